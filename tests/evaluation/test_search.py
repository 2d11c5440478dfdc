"""Search against sorting all inner products in float64."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from udonlib.evaluation import search
from udonlib.evaluation.search import nearest


def sort_everything(queries, index, k, exclude=None):
    """The definition: all inner products in float64, sorted, equal ones by position, the query itself left out."""
    similarities, positions = [], []
    for row, query in enumerate(queries):
        products = (index.double() * query.double()).sum(dim=1).tolist()
        ranked = sorted((-value, i) for i, value in enumerate(products) if exclude is None or i != exclude[row])[:k]
        ranked += [(float("inf"), -1)] * (k - len(ranked))
        similarities.append([-value for value, _ in ranked])
        positions.append([i for _, i in ranked])
    return torch.tensor(similarities, dtype=torch.float64), torch.tensor(positions)


def unit(n, dim, seed=0):
    vectors = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


@settings(deadline=None, max_examples=60)
@given(
    n_queries=st.integers(1, 9),
    n_items=st.integers(1, 150),
    n_distinct=st.integers(1, 150),
    dim=st.integers(1, 7),
    k=st.integers(1, 12),
    tile=st.tuples(st.integers(1, 5), st.sampled_from([16, 32, 64])),
    seed=st.integers(0, 2**20),
)
def test_nearest_equals_sorting_everything_whatever_the_block_sizes(n_queries, n_items, n_distinct, dim, k, tile, seed):
    generator = torch.Generator().manual_seed(seed)
    # Few distinct rows and few distinct values: many exact ties.
    distinct = torch.randint(-2, 3, (n_distinct, dim), generator=generator) / 4
    index = distinct[torch.randint(n_distinct, (n_items,), generator=generator)]
    exclude = torch.randint(-1, n_items, (n_queries,), generator=generator)
    queries = torch.where(exclude[:, None] >= 0, index[exclude], torch.randn(n_queries, dim, generator=generator))
    expected = sort_everything(queries, index, k, exclude.tolist())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(search.TILES, "cpu", tile)
        patch.setitem(search.MAXIMA, "cpu", 16)
        patch.setitem(search.RERANKED, "cpu", 64)
        found = nearest(queries, index, k, exclude)
    torch.testing.assert_close(found[0], expected[0])
    # Ties are ties of the float64 sum, so positions may differ from the loop's only where that sum is rounded.
    exact = (found[0] == expected[0]).all(dim=1)
    assert exact.float().mean() == 1 or dim > 2
    assert torch.equal(found[1][exact], expected[1][exact])


def test_blocks_of_any_size_give_the_same_bits(monkeypatch):
    queries, index = unit(700, 64), unit(5000, 64, seed=1)
    whole = nearest(queries, index, 6)
    for tile, maxima, reranked in [((7, 16), 16, 64), ((512, 4096), 2**22, 2**12), ((100, 1024), 2**10, 2**22)]:
        monkeypatch.setitem(search.TILES, "cpu", tile)
        monkeypatch.setitem(search.MAXIMA, "cpu", maxima)
        monkeypatch.setitem(search.RERANKED, "cpu", reranked)
        similarities, positions = nearest(queries, index, 6)
        assert torch.equal(similarities, whole[0])
        assert torch.equal(positions, whole[1])


def test_copies_of_a_query_are_found_in_the_order_of_their_positions_and_only_itself_is_left_out():
    index = unit(300, 16)
    index[[20, 150, 151, 299]] = index[40].clone()
    similarities, positions = nearest(index[[40, 151]], index, 4, torch.tensor([40, 151]))
    assert positions.tolist() == [[20, 150, 151, 299], [20, 40, 150, 299]]
    assert (similarities[0] == similarities[0, 0]).all()


def test_an_index_of_equal_rows_is_searched_exactly():
    index = unit(1, 8).expand(1000, 8).contiguous()
    _, positions = nearest(index[:3], index, 5, torch.arange(3))
    assert positions.tolist() == [[1, 2, 3, 4, 5], [0, 2, 3, 4, 5], [0, 1, 3, 4, 5]]


def test_neighbours_closer_than_float32_can_tell_are_ranked_by_float64():
    index = torch.full((400, 2), 0.0, dtype=torch.float64)
    index[:, 0] = 1 - 1e-12 * torch.arange(400, dtype=torch.float64).flip(0)
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert nearest(query, index, 5)[1].tolist() == [[399, 398, 397, 396, 395]]


def test_a_lower_product_precision_changes_nothing():
    queries, index = unit(60, 64), unit(3000, 64, seed=1)
    expected = nearest(queries, index, 5)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = nearest(queries, index, 5)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_a_product_with_errors_as_large_as_allowed_still_gives_the_exact_neighbours(monkeypatch):
    queries, index = unit(40, 3), unit(2000, 3, seed=1)  # three dimensions: neighbours lie close together
    expected = nearest(queries, index, 5)
    multiply = torch.mm

    def rough(a, b, *, out):
        noise = torch.rand(out.shape, generator=torch.Generator().manual_seed(len(a)))
        size = 0.007 if out.dtype == torch.float32 else 0  # the float64 product has a bound of its own
        return multiply(a, b, out=out).add_((2 * noise - 1) * size)

    monkeypatch.setattr(torch, "mm", rough)
    monkeypatch.setitem(search.ROUNDING, torch.backends.mkldnn.matmul.fp32_precision, 2.0**-8)
    found = nearest(queries, index, 5)
    assert torch.equal(found[1], expected[1])
    monkeypatch.setitem(search.ROUNDING, torch.backends.mkldnn.matmul.fp32_precision, 2.0**-24)
    assert not torch.equal(nearest(queries, index, 5)[1], expected[1])  # the noise is large enough to matter


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_compared_as_they_are(dtype):
    queries, index = unit(20, 32).to(dtype), unit(700, 32, seed=1).to(dtype)
    found, expected = nearest(queries, index, 5), sort_everything(queries, index, 5)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0])


def test_fewer_items_than_k_are_padded():
    similarities, positions = nearest(unit(1, 4), unit(2, 4, seed=1), 4, torch.tensor([1]))
    assert positions[0, 0].item() == 0
    assert positions[0, 1:].tolist() == [-1, -1, -1]
    assert similarities[0, 1:].tolist() == [-torch.inf] * 3


def test_no_queries_give_an_empty_result():
    similarities, positions = nearest(unit(0, 4), unit(2, 4), 3)
    assert similarities.shape == positions.shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0; valid: at least 1"),
        ({"index": torch.zeros(0, 4)}, "index is empty"),
        ({"exclude": torch.tensor([0, 9])}, "exclude runs from 0 to 9; valid: -1 to 4"),
        ({"exclude": torch.tensor([-2, 1])}, "exclude runs from -2 to 1; valid: -1 to 4"),
        ({"queries": torch.tensor([[1.0, 0, 0, 0], [torch.nan, 0, 0, 0]])}, "queries: row 1 is not finite; 1 of 2"),
        ({"index": torch.full((5, 4), torch.inf)}, "index: row 0 is not finite; 5 of 5"),
        ({"queries": torch.full((2, 4), 1e30)}, r"queries: row 0 is too large \(norm above 2\^60\)"),
    ],
)
def test_bad_input_is_refused_with_one_clear_message(change, message):
    arguments = {"queries": torch.ones(2, 4), "index": torch.ones(5, 4), "k": 2} | change
    with pytest.raises(ValueError, match=message):
        nearest(**arguments)


@pytest.mark.parametrize(
    ("index", "exclude", "message"),
    [
        (torch.zeros(5, 3), torch.tensor([0, 0]), r"queries \[2, 4\] and index \[5, 3\] do not fit"),
        (torch.zeros(5, 4), torch.tensor([0]), r"exclude has shape \[1\]; valid: one position per query, \[2\]"),
        (torch.zeros(5, 4, device="meta"), torch.tensor([0, 0]), "queries are on cpu, index is on meta"),
    ],
)
def test_shapes_and_devices_that_do_not_fit_are_refused(index, exclude, message):
    with pytest.raises(ValueError, match=message):  # nearest itself: the tests' shape checks would come first
        search._check_shapes(torch.zeros(2, 4), index, 1, exclude, torch.zeros(2))


MEASURE = """
from pathlib import Path
import torch
from udonlib.evaluation.search import nearest
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
queries, index = torch.rand(2000, 64, generator=generator), torch.randn({n}, 64, generator=generator)
nearest(queries[:600], index[:2000], 5)  # libraries allocate at their first use
kib = lambda name: int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = kib("VmRSS")
nearest(queries, index, 5)
print((kib("VmHWM") - before) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("n", [20_000, 200_000])
def test_memory_above_the_embeddings_stays_small_for_small_and_large_indexes(n):
    """All similarities would take 160 MB and 1.6 GB."""
    done = subprocess.run([sys.executable, "-c", MEASURE.format(n=n)], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 100


def passes_of(monkeypatch):
    """Record the queries and the float type of every product that the search makes."""
    passes = []
    original = search._best_groups
    monkeypatch.setattr(search, "_best_groups", lambda *a: (passes.append((len(a[0]), a[1].dtype)), original(*a))[1])
    return passes


def crowded(n, dim, spread):
    """Embeddings of a collapsed model: all but the same direction."""
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.ones(n, dim) + spread * torch.randn(n, dim, generator=generator), dim=1)


def test_embeddings_of_a_collapsed_model_are_searched_exactly_by_more_precise_products(monkeypatch):
    monkeypatch.setattr(search, "_precisions", lambda index: [torch.bfloat16, torch.float32, torch.float64])
    collapsed = crowded(3000, 32, 1e-5)
    queries, index = collapsed[:50], collapsed[50:]
    passes = passes_of(monkeypatch)
    similarities, positions = nearest(queries, index, 5)
    exact = queries.double() @ index.double().T
    assert torch.equal(positions, exact.sort(dim=1, descending=True, stable=True).indices[:, :5])
    torch.testing.assert_close(similarities, exact.gather(1, positions))
    assert passes == [(50, torch.bfloat16), (50, torch.float32)]


def test_queries_that_a_product_leaves_in_doubt_are_searched_again_more_precisely(monkeypatch):
    monkeypatch.setattr(search, "_precisions", lambda index: [torch.bfloat16, torch.float32, torch.float64])
    queries, index = unit(40, 16), unit(3000, 16, seed=1)
    # 1,000 rows so near to the first query that bfloat16 cannot tell them apart; rows of a group are far from another.
    index[::3] = torch.nn.functional.normalize(queries[0] + 1e-3 * index[::3], dim=1)
    passes = passes_of(monkeypatch)
    similarities, positions = nearest(queries, index, 5)
    exact = queries.double() @ index.double().T
    assert torch.equal(positions, exact.sort(dim=1, descending=True, stable=True).indices[:, :5])
    torch.testing.assert_close(similarities, exact.gather(1, positions))
    assert [dtype for _, dtype in passes] == [torch.bfloat16, torch.float32, torch.float64]
    assert passes[0][0] == 40
    assert 1 <= passes[2][0] <= passes[1][0] < 40


@settings(deadline=None, max_examples=60)
@given(dim=st.integers(1, 70), scale=st.floats(1e-3, 1e3), shift=st.floats(0, 10), seed=st.integers(0, 2**20))
def test_the_errors_of_every_product_stay_within_their_bound(dim, scale, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(5, dim, generator=generator)
    index = scale * torch.randn(48, dim, generator=generator) + shift
    centre = index.mean(dim=0)
    away = index.double() - centre.double()
    exact = (queries.double() @ away.T).unflatten(1, (-1, search.GROUP)).amax(dim=2).clamp(min=0)
    bound = queries.double().norm(dim=1) * away.norm(dim=1).max()
    for precision in search.BITS:
        maxima, groups = search._best_groups(queries, search._shifted(index, centre, precision), 3)
        error = (maxima - exact.gather(1, groups)).abs().amax(dim=1)
        assert (error <= search._relative_error(precision, index) * bound + 1e-30).all(), precision


@pytest.mark.parametrize("n_threads", [1, 3])
def test_neighbours_below_the_least_wanted_similarity_are_left_out(n_threads):
    queries, index = unit(2000, 16), unit(3000, 16, seed=1)
    similarities, positions = nearest(queries, index, 5)
    at_least = similarities[:, 2].clone()
    at_least[::7] = -torch.inf
    wanted = similarities >= at_least[:, None]
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        found = nearest(queries, index, 5, at_least=at_least)
        assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], similarities.masked_fill(~wanted, -torch.inf))
    assert torch.equal(found[1], positions.masked_fill(~wanted, -1))
