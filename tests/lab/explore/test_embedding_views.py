"""Figures, tables and sheets of an embedding show the numbers of their tables, in the colours that domains have."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from tests.helpers.embeddings import N_INDEX, N_QUERIES, open_small, quick_umap, train
from udonlib.errors import UserError
from udonlib.lab.explore import embedding_map, embedding_sheets, embedding_views
from udonlib.lab.explore.neighbourhoods import confusions, hubness, hubs
from udonlib.lab.views.sheets import RIGHT_INK, WRONG_INK, Sheet
from udonlib.lab.views.style import domain_colours

N_POINTS = N_QUERIES + 27


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> embedding_map.EmbeddingMap:
    opened = open_small(train(tmp_path_factory.mktemp("views")))
    opened.embed()
    return opened


def frames(sheet: bytes, colour: str) -> int:
    """Pixels of about a colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    pixels = np.asarray(Image.open(io.BytesIO(sheet)).convert("RGB")).astype(int)
    return int((np.abs(pixels - wanted).max(axis=2) < 24).sum())


# Colours


def test_domains_have_their_colour(found):
    looks = embedding_views.colouring(found, "domain")
    assert dict(zip(looks.names, looks.colours, strict=True)) == domain_colours(["emoji", "flags"])
    names = np.array(looks.names)[looks.kind]
    assert (names == found.points["domain"]).all()


@pytest.mark.parametrize("by", ["result", "gap"])
def test_outcomes_have_a_colour_each(found, by):
    looks = embedding_views.colouring(found, by)
    assert len(set(looks.colours)) == len(looks.names)
    assert (np.array(looks.names)[looks.kind] == found.points[by]).all()


def test_images_of_a_class_share_a_colour_and_the_legend_says_that_colours_repeat(found):
    looks = embedding_views.colouring(found, "class")
    for _, part in found.points.groupby(["domain", "class"]):
        assert len(set(looks.kind[part.index])) == 1
    flags = found.points[found.points["domain"] == "flags"]
    assert len(set(looks.kind[flags.index])) == flags["class"].nunique()
    assert "9 classes share 8 colours" in looks.note


def test_an_unknown_colouring_is_refused(found):
    with pytest.raises(UserError, match="no colouring 'results'; did you mean 'result'"):
        embedding_views.colouring(found, "results")


# Figures and tables


def test_the_map_draws_every_point_in_both_views(found):
    fig = embedding_views.map_chart(found, "domain")
    assert [trace.name for trace in fig.data] == ["emoji", "flags"] * 2
    assert sum(trace.showlegend for trace in fig.data) == 2
    assert sum(len(trace.x) for trace in fig.data) == 2 * N_POINTS
    student = found.layout("student", "pca").xy[(found.points["domain"] == "flags").to_numpy()]
    assert {tuple(xy) for xy in student} == set(zip(fig.data[1].x, fig.data[1].y, strict=True))
    assert fig.data[1].marker.color == domain_colours(["flags"])["flags"]
    assert fig.layout.title.text == "Test images by domain"


def test_a_large_map_says_how_many_points_it_draws(found, monkeypatch):
    monkeypatch.setattr(embedding_views, "MAX_DRAWN", 20)
    fig = embedding_views.map_chart(found, "result")
    assert sum(len(trace.x) for trace in fig.data) == 2 * 20
    assert fig.layout.title.text == f"Test images by hit or miss of the student (20 of {N_POINTS} points drawn)"


def test_a_umap_that_takes_time_is_announced_once(found, tmp_path, capsys, monkeypatch):
    quick_umap(monkeypatch)
    wanted = found.params.model_copy(update={"projection": "umap", "outputs": str(tmp_path)})
    moved = dataclasses.replace(found, params=wanted)
    fig = embedding_views.map_chart(moved, "domain")
    assert "computing UMAP of student and teacher: about 40 s" in capsys.readouterr().out
    assert "UMAP, 15 neighbours" in fig.layout.annotations[0].text
    embedding_views.map_chart(moved, "domain")
    assert capsys.readouterr().out == ""


def test_confusions_are_drawn_as_they_are_counted(found):
    fig = embedding_views.confusion_chart(found)
    assert len(fig.data) == 2
    for trace, (name, lists) in zip(fig.data, found.lists.items(), strict=True):
        table = confusions(lists)
        np.testing.assert_allclose(trace.z, table.to_numpy(), rtol=1e-5)
        assert list(trace.x) == list(trace.y) == ["emoji", "flags"]
        shown = [float(text or 0) for row in trace.text for text in row]
        np.testing.assert_allclose(shown, table.to_numpy().ravel(), atol=0.5)
        assert any(name in note.text and f"{found.r_at_1[name]:.1f}%" in note.text for note in fig.layout.annotations)


def test_the_table_of_hubs_says_what_was_counted(found):
    text = repr(embedding_views.hub_table(found)).splitlines()
    table = hubness(found.lists["student"]).set_index("domain")
    assert text[-1].split()[:2] == ["all", f"{N_INDEX}"]
    assert text[-3].split()[0] == "emoji"
    assert f"{table.loc['emoji', 'percent_never']:.1f}" in text[-3]
    assert str(table.loc["emoji", "most"]) in text[-3].split()


