"""Projectors from a student's tokens to the features of its frozen teachers. Trained with it, and then thrown away.

| name | reads | source |
|---|---|---|
| `ladder` | every chosen block, each through an MLP of its own; the sum | UNIC sec. 3.3 |
| `last` | the last block, through one MLP | UNIC sec. 3.2, the plain form |
| `transformer` | the last block's tokens together, through a transformer block | DUNE (CVPR 2025) |

There is one for each teacher and kind of token (`transformer`: for each teacher). All take the tokens of the student's
blocks, and return what they make of them by teacher and kind. They hold no weight of the student's: its state stays
what it would be without them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from udonlib.models.backbones import Kind, Tokens
from udonlib.models.heads import ByDomain

M = TypeVar("M", bound=nn.Module)
KINDS: tuple[Kind, ...] = ("class", "patches")
# Widths of the features that each teacher counts, by kind.
Widths = Mapping[str, Mapping[Kind, int]]


class Ladder(nn.Module):
    """A rung for each chosen block; the teacher sees the sum of what they say.

        out[teacher][kind] = sum_b head_b(tokens_b)        head_b = [N] L(dim_b -> h) [N] gelu L(h -> width)

    tokens_b is what block b gives, before any norm; the patch embedding has no rung. N layer norm (eps 1e-5), gelu
    exact. The encoder's last block has a wider rung than the others. Weights start as a truncated normal of deviation
    0.02, biases at 0. Source: UNIC sec. 3.3; pinned by golden/unic.npz.

    Args:
        dims: width of the tokens of each of the student's blocks. Blocks of a convolutional net differ in it, and in
            their grid: an earlier one's patches are averaged to the grid of the last.
        widths: of the teachers' features; a kind that a teacher does not count has no ladder.
        hidden_dim: h of a rung; 0: a quarter of the last block's width.
        last_hidden_dim: h of the last block's rung; 0: the last block's width.
        blocks: which have a rung, from 0; None: all.
        prenorm, midnorm: layer norms before the first and the second linear layer.
        generator: source of the initial weights; the global one if None.
    """

    def __init__(
        self,
        dims: Sequence[int],
        widths: Widths,
        *,
        hidden_dim: int = 0,
        last_hidden_dim: int = 0,
        blocks: Sequence[int] | None = None,
        prenorm: bool = False,
        midnorm: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        last = len(dims) - 1
        self.blocks = tuple(range(len(dims))) if blocks is None else tuple(blocks)

        def rungs(width: int) -> nn.ModuleDict:
            made = {}
            for block in self.blocks:
                hidden = (last_hidden_dim or dims[last]) if block == last else (hidden_dim or max(1, dims[last] // 4))
                made[str(block)] = _mlp(dims[block], hidden, width, prenorm, midnorm, generator)
            return nn.ModuleDict(made)

        self.heads = ByDomain(
            {
                teacher: nn.ModuleDict({kind: rungs(width) for kind, width in kinds.items()})
                for teacher, kinds in widths.items()
            }
        )

    def forward(self, blocks: Sequence[Tokens]) -> dict[str, dict[Kind, Tensor]]:
        """Features by teacher and kind from the tokens of all of the student's blocks, in their order."""
        tokens = {block: dict(blocks[block]) for block in self.blocks}
        if any("patches" in kinds for _, kinds in self.heads.items()):
            n_positions = blocks[-1]["patches"].shape[1]
            for rung in tokens.values():
                rung["patches"] = resample(rung["patches"], n_positions)
        return {
            teacher: {
                kind: reduce(torch.add, (rungs[str(block)](tokens[block][kind]) for block in self.blocks))
                for kind, rungs in kinds.items()
            }
            for teacher, kinds in self.heads.items()
        }


