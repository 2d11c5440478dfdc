"""What finds, pages and keeps images beside the maps."""

import numpy as np
import pandas as pd
import pytest

from tests.helpers.embeddings import open_small, train
from udonlib.errors import UserError
from udonlib.lab.explore import embedding_map
from udonlib.lab.explore.neighbourhoods import confusions, hubs
from udonlib.lab.explore.tiles.gallery import (
    N_ASKERS,
    PAIR,
    Gallery,
    confused_sections,
    export,
    matching,
    outcomes,
    sections_of,
)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> embedding_map.EmbeddingMap:
    opened = open_small(train(tmp_path_factory.mktemp("gallery")))
    opened.embed()
    return opened


def test_each_pair_of_a_miss_can_be_chosen_and_holds_as_many_as_it_says(found):
    choices = outcomes(found)
    assert list(choices)[:3] == ["", "right", "wrong"]
    pairs = list(choices)[3:]
    table = confusions(found.lists["student"])
    counts = {}
    for pair in pairs:
        rows = matching(found, outcome=pair)
        assert choices[pair] == f"{pair}: {len(rows)}"
        asked, taken = pair.split(PAIR)
        assert set(found.points["domain"].iloc[rows]) == {asked}
        assert (found.points["result"].iloc[rows] == "wrong").all()
        assert len(rows) == pytest.approx(table.loc[asked, taken] * 15 / 100)
        counts[pair] = len(rows)
    assert sum(counts.values()) == (found.points["result"] == "wrong").sum() > 0
    assert list(counts.values()) == sorted(counts.values(), reverse=True)


def test_words_are_looked_for_in_class_and_path(found):
    path = found.points["path"][5]
    assert 5 in matching(found, words=f" {path[-9:].upper()} ")
    assert set(found.points["class"].iloc[matching(found, "flags", "", "class 2")]) == {"class 2"}
    assert set(found.points["domain"].iloc[matching(found, "flags", "", "class 2")]) == {"flags"}


def test_all_images_can_be_paged_through(found):
    gallery = Gallery(found, "listed", lambda row: None)
    gallery.show(np.arange(len(found.points)), "57 images")
    assert gallery.widget.pages == 3
    seen: list[int] = []
    for page in range(3):
        [section] = gallery.widget.sections
        assert (gallery.widget.page, section["title"]) == (page, "57 images")
        seen += [tile["row"] for tile in section["tiles"]]
        gallery.act({"turn": 1})
    assert seen == list(range(57))
    assert gallery.widget.page == 2  # there is no further one
    gallery.act({"turn": -1})
    assert gallery.widget.page == 1
    gallery.show(np.arange(3), "3 images")
    assert (gallery.widget.page, gallery.widget.pages) == (0, 1)


def test_a_page_is_told_with_its_tiles_in_one_message(found, monkeypatch):
    gallery = Gallery(found, "listed", lambda row: None)
    gallery.show(np.arange(57), "57 images")
    told: list[set[str]] = []
    monkeypatch.setattr(
        gallery.widget, "send_state", lambda key=None: told.append({key} if isinstance(key, str) else set(key))
    )
    gallery.act({"turn": 1})
    assert told == [{"sections", "page"}]


def test_a_click_chooses_its_point_and_nonsense_nothing(found):
    chosen: list[int] = []
    gallery = Gallery(found, "listed", chosen.append)
    gallery.show(np.arange(5), "5 images")
    for message in ({"row": 4}, {"row": -1}, {"row": 57}, {"row": "4"}, {"turn": 7}, {}):
        gallery.act(message)
    assert chosen == [4]


def test_tiles_are_marked_as_the_evaluation_said(found):
    gallery = Gallery(found, "listed", lambda row: None)
    gallery.show(np.arange(24), "")
    marks = [tile["mark"] for tile in gallery.widget.sections[0]["tiles"]]
    words = {"right": "tick", "wrong": "cross"}
    assert marks == [words.get(result, "") for result in found.points["result"].iloc[:24]]
    assert gallery.widget.sections[0]["tiles"][3]["src"].startswith("data:image/png;base64,")


def test_a_query_has_the_neighbours_of_both_with_their_hits(found):
    row = int(np.flatnonzero(found.points["query"] >= 0)[2])
    query, *lists = sections_of(found, row)
    assert [tile["row"] for tile in query["tiles"]] == [row]
    for section, (name, of_embedder) in zip(lists, found.lists.items(), strict=True):
        assert section["title"].startswith(name)
        of_query = of_embedder.of(int(found.points["query"][row]))
        assert [found.row_of[picture] for picture, _ in of_query] == [tile["row"] for tile in section["tiles"]]
        assert [tile["mark"] for tile in section["tiles"]] == ["tick" if hit else "cross" for _, hit in of_query]


def test_an_index_image_has_those_who_find_it(found):
    table = hubs(found.lists["student"]).set_index("position")
    others = np.flatnonzero((found.points["query"] < 0) & (found.points["position"] >= 0))
    for row in others:
        item, askers = sections_of(found, int(row))
        position = found.points["position"][row]
        n = table["n_lists"].get(position, 0)
        assert len(askers["tiles"]) == min(n, N_ASKERS)
        assert ("no query finds it" in askers["title"]) == (n == 0)
        assert item["tiles"][0]["row"] == row


def test_confusions_of_a_region_come_in_pairs(found):
    sections = confused_sections(found, np.arange(len(found.points)))
    notes = [tile["note"] for tile in sections[0]["tiles"]]
    assert len(notes) % 2 == 0
    assert all(one != other for one, other in zip(notes[::2], notes[1::2], strict=True))
    assert confused_sections(found, np.flatnonzero(found.points["query"] < 0)[:3]) == []


def test_an_export_has_what_is_known_of_each_image(found):
    file = export(found, np.array([4, 2]), clock=lambda: 0.0)
    assert file.parent.name == "selections"
    assert file.name.startswith("small-19")
    table = pd.read_csv(file)
    assert list(table) == ["domain", "class", "path", "split", "result", "right"]
    expected = found.points.iloc[[4, 2]]
    assert table["path"].tolist() == expected["path"].tolist()
    assert table["right"].tolist() == expected["gap"].tolist()
    with pytest.raises(UserError, match="nothing is listed"):
        export(found, np.zeros(0, np.int64))
