"""Copies and augmented images: what is shown is what was found, and what training makes."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.helpers.catalogs import write_uned_tree
from udonlib import presets
from udonlib.data.catalog import load_catalog
from udonlib.data.check.datacheck import check_catalog
from udonlib.lab.explore.samples.sample_sheets import GAP, SIDE, augmented_sheet, copies_sheet


@pytest.fixture
def tree(tmp_path):
    return write_uned_tree(tmp_path, sizes={"train": (4, 3, 5), "val": (3, 3), "test": (6, 5, 4)})


def pixels(sheet):
    return np.asarray(Image.open(io.BytesIO(sheet.data)).convert("RGB")).astype(int)


def test_pairs_of_equal_images_stand_one_above_the_other(tree):
    catalog = load_catalog(str(tree))
    assert "no images were found" in copies_sheet(catalog, check_catalog(catalog)).text
    train, test = (catalog["emoji"].splits[name].paths for name in ("train", "test"))
    shutil.copy(tree / "images" / train[0], tree / "images" / test[0])
    catalog = load_catalog(str(tree))
    check = check_catalog(catalog)
    [leak] = [finding for finding in check.findings if finding.kind == "leak"]
    assert {leak.images[0][1], leak.others[0]} == {train[0], test[0]}
    shown = pixels(copies_sheet(catalog, check))
    first = shown[GAP : GAP + SIDE, GAP : GAP + SIDE]
    second = shown[GAP + SIDE + 6 : GAP + 2 * SIDE + 6, GAP : GAP + SIDE]
    assert np.abs(first - second).mean() < 3  # but for JPEG
    assert first.std() > 5


def test_augmented_images_differ_from_the_image_and_from_each_other_as_the_run_says(tree):
    catalog = load_catalog(str(tree))
    params = presets.load("smoke", augmentation="affine", augmentation_by_domain={"flags": "none"})

    def tiles(sheet, row):
        y = GAP + row * (SIDE + 18 + GAP)
        return [sheet[y : y + SIDE - 4, 120 + n * SIDE : 120 + n * SIDE + SIDE - 4] for n in range(4)]

    shown = pixels(augmented_sheet(catalog, params, n_images=2))
    emoji, flags = (tiles(shown, catalog.names.index(name)) for name in ("emoji", "flags"))
    assert min(np.abs(emoji[0] - other).mean() for other in emoji[1:]) > 5
    assert np.abs(emoji[1] - emoji[2]).mean() > 5
    assert np.abs(flags[1] - flags[2]).mean() < 3  # nothing is drawn
    assert np.array_equal(shown, pixels(augmented_sheet(catalog, params, n_images=2)))
    assert not np.array_equal(shown, pixels(augmented_sheet(catalog, params, n_images=2, seed=1)))
