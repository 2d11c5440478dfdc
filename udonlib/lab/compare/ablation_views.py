"""What is seen of a grid: its plan, its progress, and its results as tables and figures."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from IPython.display import HTML, display
from plotly.subplots import make_subplots

from udonlib.lab.compare.ablations import GridTables, by_domain, summary
from udonlib.lab.views.live import LINE_SECONDS, REDRAW_SECONDS, has_front_end
from udonlib.lab.views.sheets import Table, facts_table
from udonlib.lab.views.style import GRID, TEMPLATE, TEXT, domain_colours
from udonlib.runs.grid import Grid, Progress, State
from udonlib.runs.watch import duration

SIGNS = {"finished": "✓", "running": "▶", "waiting": "·", "failed": "✗"}
SURE, UNSURE = "#008b8b", "#a8a8a8"  # told apart by filled and open markers, too
CELL = 'style="text-align: {}; padding: 2px 7px; white-space: {}"'
N_COLUMNS = 4  # of small multiples


def plan_table(grid: Grid) -> Table:
    """Tabulate what will run: the rows and what each changes, how many runs are left, where results go."""
    p, left = grid.params, [job for job in grid.jobs.values() if job.run.status != "finished"]
    local = {"preset", "seed", "data", "images", "domains", "outputs", "device", "n_threads"}
    facts = {
        "base": p.base + (f", {p.steps:,} steps" if p.steps else ""),
        "domains": ", ".join(grid.domains),
        "seeds": ", ".join(map(str, p.seeds)),
        "runs": f"{len(grid.jobs)} different ones, {len(left)} of them not finished yet",
        "at a time": f"{p.jobs}, {next(iter(grid.jobs.values())).values['n_threads']} threads each",
        "results": str(grid.folder),
    }
    for row, seeds in grid.rows.items():
        job = next(iter(seeds.values()))[0]
        changes = [f"{name}: {value}" for name, value in job.values.items() if name not in local]
        mark = " (baseline)" if row == grid.baseline else ""
        facts[f"row {row}"] = (", ".join(changes) or "the base as it is") + mark
    return facts_table(facts)


def show(progress: Iterable[Progress], live: bool | None = None, clock: Callable[[], float] = time.monotonic) -> None:
    """Run through a grid and show where it stands: one cell that redraws itself, or plain lines.

    Args:
        progress: of `Grid.run()`; taking it is what runs.
        live: redraw one cell (True) or print lines (False); None: as `live.has_front_end` says.
        clock: seconds; for tests.
    """
    cell = display(HTML(""), display_id=True) if (has_front_end() if live is None else live) else None
    began = clock()
    next_time, printed, last = -math.inf, "", None
    seen: dict[str, str] = {}
    try:
        for last in progress:
            now = clock()
            if cell is not None:
                if now >= next_time:
                    cell.update(HTML(page(last)))
                    next_time = now + REDRAW_SECONDS
                continue
            changed = [state for state in last.states if seen.get(state.label) != state.status]
            news = [said for state in changed if (said := _news(state, known=state.label in seen))]
            seen |= {state.label: state.status for state in last.states}
            if news or (now >= next_time and line(last) != printed):
                printed = line(last)
                print(*news, printed, sep="\n", flush=True)
                next_time = now + max(LINE_SECONDS, (now - began) / 50)
    finally:
        if isinstance(progress, Generator):
            progress.close()  # an interrupt may come while we draw: stop the runs all the same
        if cell is not None and last is not None:
            cell.update(HTML(page(last)))


def line(progress: Progress) -> str:
    """The state in one line: 3 of 12 finished, 8 waiting; running no_kl-s1 400/2000  12:05 left."""
    running = [f"{state.label} {state.step}/{state.steps}" for state in progress.states if state.status == "running"]
    counts = [f"{progress.count('finished')} of {len(progress.states)} finished"]
    counts += [f"{n} {status}" for status in ("failed", "waiting") if (n := progress.count(status))]
    text = ", ".join(counts) + (f"; running {', '.join(running)}" if running else "")
    return f"{text}  {_time_left(progress)}".rstrip()


def page(progress: Progress) -> str:
    """The state as HTML: a line for each run, with a bar of its steps; text takes the page's colour."""
    rows = "".join(_state_row(state) for state in progress.states)
    title = html.escape(line(progress))
    return (
        '<div class="udon-grid" style="font-size:13px;font-variant-numeric:tabular-nums">'
        f'<b>{title}</b><table style="border-collapse:collapse;color:inherit;font:inherit">{rows}</table></div>'
    )


