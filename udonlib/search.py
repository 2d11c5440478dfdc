"""Exact nearest-neighbour search by inner product in bounded memory, on CPU or GPU.

One pass of float32 matrix products keeps only the highest similarity of every GROUP consecutive index rows. The k best
groups contain the k best rows, so only a few rows per query are compared again, in float64. The time goes into the
matrix product: a top-k over all similarities, as slow as the product itself on a CPU, never happens.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

GROUP = 16  # index rows per group: larger means fewer maxima to rank but more rows to compare again
SPARE_GROUPS = 2  # groups kept beyond the k best, so that rounding in the product hardly ever matters
TILES = {"cpu": (512, 2048), "cuda": (4096, 16384)}  # (queries, index rows) of one product; CPU: within the cache
MAXIMA = {"cpu": 2**22, "cuda": 2**26}  # group maxima held before they are reduced to the best groups
RERANKED = {"cpu": 2**19, "cuda": 2**25}  # numbers compared at once in float64

# Relative rounding of the factors of a "float32" product, by the backend's setting: float32, TensorFloat-32, bfloat16.
ROUNDING = {"ieee": 2.0**-24, "none": 2.0**-24, "tf32": 2.0**-10, "bf16": 2.0**-8}


@torch.no_grad()
def nearest(
    queries: Float[Tensor, "query dim"],
    index: Float[Tensor, "item dim"],
    k: int,
    exclude: Int[Tensor, "query"] | None = None,
) -> tuple[Float[Tensor, "query k"], Int[Tensor, "query k"]]:
    """Find the k index rows of highest inner product with each query, highest first; equal ones by lower position.

    Exact: rows are ordered by their inner products in float64. The float32 product, whose last bits change with the
    shape of a block, only proposes groups; its error e is bounded,

        e <= (2 r + (dim + 2) 2^-24) |q| max|x|,   r = rounding of the factors, 2^-24 in true float32

    and a query whose next group lies within 2 e of its k-th best one is searched again with a float64 product, whose
    bound is 2^29 times smaller, and then with more groups. So the result depends neither on block sizes nor on ties
    between exact duplicates. A collapsed model, whose embeddings all but agree, costs the second pass; an index most of
    which is exactly equal is slow, never wrong.

    Memory above the embeddings: about 40 MB on a CPU, some bytes per row for norms, and the result.

    Args:
        queries: finite, any norm and float type, on the index's device.
        index: the same.
        k: number of neighbours, >= 1; it may exceed the number of index rows.
        exclude: the index position of each query itself, which is never returned; -1 where it is not in the index.

    Returns:
        Similarities (float64) and positions. Where fewer than k rows remain: similarity -inf, position -1.

    Raises:
        ValueError: "k is 0; valid: at least 1", "index is empty", "queries: row 3 is not finite", and where
            dimensions, devices or excluded positions do not fit.
    """
    if exclude is None:
        exclude = torch.full((len(queries),), -1, dtype=torch.int64, device=queries.device)
    _check_shapes(queries, index, k, exclude)
    query_norms, index_norm = _norms(queries, "queries"), _norms(index, "index").max()
    dim = index.shape[1]
    backend = torch.backends.cuda if index.is_cuda else torch.backends.mkldnn
    rounding = {
        torch.float32: 2 * ROUNDING[backend.matmul.fp32_precision] + (dim + 2) * 2.0**-24,
        torch.float64: (dim + 8) * 2.0**-53,
    }
    underflow = dim * 2.0**-126 * (1 + query_norms + index_norm)

    similarities = queries.new_empty((len(queries), k), dtype=torch.float64)
    positions = torch.empty((len(queries), k), dtype=torch.int64, device=queries.device)
    todo, n_groups, precision = torch.arange(len(queries), device=queries.device), k + 1 + SPARE_GROUPS, torch.float32
    while len(todo):
        error = rounding[precision] * query_norms.double() * index_norm.double() + underflow
        n_at_once = min(TILES[index.device.type][0], max(1, MAXIMA[index.device.type] // n_groups))
        unsettled = []
        for rows in todo.split(n_at_once):
            maxima, groups = _best_groups(queries[rows], index, n_groups, precision)
            similarities[rows], positions[rows] = _rerank(queries[rows], index, groups, k, exclude[rows])
            if groups.shape[1] * GROUP < len(index):  # else every row was compared
                # Every row outside is at most the last maximum + e; k rows beside the query reach maximum k + 1 - e.
                unsettled.append(rows[maxima[:, -1] + 2 * error[rows] >= maxima[:, k]])
        todo = torch.cat(unsettled) if unsettled else todo[:0]
        n_groups = n_groups if precision == torch.float32 else n_groups * 16
        precision = torch.float64
    return similarities, positions


def _best_groups(
    queries: Float[Tensor, "query dim"], index: Float[Tensor, "item dim"], n_groups: int, precision: torch.dtype
) -> tuple[Float[Tensor, "query group"], Int[Tensor, "query group"]]:
    """Return the highest maxima over GROUP consecutive rows, highest first, and the groups they belong to.

    precision: float type of the product.
    """
    n_queries, n_items = len(queries), len(index)
    _, n_rows = TILES[index.device.type]
    n_maxima = max(n_rows // GROUP, MAXIMA[index.device.type] // n_queries)  # per query, held at once
    n_maxima = min(n_maxima, -(-n_items // GROUP))
    transposed = queries.to(precision).T
    tile = transposed.new_empty((min(n_rows, n_maxima * GROUP), n_queries))
    buffer = transposed.new_empty((n_maxima, n_queries))
    maxima, groups = buffer[:0], torch.empty((0, n_queries), dtype=torch.int64, device=index.device)
    for first in range(0, n_items, n_maxima * GROUP):
        last = min(first + n_maxima * GROUP, n_items)
        for start in range(first, last, len(tile)):
            rows = index[start : min(start + len(tile), last)].to(precision)
            n_padded = -(-len(rows) // GROUP) * GROUP
            with torch.autocast(index.device.type, enabled=False):
                torch.mm(rows, transposed, out=tile[: len(rows)])
            tile[len(rows) : n_padded] = -torch.inf  # the last group of the index may be short
            at = (start - first) // GROUP
            torch.amax(tile[:n_padded].view(-1, GROUP, n_queries), 1, out=buffer[at : at + n_padded // GROUP])
        n_new = -(-(last - first) // GROUP)
        new_maxima, new_groups = buffer[:n_new].topk(min(n_groups, n_new), dim=0)
        maxima, groups = torch.cat([maxima, new_maxima]), torch.cat([groups, new_groups + first // GROUP])
        maxima, best = maxima.topk(min(n_groups, len(maxima)), dim=0)
        groups = groups.gather(0, best)
    return maxima.T, groups.T


def _rerank(
    queries: Float[Tensor, "query dim"],
    index: Float[Tensor, "item dim"],
    groups: Int[Tensor, "query group"],
    k: int,
    exclude: Int[Tensor, "query"],
) -> tuple[Float[Tensor, "query k"], Int[Tensor, "query k"]]:
    """Return the k best rows within each query's groups by float64 inner product, ties by lower position."""
    dim, n_candidates = index.shape[1], groups.shape[1] * GROUP
    n_numbers = RERANKED[index.device.type]
    n_columns = max(1, n_numbers // dim)
    similarities, positions = [], []
    for chunk in torch.arange(len(queries), device=queries.device).split(max(1, n_numbers // (dim * n_candidates))):
        vectors = queries[chunk].double()[:, None, :]
        # Ascending positions, so that a stable sort leaves equal similarities in the order of their positions.
        candidates = groups[chunk].sort(dim=1).values[:, :, None] * GROUP + torch.arange(GROUP, device=index.device)
        candidates = candidates.flatten(1)
        absent = (candidates >= len(index)) | (candidates == exclude[chunk, None])
        rows = candidates.clamp(max=len(index) - 1)
        parts = [(index[part].double() * vectors).sum(dim=-1) for part in rows.split(n_columns, dim=1)]
        products = torch.cat(parts, dim=1).masked_fill_(absent, -torch.inf)
        ranked, order = products.sort(dim=1, descending=True, stable=True)
        similarities.append(ranked[:, :k])
        positions.append(candidates.gather(1, order[:, :k]).masked_fill_(ranked[:, :k] == -torch.inf, -1))
    missing = (0, max(0, k - n_candidates))
    pad = torch.nn.functional.pad
    return pad(torch.cat(similarities), missing, value=-torch.inf), pad(torch.cat(positions), missing, value=-1)


def _norms(vectors: Float[Tensor, "row dim"], name: str) -> Float[Tensor, "row"]:
    norms = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.promote_types(vectors.dtype, torch.float32))
    bad = ~(norms < 2.0**60)  # also true of NaN; the product of two norms must stay finite in float32
    if bad.any():
        row = int(bad.nonzero()[0])
        n_bad, kind = int(bad.sum()), "too large (norm above 2^60)" if vectors[row].isfinite().all() else "not finite"
        raise ValueError(f"{name}: row {row} is {kind}; {n_bad} of {len(vectors)} rows are unusable")
    return norms


def _check_shapes(queries: Tensor, index: Tensor, k: int, exclude: Tensor) -> None:
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
    if len(exclude) and (int(exclude.min()) < -1 or int(exclude.max()) >= len(index)):
        found = f"exclude runs from {int(exclude.min())} to {int(exclude.max())}"
        raise ValueError(f"{found}; valid: -1 to {len(index) - 1}")
