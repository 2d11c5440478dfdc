"""What a search finds: the neighbours of a query in each domain, its class, and why the right class is not first.

query = of_row(searched, 17)     # or of_picture(searched, image, "photo.jpg"), or cropped(query, box)
found = find(searched, query)
found.student["flags"].rows, found.answer, found.why
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Int
from PIL import Image

from udonlib.errors import UserError, nearest
from udonlib.lab.use.searched import Searched
from udonlib.search.classify import classify

MERGED = "all domains"
Box = tuple[float, float, float, float]  # left, top, right, bottom as shares of width and height
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
LEAST_SIDE = 4  # pixels of a crop
LOOKED_AT = 200  # images of a domain of which some are chosen


@dataclass(frozen=True, eq=False)
class Query:
    """What is searched for.

    name: of a file, or an image's id. row: of the index, which is not found itself; -1: none. label: the class that is
    right, "domain/class"; None: nobody said. crop: what part of `whole` is searched for.
    """

    name: str
    whole: Image.Image
    row: int = -1
    label: str | None = None
    crop: Box = WHOLE

    @property
    def image(self) -> Image.Image:
        """The part that is searched for."""
        if self.crop == WHOLE:
            return self.whole
        width, height = self.whole.size
        left, top, right, bottom = self.crop
        return self.whole.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))


@dataclass(frozen=True, eq=False)
class Hits:
    """Neighbours, the most similar first: rows of the index, and how similar they are."""

    rows: Int[np.ndarray, "_"]
    similarities: Float32[np.ndarray, "_"]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Why:
    """Where the right class stands.

    rank: of the first image of it among all, from 1. right: its row, and `similarity`. first: the row that stands first
    and `first_similarity`. before: images of each domain that stand before the right one.
    """

    rank: int
    right: int
    similarity: float
    first: int
    first_similarity: float
    before: dict[str, int]
    n: int


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found.

    student: by MERGED and by domain; teacher: by domain, of its own teacher. answer: a class or "none of these"; None
    where there are no classes; nearest_class and score as of `search.classify`. why: None where the right class is not
    known, or has no other image.
    """

    query: Query
    student: dict[str, Hits]
    teacher: dict[str, Hits] = field(default_factory=dict)
    answer: str | None = None
    nearest_class: str | None = None
    score: float = float("nan")
    why: Why | None = None

    @cached_property
    def order(self) -> list[str]:
        """The domains, that of the nearest image first."""
        domains = [name for name in self.student if name != MERGED]
        best = {name: max(self.student[name].similarities, default=-np.inf) for name in domains}
        return sorted(domains, key=lambda name: -best[name])


def of_row(searched: Searched, row: int) -> Query:
    """An image of the index as a query. Raises: UserError where it cannot be read."""
    return Query(str(searched.index.images["id"].iloc[row]), searched.picture(row), row, searched.labels[row])


def of_picture(searched: Searched, image: Image.Image, name: str) -> Query:
    """Any picture as a query."""
    return Query(name, image)


def cropped(query: Query, box: Box) -> Query:
    """The same query, of which a part is searched for. Raises: UserError for a part of hardly any pixels."""
    left, top, right, bottom = (min(1.0, max(0.0, float(side))) for side in box)
    part = replace(query, crop=(left, top, right, bottom))
    if left >= right or top >= bottom or min(part.image.size) < LEAST_SIDE:
        raise UserError(f"a crop of {query.name} has fewer than {LEAST_SIDE} pixels on a side: draw a larger one")
    return part


def find(searched: Searched, query: Query) -> Found:
    """Search for a query in all domains together and in each of them, by the student and by each domain's teacher."""
    k, index = searched.params.k, searched.index
    vector, feature = searched.embed(query.image)
    if query.row >= 0 and query.crop == WHOLE:
        vector = np.asarray(index.vectors[query.row], dtype=np.float32)  # what is indexed, to the last bit
    asked, exclude = vector[None], np.array([query.row])
    domains = searched.row_domains
    masks = {MERGED: searched.allowed} | {name: searched.allowed & (domains == name) for name in searched.domains}
    student = {}
    for name, mask in masks.items():
        similarities, rows = index.search(asked, k, exclude=exclude, mask=mask)
        here = rows[0] >= 0
        student[name] = Hits(rows[0][here], similarities[0][here])
    taught = searched.teachers
    teacher = {}
    if taught is not None:
        for name in (name for name in searched.domains if name in taught.names):
            similarities, rows = taught.search(name, feature, k, query.row)
            teacher[name] = Hits(rows, similarities)
    found = Found(query, student, teacher, why=_why(searched, query, vector))
    if index.answers:
        [said] = classify(index, asked, exclude=exclude).to_dict("records")
        found = replace(found, answer=said["answer"], nearest_class=said["nearest_class"], score=float(said["score"]))
    return found


