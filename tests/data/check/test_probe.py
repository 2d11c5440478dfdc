"""A glance at an image file tells what it is, whether it is cut, and what it shows."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.helpers.catalogs import picture, write_zip
from udonlib.data.check.probe import END, probe_file, probe_pixels
from udonlib.data.decoding import ImageError
from udonlib.data.storage import DataError, Store

FORMATS = {"JPEG": "RGB", "PNG": "RGB", "WEBP": "RGB", "GIF": "P", "BMP": "RGB", "TIFF": "RGB"}


def store(tmp_path, **files: bytes) -> Store:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return Store(tmp_path)


def noise(width: int, height: int, image_format: str, **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_file_is_known_by_its_ends(tmp_path, image_format):
    small, large = picture(1, (30, 20), image_format), noise(400, 300, image_format)
    files = store(tmp_path, small=small, large=large)
    for name, content, size in (("small", small, (30, 20)), ("large", large, (400, 300))):
        facts = probe_file(files, name)
        assert (facts.format, facts.mode, facts.n_bytes) == (image_format, FORMATS[image_format], len(content))
        assert (facts.width, facts.height) == size
    assert len(large) > END


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "WEBP"])
def test_a_cut_file_does_not_seem_whole_and_a_whole_one_does(tmp_path, image_format):
    for content in (picture(1, (90, 90), image_format), noise(400, 300, image_format)):
        files = store(tmp_path, whole=content, cut=content[: len(content) * 3 // 4])
        assert probe_file(files, "whole").seems_whole
        try:
            assert not probe_file(files, "cut").seems_whole
        except ImageError:
            assert image_format == "WEBP"  # whose reader sees that itself
        with pytest.raises(ImageError, match="^cut: "):
            probe_pixels(files, "cut")


def test_of_other_formats_nothing_is_claimed(tmp_path):
    assert not probe_file(store(tmp_path, image=picture(1, image_format="TIFF")), "image").seems_whole


def test_keys_are_equal_for_equal_files_only(tmp_path):
    one, large = picture(1), noise(600, 400, "BMP")
    changed = bytearray(large)
    changed[-1] ^= 1
    files = store(tmp_path, a=one, b=one, c=picture(2), large=large, end=bytes(changed))
    keys = {name: probe_file(files, name).key for name in ("a", "b", "c", "large", "end")}
    assert keys["a"] == keys["b"]
    assert len(set(keys.values())) == 4


def test_a_header_behind_much_metadata_is_found(tmp_path):
    icc = np.random.default_rng(0).bytes(3 * END)
    facts = probe_file(store(tmp_path, image=noise(40, 30, "JPEG", icc_profile=icc)), "image")
    assert (facts.width, facts.height) == (40, 30)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "image: the file is empty"), (b"<html></html>", "image: not an image"), (None, "no file 'image'")],
)
def test_what_is_no_image_is_refused(tmp_path, content, message):
    files = store(tmp_path, **({} if content is None else {"image": content}))
    for probe in (probe_file, probe_pixels):
        with pytest.raises((ImageError, DataError), match=message):
            probe(files, "image")


def test_an_archive_tells_the_same_as_a_folder(tmp_path):
    contents = {"small": picture(1), "large": noise(300, 300, "BMP")}
    folder = store(tmp_path, **contents)
    for compression in (0, 8):
        archive = Store(write_zip(tmp_path / f"{compression}.zip", contents, compression))
        for name in contents:
            assert probe_file(archive, name) == probe_file(folder, name)
            assert probe_pixels(archive, name) == probe_pixels(folder, name)
            assert archive.ends(name, 100) == folder.ends(name, 100)
            assert archive.digest(name) == folder.digest(name)


def test_only_the_ends_of_a_long_file_are_read(tmp_path):
    content = bytes(range(256)) * 1000
    first, last, n_bytes = store(tmp_path, a=content, b=b"abc").ends("a", 100)
    assert (first, last, n_bytes) == (content[:100], content[-100:], len(content))
    assert Store(tmp_path).ends("b", 100) == (b"abc", b"abc", 3)
    with pytest.raises(DataError, match="not a plain relative path"):
        Store(tmp_path).ends("../b", 100)


def test_copies_have_nearly_the_same_hash_and_other_images_have_not(tmp_path):
    original = Image.open(io.BytesIO(picture(3, (200, 160))))
    buffer = io.BytesIO()
    original.resize((120, 96)).save(buffer, "JPEG", quality=70)
    files = store(tmp_path, original=picture(3, (200, 160)), copy=buffer.getvalue(), other=picture(4, (200, 160)))
    one, copy, other = (probe_pixels(files, name) for name in ("original", "copy", "other"))
    assert (one.hash ^ copy.hash).bit_count() <= 3
    assert (one.hash ^ other.hash).bit_count() > 8
    assert len(one.thumbnail) == 192


def test_the_brightest_value_of_16_bits_is_seen_as_of_8(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 20), 4095, np.uint16)).save(buffer, "PNG")
    files = store(tmp_path, image=buffer.getvalue())
    assert probe_pixels(files, "image").brightest == 16
    assert probe_file(files, "image").mode == "I;16"