def status_table(grid: Grid) -> Table:
    """Tabulate every run: its status, its steps, and of one that failed the message and the log."""
    lines = []
    for state in grid.progress().states:
        steps = f"{state.step:,} / {state.steps:,}"
        lines.append([state.label, f"{SIGNS[state.status]} {state.status}", steps, state.run, _reason(state)])
    return plain_table(["run", "status", "steps", "folder", ""], lines, side="left")


def results_table(tables: GridTables) -> Table:
    """Tabulate each row's means with their differences to the baseline, and its cost. Bold differences exclude zero."""
    return plain_table(*summary(tables))


def domain_table(tables: GridTables, metric: str = "r_at_1", differences: bool = False) -> Table:
    """Tabulate a metric by domain, or its differences to the baseline (bold where they exclude zero)."""
    return plain_table(*by_domain(tables, metric, differences))


def difference_chart(tables: GridTables) -> go.Figure:
    """Draw each row's difference to the baseline with its 95% interval; a filled marker's interval excludes zero."""
    means = tables.differences[tables.differences["domain"] == "mean"]
    if means.empty:
        fig = go.Figure().update_layout(template=TEMPLATE, title="Difference to the baseline", height=200)
        text = f"nothing to compare: no other row shares a finished seed with {tables.baseline}"
        return fig.add_annotation(text=text, showarrow=False).update_xaxes(visible=False).update_yaxes(visible=False)
    rows, metrics = list(dict.fromkeys(means["row"])), tables.metrics
    fig = make_subplots(1, len(metrics), subplot_titles=list(metrics.values()), shared_yaxes=True)
    for column, metric in enumerate(metrics, 1):
        for sure in (True, False):
            part = means[(means["metric"] == metric) & (means["excludes_zero"].astype(bool) == sure)]
            colour = SURE if sure else UNSURE
            marker: dict[str, Any] = {"size": 11, "symbol": "circle" if sure else "circle-open", "color": colour}
            marker["line"] = {"width": 2, "color": colour}
            value = part["mean"].to_numpy(np.float32)
            bars = {"array": part["high"].to_numpy(np.float32) - value, "color": colour, "thickness": 2, "width": 5}
            bars["arrayminus"] = value - part["low"].to_numpy(np.float32)
            name = "interval excludes zero" if sure else "interval holds zero"
            trace = go.Scatter(x=value, y=part["row"], mode="markers", marker=marker, error_x=bars, name=name)
            trace.update(legendgroup=name, showlegend=column == 1, hovertemplate="%{y}: %{x:+.2f}")
            fig.add_trace(trace, row=1, col=column)
        fig.add_vline(x=0, line={"color": TEXT, "width": 1, "dash": "dash"}, row=1, col=column)
    fig.update_annotations(font_size=13)
    fig.update_yaxes(categoryorder="array", categoryarray=rows[::-1], range=[-0.6, len(rows) - 0.4])
    fig.update_xaxes(title="percentage points")
    title = f"Difference to {tables.baseline}, mean of the domains, 95%"
    fig.update_layout(template=TEMPLATE, title=title, height=190 + 26 * len(rows), hovermode="closest")
    return fig.update_layout(legend={"orientation": "h", "x": 0, "y": -75 / (26 * len(rows) + 45), "yanchor": "top"})


