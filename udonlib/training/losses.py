"""The loss functions of UDON as pure functions of embeddings, logits and labels.

| function | what | source |
|---|---|---|
| `cosine_logits` | class scores of unit embeddings | UDON sec. 3 |
| `margin_logits` | normface, cosface, arcface scores | NormFace 2017, CosFace 2018, ArcFace 2019 |
| `classification_loss` | cross-entropy on scaled (margin) logits | UDON eq. 1 |
| `logit_distillation` | KL from teacher to student classes | UDON eq. 2 |
| `relational_distillation` | squared difference of batch similarities | UDON eq. 3 |
| `udon_terms` | the four terms of one domain's images, by name | UDON eq. 4 |

All means run over images, so that losses of different batch sizes are comparable. Pinned by `losses.npz` and
`relational_devices.npz` of the golden numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Classification = Literal["normface", "cosface", "arcface"]

TERMS = ("ce_student", "ce_teacher", "kl", "rel")


def margin_logits(
    cosines: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    kind: Classification = "normface",
    scale: float = 16.0,
    margin: float = 0.0,
) -> Float[Tensor, "batch classes"]:
    """Scale cosines for the softmax, making the image's own class harder by a margin.

        normface  s c        cosface  s (c - m y)        arcface  s cos(arccos(c) + m) for the own class, s c else

    For arcface the sum formula  cos(a + m) = c cos m - sin m sqrt(1 - c^2)  is used. Its gradient is infinite only at
    c = +-1, where the root is given the gradient 0: there the loss has no preferred direction to leave the pole.

    Args:
        labels: class of each image, 0 <= label < classes.
        scale: s > 0, the inverse temperature of the softmax.
        margin: m >= 0; a cosine for cosface, radians for arcface, without effect for normface.

    Source: UDON's reference; no clamping beyond the pole and no "easy margin". Pinned by losses.npz.
    """
    if kind == "normface":
        return scale * cosines
    rows = torch.arange(len(labels), device=cosines.device)
    own = cosines[rows, labels]
    if kind == "cosface":
        harder = own - margin
    else:
        sine_squared = 1 - own.square()
        inside = sine_squared > 0
        sine = torch.where(inside, torch.where(inside, sine_squared, 1.0).sqrt(), 0.0)
        harder = own * math.cos(margin) - sine * math.sin(margin)
    return scale * cosines.index_put((rows, labels), harder)


def classification_loss(
    cosines: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    kind: Classification = "normface",
    scale: float = 16.0,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the margin logits; targets (1 - a) y + a / C with smoothing a in [0, 1)."""
    return F.cross_entropy(margin_logits(cosines, labels, kind, scale, margin), labels, label_smoothing=label_smoothing)


def logit_distillation(
    student_cosines: Float[Tensor, "batch classes"],
    teacher_cosines: Float[Tensor, "batch classes"],
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """Mean KL divergence from the teacher's class distribution to the student's.

        p = softmax(c_t / T_t) (constant)     q = softmax(c_s / T_s)     mean_i sum_c p (log p - log q)

    Raw cosines, neither scaled nor with a margin, and no factor T^2. No gradient reaches the teacher.
    """
    log_p = F.log_softmax(teacher_cosines.detach() / teacher_temperature, dim=1)
    log_q = F.log_softmax(student_cosines / student_temperature, dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def relational_distillation(
    student: Float[Tensor, "batch student_dim"],
    teacher: Float[Tensor, "batch teacher_dim"],
    scale: float = 32.0,
    kind: Literal["squared", "excess"] = "squared",
) -> Float[Tensor, ""]:
    """Difference between the batch similarities of the student and of the teacher.

        squared  scale * mean_ij (s_i.s_j - t_i.t_j)^2             t constant, diagonal included
        excess   scale * mean_ij max(0, s_i.s_j - t_i.t_j)^2       ours: apart stays apart, nothing pulls together

    The reference has no such scale: it sums a row and averages rows, times a quarter of the number of devices, which
    is  (images per device / 4) * (number of devices)  times the mean square: 32 for 128 images on one device. Here the
    scale is explicit, so that the loss depends neither on the batch size nor on the number of devices.
    """
    difference = student @ student.mT - (teacher @ teacher.mT).detach()
    return scale * (difference if kind == "squared" else difference.relu()).square().mean()


def udon_terms(
    student: Float[Tensor, "batch student_dim"],
    student_cosines: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    teacher: Float[Tensor, "batch teacher_dim"] | None = None,
    teacher_cosines: Float[Tensor, "batch classes"] | None = None,
    *,
    classification: Classification = "normface",
    scale: float = 16.0,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.1,
    relational_scale: float = 32.0,
    relational: Literal["squared", "excess"] = "squared",
    rival_cosines: Float[Tensor, "batch rivals"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """The named terms of UDON for images of one domain: `ce_student`, and with a teacher `ce_teacher`, `kl`, `rel`.

    Without a teacher (recipes `us_*`, `uj_*`) only `ce_student` is returned.

    Args:
        rival_cosines: the student's cosines to classes of other domains, which compete in `ce_student` alone: a joint
            classifier, since the order of a softmax's classes does not matter.
    """

    def cross_entropy(cosines: Tensor) -> Tensor:
        return classification_loss(cosines, labels, classification, scale, margin, label_smoothing)

    rivals = [] if rival_cosines is None else [rival_cosines]
    terms = {"ce_student": cross_entropy(torch.cat([student_cosines, *rivals], dim=1))}
    if teacher is not None and teacher_cosines is not None:
        terms["ce_teacher"] = cross_entropy(teacher_cosines)
        terms["kl"] = logit_distillation(student_cosines, teacher_cosines, student_temperature, teacher_temperature)
        terms["rel"] = relational_distillation(student, teacher, relational_scale, relational)
    return terms


def weighted_total(terms: Mapping[str, Float[Tensor, ""]], weights: Mapping[str, float]) -> Float[Tensor, ""]:
    """Weighted mean of the terms that are there: sum w_t L_t / sum w_t, so that leaving one out rescales the others.

    Raises:
        ValueError: "loss weights ... sum to 0" when no term has a weight.
    """
    total = sum(weights[name] for name in terms)
    if total <= 0:
        raise ValueError(f"loss weights of {', '.join(terms)} sum to {total:g}; at least one must be positive")
    return torch.stack([weights[name] / total * term for name, term in terms.items()]).sum()
