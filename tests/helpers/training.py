"""A training small enough for seconds, and its weights compared."""

from __future__ import annotations

import pandas as pd
import torch

from udonlib.data.images import ImageReader, WindowLoader
from udonlib.models.embedding_model import create_model
from udonlib.params import TrainParams
from udonlib.training.trainer import Trainer

SMALL = {
    "backbone": "test_resnet",
    "pretrained": False,
    "image_size": 32,
    "resize_size": 32,
    "student_dim": 8,
    "teacher_dim": 12,
    "augmentation": "affine",
    "precision": "float32",
    "steps": 11,
    "frozen_steps": 0,
    "batch_size": 8,
    "update_every": 4,
    "eval_every": 5,
    "log_every": 2,
    "checkpoint_every": 3,
    "learning_rate": 0.01,
    "backbone_learning_rate": 0.01,
}


def make(catalog, **changes):
    params = TrainParams(**SMALL | changes)
    reader = ImageReader(catalog, params.resize_size, "train", params.on_bad_image)
    scores = iter(range(1, 99))

    def validate(model):
        row = {"embedder": "student", "index": "merged", "domain": "mean", "r_at_1": float(next(scores))}
        return pd.DataFrame([row])

    return Trainer(
        create_model(params, catalog.n_classes),
        catalog,
        params,
        WindowLoader(reader),
        validate,
    )


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)
