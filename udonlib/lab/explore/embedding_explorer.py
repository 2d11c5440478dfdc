"""The embedding explorer: linked maps of student and teacher, thumbnails at the pointer, what a region holds.

    embedding_explorer.explore(space)     # in a notebook: widgets where a person looks, else a figure

Points are drawn by jupyter-scatter. A thumbnail is made when the pointer rests on its point, and only then. Elements
have the classes udon-explorer, and udon-explorer-colour, -shown, -projection, -teacher (lists), -student, -teachers
(maps), -status, -legend, -facts, -sheet.
"""

from __future__ import annotations

import base64
import html
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Int

from udonlib.errors import UserError
from udonlib.lab.explore.embedding_map import EmbeddingMap, MapLayout
from udonlib.lab.explore.embedding_sheets import item_sheet, query_sheet, region_sheet, thumbnail
from udonlib.lab.explore.embedding_views import (
    caption_text,
    colouring,
    colourings,
    laid_out,
    map_chart,
    paragraph,
    region_text,
)
from udonlib.lab.explore.neighbourhoods import found_by
from udonlib.lab.pictures import pictures
from udonlib.lab.projections import seconds
from udonlib.lab.views.front_end import Still, answering, named
from udonlib.lab.views.live import has_front_end
from udonlib.lab.views.sheets import CARD
from udonlib.lab.views.style import square
from udonlib.runs.watch import duration

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # its import's, of pandas
    import jscatter

HEIGHT, LEAST_WIDTH = 440, 400  # pixels of a map; narrower ones stand one above the other
SCALE = (-1.05, 1.05)  # of both axes, whatever is laid out
DISTANCE = 1.2  # of the camera: all points are in view where a map is narrower than high, too
HINT = (
    "Rest on a point for its image; click it for its neighbours. Draw around points with the lasso (the second button "
    "of a map, or press long and draw) for what lies there. A double click on an empty place clears."
)
PROJECTIONS = {"PCA, at once": "pca", "UMAP, kept once computed": "umap"}
# How a selected point stands out, in pixels: one that is looked for in the other map more than those of a region.
ONE = {"pointSizeSelected": 6, "pointOutlineWidth": 3}
MANY = {"pointSizeSelected": 1, "pointOutlineWidth": 1}
SHEET = {"display": "none", "max_width": "100%", "width": "auto", "align_self": "flex-start"}


def explore(space: EmbeddingMap) -> EmbeddingExplorer | go.Figure:
    """Return the explorer where a person looks at this kernel's cells, else the map by domain as a figure."""
    return EmbeddingExplorer(space) if has_front_end() else map_chart(space, "domain")


