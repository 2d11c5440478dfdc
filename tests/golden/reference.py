"""The reference's parameters, or gradients, or moments, in terms of `EmbeddingModel`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from udonlib.models.embedding_model import EmbeddingModel
from udonlib.models.files.layouts import REFERENCE_CLIP, REFERENCE_VIT
from udonlib.models.reference import model_from_arrays, reference_sources
from udonlib.params import TrainParams

Arrays = dict[str, np.ndarray]


def build_model(params: Arrays, n_classes: list[int], n_heads: int, patch: int) -> EmbeddingModel:
    """An EmbeddingModel with the reference's parameters; domains are called "0", "1", .."""
    names = [str(d) for d in range(len(n_classes))]
    model = model_from_arrays(Path("golden"), params, {}, names)
    assert [len(model.student_prototypes[d]) for d in names] == n_classes
    encoder = model.backbone.encoder
    assert encoder.blocks[0].attn.num_heads == n_heads
    assert encoder.patch_embed.patch_size == (patch, patch)
    model.backbone.mean = model.backbone.std = (0.5,) * 3  # the golden images' statistics, CLIP's too
    return model.train()


def state_from_reference(model: EmbeddingModel, params: Arrays) -> dict[str, torch.Tensor]:
    """What `params`, all or some, hold for the model's parameters, under our names and in our layouts."""
    clip = "norm_pre.weight" in model.backbone.encoder.state_dict()
    n_heads = model.backbone.encoder.blocks[0].attn.num_heads
    sources = reference_sources(model, REFERENCE_CLIP if clip else REFERENCE_VIT, n_heads)
    known = {name for source in sources.values() for name in source.names}
    assert set(params) <= known, set(params) - known
    there = {ours: source for ours, source in sources.items() if set(source.names) <= set(params)}
    return {
        ours: torch.from_numpy(source.convert([params[name] for name in source.names]).copy())
        for ours, source in there.items()
    }


def reference_params(n_images: int, **changes) -> TrainParams:
    """Parameters whose loss is the reference's on one device: its relational scale is batch size / 4."""
    return TrainParams(relational_scale=n_images / 4, **changes)
