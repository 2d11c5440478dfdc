"""Which class an image shows, by its neighbours' labels, or "none of these".

The k nearest images vote, the label y with the most votes wins, and its score is

    w_i = exp((s_i - max s) / TEMPERATURE),    score(y) = sum_{i: y_i = y} w_i s_i / sum_i w_i

for similarities s: high where near images agree. An answer whose score is below a threshold is "none of these". On
MiniUnED's test images that finds more of the known than the highest similarity, the plain share of votes, or the lead
over the next label. Source: weights as in Wu et al. 2018, sec. 3.4.

**How the threshold is calibrated.** On held-out images whose classes the index knows: others that are given, or images
of the index, each of which is left out while it is asked for. Half of them calibrate, half check. Each is asked twice:
as an image of a known class, and as an image of an unknown one, where no image of its own class may be found. Of n such
unknown ones the threshold lies above the ceil((n + 1) (1 - a))-th lowest score, so that an image of a class that is not
there, drawn like these, is given a label with probability a at most (a = `false_labels`). The other half then says what
that costs: how many known ones are still answered, and how many of these rightly. That is too hopeful where the model
was trained on these very images, or where a class holds near copies: give others then.
Source: split conformal prediction (Vovk et al. 2005, sec. 4).

**What it costs depends on the model.** Where the right class stands first in half of the searches, few similarities are
so high that an unknown class would hardly reach them: of MiniUnED's images the model of `make train` answers 10 to 15%
at 5% false labels, 90 to 95% of these rightly, and a third at 20%. A score relative to the next fifty neighbours would
answer some 3% more. `tradeoff` says what other shares of false labels would give; choose one for `calibrate`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from udonlib.errors import ParameterError, UserError, nearest
from udonlib.search.embed import Embeddings, Vectors
from udonlib.search.index import Index
from udonlib.search.kinds import Rows, Similarities

NONE = "none of these"
HELD_OUT = 1000  # images that are drawn
LEAST = 40
TEMPERATURE = 0.07


def votes(
    similarities: Similarities, rows: Rows, labels: np.ndarray
) -> tuple[list[str | None], Float[np.ndarray, "query"]]:
    """Count the votes of each query's neighbours.

    Args:
        similarities: highest first.
        labels: of each row of the index; None where there is none: it does not vote.

    Returns:
        The winning label and its score; None and -inf where nobody voted. Of equal votes the nearer neighbour's wins.
    """
    winners: list[str | None] = []
    scores = np.full(len(rows), -np.inf)
    for query, (values, neighbours) in enumerate(zip(similarities.astype(float), rows, strict=True)):
        heard = [(v, labels[row]) for v, row in zip(values, neighbours, strict=True) if row >= 0]
        heard = [(value, label) for value, label in heard if label is not None]
        counts: dict[str, float] = {}
        sums: dict[str, float] = {}
        for value, label in heard:
            weight = math.exp((value - heard[0][0]) / TEMPERATURE)
            counts[label] = counts.get(label, 0.0) + weight
            sums[label] = sums.get(label, 0.0) + weight * value
        winners.append(max(counts, key=lambda label: counts[label], default=None))
        if heard:
            scores[query] = sums[winners[-1]] / sum(counts.values())  # type: ignore[index]
    return winners, scores


def _labels(images: pd.DataFrame, column: str) -> np.ndarray:
    if column not in images:
        raise ParameterError({"column": f"no column {column!r}; {nearest(column, map(str, images))}"})
    values = images[column].astype(object)
    values = values.where(values.notna(), None)
    if column == "label" and "domain" in images:  # the same name in two domains is two classes
        domains = images["domain"].tolist()
        named = zip(domains, values.tolist(), strict=True)
        return np.array([v if v is None or not isinstance(d, str) else f"{d}/{v}" for d, v in named], dtype=object)
    return np.array([None if value is None else str(value) for value in values], dtype=object)


class _Asked(NamedTuple):
    """Images whose class is known, as they are answered: once as they are, once without any of their class."""

    right: np.ndarray  # bool: whether the nearest class is theirs
    known: Float[np.ndarray, "image"]  # scores
    unknown: Float[np.ndarray, "image"]


def _ask(index: Index, column: str, k: int, seed: int, held_out: Embeddings | None) -> _Asked:
    """Ask for images of known classes in random order. Raises: as `calibrate`."""
    labels = _labels(index.images, column)
    usable = index.alive & np.array([label is not None for label in labels])
    counts = pd.Series(labels[usable]).value_counts()
    if held_out is None:
        asked, mine, least = labels, usable, 2
    else:
        index.check_model(held_out.model)
        asked, least = _labels(held_out.images, column), 1
        mine = np.ones(len(asked), bool)
    rows = np.flatnonzero(mine & np.array([counts.get(label, 0) >= least for label in asked]))
    if len(rows) < LEAST or len(counts) < 2:
        raise UserError(
            f"{index.name}: {len(rows)} images of {len(counts)} classes by {column!r} have another of their class, "
            f"expected {LEAST} of 2 classes at least to calibrate with"
        )
    rows = np.random.default_rng(seed).permutation(rows)[:HELD_OUT]
    asked = asked[rows]
    queries = np.asarray((index if held_out is None else held_out).vectors[rows], dtype=np.float32)
    exclude = rows if held_out is None else None
    said, known = votes(*index.search(queries, k, exclude=exclude, mask=usable), labels)
    unknown = np.empty(len(rows))
    for label in dict.fromkeys(asked):
        own = asked == label
        unknown[own] = votes(*index.search(queries[own], k, mask=usable & (labels != label)), labels)[1]
    right = np.array([label == answer for label, answer in zip(asked, said, strict=True)])
    return _Asked(right, known, unknown)


def _cost(asked: _Asked, false_labels: float) -> dict[str, float]:
    """The threshold by the first half of the images, and what it costs by the other."""
    half = len(asked.right) // 2
    lowest = np.sort(asked.unknown[:half])
    threshold = float(np.nextafter(lowest[min(half, math.ceil((half + 1) * (1 - false_labels))) - 1], np.inf))
    right, answered = asked.right[half:], asked.known[half:] >= threshold
    return {
        "threshold": threshold,
        "answered": float(answered.mean()),
        "right": float(right[answered].mean()) if answered.any() else math.nan,
        "right_without": float(right.mean()),
        "false_labels": float((asked.unknown[half:] >= threshold).mean()),
        "n_calibrated": half,
        "n_checked": len(right),
    }


def calibrate(
    index: Index,
    column: str = "label",
    k: int = 10,
    false_labels: float = 0.05,
    seed: int = 0,
    held_out: Embeddings | None = None,
) -> dict[str, Any]:
    """Find the threshold of "none of these", and what it costs; kept in `index.answers`, and saved with the index.

    Args:
        column: holds the classes. Of `label` they are the labels of each domain.
        k: neighbours that vote.
        false_labels: the share of images of unknown classes that may be given a label, between 0 and 1.
        held_out: images that are not in the index, with the same column; None: those of the index, left out one by one.

    Returns:
        threshold; and of the checking half, as shares: `answered` of known ones, `right` of those answered,
        `right_without` a threshold, `false_labels` of unknown ones; n_calibrated, n_checked.

    Raises:
        ParameterError for an unknown column; UserError for fewer than LEAST images that have another of their class.
    """
    _check_share(false_labels)
    found = {"column": column, "k": k} | _cost(_ask(index, column, k, seed, held_out), false_labels)
    index.answers = found
    return found


def tradeoff(
    index: Index,
    allowed: Sequence[float] = (0.01, 0.05, 0.1, 0.2, 0.5),
    column: str = "label",
    k: int = 10,
    seed: int = 0,
    held_out: Embeddings | None = None,
) -> pd.DataFrame:
    """Say what `calibrate` would cost at several shares of false labels; nothing is kept.

    Returns: a row for each: allowed, and what `calibrate` returns of it. Raises: as `calibrate`.
    """
    for share in allowed:
        _check_share(share)
    asked = _ask(index, column, k, seed, held_out)
    return pd.DataFrame([{"allowed": share} | _cost(asked, share) for share in allowed])


def _check_share(false_labels: float) -> None:
    if not 0 < false_labels < 1:
        raise ParameterError({"false_labels": f"found {false_labels}, expected more than 0 and less than 1"})


def classify(
    index: Index, queries: Vectors, where: Mapping[str, Any] | None = None, exclude: np.ndarray | None = None
) -> pd.DataFrame:
    """Say which class each query shows, as `calibrate` has set it.

    Args:
        queries: unit vectors. where: what neighbours must have: see `Index.mask`. exclude: see `Index.search`.

    Returns:
        answer (a class, or NONE), nearest_class (also where the answer is NONE), score.

    Raises: UserError where nothing has been calibrated.
    """
    if not index.answers:
        raise UserError(f"{index.name}: has no threshold of '{NONE}' yet: calibrate(index) finds one")
    labels = _labels(index.images, index.answers["column"])
    allowed = index.mask(where)
    usable = np.array([label is not None for label in labels]) & (index.alive if allowed is None else allowed)
    found, scores = votes(*index.search(queries, index.answers["k"], exclude=exclude, mask=usable), labels)
    answers = [
        label if label is not None and score >= index.answers["threshold"] else NONE
        for label, score in zip(found, scores, strict=True)
    ]
    return pd.DataFrame({"answer": answers, "nearest_class": found, "score": scores})
