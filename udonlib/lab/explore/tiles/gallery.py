"""Images beside the maps: those of a selection, page by page, and the neighbours of one; what finds and keeps them.

    rows = matching(space, domain="logos", outcome="miss", words="car")
    gallery.show(rows, "12 images")            # tiles that can be clicked
    export(space, rows)                        # outputs/selections/...csv

A tile's tick or cross says what the run's evaluation said of a query or a neighbour.
"""

from __future__ import annotations

import importlib.resources
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
import traitlets
from jaxtyping import Int
from PIL import Image

from udonlib.data.decoding import decode, prepare_eval
from udonlib.errors import UserError
from udonlib.files import replacing, results_folder
from udonlib.lab.explore.embedding_map import RIGHT, WRONG, EmbeddingMap
from udonlib.lab.explore.embedding_sheets import thumbnail
from udonlib.lab.explore.neighbourhoods import found_by, nearest_confusions
from udonlib.lab.views.front_end import answering, named
from udonlib.models.processors import dtype_of

PAGE = 24  # tiles
ROOM = {"width": "auto", "min_width": "150px"}
NEAREST = 30  # images that an image of one's own is compared with
N_PAIRS, N_ASKERS = 8, 9
OUTCOMES = {"": "all", RIGHT: "hits", WRONG: "misses"}
PAIR = " → "  # between the domains of a confusion
Tile = dict[str, Any]
Section = dict[str, Any]


class GalleryWidget(anywidget.AnyWidget):
    """The page's side. sections: titles with tiles; page, pages: of the first one; chosen: the point that is shown."""

    _esm = importlib.resources.files(__package__).joinpath("gallery.js").read_text("utf-8")
    _css = importlib.resources.files(__package__).joinpath("gallery.css").read_text("utf-8")
    sections: traitlets.List[Section] = traitlets.List().tag(sync=True)
    page = traitlets.Int(0).tag(sync=True)
    pages = traitlets.Int(1).tag(sync=True)
    chosen = traitlets.Int(-1).tag(sync=True)


