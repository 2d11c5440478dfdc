"""How the loss of a domain falls with the images of it that were seen: drawn from a few numbers, or fitted to a run.

A curve knows its own domain alone: what a domain gains from the images of others, from thawing the backbone or from a
falling learning rate is in it only as far as the run that it was fitted to had the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped

from udonlib.errors import UserError

MAX_POINTS = 80  # per domain; more are merged, which loses nothing, since points are means over images
POWERS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
HUBER = 0.15  # relative deviations beyond it count linearly
MAX_RISE = 3.0  # the loss before the first image is at most this multiple of the largest measured one


@dataclass(frozen=True)
class LearningCurve:
    """The mean loss of a domain's images after n of them have been seen. It never rises.

        L(n) = floor + (start - floor) (1 + n / s)^-power,     s = half_images / (2^(1 / power) - 1)

    Args:
        start: loss before the first image, > 0.
        floor: loss that endless training would reach, 0 to start.
        half_images: images after which the loss is halfway between both, > 0.
        power: how steeply it falls in the long run, > 0; the smaller, the longer the tail.

    Raises:
        UserError: "learning curve: found start 2 and floor 3 ..." for values that are no such curve.
    """

    start: float
    floor: float = 0.0
    half_images: float = 1000.0
    power: float = 1.0

    def __post_init__(self) -> None:
        found = (self.start, self.floor, self.half_images, self.power)
        if not (all(map(math.isfinite, found)) and 0 <= self.floor <= self.start > 0 < min(found[2:])):
            raise UserError(
                f"learning curve: found start {self.start:g}, floor {self.floor:g}, half_images {self.half_images:g}, "
                f"power {self.power:g}; expected 0 <= floor <= start, and start, half_images and power above 0"
            )

    @property
    def scale(self) -> float:
        """s of the formula, in images."""
        return self.half_images / (2 ** (1 / self.power) - 1)

    def loss(self, n_images: Shaped[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        """L(n)."""
        return self.floor + (self.start - self.floor) * (1 + n_images / self.scale) ** -self.power

    def mean(self, first: float, last: float) -> float:
        """Mean of L over the images from `first` to `last` (last > first), which is what a record of losses holds."""
        ends = np.array([first, last], dtype=np.float64)
        return float(self.floor + (self.start - self.floor) * _mean_fall(ends[:1], ends[1:], self.scale, self.power)[0])


@dataclass(frozen=True)
class Fit:
    """A curve, and how far the measured points lie from it: the typical ratio of both, minus 1 (0.08 is 8%)."""

    curve: LearningCurve
    residual: float


def fit(
    first: Float[np.ndarray, "points"], last: Float[np.ndarray, "points"], loss: Float[np.ndarray, "points"]
) -> Fit:
    """Fit a curve to mean losses over stretches of images.

    Relative deviations count, since the allocation depends on ratios of losses, weighted by images and damped beyond
    15% (Huber), so that single records do not bend the curve. For each power and half_images of a grid floor and start
    solve a weighted least squares of two unknowns. Fewer than three points give their mean, without a fall.

    Args:
        first: images seen before each stretch.
        last: images seen after it, > first.
        loss: mean loss over it, >= 0.

    Raises:
        UserError: "no losses to fit a learning curve to" where there is no point.
    """
    if not len(loss):
        raise UserError("no losses to fit a learning curve to")
    first, last, loss = _merge(first, last, np.maximum(np.asarray(loss, dtype=np.float64), 1e-6))
    n = last - first
    if len(loss) < 3:
        level = float(np.average(loss, weights=n))
        return Fit(LearningCurve(level, level), _residual(loss, np.full(len(loss), level), n))
    halves = np.geomspace(max(last[-1] / 1000, n[0] / 8), 3 * last[-1], 80)  # a fall within the first point hides in it
    shapes = [LearningCurve(1.0, 0.0, float(half), power) for power in POWERS for half in halves]
    falls = np.stack([_mean_fall(first, last, shape.scale, shape.power) for shape in shapes])
    expected = np.broadcast_to(loss, falls.shape)
    damping = np.ones_like(falls)
    for _ in range(10):
        floor, rise = _solve(falls, loss, n * damping / expected**2)
        expected = np.maximum(floor[:, None] + rise[:, None] * falls, 1e-6)
        damping = HUBER / np.maximum(np.abs(loss - expected) / expected, HUBER)
    deviation = np.abs(np.log(loss / expected))
    cost = np.where(deviation < HUBER, deviation**2 / 2, HUBER * (deviation - HUBER / 2)) @ n
    cost[floor + rise > MAX_RISE * loss.max()] = np.inf
    best = int(cost.argmin())
    start, lowest = float(floor[best] + rise[best]), float(floor[best])
    curve = LearningCurve(start, min(lowest, start), shapes[best].half_images, shapes[best].power)
    return Fit(curve, _residual(loss, expected[best], n))


def fit_points(points: pd.DataFrame) -> dict[str, Fit]:
    """Fit the curve of each domain, in the order in which the domains come.

    Args:
        points: columns domain, first, last, loss, as `fit` takes them.
    """
    parts = points.sort_values("first", kind="stable").groupby("domain", sort=False)
    fits = {
        str(name): fit(*(part[column].to_numpy(float) for column in ("first", "last", "loss"))) for name, part in parts
    }
    return {name: fits[name] for name in dict.fromkeys(points["domain"])}


def guessed(n_classes: int, n_images: int) -> LearningCurve:
    """Draw a curve where nothing was measured: from a guess among the classes, halfway after one pass, to a tenth."""
    start = math.log(max(2, n_classes))
    return LearningCurve(start, start / 10, float(max(1, n_images)))


def _mean_fall(
    first: Float[np.ndarray, "points"], last: Float[np.ndarray, "points"], scale: float, power: float
) -> Float[np.ndarray, "points"]:
    """Mean of (1 + n / scale)^-power over n from `first` to `last`."""
    low, high = 1 + first / scale, 1 + last / scale
    area = np.log(high / low) if power == 1 else (high ** (1 - power) - low ** (1 - power)) / (1 - power)
    return scale / (last - first) * area


def _solve(
    falls: Float[np.ndarray, "shapes points"],
    loss: Float[np.ndarray, "points"],
    weights: Float[np.ndarray, "shapes points"],
) -> tuple[Float[np.ndarray, "shapes"], Float[np.ndarray, "shapes"]]:
    """Floor and rise >= 0 of loss = floor + rise fall by weighted least squares, for each shape."""
    w, wf, wff = weights.sum(1), (weights * falls).sum(1), (weights * falls**2).sum(1)
    wy, wfy = weights @ loss, (weights * falls) @ loss
    determinant = np.maximum(w * wff - wf**2, 1e-12 * w * wff)
    floor, rise = (wff * wy - wf * wfy) / determinant, (w * wfy - wf * wy) / determinant
    floor, rise = np.where(floor < 0, 0.0, floor), np.where(floor < 0, wfy / wff, rise)
    return np.where(rise < 0, wy / w, floor), np.maximum(rise, 0.0)


def _merge(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At most MAX_POINTS points: neighbouring ones become one of their images together."""
    first, last, loss = (np.asarray(column, dtype=np.float64) for column in columns)
    if len(loss) <= MAX_POINTS:
        return first, last, loss
    starts = np.linspace(0, len(loss), MAX_POINTS, endpoint=False).astype(int)
    n = last - first
    merged = np.add.reduceat(n * loss, starts) / np.add.reduceat(n, starts)
    return first[starts], last[np.append(starts[1:], len(loss)) - 1], merged


def _residual(loss: np.ndarray, expected: np.ndarray, n: np.ndarray) -> float:
    return float(np.expm1(np.average(np.abs(np.log(loss / expected)), weights=n)))
