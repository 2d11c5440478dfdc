"""Fonts and kanji: words and characters set in openly licensed type."""

from __future__ import annotations

import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from udonlib.data.miniuned.artwork import Drawing, Style, generator, stable_hash, trim
from udonlib.data.miniuned.collected import Collected, choose_classes, set_in
from udonlib.data.miniuned.dedupe import drop_near_duplicates
from udonlib.data.miniuned.sources import BuildError, Credit, Downloads, Package

TYPE_SIZE = 80  # pixels per em
WEIGHTS = ("400", "700", "900")  # of kanji fonts, in the order of preference
MIN_FONTS = 16  # a character's class needs so many fonts that hold it
N_KANJI, N_CANDIDATES = 440, 470
VOWELS, CONSONANTS = "aeiou", "bcdfghklmnprstvwy"


def font_credit(downloads: Downloads, package: Package) -> Credit:
    """Author and licence as the package states them, twice: both statements must agree."""
    about = downloads.members(package, {"package.json", "metadata.json"}.__contains__)
    manifest, metadata = json.loads(about["package.json"]), json.loads(about["metadata.json"])
    licence = metadata["license"]
    if licence["type"] != manifest["license"]:
        raise BuildError(
            f"{package.label}: licence {licence['type']!r} in metadata.json, {manifest['license']!r} in package.json"
        )
    author = re.split(r"(?<=\S) \S+\.ttf: ", licence.get("attribution") or manifest["author"])[0]
    return Credit(package.label, metadata["family"], author, licence["type"], manifest.get("homepage", ""))


def open_font(content: bytes) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(io.BytesIO(content), TYPE_SIZE, layout_engine=ImageFont.Layout.BASIC)


