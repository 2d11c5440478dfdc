"""Each thing that can be wrong with data is found, named with its paths, and said in the verdict."""

import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.helpers.catalogs import (
    SIZES,
    picture,
    uned_files,
    write_image_folder,
    write_tree,
    write_uned_tree,
    write_uned_zip,
)
from udonlib.data.catalog import load_catalog
from udonlib.data.check import datacheck, probe
from udonlib.data.check.datacheck import DataCheck, Finding, check_catalog, check_quickly
from udonlib.errors import UserError

CHECKS = pytest.mark.parametrize("check", [check_quickly, check_catalog], ids=["quick", "thorough"])


def found(check: DataCheck, kind: str) -> Finding:
    [finding] = [finding for finding in check.findings if finding.kind == kind]
    return finding


def checked(root, check=check_catalog) -> DataCheck:
    return check(load_catalog(str(root)))


def files_of(split: str, domain: str = "emoji") -> list[str]:
    entries = json.loads(uned_files()[f"info_files/{domain}/{split}.json"])
    return [entry["path"] for entry in entries]


@CHECKS
@pytest.mark.parametrize("write", [write_uned_tree, write_uned_zip, write_image_folder])
def test_good_data_is_sound(tmp_path, check, write):
    result = checked(write(tmp_path / "data"), check)
    assert result.findings == ()
    assert re.fullmatch(
        r"sound\. nothing wrong was found; checked the files of all and the pixels of all of \d+ images", result.verdict
    )
    result.refuse_broken()


@CHECKS
def test_images_that_cannot_be_read_are_named_with_the_reason(tmp_path, check):
    root = write_uned_tree(tmp_path / "uned") / "images"
    (root / "emoji/0005_000.png").write_bytes(b"")
    (root / "emoji/0006_001.png").write_bytes(picture(1)[:150])
    (root / "flags/0000_000.png").unlink()
    (root / "flags/0000_001.png").unlink()
    (root / "flags/0000_001.png").symlink_to("nowhere.png")
    (root / "flags/0000_002.png").write_bytes(b"<html>")
    result = checked(tmp_path / "uned", check)
    finding = found(result, "unreadable")
    assert (finding.level, finding.n) == ("broken", 5)
    reasons = {path: (domain, about) for domain, path, about in finding.images}
    assert reasons["emoji/0005_000.png"] == ("emoji", "the file is empty")
    assert reasons["emoji/0006_001.png"][1].startswith("cannot be decoded: ")
    assert reasons["flags/0000_000.png"][1] == "no such file"
    assert reasons["flags/0000_001.png"][1] == "no such file"
    assert reasons["flags/0000_002.png"][1].startswith("not an image")
    assert result.verdict.startswith("broken. images that cannot be read: 5; checked")
    assert result.n_files == result.n_images
    with pytest.raises(UserError, match=r"broken.*\nimages that cannot be read: 5 \(emoji/0005_000.png: the file is"):
        result.refuse_broken()
    result.refuse_broken("skip")


def test_a_bit_that_flipped_in_an_archive_is_found(tmp_path):
    path = write_uned_zip(tmp_path / "uned.zip", image_size=(90, 90))
    content = bytearray(path.read_bytes())
    at = content.index(b"images/emoji/0000_000.png") + 200
    content[at] ^= 0x55
    path.write_bytes(content)
    [(_, name, about)] = found(checked(path), "unreadable").images
    assert name == "emoji/0000_000.png"
    assert "its checksum differs" in about


@CHECKS
def test_queries_without_a_positive_are_counted_and_named(tmp_path, check):
    root = write_uned_tree(tmp_path / "uned", sizes=SIZES | {"test": (3, 1, 1), "val": (2, 1)})
    result = checked(root, check)
    test, val = (f for f in result.findings if f.kind == "no positive")
    assert (test.what, test.n, test.level) == ("test queries without a positive", 4, "warning")
    assert [path for _, path, _ in test.images] == [f"{d}/000{i}_000.png" for d in ("emoji", "flags") for i in (6, 7)]
    assert (val.what, val.n) == ("validation queries without a positive", 2)
    assert result.verdict.startswith("usable, with warnings. test queries without a positive: 4; validation queries")
    result.refuse_broken()


