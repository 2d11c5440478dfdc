"""Tables in, plotly figures out. The tables are those of a run: see `runs.run` for their columns."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Int
from plotly.subplots import make_subplots

from udonlib.data.catalog import Catalog
from udonlib.lab.views.style import EMBEDDERS, GRID, SYMBOLS, TEMPLATE, TEXT
from udonlib.lab.views.style import domain_colours as domain_colours
from udonlib.lab.views.style import use_renderer as use_renderer
from udonlib.training.interventions import Intervention

TERMS = {
    "total": "total",
    "ce_student": "student classification",
    "ce_teacher": "teacher classification",
    "kl": "logit distillation",
    "rel": "relational distillation",
}
MAX_POINTS = 300  # per trace; 40 traces of it are 0.2 MB in a notebook


def loss_curves(losses: pd.DataFrame) -> go.Figure:
    """Draw the losses of each domain over the steps, one panel a term. Long curves are means of bins of steps."""
    if losses.empty:
        return _nothing("Training loss", "nothing was trained in this run")
    terms = [term for term in TERMS if term in set(losses["term"])]
    n_columns = min(3, len(terms))
    n_rows = -(-len(terms) // n_columns)
    fig = panels("Training loss", [TERMS[term] for term in terms], n_rows, n_columns, height=130 + 270 * n_rows)
    for domain, colour in domain_colours(losses["domain"]).items():
        for place, term in enumerate(terms):
            rows = losses[(losses["domain"] == domain) & (losses["term"] == term)].sort_values("step")
            x, y = _decimate(rows["step"].to_numpy(), rows["value"].to_numpy())
            trace = _line(domain, x, y, colour, legend=place == 0, hover="%{y:.3f}")
            fig.add_trace(trace, row=place // n_columns + 1, col=place % n_columns + 1)
    fig.update_xaxes(title="step", rangemode="tozero")
    fig.update_yaxes(title="loss", col=1)
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
            trace = _line(domain, part["step"], part[metric], colour, legend=column == 1, hover="%{y:.1f}", width=1.5)
            trace.update(mode="lines+markers", marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 7})
            fig.add_trace(trace, row=1, col=column)
        mean = _line("mean", means["step"], means[metric], TEXT, legend=column == 1, hover="%{y:.1f}", width=4)
        fig.add_trace(mean.update(mode="lines+markers", marker={"size": 8}), row=1, col=column)
        if best is not None:
            ring = {"symbol": "circle-open", "size": 17, "color": TEXT, "line": {"width": 3}}
            name = f"best, step {int(best['step']):,}"
            point = go.Scatter(x=[best["step"]], y=[best[metric]], mode="markers", marker=ring, name=name)
            fig.add_trace(point.update(showlegend=column == 1, hoverinfo="skip"), row=1, col=column)
    fig.update_xaxes(title="step", rangemode="tozero")
    fig.update_yaxes(rangemode="tozero")
    return fig


def allocation_curves(
    allocation: pd.DataFrame, n_steps: int | None = None, interventions: Sequence[Intervention] = ()
) -> go.Figure:
    """Draw the share of steps that each domain gets, as stacked areas, and the images it has seen.

    Args:
        allocation: one row for each domain and window; `share` holds from `step` to the next window's.
        n_steps: where the last window ends; None: one more window of the same length.
        interventions: of a person; a line marks each that the result depends on.
    """
    if allocation.empty:
        return _nothing("Allocation", "nothing was trained in this run")
    steps = np.unique(allocation["step"].to_numpy())
    length = steps[-1] - steps[-2] if len(steps) > 1 else 1
    end = max(int(steps[-1] + length) if n_steps is None else n_steps, int(steps[-1]))
    marked = [entry for entry in interventions if entry.matters]
    title = f"Allocation (interventions by hand: {len(marked)})" if marked else "Allocation"
    fig = panels(title, ["share of steps, %", "images seen"], 1, 2, height=430)
    for domain, colour in domain_colours(allocation["domain"]).items():
        rows = allocation[allocation["domain"] == domain].sort_values("step")
        x, share = rows["step"].to_numpy(), 100 * rows["share"].to_numpy()
        area = _line(domain, [*x, end], [*share, share[-1]], colour, hover="%{y:.1f} %", width=0.5)
        fig.add_trace(area.update(stackgroup="share", line_shape="hv", fillcolor=colour), row=1, col=1)
        seen = _line(domain, x, rows["images_seen"], colour, legend=False, hover="%{y:,.0f}")
        fig.add_trace(seen.update(mode="lines+markers" if len(x) < 30 else "lines"), row=1, col=2)
    for entry in marked:
        fig.add_vline(entry.step, line={"color": TEXT, "width": 1.5, "dash": "dot"}, row=1, col=1)
    if marked:  # what was done shows above the areas, where the mouse is on the mark
        places = {"x": [entry.step for entry in marked], "y": [100.0] * len(marked)}
        marker = {"symbol": "triangle-down", "size": 10, "color": TEXT}
        mark = go.Scatter(**places, mode="markers", marker=marker, name="intervention", cliponaxis=False)
        fig.add_trace(mark.update(text=[str(entry) for entry in marked], hovertemplate="%{text}"), row=1, col=1)
    fig.update_xaxes(title="step", range=[0, end])
    fig.update_yaxes(range=[0, 100], row=1, col=1)
    fig.update_yaxes(rangemode="tozero", row=1, col=2)
    return fig.update_layout(legend_traceorder="reversed")


def results_chart(evaluation: pd.DataFrame, index: str = "merged") -> go.Figure:
    """Draw R@1 and mMP@k of every embedder by domain, with 95% intervals where the table has them."""
    rows = evaluation[evaluation["index"] == index]
    labels = metric_labels(rows)
    fig = panels(f"Test, {index} index", [f"{m}, %" for m in labels.values()], 2, 1, height=620)
    for embedder in by_embedder(rows):
        part = rows[rows["embedder"] == embedder]
        colour, pattern = EMBEDDERS.get(embedder, (TEXT, "x"))
        for row, metric in enumerate(labels, 1):
            bar = go.Bar(name=embedder, x=part["domain"], y=f32(part[metric]), showlegend=row == 1)
            bar.update(legendgroup=embedder, hovertemplate="%{x}: %{y:.1f}", error_y=_error_bars(part, metric))
            bar.update(
                marker={
                    "color": colour,
                    "pattern": {
                        "shape": pattern,
                        "size": 6,
                        "solidity": 0.2,
                        "fillmode": "overlay",
                        "fgcolor": "white",
                    },
                }
            )
            fig.add_trace(bar, row=row, col=1)
    order = [name for name in dict.fromkeys(rows["domain"]) if name != "mean"] + ["mean"]
    fig.update_xaxes(categoryorder="array", categoryarray=order, showgrid=False)
    fig.update_yaxes(rangemode="tozero")
    return fig.update_layout(barmode="group", bargap=0.25, hovermode="closest")


def gap_chart(evaluation: pd.DataFrame, metric: str = "r_at_1") -> go.Figure:
    """Draw student against teacher for each domain, both searching the same index: one panel for each index."""
    both = evaluation[evaluation["embedder"].isin(["student", "teacher"])]
    if both["embedder"].nunique() < 2:
        return _nothing("From student to teacher", "no teachers in this run")
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
        for embedder, symbol in (("student", "circle"), ("teacher", "diamond-open")):
            colour = EMBEDDERS[embedder][0]
            marker = {"color": colour, "size": 12, "symbol": symbol, "line": {"width": 3, "color": colour}}
            dots = go.Scatter(x=f32(pair[embedder]), y=names, mode="markers", marker=marker, name=embedder)
            dots.update(legendgroup=embedder, showlegend=column == 1, hovertemplate="%{y}: %{x:.1f}")
            fig.add_trace(dots, row=1, col=column)
        for name, value, right in zip(names, gap, pair[["student", "teacher"]].max(axis=1), strict=True):
            place = {"x": right, "y": name, "xanchor": "left", "xshift": 10, "showarrow": False}
            fig.add_annotation(text=f"{value:+.1f}".replace("-", "−"), row=1, col=column, **place)
    fig.update_xaxes(title=unit)
    fig.update_xaxes(range=_range(wide.to_numpy()))
    return fig.update_layout(hovermode="closest")


def class_sizes(catalog: Catalog, split: str = "train") -> go.Figure:
    """Draw each domain's long tail: images of each class of a split, from the largest class to the smallest."""
    fig = panels(f"Images per class, {split}", [""], 1, 1, height=470)
    colours = domain_colours(catalog.names)
    for domain in catalog.domains:
        if split in domain.splits:
            sizes = np.sort(images_per_class(domain.splits[split].labels))[::-1]
            keep = np.unique(np.geomspace(1, len(sizes), MAX_POINTS).astype(int)) - 1
            line = _line(domain.name, keep + 1, sizes[keep], colours[domain.name], hover="%{y} images")
            fig.add_trace(line, row=1, col=1)
    fig.update_xaxes(title="rank of the class (log)", type="log", dtick=1)
    fig.update_yaxes(title="images (log)", type="log", dtick="D2")
    return fig


