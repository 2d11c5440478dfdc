"""A run looked at from outside: its files, read as they grow. The run may be trained by any process."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pandas as pd

from udonlib.data.catalog import load_catalog
from udonlib.errors import UserError
from udonlib.files import whole_lines
from udonlib.params import TrainParams
from udonlib.runs.apart.process import Sign, read_sign
from udonlib.runs.folder import METRICS, WORKER, RunFolder, RunState, read_record
from udonlib.runs.run import Run
from udonlib.training.interventions import Intervention, Wish
from udonlib.training.steering import VERSION, Control, read_control

T = TypeVar("T")


class Watch:
    """What is known of a run; `update()` reads what is new, and costs a few `stat` where nothing is.

    Attributes:
        progress: from the records so far.
        state: what is going on.
        control: what is wanted of the run.
        interventions: what was done to it.
        heard: whether the process that trains it reads control.json as this version writes it.
        problem: what of its files cannot be read, in a sentence; "" for nothing.
        n_images: domain -> training images, from the run's first record.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.n_images: dict[str, int] = {}
        self.control, self.state = Control(), RunState("new", "not started yet")
        self.interventions: list[Intervention] = []
        self.heard = True
        self.problem = ""
        self._offset, self._inode = 0, -1
        self._stamps: tuple[Any, ...] = ()
        self._looked = -10.0
        self._begin()

    def _begin(self) -> None:
        self._now, self._then = 0.0, 0.0
        self.progress = Progress(self.folder.params, lambda: self._now)

    def domains(self) -> tuple[str, ...]:
        """The run's domains: from its records, or from its data before it has any."""
        known = tuple(self.progress.weights or self.n_images)
        if known:
            return known
        if isinstance(self.folder, Run):
            return tuple(self.folder.catalog.names)
        p = self.folder.params
        return tuple(load_catalog(p.data, p.domains, p.images).names)

    def in_force(self) -> Wish:
        """The wish that the run's log ends with: it holds now, or will when a resumed run has repeated it."""
        return self.interventions[-1].wish if self.interventions else Wish()

    def update(self) -> bool:
        """Read what is new. Returns whether anything is; what cannot be read is said in `problem`."""
        files = (METRICS, f"{WORKER}.json", "control.json", "steering.jsonl", "provenance.json", "summary.json")
        stamps = tuple(map(self._stamp, (*files, "ended.json")))
        # A process that was killed leaves no trace but the lock that nobody holds: look for it now and then.
        if stamps == self._stamps and time.monotonic() - self._looked < 2.0:
            return False
        changed, self._looked = stamps != self._stamps, time.monotonic()
        before = self.state
        if changed:
            self.problem = ""
            self._read_records()
            self._take_sign(read_sign(self.folder))
            self.interventions = self._read(self.folder.interventions, self.interventions)
            self.control = self._read(lambda: read_control(self.folder.path), self.control)
            self.heard = self._read(self._is_heard, True)
        self.state = self.folder.state()
        going = {"training": "running", "paused": "paused", "finished": "finished"}
        self.progress.state = going.get(self.state.name, "stopped")
        self._stamps = stamps  # at the end: what could not be read is tried again
        return changed or self.state != before

    def _stamp(self, name: str) -> tuple[int, int, int] | None:
        try:
            stat = os.stat(self.folder.path / name)
        except FileNotFoundError:
            return None
        return stat.st_mtime_ns, stat.st_ino, stat.st_size

    def _is_heard(self) -> bool:
        notes = self.folder.provenance()
        return not notes or notes[-1].get("steering") == VERSION

    def _read(self, read: Callable[[], T], otherwise: T) -> T:
        """What a file says, or else something, with the problem named."""
        try:
            return read()
        except UserError as error:
            self._name(str(error))
        return otherwise

    def _name(self, problem: str) -> None:
        self.problem = f"{self.problem}; {problem}" if self.problem else problem

    def _read_records(self) -> None:
        if (stamp := self._stamp(METRICS)) is None:
            return
        file = self.folder.path / METRICS
        _, inode, size = stamp
        if inode != self._inode or size < self._offset:  # the run was begun again, or resumed
            self._inode, self._offset = inode, 0
            self._begin()
        for line in whole_lines(file, self._offset):
            self._offset += len(line) + 1
            try:
                self._take(read_record(line))
            except Exception as error:  # a record of any shape: a list, a number, a table without columns
                self._name(f"{file}: a record cannot be read and is left out: {error!r}")

    def _take_sign(self, sign: Sign) -> None:
        """Take in what a process of the run's own says between two records."""
        try:
            record = sign.get("record") or {}
            self.progress.notices = list(map(str, sign.get("notices", [])))
            if record.get("kind") == "progress" and record["step"] > self.progress.step:
                self._take(record)
            elif record.get("kind") == "features":
                self.progress.asking = record
        except (KeyError, TypeError) as error:
            self._name(f"{self.folder.path / WORKER}.json: cannot be read: {error!r}")

    def _take(self, record: dict[str, Any]) -> None:
        """Take in one record, by a clock that stands still while nobody trains: pauses must not slow the estimate."""
        written = record.get("time", self._then)
        if record["kind"] in ("train", "progress"):
            pace = record["images_per_s"]
            training = (record["step"] - self.progress.step) * self.folder.params.batch_size / pace if pace else 0.0
            passed = written - self._then
            # Checkpoints and drawing take time, too; much more is a pause, or the time between two processes.
            self._now += passed if training <= passed < 60 + 5 * training else training
        elif record["kind"] == "validation":
            self._now += max(0.0, written - self._then)
        elif record["kind"] == "start":
            self.n_images = dict(record.get("n_images", {}))
        self._then = written
        self.progress.update(record)


