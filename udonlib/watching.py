"""A run looked at from outside: its files, read as they grow. The run may be trained by any process."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from udonlib.domains import load_catalog
from udonlib.errors import UserError
from udonlib.interventions import Intervention
from udonlib.live import Progress
from udonlib.runfolder import RunFolder, RunState
from udonlib.runs import Run
from udonlib.steering import VERSION, Control, read_control

T = TypeVar("T")
Wish = tuple[Mapping[str, float], Mapping[str, float]]  # multipliers and locks


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
        """The allocation that the run's log ends with: it holds now, or will when a resumed run has repeated it."""
        last = self.interventions[-1:]
        return (last[0].multipliers, last[0].locks) if last else ({}, {})

    def update(self) -> bool:
        """Read what is new. Returns whether anything is; what cannot be read is said in `problem`."""
        files = ("metrics.jsonl", "control.json", "steering.jsonl", "provenance.json", "summary.json", "ended.json")
        stamps = tuple(map(self._stamp, files))
        # A process that was killed leaves no trace but the lock that nobody holds: look for it now and then.
        if stamps == self._stamps and time.monotonic() - self._looked < 2.0:
            return False
        changed, self._looked = stamps != self._stamps, time.monotonic()
        before = self.state
        if changed:
            self.problem = ""
            self._read_records()
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
            found = os.stat(self.folder.path / name)
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size

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
        file = self.folder.path / "metrics.jsonl"
        if not file.exists():
            return
        with file.open("rb") as records:
            found = os.fstat(records.fileno())
            if found.st_ino != self._inode or found.st_size < self._offset:  # the run was begun again, or resumed
                self._inode, self._offset = found.st_ino, 0
                self._begin()
            records.seek(self._offset)
            for line in records.read().splitlines(keepends=True):
                if line.endswith(b"\n"):
                    self._offset += len(line)
                    try:
                        self._take(json.loads(line))
                    except Exception as error:  # a record of any shape: a list, a number, a table without columns
                        self._name(f"{file}: a record cannot be read and is left out: {error!r}")

    def _take(self, record: dict[str, Any]) -> None:
        """Take in one record, by a clock that stands still while nobody trains: pauses must not slow the estimate."""
        written = record.get("time", self._then)
        if record["kind"] == "train":
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