class TransformerProjector(nn.Module):
    """A transformer block for each teacher, over class and patch tokens of the last block together.

        out[teacher][kind] = L_kind(block([class; patches])[kind])

    Pre-norm, exact GELU, four times as wide inside; a linear layer for each kind brings the teacher's width.
    Source: DUNE (CVPR 2025) sec. 3.

    Args:
        dims: as for `Ladder`; the last one counts.
        widths: as for `Ladder`.
        head_dim: channels of a head of attention, as near to it as the width can be divided.
    """

    def __init__(
        self, dims: Sequence[int], widths: Widths, *, head_dim: int = 64, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        dim = dims[-1]
        n_heads = next(n for n in range(max(1, round(dim / head_dim)), 0, -1) if dim % n == 0)

        def block() -> nn.Module:
            made = nn.TransformerEncoderLayer(
                dim, n_heads, 4 * dim, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
            )
            return _fresh(made, generator)

        self.blocks = ByDomain({teacher: block() for teacher in widths})
        self.heads = ByDomain(
            {
                teacher: nn.ModuleDict(
                    {kind: _fresh(nn.Linear(dim, width), generator) for kind, width in kinds.items()}
                )
                for teacher, kinds in widths.items()
            }
        )

    def forward(self, blocks: Sequence[Tokens]) -> dict[str, dict[Kind, Tensor]]:
        """Features by teacher and kind from the tokens of the student's blocks, of which the last is read."""
        last = blocks[-1]
        together = torch.cat([last["class"][:, None], last["patches"]], dim=1)
        found: dict[str, dict[Kind, Tensor]] = {}
        for teacher, heads in self.heads.items():
            mixed = self.blocks[teacher](together)
            parts: Tokens = {"class": mixed[:, 0], "patches": mixed[:, 1:]}
            found[teacher] = {kind: head(parts[kind]) for kind, head in heads.items()}
        return found


def last_block(
    dims: Sequence[int],
    widths: Widths,
    *,
    last_hidden_dim: int = 0,
    generator: torch.Generator | None = None,
) -> Ladder:
    """The plain projector: a ladder whose only rung is the last block's."""
    return Ladder(dims, widths, last_hidden_dim=last_hidden_dim, blocks=[len(dims) - 1], generator=generator)


# All are called with (dims, widths, generator=...), and the options that they have.
PROJECTORS: Mapping[str, Callable[..., nn.Module]] = {
    "ladder": Ladder,
    "last": last_block,
    "transformer": TransformerProjector,
}


def resample(patches: Float[Tensor, "batch positions dim"], n_positions: int) -> Float[Tensor, "batch resampled dim"]:
    """Bring the patches of a square grid to another: averaged over areas to a coarser one, bilinear to a finer one.

    Args:
        n_positions: of the grid that is wanted, a square number.

    Raises:
        ValueError: positions of no square grid.
    """
    side, wanted = math.isqrt(patches.shape[1]), math.isqrt(n_positions)
    if side**2 != patches.shape[1] or wanted**2 != n_positions:
        raise ValueError(f"{patches.shape[1]} and {n_positions} positions: expected those of square grids")
    if side == wanted:
        return patches
    maps = patches.mT.unflatten(2, (side, side))
    if wanted < side:
        maps = F.adaptive_avg_pool2d(maps, wanted)
    else:
        maps = F.interpolate(maps, size=(wanted, wanted), mode="bilinear", align_corners=False)
    return maps.flatten(2).mT


def _mlp(
    dim: int, hidden: int, width: int, prenorm: bool, midnorm: bool, generator: torch.Generator | None
) -> nn.Sequential:
    layers: list[nn.Module] = [nn.LayerNorm(dim)] if prenorm else []
    layers += [
        nn.Linear(dim, hidden),
        *([nn.LayerNorm(hidden)] if midnorm else []),
        nn.GELU(),
        nn.Linear(hidden, width),
    ]
    return _fresh(nn.Sequential(*layers), generator)


def _fresh(module: M, generator: torch.Generator | None) -> M:
    """Draw a module's matrices anew from the generator; biases start at 0, norms as they are."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.ndim == 2:
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
    return module
