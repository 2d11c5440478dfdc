"""What a person asks of a run while it trains, and what the run does about it: two files in the run's folder.

    control.json      what is wanted now: multipliers and locks of domains, weights of
                      frozen teachers, pause, requests. Whoever steers replaces it.
    steering.jsonl    every intervention with its step, in order. The run writes it; resuming and `replay` repeat it.

The training loop looks at control.json between two steps (one `stat`), so a run is steered from its own notebook, from
another one, or from a terminal, and whether papermill or a person started it.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from udonlib.errors import UserError
from udonlib.files import DiskError, replacing, take_lock
from udonlib.training.interventions import NAMED, Intervention, Log, Wish, check_wished, interventions

VERSION = 1  # of the two files; a run notes it in its provenance, so that a panel knows whether it will be heard
REQUESTS = ("evaluate", "save", "stop", "finish")  # what is asked for once, and not wanted until further notice
POLL_SECONDS = 0.03  # between two looks at control.json while a run is paused


SIGTERM = "SIGTERM"  # in place of a panel's name: the one who asks is a scheduler, torchrun, or `kill`


class RunStoppedError(UserError):
    """Somebody asked the run to stop; it goes on when it is started again. by_signal: that was SIGTERM."""

    by_signal = False


def stopped(when: str, panel: str = "", overwrite: bool = False) -> RunStoppedError:
    """The error of a run that is asked to stop.

    Args:
        when: "after step 120 of 400".
        panel: who asked; it may have been SIGTERM.
        overwrite: what the run's parameter says: it must not begin anew.
    """
    who = f"{SIGTERM} asked for" if panel == SIGTERM else "somebody asked for in its control panel"
    again = f"run the same again{' without overwrite' * overwrite} to go on"
    error = RunStoppedError(f"the run was stopped {when}, as {who}; {again}")
    error.by_signal = panel == SIGTERM
    return error


class Notice:
    """Takes note, within it, of SIGTERM, by which schedulers and `torchrun` tell a process to end.

    Only the main thread can: elsewhere it ends the process at once, as it does without this.
    """

    given = False

    def __enter__(self) -> Notice:
        self._in_main = threading.current_thread() is threading.main_thread()
        if self._in_main:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._in_main:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)

    def _note(self, number: int, frame: object) -> None:
        self.given = True

    def heed(self) -> None:
        """Raises `stopped` where notice was given: for what can be broken off at any time."""
        if self.given:
            raise stopped("between two checkpoints", SIGTERM)


class Control(Wish):
    """The contents of control.json. Requests are counters: a request is made by raising one."""

    version: int = Field(VERSION, ge=VERSION, le=VERSION)
    number: int = Field(0, ge=0, description="changes so far")
    panel: str = Field("", description="who made the last one")
    paused: bool = Field(False, description="wait between two steps")
    evaluate: int = Field(0, ge=0, description="requests to validate now")
    save: int = Field(0, ge=0, description="requests to save a checkpoint now")
    stop: int = Field(0, ge=0, description="requests to stop after this step; the run stays unfinished")
    finish: int = Field(0, ge=0, description="requests to end the training after this step, and to test the best model")


def read_control(folder: Path) -> Control:
    """Read what is wanted of the run in this folder; nothing where the file is missing.

    Raises:
        UserError: "<file>: ..." where it cannot be read.
    """
    file = folder / "control.json"
    try:
        return Control.model_validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return Control()
    except (OSError, ValidationError) as error:
        findings = error.errors() if isinstance(error, ValidationError) else []
        where = ".".join(map(str, findings[0]["loc"])) if findings else ""
        what = f"{where + ': ' if where else ''}{findings[0]['msg']}" if findings else str(error)
        raise UserError(f"{file}: {what}; mend it, or remove it") from None


def change_control(folder: Path, panel: str = "", **changes: Any) -> Control:
    """Change what is wanted of a run, and leave the rest as others have set it. Returns what is wanted now.

    Args:
        folder: of the run.
        panel: who asks.
        changes: fields of `Control`. `multipliers`, `locks` and `teachers` are mappings that are merged into those
            there, with None for a name to be taken out; those of REQUESTS are True to ask for it once.

    Raises:
        UserError: a value that is not valid, a name that the run does not know; a control file that cannot be read.
    """
    named = {name: {key: v for key, v in changes[name].items() if v is not None} for name in NAMED if name in changes}
    check_wished(changes | named, _known(folder), "steering")
    with _locked(folder):
        before = read_control(folder)
        # The file may have been removed: then the log knows how far the numbers have come.
        number = 1 + max([before.number, *(entry.number for entry in interventions(folder))])
        values = before.model_dump() | {"number": number, "panel": panel}
        for name, value in changes.items():
            if name in NAMED:
                merged = values.get(name, {}) | dict(value)
                values[name] = {key: number for key, number in merged.items() if number is not None}
            elif name in REQUESTS:
                values[name] = values.get(name, 0) + bool(value)
            else:
                values[name] = value
        try:
            after = Control.model_validate(values)
        except ValidationError as error:
            finding = error.errors()[0]
            place = ".".join(map(str, finding["loc"]))
            raise UserError(f"steering: {place}: found {finding['input']!r}: {finding['msg']}") from None
        _write_control(folder, after)
    return after


def _known(folder: Path) -> dict[str, list[str]]:
    """The domains and frozen teachers that the run's first record names; nothing before there is one that does."""
    try:
        with (folder / "metrics.jsonl").open("rb") as records:
            first = json.loads(records.readline())
        places = {"domain": "n_images", "teacher": "teachers"}
        return {kind: list(first[name]) for kind, name in places.items() if name in first}
    except (OSError, ValueError, TypeError):
        return {}


