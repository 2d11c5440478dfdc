"""Tables of neighbours, against counts made by hand and by naive loops."""

import dataclasses
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udonlib.errors import UserError
from udonlib.evaluation.evaluate import MergedIndex, Neighbours
from udonlib.lab.explore import neighbourhoods as nb

INDEX = MergedIndex(("emoji", "flags", "logos"), (("e0", "e1", "e2"), ("f0", "f1"), ("l0",)))


def neighbours(domain: str, position: list[list[int]], hit: list[list[int]], embedder: str = "student") -> Neighbours:
    places, n = np.array(position), len(position)
    similarity = np.where(places >= 0, 1 - 0.1 * np.arange(places.shape[1]) - 0.01 * np.arange(n)[:, None], -np.inf)
    paths = tuple(f"{domain}-q{i}" for i in range(n))
    return Neighbours(embedder, domain, "merged", paths, places, similarity, np.array(hit, bool), INDEX)


EMOJI = neighbours("emoji", [[0, 3, 5], [3, 1, 2], [3, 4, -1]], [[1, 0, 0], [0, 1, 1], [0, 0, 0]])
FLAGS = neighbours("flags", [[3, 0, 5], [0, 4, 3]], [[1, 0, 0], [0, 1, 1]])


@pytest.fixture
def found() -> nb.Lists:
    return nb.gather([EMOJI, FLAGS], "student", 3)


def test_lists_know_their_queries_and_the_domains_of_their_neighbours(found):
    assert len(found) == 5
    assert found.query(3) == ("flags", "flags-q0")
    assert found.of(2) == [(("flags", "f0"), False), (("flags", "f1"), False)]
    assert found.item_domain.tolist() == [[0, 1, 2], [1, 0, 0], [1, 1, 3], [1, 0, 2], [0, 1, 1]]
    assert found.astray.tolist() == [[0, 1, 1], [1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 0, 0]]


def test_lists_take_the_wanted_embedder_domains_and_ranks():
    teacher = neighbours("flags", [[3]], [[1]], "teacher")
    found = nb.gather([EMOJI, FLAGS, teacher], "student", 2, ["flags"])
    assert found.position.tolist() == [[3, 0], [0, 4]]
    assert [found.query(row) for row in range(2)] == [("flags", "flags-q0"), ("flags", "flags-q1")]
    assert nb.gather([EMOJI, teacher], "teacher", 1).position.tolist() == [[3]]


def test_lists_are_of_the_merged_index_alone():
    separate = dataclasses.replace(FLAGS, index="separate")
    assert len(nb.gather([EMOJI, separate], "student", 3)) == 3


def test_too_many_neighbours_and_an_absent_embedder_are_refused():
    with pytest.raises(UserError, match="parameter 'k': found 4, but 3 neighbours were kept; valid: 1 to 3"):
        nb.gather([EMOJI], "student", 4)
    with pytest.raises(UserError, match="no neighbours of the teacher were kept for flags"):
        nb.gather([EMOJI], "teacher", 1, ["flags"])


def test_hubs_are_counted(found):
    table = nb.hubs(found)
    assert table["path"].tolist() == ["f0", "e0", "f1", "l0", "e1", "e2"]
    assert table["n_lists"].tolist() == [5, 3, 2, 2, 1, 1]
    assert table["n_right"].tolist() == [2, 1, 1, 0, 1, 1]
    assert table["n_domains"].tolist() == [2, 2, 2, 2, 1, 1]
    assert table["percent"].iloc[0] == 100
    assert nb.hubs(found, 2)["path"].tolist() == ["f0", "e0"]


@given(st.lists(st.lists(st.integers(-1, 5), min_size=2, max_size=2), min_size=1, max_size=12))
def test_hubs_agree_with_a_naive_count(rows):
    found = nb.gather([neighbours("emoji", rows, [[0, 0]] * len(rows))], "student", 2)
    counted = Counter(place for row in rows for place in row if place >= 0)
    table = nb.hubs(found)
    assert dict(zip(table["position"], table["n_lists"], strict=True)) == counted
    assert sorted(table["n_lists"], reverse=True) == table["n_lists"].tolist()


