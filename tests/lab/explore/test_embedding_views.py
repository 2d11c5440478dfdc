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
from udonlib.lab.views.sheets import RIGHT_INK
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


def test_of_more_classes_than_colours_the_most_frequent_have_one_and_the_rest_is_grey(found):
    looks = embedding_views.colouring(found, "class")
    names = np.array(looks.names)[looks.kind]
    true = (found.points["class"].astype(str) + " (" + found.points["domain"] + ")").to_numpy()
    assert looks.names[-1] == embedding_views.OTHERS
    assert looks.colours[-1] == embedding_views.PALE
    assert (names[names != embedding_views.OTHERS] == true[names != embedding_views.OTHERS]).all()
    counts = found.points.groupby(["domain", "class"]).size().sort_values()
    assert (names == embedding_views.OTHERS).sum() == counts.iloc[: len(counts) - 8].sum() > 0
    assert f"the 8 most frequent of {len(counts)} classes" in looks.note


def test_the_classes_of_chosen_points_are_coloured(found):
    rows = np.flatnonzero(found.points["domain"] == "flags")[:3]
    looks = embedding_views.colouring(found, "class", rows)
    chosen = set(found.points["class"].iloc[rows] + " (flags)")
    assert set(looks.names) == chosen | {embedding_views.OTHERS}
    here = (found.points["class"] + " (" + found.points["domain"] + ")").isin(chosen).to_numpy()
    assert ((np.array(looks.names)[looks.kind] != embedding_views.OTHERS) == here).all()


def test_an_unknown_colouring_is_refused(found):
    with pytest.raises(UserError, match="no colouring 'results'; did you mean 'result'"):
        embedding_views.colouring(found, "results")


# Figures and tables


def test_the_map_draws_every_point_in_both_views(found):
    fig = embedding_views.map_chart(found, "domain")
    assert [trace.name for trace in fig.data] == ["emoji", "flags"] * 2
    assert sum(trace.showlegend for trace in fig.data) == 2
    assert sum(len(trace.x) for trace in fig.data) == 2 * N_POINTS
    student = found.layout("student", "quick").xy[(found.points["domain"] == "flags").to_numpy()]
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
    assert "UMAP by 15 neighbours" in fig.layout.annotations[0].text
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


def test_the_hubs_show_who_finds_them(found):
    table = hubs(found.lists["student"])
    few, more = (embedding_sheets.hub_sheet(found, n).data for n in (3, 5))
    assert Image.open(io.BytesIO(few)).size[1] < Image.open(io.BytesIO(more)).size[1]
    one = embedding_sheets.hub_sheet(found, 1).data
    first = table.iloc[0]
    assert (frames(one, RIGHT_INK) > 400) == (first["n_right"] > 0)
