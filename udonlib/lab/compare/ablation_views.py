"""What is seen of a grid: its plan, its progress, and its results as tables and figures."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np
import plotly.graph_objects as go
from IPython.display import display

from udonlib.lab.compare.ablations import GridTables, by_domain, by_group, summary
from udonlib.lab.compare.many import curves
from udonlib.lab.compare.many.curves import N_GROUPS, run_curves
from udonlib.lab.compare.many.titles import in_short
from udonlib.lab.views.charts import add_shares, cell, dots, error_bars, f32, marker, nothing, panels, shares_of
from udonlib.lab.views.live import Output, has_front_end
from udonlib.lab.views.style import ACCENT, TEXT
from udonlib.lab.views.tables import BARE, Table, as_html, bar, facts_table, html_rows, lines_table
from udonlib.runs.grid import Grid, Progress, State
from udonlib.runs.watch import duration

SIGNS = {"finished": "✓", "running": "▶", "waiting": "·", "failed": "✗"}
UNSURE = "#a8a8a8"  # what is sure has the accent's colour; told apart by filled and open markers, too
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
        changes = [f"{name}: {in_short(value)}" for name, value in job.values.items() if name not in local]
        mark = " (baseline)" if row == grid.baseline else ""
        facts[f"row {row}"] = (", ".join(changes) or "the base as it is") + mark
    return facts_table(facts)


def train(grid: Grid, live: bool | None = None) -> Table:
    """Train what is missing and say where each run stands; where a person looks, only if they said yes to the plan.

    Args:
        live: whether a person looks at the cell; None: as `live.has_front_end` says.
    """
    asked, left = grid.params.train, sum(job.run.status != "finished" for job in grid.jobs.values())
    looks = has_front_end() if live is None else live
    if asked == "yes" or (asked == "auto" and not looks):
        show(grid.run(), live)
    elif left:
        text = (
            f"{left} runs of the plan above are not finished, and nothing was started. To train them, set "
            '`train = "yes"` in the parameters cell and run the notebook again; below is what is finished.'
        )
        display(Table(f"<p>{as_html(text)}</p>", text))
    return status_table(grid)


def curves_chart(grid: Grid) -> go.Figure:
    """Draw how the rows learned, the mean of the seeds as a line, their range as a band; unfinished runs are in it."""
    rows = {
        row: [run_curves(job.run) for jobs in seeds.values() for job in jobs if len(jobs) == 1 and job.step()]
        for row, seeds in grid.rows.items()
    }
    drawn = {row: tables for row, tables in rows.items() if tables}
    kept = dict([*drawn.items()][:N_GROUPS])
    return curves.curves_chart(kept, len(drawn) - len(kept))


def show(progress: Iterable[Progress], live: bool | None = None, clock: Callable[[], float] = time.monotonic) -> None:
    """Run through a grid and show where it stands: one cell that redraws itself, or plain lines.

    Args:
        progress: of `Grid.run()`; taking it is what runs.
        live: redraw one cell (True) or print lines (False); None: as `live.has_front_end` says.
        clock: seconds; for tests.
    """
    output, last = Output(live, clock), None
    seen: dict[str, str] = {}
    try:
        for last in progress:
            changed = [state for state in last.states if seen.get(state.label) != state.status]
            news = [said for state in changed if (said := _news(state, known=state.label in seen))]
            seen |= {state.label: state.status for state in last.states}
            if output.is_due() or (news and not output.live):
                output.show(line(last), page(last), news)
    finally:
        if isinstance(progress, Generator):
            progress.close()  # an interrupt may come while we draw: stop the runs all the same
        if output.live and last is not None:
            output.show(line(last), page(last))


def line(progress: Progress) -> str:
    """The state in one line: 3 of 12 finished, 8 waiting; running no_kl-s1 400/2000  12:05 left."""
    running = [f"{state.label} {state.step}/{state.steps}" for state in progress.states if state.status == "running"]
    counts = [f"{progress.count('finished')} of {len(progress.states)} finished"]
    counts += [f"{n} {status}" for status in ("failed", "waiting") if (n := progress.count(status))]
    text = ", ".join(counts) + (f"; running {', '.join(running)}" if running else "")
    return f"{text}  {_time_left(progress)}".rstrip()


def page(progress: Progress) -> str:
    """The state as HTML: a line for each run, with a bar of its steps; text takes the page's colour."""
    rows = html_rows(map(_state_cells, progress.states), side="left")
    title = html.escape(line(progress))
    return (
        '<div class="udon-grid" style="font-size:13px;font-variant-numeric:tabular-nums">'
        f"<b>{title}</b><table {BARE}>{rows}</table></div>"
    )


