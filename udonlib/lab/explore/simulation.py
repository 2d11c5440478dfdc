"""What the allocation would have been: the sampler of a training, fed with learning curves in place of a model.

The windows, schedules and updates are those of `training.sampler.Sampler` itself; only the losses are made up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped

from udonlib.errors import UserError
from udonlib.training.sampler import Sampler

RULES = ("relative_loss", "remaining_loss", "progress")  # signals of the dynamic sampler beside the paper's, the loss
STRATEGIES = ("dynamic", "round_robin", "balanced", "dataset_size", "fixed", "square_root", "temperature", *RULES)
LEAST_FLOOR = 0.2  # of `progress`, where the setting has none: without one a domain that rests is never seen again
MAX_DRAWS = 400_000_000  # a few seconds: each window draws a schedule of the full length
HUNGER = 0.5  # a domain with less than this part of what its loss claims starves


@dataclass(frozen=True)
class Setting:
    """What is trained, besides the strategy. Names and meanings are those of `udonlib.params.TrainParams`.

    Args:
        sizes: training images of each domain, in the catalog's order.
        n_classes: the same of classes, which `relative_loss` needs; empty: as many everywhere.
        shares: wished share of each domain, for the strategy `fixed`; empty: equal ones.
    """

    sizes: Mapping[str, int]
    steps: int = 1000
    batch_size: int = 128
    domains_per_batch: int = 1
    update_every: int = 50
    smoothing: float = 0.0
    initial: str = "round_robin"
    shares: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    floor: float = 0.0
    alpha: float = 0.3
    signal: str = "loss"
    order: str = "random"
    n_classes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch_size % self.domains_per_batch:
            raise UserError(
                f"parameter 'domains_per_batch': found {self.domains_per_batch}, expected a divisor of batch_size = "
                f"{self.batch_size}"
            )
        missing = [name for name in self.sizes if self.shares and name not in self.shares]
        if missing or (self.shares and not sum(self.shares[name] for name in self.sizes) > 0):
            found = ", ".join(f"{name} {share:g}" for name, share in self.shares.items())
            raise UserError(
                f"parameter 'fixed_shares': found {found}, expected a share for each of {', '.join(self.sizes)}, "
                "not all of them 0"
            )


@dataclass(frozen=True, eq=False)
class Simulation:
    """What a strategy gives each domain.

    starts: first step of each window. shares: allocation of each window, sums to 1. seen: images of each domain until
        the start of each window and, last, until the end. losses: predicted loss at the same moments.
    """

    strategy: str
    names: tuple[str, ...]
    steps: int
    starts: Int[np.ndarray, "windows"]
    shares: Float[np.ndarray, "windows domains"]
    seen: Int[np.ndarray, "moments domains"]
    losses: Float[np.ndarray, "moments domains"]


def simulate(curves: Mapping[str, LearningCurve], setting: Setting, strategy: str = "dynamic") -> Simulation:
    """Run the sampler over a whole training, with the losses that the curves predict for the images it draws.

    Args:
        curves: of each domain of the setting.
        strategy: one of STRATEGIES; `dynamic` follows the setting's signal, those of RULES are dynamic by their own.
    """
    names = tuple(setting.sizes)
    parts = setting.domains_per_batch
    signal = strategy if strategy in RULES else setting.signal
    sampler = Sampler(
        names,
        list(setting.sizes.values()),
        strategy="dynamic" if strategy in RULES else strategy,
        n_slots=setting.steps * parts,
        update_every=setting.update_every * parts,
        initial=setting.initial,
        shares=setting.shares or dict.fromkeys(names, 1.0),
        smoothing=setting.smoothing,
        seed=setting.seed,
        alpha=setting.alpha,
        signal=signal,
        n_classes=[setting.n_classes.get(name, 2) for name in names],
        floor=setting.floor or (LEAST_FLOOR if signal == "progress" else 0.0),
        order=setting.order,
    )
    seen = np.zeros(len(names), dtype=np.int64)
    starts, shares, moments = [], [], [seen.copy()]
    while sampler.start < sampler.n_slots:
        starts.append(sampler.start // parts)
        shares.append(sampler.weights.copy())
        drawn = np.bincount(sampler.window(), minlength=len(names)) * (setting.batch_size // parts)
        for d in np.flatnonzero(drawn):
            mean = curves[names[d]].mean(float(seen[d]), float(seen[d] + drawn[d]))
            sampler.record(names[d], mean * drawn[d], int(drawn[d]))
        seen += drawn
        moments.append(seen.copy())
        sampler.advance()
    at = np.stack(moments)
    losses = np.stack([curves[name].loss(at[:, d]) for d, name in enumerate(names)], axis=1)
    allocation = np.array(shares).reshape(-1, len(names))
    return Simulation(strategy, names, setting.steps, np.array(starts, dtype=np.int64), allocation, at, losses)


def simulate_all(curves: Mapping[str, LearningCurve], setting: Setting, strategies: Sequence[str]) -> list[Simulation]:
    """`simulate` each of some strategies.

    Raises:
        UserError: "parameter 'update_every': ... would take too long" where a person would wait for more than seconds.
    """
    n_windows = -(-setting.steps // setting.update_every)
    if setting.steps * setting.domains_per_batch * n_windows * len(strategies) > MAX_DRAWS:
        raise UserError(
            f"parameter 'update_every': found {setting.update_every:,} for {setting.steps:,} steps, but {n_windows:,} "
            "windows would take too long here: choose longer ones"
        )
    return [simulate(curves, setting, strategy) for strategy in strategies]


def outcome(simulation: Simulation, sizes: Mapping[str, int]) -> pd.DataFrame:
    """Tabulate what each domain got, and what it would claim by its loss at the end.

    Columns: domain; images; share (of all images); to_equal (share times the number of domains); passes (over its
    training images); loss (predicted, at the end); claim (its part of the sum of these losses, which is what UDON's
    rule would give it next); fed (share / claim); starves (fed < 0.5).
    """
    images = simulation.seen[-1]
    share = images / max(1, images.sum())
    loss = simulation.losses[-1]
    claim = loss / loss.sum() if loss.sum() > 0 else np.full(len(loss), 1 / len(loss))
    table = pd.DataFrame({"domain": simulation.names, "images": images, "share": share})
    table["to_equal"] = share * len(table)
    table["passes"] = images / np.maximum(1, [sizes[name] for name in simulation.names])
    table["loss"], table["claim"] = loss, claim
    table["fed"] = share / np.maximum(claim, 1e-12)
    table["starves"] = table["fed"] < HUNGER
    return table


def verdict(table: pd.DataFrame) -> str:
    """Say in a sentence who starves, and who gets least of what it has and of an equal share."""
    hungry = [
        f"{row.domain} starves ({100 * row.share:.1f}% of the images, its loss claims {100 * row.claim:.1f}%)"
        for row in table[table["starves"]].sort_values("fed").itertuples()
    ]
    fewest = table.loc[table["passes"].idxmin()]
    least = table.loc[table["share"].idxmin()]
    facts = [
        f"fewest passes: {fewest['domain']}, {fewest['passes']:.1f}",
        f"least share: {least['domain']}, {least['to_equal']:.2f} of an equal one"
        if least["to_equal"] < 0.99
        else "shares are equal",
    ]
    return "; ".join([", ".join(hungry) or "nobody starves", *facts]) + "."


def compare(simulation: Simulation, recorded: pd.DataFrame) -> pd.DataFrame:
    """Put the recorded allocation beside the simulated one: columns step, domain, recorded, simulated, first.

    Windows that the run did not reach are left out. `first` marks the window before the first update, which no loss
    decides.

    Args:
        recorded: columns step, domain, weight: the weight that holds from this step on.
    """
    rows = []
    for d, name in enumerate(simulation.names):
        part = recorded[recorded["domain"] == name].sort_values("step", kind="stable")
        steps, weights = part["step"].to_numpy(), part["weight"].to_numpy(float)
        at = np.searchsorted(steps, simulation.starts, side="right") - 1  # the last one set until this step
        reached = (at >= 0) & (simulation.starts <= steps.max(initial=-1))
        rows.append(
            pd.DataFrame(
                {
                    "step": simulation.starts[reached],
                    "domain": name,
                    "recorded": weights[at[reached]],
                    "simulated": simulation.shares[reached, d],
                    "first": simulation.starts[reached] == 0,
                }
            )
        )
    return pd.concat(rows, ignore_index=True)


def deviation(compared: pd.DataFrame) -> tuple[float, float]:
    """Mean absolute difference of the recorded shares to the simulated ones, and to equal shares, in percentage points.

    The window before the first update does not count. The second figure is what knowing nothing would give: a
    simulation is worth something as far as it is below it. Both are nan where nothing was updated.
    """
    rows = compared[~compared["first"]]
    if rows.empty:
        return float("nan"), float("nan")
    equal = 1 / rows["domain"].nunique()
    return tuple(100 * float((rows["recorded"] - other).abs().mean()) for other in (rows["simulated"], equal))  # type: ignore[return-value]


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
