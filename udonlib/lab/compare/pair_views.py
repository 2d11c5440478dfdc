"""What is seen of two runs compared: tables of `compare.pairs` in, tables and figures out.

A is solid, blue and round, B is dashed, orange and square, so that they are told apart without colour; a domain keeps
its own colour.
"""

from __future__ import annotations

import html

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from IPython.display import Image
from plotly.subplots import make_subplots

from udonlib.lab.compare import pairs
from udonlib.lab.compare.ablation_views import plain_table
from udonlib.lab.compare.ablations import label
from udonlib.lab.compare.gap_views import paired_gallery
from udonlib.lab.compare.pairs import GROUPS, Pair
from udonlib.lab.views.charts import TERMS, f32, panels
from udonlib.lab.views.sheets import Table, html_table
from udonlib.lab.views.style import TEMPLATE, TEXT, domain_colours

LOOKS = {"A": ("#2f7fd0", "solid", "circle"), "B": ("#d9720b", "dash", "square")}
MAX_POINTS = 300


def names_table(pair: Pair) -> Table:
    """Say which run is A and which is B, how far each is, and what limits the comparison."""
    lines = [[letter, run.path.name, run.state().text] for letter, run in pair.runs.items()]
    table = plain_table(["", "run", "state"], lines, side="left")
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in pair.notes)
    shown = f'<ul class="udon-runs-notes" style="margin:8px 0;padding-left:18px">{notes}</ul>' if notes else ""
    return Table(table.html + shown, "\n".join([table.text, *pair.notes]))


def parameters_table(pair: Pair) -> Table:
    """Tabulate the parameters, code and machine that differ; one line says so where nothing does."""
    found = pairs.parameters(pair.a, pair.b)
    lines = found.to_numpy().tolist() or [["nothing", "the same", "the same"]]
    head = ["what differs", f"A: {pair.a.path.name}", f"B: {pair.b.path.name}"]
    return plain_table(head, lines, side="left")


