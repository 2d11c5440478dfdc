"""What is seen of two runs compared: tables of `compare.pairs` in, tables and figures out.

A is solid, blue and round, B is dashed, orange and square, so that they are told apart without colour; a domain keeps
its own colour.
"""

from __future__ import annotations

import html
from collections.abc import Mapping

import plotly.graph_objects as go

from udonlib.lab.compare import pairs
from udonlib.lab.compare.gap_views import paired_gallery
from udonlib.lab.compare.pairs import WHO_IS_RIGHT, Pair
from udonlib.lab.views.charts import (
    TERMS,
    add_shares,
    cell,
    dots,
    error_bars,
    f32,
    line,
    marker,
    nothing,
    panels,
    shares_of,
    thinned,
)
from udonlib.lab.views.sheets import Picture
from udonlib.lab.views.style import TEXT, domain_colours, metric_label
from udonlib.lab.views.tables import Table, columns_table, difference, figure, lines_table, with_shares
from udonlib.runs.folder import RunFolder

LOOKS = {"A": ("#2f7fd0", "solid", "circle"), "B": ("#d9720b", "dash", "square")}
MAX_POINTS = 300


def names_table(pair: Pair, titles: Mapping[str, str] | None = None) -> Table:
    """Say which run is A and which is B, how far each is, and what limits the comparison.

    Args:
        titles: of runs, by name: what tells them from the others.
    """
    lines = [
        [letter, run.path.name, (titles or {}).get(run.path.name) or "–", run.state().text]
        for letter, run in pair.runs.items()
    ]
    made = lines_table(["", "run", "which is", "state"], lines, side="left")
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in pair.notes)
    shown = f'<ul class="udon-runs-notes" style="margin:8px 0;padding-left:18px">{notes}</ul>' if notes else ""
    return Table(made.html + shown, "\n".join([made.text, *pair.notes]))


def parameters_table(pair: Pair) -> Table:
    """Tabulate the parameters, code and machine that differ; one line says so where nothing does."""
    lines = pairs.parameters(pair.a, pair.b).to_numpy().tolist() or [["nothing", "the same", "the same"]]
    head = ["what differs", f"A: {pair.a.path.name}", f"B: {pair.b.path.name}"]
    return lines_table(head, lines, side="left")


