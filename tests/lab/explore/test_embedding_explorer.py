"""The embedding explorer without a browser: what a person's clicks become, by the traits that the browser sets."""

import base64
import io
import re
import threading
from html import unescape

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from PIL import Image

from tests.helpers.embeddings import N_QUERIES, open_small, quick_umap, train
from tests.helpers.waiting import SECONDS, wait_until
from udonlib.lab.explore import embedding_explorer, embedding_map
from udonlib.lab.explore.embedding_sheets import thumbnail
from udonlib.lab.explore.embedding_views import WHOSE
from udonlib.lab.explore.neighbourhoods import purity
from udonlib.lab.explore.tiles.gallery import NEAREST, Gallery, sections_of
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


def tiles(gallery: Gallery) -> list[int]:
    """The points whose tiles are seen."""
    return [tile["row"] for section in gallery.widget.sections for tile in section["tiles"]]


def test_a_lasso_lists_the_images_and_says_how_pure_the_region_is(shown, found):
    rows = np.flatnonzero(found.points["domain"] == "flags")
    lasso(shown, rows)
    assert sorted(shown.listed.rows) == rows.tolist()
    assert set(tiles(shown.listed)) <= set(rows.tolist())
    held = purity(found.points, found.lists["student"], rows)
    said = text(shown.facts)
    assert f"{len(rows)} images , {held.n_queries} of them queries" in said, said
    assert "purity: 100% flags" in said
    assert f"student: {held.same_class:.0f}%" in said
    lasso(shown, rows[:3])
    assert sorted(tiles(shown.listed)) == rows[:3].tolist()
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
    monkeypatch.setattr(shown, "_list_rows", None)  # describing it again would fail
    lasso(shown, [9, 4, 2], "teachers")
    assert selected(shown, "teachers") == [2, 4, 9]


def test_nothing_selected_says_what_can_be_done_and_lists_everything(shown, found):
    hint = text(shown.facts)
    assert "lasso" in hint
    assert len(shown.listed.rows) == len(found.points)
    lasso(shown, [1, 2])
    lasso(shown, [])
    assert text(shown.facts) == hint
    assert len(shown.listed.rows) == len(found.points)


def test_a_clicked_query_shows_its_neighbours_and_another_image_who_finds_it(shown, found):
    row = int(np.flatnonzero(found.points["query"] >= 0)[3])
    lasso(shown, [row])
    point = found.points.iloc[row]
    assert point["class"] in text(shown.facts)
    assert f"right first neighbour: {WHOSE[point['gap']]}" in text(shown.facts)
    assert shown.near.widget.sections == sections_of(found, row)
    row = int(np.flatnonzero(found.points["query"] < 0)[0])
    lasso(shown, [row])
    assert "index image" in text(shown.facts)
    assert shown.near.widget.sections == sections_of(found, row)


def test_who_is_right_is_said_of_somebody():
    assert all("teacher" in words and "student" in words for words in map(WHOSE.get, ("both", "neither")))


def test_a_clicked_tile_is_shown_in_both_maps_and_the_region_stays_listed(shown, found):
    rows = np.flatnonzero(found.points["query"] >= 0)[:5]
    lasso(shown, rows)
    row = tiles(shown.listed)[2]
    shown.listed.widget._handle_custom_msg({"row": row}, [])
    assert selected(shown, "student") == selected(shown, "teachers") == [row]
    assert sorted(shown.listed.rows) == rows.tolist()
    assert shown.listed.widget.chosen == row
    assert shown.near.widget.sections == sections_of(found, row)


