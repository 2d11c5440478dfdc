"""A figure of ours as a PNG, drawn without a browser: what a notebook shows where nothing interactive is shown.

    png = draw(figure.to_dict())

plotly draws in a browser alone. The charts of the notebooks are few in kind, so that matplotlib can draw them from the
same description, to be the same at a glance: same data, axes, colours, legend and texts, at the same places. Lines,
markers, error bars, stacked areas, bars, heatmaps, lines across a panel and annotations are known; another kind ends
in a PictureError and is left to a browser. Axes and traces are in `picturedata.py`, ink is in `picturecanvas.py`.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from udonlib.lab.pictures.canvas import ABOVE, LINE_HEIGHT, ON_TOP, Canvas, rgba
from udonlib.lab.pictures.data import Axis, PictureError, Trace, array, merged
from udonlib.lab.pictures.legend import Legend

Spec = Mapping[str, Any]
Ends = tuple[float, float]

INK = "#444444"


def draw(figure: Spec, width: int = 900) -> bytes:
    """Draw a plotly figure, given as `Figure.to_dict()`. Its height is its layout's.

    Raises:
        PictureError: it holds something that only plotly can draw.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that no font has: a box stands for them
        try:
            return _Drawing(figure, width).png()
        except PictureError:
            raise
        except Exception as error:  # of a figure that is not like ours
            raise PictureError(f"form ({error!r})") from error


