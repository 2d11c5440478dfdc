"""Which domain each step trains on: static allocations, and UDON's dynamic one.

An *allocation* is the share of the schedule that each domain gets. A *schedule* is the order in which the domains
come. A *window* is the stretch between two updates of the allocation; after each window the dynamic sampler sets the
weight of a domain to its share of the mean losses, so that domains that learn slowly get more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np
from jaxtyping import Float, Int, Shaped

from udonlib.data.catalog import Domain
from udonlib.fields import Strategy
from udonlib.params import TrainParams


def initial_weights(strategy: str, sizes: Sequence[float], alpha: float = 0.3) -> Float[np.ndarray, "domains"]:
    """Weights that sum to 1: `dataset_size` and `fixed` in proportion to `sizes`, `balanced` and `round_robin` equal.

    Between the two are `square_root` and `temperature`, in proportion to sizes^0.5 and sizes^alpha, as text in many
    languages is sampled (XLM-R: 0.3).

    Args:
        sizes: training images per domain, or for `fixed` the shares wished for (any positive scale).
        alpha: of `temperature`, 0 to 1.

    Raises:
        ValueError: "unknown allocation ..." for another strategy; "sizes must be finite ..." for those.
    """
    values = np.asarray(sizes, dtype=np.float64)
    if values.size == 0 or not np.all(np.isfinite(values)) or np.any(values < 0) or values.sum() <= 0:
        raise ValueError(f"sizes must be finite, none negative and not all 0; found {list(sizes)}")
    if strategy in ("dataset_size", "fixed"):
        return values / values.sum()
    if strategy in ("balanced", "round_robin"):
        return np.full(len(values), 1 / len(values))
    if strategy in ("square_root", "temperature"):
        powers = values ** (0.5 if strategy == "square_root" else alpha)
        return powers / powers.sum()
    raise ValueError(f"unknown allocation {strategy!r}; valid are {', '.join(get_args(Strategy))}")


def effective_shares(
    weights: Float[np.ndarray, "domains"],
    names: Sequence[str],
    multipliers: Mapping[str, float],
    locks: Mapping[str, float],
) -> Float[np.ndarray, "domains"]:
    """The allocation that a person's steering makes of the adaptive weights.

        share_d = lock_d                                          for locked domains, summing to L
        share_d = (1 - L) w_d m_d / sum_free w m                  for the free ones

    A domain without a multiplier has m = 1. Locks that sum to more than 1, or that leave no free domain to take the
    rest, are divided by their sum, so that all shares sum to 1. Without steering these are the weights, to the bit.

    Raises:
        ValueError: "no domain is left" where every lock and every weight times multiplier is 0.
    """
    if not multipliers and not locks:
        return np.array(weights, dtype=np.float64)
    free = np.array([w * multipliers.get(name, 1.0) for name, w in zip(names, weights.tolist(), strict=True)])
    free[[place for place, name in enumerate(names) if name in locks]] = 0
    pinned = np.array([locks.get(name, 0.0) for name in names])
    if pinned.sum() > 1 or free.sum() == 0:
        free[:] = 0
        if pinned.sum() == 0:
            raise ValueError(f"no domain is left: multipliers {dict(multipliers)}, locks {dict(locks)}")
        return pinned / pinned.sum()
    return pinned + (1 - pinned.sum()) * free / free.sum()


def steps_per_domain(weights: Float[np.ndarray, "domains"], n_steps: int) -> Int[np.ndarray, "domains"]:
    """Steps of each domain in a schedule: floor(n_steps w_d), and for the last domain all that is left over.

    The last one of those that have a share at all.
    """
    weights = np.asarray(weights, dtype=np.float64)
    counts = np.floor(n_steps * weights).astype(np.int64)
    last = np.flatnonzero(weights)[-1]
    counts[last] = 0
    counts[last] = n_steps - counts.sum()
    return counts


def draw_schedule(
    weights: Float[np.ndarray, "domains"], n_steps: int, generator: np.random.Generator
) -> Int[np.ndarray, "steps"]:
    """A random order of the domains with exactly `steps_per_domain` of each."""
    return generator.permutation(np.repeat(np.arange(len(weights)), steps_per_domain(weights, n_steps)))


def even_schedule(
    weights: Float[np.ndarray, "domains"], n_steps: int, generator: np.random.Generator
) -> Int[np.ndarray, "steps"]:
    """An order of the domains with exactly `steps_per_domain` of each, spread over it at equal distances.

        domain d has its slots at  (k + u_d) / n_d,  k = 0 .. n_d - 1,  u_d drawn from [0, 1) once

    So every stretch of the schedule, and every batch of several domains, is shared out as the whole, to a slot or so.
    """
    counts = steps_per_domain(weights, n_steps)
    places = [(np.arange(n) + u) / max(1, n) for n, u in zip(counts, generator.random(len(counts)), strict=True)]
    order = np.argsort(np.concatenate(places), kind="stable")
    return np.repeat(np.arange(len(counts)), counts)[order]


def round_robin_schedule(n_domains: int, n_steps: int) -> Int[np.ndarray, "steps"]:
    """0, 1, .., n_domains - 1, again and again."""
    return np.arange(n_steps) % n_domains


def updated_weights(
    weights: Float[np.ndarray, "domains"],
    loss_sums: Shaped[np.ndarray, "domains"],
    n_images: Shaped[np.ndarray, "domains"],
) -> Float[np.ndarray, "domains"]:
    """UDON's update from the losses of a window: slow learners get more.

        m_d = loss_sum_d / n_d       w_d = m_d / sum_seen m     for the domains seen (n_d > 0)

    A domain that was not seen keeps its weight; then all weights are divided by their sum. Source: UDON sec. 3.3;
    pinned by sampler.npz.

    Raises:
        ValueError: "mean losses must be finite and not negative" for a loss that cannot be shared out.
    """
    seen = np.asarray(n_images) > 0
    new = np.array(weights, dtype=np.float64)
    if not seen.any():
        return new / new.sum()
    means = np.asarray(loss_sums, dtype=np.float64)[seen] / np.asarray(n_images, dtype=np.float64)[seen]
    if not np.all(np.isfinite(means)) or np.any(means < 0):
        raise ValueError(f"mean losses must be finite and not negative, found {means.tolist()}")
    if means.sum() == 0:  # every domain is learned perfectly: nothing to tell them apart by
        return new / new.sum()
    new[seen] = means / means.sum()
    return new if seen.all() else new / new.sum()


def claims(
    signal: str,
    losses: Shaped[np.ndarray, "domains"],
    n_images: Shaped[np.ndarray, "domains"],
    n_classes: Shaped[np.ndarray, "domains"],
    first: Shaped[np.ndarray, "domains"],
    before: Shaped[np.ndarray, "domains"],
) -> Float[np.ndarray, "domains"]:
    """What the domains claim after a window, from their mean losses m_d in it; >= 0, nan where nothing is known.

        loss, gap        m_d                      the paper's; a gap is a loss of the student less the teacher's
        relative_loss    m_d / ln C_d             cross-entropy grows with the number of classes C_d: a guess has ln C_d
        remaining_loss   m_d / first_d            first_d: of the domain's first window
        progress         (before_d - m_d) / n_d   before_d: of the window before in which it was seen, n_d: its images

    A claim below 0 counts as 0. Source: `loss` is UDON sec. 3.3; the others are ours.

    Raises:
        ValueError: "unknown signal ..." for another one.
    """
    with np.errstate(invalid="ignore", divide="ignore"):  # nan where a domain was never seen
        found = {
            "loss": losses,
            "gap": losses,
            "relative_loss": losses / np.log(np.maximum(2, n_classes)),
            "remaining_loss": losses / first,
            "progress": (before - losses) / np.maximum(1, n_images),
        }
    if signal not in found:
        raise ValueError(f"unknown signal {signal!r}; valid are {', '.join(found)}")
    return np.maximum(found[signal], 0)


class Sampler:
    """The schedule of a whole training, window by window.

    `window()` draws the domains of the next window; `record()` takes the losses of each trained step; `advance()` ends
    the window, updates the weights (dynamic strategy) and moves on. `steer()` puts a person's multipliers and locks on
    the weights, and draws what is left of the window anew. As in the reference each window redraws a schedule
    of the full length and takes its own stretch of it; unlike there, a window's losses are exactly those of its own
    steps, whatever is logged when. Everything that decides what comes next is in `state_dict()`.

    Args:
        names: domains in their order.
        sizes: training images of each domain, the shares of `dataset_size`.
        strategy: `dynamic`, or one of the static ones that `initial_weights` knows.
        n_slots: length of the whole schedule. A step that mixes several domains takes several slots.
        update_every: slots per window.
        initial: allocation before the first update (`dynamic`).
        shares: wished shares by domain (`fixed`).
        smoothing: share of the old weights in each update (`dynamic`), in [0, 1).
        seed: of the generator that draws the schedules.
        alpha: of `temperature`.
        signal: what domains claim by (`dynamic`): see `claims`.
        n_classes: of each domain, for `relative_loss`.
        floor: part of each update that all domains share equally (`dynamic`), in [0, 1).
        order: of each schedule: `random`, as `draw_schedule`, or `even`, as `even_schedule`.
    """

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        *,
        strategy: str = "dynamic",
        n_slots: int,
        update_every: int,
        initial: str = "round_robin",
        shares: Mapping[str, float] | None = None,
        smoothing: float = 0.0,
        seed: int = 0,
        alpha: float = 0.3,
        signal: str = "loss",
        n_classes: Sequence[int] | None = None,
        floor: float = 0.0,
        order: str = "random",
    ) -> None:
        self.names = tuple(names)
        self.signal, self.floor, self.order = signal, floor, order
        self._n_classes = np.array(n_classes or [2] * len(self.names))
        self._first = np.full(len(self.names), np.nan)  # mean loss of each domain in the first window that saw it
        self._before = np.full(len(self.names), np.nan)  # and in the latest one
        self.strategy = strategy
        self.smoothing = smoothing
        self.n_slots = n_slots
        self.update_every = update_every
        self._ordered = strategy == "round_robin" or (strategy == "dynamic" and initial == "round_robin")
        allocation = initial if strategy == "dynamic" else strategy
        if allocation == "fixed":
            table = dict(shares or {})
            missing = [name for name in names if name not in table]
            if missing:
                raise ValueError(f"the fixed allocation has no share for {', '.join(missing)}; it has {table}")
            sizes_or_shares: Sequence[float] = [table[name] for name in names]
        else:
            sizes_or_shares = list(sizes)
        self.weights = initial_weights(allocation, sizes_or_shares, alpha)  # the adaptive ones, whatever a person does
        self.multipliers: dict[str, float] = {}
        self.locks: dict[str, float] = {}
        self.start = 0  # first slot of the current window, or of what was left of it when a person steered
        self.stop = min(update_every, n_slots)  # the slot after its last one
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._schedule = self._draw()
        self._clear()

    @property
    def shares(self) -> Float[np.ndarray, "domains"]:
        """The allocation in force: the weights, or what a person's steering makes of them."""
        return effective_shares(self.weights, self.names, self.multipliers, self.locks)

    def _draw(self) -> np.ndarray:
        self._drawn_from = self._generator.bit_generator.state
        if self._ordered and not (self.multipliers or self.locks):
            return round_robin_schedule(len(self.names), self.n_slots)
        draw = even_schedule if self.order == "even" else draw_schedule
        return draw(self.shares, self.n_slots, self._generator)

    def _clear(self) -> None:
        self.loss_sums = np.zeros(len(self.names))
        self.n_images = np.zeros(len(self.names), dtype=np.int64)

    def window(self) -> Int[np.ndarray, "slots"]:
        """Domain of each slot of the current window from `start` on; it is shorter at the end of training."""
        return self._schedule[self.start : self.stop]

    def record(self, name: str, loss_sum: float, n_images: int) -> None:
        """Add the loss, summed over the images of a step, that steers the allocation."""
        d = self.names.index(name)
        self.loss_sums[d] += loss_sum
        self.n_images[d] += n_images

    def advance(self, n_slots: int | None = None) -> None:
        """End the window: update the weights from its losses, draw the next schedule.

        Args:
            n_slots: length of the whole schedule from here on, where the training was given more steps.

        A domain that a person has muted keeps its weight until it is let go.
        """
        longer, self.n_slots = n_slots not in (None, self.n_slots), n_slots or self.n_slots
        self.start, self.stop = self.stop, min(self.stop + self.update_every, self.n_slots)
        if self.strategy == "dynamic":
            updated = self._updated()
            muted = (self.shares == 0) & (self.n_images == 0)
            if muted.any():  # by a person: else its weight would shrink from window to window
                updated[muted] = self.weights[muted]
                updated[~muted] *= (1 - updated[muted].sum()) / updated[~muted].sum()
            self.weights = self.smoothing * self.weights + (1 - self.smoothing) * updated
            if self.floor:
                self.weights = self.floor / len(self.names) + (1 - self.floor) * self.weights
            self._ordered = False
        if longer or not self._ordered or self.multipliers or self.locks:
            self._schedule = self._draw()
        self._clear()

    def _updated(self) -> Float[np.ndarray, "domains"]:
        """The weights by what the domains claim after this window; a domain of which nothing is known keeps its own."""
        if self.signal == "loss":
            return updated_weights(self.weights, self.loss_sums, self.n_images)
        seen = self.n_images > 0
        means = np.where(seen, self.loss_sums / np.maximum(1, self.n_images), np.nan)
        self._first = np.where(np.isnan(self._first), means, self._first)
        claimed = claims(self.signal, means, self.n_images, self._n_classes, self._first, self._before)
        self._before = np.where(seen, means, self._before)
        known = ~np.isnan(claimed)
        return updated_weights(self.weights, np.where(known, claimed, 0), known.astype(np.int64))

    def steer(self, multipliers: Mapping[str, float], locks: Mapping[str, float], slot: int) -> None:
        """Multiply weights and pin shares from `slot` on, in the current window. Its losses so far are kept.

        Args:
            multipliers: domain -> factor of its weight, not negative; 1 for the others.
            locks: domain -> share, in [0, 1].
            slot: the first one that is not trained yet.
        """
        assert self.start <= slot <= self.stop, (self.start, slot, self.stop)
        self.multipliers, self.locks = dict(multipliers), dict(locks)
        self.start = slot
        self._schedule = self._draw()

    def state_dict(self) -> dict:
        """Everything the rest of the schedule depends on, as plain numbers and lists."""
        return {
            "names": list(self.names),
            "start": self.start,
            "stop": self.stop,
            "n_slots": self.n_slots,
            "multipliers": dict(self.multipliers),
            "locks": dict(self.locks),
            "ordered": self._ordered,
            "weights": self.weights.tolist(),
            "loss_sums": self.loss_sums.tolist(),
            "n_images": self.n_images.tolist(),
            "first": [None if np.isnan(loss) else loss for loss in self._first.tolist()],
            "before": [None if np.isnan(loss) else loss for loss in self._before.tolist()],
            "drawn_from": self._drawn_from,  # the generator before the current schedule, which is drawn again
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: "state of domains ..." when it belongs to other domains.
        """
        if list(state["names"]) != list(self.names):
            raise ValueError(f"state of domains {state['names']} does not fit a sampler of {list(self.names)}")
        self.start = state["start"]
        self.stop = state.get("stop", min(self.start + self.update_every, self.n_slots))  # older states have none
        self.n_slots = state.get("n_slots", self.n_slots)
        self.multipliers, self.locks = dict(state.get("multipliers", {})), dict(state.get("locks", {}))
        self._ordered = state["ordered"]
        self.weights = np.asarray(state["weights"], dtype=np.float64)
        self._generator.bit_generator.state = state["drawn_from"]
        self.loss_sums = np.asarray(state["loss_sums"], dtype=np.float64)
        self.n_images = np.asarray(state["n_images"], dtype=np.int64)
        nothing = [None] * len(self.names)  # older states have none
        self._first = np.array(state.get("first", nothing), dtype=np.float64)
        self._before = np.array(state.get("before", nothing), dtype=np.float64)
        self._schedule = self._draw()


def create_sampler(params: TrainParams, domains: Sequence[Domain]) -> Sampler:
    """The sampler of a run: a step that mixes several domains takes several slots."""
    p = params
    n_classes = [domain.n_classes for domain in domains]
    if p.classifier == "joint" and (p.sampler_loss == "student" or not p.is_taught):
        n_classes = [sum(n_classes)] * len(domains)  # a guess is among all of them
    return Sampler(
        [domain.name for domain in domains],
        [len(domain.train_labels) for domain in domains],
        strategy=p.sampler,
        n_slots=p.part_end(0) * p.domains_per_batch,
        update_every=p.update_every * p.domains_per_batch,
        initial=p.sampler_init,
        shares=p.fixed_shares or None,
        smoothing=p.sampler_smoothing,
        seed=p.seed,
        alpha=p.sampler_alpha,
        signal=p.sampler_signal,
        n_classes=n_classes,
        floor=p.sampler_floor,
        order=p.sampler_order,
    )


class ImageOrder:
    """The order in which each domain's training images come: a fresh permutation per pass over the domain.

    The permutation of a pass depends only on the seed, the domain's number and the number of the pass, so that the
    state is two integers per domain.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], seed: int = 0) -> None:
        self.names = tuple(names)
        self._sizes = dict(zip(names, sizes, strict=True))
        self._seed = seed
        self._passes = dict.fromkeys(names, 0)
        self._positions = dict.fromkeys(names, 0)
        self._permutations: dict[str, tuple[int, np.ndarray]] = {}

    def _permutation(self, name: str) -> np.ndarray:
        number = self._passes[name]
        cached = self._permutations.get(name)
        if cached is None or cached[0] != number:
            generator = np.random.default_rng([self._seed, self.names.index(name), number])
            cached = self._permutations[name] = (number, generator.permutation(self._sizes[name]))
        return cached[1]

    def take(self, name: str, n_images: int) -> Int[np.ndarray, "images"]:
        """The next images of a domain, as positions in its training split."""
        taken = []
        while n_images > 0:
            position = self._positions[name]
            part = self._permutation(name)[position : position + n_images]
            taken.append(part)
            n_images -= len(part)
            self._positions[name] = position + len(part)
            if self._positions[name] == self._sizes[name]:
                self._passes[name] += 1
                self._positions[name] = 0
        return np.concatenate(taken) if taken else np.empty(0, dtype=np.int64)

    def n_seen(self) -> dict[str, int]:
        """Images taken so far, by domain."""
        return {name: self._passes[name] * self._sizes[name] + self._positions[name] for name in self.names}

    def state_dict(self) -> dict[str, dict[str, int]]:
        """Two integers per domain: passes that are over, and the place in the present one."""
        return {"passes": dict(self._passes), "positions": dict(self._positions)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Continue from `state_dict()`: the next images are those that would have come next."""
        self._passes, self._positions = dict(state["passes"]), dict(state["positions"])
