"""All runs as one HTML table that sorts by a click on a header and filters by text, with no library and no widget.

The same few lines of JavaScript serve three places: a notebook's output, an exported page, and the live table of
`runs_page`, which also lets a person choose two runs. Where scripts do not run the table stands as it was sorted.
"""

from __future__ import annotations

import html
import importlib.resources
import json
import math
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from udonlib.files import working_folder
from udonlib.lab.compare.many import titles
from udonlib.lab.compare.overview import UNREADABLE, RunRow
from udonlib.lab.views.style import ACCENT, GRID
from udonlib.lab.views.tables import Table, as_html, figure
from udonlib.runs.watch import duration

SIGNS = {"finished": "✓", "training": "▶", "paused": "‖", "stopped": "■", "failed": "✗", "lost": "✗", "new": "·"}
SIGNS |= {UNREADABLE: "!"}
# Key -> title, what it says, whether it sorts as a number. Numbers sort downwards first, what is missing goes last.
COLUMNS = {
    "run": ("run", "what tells it from the others; below, its folder under runs/", False),
    "else": ("what else, notes", "what the title does not say of its parameters; tags and a note of yours", False),
    "r_at_1": ("R@1, %", "test queries, merged index, mean of the domains; ± half the 95% interval", True),
    "mmp": ("mMP@5, %", "the same; where a run has another k, it says so", True),
    "state": ("state", "what is going on with it", False),
    "step": ("steps", "done / asked for", True),
    "ended": ("ended", "or its last record", True),
    "validation": ("val. R@1, %", "the best on the validation queries", True),
    "recipe": ("recipe", "", False),
    "seed": ("seed", "", True),
    "data": ("data", "with its domains where they are not all", False),
    "train_seconds": ("trained for", "hours:minutes:seconds", True),
    "images_per_s": ("images/s", "trained per second", True),
    "n_parameters_trained": ("parameters", "trained", True),
    "began": ("started", "", True),
}
LEFT = ("run", "else", "state", "recipe", "data")
# Columns that show only with `all columns`, and those that go as well where the page is narrow, the last ones first.
MORE = tuple(COLUMNS)[7:]
NARROW = ("ended", "step", "state", "mmp")
N_CHANGES = 4  # shown of each run besides those of its title; the comparison of two shows all
N_OPEN = 8  # runs that are listed as unfinished


def asset(name: str) -> str:
    """A file of this folder: JavaScript or CSS."""
    return importlib.resources.files(__package__).joinpath(name).read_text("utf-8")


STYLE = f"""<style>
.udon-runs, .udon-runs-open {{ --udon-grid: {GRID}; --udon-accent: {ACCENT}; }}
{asset("runs_table.css")}</style>"""


def static_table(rows: Sequence[RunRow], home: Path, chosen: tuple[str, str] | None = None) -> Table:
    """The table for a notebook's output or an exported page, with its script; the two chosen runs are marked."""
    if not rows:
        return Table(empty(home), f"No runs yet in {home}: run notebooks/train.ipynb.")
    marks = dict(zip("AB", chosen or (), strict=False))
    body = "".join(row_html(row, marks=[letter for letter, name in marks.items() if name == row.run]) for row in rows)
    script = f"<script>(() => {{\n{asset('runs_table.js')}{asset('runs_start.js')}}})();</script>"
    lines = [
        f"{row.run}  {row.title}  {row.state}  R@1 {figure(row.r_at_1)}  {row.problem}".rstrip()
        for row in rows
        if not row.note.archived
    ]
    return Table(skeleton(body) + script, "\n".join(lines))


def skeleton(body: str, picks: bool = False) -> str:
    """Filter, switches and headers around the rows' HTML; sorted by R@1. picks: with a column to choose A and B in."""
    titles = []
    for key, (title, says, number) in COLUMNS.items():
        sort = "descending" if key == "r_at_1" else "none"
        button = f'<button type="button" class="udon-runs-sort udon-runs-sort-{key}">{html.escape(title)}</button>'
        kind = " data-number" * number
        looks = f'scope="col" class="{_looks(key)}"{kind} aria-sort="{sort}" title="{html.escape(says)}"'
        titles.append(f"<th {looks}>{button}</th>")
    if picks:
        titles.insert(0, '<th scope="col" class="udon-runs-pick" title="the two runs to compare">A B</th>')
    return (
        f'{STYLE}<div class="udon-runs"><div class="udon-runs-bar">'
        '<input type="search" class="udon-runs-filter" aria-label="filter the runs" '
        'placeholder="filter: words that a row has"><span class="udon-runs-count" role="status"></span>'
        f"{_switch('columns', 'all columns')}{_switch('archived', 'archived runs')}</div>"
        '<div class="udon-runs-scroll" role="region" aria-label="runs" tabindex="0">'
        f'<table class="udon-runs-table"><thead><tr>{"".join(titles)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></div>"
    )


