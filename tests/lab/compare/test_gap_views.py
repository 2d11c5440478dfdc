"""Figures and galleries of gaps show the numbers of their tables and mark what is right."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from plotly.callbacks import Points

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.gaps import outcomes, write_run
from tests.helpers.sheets import near, neighbours, pixels
from tests.helpers.tables import bold_cells
from udonlib.data.catalog import Catalog, load_catalog
from udonlib.evaluation.outcomes import GROUPS, right_and_wrong
from udonlib.lab.compare import gap_views, gaps
from udonlib.lab.views import sheets
from udonlib.lab.views.style import domain_colours
from udonlib.presets import GapParams

STUDENT = {"emoji": [0] * 40 + [1] * 10, "flags": [1, 0] * 20}
TEACHER = {"emoji": [1] * 40 + [1] * 10, "flags": [1, 0] * 20}


@pytest.fixture
def found(tmp_path) -> gaps.GapRun:
    """A run whose teacher is far better in emoji, and the same in flags."""
    write_uned_tree(tmp_path / "data")
    write_run(tmp_path / "results", "taught")
    run = gaps.open_gaps(GapParams(run="taught", outputs=str(tmp_path / "results"), k=3))
    return dataclasses.replace(run, outcomes=outcomes({"student": STUDENT, "teacher": TEACHER}))


@pytest.fixture
def catalog(tmp_path) -> Catalog:
    return load_catalog(str(write_uned_tree(tmp_path / "uned", index_of="flags")))


def validation(embedders: list[str], domains: list[str]) -> pd.DataFrame:
    rows = [
        (step, embedder, domain, "merged", 10.0 * step + place, 5.0)
        for step in (4, 2)
        for place, embedder in enumerate(embedders)
        for domain in domains
    ]
    return pd.DataFrame(rows, columns=["step", "embedder", "domain", "index", "r_at_1", "mmp_at_5"])


def traces(fig: go.Figure, name: str) -> list:
    return [trace for trace in fig.data if trace.name == name]


def test_what_is_compared_is_named(found):
    text = repr(gap_views.compared(found))
    assert text.startswith("On average teachers lead by 40.0 ± ")
    assert " points of R@1; by domain: surely teachers in emoji (80.0); open in one.\n" in text
    assert "taught: recipe udon" in text
    assert "emoji 50, flags 40" in text
    assert "images of emoji, flags" in text


def test_differences_that_are_certain_are_bold(found):
    table = gap_views.difference_table(found)
    lines = {line.split()[0]: line.split()[1:] for line in repr(table).splitlines()[3:]}
    assert lines["emoji"][0] == "20.0"
    assert lines["emoji"][6] == "100.0"
    assert [lines["emoji"][place] for place in (12, 13, 15, 16)] == ["+80.0", "±", "+40.0", "±"]
    assert lines["flags"][12:] == ["+0.0", "±", "0.0", "+0.0", "±", "0.0"]
    assert bold_cells(table) == {("emoji", 4), ("emoji", 5), ("mean", 4), ("mean", 5)}


def test_leads_are_drawn_beside_their_domain(found):
    fig = gap_views.difference_chart(found)
    assert len(fig.data) == 2
    first = fig.data[0]
    names = dict(zip(fig.layout.yaxis.tickvals, fig.layout.yaxis.ticktext, strict=True))
    drawn = {names[round(y)]: x for x, y in zip(first.x, first.y, strict=True)}
    assert [x for name, x in drawn.items() if "emoji" in name] == [80]
    assert [x for name, x in drawn.items() if "mean" in name] == [40]
    assert domain_colours(["emoji"])["emoji"] in fig.layout.yaxis.ticktext[0]


def test_three_embedders_have_symbols_of_their_own(found):
    table = outcomes({"student": STUDENT, "teacher": TEACHER, "specialist": TEACHER})
    fig = gap_views.difference_chart(dataclasses.replace(found, outcomes=table))
    assert [trace.name for trace in fig.data] == ["teacher", "specialist"] * 2
    assert len({trace.marker.symbol for trace in fig.data}) == 2
    assert (fig.data[0].y != fig.data[1].y).all()
    assert sum(trace.showlegend for trace in fig.data) == 2


def test_validations_of_both_are_lines_in_the_order_of_steps():
    fig = gap_views.validation_chart(validation(["student", "teacher"], ["emoji", "flags", "mean"]))
    assert len(fig.data) == 6
    assert [list(trace.x) for trace in fig.data] == [[2, 4]] * 6
    assert list(traces(fig, "teacher")[0].y) == [21.0, 41.0]
    assert {trace.line.dash for trace in traces(fig, "student")} == {"solid"}
    assert {trace.line.dash for trace in traces(fig, "teacher")} == {"dash"}
    assert "not validated" not in fig.layout.title.text


@pytest.mark.parametrize("table", [validation(["student"], ["emoji", "mean"]), validation([], [])])
def test_older_runs_show_the_student_alone_and_say_so(table):
    fig = gap_views.validation_chart(table)
    assert "teachers were not validated" in fig.layout.title.text
    assert {trace.name for trace in fig.data} <= {"student"}


def test_counts_are_a_two_by_two_of_each_domain(found):
    text = repr(gap_views.counts_table(right_and_wrong(found.outcomes))).splitlines()
    assert text[-3].split() == ["emoji", "50", "10", "(20.0", "%)", "40", "(80.0", "%)", *["0", "(0.0", "%)"] * 2]
    assert text[-1].split()[:2] == ["all", "90"]


def test_frequencies_name_their_bins_and_the_certain_leads():
    table = outcomes({"student": STUDENT, "teacher": TEACHER}, {"emoji": [2] * 40 + [12000] * 10, "flags": [1] * 40})
    fig = gap_views.frequency_chart(gaps.by_frequency(table, n_bins=2))
    assert list(fig.layout.xaxis.ticktext) == ["2<br><b>+100.0</b>", "12k<br>+0.0"]
    assert list(fig.layout.xaxis2.ticktext) == ["1<br>+0.0"]
    assert [list(trace.y) for trace in traces(fig, "student")] == [[0, 100], [50]]
    assert fig.layout.xaxis3.visible is False


def test_a_domain_that_was_trained_is_grouped_by_training_images_alone():
    table = outcomes({"student": STUDENT, "teacher": TEACHER})
    trained = table[table["domain"] == "flags"].assign(n_train=7)
    fig = gap_views.frequency_chart(gaps.by_frequency(table), gaps.by_frequency(trained, "n_train"))
    titles = [note.text.partition("</span> ")[2] for note in fig.layout.annotations]
    assert titles == ["emoji", "flags, training images"]
    assert list(fig.layout.xaxis2.ticktext) == ["7<br>+0.0"]


def test_long_counts_of_a_bin_stand_in_two_lines():
    row = {"lowest": 120, "highest": 4321, "mean": 1.5, "low": -1.0, "high": 4.0}
    assert gap_views._bin_label(SimpleNamespace(**row)) == "120–<br>4.32k<br>+1.5"
    assert gap_views._bin_label(SimpleNamespace(**row | {"highest": 12, "lowest": 3})) == "3–12<br>+1.5"


def test_a_bar_shows_its_queries_where_a_person_clicks_and_is_a_figure_elsewhere(found, catalog, monkeypatch):
    parts = pair(catalog, [[False, False], [True, False]], [[True, False], [True, True]])
    monkeypatch.setattr(gaps.GapRun, "catalog", catalog)
    found = dataclasses.replace(found, neighbours=parts)
    shown: list = []
    monkeypatch.setattr(gap_views, "display", shown.append)
    monkeypatch.setattr(gap_views, "Still", lambda widget, html: shown.append((widget, html)))
    gap_views.wrong_neighbours(found, GapParams(k=2), live=False)
    gap_views.wrong_neighbours(found, GapParams(k=2), live=True)
    assert isinstance(shown[0], go.Figure)
    widget, still = shown[1]
    figure, said, place = widget.children
    assert "data:image/png" in still
    assert place.layout.display == "none"
    kind = gaps.kinds_found(parts[0])[0]  # of the one that the student got wrong
    name = gap_views.OTHER_CLASS if kind == gaps.WRONG_CLASS else kind
    trace = next(trace for trace in figure.data if trace.name == name)
    trace._dispatch_on_click(Points(point_inds=[0], trace_index=0, xs=[], ys=[], trace_name=trace.name), None)
    assert place.layout.display is None or place.layout.display == ""
    assert "emoji, student" in said.value
    bar = ("emoji", "student", kind)
    assert bytes(place.value) == gap_views.kind_gallery(parts, catalog, bar, 8, 2).data
    drawn = pixels(gap_views.kind_gallery(parts, catalog, bar, 8, 2))
    tile = 0.6 * (88 * 88 - 80 * 80)  # see `near`
    assert near(sheets.WRONG_INK, drawn).sum() == pytest.approx(3 * tile, rel=0.25)  # one query of two
    assert near(sheets.RIGHT_INK, drawn).sum() == pytest.approx(tile, rel=0.25)


def pair(catalog: Catalog, student: list[list[bool]], teacher: list[list[bool]], domain: str = "emoji") -> list:
    return [neighbours(catalog, domain, hit, name) for hit, name in ((student, "student"), (teacher, "teacher"))]


def test_overlaps_are_drawn_by_who_is_right(catalog):
    parts = pair(catalog, [[True, False], [False, False]], [[True, False], [True, True]])
    fig = gap_views.overlap_chart(gaps.overlap_means(gaps.overlaps(parts, 2)), 2)
    assert [trace.name for trace in fig.data] == ["all queries", "right: both", "right: teacher only"]
    assert fig.data[1].x[0] == 100
    assert len({trace.marker.symbol for trace in fig.data}) == 3


def test_wrong_first_neighbours_are_stacked_in_the_colour_of_where_they_are():
    rows = [
        ("emoji", "student", "right", 5, 50.0),
        ("emoji", "student", "flags", 5, 50.0),
        ("emoji", "teacher", "wrong class", 10, 100.0),
    ]
    first = pd.DataFrame(rows, columns=["domain", "embedder", "found", "n_queries", "percent"])
    fig = gap_views.first_neighbour_chart(first)
    assert list(traces(fig, "flags")[0].y) == [50, 0]
    assert traces(fig, "flags")[0].marker.color == domain_colours(["emoji", "flags"])["flags"]
    assert list(traces(fig, "own domain, other class")[0].y) == [0, 100]
    assert fig.layout.barmode == "stack"
    assert sum(sum(trace.y) for trace in fig.data) == 150


@pytest.mark.parametrize("group", GROUPS)
def test_a_gallery_shows_queries_of_its_group_with_both_lists(catalog, group):
    right = [True, False]
    student = [[s, True] for s in right for _ in right]
    teacher = [[t, False] for _ in right for t in right]
    shown = pixels(gap_views.gap_gallery(pair(catalog, student, teacher), catalog, group, k=2))
    frames = {colour: near(colour, shown) for colour in (sheets.RIGHT_INK, sheets.WRONG_INK)}
    middle = 320  # pixels; between the two lists
    n_right = 1 + (group in ("both", "student only")) + (group in ("both", "teacher only"))
    tile = 0.6 * (88 * 88 - 80 * 80)  # see `near`
    assert frames[sheets.RIGHT_INK].sum() == pytest.approx(n_right * tile, rel=0.25)
    assert frames[sheets.WRONG_INK].sum() == pytest.approx((4 - n_right) * tile, rel=0.25)
    left = frames[sheets.RIGHT_INK][:, :middle].sum() / tile
    assert round(left) == 1 + (group in ("both", "student only"))


def test_a_gallery_is_the_same_for_the_same_seed_and_shares_queries_among_domains(catalog):
    wrong, right = [[False, False]] * 6, [[True, False]] * 6
    parts = pair(catalog, wrong, right) + pair(catalog, wrong, right, "flags")
    one, again, other = (gap_views.gap_gallery(parts, catalog, "teacher only", 3, 2, seed) for seed in (0, 0, 5))
    assert one.data == again.data
    assert one.data != other.data
    chosen = gap_views._choose(list(gaps.pairs(parts)), (False, True), 3, np.random.default_rng(0))
    domains = [pair[0].query_domain for pair, _ in chosen]
    assert domains == sorted(domains)
    assert sorted(map(domains.count, ("emoji", "flags"))) == [1, 2]
    assert len({(domain, query) for domain, (_, query) in zip(domains, chosen, strict=True)}) == 3


def test_a_gallery_without_queries_says_so(catalog):
    parts = pair(catalog, [[True, True]], [[True, True]])
    shown = pixels(gap_views.gap_gallery(parts, catalog, "student only"))
    assert not near(sheets.RIGHT_INK, shown).any()
    assert near(sheets.INK, shown).any()
