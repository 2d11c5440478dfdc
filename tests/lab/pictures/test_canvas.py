"""Text with markup, colours and markers on a page of pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from udonlib.lab.pictures.canvas import MARKERS, Canvas, Run, _parsed, rgba
from udonlib.lab.pictures.data import Look


@pytest.fixture
def page() -> Canvas:
    return Canvas(200, 100, 13, "#000000")


def pixels(page: Canvas) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(page.png())).convert("RGBA")).astype(int)


def box(page: Canvas) -> tuple[int, int, int, int]:
    """Left, right, top and bottom of all ink."""
    rows, columns = np.nonzero(pixels(page)[..., 3] > 60)
    return columns.min(), columns.max(), rows.min(), rows.max()


def test_markup_becomes_lines_of_runs_that_look_alike():
    text = '<b>A &amp; B</b><br><span style="color:#ff0000;font-size:9px">■</span> c'
    assert _parsed(text, "#000000", 13.0) == [
        [Run("A & B", True, "#000000", 13.0)],
        [Run("■", False, "#ff0000", 9.0), Run(" c", False, "#000000", 13.0)],
    ]


@pytest.mark.parametrize("side", ["left", "center", "right"])
@pytest.mark.parametrize("height", ["top", "middle", "bottom"])
def test_text_stands_at_the_side_that_is_asked_for(page, side, height):
    page.write(100, 50, "word<br>word", 13, side, height)
    left, right, top, bottom = box(page)
    width = page.text_width("word")
    assert (left + right) / 2 == pytest.approx(100 + {"left": 0.5, "center": 0, "right": -0.5}[side] * width, abs=2)
    assert (top + bottom) / 2 == pytest.approx(50 + {"top": 17, "middle": 0, "bottom": -17}[height], abs=4)


def test_dollars_and_letters_that_no_font_has_are_text(page):
    page.write(10, 30, "a$b$ and a$", 13, "left", "middle")
    left, right, *_ = box(page)
    assert right - left == pytest.approx(page.text_width("a$b$ and a$"), abs=4)


def test_plotlys_colours_are_understood():
    assert rgba("rgba(255, 0, 0, 0.25)") == (1, 0, 0, 0.25)
    assert rgba("#ff0000") == rgba("red") == (*rgba("rgb(255, 0, 0)"), 1)


@pytest.mark.parametrize("symbol", MARKERS)
def test_an_open_marker_is_hollow_and_a_full_one_is_not(page, symbol):
    look = Look(symbol, "#ff0000", 30, "#ff0000", 2, 1)
    page.marker([50], [50], look, None)
    page.marker([150], [50], look._replace(symbol=f"{symbol}-open"), None)
    drawn = pixels(page)[..., 3] > 200
    full, hollow = drawn[:, :100].sum(), drawn[:, 100:].sum()
    assert hollow > 50
    if symbol.endswith("thin") or symbol == "line-ns":
        assert hollow == pytest.approx(full, rel=0.1)
    else:
        assert full > 1.5 * hollow
