"""What writes a run's folder while it trains: records, curves, checkpoints, and what a result depends on."""

from __future__ import annotations

import fcntl
import json
import platform
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from udonlib import __version__
from udonlib.domains import Catalog
from udonlib.errors import UserError
from udonlib.home import INSTALLED, SHARE
from udonlib.params import TrainParams
from udonlib.runfolder import RunFolder, write_json, write_text
from udonlib.steering import VERSION
from udonlib.storage import replacing
from udonlib.training import Record, RunStoppedError

PACKAGES = ("torch", "timm", "numpy", "pandas", "pydantic")


class RunWriter:
    """Keeps a run's records, curves and checkpoints while it trains; one process at a time."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        folder.path.mkdir(parents=True, exist_ok=True)
        self._lock = (folder.path / "lock").open("w")
        for wait in (0.02, 0.1, 0.5, None):  # somebody who asks for the run's state holds the lock for a moment
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if wait is None:
                    self._lock.close()
                    found = f"run {folder.path.name!r} is being trained by another process; wait, or stop it"
                    raise UserError(found) from None
                time.sleep(wait)
        for leftover in folder.path.rglob("*.tmp"):  # of a process that was killed while writing
            if not leftover.name.startswith("control.json"):  # panels write that one
                leftover.unlink()

    def start(self, params: TrainParams, provenance: Mapping[str, object], n_records: int) -> None:
        """Note the parameters and this start; records beyond the checkpoint's are dropped, to be made again."""
        from torch.utils.tensorboard import SummaryWriter  # seconds to import, needed by training only

        path = self.folder.path
        if n_records == 0 and (path / "tensorboard").exists():
            shutil.rmtree(path / "tensorboard")
        write_text(path / "params.yaml", yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False))
        write_json(path / "provenance.json", [*self.folder.provenance(), provenance])
        (path / "ended.json").unlink(missing_ok=True)
        records = path / "metrics.jsonl"
        lines = records.read_bytes().splitlines(keepends=True)[:n_records] if records.exists() else []
        with replacing(records) as file:
            file.writelines(lines)
        self.n_records = len(lines)
        self._records = records.open("a")
        step = json.loads(lines[-1])["step"] if lines else 0
        self._curves = SummaryWriter(str(path / "tensorboard"), purge_step=step + 1 if lines else None)

    def record(self, record: Record) -> None:
        """Append a record to metrics.jsonl and to the curves."""
        table = record.get("table")
        plain = record | {"table": table.to_dict("records")} if isinstance(table, pd.DataFrame) else dict(record)
        plain["time"] = round(time.time(), 3)  # seconds since 1970
        self._records.write(json.dumps(plain) + "\n")
        self._records.flush()
        self.n_records += 1
        step = record["step"]
        for name, value in _curve_points(record):
            self._curves.add_scalar(name, value, step)
        if isinstance(table, pd.DataFrame):
            self._curves.flush()

    def save_best(self, state: Mapping[str, object]) -> None:
        """Keep the best model so far aside, until a checkpoint knows of it: a killed run may go on another way."""
        _save(self._next, state)

    def save_last(self, state: Mapping[str, object]) -> None:
        """Replace the checkpoint to go on from, and with it the best model."""
        _save(self.folder.last, state)
        if self._next.exists():
            self._next.replace(self.folder.best)

    def settle(self, state: Mapping[str, Any] | None) -> None:
        """Decide about a best model that was kept aside when the run was killed: does the checkpoint know of it?"""
        if not self._next.exists():
            return
        kept = torch.load(self._next, map_location="cpu", weights_only=True)
        if state is not None and (state["validated"], state["best"]) == (kept["step"], kept["r_at_1"]):
            self._next.replace(self.folder.best)
        else:
            self._next.unlink()

    @property
    def _next(self) -> Path:
        return self.folder.best.with_name("next.pt")

    def note_end(self, error: BaseException) -> None:
        """Say why the run is not being trained any more, for those who look at it later."""
        kind, reason = "failed", str(error) if isinstance(error, UserError) else repr(error)
        if isinstance(error, KeyboardInterrupt | GeneratorExit | RunStoppedError):
            asked = isinstance(error, RunStoppedError)
            kind, reason = "stopped", "asked for in its control panel" if asked else "interrupted"
        if self.folder.status != "finished":
            write_json(self.folder.path / "ended.json", {"kind": kind, "reason": reason})

    def close(self) -> None:
        for name in ("_records", "_curves"):
            if hasattr(self, name):
                getattr(self, name).close()
        self._lock.close()


def _curve_points(record: Record) -> Iterator[tuple[str, float]]:
    if record["kind"] == "train":
        yield "speed/images_per_s", record["images_per_s"]
        yield "rate/heads", record["learning_rate"]
        for domain, terms in record["losses"].items():
            yield from ((f"{term}/{domain}", value) for term, value in terms.items())
    elif record["kind"] == "allocation":
        yield from ((f"allocation/{domain}", share) for domain, share in record["shares"].items())
    elif record["kind"] == "validation":
        for row in record["table"].to_dict("records"):
            if row["embedder"] == "student":
                yield f"r_at_1/{row['index']}/{row['domain']}", row["r_at_1"]


def provenance(catalog: Catalog, device: torch.device) -> dict[str, object]:
    """What a result depends on besides its parameters."""

    def git(*arguments: str) -> str | None:
        if INSTALLED:  # the commit around it would be another project's
            return None
        try:
            command = ["git", "-C", str(SHARE), *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "version": __version__,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "steering": VERSION,
        "data": catalog.name,
        "data_fingerprint": catalog.fingerprint,
    }


def _save(path: Path, state: Mapping[str, object]) -> None:
    with _interrupts_wait(), replacing(path) as file:
        torch.save(dict(state), file)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Have an interrupt wait: PyTorch's archive, cut off while it is written, raises an error of its own instead."""
    if threading.current_thread() is not threading.main_thread():  # no interrupt comes to other threads
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if came:
        signal.raise_signal(signal.SIGINT)
