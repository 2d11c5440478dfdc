"""Begin a run with the weights of another one, so that domains and classes are added to what is known already.

    make train ARGS='-p start RUN -p data [miniuned,my/folder]'

Backbone and student head are those of the other run's best model; so are the teacher heads of the domains that both
have and the prototypes of the classes that both have, by the names of domain and class. All others are new, as in a run
of its own. What is trained on is the data of the new run alone: domains of before that stand in it are replayed, those
that do not are left out of the model, and what they lose is not measured.

A new domain has steps to make up for, and the dynamic sampler does not know: a fixed share (`fixed_shares`) gives it
them (RESULTS.md).

On the test queries the other run's student is measured beside the new one, in the same index: embedder "start".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from udonlib.data.catalog import Catalog, Domain
from udonlib.errors import ParameterError, UserError
from udonlib.evaluation.intervals import paired_difference
from udonlib.files import run_path
from udonlib.models.embedding_model import EmbeddingModel
from udonlib.models.heads import ByDomain
from udonlib.params import TrainParams
from udonlib.runs.find import KEPT
from udonlib.runs.folder import RunFolder

EMBEDDER = "start"  # the other run's student, in tables


def find_start(params: TrainParams) -> RunFolder:
    """The run that another one of these parameters begins with.

    Raises:
        ParameterError: no run of that name, with the nearest; one that has kept no model yet; another backbone, heads
            of other sizes; the run itself.
    """
    folder = RunFolder(run_path(str(params.start), params.outputs, "start"))
    name = f"run {folder.path.name!r}"
    if folder.path.resolve() == params.run_dir.resolve():
        raise ParameterError({"start": f"{name} cannot begin with itself: give this one another name (run=...)"})
    if lacks := KEPT.lacks(folder):
        raise ParameterError({"start": f"{name} {lacks}"})
    there, here = (_shape(p, folder.params.has_teachers and params.has_teachers) for p in (folder.params, params))
    if not folder.params.has_head:
        raise ParameterError({"start": f"{name} (recipe {folder.params.recipe!r}) has no student head to go on with"})
    differing = [f"{key}: {there[key]!r} there, {value!r} here" for key, value in here.items() if there[key] != value]
    if differing:
        raise ParameterError({"start": f"{name} is of another shape: {'; '.join(differing)}"})
    return folder


def _shape(p: TrainParams, taught: bool) -> dict[str, Any]:
    """Parameters that make a model's tensors what they are."""
    shape = {"backbone": p.backbone, "backbone_args": p.backbone_args, "student_dim": p.student_dim}
    shape |= {"head_hidden_dims": p.head_hidden_dims, "normalise_features": p.normalise_features}
    if taught:
        hidden = p.head_hidden_dims if p.teacher_hidden_dims is None else p.teacher_hidden_dims
        shape |= {"teacher_dim": p.teacher_dim, "teacher_hidden_dims": hidden}
    return shape


@dataclass(frozen=True)
class Begun:
    """What came from the other run: its domains that are replayed, those that are new, those left out, and classes."""

    run: str
    known: tuple[str, ...]
    new: tuple[str, ...]
    left_out: tuple[str, ...]
    n_classes_known: int
    n_classes: int

    def __str__(self) -> str:
        new = f"new: {', '.join(self.new)}" if self.new else "no domain is new"
        left = f"; not replayed, and what they lose not measured: {', '.join(self.left_out)}" * bool(self.left_out)
        classes = f"{self.n_classes_known:,} of {self.n_classes:,} classes known"
        return f"begins with run {self.run!r}: {classes}; {new}{left}"


