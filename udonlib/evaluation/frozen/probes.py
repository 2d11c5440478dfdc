"""What frozen embeddings are worth for classification: neighbours that vote, and a linear classifier.

| probe | what it asks | source |
|---|---|---|
| `vote` | how well do the nearest labelled images name the class, with nothing trained | DINO (ICCV 2021) sec. 4.1 |
| `logistic_probe` | how well does one linear layer, trained on the labelled images | UNIC (ECCV 2024) sec. 4 |

Retrieval asks for the first neighbour alone; these ask for all that the vectors hold. Labelled images and those to be
classified are of the same classes and share no image: `deal` makes such parts of one set.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from udonlib.errors import UserError
from udonlib.evaluation.search import nearest

# The range of C for unit vectors: from hardly anything learned to the most that still has an optimum. Beyond, planes
# part the classes of a few images, and what L-BFGS ends with depends on where it stops.
STRENGTHS = (1e-2, 1e3)
MAX_STEPS = 1000  # of L-BFGS


def deal(
    labels: Int[np.ndarray, "image"], share: float, generator: np.random.Generator
) -> tuple[Int[np.ndarray, "row"], Int[np.ndarray, "query"]]:
    """Deal the images of every class into labelled ones and ones to be classified, at random.

    Of a class of n images max(1, round(share n)) are labelled, and at least one is asked for; a class of one image can
    be on one side alone, and is left out.

    Args:
        labels: the class of each image.
        share: of the images that is labelled, between 0 and 1.

    Returns: positions of both, each rising.

    Raises:
        UserError: no class has two images.
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}; valid: between 0 and 1")
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    labelled, asked = [], []
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        if len(members) < 2:
            continue
        n = min(len(members) - 1, max(1, round(share * len(members))))
        labelled.append(members[:n])
        asked.append(members[n:])
    if not labelled:
        raise UserError(f"none of the {len(np.unique(labels))} classes has two images: there is nothing to classify by")
    return np.sort(np.concatenate(labelled)), np.sort(np.concatenate(asked))