class Gallery:
    """Tiles of some points, a page at a time, or sections of them.

    Args:
        space: the map.
        name: of its element, for `named`.
        choose: called with the point whose tile was clicked.
    """

    def __init__(self, space: EmbeddingMap, name: str, choose: Callable[[int], None]) -> None:
        self.space, self.rows, self._title, self._choose = space, np.zeros(0, np.int64), "", choose
        self.widget = named(answering(GalleryWidget()), name)
        self.widget.on_msg(lambda widget, content, buffers: self.act(content))

    def act(self, content: dict[str, Any]) -> None:
        """Do what a click asks for; what makes no sense is left alone."""
        turn, row = content.get("turn"), content.get("row")
        if turn in (-1, 1) and 0 <= self.widget.page + turn < self.widget.pages:
            self._draw(self.widget.page + turn, self.widget.pages)
        elif isinstance(row, int) and 0 <= row < len(self.space.points):
            self._choose(row)

    def show(self, rows: Int[np.ndarray, "_"], title: str, is_ordered: bool = True) -> None:
        """Show the first page of some points, in their order or by domain and class."""
        if not is_ordered:
            points = self.space.points.iloc[rows]
            rows = rows[np.lexsort((points["class"].astype(str), points["domain"]))]
        self.rows, self._title = rows, title
        self._draw(0, max(1, -(-len(rows) // PAGE)))

    def show_sections(self, sections: list[Section]) -> None:
        """Show sections on one page."""
        self._tell(sections, 0, 1)

    def _draw(self, page: int, pages: int) -> None:
        points = self.space.points.iloc[self.rows[page * PAGE :][:PAGE]]
        tiles = [_tile(self.space, (point.domain, point.path), _mark(point.result)) for point in points.itertuples()]
        self._tell([{"title": self._title, "tiles": tiles}] if tiles else [], page, pages)

    def _tell(self, sections: list[Section], page: int, pages: int) -> None:
        """Send all in one message: a page's number never stands above the tiles of another."""
        with self.widget.hold_sync():
            self.widget.sections, self.widget.page, self.widget.pages = sections, page, pages


class Finder:
    """Controls that narrow the points down: a domain, an outcome, words, what is near an image of one's own.

    Args:
        space: the map.
        changed: called when something was chosen.
        say: called with a sentence where something cannot be done.
    """

    def __init__(self, space: EmbeddingMap, changed: Callable[[], None], say: Callable[[str], None]) -> None:
        self.space, self.said, self._changed, self._say = space, "", changed, say
        self._nearest: Int[np.ndarray, "_"] | None = None
        narrowed = {label: name for name, label in outcomes(space).items()}
        self.domain = choice("shown", "show", {"all domains": ""} | {name: name for name in space.domains})
        self.outcome = choice("outcome", f"of the {space.params.embedder}", narrowed)
        self.words = _field("search", "class or file", "part of a name")
        self.picture = _field("picture", "near an image of yours", "its path")
        self.upload = named(answering(widgets.FileUpload(accept="image/*", description="or upload")), "explorer-upload")
        self.controls = [self.domain, self.outcome, self.words, self.picture, self.upload]
        for control in self.controls[:3]:
            control.observe(lambda change: changed(), "value")
        self.picture.observe(lambda change: self._compare_path(change["new"].strip()), "value")
        self.upload.observe(lambda change: self.compare_upload(change["new"]), "value")

    @property
    def is_ordered(self) -> bool:
        """Whether `rows` have an order of their own: the nearest first."""
        return self._nearest is not None

    def rows(self) -> Int[np.ndarray, "_"]:
        """The points that are narrowed down to, or all."""
        rows = matching(self.space, self.domain.value, self.outcome.value, self.words.value)
        return rows if self._nearest is None else self._nearest[np.isin(self._nearest, rows)]

    def _compare_path(self, path: str) -> None:
        """Show what is nearest to the image in a file; an empty path ends that."""
        if not path:
            self._nearest, self.said = None, ""
            self._changed()
            return
        file = Path(path).expanduser()
        try:
            self._compare(file.read_bytes(), file.name)
        except OSError as error:
            self._say(f"{file} cannot be read: {error.strerror or error}")

    def compare_upload(self, files: Sequence[Mapping[str, Any]]) -> None:
        """Show what is nearest to the image that was uploaded last: its `name` and `content`."""
        if files:
            self._compare(bytes(files[-1]["content"]), str(files[-1]["name"]))

    def _compare(self, data: bytes, name: str) -> None:
        try:
            self._nearest = nearest_points(self.space, decode(data, name))
        except UserError as error:
            self._say(str(error))
            return
        self.said = f"The {len(self._nearest)} images nearest to {name} for the student, nearest first."
        self._changed()


def choice(name: str, label: str, options: Mapping[str, str]) -> widgets.Dropdown:
    """A list to choose from: label -> value."""
    box = widgets.Dropdown(options=list(options.items()), description=label, layout=ROOM)
    box.style.description_width = "initial"
    return named(answering(box), f"explorer-{name}")


def _field(name: str, label: str, hint: str) -> widgets.Text:
    box = widgets.Text(description=label, placeholder=hint, continuous_update=False, layout=ROOM)
    box.style.description_width = "initial"
    return named(answering(box), f"explorer-{name}")


def outcomes(space: EmbeddingMap) -> dict[str, str]:
    """What points can be narrowed down to: hits, misses, and each pair of domains that a miss confuses, by count."""
    lists = space.lists[space.params.embedder]
    wrong = _confused(space)
    names = lists.searched.domains
    pairs = pd.Series(PAIR.join((names[lists.domain[q]], names[lists.item_domain[q, 0]])) for q in wrong)
    return OUTCOMES | {pair: f"{pair}: {n}" for pair, n in pairs.value_counts().items()}


def matching(space: EmbeddingMap, domain: str = "", outcome: str = "", words: str = "") -> Int[np.ndarray, "_"]:
    """Find the points of a domain, with an outcome and with some words in their class or path; "" is any.

    Args:
        outcome: one of `outcomes`: "right", "wrong", or a pair of domains such as "emoji → icons": the misses of emoji
            whose first neighbour is an icon.
        words: upper or lower case.
    """
    points = space.points
    fits = np.ones(len(points), dtype=bool)
    if domain:
        fits &= (points["domain"] == domain).to_numpy()
    if PAIR in outcome:
        lists = space.lists[space.params.embedder]
        names = lists.searched.domains
        asked, found = (names.index(name) for name in outcome.split(PAIR))
        wrong = _confused(space)
        of_pair = wrong[(lists.domain[wrong] == asked) & (lists.item_domain[wrong, 0] == found)]
        fits &= np.isin(points["query"].to_numpy(), of_pair)
    elif outcome:
        fits &= (points["result"] == outcome).to_numpy()
    if words.strip():
        text = points["class"].astype(str) + "\n" + points["path"]
        fits &= text.str.contains(words.strip(), case=False, regex=False).to_numpy()
    return np.flatnonzero(fits)


def nearest_points(space: EmbeddingMap, image: Image.Image, n: int = NEAREST) -> Int[np.ndarray, "_"]:
    """Find the points nearest to an image of one's own in the student's embedding, nearest first."""
    pixels = prepare_eval(image.convert("RGB"), space.run.params.image_size)[None]
    device = next(space.model.parameters()).device
    with torch.no_grad():
        features = space.model.features(pixels.to(device), dtype_of(space.run.params.precision, device))
        vector = space.model.student(features)[0].float().cpu().numpy()
    return np.argsort(-(space.vectors("student") @ vector), kind="stable")[:n]


def export(space: EmbeddingMap, rows: Int[np.ndarray, "_"], clock: Callable[[], float] = time.time) -> Path:
    """Write points to `<results>/selections/<run>-<time>.csv`, in their order; returns the file.

    Columns: domain, class, path, split, result, and right (whose first neighbour is), where the run has teachers.

    Raises:
        UserError: nothing is selected; DiskError: it cannot be written.
    """
    if not len(rows):
        raise UserError("nothing is listed that could be written")
    columns = ["domain", "class", "path", "split", "result", *(["gap"] if space.has_teachers else [])]
    table = space.points.iloc[rows][columns].rename(columns={"gap": "right"})
    moment = time.strftime("%Y-%m-%d-%H%M%S", time.localtime(clock()))
    file = results_folder(space.params.outputs) / "selections" / f"{space.run.path.name}-{moment}.csv"
    with replacing(file) as opened:
        opened.write(table.to_csv(index=False).encode())
    return file


def sections_of(space: EmbeddingMap, row: int) -> list[Section]:
    """A query with its neighbours in the merged index, of each embedder; or an item with the queries that find it."""
    point = space.points.iloc[row]
    picture = (point["domain"], point["path"])
    lists = space.lists[space.params.embedder]
    if point["query"] >= 0:
        sections = [{"title": "query", "tiles": [_tile(space, picture, _mark(point["result"]))]}]
        for name, of_embedder in space.lists.items():
            found = of_embedder.of(int(point["query"]))
            tiles = [_tile(space, image, "tick" if hit else "cross") for image, hit in found]
            sections.append({"title": f"{name}'s nearest neighbours, nearest first", "tiles": tiles})
        return sections
    position = int(point["position"])
    askers = found_by(lists, position)
    title = f"found by {len(askers):,} queries of the {lists.embedder}" if len(askers) else "no query finds it"
    tiles = []
    for query in askers[:N_ASKERS]:
        hit = bool(lists.hit[query][lists.position[query] == position][0])
        tiles.append(_tile(space, lists.query(int(query)), "tick" if hit else "cross"))
    return [{"title": "index image", "tiles": [_tile(space, picture, "")]}, {"title": title, "tiles": tiles}]


def confused_sections(space: EmbeddingMap, rows: Int[np.ndarray, "_"]) -> list[Section]:
    """The queries of a region that are nearest to an image of another domain, each followed by that image."""
    queries = space.points["query"].to_numpy()[rows]
    lists = space.lists[space.params.embedder]
    pairs = nearest_confusions(lists, queries[queries >= 0], N_PAIRS)
    tiles = []
    for pair in pairs.itertuples():
        tiles.append(_tile(space, lists.query(pair.query), ""))
        tiles.append(_tile(space, (pair.domain, pair.path), "cross"))
    return [{"title": "query, and beside it the nearest image of another domain", "tiles": tiles}] if tiles else []


def _confused(space: EmbeddingMap) -> Int[np.ndarray, "_"]:
    """The queries whose first neighbour is wrong."""
    lists = space.lists[space.params.embedder]
    return np.flatnonzero(~lists.hit[:, 0] & (lists.position[:, 0] >= 0))


def _mark(result: str) -> str:
    return {RIGHT: "tick", WRONG: "cross"}.get(result, "")


def _tile(space: EmbeddingMap, picture: tuple[str, str], mark: str) -> Tile:
    """What a tile shows; its row is -1 where the image is not on the map."""
    domain, path = picture
    row, name = space.row_of.get(picture, -1), space.names[picture]
    return {"row": row, "src": thumbnail(space.catalog, path), "name": name, "note": domain, "mark": mark}