class Commands:
    """What the training loop asks between two steps: is there anything to do?

    Interventions in the log that the state of the training does not hold yet come again at their steps, until a person
    does something new: then the rest of them leaves the log, since the run has taken another way.

    Args:
        folder: of the run, whose control.json is read and whose steering.jsonl is written.
        names: the run's domains.
        n_taken: interventions that matter and that the state holds already.
        wish: what is in force in the state.
        replay: folder of another run whose interventions to repeat; this one cannot be steered then.
        weights: the adaptive weights now, in the order of the names; None: all are more than 0.
        before: what was wanted when this process began: only requests made since then count. None: as now.
        teachers: the run's frozen ones.
        notice: once it is given, the run is to stop.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        n_taken: int = 0,
        wish: Wish | None = None,
        replay: Path | None = None,
        weights: Callable[[], Sequence[float]] | None = None,
        before: Control | None = None,
        teachers: Sequence[str] = (),
        notice: Notice | None = None,
    ) -> None:
        self.paused_seconds = 0.0
        self._notice = notice or Notice()
        self._folder, self._names, self._replays = folder, tuple(names), replay is not None
        self._known = {"domain": self._names, "teacher": tuple(teachers)}
        self._weights = weights or (lambda: [1.0] * len(names))
        self._wish = wish or Wish()
        self._log = Log(folder, n_taken, replay)
        last = self._log.last_to_come()
        then = dict(self._wish if last is None else last.wish)
        with _locked(folder):
            for leftover in folder.glob("control.json.*.tmp"):  # of a panel that was killed while writing
                leftover.unlink()
            wanted = read_control(folder)
            before = wanted if before is None else before
            if self._replays or wanted.number == 0:
                wanted = wanted.model_copy(update=then)
            # A pause ends with the process that was paused.
            _write_control(folder, wanted.model_copy(update={"paused": wanted.paused and not before.paused}))
        # What is to be repeated is wanted already: only what differs from it is new, such as a slider that was moved
        # while the run was not running. That comes first.
        self._seen = before.model_copy(update={**then, "paused": False})
        self._stamp = (0, 0, 0)

    def _stat(self) -> tuple[int, int, int]:
        try:
            found = os.stat(self._folder / "control.json")
        except FileNotFoundError:
            return 0, 0, 0
        return found.st_mtime_ns, found.st_ino, found.st_size

    def take(self, step: int) -> Intervention | None:
        """What is to be done after `step` steps, one thing at a time; None: train on. Waits while the run is paused."""
        while (asked := self._asked(step)) is None and self._seen.paused:
            began = time.monotonic()
            time.sleep(POLL_SECONDS)
            self.paused_seconds += time.monotonic() - began
        return asked

    def _asked(self, step: int) -> Intervention | None:
        if self._notice.given:
            last = Intervention(number=self._log.number + 1, step=step, panel=SIGTERM, stop=True, **dict(self._wish))
            self._log.add(last)
            return last
        stamp = self._stat()
        if stamp != self._stamp:
            self._stamp = stamp
            asked = self._read(step)
            if asked is not None:
                self._log.add(asked)
                return self._in_force(asked)
        repeated = self._log.next(step)
        return None if repeated is None else self._in_force(repeated)

    def _in_force(self, entry: Intervention) -> Intervention:
        self._wish = entry.wish
        return entry

    def _read(self, step: int) -> Intervention | None:
        """What has changed in control.json since it was last read."""
        values: dict[str, Any] = {"step": step, **dict(self._wish)}
        try:
            wanted, before = read_control(self._folder), self._seen
        except UserError as error:  # what cannot be read is said once, and changes nothing
            values |= {"refused": str(error), "paused": self._seen.paused}
            return Intervention(number=self._log.number + 1, **values)
        asked = {name: getattr(wanted, name) > getattr(before, name) for name in REQUESTS}

        def steers(wanted: Control) -> bool:
            # A validation ends the repeating too: then what is wanted comes at once.
            begins = (asked["evaluate"] or asked["finish"]) and wanted.wish != self._wish
            return begins or wanted.wish != before.wish

        try:
            if self._replays and (steers(wanted) or asked["evaluate"] or asked["finish"]):
                asked |= {"evaluate": False, "finish": False}
                raise UserError(
                    "this run repeats another one's interventions: it can be paused, saved and stopped, not steered or "
                    "finished"
                )
            if steers(wanted):
                self._check(wanted)
        except UserError as error:  # what is in force stays; what is asked for besides is done
            values["refused"] = str(error)
            wanted = self._taken_back(wanted, before)
        self._seen = wanted
        steered = steers(wanted)
        if not (steered or any(asked.values()) or wanted.paused != before.paused or "refused" in values):
            return None
        values |= {"panel": wanted.panel, "paused": wanted.paused, **asked}
        if steered:
            values |= {"steers": True, **dict(wanted.wish)}
        return Intervention(number=max(wanted.number, self._log.number + 1), **values)

    def _taken_back(self, wanted: Control, before: Control) -> Control:
        """Put the wish of before a refusal into the file, unless somebody has changed it since."""
        update = dict(before.wish)
        with (
            _locked(self._folder),
            suppress(UserError),
        ):  # of a file that was damaged since: it is said at the next look
            if read_control(self._folder) == wanted:
                _write_control(self._folder, wanted.model_copy(update=update))
                self._stamp = self._stat()
        return wanted.model_copy(update=update)

    def _check(self, wanted: Control) -> None:
        check_wished(dict(wanted.wish), self._known, "control.json")
        weights = zip(self._names, self._weights(), strict=True)
        if not any(wanted.locks.get(name, weight * wanted.multipliers.get(name, 1.0)) > 0 for name, weight in weights):
            raise UserError("control.json: no domain is left to train: every lock, or weight times multiplier, is 0")


def _write_control(folder: Path, control: Control) -> None:
    with replacing(folder / "control.json") as file:
        file.write((json.dumps(control.model_dump(), indent=1) + "\n").encode())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep two writers of control.json from losing each other's change. Waits for the other one."""
    if not folder.is_dir():
        raise UserError(f"there is no run in {folder} to be steered")
    try:
        file = take_lock(folder / "control.lock")
    except DiskError as error:
        raise UserError(f"the run cannot be steered: {error}") from None
    with file:
        yield
