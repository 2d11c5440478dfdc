"""Sheets of images: pairs that a check found to be the same, and what augmentation makes of some."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image as Pixels

from udonlib.data.augmentation import augment
from udonlib.data.catalog import Catalog
from udonlib.data.check.datacheck import DataCheck
from udonlib.data.decoding import decode
from udonlib.data.images import ImageReader
from udonlib.errors import UserError
from udonlib.lab.views.sheets import Picture, Sheet
from udonlib.lab.views.tables import Table, lines_table
from udonlib.params import TrainParams

SIDE, GAP, LINE = 84, 12, 18
KINDS = {"leak": "a leak", "conflict": "two classes", "copies": "same class"}


def copies_sheet(catalog: Catalog, check: DataCheck, n: int = 20) -> Picture | Table:
    """Show pairs of images that are equal or nearly so, one above the other, as many of each kind as there is room for.

    Args:
        check: of this catalog.
        n: pairs, at most.
    """
    found = [finding for finding in check.findings if finding.others]
    chosen = [
        (KINDS[finding.kind], domain, (path, other))
        for finding in found
        for (domain, path, _), other in list(zip(finding.images, finding.others, strict=True))[: n // len(found) or 1]
    ]
    if not chosen:
        return lines_table(["pairs"], [["no images were found that are equal, or nearly so"]], side="left")
    columns = 10
    n_rows = -(-len(chosen) // columns)
    height = 2 * SIDE + 6 + 2 * LINE + GAP
    sheet = Sheet(columns * (SIDE + GAP) + GAP, n_rows * height + GAP)
    for place, (kind, domain, paths) in enumerate(chosen):
        x, y = GAP + place % columns * (SIDE + GAP), GAP + place // columns * height
        for below, path in enumerate(paths):
            captions = [kind, domain] if below else []
            sheet.tile(x, y + below * (SIDE + 6), SIDE, _picture(catalog, path), captions)
    return sheet.image()


def augmented_sheet(
    catalog: Catalog, params: TrainParams, n_images: int = 3, n_views: int = 3, seed: int = 0
) -> Picture:
    """Show some training images of each domain as training sees them: first as they are, then so many times augmented.

    Args:
        params: of the run: its augmentation, by domain where that differs, and size.
        n_images: of each domain. n_views: of each image.
        seed: of the choice and of what augmentation draws.
    """
    reader = ImageReader(catalog, params.resize_size, "train", "skip", cache=False)
    domains = [domain for domain in catalog.domains if len(domain.train_labels)]
    step = (n_views + 1) * SIDE + GAP
    sheet = Sheet(120 + n_images * step, len(domains) * (SIDE + LINE + GAP) + GAP)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    for row, domain in enumerate(domains):
        y = GAP + row * (SIDE + LINE + GAP)
        kind = params.augmentation_by_domain.get(domain.name, params.augmentation)
        sheet.write(GAP, y, domain.name, 104)
        sheet.write(GAP, y + LINE, kind, 104)
        chosen = rng.permutation(len(domain.train_labels))[:n_images]
        for column, number in enumerate(chosen.tolist()):
            images = reader.read(domain.name, "train", np.array([number]))
            if not len(images):  # the check of the data says which and why
                continue
            views = augment(images.repeat(n_views, 1, 1, 1), kind, params.image_size, generator)
            left = 120 + column * step
            for place, view in enumerate([images[0], *views]):
                pixels = view.permute(1, 2, 0).clamp(0, 255).to(torch.uint8).numpy()
                caption = [["as it is"], ["augmented"]][place] if place < 2 else []
                sheet.tile(left + place * SIDE, y, SIDE - 4, Pixels.fromarray(pixels), caption)
    return sheet.image()


def _picture(catalog: Catalog, path: str) -> Pixels.Image:
    try:
        return decode(catalog.store.read(path), path)
    except UserError:  # it has gone since the check
        return Pixels.new("RGB", (SIDE, SIDE), "#dddddd")
