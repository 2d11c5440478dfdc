"""One training step: named losses, backward, optimizer, with the rates of the step; which losses, an objective says."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from udonlib.data.images import Slot
from udonlib.errors import UserError
from udonlib.models.embedding_model import EmbeddingModel
from udonlib.models.processors import dtype_of
from udonlib.params import TrainParams
from udonlib.training.losses import Batch, Objective, UdonObjective
from udonlib.training.parallel.class_shards import ClassShards
from udonlib.training.parallel.world import ONE, World


class TrainingError(UserError):
    """The run cannot go on; its last checkpoint is intact."""


def diverged(step: int, what: str) -> TrainingError:
    """The error of a run whose numbers have left all bounds."""
    return TrainingError(
        f"step {step}: {what}; the last checkpoint is kept. Lower 'learning_rate' or 'backbone_learning_rate', add "
        "'warmup_steps', or set 'max_grad_norm'"
    )


# Of a step: domains and how many images of each, its terms by domain, the norm of its gradient.
Taken = tuple[list[tuple[str, int]], dict[str, dict[str, Tensor]], Tensor]


def fetched(steps: Sequence[Taken]) -> list[float]:
    """The numbers of some steps, brought from the device at once: of each the norm, then the terms by domain."""
    numbers: list[Tensor] = []
    for sizes, terms, norm in steps:
        numbers += [norm, *(value for domain, _ in sizes for value in terms[domain].values())]
    return torch.stack([number.float().reshape(()) for number in numbers]).tolist() if numbers else []


def learning_rate_factor(step: int, params: TrainParams) -> float:
    """Factor of both learning rates at `step` (from 0): linear warm-up, then constant or half a cosine down to 0.

    In the steps that a finished run was given the half cosine begins anew: see `TrainParams.part_at`.
    """
    start, length = params.part_at(step)
    n_warm = 0 if start else params.warmup_steps
    warm = min(1.0, (step + 1) / (params.warmup_steps + 1))
    if params.rate_schedule == "constant":
        return warm
    progress = max(0, step - start - n_warm) / max(1, length - n_warm)
    return warm * 0.5 * (1 + math.cos(math.pi * progress))


class Learner:
    """A model, what it is to minimise, and the optimizer.

    AdamW with two rates, one for the backbone and one for the rest: heads, prototypes and whatever the objective
    brings; weight decay is decoupled and acts on all that the objective does not except. The reference's semantics of
    absent heads and of the frozen backbone are options, because they cost time: `absent_heads="decay"` keeps moving
    heads whose domain is not in the batch (their moments decay), `frozen_backbone="zero_lr"` computes the backbone's
    gradients although it does not move. Pinned by the golden trajectories.

    Batch normalisation sees the images of its own process alone; its running statistics are averaged over processes.

    Args:
        model: on its device.
        params: of the run.
        objective: None: UDON's, without offline teachers.
        world: the processes that share each batch.
        shards: which classes' prototypes the model holds here; None: all.
    """

    def __init__(
        self,
        model: EmbeddingModel,
        params: TrainParams,
        objective: Objective | None = None,
        world: World = ONE,
        shards: ClassShards | None = None,
    ) -> None:
        self.model = model
        self.params = params
        self.world = world
        self.shards = shards or ClassShards(model)
        self.rate = 1.0  # a person's factor of both rates on their schedule
        device = next(model.parameters()).device
        self.objective = (objective or UdonObjective(params)).to(device)
        self._precision = dtype_of(params.precision, device)
        self._parameters = [*model.parameters(), *self.objective.parameters()]
        self._statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        backbone = list(model.backbone.parameters())
        inside = {id(p) for p in backbone}
        heads = [p for p in self._parameters if id(p) not in inside]
        parts = ((heads, params.learning_rate), (backbone, params.backbone_learning_rate))
        groups = [
            {"params": [p for p in part if self.objective.decays(p) == decays], "lr": rate, "weight_decay": decay}
            for decays, decay in ((True, params.weight_decay), (False, 0.0))
            for part, rate in parts
        ]
        if not any(group["params"] for group in groups[2:]):
            del groups[2:]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, params.beta2), fused=True)

    def step(
        self,
        number: int,
        images: Tensor,
        parts: Sequence[tuple[str, Tensor]],
        slots: Sequence[Slot] = (),
    ) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
        """Train on one batch: images of one or several domains.

        A batch of several domains has the loss sum_d (n_d / n) L_d: for UDON the same as accumulating single-domain
        batches, except that batch normalisation sees all of them.

        Args:
            number: of the step, from 0; sets the rates.
            images: this process's part of the batch: values in 0..255, augmented, in the order of `parts`.
            parts: domain and training labels of consecutive images of the whole batch; each domain once.
            slots: domain and positions in its train split of the images, for objectives that know them by these.

        Returns:
            The terms by domain, detached, and the norm of the gradient before clipping: of the whole batch.
        """
        p, model, world = self.params, self.model, self.world
        frozen = number < p.frozen_steps or p.backbone_learning_rate == 0
        without_graph = frozen and p.frozen_backbone == "no_grad"
        model.train()
        self.objective.train()
        if without_graph:
            model.backbone.eval()
        factor = self.rate * learning_rate_factor(number, p)
        for place, group in enumerate(self.optimizer.param_groups):  # heads, backbone; then what does not decay of each
            rates = (p.learning_rate, 0.0 if frozen else p.backbone_learning_rate)
            group["lr"] = factor * rates[place % 2]

        batch = Batch(images, parts, slots, number, self._precision, without_graph, world, self.shards)
        by_domain = self.objective.terms(model, batch)
        loss = images.new_zeros((), dtype=torch.float32)
        for domain, labels in parts:
            loss = loss + len(labels) / batch.n_images * by_domain[domain]["total"]

        self.optimizer.zero_grad(set_to_none=True)
        loss.backward(torch.full_like(loss, 1 / world.size))  # each process has the whole loss
        if p.absent_heads == "decay":
            for parameter in self._parameters:
                if parameter.grad is None and parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
        self.shards.sum_(self._parameters, world)
        limit = math.inf if p.max_grad_norm is None else p.max_grad_norm
        grad_norm = self.shards.clip_(self._parameters, limit)
        self.optimizer.step()
        world.average_(self._statistics)
        return {d: {k: v.detach() for k, v in terms.items()} for d, terms in by_domain.items()}, grad_norm.detach()