def _why(searched: Searched, query: Query, vector: Float32[np.ndarray, "dim"]) -> Why | None:
    """Where the right class stands among all images, each compared."""
    if query.label is None:
        return None
    others = searched.allowed.copy()
    if query.row >= 0:
        others[query.row] = False
    right = np.flatnonzero(others & (searched.labels == query.label))
    if not len(right):
        return None
    similarities = np.asarray(searched.index.vectors, dtype=np.float32) @ vector
    similarities[~others] = -np.inf
    best = int(right[np.argmax(similarities[right])])
    before = np.flatnonzero(similarities > similarities[best])
    names, counts = np.unique(searched.row_domains[before], return_counts=True)
    first = int(np.argmax(similarities)) if len(before) else best
    by_domain = dict(sorted(zip(names.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1]))
    values = float(similarities[best]), first, float(similarities[first])
    return Why(len(before) + 1, best, *values, by_domain, int(others.sum()))


def is_right(searched: Searched, query: Query, row: int) -> bool | None:
    """Whether an image is of the query's class; None where either is not known."""
    label = searched.labels[row]
    return None if query.label is None or label is None else bool(label == query.label)


def labelled(searched: Searched, query: Query, label: str) -> Query:
    """The same query, of which somebody says the class; "" says nothing. Raises: UserError with the nearest class."""
    if label and label not in set(searched.labels):
        known = [str(name) for name in dict.fromkeys(searched.labels) if name is not None]
        raise UserError(f"no image of class '{label}' is searched; {nearest(label, known)}")
    return replace(query, label=label or None)


def some(searched: Searched, n: int, domain: str = "", misses: bool = False, seed: int = 0) -> list[int]:
    """Rows of some images in random order.

    Args:
        domain: of this one; "": of all in turn.
        misses: those whose nearest other image is of another class.
    """
    names = [domain] if domain in searched.domains and domain else list(searched.domains)
    parted = [_by_result(searched, name, seed) for name in names]
    pools = [part[False] if misses else _mixed(part) for part in parted]
    chosen = [pool[turn] for turn in range(n) for pool in pools if turn < len(pool)]
    return chosen[:n]


def _mixed(parted: dict[bool, list[int]]) -> list[int]:
    """Right and wrong ones in the proportion in which they are there."""
    tagged = [((i + 0.5) / len(rows), row) for rows in parted.values() for i, row in enumerate(rows)]
    return [row for _, row in sorted(tagged)]


def sample(searched: Searched, n: int, seed: int = 0) -> list[int]:
    """Rows of n images that show what happens: of every domain in turn, as many found right as found wrong.

    Found right: the nearest other image is of the same class. Of domains without classes, any.
    """
    by_domain = {name: _by_result(searched, name, seed) for name in searched.domains}
    kinds = [(name, (turn + place) % 2 == 0) for turn in range(n) for place, name in enumerate(searched.domains)]
    chosen: list[int] = []
    for name, right in kinds:
        left = by_domain[name][right] or by_domain[name][not right]
        if left and len(chosen) < n:
            chosen.append(left.pop(0))
    return sorted(chosen, key=lambda row: (searched.domains.index(searched.row_domains[row]), row))


def _by_result(searched: Searched, domain: str, seed: int) -> dict[bool, list[int]]:
    """Some rows of a domain by whether the nearest other image is right, in random order."""
    rows = np.flatnonzero(searched.allowed & (searched.row_domains == domain))
    rows = np.random.default_rng(seed).permutation(rows)[:LOOKED_AT]
    labels = searched.labels
    queries = np.asarray(searched.index.vectors[rows], dtype=np.float32)
    _, found = searched.index.search(queries, 1, exclude=rows, mask=searched.allowed)
    pairs = zip(rows, found[:, 0], strict=True)
    right = [labels[row] is not None and other >= 0 and labels[row] == labels[other] for row, other in pairs]
    parted: dict[bool, list[int]] = {True: [], False: []}
    for row, is_it in zip(rows.tolist(), right, strict=True):
        parted[bool(is_it)].append(row)
    return parted
