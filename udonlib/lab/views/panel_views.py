"""What the steering panel shows: a run's state, losses and allocation as HTML and SVG. A redraw is about 20 KB."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence

import numpy as np

from udonlib.lab.views.style import domain_colours, square
from udonlib.lab.views.tables import Frame, Table, bar, html_rows, share_bar
from udonlib.runs.folder import RunFolder
from udonlib.runs.watch import Progress, duration

FRAME = Frame(520, 190, left=44, bottom=34, top=22, right=8)  # of a chart


def status(progress: Progress, name: str, text: str, notes: Sequence[str], timed: bool = True) -> str:
    """The head of the panel: the run, a bar of its steps, what is going on, and notes below.

    Args:
        progress: from the run's records.
        name: of the run.
        text: what `RunState` says of it.
        notes: sentences for the person, plain text.
        timed: say how long it still takes; it is said once on a page.
    """
    total = progress.params.steps
    left = progress.seconds_left()
    facts = [f"{text}, validating the model" if progress.is_validating else text]
    if timed and progress.state == "running" and left is not None:
        facts.append(f"about {duration(left)} left")
    if not math.isnan(progress.images_per_s):
        facts.append(f"{progress.images_per_s:,.0f} images/s")
    if not math.isnan(progress.best[1]):
        facts.append(f"best validation R@1 {progress.best[1]:.1f} % at step {progress.best[0]:,}")
    share = min(1.0, progress.step / total) if total else 1.0
    lines = "".join(f"<div>{html.escape(note)}</div>" for note in notes)
    return (
        '<div style="line-height:1.5;font-size:13px;font-variant-numeric:tabular-nums">'
        f"<b>{html.escape(name)}</b> &nbsp; {' &nbsp;·&nbsp; '.join(map(html.escape, facts))}"
        f"{bar(share, margin='6px 0')}"
        f'<div class="udon-notes">{lines}</div></div>'
    )


def headings(columns: Sequence[str]) -> str:
    """The line above the domains' numbers; `columns` as in `numbers`."""
    wrapped = "white-space:normal;line-height:1.2;display:inline-block;font-size:11px"
    return _cells([f'<span style="{wrapped}">{html.escape(column)}</span>' for column in columns])


COLUMNS = ("adaptive weight", "share", "teacher loss", "student loss", "images seen", "R@1, %")


def numbers(progress: Progress, domain: str) -> str:
    """What a domain is doing, beside its slider: the values of COLUMNS."""
    colour = domain_colours(progress.domains or [domain]).get(domain, "currentColor")
    share = progress.shares.get(domain)
    largest = max(progress.shares.values(), default=0) or 1
    terms = progress.terms.get(domain, {})
    curve = progress.r_at_1.get(domain)
    shown = "–"
    if share is not None:
        text = f'<span style="display:inline-block;width:46px">{share:.1%}</span>'
        shown = share_bar(share / largest, 34, colour) + text
    return _cells(
        [
            f"{progress.weights[domain]:.1%}" if domain in progress.weights else "–",
            shown,
            f"{terms['ce_teacher']:.2f}" if "ce_teacher" in terms else "–",
            f"{terms['ce_student']:.2f}" if "ce_student" in terms else "–",
            f"{progress.images_seen.get(domain, 0):,}",
            f'<span title="validated after step {curve[-1][0]:,}">{curve[-1][1]:.1f}</span>' if curve else "–",
        ]
    )


TAUGHT_COLUMNS = ("weight", "images kept", "class loss", "patch loss")


def taught_numbers(progress: Progress, teacher: str) -> str:
    """What the student is to a frozen teacher, beside its slider: the values of TAUGHT_COLUMNS."""
    weight = progress.params.teachers[teacher].weight * progress.wish.teachers.get(teacher, 1.0)
    last = {kind: progress.taught.get(f"{teacher}/{kind}", [])[-1:] for kind in ("kept", "class", "patches")}
    kept, *losses = [curve[0][1] if curve else None for curve in last.values()]
    shown = "–"
    if kept is not None:
        text = f'<span style="display:inline-block;width:46px">{kept:.1%}</span>'
        shown = share_bar(kept, 34, "currentColor") + text
    return _cells([f"{weight:.3g}", shown, *("–" if loss is None else f"{loss:.3f}" for loss in losses)])


def drop_text(progress: Progress) -> str:
    """What the probability in force is of."""
    asked = progress.wish.drop_probability
    share = progress.params.drop_probability if asked is None else asked
    look = f"font-size:12px;white-space:nowrap;box-sizing:border-box;padding-left:12px;width:{sum(WIDTHS)}px"
    return f'<div style="{look}">{100 * share:g}% of an image\'s teachers but the farthest</div>'


def rate_text(progress: Progress) -> str:
    """The learning rate of the heads in the step that was recorded last."""
    look = f"font-size:12px;white-space:nowrap;box-sizing:border-box;padding-left:12px;width:{sum(WIDTHS)}px"
    now = "" if math.isnan(progress.learning_rate) else f"{progress.learning_rate:.2g} for the heads"
    return f'<div style="{look}">{now}</div>'


WIDTHS = (48, 92, 46, 48, 58, 36)  # pixels


def _cells(texts: Sequence[str]) -> str:
    style = "display:inline-block;text-align:right;white-space:nowrap;width:{}px"
    filled = [*texts, *[""] * (len(WIDTHS) - len(texts))]  # as wide whatever is said
    cells = "".join(
        f'<span style="{style.format(width)}">{text}</span>' for width, text in zip(WIDTHS, filled, strict=True)
    )
    return f'<div style="font-size:12px;font-variant-numeric:tabular-nums;white-space:nowrap">{cells}</div>'


