"""What a process says that trains a run apart, `python -m udonlib worker RUN`, and what it holds: see `process`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from udonlib.errors import UserError
from udonlib.files import HeldError, fcntl, read_yaml, take_lock, write_json
from udonlib.params import TrainParams
from udonlib.runs.apart.process import Sign
from udonlib.runs.folder import WORKER
from udonlib.runs.run import Run
from udonlib.training.trainer import Record

SIGN_SECONDS = 0.5  # between two signs of life at least
NOT_KEPT = ("progress", "features")  # kinds of records that the run's own do not hold


class Signs:
    """Keeps worker.json: what the run's records do not say."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / f"{WORKER}.json"
        self._sign: Sign = {"pid": os.getpid(), "notices": [], "record": {}, "end": None}
        self._next = 0.0
        self.is_first = os.environ.get("RANK", "0") == "0"  # of those that torchrun has started

    def begin(self) -> None:
        """Say that the process is there."""
        self._write()

    def take(self, record: Record) -> None:
        """Take note of a record of the training."""
        kind, before = record["kind"], self._sign["record"]
        shown = record | {"time": round(time.time(), 3)} if kind in NOT_KEPT else {}
        self._sign |= {"record": shown} | ({"notices": record["notices"]} if "notices" in record else {})
        now = time.monotonic()
        if kind == "start" or (before and not shown) or (shown and now >= self._next):
            self._next = now + SIGN_SECONDS
            self._write()

    def end(self, error: BaseException | None) -> None:
        """Say how it ended; an exit tells what another of torchrun's processes has ended of."""
        error = error.__cause__ if isinstance(error, SystemExit) and error.__cause__ else error
        kind = "" if error is None else type(error).__name__
        kind = kind if kind in ("RunStoppedError", "TrainingError") or not isinstance(error, UserError) else "UserError"
        self._sign |= {"end": [kind, "" if error is None else str(error)], "record": {}}
        self._write()

    def _write(self) -> None:
        if self.is_first:
            write_json(self._file, self._sign)


@contextmanager
def signs(folder: Path, held: bool = False) -> Iterator[Signs]:
    """Be the process that trains the run in a folder, and say how that ends.

    Args:
        held: whoever has started this process has given it the lock.

    Raises: UserError where another process is there.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever has started this may have ignored it
    said = Signs(folder)
    try:
        has_it = (held and fcntl is not None) or not said.is_first
        lock = None if has_it else take_lock(folder / f"{WORKER}.lock", seconds=0)
    except HeldError:
        raise UserError(f"run {folder.name!r} is being trained by another process; wait, or stop it") from None
    try:
        said.begin()
        yield said
    except BaseException as error:
        said.end(error)
        raise
    else:
        said.end(None)
    finally:
        if lock is not None:
            lock.close()


def asked_run(folder: Path, asked: Path) -> Run:
    """The run in a folder with the parameters that somebody has written down for it."""
    return Run(TrainParams(**read_yaml(asked)), folder)
