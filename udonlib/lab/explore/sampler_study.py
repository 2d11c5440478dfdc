"""What the sampler's notebook looks at: learning curves of a run or drawn ones, a setting, and recorded allocations."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from udonlib import presets
from udonlib.data.catalog import Catalog, MissingDataError
from udonlib.data.imbalance import open_catalog
from udonlib.errors import UserError, nearest
from udonlib.files import runs_folder, whole_lines
from udonlib.lab.explore.simulation import (
    RULES,
    Fit,
    LearningCurve,
    Setting,
    Simulation,
    compare,
    fit_points,
    guessed,
    simulate_all,
)
from udonlib.params import WITHOUT_EFFECT, TrainParams
from udonlib.presets import SamplerParams
from udonlib.runs.find import Question, find_run, runs_for
from udonlib.runs.folder import METRICS, RunFolder, read_record
from udonlib.training.interventions import Intervention

DRAWN = "miniuned"  # preset whose steps and batches hold where there is no run
SHAPES = {"start_loss": "start", "floor_loss": "floor", "half_images": "half_images"}  # parameter -> of LearningCurve
MAX_RUNS = 6  # overlaid; more lines cannot be told apart

OWN = {"run", "outputs", "seed", "overwrite", "steps", "batch_size", "update_every", "sampler", "sampler_signal"}
OWN |= {"sampler_smoothing", "fixed_shares", "replay"}  # of a run, but not of a preset, or set by the sliders


@dataclass(frozen=True, eq=False)
class Explored:
    """All that the explorer begins with.

    source: the run whose losses the curves were fitted to; None: drawn. points: those losses, see `loss_points`. fits:
        as fitted, before parameters changed them. curves: as they are simulated. check: the dynamic run that the
        simulation is held against, and check_setting, how it was trained. runs: whose allocations are overlaid.
    """

    params: SamplerParams
    source: RunFolder | None
    points: pd.DataFrame
    fits: dict[str, Fit]
    curves: dict[str, LearningCurve]
    setting: Setting
    check: RunFolder | None
    check_setting: Setting | None
    runs: list[RunFolder]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.setting.sizes)

    @cached_property
    def simulations(self) -> list[Simulation]:
        """What each strategy asked for would have done. Raises: UserError, see `simulation.simulate_all`."""
        return simulate_all(self.curves, self.setting, self.params.strategies)


def preset_of(explored: Explored, setting: Setting, strategies: Sequence[str]) -> dict[str, Any]:
    """The parameters of a run with a setting: those of the run that the curves are of, and what was changed.

    Args:
        strategies: as they are chosen.

    Raises:
        UserError: not one strategy is chosen: which one is to be trained?
    """
    if len(strategies) != 1:
        raise UserError(f"found {len(strategies)} strategies chosen, expected one: that which is to be trained")
    values: dict[str, Any] = {"preset": "miniuned"}
    if explored.source is not None:
        kept = explored.source.params.model_dump(mode="json", exclude_defaults=True, exclude=OWN)
        values = {"preset": "paper", **kept}
    values |= {"steps": setting.steps, "batch_size": setting.batch_size, "update_every": setting.update_every}
    [strategy] = strategies
    rule = {"sampler": "dynamic", "sampler_signal": strategy} if strategy in RULES else {"sampler": strategy}
    values |= rule | {"sampler_smoothing": setting.smoothing}
    return values | ({"fixed_shares": dict(setting.shares)} if strategy == "fixed" and setting.shares else {})


def open_sampler(params: SamplerParams) -> Explored:
    """Read runs and data, and fit or draw the curves.

    Raises:
        UserError: no such run, or one that is unfinished or trained nothing; data that is gone; names of domains that
            are not there, with the nearest ones; a check against a run that was not dynamic or had other domains.
    """
    source = _source(params.run, params.outputs)
    trained = source.params if source else presets.load(DRAWN)
    catalog = _catalog(params, trained, source)
    if source:
        points = loss_points(source)
        points = points[points["domain"].isin(catalog.names)].reset_index(drop=True)
        fits = fit_points(points)
        missing = [name for name in catalog.names if name not in fits]
        if missing:
            raise UserError(
                f"run {source.path.name!r} recorded no losses of {', '.join(missing)}; leave them out: domains=..."
            )
        curves = {name: fits[name].curve for name in catalog.names}
    else:
        points, fits = loss_points(None), {}
        curves = {domain.name: guessed(domain.n_classes, len(domain.train_labels)) for domain in catalog.domains}
    curves = _reshaped(curves, params)
    setting = _setting(trained, catalog, params)
    check = _check(params, source)
    check_setting = None
    if check:
        names = _domains(check)
        whole = catalog if list(catalog.names) == names else _catalog(params, check.params, check, tuple(names))
        if set(_domains(check)) - set(curves):
            if params.check != "auto":
                raise UserError(
                    f"parameter 'check': run {check.path.name!r} trained {', '.join(_domains(check))}, but there are "
                    f"curves of {', '.join(curves)} only"
                )
            check = None  # the run's own domains without some of them are another training
        else:
            check_setting = _setting(check.params, whole, None)
    return Explored(params, source, points, fits, curves, setting, check, check_setting, _runs(params, source))


def checked(explored: Explored) -> pd.DataFrame:
    """The allocation of the run to check against, recorded and simulated as it was trained: see `simulation.compare`.

    Empty where there is no such run.
    """
    if explored.check is None or explored.check_setting is None:
        return pd.DataFrame(columns=["step", "domain", "recorded", "simulated", "first"])
    [simulated] = simulate_all(explored.curves, explored.check_setting, ["dynamic"])
    return compare(simulated, recorded_allocation(explored.check))


def loss_points(run: RunFolder | None) -> pd.DataFrame:
    """The losses that steer a run's sampler, as means over images: columns domain, first, last, loss.

    first, last: images of the domain seen before and after. The loss is the teachers' classification, or the student's
    where there are no teachers or the parameter `sampler_loss` says so: as `training.trainer` feeds the sampler.
    """
    rows: list[tuple[str, int, int, float]] = []
    seen: dict[str, int] = {}
    for record in run.records("train") if run else ():
        for domain, terms in record["losses"].items():
            now, before = record["images_seen"][domain], seen.get(domain, 0)
            if now > before and run is not None:
                rows.append((domain, before, now, terms[_term(run, terms)]))
            seen[domain] = now
    return pd.DataFrame(rows, columns=["domain", "first", "last", "loss"])


def steering_loss(run: RunFolder) -> str:
    """Whose classification loss steers a run's sampler: teacher or student."""
    [terms, *_] = [terms for record in run.records("train") for terms in record["losses"].values()] or [{}]
    return _term(run, terms).removeprefix("ce_")


