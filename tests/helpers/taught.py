"""A run with two small frozen teachers."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.helpers.training import SMALL
from udonlib.models.backbones import create_backbone
from udonlib.models.files.importers import save_backbone_weights
from udonlib.params import TrainParams


def write_teachers(folder: Path) -> Path:
    """Weights of two small encoders, drawn from a seed."""
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        encoder = create_backbone("small_resnet", pretrained=False, image_size=32, arguments={"width": 8})
        save_backbone_weights(encoder, folder / f"{name}.safetensors")
    return folder


def small_teachers(files: Path) -> dict[str, dict]:
    """The two as the parameter `teachers` has them: `one` has both kinds of tokens, `two` has no patches."""

    def teacher(name: str, side: int) -> dict:
        weights = str(files / f"{name}.safetensors")
        return {"backbone": "small_resnet", "backbone_args": {"width": 8}, "image_size": side, "weights": weights}

    return {"one": teacher("one", 32), "two": teacher("two", 48) | {"kinds": ["class"]}}


def taught_params(root, outputs, files, **changes) -> TrainParams:
    """Parameters of a run on the data in `root`, with the teachers in `files`."""
    fixed = {"recipe": "unic", "teachers": small_teachers(files), "sampler": "dynamic", "augmentation": "none"}
    return TrainParams(**SMALL | fixed | {"data": str(root), "outputs": str(outputs), "n_threads": 1} | changes)
