"""Specialists put together: an oracle knows each query's domain, and its specialist answers.

| embedder | embeds a query | embeds the index |
|---|---|---|
| `specialist` | the specialist of its domain | that specialist too, all domains: like a teacher |
| `routed` | the specialist of its domain | the specialist of each image's own domain |

Both search the merged index. Not a universal embedding, but the anchor that one is measured against: as many models as
domains, and an oracle. Source: UnED (ICCV 2023) sec. 5, "specialist + oracle".
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from udonlib import presets
from udonlib.data.catalog import load_catalog
from udonlib.data.images import ImageReader
from udonlib.errors import UserError, nearest
from udonlib.evaluation.evaluate import Evaluation, evaluate, loading
from udonlib.evaluation.files import load_outcomes, save_outcomes
from udonlib.files import results_folder, runs_folder
from udonlib.models.embedding_model import EmbeddingModel
from udonlib.models.processors import dtype_of, pick_device
from udonlib.params import WITHOUT_EFFECT
from udonlib.runs.find import ANSWERED, runs_for
from udonlib.runs.folder import RunFolder
from udonlib.runs.run import Run, load_run

# What specialists must share: the images they see, where those come from, and the size of their embedding.
SHARED = ("data", "images", "image_size", "precision", "on_bad_image", "k", "student_dim")
# What a run and specialists that stand beside it unasked were given alike.
ALIKE = ("backbone", "backbone_args", "pretrained", "weights", "image_size", "imbalance_between", "imbalance_within")


def evaluate_assembly(
    specialists: Sequence[Run],
    subset: Literal["val", "test"] = "test",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate finished runs of one domain each on all their domains together.

    Args:
        specialists: one run for each domain, in any order.
        progress: called with (images done, images in all).

    Raises:
        UserError: a run that is not finished or trained on several domains, two of one domain, none at all, or runs
            that see different images.
    """
    runs = _of_each_domain(specialists)
    params = next(iter(runs.values())).params
    catalog = load_catalog(params.data, list(runs), params.images)
    device = pick_device(params.device)
    models = {domain: runs[domain].load_model().to(device) for domain in catalog.names}

    def embed(model: EmbeddingModel, images: Tensor) -> Tensor:
        return model.embed(images.to(device), dtype_of(params.precision, device))

    def embed_by_all(images: Tensor) -> Tensor:
        return torch.cat([embed(model, images) for model in models.values()], dim=1)

    def part(number: int, embeddings: Tensor) -> Tensor:
        return embeddings.unflatten(1, (len(models), -1))[:, number]

    reader = ImageReader(catalog, params.image_size, "eval", params.on_bad_image, params.cache_images)
    return evaluate(
        catalog,
        subset,
        loading(reader, params.n_workers),
        embed_by_all,
        {"specialist": {domain: partial(part, number) for number, domain in enumerate(catalog.names)}},
        {"routed": {domain: partial(embed, model) for domain, model in models.items()}},
        k=params.k,
        batch_size=params.eval_batch_size,
        progress=progress,
    )


def _of_each_domain(specialists: Sequence[Run]) -> Mapping[str, Run]:
    """Check that the runs can stand side by side."""
    if not specialists:
        raise UserError("an assembly needs at least one finished run of one domain; found none")
    runs: dict[str, Run] = {}
    first = specialists[0].params.model_dump(include=set(SHARED))
    for run in specialists:
        if run.status != "finished":
            raise UserError(f"run {run.path.name!r} is {run.status}; an assembly needs finished runs: train it first")
        if len(run.catalog.names) != 1:
            raise UserError(
                f"run {run.path.name!r} is trained on {', '.join(run.catalog.names)}; an assembly needs runs of one "
                "domain each"
            )
        [domain] = run.catalog.names
        if domain in runs:
            raise UserError(
                f"runs {runs[domain].path.name!r} and {run.path.name!r} are both of domain '{domain}'; an assembly "
                "needs one run for each domain"
            )
        values = run.params.model_dump(include=set(SHARED))
        differing = [name for name in SHARED if values[name] != first[name]]
        if differing:
            name = differing[0]
            raise UserError(
                f"runs {specialists[0].path.name!r} and {run.path.name!r} differ in {name}: {first[name]!r}, "
                f"{values[name]!r}; an assembly needs runs that share it"
            )
        runs[domain] = run
    return runs


