"""Which pixels of a drawing's picture are figure, and which are ground: masks.zip, beside the archive.

A picture of emoji, logos or icons is a drawing laid on a ground, and its drawing's alpha says what it covers:

    picture = a figure + (1 - a) ground,     mask = a >= 1/2

with a reduced from the canvas as the picture itself is. The builder composes each picture once more and takes a mask
only where that gives the archive's bytes again, so that every mask is that of the picture as it ships. A domain's masks
lie in one sheet, a lossless black and white WebP of cells as large as the pictures, row by row, sorted by path.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
from jaxtyping import Bool
from PIL import Image

from udonlib.data.miniuned import ARCHIVE, MASKS
from udonlib.data.miniuned.artwork import DRAWN, SIZE, generator, reduced, set_on_ground
from udonlib.data.miniuned.attribution import Rows
from udonlib.data.miniuned.layout import encode
from udonlib.data.miniuned.sources import BuildError

COLUMNS = 64  # cells of a sheet


def draw_masks(
    images: Mapping[str, bytes],
    info: Mapping[str, Mapping[str, Rows]],
    draw: Callable[[str, str], Image.Image],
    report: Callable[[str], None] = print,
) -> dict[str, bytes]:
    """Sheets of the domains of drawings, by the name of their file.

    Args:
        images: of the archive, by path.
        info: domain -> split -> rows of its info file.
        draw: the drawing (RGBA) of a domain's source.

    Raises:
        BuildError: a picture whose bytes are not those of its drawing.
    """
    sheets = {}
    for domain, style in DRAWN.items():
        rows = {str(row["path"]): row for split in info[domain].values() for row in split}
        masks = []
        for path in sorted(rows):
            row = rows[path]
            source = str(row["source"])
            ground, drawing = set_on_ground(draw(domain, source), generator(domain, row["class"], source), style)
            picture = Image.alpha_composite(ground, drawing).convert("RGB")
            if encode(reduced(picture)) != images[path]:
                raise BuildError(f"{path}: the drawing {source} gives another picture than the archive holds")
            masks.append(np.asarray(reduced(drawing.getchannel("A"))) >= 128)
        sheets[f"{domain}.webp"] = sheet(np.stack(masks))
        report(f"{domain}: {len(masks)} masks, {len(sheets[f'{domain}.webp']):,} bytes")
    return sheets


def sheet(masks: Bool[np.ndarray, "image side side"]) -> bytes:
    """Masks as one picture of cells, white where they are true; `cells` reads it."""
    n, side = len(masks), masks.shape[1]
    cells = np.zeros((math.ceil(n / COLUMNS) * COLUMNS, side, side), bool)
    cells[:n] = masks
    pixels = cells.reshape(-1, COLUMNS, side, side).swapaxes(1, 2).reshape(-1, COLUMNS * side)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8) * 255).convert("RGB").save(buffer, "WEBP", lossless=True, method=6)
    return buffer.getvalue()


def cells(content: bytes, side: int = SIZE) -> Bool[np.ndarray, "image side side"]:
    """All cells of a sheet; those behind the last mask are false."""
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("L")) >= 128
    return pixels.reshape(-1, side, COLUMNS, side).swapaxes(1, 2).reshape(-1, side, side)


@cache
def shipped_masks(domain: str) -> dict[str, Bool[np.ndarray, "side side"]]:
    """Mask of each picture of a domain of the archive, by its path; nothing for domains that are not drawings."""
    if domain not in DRAWN:
        return {}
    with zipfile.ZipFile(ARCHIVE) as archive, zipfile.ZipFile(MASKS) as sheets:
        prefix = f"images/{domain}/"
        paths = sorted(name.removeprefix("images/") for name in archive.namelist() if name.startswith(prefix))
        return dict(zip(paths, cells(sheets.read(f"{domain}.webp")), strict=False))