def _switch(name: str, text: str) -> str:
    return f'<label class="udon-runs-switch"><input type="checkbox" class="udon-runs-show-{name}">{text}</label>'


def _looks(key: str) -> str:
    """The classes of a column's cells."""
    place = NARROW.index(key) + 1 if key in NARROW else 0
    kinds = {"udon-runs-left": key in LEFT, "udon-runs-name": key == "run", "udon-runs-more": key in MORE}
    kinds |= {f"udon-runs-narrow{place}": bool(place), f"udon-runs-{key}": True}
    return " ".join(kind for kind, has in kinds.items() if has)


def row_html(row: RunRow, marks: Sequence[str] = (), picks: bool = False) -> str:
    """One line of the table. marks: letters before the name. picks: with two buttons to choose it, and an editor."""
    values = {key: getattr(row, key) for key in COLUMNS if key != "else"}
    values |= {"else": _else(row, None), "run": f"{row.title or row.run} {row.run}"}
    cells = [_picks(row.run)] if picks else []
    for key, shown in _cells(row, picks).items():
        kind = f'class="{_looks(key)}"'
        sort = f'data-v="{html.escape(_sort_value(values[key]))}"'
        if key == "run":
            letters = "".join(f"<b>{letter}</b> " for letter in marks)
            says = html.escape(f"{row.title}: {row.run}".removeprefix(": "))
            cells.append(f'<th scope="row" {kind} {sort} title="{says}">{letters}{shown}</th>')
        else:
            title = f' title="{html.escape(row.problem or row.text)}"' if key == "state" else ""
            cells.append(f"<td {kind} {sort}{title}>{shown}</td>")
    archived = ' class="udon-runs-archived"' * row.note.archived
    return f'<tr data-run="{html.escape(row.run)}"{archived}>{"".join(cells)}</tr>'


def open_runs(rows: Sequence[RunRow], home: Path) -> Table:
    """List what trains now, what was left unfinished and what cannot be read, with what to do about each."""
    unfinished = [row for row in rows if row.going or (not row.note.archived and (row.open or row.problem))]
    unfinished.sort(key=lambda row: (not row.going, not row.open))
    if not unfinished:
        text = "Nothing is training, and nothing was left unfinished." if rows else f"No runs yet in {home}."
        return Table(f'<div class="udon-runs-open">{html.escape(text)}</div>', text)
    items, lines = [], []
    for row in unfinished[:N_OPEN]:
        says, how = _advice(row, home)
        bar = _bar(row) if row.open and row.steps else ""
        code = f"<br>{_as_code(how)}" if how else ""
        sign = SIGNS.get(row.state, "!") if not row.problem else "!"
        items.append(f"<li>{sign} {bar}<b>{html.escape(row.run)}</b>: {html.escape(says)}{code}</li>")
        lines.append(f"{sign} {row.run}: {says}" + (f"; {how}" if how else ""))
    if len(unfinished) > N_OPEN:
        items.append(f"<li>and {len(unfinished) - N_OPEN} more in the table</li>")
        lines.append(f"and {len(unfinished) - N_OPEN} more")
    style = "list-style:none;padding-left:0;margin:4px 0"
    return Table(
        f'{STYLE}<div class="udon-runs-open"><ul style="{style}">{"".join(items)}</ul></div>', "\n".join(lines)
    )


def empty(home: Path) -> str:
    """What stands where there is no run yet."""
    return (
        f'<div class="udon-runs-open"><b>No runs yet</b> in <code>{html.escape(str(home))}</code>: run '
        "<code>notebooks/train.ipynb</code> or <code>make train</code>, and they will be listed here.</div>"
    )


def _advice(row: RunRow, home: Path) -> tuple[str, str]:
    """What is to say of a run, and the command or parameter that helps."""
    if row.problem and not row.open:
        return row.problem, ""
    text = row.text + (f"; {row.problem}" if row.problem else "")
    if row.going:
        left = f", about {duration(row.seconds_left)} left" if row.seconds_left is not None else ""
        return text + left, f'to steer it, open `notebooks/steer.ipynb` with `run = "{row.run}"`'
    path = home / row.run / "params.yaml"
    here = working_folder()
    shown = path.relative_to(here) if path.is_relative_to(here) else path
    return text, f"`papermill notebooks/train.ipynb outputs/train.ipynb -f {shlex.quote(str(shown))}`"


