"""What the allocation would have been: the sampler of a training, fed with learning curves in place of a model.

The windows, schedules and updates are those of `udonlib.sampler.Sampler` itself; only the losses are made up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from udonlib.errors import UserError
from udonlib.learningcurves import LearningCurve
from udonlib.sampler import Sampler

STRATEGIES = ("dynamic", "round_robin", "balanced", "dataset_size", "fixed")
MAX_DRAWS = 400_000_000  # a few seconds: each window draws a schedule of the full length
HUNGER = 0.5  # a domain with less than this part of what its loss claims starves


@dataclass(frozen=True)
class Setting:
    """What is trained, besides the strategy. Names and meanings are those of `udonlib.params.TrainParams`.

    Args:
        sizes: training images of each domain, in the catalog's order.
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
        strategy: one of STRATEGIES.
    """
    names = tuple(setting.sizes)
    parts = setting.domains_per_batch
    sampler = Sampler(
        names,
        list(setting.sizes.values()),
        strategy=strategy,
        n_slots=setting.steps * parts,
        update_every=setting.update_every * parts,
        initial=setting.initial,
        shares=setting.shares or dict.fromkeys(names, 1.0),
        smoothing=setting.smoothing,
        seed=setting.seed,
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