def test_an_image_that_cannot_be_read_is_named_and_nothing_breaks(shown, found):
    path = found.catalog.store.root / "images" / found.points["path"][0]
    content = path.read_bytes()
    path.write_bytes(b"broken")
    try:
        lasso(shown, [0, 1])
        assert found.points["path"][0] in text(shown.facts)
        assert hover(shown, 0)["preview"] == ""
    finally:
        path.write_bytes(content)
    lasso(shown, [0])
    assert 0 in tiles(shown.near)


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
    assert answer["preview"] == thumbnail(found.catalog, found.points["path"][7])
    point = found.points.iloc[7]
    expected = {"class": point["class"], "domain": point["domain"], "right first neighbour": WHOSE[point["gap"]]}
    assert answer["properties"] == expected


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
    assert "the 8 most frequent of 9 classes" in text(shown.legend)


def test_one_domain_alone_is_shown_large_and_what_was_selected_before_is_gone(shown, found):
    lasso(shown, np.flatnonzero(found.points["domain"] == "emoji")[:4])
    calls = {name: drawn.widget.zoom_to_call_idx for name, drawn in shown.maps.items()}
    shown.shown.value = "flags"
    rows = np.flatnonzero(found.points["domain"] == "flags").tolist()
    for name, drawn in shown.maps.items():
        assert drawn.widget.filter.tolist() == rows
        assert np.asarray(drawn.widget.zoom_to).tolist() == rows
        assert drawn.widget.zoom_to_call_idx > calls[name]
        assert selected(shown, name) == []
    assert "emoji 0" in re.sub(r"\s+", " ", text(shown.legend))
    assert "purity: 100% flags" in text(shown.facts)
    assert sorted(shown.listed.rows) == rows
    shown.shown.value = ""
    assert all(drawn.widget.filter is None for drawn in shown.maps.values())
    for drawn in shown.maps.values():  # all of them, however narrow the map is
        assert np.asarray(drawn.widget.zoom_to).tolist() == list(range(len(found.points)))


def test_hits_misses_and_words_narrow_what_is_shown(shown, found):
    points = found.points
    shown.outcome.value = "wrong"
    assert sorted(shown.listed.rows) == np.flatnonzero(points["result"] == "wrong").tolist()
    shown.search.value = "CLASS 1"
    expected = (points["result"] == "wrong") & points["class"].str.contains("class 1")
    assert sorted(shown.listed.rows) == np.flatnonzero(expected).tolist()
    shown.search.value = "nothing is called so"
    assert "No image" in text(shown.status)
    assert tiles(shown.listed) == []
    shown.search.value = shown.outcome.value = ""
    assert len(shown.listed.rows) == len(points)


def test_an_image_of_ones_own_lists_what_is_nearest_to_it(shown, found, tmp_path):
    row = int(np.flatnonzero(found.points["query"] >= 0)[7])
    data = found.catalog.store.read(found.points["path"][row])
    (tmp_path / "mine.png").write_bytes(data)
    shown.finder.picture.value = str(tmp_path / "mine.png")
    by_path = shown.listed.rows.tolist()
    assert by_path[0] == row
    assert len(by_path) == NEAREST
    assert "nearest to mine.png" in text(shown.status)
    shown.finder.picture.value = ""
    assert len(shown.listed.rows) == len(found.points)
    shown.finder.compare_upload([{"name": "mine.png", "content": memoryview(data)}])
    assert shown.listed.rows.tolist() == by_path
    shown.finder.picture.value = str(tmp_path / "missing.png")
    assert "missing.png cannot be read" in text(shown.status)
    (tmp_path / "broken.png").write_bytes(b"broken")
    shown.finder.picture.value = str(tmp_path / "broken.png")
    assert "broken.png" in text(shown.status)
    assert shown.listed.rows.tolist() == by_path


def test_what_is_listed_is_written_and_said_where(shown, found):
    rows = np.flatnonzero(found.points["domain"] == "flags")[:5]
    lasso(shown, rows)
    shown.export.click()
    [name] = re.findall(r"5 images written to (\S+)", text(shown.status))
    table = pd.read_csv(name)
    assert table["path"].tolist() == found.points["path"].iloc[rows].tolist()
    assert "selections" in name


