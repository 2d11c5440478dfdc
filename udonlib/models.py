"""The universal embedding model: a backbone, one student head, a teacher head per domain, prototypes for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from udonlib.augmentation import normalise
from udonlib.backbones import Backbone
from udonlib.errors import UserError
from udonlib.heads import Head, prototypes
from udonlib.losses import cosine_logits, unit

Images = Float[Tensor, "batch 3 height width"] | UInt8[Tensor, "batch 3 height width"]


@dataclass(frozen=True)
class DomainOutputs:
    """What the model says of images of one domain. Without teachers the last two are None."""

    student: Float[Tensor, "batch student_dim"]
    student_cosines: Float[Tensor, "batch classes"]
    teacher: Float[Tensor, "batch teacher_dim"] | None = None
    teacher_cosines: Float[Tensor, "batch classes"] | None = None


class EmbeddingModel(nn.Module):
    """One embedding for many domains, trained together with a specialist per domain.

        feature b = unit(backbone(x))     student e_s = unit(L_s b)     teacher of domain d  e_t = unit(L_d b)

    Both are scored against prototypes of the domain's training classes. Source: UDON sec. 3; pinned by model_vit.npz
    and model_clip.npz.

    Args:
        backbone: the encoder that all heads share.
        n_classes: training classes of each domain, in the order of the domains.
        student_dim: size of the student's embedding.
        teacher_dim: size of each teacher's embedding; 0 for a model without teachers.
        hidden_dims: hidden layers of every head.
        normalise_features: whether heads see unit features (the paper) or the backbone's own scale.
        seed: of the initial weights of heads and prototypes.
    """

    def __init__(
        self,
        backbone: Backbone,
        n_classes: Mapping[str, int],
        *,
        student_dim: int = 64,
        teacher_dim: int = 256,
        hidden_dims: Sequence[int] = (),
        normalise_features: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name in n_classes:
            if "." in name or name in nn.ModuleDict.__dict__:
                raise UserError(f"domain {name!r}: a domain's name must not contain '.' nor be a Python method name")
        generator = torch.Generator().manual_seed(seed)
        dim = backbone.feature_dim
        self.domains = tuple(n_classes)
        self.normalise_features = normalise_features
        self.backbone = backbone
        self.student = Head(dim, student_dim, hidden_dims, generator)
        self.student_prototypes = nn.ParameterDict(
            {d: prototypes(n, student_dim, generator) for d, n in n_classes.items()}
        )
        taught = n_classes if teacher_dim else {}
        self.teachers = nn.ModuleDict({d: Head(dim, teacher_dim, hidden_dims, generator) for d in taught})
        self.teacher_prototypes = nn.ParameterDict(
            {d: prototypes(n, teacher_dim, generator) for d, n in taught.items()}
        )

    def features(
        self, images: Images, precision: torch.dtype = torch.float32, frozen: bool = False
    ) -> Float[Tensor, "batch feature_dim"]:
        """Features of images whose values lie in 0..255 (any dtype), in float32.

        Args:
            precision: bfloat16 runs the backbone under autocast; heads and losses stay float32.
            frozen: compute without a graph.
        """
        normalised = normalise(images, self.backbone.mean, self.backbone.std)
        normalised = normalised.contiguous(memory_format=torch.channels_last)  # convolutions are twice as fast on CPUs
        low = precision != torch.float32
        autocast = torch.autocast(normalised.device.type, precision) if low else nullcontext()
        with autocast, torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            features = self.backbone(normalised).float()
        return unit(features) if self.normalise_features else features

    def embed(self, images: Images, precision: torch.dtype = torch.float32) -> Float[Tensor, "batch student_dim"]:
        """The universal embedding of images with values in 0..255: unit rows."""
        return self.student(self.features(images, precision))

    def outputs(self, features: Float[Tensor, "batch feature_dim"], domain: str) -> DomainOutputs:
        """Embeddings and cosines of images of one domain, from their features."""
        student = self.student(features)
        student_cosines = cosine_logits(student, self.student_prototypes[domain])
        if domain not in self.teachers:
            return DomainOutputs(student, student_cosines)
        teacher = self.teachers[domain](features)
        return DomainOutputs(student, student_cosines, teacher, cosine_logits(teacher, self.teacher_prototypes[domain]))

    def domain_parameters(self, domain: str) -> list[nn.Parameter]:
        """The parameters that only images of `domain` train."""
        own = [self.student_prototypes[domain]]
        if domain in self.teachers:
            own += [*self.teachers[domain].parameters(), self.teacher_prototypes[domain]]
        return own