def allocation_charts(tables: GridTables) -> go.Figure:
    """Draw the share of steps that each domain gets over the steps, one panel a row of the grid: means over seeds."""
    found = tables.allocation
    rows = list(dict.fromkeys(found["row"]))
    n_rows = max(1, -(-len(rows) // N_COLUMNS))
    height = 150 + 170 * n_rows
    fig = make_subplots(
        n_rows,
        min(N_COLUMNS, max(1, len(rows))),
        subplot_titles=rows,
        shared_xaxes="all",
        shared_yaxes="all",
        horizontal_spacing=0.03,
        vertical_spacing=0.35 / n_rows if n_rows > 1 else 0,
    )
    colours = domain_colours(found["domain"])
    for place, row in enumerate(rows):
        where = {"row": place // N_COLUMNS + 1, "col": place % N_COLUMNS + 1}
        shares = found[found["row"] == row].groupby(["domain", "step"], sort=False)["share"].mean()
        for domain in shares.index.unique(level="domain"):
            curve = 100 * shares[domain].sort_index().astype(float)
            # The last window has no end of its own here: it lasts as long as the one before it.
            steps = curve.index.to_numpy()
            end = steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)
            area = go.Scatter(
                x=np.asarray([*steps, end], np.int32),
                y=np.asarray([*curve, curve.iloc[-1]], np.float32),
                name=domain,
                legendgroup=domain,
                showlegend=place == 0,
                mode="lines",
                stackgroup="share",
                fillcolor=colours[domain],
                line={"color": colours[domain], "width": 0.5, "shape": "hv"},
                hovertemplate="%{y:.1f} %",
            )
            fig.add_trace(area, **where)
        lowest = place + N_COLUMNS >= len(rows)
        fig.update_xaxes(title="step" if lowest else None, showticklabels=True, nticks=4, **where)
    fig.update_yaxes(range=[0, 100])
    fig.update_yaxes(title="share of steps, %", col=1)
    fig.update_annotations(font_size=13)
    fig.update_layout(template=TEMPLATE, title="Allocation", height=height, hovermode="x unified")
    return fig.update_layout(legend_traceorder="reversed")


def _news(state: State, known: bool) -> str:
    """What is worth a line of its own: a run that has ended since we look, or that has failed."""
    if state.status == "failed":
        return f"{state.label} failed: {_reason(state)}"
    return f"{state.label} finished" if state.status == "finished" and known else ""


def _reason(state: State) -> str:
    return state.message + (f" (log: {state.log})" if state.log else "")


def _time_left(progress: Progress) -> str:
    if progress.count("running") + progress.count("waiting") == 0:
        return ""
    return "estimating the time" if progress.seconds_left is None else f"{duration(progress.seconds_left)} left"


def _state_row(state: State) -> str:
    share = state.step / state.steps if state.steps else float(state.status == "finished")
    bar = f'<div style="width:{share:.0%};height:8px;border-radius:4px;background:{SURE}"></div>'
    bar = f'<div style="width:160px;background:{GRID};border-radius:4px">{bar}</div>'
    cells = [
        html.escape(state.label),
        f"{SIGNS[state.status]} {state.status}",
        bar,
        f"{state.step:,}/{state.steps:,}",
        html.escape(_reason(state)),
    ]
    return "<tr>" + "".join(f"<td {CELL.format('left', 'nowrap')}>{cell}</td>" for cell in cells) + "</tr>"


def plain_table(head: list[str], lines: list[list[str]], side: str = "right") -> Table:
    """Format texts as a table whose first column names the row and whose others stand on a side; **text** is bold."""

    def row(cells: list[str], tag: str) -> str:
        shown = [html.escape(cell) for cell in cells]
        shown = [f"<b>{cell[2:-2]}</b>" if cell.startswith("**") else cell for cell in shown]
        sides = ["left"] + [side] * (len(cells) - 1)
        wrap = "normal" if tag == "th" else "nowrap"
        made = (f"<{tag} {CELL.format(where, wrap)}>{cell}</{tag}>" for where, cell in zip(sides, shown, strict=True))
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(row(cells, "td") for cells in lines)
    table = f'<table class="dataframe"><thead>{row(head, "th")}</thead><tbody>{body}</tbody></table>'
    plain = pd.DataFrame([[cell.replace("**", "") for cell in cells] for cells in lines], columns=head)
    return Table(f'<div style="overflow-x: auto">{table}</div>', plain.to_string(index=False))
