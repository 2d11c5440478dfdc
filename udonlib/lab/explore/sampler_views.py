"""What is seen of the sampler: learning curves, allocations simulated and recorded, who starves.

A domain keeps its colour; strategies and runs are told apart by symbol or dash as well as by colour.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from udonlib.errors import UserError
from udonlib.lab.explore.sampler_study import Explored, checked, labels, recorded_allocation, steering_loss, steerings
from udonlib.lab.explore.simulation import STRATEGIES, deviation, outcome, verdict
from udonlib.lab.views.charts import (
    ROW_GAP,
    add_shares,
    cell,
    dots,
    f32,
    grid,
    label_grid,
    line,
    marker,
    name_rows,
    nothing,
    panels,
    row_heights,
    thinned,
)
from udonlib.lab.views.style import EMBEDDER_LOOKS, TEXT, domain_colours
from udonlib.lab.views.tables import Table, facts_table

INKS = (*(EMBEDDER_LOOKS[name].colour for name in ("student", "teacher", "specialist", "features")), TEXT)
SYMBOLS = (
    *("circle", "square-open", "cross-thin", "diamond-open", "x-thin"),
    *("triangle-up-open", "triangle-down-open", "circle-open", "square", "diamond"),
)
# strategy -> colour and symbol
LOOKS = dict(zip(STRATEGIES, zip((*INKS, *INKS), SYMBOLS, strict=True), strict=True))
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MAX_WINDOWS = 200  # per area; more are thinned out
TICKS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)  # of losses
SMALL = '<br><span style="font-size:13px">'


def explored_table(explored: Explored) -> Table:
    """Tabulate what is looked at: where the curves come from, what is simulated, what it is held against."""
    e, s = explored, explored.setting
    sizes = ", ".join(f"{name} {n:,}" for name, n in s.sizes.items())
    if e.source:
        p, loss = e.source.params, steering_loss(e.source)
        curves = f"fitted to the {loss} loss of {e.source.path.name}: recipe {p.recipe}, {p.sampler}, {p.steps:,} steps"
    else:
        curves = "drawn from the numbers of classes and images: nothing was measured"
    changed = sorted({*e.params.start_loss, *e.params.floor_loss, *e.params.half_images})
    mixed = f"{s.domains_per_batch} domains in a batch" if s.domains_per_batch > 1 else "one domain in a batch"
    return facts_table(
        {
            "curves": curves + (f"; changed by parameters: {', '.join(changed)}" if changed else ""),
            "training images": sizes,
            "simulated": f"{s.steps:,} steps of {s.batch_size} images, {mixed}",
            "dynamic": f"updated every {s.update_every:,} steps, smoothing {s.smoothing:g}, begins with {s.initial}",
            "held against": e.check.path.name if e.check else "nothing: no dynamic run, or curves that are not its own",
            "recorded": ", ".join(labels(e.runs)) or "no runs",
        }
    )


def curve_chart(explored: Explored) -> go.Figure:
    """Draw each domain's learning curve and, where it was fitted, the losses that it was fitted to.

    A bar is a recorded mean, as wide as the images that it is a mean of; the percentage says how far bars typically lie
    from the curve.
    """
    e = explored
    notes = []
    for name, curve in e.curves.items():
        fitted = name in e.fits and e.fits[name].curve == curve
        off = f", off by {100 * e.fits[name].residual:.0f} %" if fitted else ", changed" if e.fits else ""
        notes.append(off)
    fig = grid("Learning curves" + (", fitted and measured" if e.fits else ", drawn"), e.names, notes)
    colours = domain_colours(e.names)
    end = e.setting.steps * e.setting.batch_size / len(e.names)
    for place, (name, curve) in enumerate(e.curves.items()):
        part = e.points[e.points["domain"] == name]
        x = np.linspace(0, max(part["last"].max(), 1) if len(part) else end, 120)
        if len(part):
            thin = thinned(part, MAX_WINDOWS)
            ends = np.stack([thin["first"], thin["last"], np.full(len(thin), np.nan)], axis=1).ravel()
            bars = line("measured", ends, np.repeat(thin["loss"], 3), TEXT, "measured %{y:.2f}", place == 0, 5)
            fig.add_trace(bars, **cell(place))
        fig.add_trace(line("curve", x, curve.loss(x), colours[name], "curve %{y:.2f}", False, 2.5), **cell(place))
    values = np.concatenate([*(curve.loss(np.array([0.0, end])) for curve in e.curves.values()), e.points["loss"]])
    low, high = np.log10(max(values.min(), 1e-3)) - 0.1, np.log10(values.max()) + 0.1
    fig.update_yaxes(type="log", range=[low, high], tickvals=TICKS, ticktext=[f"{tick:g}" for tick in TICKS])
    fig.update_xaxes(nticks=4, tickformat="~s", rangemode="tozero")
    label_grid(fig, len(e.names), "its images seen", "loss (log)")
    return fig.update_layout(hovermode="x")


def strategy_chart(explored: Explored) -> go.Figure:
    """Draw the allocation that each strategy would have made, as stacked areas, one panel a strategy."""
    simulations = explored.simulations
    n_columns = min(2, len(simulations))
    n_rows = -(-len(simulations) // n_columns)
    titles = [one.strategy for one in simulations]
    fig = panels("Allocation by strategy, simulated", titles, n_rows, n_columns, height=150 + 225 * n_rows)
    for place, one in enumerate(simulations):
        keep = slice(None, None, -(-len(one.starts) // MAX_WINDOWS))
        shares = {name: (one.starts[keep], one.shares[keep, d]) for d, name in enumerate(one.names)}
        add_shares(fig, shares, one.steps, place == 0, **cell(place, n_columns))
    fig.update_xaxes(range=[0, explored.setting.steps], nticks=6)
    label_grid(fig, len(simulations), "step", "share, %", n_columns)
    return fig.update_layout(legend_traceorder="reversed")


def outcome_chart(explored: Explored) -> go.Figure:
    """Draw what each domain gets from each strategy: its share of all images, passes over its own, its loss at the end.

    A ring marks a domain that starves.
    """
    sizes, order = explored.setting.sizes, explored.names
    measures = {"share": ("share of all images, %", 100), "passes": ("passes over them", 1)}
    losses = np.concatenate([outcome(one, sizes)["loss"] for one in explored.simulations])
    n_ticks = sum(bool(losses.min() <= tick <= losses.max()) for tick in TICKS)
    is_wide = n_ticks > 1  # else a logarithm would have no ticks
    measures["loss"] = ("predicted last loss" + " (log)" * is_wide, 1)
    fig = panels(
        "What each domain gets, simulated", [label for label, _ in measures.values()], 1, 3, 150 + 36 * len(order)
    )
    simulations = explored.simulations
    for place, one in enumerate(simulations):
        table = outcome(one, sizes)
        y = row_heights(len(order), 0.13 * ((len(simulations) - 1) / 2 - place))
        looks, hover, texts = marker(*LOOKS[one.strategy], 9, 2), "%{text}: %{x:.1f}", table["domain"]
        for column, (measure, (_, factor)) in enumerate(measures.items(), 1):
            points = dots(one.strategy, f32(factor * table[measure]), f32(y), looks, hover, column == 1, text=texts)
            fig.add_trace(points, row=1, col=column)
        hungry = table["starves"].to_numpy()
        rings = dots("starves", f32(100 * table["share"][hungry]), f32(y[hungry]), marker(TEXT, "circle-open", 19, 2))
        fig.add_trace(rings.update(showlegend=False, hoverinfo="skip"), row=1, col=1)
    fig.add_trace(dots("starves", [None], [None], marker(TEXT, "circle-open", 14, 2)), row=1, col=1)
    name_rows(fig, order)
    fig.update_yaxes(showticklabels=False, col=2)
    fig.update_yaxes(showticklabels=False, col=3)
    fig.update_xaxes(rangemode="tozero", nticks=5)
    for column in (1, 2):  # room for a ring at 0
        most = max(max(trace.x, default=0) or 0 for trace in fig.select_traces(col=column))
        fig.update_xaxes(range=[-0.06 * most, 1.06 * most], col=column)
    if is_wide:
        fig.update_xaxes(type="log", tickvals=TICKS, ticktext=[f"{tick:g}" for tick in TICKS], col=3)
    else:
        fig.update_xaxes(rangemode="normal", col=3)
    fig.update_traces(cliponaxis=False)
    return fig.update_layout(hovermode="closest")


def verdict_table(explored: Explored) -> Table:
    """Say for each strategy who starves, and who gets least."""
    sizes = explored.setting.sizes
    return facts_table({one.strategy: verdict(outcome(one, sizes)) for one in explored.simulations})


def check_chart(explored: Explored) -> go.Figure:
    """Draw the recorded allocation of a dynamic run and the one that the curves predict, with their mean difference."""
    try:
        compared = checked(explored)
    except UserError as error:  # such as too many windows: the notebook has more to show
        return nothing("Simulated against recorded", str(error))
    if compared.empty or explored.check is None:
        return nothing("Simulated against recorded", "no dynamic run to hold the simulation against")
    off, equal = deviation(compared)
    own = explored.source is not None and explored.source.path == explored.check.path
    origin = (
        "its own losses" if own else f"the losses of {explored.source.path.name}" if explored.source else "drawn curves"
    )
    title = f"{explored.check.path.name}: simulated from {origin}"
    said = f"mean absolute difference {off:.2f} percentage points; equal shares would be off by {equal:.2f}"
    steered = (
        f"{SMALL}a person steered this run: the simulation does not know</span>" if steerings(explored.check) else ""
    )
    names = list(dict.fromkeys(compared["domain"]))
    parts = {name: compared[compared["domain"] == name] for name in names}
    gaps = {n: 100 * (p["recorded"] - p["simulated"])[~p["first"]].abs().mean() for n, p in parts.items()}
    notes = [f", off by {gaps[name]:.1f}" if np.isfinite(gaps[name]) else "" for name in names]
    if not np.isfinite(off):
        said = "the run ended before its first update: there is nothing to compare"
    fig = grid(f"{title}{SMALL}{said}</span>{steered}", names, notes, top=120 if steered else 105)
    colours, end = domain_colours(names), explored.check.summary()["steps"]
    for place, (name, part) in enumerate(parts.items()):
        for kind, width, dash, colour in (("recorded", 2.5, "solid", colours[name]), ("simulated", 2, "dot", TEXT)):
            steps = _until(thinned(part, MAX_WINDOWS), kind, end)
            share = line(kind, *steps, colour, kind + " %{y:.1f} %", False, width, dash=dash, shape="hv")
            fig.add_trace(share, **cell(place))
    _keys(fig, {"recorded": {"colour": TEXT, "width": 2.5}, "simulated": {"colour": TEXT, "width": 2, "dash": "dot"}})
    fig.update_yaxes(rangemode="tozero", nticks=5)
    fig.update_xaxes(rangemode="tozero", nticks=4)
    label_grid(fig, len(names), "step", "share, %")
    return fig


def run_chart(explored: Explored) -> go.Figure:
    """Draw the effective share of each domain over the steps of several runs, one line a run.

    Where a person steered, a triangle on the axis marks each intervention.
    """
    runs = explored.runs
    if not runs:
        return nothing("Allocations of finished runs", "no finished run of several domains")
    tables = [recorded_allocation(run) for run in runs]
    names = list(dict.fromkeys(name for table in tables for name in table["domain"]))
    fig = grid("Allocations of finished runs", names)
    colours = [*INKS[:3], TEXT, *INKS[:2]]
    keys = {}
    for number, (run, label, table) in enumerate(zip(runs, labels(runs), tables, strict=True)):
        look: dict[str, Any] = {"colour": colours[number], "dash": DASHES[number], "width": 2}
        acts, end = steerings(run), run.summary()["steps"]
        keys[label + (f" (▲ steered: {len(acts)})" if acts else "")] = look
        for place, name in enumerate(names):
            part = thinned(table[table["domain"] == name], MAX_WINDOWS)
            if part.empty:
                continue
            share = line(label, *_until(part, "share", end), hover="%{y:.1f} %", legend=False, **look, shape="hv")
            fig.add_trace(share, **cell(place))
            if acts:
                texts = [f"step {act.step:,}: {html.escape(str(act))}" for act in acts]
                looks = {"symbol": "triangle-up", "size": 9, "color": look["colour"]}
                marks = dots(label, [act.step for act in acts], [0] * len(acts), looks, "%{text}", False, text=texts)
                fig.add_trace(marks.update(cliponaxis=False), **cell(place))
    _keys(fig, keys)
    fig.update_yaxes(rangemode="tozero", nticks=5)
    fig.update_xaxes(rangemode="tozero", nticks=4)
    label_grid(fig, len(names), "step", "share, %")
    below = 20 * -(-len(runs) // 2) + 30  # pixels of the legend
    legend = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"}
    return fig.update_layout(legend=legend, height=fig.layout.height + below, margin_b=ROW_GAP + below)


def _until(table: pd.DataFrame, column: str, end: int) -> tuple[list[int], list[float]]:
    """Steps and shares in percent; the last one holds until `end`."""
    return [*table["step"], end], [100 * share for share in (*table[column], *table[column][-1:])]


def _keys(fig: go.Figure, looks: Mapping[str, Mapping[str, Any]]) -> None:
    """Entries of the legend that belong to no domain."""
    for name, look in looks.items():
        fig.add_trace(line(name, [], [], **look).update(x=[None], y=[None], legendgroup=None), row=1, col=1)
