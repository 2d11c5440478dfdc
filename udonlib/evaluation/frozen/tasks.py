"""The tasks of whole images, from class tokens that were made before: retrieval and classification of each domain.

| group | tasks | score of a query, and what stands beside it | source |
|---|---|---|---|
| retrieval | one a domain, in the merged test index | R@1; mMP@5 | UnED (ICCV 2023) sec. 3 |
| classification | one a domain, of its test classes | linear classifier right; k neighbours | UNIC sec. 4 |

Vectors are of unit norm in all of them.

**Classification.** Test classes are new to a student, so labelled images of them have to be given: where a domain has
an index of its own, those of its images that are of the queries' classes, else half of the queries of each class, dealt
at random; the other queries are asked for. At most MOST_CLASSES classes and MOST_LABELLED labelled images of each are
taken, drawn at random. C of the linear classifier is chosen on a fifth of the labelled images, by TRIALS trials, so
that nothing of what is asked for is seen. Every encoder gets the same images. An image of several labels is labelled
with its first, and named rightly by any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from udonlib.data.catalog import Catalog, Domain
from udonlib.evaluation.evaluate import evaluate
from udonlib.evaluation.frozen.probes import deal, logistic_probe, vote
from udonlib.evaluation.reading import Batch, Embed, Load
from udonlib.models.heads import unit

HEADLINES = {"retrieval": "r_at_1", "classification": "logistic", "dense": "mean_iou"}  # the metric of each group
LABELLED = 0.5  # of the images of a class, where a domain has no index of its own
MOST_CLASSES, MOST_LABELLED = 200, 50
TRIALS = 11
AT_ONCE = 4096  # vectors that are handed to the search together


@dataclass(frozen=True, eq=False)
class ClassTokens:
    """What every encoder says of the images of one domain.

    rows: path -> row of the vectors; images that cannot be read have none. vectors: by encoder, of unit norm.
    """

    rows: dict[str, int]
    vectors: dict[str, Float[Tensor, "image dim"]]


def scored(encoder: str, group: str, domain: str, metric: str, paths: Sequence[str], score: np.ndarray) -> pd.DataFrame:
    """One row a query, as the tables of this room have them."""
    names = {"encoder": encoder, "group": group, "domain": domain, "metric": metric}
    return pd.DataFrame(names | {"path": list(paths), "score": np.asarray(score, dtype=np.float64)})


def retrieval(catalog: Catalog, tokens: Mapping[str, ClassTokens], encoders: Sequence[str]) -> Iterator[pd.DataFrame]:
    """R@1 and mMP@5 of every test query in the merged index, by `evaluate`.

    Raises: what `evaluate` raises.
    """

    def load(domain: str, split: str, batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
        paths = catalog[domain].splits[split].paths
        for batch in batches:
            read = [i for i in batch if paths[i] in tokens[domain].rows]
            yield torch.tensor([tokens[domain].rows[paths[i]] for i in read], dtype=torch.int64), read

    embedders: dict[str, Mapping[str, Embed]] = {
        name: {domain: of.vectors[name].__getitem__ for domain, of in tokens.items()} for name in encoders
    }
    made: Load = load
    outcomes = evaluate(catalog, "test", made, image_embedders=embedders, batch_size=AT_ONCE).outcomes
    merged = outcomes[outcomes["index"] == "merged"]
    for (name, domain), part in merged.groupby(["embedder", "domain"], sort=False):
        for metric in ("r_at_1", "mmp_at_5"):
            yield scored(name, "retrieval", domain, metric, part["path"].tolist(), part[metric].to_numpy())


@dataclass(frozen=True, eq=False)
class Dealt:
    """Images of a classification task: rows and class of those labelled, rows, paths and classes of those asked for."""

    labelled: Int[np.ndarray, "image"]
    labels: Int[np.ndarray, "image"]
    asked: Int[np.ndarray, "query"]
    paths: tuple[str, ...]
    answers: Int[np.ndarray, "query label"]


def deal_images(domain: Domain, rows: Mapping[str, int], seed: int) -> Dealt | None:
    """Deal a domain's test images into labelled ones and ones that are asked for; None where that leaves no task.

    Args:
        rows: path -> row, of the images that can be read.
    """
    generator = np.random.default_rng(seed)
    queries, index = domain.queries("test"), domain.index("test")
    asked = np.array([i for i, path in enumerate(queries.paths) if path in rows], dtype=np.int64)
    classes = np.unique(queries.labels[asked, 0]) if len(asked) else asked
    if index is queries:
        _, counts = np.unique(queries.labels[asked, 0], return_counts=True)
        if (counts > 1).sum() < 2:
            return None
        of_asked = queries.labels[asked, 0]
        first, second = deal(of_asked, LABELLED, generator)
        labelled, asked = asked[first], asked[second]
    else:
        known = set(queries.paths)
        usable = (i for i, path in enumerate(index.paths) if path in rows and path not in known)
        labelled = np.array([i for i in usable if index.labels[i, 0] in classes], dtype=np.int64)
    classes = np.intersect1d(np.unique(index.labels[labelled, 0]), queries.labels[asked])
    if len(classes) < 2:
        return None
    classes = generator.permutation(classes)[:MOST_CLASSES]
    labelled = generator.permutation(labelled[np.isin(index.labels[labelled, 0], classes)])
    rank = pd.Series(index.labels[labelled, 0]).groupby(index.labels[labelled, 0]).cumcount().to_numpy()
    labelled = np.sort(labelled[rank < MOST_LABELLED])
    asked = asked[np.isin(queries.labels[asked], classes).any(axis=1)]
    return Dealt(
        np.array([rows[index.paths[i]] for i in labelled]),
        index.labels[labelled, 0],
        np.array([rows[queries.paths[i]] for i in asked]),
        tuple(queries.paths[i] for i in asked),
        queries.labels[asked],
    )


def classification(
    domain: str, dealt: Dealt, vectors: Mapping[str, Float[Tensor, "image dim"]], seed: int
) -> Iterator[pd.DataFrame]:
    """Whether the linear classifier, and the vote of k neighbours, name each image rightly, 1 or 0."""
    for name, of_all in vectors.items():
        labelled, asked = of_all[dealt.labelled], of_all[dealt.asked]
        probe = logistic_probe(labelled, dealt.labels, TRIALS, seed=seed)
        said = {"logistic": probe.predict(asked), "knn": vote(labelled, dealt.labels, asked)}
        for metric, labels in said.items():
            right = (labels[:, None] == dealt.answers).any(axis=1)
            yield scored(name, "classification", domain, metric, dealt.paths, right)


def together(tokens: Sequence[Float[Tensor, "*shape _"]]) -> Float[Tensor, "*shape dim"]:
    """The concatenation of several encoders: the unit vectors of each side by side, to unit norm.

    <a, b> of two images is then the mean over the encoders of their cosines.
    """
    return unit(torch.cat([unit(each) for each in tokens], dim=-1))
