"""The folder of a run: parameters, provenance, records, checkpoints, evaluation.

    outputs/runs/<run>/
        params.yaml        every parameter, defaults included
        provenance.json    code, versions, machine and data of each start
        metrics.jsonl      one record a line: allocation, train, validation, steering
        control.json, steering.jsonl    what a person asks of the run, and what was done: see `training.steering`
        ended.json         why it is not being trained now, unless it was killed
        tensorboard/       the same as curves
        checkpoints/       last.pt (everything the next step needs), best.pt (the model of the best validation), and
                           those of the checkpoint before: see `runs.checkpoints`
        evaluation.csv, evaluation.json, outcomes.csv.gz, neighbours.npz    of the best model on the test queries
        summary.json       figures of the whole run
        asked.yaml, worker.json, worker.lock, worker.log    of a process of its own: see `runs.apart`

A run without summary.json is unfinished, and training it again goes on from last.pt: the same weights, to the bit on a
CPU in float32, as if nothing had happened. Files are replaced whole, never half-written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from udonlib import files
from udonlib.errors import ParameterError, UserError
from udonlib.evaluation.files import OUTCOMES, load_outcomes, load_table
from udonlib.files import is_held, whole_lines
from udonlib.params import TrainParams
from udonlib.runs.checkpoints import Checkpoint, Checkpoints, load_checkpoint
from udonlib.training.interventions import Intervention, interventions
from udonlib.training.steering import read_control

STATES = ("new", "training", "paused", "stopped", "failed", "lost", "finished", "unreadable")


METRICS = "metrics.jsonl"
WORKER = "worker"  # stem of the files of a process that trains the run apart from a notebook


def read_record(line: bytes) -> dict[str, Any]:
    """A record of a run from its line. Raises: UserError: "not a record: ..."; who reads the file names the place."""
    try:
        record = json.loads(line)
        _ = str(record["kind"]), int(record["step"])
    except (ArithmeticError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"not a record: {error!r}") from None
    return record


class RunFolder:
    """The files of one run: reading them needs no model and no images."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def params(self) -> TrainParams:
        """The parameters the run was started with."""
        file = self.path / "params.yaml"
        values = files.read_yaml(file)
        try:
            return TrainParams(**values)
        except ParameterError as error:
            raise UserError(f"{file}: not a run's parameters: {error}") from None

    @property
    def status(self) -> str:
        """new (never started), unfinished, or finished."""
        if (self.path / "summary.json").exists():
            return "finished"
        return "unfinished" if (self.path / "params.yaml").exists() else "new"

    @property
    def is_over(self) -> bool:
        """Whether it is finished, and neither to be begun anew nor given more steps."""
        finished = self.status == "finished" and not self.params.overwrite
        return finished and self.summary()["steps"] not in self.params.seams

    @property
    def checkpoints(self) -> Checkpoints:
        """The run's checkpoints, whether there are any or not."""
        return Checkpoints(self.path)

    @property
    def last(self) -> Path:
        """The file of the checkpoint to go on from; it need not exist."""
        return self.checkpoints.last

    @property
    def best(self) -> Path:
        """The file of the best model; it need not exist."""
        return self.path / "checkpoints" / "best.pt"

    def summary(self) -> dict[str, Any]:
        """Figures of the whole run: steps, seconds, images, skipped images, best step."""
        file = self.path / "summary.json"
        try:
            summary = json.loads(file.read_text())
            int(summary["steps"])
        except (OSError, ArithmeticError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{file}: not a run's summary: {error!r}") from None
        return summary

    def provenance(self) -> list[dict[str, Any]]:
        """One note for each start of the run: code, versions, machine, data; none for a run that is new."""
        file = self.path / "provenance.json"
        try:
            notes = json.loads(file.read_text())
            fits = [isinstance(note["data_fingerprint"], str) for note in notes]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{file}: not a run's provenance: {error!r}") from None
        if not (fits and all(fits)):
            raise UserError(f"{file}: not a run's provenance: expected a note of each start, with its data_fingerprint")
        return notes

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Records of one kind in their order; a line that is still being written is left out."""
        file, records = self.path / METRICS, []
        for number, line in enumerate(whole_lines(file), 1):
            try:
                records.append(read_record(line))
            except UserError as error:
                raise UserError(f"{file}, line {number}: {error}") from None
        return [record for record in records if record["kind"] == kind]

    def n_whole_records(self) -> int:
        """How many records can be read from the first one on, of any kind."""
        return self._whole_records()[0]

    def _whole_records(self) -> tuple[int, int]:
        """How many records can be read from the first one on, and how many bytes they are."""
        n_bytes = 0
        lines = whole_lines(self.path / METRICS)
        for number, line in enumerate(lines):
            try:
                read_record(line)
            except UserError:
                return number, n_bytes
            n_bytes += len(line) + 1
        return len(lines), n_bytes

    def torn_records(self) -> str:
        """What of the records' end cannot be read, in a sentence; "" for nothing."""
        n_records, n_bytes = self._whole_records()
        file = self.path / METRICS
        lost = file.stat().st_size - n_bytes if file.exists() else 0
        return f"{file}: what follows record {n_records:,} cannot be read and is left out ({lost:,} bytes)" * (lost > 0)

    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint to go on from, that all other files of the run fit; None: the run has not come to one.

        Raises:
            UserError: there was one, and nothing of it can be used, with the way out.
        """
        n_records, done = self.n_whole_records(), self.interventions()
        n_done = sum(entry.matters for entry in done)

        def problem_of(state: Mapping[str, Any]) -> str | None:
            if n_records < state["n_records"]:
                return f"it counts {state['n_records']:,} records, metrics.jsonl holds {n_records:,} that can be read"
            if n_done < state.get("n_interventions", 0):
                return f"it counts {state['n_interventions']:,} interventions, steering.jsonl holds {n_done:,}"
            return None

        last = self.checkpoints.find(problem_of)
        came_to = last_step(self.path)
        if last is None and any(record["step"] < came_to for record in self.records("validation")):  # each makes one
            raise UserError(
                f"{self.last}: missing, though the run came to step {came_to:,}: put back a copy, or begin anew "
                "(overwrite=true)"
            )
        return last

    def losses(self) -> pd.DataFrame:
        """Mean losses since the record before: step, domain, term, value, images (of the domain, since then)."""
        records = self.records("train")
        seen = [record.get("images_seen", {}) for record in records]
        rows = [
            (record["step"], domain, term, value, now.get(domain, 0) - before.get(domain, 0))
            for record, now, before in zip(records, seen, [{}, *seen], strict=False)
            for domain, terms in record["losses"].items()
            for term, value in terms.items()
        ]
        return pd.DataFrame(rows, columns=["step", "domain", "term", "value", "images"])

    def pace(self) -> float:
        """Images trained per second: the median over the records, so that pauses do not count."""
        paces = [record["images_per_s"] for record in self.records("train")]
        return round(float(np.median(paces)), 1) if paces else 0.0

    def allocation(self) -> pd.DataFrame:
        """The allocation from each start of a window and each intervention on.

        Columns: step, domain, weight (the adaptive one), share (of the steps; another one where a person steered),
        images_seen (until then).
        """
        rows = [
            (record["step"], domain, weight, record.get("shares", record["weights"])[domain], seen[domain])
            for record in self.records("allocation")
            for seen in [record["images_seen"]]
            for domain, weight in record["weights"].items()
        ]
        table = pd.DataFrame(rows, columns=["step", "domain", "weight", "share", "images_seen"])
        return table.drop_duplicates(["step", "domain"], keep="last", ignore_index=True)  # several changes at a step

    def interventions(self) -> list[Intervention]:
        """What a person did to the run, in order; empty for a run that was left alone."""
        return interventions(self.path)

    def state(self) -> RunState:
        """What is going on with the run, from its small files."""
        return run_state(self)

    @property
    def step(self) -> int:
        """Steps that its records tell of."""
        return last_step(self.path)

    def validation(self) -> pd.DataFrame:
        """The tables of all validations, one under the other, with the step in front."""
        tables = [pd.DataFrame(r["table"]).assign(step=r["step"]) for r in self.records("validation")]
        if not tables:
            return pd.DataFrame(columns=["step", "embedder", "domain", "index", "r_at_1", "mmp_at_5"])
        table = pd.concat(tables, ignore_index=True)
        return table[["step", *(column for column in table if column != "step")]]

    def evaluation(self) -> pd.DataFrame:
        """The table of the final test. Raises: UserError where its files are missing or damaged."""
        return load_table(self.path)

    def outcomes(self) -> pd.DataFrame:
        """How each query of the final test was answered. Raises: UserError where the file is missing or damaged."""
        return load_outcomes(self.path / OUTCOMES)

    def load_model_state(self) -> dict[str, Any]:
        """What best.pt holds: `model` (a state dict), `step`, `r_at_1`.

        Raises:
            UserError: it is missing or damaged, with what can be done.
        """
        with self._saying_what_to_do():
            return load_checkpoint(self.best)

    @contextmanager
    def _saying_what_to_do(self) -> Iterator[None]:
        """Say after whatever is wrong with best.pt what can be done."""
        try:
            yield
        except UserError as error:
            other = f"take the last model instead (evaluate.ipynb -p checkpoint {self.last}), " * self.last.exists()
            raise UserError(f"{error}. Put back a copy, {other}or train the run again (overwrite=true)") from None


class RunState(NamedTuple):
    """What is going on with a run: `name` is one of STATES, `text` says it in a sentence."""

    name: str
    text: str


def run_state(folder: RunFolder) -> RunState:
    """What is going on with a run; `lost` is one whose process ended without a word, as when it is killed."""
    try:
        status = folder.status
        if status == "new":
            begins = is_held(folder.path / f"{WORKER}.lock")
            return RunState("training", "getting ready") if begins else RunState("new", "not started yet")
        steps, step = folder.params.steps, last_step(folder.path)
        # What a resumed run has yet to repeat stands in the log behind what was done since.
        last = max(folder.interventions(), key=lambda entry: entry.number, default=None)
        done = folder.summary()["steps"] if status == "finished" else 0
    except UserError as error:
        return RunState("unreadable", str(error))
    where = f"step {step:,} of {steps:,}"
    if is_locked(folder.path):
        paused = last is not None and last.paused and _wants_pause(folder.path)
        return RunState("paused", f"paused after {where}") if paused else RunState("training", f"training, {where}")
    if (status != "finished" or not folder.is_over) and is_held(
        folder.path / f"{WORKER}.lock"
    ):  # it loads, or it has just ended
        return RunState("training", f"getting ready to go on, {where}")
    if status == "finished":
        return RunState("finished", f"finished after {done:,} steps")
    again = "run it again to begin anew"
    if folder.checkpoints.exist:
        again = f"run it again{' without overwrite' * folder.params.overwrite} to go on from its last checkpoint"
    try:
        ended = json.loads((folder.path / "ended.json").read_text())
        kind = {"stopped": "stopped", "failed": "failed"}[ended["kind"]]
        return RunState(kind, f"{kind} after {where} ({ended['reason']}); {again}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return RunState("lost", f"ended without a word after {where}: killed, or its machine went down; {again}")


def last_step(path: Path) -> int:
    """The step of the last record of a run; 0 before the first one. Reads the end of the file only."""
    file = path / METRICS
    for start in (-(1 << 14), -(1 << 18), 0):  # a validation's table is a long line
        if lines := whole_lines(file, start):
            try:
                return int(read_record(lines[-1])["step"])
            except UserError as error:
                raise UserError(f"{file}: the last record cannot be read: {error}") from None
    return 0


def _wants_pause(path: Path) -> bool:
    """Whether a pause is still wanted: it ends with the process, and the log does not say so."""
    try:
        return read_control(path).paused
    except UserError:  # nobody can have asked the run to go on
        return True


def is_locked(path: Path) -> bool:
    """Whether a process trains the run now."""
    return is_held(path / "lock")
