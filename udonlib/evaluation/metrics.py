"""Retrieval metrics of single queries from ranked relevance: pure functions, no embeddings, no search."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def r_at_k(relevant: Bool[Tensor, "query rank"], k: int = 1) -> Float[Tensor, "query"]:
    """Recall at k of each query: 1 where one of the k nearest neighbours is relevant, else 0.

    A query without any relevant index item has no relevant neighbour either, so it counts as 0.
    Source: UnED (ICCV 2023) sec. 3 for k = 1, pinned by golden/knn.npz; for other k, metric learning's Recall@k.

    Args:
        relevant: whether the neighbour at each rank, nearest first, is relevant; absent neighbours are False.
        k: number of neighbours that count, 1 .. number of ranks.

    Raises:
        ValueError: "k is 7, but relevant has 5 ranks; valid: 1 to 5".
    """
    _check(k, relevant)
    return relevant[:, :k].any(dim=1).float()


def mmp_at_k(
    relevant: Bool[Tensor, "query rank"], n_positives: Int[Tensor, "query"], k: int = 5
) -> Float[Tensor, "query"]:
    """Modified mean precision at k of each query, in [0, 1].

        mMP@k = (relevant among the first min(k, n)) / min(k, n),   0 where n = 0

    n is the number of relevant index items, the query itself excluded, so that a class with fewer than k other
    images can still score 1. Source: UnED (ICCV 2023) sec. 3; pinned by golden/knn.npz.

    Args:
        relevant: whether the neighbour at each rank, nearest first, is relevant; absent neighbours are False.
        n_positives: number n of relevant index items of each query, >= 0.
        k: number of neighbours that count, 1 .. number of ranks.

    Raises:
        ValueError: "k is 7, but relevant has 5 ranks; valid: 1 to 5".
    """
    _check(k, relevant)
    n_counted = n_positives.clamp(max=k)
    counted = torch.arange(k, device=relevant.device) < n_counted[:, None]
    n_hits = (relevant[:, :k] & counted).sum(dim=1)
    return n_hits.float() / n_counted.clamp(min=1)


def map_at_k(
    relevant: Bool[Tensor, "query rank"], n_positives: Int[Tensor, "query"], k: int = 5
) -> Float[Tensor, "query"]:
    """Average precision at k of each query, in [0, 1]; mAP@k is its mean.

        AP@k = 1 / min(k, n) sum over j = 1..k of rel(j) P(j),   0 where n = 0
        P(j) = (relevant among the first j) / j

    Unlike mMP@k it counts what stands behind rank n, and is the larger the earlier right neighbours come. Divided by
    min(k, n), not n, so that a class of more than k images can score 1. Source: Google Landmarks v2 (CVPR 2020) sec. 4.

    Args and Raises: of `mmp_at_k`.
    """
    _check(k, relevant)
    hits = relevant[:, :k].float()
    precision = hits.cumsum(dim=1) / torch.arange(1, k + 1, device=hits.device)
    return (hits * precision).sum(dim=1) / n_positives.clamp(min=1, max=k)


def measure(
    name: str, relevant: Bool[Tensor, "query rank"], n_positives: Int[Tensor, "query"]
) -> Float[Tensor, "query"]:
    """A metric of each query by its name: `r_at_<k>`, `mmp_at_<k>` or `map_at_<k>`, in [0, 1].

    Raises:
        ValueError: a name that is none of these; a k beyond the ranks.
    """
    kind, k = name.partition("_at_")[0], ranks_of(name)
    if kind == "r":
        return r_at_k(relevant, k)
    if kind not in ("mmp", "map"):
        raise ValueError(f"metric is {name!r}; valid: r_at_<k>, mmp_at_<k>, map_at_<k>")
    return (mmp_at_k if kind == "mmp" else map_at_k)(relevant, n_positives, k)


def ranks_of(name: str) -> int:
    """How many neighbours the metric of this name looks at."""
    return int(name.rpartition("_at_")[2])


def _check(k: int, relevant: Tensor) -> None:
    n_ranks = relevant.shape[1]
    if not 1 <= k <= n_ranks:
        raise ValueError(f"k is {k}, but relevant has {n_ranks} ranks; valid: 1 to {n_ranks}")


def relevance(
    positions: Int[Tensor, "query rank"],
    query_labels: Int[Tensor, "query query_label"],
    query_domains: Int[Tensor, "query"],
    index_labels: Int[Tensor, "item item_label"],
    index_domains: Int[Tensor, "item"],
) -> Bool[Tensor, "query rank"]:
    """Say which neighbours are relevant: same domain, and at least one label shared.

    Pinned by golden/knn.npz (labels that several domains use; queries with several labels).

    Args:
        positions: neighbours as positions in the index; -1 for an absent one, which is never relevant.
        query_labels, index_labels: labels >= 0 within the domain, padded with -1.
        query_domains, index_domains: a number per domain.
    """
    shared = torch.zeros_like(positions, dtype=torch.bool)
    for column in range(query_labels.shape[1]):  # one label of each query at a time keeps this small
        label = query_labels[:, column, None, None]
        shared |= ((index_labels[positions] == label) & (label >= 0)).any(dim=-1)
    return shared & (index_domains[positions] == query_domains[:, None]) & (positions >= 0)


def count_positives(
    query_labels: Int[Tensor, "query query_label"],
    query_domains: Int[Tensor, "query"],
    index_labels: Int[Tensor, "item item_label"],
    index_domains: Int[Tensor, "item"],
    exclude: Int[Tensor, "query"] | None = None,
) -> Int[Tensor, "query"]:
    """Count the relevant index items of each query, itself excluded; an item that shares several labels counts once.

    Items are grouped by (domain, label), so that time and memory grow with the items, not with queries x items.
    Pinned by golden/knn.npz.

    Args:
        query_labels, index_labels, query_domains, index_domains: as for `relevance`.
        exclude: position of each query in the index, -1 where it is not there.
    """
    # A label named twice by one item counts once; labels become numbers without gaps, so that (domain, label) is one.
    index_labels = index_labels.sort(dim=1).values
    twice = torch.zeros_like(index_labels, dtype=torch.bool)
    twice[:, 1:] = index_labels[:, 1:] == index_labels[:, :-1]
    held = (index_labels >= 0) & ~twice
    known, index_numbers = index_labels[held].unique(return_inverse=True)
    items = held.nonzero()[:, 0]
    keys, order = (index_domains[items] * len(known) + index_numbers).sort(stable=True)
    items = items[order]

    query_numbers = torch.searchsorted(known, query_labels).clamp(max=max(0, len(known) - 1))
    exists = (known[query_numbers] == query_labels) if len(known) else torch.zeros_like(query_labels, dtype=torch.bool)
    query_keys = (query_domains[:, None] * len(known) + query_numbers).masked_fill(~exists, -1)
    first, last = torch.searchsorted(keys, query_keys), torch.searchsorted(keys, query_keys, right=True)
    counts = (last - first).sum(dim=1)

    # A query with several labels may meet an item in more than one of them, or name one twice: count its items.
    for query in (exists.sum(dim=1) > 1).nonzero()[:, 0].tolist():
        spans = zip(first[query].tolist(), last[query].tolist(), strict=True)
        counts[query] = torch.cat([items[begin:end] for begin, end in spans]).unique().numel()
    if exclude is not None:
        itself = relevance(exclude[:, None], query_labels, query_domains, index_labels, index_domains)[:, 0]
        counts = counts - itself.long()
    return counts