def metric_labels(table: pd.DataFrame) -> dict[str, str]:
    """Columns of an evaluation table that hold metrics, with the names to show: R@1, and mMP@k of the table's k."""
    mmp = next(name for name in table if name.startswith("mmp_at_") and name.removeprefix("mmp_at_").isdigit())
    return {"r_at_1": "R@1", mmp: f"mMP@{mmp.removeprefix('mmp_at_')}"}


def by_embedder(rows: pd.DataFrame) -> list[str]:
    """Embedders of an evaluation table in the order in which they are shown."""
    found = list(dict.fromkeys(rows["embedder"]))
    return [name for name in EMBEDDERS if name in found] + [name for name in found if name not in EMBEDDERS]


def images_per_class(labels: Int[np.ndarray, "image label"]) -> Int[np.ndarray, "class"]:
    """Count the images of each class that occurs; -1 pads images with fewer labels."""
    return np.unique(labels[labels >= 0], return_counts=True)[1]


def _nothing(title: str, why: str) -> go.Figure:
    """An empty figure that says why it is empty."""
    fig = panels(title, [], 1, 1, height=200).add_annotation(text=why, showarrow=False)
    return fig.update_xaxes(visible=False).update_yaxes(visible=False)


def panels(title: str, titles: Sequence[str], n_rows: int, n_columns: int, height: int) -> go.Figure:
    """An empty figure of panels in the one style."""
    gaps = {"horizontal_spacing": 0.22 / n_columns, "vertical_spacing": 0.36 / n_rows / max(1, n_rows - 1)}
    fig = make_subplots(n_rows, n_columns, subplot_titles=titles, **gaps)
    fig.update_annotations(font_size=13, yshift=4)
    return fig.update_layout(template=TEMPLATE, title=title, height=height, hovermode="x unified")


