"""Drawings and how they become pictures: ink, background, tilt, size, place, from a generator of each picture's own."""

from __future__ import annotations

import colorsys
import hashlib
import math
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image

SIZE = 48  # pixels of a finished picture
CANVAS = 2 * SIZE  # pictures are composed at twice the size and reduced
WHITE, NEAR_BLACK, NEAR_WHITE = (255, 255, 255), (20, 20, 20), (250, 250, 250)
LUMA = np.array([0.3, 0.59, 0.11], np.float32)

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Drawing:
    """One piece of artwork (RGBA) or a finished picture (RGB).

    `source` is '<key>:<item>', the key being that of the credits. `role` places a picture in a split where the class
    does not decide it (fashion: train, val, test; earth: query, index).
    """

    image: Image.Image
    source: str
    role: str = ""


@dataclass(frozen=True)
class Style:
    """How drawings are set: tilt in degrees (standard deviation), longest side over canvas, share of white grounds."""

    tilt: float = 8.0
    smallest: float = 0.62
    largest: float = 0.96
    white: float = 0.35


# Domains whose pictures are drawings on a ground and nothing more, and how they are set.
DRAWN = {"emoji": Style(), "logos": Style(tilt=5), "icons": Style(tilt=7)}


def stable_hash(*key: object) -> int:
    """A 64-bit number from the key's text: the same on every machine, in every process."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, key)).encode()).digest()[:8], "big")


def generator(*key: object) -> Random:
    """The random generator of one item, so that no item's draws depend on another's."""
    return Random(stable_hash(*key))


def luminance(colour: Colour) -> float:
    return float(np.dot(LUMA, colour)) / 255


def hsv(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return int(255 * red), int(255 * green), int(255 * blue)


def trim(image: Image.Image, smallest_side: int = 10) -> Image.Image | None:
    """Cut away the transparent margin; None where next to nothing is left."""
    box = image.getchannel("A").point(lambda alpha: 255 if alpha > 12 else 0).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    return image if min(image.size) >= smallest_side else None


def is_monochrome(image: Image.Image) -> bool:
    """True where the opaque pixels share one colour, so that the ink may be chosen freely."""
    pixels = np.asarray(image.convert("RGBA")).astype(np.float32)
    opaque = pixels[..., 3] > 128
    return bool(opaque.sum() < 20 or pixels[opaque][:, :3].std(0).max() < 6)


def choose_background(rng: Random, avoid: float | None, white: float) -> Colour:
    """White, light or dark, at least 0.3 in luminance away from `avoid` (the drawing's own) where that is given."""
    colour: Colour = WHITE
    for _ in range(50):
        kind = rng.random()
        if kind < white:
            colour = WHITE
        elif kind < white + 0.35:
            colour = hsv(rng.random(), rng.uniform(0.05, 0.45), rng.uniform(0.8, 1.0))
        else:
            colour = hsv(rng.random(), rng.uniform(0.2, 0.9), rng.uniform(0.1, 0.55))
        if avoid is None or abs(luminance(colour) - avoid) > 0.3:
            return colour
    return colour


def choose_ink(rng: Random, background: Colour) -> Colour:
    """A colour at least 0.35 in luminance away from the background; near-black or near-white in three cases of ten."""
    for _ in range(60):
        if rng.random() < 0.7:
            ink = hsv(rng.random(), rng.random(), rng.uniform(0.05, 1.0))
        else:
            ink = NEAR_BLACK if rng.random() < 0.5 else NEAR_WHITE
        if abs(luminance(ink) - luminance(background)) > 0.35:
            return ink
    return NEAR_BLACK if luminance(background) > 0.5 else NEAR_WHITE


def paint_background(rng: Random, colour: Colour) -> Image.Image:
    """A flat field, or in a third of all cases one that brightens along a random direction."""
    pixels = np.ones((CANVAS, CANVAS, 3), np.float32) * np.array(colour, np.float32)
    if rng.random() < 0.35:
        ramp = np.linspace(-1, 1, CANVAS, dtype=np.float32)
        angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0.05, 0.22)
        slope = math.cos(angle) * ramp[None, :] + math.sin(angle) * ramp[:, None]
        pixels *= (1 + strength * slope)[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).convert("RGBA")


def recolour(image: Image.Image, ink: Colour) -> Image.Image:
    """The drawing's silhouette in one colour."""
    inked = Image.new("RGBA", image.size, (*ink, 0))
    inked.putalpha(image.getchannel("A"))
    return inked


def fit(image: Image.Image, longest: float) -> Image.Image:
    """Scaled so that the longer side has `longest` pixels (at least 2 on the shorter)."""
    zoom = longest / max(image.size)
    width, height = (max(2, int(side * zoom)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def compose(image: Image.Image, rng: Random, style: Style) -> Image.Image:
    """Set a drawing (RGBA) on a background and give the finished picture, RGB [SIZE, SIZE].

    Everything is drawn from `rng`: the same generator state gives the same pixels.
    """
    ground, drawing = set_on_ground(image, rng, style)
    return reduced(Image.alpha_composite(ground, drawing).convert("RGB"))


def set_on_ground(image: Image.Image, rng: Random, style: Style) -> tuple[Image.Image, Image.Image]:
    """A background, and a drawing (RGBA) as it lies on it, both RGBA [CANVAS, CANVAS].

    One-coloured drawings get a random ink that stands out from the background; for coloured ones the background stands
    out from the drawing.
    """
    if is_monochrome(image):
        colour = choose_background(rng, None, style.white)
        image = recolour(image, choose_ink(rng, colour))
    else:
        pixels = np.asarray(image).astype(np.float32)
        opaque = pixels[pixels[..., 3] > 128][:, :3]
        colour = choose_background(rng, float((opaque @ LUMA).mean()) / 255, style.white)
    background = paint_background(rng, colour)
    image = fit(image, rng.uniform(style.smallest, style.largest) * CANVAS)
    image = image.rotate(rng.gauss(0.0, style.tilt), Image.Resampling.BICUBIC, expand=True)
    if max(image.size) > CANVAS:
        image = fit(image, CANVAS)
    drawing = Image.new("RGBA", background.size, (0, 0, 0, 0))
    drawing.paste(image, (rng.randint(0, CANVAS - image.size[0]), rng.randint(0, CANVAS - image.size[1])))
    return background, drawing


def reduced(canvas: Image.Image) -> Image.Image:
    """What was composed, at the size of a finished picture."""
    return canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
