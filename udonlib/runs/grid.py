"""A grid of runs: rows, each a small change of one base preset, times seeds; run by papermill, resumed, never repeated.

    grid = open_grid(GridParams(rows="no_kl,us_rr", seeds="0,1,2"))
    for progress in grid.run(): ...

A row of the recipe `specialist` is one run for each domain; a row with offline teachers needs the specialists that
teach first. Runs of equal settings are one run, here and in other notebooks. A run that fails is kept with its message,
and the others go on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from udonlib import presets
from udonlib.data.catalog import load_catalog
from udonlib.errors import UserError, nearest
from udonlib.files import SHARE, results_folder, write_text
from udonlib.models.processors import n_cores
from udonlib.params import RECIPES, TrainParams
from udonlib.presets import GridParams
from udonlib.runs.folder import RunFolder, last_step

ABLATIONS = SHARE / "params" / "ablations"
TABLE = (  # the rows of the table in RESULTS.md
    *("udon", "udon_plus", "us_rr", "uj_rr", "adapter", "features", "specialist"),
    *("no_kl", "no_rel", "no_distillation", "round_robin"),
    *("plus_separate", "plus_kl", "plus_rel_4", "plus_deep_teachers", "plus_random"),
)
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """One training run of a grid.

    values: what train.ipynb is given. needs: names of runs that must be finished before.
    """

    label: str
    values: Mapping[str, Any]
    params: TrainParams
    needs: tuple[str, ...] = ()

    @cached_property
    def name(self) -> str:
        """Of the run: from its parameters."""
        return self.params.run_name

    @cached_property
    def run(self) -> RunFolder:
        """The run's folder, whether it exists or not."""
        return RunFolder(self.params.run_dir)

    def step(self) -> int:
        """The step of the run's last record; 0 before the first."""
        return last_step(self.run.path)


@dataclass
class State:
    """Where one job stands: waiting, running, finished or failed (then with a message and the log)."""

    label: str
    run: str
    status: str
    step: int
    steps: int
    message: str = ""
    log: Path | None = None


@dataclass
class Progress:
    """Where the whole grid stands; seconds_left is None until some run shows its pace."""

    states: list[State]
    seconds_left: float | None = None

    def count(self, status: str) -> int:
        """How many jobs stand at `status`: waiting, running, finished or failed."""
        return sum(state.status == status for state in self.states)


@dataclass
class _Process:
    process: subprocess.Popen
    notebook: Path
    log: Path
    from_step: int
    first: tuple[int, float] | None = None  # step and time when it was first seen to move

    def pace(self, step: int) -> float | None:
        """Seconds a step since it began to move; None before."""
        if self.first is None and step > self.from_step:
            self.first = step, time.monotonic()
        if self.first is None or step <= self.first[0]:
            return None
        return (time.monotonic() - self.first[1]) / (step - self.first[0])


