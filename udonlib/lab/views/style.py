"""How everything drawn looks: colours, the one template of figures, and how a notebook stores a figure.

All of it reads on a light and on a dark page: backgrounds are transparent, text is a grey with a contrast of 4 to 1 on
white and on #111111. A domain has the same colour everywhere.
"""

import asyncio
import atexit
import base64
import contextlib
import html
import importlib.resources
import importlib.util
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from IPython.core.getipython import get_ipython
from IPython.display import display, update_display
from plotly.io.base_renderers import PngRenderer

from udonlib.lab import LOADING
from udonlib.lab.pictures import pictures

TEXT = "#7a7a7a"
GRID = "rgba(128, 128, 128, 0.25)"
# Eight colours at least 0.08 apart in OKLab for normal sight, protanopia, deuteranopia and tritanopia (simulated after
# Machado et al. 2009), each with a contrast of at least 2.4 on white and 3.2 on #111111.
PALETTE = ("#ff6a00", "#2563c1", "#9f01ff", "#b72f6d", "#5c6e05", "#ff6ecf", "#91ad74", "#19adff")
FIXED = {
    **dict(zip(("emoji", "flags", "logos", "icons", "fonts", "kanji", "fashion", "earth"), PALETTE, strict=True)),
    **dict(zip(("sop", "cars", "rp2k", "met", "food2k", "inshop", "inat", "gldv2"), PALETTE, strict=True)),
}
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "triangle-down", "star", "hexagon")
ACCENT = "#008b8b"  # of what is done, or sure


class EmbedderLook(NamedTuple):
    """How an embedder is told apart: also without colour, by the pattern of bars, symbols and the dashes of lines."""

    colour: str = TEXT
    pattern: str = "x"
    symbol: str = "x"
    dash: str = "dashdot"


EMBEDDER_LOOKS = {
    "student": EmbedderLook(ACCENT, "", "circle", "solid"),
    "teacher": EmbedderLook("#c77700", "/", "diamond-open", "dash"),
    "specialist": EmbedderLook("#7a5fd0", "x", "triangle-up", "dot"),
    "start": EmbedderLook("#3d9970", "-"),
    "features": EmbedderLook("#7f7f7f", "\\"),
    "pixels": EmbedderLook("#a8a8a8", "."),
}
# Frozen teachers, in the order of their names.
TEACHER_LOOKS = (
    EmbedderLook("#c77700", "/", "diamond", "solid"),
    EmbedderLook("#7a5fd0", "x", "square", "dash"),
    EmbedderLook("#2563c1", "\\", "triangle-up", "dot"),
    EmbedderLook("#b72f6d", ".", "cross", "dashdot"),
)
# What JupyterLab's own style sheets leave to be said, of all pages.
STYLE = f"<style>{importlib.resources.files(__package__).joinpath('front_end.css').read_text('utf-8')}</style>"
PNG_WIDTH = 700  # pixels: about what a page of 1,024 leaves, so that text is read there, too
LEAVE_SECONDS = 10.0  # for the browser to end, when the process does
PNG_SECONDS = 45  # for one image; a browser that starts on a busy machine needs some of them for its first one
_AXIS = {"gridcolor": GRID, "linecolor": GRID, "zeroline": False, "title": {"font": {"size": 13}, "standoff": 8}}

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "Inter, Segoe UI, Helvetica, Arial, sans-serif", "size": 13, "color": TEXT},
        "title": {"x": 0, "xref": "paper", "xanchor": "left", "font": {"size": 16}},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": _AXIS | {"ticks": "outside", "tickcolor": GRID},
        "yaxis": _AXIS | {"automargin": True},
        "legend": {"x": 1.02, "y": 1, "yanchor": "top", "tracegroupgap": 0, "bgcolor": "rgba(0,0,0,0)"},
        "hoverlabel": {"bgcolor": "#333333", "bordercolor": "#333333", "font": {"color": "#f2f2f2"}},
        "margin": {"l": 70, "r": 30, "t": 85, "b": 60},
    }
)


class _Pictures(PngRenderer):
    """A PNG beside the interactive figure: an export and a viewer of pictures show that one.

    A Chrome draws it, if there is one; it starts in the background, since that takes seconds. One browser draws all
    figures. Now and then it does not come up, or dies, and kaleido would wait for it without limit: then each figure
    gets a browser of its own, and where that does not answer either, or where there is none, `pictures.draw` draws.
    """

    def __init__(self) -> None:
        super().__init__(width=PNG_WIDTH, scale=1)
        # What is still to be tried; a list, since plotly draws with shallow copies of its renderers.
        self.ways: list[Callable[..., bytes]] = [_by_the_one_browser, _by_a_browser_of_its_own]
        self._browser = threading.Thread(target=self._start_browser, daemon=True)
        self._browser.start()

    def _start_browser(self) -> None:
        try:
            _start_the_one_browser()
        except _NoBrowserError:
            self.ways.clear()
        except Exception:  # whatever a browser can die of: the first figure tries again
            return

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, str]:
        size = {"width": self.width, "height": fig_dict["layout"].get("height", 450), "scale": self.scale}
        self._browser.join(timeout=PNG_SECONDS)
        while self.ways:
            png: list[bytes] = []
            call = threading.Thread(
                target=_try, args=(self.ways[0], fig_dict, {"format": "png", **size}, png), daemon=True
            )
            call.start()
            call.join(timeout=PNG_SECONDS)
            if png:
                return _as_png(png[0])
            self.ways.pop(0)
            if not self.ways:
                print("The browser that draws the figures' pictures does not answer: from here they do without it.")
        try:
            return _as_png(pictures.draw(fig_dict, self.width))
        except pictures.PictureError as error:  # a figure of somebody's own
            print(f"A figure has no static picture: only Chrome or Chromium draws its {error}.")
            return {}


