"""What a drawn figure has to show, in pixels: its axes with range and ticks, and its traces. See `pictures.py`.

The rules are plotly's, as far as our figures need them: it leaves room at the ends of what it shows, puts ticks at 1, 2
or 5 times a power of ten, and writes 12000 as 12k.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

ROOM = 0.05  # of an axis' length, left free at an end that shows data
TICK_PIXELS = {"x": 80, "y": 40}  # between two ticks, about
DIGITS = {"D1": range(1, 10), "D2": (1, 2, 5)}  # of the ticks of a logarithmic axis


class PictureError(Exception):
    """Something that only plotly can draw."""


def merged(*specs: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that later ones override, level by level."""
    whole: dict[str, Any] = {}
    for spec in specs:
        for name, value in spec.items():
            both = isinstance(value, Mapping) and isinstance(whole.get(name), Mapping)
            whole[name] = merged(whole[name], value) if both else value
    return whole


def array(values: Any) -> Shaped[np.ndarray, "..."]:
    """Values as plotly stores them: a sequence, or the bytes of numbers."""
    if isinstance(values, Mapping):
        numbers = np.frombuffer(base64.b64decode(values["bdata"]), np.dtype(values["dtype"]))
        return numbers.reshape([int(n) for n in str(values["shape"]).split(",")]) if "shape" in values else numbers
    items = [None if value is None else value for value in values]
    if any(isinstance(item, str) for item in items):
        return np.array(items, dtype=object)
    return np.array([np.nan if item is None else item for item in items]) if items else np.zeros(0)


