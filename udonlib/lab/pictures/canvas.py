"""Lines, markers, boxes and marked-up text on a page of pixels, drawn by matplotlib. See `pictures.py`.

Everything is in pixels from the upper left corner. Colours are plotly's, in words.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from functools import cache
from html.parser import HTMLParser
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as Pixels

from udonlib.lab.pictures.data import Axis, Look, PictureError

FALLBACKS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "IPAGothic", "Hiragino Sans", "Microsoft YaHei")
LINE_HEIGHT = 1.3  # of a text, in its size
DASHES = {"dash": (9, 9), "dot": (3, 3), "longdash": (15, 10), "dashdot": (9, 5, 3, 5), "longdashdot": (15, 8, 3, 8)}
THIN = ("+", "x", "|")  # markers that are all line
HATCHES = {"/": "///", "\\": "\\\\\\", "x": "xx", ".": "..", "-": "--", "|": "||", "+": "+"}
ABOVE, ON_TOP, LETTERS = 3, 4, 5  # what is drawn over what
MARKERS = {  # plotly's symbol -> matplotlib's, and how large it has to be
    "circle": ("o", 1.0),
    "square": ("s", 1.0),
    "diamond": ("D", 0.92),
    "cross": ("P", 1.2),
    "x": ("X", 1.1),
    "triangle-up": ("^", 1.1),
    "triangle-down": ("v", 1.1),
    "star": ("*", 1.4),
    "hexagon": ("h", 1.0),
    "cross-thin": ("+", 1.4),
    "x-thin": ("x", 1.0),
    "line-ns": ("|", 1.4),
}


class Run(NamedTuple):
    """Letters that look alike."""

    text: str
    bold: bool
    colour: str
    size: float


class Canvas:
    """A page that is transparent where nothing is drawn.

    Args:
        width, height: of the page.
        size, ink: of the letters that do not say otherwise.
    """

    def __init__(self, width: float, height: float, size: float, ink: str) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second
        from matplotlib.figure import Figure

        self.height, self.size, self.ink = height, size, ink
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # a point is a pixel
        self._canvas = FigureCanvasAgg(figure)
        figure.patch.set_alpha(0)
        self._page = figure.add_axes((0, 0, 1, 1))
        self._page.set(xlim=(0, width), ylim=(height, 0))
        self._page.axis("off")

    def png(self) -> bytes:
        """The page; 256 colours are enough for it, and a third of the bytes."""
        self._canvas.draw()
        pixels = Pixels.fromarray(np.asarray(self._canvas.buffer_rgba()))
        file = io.BytesIO()
        pixels.quantize(256, Pixels.Quantize.FASTOCTREE, dither=Pixels.Dither.NONE).save(file, "PNG", optimize=True)
        return file.getvalue()

    def line(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        colour: Any,
        width: float,
        order: int = 1,
        dash: str = "solid",
        clip: Any = None,
    ) -> None:
        # matplotlib counts dashes in widths of the line.
        style = (0, tuple(part * max(1.0, width / 3) / width for part in DASHES[dash])) if dash in DASHES else "solid"
        [line] = self._page.plot(xs, ys, color=rgba(colour), linewidth=width, linestyle=style, zorder=order)
        line.set(dash_capstyle="butt", solid_capstyle="butt", solid_joinstyle="round")
        line.set_clip_box(self._clip(clip))
        line.set_snap(len(xs) == 2 or None)  # straight lines are sharp

    def marker(self, xs: Sequence[float], ys: Sequence[float], look: Look, clip: Any) -> None:
        base = look.symbol.removesuffix("-open")
        if base not in MARKERS:
            raise PictureError(f"marker '{look.symbol}'")
        shape, factor = MARKERS[base]
        is_open = look.symbol.endswith("-open")
        edge = look.colour if is_open or shape not in THIN else look.edge
        edge = look.edge if not is_open and look.width else edge
        width = look.width or (1.0 if is_open or shape in THIN else 0.0)
        [line] = self._page.plot(xs, ys, marker=shape, linestyle="none", markersize=factor * look.size, zorder=ON_TOP)
        line.set(markerfacecolor="none" if is_open else rgba(look.colour), markeredgecolor=rgba(edge))
        line.set(markeredgewidth=width, alpha=None if look.opacity == 1 else look.opacity)
        line.set_clip_box(self._clip(clip))

    def area(self, outline: Sequence[tuple[float, float]], colour: Any, clip: Any) -> None:
        from matplotlib.patches import Polygon

        if outline:
            area = Polygon(outline, closed=True, facecolor=rgba(colour), linewidth=0, zorder=1.5)
            self._page.add_patch(area).set_clip_box(self._clip(clip))

    def box(self, corners: Sequence[float], colour: Any, pattern: str, ink: str) -> None:
        from matplotlib.patches import Rectangle

        x, y, width, height = corners
        hatch = HATCHES.get(pattern, "") or None
        box = Rectangle((x, y), width, height, facecolor=rgba(colour), edgecolor=ink, linewidth=0, hatch=hatch)
        box.set_hatch_linewidth(0.7)
        self._page.add_patch(box).set(zorder=2)

    def _clip(self, frame: Sequence[Axis] | None) -> Any:
        from matplotlib.transforms import Bbox

        if frame is None:
            return None
        (left, right), (bottom, top) = (axis.ends for axis in frame)
        return Bbox.from_extents(left - 1, self.height - bottom - 1, right + 1, self.height - top + 1)

    def text_width(self, text: str, size: float | None = None) -> float:
        lines = _parsed(text, self.ink, size or self.size)
        return max((sum(map(self._run_width, runs)) for runs in lines), default=0.0)

    def _run_width(self, run: Run) -> float:
        if not run.text:
            return 0.0
        return float(self._canvas.get_renderer().get_text_width_height_descent(run.text, _font(run), False)[0])

    def write(
        self, x: float, y: float, text: str, size: float, side: str, height: str, colour: str | None = None
    ) -> None:
        """Write lines of marked-up text at a place that is their left, center or right; top, middle or bottom."""
        lines = _parsed(text, colour or self.ink, size)
        tall = [LINE_HEIGHT * max((run.size for run in runs), default=size) for runs in lines]
        y -= {"top": 0.0, "middle": 0.5, "bottom": 1.0}[height] * sum(tall)
        for runs, room in zip(lines, tall, strict=True):
            at = x - {"left": 0.0, "center": 0.5, "right": 1.0}[side] * sum(map(self._run_width, runs))
            for run in runs:
                self._letters(at, y + room * 0.74, run, ha="left", va="baseline")
                at += self._run_width(run)
            y += room

    def write_turned(
        self, x: float, y: float, text: str, size: float, angle: float, side: str = "", height: str = "top"
    ) -> float:
        """Write one line at an angle; return how far down it reaches. Without a side it is a label below an axis."""
        runs = [run for line in _parsed(text, self.ink, size) for run in line]
        run = Run(" ".join(run.text for run in runs), False, self.ink, size)
        side = side or ("center" if abs(angle) == 90 else "right" if angle > 0 else "left")
        self._letters(x, y, run, rotation=angle, ha=side, va=height, rotation_mode="default")
        turn = np.radians(angle)
        return float(y + abs(np.sin(turn)) * self._run_width(run) + abs(np.cos(turn)) * size)

    def _letters(self, x: float, y: float, run: Run, **how: Any) -> None:
        colour = rgba(run.colour)
        self._page.text(
            x, y, run.text, color=colour, fontproperties=_font(run), parse_math=False, zorder=LETTERS, **how
        )


def rgba(colour: Any) -> Any:
    """A colour as matplotlib takes it: plotly writes rgba(128, 128, 128, 0.25)."""
    if isinstance(colour, str) and (numbers := re.fullmatch(r"rgba?\((.*)\)", colour)):
        red, green, blue, *alpha = (float(part) for part in numbers[1].split(","))
        return (red / 255, green / 255, blue / 255, *alpha)
    if isinstance(colour, str):
        from matplotlib.colors import to_rgba

        return to_rgba(colour)
    return colour


@cache
def _families() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return [name for name in FALLBACKS if name in installed]


def _font(run: Run) -> Any:
    from matplotlib.font_manager import FontProperties

    return FontProperties(family=_families(), size=run.size, weight="bold" if run.bold else "normal")


@cache
def _parsed(text: str, colour: str, size: float) -> list[list[Run]]:
    """Lines of a text with plotly's markup: <b>, <br>, <span style="color:..;font-size:..">."""
    reader = _Markup(Run("", False, colour, size))
    reader.feed(text)
    reader.close()
    return reader.lines


class _Markup(HTMLParser):
    def __init__(self, look: Run) -> None:
        super().__init__()
        self.lines: list[list[Run]] = [[]]
        self._looks = [look]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "br":
            self.lines.append([])
            return
        look = self._looks[-1]
        style = dict(re.findall(r"([\w-]+):\s*([^;]+)", dict(attrs).get("style") or ""))
        look = look._replace(colour=style.get("color", look.colour), bold=look.bold or tag == "b")
        look = look._replace(size=float(style["font-size"].removesuffix("px")) if "font-size" in style else look.size)
        self._looks.append(look)

    def handle_endtag(self, tag: str) -> None:
        if tag != "br" and len(self._looks) > 1:
            self._looks.pop()

    def handle_data(self, data: str) -> None:
        self.lines[-1].append(self._looks[-1]._replace(text=data))
