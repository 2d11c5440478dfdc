"""What writes a run's folder while it trains: records, curves, checkpoints, and what a result depends on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import pandas as pd
import torch
import yaml

from udonlib import __version__
from udonlib.data.catalog import Catalog
from udonlib.errors import UserError
from udonlib.evaluation import files as evaluation_files
from udonlib.files import (
    INSTALLED,
    SHARE,
    DiskError,
    HeldError,
    remove,
    remove_leftovers,
    replacing,
    take_lock,
    whole_lines,
    write_json,
    write_text,
    writing,
)
from udonlib.params import TrainParams
from udonlib.runs.checkpoints import NAMES, Checkpoint, Saving
from udonlib.runs.folder import METRICS, RunFolder, read_record
from udonlib.training.steering import VERSION, RunStoppedError
from udonlib.training.trainer import Record

PACKAGES = ("torch", "timm", "numpy", "pandas", "pydantic")
# What a run writes besides its lock, curves and parameters, in the order in which it goes where a run begins anew: a
# run without a summary is not taken for a finished one.
FILES = (
    *("summary.json", *(f"checkpoints/{name}" for name in NAMES), METRICS, "provenance.json", "ended.json"),
    *("steering.jsonl", "control.json", *evaluation_files.FILES),
)


class RunWriter:
    """Keeps a run's records, curves and checkpoints while it trains; one process at a time."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._checkpoints = folder.checkpoints
        self._saving = Saving()
        try:  # somebody who asks for the run's state holds the lock for a moment
            self._lock = take_lock(folder.path / "lock", seconds=2.0)
        except HeldError:
            problem = f"run {folder.path.name!r} is being trained by another process; wait, or stop it"
            raise UserError(problem) from None
        for name in FILES:
            if name != "control.json":  # panels write that one
                remove_leftovers(folder.path, name)

    def clear(self) -> None:
        """Remove what a former run of this name left, but nothing that is not a run's, and not the lock that we hold.

        Its parameters go last: who is killed on the way leaves an unfinished run, never one that looks new.
        """
        remove(self.folder.path, FILES)
        self._clear_curves()
        remove(self.folder.path, ["params.yaml"])

    def _clear_curves(self) -> None:
        curves = self.folder.path / "tensorboard"
        remove(curves, [path.name for path in curves.glob("events.out.tfevents.*")])

    def start(self, params: TrainParams, provenance: Mapping[str, object], n_records: int) -> None:
        """Note the parameters and this start; records beyond the checkpoint's are dropped, to be made again."""
        from torch.utils.tensorboard import SummaryWriter  # seconds to import, needed by training only

        path = self.folder.path
        if n_records == 0:
            self._clear_curves()
        write_text(path / "params.yaml", yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False))
        write_json(path / "provenance.json", [*self.folder.provenance(), provenance])
        for name in ("ended.json", "summary.json"):  # the latter where a finished run is given more steps
            (path / name).unlink(missing_ok=True)
        records = path / METRICS
        lines = whole_lines(records)[:n_records]
        with replacing(records) as file:
            file.writelines(line + b"\n" for line in lines)
        self.n_records = len(lines)
        with writing(records):
            self._records = records.open("ab")
        step = read_record(lines[-1])["step"] if lines else 0
        self._curves = SummaryWriter(str(path / "tensorboard"), purge_step=step + 1 if lines else None)

    def record(self, record: Record) -> None:
        """Append a record to metrics.jsonl and to the curves."""
        table = record.get("table")
        plain = record | {"table": table.to_dict("records")} if isinstance(table, pd.DataFrame) else dict(record)
        plain["time"] = round(time.time(), 3)  # seconds since 1970
        with writing(self.folder.path / METRICS):
            self._records.write((json.dumps(plain) + "\n").encode())
            self._records.flush()
        self.n_records += 1
        step = record["step"]
        with writing(self.folder.path / "tensorboard"):
            for name, value in _curve_points(record):
                self._curves.add_scalar(name, value, step)
            if isinstance(table, pd.DataFrame):
                self._curves.flush()

    def save_best(self, state: Mapping[str, object]) -> None:
        """Keep the best model so far aside, until a checkpoint knows of it: a killed run may go on another way."""
        self._saving.save(self._checkpoints.save_best, state)

    def save_last(self, state: Mapping[str, object]) -> None:
        """Replace the checkpoint to go on from, and with it the best model, when all that it counts is on the disk."""
        with writing(self.folder.path / METRICS):
            os.fsync(self._records.fileno())
        self._saving.save(self._checkpoints.save_last, state)

    def wait(self) -> None:
        """Come back when all checkpoints are written; raises a DiskError where one could not be."""
        self._saving.wait()

    def settle(self, checkpoint: Checkpoint | None) -> None:
        """Decide what of the checkpoints there are stays: see `runs.checkpoints`."""
        self._checkpoints.settle(checkpoint)

    def finish(self, summary: Mapping[str, object]) -> None:
        """Say that the run is finished, with the figures of the whole."""
        write_json(self.folder.path / "summary.json", summary)

    def note_end(self, error: BaseException) -> None:
        """Say why the run is not being trained any more, for those who look at it later."""
        kind, reason = "failed", str(error) if isinstance(error, UserError) else repr(error)
        if isinstance(error, KeyboardInterrupt | GeneratorExit | RunStoppedError):
            kind, reason = "stopped", "interrupted"
            if isinstance(error, RunStoppedError):
                reason = "by SIGTERM" if error.by_signal else "asked for in its control panel"
        if self.folder.status != "finished":
            with suppress(DiskError):  # what it is noted for is said by the error itself
                write_json(self.folder.path / "ended.json", {"kind": kind, "reason": reason})

    def close(self) -> None:
        """Close all files, and give the run free for other processes."""
        with suppress(OSError):  # curves that no longer fit on the disk
            if hasattr(self, "_curves"):
                self._curves.close()
        with suppress(OSError):
            if hasattr(self, "_records"):
                self._records.close()
        self._saving.close()
        self._lock.close()


class NoWriter(RunWriter):
    """What a process has in a writer's place that trains a run together with the one that writes: it leaves nothing."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.n_records = folder, 1

    def _nothing(self, *given: object) -> None:
        return

    nothing: Any = _nothing
    clear = start = record = save_best = save_last = wait = settle = finish = note_end = close = nothing


def _curve_points(record: Record) -> Iterator[tuple[str, float]]:
    if record["kind"] == "train":
        yield "speed/images_per_s", record["images_per_s"]
        yield "rate/heads", record["learning_rate"]
        yield "rate/gradient_norm", record["gradient_norm"]
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