def page(progress: Progress, head: str) -> str:
    """The panel without its controls: what a saved notebook keeps. `head` is of `status`."""
    colours = domain_colours(progress.domains)
    rows = [["", headings(COLUMNS)]]
    rows += [[square(colour, domain), numbers(progress, domain)] for domain, colour in colours.items()]
    look = "padding: 0 12px 0 0; white-space: nowrap"
    if progress.params.teachers:
        rows += [["", headings(TAUGHT_COLUMNS)]]
        rows += [[html.escape(name), taught_numbers(progress, name)] for name in sorted(progress.params.teachers)]
        rows += [["dropped", drop_text(progress)]]
    rows += [["learning rate", rate_text(progress)]]
    table = f'<table style="font-size:13px;margin:0 0 8px">{html_rows(rows, look=look)}</table>'
    return f'<div class="udon-panel">{head}{table}{charts(progress) if progress.allocations else ""}</div>'


def charts(progress: Progress) -> str:
    """The losses and the allocation over the steps, side by side, with a mark at what a person did to the result."""
    return f'<div style="display:flex;flex-wrap:wrap;gap:12px">{loss_chart(progress)}{allocation_chart(progress)}</div>'


def loss_chart(progress: Progress) -> str:
    """The total loss of each domain over the steps."""
    curves = {name: curve for name, curve in progress.losses.items() if curve}
    high = _round_up(max((value for curve in curves.values() for _, value in curve), default=1.0))
    colours, end = domain_colours(progress.domains), _end(progress)
    lines = (FRAME.line(((x / end, y / high) for x, y in curve), colours[name]) for name, curve in curves.items())
    return _chart("total loss", "".join(lines), progress, [(y, f"{y * high:g}") for y in (0.0, 0.5, 1.0)])


def allocation_chart(progress: Progress) -> str:
    """The shares of steps as stacked areas; what has not been trained yet shows what is in force."""
    colours, allocations = domain_colours(progress.domains), _spread(progress)
    steps = [step for step, _ in allocations]
    ends = np.array([*steps, max([progress.step, *steps[-1:]])]) / _end(progress)
    shares = np.array([[shares.get(name, 0.0) for name in colours] for _, shares in allocations])
    areas = FRAME.areas(ends, shares, [(colour, name) for name, colour in colours.items()])
    return _chart("share of steps", areas, progress, [(y, f"{y:.0%}") for y in (0.0, 0.5, 1.0)])


def _spread(progress: Progress) -> list[tuple[int, dict[str, float]]]:
    """The allocations that can be told apart in the chart: a pixel apart, or made by an intervention."""
    apart, marked = _end(progress) / FRAME.width, {entry.step for entry in progress.interventions if entry.steers}
    kept: list[tuple[int, dict[str, float]]] = []
    for step, shares in progress.allocations:
        if not kept or step - kept[-1][0] >= apart or step in marked:
            kept.append((step, shares))
    return kept


def _marks(progress: Progress) -> str:
    marks = []
    for entry in progress.interventions:
        if not entry.matters:
            continue
        x = FRAME.x(entry.step / _end(progress))
        title = f"<title>step {entry.step:,}: {html.escape(str(entry))}</title>"
        line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{FRAME.y(1)}" y2="{FRAME.y(0)}" stroke="currentColor" '
        marks.append(
            f'{line}stroke-dasharray="2 3"/><path d="M{x - 5:.1f} {FRAME.top - 8}h10l-5 8z" fill="currentColor">'
        )
        marks.append(f"{title}</path>")
    return "".join(marks)


def _chart(title: str, content: str, progress: Progress, heights: Sequence[tuple[float, str]]) -> str:
    """A chart over the steps, with the marks of what a person did."""
    end = _end(progress)
    places = [(round(part * end) / end, f"{round(part * end):,}") for part in (0.0, 0.5, 1.0)]
    style = f"width:100%;max-width:{FRAME.width}px;min-width:320px;flex:1 1 320px"
    return FRAME.drawn(content + _marks(progress), heights, places, style, title, "step")


def _end(progress: Progress) -> int:
    """The last step of the axis: of the run, or while it is young, not far beyond now."""
    near = _round_up(max(20.0, 1.5 * progress.step))
    return max(1, min(progress.params.steps, round(near)))


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... above a value."""
    unit = 10.0 ** math.floor(math.log10(max(value, 1e-6)))
    return next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= value)


def report(run: RunFolder) -> Table:
    """Say whether a person had a hand in the run's result, which has to say so, and list what was done."""
    done = run.interventions()
    if not done:
        return Table("<p>Nobody steered this run.</p>", "Nobody steered this run.")
    name = html.escape(run.params.replay or run.path.name)
    text = "Nobody steered this run: its figures do not depend on what was asked of it."
    if any(entry.matters for entry in done):
        how = "steered" if any(entry.steers for entry in done) else "validated"
        how = "finished before its last step" if any(entry.finish for entry in done) else how
        which = f"This run was {how} by hand"
        which = f"This run repeats what a person did to {name}" if run.params.replay else which
        text = (
            f"<b>{which}</b>: its figures are not those of its parameters alone. The parameter "
            f"<code>replay = {name}</code> of train.ipynb repeats it, step by step."
        )
    head = html_rows([["after step", "what was done", "by"]], "th", "th", "left")
    rows = ([f"{entry.step:,}", html.escape(str(entry)), html.escape(entry.panel)] for entry in done)
    table = f"<table>{head}{html_rows(rows, side='left', name_side='right')}</table>"
    plain = [f"after step {entry.step:,}: {entry}" for entry in done]
    return Table(f"<p>{text}</p>{table}", "\n".join([html.unescape(re.sub(r"<.*?>", "", text)), *plain]))