KEPT = "gaps/specialists-{}.csv.gz"  # in the folder of results


def find_specialists(run: Run, which: str = "auto", outputs: str = "auto") -> dict[str, RunFolder]:
    """Find for each domain of `run` a finished run that was trained on this domain alone.

    Of several the one with the run's seed goes first, then the one that finished last. "auto" never mixes settings: its
    runs differ in domain and seed alone.

    Args:
        which: "none"; "auto", runs of recipe `specialist` that were tested on the same queries and given the same
            backbone and data, if each domain has one; a pattern of names such as "specialist-*-s1-*"; or a preset,
            whose runs with the run's seed are meant.

    Returns: a run for each domain, or nothing: the index of some domains would be another than the run's.

    Raises:
        UserError: neither a run nor a preset is called so; domains that have no specialist.
    """
    if which == "none":
        return {}
    finished = list(runs_for(ANSWERED, outputs))
    if which == "auto":  # the setting that finished last and has every domain
        candidates = [folder for folder in finished if folder.params.recipe == "specialist" and _alike(folder, run)]
        settings = dict.fromkeys(map(_setting, candidates))
        groups = [[folder for folder in candidates if _setting(folder) == setting] for setting in settings]
        whole = [by_domain for group in groups if len(by_domain := _by_domain(run, group)) == len(run.catalog.names)]
        return next((_ordered(run, by_domain) for by_domain in whole), {})
    chosen = [folder for folder in finished if fnmatch.fnmatchcase(folder.path.name, which)]
    chosen = chosen or _of_preset(run, which, outputs, [folder.path.name for folder in finished])
    by_domain = _by_domain(run, chosen)
    without = [domain for domain in run.catalog.names if domain not in by_domain]
    if without:
        raise UserError(
            f"parameter 'specialists': {which!r} has no finished run of {', '.join(without)} alone that was tested on "
            f"the queries of run {run.path.name!r}; expected one for each domain, 'auto' or 'none'"
        )
    return _ordered(run, by_domain)


def _by_domain(run: Run, folders: Sequence[RunFolder]) -> dict[str, RunFolder]:
    """The first of the runs of one domain each that was tested on the run's queries; the run's own seed goes first."""
    queries = _queries(run)
    by_domain: dict[str, RunFolder] = {}
    for folder in sorted(folders, key=lambda folder: folder.params.seed != run.params.seed):  # stable
        [domain, *others] = tested = _queries(folder)
        if not others and domain not in by_domain and tested[domain] == queries.get(domain):
            by_domain[domain] = folder
    return by_domain


def _ordered(run: Run, by_domain: Mapping[str, RunFolder]) -> dict[str, RunFolder]:
    return {domain: by_domain[domain] for domain in run.catalog.names}


def _alike(folder: RunFolder, run: Run) -> bool:
    """Whether a specialist was given what the run was given, so that what differs is its domain and its training."""
    return all(getattr(folder.params, name) == getattr(run.params, name) for name in ALIKE)


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
        outcomes = evaluate_assembly([load_run(folder) for folder in specialists.values()]).outcomes
        save_outcomes(outcomes[outcomes["embedder"] == "specialist"], file)
    return load_outcomes(file)


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


def _queries(folder: RunFolder) -> dict[str, frozenset[str]]:
    """The test queries of each domain of a run."""
    by_domain = folder.outcomes().groupby("domain", sort=False)
    return {str(domain): frozenset(part["path"]) for domain, part in by_domain}
