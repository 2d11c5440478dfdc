"""Tables and figures of two runs show the numbers of their tables, and say why there is nothing to show."""

import re

import numpy as np
import pytest

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.gaps import A, B
from tests.helpers.gaps import write_run as write_searched_run
from tests.helpers.runfolders import write_run
from tests.helpers.tables import bold_cells
from udonlib.lab.compare import pair_views, pairs
from udonlib.lab.compare.pairs import Pair, open_pair
from udonlib.runs.folder import RunFolder


@pytest.fixture
def pair(tmp_path) -> Pair:
    one = write_run(tmp_path, "one", A)
    return open_pair(RunFolder(one), RunFolder(write_run(tmp_path, "two", B, w_kl=0.5, step=30)))


@pytest.fixture
def apart(tmp_path) -> Pair:
    """A finished run and one that has not begun to train."""
    one = RunFolder(write_run(tmp_path, "one", A))
    other = write_run(tmp_path, "new", A, finished=False)
    (other / "metrics.jsonl").write_text("")
    return open_pair(one, RunFolder(other))


def test_which_run_is_which_and_what_limits_the_comparison_is_said(apart):
    table = pair_views.names_table(apart)
    assert re.search(r"A +one", table.text)
    assert "udon no_kl, seed 0" in pair_views.names_table(apart, {"one": "udon no_kl, seed 0"}).html
    assert re.search(r"B +new", table.text)
    assert "has no test outcomes to compare" in table.html.split("<li>")[1]


def test_the_table_of_parameters_has_what_differs(pair):
    text = pair_views.parameters_table(pair).text
    assert re.search(r"w_kl +1.0 +0.5", text)
    assert "w_rel" not in text
    same = Pair(pair.a, pair.a, pair.outcomes, ())
    assert "nothing" in pair_views.parameters_table(same).text


def test_curves_lie_over_each_other_and_are_told_apart_without_colour(pair):
    fig = pair_views.curves_chart(pair)
    assert [title.text for title in fig.layout.annotations] == [
        "loss: student classification",
        "loss: total",
        "validation R@1, %",
        "validation mMP@5, %",
    ]
    assert [trace.name for trace in fig.data] == ["A: one"] * 4 + ["B: two"] * 4
    assert {trace.line.dash for trace in fig.data[:4]} == {"solid"}
    assert {trace.line.dash for trace in fig.data[4:]} == {"dash"}
    assert list(fig.data[0].x) == [20, 40]
    assert list(fig.data[4].x) == [15, 30]
    assert sum(bool(trace.showlegend) for trace in fig.data) == 2


def test_the_allocation_holds_until_the_last_step_and_images_are_shares(pair):
    fig = pair_views.allocation_chart(pair)
    areas = [trace for trace in fig.data if trace.stackgroup]
    assert [(list(trace.x), list(trace.y)) for trace in areas[:2]] == [([0, 20, 40], [50, 50, 50])] * 2
    assert list(areas[2].x) == [0, 15, 30]
    dots = [trace for trace in fig.data if not trace.stackgroup]
    assert [trace.name for trace in dots] == ["A", "B"]
    assert list(dots[0].x) == pytest.approx([100 / 3, 200 / 3])
    assert dots[0].marker.symbol != dots[1].marker.symbol


def test_differences_in_table_and_figure_are_the_same(pair):
    found = pairs.between_runs(pair)
    fig = pair_views.difference_chart(pair)
    assert list(fig.data[0].x) == pytest.approx(found["mean"].tolist(), rel=1e-6)
    assert list(fig.data[0].y) == ["emoji", "flags", "mean"]
    np.testing.assert_allclose(fig.data[0].error_x.array, found["high"] - found["mean"], rtol=1e-5)
    text = pair_views.difference_table(pair).text
    for row in found.itertuples():
        assert f"{row.mean:+.1f} ± {(row.high - row.low) / 2:.1f}" in text


def test_a_difference_is_bold_and_filled_only_where_its_interval_excludes_zero(tmp_path):
    right = {"emoji": [1.0] * 40, "flags": [1.0, 0.0] * 20}
    wrong = {"emoji": [0.0] * 30 + [1.0] * 10, "flags": [0.0, 1.0] * 20}
    runs = [RunFolder(write_run(tmp_path, name, values)) for name, values in (("a", wrong), ("b", right))]
    pair = open_pair(*runs)
    assert list(pair_views.difference_chart(pair).data[0].marker.symbol) == ["circle", "circle-open", "circle"]
    bold = bold_cells(pair_views.difference_table(pair))
    assert {name for name, column in bold if column == 3} == {"emoji", "mean"}  # of R@1


def test_queries_that_changed_side_are_tabulated(pair):
    text = pair_views.changed_table(pair).text
    assert re.search(r"emoji +6 +2 \(33.3 %\) +1 \(16.7 %\) +3 \(50.0 %\) +0 \(0.0 %\)", text)
    assert re.search(r"all +10 +3 \(30.0 %\) +1 \(10.0 %\) +4 \(40.0 %\) +2 \(20.0 %\)", text)


def test_what_there_is_not_is_said_in_place_of_every_figure(apart):
    for view in (pair_views.difference_table, pair_views.groups_table, pair_views.changed_table):
        assert "no test outcomes that both runs share" in view(apart).text
    assert "no test outcomes" in pair_views.difference_chart(apart).layout.annotations[0].text
    assert "no test outcomes" in pair_views.changed_gallery(apart, "A").text
    nobody = Pair(apart.b, apart.b, apart.outcomes, ())
    assert pair_views.curves_chart(nobody).layout.annotations[0].text == "neither run has trained or validated yet"
    assert pair_views.allocation_chart(nobody).layout.annotations[0].text == "neither run has trained"
    assert [trace.name for trace in pair_views.curves_chart(apart).data][:1] == ["A: one"]


def test_galleries_hold_the_queries_that_one_run_alone_gets(tmp_path):
    write_uned_tree(tmp_path / "data")
    folders = [write_searched_run(tmp_path / "results", name) for name in ("one", "other")]
    file = folders[1] / "neighbours.npz"
    with np.load(file) as opened:
        arrays = dict(opened)
    arrays["student/flags/hit"][:, 0] = False
    np.savez(file, **arrays)
    pair = open_pair(*map(RunFolder, folders))
    only_a, only_b = (pair_views.changed_gallery(pair, side, n_queries=3, k=3) for side in "AB")
    assert only_a.data[:4] == only_b.data[:4] == b"RIFF"
    assert len(only_a.data) > 2 * len(only_b.data)  # three rows of images, and one line that says there are none
