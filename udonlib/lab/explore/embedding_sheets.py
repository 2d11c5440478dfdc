"""Thumbnails of images, and a sheet of hubs as in `views.sheets`: one picture, with ticks and crosses."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np

from udonlib.data.catalog import Catalog
from udonlib.data.decoding import decode
from udonlib.lab.explore.embedding_map import EmbeddingMap
from udonlib.lab.explore.neighbourhoods import found_by, hubs
from udonlib.lab.views.sheets import GAP, INK, LINE, RIGHT_INK, WRONG_INK, Picture, Sheet

SIDE = 72  # pixels of a tile
STEP, ROW = SIDE + GAP, SIDE + 2 * LINE + GAP  # from one tile to the next
HUB_TEXT = 150  # pixels for what is said of a hub
# What browsers show as it is, by the first bytes of a file: no need to decode and encode it again.
WEB_FORMATS = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png", b"RIFF": "webp"}
MAX_RAW = 6_000  # bytes of a file that is sent as it is

ImageKey = tuple[str, str]  # domain, path


def thumbnail(catalog: Catalog, path: str, side: int = 96) -> str:
    """Make a small picture of an image as a data URI: the file itself where it is small, else a JPEG of `side` pixels.

    Raises:
        ImageError, DataError: an image that cannot be read, by name.
    """
    data = catalog.store.read(path)
    kind = next((name for start, name in WEB_FORMATS.items() if data.startswith(start)), None)
    if kind is None or len(data) > MAX_RAW:
        image = decode(data, path, side)
        image.thumbnail((side, side))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80)
        data, kind = file.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def hub_sheet(space: EmbeddingMap, n: int = 8, n_queries: int = 7) -> Picture:
    """Show the items that turn up in the most lists, each with random queries that have it among their nearest.

    Args:
        space: the map; `params.embedder` says whose lists, `params.seed` the choice of queries.
        n: hubs.
        n_queries: queries of each.
    """
    lists = space.lists[space.params.embedder]
    table = hubs(lists, n)
    rng = np.random.default_rng(space.params.seed)
    left, top = STEP + HUB_TEXT + 2 * GAP, LINE + 2 * GAP
    sheet = Sheet(left + n_queries * STEP + GAP, top + max(1, len(table)) * ROW)
    k = lists.position.shape[1]
    for x, text in ((GAP, "hub of the index"), (left, f"some of the queries that have it among their {k} nearest")):
        sheet.write(x, GAP, text)
    for number, hub in enumerate(table.itertuples()):
        y = top + number * ROW
        _tile(sheet, space, (GAP, y), (hub.domain, hub.path), (INK, ""))
        domains = "1 domain" if hub.n_domains == 1 else f"{hub.n_domains} domains"
        facts = (f"in {hub.n_lists:,} lists", f"right in {hub.n_right:,}", f"queries of {domains}")
        for line, text in enumerate(facts):
            sheet.write(GAP + STEP + 4, y + line * LINE, text)
        askers = rng.permutation(found_by(lists, hub.position))[:n_queries]
        _askers(sheet, space, hub.position, askers, (left, y))
    return sheet.image()


def _askers(
    sheet: Sheet, space: EmbeddingMap, position: int, queries: Sequence[int] | np.ndarray, where: tuple[int, int]
) -> None:
    """Queries that have an item among their nearest, in a row; a tick where it is relevant to them."""
    lists = space.lists[space.params.embedder]
    for number, query in enumerate(queries):
        hit = bool(lists.hit[query][lists.position[query] == position][0])
        _tile(sheet, space, (where[0] + number * STEP, where[1]), lists.query(int(query)), _look(hit))


def _look(hit: bool) -> tuple[str, str]:
    return (RIGHT_INK, "tick") if hit else (WRONG_INK, "cross")


def _tile(sheet: Sheet, space: EmbeddingMap, where: tuple[int, int], picture: ImageKey, look: tuple[str, str]) -> None:
    domain, path = picture
    image = decode(space.catalog.store.read(path), path, SIDE)
    sheet.tile(*where, SIDE, image, [space.names[picture], domain], *look)
