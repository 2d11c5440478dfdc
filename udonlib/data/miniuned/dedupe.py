"""Near-duplicates: of drawings (the same artwork in another colour) and of pictures (the same pixels, about)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from udonlib.data.miniuned.artwork import Drawing, is_monochrome, stable_hash

SIDE = 24  # drawings are compared on a square of this side, aspect kept
THUMB = 12  # pictures are compared at this side: coarse enough that a pixel of shift changes little
SAME_PICTURE = 0.96  # correlation at and above which two pictures are near-duplicates


@dataclass(frozen=True)
class Signatures:
    """Silhouettes float32 [n, SIDE * SIDE] in 0..1, colours [n, SIDE * SIDE * 3] times alpha, areas [n]."""

    alpha: np.ndarray
    colour: np.ndarray
    area: np.ndarray

    @classmethod
    def of(cls, drawings: Sequence[Drawing]) -> Signatures:
        pairs = [signature(drawing.image) for drawing in drawings]
        alpha = np.stack([a for a, _ in pairs]) if pairs else np.zeros((0, SIDE * SIDE), np.float32)
        colour = np.stack([c for _, c in pairs]) if pairs else np.zeros((0, SIDE * SIDE * 3), np.float32)
        return cls(alpha, colour, alpha.sum(1))

    def near(self, alpha: np.ndarray, colour: np.ndarray, overlap: float, difference: float) -> np.ndarray:
        """Positions whose silhouette overlaps the given (IoU >= overlap) with an equal inside (mean |d| < difference).

        With L1 distance d and areas a, b: soft IoU = (a + b - d) / (a + b + d), at most min(a, b) / max(a, b).
        """
        area = float(alpha.sum())
        close = np.flatnonzero((self.area >= overlap * area) & (overlap * self.area <= area))
        distance = np.abs(self.alpha[close] - alpha).sum(1)
        total = np.maximum(self.area[close] + area, 1e-6)
        close = close[(total - distance) / (total + distance) >= overlap]
        return close[np.abs(self.colour[close] - colour).mean(1) < difference]


def signature(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Silhouette [SIDE * SIDE] and inner colour [SIDE * SIDE * 3] of a drawing; blind to the ink where it is one."""
    zoom = SIDE / max(image.size)
    width, height = (max(1, round(side * zoom)) for side in image.size)
    canvas = Image.new("RGBA", (SIDE, SIDE))
    canvas.paste(image.resize((width, height), Image.Resampling.BOX), ((SIDE - width) // 2, (SIDE - height) // 2))
    pixels = np.asarray(canvas).astype(np.float32) / 255
    alpha = pixels[..., 3]
    colour = np.repeat(alpha[..., None] * 0.5, 3, 2) if is_monochrome(image) else pixels[..., :3] * alpha[..., None]
    return alpha.ravel(), colour.ravel()


def drop_near_duplicates(drawings: Sequence[Drawing]) -> list[Drawing]:
    """The drawings in order, without those that repeat an earlier one (IoU >= 0.90, insides differ by < 0.035)."""
    all_signatures = Signatures.of(drawings)
    kept: list[int] = []
    for i in range(len(drawings)):
        earlier = Signatures(all_signatures.alpha[kept], all_signatures.colour[kept], all_signatures.area[kept])
        if not len(earlier.near(all_signatures.alpha[i], all_signatures.colour[i], 0.90, 0.035)):
            kept.append(i)
    return [drawings[i] for i in kept]


def drop_duplicate_classes(
    classes: Mapping[str, Sequence[Drawing]], min_images: int
) -> tuple[dict[str, list[Drawing]], list[str]]:
    """Classes without the artwork that stands under two labels, and what was dropped, in words.

    Two classes that share two drawings, or a third of the smaller, are one class under two names: the later (in a
    stable order) goes. Otherwise the shared drawing goes from both. A class left with fewer than `min_images` goes too.
    """
    names = sorted(classes, key=lambda name: stable_hash("duplicate classes", name))
    items = [(name, drawing) for name in names for drawing in classes[name]]
    signatures = Signatures.of([drawing for _, drawing in items])
    shared: Counter[tuple[str, str]] = Counter()
    meetings: list[tuple[int, int]] = []
    for i, (name, _) in enumerate(items):
        for j in signatures.near(signatures.alpha[i], signatures.colour[i], 0.93, 0.02).tolist():
            if j > i and items[j][0] != name:
                shared[name, items[j][0]] += 1
                meetings.append((i, j))
    dropped: set[str] = set()
    words: list[str] = []
    for (first, second), count in shared.items():
        same = count >= 2 or count >= 0.34 * min(len(classes[first]), len(classes[second]))
        if same and first not in dropped and second not in dropped:
            dropped.add(second)
            words.append(f"class {second}: repeats {first} ({count} shared)")
    taken = {k for i, j in meetings for k in (i, j) if items[i][0] not in dropped and items[j][0] not in dropped}
    words += [f"drawing {items[k][1].source} of {items[k][0]}: stands in two classes" for k in sorted(taken)]
    kept: dict[str, list[Drawing]] = {name: [] for name in classes if name not in dropped}
    for k, (name, drawing) in enumerate(items):
        if name in kept and k not in taken:
            kept[name].append(drawing)
    words += [f"class {name}: {len(v)} drawings left" for name, v in kept.items() if len(v) < min_images]
    return {name: drawings for name, drawings in kept.items() if len(drawings) >= min_images}, words


def repeats_of(drawings: Sequence[Drawing], held_out: Sequence[Drawing]) -> set[int]:
    """Positions in `drawings` whose artwork also stands in `held_out` (the rule of `drop_near_duplicates`)."""
    signatures, held = Signatures.of(drawings), Signatures.of(held_out)
    found: set[int] = set()
    for alpha, colour in zip(held.alpha, held.colour, strict=True):
        found.update(signatures.near(alpha, colour, 0.90, 0.035).tolist())
    return found


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Pictures uint8 [n, 48, 48, 3] as unit vectors float32 [n, 432]: means of 4 x 4 pixels, centred, scaled.

    The inner product of two is their correlation, blind to brightness and contrast. A picture without any contrast
    (standard deviation below 2 of 255) becomes the zero vector, which is near nothing.
    """
    n, height, width, _ = images.shape
    cells = images.reshape(n, THUMB, height // THUMB, THUMB, width // THUMB, 3).astype(np.float32).mean((2, 4))
    flat = cells.reshape(n, -1)
    flat = flat - flat.mean(1, keepdims=True)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    flat /= np.maximum(norms, 1e-6)
    flat[norms[:, 0] < 2 * np.sqrt(flat.shape[1])] = 0
    return flat


def near_pictures(
    pictures: np.ndarray, others: np.ndarray, threshold: float = SAME_PICTURE
) -> list[tuple[int, int, float]]:
    """Pairs (i, j, correlation) of near-duplicates between thumbnails [n, d] and [m, d], in bounded memory."""
    pairs: list[tuple[int, int, float]] = []
    for start in range(0, len(pictures), 1024):
        correlation = pictures[start : start + 1024] @ others.T
        rows, columns = np.nonzero(correlation >= threshold)
        values = correlation[rows, columns]
        pairs += [(start + int(i), int(j), float(v)) for i, j, v in zip(rows, columns, values, strict=True)]
    return pairs