def _term(run: RunFolder, terms: Mapping[str, float]) -> str:
    return "ce_teacher" if "ce_teacher" in terms and run.params.sampler_loss == "teacher" else "ce_student"


def recorded_allocation(run: RunFolder) -> pd.DataFrame:
    """A run's allocation with its effective share: columns step, domain, weight, share.

    share is what the steps were really drawn from, also where a person steered; weight is the sampler's own.
    """
    return run.allocation()[["step", "domain", "weight", "share"]]


def labels(runs: Sequence[RunFolder]) -> list[str]:
    """What to call each run: its name, or where several have the same one, the parts of their paths that differ."""
    paths = [run.path.resolve() for run in runs]
    names = []
    for path in paths:
        alike = [other for other in paths if other.name == path.name]
        names.append(path.name if len(alike) == 1 else str(path.relative_to(os.path.commonpath(alike))))
    return names


def steerings(run: RunFolder) -> list[Intervention]:
    """What a person did to the run's allocation while it trained, in order."""
    return [entry for entry in run.interventions() if entry.steers]


def _not_trained(run: RunFolder) -> str:
    if run.status != "finished":
        return f"is {run.status}"
    trained = run.params.steps and _domains(run)
    return "" if trained else f"(recipe {run.params.recipe!r}) trained nothing: it has no losses"