def status_table(grid: Grid) -> Table:
    """Tabulate every run: its status, its steps, and of one that failed the message and the log."""
    lines = []
    for state in grid.progress().states:
        steps = f"{state.step:,} / {state.steps:,}"
        lines.append([state.label, f"{SIGNS[state.status]} {state.status}", steps, state.run, _reason(state)])
    return lines_table(["run", "status", "steps", "folder", ""], lines, side="left")


def results_table(tables: GridTables) -> Table:
    """Tabulate each row's means with their differences to the baseline, and its cost. Bold differences exclude zero."""
    return lines_table(*summary(tables))


def domain_table(tables: GridTables, metric: str = "r_at_1", differences: bool = False) -> Table:
    """Tabulate a metric by domain, or its differences to the baseline (bold where they exclude zero)."""
    return lines_table(*by_domain(tables, metric, differences))


def group_table(tables: GridTables) -> Table:
    """Tabulate R@1 by how much like a query there was to learn from, with the differences to the baseline."""
    return lines_table(*by_group(tables))


def difference_chart(tables: GridTables) -> go.Figure:
    """Draw each row's difference to the baseline with its 95% interval; a filled marker's interval excludes zero."""
    means = tables.differences[tables.differences["domain"] == "mean"]
    if means.empty:
        why = f"nothing to compare: no other row shares a finished seed with {tables.baseline}"
        return nothing("Difference to the baseline", why)
    rows, metrics = list(dict.fromkeys(means["row"])), tables.metrics
    title = f"Difference to {tables.baseline}, mean of the domains, 95%"
    height = 190 + 26 * len(rows)
    fig = panels(title, list(metrics.values()), 1, len(metrics), height, shared_yaxes=True, horizontal_spacing=0.1)
    for column, metric in enumerate(metrics, 1):
        for sure in (True, False):
            part = means[(means["metric"] == metric) & (means["excludes_zero"].astype(bool) == sure)]
            colour, symbol = (ACCENT, "circle") if sure else (UNSURE, "circle-open")
            name = "interval excludes zero" if sure else "interval holds zero"
            looks, hover = marker(colour, symbol, 11, 2), "%{y}: %{x:+.2f}"
            trace = dots(name, f32(part["mean"]), part["row"], looks, hover, legend=column == 1)
            trace.update(error_x=error_bars(part, colour=colour, thickness=2, width=5))
            fig.add_trace(trace, row=1, col=column)
        fig.add_vline(x=0, line={"color": TEXT, "width": 1, "dash": "dash"}, row=1, col=column)
    fig.update_yaxes(categoryorder="array", categoryarray=rows[::-1], range=[-0.6, len(rows) - 0.4])
    fig.update_xaxes(title="percentage points")
    legend = {"orientation": "h", "x": 0, "y": -75 / (26 * len(rows) + 45), "yanchor": "top"}
    return fig.update_layout(hovermode="closest", legend=legend)


def allocation_charts(tables: GridTables) -> go.Figure:
    """Draw the share of steps that each domain gets over the steps, one panel a row of the grid: means over seeds."""
    rows = list(dict.fromkeys(tables.allocation["row"]))
    n_rows, n_columns = max(1, -(-len(rows) // N_COLUMNS)), min(N_COLUMNS, max(1, len(rows)))
    shared: dict[str, Any] = {"shared_xaxes": "all", "shared_yaxes": "all"}
    shared |= {"horizontal_spacing": 0.03, "vertical_spacing": 0.35 / n_rows if n_rows > 1 else 0}
    fig = panels("Allocation", rows, n_rows, n_columns, 150 + 170 * n_rows, **shared)
    for place, row in enumerate(rows):
        where = cell(place, N_COLUMNS)
        of_row = tables.allocation[tables.allocation["row"] == row]
        means = of_row.groupby(["domain", "step"], sort=False)["share"].mean().astype(float).reset_index()
        # The last window has no end of its own here: it lasts as long as the one before it.
        steps = np.unique(means["step"])
        end = int(steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1))
        add_shares(fig, shares_of(means), end, legend=place == 0, **where)
        lowest = place + N_COLUMNS >= len(rows)
        fig.update_xaxes(title="step" if lowest else None, showticklabels=True, nticks=4, **where)
    fig.update_yaxes(title="share of steps, %", col=1)
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


def _state_cells(state: State) -> list[str]:
    share = state.step / state.steps if state.steps else float(state.status == "finished")
    cells = [html.escape(state.label), f"{SIGNS[state.status]} {state.status}", bar(share, "160px")]
    return [*cells, f"{state.step:,}/{state.steps:,}", html.escape(_reason(state))]
