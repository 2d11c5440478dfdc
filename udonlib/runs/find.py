"""Runs looked up by name, path or age: what each question means by "latest"."""

from __future__ import annotations

import itertools

from udonlib.errors import UserError
from udonlib.files import run_path, runs_folder
from udonlib.runs.folder import RunFolder, is_locked


def run_folder(name: str, outputs: str = "auto") -> RunFolder:
    """An existing run by its name or path.

    Raises:
        UserError: "no run ..." with the nearest name.
    """
    return RunFolder(run_path(name, outputs))


def find_run(name: str, outputs: str = "auto") -> RunFolder:
    """An existing run by its name or path, or "latest": the one that is being trained now, or that wrote last.

    Raises:
        UserError: "no run ..." with the nearest name.
    """
    if name != "latest":
        return run_folder(name, outputs)
    home = runs_folder(outputs)
    found = [(is_locked(file.parent), file.stat().st_mtime, file.parent) for file in home.glob("*/metrics.jsonl")]
    if not found:
        raise UserError(f"parameter 'run': found 'latest', but there are no runs in {home}; train one: train.ipynb")
    return RunFolder(max(found)[2])


def finished_runs(outputs: str = "auto") -> list[RunFolder]:
    """The finished runs of a folder of results, the last one first."""
    files = sorted(runs_folder(outputs).glob("*/summary.json"), key=lambda file: -file.stat().st_mtime_ns)
    return [RunFolder(file.parent) for file in files]


def find_tested(name: str = "latest", embedder: str = "student", outputs: str = "auto") -> RunFolder:
    """A finished run that tested an embedder: by name or path, or 'latest', the one that finished last.

    Raises:
        UserError: there is none of this name, or it is unfinished, or it lacks the embedder; with the names of others.
    """
    taught = " with teachers" if embedder == "teacher" else ""
    others = (folder for folder in answered_runs(outputs) if _tested(folder, embedder))
    if name == "latest":
        last = next(others, None)
        if last is None:
            raise UserError(f"no finished run{taught} in {runs_folder(outputs)}; train one: make train")
        return last
    run = run_folder(name, outputs)
    if run.status == "finished" and _tested(run, embedder):
        return run
    lacks = f"is {run.status}" if run.status != "finished" else f"(recipe {run.params.recipe!r}) has no {embedder}"
    valid = ", ".join(folder.path.name for folder in itertools.islice(others, 8)) or "none yet"
    raise UserError(f"run {run.path.name!r} {lacks}; finished runs{taught}: {valid}")


def answered_runs(outputs: str) -> list[RunFolder]:
    """The finished runs that say how each query was answered, the last one first."""
    return [folder for folder in finished_runs(outputs) if (folder.path / "outcomes.csv.gz").exists()]


def _tested(folder: RunFolder, embedder: str) -> bool:
    """Whether a run of this version has tested an embedder and kept its neighbours."""
    try:
        there = embedder in set(folder.evaluation()["embedder"]) and recipe_of(folder) is not None
    except (OSError, KeyError, ValueError):  # no evaluation, or a damaged one
        return False
    return there and (folder.path / "neighbours.npz").exists()


def recipe_of(folder: RunFolder) -> str | None:
    """The recipe of a run; None where its parameters are of another version."""
    try:
        return folder.params.recipe
    except UserError:
        return None
