"""A training small enough for seconds, and its weights compared."""

from __future__ import annotations

import pandas as pd
import torch

from udonlib.data.images import ImageReader, WindowLoader
from udonlib.models.backbones import create_backbone
from udonlib.models.embedding_model import create_model
from udonlib.params import TrainParams
from udonlib.training.losses import Objective
from udonlib.training.parallel.world import ONE
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


def make(catalog, objective=None, world=ONE, **changes):
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
        objective,
        world,
    )


class Predicting(Objective):
    """Predicts mean colours, less their running mean, from the tokens of two blocks: labels are not asked for.

    What other objectives may bring: parameters and state of their own, terms that are no losses, no decay of biases.
    """

    running: torch.Tensor

    def __init__(self, dims):
        super().__init__()
        torch.manual_seed(5)
        self.projectors = torch.nn.ModuleList([torch.nn.Linear(dim, 3) for dim in dims])
        self.register_buffer("running", torch.zeros(3))

    def decays(self, parameter):
        return parameter.ndim > 1

    def terms(self, model, batch):
        blocks = model.tokens(batch.images, [0, -1], precision=batch.precision, frozen=batch.frozen)
        colours = batch.images.mean((2, 3)) / 255
        predicted = sum(project(block["class"].float()) for project, block in zip(self.projectors, blocks, strict=True))
        losses = (predicted - (colours - self.running)).square().mean(1)
        losses, colours = (batch.world.gather(rows, batch.n_images) for rows in (losses, colours))
        self.running = 0.9 * self.running + 0.1 * colours.mean(0)
        sizes = [len(labels) for _, labels in batch.parts]
        parts = zip(batch.parts, losses.split(sizes), colours.split(sizes), strict=True)
        return {d: {"total": own.mean(), "brightness": shown.mean()} for (d, _), own, shown in parts}


def predicting(params):
    backbone = create_backbone(params.backbone, pretrained=False, image_size=params.image_size)
    return Predicting([backbone.block_dims[0], backbone.block_dims[-1]])


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)