def test_hubness_says_who_is_never_found_and_who_draws_queries(found):
    table = nb.hubness(found).set_index("domain")
    assert table["n_items"].to_dict() == {"emoji": 3, "flags": 2, "logos": 1, "all": 6}
    assert table["most"].to_dict() == {"emoji": 3, "flags": 5, "logos": 2, "all": 5}
    assert table.loc["all", "percent_never"] == 0
    assert table.loc["flags", "percent_lists"] == pytest.approx(100 * 7 / 14)
    assert table.loc["flags", "percent_index"] == pytest.approx(100 * 2 / 6)
    counts = np.array([3, 1, 1, 5, 2, 2])
    skewness = ((counts - counts.mean()) ** 3).mean() / counts.std() ** 3
    assert table.loc["all", "skewness"] == pytest.approx(skewness)
    assert table.loc["logos", "skewness"] == 0
    alone = nb.hubness(nb.gather([FLAGS], "student", 1)).set_index("domain")
    assert alone.loc["emoji", "percent_never"] == pytest.approx(100 * 2 / 3)


def test_confusions_are_wrong_first_neighbours_by_domain(found):
    table = nb.confusions(found)
    assert table.index.tolist() == ["emoji", "flags"]
    assert table.loc["emoji"].round(1).to_dict() == {"emoji": 0, "flags": 66.7, "logos": 0}
    assert table.loc["flags"].to_dict() == {"emoji": 50, "flags": 0, "logos": 0}


def test_rows_of_confusions_sum_to_what_r_at_1_lacks(found):
    missed = 100 * (1 - np.array([found.hit[found.domain == d, 0].mean() for d in (0, 1)]))
    np.testing.assert_allclose(nb.confusions(found).sum(axis=1), missed)


def test_a_query_without_any_neighbour_is_confused_with_nobody():
    found = nb.gather([neighbours("emoji", [[-1, -1], [3, 0]], [[0, 0], [0, 1]])], "student", 2)
    assert nb.confusions(found).loc["emoji"].to_dict() == {"emoji": 0, "flags": 50, "logos": 0}


POINTS = pd.DataFrame(
    {
        "domain": ["emoji"] * 4 + ["flags"] * 2,
        "class": ["a", "a", "b", "a", "a", "a"],
        "query": [0, 1, 2, -1, 3, 4],
    }
)


def test_purity_is_the_share_of_the_most_frequent(found):
    held = nb.purity(POINTS, found, np.array([0, 2, 3, 4, 5]))
    assert (held.n_images, held.n_queries) == (5, 4)
    assert (held.domain, held.percent_domain) == ("emoji", 60)
    assert (held.label, held.percent_label) == ("a (emoji)", 40)  # a class of one domain is not that of the other
    assert held.same_class == pytest.approx(100 * (1 / 3 + 0 + 1 / 3 + 2 / 3) / 4)


def test_a_region_without_queries_has_no_share_of_relevant_items(found):
    held = nb.purity(POINTS, found, np.array([3]))
    assert held.percent_label == 100
    assert np.isnan(held.same_class)
    with pytest.raises(ValueError, match="without points"):
        nb.purity(POINTS, found, np.array([], dtype=int))


def test_confused_domains_are_those_among_the_nearest(found):
    table = nb.confused_domains(found, np.array([0, 1, 2]))
    assert table.to_dict("records") == [
        {"domain": "flags", "n_queries": 3, "percent": 100.0, "best": 1},
        {"domain": "logos", "n_queries": 1, "percent": pytest.approx(100 / 3), "best": 3},
    ]
    assert nb.confused_domains(found, np.array([], dtype=int)).empty


def test_the_nearest_confusions_come_one_a_query_and_nearest_first(found):
    table = nb.nearest_confusions(found, np.array([0, 1, 2, 4]), 3)
    assert table["query"].tolist() == [1, 4, 2]
    assert table["rank"].tolist() == [1, 1, 1]
    assert table["path"].tolist() == ["f0", "e0", "f0"]
    assert table["similarity"].is_monotonic_decreasing
    late = nb.nearest_confusions(found, np.array([0]))
    assert late.iloc[0][["rank", "domain", "path"]].tolist() == [2, "flags", "f0"]
    assert nb.nearest_confusions(found, np.array([], dtype=int)).empty


def test_an_item_knows_who_finds_it_nearest_first(found):
    assert nb.found_by(found, 3).tolist() == [3, 1, 2, 0, 4]
    assert nb.found_by(found, 5).tolist() == [0, 3]
