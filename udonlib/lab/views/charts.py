"""Tables in, plotly figures out: the pieces that all figures are made of, and the figures of a run.

The tables are those of a run: see `runs.run` for their columns.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Int
from plotly.subplots import make_subplots

from udonlib.data.catalog import Catalog
from udonlib.lab.views.style import (
    EMBEDDER_LOOKS,
    GRID,
    SYMBOLS,
    TEMPLATE,
    TEXT,
    EmbedderLook,
    by_embedder,
    coloured,
    domain_colours,
    metric_labels,
    teacher_looks,
)
from udonlib.lab.views.style import use_renderer as use_renderer
from udonlib.training.interventions import Intervention

TERMS = {
    "total": "total",
    "ce_student": "student classification",
    "ce_teacher": "teacher classification",
    "kl": "logit distillation",
    "rel": "relational distillation",
    "unic": "frozen teachers",
}
KINDS = {"class": "loss, class token", "patches": "loss, patches", "kept": "images kept, %"}  # terms of frozen teachers
MAX_POINTS = 300  # per trace; 40 traces of it are 0.2 MB in a notebook


# Pieces


def nothing(title: str, why: str) -> go.Figure:
    """An empty figure that says why it is empty."""
    fig = panels(title, [], height=200).add_annotation(text=why, showarrow=False)
    return fig.update_xaxes(visible=False).update_yaxes(visible=False)


def panels(
    title: str, titles: Sequence[str], n_rows: int = 1, n_columns: int = 1, height: int = 450, **options: Any
) -> go.Figure:
    """An empty figure of panels in the one style; `options` are those of plotly's `make_subplots`."""
    gaps = {"horizontal_spacing": 0.22 / n_columns, "vertical_spacing": 0.36 / n_rows / max(1, n_rows - 1)}
    fig = make_subplots(n_rows, n_columns, subplot_titles=titles, **gaps | options)
    fig.update_annotations(font_size=13, yshift=4)
    return fig.update_layout(template=TEMPLATE, title=title, height=height, hovermode="x unified")


N_COLUMNS, ROW_GAP = 3, 72  # of a grid, and pixels between two rows