@CHECKS
def test_a_domain_in_which_nothing_can_be_right_is_broken(tmp_path, check):
    root = write_uned_tree(tmp_path / "uned")
    entries = [{"path": path, "class_id": 100 + i} for i, path in enumerate(files_of("test"))]
    (root / "info_files/emoji/test.json").write_text(json.dumps(entries))
    result = checked(root, check)
    assert found(result, "unmeasured").n == 1
    with pytest.raises(UserError, match="none of the 7 test queries of domain 'emoji' has one"):
        result.refuse_broken("skip")


@CHECKS
def test_training_classes_of_one_image_are_noted(tmp_path, check):
    result = checked(write_uned_tree(tmp_path / "uned", sizes=SIZES | {"train": (4, 1, 5)}), check)
    finding = found(result, "single")
    assert (finding.n, finding.level) == (2, "note")
    assert finding.images[0][:2] == ("emoji", "emoji/0001_000.png")
    assert result.verdict.startswith("sound")


@CHECKS
def test_equal_files_are_told_apart_by_what_they_do(tmp_path, check):
    root = write_uned_tree(tmp_path / "uned")
    images, train, test = root / "images", files_of("train"), files_of("test")
    shutil.copy(images / train[0], images / test[0])  # seen in training
    shutil.copy(images / train[4], images / train[8])  # of another class
    shutil.copy(images / train[9], images / "flags/0002_000.png")  # of another domain
    shutil.copy(images / test[1], images / test[2])  # of its own class
    result = checked(root, check)
    leak, conflict, copies = (found(result, kind) for kind in ("leak", "conflict", "copies"))
    assert (leak.n, conflict.n, copies.n) == (1, 2, 1)
    assert {finding.level for finding in (leak, conflict, copies)} == {"warning"}
    [(domain, path, about)] = leak.images
    assert {path, about.split("as ")[1].split(":")[0]} == {train[0], test[0]}
    assert domain == "emoji"
    assert "emoji, train, class 'class 0'" in about
    assert "emoji, test, class" in about
    assert "pairs of equal files in training and in a test or validation query: 1" in result.verdict


