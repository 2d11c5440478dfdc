"""Outcomes by how much there was to learn from: queries of frequent and of rare kinds, large and small domains.

The classes of test queries are unseen in training, so that a query has no frequency of its own. Its stand-in is the
training class of its domain that looks most like it: the one whose image is nearest in `reading.pixels`, small pictures
that nothing has learned. Nearest in a model's own embedding would be closer to what that model knows, but would put
each model's queries into other groups, so that no two could be compared; features of a pretrained encoder would favour
models that begin with it. The price is noise: a query may look like a class that it has little to do with, which makes
groups more alike than they are, for all models in the same way.

Groups are thirds of a domain's queries, as far as equal counts stay together: `tail`, `middle` and `head`. A domain
whose queries all have the same count has none. Domains are `large` or `small` by training images, half of them each.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from udonlib.data.catalog import Catalog
from udonlib.data.images import ImageReader
from udonlib.evaluation.intervals import row_interval
from udonlib.evaluation.reading import Load, in_batches, loading, pixels

GROUPS = ("head", "middle", "tail")
SIZES = ("large domains", "small domains")
MAX_LOOKED_AT = 200_000  # training images that are worth reading to find those like each query
N_AT_ONCE = 1024  # queries that are compared with all training images of their domain
SIDE = 32  # pixels of the images that are compared: `pixels` makes 16 of them


def frequencies(catalog: Catalog, subset: Literal["val", "test"] = "test", load: Load | None = None) -> pd.DataFrame:
    """Say for each query how much like it there was to learn from: columns domain, path, n_train, group, size.

    n_train: training images of the class that it looks most like. group: one of GROUPS, or "" in a domain of equal
    counts. size: one of SIZES. Images that cannot be read are left out; a domain without training images is.

    Args:
        load: reads the images of queries and train splits; None: small, and as evaluations do.
    """
    load = load or loading(ImageReader(catalog, SIDE, "eval", "skip", cache=False))
    trained = [domain for domain in catalog.domains if "train" in domain.splits and len(domain.splits["train"])]
    by_size = sorted(trained, key=lambda domain: -len(domain.splits["train"]))
    large = {domain.name for domain in by_size[: (len(by_size) + 1) // 2]}
    tables = []
    for domain in trained:
        queries = domain.queries(subset)
        rows, there = _pixels(load, domain.name, "train", len(domain.splits["train"]))
        asked, wanted = _pixels(load, domain.name, subset, len(queries))
        nearest = torch.cat([(part @ there.T).argmax(dim=1) for part in wanted.split(N_AT_ONCE)]).numpy()
        n_of_class = np.bincount(domain.train_labels)
        n_train = n_of_class[domain.train_labels[np.asarray(rows)[nearest]]]
        values = {"path": [queries.paths[i] for i in asked], "n_train": n_train, "group": grouped(n_train)}
        tables.append(pd.DataFrame({"domain": domain.name, **values, "size": SIZES[domain.name not in large]}))
    columns = ["domain", "path", "n_train", "group", "size"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def grouped(counts: Int[np.ndarray, "query"]) -> list[str]:
    """The group of each of a domain's queries, from the count that stands for its frequency."""
    values, number, n = np.unique(counts, return_inverse=True, return_counts=True)
    if len(values) < 2:
        return [""] * len(counts)
    middle = (np.cumsum(n) - n / 2) / len(counts)  # where a count stands among all, from 0 to 1
    names = np.where(middle <= 1 / 3, "tail", np.where(middle > 2 / 3, "head", "middle"))
    return names[number].tolist()


def of_groups(outcomes: pd.DataFrame, known: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The outcomes of each group's queries, by its name; groups without queries are left out.

    Args:
        outcomes: of an `Evaluation`, or of several under seeds: columns domain, path and others.
        known: of `frequencies`.
    """
    marked = outcomes.merge(known[["domain", "path", "group", "size"]], on=["domain", "path"], how="left", sort=False)
    parts = {name: marked[marked["group"] == name] for name in GROUPS}
    parts |= {name: marked[marked["size"] == name] for name in SIZES}
    return {name: part.drop(columns=["group", "size"]) for name, part in parts.items() if len(part)}


def by_group(outcomes: pd.DataFrame, metric: str = "r_at_1") -> pd.DataFrame:
    """A metric of each embedder by groups of queries: embedder, group, n_queries, mean, low, high, in percent.

    Means over the domains that have such queries, in the merged index; 95% intervals over queries.

    Args:
        outcomes: of one evaluation, with the columns group and size of `frequencies`.
    """
    tables = []
    merged = outcomes[outcomes["index"] == "merged"].assign(seed=0)
    for embedder, part in merged.groupby("embedder", sort=False):
        for column, names in (("group", GROUPS), ("size", SIZES)):
            for name in names:
                of_group = part[part[column] == name]
                if len(of_group):
                    mean = row_interval(of_group, metric).query("domain == 'mean'")
                    tables.append(mean.assign(embedder=embedder, group=name, n_queries=len(of_group)))
    columns = ["embedder", "group", "n_queries", "mean", "low", "high"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def _pixels(load: Load, domain: str, split: str, n: int) -> tuple[list[int], Tensor]:
    """Positions of the images that can be read, and their pixels."""
    kept: list[int] = []
    made = []
    for _, read, images in in_batches(load, domain, split, list(range(n)), 256):
        if len(read):
            kept += read
            made.append(pixels(images))
    return kept, torch.cat(made) if made else torch.zeros(0, 768)