def begin_with(model: EmbeddingModel, start: RunFolder, before: EmbeddingModel, there: Catalog, here: Catalog) -> Begun:
    """Fill a new model with what another run knows.

    Args:
        model: before its first step.
        before: the other run's best model. there: the catalog that it was trained on.
        here: the catalog of the new run.

    Raises:
        UserError: tensors of other shapes, such as positions for images of another size; data with other classes than
            the model was trained on.
    """
    known = tuple(name for name in here.names if name in there.names)
    state, new = before.state_dict(), model.state_dict()
    for domain in there.domains:
        n_rows = len(before.student_prototypes[domain.name])
        if n_rows != domain.n_classes:
            found = f"domain '{domain.name}' has {domain.n_classes} training classes, its model {n_rows}"
            raise UserError(f"parameter 'start': {found}: the data at {start.params.data!r} has changed since it began")
    taken = {key: value for key, value in state.items() if key.startswith(("backbone.", "student."))}
    n_known = 0
    for name in known:
        key = ByDomain.key(name)
        taken |= {k: v for k, v in state.items() if k.startswith(f"teachers.{key}.") and k in new}
        rows_there, rows_here = _rows(there[name], here[name])
        n_known += len(rows_here)
        for kind in ("student_prototypes", "teacher_prototypes"):
            if f"{kind}.{key}" in state and f"{kind}.{key}" in new:
                taken[f"{kind}.{key}"] = _mixed(new[f"{kind}.{key}"], state[f"{kind}.{key}"], rows_here, rows_there)
    for key, value in taken.items():
        if key not in new or new[key].shape != value.shape:
            expected = list(new[key].shape) if key in new else "none of this name"
            raise UserError(
                f"parameter 'start': run {start.path.name!r} has '{key}' of shape {list(value.shape)}, expected "
                f"{expected}: its image_size is {start.params.image_size}"
            )
    model.load_state_dict({**new, **taken})
    model.backbone.mean, model.backbone.std = before.backbone.mean, before.backbone.std
    added = tuple(name for name in here.names if name not in known)
    left_out = tuple(name for name in there.names if name not in known)
    return Begun(start.path.name, known, added, left_out, n_known, sum(here.n_classes.values()))


def _rows(there: Domain, here: Domain) -> tuple[list[int], list[int]]:
    """Return the rows of the prototypes of the classes that both have, there and here, by name."""
    rows = {name: row for row, name in enumerate(_class_names(there))}
    both = [(rows[name], row) for row, name in enumerate(_class_names(here)) if name in rows]
    return [row for row, _ in both], [row for _, row in both]


def _class_names(domain: Domain) -> list[str]:
    names = domain.splits["train"].class_names
    return [names.get(label, str(label)) for label in domain.train_classes.tolist()]


def _mixed(new: Tensor, old: Tensor, rows: list[int], rows_before: list[int]) -> Tensor:
    mixed = new.clone()
    mixed[torch.tensor(rows, dtype=torch.long)] = old[torch.tensor(rows_before, dtype=torch.long)]
    return mixed


def since_start(outcomes: pd.DataFrame, known: Sequence[str], metric: str = "r_at_1") -> pd.DataFrame:
    """Compare the student of a run with that of the run that it began with: same queries, same merged index.

    Args:
        outcomes: of the run's test, of both embedders.
        known: the domains that were known before.

    Returns: a row for each domain, then "mean", of those that were known before: domain, known, n_queries, before,
        after, difference, low, high; the last five in percent, the interval of 95% over queries, paired.
    """
    rows = outcomes[outcomes["index"] == "merged"].assign(seed=0)
    after, before = (rows[rows["embedder"] == name] for name in ("student", EMBEDDER))
    old = [part[part["domain"].isin(known)] for part in (after, before)]
    found = paired_difference(after, before, metric)
    found = found[found["domain"] != "mean"]
    if known:
        of_known = paired_difference(old[0], old[1], metric)
        found = pd.concat([found, of_known[of_known["domain"] == "mean"]], ignore_index=True)
    table = found.rename(columns={"mean": "difference"})[["domain", "difference", "low", "high"]]
    table.insert(1, "known", table["domain"].isin([*known, "mean"]))
    for place, (name, part, of_old) in enumerate((("before", before, old[1]), ("after", after, old[0])), start=2):
        values = part.groupby("domain")[metric].mean()
        values["mean"] = values[list(known)].mean()
        table.insert(place, name, 100 * values.reindex(table["domain"]).to_numpy())
        counts = part["domain"].value_counts()
        counts["mean"] = len(of_old)
    table.insert(2, "n_queries", counts.reindex(table["domain"]).to_numpy())
    return table
