"""The embedding explorer without a browser: what a person's clicks become, by the traits that the browser sets."""

import base64
import io
import re
import threading
from html import unescape

import numpy as np
import plotly.graph_objects as go
import pytest
from PIL import Image

from tests.helpers.embeddings import N_QUERIES, open_small, quick_umap, train
from tests.helpers.waiting import SECONDS
from udonlib.lab.explore import embedding_explorer, embedding_map
from udonlib.lab.explore.neighbourhoods import purity
from udonlib.lab.views.style import domain_colours


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explorer")
    train(folder, "plain", recipe="us_rr", sampler_loss="student")
    return train(folder)


@pytest.fixture
def found(results) -> embedding_map.EmbeddingMap:
    opened = open_small(results)
    opened.embed()
    return opened


@pytest.fixture
def shown(found) -> embedding_explorer.EmbeddingExplorer:
    return embedding_explorer.EmbeddingExplorer(found)


def text(widget) -> str:
    return unescape(re.sub(r"<[^>]+>", " ", widget.value))


def lasso(shown: embedding_explorer.EmbeddingExplorer, rows, view: str = "student") -> None:
    """What the browser does when somebody draws around points, or clicks one."""
    shown.maps[view].widget.set_state(
        {"selection": {"view": np.array(rows, "uint32"), "dtype": "uint32", "shape": [len(rows)]}}
    )


def selected(shown: embedding_explorer.EmbeddingExplorer, view: str) -> list[int]:
    return sorted(int(row) for row in shown.maps[view].widget.selection)


def test_a_lasso_fills_the_sheet_and_says_how_pure_the_region_is(shown, found):
    assert shown.sheet.layout.display == "none"
    rows = np.flatnonzero(found.points["domain"] == "flags")
    lasso(shown, rows)
    assert bytes(shown.sheet.value).startswith(b"\xff\xd8\xff")
    assert shown.sheet.layout.display == ""
    held = purity(found.points, found.lists["student"], rows)
    said = text(shown.facts)
    assert f"{len(rows)} images , {held.n_queries} of them queries" in said, said
    assert "purity: 100% flags" in said
    assert f"student: {held.same_class:.0f}%" in said
    before = shown.sheet.value
    lasso(shown, rows[:3])
    assert shown.sheet.value != before
    assert "3 images" in text(shown.facts)


@pytest.mark.parametrize(("one", "other"), [("student", "teachers"), ("teachers", "student")])
def test_a_selection_shows_in_both_maps(shown, one, other):
    lasso(shown, [4, 2, 9], one)
    assert selected(shown, other) == selected(shown, one) == [2, 4, 9]
    lasso(shown, [5], other)
    assert selected(shown, one) == [5]
    lasso(shown, [], one)
    assert selected(shown, other) == []


def test_the_echo_of_a_selection_does_nothing(shown, monkeypatch):
    lasso(shown, [4, 2, 9])
    monkeypatch.setattr(shown, "_described", None)  # describing it again would fail
    lasso(shown, [9, 4, 2], "teachers")
    assert selected(shown, "teachers") == [2, 4, 9]


def test_nothing_selected_says_what_can_be_done(shown):
    hint = text(shown.facts)
    assert "lasso" in hint
    lasso(shown, [1, 2])
    lasso(shown, [])
    assert text(shown.facts) == hint
    assert shown.sheet.layout.display == "none"


def test_a_clicked_query_shows_its_neighbours_and_another_image_who_finds_it(shown, found):
    row = int(np.flatnonzero(found.points["query"] >= 0)[3])
    lasso(shown, [row])
    point = found.points.iloc[row]
    assert point["class"] in text(shown.facts)
    assert f"right: {point['gap']}" in text(shown.facts)
    assert shown.sheet.value == embedding_explorer.query_sheet(found, int(point["query"])).data
    row = int(np.flatnonzero(found.points["query"] < 0)[0])
    lasso(shown, [row])
    assert "index image" in text(shown.facts)
    assert shown.sheet.value == embedding_explorer.item_sheet(found, int(found.points["position"][row])).data