def _line(name: str, x: Any, y: Any, colour: str, hover: str, legend: bool = True, width: float = 2) -> go.Scatter:
    trace = go.Scatter(name=name, x=np.asarray(x, np.int32), y=f32(y), mode="lines", hovertemplate=hover)
    return trace.update(line={"color": colour, "width": width}, legendgroup=name, showlegend=legend)


def f32(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)  # stored as 4 bytes a number, a third of its digits


def _decimate(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over bins of consecutive points, where there are more than MAX_POINTS."""
    if len(x) <= MAX_POINTS:
        return x, y
    starts = np.linspace(0, len(x), MAX_POINTS, endpoint=False).astype(int)
    counts = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) // counts, np.add.reduceat(y, starts) / counts


def _error_bars(part: pd.DataFrame, metric: str) -> dict[str, Any] | None:
    if f"{metric}_low" not in part:
        return None
    up, down = part[f"{metric}_high"] - part[metric], part[metric] - part[f"{metric}_low"]
    return {"array": f32(up), "arrayminus": f32(down), "color": TEXT, "thickness": 1.2, "width": 3}


def _range(values: np.ndarray) -> list[float]:
    """Limits that leave room for a number right of the largest value."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    room = max(high - low, 1.0)
    return [low - 0.08 * room, high + 0.2 * room]
