"""What a step learns from: an objective, UDON's first of all, and the loss functions it is made of.

| function | what | source |
|---|---|---|
| `margin_logits` | normface, cosface, arcface scores | NormFace 2017, CosFace 2018, ArcFace 2019 |
| `classification_loss` | cross-entropy on scaled (margin) logits | UDON eq. 1 |
| `logit_distillation` | KL from teacher to student classes | UDON eq. 2 |
| `relational_distillation` | squared difference of batch similarities | UDON eq. 3 |
| `UdonObjective` | the four terms of each domain's images, by name, and their weighted mean | UDON eq. 4 |

All means run over images, so that losses of different batch sizes are comparable. Pinned by `losses.npz` and
`relational_devices.npz` of the golden numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from udonlib.data.images import Slot
from udonlib.models.embedding_model import DomainOutputs, EmbeddingModel
from udonlib.models.heads import cosine_logits, unit
from udonlib.params import TrainParams
from udonlib.training.interventions import Wish, check_wished
from udonlib.training.parallel.class_shards import ClassShards, Columns
from udonlib.training.parallel.world import ONE, World

Classification = Literal["normface", "cosface", "arcface"]
Terms = dict[str, Float[Tensor, ""]]


def margin_logits(
    cosines: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    kind: Classification,
    scale: float,
    margin: float = 0.0,
    columns: Columns | None = None,
) -> Float[Tensor, "batch classes"]:
    """Scale cosines for the softmax, making the image's own class harder by a margin.

        normface  s c        cosface  s (c - m y)        arcface  s cos(arccos(c) + m) for the own class, s c else

    For arcface the sum formula  cos(a + m) = c cos m - sin m sqrt(1 - c^2)  is used. Its gradient is infinite only at
    c = +-1, where the root is given the gradient 0: there the loss has no preferred direction to leave the pole.

    Args:
        labels: class of each image, 0 <= label < classes.
        scale: s > 0, the inverse temperature of the softmax.
        margin: m >= 0; a cosine for cosface, radians for arcface, without effect for normface.
        columns: the classes that have a cosine here; None: all.

    Source: UDON's reference; no clamping beyond the pole and no "easy margin". Pinned by losses.npz.
    """
    if kind == "normface":
        return scale * cosines
    rows, own_columns = (columns or Columns(cosines.shape[1])).place(labels)
    own = cosines[rows, own_columns]
    if kind == "cosface":
        harder = own - margin
    else:
        sine_squared = 1 - own.square()
        inside = sine_squared > 0
        sine = torch.where(inside, torch.where(inside, sine_squared, 1.0).sqrt(), 0.0)
        harder = own * math.cos(margin) - sine * math.sin(margin)
    return scale * cosines.index_put((rows, own_columns), harder)


def classification_loss(
    cosines: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    kind: Classification,
    scale: float,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    columns: Columns | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the margin logits z; targets (1 - a) y + a / C with smoothing a in [0, 1).

        mean_i log sum_c exp z_ic - (1 - a) z_i,own - a mean_c z_ic

    Args:
        columns: the classes that have a cosine here, if not all; the loss is over all of them.
    """
    logits = margin_logits(cosines, labels, kind, scale, margin, columns)
    if columns is None or columns.are_all:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    rows, own_columns = columns.place(labels)
    own = logits.new_zeros(len(labels)).index_put((rows,), logits[rows, own_columns])
    own, total = columns.sums(own, columns.total(logits))
    [log_sum] = columns.log_sums(logits)
    return (log_sum - (1 - label_smoothing) * own - label_smoothing * total / columns.n_classes).mean()


def logit_distillation(
    student_cosines: Float[Tensor, "batch classes"],
    teacher_cosines: Float[Tensor, "batch classes"],
    student_temperature: float,
    teacher_temperature: float,
    columns: Columns | None = None,
) -> Float[Tensor, ""]:
    """Mean KL divergence from the teacher's class distribution to the student's.

        p = softmax(c_t / T_t) (constant)     q = softmax(c_s / T_s)     mean_i sum_c p (log p - log q)

    Raw cosines, neither scaled nor with a margin, and no factor T^2. No gradient reaches the teacher.

    Args:
        columns: the classes that have cosines here, if not all; the divergence is over all of them.
    """
    teacher, student = teacher_cosines.detach() / teacher_temperature, student_cosines / student_temperature
    if columns is None or columns.are_all:
        log_p, log_q = F.log_softmax(teacher, dim=1), F.log_softmax(student, dim=1)
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    of_teacher, of_student = columns.log_sums(teacher, student)
    p = (teacher - of_teacher[:, None]).exp()
    [difference] = columns.sums(columns.total(p * (teacher - student)))
    return (difference - of_teacher + of_student).mean()


