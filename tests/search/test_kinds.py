"""Kinds of faiss indexes: what they find, what is measured of them, and which is chosen."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.search import clusters
from udonlib.errors import UserError
from udonlib.search import kinds
from udonlib.search.kinds import KINDS, Judge, Structure, choose, exactly, rerank, search, table, told

VECTORS = clusters(2000, n_classes=60).vectors
QUERIES = clusters(7, n_classes=60, seed=1).vectors


def naive(vectors, queries, k, mask=None):
    """Rows by a sort of all products; equal ones by lower row."""
    products = queries.astype(np.float64) @ vectors.astype(np.float64).T
    if mask is not None:
        products[:, ~mask] = -np.inf
    rows = np.argsort(-products, axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(products, rows, 1)
    return values, np.where(np.isinf(values), -1, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_finds_nearly_all_and_only_what_it_may(kind):
    structure = Structure.build(kind, VECTORS)
    structure.setting = 64
    mask = np.random.default_rng(0).random(len(VECTORS)) < 0.5
    for allowed in (None, mask):
        similarities, rows = search(structure, VECTORS, QUERIES, 5, allowed)
        values, best = naive(VECTORS, QUERIES, 5, allowed)
        assert np.mean([len(set(a) & set(b)) for a, b in zip(rows, best, strict=True)]) > 4.5
        assert allowed is None or mask[rows].all()
        assert (np.diff(similarities, axis=1) <= 0).all()
        true = np.einsum("qd,qkd->qk", QUERIES, VECTORS[rows])
        assert np.allclose(similarities, true, atol=1e-5)  # those that pack vectors too
        assert kind != "exact" or np.allclose(similarities, values, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_added_later_are_found(kind):
    structure = Structure.build(kind, VECTORS[:1500])
    structure.setting = 64
    structure.add(VECTORS[1500:])
    assert len(structure) == len(VECTORS)
    assert structure.n_bytes > 1000
    _, rows = search(structure, VECTORS, VECTORS[1500:1510], 1)
    assert rows[:, 0].tolist() == list(range(1500, 1510))


@settings(max_examples=50)
@given(data=st.data(), n=st.integers(1, 60), k=st.integers(1, 70), piece=st.sampled_from([3, 1000]))
def test_some_rows_are_compared_exactly_with_ties_by_row(data, n, k, piece):
    numbers = st.lists(st.integers(-2, 2), min_size=3, max_size=3)
    vectors = np.array(data.draw(st.lists(numbers, min_size=n, max_size=n)), dtype=np.float32)
    queries = np.array(data.draw(st.lists(numbers, min_size=1, max_size=3)), dtype=np.float32)
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, n - 1)))), dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "ADD", piece)
        similarities, found = exactly(vectors, queries, k, rows)
    expected, best = naive(vectors, queries, k, np.isin(np.arange(n), rows))
    width = best.shape[1]
    assert found.shape == similarities.shape == (len(queries), k)
    assert np.array_equal(found[:, :width], best)
    assert np.array_equal(similarities[:, :width], expected)
    assert (found[:, width:] == -1).all()


def test_proposed_rows_are_ordered_by_their_exact_similarities():
    rows = np.array([[5, 3, -1, 9], [-1, -1, -1, 2]])
    similarities, found = rerank(VECTORS, QUERIES[:2], rows, 3)
    assert found[1].tolist() == [2, -1, -1]
    assert np.isneginf(similarities[1, 1:]).all()
    expected = sorted([5, 3, 9], key=lambda row: -float(VECTORS[row] @ QUERIES[0]))
    assert found[0].tolist() == expected


def test_recall_is_the_share_of_the_exact_neighbours():
    judge = Judge(VECTORS, 10)
    structure = Structure.build("ivf", VECTORS)
    structure.setting = 1
    _, found = structure.propose(VECTORS[judge.rows], 11)
    _, best = naive(VECTORS, VECTORS[judge.rows], 11)
    shares = []
    for row, one, other in zip(judge.rows, found, best, strict=True):
        shares.append(len((set(one[:11]) - {row}) & (set(other) - {row})) / 10)
    assert 0.3 < np.mean(shares) < 0.995
    assert judge.recall(structure) == pytest.approx(np.mean(shares), abs=0.005)
    assert judge.recall(judge.exact) == 1.0


def test_a_copy_of_a_neighbour_counts_as_well_as_the_neighbour():
    copies = np.repeat(VECTORS[:100], 20, axis=0)
    judge = Judge(copies, 10)
    assert judge.recall(Structure.build("sq8", copies)) == 1.0
    assert Judge(VECTORS[:1], 10).recall(Judge(VECTORS[:1], 10).exact) == 1.0


def test_exact_search_is_chosen_while_it_is_fast_enough():
    structure, tried = choose(VECTORS, max_ms=1000)
    assert structure.kind == "exact"
    assert [measured.kind for measured in tried] == ["exact"]
    assert tried[0].recall == 1.0
    assert tried[0].n_bytes == VECTORS.nbytes


def test_a_kind_that_keeps_to_the_budgets_is_chosen(monkeypatch):
    monkeypatch.setattr(Judge, "ms", lambda self, structure: 9.0 if structure.kind in ("exact", "ivf") else 1.0)
    structure, tried = choose(VECTORS, max_ms=2, recall=0.9)
    assert [measured.kind for measured in tried] == ["exact", "ivf", "hnsw"]
    assert structure.kind == "hnsw"
    assert tried[-1].recall >= 0.9
    structure, tried = choose(VECTORS, max_ms=2, max_bytes=VECTORS.nbytes / 3.5)
    assert [measured.kind for measured in tried] == ["exact", "sq8"]
    assert tried[-1].n_bytes <= VECTORS.nbytes / 3.5
    assert list(table(tried)["kind"]) == ["exact", "sq8"]


def test_the_smallest_setting_that_reaches_the_recall_is_taken():
    low, high = (choose(VECTORS, "ivf", recall=recall)[1][-1] for recall in (0.5, 0.99))
    assert low.setting < high.setting
    assert low.recall >= 0.5
    assert high.recall >= 0.99


def test_where_nothing_keeps_to_the_budgets_what_was_measured_is_said():
    with pytest.raises(
        UserError, match=r"no kind of index of 2,000 vectors keeps to 0 ms .*: exact .*; ivf .*; hnsw"
    ) as error:
        choose(VECTORS, max_ms=0.0)
    assert "\n" not in str(error.value)


def test_unknown_kinds_and_too_few_vectors_are_refused():
    with pytest.raises(UserError, match=r"parameter 'kind': found 'hsnw'; did you mean 'hnsw'\?"):
        choose(VECTORS, "hsnw")
    with pytest.raises(UserError, match="parameter 'kind': found 'ivf' for 255 vectors, expected at least 256"):
        choose(VECTORS[:255], "ivf")
    assert choose(VECTORS[:1], "exact")[0].kind == "exact"
    assert "recall@10 1.000" in told(choose(VECTORS)[1][0])