def places(shown: embedding_explorer.EmbeddingExplorer, view: str) -> np.ndarray:
    return shown.maps[view].widget.points[:, :2] * 1.05  # the scale of the axes


def test_another_teacher_moves_the_points_of_its_map_alone(shown, found):
    np.testing.assert_allclose(places(shown, "student"), found.layout("student", "quick").xy, atol=1e-5)
    np.testing.assert_allclose(places(shown, "teachers"), found.layout("teacher", "quick").xy, atol=1e-5)
    shown.teacher.value = "teacher of flags"
    np.testing.assert_allclose(places(shown, "student"), found.layout("student", "quick").xy, atol=1e-5)
    np.testing.assert_allclose(places(shown, "teachers"), found.layout("teacher of flags", "quick").xy, atol=1e-5)
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
    assert "UMAP by 6 neighbours" in text(shown.captions["student"])
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

    monkeypatch.setattr(found, "is_kept", lambda view, projection: projection == "pca")
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


def test_a_layout_that_takes_time_follows_the_first_picture_map_by_map(found, monkeypatch):
    computed, go_on, asked = found.layout, {"student": threading.Event(), "teacher": threading.Event()}, []

    def slow(view: str, projection: str, say: object = None) -> embedding_map.MapLayout:
        if projection == "quick":
            asked.append(view)
            assert go_on[view].wait(SECONDS)
        return computed(view, projection)

    monkeypatch.setattr(embedding_explorer, "is_ready", lambda space, view, projection: projection == "pca")
    monkeypatch.setattr(found, "layout", slow)
    shown = embedding_explorer.EmbeddingExplorer(found)
    assert shown.projection.value == "quick"
    assert "PCA" in text(shown.captions["student"])  # until the layout is there
    go_on["student"].set()
    wait_until(lambda: "laid out by 15 neighbours" in text(shown.captions["student"]), "the student's layout")
    assert "PCA" in text(shown.captions["teachers"]).split(";")[1]
    wait_until(lambda: "the layout of teacher (2 of 2)" in text(shown.status), "word on the second layout")
    go_on["teacher"].set()
    shown.wait()
    assert asked == ["student", "teacher"]
    assert "laid out by 15 neighbours" in text(shown.captions["teachers"])
    np.testing.assert_allclose(places(shown, "teachers"), computed("teacher", "quick").xy, atol=1e-5)
    assert text(shown.status) == ""


def test_a_umap_that_fails_leaves_the_map_and_says_why(shown, found, monkeypatch):
    def fail(*arguments: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(found, "is_kept", lambda view, projection: projection == "pca")
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
    assert 0 in tiles(shown.near)
    assert shown.teacher not in shown.box.children[0].children


NAMES = ("colour shown outcome search picture upload export projection teacher", "student teachers status legend facts")


def test_every_control_can_be_found_by_its_class(shown):
    def classes(widget) -> set[str]:
        below = [classes(child) for child in getattr(widget, "children", ())]
        return set(widget._dom_classes).union(*below)

    names = [
        "",
        *(f"-{n}" for n in " ".join([*NAMES, "listed near"]).split()),
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
        assert picture.size == (900, 577)
        assert (np.asarray(picture)[..., 3] > 0).sum() > 2_000
    assert stills[0] != stills[-1]
    assert "wrong" in stills[-1]


def test_images_on_the_maps_are_framed_as_points_are_coloured_and_can_be_left_out(found, shown, monkeypatch):
    told = {name: [] for name in shown.maps}
    for name, images in shown.on_maps.items():
        monkeypatch.setattr(images.widget, "send", told[name].append)
        images.answer({"wanted": [3]})
    domain = found.points["domain"].iloc[3]
    assert {answer["colours"][3] for [answer] in told.values()} == {domain_colours(found.domains)[domain]}
    shown.colour.value = "result"
    assert all(len(answers) == 2 for answers in told.values())
    shown.images.value = False
    assert [images.widget.shown for images in shown.on_maps.values()] == [False] * len(shown.maps)
