"""Icons: classes are concrete things from a written list, each drawn by many icon sets."""

from __future__ import annotations

import math
import re
from collections import defaultdict

from udonlib.data.miniuned import FOLDER
from udonlib.data.miniuned.artwork import DRAWN, Drawing, generator, stable_hash
from udonlib.data.miniuned.collected import Collected, choose_classes, set_in
from udonlib.data.miniuned.dedupe import drop_near_duplicates
from udonlib.data.miniuned.iconify import IconSets

STYLE_SUFFIX = re.compile(
    r"[-_](outlined?|filled|fill|solid|line|linear|lineal|bold|duotone|two-?tone|thin|light|regular|broken|sharp|rounded"
    r"|round|glyph|colou?r|colored|s|o|rounded-\w+|sharp-\w+|\d+px|\d+|alt|baseline|bulk|free|v\d|stroke|bold-duotone"
    r"|line-duotone|icon|flat|simple|remix|block|\d+-\w+)$"
)
GENERAL = ("UI", "Material", "Archive", "Thematic", "None")  # categories of sets that draw things, not brands or emoji
# Older or lighter editions of a set that is taken anyway, animated sets, and sets of signs for maps and clouds.
LEFT_OUT = re.compile(
    r"flag|flagpack|circle-flags|cif|fluent-emoji|gcp|k8s|svg-spinners|line-md|map|healthicons"
    r"|(fa6|fa-|heroicons-|material-symbols-light|bx|iconmind|keyline).*"
)
MIN_IMAGES, MOST_IMAGES, N_CLASSES = 6, 34, 260


def load_concepts() -> dict[str, str]:
    """Every name of concepts.txt ('house' and its synonym 'home') to the name of its class."""
    names: dict[str, str] = {}
    for line in (FOLDER / "concepts.txt").read_text().splitlines():
        first, *others = line.split()
        for name in (first, *others):
            if names.setdefault(name, first) != first:
                raise ValueError(f"concepts.txt: {name!r} stands under both {names[name]!r} and {first!r}")
    return names


def concept(set_name: str, icon: str, names: dict[str, str]) -> str | None:
    """The class of an icon: its name, bare of the words for style ('home-outline-24'), looked up among the concepts."""
    name = icon.lower()
    if set_name == "ic":
        name = re.sub(r"^(baseline|outline|round|sharp|twotone)-", "", name)
    if set_name == "fluent":
        name = re.sub(r"-(filled|regular)$", "", re.sub(r"-\d+(-\w+)*$", "", name))
    for _ in range(5):
        if name in names:
            return names[name]
        shorter = STYLE_SUFFIX.sub("", name)
        if shorter == name:
            return None
        name = shorter
    return None


def general_sets(icons: IconSets) -> list[str]:
    """Licensed sets of interface icons, sorted."""
    kept = []
    for name in icons.licensed():
        category = str(icons.collections[name].get("category"))
        if category.startswith(GENERAL) and not LEFT_OUT.fullmatch(name):
            kept.append(name)
    return kept


def collect_icons(icons: IconSets) -> Collected:
    sets = general_sets(icons)
    icons.load(sets)
    names = load_concepts()
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sets:
        for icon in sorted(icons.icons(name), key=lambda icon: (len(icon), icon)):
            thing = concept(name, icon, names)
            if thing is not None:
                found[thing][name].append(icon)
    classes: dict[str, list[Drawing]] = {}
    for thing in sorted(found):
        drawn = []
        for name in sorted(found[thing], key=lambda name: stable_hash("icons", thing, name)):
            styles = found[thing][name][:6]
            drawn.append(icons.draw(name, styles[stable_hash("icons", "style", thing, name) % len(styles)]))
        number = round(6 * math.exp(abs(generator("icons", "number", thing).gauss(0, 0.62))))
        distinct = drop_near_duplicates([d for d in drawn if d is not None])
        classes[thing] = distinct[: min(number, MOST_IMAGES)]
    kept, notes = choose_classes("icons", classes, MIN_IMAGES, N_CLASSES)
    return Collected("icons", kept, {n: icons.credit(n) for n in sets}, set_in(DRAWN["icons"]), notes=notes)
