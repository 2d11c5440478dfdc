"""Images on a map: what is sent for what a page asks for."""

import numpy as np
import pytest

from tests.helpers.embeddings import open_small, train
from udonlib.errors import UserError
from udonlib.lab.explore import embedding_map
from udonlib.lab.explore.embedding_sheets import thumbnail
from udonlib.lab.explore.tiles import on_map
from udonlib.lab.explore.tiles.on_map import MOST, NO_COLOUR, SIDE, ImagesOnMap


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> embedding_map.EmbeddingMap:
    opened = open_small(train(tmp_path_factory.mktemp("on_map")))
    opened.embed()
    return opened


@pytest.fixture
def images(found, monkeypatch) -> tuple[ImagesOnMap, list]:
    made, told = ImagesOnMap(found), []
    monkeypatch.setattr(made.widget, "send", told.append)
    return made, told


def test_what_is_asked_for_comes_with_its_points_colour(found, images):
    made, told = images
    made.colour(np.array([0, 1, -1, *[1] * (len(found.points) - 3)]), ["red", "blue"])
    assert told == []  # there is nothing to paint
    made.answer({"wanted": [2, 0, 1]})
    [answer] = told
    paths = found.points["path"]
    assert answer["images"] == {row: thumbnail(found.catalog, paths.iloc[row], SIDE) for row in (2, 0, 1)}
    assert answer["colours"] == {0: "red", 1: "blue", 2: NO_COLOUR}


def test_what_was_sent_changes_its_colour_with_the_points(found, images):
    made, told = images
    made.answer({"wanted": [4, 5]})
    made.colour(np.zeros(len(found.points), int), ["green"])
    assert told[1:] == [{"colours": {4: "green", 5: "green"}}]


@pytest.mark.parametrize("wanted", [None, "5", [-1], [10**6], [1.5], ["0"], [None], [[0]], {}])
def test_what_makes_no_sense_is_left_alone(images, wanted):
    made, told = images
    made.answer({"wanted": wanted})
    made.answer({})
    assert told == []


def test_nobody_gets_more_than_a_map_holds(found, images):
    made, told = images
    made.answer({"wanted": [*range(len(found.points))] * 9})
    made.answer({"wanted": [0] * MOST + [1]})
    assert list(told[1]["images"]) == [0]


def test_an_image_that_cannot_be_read_is_empty_and_the_others_come(found, images, monkeypatch):
    def read(catalog, path, side):
        if path == found.points["path"].iloc[1]:
            raise UserError(f"{path}: damaged")
        return thumbnail(catalog, path, side)

    monkeypatch.setattr(on_map, "thumbnail", read)
    made, told = images
    made.answer({"wanted": [0, 1]})
    assert [bool(told[0]["images"][row]) for row in (0, 1)] == [True, False]
