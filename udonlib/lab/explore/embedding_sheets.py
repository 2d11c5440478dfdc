"""What lies in a region of an embedding, around a query and around a hub: sheets of images, as in `views.sheets`.

Each is one JPEG on a light card. Ticks and crosses say what the run's evaluation said of a query or a neighbour.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from IPython.display import Image
from jaxtyping import Int

from udonlib.data.catalog import Catalog
from udonlib.data.decoding import decode
from udonlib.lab.explore.embedding_map import RIGHT, WRONG, EmbeddingMap
from udonlib.lab.explore.neighbourhoods import found_by, hubs, nearest_confusions
from udonlib.lab.views.sheets import FAINT, GAP, INK, LINE, RIGHT_INK, WRONG_INK, Sheet

SIDE = 72  # pixels of a tile
STEP, ROW = SIDE + GAP, SIDE + 2 * LINE + GAP  # from one tile to the next
COLUMNS = 10
PAIRS = 4  # pairs of a query and a confusion in a row
HUB_TEXT = 150  # pixels for what is said of a hub
# What browsers show as it is, by the first bytes of a file: no need to decode and encode it again.
WEB_FORMATS = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png", b"RIFF": "webp"}
MAX_RAW = 6_000  # bytes of a file that is sent as it is

Picture = tuple[str, str]  # domain, path


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


def region_sheet(space: EmbeddingMap, rows: Int[np.ndarray, "point"], n: int = 30, n_pairs: int = 8) -> Image:
    """Show the images of a region, and below them the nearest of another domain beside the query they are near to.

    Args:
        space: the map, embedded or not.
        rows: its points in the region, at least one.
        n: images that are shown; of more, a random choice (seed of the map), sorted by domain and class.
        n_pairs: confusions at most; see `nearest_confusions`.
    """
    chosen = np.sort(np.random.default_rng(space.params.seed).permutation(rows)[:n])
    region = space.points.iloc[chosen].sort_values(["domain", "class"], kind="stable")
    queries = space.points["query"].to_numpy()[rows]
    lists = space.lists[space.params.embedder]
    pairs = nearest_confusions(lists, queries[queries >= 0], n_pairs)
    n_rows, n_pair_rows = -(-len(region) // COLUMNS), -(-len(pairs) // PAIRS)
    top = LINE + 2 * GAP
    below = top + n_rows * ROW
    sheet = Sheet(COLUMNS * STEP + GAP, below + (n_pair_rows * ROW + top if n_pair_rows else 0))
    some = f"{len(region)} of " if len(region) < len(rows) else ""
    sheet.write(GAP, GAP, f"{some}{len(rows):,} images in the region", INK)
    for number, row in enumerate(region.itertuples()):
        look = {RIGHT: (RIGHT_INK, "tick"), WRONG: (WRONG_INK, "cross")}.get(row.result, ("", ""))
        where = (GAP + number % COLUMNS * STEP, top + number // COLUMNS * ROW)
        _tile(sheet, space, where, (row.domain, row.path), look)
    if n_pair_rows:
        sheet.write(GAP, below + GAP, "query, and beside it the nearest image of another domain", INK)
    width = (COLUMNS * STEP) // PAIRS
    for number, pair in enumerate(pairs.itertuples()):
        x, y = GAP + number % PAIRS * width, below + top + number // PAIRS * ROW
        _tile(sheet, space, (x, y), lists.query(pair.query), (INK, ""))
        _tile(sheet, space, (x + STEP, y), (pair.domain, pair.path), (WRONG_INK, "cross"))
    return sheet.image()


def query_sheet(space: EmbeddingMap, query: int) -> Image:
    """Show a query with its neighbours in the merged index, right and wrong ones marked: a row for each embedder."""
    rows = [(name, lists) for name, lists in space.lists.items()]
    k = max(lists.position.shape[1] for _, lists in rows)
    left = 2 * STEP + 2 * GAP
    sheet = Sheet(left + k * STEP + GAP, len(rows) * (ROW + LINE + GAP) + GAP)
    sheet.write(GAP, GAP, "query", INK)
    _tile(sheet, space, (GAP, LINE + 2 * GAP), rows[0][1].query(query), (INK, ""))
    for number, (name, lists) in enumerate(rows):
        y = number * (ROW + LINE + GAP) + GAP
        sheet.write(left, y, f"{name}'s nearest neighbours, nearest first", INK)
        for rank, (picture, hit) in enumerate(lists.of(query)):
            _tile(sheet, space, (left + rank * STEP, y + LINE + GAP), picture, _look(hit))
    return sheet.image()


def item_sheet(space: EmbeddingMap, position: int, n: int = 9) -> Image:
    """Show an item of the merged index and the queries that have it among their nearest: a tick where that is right."""
    lists = space.lists[space.params.embedder]
    askers = found_by(lists, position)
    sheet = Sheet((n + 1) * STEP + 3 * GAP, ROW + LINE + 2 * GAP)
    sheet.write(GAP, GAP, "index", INK)
    _tile(sheet, space, (GAP, LINE + 2 * GAP), lists.searched.locate(position), (INK, ""))
    text = f"found by {len(askers):,} queries of the {lists.embedder}" if len(askers) else "no query finds it"
    sheet.write(STEP + 2 * GAP, GAP, text, INK if len(askers) else FAINT)
    _askers(sheet, space, position, askers[:n], (STEP + 2 * GAP, LINE + 2 * GAP))
    return sheet.image()


def hub_sheet(space: EmbeddingMap, n: int = 8, n_queries: int = 7) -> Image:
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
        sheet.write(x, GAP, text, INK)
    for number, hub in enumerate(table.itertuples()):
        y = top + number * ROW
        _tile(sheet, space, (GAP, y), (hub.domain, hub.path), (INK, ""))
        domains = "1 domain" if hub.n_domains == 1 else f"{hub.n_domains} domains"
        facts = (f"in {hub.n_lists:,} lists", f"right in {hub.n_right:,}", f"queries of {domains}")
        for line, text in enumerate(facts):
            sheet.write(GAP + STEP + 4, y + line * LINE, text, FAINT if line else INK)
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


def _tile(sheet: Sheet, space: EmbeddingMap, where: tuple[int, int], picture: Picture, look: tuple[str, str]) -> None:
    domain, path = picture
    image = decode(space.catalog.store.read(path), path, SIDE)
    sheet.tile(*where, SIDE, image, [space.names[picture], domain], *look)
