"""The embedding explorer: linked maps of student and teacher, images on them and beside them, what a region holds.

    embedding_explorer.explore(space)     # in a notebook: widgets where a person looks, else a figure

Points are drawn by jupyter-scatter. A thumbnail is made when there is room for it on the map, or the pointer rests on
its point, and only then. Elements have the classes udon-explorer, and udon-explorer-colour, -shown, -outcome,
-projection, -teacher (lists), -images (a box to tick), -search, -picture, -upload, -export, -student, -teachers (maps),
-status, -legend, -facts, -listed, -near (galleries).
"""

from __future__ import annotations

import base64
import html
import threading
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
from udonlib.lab.explore.embedding_sheets import thumbnail
from udonlib.lab.explore.embedding_views import (
    LAYOUTS,
    WHOSE,
    caption_text,
    colouring,
    colourings,
    is_ready,
    laid_out,
    map_chart,
    paragraph,
    region_text,
)
from udonlib.lab.explore.neighbourhoods import found_by
from udonlib.lab.explore.tiles.gallery import (
    ROOM,
    Finder,
    Gallery,
    Section,
    choice,
    confused_sections,
    export,
    sections_of,
)
from udonlib.lab.explore.tiles.on_map import ImagesOnMap
from udonlib.lab.pictures import pictures
from udonlib.lab.projections import seconds
from udonlib.lab.views.front_end import Still, Ticking, answering, button, named
from udonlib.lab.views.live import has_front_end
from udonlib.lab.views.style import square
from udonlib.runs.watch import duration

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # its import's, of pandas
    import jscatter

