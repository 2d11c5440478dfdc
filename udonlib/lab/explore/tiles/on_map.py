"""Images on a map: those of the points in view that find room, with a frame in their point's colour.

    images = ImagesOnMap(space)
    images.colour(kind, colours)
    VBox([scatter.widget, images.widget])      # it finds the map beside it

Where they stand is the browser's to say, which knows the view; it asks for those images that it has not had yet.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from typing import Any

import anywidget
import numpy as np
import traitlets
from jaxtyping import Int

from udonlib.errors import UserError
from udonlib.lab.explore.embedding_map import EmbeddingMap
from udonlib.lab.explore.embedding_sheets import thumbnail
from udonlib.lab.views.front_end import answering, named

MOST = 200  # images that are sent for one question
SIDE = 64  # pixels of an image, for screens of two to a pixel
NO_COLOUR = "#888888"


class OnMapWidget(anywidget.AnyWidget):
    """The page's side. shown: whether there are images on the map."""

    _esm = importlib.resources.files(__package__).joinpath("on_map.js").read_text("utf-8")
    _css = importlib.resources.files(__package__).joinpath("on_map.css").read_text("utf-8")
    shown = traitlets.Bool(True).tag(sync=True)


class ImagesOnMap:
    """The images on one map.

    Args:
        space: the map; its points are those of the scatter plot, in this order.
    """

    def __init__(self, space: EmbeddingMap) -> None:
        self.space = space
        self._kind = np.full(len(space.points), -1)
        self._colours: Sequence[str] = (NO_COLOUR,)
        self._sent: set[int] = set()
        self.widget = named(answering(OnMapWidget()), "images-on-map")
        self.widget.on_msg(lambda widget, content, buffers: self.answer(content))

    def colour(self, kind: Int[np.ndarray, "_"], colours: Sequence[str]) -> None:
        """Give the frames other colours: the position in `colours` for each point, -1: none."""
        self._kind, self._colours = kind, (*colours, NO_COLOUR)
        if self._sent:
            self.widget.send({"colours": self._colours_of(self._sent)})

    def answer(self, content: dict[str, Any]) -> None:
        """Send the images that a page asks for as {wanted: points}; one that cannot be read is empty."""
        wanted = content.get("wanted")
        known = range(len(self.space.points))
        rows = [row for row in wanted if isinstance(row, int) and row in known] if isinstance(wanted, list) else []
        images = {}
        for row in rows[:MOST]:
            try:
                images[row] = thumbnail(self.space.catalog, self.space.points["path"].iloc[row], SIDE)
            except UserError:  # the gallery says so
                images[row] = ""
        self._sent |= images.keys()
        if images:
            self.widget.send({"images": images, "colours": self._colours_of(images)})

    def _colours_of(self, rows: Sequence[int] | set[int] | dict[int, str]) -> dict[int, str]:
        return {row: self._colours[self._kind[row]] for row in rows}
