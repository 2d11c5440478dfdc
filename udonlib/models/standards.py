"""Standardising what frozen teachers say, so that none of them outweighs the others by the scale of its features.

| name | what | source |
|---|---|---|
| `RunningStandard` | running mean and deviation of each dimension | UNIC sec. 3.2 |
| `BatchStandard` | the batch's own | |
| `FixedStandard` | those of the first batches | |
| `IsotropicStandard` | one scale, after a rotation that makes variances equal | PHI-S (ICLR 2025) |
| `Standards` | one for each teacher and kind of token | |

Statistics are sums over all processes, and buffers, so that checkpoints keep them. Pinned by `unic.npz` of the golden
numbers. The original standardises a batch by the statistics from before it, so that the first one is raw
(`update="after"`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from udonlib.models.heads import ByDomain
from udonlib.models.ladder import Kind, Tokens, Widths

EPS = 1e-6  # added to deviations when they are measured, and again when they divide
Sums = Callable[[Tensor], Tensor]  # of the same tensor of all processes; what it is given, for one process


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def _moments(rows: Float[Tensor, "n dim"], sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations of the rows of all processes, in two passes, which lose no digits."""
    first = sums(torch.cat([rows.sum(0), rows.new_tensor([len(rows)])]))
    n, mean = first[-1], first[:-1] / first[-1]
    return n, mean, sums((rows - mean).square().sum(0))


class RunningStandard(nn.Module):
    """Standardise by running statistics of each dimension.

        out = (x - mean) / (deviation + eps)
        statistics <- (1 - momentum) statistics + momentum (mean, deviation + eps of the batch and its positions)

    They begin at mean 0 and deviation 1; deviations are unbiased. `after`: a batch is standardised by the statistics
    from before it, as in the original; `before`: by those that it has changed. Source: UNIC sec. 3.2; golden/unic.npz.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, dim: int, *, update: Literal["after", "before"] = "before", sums: Sums = _alone) -> None:
        super().__init__()
        self.update, self.sums = update, sums
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))

    def forward(self, x: Float[Tensor, "batch *position dim"], momentum: float) -> Float[Tensor, "batch *position dim"]:
        """Standardised features. momentum: in [0, 1]; 0 leaves the statistics alone, as in validation."""
        mean, deviation = self.mean, self.deviation
        if momentum > 0:
            n, batch_mean, squares = _moments(x.flatten(0, -2), self.sums)
            batch_deviation = (squares / (n - 1).clamp(min=1)).sqrt() + EPS
            self.mean = (1 - momentum) * mean + momentum * batch_mean
            self.deviation = (1 - momentum) * deviation + momentum * batch_deviation
            if self.update == "before":
                mean, deviation = self.mean, self.deviation
        return (x - mean) / (deviation + EPS)


class BatchStandard(nn.Module):
    """Standardise by the batch's own mean and deviation of each dimension; there is nothing to keep."""

    def __init__(self, dim: int, *, sums: Sums = _alone) -> None:
        super().__init__()
        self.sums = sums

    def forward(self, x: Float[Tensor, "batch *position dim"], momentum: float) -> Float[Tensor, "batch *position dim"]:
        """Standardised features, in validation too; `momentum` is without effect."""
        n, mean, squares = _moments(x.flatten(0, -2), self.sums)
        return (x - mean) / ((squares / (n - 1).clamp(min=1)).sqrt() + EPS)


