"""What can be evaluated: a run, a checkpoint of ours or of the reference, or descriptors; and on which catalog."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from udonlib.data.catalog import Catalog, load_catalog
from udonlib.errors import UserError, nearest
from udonlib.models.embedding_model import EmbeddingModel
from udonlib.models.reference import import_checkpoint
from udonlib.params import WITHOUT_EFFECT, TrainParams
from udonlib.presets import EvaluateParams
from udonlib.runs.checkpoints import OTHERS, load_model
from udonlib.runs.find import KEPT, find_run
from udonlib.runs.folder import RunFolder


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