def test_large_files_are_equal_only_if_all_of_them_is(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "END", 100)
    monkeypatch.setattr(datacheck, "END", 100)
    files = uned_files(image_format="BMP")
    a, b, c, d = (f"images/emoji/0002_00{i}.bmp" for i in range(4))
    middle = bytearray(files[a])
    middle[len(middle) // 2] ^= 1
    files |= {b: files[a], c: bytes(middle), d: bytes(middle)}
    root = write_tree(tmp_path / "uned", files)
    equal = [f for f in checked(root).findings if f.what.startswith("pairs of equal files")]
    assert [(finding.kind, finding.n) for finding in equal] == [("copies", 2)]
    assert [f for f in checked(root, check_quickly).findings if f.kind == "copies"] == []  # not read, not claimed


def test_near_duplicates_are_found_by_the_thorough_check(tmp_path):
    root = write_uned_tree(tmp_path / "uned", image_size=(120, 100))
    image = Image.open(root / "images" / files_of("train")[0])
    image.resize((90, 75)).save(root / "images" / files_of("test")[3], "JPEG", quality=60)
    image.save(root / "images" / files_of("train")[1], "JPEG", quality=60)
    result = checked(root)
    assert (found(result, "leak").n, found(result, "copies").n) == (2, 1)  # the copies are copies of each other, too
    assert found(result, "leak").what.startswith("pairs of near-duplicates")
    assert found(result, "copies").level == "note"
    assert checked(root, check_quickly).findings == ()


def sixteen_bits(top: int) -> bytes:
    values = np.linspace(0, top, 400).reshape(20, 20).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(("top", "n"), [(4095, 2), (65535, 0)])
def test_12_bits_in_16_are_noticed(tmp_path, top, n):
    root = write_uned_tree(tmp_path / "uned")
    for path in files_of("train")[:2]:
        (root / "images" / path).write_bytes(sixteen_bits(top))
    narrow = [finding for finding in checked(root).findings if finding.kind == "narrow"]
    assert sum(finding.n for finding in narrow) == n
    if n:
        assert "16 bits; no image of its domain is brighter than about 4,112 of 65,535" in narrow[0].images[0][2]


def test_images_of_one_colour_are_noted(tmp_path):
    root = write_uned_tree(tmp_path / "uned")
    Image.new("RGB", (30, 30), (200, 10, 10)).save(root / "images" / files_of("train")[0])
    finding = found(checked(root), "flat")
    assert [path for _, path, _ in finding.images] == files_of("train")[:1]


def test_the_files_of_a_domain_are_counted_by_kind(tmp_path):
    root = write_image_folder(tmp_path / "pets")
    Image.new("L", (200, 10)).save(root / "cats" / "class 0" / "0.PNG")
    [cats, dogs] = checked(root).kinds
    assert (cats.domain, dogs.domain) == ("cats", "dogs")
    assert cats.formats == {"PNG": 20, "JPEG": 10}
    assert cats.endings == {".png": 20, ".jpg": 10}
    assert cats.modes == {"RGB": 29, "L": 1}
    assert (cats.widths, cats.heights) == ((24, 24, 200), (10, 20, 20))
    assert cats.n_bytes == sum(path.stat().st_size for path in (root / "cats").rglob("*.*"))


@CHECKS
def test_what_a_folder_holds_besides_is_counted_with_the_reason(tmp_path, check):
    root = write_image_folder(tmp_path / "pets")
    extra = {
        "cats/class 0/a.heif2": b"x",
        "cats/class 1/b.svg": b"x",
        "dogs/class 1/c.svg": b"x",
        "cats/@eaDir/1.jpg": b"x",
    }
    result = checked(write_tree(root, extra), check)
    left = {finding.what: finding for finding in result.findings}
    assert [(f.what, f.n, f.level) for f in result.findings] == [
        *(("left out, .svg", 2, "warning"), ("left out, .heif2", 1, "note"), ("left out, @eaDir", 1, "note"))
    ]
    assert left["left out, .svg"].images == (("", "cats/class 1/b.svg", "first"),)
    assert "convert them to PNG" in left["left out, .svg"].meaning
    assert result.verdict.startswith("usable, with warnings. left out, .svg: 2; checked")
    assert result.notes == ()


def test_what_was_not_looked_at_is_said(tmp_path):
    root = write_uned_tree(tmp_path / "uned")
    result = check_catalog(load_catalog(str(root)), seconds=0)
    assert result.verdict == (
        "sound as far as was looked. nothing wrong was found; checked the files of 0 and the pixels of 0 of 48 images"
    )
    assert result.kinds == ()


def test_the_quick_check_decodes_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(datacheck, "QUICK_PIXELS", 5)
    result = checked(write_uned_tree(tmp_path / "uned"), check_quickly)
    assert (result.n_files, result.n_pixels) == (48, 5)
    assert "the pixels of 5 of 48 images" in result.verdict


def test_two_domains_of_miniuned_have_one_pair_that_looks_alike_and_nothing_else():
    """Two shots of one place, searched for each other: a fair note. benchmarks/datacheck.py says it of all domains."""
    result = check_catalog(load_catalog("miniuned", "flags, earth"), seconds=None)
    assert result.verdict == (
        "sound. nothing wrong was found; checked the files of all and the pixels of all of 4,179 images"
    )
    [finding] = result.findings
    assert (finding.kind, finding.level, finding.n) == ("copies", "note", 1)
    assert "earth/0392_00" in finding.images[0][1]
