"""Emoji and flags: classes are Unicode code points, which the sets' own character maps give."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from random import Random

import numpy as np
from PIL import Image

from udonlib.data.miniuned.artwork import DRAWN, Drawing, Style, compose
from udonlib.data.miniuned.collected import Collected, choose_classes, set_in, stable_order
from udonlib.data.miniuned.dedupe import drop_near_duplicates
from udonlib.data.miniuned.iconify import IconSets
from udonlib.data.miniuned.review import AMBIGUOUS_FLAGS

EMOJI_SETS = (
    "noto twemoji fluent-emoji fluent-emoji-flat emojione noto-v1 fxemoji fluent-emoji-high-contrast "
    "emojione-monotone streamline-emojis"
).split()
CHARACTER_MAPS = ("twemoji", "noto", "fluent-emoji-flat")  # the sets whose maps name the code points
N_EMOJI, N_CANDIDATES = 520, 600
FLAG_SETS = ("twemoji", "emojione", "emojione-monotone", "circle-flags", "flagpack", "cif", "flag")
# Code points left out: letters of flags, skin tones, clock faces (twelve of one drawing), input symbols, legal signs.
LEFT_OUT = (
    (0x1F1E6, 0x1F1FF),
    (0x1F3FB, 0x1F3FF),
    (0x1F550, 0x1F567),
    (0x1F520, 0x1F524),
    (0x2122, 0x2122),
    (0, 0xFFF),
)


def code_points(icons: IconSets) -> tuple[dict[str, str], dict[str, str]]:
    """Icon name -> code points ('1f600', '1f1eb-1f1f7'), and code points -> the name of the class."""
    by_name: dict[str, str] = {}
    class_names: dict[str, str] = {}
    for name in CHARACTER_MAPS:
        for code, icon in sorted(icons.sets[name]["chars"].items()):
            code = "-".join(part for part in code.split("-") if part != "fe0f")
            by_name.setdefault(icon, code)
            class_names.setdefault(by_name[icon], icon)
        for alias, entry in icons.aliases(name).items():
            if entry["parent"] in by_name:
                by_name.setdefault(alias, by_name[entry["parent"]])
    return by_name, class_names


def is_plain(code: str) -> bool:
    """One code point, not of the kinds left out."""
    return "-" not in code and not any(first <= int(code, 16) <= last for first, last in LEFT_OUT)


def collect_emoji(icons: IconSets) -> Collected:
    icons.load(EMOJI_SETS)
    by_name, class_names = code_points(icons)
    squeezed = {name.replace("-", ""): code for name, code in by_name.items()}  # fxemoji writes without hyphens
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name in EMOJI_SETS:
        for icon in [*icons.icons(name), *icons.aliases(name)]:
            code = by_name.get(icon) or (squeezed.get(icon) if name == "fxemoji" else None)
            if code and is_plain(code):
                found[code].setdefault(name, icon)
    classes: dict[str, list[Drawing]] = {}
    by_class = {class_names[code]: code for code in found if len(found[code]) >= 5}
    for name in stable_order("emoji", sorted(by_class))[:N_CANDIDATES]:
        drawn = [icons.draw(name_of_set, icon) for name_of_set, icon in found[by_class[name]].items()]
        classes[name] = drop_near_duplicates([d for d in drawn if d is not None])
    kept, notes = choose_classes("emoji", classes, min_images=4, n_classes=N_EMOJI)
    return Collected("emoji", kept, {n: icons.credit(n) for n in EMOJI_SETS}, set_in(DRAWN["emoji"]), notes=notes)


def country(code: str) -> str | None:
    """'1f1eb-1f1f7' -> 'fr'; None for what is not a pair of regional letters."""
    parts = [int(part, 16) for part in code.split("-")]
    if len(parts) != 2 or not all(0x1F1E6 <= part <= 0x1F1FF for part in parts):
        return None
    return "".join(chr(part - 0x1F1E6 + ord("a")) for part in parts)


def collect_flags(icons: IconSets) -> Collected:
    icons.load([*FLAG_SETS, *CHARACTER_MAPS])
    by_name, class_names = code_points(icons)
    countries = {name: country(code) for name, code in by_name.items()}
    names = {country(code): name.removeprefix("flag-") for code, name in class_names.items() if country(code)}
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in FLAG_SETS:
        for icon in icons.icons(name):
            if name in ("twemoji", "emojione", "emojione-monotone"):
                key = countries.get(icon.replace("flag-for-", "flag-"))
            else:  # these sets name their icons by country code; 'flag' adds the shape: fr-1x1, fr-4x3
                key = re.sub(r"-(1x1|4x3)$", "", icon) if name == "flag" else icon
            if key in names and key not in AMBIGUOUS_FLAGS:
                found[key].append((name, icon))  # type: ignore[index]
    classes: dict[str, list[Drawing]] = {}
    for key in sorted(found):
        drawn = [icons.draw(name, icon) for name, icon in found[key]]
        classes[names[key]] = drop_near_duplicates([d for d in drawn if d is not None])
    kept, notes = choose_classes("flags", classes, min_images=3, n_classes=230)
    return Collected("flags", kept, {n: icons.credit(n) for n in FLAG_SETS}, fly, notes=notes)


def fly(image: Image.Image, rng: Random) -> Image.Image:
    """A flag in the wind (a sine along its length, shaded), sheared and squeezed, then composed."""
    pixels = np.asarray(image).astype(np.float32)
    height, width = pixels.shape[:2]
    amplitude, waves, phase = rng.uniform(0, 0.07) * height, rng.uniform(0.6, 1.8), rng.uniform(0, 2 * math.pi)
    margin = int(amplitude) + 1
    waved = np.zeros((height + 2 * margin, width, 4), np.float32)
    for x in range(width):
        angle = 2 * math.pi * waves * x / width + phase
        top = margin + round(amplitude * math.sin(angle))
        waved[top : top + height, x] = pixels[:, x]
        if amplitude > 1:
            waved[top : top + height, x, :3] *= 1 - 0.22 * (0.5 + 0.5 * math.cos(angle))
    flag = Image.fromarray(np.clip(waved, 0, 255).astype(np.uint8))
    shear, squeeze = rng.uniform(-0.18, 0.18), rng.uniform(0.7, 1.1)
    flag = flag.resize((max(8, int(flag.width * squeeze)), flag.height), Image.Resampling.BICUBIC)
    drop = shear * flag.height  # how far the right edge moves down, in pixels
    size = (flag.width, flag.height + math.ceil(abs(drop)))
    sheared = (1, 0, 0, drop / flag.width, 1, -max(drop, 0))
    flag = flag.transform(size, Image.Transform.AFFINE, sheared, Image.Resampling.BICUBIC)
    return compose(flag, rng, Style(tilt=7, smallest=0.7, largest=1.0, white=0.15))
