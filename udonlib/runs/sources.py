"""What can be evaluated: a run, a checkpoint of ours or of the reference, or descriptors; and on which catalog."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from udonlib.data.catalog import Catalog, load_catalog
from udonlib.errors import UserError, nearest
from udonlib.models.embedding_model import EmbeddingModel, create_model
from udonlib.models.files.torch_files import read_torch
from udonlib.models.heads import ByDomain
from udonlib.models.reference import import_checkpoint
from udonlib.params import WITHOUT_EFFECT, TrainParams
from udonlib.presets import EvaluateParams
from udonlib.runs.find import KEPT, find_run
from udonlib.runs.folder import RunFolder

# How to evaluate what is no checkpoint of ours.
OTHERS = "To evaluate another encoder, run train.ipynb: recipe=features, backbone=NAME, pretrained=False, weights=FILE"


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
        state, statistics = _read_run_checkpoint(self.file)
        prefix = "student_prototypes."
        n_classes = {
            ByDomain.domain(name.removeprefix(prefix)): len(value)
            for name, value in state.items()
            if name.startswith(prefix)
        }
        model = create_model(self.trained.model_copy(update={"pretrained": False, "weights": None}), n_classes)
        wanted = model.state_dict()
        shapes = {
            name: [list(there[name].shape) if name in there else None for there in (state, wanted)]
            for name in wanted | state
        }
        differing = {name: both for name, both in shapes.items() if both[0] != both[1]}
        if differing:
            name, (found, expected) = next(iter(differing.items()))
            what = "is missing" if found is None else f"has shape {found}, expected {expected or 'none of this name'}"
            n = f"{len(differing)} of {len(shapes)} tensors differ, the first of them:"
            raise UserError(f"{self.file}: another model than its params.yaml says: {n} '{name}' {what}")
        model.load_state_dict(state)
        if statistics is not None:
            model.backbone.mean, model.backbone.std = statistics
        return model.eval()

    def image_size(self, model: EmbeddingModel) -> int:
        """Side of the images that the model sees, in pixels."""
        if self.trained is not None:
            return self.trained.image_size
        width, _ = model.backbone.encoder.patch_embed.img_size  # type: ignore[union-attr, misc]
        return int(width)  # the reference has vision transformers only


def _read_run_checkpoint(file: Path) -> tuple[dict[str, Tensor], list[tuple[float, ...]] | None]:
    """Return the weights of a checkpoint of ours that are validated, and its images' mean and deviation.

    Its form is checked as a whole, before anything is made of it: the file may be of any other program.
    """
    saved = read_torch(file)
    state = saved.get("model" if saved.get("average") is None else "average") if isinstance(saved, dict) else None
    problem = None
    if not isinstance(state, dict) or not state:
        there = ", ".join(f"'{key}'" for key in list(saved)[:4]) if isinstance(saved, dict) else type(saved).__name__
        problem = f"found {there or 'nothing'}, expected the weights under 'model'"
    else:
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                problem = (
                    f"under 'model' stands {name!r:.60}, which is {type(value).__name__}, expected tensors by name"
                )
            elif name.startswith("student_prototypes.") and value.ndim != 2:
                problem = f"'{name}' has shape {list(value.shape)}, expected a row for each class"
            elif value.is_complex() or not value.isfinite().all():
                problem = f"'{name}' holds values that are no finite numbers"
    statistics = saved.get("statistics") if isinstance(saved, dict) else None
    if problem is None and statistics is not None:
        try:
            statistics = [tuple(float(number) for number in numbers) for numbers in statistics]
            if [len(numbers) for numbers in statistics] != [3, 3] or not np.isfinite(statistics).all():
                raise ValueError
        except (TypeError, ValueError):
            problem = "'statistics' is not a mean and a deviation of three channels"
    if problem is not None:
        raise UserError(f"{file}: not a checkpoint of a run: {problem}. {OTHERS}")
    return state, statistics  # type: ignore[return-value]


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