HEIGHT, LEAST_WIDTH = 440, 270  # pixels of a map; narrower ones stand one above the other
GAP = 14  # pixels between maps
SCALE = (-1.05, 1.05)  # of both axes, whatever is laid out
HINT = (
    "Rest on a point for its image; click it, or a tile, for its neighbours. Draw around points with the lasso (the "
    "second button of a map, or press long and draw) for what lies there. A double click on an empty place clears."
)
PROJECTIONS = {"by neighbours, in seconds": "quick", "UMAP, in minutes": "umap", "PCA, at once": "pca"}
# How a selected point stands out, in pixels: one that is looked for in the other map more than those of a region.
ONE = {"pointSizeSelected": 6, "pointOutlineWidth": 3}
MANY = {"pointSizeSelected": 1, "pointOutlineWidth": 1}


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
        # What is said at the pointer: title -> of each point.
        points = space.points
        self._said = pd.DataFrame({"class": points["class"].astype(str), "domain": points["domain"]})
        whose = points["gap"].map(WHOSE) if space.has_teachers else points["result"]
        self._said["right first neighbour" if space.has_teachers else space.params.embedder] = whose
        teachers = {"each domain's own": "teacher"} | {f"{name}'s": f"teacher of {name}" for name in space.domains}
        self.colour = choice("colour", "colour by", {label: name for name, label in colourings(space).items()})
        self.finder = Finder(space, self._filter, self._say)
        self.shown, self.outcome, self.search = self.finder.domain, self.finder.outcome, self.finder.words
        images = widgets.Checkbox(True, description="images on the map", indent=False, layout=ROOM)
        self.images = named(answering(images), "explorer-images")
        self.export = button("explorer-export", "Write CSV", "what is listed below", "download")
        self.projection = choice("projection", "layout", PROJECTIONS)
        self.projection.value = space.params.projection
        self.teacher = choice("teacher", "teacher", teachers)
        self.status, self.legend, self.facts = _text("status"), _text("legend"), _text("facts")
        self.listed = Gallery(space, "explorer-listed", self._choose)
        self.near = Gallery(space, "explorer-near", self._choose)
        self._shown: dict[str, MapLayout] = {}  # what each map shows now
        self.maps = {"student": self._map("student", "student")}
        if space.has_teachers:
            self.maps["teachers"] = self._map("teachers", "teacher")
        self.on_maps = {name: ImagesOnMap(space) for name in self.maps}
        self.captions = {name: _text("caption") for name in self.maps}
        self.box = self._arranged()
        self._list_rows(self.finder.rows())
        self._recolour()
        self._say_what_is_shown()
        self.colour.observe(lambda change: self._recolour(), "value")
        self.export.on_click(lambda _: self._export())
        self.projection.observe(lambda change: self._lay_out(), "value")
        self.teacher.observe(lambda change: self._lay_out(), "value")
        for name, drawn in self.maps.items():
            drawn.widget.observe(lambda change: self._selected(change["new"]), "selection")
            widgets.link((self.images, "value"), (self.on_maps[name].widget, "shown"))
        self._lay_out()

    # --- what is built once ---

    def _map(self, name: str, view: str) -> Any:
        """A scatter plot of all points."""
        kind = self.projection.value
        self._shown[name] = self._layout(view, kind if self._is_ready(view, kind) else "pca")
        xy = self._shown[name].xy
        table = pd.DataFrame({"x": xy[:, 0], "y": xy[:, 1], "image": ""})
        for title, said in self._said.items():
            table[title] = said.to_numpy()
        looks = colouring(self.space, "domain")
        table["kind"] = pd.Categorical.from_codes(looks.kind, list(looks.names))
        self._tables[name] = table
        drawn = jscatter.Scatter(data=table, x="x", y="y", x_scale=SCALE, y_scale=SCALE)
        drawn.color(by="kind", map=list(looks.colours)).size(4 if len(table) < 50_000 else 2).height(HEIGHT)
        drawn.background((0, 0, 0, 0)).axes(False).lasso(on_long_press=True)
        drawn.reticle(False).opacity(unselected=0.35)
        drawn.tooltip(
            True, list(self._said), histograms=False, preview="image", preview_type="image", preview_image_height=110
        )
        # It would answer from its table, with every thumbnail made beforehand; and what `on_msg` adds, it never calls.
        drawn.widget._handle_custom_msg = lambda content, buffers: self._answer(drawn.widget, content)
        named(answering(drawn.widget), f"explorer-{name}")
        return drawn

    def _arranged(self) -> widgets.VBox:
        controls = [self.colour, self.projection, *([self.teacher] if "teachers" in self.maps else []), self.images]
        narrowing = [*self.finder.controls, self.export]
        flow = {"display": "flex", "flex_flow": "row wrap", "grid_gap": f"4px {GAP}px", "align_items": "flex-end"}
        wide = {"flex": f"1 1 {LEAST_WIDTH}px", "min_width": "0"}
        sides = []
        for name, drawn in self.maps.items():
            parts = [self.captions[name], drawn.widget, self.on_maps[name].widget]
            sides.append(named(widgets.VBox(parts, layout=wide), "with-images"))
        least = len(sides) * LEAST_WIDTH + (len(sides) - 1) * GAP
        maps = widgets.Box(sides, layout=flow | {"flex": f"3 1 {least}px", "min_width": "0"})
        # Beside the maps where there is room, else below them.
        side = widgets.VBox([self.listed.widget], layout=wide | {"max_height": f"{HEIGHT + 40}px", "overflow": "auto"})
        stage = widgets.Box([maps, side], layout=flow | {"align_items": "flex-start"})
        rows = [widgets.Box(each, layout=flow) for each in (controls, narrowing)]
        box = widgets.VBox([*rows, self.legend, stage, self.status, self.facts, self.near.widget])
        return named(box, "explorer")

    def _ipython_display_(self) -> None:
        self._still = Still(self.box, self._seen())

    def _keep(self) -> None:
        if self._still is not None:
            self._still.keep(self._seen, now=True)

    def _seen(self) -> str:
        """The maps as they are laid out and coloured, as a picture."""
        figure = laid_out(self.space, self.colour.value, [*self._shown.values()])
        image = base64.b64encode(pictures.draw(figure.to_dict())).decode()
        return f'<img src="data:image/png;base64,{image}" style="max-width:100%">{self.legend.value}'

    # --- what a person does ---

    def _selected(self, selection: Any) -> None:
        """A lasso, a click or an empty place in one of the maps; or the echo of what we wrote into the other."""
        rows = np.unique(np.asarray([] if selection is None else selection, dtype=np.int64))
        if not np.array_equal(rows, self.rows):
            self._select(rows)

    def _select(self, rows: Int[np.ndarray, "_"]) -> None:
        """Show a selection in both maps, and what it holds: a region is listed, one point among what is listed."""
        self._mark(rows)
        if len(rows) == 1:
            self._describe_point(int(rows[0]))
        else:
            self._list_rows(rows if len(rows) else self.finder.rows())

    def _choose(self, row: int) -> None:
        """A tile was clicked."""
        self._mark(np.array([row]))
        self._describe_point(row)

    def _mark(self, rows: Int[np.ndarray, "_"]) -> None:
        """Mark a selection in both maps."""
        self.rows = rows
        for drawn in self.maps.values():
            drawn.options(regl_scatterplot_options=ONE if len(rows) == 1 else MANY)
            now = drawn.widget.selection
            if not np.array_equal(np.unique(np.asarray([] if now is None else now)), rows):
                drawn.widget.selection = rows.astype(np.uint32)

    def _list_rows(self, rows: Int[np.ndarray, "_"]) -> None:
        """List points, page by page, and say what they hold."""
        is_all = len(rows) == len(self.space.points)
        self._rows_listed = rows
        self.facts.value = paragraph(HINT) if is_all or not len(rows) else region_text(self.space, rows)
        self._fill(lambda: self.listed.show(rows, f"{len(rows):,} images", self.finder.is_ordered))
        self._show_near(lambda: [] if is_all else confused_sections(self.space, rows), -1)
        if self.colour.value == "class":  # whose classes have colours
            self._recolour()

    def _describe_point(self, row: int) -> None:
        """Say what a point is, and show its neighbours or who finds it."""
        point = self.space.points.iloc[row]
        name = (
            f"<b>{html.escape(point['class'])}</b>, {html.escape(point['domain'])} &nbsp; {html.escape(point['path'])}"
        )
        if point["query"] >= 0:
            title, said = self._said.columns[-1], self._said.iloc[row, -1]
            self.facts.value = paragraph(f"query {name}; {title}: {html.escape(said)}", safe=True)
        else:
            n = len(found_by(self.space.lists[self.space.params.embedder], int(point["position"])))
            self.facts.value = paragraph(f"index image {name}; found by {n:,} queries", safe=True)
        self._show_near(lambda: sections_of(self.space, row), row)

    def _show_near(self, make: Callable[[], list[Section]], chosen: int) -> None:
        self.listed.widget.chosen = self.near.widget.chosen = chosen
        self._fill(lambda: self.near.show_sections(make()))

    def _fill(self, show: Callable[[], None]) -> None:
        try:
            show()
        except UserError as error:  # an image that cannot be read, say
            self.facts.value = paragraph(str(error))

    def _answer(self, widget: Any, content: dict[str, Any]) -> None:
        """Answer a map that asks what to show at the pointer."""
        row = content.get("index")
        if content.get("type") != "tooltip" or not isinstance(row, int) or not 0 <= row < len(self.space.points):
            return
        try:
            image = thumbnail(self.space.catalog, self.space.points["path"].iloc[row])
        except UserError:
            image = ""  # the words say what it is
        widget.send({"type": "tooltip", "index": row, "preview": image, "properties": self._said.iloc[row].to_dict()})

    def _recolour(self) -> None:
        looks = colouring(self.space, self.colour.value, self._rows_listed)
        kinds = pd.Categorical.from_codes(looks.kind, list(looks.names))
        for name, drawn in self.maps.items():
            self._tables[name]["kind"] = kinds
            drawn.color(by="kind", map=list(looks.colours))
            self.on_maps[name].colour(looks.kind, looks.colours)
        shown = looks.kind[self.finder.rows()]
        counts = np.bincount(shown[shown >= 0], minlength=len(looks.names))
        parts = zip(looks.names, looks.colours, counts, strict=True)
        keys = [f'<span style="white-space:nowrap">{square(c, name)} {n:,}</span>' for name, c, n in parts]
        self.legend.value = paragraph(" &nbsp; ".join([*keys, html.escape(looks.note)]), safe=True)
        self._keep()

    def _filter(self) -> None:
        """Show the points that are wanted alone, large, with what they hold; and no longer what was selected before."""
        rows = self.finder.rows()
        is_all = len(rows) == len(self.space.points)
        for drawn in self.maps.values():
            drawn.filter(None if is_all else rows)
        self._mark(np.zeros(0, np.int64))
        self._list_rows(rows)
        self._recolour()
        self._zoom()
        self._say(self.finder.said if len(rows) else "No image of the map is all of that.")

    def _zoom(self) -> None:
        """Look at what is shown. Two points would fill the map with nothing."""
        rows = self.finder.rows()
        if len(rows) > 2:
            for drawn in self.maps.values():
                drawn.zoom(to=rows, animation=0, padding=0.1)

    def _export(self) -> None:
        try:
            self._say(f"{len(self._rows_listed):,} images written to {export(self.space, self._rows_listed)}")
        except UserError as error:
            self._say(str(error))

    def _lay_out(self) -> None:
        """Lay both maps out as chosen: at once, or in the background where that takes a while."""
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
        return (view, kind) in self._layouts or is_ready(self.space, view, kind)

    def _layout(self, view: str, kind: str) -> MapLayout:
        if (view, kind) not in self._layouts:
            self._layouts[view, kind] = self.space.layout(view, kind, self._say)
        return self._layouts[view, kind]

    def _apply(self) -> None:
        """Move the points of both maps to where they are wanted, as far as that is computed."""
        kind = self.projection.value
        ready = {name: view for name, view in self._views().items() if self._is_ready(view, kind)}
        for name, view in ready.items():
            self._shown[name] = self._layout(view, kind)
            xy, table = self._shown[name].xy, self._tables[name]
            if not np.array_equal(table[["x", "y"]].to_numpy(), xy):
                table["x"], table["y"] = xy[:, 0], xy[:, 1]
                self.maps[name].xy("x", "y", SCALE, SCALE, animate=False)  # what comes during a transition is lost
                self._zoom()
        self._say_what_is_shown()
        if len(ready) == len(self.maps):
            self._say("")

    def _say_what_is_shown(self) -> None:
        for name, layout in self._shown.items():
            self.captions[name].value = caption_text(layout)
        self._keep()

    def _compute(self, todo: list[str], kind: str) -> None:
        """Compute layouts, with the seconds that it takes on show; then lay out what is wanted by then."""
        try:
            for number, view in enumerate(todo):
                about = duration(seconds(len(self.space.points), kind) - (seconds(0, kind) if number else 0))
                text = f"computing {LAYOUTS[kind]} of {view} ({number + 1} of {len(todo)}), about {about}"
                with Ticking(text, self._say):
                    self._layout(view, kind)
                self._apply()
        except Exception as error:  # whatever stops a fit: the map stays as it is, and says why
            self._work = None
            self._say(f"{LAYOUTS[kind]} failed, the map is as it was: {type(error).__name__}: {error}")
            return
        self._work = None
        self._lay_out()

    def _say(self, text: str) -> None:
        self.status.value = paragraph(text) if text else ""


def _text(name: str) -> widgets.HTML:
    return named(widgets.HTML(layout={"margin": "0"}), f"explorer-{name}")
