"""The run whose gaps are looked into: found, checked, and read together with specialists of its domains.

A specialist was trained, and tested, on one domain alone. What specialists find in the merged index of the run is
searched once, see `udonlib.assembly`, and kept in the folder of results, outside all runs: who looks at a run leaves it
as it is.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from udonlib import presets
from udonlib.assembly import evaluate_assembly
from udonlib.domains import Catalog
from udonlib.errors import UserError, nearest
from udonlib.evaluation import Neighbours
from udonlib.evaluationfiles import load_outcomes, save_outcomes
from udonlib.home import results_folder, runs_folder
from udonlib.notebookparams import GapParams
from udonlib.params import WITHOUT_EFFECT
from udonlib.runfolder import RunFolder, finished_runs
from udonlib.runs import Run, load_run

KEPT = "gaps/specialists-{}.csv.gz"  # in the folder of results


@dataclass(frozen=True, eq=False)
class GapRun:
    """A finished run with teachers, and what all embedders made of its test queries.

    specialists: the run of each domain that has one. domains: those to compare, in the catalog's order. outcomes: as of
        `Evaluation`, of student, teacher and, where there are some, specialist. neighbours: in the merged index.
        validation: as of `RunFolder`.
    """

    run: Run
    domains: tuple[str, ...]
    specialists: dict[str, RunFolder]
    outcomes: pd.DataFrame
    neighbours: list[Neighbours]
    validation: pd.DataFrame

    @property
    def catalog(self) -> Catalog:
        return self.run.catalog

    @property
    def metrics(self) -> list[str]:
        """The columns of outcomes that measure: r_at_1 and mmp_at_k."""
        return [name for name in self.outcomes if "_at_" in name]


def open_gaps(params: GapParams) -> GapRun:
    """Read a run and its specialists.

    Raises:
        UserError: no such run, or an unfinished one, or one without teachers, with the names of runs that have some;
            k beyond the neighbours that were kept; specialists that do not exist, or were tested on other queries.
    """
    run = find_run(params.run, "teacher", params.outputs)
    if params.data != "auto" or params.images:
        run.move_data(params.data, params.images)
    neighbours = run.neighbours()
    n_kept, domains, name = min(part.position.shape[1] for part in neighbours), run.catalog.names, run.path.name
    if params.k > n_kept:
        raise UserError(f"parameter 'k': found {params.k}, but run {name!r} kept {n_kept}; valid: 1 to {n_kept}")
    if params.domains != "all":
        unknown = next((name for name in params.domains if name not in domains), None)
        if unknown:
            raise UserError(f"parameter 'domains': run {name!r} has no '{unknown}'; {nearest(unknown, domains)}")
        domains = tuple(name for name in domains if name in params.domains)
    outcomes = _outcomes(run)
    outcomes = outcomes[outcomes["embedder"].isin(["student", "teacher"])]
    specialists = find_specialists(run, params.specialists, params.outputs)
    if specialists:
        outcomes = pd.concat([outcomes, specialist_outcomes(run, specialists, params.outputs)], ignore_index=True)
    # The mean over domains is that of all the run's; of some of them it would be another.
    validated = [*domains, "mean"] if len(domains) == len(run.catalog.names) else domains
    validation = run.validation()
    return GapRun(
        run,
        domains,
        {name: specialists[name] for name in domains if name in specialists},
        outcomes[outcomes["domain"].isin(domains)],
        sorted(
            (part for part in neighbours if part.query_domain in domains),
            key=lambda part: domains.index(part.query_domain),
        ),
        validation[validation["domain"].isin(validated)],
    )


def find_run(name: str = "latest", embedder: str = "student", outputs: str = "auto") -> Run:
    """A finished run that tested an embedder: by name or path, or 'latest', the one that finished last.

    Raises:
        UserError: there is none of this name, or it is unfinished, or it lacks the embedder; with the names of others.
    """
    taught = " with teachers" if embedder == "teacher" else ""
    others = (folder for folder in _finished(outputs) if _tested(folder, embedder))
    if name == "latest":
        last = next(others, None)
        if last is None:
            raise UserError(f"no finished run{taught} in {runs_folder(outputs)}; train one: make train")
        return load_run(str(last.path), outputs)
    run = load_run(name, outputs)
    if run.status == "finished" and _tested(run, embedder):
        return run
    lacks = f"is {run.status}" if run.status != "finished" else f"(recipe {run.params.recipe!r}) has no {embedder}"
    valid = ", ".join(folder.path.name for folder in itertools.islice(others, 8)) or "none yet"
    raise UserError(f"run {run.path.name!r} {lacks}; finished runs{taught}: {valid}")


def find_specialists(run: Run, which: str = "auto", outputs: str = "auto") -> dict[str, RunFolder]:
    """Find for each domain of `run` a finished run that was trained on this domain alone.

    Of several the one with the run's seed goes first, then the one that finished last. "auto" never mixes settings: its
    runs differ in domain and seed alone.

    Args:
        which: "none"; "auto", runs of recipe `specialist` that were tested on the same queries, if each domain has one;
            a pattern of names such as "specialist-*-s1-*"; or a preset, whose runs with the run's seed are meant.

    Returns: a run for each domain, or nothing: the index of some domains would be another than the run's.

    Raises:
        UserError: neither a run nor a preset is called so; domains that have no specialist.
    """
    if which == "none":
        return {}
    finished = _finished(outputs)
    if which == "auto":  # the setting that finished last and has every domain
        candidates = [folder for folder in finished if _recipe(folder) == "specialist"]
        settings = dict.fromkeys(map(_setting, candidates))
        groups = [[folder for folder in candidates if _setting(folder) == setting] for setting in settings]
        whole = [found for group in groups if len(found := _by_domain(run, group)) == len(run.catalog.names)]
        return next((_ordered(run, found) for found in whole), {})
    chosen = [folder for folder in finished if fnmatch.fnmatchcase(folder.path.name, which)]
    chosen = chosen or _of_preset(run, which, outputs, [folder.path.name for folder in finished])
    found = _by_domain(run, chosen)
    without = [domain for domain in run.catalog.names if domain not in found]
    if without:
        raise UserError(
            f"parameter 'specialists': {which!r} has no finished run of {', '.join(without)} alone that was tested on "
            f"the queries of run {run.path.name!r}; expected one for each domain, 'auto' or 'none'"
        )
    return _ordered(run, found)


def _by_domain(run: Run, folders: Sequence[RunFolder]) -> dict[str, RunFolder]:
    """The first of the runs of one domain each that was tested on the run's queries; the run's own seed goes first."""
    queries = _queries(run)
    found: dict[str, RunFolder] = {}
    for folder in sorted(folders, key=lambda folder: folder.params.seed != run.params.seed):  # stable
        [domain, *others] = tested = _queries(folder)
        if not others and domain not in found and tested[domain] == queries.get(domain):
            found[domain] = folder
    return found


def _ordered(run: Run, found: Mapping[str, RunFolder]) -> dict[str, RunFolder]:
    return {domain: found[domain] for domain in run.catalog.names}


def _setting(folder: RunFolder) -> str:
    """What specialists of one kind have in common: all values that influence results but domain and seed."""
    return folder.params.model_dump_json(exclude={*WITHOUT_EFFECT, "domains"})


def specialist_outcomes(run: Run, specialists: Mapping[str, RunFolder], outputs: str = "auto") -> pd.DataFrame:
    """Outcomes of each domain's queries and of the whole index embedded by the domain's specialist.

    Searched once, and kept in the folder of results until a specialist changes.

    Args:
        specialists: one for each domain of the run.
    """
    digest = hashlib.sha256(run.catalog.fingerprint.encode())
    for domain, folder in specialists.items():
        digest.update(f"{domain}\0{folder.path.absolute()}\0".encode() + (folder.path / "evaluation.csv").read_bytes())
    file = results_folder(outputs) / KEPT.format(digest.hexdigest()[:16])
    if not file.exists():
        outcomes = evaluate_assembly([load_run(str(folder.path)) for folder in specialists.values()]).outcomes
        save_outcomes(outcomes[outcomes["embedder"] == "specialist"], file)
    return load_outcomes(file)


def _finished(outputs: str) -> list[RunFolder]:
    """The finished runs that say how each query was answered, the last one first."""
    return [folder for folder in finished_runs(outputs) if (folder.path / "outcomes.csv.gz").exists()]


def _tested(folder: RunFolder, embedder: str) -> bool:
    """Whether a run of this version has tested an embedder and kept its neighbours."""
    try:
        there = embedder in set(folder.evaluation()["embedder"]) and _recipe(folder) is not None
    except (OSError, KeyError, ValueError):  # no evaluation, or a damaged one
        return False
    return there and (folder.path / "neighbours.npz").exists()


def _recipe(folder: RunFolder) -> str | None:
    """The recipe of a run; None where its parameters are of another version."""
    try:
        return folder.params.recipe
    except UserError:
        return None


def _of_preset(run: Run, preset: str, outputs: str, names: Sequence[str]) -> list[RunFolder]:
    """The finished runs of a preset with the run's data and seed, one for each domain at most."""
    home, p = runs_folder(outputs), run.params
    values = {"seed": p.seed, "data": p.data, "images": p.images}
    try:
        settings = [presets.load(preset, domains=[domain], **values) for domain in run.catalog.names]
    except UserError as error:
        raise UserError(
            f"parameter 'specialists': found {preset!r}, but no finished run in {home} is called so "
            f"({nearest(preset, names[:20])}), nor is it a preset of specialists: {error}"
        ) from None
    folders = [RunFolder(home / setting.run_name) for setting in settings]
    return [folder for folder in folders if folder.status == "finished"]


def _outcomes(folder: RunFolder) -> pd.DataFrame:
    return load_outcomes(folder.path / "outcomes.csv.gz")


def _queries(folder: RunFolder) -> dict[str, frozenset[str]]:
    """The test queries of each domain of a run."""
    outcomes = _outcomes(folder)
    return {domain: frozenset(part["path"]) for domain, part in outcomes.groupby("domain", sort=False)}
