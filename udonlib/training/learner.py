"""One training step: forward, named losses, backward, optimizer, with the rates of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from udonlib.models.embedding_model import EmbeddingModel
from udonlib.models.heads import cosine_logits, unit
from udonlib.models.processors import dtype_of
from udonlib.params import TrainParams
from udonlib.training.losses import classification_loss, udon_terms, weighted_total


def learning_rate_factor(step: int, params: TrainParams) -> float:
    """Factor of both learning rates at `step` (from 0): linear warm-up, then constant or half a cosine down to 0."""
    warm = min(1.0, (step + 1) / (params.warmup_steps + 1))
    if params.rate_schedule == "constant":
        return warm
    progress = max(0, step - params.warmup_steps) / max(1, params.steps - params.warmup_steps)
    return warm * 0.5 * (1 + math.cos(math.pi * progress))


class Learner:
    """A model, its optimizer and the loss of a batch.

    AdamW with two rates, one for the backbone and one for heads and prototypes; weight decay is decoupled and acts on
    every parameter. The reference's semantics of absent heads and of the frozen backbone are options, because they
    cost time: `absent_heads="decay"` keeps moving heads whose domain is not in the batch (their moments decay),
    `frozen_backbone="zero_lr"` computes the backbone's gradients although it does not move. Pinned by the golden
    trajectories.

    Args:
        model: on its device.
        params: of the run.
        offline_teachers: frozen specialist of each domain, on the same device, that teaches in place of the model's own
            teacher heads: its student embedding and classes are the teacher's.
    """

    def __init__(
        self, model: EmbeddingModel, params: TrainParams, offline_teachers: Mapping[str, EmbeddingModel] | None = None
    ) -> None:
        self.model = model
        self.params = params
        self.offline_teachers = {d: m.eval().requires_grad_(False) for d, m in (offline_teachers or {}).items()}
        backbone = list(model.backbone.parameters())
        inside = {id(p) for p in backbone}
        heads = [p for p in model.parameters() if id(p) not in inside]
        self._precision = dtype_of(params.precision, next(model.parameters()).device)
        self.optimizer = torch.optim.AdamW(
            [{"params": heads, "lr": params.learning_rate}, {"params": backbone, "lr": params.backbone_learning_rate}],
            betas=(0.9, params.beta2),
            weight_decay=params.weight_decay,
            fused=True,
        )

    def loss_weights(self, number: int) -> dict[str, float]:
        """Weights of the terms at a step, from 0: distillation's rise linearly over `distillation_ramp` steps."""
        p = self.params
        ramp = min(1.0, (number + 1) / (p.distillation_ramp + 1))
        return {"ce_student": p.w_ce_student, "ce_teacher": p.w_ce_teacher, "kl": ramp * p.w_kl, "rel": ramp * p.w_rel}

    def terms(
        self, features: Tensor, domain: str, labels: Tensor, *, images: Tensor | None = None, number: int = 0
    ) -> dict[str, Tensor]:
        """Named loss terms of images of one domain, and their weighted mean as `total`.

        Args:
            images: what the features were made of; offline teachers look at it.
            number: of the step, from 0.
        """
        p = self.params
        out = self.model.outputs(features, domain)
        if domain in self.offline_teachers:
            if images is None:
                raise ValueError(f"domain '{domain}' has an offline teacher, which has to see the images: none given")
            specialist = self.offline_teachers[domain]
            with torch.no_grad():
                known = specialist.outputs(specialist.features(images, self._precision), domain)
            out = replace(out, teacher=known.student, teacher_cosines=known.student_cosines)
        terms = udon_terms(
            out.student,
            out.student_cosines,
            labels,
            out.teacher,
            out.teacher_cosines,
            classification=p.classification,
            scale=p.scale,
            margin=p.margin,
            label_smoothing=p.label_smoothing,
            student_temperature=p.student_temperature,
            teacher_temperature=p.teacher_temperature,
            relational_scale=p.relational_scale,
            relational=p.relational,
            rival_cosines=self.model.rival_cosines(out.student, domain) if p.classifier == "joint" else None,
        )
        if p.nested_dims:
            terms["ce_student"] = self._nested_classification(out.student, domain, labels, terms["ce_student"])
        return terms | {"total": weighted_total(terms, self.loss_weights(number))}

    def _nested_classification(self, student: Tensor, domain: str, labels: Tensor, whole: Tensor) -> Tensor:
        """Mean of the student's classification loss and those of its shorter embeddings, each with its own norm."""
        p, model = self.params, self.model
        losses = [whole]
        for dim in p.nested_dims:
            short = unit(student[:, :dim])
            rivals = [d for d in model.domains if d != domain and p.classifier == "joint"]
            classes = torch.cat([model.student_prototypes[d][:, :dim] for d in (domain, *rivals)])
            cosines = cosine_logits(short, classes)
            losses.append(classification_loss(cosines, labels, p.classification, p.scale, p.margin, p.label_smoothing))
        return torch.stack(losses).mean()

    def step(
        self, number: int, images: Tensor, parts: Sequence[tuple[str, Tensor]]
    ) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
        """Train on one batch: images of one or several domains, each through its own heads.

        A batch of several domains has the loss sum_d (n_d / n) L_d: the same as accumulating single-domain batches,
        except that batch normalisation sees all of them.

        Args:
            number: of the step, from 0; sets the rates.
            images: values in 0..255, augmented, in the order of `parts`.
            parts: domain and training labels of consecutive images; each domain once.

        Returns:
            The loss terms by domain, detached, and the norm of the gradient before clipping.
        """
        p, model = self.params, self.model
        frozen = number < p.frozen_steps or p.backbone_learning_rate == 0
        without_graph = frozen and p.frozen_backbone == "no_grad"
        model.train()
        if without_graph:
            model.backbone.eval()
        factor = learning_rate_factor(number, p)
        heads, backbone = self.optimizer.param_groups
        heads["lr"] = factor * p.learning_rate
        backbone["lr"] = 0.0 if frozen else factor * p.backbone_learning_rate

        features = model.features(images, self._precision, frozen=without_graph)
        by_domain: dict[str, dict[str, Tensor]] = {}
        start = 0
        loss = features.new_zeros(())
        for domain, labels in parts:
            end = start + len(labels)
            by_domain[domain] = self.terms(features[start:end], domain, labels, images=images[start:end], number=number)
            start = end
            loss = loss + len(labels) / len(images) * by_domain[domain]["total"]

        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if p.absent_heads == "decay":
            for parameter in model.parameters():
                if parameter.grad is None and parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
        limit = math.inf if p.max_grad_norm is None else p.max_grad_norm
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        self.optimizer.step()
        return {d: {k: v.detach() for k, v in terms.items()} for d, terms in by_domain.items()}, grad_norm.detach()