def curves_chart(pair: Pair) -> go.Figure:
    """Draw losses and validation of both runs over the steps, as means over the domains, one above the other."""
    tables = {letter: pairs.curves(run) for letter, run in pair.runs.items()}
    names = list(dict.fromkeys(name for table in tables.values() for name in table["curve"]))
    if not names:
        return nothing("Training", "neither run has trained or validated yet")
    titles = [f"loss: {TERMS[name]}" if name in TERMS else f"validation {metric_label(name)}, %" for name in names]
    n_rows = -(-len(names) // 2)
    fig = panels("Curves of A and B, means over the domains", titles, n_rows, 2, 90 + 260 * n_rows)
    for letter, table in tables.items():
        colour, dash, symbol = LOOKS[letter]
        for place, name in enumerate(names):
            part = thinned(table[table["curve"] == name].sort_values("step"), MAX_POINTS)
            trace = line(
                _name(pair, letter), part["step"], part["value"], colour, "%{y:.2f}", place == 0, 2.5, dash=dash
            )
            trace.update(mode="lines+markers" if name not in TERMS else "lines", legendgroup=letter)
            fig.add_trace(trace.update(marker={"symbol": symbol, "size": 8}), **cell(place, 2))
    fig.update_xaxes(title="step", rangemode="tozero")
    return _legend_above(fig)


def allocation_chart(pair: Pair) -> go.Figure:
    """Draw the share of steps of each domain in both runs, stacked, and the share of images that it saw."""
    titles = ["A: share of steps, %", "B: share of steps, %", "images seen, %"]
    tables = [run.allocation() for run in pair.runs.values()]
    if all(table.empty for table in tables):
        return nothing("Allocation", "neither run has trained")
    fig = panels("Allocation of A and B", titles, 1, 3, 500, horizontal_spacing=0.12, column_widths=[0.3, 0.3, 0.4])
    order = list(dict.fromkeys(name for table in tables for name in table["domain"]))
    for column, (table, run) in enumerate(zip(tables, pair.runs.values(), strict=True), 1):
        end = max([step for step in (_last_step(run), *table["step"]) if step is not None], default=1)
        add_shares(fig, dict.fromkeys(order, ((), ())) | shares_of(table), end, column == 1, col=column)
        fig.update_xaxes(title="step", range=[0, end], nticks=4, row=1, col=column)
    for letter, run in pair.runs.items():
        seen = pairs.images_seen(run)
        total = max(1, sum(seen.values()))
        there = [domain for domain in order if domain in seen]
        colour, _, symbol = LOOKS[letter]
        looks = marker(colour, symbol if letter == "A" else f"{symbol}-open")
        shares, texts = [100 * seen[name] / total for name in there], [f"{seen[name]:,} images" for name in there]
        fig.add_trace(dots(letter, f32(shares), there, looks, "%{x:.1f} %, %{text}", text=texts), row=1, col=3)
    fig.update_yaxes(categoryorder="array", categoryarray=order[::-1], row=1, col=3)
    fig.update_xaxes(title="share of images, %", rangemode="tozero", row=1, col=3)
    legend = {"orientation": "h", "x": 0, "y": -0.25, "yanchor": "top"}
    return fig.update_layout(hovermode="closest", legend=legend, margin_b=140)


def difference_chart(pair: Pair) -> go.Figure:
    """Draw B - A of each metric by domain with its 95% interval over queries; filled: the interval excludes zero."""
    if pair.outcomes.empty:
        return nothing("What B finds more than A", "no test outcomes that both runs share")
    metrics = {metric: f"{metric_label(metric)}, points" for metric in pair.metrics}
    fig = panels("What B finds more than A, merged index", list(metrics.values()), 1, len(metrics), height=440)
    order = [*pair.domains, "mean"]
    colours = domain_colours(pair.domains) | {"mean": TEXT}
    for column, metric in enumerate(metrics, 1):
        rows = pairs.between_runs(pair, metric).set_index("domain").reindex(order)
        symbols = [
            "circle" if low > 0 or high < 0 else "circle-open"
            for low, high in zip(rows["low"], rows["high"], strict=True)
        ]
        looks = marker([colours[name] for name in order], symbols, 12)
        texts = [f"{n:,} queries" for n in rows["n_queries"]]
        points = dots("B − A", f32(rows["mean"]), order, looks, "%{y}: %{x:+.1f}, %{text}", False, text=texts)
        fig.add_trace(points.update(error_x=error_bars(rows, width=4)), row=1, col=column)
        fig.add_vline(x=0, line={"color": TEXT, "width": 1.5}, row=1, col=column)
    shown = {name: f"<b>{name}</b>" if name == "mean" else name for name in order}
    ticks = {"tickvals": order, "ticktext": list(shown.values())}
    fig.update_yaxes(categoryorder="array", categoryarray=order[::-1], **ticks)
    fig.update_xaxes(title="← A ahead    B ahead →")
    return fig.update_layout(hovermode="closest")


def difference_table(pair: Pair) -> Table:
    """Tabulate each metric in A and B and B - A with its 95% interval; bold where that excludes zero."""
    if pair.outcomes.empty:
        return lines_table(["outcomes"], [["no test outcomes that both runs share"]], side="left")
    columns: dict[tuple[str, str], list[str]] = {}
    for metric in pair.metrics:
        rows, title = pairs.between_runs(pair, metric), f"{metric_label(metric)}, %"
        columns |= {} if columns else {("", "queries"): [f"{n:,}" for n in rows["n_queries"]]}
        columns |= {(title, side.upper()): [figure(value) for value in rows[side]] for side in pairs.SIDES}
        columns[title, "B − A"] = [difference(row.mean, row.low, row.high) for row in rows.itertuples()]
    return columns_table(columns, [*pair.domains, "mean"], ("merged index", ""))


def groups_table(pair: Pair, data: str = "auto", images: str | None = None) -> Table:
    """Tabulate R@1 in A and B and B - A by groups of queries, as `difference_table`.

    Args:
        data, images: where the runs' data is now, if it has moved.
    """
    if pair.outcomes.empty:
        return lines_table(["outcomes"], [["no test outcomes that both runs share"]], side="left")
    rows = pairs.by_group(pair, data, images)
    if rows.empty:
        return lines_table(["groups of queries"], [["too much training data to look at"]], side="left")
    lines = [
        [row.group, f"{row.n_queries:,}", figure(row.a), figure(row.b), difference(row.mean, row.low, row.high)]
        for row in rows.itertuples()
    ]
    return lines_table([f"{metric_label('r_at_1')}, %, of", "queries", "A", "B", "B − A"], lines)


def changed_table(pair: Pair) -> Table:
    """Tabulate by domain how many queries both, one or none of the runs get right: their number and share."""
    if pair.outcomes.empty:
        return lines_table(["outcomes"], [["no test outcomes that both runs share"]], side="left")
    counts = pairs.changed(pair)
    columns = {"queries": [f"{n:,}" for n in counts["n_queries"]]}
    for group in WHO_IS_RIGHT:
        title = group if group == "neither" else f"{group} right"
        columns[title] = with_shares(counts[group], counts["n_queries"])
    return columns_table(columns, list(counts["domain"]))


def changed_gallery(
    pair: Pair,
    right: str,
    n_queries: int = 8,
    k: int = 5,
    seed: int = 0,
    data: str = "auto",
    images: str | None = None,
) -> Picture | Table:
    """Show random queries that one run gets right and the other wrong, with the neighbours of both.

    Args:
        right: who is right, "A" or "B".
        n_queries: in all, shared by the domains. k: neighbours of each. seed: of the choice.
        data, images: where the runs' data is now, if it has moved.

    Raises:
        UserError: neighbours or images that are not there, or are not what was searched.
    """
    if pair.outcomes.empty:
        return lines_table(["queries"], [["no test outcomes that both runs share"]], side="left")
    catalog, neighbours = pairs.neighbours(pair, data, images)
    titles = (f"A: {pair.a.path.name}", f"B: {pair.b.path.name}")
    return paired_gallery(neighbours, catalog, (right == "A", right == "B"), titles, n_queries, k, seed)


def _name(pair: Pair, letter: str) -> str:
    return f"{letter}: {pair.runs[letter].path.name}"


def _last_step(run: RunFolder) -> int | None:
    records = run.records("train")
    return int(records[-1]["step"]) if records else None


def _legend_above(fig: go.Figure) -> go.Figure:
    """Put two long names in one line above the panels."""
    legend = {"orientation": "h", "x": 0, "y": 1, "yref": "container", "yanchor": "top"}
    fig.update_layout(title={"y": 0.98, "yref": "container", "yanchor": "top"})
    return fig.update_layout(legend=legend | {"y": 0.92}, margin_t=110)
