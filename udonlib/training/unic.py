"""UNIC: a student that predicts the standardised features of several frozen teachers, with labels or without.

| name | what | source |
|---|---|---|
| `token_loss` | distance between features and targets of one kind of token | UNIC eq. 1 |
| `teacher_losses` | of each teacher, kind of token and image | UNIC eq. 2 |
| `kept_teachers` | which teachers teach an image | UNIC sec. 3.4, teacher dropping |
| `unic_terms` | the total of each image, and what it is made of, by name | UNIC eq. 3 |
| `cosine`, `warmed_cosine` | the way of momentum and rate from start to end | UNIC's original |
| `UnicObjective` | all of it, as what a step minimises | |

Teachers go by the alphabet everywhere, tokens by kind (`class`, `patches`). Pinned by `unic.npz` of the golden numbers.
Three habits of the original are options here: a batch is standardised by the statistics from before it, so that the
first one is raw (`standard_update: after`); images weigh as much as they have teachers left (`image_weights: kept`);
projectors see the last block before the encoder's last norm, which is then used untrained (`projected_end: block`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from udonlib.models.embedding_model import EmbeddingModel
from udonlib.models.ladder import PROJECTORS, Kind, Tokens, resample
from udonlib.models.processors import computing_in
from udonlib.models.standards import Standards
from udonlib.models.teachers import Teacher
from udonlib.params import TrainParams
from udonlib.training.interventions import Wish
from udonlib.training.losses import Batch, Objective, Terms, UdonObjective
from udonlib.training.parallel.world import ONE, World

Losses = Mapping[str, Mapping[Kind, Float[Tensor, "batch"]]]  # of each image, by teacher and kind of token


def token_loss(
    student: Float[Tensor, "batch *position dim"],
    target: Float[Tensor, "batch *position dim"],
    w_cosine: float = 0.5,
    w_smooth_l1: float = 0.5,
) -> Float[Tensor, "batch"]:
    """Distance of each image's tokens of one kind from a teacher's, averaged over positions.

        w_cosine (1 - cos(s, t)) + w_smooth_l1 mean_c huber(s_c - t_c)      huber(d) = d^2 / 2 up to 1, then |d| - 1/2

    Args:
        target: standardised; no gradient reaches it.
    """
    target = target.detach()
    distance = w_cosine * (1 - F.cosine_similarity(student, target, dim=-1))
    distance = distance + w_smooth_l1 * F.smooth_l1_loss(student, target, reduction="none").mean(-1)
    return distance.flatten(1).mean(1) if distance.ndim > 1 else distance


def teacher_losses(
    student: Mapping[str, Tokens],
    targets: Mapping[str, Tokens],
    w_cosine: float = 0.5,
    w_smooth_l1: float = 0.5,
) -> dict[str, dict[Kind, Float[Tensor, "batch"]]]:
    """Loss of each image by teacher, in the order of the alphabet, and kind of token.

    Args:
        student: what the projectors say, by teacher and kind.
        targets: standardised features of the same teachers and kinds, patches on the student's grid.
    """
    return {
        teacher: {
            kind: token_loss(student[teacher][kind], targets[teacher][kind], w_cosine, w_smooth_l1) for kind in kinds
        }
        for teacher, kinds in sorted(student.items())
    }


def kept_teachers(
    losses: Float[Tensor, "teachers batch"], drop_probability: float, draws: Float64[Tensor, "batch others"]
) -> Bool[Tensor, "teachers batch"]:
    """Which teachers teach each image: the one with the largest loss always, each other unless it is dropped.

        dropped where u < p: p = 0 is the mean of the teachers, p = 1 the one that is farthest away

    Args:
        losses: of each teacher, in the order of the alphabet; of equal ones the first counts as the largest.
        draws: uniform in [0, 1), one for each image and teacher but the largest, in the same order. Draw them with
            `torch.rand(batch, teachers - 1, generator=..., dtype=torch.float64)`.
    """
    largest = F.one_hot(losses.argmax(0), len(losses)).bool().mT
    # The i-th teacher that is not the largest takes the image's i-th draw.
    place = ((~largest).cumsum(0) - 1).clamp(0, max(0, len(losses) - 2))
    if draws.shape[1] == 0:
        return largest
    return largest | (draws.to(losses.device).mT.gather(0, place) >= drop_probability)


def unic_terms(
    by_kind: Losses,
    draws: Float64[Tensor, "batch others"] | None = None,
    *,
    drop_probability: float = 0.5,
    weights: Mapping[str, float] | None = None,
    image_weights: Literal["kept", "equal"] = "equal",
) -> dict[str, Float[Tensor, "batch"]]:
    """The named terms of each image: `total`, and of each teacher `NAME/class`, `NAME/patches` and `NAME/kept`.

        L_t = mean of the teacher's kinds       m = `kept_teachers`       w = `weights`
        equal  total_i = sum_t w_t m_ti L_ti / sum_t w_t m_ti
        kept   total_i = sum_t w_t m_ti L_ti / mean_j sum_t w_t m_tj      the original's: weight by teachers left

    A batch's loss is the mean of the totals. Those of kinds are of all images, kept or not, and `kept` is 1 where the
    teacher taught the image: neither has a gradient.

    Args:
        by_kind: as `teacher_losses` gives them.
        draws: as for `kept_teachers`; None: no teacher is dropped, as in validation.
        weights: of teachers, 1 where none is given; not negative, one at least positive. One without weight teaches no
            image, and is not the farthest one.
    """
    losses = torch.stack([torch.stack(list(kinds.values())).mean(0) for kinds in by_kind.values()])
    w = losses.new_tensor([(weights or {}).get(teacher, 1.0) for teacher in by_kind])[:, None]
    kept = (w > 0).expand_as(losses)
    if draws is not None:
        kept = kept & kept_teachers(losses.detach().where(kept, -math.inf), drop_probability, draws)
    w = w * kept
    left = w.sum(0)
    terms = {"total": (w * losses).sum(0) / (left.mean() if image_weights == "kept" else left)}
    for (teacher, kinds), taught in zip(by_kind.items(), kept, strict=True):
        terms |= {f"{teacher}/{kind}": loss.detach() for kind, loss in kinds.items()}
        terms[f"{teacher}/kept"] = taught.to(losses.dtype)
    return terms


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at `steps`:  end + (start - end) / 2 (1 + cos(pi step / steps))."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * step / steps))


def warmed_cosine(peak: float, end: float, step: int, steps: int, warmup_steps: int) -> float:
    """A learning rate: linear from 0 at step 0 to `peak` at the last of `warmup_steps`, then `cosine` down to `end`."""
    if step < warmup_steps:
        return peak * step / max(1, warmup_steps - 1)
    return cosine(peak, end, step - warmup_steps, steps - warmup_steps)


class UnicObjective(Objective):
    """Teach a student what frozen teachers see: projectors, standards, and the loss of each step.

        tokens of the student's blocks -> projectors -> compared with standardised features of each teacher

    Terms are those of `unic_terms`, as means over a domain's images. With labels too (a recipe of UDON's with frozen
    teachers) they stand beside UDON's, from the same pass of the backbone:  total = total_UDON + w_unic `unic`.

    Args:
        params: of the run.
        model: the student, on its device; its sizes count.
        teachers: frozen, by name.
        features: what the teachers say of this process's images of a batch, where that is known already; None: they are
            asked in each step, about the images that the student sees.
        labelled: UDON's objective, beside this one; None: the images need no labels.
        world: the processes that share each batch.
    """

    def __init__(
        self,
        params: TrainParams,
        model: EmbeddingModel,
        teachers: Mapping[str, Teacher],
        features: Callable[[Batch], Mapping[str, Tokens]] | None = None,
        labelled: UdonObjective | None = None,
        world: World = ONE,
    ) -> None:
        super().__init__()
        p = self.params = params
        self._teachers = dict(sorted(teachers.items()))  # no part of what is kept
        self._features = features
        self.labelled = labelled
        self.allocates_by = "total" if labelled is None else labelled.allocates_by
        self.taught_by = tuple(self._teachers)
        self.steer(Wish())
        dims = model.backbone.block_dims
        beneath = range(len(dims) - 1) if p.projected_blocks is None else p.projected_blocks
        self._blocks = [*beneath] if p.projector == "ladder" else []
        self._reads_end = p.projected_end == "end"
        if not self._reads_end:
            self._blocks.append(len(dims) - 1)
        widths = {name: teacher.widths for name, teacher in self._teachers.items()}
        read = [dims[block] for block in self._blocks] + [model.backbone.feature_dim] * self._reads_end
        options = {"hidden_dim": p.projector_hidden_dim} if p.projector == "ladder" else {}
        if p.projector != "transformer":
            options["last_hidden_dim"] = p.projector_last_hidden_dim
        generator = torch.Generator().manual_seed(p.seed)
        self.projectors = PROJECTORS[p.projector](read, widths, generator=generator, **options)
        how = {"update": p.standard_update} if p.standard == "running" else {}
        self.standards = Standards(widths, p.standard, sums=world.sum, **how)

    def claim(self, values: Mapping[str, float]) -> float:
        """See `Objective`: with labels what their objective says."""
        return super().claim(values) if self.labelled is None else self.labelled.claim(values)

    def decays(self, parameter: nn.Parameter) -> bool:
        """Matrices and kernels decay; biases, norms and scales do not."""
        return parameter.ndim > 1

    def steer(self, wish: Wish) -> None:
        """See `Objective`: weights of the teachers times a person's factors, and the probability to drop one."""
        super().steer(wish)
        p, asked = self.params, wish.drop_probability
        self.weights = {name: p.teachers[name].weight * wish.teachers.get(name, 1.0) for name in self._teachers}
        self.drop_probability = p.drop_probability if asked is None else asked

    def terms(self, model: EmbeddingModel, batch: Batch) -> dict[str, Terms]:
        """See `Objective`: means of `unic_terms` over a domain's images, and UDON's where there are labels."""
        p, world, n = self.params, batch.world, batch.n_images
        needs_end = self._reads_end or self.labelled is not None
        tokens = model.tokens(batch.images, self._blocks, needs_end, batch.precision, batch.frozen)
        read = tokens if self._reads_end or not needs_end else tokens[:-1]
        with computing_in(batch.precision, batch.images.device):  # most of what is done beside the student's own pass
            said = self.projectors(read)
        end = p.part_end(0)  # in steps that a finished run was given the statistics stay as slow
        ends = p.standard_momentum, p.standard_momentum_end
        momentum = cosine(*ends, min(batch.number, end), end) if self.training else 0.0
        targets = self.standards(self._ask(batch, read[-1]["patches"].shape[1]), momentum)
        said = {name: {kind: value.float() for kind, value in kinds.items()} for name, kinds in said.items()}
        ours = teacher_losses(said, targets, p.w_cosine, p.w_smooth_l1)
        names = [(teacher, kind) for teacher, kinds in ours.items() for kind in kinds]
        losses = world.gather(torch.stack([ours[teacher][kind] for teacher, kind in names], dim=1), n)
        by_kind: dict[str, dict[Kind, Tensor]] = {}
        for column, (teacher, kind) in enumerate(names):
            by_kind.setdefault(teacher, {})[kind] = losses[:, column]
        terms = unic_terms(
            by_kind,
            self._draws(batch) if self.training else None,
            drop_probability=self.drop_probability,
            weights=self.weights,
            image_weights=p.image_weights,
        )
        sizes = [len(labels) for _, labels in batch.parts]
        means = {name: [part.mean() for part in values.split(sizes)] for name, values in terms.items()}
        found = {d: {name: values[i] for name, values in means.items()} for i, (d, _) in enumerate(batch.parts)}
        if self.labelled is None:
            return found
        udon = self.labelled.terms_of(model, model.scaled(tokens[-1]["class"].float()), batch)
        for domain, unic in found.items():
            unic["unic"] = unic.pop("total")
            total = udon[domain]["total"] + p.w_unic * unic["unic"]
            found[domain] = udon[domain] | unic | {"total": total}
        return found

    def _ask(self, batch: Batch, n_positions: int) -> dict[str, dict[Kind, Tensor]]:
        """What the teachers say of our images, patches on the student's grid."""
        if self._features is None:
            return {name: t(batch.images, n_positions, batch.precision) for name, t in self._teachers.items()}
        return {
            name: {kind: resample(value, n_positions) if kind == "patches" else value for kind, value in tokens.items()}
            for name, tokens in self._features(batch).items()
        }

    def _draws(self, batch: Batch) -> Float64[Tensor, "batch others"]:
        """The step's own draws, the same in every process and after every resume."""
        generator = torch.Generator().manual_seed((self.params.seed + 1) * 2**31 + batch.number)
        return torch.rand(batch.n_images, len(self._teachers) - 1, generator=generator, dtype=torch.float64)
