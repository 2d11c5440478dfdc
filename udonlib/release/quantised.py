"""Smaller vectors, each measured on the model's own test set: what they cost in R@1, with and without re-ranking.

Ways, for float32 vectors of d dimensions (4 d bytes):

    float16     2 d     each value rounded
    int8        d       256 levels for each dimension, between the bounds within which nearly all of it lies
    binary      d / 8   whether each value is above its dimension's median
    prefix_n    4 n     the first n dimensions, to unit norm, where the run trained them so

Bounds and medians come from images of the validation, never of the test. Re-ranking searches by the small vectors and
orders the first of what they find by the float32 vectors, which then have to be kept somewhere, but not in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from udonlib.evaluation.intervals import bootstrap_interval
from udonlib.models.heads import unit
from udonlib.release.testset import TestSet

Small = Callable[[Float[Tensor, "item dim"]], Float[Tensor, "item small"]]

RERANKED = 100  # neighbours by small vectors that are ordered again
TAIL = 5e-4  # share of the values beyond either bound of int8's levels
LOSES_NOTHING, HOPELESS = 0.5, 5.0  # R@1, percent points: an interval below the one, or above the other


def int8(calibration: Float[Tensor, "item dim"]) -> Small:
    """Round to 256 levels for each dimension: the vectors that the bytes stand for, in float32.

    level = round(255 (x - low) / (high - low)), cut to 0..255;     x' = low + level (high - low) / 255
    """
    low, high = (torch.quantile(calibration.float()[:100_000], share, dim=0) for share in (TAIL, 1 - TAIL))
    step = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)

    def small(vectors: Tensor) -> Tensor:
        return low + ((vectors - low) / step).round().clamp(0, 255) * step

    return small


def binary(calibration: Float[Tensor, "item dim"]) -> Small:
    """One bit for each dimension, as -1 and 1: inner products are then d - 2 x differing bits."""
    median = calibration.float().median(dim=0).values
    return lambda vectors: torch.where(vectors > median, 1.0, -1.0)


def ways(calibration: Float[Tensor, "item dim"], nested_dims: Sequence[int] = ()) -> dict[str, tuple[float, Small]]:
    """The ways to make vectors smaller, by name: bytes a vector, and how.

    Args:
        calibration: embeddings of images that are not tested on.
        nested_dims: shorter embeddings that the run trained.
    """
    dim = calibration.shape[1]
    found: dict[str, tuple[float, Small]] = {
        "float16": (2.0 * dim, lambda vectors: vectors.half().float()),
        "int8": (1.0 * dim, int8(calibration)),
        "binary": (dim / 8, binary(calibration)),
    }
    for n in sorted(nested_dims, reverse=True):
        found[f"prefix_{n}"] = 4.0 * n, lambda vectors, n=n: unit(vectors[:, :n])  # type: ignore[misc]
    return found


def measure(
    test: TestSet,
    name: str,
    calibration: Float[Tensor, "item dim"],
    nested_dims: Sequence[int] = (),
    seed: int = 0,
) -> pd.DataFrame:
    """Measure every way on a test set, in the merged index.

    Args:
        name: of the float32 embeddings in `test`.
        calibration, nested_dims: see `ways`.
        seed: of the bootstrap.

    Returns:
        A row for each way and both kinds of search: vectors, bytes, reranked, r_at_1 (percent, mean over domains); lost
        (percent points against float32, paired by query), low, high (95%); verdict. float32 comes first.
    """
    queries, index = test.queries[name], test.index[name]
    whole = test.right(test.neighbours(queries, index, 1)[1]).numpy().astype(float)
    percent = 100 * float(np.mean([values.mean() for values in test.by_domain(whole).values()]))
    nothing = {"lost": 0.0, "low": 0.0, "high": 0.0, "verdict": ""}
    rows = [{"vectors": "float32", "bytes": 4.0 * queries.shape[1], "reranked": 0, "r_at_1": percent} | nothing]
    for way, (n_bytes, small) in ways(calibration, nested_dims).items():
        _, found = test.neighbours(small(queries), small(index), min(RERANKED, len(index)))
        for n_reranked, first in ((0, found), (found.shape[1], _reranked(queries, index, found))):
            lost = 100 * (whole - test.right(first[:, :1]).numpy())
            interval = bootstrap_interval(test.by_domain(lost), np.random.default_rng(seed)).iloc[-1]
            row = {"vectors": way, "bytes": n_bytes, "reranked": n_reranked, "r_at_1": percent - interval["mean"]}
            row |= {"lost": interval["mean"], "low": interval["low"], "high": interval["high"]}
            rows.append(row | {"verdict": verdict(interval["low"], interval["high"])})
    return pd.DataFrame(rows)


def _reranked(queries: Tensor, index: Tensor, found: Tensor) -> Tensor:
    """What was found, ordered by the whole vectors; equal ones as they were."""
    best = torch.empty_like(found)
    for rows in torch.arange(len(queries)).split(1024):
        places = found[rows]
        similarities = torch.einsum("qd,qkd->qk", queries[rows].double(), index[places.clamp(min=0)].double())
        similarities[places < 0] = -torch.inf
        best[rows] = places.gather(1, similarities.argsort(dim=1, descending=True, stable=True))
    return best


def verdict(low: float, high: float) -> str:
    """What an interval of the loss, in percent points, says in a word or two."""
    if high <= LOSES_NOTHING:
        return "as good"
    return "hopeless" if low >= HOPELESS else "worse" if low > 0 else "not told apart"