def relational_distillation(
    student: Float[Tensor, "batch student_dim"],
    teacher: Float[Tensor, "batch teacher_dim"],
    scale: float,
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


def weighted_total(terms: Mapping[str, Float[Tensor, ""]], weights: Mapping[str, float]) -> Float[Tensor, ""]:
    """Weighted mean of the terms that are there: sum w_t L_t / sum w_t, so that leaving one out rescales the others.

    Raises:
        ValueError: "loss weights ... sum to 0" when no term has a weight.
    """
    total = sum(weights[name] for name in terms)
    if total <= 0:
        raise ValueError(f"loss weights of {', '.join(terms)} sum to {total:g}; at least one must be positive")
    return torch.stack([weights[name] / total * term for name, term in terms.items()]).sum()


@dataclass(frozen=True)
class Batch:
    """What one step learns from.

    Args:
        images: this process's part of the batch, values in 0..255, augmented, in the order of `parts`.
        parts: domain and training labels of consecutive images of the *whole* batch; each domain once.
        slots: domain and positions in its train split of consecutive images of this process's part.
        number: of the step, from 0.
        precision: of the forward pass of backbone and projectors.
        frozen: encode without a graph, since the backbone does not learn in this step.
        world: the processes that share the batch; `world.gather` makes their rows those of the whole batch.
        shards: which classes' prototypes this process holds, and which of them have a column; None: all.
    """

    images: Tensor
    parts: Sequence[tuple[str, Tensor]]
    slots: Sequence[Slot] = ()
    number: int = 0
    precision: torch.dtype = torch.float32
    frozen: bool = False
    world: World = ONE
    shards: ClassShards | None = None

    @property
    def n_images(self) -> int:
        """Images of the whole batch."""
        return sum(len(labels) for _, labels in self.parts)


class Objective(nn.Module):
    """What a step minimises. `training.learner` optimises it, whatever it is.

    Its parameters, such as projectors, are optimised at the rate of the heads; its state, such as running means, is
    kept in checkpoints. Neither belongs to the model that comes out. Frozen teachers are to stand in a plain
    dictionary, so that they are no part of it.

    Attributes:
        allocates_by: name of the term whose mean the dynamic sampler takes as a domain's loss.
        taught_by: names of the frozen teachers that a person may steer.
    """

    allocates_by = "total"
    taught_by: tuple[str, ...] = ()

    def terms(self, model: EmbeddingModel, batch: Batch) -> dict[str, Terms]:
        """Named terms of each domain's images, with one called `total`.

        The loss of the batch is  sum_d (n_d / n) total_d.  The other terms are logged, each as a mean over images, be
        they losses or not: what is to be watched has a name here. All are of the whole batch, in every process.
        """
        raise NotImplementedError

    def claim(self, values: Mapping[str, float]) -> float:
        """What the dynamic sampler takes as a domain's loss, from the values of a step's terms."""
        return values[self.allocates_by]

    def decays(self, parameter: nn.Parameter) -> bool:
        """Whether weight decay acts on a parameter of the model or of this module: on all, if nothing else is said."""
        return True

    def steer(self, wish: Wish) -> None:
        """Put in force what a person wants of the frozen teachers.

        Raises:
            UserError: there are none of that name, or none at all, or none would be left.
        """
        check_wished(dict(wish), {"teacher": self.taught_by}, "steering")


class UdonObjective(Objective):
    """Classification by student and teachers, and distillation from one to the other, domain by domain.

        total = (w_cs CE_s + w_ct CE_t + w_kl KL + w_rel REL) / (w_cs + w_ct + w_kl + w_rel)

    over the terms that are there: `ce_student`; with a teacher `ce_teacher`, `kl` and `rel` too. Source: UDON eq. 4;
    pinned by losses.npz and the trajectories.

    Args:
        params: of the run: kind and scale of the losses, and their weights.
        offline_teachers: frozen specialist of each domain that teaches in place of the model's own teacher heads: its
            student embedding and classes are the teacher's.
    """

    def __init__(self, params: TrainParams, offline_teachers: Mapping[str, EmbeddingModel] | None = None) -> None:
        super().__init__()
        self.params = params
        self.allocates_by = "ce_teacher" if params.sampler_loss == "teacher" and params.is_taught else "ce_student"
        self.offline_teachers = {d: m.eval().requires_grad_(False) for d, m in (offline_teachers or {}).items()}

    def claim(self, values: Mapping[str, float]) -> float:
        """See `Objective`; of the signal `gap` how much worse the student classifies than the teacher."""
        gap = self.params.sampler_signal == "gap" and "ce_teacher" in values
        return values["ce_student"] - values["ce_teacher"] if gap else values[self.allocates_by]

    def weights(self, number: int) -> dict[str, float]:
        """Weights of the terms at a step, from 0: distillation's rise linearly over `distillation_ramp` steps."""
        p = self.params
        ramp = min(1.0, (number + 1) / (p.distillation_ramp + 1))
        return {"ce_student": p.w_ce_student, "ce_teacher": p.w_ce_teacher, "kl": ramp * p.w_kl, "rel": ramp * p.w_rel}

    def terms(self, model: EmbeddingModel, batch: Batch) -> dict[str, Terms]:
        """See `Objective`. The relational term is of the whole batch, whatever number of processes shares it.

        Raises:
            ValueError: "domain 'flags' has no offline teacher" where others have one, or the parameters ask for one.
        """
        return self.terms_of(model, model.features(batch.images, batch.precision, batch.frozen), batch)

    def terms_of(
        self, model: EmbeddingModel, features: Float[Tensor, "ours feature_dim"], batch: Batch
    ) -> dict[str, Terms]:
        """The same, from the features of this process's images."""
        features = batch.world.gather(features, batch.n_images)
        student, shards = model.student(features), batch.shards or ClassShards(model)
        labelled, joint = dict(batch.parts), self.params.classifier == "joint"
        columns = {d: shards.columns(d, labelled.get(d), batch.number) for d in (model.domains if joint else labelled)}
        # Of a joint classifier the classes of each domain compete with those of all others, for all images.
        cosines = {d: cosine_logits(student, columns[d].of(model.student_prototypes[d])) for d in columns if joint}
        by_domain: dict[str, Terms] = {}
        start = 0
        for domain, labels in batch.parts:
            rows = slice(start, start := start + len(labels))
            own = columns[domain]
            if joint:
                of_own = cosines[domain][rows]
            else:
                of_own = cosine_logits(student[rows], own.of(model.student_prototypes[domain]))
            out = DomainOutputs(student[rows], of_own, *model.taught(features[rows], domain, own.sample))
            if self.offline_teachers or self.params.offline_teachers is not None:
                out = self._taught_offline(out, domain, batch, rows, own)
            rivals = {d: columns[d] for d in cosines if d != domain}
            terms = self.losses(out, labels, own, [cosines[d][rows] for d in rivals], rivals.values())
            if self.params.nested_dims:
                terms["ce_student"] = self._nested(model, out, labels, {domain: own} | rivals, terms["ce_student"])
            by_domain[domain] = terms | {"total": weighted_total(terms, self.weights(batch.number))}
        return by_domain

    def losses(
        self,
        out: DomainOutputs,
        labels: Int[Tensor, "batch"],
        columns: Columns | None = None,
        rival_cosines: Sequence[Float[Tensor, "batch _"]] = (),
        rivals: Iterable[Columns] = (),
    ) -> Terms:
        """The named losses of images of one domain: `ce_student`, and with a teacher `ce_teacher`, `kl`, `rel`.

        Args:
            out: what the model, and perhaps an offline teacher, says of them.
            columns: the classes that its cosines are of; None: all.
            rival_cosines: the student's cosines to classes of other domains, which compete in `ce_student` alone: a
                joint classifier, since the order of a softmax's classes does not matter.
            rivals: the classes that these are of.
        """
        p = self.params
        columns = columns or Columns(out.student_cosines.shape[1])
        joint = torch.cat([out.student_cosines, *rival_cosines], dim=1)
        terms = {"ce_student": self._classification(joint, labels, columns.beside(rivals))}
        if out.teacher is not None and out.teacher_cosines is not None:
            terms["ce_teacher"] = self._classification(out.teacher_cosines, labels, columns)
            terms["kl"] = logit_distillation(
                out.student_cosines, out.teacher_cosines, p.student_temperature, p.teacher_temperature, columns
            )
            terms["rel"] = relational_distillation(out.student, out.teacher, p.relational_scale, p.relational)
        return terms

    def _classification(self, cosines: Tensor, labels: Tensor, columns: Columns) -> Tensor:
        p = self.params
        return classification_loss(cosines, labels, p.classification, p.scale, p.margin, p.label_smoothing, columns)

    def _nested(
        self, model: EmbeddingModel, out: DomainOutputs, labels: Tensor, by_domain: Mapping[str, Columns], whole: Tensor
    ) -> Tensor:
        """Mean of the student's classification loss and those of its shorter embeddings, each with its own norm."""
        losses = [whole]
        own, *rivals = by_domain.values()
        for dim in self.params.nested_dims:
            short = unit(out.student[:, :dim])
            cosines = [
                cosine_logits(short, columns.of(model.student_prototypes[d])[:, :dim])
                for d, columns in by_domain.items()
            ]
            losses.append(self._classification(torch.cat(cosines, dim=1), labels, own.beside(rivals)))
        return torch.stack(losses).mean()

    def _taught_offline(
        self, out: DomainOutputs, domain: str, batch: Batch, rows: slice, columns: Columns
    ) -> DomainOutputs:
        """What the domain's offline teacher says of its images, which are these rows of the batch, as the teacher."""
        if domain not in self.offline_teachers:
            raise ValueError(f"domain {domain!r} has no offline teacher; those of {list(self.offline_teachers)} have")
        teacher = self.offline_teachers[domain]
        ours = batch.world.rows(batch.n_images)
        first, last = max(rows.start, ours.start), min(rows.stop, ours.stop)
        images = batch.images[first - ours.start : max(first, last) - ours.start]
        with torch.no_grad():
            mine = teacher.student(teacher.features(images, batch.precision))
            known = batch.world.gather(mine, rows.stop - rows.start, first - rows.start)
            cosines = cosine_logits(known, columns.of_all(teacher.student_prototypes[domain]))
        return replace(out, teacher=known, teacher_cosines=cosines)
