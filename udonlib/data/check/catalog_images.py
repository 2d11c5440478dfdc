"""The images of a catalog, each once, whatever the splits that it stands in; and what its labels alone tell."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64

from udonlib.data.catalog import SPLITS, Catalog, Domain

# Queries and what they search in before what is trained on: the last would be found out by training.
FIRST_LOOKED_AT = ("test", "index", "val", "small_index", "train")


class CatalogImages:
    """Every image of a catalog once, by position.

    Attributes:
        paths: of each image. domain: the number of its domain. roles: bit i of it is set where it stands in SPLITS[i].
    """

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.paths: list[str] = []
        domains, roles, rows = [], [], []
        for number, domain in enumerate(catalog.domains):
            position: dict[str, int] = {}
            for split in (domain.splits[name] for name in FIRST_LOOKED_AT if name in domain.splits):
                bit = 1 << SPLITS.index(split.name)
                for row, path in enumerate(split.paths):
                    at = position.setdefault(path, len(self.paths))
                    if at == len(self.paths):
                        self.paths.append(path)
                        domains.append(number)
                        roles.append(bit)
                        rows.append(row)
                    else:
                        roles[at] |= bit
        self.domain = np.array(domains, np.int64)
        self.roles = np.array(roles, np.int64)
        self._rows = np.array(rows, np.int64)  # in the first split of FIRST_LOOKED_AT that it stands in

    def __len__(self) -> int:
        return len(self.paths)

    def is_in(self, split: str) -> Bool[np.ndarray, "n"]:
        """Return which images stand in a split."""
        return (self.roles >> SPLITS.index(split) & 1).astype(bool)

    def splits(self, position: int) -> list[str]:
        """Return the splits of one image."""
        return [name for i, name in enumerate(SPLITS) if self.roles[position] >> i & 1]

    def classes(self, position: int) -> dict[int, str]:
        """Return the class ids of one image with their names."""
        splits = self.catalog.domains[self.domain[position]].splits
        first = next(splits[name] for name in FIRST_LOOKED_AT if name in self.splits(position))
        labels = first.labels[self._rows[position]].tolist()
        return {label: first.class_names.get(label, str(label)) for label in labels if label >= 0}

    def share_a_class(self, a: int, b: int) -> bool:
        """Say whether two images have a class in common; classes of two domains are never the same."""
        return bool(self.domain[a] == self.domain[b] and self.classes(a).keys() & self.classes(b).keys())

    def where(self, position: int) -> str:
        """Say where an image stands: "cats, train, class 'Siamese'"."""
        names = ", ".join(f"'{name}'" for name in self.classes(position).values())
        return f"{self.catalog.names[self.domain[position]]}, {' and '.join(self.splits(position))}, class {names}"

    def missing(self) -> Iterator[int]:
        """Yield the positions of images that do not exist: their folders are listed, no file is opened."""
        for number in range(len(self.catalog.domains)):
            members = np.flatnonzero(self.domain == number)
            absent = set(self.catalog.store.missing([self.paths[i] for i in members]))
            yield from (int(i) for i in members if absent and self.paths[i] in absent)

    def evaluated_first(self, seed: int) -> Int64[np.ndarray, "n"]:
        """Return all positions: test images and their index, those of validation, those of training; each in random
        order, so that the first of them are a fair sample."""
        rank = np.zeros(len(self), np.int64)
        for place, name in reversed(list(enumerate(FIRST_LOOKED_AT))):
            rank[self.is_in(name)] = place
        shuffled = np.random.default_rng(seed).permutation(len(self))
        return shuffled[np.argsort(rank[shuffled], kind="stable")]


def without_positives(domain: Domain, subset: Literal["val", "test"]) -> Bool[np.ndarray, "n"]:
    """Say which queries have no image of their class in their index but themselves: they can only count as 0."""
    queries, index = domain.queries(subset), domain.index(subset)
    place = {path: i for i, path in enumerate(index.paths)}
    itself = np.array([place.get(path, -1) for path in queries.paths], np.int64)
    held = np.sort(index.labels, axis=1)
    once = held >= 0
    once[:, 1:] &= held[:, 1:] != held[:, :-1]  # a label that an image names twice counts once
    known, counts = np.unique(held[once], return_counts=True)
    if not len(known):
        return np.ones(len(queries), bool)
    at = np.searchsorted(known, queries.labels).clip(max=len(known) - 1)
    n_images = np.where((queries.labels >= 0) & (known[at] == queries.labels), counts[at], 0)
    is_own = (queries.labels[:, :, None] == index.labels[itself][:, None, :]).any(axis=2) & (itself >= 0)[:, None]
    return ~(n_images - is_own > 0).any(axis=1)


def single_images(domain: Domain) -> list[int]:
    """Return the positions in the train split of images that are alone in their class."""
    labels = domain.splits["train"].labels[:, 0]
    _, first, counts = np.unique(labels, return_index=True, return_counts=True)
    return sorted(first[counts == 1].tolist())
