"""What can be evaluated: a run, a checkpoint of ours or of the reference, or descriptors; and on which catalog."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from udonlib.checkpoints import import_checkpoint
from udonlib.domains import Catalog, load_catalog
from udonlib.errors import UserError, nearest
from udonlib.heads import ByDomain
from udonlib.models import EmbeddingModel, create_model
from udonlib.notebookparams import EvaluateParams
from udonlib.params import WITHOUT_EFFECT, TrainParams
from udonlib.runfolder import RunFolder, run_folder


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
        try:
            saved = torch.load(self.file, map_location="cpu", weights_only=True)
            state = saved["model"] if saved.get("average") is None else saved["average"]
            prefix = "student_prototypes."
            n_classes = {
                ByDomain.domain(name.removeprefix(prefix)): len(value)
                for name, value in state.items()
                if name.startswith(prefix)
            }
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, AttributeError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"{self.file}: not a checkpoint of a run ({reason:.120})") from None
        model = create_model(self.trained.model_copy(update={"pretrained": False, "weights": None}), n_classes)
        try:
            model.load_state_dict(state)
            if "statistics" in saved:
                model.backbone.mean, model.backbone.std = map(tuple, saved["statistics"])
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.file}: another model than its params.yaml says: {reason:.300}") from None
        return model.eval()

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
        folder = run_folder(params.run, params.outputs)
        if not folder.best.exists():
            raise UserError(
                f"run {folder.path.name!r} has no checkpoint yet: it is {folder.status}, and its first validation "
                f"comes at step {folder.params.eval_every:,}"
            )
        return Source("run", folder.path.name, folder.best, folder.params)
    kind = "descriptors" if params.checkpoint is None else "checkpoint"
    path = Path(params.checkpoint or params.descriptors or "").expanduser()
    if kind == "checkpoint" and (path / "checkpoint_-1").is_file():  # the reference's name of its best model
        path = path / "checkpoint_-1"
    if not path.is_file():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"parameter '{kind}': no file '{path}'; {nearest(path.name, beside[:20])}")
    if kind == "descriptors" or path.suffix != ".pt":
        return Source(kind, path.stem if path.suffix else f"{path.absolute().parent.name}-{path.name}", path)
    for folder in (RunFolder(path.absolute().parent), RunFolder(path.absolute().parent.parent)):
        if (folder.path / "params.yaml").exists():
            return Source(kind, f"{folder.path.name}-{path.stem}", path, folder.params)
    raise UserError(
        f"{path}: no params.yaml beside it or above: put that of its run there, it says how to build the model"
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