def vote(
    labelled: Float[torch.Tensor, "image dim"],
    labels: Int[np.ndarray, "image"],
    asked: Float[torch.Tensor, "query dim"],
    k: int = 20,
    temperature: float = 0.07,
) -> Int[np.ndarray, "query"]:
    """Name the class of each vector by a vote of its nearest labelled neighbours.

        class = argmax_c  sum of exp(s_i / temperature) over the k nearest neighbours i of class c,  s_i: their cosine

    Of equal votes the lower label wins. Fewer than k labelled images all vote.

    Args:
        labelled, asked: of unit norm.
        labels: class of each labelled vector.
        k: neighbours that vote, >= 1.
        temperature: > 0; small: the nearest alone decides, large: all k count the same.
    """
    if k < 1 or not temperature > 0:
        raise ValueError(f"k is {k}, temperature is {temperature}; valid: k >= 1, temperature > 0")
    similarities, positions = nearest(asked, labelled, min(k, len(labelled)))
    # The same factor for all neighbours of a vector changes no vote, and keeps exp in range.
    weights = ((similarities - similarities[:, :1]).double() / temperature).exp().numpy()
    classes, numbers = np.unique(labels, return_inverse=True)
    votes = np.zeros((len(asked), len(classes)))
    np.add.at(votes, (np.arange(len(asked))[:, None], numbers[positions.numpy()]), weights)
    return classes[votes.argmax(axis=1)]


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear classifier of frozen vectors, and how it was chosen.

    classifier: scikit-learn's LogisticRegression.
    strength: C of the logistic regression, the inverse of its regularisation. tried: accuracy on held-out images by C.
    """

    classifier: Any
    strength: float
    tried: dict[float, float]

    def predict(self, vectors: Float[torch.Tensor, "image dim"]) -> Int[np.ndarray, "image"]:
        """The class of each vector."""
        return self.classifier.predict(vectors.numpy())


def logistic_probe(
    labelled: Float[torch.Tensor, "image dim"],
    labels: Int[np.ndarray, "image"],
    trials: int = 11,
    held_out: float = 0.2,
    seed: int = 0,
) -> LinearProbe:
    """Train a linear classifier on frozen vectors: multinomial logistic regression by L-BFGS.

        minimise  C sum_i -log softmax(W x_i + b)[y_i]  +  |W|^2 / 2

    C is one of `trials` values, evenly spaced in its logarithm: the largest whose accuracy on held-out images is at
    most a standard error, sqrt(a (1 - a) / n), below the best one a. Held out is a share of the labelled images of each
    class that has two; then all are trained on. Where the few images of a class are unlike each other, the held-out
    ones say next to nothing of C, and the smallest of equal ones would learn next to nothing.

    Args:
        labelled: vectors, of unit norm or not.
        labels: their classes, at least two.
        trials: values of C that are tried, >= 1; with one there is nothing to choose, and C is 1.

    Raises:
        UserError: fewer than two classes; vectors that are not finite.
    """
    if len(np.unique(labels)) < 2:
        raise UserError(f"found {len(np.unique(labels))} class of {len(labels)} images; a classifier needs two or more")
    if not torch.isfinite(labelled).all():
        raise UserError(f"found {(~torch.isfinite(labelled)).any(1).sum()} vectors with values that are not finite")
    if trials < 1:
        raise ValueError(f"trials is {trials}; valid: 1 or more")
    vectors, tried = labelled.double().numpy(), dict[float, float]()
    if trials > 1:
        kept, held = deal(labels, 1 - held_out, np.random.default_rng(seed))
        alone = np.setdiff1d(np.arange(len(labels)), np.concatenate([kept, held]))  # the only image of its class
        kept = np.concatenate([kept, alone])
        strengths = np.geomspace(*STRENGTHS, trials).tolist()
        for strength, classifier in zip(strengths, regressions(vectors[kept], labels[kept], strengths), strict=True):
            tried[strength] = float((classifier.predict(vectors[held]) == labels[held]).mean())
    accuracy = max(tried.values(), default=0.0)
    error = math.sqrt(accuracy * (1 - accuracy) / len(held)) if tried else 0.0
    best = max((strength for strength, found in tried.items() if found >= accuracy - error), default=1.0)
    return LinearProbe(next(regressions(vectors, labels, [best])), best, tried)


def regressions(
    vectors: Float[np.ndarray, "n dim"],
    labels: Int[np.ndarray, "n"],
    strengths: Sequence[float],
    weights: Float[np.ndarray, "n"] | None = None,
) -> Iterator[Any]:
    """Yield the logistic regression (scikit-learn's) of each C, each begun where the one before it ended.

    With few vectors of many dimensions it is computed among the dimensions that they span, which gives the same: the
    intercept is free, so that centring changes nothing, and what stands at right angles to all vectors has no weight.

    Args:
        strengths: values of C, best rising.
        weights: of each vector's loss; None: 1.
    """
    from sklearn.exceptions import ConvergenceWarning  # a second to import, and few ask for it
    from sklearn.linear_model import LogisticRegression

    centre = vectors.mean(axis=0)
    basis = np.linalg.qr((vectors - centre).T).Q if len(vectors) < vectors.shape[1] else None
    inner = vectors - centre if basis is None else (vectors - centre) @ basis
    fitted = LogisticRegression(max_iter=MAX_STEPS, warm_start=True)
    for strength in strengths:
        with warnings.catch_warnings():
            # Weak regularisation of few images has no finite optimum that matters: the last step is as good.
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted.set_params(C=strength).fit(inner, labels, weights)
        found = copy(fitted)
        found.coef_ = fitted.coef_ if basis is None else fitted.coef_ @ basis.T
        found.intercept_ = fitted.intercept_ - found.coef_ @ centre
        found.n_features_in_ = vectors.shape[1]
        yield found
