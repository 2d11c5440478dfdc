"""Evaluate any run, checkpoint or descriptors on any catalog, into a folder of its own.

    evaluation = open_evaluation(params)
    evaluation.measure()
    evaluation.table

    outputs/evaluations/<name>/
        params.yaml          every parameter
        provenance.json      what was evaluated, code, versions, machine and data
        evaluation.csv, evaluation.json, outcomes.csv.gz, neighbours.npz    as of a run
        descriptors.npz      the student's embedding of every image, where wanted: see `evaluation.descriptors`
        summary.json         written last: what the results belong to

A finished evaluation of the same file, data and parameters is shown again, not made again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor

from udonlib.data.catalog import Catalog, load_catalog
from udonlib.data.images import ImageReader
from udonlib.data.imbalance import open_catalog
from udonlib.errors import UserError, nearest
from udonlib.evaluation import files
from udonlib.evaluation.descriptors import read_descriptors, save_descriptors
from udonlib.evaluation.evaluate import Evaluation, Head, Neighbours, evaluate
from udonlib.evaluation.files import NEIGHBOURS, OUTCOMES, load_neighbours, load_outcomes, load_table, save_evaluation
from udonlib.evaluation.frequency import MAX_LOOKED_AT, by_group, frequencies
from udonlib.evaluation.intervals import bootstrap_interval
from udonlib.evaluation.reading import Load, in_batches, loading
from udonlib.files import replacing_together, results_folder, take_lock, write_json, write_text
from udonlib.models.embedding_model import EmbeddingModel
from udonlib.models.processors import dtype_of, pick_device
from udonlib.models.reference import import_checkpoint
from udonlib.params import WITHOUT_EFFECT, TrainParams
from udonlib.presets import EvaluateParams
from udonlib.runs.checkpoints import OTHERS, load_model
from udonlib.runs.find import KEPT, find_run
from udonlib.runs.folder import RunFolder
from udonlib.runs.writer import provenance
from udonlib.training.threads import use_threads

Progress = Callable[[str, int, int], None]  # what is done ("embedding", ...), how much of it, of how much
DESCRIPTORS = "descriptors"  # the embedder's name in tables
# What an evaluation writes: the parameters say that the others are an evaluation's, the summary whose they are.
FILES = ("params.yaml", "provenance.json", *files.FILES, "descriptors.npz", "summary.json")


@dataclass(frozen=True)
class Source:
    """What is evaluated: its file, and the parameters of the run that made it, if a run did."""

    kind: str  # run, checkpoint or descriptors
    name: str
    file: Path
    trained: TrainParams | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file and of the parameters that make a model of it."""
        with self.file.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        config = self.file.with_name("config.json")  # names the domains of a checkpoint of the reference
        if self.kind == "checkpoint" and self.trained is None and config.is_file():
            digest.update(config.read_bytes())
        if self.trained is not None:
            values = self.trained.model_dump(mode="json", exclude=WITHOUT_EFFECT, exclude_defaults=True)
            digest.update(json.dumps(values, sort_keys=True).encode())
        return digest.hexdigest()

    def load_model(self) -> EmbeddingModel:
        """The model, in evaluation mode, on the CPU. The data that it was trained on is not needed.

        Raises:
            UserError: a file that is no checkpoint, or of another model than its run's parameters say.
        """
        if self.trained is None:
            return import_checkpoint(self.file).eval()
        return load_model(self.file, self.trained)

    def image_size(self, model: EmbeddingModel) -> int:
        """Side of the images that the model sees, in pixels."""
        if self.trained is not None:
            return self.trained.image_size
        width, _ = model.backbone.encoder.patch_embed.img_size  # type: ignore[union-attr, misc]
        return int(width)  # the reference has vision transformers only