def _not_shared(run: RunFolder) -> str:
    return _not_trained(run) or ("" if len(_domains(run)) > 1 else f"trained {_domains(run)[0]} alone")


def _not_dynamic(run: RunFolder) -> str:
    if not (lacks := _not_trained(run)) and run.params.sampler_signal == "gap":
        return "has sampler_signal 'gap', which no curve of one loss shows"
    if lacks or run.params.sampler == "dynamic":
        return lacks
    return f"has sampler {run.params.sampler!r}, whose allocation no loss decides"


# Finished runs whose steps were shared among several domains. Of one domain there is nothing to allocate: such a run is
# looked at where it is named, and never the latest.
SHARED = Question("finished run of several domains", "summary.json", _not_shared)
TRAINED = Question("finished run with losses", "summary.json", _not_trained)
# The losses of finished (offline) teachers do not fall: a run that trains its own shows more.
FITTED = dataclasses.replace(
    SHARED,
    rank=lambda run: (run.params.sampler != "dynamic", run.params.offline_teachers is not None),
    advice="train one, or draw the curves: run=drawn",
)
DYNAMIC = Question(
    "finished run with a dynamic sampler", "summary.json", _not_dynamic, rank=lambda run: len(_domains(run)) == 1
)


def _domains(folder: RunFolder) -> list[str]:
    """Domains of a run in the catalog's order; none where nothing was trained."""
    line = next((line for line in whole_lines(folder.path / METRICS) if b'"allocation"' in line), None)
    return list(read_record(line)["weights"]) if line else []


def _source(name: str, outputs: str) -> RunFolder | None:
    """The run that curves are fitted to; "latest": the last one, dynamic ones and new teachers first."""
    if name == "drawn" or (name == "auto" and not any(runs_for(FITTED, outputs))):
        return None
    if name in ("auto", "latest"):
        return find_run("latest", FITTED, outputs)
    return find_run(name, TRAINED, outputs)


def _catalog(
    params: SamplerParams, trained: TrainParams, source: RunFolder | None, domains: str | Sequence[str] | None = None
) -> Catalog:
    """The data that the simulation counts images of."""
    data = trained.data if params.data == "auto" else params.data
    images = params.images or (trained.images if params.data == "auto" else None)
    wanted = domains or (trained.domains if params.domains == "all" else params.domains)
    try:
        return open_catalog(trained.model_copy(update={"data": data, "domains": wanted, "images": images}))
    except MissingDataError as error:
        if source is None or params.data != "auto":
            raise
        raise UserError(
            f"run {source.path.name!r} was trained on {data!r}: {error}; or say where it is: data=..."
        ) from None


def _setting(trained: TrainParams, catalog: Catalog, params: SamplerParams | None) -> Setting:
    """How a run was trained, or where `params` says otherwise, how it is to be simulated."""
    values: dict[str, Any] = {
        "steps": trained.steps,
        "batch_size": trained.batch_size,
        "domains_per_batch": trained.domains_per_batch,
        "update_every": trained.update_every,
        "sampler_smoothing": trained.sampler_smoothing,
        "sampler_init": trained.sampler_init,
        "fixed_shares": trained.fixed_shares,
        "sampler_floor": trained.sampler_floor,
        "sampler_alpha": trained.sampler_alpha,
        "seed": trained.seed,
    }
    if params is not None:
        _known("fixed_shares", params.fixed_shares, catalog.names)
        given = {name: getattr(params, name) for name in values}
        values |= {name: value for name, value in given.items() if value is not None and value != {}}
        if params.domains_per_batch is None and values["batch_size"] % values["domains_per_batch"]:
            values["domains_per_batch"] = 1
    names = {"sampler_smoothing": "smoothing", "sampler_init": "initial", "fixed_shares": "shares"}
    names |= {"sampler_floor": "floor", "sampler_alpha": "alpha"}
    sizes = {domain.name: len(domain.train_labels) for domain in catalog.domains}
    shares = values["fixed_shares"]
    if params is None or not params.fixed_shares:  # the run's own, if they name these domains
        values["fixed_shares"] = shares if set(sizes) <= set(shares) else {}
    # A gap is not known from the losses of one of the two: the paper's rule stands in for it.
    signal = "loss" if trained.sampler_signal == "gap" else trained.sampler_signal
    settled = {names.get(name, name): value for name, value in values.items()}
    order = trained.sampler_order
    return Setting(sizes, signal=signal, order=order, n_classes=catalog.n_classes, **settled)


