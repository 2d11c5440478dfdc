"""Make the training data of a catalog uneven: domains of very different numbers of classes, classes with long tails.

The convention of long-tail work (CIFAR-LT): sizes fall exponentially from the largest to the smallest, by a factor.
Between domains it is the number of classes that falls, as UnED's large domains are those of many classes, and within a
domain the number of images of a class:

    classes of domain i = min(those it has, n_0 between^(-i / (D - 1))),   n_0: classes of the largest domain
    images of class j   = min(those it has, m_0 within^(-j / (C - 1))),    m_0: images of the domain's largest class

rounded, and at least two classes and one image, which is all that training asks for (a class needs no second image: it
has a prototype). Nothing is ever added, so that the fall that comes out may be steeper than the factor where a catalog
is uneven already, and less steep where its classes are small: ten images cannot fall by a factor of fifty.

Everything is fixed: domains are ranked by their number of classes, the largest first, then by name; classes by their
number of images, the largest first. Which classes and images stay, and who comes first of equals, is decided by SHA-256
of their names and paths: no matter how the data is stored, and the smaller of two choices is part of the larger one.
Validation, test and index are left as they are. The profile is of all domains that the data has: choosing some of them
(`domains`) changes nothing in these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from jaxtyping import Int

from udonlib.data.catalog import REQUIRED_SPLITS, Catalog, Domain, Split, load_catalog
from udonlib.fields import UnevenParams

Item = TypeVar("Item")
MIN_CLASSES, MIN_IMAGES = 2, 1


def open_catalog(params: UnevenParams, needed: Sequence[str] = REQUIRED_SPLITS, all_as_test: bool = False) -> Catalog:
    """Read the data of these parameters, and make it uneven where they say so.

    Args:
        needed, all_as_test: of `load_catalog`.

    Raises: DataError, as `load_catalog` does.
    """
    p = params
    chosen = load_catalog(p.data, p.domains, p.images, needed, all_as_test)
    if all_as_test or p.imbalance_between == p.imbalance_within == 1:
        return chosen
    ranked = chosen if p.domains == "all" else load_catalog(p.data, "all", p.images, ())
    return uneven(chosen, p.imbalance_between, p.imbalance_within, ranked)


def uneven(catalog: Catalog, between: float, within: float, ranked: Catalog | None = None) -> Catalog:
    """Return the catalog with uneven training data; its fingerprint is another one, and a note says what was done.

    Args:
        between: classes of the largest domain / of the smallest, >= 1; 1: all classes stay.
        within: images of the largest class / of the smallest, in each domain, >= 1; 1: all images stay.
        ranked: the domains that are ranked, of which those of `catalog` are some; None: the same ones.
    """
    domains = sorted((ranked or catalog).domains, key=lambda domain: (-domain.n_classes, domain.name))
    targets = falling(domains[0].n_classes, between, len(domains), MIN_CLASSES)
    n_classes = dict(zip((domain.name for domain in domains), targets.tolist(), strict=True))
    made = tuple(_cut(domain, n_classes[domain.name] if between > 1 else None, within) for domain in catalog.domains)
    sizes = [len(domain.splits["train"]) for domain in made if "train" in domain.splits]
    note = (
        f"training data made uneven (imbalance_between {between:g}, imbalance_within {within:g}): "
        f"{sum(sizes):,} images of {sum(domain.n_classes for domain in made):,} classes are left of "
        f"{sum(len(d.splits['train']) for d in catalog.domains if 'train' in d.splits):,} of "
        f"{sum(catalog.n_classes.values()):,}"
    )
    return replace(catalog, domains=made, notes=(*catalog.notes, note))


def falling(largest: int, factor: float, n: int, least: int) -> Int[np.ndarray, "n"]:
    """Sizes that fall exponentially: largest factor^(-i / (n - 1)), rounded to the nearest, at least `least`."""
    exponents = np.arange(n) / max(1, n - 1)
    return np.maximum(least, np.rint(largest * factor**-exponents)).astype(np.int64)


def _cut(domain: Domain, n_classes: int | None, within: float) -> Domain:
    """A domain with its first `n_classes` classes (None: all), whose images fall by a factor."""
    if "train" not in domain.splits:
        return domain
    split = domain.splits["train"]
    names = {number: split.class_names.get(number, str(number)) for number in domain.train_classes.tolist()}
    kept = _by_digest(list(names), lambda number: f"{domain.name}\0{names[number]}")[:n_classes]
    by_class = np.split(np.argsort(domain.train_labels, kind="stable"), np.bincount(domain.train_labels).cumsum()[:-1])
    all_rows = dict(zip(domain.train_classes.tolist(), by_class, strict=True))
    rows = {number: all_rows[number].tolist() for number in kept}
    order = sorted(kept, key=lambda number: -len(rows[number]))  # equals stay in the order of their digests
    if within > 1 and order:
        sizes = falling(len(rows[order[0]]), within, len(order), MIN_IMAGES).tolist()
        for number, size in zip(order, sizes, strict=True):
            rows[number] = _by_digest(rows[number], split.paths.__getitem__)[:size]
    chosen = np.array(sorted(row for part in rows.values() for row in part), dtype=np.int64)
    left = Split(
        split.name,
        tuple(split.paths[row] for row in chosen.tolist()),
        split.labels[chosen],
        {number: name for number, name in split.class_names.items() if number in rows},
    )
    return Domain(domain.name, domain.splits | {"train": left})


def _by_digest(items: Sequence[Item], text: Callable[[Item], str]) -> list[Item]:
    """Order items as if by chance, always in the same way."""
    return sorted(items, key=lambda item: hashlib.sha256(text(item).encode()).digest())