def test_an_image_that_cannot_be_read_is_named_and_nothing_breaks(shown, found):
    path = found.catalog.store.root / "images" / found.points["path"][0]
    content = path.read_bytes()
    path.write_bytes(b"broken")
    try:
        lasso(shown, [0, 1])
        assert found.points["path"][0] in text(shown.facts)
        assert shown.sheet.layout.display == "none"
        assert hover(shown, 0)["preview"] == ""
    finally:
        path.write_bytes(content)
    lasso(shown, [0])
    assert shown.sheet.value


def hover(shown: embedding_explorer.EmbeddingExplorer, row: object, view: str = "student") -> dict:
    """What the browser gets when the pointer rests on a point; {} for no answer."""
    widget, sent = shown.maps[view].widget, []
    widget.send = lambda content, buffers=None: sent.append(content)
    message = {"type": "tooltip", "index": row, "properties": ["class", "domain", "right"], "preview": "image"}
    widget._handle_msg({"content": {"data": {"method": "custom", "content": message}}, "buffers": []})
    return sent[0] if sent else {}


@pytest.mark.parametrize("view", ["student", "teachers"])
def test_the_pointer_gets_a_thumbnail_and_what_it_shows(shown, found, view):
    answer = hover(shown, 7, view)
    assert (answer["type"], answer["index"]) == ("tooltip", 7)
    assert answer["preview"] == embedding_explorer.thumbnail(found.catalog, found.points["path"][7])
    point = found.points.iloc[7]
    assert answer["properties"] == {"class": point["class"], "domain": point["domain"], "right": point["gap"]}


@pytest.mark.parametrize("row", [-1, 10_000, "7", None, 1.5])
def test_a_point_that_is_not_there_has_no_answer(shown, row):
    assert hover(shown, row) == {}


def colours_of(shown: embedding_explorer.EmbeddingExplorer, view: str = "student") -> list[str]:
    """The colour of each point as the browser draws it."""
    widget = shown.maps[view].widget
    colours = ["#" + "".join(f"{round(255 * part):02x}" for part in colour[:3]) for colour in widget.color]
    return [colours[int(kind)] for kind in widget.points[:, 2]]


def test_points_are_drawn_in_the_colour_of_their_domain_or_outcome(shown, found):
    for view in ("student", "teachers"):
        expected = found.points["domain"].map(domain_colours(["emoji", "flags"]))
        assert colours_of(shown, view) == expected.tolist()
    assert "emoji 15" in re.sub(r"\s+", " ", text(shown.legend))
    shown.colour.value = "result"
    looks = embedding_explorer.colouring(found, "result")
    assert colours_of(shown) == [looks.colours[kind] for kind in looks.kind]
    assert "not a query 27" in re.sub(r"\s+", " ", text(shown.legend))
    shown.colour.value = "class"
    assert "9 classes share 8 colours" in text(shown.legend)


def test_one_domain_alone_can_be_shown(shown, found):
    shown.shown.value = "flags"
    rows = np.flatnonzero(found.points["domain"] == "flags")
    for drawn in shown.maps.values():
        assert drawn.widget.filter.tolist() == rows.tolist()
    assert "emoji 0" in re.sub(r"\s+", " ", text(shown.legend))
    shown.shown.value = ""
    assert all(drawn.widget.filter is None for drawn in shown.maps.values())


def places(shown: embedding_explorer.EmbeddingExplorer, view: str) -> np.ndarray:
    return shown.maps[view].widget.points[:, :2] * 1.05  # the scale of the axes


def test_another_teacher_moves_the_points_of_its_map_alone(shown, found):
    np.testing.assert_allclose(places(shown, "student"), found.layout("student", "pca").xy, atol=1e-5)
    np.testing.assert_allclose(places(shown, "teachers"), found.layout("teacher", "pca").xy, atol=1e-5)
    shown.teacher.value = "teacher of flags"
    np.testing.assert_allclose(places(shown, "student"), found.layout("student", "pca").xy, atol=1e-5)
    np.testing.assert_allclose(places(shown, "teachers"), found.layout("teacher of flags", "pca").xy, atol=1e-5)
    assert "teacher of flags" in text(shown.captions["teachers"])