Record = dict[str, Any]

Curve = list[tuple[int, float]]

CURVE_POINTS = 200

MIN_STEPS, MIN_SECONDS = 10, 5.0  # before the remaining time is estimated: either, and more than one record

SIZELESS = 0.125  # share of a step's cost that does not depend on the images' size: heads, losses, optimizer

FORWARD = 1 / 3  # cost of a forward pass, as in validation and in frozen steps, in those of training on the images


@dataclass
class Progress:
    """All that is shown, kept up to date from the records."""

    params: TrainParams
    clock: Callable[[], float]
    state: str = "running"
    step: int = 0
    images_per_s: float = math.nan
    loss: float = math.nan
    learning_rate: float = math.nan  # of the heads
    losses: dict[str, Curve] = field(default_factory=dict)
    terms: dict[str, dict[str, float]] = field(default_factory=dict)  # the latest losses of each domain
    taught: dict[str, Curve] = field(default_factory=dict)  # of frozen teachers, by term: the mean over all images
    wish: Wish = field(default_factory=Wish)  # of a person, in force
    allocations: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # step, shares from there on
    weights: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    interventions: list[Intervention] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)  # what is to be known before hours are spent
    asking: Record = field(default_factory=dict)  # which teacher looks at all images, and how far it is
    images_seen: dict[str, int] = field(default_factory=dict)
    r_at_1: dict[str, Curve] = field(default_factory=dict)
    best: tuple[int, float] = (0, math.nan)
    last_is_best: bool = False
    validated: int = -1  # the step of the latest validation
    summary: Record = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.began = self._since = self.clock()
        self._first_step: int | None = None
        self._paces: deque[tuple[float, float]] = deque(maxlen=30)  # work, seconds
        self._n_paces = 0
        self._pauses: deque[float] = deque(maxlen=3)  # seconds of a validation
        self._n_evaluated: dict[str, int] = {"val": 0, "test": 0}
        self._work_of_cheap = [0.0]  # of the first 0, 1, 2, ... steps, while images grow or the backbone is frozen
        p = self.params
        n_frozen = p.frozen_steps if p.frozen_backbone == "no_grad" and p.backbone_learning_rate else 0
        for step in range(min(p.steps, max(p.growing_steps, n_frozen))):
            size = SIZELESS + (1 - SIZELESS) * (p.image_size_at(step) / p.image_size) ** 2
            self._work_of_cheap.append(self._work_of_cheap[-1] + (FORWARD if step < n_frozen else 1.0) * size)

    def update(self, record: Record) -> None:
        """Take in one record."""
        now, step = self.clock(), int(record.get("step", self.step))
        if self._first_step is None:
            self._first_step = self.step = step  # a resumed run begins late
        before = self.images_seen
        if "images_seen" in record:
            self.images_seen = dict(record["images_seen"])
        self.asking = record if record["kind"] == "features" else {}
        match record["kind"]:
            case "start":
                self.notices += record.get("notices", [])
                self._n_evaluated |= record.get("n_evaluated", {})
                if record.get("best"):  # a run that goes on
                    [self.best] = record["best"]
            case "progress":
                self._take_pace(step, now, record["images_per_s"])
            case "train":
                self._take_pace(step, now, record["images_per_s"])
                self.terms |= record["losses"]
                self.learning_rate = record.get("learning_rate", math.nan)
                totals = {name: terms["total"] for name, terms in record["losses"].items()}
                self.loss = sum(totals.values()) / len(totals)
                for name, total in totals.items():
                    _extend(self.losses.setdefault(name, []), step, total)
                self._take_taught(step, record["losses"], before)
            case "allocation":
                self.weights = dict(record["weights"])
                self.shares = dict(record["shares"] if "shares" in record else record["weights"])
                self.allocations.append((step, self.shares))
            case "steering":
                done = Intervention(**{name: value for name, value in record.items() if name not in ("kind", "time")})
                self.interventions.append(done)
                self.wish = done.wish
                self.state = "paused" if done.paused else "running"
            case "validation":
                self._pauses.append(now - self._since)
                self._take_validation(step, pd.DataFrame(record["table"]), bool(record["best"]))
            case "end":
                self.summary = record
        self.step, self._since = step, now

    def _take_pace(self, step: int, now: float, images_per_s: float) -> None:
        if self._n_paces == 1:  # the first one holds the first use of all code, and the first images
            self._paces.clear()
        self._n_paces += 1
        self._paces.append((self._work(step) - self._work(self.step), now - self._since))
        self.images_per_s = images_per_s

    def _take_taught(self, step: int, losses: Mapping[str, Mapping[str, float]], before: Mapping[str, int]) -> None:
        """Take in the terms of frozen teachers, as means over the images since the record before."""
        # Of the first record after a run was resumed these are the images since its beginning.
        n_images = {name: self.images_seen.get(name, 0) - before.get(name, 0) for name in losses}
        for term in {term: None for terms in losses.values() for term in terms if "/" in term}:
            total = sum(n * losses[name][term] for name, n in n_images.items())
            _extend(self.taught.setdefault(term, []), step, total / max(1, sum(n_images.values())))

    def _work(self, step: int) -> float:
        """Cost of all steps before this one, in those of steps that train all with images of their final size."""
        cheap = self._work_of_cheap
        return cheap[step] if step < len(cheap) else cheap[-1] + step - len(cheap) + 1

    def _take_validation(self, step: int, table: pd.DataFrame, best: bool) -> None:
        rows = table[(table["embedder"] == "student") & (table["index"] == "merged")]
        for name, value in zip(rows["domain"], rows["r_at_1"], strict=True):
            _extend(self.r_at_1.setdefault(name, []), step, float(value))
        self.last_is_best, self.validated = best, step
        if best and self.r_at_1.get("mean"):
            self.best = self.r_at_1["mean"][-1]

    @property
    def domains(self) -> list[str]:
        """Names in the order of the allocation, which is the catalog's."""
        return list(self.shares) or list(self.losses)

    def seconds_left(self) -> float | None:
        """Remaining steps at the recent pace, remaining validations and the test; None: too early.

        Until the first validation is over, what it takes is told from the pace of training.
        """
        work, seconds = (sum(values) for values in zip(*self._paces, strict=True)) if self._paces else (0.0, 0.0)
        n_steps = self.step - (self._first_step or 0)
        if not work or not (n_steps >= MIN_STEPS or (self._n_paces > 1 and self.clock() - self.began >= MIN_SECONDS)):
            return None
        every, total = self.params.eval_every, self.params.steps
        per_step = seconds / work
        per_image = FORWARD * per_step / self.params.batch_size
        validations = total // every - self.step // every + (1 if total % every and self.step < total else 0)
        n_val, n_test = self._n_evaluated["val"], self._n_evaluated["test"]
        pause = sum(self._pauses) / len(self._pauses) if self._pauses else n_val * per_image
        test = 2 * n_test * (pause / n_val if n_val else per_image)  # of the model, and of the untrained one
        return (self._work(total) - self._work(self.step)) * per_step + validations * pause + test

    @property
    def is_validating(self) -> bool:
        """Whether a validation is due after this step and has not come, as far as records tell."""
        asked = any((entry.evaluate or entry.finish) and entry.step == self.step for entry in self.interventions[-1:])
        due = self.step > 0 and (self.step % self.params.eval_every == 0 or self.step == self.params.steps or asked)
        return self.state == "running" and due and self.validated < self.step

    @property
    def share(self) -> float:
        """Share of the steps that are done; a run without steps (recipe `features`) is done."""
        return min(1.0, self.step / self.params.steps) if self.params.steps else 1.0

    def line(self) -> str:
        """The state in one line: step 400/1600 (25%)  1150 images/s  loss 3.21  R@1 41.2 (best)  2 min 05 s left."""
        total = self.params.steps
        parts = [f"step {self.step}/{total} ({self.share:.0%})"]
        if not math.isnan(self.images_per_s):
            parts.append(f"{self.images_per_s:.0f} images/s")
        if not math.isnan(self.loss):
            parts.append(f"loss {self.loss:.2f}")
        if self.r_at_1.get("mean"):
            at, value = self.r_at_1["mean"][-1]
            best = " (best)" if self.last_is_best else f" (best {self.best[1]:.1f} at step {self.best[0]})"
            parts.append(f"R@1 {value:.1f}" + best + ("" if at == self.step else f" at step {at}"))
        return "  ".join([*parts, self.time_text()])

    def time_text(self) -> str:
        """What is left, or what was needed."""
        taken = duration(self.clock() - self.began)
        if self.state == "finished":
            found = f"test R@1 {self.summary['test_r_at_1']:.1f}, " if "test_r_at_1" in self.summary else ""
            n_done = self.summary.get("interventions", sum(entry.matters for entry in self.interventions))
            by_hand = f", interventions by hand: {n_done}" if n_done else ""
            return found + f"finished in {duration(self.summary.get('seconds', self.clock() - self.began))}{by_hand}"
        if self.state == "paused":
            return "paused"
        if self.state == "stopped":
            return f"stopped after {taken}; run the same again{' without overwrite' * self.params.overwrite} to go on"
        if self._first_step is None:
            return "getting ready"
        left = self.seconds_left()
        if (asked := self.asking) and asked["n_done"] < asked["n_images"]:
            seconds = (asked["n_images"] - asked["n_done"]) / asked["images_per_s"]
            done = f"{asked['n_done']:,} of {asked['n_images']:,} images"
            return f"teacher {asked['teacher']} looks at {done}, {duration(seconds)} left for it"
        if self.step >= self.params.steps or any(entry.finish for entry in self.interventions[-1:]):
            return "testing"
        if left is None:
            return "estimating the time"
        return f"{duration(left)} left"


def duration(seconds: float) -> str:
    """Write seconds as "45 s", "2 min 05 s" or "1 h 02 min", which nobody takes for a time of the day."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _extend(curve: Curve, step: int, value: float) -> None:
    """Append a point; a curve that has grown long keeps points that are evenly spread over its steps."""
    curve.append((step, value))
    if len(curve) > CURVE_POINTS:
        apart = (step - curve[0][0]) / (CURVE_POINTS / 2)
        kept = curve[:1]
        for point in curve[1:-1]:
            if point[0] - kept[-1][0] >= apart:
                kept.append(point)
        curve[:] = [*kept, curve[-1]]
