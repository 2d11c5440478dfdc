"""Metrics against loops that count one query at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from udonlib.evaluation.metrics import count_positives, map_at_k, measure, mmp_at_k, r_at_k, ranks_of, relevance


def loop_relevant(query, item):
    """Say by the definition whether an index item is relevant: (labels, domain) of both."""
    return query[1] == item[1] and bool((set(query[0]) & set(item[0])) - {-1})


def loop_mmp(relevant, n, k):
    if n == 0:
        return 0.0
    n_counted = min(k, n)
    return sum(relevant[:n_counted]) / n_counted


def loop_map(relevant, n, k):
    found, total = 0, 0.0
    for rank, is_right in enumerate(relevant[:k], 1):
        found += is_right
        total += is_right * found / rank
    return total / min(k, n) if n else 0.0


labelled = st.lists(
    st.tuples(st.lists(st.integers(-1, 4), min_size=3, max_size=3), st.integers(0, 2)), min_size=1, max_size=12
)


def tensors(items):
    return torch.tensor([labels for labels, _ in items]), torch.tensor([domain for _, domain in items])


@settings(deadline=None)
@given(labelled, labelled, st.data())
def test_relevance_and_positives_equal_a_loop_over_labels_and_domains(queries, index, data):
    positions = data.draw(
        st.lists(
            st.lists(st.integers(-1, len(index) - 1), min_size=4, max_size=4),
            min_size=len(queries),
            max_size=len(queries),
        )
    )
    exclude = [row[0] for row in positions]
    of_queries, of_index = tensors(queries), tensors(index)
    expected = [
        [position >= 0 and loop_relevant(query, index[position]) for position in row]
        for query, row in zip(queries, positions, strict=True)
    ]
    assert relevance(torch.tensor(positions), *of_queries, *of_index).tolist() == expected
    counts = [
        sum(loop_relevant(query, item) for i, item in enumerate(index) if i != itself)
        for query, itself in zip(queries, exclude, strict=True)
    ]
    assert count_positives(*of_queries, *of_index, torch.tensor(exclude)).tolist() == counts


@given(
    st.lists(st.tuples(st.lists(st.booleans(), min_size=6, max_size=6), st.integers(0, 9)), min_size=1, max_size=8),
    st.integers(1, 6),
)
def test_mmp_and_recall_equal_a_loop_over_queries(queries, k):
    relevant = torch.tensor([flags for flags, _ in queries])
    n_positives = torch.tensor([n for _, n in queries])
    expected = [loop_mmp(flags, n, k) for flags, n in queries]
    assert mmp_at_k(relevant, n_positives, k).tolist() == pytest.approx(expected)
    assert r_at_k(relevant).tolist() == [float(flags[0]) for flags, _ in queries]
    assert r_at_k(relevant, k).tolist() == [float(any(flags[:k])) for flags, _ in queries]


@given(
    st.lists(st.tuples(st.lists(st.booleans(), min_size=6, max_size=6), st.integers(0, 4)), min_size=1, max_size=8),
    st.integers(1, 6),
)
def test_average_precision_equals_a_loop_over_ranks(queries, k):
    relevant = torch.tensor([flags for flags, _ in queries])
    n_positives = torch.tensor([n + sum(flags) for flags, n in queries])
    expected = [loop_map(flags, n + sum(flags), k) for flags, n in queries]
    assert map_at_k(relevant, n_positives, k).tolist() == pytest.approx(expected)
    assert measure(f"map_at_{k}", relevant, n_positives).tolist() == pytest.approx(expected)


def test_average_precision_rewards_what_comes_early_and_counts_what_stands_behind_the_positives():
    n_positives = torch.tensor([2, 2, 2, 9])
    relevant = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    assert map_at_k(relevant, n_positives, 4).tolist() == pytest.approx([1, (1 + 2 / 3) / 2, (1 / 3 + 1 / 2) / 2, 1])
    assert mmp_at_k(relevant, n_positives, 4).tolist() == pytest.approx([1, 0.5, 0, 1])


def test_a_metric_is_known_by_its_name():
    relevant, n_positives = torch.tensor([[False, True, False]]), torch.tensor([3])
    found = {name: measure(name, relevant, n_positives).item() for name in ("r_at_1", "r_at_2", "mmp_at_2", "map_at_3")}
    assert found == pytest.approx({"r_at_1": 0.0, "r_at_2": 1.0, "mmp_at_2": 0.5, "map_at_3": 0.5 / 3})
    assert ranks_of("map_at_12") == 12
    with pytest.raises(ValueError, match="'ndcg_at_2'; valid: r_at_<k>, mmp_at_<k>, map_at_<k>"):
        measure("ndcg_at_2", relevant, n_positives)
    with pytest.raises(ValueError, match="k is 4, but relevant has 3 ranks"):
        measure("r_at_4", relevant, n_positives)


def test_a_class_with_two_other_images_scores_one_when_both_come_first():
    relevant = torch.tensor([[True, True, False, False, False]])
    assert mmp_at_k(relevant, torch.tensor([2])).item() == 1.0


def test_a_query_without_relevant_images_counts_as_zero():
    relevant = torch.zeros(1, 5, dtype=torch.bool)
    assert mmp_at_k(relevant, torch.tensor([0])).item() == 0.0
    assert r_at_k(relevant).item() == 0.0


def test_labels_near_the_largest_integer_do_not_collide():
    largest = 2**63 - 1
    labels, domains = torch.tensor([[largest], [largest - 1], [0]]), torch.tensor([0, 1, 1])
    assert count_positives(labels, domains, labels, domains, torch.tensor([-1, -1, -1])).tolist() == [1, 1, 1]


def test_positives_of_an_index_without_labels_are_none():
    nothing, label = torch.tensor([[-1]]), torch.tensor([[3]])
    zero = torch.zeros(1, dtype=torch.int64)
    assert count_positives(label, zero, nothing, zero).tolist() == [0]


@pytest.mark.parametrize("k", [0, 6])
def test_a_k_beyond_the_ranks_is_refused(k):
    with pytest.raises(ValueError, match=f"k is {k}, but relevant has 5 ranks; valid: 1 to 5"):
        mmp_at_k(torch.zeros(2, 5, dtype=torch.bool), torch.ones(2, dtype=torch.int64), k)


def test_recall_without_ranks_is_refused():
    with pytest.raises(ValueError, match="relevant has 0 ranks"):
        r_at_k(torch.zeros(2, 0, dtype=torch.bool))
