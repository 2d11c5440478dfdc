"""What is seen of the sampler: learning curves, allocations simulated and recorded, who starves.

A domain keeps its colour; strategies and runs are told apart by symbol or dash as well as by colour.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from udonlib.errors import UserError
from udonlib.lab.explore.sampler_study import Explored, checked, labels, recorded_allocation, steering_loss, steerings
from udonlib.lab.explore.simulation import STRATEGIES, deviation, outcome, verdict
from udonlib.lab.views.charts import f32, panels
from udonlib.lab.views.sheets import Table, facts_table
from udonlib.lab.views.style import EMBEDDERS, TEMPLATE, TEXT, domain_colours

INKS = (*(EMBEDDERS[name][0] for name in ("student", "teacher", "specialist", "features")), TEXT)
SYMBOLS = ("circle", "square-open", "cross-thin", "diamond-open", "x-thin")
LOOKS = dict(zip(STRATEGIES, zip(INKS, SYMBOLS, strict=True), strict=True))  # strategy -> colour and symbol
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MAX_WINDOWS = 200  # per area; more are thinned out
TICKS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)  # of losses
SMALL = '<br><span style="font-size:13px">'
PANEL = 150  # pixels, height of one of many panels
GAP = 72  # pixels between two rows of them


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
    fig = _grid("Learning curves" + (", fitted and measured" if e.fits else ", drawn"), e.names, notes)
    colours = domain_colours(e.names)
    end = e.setting.steps * e.setting.batch_size / len(e.names)
    for place, (name, curve) in enumerate(e.curves.items()):
        where = {"row": place // 3 + 1, "col": place % 3 + 1}
        part = e.points[e.points["domain"] == name]
        x = np.linspace(0, max(part["last"].max(), 1) if len(part) else end, 120)
        if len(part):
            thin = part.iloc[:: -(-len(part) // MAX_WINDOWS)]
            ends = np.stack([thin["first"], thin["last"], np.full(len(thin), np.nan)], axis=1).ravel()
            bars = go.Scatter(x=f32(ends), y=f32(np.repeat(thin["loss"], 3)), mode="lines", name="measured")
            bars.update(line={"color": TEXT, "width": 5}, hovertemplate="measured %{y:.2f}")
            fig.add_trace(bars.update(legendgroup="measured", showlegend=place == 0), **where)
        line = go.Scatter(x=f32(x), y=f32(curve.loss(x)), mode="lines", name="curve", legendgroup="curve")
        line.update(line={"color": colours[name], "width": 2.5}, showlegend=False)
        fig.add_trace(line.update(hovertemplate="curve %{y:.2f}"), **where)
    values = np.concatenate([*(curve.loss(np.array([0.0, end])) for curve in e.curves.values()), e.points["loss"]])
    low, high = np.log10(max(values.min(), 1e-3)) - 0.1, np.log10(values.max()) + 0.1
    fig.update_yaxes(type="log", range=[low, high], tickvals=TICKS, ticktext=[f"{tick:g}" for tick in TICKS])
    fig.update_xaxes(nticks=4, tickformat="~s", rangemode="tozero")
    return _label(fig, len(e.names), "images of the domain seen", "loss (log)").update_layout(hovermode="x")


def strategy_chart(explored: Explored) -> go.Figure:
    """Draw the allocation that each strategy would have made, as stacked areas, one panel a strategy."""
    found = explored.simulations
    n_columns = min(2, len(found))
    n_rows = -(-len(found) // n_columns)
    titles = [one.strategy for one in found]
    fig = panels("Allocation by strategy, simulated", titles, n_rows, n_columns, height=150 + 225 * n_rows)
    for place, one in enumerate(found):
        keep = slice(None, None, -(-len(one.starts) // MAX_WINDOWS))
        x = np.append(one.starts[keep], one.steps)
        for d, (name, colour) in enumerate(domain_colours(one.names).items()):
            share = 100 * one.shares[keep, d]
            area = go.Scatter(x=x, y=f32(np.append(share, share[-1])), mode="lines", name=name, legendgroup=name)
            area.update(stackgroup="share", line={"shape": "hv", "width": 0.5, "color": colour}, fillcolor=colour)
            area.update(hovertemplate="%{y:.1f} %", showlegend=place == 0)
            fig.add_trace(area, row=place // n_columns + 1, col=place % n_columns + 1)
    fig.update_xaxes(range=[0, explored.setting.steps], nticks=6)
    fig.update_xaxes(title="step", row=n_rows)
    fig.update_yaxes(range=[0, 100])
    fig.update_yaxes(title="share, %", col=1)
    for place in range(len(found), n_rows * n_columns):
        fig.update_xaxes(visible=False, row=place // n_columns + 1, col=place % n_columns + 1)
        fig.update_yaxes(visible=False, row=place // n_columns + 1, col=place % n_columns + 1)
    return fig.update_layout(legend_traceorder="reversed")


def outcome_chart(explored: Explored) -> go.Figure:
    """Draw what each domain gets from each strategy: its share of all images, passes over its own, its loss at the end.

    A ring marks a domain that starves.
    """
    sizes, order = explored.setting.sizes, explored.names
    measures = {"share": ("share of all images, %", 100), "passes": ("passes over its images", 1)}
    losses = np.concatenate([outcome(one, sizes)["loss"] for one in explored.simulations])
    n_ticks = sum(bool(losses.min() <= tick <= losses.max()) for tick in TICKS)
    is_wide = n_ticks > 1  # else a logarithm would have no ticks
    measures["loss"] = ("predicted loss at the end" + " (log)" * is_wide, 1)
    fig = panels(
        "What each domain gets, simulated", [label for label, _ in measures.values()], 1, 3, 150 + 36 * len(order)
    )
    found = explored.simulations
    for place, one in enumerate(found):
        table = outcome(one, sizes)
        y = len(order) - 1 - np.arange(len(order)) + 0.13 * ((len(found) - 1) / 2 - place)
        colour, symbol = LOOKS[one.strategy]
        marker = {"symbol": symbol, "size": 9, "color": colour, "line": {"width": 2, "color": colour}}
        for column, (measure, (_, factor)) in enumerate(measures.items(), 1):
            dots = go.Scatter(
                x=f32(factor * table[measure]), y=f32(y), mode="markers", marker=marker, name=one.strategy
            )
            dots.update(legendgroup=one.strategy, showlegend=column == 1, text=table["domain"])
            fig.add_trace(dots.update(hovertemplate="%{text}: %{x:.1f}"), row=1, col=column)
        hungry = table["starves"].to_numpy()
        ring = {"symbol": "circle-open", "size": 19, "color": TEXT, "line": {"width": 2}}
        rings = go.Scatter(x=f32(100 * table["share"][hungry]), y=f32(y[hungry]), mode="markers", marker=ring)
        rings.update(name="starves", legendgroup="starves", showlegend=False, hoverinfo="skip")
        fig.add_trace(rings, row=1, col=1)
    key = go.Scatter(x=[None], y=[None], mode="markers", name="starves", marker={"symbol": "circle-open", "size": 14})
    fig.add_trace(key.update(marker_color=TEXT, marker_line_width=2), row=1, col=1)
    ticks = {"tickvals": list(range(len(order) - 1, -1, -1)), "ticktext": _coloured(order)}
    fig.update_yaxes(range=[-0.6, len(order) - 0.4], showgrid=False, tickvals=ticks["tickvals"])
    fig.update_yaxes(**ticks, col=1)
    fig.update_yaxes(showticklabels=False, col=2)
    fig.update_yaxes(showticklabels=False, col=3)
    for column in (1, 2, 3):
        for border in np.arange(len(order) - 1) + 0.5:
            fig.add_hline(y=border, line={"color": "rgba(128, 128, 128, 0.25)", "width": 1}, row=1, col=column)
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
        return _nothing("Simulated against recorded", str(error))
    if compared.empty or explored.check is None:
        return _nothing("Simulated against recorded", "no dynamic run to hold the simulation against")
    off, equal = deviation(compared)
    own = explored.source is not None and explored.source.path == explored.check.path
    origin = (
        "its own losses" if own else f"the losses of {explored.source.path.name}" if explored.source else "drawn curves"
    )
    title = f"{explored.check.path.name}: simulated from {origin}"
    found = (
        f"{SMALL}mean absolute difference {off:.2f} percentage points; equal shares would be off by {equal:.2f}</span>"
    )
    steered = (
        f"{SMALL}a person steered this run: the simulation does not know</span>" if steerings(explored.check) else ""
    )
    names = list(dict.fromkeys(compared["domain"]))
    parts = {name: compared[compared["domain"] == name] for name in names}
    gaps = {n: 100 * (p["recorded"] - p["simulated"])[~p["first"]].abs().mean() for n, p in parts.items()}
    notes = [f", off by {gaps[name]:.1f}" if np.isfinite(gaps[name]) else "" for name in names]
    if not np.isfinite(off):
        found = f"{SMALL}the run ended before its first update: there is nothing to compare</span>"
    fig = _grid(title + found + steered, names, notes, top=120 if steered else 105)
    colours, end = domain_colours(names), explored.check.summary()["steps"]
    for place, (name, part) in enumerate(parts.items()):
        part = part.iloc[:: -(-len(part) // MAX_WINDOWS)]
        for kind, width, dash, colour in (("recorded", 2.5, "solid", colours[name]), ("simulated", 2, "dot", TEXT)):
            share = 100 * part[kind].to_numpy()
            x, y = [*part["step"], end], f32([*share, share[-1]])
            line = go.Scatter(x=x, y=y, mode="lines", name=kind, legendgroup=kind)
            line.update(line={"shape": "hv", "width": width, "dash": dash, "color": colour}, showlegend=False)
            fig.add_trace(line.update(hovertemplate=kind + " %{y:.1f} %"), row=place // 3 + 1, col=place % 3 + 1)
    _keys(fig, {"recorded": {"color": TEXT, "width": 2.5}, "simulated": {"color": TEXT, "width": 2, "dash": "dot"}})
    fig.update_yaxes(rangemode="tozero", nticks=5)
    fig.update_xaxes(rangemode="tozero", nticks=4)
    return _label(fig, len(names), "step", "share, %")


def run_chart(explored: Explored) -> go.Figure:
    """Draw the effective share of each domain over the steps of several runs, one line a run.

    Where a person steered, a triangle on the axis marks each intervention.
    """
    runs = explored.runs
    if not runs:
        return _nothing("Allocations of finished runs", "no finished run of several domains")
    tables = [recorded_allocation(run) for run in runs]
    names = list(dict.fromkeys(name for table in tables for name in table["domain"]))
    fig = _grid("Allocations of finished runs", names, [""] * len(names))
    colours = [*INKS[:3], TEXT, *INKS[:2]]
    keys = {}
    for number, (run, label, table) in enumerate(zip(runs, labels(runs), tables, strict=True)):
        look = {"color": colours[number], "dash": DASHES[number], "width": 2}
        acts, end = steerings(run), run.summary()["steps"]
        keys[label + (f" (▲ steered: {len(acts)})" if acts else "")] = look
        for place, name in enumerate(names):
            part = table[table["domain"] == name]
            part = part.iloc[:: -(-max(1, len(part)) // MAX_WINDOWS)]
            if part.empty:
                continue
            where = {"row": place // 3 + 1, "col": place % 3 + 1}
            x, share = [*part["step"], end], 100 * part["share"].to_numpy()
            line = go.Scatter(x=x, y=f32([*share, share[-1]]), mode="lines", name=label, legendgroup=label)
            line.update(line=look | {"shape": "hv"}, showlegend=False, hovertemplate="%{y:.1f} %")
            fig.add_trace(line, **where)
            if acts:
                marker = {"symbol": "triangle-up", "size": 9, "color": look["color"]}
                marks = go.Scatter(x=[act.step for act in acts], y=[0] * len(acts), mode="markers", marker=marker)
                marks.update(text=[f"step {act.step:,}: {html.escape(str(act))}" for act in acts], cliponaxis=False)
                marks.update(hovertemplate="%{text}", name=label)
                fig.add_trace(marks.update(legendgroup=label, showlegend=False), **where)
    _keys(fig, keys)
    fig.update_yaxes(rangemode="tozero", nticks=5)
    fig.update_xaxes(rangemode="tozero", nticks=4)
    _label(fig, len(names), "step", "share, %")
    below = 20 * -(-len(runs) // 2) + 30  # pixels of the legend
    legend = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"}
    return fig.update_layout(legend=legend, height=fig.layout.height + below, margin_b=GAP + below)


def _keys(fig: go.Figure, lines: dict[str, dict[str, Any]]) -> None:
    """Entries of the legend that belong to no domain."""
    for name, line in lines.items():
        fig.add_trace(go.Scatter(x=[None], y=[None], mode="lines", name=name, line=line), row=1, col=1)


def _nothing(title: str, why: str) -> go.Figure:
    """An empty figure that says why it is empty."""
    fig = panels(title, [], 1, 1, height=200).add_annotation(text=why, showarrow=False)
    return fig.update_xaxes(visible=False).update_yaxes(visible=False)


def _coloured(names: Sequence[str]) -> list[str]:
    colours = domain_colours(names)
    return [f'<span style="color:{colours[name]}">■</span> {html.escape(name)} ' for name in names]


def _grid(title: str, names: Sequence[str], notes: Sequence[str], top: int = 85) -> go.Figure:
    """Panels in rows of three, one a domain, with its colour beside its name."""
    n_rows = max(1, -(-len(names) // 3))
    height = n_rows * (PANEL + GAP) - GAP
    titles = [name.rstrip() + note for name, note in zip(_coloured(names), notes, strict=True)]
    fig = make_subplots(n_rows, 3, subplot_titles=titles, horizontal_spacing=0.08, vertical_spacing=GAP / height)
    fig.update_annotations(font_size=13, yshift=4)
    margin = {"t": top, "b": GAP}
    return fig.update_layout(
        template=TEMPLATE, title=title, height=height + top + GAP, margin=margin, hovermode="x unified"
    )


def _label(fig: go.Figure, n_panels: int, x: str, y: str) -> go.Figure:
    """Name the axes at the left and lower border; panels that stay empty do not show."""
    for place in range(-(-n_panels // 3) * 3):
        where = {"row": place // 3 + 1, "col": place % 3 + 1}
        if place >= n_panels:
            fig.update_xaxes(visible=False, **where).update_yaxes(visible=False, **where)
        elif place >= n_panels - 3:
            fig.update_xaxes(title=x, **where)
        if place % 3 == 0:
            fig.update_yaxes(title=y, **where)
    return fig