def ink(font: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
    """The text as a black silhouette (RGBA), trimmed; None where the font draws nothing."""
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
    if right - left < 3 or bottom - top < 3:
        return None
    mask = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(mask).text((2 - left, 2 - top), text, fill=255, font=font)
    image = Image.new("RGBA", mask.size)
    image.putalpha(mask)
    return trim(image, smallest_side=4)


def random_word(rng: Random) -> str:
    """Three to five letters that can be spoken, mostly capitalised, sometimes with a figure or a mark."""
    syllables = []
    for _ in range(2):
        syllable = rng.choice(CONSONANTS) + rng.choice(VOWELS)
        syllables.append(syllable + (rng.choice(CONSONANTS) if rng.random() < 0.5 else ""))
    word = "".join(syllables)[: rng.randint(3, 5)]
    kind = rng.random()
    word = word.capitalize() if kind < 0.6 else word.upper() if kind < 0.7 else word
    return word[:2] + rng.choice("0123456789&?!") if rng.random() < 0.12 else word


def specimen(font: ImageFont.FreeTypeFont) -> np.ndarray | None:
    """A font's look as float32 in 0..1: two words squeezed to 64 x 24; None where it lacks their letters."""
    parts = [ink(font, text) for text in ("Hamburg", "gaseQ")]
    grey = [np.asarray(p.getchannel("A").resize((64, 24), Image.Resampling.BOX)) for p in parts if p is not None]
    return np.concatenate(grey).astype(np.float32) / 255 if len(grey) == 2 else None


def collect_fonts(downloads: Downloads) -> Collected:
    """Families as classes: random words in random weights. Families that look like an earlier one are left out."""
    classes: dict[str, list[Drawing]] = {}
    looks: dict[str, np.ndarray] = {}
    owed: dict[str, Credit] = {}
    notes: list[str] = []
    pattern = re.compile(r"files/.*-latin-(300|400|700|900)-(normal|italic)\.woff2")
    for package in downloads.of("fonts"):
        family = package.name.split("/")[1]
        files = downloads.members(package, lambda name: pattern.fullmatch(name) is not None)
        styles = {re.sub(r".*-latin-|\.woff2", "", name): open_font(content) for name, content in files.items()}
        regular = "400-normal" if "400-normal" in styles else min(styles)
        look = specimen(styles[regular])
        if look is None:
            notes.append(f"family {family}: lacks Latin letters")
            continue
        twin = next((name for name, other in looks.items() if np.abs(look - other).mean() < 0.045), None)
        if twin is not None:
            notes.append(f"family {family}: looks like {twin}")
            continue
        looks[family] = look
        owed[package.name] = font_credit(downloads, package)
        rng = generator("fonts", family)
        drawings: dict[str, Drawing] = {}
        for _ in range(rng.randint(14, 30)):
            word = random_word(rng)
            style = regular if rng.random() < 0.5 else rng.choice(sorted(styles))
            image = ink(styles[style], word)
            if image is not None and image.width > 2.6 * image.height:
                word = word[:3]
                image = ink(styles[style], word)
            if image is not None:
                drawings.setdefault(word, Drawing(image, f"{package.name}:{style}:{word}"))
        classes[family] = list(drawings.values())
    return Collected(
        "fonts", classes, owed, set_in(Style(tilt=4, smallest=0.8, largest=1.0)), artwork=False, notes=notes
    )


def common_characters() -> set[int]:
    """Code points of the kanji in JIS level 1 that GB 2312 holds too: known to Japanese and Chinese fonts alike."""
    found = set()
    for code in range(0x4E00, 0xA000):
        try:
            japanese = int.from_bytes(chr(code).encode("shift_jis"), "big")
            chr(code).encode("gb2312")
        except UnicodeEncodeError:
            continue
        if 0x889F <= japanese <= 0x9872:
            found.add(code)
    return found


def ranges(text: str) -> Iterator[int]:
    """The code points of a CSS unicode-range such as 'U+4E00-4E10, U+5B57, U+30??'."""
    for part in text.split(","):
        part = part.strip().upper().removeprefix("U+")
        first, _, last = part.partition("-")
        yield from range(int(first.replace("?", "0"), 16), int((last or first).replace("?", "F"), 16) + 1)


def files_by_character(files: dict[str, bytes], wanted: set[int], family: str) -> dict[int, str]:
    """Which of a font's subset files draws each wanted character, regular weight preferred."""
    found: dict[int, str] = {}
    for subset, text in json.loads(files["unicode.json"]).items():
        names = [f"files/{family}-{subset.strip('[]')}-{weight}-normal.woff2" for weight in WEIGHTS]
        file = next((name for name in names if name in files), None)
        if file is not None:
            for code in ranges(text):
                if code in wanted:
                    found.setdefault(code, file)
    return found


def collect_kanji(downloads: Downloads) -> Collected:
    """Characters as classes: one drawing per font, long-tailed numbers of fonts."""
    wanted = common_characters()
    where: dict[str, dict[int, str]] = {}  # package -> character -> subset file
    pattern = re.compile(r"unicode\.json|files/.*-(400|700|900)-normal\.woff2")
    contents: dict[str, dict[str, bytes]] = {}
    for package in downloads.of("kanji"):
        contents[package.name] = downloads.members(package, lambda name: pattern.fullmatch(name) is not None)
        where[package.name] = files_by_character(contents[package.name], wanted, package.name.split("/")[1])
    n_fonts = {code: sum(code in held for held in where.values()) for code in wanted}
    candidates = sorted((code for code in wanted if n_fonts[code] >= MIN_FONTS), key=lambda c: stable_hash("kanji", c))
    drawn: dict[int, list[Drawing]] = defaultdict(list)
    for name, held in where.items():
        opened: dict[str, ImageFont.FreeTypeFont] = {}
        for code in candidates[:N_CANDIDATES]:
            if code not in held:
                continue
            file = held[code]
            if file not in opened:
                opened[file] = open_font(contents[name][file])
            font = opened[file]
            image = ink(font, chr(code))
            blank = font.getmask("\uffff")  # what the font draws for a character that it lacks
            if image is not None and bytes(font.getmask(chr(code))) != bytes(blank):
                drawn[code].append(Drawing(image, f"{name}:U+{code:04X}"))
    classes: dict[str, list[Drawing]] = {}
    for code, drawings in drawn.items():
        number = round(5 * math.exp(abs(generator("kanji", "number", code).gauss(0, 0.75))))
        drawings = sorted(drawings, key=lambda d: stable_hash("kanji", d.source))
        classes[f"U+{code:04X}"] = drop_near_duplicates(drawings)[: min(number, 22)]
    kept, notes = choose_classes("kanji", classes, min_images=5, n_classes=N_KANJI)
    owed = {package.name: font_credit(downloads, package) for package in downloads.of("kanji")}
    return Collected("kanji", kept, owed, set_in(Style(tilt=6, smallest=0.7, largest=1.0)), notes=notes)