def test_what_is_shown_is_named(found):
    text = repr(embedding_views.described(found))
    assert "small: recipe udon" in text
    assert f"student {found.r_at_1['student']:.1f}, teacher {found.r_at_1['teacher']:.1f}" in text
    assert f"{N_POINTS} test images: queries" in text
    assert f"of the student, 5 of each of {N_QUERIES} queries" in text


def test_embedding_says_how_far_it_is_and_then_that_it_was_done(tmp_path, capsys):
    results = train(tmp_path)
    for words in ("embedded in 0 s", "embedded before"):
        opened = open_small(results)
        embedding_views.embed(opened, live=False, clock=lambda: 0.0)
        assert f"{N_POINTS} images {words}" in capsys.readouterr().out.splitlines()[-1]


def test_a_broken_cache_is_said_and_does_no_harm(tmp_path, capsys):
    results = train(tmp_path)
    embedding_views.embed(open_small(results), live=False)
    [file] = (results / "cache").iterdir()
    file.write_bytes(b"broken")
    opened = open_small(results)
    embedding_views.embed(opened, live=False)
    assert f"{file.name} cannot be read" in capsys.readouterr().out
    assert opened.features is not None


# Sheets


def test_a_thumbnail_is_the_file_itself_where_it_is_small(found, tmp_path):
    path = found.points["path"][0]
    uri = embedding_sheets.thumbnail(found.catalog, path)
    assert uri.startswith("data:image/png;base64,")
    large = found.catalog.store.root / "large.png"
    Image.effect_noise((300, 200), 80).save(large if large.parent.is_dir() else tmp_path / "large.png")
    where = found.catalog.store.root / found.catalog.store.prefix / path
    before = where.read_bytes()
    try:
        where.write_bytes(large.read_bytes())
        uri = embedding_sheets.thumbnail(found.catalog, path, 64)
    finally:
        where.write_bytes(before)
        large.unlink()
    assert uri.startswith("data:image/jpeg;base64,")
    assert len(uri) < 6_000


def test_a_region_shows_its_images_and_what_is_near_of_another_domain(found):
    few, many = (embedding_sheets.region_sheet(found, np.arange(n)).data for n in (2, N_POINTS))
    assert Image.open(io.BytesIO(many)).size[1] > Image.open(io.BytesIO(few)).size[1]
    assert len(many) < 400_000
    assert many == embedding_sheets.region_sheet(found, np.arange(N_POINTS)).data
    wrong = np.flatnonzero(found.points["result"] == "wrong")
    right = np.flatnonzero(found.points["result"] == "right")
    no_pairs = {"n_pairs": 0}
    n_crosses = min(len(wrong), 30)
    assert frames(embedding_sheets.region_sheet(found, wrong, **no_pairs).data, WRONG_INK) > 400 * n_crosses > 0
    assert frames(embedding_sheets.region_sheet(found, right, **no_pairs).data, WRONG_INK) < 400
    assert frames(embedding_sheets.region_sheet(found, right, **no_pairs).data, RIGHT_INK) > 1000


def test_every_image_of_a_region_is_marked_as_the_evaluation_said(found, monkeypatch):
    looks, tile = [], Sheet.tile

    def noted(self, x, y, side, image, words, *look):
        looks.append(look)
        tile(self, x, y, side, image, words, *look)

    monkeypatch.setattr(Sheet, "tile", noted)
    embedding_sheets.region_sheet(found, np.arange(N_POINTS), n=N_POINTS, n_pairs=0)
    shown = found.points.sort_values(["domain", "class"], kind="stable")["result"]
    expected = {"right": (RIGHT_INK, "tick"), "wrong": (WRONG_INK, "cross")}
    assert looks == [expected.get(result, ("", "")) for result in shown]
    assert len(set(looks)) == 3  # index images are neither


def test_a_query_shows_student_and_teacher_with_their_hits(found):
    hits = {name: lists.hit.sum(axis=1) for name, lists in found.lists.items()}
    both = hits["student"] + hits["teacher"]
    best, worst = int(both.argmax()), int(both.argmin())
    assert both[best] > both[worst]
    marks = [frames(embedding_sheets.query_sheet(found, query).data, RIGHT_INK) for query in (best, worst)]
    assert marks[0] > marks[1]


def test_an_item_and_the_hubs_show_who_finds_them(found):
    table = hubs(found.lists["student"])
    sheet = embedding_sheets.hub_sheet(found, 3)
    assert (
        Image.open(io.BytesIO(sheet.data)).size[1]
        < Image.open(io.BytesIO(embedding_sheets.hub_sheet(found, 5).data)).size[1]
    )
    for hub in table.head(3).itertuples():
        wrong = frames(embedding_sheets.item_sheet(found, hub.position).data, WRONG_INK)
        assert (wrong > 400) == (hub.n_right < hub.n_lists)
    never = set(range(N_INDEX)) - set(table["position"])
    for position in sorted(never)[:1]:
        assert frames(embedding_sheets.item_sheet(found, position).data, WRONG_INK) < 400
