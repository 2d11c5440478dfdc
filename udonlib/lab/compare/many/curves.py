"""Curves of many runs over each other, grouped by setting: the mean of the seeds as a line, their range as a band.

One group has one colour and dash in all panels. Smoothing and the scale of the axes are buttons of the figure itself,
so that they work in JupyterLab, in an exported page, and without a kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from udonlib.lab.views.charts import TERMS, cell, line, nothing, panels
from udonlib.lab.views.style import PALETTE, TEXT, metric_label
from udonlib.runs.folder import RunFolder

N_POINTS = 160  # of a line at most
N_GROUPS = 8  # drawn at a time: as many as there are colours
DASHES = ("solid", "dash", "dot", "dashdot")
SMOOTHING = (0.0, 0.6, 0.9)  # weights of what was, as in TensorBoard
TRAINING = {"ce_student": TERMS["ce_student"], "total": TERMS["total"], "learning_rate": "", "gradient_norm": ""}
ROUGH = ("ce_student", "total", "gradient_norm")  # what is smoothed
COLUMNS = ["curve", "step", "value"]
BUTTONS = {
    "type": "buttons",
    "direction": "right",
    "xanchor": "left",
    "y": 1,
    "yanchor": "bottom",
    "font": {"size": 12},
}


def run_curves(run: RunFolder) -> pd.DataFrame:
    """The curves of a run as means over its domains: curve, step, value.

    Curves: ce_student (classification loss of the student), total, learning_rate (of the heads), gradient_norm (mean
    since the record before, of all trained parameters, before it is clipped; of runs that recorded it); r_at_1,
    mmp_at_k (validation queries in the merged index, percent).
    """
    records, losses = run.records("train"), run.losses()
    tables = []
    for term in ("ce_student", "total"):
        means = losses[losses["term"] == term].groupby("step", sort=True)["value"].mean()
        tables.append(means.reset_index().assign(curve=term))
    for name in ("learning_rate", "gradient_norm"):
        told = [(name, record["step"], float(record[name])) for record in records if name in record]
        tables.append(pd.DataFrame(told, columns=COLUMNS))
    rows = run.validation()
    rows = rows[(rows["embedder"] == "student") & (rows["index"] == "merged") & (rows["domain"] == "mean")]
    for metric in (name for name in rows if "_at_" in name):
        tables.append(rows[["step", metric]].rename(columns={metric: "value"}).assign(curve=metric))
    tables = [table[COLUMNS].astype({"step": int, "value": float}) for table in tables if len(table)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)


def over_seeds(curves: Sequence[pd.DataFrame], name: str, smoothing: float = 0.0) -> pd.DataFrame:
    """One curve of several runs: step, mean, low, high, n.

    At each step that one of them recorded stands the mean of those that have come so far and begun, low and high are
    the lowest and the highest of them; between two records a run is taken to be on the line that joins them.

    Args:
        curves: of each run, as of `run_curves`.
        name: of the curve.
        smoothing: weight s of what was, 0 to 1: `smoothed`; each run is smoothed before they are joined.
    """
    parts = []
    for table in curves:
        part = table[table["curve"] == name].drop_duplicates("step", keep="last").sort_values("step")
        if len(part):
            values = smoothed(part["value"].to_numpy(float), smoothing)
            parts.append((part["step"].to_numpy(int), values))
    steps = np.unique(np.concatenate([steps for steps, _ in parts])) if parts else np.zeros(0, int)
    if len(steps) > N_POINTS:
        steps = steps[np.unique(np.linspace(0, len(steps) - 1, N_POINTS).astype(int))]
    values = np.array([np.interp(steps, at, value, np.nan, np.nan) for at, value in parts]).reshape(
        len(parts), len(steps)
    )
    there = (~np.isnan(values)).sum(axis=0)
    keep = there > 0
    values, steps = values[:, keep], steps[keep]
    columns = {"step": steps, "mean": steps * 0.0, "low": steps * 0.0, "high": steps * 0.0, "n": there[keep]}
    if values.size:
        columns |= {"mean": np.nanmean(values, axis=0), "low": np.nanmin(values, 0), "high": np.nanmax(values, 0)}
    return pd.DataFrame(columns)


def smoothed(values: np.ndarray, weight: float) -> np.ndarray:
    """The moving average of a curve as TensorBoard draws it: a_t = s a_(t-1) + (1 - s) v_t, shown over 1 - s^t."""
    last, made = 0.0, np.empty(len(values))
    for place, value in enumerate(values):
        last = weight * last + (1 - weight) * value
        made[place] = last / (1 - weight ** (place + 1))
    return made


def curves_chart(
    groups: Mapping[str, Sequence[pd.DataFrame]], n_left_out: int = 0, smoothing: float = 0.0, log: bool = False
) -> go.Figure:
    """Draw losses, validation, learning rate and gradient norm of groups of runs over the steps.

    Args:
        groups: name -> curves of each run of the group, as of `run_curves`.
        n_left_out: groups that are not drawn, for the title.
        smoothing: where the buttons begin, one of SMOOTHING or another; log: likewise, of the axes of training.
    """
    known = list(dict.fromkeys(name for tables in groups.values() for table in tables for name in table["curve"]))
    order = [name for name in known if "_at_" in name] + [name for name in TRAINING if name in known]
    if not order:
        return nothing("Curves", "none of these runs has trained or validated yet")
    n_rows = -(-len(order) // 2)
    title = (
        "Curves of all runs above"
        if not n_left_out
        else f"Curves of {len(groups)} settings ({n_left_out} more: filter the table)"
    )
    fig = panels(
        title,
        [_title(name) for name in order],
        n_rows,
        2,
        205 + 255 * n_rows,
        vertical_spacing=0.21 / max(1, n_rows - 1),
    )
    levels = sorted({*SMOOTHING, smoothing})
    y_of: dict[float, list[Any]] = {level: [] for level in levels}
    for number, (group, tables) in enumerate(groups.items()):
        colour = PALETTE[number % len(PALETTE)]
        shown = f"{group} ({len(tables)} runs)" if len(tables) > 1 else group
        for place, name in enumerate(order):
            joined = {s: over_seeds(tables, name, s) for s in (levels if name in ROUGH else [0.0])}
            now = joined[smoothing if name in ROUGH else 0.0]
            if len(tables) > 1 and len(now):
                band = _band(now, colour).update(legendgroup=shown, showlegend=False)
                fig.add_trace(band, **cell(place, 2))
                for level in levels:
                    y_of[level].append(_rounded(_outline(joined.get(level, now))))
            trace = line(shown, now["step"], now["mean"], colour, "%{y:.4g}", place == 0, 2)
            trace.update(line_dash=DASHES[number // 4 % len(DASHES)])
            trace.update(mode="lines+markers" if len(now) < 3 else "lines")
            fig.add_trace(trace, **cell(place, 2))
            for level in levels:
                y_of[level].append(_rounded(joined.get(level, now)["mean"]))
    fig.update_xaxes(rangemode="tozero")
    for place in range(max(0, len(order) - 2), len(order)):
        fig.update_xaxes(title="step", **cell(place, 2))
    axes = [f"yaxis{place + 1}".replace("axis1", "axis") for place, name in enumerate(order) if name in TRAINING]
    if log:
        fig.update_layout({axis: {"type": "log"} for axis in axes})
    legend = {"orientation": "h", "x": 0, "xref": "container", "y": 0, "yref": "container", "yanchor": "bottom"}
    fig.update_layout(
        legend=legend,
        title={"y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 18}},
        margin={"t": 128, "b": 70 + 20 * len(groups)},
    )
    return fig.update_layout(updatemenus=_buttons(levels, smoothing, y_of, axes, log))


def _buttons(
    levels: Sequence[float], smoothing: float, y_of: Mapping[float, list[Any]], axes: Sequence[str], log: bool
) -> list[dict[str, Any]]:
    """What a person may change of the figure: how smooth it is, and the scale of the axes."""
    smooth = [
        {"label": f"smoothing {level:g}" if level else "as recorded", "method": "restyle", "args": [{"y": y_of[level]}]}
        for level in levels
    ]
    scales = [
        {"label": kind, "method": "relayout", "args": [{f"{axis}.type": kind for axis in axes}]}
        for kind in ("linear", "log")
    ]
    looks = BUTTONS | {
        "bgcolor": "rgba(128, 128, 128, 0.15)",
        "bordercolor": "rgba(128, 128, 128, 0.5)",
        "pad": {"b": 28},
    }
    menus = [{**looks, "buttons": smooth, "x": 0, "active": list(levels).index(smoothing)}]
    return [*menus, {**looks, "buttons": scales, "x": 0.58, "active": int(log)}] if axes else menus


def _title(name: str) -> str:
    if name in ("learning_rate", "gradient_norm"):
        return {"learning_rate": "learning rate of the heads", "gradient_norm": "norm of the gradient"}[name]
    return f"loss: {TERMS[name]}" if name in TERMS else f"validation {metric_label(name)}, %"


def _outline(joined: pd.DataFrame) -> np.ndarray:
    return np.concatenate([joined["high"], joined["low"][::-1]])


def _band(joined: pd.DataFrame, colour: str) -> go.Scatter:
    """From the lowest to the highest run, as one area."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    steps = np.concatenate([joined["step"], joined["step"][::-1]]).astype(np.int32)
    band = go.Scatter(x=steps, y=_outline(joined).astype(np.float32), mode="lines", line_width=0, fill="toself")
    return band.update(line_color=TEXT, fillcolor=f"rgba({red}, {green}, {blue}, 0.18)", hoverinfo="skip")


def _rounded(values: Any) -> list[float]:
    """With as many digits as are seen: buttons keep their numbers as text."""
    return [float(f"{value:.4g}") for value in values]
