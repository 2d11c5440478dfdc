"""How everything drawn looks: colours, the one template of figures, and how a notebook stores a figure.

All of it reads on a light and on a dark page: backgrounds are transparent, text is a grey with a contrast of 4 to 1 on
white and on #111111. A domain has the same colour everywhere.
"""

import base64
import importlib.util
import threading
import zlib
from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
from IPython.core.getipython import get_ipython
from IPython.display import HTML, display
from plotly.io.base_renderers import PngRenderer

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
EMBEDDERS = {  # name -> colour, fill pattern: told apart without colour, too
    "student": ("#008b8b", ""),
    "teacher": ("#c77700", "/"),
    "specialist": ("#7a5fd0", "x"),
    "features": ("#7f7f7f", "\\"),
    "pixels": ("#a8a8a8", "."),
}
PNG_WIDTH = 900  # pixels
# JupyterLab shows a figure's image until the mouse is on it, then the figure; without this, in the image's own width.
FIT_IMAGES = "<style>.jp-RenderedPlotly .plot-img { max-width: 100%; }</style>"
AXIS = {"font": {"size": 13}, "standoff": 8}

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "Inter, Segoe UI, Helvetica, Arial, sans-serif", "size": 13, "color": TEXT},
        "title": {"x": 0, "xref": "paper", "xanchor": "left", "font": {"size": 16}},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": {
            "gridcolor": GRID,
            "linecolor": GRID,
            "zeroline": False,
            "ticks": "outside",
            "tickcolor": GRID,
            "title": AXIS,
        },
        "yaxis": {"gridcolor": GRID, "linecolor": GRID, "zeroline": False, "automargin": True, "title": AXIS},
        "legend": {"x": 1.02, "y": 1, "yanchor": "top", "tracegroupgap": 0, "bgcolor": "rgba(0,0,0,0)"},
        "hoverlabel": {"bgcolor": "#333333", "bordercolor": "#333333", "font": {"color": "#f2f2f2"}},
        "margin": {"l": 70, "r": 30, "t": 85, "b": 60},
    }
)


class _PngOrNothing(PngRenderer):
    """A PNG beside the interactive figure. After a first failure none: a dead browser must not block a notebook."""

    def __init__(self) -> None:
        super().__init__(width=PNG_WIDTH, scale=1)
        self.failures: list[str] = []  # a list, since plotly draws with shallow copies of its renderers

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, str]:
        png: list[bytes] = []
        if not self.failures:
            # kaleido waits without limit for a server whose browser is gone: hence the thread.
            call = threading.Thread(target=self._draw, args=(fig_dict, png), daemon=True)
            call.start()
            call.join(timeout=60)
        if not png and not self.failures:
            self.failures.append("no answer")
            print("Static images of figures are off from here: the browser that draws them does not answer.")
        return {"image/png": base64.b64encode(png[0]).decode()} if png else {}

    def _draw(self, fig_dict: dict[str, Any], png: list[bytes]) -> None:
        import kaleido  # optional: without it figures are interactive only

        size = {"width": self.width, "height": fig_dict["layout"].get("height", 450), "scale": self.scale}
        try:
            png.append(kaleido.calc_fig_sync(fig_dict, opts={"format": "png", **size}))
        except Exception:  # whatever a browser can die of; the figure shows without its image
            png.clear()


def use_renderer() -> str:
    """Make figures show in JupyterLab, in exported HTML and as static images. Returns the renderer's name.

    With kaleido and a Chrome or Chromium a figure is stored twice, interactive and as PNG. Without, one line says so,
    and figures in exported HTML load plotly.js from its public address.
    """
    missing = "the package kaleido is not installed"
    if importlib.util.find_spec("kaleido"):
        import kaleido
        from choreographer.browsers.chromium import Chromium

        missing = "no Chrome or Chromium was found (plotly_get_chrome installs one)"
        if Chromium.find_browser(skip_local=False):
            kaleido.start_sync_server(silence_warnings=True, mathjax=False, timeout=30)
            pio.renderers["png"] = _PngOrNothing()
            missing = ""
    pio.renderers.default = "plotly_mimetype+" + ("notebook_connected" if missing else "png")
    if get_ipython() is not None:
        display(HTML(FIT_IMAGES))
    if missing:
        print(f"Figures are interactive only, without static images: {missing}.")
    return str(pio.renderers.default)


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
