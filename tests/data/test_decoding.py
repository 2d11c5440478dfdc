"""Decoding: every odd format comes out right, and everything else is reported by its path."""

import io
import struct
import sys
import threading
import types
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.helpers.catalogs import picture
from tests.helpers.waiting import SECONDS
from udonlib.data import decoding
from udonlib.data.decoding import (
    ENDINGS,
    FORMATS,
    MAX_PIXELS,
    ImageError,
    decode,
    decode_alpha,
    ending,
    prepare_eval,
    prepare_train,
    resize_eval,
    resize_train,
    to_rgb,
    why_left_out,
)
from udonlib.errors import UserError


def encode(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def flat(mode: str, colour: object, size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new(mode, size, colour)  # type: ignore[arg-type]


def colour_of(data: bytes) -> tuple[int, ...]:
    """The one colour of an image."""
    image = decode(data, "x")
    assert image.mode == "RGB"
    pixels = np.asarray(image).reshape(-1, 3)
    assert (pixels == pixels[0]).all()
    return tuple(pixels[0].tolist())


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """Write a PNG by hand, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


SMALL = {"BLP", "ICNS", "ICO", "MSP", "XBM"}  # of palettes, two colours or fixed sizes


class TestColours:
    @pytest.mark.parametrize("image_format", [name for name in FORMATS if name in Image.SAVE and name not in SMALL])
    def test_every_format_keeps_a_photograph(self, image_format: str) -> None:
        image = Image.open(io.BytesIO(picture(1, (40, 30))))
        found = np.asarray(decode(encode(image, image_format), "x")).astype(int)
        assert found.shape == (30, 40, 3)
        assert np.abs(found - np.asarray(image)).mean() < 12  # GIF's palette is the coarsest

    def test_icons_are_read(self) -> None:
        assert colour_of(encode(flat("RGB", (200, 10, 60), (16, 16)), "ICO")) == (200, 10, 60)

    def test_grey_becomes_three_equal_channels(self) -> None:
        assert colour_of(encode(flat("L", 77))) == (77, 77, 77)
        assert colour_of(encode(flat("1", 1))) == (255, 255, 255)

    def test_palette_colours_are_looked_up(self) -> None:
        assert colour_of(encode(flat("RGB", (200, 30, 40)).quantize(4))) == (200, 30, 40)

    def test_transparency_is_laid_on_white(self) -> None:
        assert colour_of(encode(flat("RGBA", (0, 0, 0, 0)))) == (255, 255, 255)
        assert colour_of(encode(flat("RGBA", (255, 0, 0, 128)))) == (255, 127, 127)
        assert colour_of(encode(flat("LA", (0, 51)))) == (204, 204, 204)

    def test_transparent_colours_of_palette_grey_and_rgb_are_laid_on_white(self) -> None:
        palette = flat("P", 3)
        palette.putpalette(bytes(range(12)))
        assert colour_of(encode(palette, transparency=3)) == (255, 255, 255)
        assert colour_of(encode(palette, transparency=2)) == (9, 10, 11)
        assert colour_of(encode(palette, "GIF", transparency=3)) == (255, 255, 255)
        assert colour_of(encode(palette, transparency=bytes([255, 255, 255, 0]))) == (255, 255, 255)
        assert colour_of(encode(flat("RGB", (1, 2, 3)), transparency=(1, 2, 3))) == (255, 255, 255)
        assert colour_of(encode(flat("RGB", (1, 2, 3)), transparency=(1, 2, 4))) == (1, 2, 3)
        assert colour_of(encode(flat("L", 9), transparency=9)) == (255, 255, 255)
        assert colour_of(encode(flat("1", 0), transparency=0)) == (255, 255, 255)

    @pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
    def test_16_bit_grey_is_scaled_and_not_clipped(self, image_format: str) -> None:
        values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
        found = decode(encode(Image.fromarray(values), image_format), "x")
        assert np.asarray(found)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]

    def test_16_bit_portable_grey_maps_are_scaled(self) -> None:
        data = b"P5 2 1 65535\n" + struct.pack(">HH", 32768, 65535)
        assert np.asarray(decode(data, "x"))[0, :, 0].tolist() == [128, 255]

    def test_16_bit_rgb_keeps_its_high_bits(self) -> None:
        assert colour_of(png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 65535, 32896, 257))) == (255, 128, 1)

    def test_a_transparent_value_of_16_bits_is_laid_on_white(self) -> None:
        rows = b"\0" + struct.pack(">HHH", 300, 301, 65535)
        key = (b"tRNS", struct.pack(">H", 300))
        assert np.asarray(decode(png(3, 1, 16, 0, rows, key), "x"))[0, :, 0].tolist() == [255, 1, 255]
        colour = struct.pack(">HHH", 65535, 300, 5)
        assert colour_of(png(1, 1, 16, 2, b"\0" + colour, (b"tRNS", colour))) == (255, 255, 255)
        assert colour_of(png(1, 1, 16, 2, b"\0" + colour, (b"tRNS", bytes(6)))) == (255, 1, 0)

    def test_12_bits_in_16_keep_the_scale_of_16(self) -> None:
        values = np.array([[0, 1000, 4095]], dtype=np.uint16)
        assert np.asarray(decode(encode(Image.fromarray(values)), "x"))[0, :, 0].tolist() == [0, 4, 16]

    def test_16_bit_grey_with_alpha_is_laid_on_white(self) -> None:
        assert colour_of(png(1, 1, 16, 4, b"\0" + struct.pack(">HH", 0, 0))) == (255, 255, 255)

    def test_alpha_is_told_of_whatever_is_transparent_and_of_nothing_else(self) -> None:
        def alpha_of(data: bytes) -> list[int] | None:
            alpha = decode_alpha(data, "x")
            return None if alpha is None else np.unique(np.asarray(alpha)).tolist()

        assert alpha_of(encode(flat("RGB", (1, 2, 3)))) is None
        assert alpha_of(encode(flat("RGBA", (1, 2, 3, 255)))) is None
        assert alpha_of(encode(flat("RGBA", (1, 2, 3, 90)))) == [90]
        assert alpha_of(encode(flat("LA", (0, 51)))) == [51]
        assert alpha_of(encode(flat("RGB", (1, 2, 3)), transparency=(1, 2, 3))) == [0]
        assert alpha_of(encode(flat("RGB", (1, 2, 3)), transparency=(1, 2, 4))) is None
        key = (b"tRNS", struct.pack(">H", 300))
        assert alpha_of(png(2, 1, 16, 0, b"\0" + struct.pack(">HH", 300, 301), key)) == [0, 255]
        colour = struct.pack(">HHH", 65535, 300, 5)
        assert alpha_of(png(1, 1, 16, 2, b"\0" + colour, (b"tRNS", colour))) == [0]

    def test_alpha_is_turned_as_the_image_is(self) -> None:
        image = flat("RGBA", (1, 2, 3, 255), (6, 4))
        image.putpixel((5, 0), (1, 2, 3, 0))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise by a quarter
        turned = decode_alpha(encode(image, exif=exif), "x")
        assert turned is not None
        assert turned.size == (4, 6)
        assert [tuple(place) for place in np.argwhere(np.asarray(turned) == 0)] == [(5, 3)]

    def test_alpha_of_what_is_no_image_is_refused(self) -> None:
        with pytest.raises(ImageError, match="x: not an image"):
            decode_alpha(b"no image", "x")

    def test_cmyk_is_converted_whether_inverted_as_adobe_does_or_not(self) -> None:
        cyan = flat("CMYK", (255, 0, 0, 0), (16, 16))
        assert colour_of(encode(cyan, "TIFF")) == (0, 255, 255)
        adobe = encode(cyan, "JPEG", quality=100)
        assert b"Adobe" in adobe
        assert np.abs(np.subtract(colour_of(adobe), (0, 255, 255))).max() <= 2
        marker = adobe.index(b"\xff\xee")
        plain = adobe[:marker] + adobe[marker + 2 + int.from_bytes(adobe[marker + 2 : marker + 4], "big") :]
        assert b"Adobe" not in plain
        # without the marker the stored values are ink: cyan stored inverted is everything but cyan, thus nearly black
        assert np.abs(np.subtract(colour_of(plain), (0, 0, 0))).max() <= 2

    def test_of_an_animation_the_first_frame_is_taken(self) -> None:
        frames = [flat("RGB", colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
        for image_format in ("GIF", "WEBP", "PNG", "TIFF"):
            options = {"lossless": True} if image_format == "WEBP" else {}
            data = encode(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
            assert Image.open(io.BytesIO(data)).n_frames == 3  # type: ignore[attr-defined]
            assert colour_of(data) == (255, 0, 0)


class TestOrientation:
    @pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation_is_applied(self, image_format: str, orientation: int) -> None:
        upright = np.zeros((32, 48, 3), dtype=np.uint8)
        upright[:16, :24], upright[:16, 24:], upright[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
        # how a camera stores the picture that is upright after the orientation was applied
        stored = {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.transpose(1, 0, 2),
            6: np.rot90(upright),
            7: np.rot90(upright, 2).transpose(1, 0, 2),
            8: np.rot90(upright, -1),
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(Image.fromarray(np.ascontiguousarray(stored)), image_format, exif=exif)
        found = np.asarray(decode(data, "x")).astype(int)
        assert found.shape == upright.shape
        assert np.abs(found - upright)[4:12, 4:20].max() < 40
        assert np.abs(found - upright).mean() < 12

    def test_unreadable_exif_data_does_no_harm(self) -> None:
        data = encode(flat("RGB", (10, 20, 30)), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
        assert colour_of(data) == (10, 20, 30)


def declared(width: int, height: int) -> bytes:
    return png(width, height, 8, 2, b"\0" * 100)


BAD_FILES = {
    "empty": (b"", "the file is empty"),
    "text": (b"<html>not found</html>", "not an image of a known format"),
    "zeros": (b"\0" * 1000, "not an image of a known format"),
    "a program's format": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
    "truncated JPEG": (picture(1, (90, 80), "JPEG")[:-300], "cannot be decoded: .*truncated"),
    "truncated PNG": (picture(1, (90, 80))[:-300], "cannot be decoded: .*truncated"),
    "truncated WebP": (picture(1, (90, 80), "WEBP")[:-100], "x/y.jpg: "),
    "truncated GIF": (picture(1, (90, 80), "GIF")[:-300], "cannot be decoded: .*truncated"),
    "truncated TIFF": (picture(1, (90, 80), "TIFF")[:200], "x/y.jpg: "),
    "only a header": (picture(1, (90, 80), "JPEG")[:20], "x/y.jpg: "),
    "20,000 x 20,000 declared": (declared(20_000, 20_000), "too large: .*pixels"),
    "10,000 x 10,000 declared": (declared(10_000, 10_000), f"too large: .*{MAX_PIXELS} pixels"),
    "a line": (encode(flat("RGB", 0, (1001, 10))), "too thin: 1001 x 10, one side more than 100 times the other"),
    "floating point": (encode(flat("F", 0.5), "TIFF"), "floating-point pixels have no fixed range"),
    "32 bits": (encode(flat("I", 70_000), "TIFF"), "32-bit pixels of 70000 to 70000; store it with 8 or 16 bits"),
}


class TestBadFiles:
    @pytest.mark.parametrize("case", BAD_FILES)
    def test_a_bad_file_is_reported_by_its_path(self, case: str) -> None:
        data, message = BAD_FILES[case]
        with pytest.raises(ImageError, match=rf"^x/y\.jpg: .*{message.removeprefix('x/y.jpg: ')}"):
            decode(data, "x/y.jpg")

    def test_a_huge_declared_size_takes_no_memory(self) -> None:
        import tracemalloc

        tracemalloc.start()
        with pytest.raises(ImageError):
            decode(declared(20_000, 20_000), "x")
        assert tracemalloc.get_traced_memory()[1] < 10**6
        tracemalloc.stop()

    def test_the_largest_size_allowed_is_not_refused_for_its_size(self) -> None:
        with pytest.raises(ImageError, match="cannot be decoded: .*truncated"):
            decode(declared(9459, MAX_PIXELS // 9459), "x")

    @given(
        seed=st.integers(0, 3),
        image_format=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]),
        at=st.floats(0, 1, exclude_max=True),
        change=st.binary(min_size=1, max_size=6),
        cut=st.booleans(),
    )
    def test_damage_anywhere_gives_an_image_or_an_image_error(
        self, seed: int, image_format: str, at: float, change: bytes, cut: bool
    ) -> None:
        data = picture(seed, (31, 23), image_format)
        place = int(at * len(data))
        damaged = data[:place] if cut else data[:place] + change + data[place + len(change) :]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                assert decode(damaged, "x").mode == "RGB"
            except ImageError as error:
                assert str(error).startswith("x: ")  # noqa: PT017

    def test_it_is_a_mistake_that_the_user_can_mend(self) -> None:
        assert issubclass(ImageError, UserError)


class TestLargeJpegs:
    def test_a_fraction_is_decoded_where_that_is_enough(self) -> None:
        data = picture(1, (800, 640), "JPEG")
        assert decode(data, "x").size == (800, 640)
        assert decode(data, "x", at_least=75).size == (200, 160)
        assert decode(data, "x", at_least=300).size == (800, 640)
        small = np.asarray(decode(data, "x", at_least=75)).astype(float)
        whole = np.asarray(decode(data, "x").reduce(4)).astype(float)
        assert np.abs(small - whole).mean() < 2


def naive_bilinear(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Half-pixel centres, edges repeated, one output pixel at a time."""
    result = np.zeros((3, height, width))
    for i in range(height):
        for j in range(width):
            y = max((i + 0.5) * pixels.shape[0] / height - 0.5, 0)
            x = max((j + 0.5) * pixels.shape[1] / width - 0.5, 0)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, pixels.shape[0] - 1), min(x0 + 1, pixels.shape[1] - 1)
            top = pixels[y0, x0] * (1 - x + x0) + pixels[y0, x1] * (x - x0)
            bottom = pixels[y1, x0] * (1 - x + x0) + pixels[y1, x1] * (x - x0)
            result[:, i, j] = top * (1 - y + y0) + bottom * (y - y0)
    return result


class TestResizing:
    @given(height=st.integers(1, 30), width=st.integers(1, 30), size=st.integers(1, 12), seed=st.integers(0, 99))
    def test_both_resizings_agree_with_a_loop_over_pixels(self, height: int, width: int, size: int, seed: int) -> None:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = naive_bilinear(pixels, size, size)
        np.testing.assert_allclose(resize_train(pixels, size).numpy(), expected, atol=1e-3)
        short = min(height, width)
        longer = int(max(height, width) / short * size)
        new_height, new_width = (longer, size) if height > width else (size, longer)
        top, left = (new_height - size) // 2, (new_width - size) // 2
        whole = naive_bilinear(pixels, new_height, new_width)
        expected = whole[:, top : top + size, left : left + size]
        np.testing.assert_allclose(resize_eval(pixels, size).numpy(), expected, atol=1e-3)

    def test_an_image_of_the_right_size_stays_as_it_is(self) -> None:
        image = Image.open(io.BytesIO(picture(3, (48, 48))))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert torch.equal(prepare_train(image, 48), pixels)
        assert torch.equal(prepare_eval(image, 48), pixels)

    def test_values_are_rounded_to_the_nearest(self) -> None:
        image = Image.fromarray(np.array([[[10, 0, 0], [13, 0, 0]]], dtype=np.uint8).repeat(2, 0))
        assert resize_train(np.array(image), 4)[0, 0].tolist() == [10.0, 10.75, 12.25, 13.0]
        assert prepare_train(image, 4)[0, 0].tolist() == [10, 11, 12, 13]


def test_threads_that_decode_at_once_leave_warnings_as_they_were(monkeypatch):
    both_inside, first_is_done = threading.Barrier(2), threading.Event()
    identified = decoding._identified

    def slowly(data: bytes, path: str) -> Image.Image:
        both_inside.wait(SECONDS)
        if path == "second":
            assert first_is_done.wait(SECONDS)
        return identified(data, path)

    monkeypatch.setattr(decoding, "_identified", slowly)
    before = list(warnings.filters)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(decode, picture(1), "first")
        second = pool.submit(decode, picture(2), "second")
        first.result()
        first_is_done.set()
        second.result()
    assert warnings.filters == before


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
    decoding._add_plugins()
    assert called == ["heif"]


def test_endings_are_compared_in_small_letters() -> None:
    assert [ending(name) for name in ("a.JPG", "a.b.Png", "noend", ".hidden", "a.")] == [".jpg", ".png", "", "", "."]


def test_an_image_that_pillow_has_opened_is_brought_to_rgb_as_its_file_is_and_stays_as_it_is():
    for mode, image_format in (("RGB", "PNG"), ("L", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("P", "GIF")):
        data = picture(5, image_format=image_format, mode=mode)
        opened = Image.open(io.BytesIO(data))
        made = to_rgb(opened, "it")
        assert np.array_equal(np.asarray(made), np.asarray(decode(data, "it")))
        assert opened.mode == mode
    with pytest.raises(ImageError, match="it: too thin: 500 x 2"):
        to_rgb(Image.new("RGB", (500, 2)), "it")
    with pytest.raises(ImageError, match="it: cannot be decoded"):
        to_rgb(Image.open(io.BytesIO(picture(5, (400, 300))[:5000])), "it")