class Grid:
    """The runs of a grid and what has become of them. Opening one writes nothing.

    rows: row -> seed -> its jobs: one, or one for each domain. jobs: every different run, by name, those that others
        need first. baseline: the row that others are compared with.
    """

    def __init__(self, params: GridParams) -> None:
        self.params, self.folder = params, folder_of(params)
        self.baseline = params.baseline
        self.domains = load_catalog(params.data, params.domains, params.images).names
        try:
            presets.load(params.base)
        except UserError as error:
            raise UserError(f"parameter 'base': {error}") from None
        self.jobs: dict[str, Job] = {}
        self.rows: dict[str, dict[int, tuple[Job, ...]]] = {}
        self._failed: dict[str, tuple[str, Path | None]] = {}
        self._running: dict[str, _Process] = {}
        for row in dict.fromkeys((params.baseline, *_row_names(params.rows, params.base))):
            own = _row_values(row)
            name = _stem(row)
            if row == params.baseline:
                self.baseline = name
            if name in self.rows:
                raise UserError(f"parameter 'rows': two rows are named '{name}'; rename one of the files")
            self.rows[name] = {seed: self._jobs_of(name, own, seed) for seed in params.seeds}

    def _jobs_of(self, row: str, own: Mapping[str, Any], seed: int) -> tuple[Job, ...]:
        """Make the jobs of a row and a seed, and of the teachers that they need; equal runs are made once."""
        if own.get("recipe") == "specialist":
            each = [(f"{row}-{domain}-s{seed}", domain) for domain in self.domains]
            return tuple(self._add(label, self._values(own, seed, domain)) for label, domain in each)
        values = self._values(own, seed)
        needs: tuple[Job, ...] = ()
        if "offline_teachers" in own:
            teacher = str(own["offline_teachers"])
            teachers = _row_values(teacher)
            # The teachers' preset stands on the preset that it names; on another base it needs a file of its own.
            if not self._stands_on_base(teacher):
                values["offline_teachers"] = str(self._teachers_file(teachers))
            needs = self._jobs_of(_stem(teacher), teachers, seed)
        return (self._add(f"{row}-s{seed}", values, tuple(job.name for job in needs)),)

    def _values(self, own: Mapping[str, Any], seed: int, domain: str | None = None) -> dict[str, Any]:
        """What differs from the base: the row's own values on top of the grid's."""
        p = self.params
        names = domain or (p.domains if p.domains == "all" else list(p.domains))
        where = {"seed": seed, "data": p.data, "images": p.images, "domains": names, "outputs": p.outputs}
        where |= {"device": p.device, "n_threads": p.n_threads or max(1, n_cores() // p.jobs)}
        unset = {"images": None, "outputs": "auto", "device": "auto"}
        where = {name: value for name, value in where.items() if name not in unset or value != unset[name]}
        return {"preset": p.base, **self._changes(own), **where}

    def _changes(self, own: Mapping[str, Any]) -> dict[str, Any]:
        fixed = RECIPES.get(str(own.get("recipe")), {})
        common = {} if self.params.steps is None or "steps" in fixed else {"steps": self.params.steps}
        return {**common, **own}

    def _add(self, label: str, values: dict[str, Any], needs: tuple[str, ...] = ()) -> Job:
        try:
            params = presets.load(values["preset"], **{name: v for name, v in values.items() if name != "preset"})
        except UserError as error:
            raise UserError(f"run {label}: {error}") from None
        job = Job(label, values, params, needs)
        return self.jobs.setdefault(job.name, job)

    def _stands_on_base(self, teacher: str) -> bool:
        own, alone = self._changes(_row_values(teacher)), presets.load(teacher)
        return presets.load(self.params.base, **own) == alone

    def _teachers_file(self, own: Mapping[str, Any]) -> Path:
        content = {"preset": self.params.base, **self._changes(own)}
        digits = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:6]
        return self.folder / f"teachers-{digits}.yaml"

    def progress(self) -> Progress:
        """Look at the runs' folders, and tell where each of them stands."""
        states, left, known = [], [], []
        for job in self.jobs.values():
            steps, process = job.params.steps, self._running.get(job.name)
            message, log = self._failed.get(job.name, ("", None))
            if job.run.status == "finished" and process is None:
                summary = job.run.summary()
                states.append(State(job.label, job.name, "finished", summary["steps"], summary["steps"]))
                known += [summary["seconds"] / summary["steps"]] if summary["steps"] else []
                continue
            step = job.step()
            status = "running" if process else "failed" if message else "waiting"
            states.append(State(job.label, job.name, status, step, steps, message, process.log if process else log))
            pace = process.pace(step) if process else None
            known += [] if pace is None else [pace]
            left += [] if status == "failed" else [(steps - step, pace)]
        if not known:
            return Progress(states, None if left else 0.0)
        usual = sum(known) / len(known)
        seconds = [n * (usual if pace is None else pace) for n, pace in left]
        return Progress(states, max(sum(seconds) / self.params.jobs, *seconds, 0.0) if seconds else 0.0)

    def run(self) -> Iterator[Progress]:
        """Run what is not finished, `jobs` at a time; yields the state until nothing is left that can run.

        Closing the iterator, or an interrupt, stops the running ones at their last checkpoint; the same call goes on
        from there, and tries failed ones again.
        """
        self._failed.clear()
        queue = [job for job in self.jobs.values() if job.run.status != "finished"]
        try:
            self._write_teachers()
            while queue or self._running:
                for name in [name for name, running in self._running.items() if running.process.poll() is not None]:
                    self._collect(name)
                for job in list(queue):
                    lost = [need for need in job.needs if need in self._failed]
                    if lost:
                        self._failed[job.name] = f"needs {self.jobs[lost[0]].label}, which failed", None
                        queue.remove(job)
                    elif len(self._running) < self.params.jobs and self._is_ready(job):
                        self._start(job)
                        queue.remove(job)
                yield self.progress()
                if queue or self._running:
                    time.sleep(POLL_SECONDS)
        finally:
            self._stop()
        yield self.progress()

    def _is_ready(self, job: Job) -> bool:
        return all(self.jobs[need].run.status == "finished" and need not in self._running for need in job.needs)

    def _write_teachers(self) -> None:
        for job in self.jobs.values():
            file = Path(str(job.values.get("offline_teachers", "")))
            if file.parent == self.folder and not file.exists():
                teacher = self.jobs[job.needs[0]]
                local = {"seed", "data", "images", "domains", "outputs", "device", "n_threads"}
                values = {name: value for name, value in teacher.values.items() if name not in local}
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(file, "# The base of this grid, as the specialists that teach.\n\n" + yaml.safe_dump(values))

    def _start(self, job: Job) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        notebook, log = self.folder / f"{job.label}.ipynb", self.folder / f"{job.label}.log"
        notebook.unlink(missing_ok=True)
        # A papermill of its own: nobody looks at its cells, and its kernel is this environment's.
        own = {"UDON_LIVE": "0", "JUPYTER_PREFER_ENV_PATH": "1", "OMP_NUM_THREADS": str(job.values["n_threads"])}
        with log.open("wb") as file:
            process = subprocess.Popen(
                self._command(job, notebook),
                env=os.environ | own,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # an interrupt of ours reaches it through `_stop` alone
            )
        self._running[job.name] = _Process(process, notebook, log, job.step())

    def _command(self, job: Job, notebook: Path) -> list[str]:
        source, values = SHARE / "notebooks" / "train.ipynb", yaml.safe_dump(dict(job.values))
        command = [sys.executable, "-m", "papermill", str(source), str(notebook)]
        return [*command, "--no-progress-bar", "--log-output", "-y", values]

    def _collect(self, name: str) -> None:
        """Take note of a process that has ended."""
        ended = self._running.pop(name)
        if ended.process.returncode or self.jobs[name].run.status != "finished":
            self._failed[name] = _cause(ended), ended.log

    def _stop(self) -> None:
        """Ask what runs to end, so that papermill stops its kernel; kill what does not listen."""
        for running in self._running.values():
            running.process.terminate()
        for running in self._running.values():
            try:
                running.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
        self._running.clear()


def open_grid(params: GridParams) -> Grid:
    """The grid of these parameters; data, rows and the parameters of every run are checked.

    Raises:
        UserError: an unknown row with the nearest name; impossible parameters, with the run that they belong to.
    """
    return Grid(params)


def _row_names(rows: tuple[str, ...], base: str) -> list[str]:
    several = {"table": TABLE, "all": _every_row(base) if "all" in rows else ()}
    return [name for row in rows for name in several.get(row, (row,))]


def _every_row(base: str) -> tuple[str, ...]:
    """All ablations of the base's kind: of frozen teachers, or of UDON."""
    frozen = presets.load(base).recipe == "unic"
    names = sorted(path.name.removesuffix(".yaml") for path in ABLATIONS.glob("*.yaml"))
    return ("unic" if frozen else "udon", *(name for name in names if name.startswith("unic_") == frozen))


def _stem(row: str) -> str:
    return re.sub(r"\.ya?ml$", "", Path(row).name)  # a dot may stand within: temperature_0.2


def _row_values(row: str) -> dict[str, Any]:
    """What a row changes: the lines of its preset, or the recipe of its name."""
    name = row.removeprefix("ablations/")
    if row.endswith((".yaml", ".yml")):
        return presets.own_values(row)
    known = [path.name.removesuffix(".yaml") for path in ABLATIONS.glob("*.yaml")]
    if name in known:
        return presets.own_values(f"ablations/{name}")
    if name in RECIPES:
        return {"recipe": name}
    raise UserError(f"parameter 'rows': no row '{row}'; {nearest(row, ['table', 'all', *RECIPES, *known])}")


def _cause(ended: _Process) -> str:
    """Say in one line why a run has ended: the notebook's error, or the last line of the log."""
    if ended.process.returncode < 0:
        return f"ended by signal {-ended.process.returncode}" + (" (out of memory?)" * (ended.process.returncode == -9))
    try:
        cells = json.loads(ended.notebook.read_text(encoding="utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", ())]
        error = next(output for output in outputs if output["output_type"] == "error")
        return f"{error['ename']}: {error['evalue']}"
    except (OSError, ValueError, StopIteration):
        lines = ended.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it ended without a word")


def folder_of(params: GridParams) -> Path:
    """Folder of a grid: executed notebooks, logs and tables."""
    if params.grid != "auto":
        return results_folder(params.outputs) / "ablations" / params.grid
    names = (re.sub(r"\.ya?ml$", "", Path(row).name) for row in params.rows)
    name = "+".join(re.sub(r"[^A-Za-z0-9._]+", "_", name) for name in names)
    if len(name) > 60:
        name = f"{len(params.rows)}rows-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    return results_folder(params.outputs) / "ablations" / f"{name}-{Path(params.base).stem[:100]}"