def find_source(params: EvaluateParams) -> Source:
    """Find what is to be evaluated.

    Raises:
        UserError: nothing there, with the nearest name; a run without a checkpoint; a .pt without its params.yaml.
    """
    if params.run is not None:
        folder = find_run(params.run, KEPT, params.outputs)
        return Source("run", folder.path.name, folder.best, folder.params)
    kind = "descriptors" if params.checkpoint is None else "checkpoint"
    path = Path(params.checkpoint or params.descriptors or "").expanduser()
    if kind == "checkpoint" and (path / "checkpoint_-1").is_file():  # the reference's name of its best model
        path = path / "checkpoint_-1"
    if not path.is_file():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"parameter '{kind}': no file '{path}'; {nearest(path.name, beside[:20])}")
    with path.open("rb") as file:
        head = file.read(9)
    if kind == "checkpoint" and head[8:] == b"{":
        raise UserError(f"{path}: an encoder's weights, expected a checkpoint of a run or of the reference. {OTHERS}")
    if kind == "descriptors" or (path.suffix != ".pt" and not head.startswith((b"PK", b"\x80\x02"))):
        return Source(kind, path.stem if path.suffix else f"{path.absolute().parent.name}-{path.name}", path)
    for folder in (RunFolder(path.absolute().parent), RunFolder(path.absolute().parent.parent)):
        if (folder.path / "params.yaml").exists():
            return Source(kind, f"{folder.path.name}-{path.stem}", path, folder.params)
    raise UserError(
        f"{path}: no params.yaml beside it or above: put that of its run there, it says how to build the model. "
        f"{OTHERS}"
    )


def find_catalog(params: EvaluateParams, source: Source) -> Catalog:
    """The catalog to evaluate on: the data given, or what the run was trained for, or miniuned."""
    data, domains, images, trained = params.data, params.domains, params.images, source.trained
    if data == "auto" and trained is None:
        data = "miniuned"
    elif data == "auto" and trained is not None:
        data, images = trained.data, images or trained.images
        domains = trained.domains if domains == "all" else domains
    return load_catalog(data, domains, images, (params.subset,), params.all_as_test)