def grid(
    title: str, names: Sequence[str], notes: Sequence[str] = (), panel: int = 150, gap: int = ROW_GAP, top: int = 85
) -> go.Figure:
    """Panels in rows of three, one a domain, with its colour beside its name; see `cell` and `label_grid`.

    Args:
        notes: what stands behind the names.
        panel: height of one, and `gap`, between two rows, in pixels.
        top: pixels above them.
    """
    titles = [name.rstrip() + note for name, note in zip(coloured(names), notes or [""] * len(names), strict=True)]
    n_rows = max(1, -(-len(names) // N_COLUMNS))
    high = n_rows * (panel + gap) - gap
    spacing = {"horizontal_spacing": 0.08, "vertical_spacing": gap / high}
    fig = panels(title, titles, n_rows, N_COLUMNS, high + top + gap, **spacing)
    return fig.update_layout(margin={"t": top, "b": gap})


def cell(place: int, n_columns: int = N_COLUMNS) -> dict[str, int]:
    """Row and column of the panel at a place, as plotly counts them."""
    return {"row": place // n_columns + 1, "col": place % n_columns + 1}


def label_grid(fig: go.Figure, n_panels: int, x: str, y: str, n_columns: int = N_COLUMNS, standoff: int = 8) -> None:
    """Name the axes of a grid at its left and lower border; panels that stay empty do not show."""
    for place in range(-(-n_panels // n_columns) * n_columns):
        where = cell(place, n_columns)
        if place >= n_panels:
            fig.update_xaxes(visible=False, **where).update_yaxes(visible=False, **where)
        elif place >= n_panels - n_columns:
            fig.update_xaxes(title={"text": x, "standoff": standoff}, **where)
        if place % n_columns == 0:
            fig.update_yaxes(title=y, **where)


def name_rows(fig: go.Figure, names: Sequence[str], borders: bool = True) -> None:
    """Let the y axes be rows of domains, the first on top, with lines between them; `row_heights` says where."""
    ticks = {"tickvals": list(range(len(names)))[::-1], "ticktext": coloured(names)}
    fig.update_yaxes(**ticks, range=[-0.6, len(names) - 0.4], showgrid=not borders)
    for border in np.arange(len(names) - 1) + 0.5 if borders else ():
        fig.add_hline(y=border, line={"color": GRID, "width": 1})


def row_heights(n_rows: int, shift: float = 0.0) -> np.ndarray:
    """Where the rows of `name_rows` stand on the y axis."""
    return n_rows - 1 - np.arange(n_rows) + shift


def line(
    name: str, x: Any, y: Any, colour: str, hover: str = "", legend: bool = True, width: float = 2, **look: Any
) -> go.Scatter:
    """A line; `look` is what else is said of it, such as its dash."""
    x = np.asarray(x)
    x = x.astype(np.int32 if x.dtype.kind in "iu" else np.float32)
    trace = go.Scatter(name=name, x=x, y=f32(y), mode="lines", hovertemplate=hover or None)
    return trace.update(line={"color": colour, "width": width, **look}, legendgroup=name, showlegend=legend)


def dots(
    name: str, x: Any, y: Any, looks: Mapping[str, Any], hover: str = "", legend: bool = True, **more: Any
) -> go.Scatter:
    """Markers, with `looks` as of `marker`; `more` is what else plotly's Scatter takes."""
    trace = go.Scatter(name=name, x=x, y=y, mode="markers", marker=looks, legendgroup=name, showlegend=legend)
    return trace.update(hovertemplate=hover or None, **more)


def marker(colour: Any, symbol: Any = "circle", size: float = 11, width: float = 2.5) -> dict[str, Any]:
    """A marker in one colour, filled or open as its symbol says."""
    return {"symbol": symbol, "size": size, "color": colour, "line": {"width": width, "color": colour}}


def error_bars(
    table: pd.DataFrame, mean: str = "mean", low: str = "low", high: str = "high", colour: str = TEXT, **look: float
) -> dict[str, Any] | None:
    """The intervals of a table around its means, as plotly's error_x or error_y; None where it has none."""
    if low not in table:
        return None
    ends = {"array": f32(table[high] - table[mean]), "arrayminus": f32(table[mean] - table[low])}
    return {"type": "data", **ends, "color": colour, "thickness": 1.3, "width": 3, **look}


def embedder_bars(fig: go.Figure, table: pd.DataFrame, ends: Mapping[str, tuple[str, str]]) -> go.Figure:
    """Draw bars of every embedder by domain, the mean last, a panel a metric.

    Args:
        ends: metric -> columns of its interval, which need not be there.
    """
    for embedder in by_embedder(table):
        part, look = table[table["embedder"] == embedder], EMBEDDER_LOOKS.get(embedder, EmbedderLook())
        pattern = {"shape": look.pattern, "size": 6, "solidity": 0.2, "fillmode": "overlay", "fgcolor": "white"}
        for row, (metric, (low, high)) in enumerate(ends.items(), 1):
            bar = go.Bar(name=embedder, x=part["domain"], y=f32(part[metric]), showlegend=row == 1)
            bar.update(legendgroup=embedder, hovertemplate="%{x}: %{y:.1f}")
            bar.update(error_y=error_bars(part, metric, low, high), marker={"color": look.colour, "pattern": pattern})
            fig.add_trace(bar, row=row, col=1)
    order = [name for name in dict.fromkeys(table["domain"]) if name != "mean"] + ["mean"]
    fig.update_xaxes(categoryorder="array", categoryarray=order, showgrid=False)
    fig.update_yaxes(rangemode="tozero")
    return fig.update_layout(barmode="group", bargap=0.25, hovermode="closest")


Shares = Mapping[str, tuple[Any, Any]]  # domain -> steps, and the shares (0..1) that hold from them on


def shares_of(allocation: pd.DataFrame) -> dict[str, tuple[Any, Any]]:
    """The shares in a table of an allocation, with columns domain, step and share."""
    rows = allocation.sort_values("step", kind="stable")
    parts = {name: rows[rows["domain"] == name] for name in dict.fromkeys(allocation["domain"])}
    return {name: (part["step"], part["share"]) for name, part in parts.items()}


def add_shares(fig: go.Figure, shares: Shares, end: int, legend: bool = True, row: int = 1, col: int = 1) -> None:
    """Stack the share of steps that each domain gets, as areas: the last share holds until `end`."""
    for domain, colour in domain_colours(shares).items():
        steps, share = ([*values] for values in shares[domain])
        x, y = [*steps, end][: len(share) + 1] if share else [], [100 * value for value in (*share, *share[-1:])]
        area = line(domain, x, y, colour, "%{y:.1f} %", legend, width=0.5, shape="hv")
        fig.add_trace(area.update(stackgroup="share", fillcolor=colour), row=row, col=col)
    fig.update_yaxes(range=[0, 100], row=row, col=col)


def thinned(table: pd.DataFrame, n: int) -> pd.DataFrame:
    """At most n rows of a table, evenly."""
    return table.iloc[:: max(1, -(-len(table) // n))]


def images_per_class(labels: Int[np.ndarray, "image label"]) -> Int[np.ndarray, "class"]:
    """Count the images of each class that occurs; -1 pads images with fewer labels."""
    return np.unique(labels[labels >= 0], return_counts=True)[1]


def f32(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)  # stored as 4 bytes a number, a third of its digits


# The figures of a run


def loss_curves(losses: pd.DataFrame) -> go.Figure:
    """Draw the losses of each domain over the steps, one panel a term. Long curves are means of bins of steps."""
    if losses.empty:
        return nothing("Training loss", "nothing was trained in this run")
    terms = [term for term in TERMS if term in set(losses["term"])]
    n_columns = min(3, len(terms))
    n_rows = -(-len(terms) // n_columns)
    fig = panels("Training loss", [TERMS[term] for term in terms], n_rows, n_columns, height=130 + 270 * n_rows)
    for domain, colour in domain_colours(losses["domain"]).items():
        for place, term in enumerate(terms):
            rows = losses[(losses["domain"] == domain) & (losses["term"] == term)].sort_values("step")
            x, y = _decimate(rows["step"].to_numpy(), rows["value"].to_numpy())
            trace = line(domain, x, y, colour, "%{y:.3f}", legend=place == 0)
            fig.add_trace(trace, **cell(place, n_columns))
    fig.update_xaxes(title="step", rangemode="tozero")
    fig.update_yaxes(title="loss", col=1)
    return fig


def teacher_curves(losses: pd.DataFrame) -> go.Figure:
    """Draw what a student's frozen teachers say of it over the steps: losses by kind of token, and images kept.

    A teacher's loss is the mean over all images of a step; kept are those that it taught, not dropped for them.

    Args:
        losses: as of a run, with the number of images that each is the mean of.
    """
    rows = losses[losses["term"].str.contains("/", regex=False)]
    if rows.empty:
        return nothing("Frozen teachers", "no frozen teachers in this run")
    sums = rows.assign(sum=rows["value"] * rows["images"]).groupby(["term", "step"])[["sum", "images"]].sum()
    means = sums["sum"] / sums["images"]
    terms = {term: term.split("/") for term in means.index.unique("term")}
    kinds = [kind for kind in KINDS if kind in {kind for _, kind in terms.values()}]
    fig = panels("Frozen teachers", [KINDS[kind] for kind in kinds], 1, len(kinds), height=400)
    named: set[str] = set()
    looks = teacher_looks(teacher for teacher, _ in terms.values())
    for term, (teacher, kind) in terms.items():
        x, y = _decimate(means[term].index.to_numpy(), means[term].to_numpy())
        scale, hover = (100, "%{y:.1f} %") if kind == "kept" else (1, "%{y:.3f}")
        look = looks[teacher]
        trace = line(teacher, x, scale * y, look.colour, hover, legend=teacher not in named)
        trace.update(line_dash=look.dash)
        fig.add_trace(trace, row=1, col=1 + kinds.index(kind))
        named.add(teacher)
    fig.update_xaxes(title="step", rangemode="tozero")
    fig.update_yaxes(rangemode="tozero")
    if "kept" in kinds:
        fig.update_yaxes(range=[0, 102], row=1, col=1 + kinds.index("kept"))
    return fig


def validation_curves(validation: pd.DataFrame, index: str = "merged") -> go.Figure:
    """Draw the student's R@1 and mMP@k on the validation queries over the steps, by domain and as the mean.

    A ring marks the step of the highest mean R@1, whose checkpoint is tested.
    """
    rows = validation[(validation["embedder"] == "student") & (validation["index"] == index)].sort_values("step")
    labels = metric_labels(rows)
    fig = panels(f"Validation, student, {index} index", [f"{m}, %" for m in labels.values()], 1, 2, height=430)
    means = rows[rows["domain"] == "mean"]
    colours = domain_colours(d for d in rows["domain"] if d != "mean")
    best = means.iloc[means["r_at_1"].argmax()] if len(means) else None
    for column, metric in enumerate(labels, 1):
        for place, (domain, colour) in enumerate(colours.items()):
            part = rows[rows["domain"] == domain]
            trace = line(domain, part["step"], part[metric], colour, "%{y:.1f}", column == 1, 1.5)
            trace.update(mode="lines+markers", marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 7})
            fig.add_trace(trace, row=1, col=column)
        mean = line("mean", means["step"], means[metric], TEXT, "%{y:.1f}", column == 1, 4)
        fig.add_trace(mean.update(mode="lines+markers", marker={"size": 8}), row=1, col=column)
        if best is not None:
            name = f"best, step {int(best['step']):,}"
            ring = dots(name, [best["step"]], [best[metric]], marker(TEXT, "circle-open", 17, 3), legend=column == 1)
            fig.add_trace(ring.update(hoverinfo="skip"), row=1, col=column)
    fig.update_xaxes(title="step", rangemode="tozero")
    fig.update_yaxes(rangemode="tozero")
    return fig


def allocation_curves(
    allocation: pd.DataFrame,
    n_steps: int | None = None,
    interventions: Sequence[Intervention] = (),
    step: int | None = None,
) -> go.Figure:
    """Draw the share of steps that each domain gets, as stacked areas, and the images it has seen.

    Args:
        allocation: one row for each domain and window; `share` holds from `step` to the next window's.
        n_steps: where the last window ends; None: one more window of the same length.
        interventions: of a person; a line marks each that the result depends on.
        step: steps that are done, where a run has not come to its end: nothing is drawn beyond.
    """
    if allocation.empty:
        return nothing("Allocation", "nothing was trained in this run")
    steps = np.unique(allocation["step"].to_numpy())
    length = steps[-1] - steps[-2] if len(steps) > 1 else 1
    end = max(int(steps[-1] + length) if n_steps is None else n_steps, int(steps[-1]))
    marked = [entry for entry in interventions if entry.matters]
    title = f"Allocation (interventions by hand: {len(marked)})" if marked else "Allocation"
    fig = panels(title, ["share of steps, %", "images seen"], 1, 2, height=430)
    add_shares(fig, shares_of(allocation), end if step is None else max(min(end, step), int(steps[-1])))
    for domain, colour in domain_colours(allocation["domain"]).items():
        rows = allocation[allocation["domain"] == domain].sort_values("step")
        seen = line(domain, rows["step"], rows["images_seen"], colour, "%{y:,.0f}", legend=False)
        fig.add_trace(seen.update(mode="lines+markers" if len(rows) < 30 else "lines"), row=1, col=2)
    for entry in marked:
        fig.add_vline(entry.step, line={"color": TEXT, "width": 1.5, "dash": "dot"}, row=1, col=1)
    if marked:  # what was done shows above the areas, where the mouse is on the mark
        places = {"x": [entry.step for entry in marked], "y": [100.0] * len(marked)}
        looks = {"symbol": "triangle-down", "size": 10, "color": TEXT}
        texts = [str(entry) for entry in marked]
        mark = dots("intervention", places["x"], places["y"], looks, "%{text}", text=texts, cliponaxis=False)
        fig.add_trace(mark, row=1, col=1)
    fig.update_xaxes(title="step", range=[0, end])
    fig.update_yaxes(rangemode="tozero", row=1, col=2)
    return fig.update_layout(legend_traceorder="reversed")


def results_chart(evaluation: pd.DataFrame, index: str = "merged") -> go.Figure:
    """Draw R@1 and mMP@k of every embedder by domain, with 95% intervals where the table has them."""
    rows = evaluation[evaluation["index"] == index]
    labels = metric_labels(rows)
    fig = panels(f"Test, {index} index", [f"{m}, %" for m in labels.values()], 2, 1, height=620)
    return embedder_bars(fig, rows, {metric: (f"{metric}_low", f"{metric}_high") for metric in labels})


def gap_chart(evaluation: pd.DataFrame, metric: str = "r_at_1") -> go.Figure:
    """Draw student against teacher for each domain, both searching the same index: one panel for each index."""
    both = evaluation[evaluation["embedder"].isin(["student", "teacher"])]
    if both["embedder"].nunique() < 2:
        return nothing("From student to teacher", "no teachers in this run")
    wide = both.pivot_table(index=["index", "domain"], columns="embedder", values=metric, sort=False).dropna()
    indexes = list(dict.fromkeys(wide.index.get_level_values("index")))
    title, unit = "From student to teacher, in the same index", f"{metric_labels(both)[metric]}, %"
    fig = panels(title, [f"{name} index" for name in indexes], 1, len(indexes), height=480)
    for column, index in enumerate(indexes, 1):
        pair = wide.loc[index].iloc[::-1]  # plotly draws categories upwards
        names = [f"<b>{name}</b>" if name == "mean" else name for name in pair.index]
        gap = pair["teacher"] - pair["student"]
        ends = np.stack([pair["student"], pair["teacher"], np.full(len(pair), np.nan)], axis=1).ravel()
        bars = go.Scatter(x=f32(ends), y=np.repeat(names, 3).tolist(), mode="lines", line={"color": GRID, "width": 6})
        fig.add_trace(bars.update(showlegend=False, hoverinfo="skip"), row=1, col=column)
        for embedder in ("student", "teacher"):
            look = EMBEDDER_LOOKS[embedder]
            looks = marker(look.colour, look.symbol, 12, 3)
            fig.add_trace(
                dots(embedder, f32(pair[embedder]), names, looks, "%{y}: %{x:.1f}", column == 1), row=1, col=column
            )
        for name, value, right in zip(names, gap, pair[["student", "teacher"]].max(axis=1), strict=True):
            place = {"x": right, "y": name, "xanchor": "left", "xshift": 10, "showarrow": False}
            fig.add_annotation(text=f"{value:+.1f}".replace("-", "−"), row=1, col=column, **place)
    fig.update_xaxes(title=unit)
    fig.update_xaxes(range=_range(wide.to_numpy()))
    return fig.update_layout(hovermode="closest")


def class_sizes(catalog: Catalog, split: str = "train", before: Catalog | None = None) -> go.Figure:
    """Draw each domain's long tail: images of each class of a split, from the largest class to the smallest.

    Args:
        before: the same data before it was made uneven, dotted where it differs; None: it was not.
    """
    fig = panels(f"Images per class, {split}", [""], 1, 1, height=470)
    colours = domain_colours(catalog.names)
    shown = [(domain, "solid", "") for domain in catalog.domains]
    if before is not None and before.fingerprint != catalog.fingerprint:
        shown += [(domain, "dot", ", before") for domain in before.domains]
    for domain, dash, when in shown:
        if split in domain.splits:
            sizes = np.sort(images_per_class(domain.splits[split].labels))[::-1]
            keep = np.unique(np.geomspace(1, len(sizes), MAX_POINTS).astype(int)) - 1
            colour, name = colours[domain.name], domain.name + when
            tail = line(name, keep + 1, sizes[keep], colour, "%{y} images", legend=not when, dash=dash)
            fig.add_trace(tail.update(legendgroup=domain.name), row=1, col=1)
    longest = max((float(trace.x.max()) for trace in fig.data), default=1.0)
    largest = max((float(trace.y.max()) for trace in fig.data), default=1.0)
    fig.update_xaxes(title="rank of the class (log)", type="log", **log_ticks(longest))
    fig.update_yaxes(title="images (log)", type="log", **log_ticks(largest))
    return fig


def log_ticks(highest: float) -> dict[str, Any]:
    """Ticks of a logarithmic axis from 1 on, written in full: 1, 2, 5, 10, 20, 50; plotly writes 1, 2, 5, 10, 2."""
    ticks = [digit * 10**power for power in range(len(str(int(highest)))) for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if tick <= 2 * highest]
    return {"tickvals": ticks, "ticktext": [f"{tick:,}" for tick in ticks]}


def _decimate(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over bins of consecutive points, where there are more than MAX_POINTS."""
    if len(x) <= MAX_POINTS:
        return x, y
    starts = np.linspace(0, len(x), MAX_POINTS, endpoint=False).astype(int)
    counts = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) // counts, np.add.reduceat(y, starts) / counts


def _range(values: np.ndarray) -> list[float]:
    """Limits that leave room for a number right of the largest value."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    room = max(high - low, 1.0)
    return [low - 0.08 * room, high + 0.4 * room]