def _reshaped(curves: dict[str, LearningCurve], params: SamplerParams) -> dict[str, LearningCurve]:
    """The curves with the values that parameters set for single domains."""
    for parameter in SHAPES:
        _known(parameter, getattr(params, parameter), tuple(curves))
    changed = {}
    for domain, curve in curves.items():
        values = {name: getattr(params, p)[domain] for p, name in SHAPES.items() if domain in getattr(params, p)}
        if "start" in values and "floor" not in values:
            values["floor"] = min(curve.floor, values["start"])
        try:
            changed[domain] = dataclasses.replace(curve, **values)
        except UserError as error:
            parameter = "floor_loss" if domain in params.floor_loss else "start_loss"
            raise UserError(f"parameter '{parameter}', domain '{domain}': {error}") from None
    return changed


def _known(parameter: str, given: Mapping[str, float], names: Sequence[str]) -> None:
    unknown = next((name for name in given if name not in names), None)
    if unknown is not None:
        raise UserError(f"parameter '{parameter}': there is no domain '{unknown}'; {nearest(unknown, names)}")


def _check(params: SamplerParams, source: RunFolder | None) -> RunFolder | None:
    """The dynamic run to hold the simulation against: there may be none."""
    if params.check == "auto":
        changed = any(getattr(params, name) for name in SHAPES)  # what-if curves are not the run's
        return source if source and not _not_dynamic(source) and not changed else None
    return find_run(params.check, DYNAMIC, params.outputs, "check")


def _runs(params: SamplerParams, source: RunFolder | None) -> list[RunFolder]:
    """The runs whose allocations are overlaid, in the order asked for, each once; at most MAX_RUNS."""
    usable = list(runs_for(SHARED, params.outputs))
    by_path: dict[Path, RunFolder] = {}
    for name in params.runs:
        if name == "auto":
            chosen = [source, *_other_seeds(source, usable)] if source else []
        elif any(sign in name for sign in "*?["):
            chosen = sorted(
                (run for run in usable if fnmatch.fnmatchcase(run.path.name, name)), key=lambda run: run.path.name
            )
        else:
            chosen = [find_run(name, SHARED if name == "latest" else TRAINED, params.outputs, "runs")]
        if not chosen and name != "auto":
            names = [run.path.name for run in usable]
            raise UserError(
                f"parameter 'runs': no finished run of several domains in {runs_folder(params.outputs)} is called "
                f"{name!r}; {nearest(name, names[:20]) if names else 'there are none yet'}"
            )
        by_path |= {run.path.resolve(): run for run in chosen}
    return list(by_path.values())[:MAX_RUNS]


def _other_seeds(source: RunFolder, usable: Sequence[RunFolder]) -> list[RunFolder]:
    """Runs that differ from `source` in their seed alone, by seed."""

    def setting(run: RunFolder) -> str:
        return run.params.model_dump_json(exclude=WITHOUT_EFFECT)

    same = [run for run in usable if run.path != source.path and setting(run) == setting(source)]
    return sorted(same, key=lambda run: run.params.seed)
