"""What a domain's module hands to the build: classes of drawings, how a drawing becomes a picture, and the credits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from PIL import Image

from udonlib.data.miniuned.artwork import Drawing, Style, compose, stable_hash
from udonlib.data.miniuned.dedupe import drop_duplicate_classes
from udonlib.data.miniuned.sources import Credit

Finish = Callable[[Image.Image, Random], Image.Image]


@dataclass(frozen=True)
class Collected:
    """One domain before it is split. `credits` maps the key of a drawing's source to whom it is owed.

    `artwork` is True where drawings are vector artwork that recolouring disguises, so that duplicates must be sought
    before composing; photographs, maps and random words are compared as pictures alone.
    """

    name: str
    classes: dict[str, list[Drawing]]
    credits: dict[str, Credit]
    finish: Finish
    artwork: bool = True
    notes: list[str] = field(default_factory=list)


def set_in(style: Style) -> Finish:
    """The usual way to finish a drawing: composed in this style."""
    return lambda image, rng: compose(image, rng, style)


def choose_classes(
    domain: str, classes: dict[str, list[Drawing]], min_images: int, n_classes: int
) -> tuple[dict[str, list[Drawing]], list[str]]:
    """At most `n_classes` trustworthy classes, in the domain's stable order, and what was dropped, in words."""
    enough = {name: drawings for name, drawings in classes.items() if len(drawings) >= min_images}
    kept, notes = drop_duplicate_classes(enough, min_images)
    return {name: kept[name] for name in stable_order(domain, kept)[:n_classes]}, notes


def stable_order(domain: str, names: Sequence[str] | dict[str, list[Drawing]]) -> list[str]:
    """Class names in the order of their hashes: the order of class ids, and so of the splits."""
    return sorted(names, key=lambda name: (stable_hash(domain, name), name))
