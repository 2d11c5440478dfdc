"""The process that trains a run apart from a notebook: started, found again by anybody, told to stop.

    asked.yaml     the parameters that it was started with
    worker.json    what it says of itself: its number, notices, a sign of life between two records, and how it ended
    worker.lock    held as long as it lives, from its first moment on
    worker.log     what it prints

All stand in the run's folder. It is in a session of its own: neither the end of a kernel nor that of a terminal, a
server or a browser's page ends it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from udonlib.errors import UserError
from udonlib.files import PACKAGE, HeldError, fcntl, is_held, take_lock, write_text, writing
from udonlib.runs.folder import WORKER, RunFolder, is_locked
from udonlib.training.steering import change_control
from udonlib.training.trainer import RunStoppedError, TrainingError

LINES = 8  # of the log, that are shown where the process ended without a word

Sign = dict[str, Any]


class WorkerError(UserError):
    """The process that trained a run has ended, and not as a run ends."""


class Worker:
    """The process that trains a run, or that has trained it; whoever asks, and whether it is still there or not."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._process: subprocess.Popen | None = None

    @property
    def log(self) -> Path:
        """The file of what it prints."""
        return self.folder.path / "worker.log"

    @property
    def is_alive(self) -> bool:
        """Whether such a process is there."""
        if self._process is not None and self._process.poll() is None:
            return True
        return is_held(self.folder.path / f"{WORKER}.lock")

    @property
    def trains(self) -> bool:
        """Whether the run is trained, or about to be: by this process or by another one, such as papermill's."""
        return self.is_alive or is_locked(self.folder.path)

    def start(self, processes: int = 1) -> None:
        """Start it, unless there is one. What it trains is the run as its parameters say now.

        Args:
            processes: that share each batch, by `torchrun`; 1: it alone.

        Raises:
            DiskError: the folder cannot be written.
        """
        path = self.folder.path
        try:
            lock = take_lock(path / f"{WORKER}.lock", seconds=0)
        except HeldError:
            return
        with lock:
            with writing(path / f"{WORKER}.json"):
                (path / f"{WORKER}.json").unlink(missing_ok=True)
            asked = path / "asked.yaml"
            write_text(asked, yaml.safe_dump(self.folder.params.model_dump(mode="json"), sort_keys=False))
            # The same udonlib, from wherever it is imported here.
            places = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "PYTHONUNBUFFERED": "1"}
            words = ["-m", "udonlib", "worker", str(path), "--asked", str(asked)]
            if processes > 1:
                words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *words]
                if sys.platform == "linux":  # all of them are on this machine
                    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
            # The lock is handed over: it is free when the process ends, and not a moment before.
            apart: dict[str, Any] = {"pass_fds": [lock.fileno()], "start_new_session": True}
            if fcntl is None:  # Windows: the process takes the lock itself
                apart = {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
            with writing(self.log), self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, *words],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    **apart,
                )

    def stop(self) -> None:
        """Ask it to stop after its step, with a checkpoint; where it takes no wishes, as while it loads, it is ended.

        Does not wait. Raises: UserError where that cannot be written.
        """
        state = self.folder.state()
        total = self.folder.params.steps
        if is_locked(self.folder.path) and state.name in ("training", "paused") and self.folder.step < total:
            change_control(self.folder.path, "interrupt", stop=True, paused=False)
        else:
            self.interrupt()

    def interrupt(self) -> None:
        """Interrupt it where it is: the run goes on from its last checkpoint."""
        number = read_sign(self.folder).get("pid") or (self._process and self._process.pid)
        if number and self.is_alive:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(number, signal.SIGINT)

    def check_end(self) -> None:
        """Say how it ended: nothing where the run is finished.

        Raises:
            RunStoppedError: somebody asked for that. TrainingError, UserError: as it raised them. KeyboardInterrupt.
            WorkerError: it was killed, or failed otherwise, with the end of its log.
        """
        end = read_sign(self.folder).get("end")
        if end is None:
            state = self.folder.state()
            if state.name == "finished":
                return
            raise WorkerError(f"run {self.folder.path.name!r}: {state.text}{self._last_words()}")
        kind, text = end
        if kind == "KeyboardInterrupt":
            raise KeyboardInterrupt
        if kind == "SystemExit":  # SIGTERM, as of a scheduler
            raise RunStoppedError(f"run {self.folder.path.name!r}: {self.folder.state().text}")
        known = {"RunStoppedError": RunStoppedError, "TrainingError": TrainingError, "UserError": UserError}
        if kind in known:
            raise known[kind](text)
        if kind:
            raise WorkerError(
                f"run {self.folder.path.name!r}: the process that trains it ended with {kind}: {text}; all that it "
                f"said stands in {self.log}"
            )

    def _last_words(self) -> str:
        with suppress(OSError):
            lines = self.log.read_text(errors="replace").splitlines()[-LINES:]
            return "\n".join([f". Its log, {self.log}, ends with", *lines]) if lines else f". Its log: {self.log}"
        return ""


def read_sign(folder: RunFolder) -> Sign:
    """What the process says of itself; {} where it has not said anything yet, or there is none."""
    try:
        sign = json.loads((folder.path / f"{WORKER}.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return sign if isinstance(sign, dict) else {}