class EmbeddingExplorer:
    """The widgets, and what happens between them. `box` is what is shown.

    Args:
        space: the map, embedded.

    Raises:
        UserError: the images are not embedded yet.
    """

    def __init__(self, space: EmbeddingMap) -> None:
        self.space = space
        self.rows = np.zeros(0, np.int64)  # the points that are selected, in both maps
        self._layouts: dict[tuple[str, str], MapLayout] = {}
        self._tables: dict[str, pd.DataFrame] = {}  # what each map draws
        self._work: threading.Thread | None = None
        self._still: Still | None = None
        self._latest: threading.Thread | None = None  # that was begun, and may be about to lay out
        # What is said at the pointer: title -> column of the points.
        self._titles = {"class": "class", "domain": "domain"}
        self._titles |= {"right": "gap"} if space.has_teachers else {space.params.embedder: "result"}
        teachers = {"each domain's own": "teacher"} | {f"{name}'s": f"teacher of {name}" for name in space.domains}
        self.colour = _list("colour", "colour by", {label: name for name, label in colourings(space).items()})
        self.shown = _list("shown", "show", {"all domains": ""} | {name: name for name in space.domains})
        self.projection = _list("projection", "layout", PROJECTIONS)
        self.teacher = _list("teacher", "teacher", teachers)
        self.status, self.legend, self.facts = _text("status"), _text("legend"), _text("facts")
        self.sheet = named(widgets.Image(format="jpeg", layout=SHEET), "explorer-sheet")
        self.maps = {"student": self._map("student", "student")}
        if space.has_teachers:
            self.maps["teachers"] = self._map("teachers", "teacher")
        self.captions = {name: _text("caption") for name in self.maps}
        self.box = self._arranged()
        self._recolour()
        self._say_what_is_shown()
        self._select(self.rows)
        self.colour.observe(lambda change: self._recolour(), "value")
        self.shown.observe(lambda change: self._filter(), "value")
        self.projection.observe(lambda change: self._lay_out(), "value")
        self.teacher.observe(lambda change: self._lay_out(), "value")
        for drawn in self.maps.values():
            drawn.widget.observe(lambda change: self._selected(change["new"]), "selection")
        if space.params.projection == "umap":
            self.projection.value = "umap"

    # --- what is built once ---

    def _map(self, name: str, view: str) -> Any:
        """A scatter plot of all points."""
        points = self.space.points
        xy = self._layout(view, "pca").xy
        table = pd.DataFrame({"x": xy[:, 0], "y": xy[:, 1], "image": ""})
        for title, column in self._titles.items():
            table[title] = points[column].to_numpy()
        looks = colouring(self.space, "domain")
        table["kind"] = pd.Categorical.from_codes(looks.kind, list(looks.names))
        self._tables[name] = table
        drawn = jscatter.Scatter(data=table, x="x", y="y", x_scale=SCALE, y_scale=SCALE)
        drawn.color(by="kind", map=list(looks.colours)).size(4 if len(table) < 50_000 else 2).height(HEIGHT)
        drawn.background(CARD).axes(False).lasso(on_long_press=True)
        drawn.camera(distance=DISTANCE).reticle(False).opacity(unselected=0.25)
        drawn.tooltip(
            True, list(self._titles), histograms=False, preview="image", preview_type="image", preview_image_height=110
        )
        # It would answer from its table, with every thumbnail made beforehand; and what `on_msg` adds, it never calls.
        drawn.widget._handle_custom_msg = lambda content, buffers: self._answer(drawn.widget, content)
        named(answering(drawn.widget), f"explorer-{name}")
        return drawn

    def _arranged(self) -> widgets.VBox:
        controls = [self.colour, self.shown, self.projection, *([self.teacher] if "teachers" in self.maps else [])]
        sides = []
        for name, drawn in self.maps.items():
            side = widgets.VBox(
                [self.captions[name], drawn.widget], layout={"flex": f"1 1 {LEAST_WIDTH}px", "min_width": "0"}
            )
            sides.append(side)
        flow = {"display": "flex", "flex_flow": "row wrap", "grid_gap": "4px 14px"}
        maps = widgets.Box(sides, layout=flow)
        below = widgets.VBox([self.facts, self.sheet], layout={"min_width": "0"})
        box = widgets.VBox([widgets.Box(controls, layout=flow), self.legend, maps, self.status, below])
        return named(box, "explorer")

    def _ipython_display_(self) -> None:
        self._still = Still(self.box, self._seen())

    def _keep(self) -> None:
        if self._still is not None:
            self._still.keep(self._seen, now=True)

    def _seen(self) -> str:
        """The maps as they are laid out and coloured, as a picture."""
        figure = laid_out(self.space, self.colour.value, self._shown)
        image = base64.b64encode(pictures.draw(figure.to_dict())).decode()
        return f'<img src="data:image/png;base64,{image}" style="max-width:100%">{self.legend.value}'

    # --- what a person does ---

    def _selected(self, selection: Any) -> None:
        """A lasso, a click or an empty place in one of the maps; or the echo of what we wrote into the other."""
        rows = np.unique(np.asarray([] if selection is None else selection, dtype=np.int64))
        if not np.array_equal(rows, self.rows):
            self._select(rows)

    def _select(self, rows: Int[np.ndarray, "_"]) -> None:
        """Show a selection in both maps, and what it holds."""
        self.rows = rows
        for drawn in self.maps.values():
            drawn.options(regl_scatterplot_options=ONE if len(rows) == 1 else MANY)
            now = drawn.widget.selection
            if not np.array_equal(np.unique(np.asarray([] if now is None else now)), rows):
                drawn.widget.selection = rows.astype(np.uint32)
        try:
            self.facts.value, image = self._described(rows)
        except UserError as error:  # an image that cannot be read, say
            self.facts.value, image = paragraph(str(error)), b""
        self.sheet.value = image
        self.sheet.layout.display = "" if image else "none"

    def _described(self, rows: Int[np.ndarray, "_"]) -> tuple[str, bytes]:
        """What a selection holds: HTML, and the sheet of its images."""
        if not len(rows):
            return paragraph(HINT), b""
        if len(rows) > 1:
            return region_text(self.space, rows), region_sheet(self.space, rows).data
        point = self.space.points.iloc[int(rows[0])]
        name = (
            f"<b>{html.escape(point['class'])}</b>, {html.escape(point['domain'])} &nbsp; {html.escape(point['path'])}"
        )
        if point["query"] >= 0:
            gap = f"; right: {point['gap']}" if "gap" in point else f"; {point['result']}"
            return paragraph(f"query {name}{gap}", safe=True), query_sheet(self.space, int(point["query"])).data
        lists = self.space.lists[self.space.params.embedder]
        text = f"index image {name}; found by {len(found_by(lists, int(point['position']))):,} queries"
        return paragraph(text, safe=True), item_sheet(self.space, int(point["position"])).data

    def _answer(self, widget: Any, content: dict[str, Any]) -> None:
        """Answer a map that asks what to show at the pointer."""
        row = content.get("index")
        if content.get("type") != "tooltip" or not isinstance(row, int) or not 0 <= row < len(self.space.points):
            return
        point = self.space.points.iloc[row]
        try:
            image = thumbnail(self.space.catalog, point["path"])
        except UserError:
            image = ""  # the words say what it is
        said = {title: str(point[column]) for title, column in self._titles.items()}
        widget.send({"type": "tooltip", "index": row, "preview": image, "properties": said})

    def _recolour(self) -> None:
        looks = colouring(self.space, self.colour.value)
        kinds = pd.Categorical.from_codes(looks.kind, list(looks.names))
        for name, drawn in self.maps.items():
            self._tables[name]["kind"] = kinds
            drawn.color(by="kind", map=list(looks.colours))
        shown = looks.kind[self._shown_rows()]
        counts = np.bincount(shown[shown >= 0], minlength=len(looks.names))
        parts = zip(looks.names, looks.colours, counts, strict=True)
        keys = [f"{square(c, name)} <small>{n:,}</small>" for name, c, n in parts]
        squares = "".join(square(colour).rstrip() for colour in looks.colours)
        text = f"{squares} {html.escape(looks.note)}" if looks.note else " &nbsp; ".join(keys)
        self.legend.value = paragraph(text, safe=True)
        self._keep()

    def _filter(self) -> None:
        for drawn in self.maps.values():
            drawn.filter(self._shown_rows() if self.shown.value else None)
        self._recolour()

    def _shown_rows(self) -> Int[np.ndarray, "_"]:
        """The points of the domain that is shown, or of all."""
        name = self.shown.value
        points = self.space.points
        return np.flatnonzero(points["domain"] == name) if name else np.arange(len(points))

    def _lay_out(self) -> None:
        """Lay both maps out as chosen: at once, or in the background where a UMAP has to be computed first."""
        kind = self.projection.value
        todo = [view for view in self._views().values() if not self._is_ready(view, kind)]
        if not todo:
            self._apply()
        elif self._work is None:  # else what runs in the background lays out what is chosen by its end
            self._work = self._latest = threading.Thread(target=self._compute, args=(todo, kind), daemon=True)
            self._work.start()

    def wait(self) -> None:
        """Wait until nothing is computed in the background, and what was is laid out."""
        while self._latest is not None and self._latest.is_alive():
            self._latest.join()

    # --- layouts ---

    def _views(self) -> dict[str, str]:
        """What each map has to show."""
        views = {"student": "student", "teachers": self.teacher.value}
        return {name: views[name] for name in self.maps}

    def _is_ready(self, view: str, kind: str) -> bool:
        return kind == "pca" or (view, kind) in self._layouts or self.space.is_kept(view)

    def _layout(self, view: str, kind: str) -> MapLayout:
        if (view, kind) not in self._layouts:
            self._layouts[view, kind] = self.space.layout(view, kind, self._say)
        return self._layouts[view, kind]

    def _apply(self) -> None:
        """Move the points of both maps to where they are wanted."""
        kind = self.projection.value
        for name, view in self._views().items():
            xy = self._layout(view, kind).xy
            table = self._tables[name]
            if not np.array_equal(table[["x", "y"]].to_numpy(), xy):
                table["x"], table["y"] = xy[:, 0], xy[:, 1]
                self.maps[name].xy("x", "y", SCALE, SCALE, animate=False)  # what comes during a transition is lost
        self._say_what_is_shown()
        self._say("")

    def _say_what_is_shown(self) -> None:
        layouts = {name: self._layout(view, self.projection.value) for name, view in self._views().items()}
        for name, layout in layouts.items():
            self.captions[name].value = caption_text(layout)
        self._shown = list(layouts.values())
        self._keep()

    def _compute(self, todo: list[str], kind: str) -> None:
        """Compute layouts, with the seconds that it takes on show; then lay out what is wanted by then."""
        try:
            for number, view in enumerate(todo):
                text = (
                    f"computing UMAP of {view} ({number + 1} of {len(todo)}), about {duration(self._estimate(number))}"
                )
                with _Ticking(text, self._say):
                    self._layout(view, kind)
        except Exception as error:  # whatever stops a fit: the map stays as it is, and says why
            self._work = None
            self._say(f"UMAP failed, the map is as it was: {type(error).__name__}: {error}")
            return
        self._work = None
        self._lay_out()

    def _estimate(self, number: int) -> float:
        n = len(self.space.points)
        return seconds(n) - (seconds(0) if number else 0)

    def _say(self, text: str) -> None:
        self.status.value = paragraph(text) if text else ""


class _Ticking:
    """Says a text with the seconds since, once a second, as long as the block runs."""

    def __init__(self, text: str, say: Callable[[str], None]) -> None:
        self._text, self._say, self._end = text, say, threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _tick(self) -> None:
        began = time.monotonic()
        while True:
            self._say(f"{self._text}; {duration(time.monotonic() - began)} so far. Everything else goes on.")
            if self._end.wait(1.0):
                return


def _list(name: str, label: str, options: dict[str, str]) -> widgets.Dropdown:
    layout = {"width": "auto", "min_width": "150px"}
    box = widgets.Dropdown(options=list(options.items()), description=label, layout=layout)
    box.style.description_width = "initial"
    return named(answering(box), f"explorer-{name}")


def _text(name: str) -> widgets.HTML:
    return named(widgets.HTML(layout={"margin": "0"}), f"explorer-{name}")
