"""Axes of figures drawn without a browser: their ranges, ticks and texts are plotly's, as far as ours need them."""

import base64

import numpy as np
import pytest

from udonlib.lab.pictures.data import Axis, array, merged


def axis(letter: str = "y", length: float = 300, values: tuple[float, ...] = (), room: bool = True, **spec) -> Axis:
    found = Axis(letter, spec, 13)
    found.ends = (0.0, length)
    found.extend([np.array(values, float)] if values else [], room)
    found.find_range(found.extents)
    return found


def texts(found: Axis) -> list[str]:
    return [text for _, text in found.ticks()]


def test_settings_are_merged_level_by_level():
    base = {"title": {"x": 0, "font": {"size": 16}}, "height": 1}
    assert merged(base, {"title": {"font": {"color": "red"}}}) == {
        "title": {"x": 0, "font": {"size": 16, "color": "red"}},
        "height": 1,
    }


def test_arrays_are_read_as_plotly_stores_them():
    numbers = np.arange(6, dtype=np.int16).reshape(2, 3)
    stored = {"dtype": "i2", "bdata": base64.b64encode(numbers.tobytes()).decode(), "shape": "2, 3"}
    assert array(stored).tolist() == numbers.tolist()
    assert np.isnan(array([1, None])).tolist() == [False, True]
    assert array(["a", "b"]).tolist() == ["a", "b"]


@pytest.mark.parametrize(
    ("spec", "room", "range_"),
    [
        ({}, True, (10 - 0.5 / 0.9, 20 + 0.5 / 0.9)),
        ({}, False, (10, 20)),
        ({"rangemode": "tozero"}, True, (0, 20 + 1 / 0.95)),
        ({"range": [0, 100]}, True, (0, 100)),
        ({"autorange": "reversed"}, False, (20, 10)),
    ],
)
def test_an_axis_shows_all_values_with_room_at_the_ends(spec, room, range_):
    assert axis(values=(10, 20), room=room, **spec).range == pytest.approx(range_)


def test_only_an_end_with_data_that_needs_it_has_room():
    found = Axis("y", {}, 13)
    found.extend([np.zeros(1)], False)  # where bars stand
    found.extend([np.array([4.0, 19.0])], True)
    found.find_range(found.extents)
    assert found.range == pytest.approx((0, 20))


@pytest.mark.parametrize(
    ("length", "range_", "spec", "said"),
    [
        (285, (0, 100), {}, ["0", "20", "40", "60", "80", "100"]),
        (100, (0, 100), {}, ["0", "50", "100"]),
        (200, (0, 40), {"nticks": 4}, ["0", "20", "40"]),
        (285, (-1, 1), {}, ["−1", "−0.5", "0", "0.5", "1"]),
        (285, (0, 0.1), {}, ["0", "0.02", "0.04", "0.06", "0.08", "0.1"]),
        (100, (0, 20_000), {}, ["0", "5k", "10k", "15k", "20k"]),
        (100, (0, 20_000), {"tickformat": ","}, ["0", "5,000", "10,000", "15,000", "20,000"]),
        (100, (0, 2_000), {"tickformat": "~s"}, ["0", "500", "1k", "1.5k", "2k"]),
        (285, (0, 2), {"type": "log"}, ["1", "10", "100"]),
        (285, (0, 1), {"type": "log", "dtick": "D2"}, ["1", "2", "5", "10"]),
        (285, (0, 1), {"tickvals": [0, 1, 2], "ticktext": ["a", "b", "c"]}, ["a", "b"]),
        (285, (-1, 1), {"type": "log", "tickvals": [0.1, 1, 10]}, ["0.1", "1", "10"]),
    ],
)
def test_ticks_stand_at_round_numbers_and_say_them(length, range_, spec, said):
    assert texts(axis("y", length, range=list(range_), **spec)) == said


def test_categories_keep_the_order_that_is_asked_for_and_their_texts():
    found = Axis("y", {"categoryorder": "array", "categoryarray": ["c", "a"], "range": [-0.5, 2.5]}, 13)
    found.ends = (300.0, 0.0)
    found.take_categories(np.array(["a", "b", "c"], dtype=object))
    found.find_range([])
    assert found.ticks() == [(250.0, "c"), (150.0, "a"), (50.0, "b")]
    assert found.place("a") == found.place(1) == 150.0
    assert found.numbers(np.array(["b", "a"], dtype=object)).tolist() == [2, 1]


def test_two_levels_of_categories_have_groups_and_borders_between_them():
    found = Axis("x", {"range": [-0.5, 3.5]}, 13)
    found.ends = (0.0, 400.0)
    names = [["emoji", "emoji", "earth", "earth"], ["student", "teacher", "student", "teacher"]]
    found.take_categories(np.array(names, dtype=object))
    found.find_range([])
    assert texts(found) == ["student", "teacher", "student", "teacher"]
    assert found.groups() == [(100.0, "emoji"), (300.0, "earth")]
    assert found.borders() == [0.0, 200.0, 400.0]


def test_an_axis_shrinks_about_its_middle():
    found = axis("y", range=[0, 10])
    found.ends = (300.0, 0.0)
    found.shrink(10)
    assert found.ends == (200.0, 100.0)
    assert found.scale() == 10
