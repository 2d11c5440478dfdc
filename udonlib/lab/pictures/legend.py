"""The legend of a drawn figure: which traces it names, how much room it takes, and its samples. See `pictures.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from udonlib.lab.pictures.canvas import Canvas
from udonlib.lab.pictures.data import Trace, merged

SAMPLE = 30  # pixels of a line
ENTRY = 20  # pixels from one entry to the next


class Legend:
    """The names of traces, each beside a sample: one above the other, or lying in rows.

    Args:
        traces: of the figure.
        layout: of the figure.
        page: to draw on.
    """

    def __init__(self, traces: Sequence[Trace], layout: Mapping[str, Any], page: Canvas) -> None:
        self._page = page
        self._spec = merged({"x": 1.02, "y": 1, "orientation": "v"}, layout.get("legend", {}))
        self._title = self._spec.get("title", {}).get("text", "")
        named = [trace for trace in traces if trace.spec.get("showlegend", True) and trace.kind != "heatmap"]
        asked = any(trace.spec.get("showlegend") for trace in traces) or len(named) > 1
        order = self._spec.get("traceorder", "reversed" if layout.get("barmode") == "stack" else "normal")
        named = named[::-1] if order == "reversed" else named
        self.entries = named if asked and layout.get("showlegend", True) else []
        self.lies, self._is_of_page = self._spec["orientation"] == "h", self._spec.get("yref") == "container"

    def right(self, left: float, width: float, right: float) -> float:
        """Where the panels have to end on the right, for a legend beside them."""
        if not self.entries or self.lies or self._spec["x"] <= 1:
            return right
        widest = max([*map(self._width, self.entries), self._page.text_width(self._title) + 12]) + 6
        return min(right, left + (width - left - widest) / self._spec["x"])

    def bottom(self, left: float, width: float, top: float, height: float, bottom: float) -> float:
        """Where the panels have to end below, for a legend that lies under them."""
        if not self.entries or not self.lies or self._is_of_page:
            return bottom
        room = -(-len(self.entries) // self._columns(left, width)) * ENTRY + 8
        return min(bottom, top + (height - top - room) / (1 - min(0.0, self._spec["y"])))

    def draw(self, left: float, right: float, top: float, bottom: float, width: float, height: float) -> None:
        """Draw it, beside or below panels that end there."""
        if not self.entries:
            return
        columns = self._columns(left, width) if self.lies else 1
        rows = -(-len(self.entries) // columns) + bool(self._title and not self.lies)
        start = left + self._spec["x"] * (right - left)
        y = (1 - self._spec["y"]) * height if self._is_of_page else bottom - self._spec["y"] * (bottom - top)
        y -= rows * ENTRY + 6 if self._spec.get("yanchor") == "bottom" else 0
        if self._title and not self.lies:
            self._page.write(start + 2, y + ENTRY / 2, self._title, self._page.size, "left", "middle")
            y += ENTRY
        widest, x = max(map(self._width, self.entries)), start
        for number, trace in enumerate(self.entries):
            if number % columns == 0:
                x, y = start, y + (ENTRY if number else ENTRY / 2 + 4)
            self._draw_sample(trace, x + 5, y)
            self._page.write(x + 10 + SAMPLE, y, trace.name, self._page.size, "left", "middle")
            x += widest if columns < len(self.entries) else self._width(trace)

    def _width(self, trace: Trace) -> float:
        return SAMPLE + 15 + self._page.text_width(trace.name)

    def _columns(self, left: float, width: float) -> int:
        """Entries side by side: all, or as many as fit where all are as wide as the widest."""
        widths, room = list(map(self._width, self.entries)), width - left - 10
        return len(widths) if sum(widths) <= room else max(1, int(room // max(widths)))

    def _draw_sample(self, trace: Trace, x: float, y: float) -> None:
        line, marker, middle = trace.spec.get("line", {}), trace.spec.get("marker", {}), x + SAMPLE / 2
        colour = line.get("color", trace.colour)
        if trace.kind == "bar":
            pattern = marker.get("pattern", {})
            shape = pattern.get("shape", "")
            box = (middle - 6, y - 6, 12, 12)
            self._page.box(box, marker.get("color", colour), shape if isinstance(shape, str) else "", "white")
        elif trace.stack:
            self._page.box((x, y - 3, SAMPLE, 6), trace.spec.get("fillcolor", colour), "", "white")
        elif "lines" in trace.mode:
            self._page.line((x, x + SAMPLE), (y, y), colour, line.get("width", 2), 2, line.get("dash", "solid"))
        if "markers" in trace.mode and trace.kind == "scatter":
            look = trace.marker_looks(1)[0]
            constant = self._spec.get("itemsizing") == "constant"
            self._page.marker([middle], [y], look._replace(size=11.0 if constant else min(look.size, 16.0)), None)

    # Strokes

    # Letters
