"""The search panel, by the messages that its page sends."""

import io
from pathlib import Path

import pytest

from udonlib.lab.use import search_panel
from udonlib.lab.use.search_panel import SearchPanel


@pytest.fixture
def panel(searched):
    return SearchPanel(searched)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_click_searches_on_and_back_returns(panel):
    first, view = panel.found.query, panel.widget.view
    assert not view["can_back"]
    row = int(panel.found.student["all domains"].rows[1])
    panel.act({"do": "row", "row": row})
    assert panel.found.query.row == row
    assert panel.widget.view["can_back"]
    assert panel.widget.view["picture"] != view["picture"]
    panel.act({"do": "back"})
    assert panel.found.query.row == first.row
    assert panel.widget.view == view
    panel.act({"do": "back"})
    assert panel.widget.view == view


def test_a_file_is_searched_cropped_and_labelled(panel, searched):
    panel.act({"do": "picture", "name": "mine.png"}, [memoryview(png(searched.picture(6)))])
    assert panel.found.student["all domains"].rows[0] == 6
    assert panel.widget.view["name"] == "mine.png"
    panel.act({"do": "crop", "box": [0.25, 0, 1, 0.75]})
    assert panel.widget.view["crop"] == [0.25, 0, 1, 0.75]
    panel.act({"do": "label", "label": searched.labels[6]})
    assert panel.widget.view["label"] == searched.labels[6]
    assert panel.widget.view["crop"] == [0.25, 0, 1, 0.75]
    panel.act({"do": "whole"})
    assert panel.widget.view["crop"] == [0, 0, 1, 1]
    assert "found: the right class stands first" in panel.widget.view["said"]


@pytest.mark.parametrize(
    ("content", "buffers", "note"),
    [
        ({"do": "picture", "name": "bad.png"}, [b"no image"], "bad.png: not an image"),
        ({"do": "crop", "box": [0, 0, 0.001, 1]}, [], "draw a larger one"),
        ({"do": "label", "label": "flags/clas"}, [], "no image of class"),
        ({"do": "problem", "text": "x: the browser <b>cannot</b>"}, [], "x: the browser &lt;b&gt;cannot"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(panel, content, buffers, note):
    before = panel.widget.view
    panel.act(content, buffers)
    assert note in panel.widget.view["note"]
    assert panel.widget.view | {"note": ""} == before
    panel.act({"do": "row", "row": 3})
    assert panel.widget.view["note"] == ""


def test_messages_that_mean_nothing_change_nothing(panel):
    before = panel.widget.view
    for content in ({}, {"do": "row", "row": 10**6}, {"do": "row", "row": -1}, {"do": "picture", "name": "x"}):
        panel.act(content)
    assert panel.widget.view == before


def test_others_are_shown_of_one_domain_or_that_are_missed(panel, searched):
    before = panel.widget.view["strip"]
    panel.act({"do": "browse", "domain": "flags", "misses": True})
    view = panel.widget.view
    assert view["strip"] != before
    assert (view["domain"], view["misses"]) == ("flags", True)
    assert all(searched.row_domains[row] == "flags" for row in panel._strip)


def test_saving_says_where(panel, results):
    panel.act({"do": "save"})
    file = panel.widget.view["note"].removeprefix("saved: ")
    assert file.startswith(str(results / "searches"))
    assert "<h1>Search for" in Path(file).read_text()


def test_without_a_front_end_there_is_a_sheet(searched, monkeypatch):
    monkeypatch.setenv("UDON_LIVE", "0")
    assert search_panel.show(searched).data[:4] == b"RIFF"
    monkeypatch.setenv("UDON_LIVE", "1")
    assert isinstance(search_panel.show(searched), SearchPanel)