class FixedStandard(nn.Module):
    """Standardise by the mean and deviation of each dimension over the first batches, which then stay.

    Until then by those of the batches so far, the batch itself included.

    Args:
        n_batches: that are measured, at least 1.
    """

    n: Tensor
    mean: Tensor
    squares: Tensor
    n_seen: Tensor

    def __init__(self, dim: int, *, n_batches: int = 100, sums: Sums = _alone) -> None:
        super().__init__()
        self.n_batches, self.sums = n_batches, sums
        self.register_buffer("n_seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("n", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("squares", torch.zeros(dim))

    def forward(self, x: Float[Tensor, "batch *position dim"], momentum: float) -> Float[Tensor, "batch *position dim"]:
        """Standardised features. momentum: 0 measures nothing, as in validation; else without effect."""
        if momentum > 0 and self.n_seen < self.n_batches:
            n, mean, squares = _moments(x.flatten(0, -2), self.sums)
            both, apart = self.n + n, mean - self.mean  # two samples' moments as one's
            self.mean = self.mean + apart * n / both
            self.squares = self.squares + squares + apart.square() * self.n * n / both
            self.n, self.n_seen = both, self.n_seen + 1
        if self.n_seen == 0:
            return x
        return (x - self.mean) / ((self.squares / (self.n - 1).clamp(min=1)).sqrt() + EPS)


class IsotropicStandard(nn.Module):
    """Standardise by one scale for all dimensions, after a rotation that gives each of them the same variance.

        out = R (x - mean) / (scale + eps)      scale^2 = mean_c variance_c      (R C R')_ii = scale^2 for all i

    C is the covariance over the first batches. Unlike dimensions that are scaled one by one, features keep their shape:
    distances among them change by one factor only. Until C is known, which is when the last of those batches has been
    seen, R is the identity. R is a chain of rotations in planes, each of which brings one dimension to the mean
    variance; the paper's, Hadamard's matrix after the principal axes, has the same property, in those sizes in which
    there is one. Source: PHI-S (ICLR 2025) sec. 3.4.

    Args:
        n_batches: that are measured, at least 1.
    """

    n: Tensor
    mean: Tensor
    products: Tensor
    rotation: Tensor
    n_seen: Tensor

    def __init__(self, dim: int, *, n_batches: int = 100, sums: Sums = _alone) -> None:
        super().__init__()
        self.n_batches, self.sums = n_batches, sums
        self.register_buffer("n_seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("n", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("products", torch.zeros(dim, dim))
        self.register_buffer("rotation", torch.eye(dim))

    def forward(self, x: Float[Tensor, "batch *position dim"], momentum: float) -> Float[Tensor, "batch *position dim"]:
        """Standardised features. momentum: 0 measures nothing, as in validation; else without effect."""
        if momentum > 0 and self.n_seen < self.n_batches:
            rows = x.flatten(0, -2)
            n, mean, _ = _moments(rows, self.sums)
            centred = rows - mean
            both, apart = self.n + n, mean - self.mean
            self.mean = self.mean + apart * n / both
            self.products = self.products + self.sums(centred.mT @ centred) + apart.outer(apart) * self.n * n / both
            self.n, self.n_seen = both, self.n_seen + 1
            if self.n_seen == self.n_batches:
                self.rotation = equalising_rotation(self.products / (self.n - 1).clamp(min=1)).to(x)
        if self.n_seen == 0:
            return x
        scale = (self.products.diagonal().mean() / (self.n - 1).clamp(min=1)).sqrt()
        return (x - self.mean) @ self.rotation.mT / (scale + EPS)


def equalising_rotation(covariance: Float[Tensor, "dim dim"]) -> Float64[Tensor, "dim dim"]:
    """A rotation R for which all variances, the diagonal of R C R', are the same: their mean.

    There is one for every symmetric C (Schur and Horn): as long as a variance lies above the mean and another below it,
    turning in the plane of the two brings the first to it. dim - 1 turns of a row and a column each.
    """
    c = covariance.double().cpu().clone()
    rotation = torch.eye(len(c), dtype=torch.float64)
    target = c.diagonal().mean()
    for _ in range(len(c) - 1):
        above, below = int(c.diagonal().argmax()), int(c.diagonal().argmin())
        a, b, between = c[above, above] - target, c[below, below] - target, c[above, below]
        if not a > 0 > b:
            break
        # a cos^2 + 2 between cos sin + b sin^2 = 0, solved for the tangent; a b < 0, so that there is a solution
        tangent = (-between - (between.square() - a * b).sqrt()) / b
        cos = 1 / (1 + tangent.square()).sqrt()
        turn = torch.stack([torch.stack([cos, cos * tangent]), torch.stack([-cos * tangent, cos])])
        pair = [above, below]
        c[pair] = turn @ c[pair]
        c[:, pair] = c[:, pair] @ turn.mT
        c[above, above] = target  # exactly, so that it is not chosen again
        rotation[pair] = turn @ rotation[pair]
    return rotation


class RawStandard(nn.Module):
    """Features as they are."""

    def __init__(self, dim: int, *, sums: Sums = _alone) -> None:
        super().__init__()

    def forward(self, x: Float[Tensor, "batch *position dim"], momentum: float) -> Float[Tensor, "batch *position dim"]:
        """The features. `momentum` is without effect."""
        return x


# All are called with (dim, sums=...), and the options that they have.
STANDARDS: Mapping[str, Callable[..., nn.Module]] = {
    "running": RunningStandard,
    "batch": BatchStandard,
    "fixed": FixedStandard,
    "isotropic": IsotropicStandard,
    "none": RawStandard,
}


class Standards(nn.Module):
    """The standard of each teacher and kind. `state_dict()` is what a checkpoint keeps of it.

    Args:
        widths: of the features that each teacher counts, by kind.
        how: a name of `STANDARDS`.
        sums: adds up a tensor of all processes.
        options: of that standard.
    """

    def __init__(self, widths: Widths, how: str = "running", *, sums: Sums = _alone, **options: object) -> None:
        super().__init__()
        self.of = ByDomain(
            {
                teacher: nn.ModuleDict(
                    {kind: STANDARDS[how](width, sums=sums, **options) for kind, width in kinds.items()}
                )
                for teacher, kinds in sorted(widths.items())
            }
        )

    @torch.no_grad()
    def forward(self, features: Mapping[str, Tokens], momentum: float) -> dict[str, dict[Kind, Tensor]]:
        """Targets from the teachers' features: those that count, standardised, in float32.

        Args:
            momentum: of this step, see `cosine`; 0 leaves all statistics alone.
        """
        return {
            teacher: {kind: standard(features[teacher][kind].float(), momentum) for kind, standard in kinds.items()}
            for teacher, kinds in self.of.items()
        }