class _NoBrowserError(Exception):
    pass


def _start_the_one_browser() -> None:
    if importlib.util.find_spec("kaleido") is None:
        raise _NoBrowserError
    import kaleido  # a second
    from choreographer.browsers.chromium import Chromium

    if not Chromium.find_browser(skip_local=False):
        raise _NoBrowserError
    kaleido.start_sync_server(silence_warnings=True, mathjax=False, timeout=30)
    atexit.register(_leave_the_one_browser)  # what is registered last comes first: before kaleido's own


def _leave_the_one_browser() -> None:
    """Let the browser end, but not wait for one that never came up, as kaleido would without limit."""
    from kaleido._sync_server import GlobalKaleidoServer

    server = GlobalKaleidoServer()
    if server.is_running():
        server._task_queue.put(None)
        server._thread.join(LEAVE_SECONDS)
        server._initialized = False  # kaleido has nothing left to wait for


def _as_png(image: bytes) -> dict[str, str]:
    return {"image/png": base64.b64encode(image).decode()}


def _try(way: Callable[..., bytes], figure: dict[str, Any], options: dict[str, Any], png: list[bytes]) -> None:
    with contextlib.suppress(Exception):  # whatever a browser can die of
        png.append(way(figure, options))


def _by_the_one_browser(figure: dict[str, Any], options: dict[str, Any]) -> bytes:
    import kaleido

    return kaleido.calc_fig_sync(figure, opts=options)


def _by_a_browser_of_its_own(figure: dict[str, Any], options: dict[str, Any]) -> bytes:
    import kaleido

    return asyncio.run(kaleido.calc_fig(figure, opts=options, kopts={"mathjax": False}))


def use_renderer() -> str:
    """Make figures show in JupyterLab, in exported HTML and as static images. Returns the renderer's name.

    Each figure is stored twice, interactive and as PNG: see `_Pictures`. Nothing that is shown needs a network.
    """
    with _without("rfc3987_syntax"):
        pio.renderers["png"] = _Pictures()
    pio.renderers.default = "plotly_mimetype+png"
    if get_ipython() is not None:
        update_display({"text/html": "", "text/plain": ""}, raw=True, display_id=LOADING)
        display({"text/html": STYLE}, raw=True)
    return str(pio.renderers.default)


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
    """Have an import find no such module, unless it is there already.

    plotly's renderers import nbformat, and that a checker of JSON, which makes a parser of web addresses for three
    seconds if it can; no figure has any.
    """
    absent = module not in sys.modules
    if absent:
        sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if absent:
            del sys.modules[module]


def domain_colours(names: Iterable[str]) -> dict[str, str]:
    """Give each domain its colour: fixed for MiniUnED and UnED, by a checksum of the name for others.

    Others take the next free colour where theirs is taken; beyond eight domains colours repeat.
    """
    names = list(dict.fromkeys(names))
    colours = {name: FIXED[name] for name in names if name in FIXED}
    for name in sorted(set(names) - set(colours)):
        start = zlib.crc32(name.encode()) % len(PALETTE)
        order = PALETTE[start:] + PALETTE[:start]
        used = list(colours.values())
        colours[name] = min(order, key=used.count)
    return {name: colours[name] for name in names}


def teacher_looks(names: Iterable[str]) -> dict[str, EmbedderLook]:
    """Give each frozen teacher its look, the same on all pages of a run; beyond four teachers they repeat."""
    return {name: TEACHER_LOOKS[place % len(TEACHER_LOOKS)] for place, name in enumerate(sorted(set(names)))}


def square(colour: str, name: str = "") -> str:
    """A name behind a square of a colour, as HTML that plotly understands, too."""
    return f'<span style="color:{colour}">■</span> {html.escape(name)}'


def coloured(names: Iterable[str]) -> list[str]:
    """The names of domains behind squares of their colours, for titles and ticks; the mean is bold."""
    names = list(names)
    colours = domain_colours(name for name in names if name != "mean")
    return [f"{square(colours[name], name)} " if name in colours else f"<b>{name}</b> " for name in names]


METRIC_KINDS = {"r": "R", "mmp": "mMP", "map": "mAP"}


def metric_label(metric: str) -> str:
    """Write r_at_1 as R@1, mmp_at_5 as mMP@5 and map_at_5 as mAP@5; any other name as it is."""
    kind, found, k = metric.partition("_at_")
    return f"{METRIC_KINDS[kind]}@{k}" if found and kind in METRIC_KINDS else metric


def metric_labels(table: pd.DataFrame) -> dict[str, str]:
    """Columns of an evaluation table that hold metrics, with the names to show: R@1, and mMP@k of the table's k."""
    mmp = next(name for name in table if name.startswith("mmp_at_") and name.removeprefix("mmp_at_").isdigit())
    return {name: metric_label(name) for name in ("r_at_1", mmp)}


def by_embedder(rows: pd.DataFrame) -> list[str]:
    """Embedders of a table in the order in which they are shown."""
    present = list(dict.fromkeys(rows["embedder"]))
    return [name for name in EMBEDDER_LOOKS if name in present] + [n for n in present if n not in EMBEDDER_LOOKS]
