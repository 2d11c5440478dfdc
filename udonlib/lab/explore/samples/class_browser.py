"""The classes of a catalog, page by page: what each of them holds, found by its name or by its size.

browse(catalog)        # in a notebook: controls and tiles; elsewhere a sheet of samples
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
from jaxtyping import Int

from udonlib.data.catalog import Catalog, Split
from udonlib.errors import UserError
from udonlib.lab.explore.embedding_sheets import thumbnail
from udonlib.lab.explore.tiles.gallery import GalleryWidget, Section, Tile
from udonlib.lab.views.front_end import Still, answering, named
from udonlib.lab.views.live import has_front_end
from udonlib.lab.views.sheets import Picture, sample_sheet

PAGE, N_TILES = 8, 10  # classes of a page, and images of each
MOST, FEWEST, BY_NAME = "most images first", "fewest images first", "by name"


class ClassImages(NamedTuple):
    """A class and the rows of its images in a split."""

    name: str
    rows: Int[np.ndarray, "_"]


def classes_of(split: Split) -> list[ClassImages]:
    """Every class of a split with its images, in the order of labels. An image of several classes is in each."""
    rows, places = np.nonzero(split.labels >= 0)
    labels = split.labels[rows, places]
    order = np.argsort(labels, kind="stable")
    found, starts = np.unique(labels[order], return_index=True)
    parts = np.split(rows[order], starts[1:])
    return [
        ClassImages(split.class_names.get(label, str(label)), part)
        for label, part in zip(found.tolist(), parts, strict=True)
    ]


def matching(classes: list[ClassImages], words: str = "", order: str = BY_NAME) -> list[ClassImages]:
    """The classes whose name has some words in it, upper or lower case, in one of the three orders."""
    found = [each for each in classes if words.strip().casefold() in each.name.casefold()]
    if order == BY_NAME:
        return sorted(found, key=lambda each: each.name.casefold())
    return sorted(found, key=lambda each: -len(each.rows) if order == MOST else len(each.rows))


class ClassBrowser:
    """Controls and a page of classes with some images of each.

    Args:
        catalog: whose.
    """

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.domain = _choice("domain", {name: name for name in catalog.names})
        self.split = _choice("split", {})
        self.order = _choice("order", {order: order for order in (BY_NAME, MOST, FEWEST)})
        self.words = named(answering(widgets.Text(description="class", placeholder="part of a name")), "classes-words")
        self.words.continuous_update = False
        self.gallery = named(answering(GalleryWidget()), "classes-gallery")
        self.gallery.on_msg(lambda widget, content, buffers: self.turn(content))
        self.said = named(widgets.HTML(), "classes-said")
        row = widgets.HBox([self.domain, self.split, self.order, self.words], layout={"flex_flow": "row wrap"})
        self.box = named(widgets.VBox([row, self.said, self.gallery]), "classes")
        self._kept: tuple[tuple[str, str], list[ClassImages]] | None = None
        self._offer_splits()
        self.domain.observe(lambda change: self._offer_splits(), "value")
        for control in (self.split, self.order, self.words):
            control.observe(lambda change: self.show(), "value")

    def _ipython_display_(self) -> None:
        Still(self.box, sample_sheet(self.catalog)._repr_html_())

    def _offer_splits(self) -> None:
        before = self.split.value
        names = [name for name, split in self.catalog[self.domain.value].splits.items() if len(split)]
        self.split.options = names
        self.split.value = before if before in names else next(iter(names), None)
        self.show()

    def shown(self) -> list[ClassImages]:
        """The classes that the controls leave, in their order."""
        key = (self.domain.value, self.split.value)
        if self._kept is None or self._kept[0] != key:
            splits = self.catalog[key[0]].splits
            self._kept = key, classes_of(splits[key[1]]) if key[1] in splits else []
        return matching(self._kept[1], self.words.value, self.order.value)

    def show(self, page: int = 0) -> None:
        """Show a page, from 0, of what the controls leave."""
        found = self.shown()
        n_images = sum(len(each.rows) for each in found)
        self.said.value = f"{len(found):,} classes, {n_images:,} images" if found else "no class has this in its name"
        part = found[page * PAGE :][:PAGE]
        with self.gallery.hold_sync():
            self.gallery.sections = [self._section(each) for each in part]
            self.gallery.page, self.gallery.pages = page, max(1, -(-len(found) // PAGE))

    def turn(self, content: Mapping[str, object]) -> None:
        """Go a page on or back, as a click asks; what makes no sense is left alone."""
        by = content.get("turn")
        if by in (-1, 1) and 0 <= self.gallery.page + by < self.gallery.pages:
            self.show(self.gallery.page + by)

    def _section(self, each: ClassImages) -> Section:
        n = len(each.rows)
        of = f", {N_TILES} of them" if n > N_TILES else ""
        title = f"{each.name}: {n:,} image{'s' * (n != 1)}{of}"
        return {"title": title, "tiles": [self._tile(row) for row in each.rows[:N_TILES].tolist()]}

    def _tile(self, row: int) -> Tile:
        path = self.catalog[self.domain.value].splits[self.split.value].paths[row]
        name = path.rpartition("/")[2]
        try:
            return {"row": -1, "src": thumbnail(self.catalog, path), "name": name, "note": "", "mark": ""}
        except UserError:  # the check of the data says what is wrong with it
            return {"row": -1, "src": "", "name": name, "note": "cannot be read", "mark": "cross"}


def browse(catalog: Catalog, live: bool | None = None) -> ClassBrowser | Picture:
    """The browser where a person looks at this kernel's cells, else a sheet of samples of each domain.

    Args:
        live: None: as `live.has_front_end` says.
    """
    return ClassBrowser(catalog) if (has_front_end() if live is None else live) else sample_sheet(catalog)


def _choice(name: str, options: Mapping[str, str]) -> widgets.Dropdown:
    box = widgets.Dropdown(options=list(options.items()), description=name, layout={"width": "auto"})
    box.style.description_width = "initial"
    return named(answering(box), f"classes-{name}")