def _as_code(text: str) -> str:
    """HTML of a text in which `...` is code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text, quote=False))


def _cells(row: RunRow, edits: bool = False) -> dict[str, str]:
    """What each column shows, as HTML."""
    steps = "–" if row.step is None else f"{row.step:,} / " + ("?" if row.steps is None else f"{row.steps:,}")
    left = f" <small>{duration(row.seconds_left)} left</small>" if row.seconds_left is not None else ""
    n_acts = row.interventions
    by_hand = f" <small>{n_acts} intervention{'s' * (n_acts > 1)}</small>" if n_acts else ""
    unsure = " <small>(in part)</small>" if row.problem and row.state != UNREADABLE else ""
    n = row.n_parameters_trained
    name = html.escape(row.run)
    shown = {
        "run": f'<span class="udon-runs-title">{html.escape(row.title)}</span><small>{name}</small>'
        if row.title
        else name,
        "else": _noted(row, edits),
        "state": f"{SIGNS.get(row.state, '·')} {html.escape(row.state)}{by_hand}{unsure}",
        "step": (_bar(row) if row.open else "") + steps + left,
        "r_at_1": as_html(figure(row.r_at_1, row.r_at_1_low, row.r_at_1_high)),
        "mmp": as_html(figure(row.mmp, row.mmp_low, row.mmp_high))
        + (f" <small>k={row.k}</small>" if row.k != 5 else ""),
        "recipe": html.escape(row.recipe) or "–",
        "seed": "–" if row.seed is None else str(row.seed),
        "data": html.escape(row.data) or "–",
        "validation": figure(row.validation),
        "train_seconds": "–" if math.isnan(row.train_seconds) else duration(row.train_seconds),
        "images_per_s": "–" if math.isnan(row.images_per_s) else f"{row.images_per_s:,.0f}",
        "n_parameters_trained": "–" if math.isnan(n) else f"{n / 1e6:.2f} M" if n >= 1e5 else f"{n / 1e3:.0f} k",
        "began": _date(row.began),
        "ended": _date(row.ended),
    }
    return {key: shown[key] for key in COLUMNS}


def _noted(row: RunRow, edits: bool) -> str:
    """What else there is to say of a run, its tags and note, and a button to write them where they can be written."""
    tags = "".join(f'<span class="udon-runs-tag">{html.escape(tag)}</span>' for tag in row.note.tags)
    note = f'<span class="udon-runs-note">{html.escape(row.note.text)}</span>' if row.note.text else ""
    says = html.escape(json.dumps({"text": row.note.text, "tags": ", ".join(row.note.tags)}))
    name = html.escape(f"note, tags, archive: {row.run}")
    button = (
        f'<button type="button" class="udon-runs-edit" aria-label="{name}" title="{name}" data-note="{says}">✎</button>'
    )
    return " ".join(filter(None, [html.escape(_else(row, N_CHANGES)), tags, note])) + button * edits


def _else(row: RunRow, n: int | None) -> str:
    """The unusual parameters of a run that its title does not name, in words; of one with a problem, the problem."""
    rest = [*titles.ablation(row.changes)[1].items()][titles.N_IN_TITLE if row.title else 0 :]
    texts = [f"{name} {titles.in_short(value)}" for name, value in rest]
    more = f" and {len(texts) - n} more" if n is not None and len(texts) > n else ""
    return "; ".join(filter(None, [row.problem, ", ".join(texts[:n]) + more]))


def _bar(row: RunRow) -> str:
    share = min(1.0, (row.step or 0) / row.steps) if row.steps else 0.0
    return f'<span class="udon-runs-track"><span style="width:{share:.1%}"></span></span>'


def _picks(run: str) -> str:
    def button(letter: str) -> str:
        says = html.escape(f"{run} as {letter}")
        return (
            f'<label><input type="radio" class="udon-runs-{letter.lower()}" aria-label="{says}" title="{says}"></label>'
        )

    return f'<td class="udon-runs-pick">{button("A")}{button("B")}</td>'


def _sort_value(value: Any) -> str:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def _date(seconds: float) -> str:
    return "–" if math.isnan(seconds) else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