class SavedEvaluation:
    """One evaluation and its folder. Opening it writes nothing.

    Raises:
        UserError: a folder of the wanted name that holds another evaluation, unless it may be overwritten.
    """

    def __init__(self, params: EvaluateParams) -> None:
        self.params = params
        self.source = find_source(params)
        self.catalog = find_catalog(params, self.source)
        trained = self.source.trained
        self.precision = "float32" if trained is None else trained.precision
        if params.precision != "auto":
            self.precision = params.precision
        self.embedder = DESCRIPTORS if self.source.kind == "descriptors" else "student"
        stem = re.sub(r"[^A-Za-z0-9._+-]+", "_", f"{self.source.name}-on-{self.catalog.name}-{params.subset}")
        name = f"{stem}-{self.fingerprint[:6]}" if params.name == "auto" else params.name
        self.path = results_folder(params.outputs) / "evaluations" / name
        self._made = False
        self._refuse_others()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that the results depend on: the file, the data and the parameters that matter."""
        p = self.params
        values = [self.source.digest, self.catalog.fingerprint, self.catalog.names, p.subset, p.k, p.seed, *p.metrics]
        values += [self.precision, p.on_bad_image] if self.source.kind != "descriptors" else []
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    @property
    def _summary(self) -> dict[str, Any]:
        """What the results there belong to; {} where there are none, and where they are to be made anew."""
        file = self.path / "summary.json"
        if self.params.overwrite and not self._made:
            return {}
        try:
            summary = json.loads(file.read_bytes())
            _ = str(summary["fingerprint"]), str(summary["of"]), list(summary["skipped_images"])
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{file}: not the summary of an evaluation ({error!r:.80}); give another name (name=...), or replace "
                "it (overwrite=true)"
            ) from None
        return dict(summary)

    def _refuse_others(self) -> None:
        """Refuse to replace what is not this evaluation's, unless it may be."""
        summary, name = self._summary, self.path.name
        if summary.get("fingerprint", self.fingerprint) != self.fingerprint:
            raise UserError(
                f"evaluation {name!r} exists and is of another model, data or parameters: {summary['of']}. "
                "Give this one another name (name=...), or replace that one (overwrite=true)"
            )
        there = [file for file in FILES if (self.path / file).exists()]
        if there and not (self.path / "params.yaml").exists() and not self.params.overwrite:
            raise UserError(
                f"{self.path / there[0]}: is there already, and not of an evaluation: give this one another name "
                "(name=...), or replace it (overwrite=true)"
            )

    @property
    def is_finished(self) -> bool:
        """Whether the results are there."""
        return self._summary.get("fingerprint") == self.fingerprint

    def measure(self, progress: Progress | None = None) -> pd.DataFrame:
        """Evaluate and write everything, unless it has been; returns the table.

        Args:
            progress: called with what is done ("reading", "embedding", "exporting"), how much of it, of how much.

        Raises:
            UserError: whatever is wrong with the model's or descriptors' file, or an image that cannot be read.
        """
        use_threads(self.params.n_threads)
        report = progress or (lambda what, done, total: None)
        if not self.is_finished:
            found = self._of_descriptors(report) if self.embedder == DESCRIPTORS else self._of_model(report)
            self._save(replace(found, outcomes=self._with_groups(found.outcomes, report)))
            self._made = True
        exported = self.path / "descriptors.npz"
        if self.params.save_descriptors and not exported.exists():
            save_descriptors(exported, self._embeddings(report))
        return self.table

    def _of_descriptors(self, report: Progress) -> Evaluation:
        p, device = self.params, pick_device(self.params.device)
        others: Literal["error", "skip"] = "error" if p.domains == "all" else "skip"
        read = read_descriptors(self.source.file, self.catalog, p.subset, others, partial(report, "reading"))
        embedders = {DESCRIPTORS: lambda vectors: vectors.to(device)}
        searched = partial(report, "searching")
        many: dict[str, Any] = {"k": p.k, "metrics": p.metrics, "batch_size": 2**14, "progress": searched}
        return evaluate(self.catalog, p.subset, read.load, image_embedders=embedders, **many)

    def _with_groups(self, outcomes: pd.DataFrame, report: Progress) -> pd.DataFrame:
        """Add how much like each query the run learned from, as `evaluation.frequency` says, where a run did."""
        trained, p = self.source.trained, self.params
        if trained is None or p.data != "auto":
            return outcomes
        whole = open_catalog(trained.model_copy(update={"images": p.images or trained.images}))
        if (n_images := sum(len(domain.train_labels) for domain in whole.domains)) > MAX_LOOKED_AT:
            return outcomes
        report("comparing", 0, n_images)
        known = frequencies(whole, p.subset)
        report("comparing", n_images, n_images)
        return outcomes.merge(known, on=["domain", "path"], how="left", sort=False).fillna({"group": "", "size": ""})

    @cached_property
    def _model(self) -> EmbeddingModel:
        model = self.source.load_model().to(pick_device(self.params.device))
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @cached_property
    def _reader(self) -> ImageReader:
        size = self.source.image_size(self._model)
        return ImageReader(self.catalog, size, "eval", self.params.on_bad_image, self.params.cache_images)

    @cached_property
    def _load(self) -> Load:
        return loading(self._reader, self.params.n_workers)

    def _features(self, images: Tensor) -> Tensor:
        device = pick_device(self.params.device)
        return self._model.features(images.to(device), dtype_of(self.precision, device))

    def _of_model(self, report: Progress) -> Evaluation:
        """Evaluate the student, its shorter embeddings, and the teachers of those domains that have one."""
        p, model, trained = self.params, self._model, self.source.trained
        heads: dict[str, Head | Mapping[str, Head | None]] = {"student": model.student}
        teachers: dict[str, Head] = dict(model.teachers.items())
        if set(teachers) & set(self.catalog.names):
            heads["teacher"] = {name: teachers.get(name) for name in self.catalog.names}
        for dim in trained.nested_dims if trained is not None else ():
            heads[f"student_{dim}"] = partial(model.short_embedding, dim)
        return evaluate(
            self.catalog,
            p.subset,
            self._load,
            self._features,
            heads,
            k=p.k,
            metrics=p.metrics,
            batch_size=p.eval_batch_size,
            progress=partial(report, "embedding"),
        )

    def _embeddings(self, report: Progress) -> Iterator[tuple[str, str, Tensor]]:
        """Yield domain, split and the student's embedding of every image of it."""
        size, done = self.params.eval_batch_size, 0
        total = sum(sum(domain.sizes.values()) for domain in self.catalog.domains)
        for domain in self.catalog.domains:
            for name, split in domain.splits.items():
                made = []
                for batch, read, images in in_batches(self._load, domain.name, name, list(range(len(split))), size):
                    if len(read) < len(batch):
                        lost = split.paths[min(set(batch).difference(read))]
                        raise UserError(f"{domain.name}/{name}: '{lost}' cannot be read: descriptors need every image")
                    with torch.no_grad():
                        made.append(self._model.student(self._features(images)).cpu())
                    done += len(batch)
                    report("exporting", done, total)
                yield domain.name, name, torch.cat(made)

    def _save(self, evaluation: Evaluation) -> None:
        """Put the results in place as a whole, one process at a time; what was there stays until they are written."""
        p = self.params
        of = {"kind": self.source.kind, "file": str(self.source.file.absolute()), "sha256": self.source.digest}
        note = provenance(self.catalog, pick_device(p.device)) | {"of": of, "data_root": str(self.catalog.root)}
        summary = {"of": f"{self.source.kind} {self.source.name} on {self.catalog.name} ({p.subset})"}
        summary |= {"fingerprint": self.fingerprint, "skipped_images": evaluation.skipped.to_dict("records")}
        with take_lock(self.path / "lock"):
            self._refuse_others()  # who had the lock may have written something else
            with replacing_together(self.path, FILES) as folder:
                write_text(folder / "params.yaml", yaml.safe_dump(p.model_dump(mode="json"), sort_keys=False))
                save_evaluation(evaluation, folder, p.seed)
                write_json(folder / "provenance.json", note)
                write_json(folder / "summary.json", summary)

    @property
    def table(self) -> pd.DataFrame:
        """The results: `evaluation.evaluate.Evaluation.table` with intervals.

        Raises:
            UserError: their files are missing or damaged.
        """
        try:
            return load_table(self.path)
        except UserError as error:
            raise UserError(f"{error}; evaluate again (overwrite=true)") from None

    @property
    def n_skipped(self) -> int:
        """Images that could not be read and took no part."""
        return len(self._summary["skipped_images"])

    def by_group(self) -> pd.DataFrame | None:
        """R@1 of groups of queries: `frequency.by_group`; None where no training images are known to compare with."""
        outcomes = self.outcomes()
        return by_group(outcomes) if "group" in outcomes else None

    def outcomes(self) -> pd.DataFrame:
        """How each query was answered. Raises: UserError where the file is missing or damaged."""
        return load_outcomes(self.path / OUTCOMES)

    def neighbours(self) -> list[Neighbours]:
        """Neighbours of all queries in the merged index."""
        return load_neighbours(self.path / NEIGHBOURS, self.catalog, self.params.subset)

    def lost_by_merging(self) -> pd.DataFrame:
        """See `lost_by_merging`, of R@1."""
        return lost_by_merging(self.outcomes(), seed=self.params.seed)


