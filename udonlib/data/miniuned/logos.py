"""Logos: classes are brands, found under one normalised name in several icon sets. Marks stay those of their owners."""

from __future__ import annotations

import re
from collections import defaultdict

from udonlib.data.miniuned.artwork import DRAWN, Drawing
from udonlib.data.miniuned.collected import Collected, choose_classes, set_in, stable_order
from udonlib.data.miniuned.dedupe import drop_near_duplicates
from udonlib.data.miniuned.iconify import IconSets
from udonlib.data.miniuned.review import AMBIGUOUS_LOGOS, SAME_BRAND, WRONG_LOGOS

LOGO_SETS = (
    "simple-icons logos cib bxl fa7-brands streamline-logos devicon devicon-plain skill-icons thesvg-color selfhst "
    "vscode-icons material-icon-theme file-icons ant-design ri tabler ion uil jam mdi mage lineicons catppuccin"
).split()
BRAND_SETS = ("simple-icons", "logos", "cib", "devicon", "bxl")  # all of whose icons are brands
# Sets that mix brands with things ('rocket', 'compass'): taken only where a set of well-known brands has the name too.
MIXED_SETS = frozenset({"ant-design", "ri", "uil", "jam", "mdi", "mage", "lineicons"})
WELL_KNOWN = ("fa7-brands", "bxl", "tabler", "ion")
PREFIXES = {"vscode-icons": "file-type-", "tabler": "brand-", "ion": "logo-"}  # only icons so named are brands
VARIANT = re.compile(
    r"[-_](icon|logos?|filled|fill|line|outlined?|original|plain|wordmark|light|dark|color|mono|solid|block|square|circle"
    r"|alt|branded|background|new|brand|\d)$"
)
MIN_SETS, MIN_IMAGES, MOST_IMAGES, N_CLASSES = 4, 4, 14, 420


def brand(set_name: str, icon: str) -> str | None:
    """The brand's bare name ('google-drive-icon' -> 'googledrive'); None where the set does not call it a brand."""
    prefix = PREFIXES.get(set_name, "")
    if not icon.startswith(prefix):
        return None
    name = icon.removeprefix(prefix).lower()
    if set_name == "streamline-logos":
        name = re.sub(r"-logo(-\d)?(-block|-solid)?$", "", name)
    shorter = VARIANT.sub("", name)
    while shorter != name:
        name, shorter = shorter, VARIANT.sub("", shorter)
    name = name.replace("-", "").replace(".", "")
    return SAME_BRAND.get(name, name)


def collect_logos(icons: IconSets) -> Collected:
    icons.load(LOGO_SETS)
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in LOGO_SETS:
        for icon in icons.icons(name):
            key = brand(name, icon)
            if key is not None and f"{name}:{icon}" not in WRONG_LOGOS:
                found[key][name].append(icon)
    classes: dict[str, list[Drawing]] = {}
    for key in stable_order("logos", sorted(found)):
        sets = found[key]
        if not any(name in sets for name in WELL_KNOWN):
            sets = {name: drawings for name, drawings in sets.items() if name not in MIXED_SETS}
        if len(key) < 2 or key in AMBIGUOUS_LOGOS or len(sets) < MIN_SETS or not any(s in sets for s in BRAND_SETS):
            continue
        drawn = [icons.draw(name, icon) for name in sets for icon in sets[name][:3]]
        classes[key] = drop_near_duplicates([d for d in drawn if d is not None])[:MOST_IMAGES]
    kept, notes = choose_classes("logos", classes, MIN_IMAGES, N_CLASSES)
    return Collected("logos", kept, {n: icons.credit(n) for n in LOGO_SETS}, set_in(DRAWN["logos"]), notes=notes)