def test_a_umap_is_computed_beside_says_so_and_is_kept(results, monkeypatch):
    quick_umap(monkeypatch)
    found = open_small(results, umap_neighbours=6)
    found.embed()
    shown = embedding_explorer.EmbeddingExplorer(found)
    said: list[str] = []
    shown.status.observe(lambda change: said.append(text(shown.status)), "value")
    shown.projection.value = "umap"
    lasso(shown, [1, 2, 3])  # goes on meanwhile
    assert "3 images" in text(shown.facts)
    shown.wait()
    assert any("computing UMAP of student (1 of 2), about" in words for words in said)
    assert text(shown.status) == ""
    np.testing.assert_allclose(places(shown, "student"), found.layout("student", "umap").xy, atol=1e-5)
    assert "UMAP, 6 neighbours" in text(shown.captions["student"])
    said.clear()
    again = embedding_explorer.EmbeddingExplorer(found)
    again.projection.value = "umap"
    assert again._work is None  # at once
    np.testing.assert_array_equal(places(again, "teachers"), places(shown, "teachers"))


def test_the_way_back_to_pca_is_open_while_a_umap_is_computed(shown, found, monkeypatch):
    computed, go_on = found.layout, threading.Event()

    def slow(view: str, projection: str, say: object = None) -> embedding_map.MapLayout:
        assert projection == "pca" or go_on.wait(SECONDS)
        return computed(view, "pca")

    monkeypatch.setattr(found, "is_kept", lambda view: False)
    monkeypatch.setattr(found, "layout", slow)
    shown.projection.value = "umap"
    shown.projection.value = "pca"
    shown.teacher.value = "teacher of emoji"
    assert "PCA" in text(shown.captions["teachers"])
    np.testing.assert_allclose(places(shown, "teachers"), computed("teacher of emoji", "pca").xy, atol=1e-5)
    go_on.set()
    shown.wait()
    assert "PCA" in text(shown.captions["student"])
    assert text(shown.status) == ""


def test_a_umap_that_fails_leaves_the_map_and_says_why(shown, found, monkeypatch):
    def fail(*arguments: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(found, "is_kept", lambda view: False)
    monkeypatch.setattr(found, "layout", fail)
    before = places(shown, "student")
    shown.projection.value = "umap"
    shown.wait()
    assert "UMAP failed, the map is as it was: MemoryError: no memory" in text(shown.status)
    np.testing.assert_array_equal(places(shown, "student"), before)


def test_a_run_without_teachers_has_one_map(results):
    found = open_small(results, run="plain")
    found.embed()
    shown = embedding_explorer.EmbeddingExplorer(found)
    assert list(shown.maps) == ["student"]
    lasso(shown, [0])
    assert shown.sheet.value
    assert shown.teacher not in shown.box.children[0].children


def test_every_control_can_be_found_by_its_class(shown):
    def classes(widget) -> set[str]:
        below = [classes(child) for child in getattr(widget, "children", ())]
        return set(widget._dom_classes).union(*below)

    names = [
        "",
        *(f"-{n}" for n in "colour shown projection teacher student teachers status legend facts sheet".split()),
    ]
    assert {f"udon-explorer{name}" for name in names} <= classes(shown.box)


def test_without_a_front_end_a_figure_takes_the_explorers_place(found, monkeypatch):
    monkeypatch.setenv("UDON_LIVE", "0")
    fig = embedding_explorer.explore(found)
    assert isinstance(fig, go.Figure)
    assert sum(len(trace.x) for trace in fig.data) == 2 * (N_QUERIES + 27)
    monkeypatch.setenv("UDON_LIVE", "1")
    assert "udon-explorer" in embedding_explorer.explore(found).box._dom_classes


def test_a_saved_notebook_keeps_a_picture_of_the_maps_as_they_are_coloured(shown, monkeypatch):
    stills = []

    class Kept:
        def __init__(self, widget, html):
            assert widget is shown.box
            stills.append(html)

        def keep(self, make, now):
            stills.append(make())

    monkeypatch.setattr(embedding_explorer, "Still", Kept)
    shown._ipython_display_()
    shown.colour.value = "result"
    for html in (stills[0], stills[-1]):
        [image] = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
        picture = Image.open(io.BytesIO(base64.b64decode(image))).convert("RGBA")
        assert picture.size == (900, 560)
        assert (np.asarray(picture)[..., 3] > 0).sum() > 2_000
    assert stills[0] != stills[-1]
    assert "wrong" in stills[-1]
