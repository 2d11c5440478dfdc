"""What a run depends on and must find unchanged: files that it begins with, a run whose interventions it repeats."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Set
from contextlib import suppress
from pathlib import Path

from udonlib.errors import UserError
from udonlib.files import run_path
from udonlib.models.embedding_model import weights_file
from udonlib.params import TrainParams
from udonlib.runs.folder import RunFolder
from udonlib.runs.teachers import teacher_files


def differences(there: TrainParams, here: TrainParams, apart_from: Set[str]) -> list[str]:
    """Say which parameters differ, and how: "steps: 400 there, 800 here"."""
    then, now = (params.model_dump(exclude=set(apart_from)) for params in (there, here))
    return [f"{name}: {then[name]!r} there, {now[name]!r} here" for name in now if then[name] != now[name]]


def origins(params: TrainParams, specialists: Mapping[str, RunFolder]) -> dict[str, str]:
    """SHA-256 of each file that a run begins with: weights of the backbone, another run's model, teachers.

    Args:
        specialists: by domain, whose models teach offline.
    """
    files = {}
    if params.weights is not None:
        files[f"weights {params.weights!r}"] = weights_file(params.weights)
    if params.start is not None:
        with suppress(UserError):  # it may be gone when this run is finished
            start = RunFolder(run_path(params.start, params.outputs, "start"))
            files[f"model of run {params.start!r}, its start,"] = start.best
    files |= {f"offline teacher of '{domain}'": run.best for domain, run in specialists.items()}
    files |= teacher_files(params)
    digests = {}
    for name, path in files.items():
        if path.exists():  # else whoever needs it says so
            with path.open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def check_origins(run: RunFolder, now: Mapping[str, str]) -> None:
    """Refuse to go on with, or to pass for the same, a run that began with other weights or teachers."""
    before = run.provenance()
    then = before[0].get("origins", {}) if before else {}
    for name, digest in now.items():
        if then.get(name, digest) != digest:
            raise UserError(
                f"run {run.path.name!r} does not fit: the {name} has changed since it began. Restore the file, "
                "give this run another name (run=...), or begin anew (overwrite=true)"
            )


def replayed(params: TrainParams, path: Path, fingerprint: str, apart_from: Set[str]) -> Path | None:
    """The folder of the run whose interventions this one repeats.

    Args:
        path: folder of this one. fingerprint: of its data. apart_from: parameters that may differ.

    Raises:
        UserError: it is not finished, or its parameters or data are others: they would not mean the same there.
    """
    if params.replay is None:
        return None
    other = RunFolder(run_path(params.replay, params.outputs, "replay"))
    name = f"parameter 'replay': run '{other.path.name}'"
    if other.path.resolve() == path.resolve():
        raise UserError(f"{name} cannot repeat itself: give this one another name (run=...)")
    if other.status != "finished":
        raise UserError(f"{name} is not finished: {other.state().text}")
    if other.params.seams and (params.patience or any(entry.finish for entry in other.interventions())):
        raise UserError(f"{name} ended before its last step and was given more: that cannot be repeated")
    differing = differences(other.params, params, apart_from | {"replay"})
    if differing:
        raise UserError(f"{name} differs in {'; '.join(differing)}: leave that out")
    if not any(entry.matters for entry in other.interventions()):
        raise UserError(f"{name} has nothing to repeat: nobody intervened in it")
    if other.provenance()[0]["data_fingerprint"] != fingerprint:
        raise UserError(f"{name} was trained on other data")
    return other.path