class _Drawing:
    """One figure. Everything is in pixels from the upper left corner."""

    def __init__(self, figure: Spec, width: int) -> None:
        self.template = figure["layout"].get("template", {}).get("layout", {})
        self.layout = merged(self.template, figure["layout"])
        self.width, self.height = float(width), float(self.layout.get("height", 450))
        self.font = self.layout.get("font", {})
        self.size, self.ink = float(self.font.get("size", 12)), self.font.get("color", INK)
        self.page = Canvas(self.width, self.height, self.size, self.ink)
        stacked = self.layout.get("barmode") == "stack"
        self._traces = [Trace(dict(spec), number, stacked) for number, spec in enumerate(figure.get("data", ()))]
        self._lay_out_data()
        self._lay_out_page()

    def png(self) -> bytes:
        """Draw all of it."""
        for axis in self.axes.values():
            self._draw_grid(axis)
        for trace in self._traces:
            {"bar": self._draw_bars, "heatmap": self._draw_heatmap}.get(trace.kind, self._draw_scatter)(trace)
        for axis in self.axes.values():
            self._draw_ticks(axis)
        for shape in self.layout.get("shapes", ()):
            self._draw_shape(shape)
        for annotation in self.layout.get("annotations", ()):
            self._draw_annotation(annotation)
        self._draw_title()
        self.legend.draw(self.left, self.right, self.top, self.bottom, self.width, self.height)
        return self.page.png()

    # Where everything is

    def _lay_out_data(self) -> None:
        """Give each axis the values that it has to show."""
        names = {name.replace("axis", "") for name in self.layout if re.fullmatch(r"[xy]axis\d*", name)}
        names |= {name for trace in self._traces for name in (trace.x_name, trace.y_name)}
        self.axes = {name: Axis(name, self._axis_spec(name), self.size) for name in sorted(names)}
        for trace in self._traces:
            trace.x_axis, trace.y_axis = self.axes[trace.x_name], self.axes[trace.y_name]
            trace.x_axis.take_categories(trace.given_x)
            trace.y_axis.take_categories(trace.given_y)
        stacks: dict[tuple[str, str], dict[float, float]] = {}
        for trace in self._traces:
            trace.measure(stacks.setdefault((trace.x_name + trace.y_name, trace.stack), {}))
        used = {name for trace in self._traces for name in (trace.x_name, trace.y_name)}
        for axis in self.axes.values():
            axis.is_visible &= axis.name in used
            root = self.axes.get(axis.spec.get("matches", ""), axis)
            if root is not axis:
                root.extents += axis.extents
        for axis in self.axes.values():
            axis.find_range(self.axes.get(axis.spec.get("matches", ""), axis).extents)

    def _axis_spec(self, name: str) -> dict[str, Any]:
        kind = name[0] + "axis"
        return merged(self.template.get(kind, {}), self.layout.get(kind + name[1:], {}))

    def _lay_out_page(self) -> None:
        """Find the margins that labels and legend need, and with them each axis' ends."""
        margin = {"l": 80, "r": 80, "t": 100, "b": 80} | dict(self.layout.get("margin", {}))
        self.legend = Legend(self._traces, self.layout, self.page)
        self.left, self.top = float(margin["l"]), float(margin["t"])
        self.right, self.bottom = self.width - float(margin["r"]), self.height - float(margin["b"])
        self.right = self.legend.right(self.left, self.width, self.right)
        self._place_axes()
        for axis in self.axes.values():
            if axis.letter == "y" and axis.spec.get("automargin") and self._origin(axis) <= self.left + 1:
                self.left = max(self.left, self._label_width(axis) + self._title_room(axis) + 4)
        self.right = self.legend.right(self.left, self.width, self.right)
        self.bottom = self.legend.bottom(self.left, self.width, self.top, self.height, self.bottom)
        self._place_axes()

    def _place_axes(self) -> None:
        wide, high = self.right - self.left, self.bottom - self.top
        for axis in self.axes.values():
            low, above = axis.spec.get("domain", (0, 1))
            ends = (self.left + low * wide, self.left + above * wide)
            axis.ends = ends if axis.letter == "x" else (self.bottom - low * high, self.bottom - above * high)
        for axis in self.axes.values():
            if (other := self.axes.get(axis.spec.get("scaleanchor", ""))) is not None:
                scale = min(axis.scale(), other.scale())
                axis.shrink(scale)
                other.shrink(scale)

    def _partner(self, axis: Axis) -> Axis:
        """The axis that crosses another one."""
        default = ("y" if axis.letter == "x" else "x") + axis.name[1:]
        name = axis.spec.get("anchor", default)
        return self.axes.get(name, self.axes.get(default, axis))

    def _origin(self, axis: Axis) -> float:
        """Where an axis stands: pixels across it."""
        return self._partner(axis).ends[0]

    def _label_width(self, axis: Axis) -> float:
        shown = axis.is_visible and axis.spec.get("showticklabels", True)
        return max((self.page.text_width(text) for _, text in axis.ticks()), default=0.0) + 4 if shown else 0.0

    def _title_room(self, axis: Axis) -> float:
        title = axis.spec.get("title", {})
        n_lines = title["text"].count("<br>") + 1 if title.get("text") else 0
        return n_lines * LINE_HEIGHT * self._title_size(axis) + float(title.get("standoff", 8)) if n_lines else 0.0

    def _title_size(self, axis: Axis) -> float:
        return float(axis.spec.get("title", {}).get("font", {}).get("size", self.size))

    # Axes

    def _draw_grid(self, axis: Axis) -> None:
        if not (axis.is_visible and axis.spec.get("showgrid", True)):
            return
        colour = axis.spec.get("gridcolor", "#eeeeee")
        across = self._partner(axis).ends
        for place, _ in axis.ticks():
            self.page.line(*self._along(axis, place, across), colour, 1)

    def _draw_ticks(self, axis: Axis) -> None:
        if not axis.is_visible:
            return
        spec, is_x = axis.spec, axis.letter == "x"
        origin, length = self._origin(axis), 5.0 if axis.spec.get("ticks") == "outside" and not axis.is_nested else 0.0
        angle, size = spec.get("tickangle"), float(spec.get("tickfont", {}).get("size", self.size))
        ticks = axis.ticks() if spec.get("showticklabels", True) else []
        lowest = origin + length
        for place, text in ticks:
            if length:
                self.page.line(
                    *self._along(axis, place, (origin, origin + length)), spec.get("tickcolor", INK), 1, ON_TOP
                )
            if not is_x:
                self.page.write(origin - 4, place, text, size, "right", "middle")
            elif angle:
                lowest = max(lowest, self.page.write_turned(place, origin + length + 4, text, size, -angle))
            else:
                n_lines = text.count("<br>") + 1
                self.page.write(place, origin + length + 3, text, size, "center", "top")
                lowest = max(lowest, origin + length + 3 + n_lines * LINE_HEIGHT * size)
        if axis.is_nested:
            lowest = self._draw_groups(axis, origin, lowest)
        self._draw_axis_title(axis, lowest)

    def _draw_groups(self, axis: Axis, origin: float, lowest: float) -> float:
        """The outer of two levels of categories, with lines between the groups."""
        end = lowest + 2 * LINE_HEIGHT * self.size
        colour = axis.spec.get("dividercolor", INK)
        for place in axis.borders():
            self.page.line((place, place), (origin, end), colour, 1, ON_TOP)
        for place, text in axis.groups():
            self.page.write(place, lowest + 6, text, self.size, "center", "top")
        return end

    def _draw_axis_title(self, axis: Axis, lowest: float) -> None:
        title, size = axis.spec.get("title", {}), self._title_size(axis)
        if not title.get("text"):
            return
        middle, gap = sum(axis.ends) / 2, float(title.get("standoff", 8))
        if axis.letter == "x":
            self.page.write(middle, lowest + gap - 6, title["text"], size, "center", "top")
        else:
            x = self._origin(axis) - self._label_width(axis) - gap - LINE_HEIGHT * size / 2
            self.page.write_turned(max(x, size * 0.7), middle, title["text"], size, 90, "center", "center")

    def _along(self, axis: Axis, place: float, across: Ends) -> tuple[Ends, Ends]:
        """A line across an axis at a place of it, as xs and ys."""
        return ((place, place), across) if axis.letter == "x" else (across, (place, place))

    # Data

    def _draw_scatter(self, trace: Trace) -> None:
        x, y = trace.x_axis.pixels(trace.x), trace.y_axis.pixels(trace.y)
        line, marker = trace.spec.get("line", {}), trace.spec.get("marker", {})
        colour = line.get("color", marker.get("color") if isinstance(marker.get("color"), str) else trace.colour)
        clip = None if trace.spec.get("cliponaxis") is False else trace.frame
        if trace.stack:
            base = trace.y_axis.pixels(trace.base)
            outline = (*_steps(x, y, line), *reversed(_steps(x, base, line)))
            self.page.area(outline, trace.spec.get("fillcolor", colour), trace.frame)
        if trace.spec.get("fill"):
            self.page.area(list(zip(x, y, strict=True)), trace.spec.get("fillcolor", colour), trace.frame)
        if "lines" in trace.mode and line.get("width", 2):
            xs, ys = zip(*_steps(x, y, line), strict=True) if len(x) else ((), ())
            self.page.line(xs, ys, colour, line.get("width", 2), 2, line.get("dash", "solid"), trace.frame)
        for name, along in (("error_x", x), ("error_y", y)):
            if trace.spec.get(name):
                self._draw_errors(trace, name, x, y, along is x, colour)
        if "markers" in trace.mode:
            self._draw_markers(x, y, trace, clip)

    def _draw_markers(self, x: Sequence[float], y: Sequence[float], trace: Trace, clip: Any) -> None:
        looks = trace.marker_looks(len(x))
        for look in dict.fromkeys(looks):
            chosen = [number for number, other in enumerate(looks) if other == look]
            self.page.marker([x[i] for i in chosen], [y[i] for i in chosen], look, clip)

    def _draw_errors(
        self, trace: Trace, name: str, x: Sequence[float], y: Sequence[float], is_x: bool, colour: str
    ) -> None:
        spec, axis = trace.spec[name], trace.x_axis if is_x else trace.y_axis
        low, high = (axis.pixels(values) for values in trace.errors(name))
        shade, width, cap = spec.get("color", colour), spec.get("thickness", 2), float(spec.get("width", 4))
        for across, start, end in zip(y if is_x else x, low, high, strict=True):
            parts = [((start, end), (across, across))]
            parts += [((at, at), (across - cap, across + cap)) for at in (start, end)]
            for along, beside in parts:
                self.page.line(*((along, beside) if is_x else (beside, along)), shade, width, ABOVE, clip=trace.frame)

    def _draw_bars(self, trace: Trace) -> None:
        left, right = (trace.x_axis.pixels(trace.x + shift) for shift in self._slot(trace))
        base, top = trace.y_axis.pixels(trace.base), trace.y_axis.pixels(trace.y)
        marker = trace.spec.get("marker", {})
        pattern = marker.get("pattern", {})
        for number in range(len(trace.x)):
            if np.isfinite(top[number]):
                shape = pattern.get("shape", "")
                shape = shape if isinstance(shape, str) else shape[number % len(shape)]
                corners = (left[number], top[number], right[number] - left[number], base[number] - top[number])
                self.page.box(corners, marker.get("color", trace.colour), shape, pattern.get("fgcolor", "white"))
        if trace.spec.get("error_y"):
            middle = [(a + b) / 2 for a, b in zip(left, right, strict=True)]
            self._draw_errors(trace, "error_y", middle, top, False, self.ink)

    def _slot(self, trace: Trace) -> Ends:
        """The ends of a trace's bars, in categories from their middle."""
        room = 1 - float(self.layout.get("bargap", 0.2))
        if self.layout.get("barmode", "group") == "stack":
            return -room / 2, room / 2
        beside = [other for other in self._traces if other.kind == "bar" and other.x_name == trace.x_name]
        width = room / len(beside)
        start = -room / 2 + beside.index(trace) * width
        return start, start + width

    def _draw_heatmap(self, trace: Trace) -> None:
        spec, values = trace.spec, np.atleast_2d(array(trace.spec["z"]))
        low, high = float(spec.get("zmin", np.nanmin(values))), float(spec.get("zmax", np.nanmax(values)))
        x, y = trace.x_axis, trace.y_axis
        places, colours = zip(*spec["colorscale"], strict=True)
        shades = np.array([rgba(colour) for colour in colours])
        gaps = (float(spec.get("xgap", 0)), float(spec.get("ygap", 0)))
        size = float(spec.get("textfont", {}).get("size", self.size))
        for (row, column), value in np.ndenumerate(values):
            (left, right), (top, bottom) = (
                sorted(axis.pixels(np.array([place - 0.5, place + 0.5]))) for axis, place in ((x, column), (y, row))
            )
            share = np.clip((value - low) / ((high - low) or 1), 0, 1)
            shade = tuple(float(np.interp(share, places, shades[:, i])) for i in range(3))
            corners = (left + gaps[0] / 2, top + gaps[1] / 2, right - left - gaps[0], bottom - top - gaps[1])
            self.page.box(corners, shade, "", "white")
            text = spec["text"][row][column] if spec.get("texttemplate") else ""
            ink = "#ffffff" if np.dot(shade, (0.299, 0.587, 0.114)) < 0.52 else "#444444"
            self.page.write((left + right) / 2, (top + bottom) / 2, text, size, "center", "middle", ink)

    # What is beside the data

    def _draw_shape(self, shape: Spec) -> None:
        if shape.get("type") != "line":
            raise PictureError(f"shape '{shape.get('type')}'")
        ends = [self._place(shape, letter, shape[letter + number]) for letter in "xy" for number in "01"]
        line = shape.get("line", {})
        dash = line.get("dash", "solid")
        self.page.line(ends[:2], ends[2:], line.get("color", INK), line.get("width", 2), ABOVE, dash)

    def _place(self, spec: Spec, letter: str, value: Any) -> float:
        """A place in the units of a panel's axis, of its frame or of all frames, in pixels."""
        name, _, domain = spec.get(f"{letter}ref", "paper").partition(" ")
        if name == "paper":
            ends = (self.left, self.right) if letter == "x" else (self.bottom, self.top)
        elif domain:
            ends = self.axes[name].ends
        else:
            return float(self.axes[name].place(value))
        return float(ends[0] + float(value) * (ends[1] - ends[0]))

    def _draw_annotation(self, spec: Spec) -> None:
        if spec.get("showarrow", True):
            raise PictureError("annotation with an arrow")
        at = {letter: spec.get(letter, 0.5) for letter in "xy"}
        x = self._place(spec, "x", at["x"]) + spec.get("xshift", 0)
        y = self._place(spec, "y", at["y"]) - spec.get("yshift", 0)
        font = merged(self.font, spec.get("font", {}))
        sides = (spec.get("xanchor", "center"), spec.get("yanchor", "middle"))
        self.page.write(
            x, y, spec.get("text", ""), float(font.get("size", self.size)), *sides, font.get("color", self.ink)
        )

    def _draw_title(self) -> None:
        title = self.layout.get("title", {})
        size = float(title.get("font", {}).get("size", 17))
        x = self.left if title.get("xref") == "paper" else title.get("x", 0.05) * self.width
        if "y" in title:
            self.page.write(x, (1 - title["y"]) * self.height, title.get("text", ""), size, "left", title["yanchor"])
        else:
            self.page.write(x, self.top / 2 - 3 - LINE_HEIGHT * size / 2, title.get("text", ""), size, "left", "top")


def _steps(x: Sequence[float], y: Sequence[float], line: Spec) -> list[tuple[float, float]]:
    """The corners of a line, which may go in steps that hold until the next point."""
    points = list(zip(x, y, strict=True))
    if line.get("shape") != "hv":
        return points
    corners = (((x, y), (x, new)) for (_, y), (x, new) in itertools.pairwise(points))
    return [*points[:1], *itertools.chain.from_iterable(corners)]
