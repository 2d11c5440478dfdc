"""Projection heads on a backbone's feature, and the class prototypes they are trained with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Head(nn.Module):
    """Map features to unit embeddings: one linear layer, or an MLP.

        e = unit(L_n g(N(L_{n-1} ... g(N(L_1 x)))))     N layer norm (eps 1e-6), g tanh-GELU; nothing after the last L

    Weights start as a truncated normal of variance 1 / fan_in, biases at 0. Source: UDON's reference; heads.npz.

    Args:
        in_dim: size of a feature.
        out_dim: size of an embedding.
        hidden_dims: sizes of the hidden layers; () is the paper's single linear layer.
        generator: source of the initial weights; the global one if None.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dims: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.out_dim = out_dim
        layers: list[nn.Module] = []
        for width in hidden_dims:
            layers += [nn.Linear(in_dim, width), nn.LayerNorm(width, eps=1e-6), nn.GELU(approximate="tanh")]
            in_dim = width
        self.layers = nn.Sequential(*layers, nn.Linear(in_dim, out_dim))
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                _truncated_normal_(layer.weight, generator)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch out_dim"]:
        """Embeddings of features: unit rows."""
        return unit(self.layers(features))


class FeatureHead(nn.Module):
    """The feature itself as embedding, scaled to unit norm: nothing to learn."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_dim = dim

    def forward(self, features: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Features as unit rows."""
        return unit(features)


class ByDomain(nn.Module):
    """Modules or parameters by the name of a domain, whatever that is.

    torch's own dictionaries refuse a name that is an attribute of theirs, such as "type" or "children", and any with a
    dot; a folder may have such a name. In state dicts, whose keys are cut at dots, "/" stands for a dot: no folder's
    name holds one. All other names stand there as they are, as in torch's dictionaries.
    """

    def __init__(self, members: Mapping[str, nn.Module] | Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, self.key(name), member)

    @staticmethod
    def key(domain: str) -> str:
        """The domain's name in a state dict's keys."""
        return domain.replace(".", "/")

    @staticmethod
    def domain(key: str) -> str:
        """The domain of a name in a state dict's keys."""
        return key.replace("/", ".")

    def __setattr__(self, name: str, value: object) -> None:
        """Set a member, or else an attribute of the module, also where both have one name, as "training"."""
        if isinstance(value, nn.Parameter):
            self._parameters[name] = value
        elif isinstance(value, nn.Module):
            self._modules[name] = value
        else:
            object.__setattr__(self, name, value)

    def __getitem__(self, domain: str) -> Any:
        return {**self._parameters, **self._modules}[self.key(domain)]

    def __contains__(self, domain: str) -> bool:
        return self.key(domain) in self._parameters or self.key(domain) in self._modules

    def __len__(self) -> int:
        return len(self._parameters) + len(self._modules)

    def __iter__(self) -> Iterator[str]:
        return map(self.domain, (*self._parameters, *self._modules))

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yield domain and member."""
        return ((domain, self[domain]) for domain in self)


def _truncated_normal_(weight: Tensor, generator: torch.Generator | None) -> None:
    """Fill with a normal of variance 1 / fan_in, cut at two deviations; .8796 restores the variance after the cut."""
    std = 1 / math.sqrt(weight.shape[1]) / 0.87962566
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


def prototypes(n_classes: int, dim: int, generator: torch.Generator | None = None) -> nn.Parameter:
    """Class vectors [n_classes, dim], uniform in +-sqrt(3 / dim), that is of expected squared norm 1."""
    bound = math.sqrt(3 / dim)
    return nn.Parameter(torch.empty(n_classes, dim).uniform_(-bound, bound, generator=generator))


def unit(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """Scale each row to Euclidean norm 1: x / ||x||. A zero row stays zero instead of becoming NaN."""
    return F.normalize(x, dim=-1)


FEW = 8192  # prototypes; of more, it is reading and writing them that takes the time
RUN = 4096  # of these that are worked on at a time
LEAST = 1e-12  # norm that a row is divided by, as in F.normalize


def cosine_logits(
    embeddings: Float[Tensor, "batch dim"], prototypes: Float[Tensor, "classes dim"]
) -> Float[Tensor, "batch classes"]:
    """Cosine between each embedding and each class prototype, in [-1, 1].

        c = e W / ||W||     gradients flow through ||W||

    Args:
        embeddings: unit rows.
        prototypes: one row per class, of any norm.
    """
    if len(prototypes) <= FEW:
        return embeddings @ unit(prototypes).mT
    return _Cosines.apply(embeddings, prototypes)


class _Cosines(torch.autograd.Function):
    """The same without copies of the prototypes, and half of the memory, some thousand rows at a time, which the
    processor's caches hold until all is done with them.

        c_ij = e_i w_j / n_j     n_j = ||w_j||
        de_i = sum_j g_ij w_j / n_j     dw_j = sum_i g_ij e_i / n_j - (sum_i g_ij c_ij) w_j / n_j^2
    """

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, prototypes: Tensor) -> Tensor:
        norms = prototypes.new_empty(len(prototypes))
        cosines = prototypes.new_empty(len(embeddings), len(prototypes))
        for rows in _runs(prototypes):
            few = prototypes[rows]
            norms[rows] = torch.linalg.vector_norm(few, dim=1).clamp_min_(LEAST)
            cosines[:, rows] = (few @ embeddings.mT).mT / norms[rows]
        ctx.save_for_backward(embeddings, prototypes, norms, cosines)
        return cosines

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        embeddings, prototypes, norms, cosines = ctx.saved_tensors
        of_embeddings = torch.zeros_like(embeddings.mT) if ctx.needs_input_grad[0] else None
        of_prototypes = torch.empty_like(prototypes) if ctx.needs_input_grad[1] else None
        for rows in _runs(prototypes):
            few, scaled = prototypes[rows], gradient[:, rows] / norms[rows]
            if of_embeddings is not None:
                of_embeddings.addmm_(few.mT, scaled.mT)
            if of_prototypes is not None:
                along = (scaled * cosines[:, rows]).sum(0).div_(norms[rows])
                torch.mm(scaled.mT, embeddings, out=of_prototypes[rows]).addcmul_(few, along[:, None], value=-1)
        return None if of_embeddings is None else of_embeddings.mT, of_prototypes


def _runs(prototypes: Tensor) -> Iterator[slice]:
    """Rows that are worked on at a time: on a GPU, which has other caches, all."""
    n_rows = RUN if prototypes.device.type == "cpu" else len(prototypes)
    return (slice(first, first + n_rows) for first in range(0, len(prototypes), n_rows))