def lost_by_merging(outcomes: pd.DataFrame, metric: str = "r_at_1", seed: int = 0) -> pd.DataFrame:
    """Say how many points a metric loses where a query searches all domains' images, not its own domain's alone.

    A neighbour of another domain is never relevant, so that no query gains. The intervals are over queries, each
    compared with itself.

    Args:
        outcomes: of an `Evaluation`.

    Returns:
        Columns embedder, domain, lost, low, high in percent points; a row for each domain, then their mean.
    """
    wide = outcomes.pivot_table(index=["embedder", "domain", "path"], columns="index", values=metric, sort=False)
    lost = 100 * (wide["separate"] - wide["merged"])
    n_domains = outcomes["domain"].nunique()
    tables = []
    for embedder, values in lost.groupby("embedder", sort=False):
        by_domain = {name: part.to_numpy(float)[None] for name, part in values.groupby("domain", sort=False)}
        table = bootstrap_interval(by_domain, np.random.default_rng(seed)).rename(columns={"mean": "lost"})
        whole = len(by_domain) == n_domains
        tables.append(table[whole | (table["domain"] != "mean")].assign(embedder=embedder))
    return pd.concat(tables, ignore_index=True)[["embedder", "domain", "lost", "low", "high"]]


def open_evaluation(params: EvaluateParams) -> SavedEvaluation:
    """The evaluation of these parameters, finished or not; its model or descriptors and its data are looked up."""
    return SavedEvaluation(params)
