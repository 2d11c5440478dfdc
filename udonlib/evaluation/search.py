"""Exact nearest-neighbour search by inner product in bounded memory, on CPU or GPU.

A pass of low-precision matrix products keeps only the highest similarity of every GROUP consecutive index rows. The k
best groups contain the k best rows, so only a few rows per query, those that the product's proven error leaves in
doubt, are compared again in float64. Nearly all time goes into the product: a top-k over all similarities, as slow as
the product itself on a CPU, never happens.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from udonlib.models.processors import lone_threads

Found = tuple[Tensor, Tensor, Tensor]  # similarities, positions, which queries are in doubt

GROUP = 16  # index rows per group: larger means fewer maxima to rank but more rows to compare again
SPARE_GROUPS = 26  # groups kept beyond the k best, so that the product's error hardly ever leaves a query in doubt
TILES = {"cpu": (512, 2048), "cuda": (4096, 16384)}  # (queries, index rows) of one product; CPU: within the cache
MAXIMA = {"cpu": 2**22, "cuda": 2**26}  # group maxima held before they are reduced to the best groups
MAX_THREADS = 16  # that search at the same time, each with a tile and maxima of its own
RERANKED = {"cpu": 2**19, "cuda": 2**25}  # numbers compared at once in float64

# Relative rounding of the factors of a "float32" product, by the backend's setting: float32, TensorFloat-32, bfloat16.
ROUNDING = {"ieee": 2.0**-24, "none": 2.0**-24, "tf32": 2.0**-10, "bf16": 2.0**-8}
BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


@torch.no_grad()
def nearest(
    queries: Float[Tensor, "query dim"],
    index: Float[Tensor, "item dim"],
    k: int,
    exclude: Int[Tensor, "query"] | None = None,
    at_least: Float[Tensor, "query"] | None = None,
) -> tuple[Float[Tensor, "query k"], Int[Tensor, "query k"]]:
    """Find the k index rows of highest inner product with each query, highest first; equal ones by lower position.

    Exact: rows are ordered by their inner products in float64. A product of lower precision, whose last bits change
    with the shape of a block, only proposes groups. It compares <q, x - m>, m the mean of the index, which ranks as
    <q, x> does and is smaller; its error e is bounded,

        e <= (2 r + o + (dim + 4) 2^-24) |q| max|x - m|

        r = rounding of the factors, o = of the result: 2^-24, 0 in true float32; 2^-8, 2^-8 in bfloat16

    A row can be one of the k best only if its group's maximum is at least the (k+1)-th highest one - 2 e. All groups
    that pass are compared; a query for which more may pass than were kept is searched again in float32, then in float64
    (error 2^29 times smaller), then with more groups. So the result depends neither on block sizes nor on ties between
    exact duplicates. A collapsed model, whose embeddings all but agree, costs the further passes; an index most of
    which is exactly equal is slow, never wrong. bfloat16 comes first where the processor multiplies it (AVX-512 or AMX:
    several times faster than float32).

    Memory above the embeddings: a copy of the index in the product's type (in bfloat16 half of a float32 index), about
    40 MB per thread on a CPU, some bytes per row for norms, and the result.

    Args:
        queries: finite, any norm and float type, on the index's device.
        index: the same.
        k: number of neighbours, >= 1; it may exceed the number of index rows.
        exclude: the index position of each query itself, which is never returned; -1 where it is not in the index.
        at_least: rows of lower similarity to a query are no neighbours of it: saves time where better ones are known.

    Returns:
        Similarities (float64) and positions. Where fewer than k rows remain: similarity -inf, position -1.

    Raises:
        ValueError: "k is 0; valid: at least 1", "index is empty", "queries: row 3 is not finite", and where
            dimensions, devices, excluded positions or lowest similarities do not fit.
    """
    device, dim = index.device, index.shape[1]
    if exclude is None:
        exclude = torch.full((len(queries),), -1, dtype=torch.int64, device=queries.device)
    if at_least is None:
        at_least = torch.full((len(queries),), -torch.inf, device=queries.device)
    _check_shapes(queries, index, k, exclude, at_least)
    lengths, longest = _norms(queries, "queries").double(), _norms(index, "index").max().double()
    centre = index.mean(dim=0, dtype=torch.promote_types(index.dtype, torch.float32))
    spread = max((part - centre).norm(dim=1, dtype=torch.float64).max() for part in index.split(2**16))
    # What the similarities themselves and <q, m> lose in float64, and what underflows in any product.
    rest = lengths * (dim + 8) * 2.0**-52 * (longest + centre.double().norm())
    rest += dim * 2.0**-126 * (1 + lengths + spread)

    similarities = queries.new_empty((len(queries), k), dtype=torch.float64)
    positions = torch.empty((len(queries), k), dtype=torch.int64, device=device)
    todo, n_groups, precisions = torch.arange(len(queries), device=device), k + 1 + SPARE_GROUPS, _precisions(index)
    while len(todo):
        precision = precisions.pop(0) if precisions else torch.float64
        error = _relative_error(precision, index) * lengths * spread + rest
        n_at_once = min(
            TILES[device.type][0], MAXIMA[device.type] // n_groups, RERANKED[device.type] // n_groups // GROUP
        )
        shifted = _shifted(index, centre, precision)
        search = partial(_search, queries, index, shifted, centre, error, at_least.double(), exclude, k, n_groups)
        blocks, unsettled = todo.split(max(1, n_at_once)), []
        for rows, (*found, in_doubt) in zip(blocks, _map(search, blocks, device), strict=True):
            similarities[rows], positions[rows] = found
            unsettled.append(rows[in_doubt])
        todo = torch.cat(unsettled)
        n_groups = n_groups if precisions else n_groups * 16
    return similarities, positions


def _map(work: Callable[[Tensor], Found], blocks: Sequence[Tensor], device: torch.device) -> Iterator[Found]:
    """Work on blocks in order; on a CPU, every thread works on blocks of its own.

    Threads that share each product wait for one another thousands of times a second, which a busy core makes slow.
    """
    n_threads = min(torch.get_num_threads(), MAX_THREADS, len(blocks))
    if device.type != "cpu" or n_threads == 1:
        yield from map(work, blocks)
        return
    with lone_threads(n_threads, "udonlib-search") as pool:
        yield from pool.map(work, blocks)


@torch.no_grad()
def _search(
    all_queries: Float[Tensor, "query dim"],
    index: Float[Tensor, "item dim"],
    shifted: Float[Tensor, "item dim"],
    centre: Float[Tensor, "dim"],
    error: Float[Tensor, "query"],
    at_least: Float[Tensor, "query"],
    exclude: Int[Tensor, "query"],
    k: int,
    n_groups: int,
    rows: Int[Tensor, "row"],
) -> Found:
    """Search for some rows of the queries; return similarities, positions, and which of the rows are in doubt."""
    queries = all_queries[rows]
    maxima, groups = _best_groups(queries, shifted, n_groups)
    offset, e, lowest = (queries.double() @ centre.double())[:, None], error[rows, None], at_least[rows, None]
    # k rows beside the query itself reach maximum k + 1 - e, and no row exceeds its group's maximum + e.
    enough = torch.maximum(maxima[:, min(k, maxima.shape[1] - 1), None] - 2 * e, lowest - offset - e)
    similarities, positions = _rerank(queries, index, groups.masked_fill(maxima < enough, -1), k, exclude[rows], lowest)
    worst = torch.maximum(similarities[:, -1:], lowest) - offset
    in_doubt = (maxima[:, -1:] + e >= worst)[:, 0]
    if groups.shape[1] * GROUP >= len(index):  # no group was left out
        in_doubt = torch.zeros_like(in_doubt)
    return similarities, positions, in_doubt


def _precisions(index: Float[Tensor, "item dim"]) -> list[torch.dtype]:
    """Return the float types of the products to try, one after another: bfloat16 first where it is fast."""
    device = index.device.type
    fast = False
    if device == "cpu" and len(index) > TILES["cpu"][1] and torch.backends.mkldnn.is_available():
        known = torch.cpu.get_capabilities()
        fast = known.get("avx512_bf16", False) or known.get("amx_bf16", False)
    return [torch.bfloat16] * fast + [torch.float32, torch.float64]


def _relative_error(precision: torch.dtype, index: Float[Tensor, "item dim"]) -> float:
    """Return the bound on the error of <q, x - m> in units of |q| max|x - m|."""
    n_sums = index.shape[1] + 4
    if precision == torch.float64:
        return (n_sums + 4) * 2.0**-53
    of_factors, of_result = 2.0**-8, 2.0**-8  # bfloat16, whose products are summed in float32
    if precision == torch.float32:
        backend = torch.backends.cuda if index.is_cuda else torch.backends.mkldnn
        of_factors, of_result = ROUNDING[backend.matmul.fp32_precision], 0.0
    return (1 + of_factors) ** 2 * (1 + of_result) * (1 + n_sums * 2.0**-24) - 1


def _shifted(index: Float[Tensor, "item dim"], centre: Float[Tensor, "dim"], precision: torch.dtype) -> Tensor:
    """Return index - centre in a float type; the difference itself is taken in at least float32 and that type."""
    shifted = torch.empty_like(index, dtype=precision)
    centre = centre.to(torch.promote_types(centre.dtype, precision))
    for source, target in zip(index.split(2**14), shifted.split(2**14), strict=True):
        target.copy_(source.to(centre.dtype) - centre)
    return shifted


def _best_groups(
    queries: Float[Tensor, "query dim"], index: Float[Tensor, "item dim"], n_groups: int
) -> tuple[Float[Tensor, "query group"], Int[Tensor, "query group"]]:
    """Return the highest maxima over GROUP consecutive rows, highest first, and the groups they belong to.

    index: minus its mean, in the float type of the product. A negative maximum counts as 0: floats from 0 up have the
    order of their bits, read as integers, and the highest integers are found several times faster. The maximum of a
    whole index is hardly ever negative, since its mean was taken off.
    """
    n_queries, n_items, bits = len(queries), len(index), BITS[index.dtype]
    _, n_rows = TILES[index.device.type]
    n_maxima = max(n_rows // GROUP, MAXIMA[index.device.type] // n_queries)  # per query, held at once
    n_maxima = min(n_maxima, -(-n_items // GROUP))
    transposed = queries.to(index.dtype).T
    tile = transposed.new_empty((min(n_rows, n_maxima * GROUP), n_queries))
    buffer = torch.empty((n_maxima, n_queries), dtype=bits, device=index.device)
    maxima, groups = buffer[:0], torch.empty((0, n_queries), dtype=torch.int64, device=index.device)
    for first in range(0, n_items, n_maxima * GROUP):
        last = min(first + n_maxima * GROUP, n_items)
        for start in range(first, last, len(tile)):
            rows = index[start : min(start + len(tile), last)]
            n_padded = -(-len(rows) // GROUP) * GROUP
            with torch.autocast(index.device.type, enabled=False):
                torch.mm(rows, transposed, out=tile[: len(rows)])
            tile[len(rows) : n_padded] = 0  # the last group of the index may be short
            at = (start - first) // GROUP
            of_groups = tile[:n_padded].view(bits).view(-1, GROUP, n_queries)
            torch.amax(of_groups, 1, out=buffer[at : at + n_padded // GROUP])
        n_new = -(-(last - first) // GROUP)
        new_maxima, new_groups = _highest(buffer[:n_new].clamp_(min=0), n_groups)
        maxima, groups = torch.cat([maxima, new_maxima]), torch.cat([groups, new_groups + first // GROUP])
        maxima, best = maxima.topk(min(n_groups, len(maxima)), dim=0)
        groups = groups.gather(0, best)
    return maxima.view(index.dtype).double().T, groups.T


def _highest(values: Int[Tensor, "row query"], n: int) -> tuple[Int[Tensor, "best query"], Int[Tensor, "best query"]]:
    """Return the n highest of each column, highest first, and their rows.

    Of many rows, only those in the n blocks of highest maxima are ranked: top-k is slow, the maximum is not.
    """
    n_blocks = len(values) // GROUP
    if n_blocks <= 2 * n:
        return values.topk(min(n, len(values)), dim=0)
    whole, rest = values[: n_blocks * GROUP].view(n_blocks, GROUP, -1), values[n_blocks * GROUP :]
    blocks = whole.amax(dim=1).topk(n, dim=0).indices
    rows = (blocks[:, None] * GROUP + torch.arange(GROUP, device=values.device)[:, None]).flatten(0, 1)
    beyond = torch.arange(n_blocks * GROUP, len(values), device=values.device)[:, None].expand(
        len(rest), values.shape[1]
    )
    rows = torch.cat([rows, beyond])
    highest, best = values.gather(0, rows).topk(n, dim=0)
    return highest, rows.gather(0, best)


def _rerank(
    queries: Float[Tensor, "query dim"],
    index: Float[Tensor, "item dim"],
    groups: Int[Tensor, "query group"],
    k: int,
    exclude: Int[Tensor, "query"],
    lowest: Float[Tensor, "query 1"],
) -> tuple[Float[Tensor, "query k"], Int[Tensor, "query k"]]:
    """Return the k best rows within each query's groups by float64 inner product, ties by lower position.

    groups: -1 for one that needs no comparison. lowest: lower similarities count as absent.
    """
    n_width = int((groups >= 0).sum(dim=1).max())
    groups = groups.sort(dim=1, descending=True).values[:, :n_width].flip(1)  # ascending; the absent ones come first
    who, where = (groups >= 0).nonzero(as_tuple=True)
    within = torch.arange(GROUP, device=index.device)
    products = torch.full((*groups.shape, GROUP), -torch.inf, dtype=torch.float64, device=index.device)
    for part in torch.arange(len(who), device=index.device).split(
        max(1, RERANKED[index.device.type] // (GROUP * index.shape[1]))
    ):
        rows = (groups[who[part], where[part], None] * GROUP + within).clamp(max=len(index) - 1)
        products[who[part], where[part]] = (index[rows].double() * queries[who[part], None].double()).sum(dim=-1)
    candidates = (groups[:, :, None] * GROUP + within).flatten(1)
    products = products.flatten(1)
    absent = (candidates >= len(index)) | (candidates == exclude[:, None]) | (products < lowest)
    products.masked_fill_(absent, -torch.inf)
    # Positions ascend, so that a stable sort leaves equal similarities in their order.
    ranked, order = products.sort(dim=1, descending=True, stable=True)
    similarities, positions = ranked[:, :k], candidates.gather(1, order[:, :k])
    missing = (0, k - similarities.shape[1])
    similarities = torch.nn.functional.pad(similarities, missing, value=-torch.inf)
    positions = torch.nn.functional.pad(positions, missing, value=-1)
    return similarities, positions.masked_fill_(similarities == -torch.inf, -1)


def _norms(vectors: Float[Tensor, "row dim"], name: str) -> Float[Tensor, "row"]:
    norms = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.promote_types(vectors.dtype, torch.float32))
    bad = ~(norms < 2.0**60)  # also true of NaN; the product of two norms must stay finite in float32
    if bad.any():
        row = int(bad.nonzero()[0])
        n_bad, kind = int(bad.sum()), "too large (norm above 2^60)" if vectors[row].isfinite().all() else "not finite"
        raise ValueError(f"{name}: row {row} is {kind}; {n_bad} of {len(vectors)} rows are unusable")
    return norms


def _check_shapes(queries: Tensor, index: Tensor, k: int, exclude: Tensor, at_least: Tensor) -> None:
    if k < 1:
        raise ValueError(f"k is {k}; valid: at least 1")
    if queries.ndim != 2 or index.ndim != 2 or queries.shape[1] != index.shape[1]:
        found = f"queries {list(queries.shape)} and index {list(index.shape)}"
        raise ValueError(f"{found} do not fit; valid: [query, dim] and [item, dim]")
    if len(index) == 0 or index.shape[1] == 0:
        raise ValueError(f"index is empty: {list(index.shape)}; valid: at least one row of at least one dimension")
    if queries.device != index.device:
        raise ValueError(f"queries are on {queries.device}, index is on {index.device}; valid: one device")
    if exclude.shape != queries.shape[:1]:
        raise ValueError(f"exclude has shape {list(exclude.shape)}; valid: one position per query, [{len(queries)}]")
    if at_least.shape != queries.shape[:1]:
        raise ValueError(f"at_least has shape {list(at_least.shape)}; valid: one value per query, [{len(queries)}]")
    if len(exclude) and (int(exclude.min()) < -1 or int(exclude.max()) >= len(index)):
        found = f"exclude runs from {int(exclude.min())} to {int(exclude.max())}"
        raise ValueError(f"{found}; valid: -1 to {len(index) - 1}")
