"""What counts as an image is what the installed Pillow reads; the rest has a reason."""

import sys
import types

import pytest
from PIL import Image

from udonlib import imagekinds
from udonlib.imagekinds import ENDINGS, FORMATS, ending, why_left_out


@pytest.mark.parametrize(
    "kind",
    ".avif .bmp .gif .jp2 .jpeg .jpg .pgm .png .ppm .tif .tiff .webp .jfif .jpe .j2k .ico .apng .pbm .pnm .mpo".split(),
)
def test_what_pillow_reads_is_looked_for(kind: str) -> None:
    assert kind in ENDINGS


def test_formats_that_start_programs_or_hold_no_pictures_are_not_opened() -> None:
    assert not {"EPS", "WMF", "HDF5", "MPEG", "GRIB", "BUFR", "TGA"} & set(FORMATS)
    assert not {".eps", ".pdf", ".wmf", ".h5", ".mpg"} & ENDINGS
    assert all(Image.OPEN[name][1] is not None for name in FORMATS), "a format without a signature takes anything"


@pytest.mark.parametrize(
    ("kind", "reason", "may_be_image"),
    [
        (".heic", "install pillow-heif", True),
        (".jxl", "install pillow-jxl-plugin", True),
        (".mp4", "store their frames", True),
        ("", "no ending", True),
        (".txt", "no ending of an image", False),
    ],
)
def test_what_is_left_out_has_a_reason(kind: str, reason: str, may_be_image: bool) -> None:
    assert reason in why_left_out(kind)[0]
    assert why_left_out(kind)[1] == may_be_image


def test_a_plugin_that_is_installed_registers_its_format(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    plugin = types.SimpleNamespace(register_heif_opener=lambda: called.append("heif"))
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)  # type: ignore[arg-type]
    imagekinds._add_plugins()
    assert called == ["heif"]


def test_endings_are_compared_in_small_letters() -> None:
    assert [ending(name) for name in ("a.JPG", "a.b.Png", "noend", ".hidden", "a.")] == [".jpg", ".png", "", "", "."]