class Axis:
    """One axis of a panel: `name` is plotly's, such as x or y2; `ends` are the pixels of its low and its high end."""

    def __init__(self, name: str, spec: Mapping[str, Any], size: float) -> None:
        self.name, self.letter, self.spec = name, name[0], spec
        self.ends = (0.0, 1.0)
        self.range = (0.0, 1.0)
        self.extents: list[tuple[float, float, bool]] = []  # low, high, whether they need room beyond
        self.is_log, self.is_nested = spec.get("type") == "log", False
        self.is_visible = spec.get("visible", True)
        self._size = size
        self._categories: list[Any] = []
        self._has_categories = False
        if spec.get("type") in ("date",):
            raise PictureError(f"axis of type '{spec['type']}'")

    # Values

    def take_categories(self, given: Shaped[np.ndarray, "..."]) -> None:
        """Note what the data calls its categories, in its order or that of the axis."""
        if given.dtype != object and given.dtype.kind not in "US":
            return
        self.is_nested |= given.ndim == 2
        if not self._has_categories and self.spec.get("categoryorder") == "array":
            self._categories += list(self.spec["categoryarray"])
        self._has_categories = True
        self._categories += [item for item in _items(given) if item not in self._categories]
        self._categories = list(dict.fromkeys(self._categories))

    def numbers(self, given: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, "point"]:
        """Values in the unit in which the axis is even: places of categories, logarithms, or themselves."""
        if self._has_categories:
            places = {item: place for place, item in enumerate(self._categories)}
            return np.array([places.get(item, np.nan) for item in _items(given)], dtype=float)
        if self.is_log:
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.log10(given.astype(float))
        return given.astype(float)

    def extend(self, parts: Sequence[Float[np.ndarray, "point"]], needs_room: bool) -> None:
        """Note values that the axis has to show."""
        values = np.concatenate([*parts, np.zeros(0)])
        values = values[np.isfinite(values)]
        if len(values):
            self.extents.append((float(values.min()), float(values.max()), needs_room))

    def find_range(self, extents: Sequence[tuple[float, float, bool]]) -> None:
        """Settle what the axis shows: what it is told to, or all values with room at the ends."""
        if "range" in self.spec:
            self.range = (float(self.spec["range"][0]), float(self.spec["range"][1]))
            return
        low = min((low for low, _, _ in extents), default=0.0)
        high = max((high for _, high, _ in extents), default=1.0)
        from_zero = self.spec.get("rangemode") == "tozero" and not self.is_log
        if from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if high <= low:
            low, high = (low - 1, high + 1) if not from_zero else (low, high + 1)
        below, above = (self._room(extents, side, end, from_zero) for side, end in enumerate((low, high)))
        span = (high - low) / (1 - below - above)
        self.range = (low - below * span, high + above * span)
        if self.spec.get("autorange") == "reversed":
            self.range = self.range[::-1]

    def _room(self, extents: Sequence[tuple[float, float, bool]], side: int, end: float, from_zero: bool) -> float:
        """The share of the axis to leave free at an end: some where data that needs it is there."""
        needed = any(extent[2] and extent[side] == end for extent in extents)
        return ROOM if needed and not (from_zero and end == 0) else 0.0

    # Pixels

    def pixels(self, numbers: Sequence[float] | Float[np.ndarray, "point"]) -> list[float]:
        """Where values are, given as `numbers` gives them."""
        share = (np.asarray(numbers, float) - self.range[0]) / (self.range[1] - self.range[0])
        return [float(value) for value in self.ends[0] + share * (self.ends[1] - self.ends[0])]

    def place(self, value: Any) -> float:
        """Where one value is, given as a person writes it: a category's name or a number."""
        given = np.array([value], dtype=object) if isinstance(value, str) else np.array([value], dtype=float)
        number = self.numbers(given) if isinstance(value, str) or not self._has_categories else given
        return self.pixels(number)[0]

    def scale(self) -> float:
        """Pixels of one unit."""
        return abs((self.ends[1] - self.ends[0]) / (self.range[1] - self.range[0]))

    def shrink(self, scale: float) -> None:
        """Take only so much of the room that a unit has this many pixels, in the middle of it."""
        middle, sign = sum(self.ends) / 2, math.copysign(1, self.ends[1] - self.ends[0])
        half = sign * scale * abs(self.range[1] - self.range[0]) / 2
        self.ends = (middle - half, middle + half)

    # Ticks

    def ticks(self) -> list[tuple[float, str]]:
        """The ticks within the range: pixels and texts."""
        if "tickvals" in self.spec:
            given = array(self.spec["tickvals"])
            texts = self.spec.get("ticktext") or [f"{value:g}" for value in given]
            is_named = given.dtype == object or self.is_log
            ticks = list(zip(self.numbers(given) if is_named else given.astype(float), texts, strict=False))
        elif self._has_categories:
            texts = [str(item[1] if self.is_nested else item) for item in self._categories]
            ticks = list(enumerate(texts))
        elif self.is_log:
            ticks = self._log_ticks()
        else:
            ticks = self._even_ticks()
        low, high = sorted(self.range)
        slack = 1e-6 * (high - low)
        return [(self.pixels([at])[0], text) for at, text in ticks if low - slack <= at <= high + slack]

    def groups(self) -> list[tuple[float, str]]:
        """The outer categories of two levels: the middle of each, and its name."""
        places: dict[str, list[int]] = {}
        for place, (outer, _) in enumerate(self._categories):
            places.setdefault(str(outer), []).append(place)
        return [(self.pixels([float(np.mean(inner))])[0], outer) for outer, inner in places.items()]

    def borders(self) -> list[float]:
        """Pixels between the outer categories, and at both ends."""
        outer = [category[0] for category in self._categories]
        between = [place - 0.5 for place in range(1, len(outer)) if outer[place] != outer[place - 1]]
        return self.pixels(np.array([-0.5, *between, len(outer) - 0.5]))

    def _even_ticks(self) -> list[tuple[float, str]]:
        low, high = sorted(self.range)
        length = abs(self.ends[1] - self.ends[0])
        n_ticks = self.spec.get("nticks") or min(max(length / TICK_PIXELS[self.letter], 4), 9) + 1
        rough = (high - low) / n_ticks
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(factor for factor in (2, 5, 10) if factor > rough / power * (1 + 1e-9))
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        numbers = range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)
        most = math.floor(math.log10(max(abs(low), abs(high))) + 0.01)
        unit = max(0, round((most - 1) / 3)) if most > 3 else 0  # thousands, millions: the same for all ticks
        return [(number * step, self._written(number * step, digits, unit)) for number in numbers]

    def _log_ticks(self) -> list[tuple[float, str]]:
        low, high = sorted(self.range)
        powers = range(math.floor(low), math.ceil(high) + 1)
        factors = DIGITS.get(str(self.spec.get("dtick", "D2" if high - low < 2 else 1)), (1,))
        ticks = []
        for power in powers:
            for factor in factors:
                number = factor * 10.0**power
                text = self._written(number, max(0, -power)) if factor == 1 else str(factor)
                ticks.append((math.log10(number), text))
        return ticks

    def _written(self, number: float, digits: int, unit: int = 0) -> str:
        form = self.spec.get("tickformat", "")
        if form == ",":
            text = f"{number:,.0f}"
        elif form == "~s" or unit:
            unit = unit or (int(math.log10(abs(number)) // 3) if abs(number) >= 1000 else 0)
            text = f"{number / 1000**unit:.6g}{' kMG'[unit].strip() if number else ''}"
        elif form:
            raise PictureError(f"tick format '{form}'")
        else:
            text = f"{number:.{digits}f}"
            text = text.rstrip("0").rstrip(".") if digits else text
        return text.replace("-", "−")


class Look(NamedTuple):
    symbol: str
    colour: str
    size: float
    edge: str
    width: float
    opacity: float


class Trace:
    """One plotly trace, and its data in the units of its axes."""

    x_axis: Axis
    y_axis: Axis
    x: Float[np.ndarray, "point"]
    y: Float[np.ndarray, "point"]
    base: Float[np.ndarray, "point"]  # of areas and bars

    def __init__(self, spec: Mapping[str, Any], number: int, is_stacked: bool) -> None:
        self.spec, self.kind = spec, spec.get("type", "scatter")
        if (
            self.kind not in ("scatter", "bar", "heatmap")
            or spec.get("orientation") == "h"
            or spec.get("fill", "toself") != "toself"
        ):
            raise PictureError(f"trace '{self.kind}'")
        self.x_name, self.y_name = spec.get("xaxis") or "x", spec.get("yaxis") or "y"
        given = {letter: array(spec[letter]) for letter in "xy" if spec.get(letter) is not None}
        counted = np.arange(len(next(iter(given.values()), ())))  # what is not given
        self.given_x, self.given_y = given.get("x", counted), given.get("y", counted)
        self.name, self.mode = str(spec.get("name", f"trace {number}")), spec.get("mode", "lines")
        self.stack = "bar" if self.kind == "bar" else spec.get("stackgroup", "")
        self.colour = f"C{number % 10}"  # plotly's own colours, in the same order
        self.is_stacked = is_stacked  # if it is a bar

    @property
    def frame(self) -> tuple[Axis, Axis]:
        return self.x_axis, self.y_axis

    def measure(self, stack: dict[float, float]) -> None:
        """Find the data's place on the axes, and tell these; `stack` is the top of what lies below at each x."""
        if self.kind == "heatmap":
            for axis, given in ((self.x_axis, self.given_x), (self.y_axis, self.given_y)):
                axis.extents.append((-0.5, len(given) - 0.5, False))
            return
        self.x, self.y = self.x_axis.numbers(self.given_x), self.y_axis.numbers(self.given_y)
        self.base = np.zeros_like(self.y)
        is_pile = bool(self.stack) and (self.kind == "scatter" or self.is_stacked)
        if is_pile:
            self.base = np.array([stack.get(float(x), 0.0) for x in self.x])
            self.y = self.base + np.nan_to_num(self.y)
            stack.update(zip(map(float, self.x), map(float, self.y), strict=True))
        has_dots = self.kind == "scatter" and "markers" in self.mode
        if self.kind == "bar":
            self.x_axis.extents.append((self.x.min() - 0.5, self.x.max() + 0.5, False))
        else:
            self.x_axis.extend([self.x, *self.errors("error_x")], has_dots)
        if self.stack:
            self.y_axis.extend([self.base], False)
        self.y_axis.extend([self.y, *self.errors("error_y")], not (self.kind == "scatter" and is_pile))

    def errors(self, name: str) -> list[Float[np.ndarray, "point"]]:
        """The lower and upper ends of error bars; none where there are none."""
        if not (spec := self.spec.get(name)) or spec.get("array") is None:
            return []
        middle = self.x if name == "error_x" else self.y
        up = array(spec["array"]).astype(float)
        down = up if spec.get("arrayminus") is None else array(spec["arrayminus"]).astype(float)
        return [middle - down, middle + up]

    def marker_looks(self, n: int) -> list[Look]:
        """How each point's marker looks."""
        marker = self.spec.get("marker", {})
        line = marker.get("line", {})
        colour = marker.get("color", self.spec.get("line", {}).get("color", self.colour))
        parts = [marker.get("symbol", "circle"), colour, marker.get("size", 6), line.get("color", colour)]
        parts += [line.get("width", 0), marker.get("opacity", 1)]
        return [Look(*(_item(part, number) for part in parts)) for number in range(n)]


def _item(value: Any, number: int) -> Any:
    return value[number] if isinstance(value, (list, tuple, np.ndarray)) else value


def _items(given: Shaped[np.ndarray, "..."]) -> list[Any]:
    """Categories one by one; of two levels, pairs."""
    return [tuple(pair) for pair in given.T.tolist()] if given.ndim == 2 else given.tolist()
