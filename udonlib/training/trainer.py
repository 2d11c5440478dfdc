"""The one training loop: it yields records of what happened and holds all the state that the next step needs.

`Trainer` decides what each step sees (sampler, image order, augmentation), when to log, validate and save, and yields a
record each time; `training.learner` does the step, `runs.run` writes the files. Training is a pure function of
parameters and data: every draw comes from a generator whose state is either in `state_dict()` or derived from the seed
and the number of the step, so a resumed run repeats the bits.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from udonlib.data.augmentation import augment
from udonlib.data.catalog import Catalog
from udonlib.data.images import Slot, WindowLoader
from udonlib.errors import UserError
from udonlib.models.embedding_model import EmbeddingModel
from udonlib.params import TrainParams
from udonlib.training.interventions import Intervention, Wish
from udonlib.training.learner import Learner, Taken, TrainingError, diverged, fetched
from udonlib.training.losses import Objective
from udonlib.training.parallel.class_shards import ClassShards
from udonlib.training.parallel.world import ONE, World
from udonlib.training.sampler import ImageOrder, create_sampler
from udonlib.training.steering import Commands, RunStoppedError, stopped

Record = dict[str, Any]
__all__ = ["Record", "RunStoppedError", "Trainer", "TrainingError", "diverged", "merged_r_at_1"]


class Trainer:
    """Train a model on a catalog; iterate over `train()` and keep the records.

    Args:
        model: on its device.
        catalog: what to train on.
        params: of the run.
        loader: reads planned batches of the train splits.
        validate: evaluates a model as it is and returns the table of `evaluation.evaluate`. All processes call it, and
            the first one's table counts.
        objective: what a step minimises; None: UDON's, without offline teachers.
        world: the processes that share each batch; every one of them iterates over `train()`, and gets the same records
            (but for the pace). The first one alone is told what a person wants.

    Attributes:
        commands: where to ask, between two steps, what a person wants; None: nobody steers this process.
        sign_every: seconds without a record after which one of kind `progress` comes; it is for those who wait, and no
            part of what a run leaves.
    """

    def __init__(
        self,
        model: EmbeddingModel,
        catalog: Catalog,
        params: TrainParams,
        loader: WindowLoader,
        validate: Callable[[EmbeddingModel], pd.DataFrame],
        objective: Objective | None = None,
        world: World = ONE,
    ) -> None:
        if world.size > params.batch_size:
            raise UserError(f"parameter 'batch_size': found {params.batch_size} images for {world.size} processes")
        self.params = params
        self.world = world
        self.model = model
        self.shards = ClassShards(model, world, params.split_classes_from, params.class_sample, params.seed)
        # What is validated and kept: the model itself, or the moving average of its weights and statistics.
        self.kept = copy.deepcopy(model).requires_grad_(False) if params.average_decay else model
        self.learner = Learner(model, params, objective, world, self.shards)
        self.step = 0  # steps done
        self.best = -math.inf  # best merged-index R@1 of the student on the validation queries, mean over domains
        self.n_worse = 0  # validations since the best one
        self._validated = -1  # the step of the latest one
        self.n_interventions = 0  # of those that matter: see `training.steering`
        self.wish = Wish()  # of a person, in force
        self.commands: Commands | None = None
        self.sign_every = math.inf
        self._loader = loader
        self._validate = validate
        self._device = next(model.parameters()).device
        names = [domain.name for domain in catalog.domains]
        sizes = [len(domain.train_labels) for domain in catalog.domains]
        self._labels = {d.name: torch.from_numpy(d.train_labels).to(self._device) for d in catalog.domains}
        self._kinds = {name: params.augmentation_by_domain.get(name, params.augmentation) for name in names}
        self.sampler = create_sampler(params, catalog.domains)
        self._order = ImageOrder(names, sizes, params.seed)
        self._window_order = self._order.state_dict()  # as it was at the current window's `start`
        self.images_seen = dict.fromkeys(names, 0)
        self._finished = False  # by a person, before all steps were done
        self._allocated = -1  # the slot at which the latest record of the allocation was made
        self._pending: list[Taken] = []

    def plan_window(self) -> list[list[Slot]]:
        """The images of each step of the current window: per step, domains and positions in their train splits."""
        self._window_order = self._order.state_dict()
        return [self._take(slots) for slots in self.sampler.window().reshape(-1, self.params.domains_per_batch)]

    def _take(self, slots: np.ndarray) -> list[Slot]:
        """The next images of the domains in these slots."""
        n_per_slot = self.params.batch_size // self.params.domains_per_batch
        counts = [(self.sampler.names[d], int(n)) for d, n in zip(*np.unique(slots, return_counts=True), strict=True)]
        return [(name, self._order.take(name, n * n_per_slot)) for name, n in counts]

    @property
    def done(self) -> bool:
        """Whether all steps are done, validations have not improved for `patience` times, or somebody has ended it."""
        return self.step == self.params.steps or 0 < self.params.patience <= self.n_worse or self._finished

    def train(self) -> Iterator[Record]:
        """Run to the end, yielding records: `allocation`, `train`, `validation`, `steering`, `checkpoint`, `progress`.

        `checkpoint` says that `state_dict()` is worth saving now; `steering` is what a person asked for, said before it
        is done.

        Raises:
            TrainingError: "step 120: the loss is nan ..." when a loss or a gradient is not finite.
            RunStoppedError: somebody asked for it.
        """
        p = self.params
        if self.done and self.best == -math.inf:  # nothing is left to train, but there is no model to keep yet
            yield self._validation_record()
            yield {"kind": "checkpoint", "step": self.step}
        yield from self._obey(self._asked())
        while not self.done:
            plan = self.plan_window()
            done = self.step - self.sampler.start // p.domains_per_batch
            if done == 0 and plan and self._allocated != self.sampler.start:
                yield self._allocation_record()
            clock, since = time.perf_counter(), self.step
            sign = clock
            rest = plan[done:]
            for (images, slots), planned in zip(self._loader([self._ours(slots) for slots in rest]), rest, strict=True):
                self._train_step(images, slots, planned)
                logs, validates, saves = (
                    self.step % every == 0 or self.step in (p.steps, *p.seams)
                    for every in (p.log_every, p.eval_every, p.checkpoint_every)
                )
                ends = self.step * p.domains_per_batch == self.sampler.stop
                notable = logs or validates or saves or ends
                if notable:
                    yield self._train_record(clock, since)
                if saves or validates:
                    self._check_weights()
                if validates:
                    yield self._validation_record()
                if saves or validates:
                    yield {"kind": "checkpoint", "step": self.step}
                if self.done:
                    return
                asked = self._asked()
                if asked is not None:
                    if not notable:
                        yield self._train_record(clock, since)
                    self._check_weights()
                    yield from self._obey(asked)
                    if not ends:
                        self._order.load_state_dict(self._window_order)
                    break  # plan again: what is left of the window may be another one
                if notable:
                    clock, since = time.perf_counter(), self.step
                    sign = clock
                elif time.perf_counter() - sign >= self.sign_every:
                    sign = time.perf_counter()
                    yield {"kind": "progress", "step": self.step, "images_per_s": self._pace(clock, since)}
            if self.step * p.domains_per_batch == self.sampler.stop:
                self.sampler.advance(p.part_end(self.step) * p.domains_per_batch)

    def _train_record(self, clock: float, since: int) -> Record:
        """The losses, and the pace since the step `since` at the time `clock`."""
        return self._flush() | {"images_per_s": self._pace(clock, since)}

    def _pace(self, clock: float, since: int) -> float:
        return (self.step - since) * self.params.batch_size / (time.perf_counter() - clock)

    def _asked(self) -> Intervention | None:
        return self.world.broadcast(None if self.commands is None else self.commands.take(self.step))

    def _obey(self, asked: Intervention | None) -> Iterator[Record]:
        """Do what was asked for after this step, and what is asked for while the run is paused."""
        while asked is not None:
            yield asked.record()
            self.n_interventions += asked.matters
            if asked.steers:
                self._steer(asked)
                if self.step * self.params.domains_per_batch == self.sampler.start:
                    yield self._allocation_record()
            self._finished |= asked.finish
            if (asked.evaluate or asked.finish) and self._validated != self.step:
                yield self._validation_record()
            if asked.evaluate or asked.finish or asked.save or asked.paused or asked.stop:
                yield {"kind": "checkpoint", "step": self.step}
            if asked.stop:
                when = f"after step {self.step:,} of {self.params.steps:,}"
                raise stopped(when, asked.panel, self.params.overwrite)
            if self.done:
                return
            asked = self._asked()

    def _steer(self, asked: Intervention) -> None:
        """Draw the rest of the window anew; the images that it had planned go back to their places in the order.

        What is wanted of frozen teachers alone leaves the window as it is.
        """
        before = self.wish
        self._take_wish(asked.wish)
        if asked.allocates_as(before) and self.wish != before:
            return
        slot = self.step * self.params.domains_per_batch
        trained = self.sampler.window()[: slot - self.sampler.start]
        self._order.load_state_dict(self._window_order)
        self._take(trained)
        self._window_order = self._order.state_dict()
        self.sampler.steer(asked.multipliers, asked.locks, slot)

    def _take_wish(self, wish: Wish) -> None:
        self.wish, self.learner.rate = wish, wish.rate
        self.learner.objective.steer(wish)

    def _allocation_record(self) -> Record:
        sampler = self.sampler
        if sampler.start == sampler.stop:  # a window has ended: what the next one will begin with
            sampler = copy.deepcopy(sampler)
            sampler.advance(self.params.part_end(self.step) * self.params.domains_per_batch)
        self._allocated, names = sampler.start, sampler.names
        return {
            "kind": "allocation",
            "step": self.step,
            "weights": dict(zip(names, sampler.weights.tolist(), strict=True)),
            "shares": dict(zip(names, sampler.shares.tolist(), strict=True)),
            "images_seen": dict(self.images_seen),
        }

    def _ours(self, slots: Sequence[Slot]) -> list[Slot]:
        """The part of a step's images that this process reads."""
        rows, start, ours = self.world.rows(self.params.batch_size), 0, []
        for name, indices in slots:
            mine = indices[max(0, rows.start - start) : max(0, rows.stop - start)]
            start += len(indices)
            if len(mine):
                ours.append((name, mine))
        return ours

    def _train_step(self, images: Tensor, slots: Sequence[Slot], planned: Sequence[Slot]) -> None:
        """Train on images of ours, from these slots; the whole batch was planned with those."""
        p, world, device = self.params, self.world, self._device
        # Dropout and the like draw from the global generator: seeding it by step makes it part of the state for free.
        seed = p.seed * 1_000_003 + self.step
        torch.manual_seed(seed + world.rank * 2**52)  # another one for the images of each process
        generator = torch.Generator(device).manual_seed(seed)
        kinds = [self._kinds[name] for name, indices in planned for _ in range(len(indices))]
        rows = world.rows(len(kinds))
        views = augment(images.to(device, non_blocking=True), kinds, p.image_size, generator, rows)
        size = p.image_size_at(self.step)
        if size < p.image_size:
            views = F.interpolate(views, (size, size), mode="bilinear", antialias=True)
        ours = [self._labels[name][torch.from_numpy(indices).to(device)] for name, indices in slots]
        sizes = [(name, len(indices)) for name, indices in planned]
        labels = world.gather(torch.cat(ours), len(kinds)).split([n for _, n in sizes])
        parts = [(name, part) for (name, _), part in zip(sizes, labels, strict=True)]
        terms, grad_norm = self.learner.step(self.step, views, parts, slots)
        self._pending.append((sizes, terms, grad_norm))
        self.step += 1
        if self.kept is not self.model:
            self._average()

    @torch.no_grad()
    def _average(self) -> None:
        """Move the kept model towards the trained one; at first quickly, so that the initial weights are forgotten."""
        decay = min(self.params.average_decay, self.step / (self.step + 10))
        kept, now = self.kept.state_dict(), self.model.state_dict()
        floats = [name for name, value in now.items() if value.is_floating_point()]
        torch._foreach_lerp_([kept[name] for name in floats], [now[name] for name in floats], 1 - decay)
        for name in now.keys() - set(floats):
            kept[name].copy_(now[name])

    def _flush(self) -> Record:
        """Fetch the losses of the steps since the last flush: into the sampler's window, and as means for the log."""
        sums, counts, norms = dict[str, dict[str, float]](), dict[str, int](), list[float]()
        found = iter(fetched(self._pending))
        for step, (sizes, terms, _) in enumerate(self._pending, self.step - len(self._pending) + 1):
            norms.append(next(found))
            for name, n in sizes:
                values = dict(zip(terms[name], found, strict=False))
                bad = [term for term, value in values.items() if not math.isfinite(value)]
                if bad or not math.isfinite(norms[-1]):
                    what = f"{bad[0]} of domain {name!r} is {values[bad[0]]}" if bad else "the gradient is not finite"
                    raise diverged(step, what)
                self.images_seen[name] += n
                self.sampler.record(name, n * self.learner.objective.claim(values), n)
                domain = sums.setdefault(name, dict.fromkeys(values, 0.0))
                for term, value in values.items():
                    domain[term] += n * value
                counts[name] = counts.get(name, 0) + n
        self._pending.clear()
        return {
            "kind": "train",
            "step": self.step,
            "learning_rate": self.learner.optimizer.param_groups[0]["lr"],
            "gradient_norm": sum(norms) / max(1, len(norms)),  # of all trained parameters, before it is clipped
            "images_seen": dict(self.images_seen),
            "losses": {d: {term: value / counts[d] for term, value in s.items()} for d, s in sums.items()},
        }

    @torch.no_grad()
    def _check_weights(self) -> None:
        """Refuse to keep or to validate weights that are no numbers: a loss shows them only at the step after."""
        for module in dict.fromkeys((self.model, self.kept, self.learner.objective)):
            for name, value in module.state_dict().items():
                if value.is_floating_point() and not value.isfinite().all():
                    raise diverged(self.step, f"{name} is not finite any more")

    def _validation_record(self) -> Record:
        table = self.world.broadcast(self._validate(self.kept))
        self._validated = self.step
        value = merged_r_at_1(table)
        best = value > self.best
        self.best = max(self.best, value)
        frozen = self.step <= self.params.frozen_steps < self.params.steps  # heads alone are level long before the end
        self.n_worse = 0 if best or frozen or self.step in self.params.seams[-1:] else self.n_worse + 1
        return {"kind": "validation", "step": self.step, "r_at_1": value, "best": best, "table": table}

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on. To be taken when `train()` has yielded `checkpoint`.

        All processes call it together; the first one's is whole.
        """
        return {
            "step": self.step,
            "best": self.best,
            "n_worse": self.n_worse,
            "validated": self._validated,
            "finished": self._finished,
            "model": self.shards.whole(self.model.state_dict()),
            "average": self.kept_state() if self.kept is not self.model else None,
            "optimizer": self.shards.whole_optimizer(self.learner.optimizer),
            "objective": self.learner.objective.state_dict(),
            "sampler": self.sampler.state_dict(),
            "order": self._window_order,
            "images_seen": dict(self.images_seen),
            "allocated": self._allocated,
            "n_interventions": self.n_interventions,
            "wish": dict(self.wish),
        }

    def kept_state(self) -> dict[str, Tensor]:
        """State of the model that is validated and kept; as `state_dict`."""
        return self.shards.whole(self.kept.state_dict())

    def load_state_dict(self, state: Mapping) -> None:
        """Continue from `state_dict()`: the next step is the one that would have come next."""
        shards, optimizer = self.shards, self.learner.optimizer
        self.model.load_state_dict(shards.part(state["model"]))
        if state["average"] is not None:
            self.kept.load_state_dict(shards.part(state["average"]))
        optimizer.load_state_dict(shards.part_of_optimizer(optimizer, state["optimizer"]))
        self.learner.objective.load_state_dict(state.get("objective", {}))
        self.sampler.load_state_dict(state["sampler"])
        self._order.load_state_dict(state["order"])
        self._window_order = state["order"]
        before, n_images = self._order.n_seen(), self.sampler.n_images.tolist()
        seen = {name: before[name] + n for name, n in zip(self.sampler.names, n_images, strict=True)}
        self.images_seen = dict(state.get("images_seen", seen))  # older states have none of this and what follows
        self._allocated, self._validated = state.get("allocated", -1), state.get("validated", -1)
        self._finished = state.get("finished", False)
        self.n_interventions = state.get("n_interventions", 0)
        steered = {name: state["sampler"].get(name, {}) for name in ("multipliers", "locks")}
        self._take_wish(Wish(**state.get("wish", steered)))
        self.step, self.best, self.n_worse = state["step"], state["best"], state["n_worse"]
        if self.step in self.params.seams[-1:]:  # it had ended here, and was given more steps
            self._finished, self.n_worse = False, 0


def merged_r_at_1(table: pd.DataFrame) -> float:
    """The figure that selects checkpoints: the student's R@1 in the merged index, mean over domains, in percent."""
    row = table[(table["embedder"] == "student") & (table["index"] == "merged") & (table["domain"] == "mean")]
    return float(row["r_at_1"].iloc[0])
