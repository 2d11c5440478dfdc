"""The folder of a run: parameters, provenance, records, checkpoints, evaluation.

    outputs/runs/<run>/
        params.yaml        every parameter, defaults included
        provenance.json    code, versions, machine and data of each start
        metrics.jsonl      one record a line: allocation, train, validation
        tensorboard/       the same as curves
        checkpoints/       last.pt (everything the next step needs), best.pt (the model of the best validation)
        evaluation.csv, evaluation.json, outcomes.csv.gz, neighbours.npz    of the best model on the test queries
        summary.json       figures of the whole run

A run without summary.json is unfinished, and training it again goes on from last.pt: the same weights, to the bit on a
CPU in float32, as if nothing had happened. Files are replaced whole, never half-written.
"""

from __future__ import annotations

import fcntl
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from udonlib.domains import Catalog
from udonlib.errors import UserError, nearest
from udonlib.params import PROJECT, DataParams, TrainParams
from udonlib.storage import replacing
from udonlib.training import Record

PACKAGES = ("torch", "timm", "numpy", "faiss-cpu", "pandas", "pydantic")


def write_text(path: Path, text: str) -> None:
    """Replace a text file whole."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file whole."""
    write_text(path, json.dumps(value, indent=1) + "\n")


class RunFolder:
    """The files of one run: reading them needs no model and no images."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def params(self) -> TrainParams:
        """The parameters the run was started with."""
        file = self.path / "params.yaml"
        try:
            return TrainParams(**yaml.safe_load(file.read_text()))
        except (OSError, yaml.YAMLError, TypeError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: not a run's parameters: {error}") from None

    @property
    def status(self) -> str:
        """new (never started), unfinished, or finished."""
        if (self.path / "summary.json").exists():
            return "finished"
        return "unfinished" if (self.path / "params.yaml").exists() else "new"

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.pt"

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / "best.pt"

    def summary(self) -> dict[str, Any]:
        """Figures of the whole run: steps, seconds, images, skipped images, best step."""
        return json.loads((self.path / "summary.json").read_text())

    def provenance(self) -> list[dict[str, Any]]:
        """One note for each start of the run: code, versions, machine, data."""
        file = self.path / "provenance.json"
        return json.loads(file.read_text()) if file.exists() else []

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Records of one kind in their order; a line that is still being written is left out."""
        file = self.path / "metrics.jsonl"
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        records = (json.loads(line) for line in lines if line.endswith(b"\n"))
        return [record for record in records if record["kind"] == kind]

    def losses(self) -> pd.DataFrame:
        """Mean losses since the record before: step, domain, term, value."""
        rows = [
            (record["step"], domain, term, value)
            for record in self.records("train")
            for domain, terms in record["losses"].items()
            for term, value in terms.items()
        ]
        return pd.DataFrame(rows, columns=["step", "domain", "term", "value"])

    def allocation(self) -> pd.DataFrame:
        """The allocation at the start of each window: step, domain, weight (share), images_seen (until then)."""
        rows = [
            (record["step"], domain, weight, record["images_seen"][domain])
            for record in self.records("allocation")
            for domain, weight in record["weights"].items()
        ]
        return pd.DataFrame(rows, columns=["step", "domain", "weight", "images_seen"])

    def validation(self) -> pd.DataFrame:
        """The tables of all validations, one under the other, with the step in front."""
        tables = [pd.DataFrame(r["table"]).assign(step=r["step"]) for r in self.records("validation")]
        if not tables:
            return pd.DataFrame(columns=["step", "embedder", "domain", "index", "r_at_1", "mmp_at_5"])
        table = pd.concat(tables, ignore_index=True)
        return table[["step", *(column for column in table if column != "step")]]

    def evaluation(self) -> pd.DataFrame:
        """The table of the final test."""
        return pd.read_csv(self.path / "evaluation.csv")

    def load_model_state(self) -> dict[str, Any]:
        """What best.pt holds: `model` (a state dict), `step`, `r_at_1`."""
        return torch.load(self.best, map_location="cpu", weights_only=True)


def run_folder(name: str, outputs: str = "auto") -> RunFolder:
    """An existing run by its name or path.

    Raises:
        UserError: "no run ..." with the nearest name.
    """
    home = (PROJECT / "outputs" if outputs == "auto" else Path(outputs).expanduser()) / "runs"
    for path in (home / name, Path(name).expanduser()):
        if (path / "params.yaml").exists():
            return RunFolder(path)
    names = [path.parent.name for path in home.glob("*/params.yaml")]
    raise UserError(f"no run {name!r} in {home}; {nearest(name, names) if names else 'it holds no runs yet'}")


class RunWriter:
    """Keeps a run's records, curves and checkpoints while it trains; one process at a time."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        folder.path.mkdir(parents=True, exist_ok=True)
        self._lock = (folder.path / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"run {folder.path.name!r} is being trained by another process; wait, or stop it") from None
        for leftover in folder.path.rglob("*.tmp"):  # of a process that was killed while writing
            leftover.unlink()

    def start(self, params: TrainParams, provenance: Mapping[str, object], n_records: int) -> None:
        """Note the parameters and this start; records beyond the checkpoint's are dropped, to be made again."""
        from torch.utils.tensorboard import SummaryWriter  # seconds to import, needed by training only

        path = self.folder.path
        if n_records == 0 and (path / "tensorboard").exists():
            shutil.rmtree(path / "tensorboard")
        write_text(path / "params.yaml", yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False))
        write_json(path / "provenance.json", [*self.folder.provenance(), provenance])
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
        plain = record | {"table": table.to_dict("records")} if isinstance(table, pd.DataFrame) else record
        self._records.write(json.dumps(plain) + "\n")
        self._records.flush()
        self.n_records += 1
        step = record["step"]
        for name, value in _curve_points(record):
            self._curves.add_scalar(name, value, step)
        if isinstance(table, pd.DataFrame):
            self._curves.flush()

    def save(self, path: Path, state: Mapping[str, object]) -> None:
        """Replace a checkpoint."""
        with replacing(path) as file:
            torch.save(dict(state), file)

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
        yield from ((f"allocation/{domain}", weight) for domain, weight in record["weights"].items())
    elif record["kind"] == "validation":
        for row in record["table"].to_dict("records"):
            if row["embedder"] == "student":
                yield f"r_at_1/{row['index']}/{row['domain']}", row["r_at_1"]


def provenance(params: DataParams, catalog: Catalog, device: torch.device) -> dict[str, object]:
    """What a result depends on besides its parameters."""

    def git(*arguments: str) -> str | None:
        try:
            command = ["git", "-C", str(PROJECT), *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "data": catalog.name,
        "data_fingerprint": catalog.fingerprint,
    }