def curves_chart(pair: Pair) -> go.Figure:
    """Draw losses and validation of both runs over the steps, as means over the domains, one above the other."""
    tables = {letter: pairs.curves(run) for letter, run in pair.runs.items()}
    names = list(dict.fromkeys(name for table in tables.values() for name in table["curve"]))
    if not names:
        return nothing("Training", "neither run has trained or validated yet")
    titles = [f"loss: {TERMS[name]}" if name in TERMS else f"validation {label(name)}, %" for name in names]
    fig = panels(
        "Curves of A and B, means over the domains", titles, -(-len(names) // 2), 2, 90 + 260 * -(-len(names) // 2)
    )
    for letter, table in tables.items():
        colour, dash, symbol = LOOKS[letter]
        for place, name in enumerate(names):
            part = table[table["curve"] == name].sort_values("step")
            part = part.iloc[:: -(-len(part) // MAX_POINTS) or 1]
            mode = "lines+markers" if name not in TERMS else "lines"
            trace = go.Scatter(
                x=part["step"].to_numpy(np.int32), y=f32(part["value"]), mode=mode, name=_name(pair, letter)
            )
            trace.update(line={"color": colour, "dash": dash, "width": 2.5}, marker={"symbol": symbol, "size": 8})
            trace.update(legendgroup=letter, showlegend=place == 0, hovertemplate="%{y:.2f}")
            fig.add_trace(trace, row=place // 2 + 1, col=place % 2 + 1)
    fig.update_xaxes(title="step", rangemode="tozero")
    return _legend_above(fig)


def allocation_chart(pair: Pair) -> go.Figure:
    """Draw the share of steps of each domain in both runs, stacked, and the share of images that it saw."""
    titles = ["A: share of steps, %", "B: share of steps, %", "images seen, %"]
    tables = [run.allocation() for run in pair.runs.values()]
    if all(table.empty for table in tables):
        return nothing("Allocation", "neither run has trained")
    fig = make_subplots(1, 3, subplot_titles=titles, horizontal_spacing=0.12, column_widths=[0.3, 0.3, 0.4])
    fig.update_annotations(font_size=13, yshift=4)
    fig.update_layout(template=TEMPLATE, title="Allocation of A and B", height=500)
    order = list(dict.fromkeys(name for table in tables for name in table["domain"]))
    colours = domain_colours(order)
    for column, (table, run) in enumerate(zip(tables, pair.runs.values(), strict=True), 1):
        end = max([step for step in (_last_step(run), *table["step"]) if step is not None], default=1)
        for domain in order:
            rows = table[table["domain"] == domain].sort_values("step", kind="stable")
            share = 100 * rows["share"].to_numpy()
            x, y = [*rows["step"], end], [*share, *share[-1:]]
            area = go.Scatter(x=np.asarray(x[: len(y)], np.int32), y=f32(y), mode="lines", name=domain)
            area.update(stackgroup="share", fillcolor=colours[domain], hovertemplate="%{y:.1f} %", legendgroup=domain)
            area.update(line={"color": colours[domain], "width": 0.5, "shape": "hv"}, showlegend=column == 1)
            fig.add_trace(area, row=1, col=column)
        fig.update_xaxes(title="step", range=[0, end], nticks=4, row=1, col=column)
    for letter, run in pair.runs.items():
        seen = pairs.images_seen(run)
        total = max(1, sum(seen.values()))
        there = [domain for domain in order if domain in seen]
        colour, _, symbol = LOOKS[letter]
        dots = go.Scatter(x=f32([100 * seen[domain] / total for domain in there]), y=there, mode="markers", name=letter)
        marker = {"symbol": symbol if letter == "A" else f"{symbol}-open", "size": 11, "color": colour}
        dots.update(
            marker=marker | {"line": {"width": 2.5, "color": colour}}, text=[f"{seen[d]:,} images" for d in there]
        )
        fig.add_trace(dots.update(hovertemplate="%{x:.1f} %, %{text}"), row=1, col=3)
    fig.update_yaxes(range=[0, 100], row=1, col=1)
    fig.update_yaxes(range=[0, 100], row=1, col=2)
    fig.update_yaxes(categoryorder="array", categoryarray=order[::-1], row=1, col=3)
    fig.update_xaxes(title="share of images, %", rangemode="tozero", row=1, col=3)
    legend = {"orientation": "h", "x": 0, "y": -0.25, "yanchor": "top"}
    return fig.update_layout(hovermode="closest", legend=legend, margin_b=140)


def difference_chart(pair: Pair) -> go.Figure:
    """Draw B - A of each metric by domain with its 95% interval over queries; filled: the interval excludes zero."""
    if pair.outcomes.empty:
        return nothing("What B finds more than A", "no test outcomes that both runs share")
    metrics = {metric: f"{label(metric)}, points" for metric in pair.metrics}
    fig = panels("What B finds more than A, merged index", list(metrics.values()), 1, len(metrics), height=440)
    order = [*pair.domains, "mean"]
    colours = domain_colours(pair.domains) | {"mean": TEXT}
    for column, metric in enumerate(metrics, 1):
        rows = pairs.differences(pair, metric).set_index("domain").reindex(order)
        sure = (rows["low"] > 0) | (rows["high"] < 0)
        shades = [colours[name] for name in order]
        marker = {"size": 12, "color": shades, "line": {"width": 2.5, "color": shades}}
        marker["symbol"] = ["circle" if is_sure else "circle-open" for is_sure in sure]
        up, down = f32(rows["high"] - rows["mean"]), f32(rows["mean"] - rows["low"])
        dots = go.Scatter(x=f32(rows["mean"]), y=order, mode="markers", marker=marker, showlegend=False)
        dots.update(error_x={"array": up, "arrayminus": down, "color": TEXT, "thickness": 1.4, "width": 4})
        dots.update(text=[f"{n:,} queries" for n in rows["n_queries"]], hovertemplate="%{y}: %{x:+.1f}, %{text}")
        fig.add_trace(dots, row=1, col=column)
        fig.add_vline(x=0, line={"color": TEXT, "width": 1.5}, row=1, col=column)
    shown = {name: f"<b>{name}</b>" if name == "mean" else name for name in order}
    ticks = {"tickvals": order, "ticktext": list(shown.values())}
    fig.update_yaxes(categoryorder="array", categoryarray=order[::-1], **ticks)
    fig.update_xaxes(title="← A ahead    B ahead →")
    return fig.update_layout(hovermode="closest")


def difference_table(pair: Pair) -> Table:
    """Tabulate each metric in A and B and B - A with its 95% interval; bold where that excludes zero."""
    if pair.outcomes.empty:
        return plain_table(["outcomes"], [["no test outcomes that both runs share"]], side="left")
    cells: dict[tuple[str, str], list[str]] = {}
    bold: set[tuple[int, int]] = set()
    for metric in pair.metrics:
        rows = pairs.differences(pair, metric)
        cells |= {} if cells else {("", "queries"): [f"{n:,}" for n in rows["n_queries"]]}
        for side in pairs.SIDES:
            cells[f"{label(metric)}, %", side.upper()] = [f"{value:.1f}" for value in rows[side]]
        bold |= {(int(i), len(cells)) for i in np.flatnonzero((rows["low"] > 0) | (rows["high"] < 0))}
        texts = [f"{row.mean:+.1f} ±{(row.high - row.low) / 2:.1f}".replace("-", "−") for row in rows.itertuples()]
        cells[f"{label(metric)}, %", "B − A"] = texts
    index = pd.Index([*pair.domains, "mean"], name="domain")
    table = pd.DataFrame(cells, index=index)
    table.columns = pd.MultiIndex.from_tuples(cells, names=["merged index", ""])
    return html_table(table, bold)


def changed_table(pair: Pair) -> Table:
    """Tabulate by domain how many queries both, one or none of the runs get right: their number and share."""
    if pair.outcomes.empty:
        return plain_table(["outcomes"], [["no test outcomes that both runs share"]], side="left")
    counts = pairs.changed(pair)
    cells = {"queries": [f"{n:,}" for n in counts["n_queries"]]}
    for group in GROUPS:
        parts = zip(counts[group], counts["n_queries"], strict=True)
        cells[f"{group} right" if group != "neither" else group] = [
            f"{n:,} ({100 * n / all_:.1f} %)" for n, all_ in parts
        ]
    return html_table(pd.DataFrame(cells, index=pd.Index(counts["domain"], name="domain")), set())


def changed_gallery(
    pair: Pair,
    right: str,
    n_queries: int = 8,
    k: int = 5,
    seed: int = 0,
    data: str = "auto",
    images: str | None = None,
) -> Image | Table:
    """Show random queries that one run gets right and the other wrong, with the neighbours of both.

    Args:
        right: who is right, "A" or "B".
        n_queries: in all, shared by the domains. k: neighbours of each. seed: of the choice.
        data, images: where the runs' data is now, if it has moved.

    Raises:
        UserError: neighbours or images that are not there, or are not what was searched.
    """
    if pair.outcomes.empty:
        return plain_table(["queries"], [["no test outcomes that both runs share"]], side="left")
    catalog, found = pairs.neighbours(pair, data, images)
    titles = (f"A: {pair.a.path.name}", f"B: {pair.b.path.name}")
    return paired_gallery(found, catalog, (right == "A", right == "B"), titles, n_queries, k, seed)


def nothing(title: str, why: str) -> go.Figure:
    """An empty figure that says why it is empty."""
    fig = go.Figure().update_layout(template=TEMPLATE, title=title, height=200)
    fig.add_annotation(text=why, showarrow=False)
    return fig.update_xaxes(visible=False).update_yaxes(visible=False)


def _name(pair: Pair, letter: str) -> str:
    return f"{letter}: {pair.runs[letter].path.name}"


def _last_step(run: object) -> int | None:
    records = run.records("train")  # type: ignore[attr-defined]
    return int(records[-1]["step"]) if records else None


def _legend_above(fig: go.Figure) -> go.Figure:
    """Put two long names in one line above the panels."""
    legend = {"orientation": "h", "x": 0, "y": 1, "yref": "container", "yanchor": "top"}
    fig.update_layout(title={"y": 0.98, "yref": "container", "yanchor": "top"})
    return fig.update_layout(legend=legend | {"y": 0.92}, margin_t=110)
