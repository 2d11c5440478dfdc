"""Weights of other makers' encoders into a `Backbone`, complete or not at all; and ours, written and read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn

from udonlib import weightfiles
from udonlib.backbones import Backbone, timm
from udonlib.errors import UserError, nearest
from udonlib.layouts import AUGREG, OPENAI_CLIP, Layout, Source, take
from udonlib.storage import replacing

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def load_backbone_weights(backbone: Backbone, path: str | Path) -> None:
    """Fill a backbone with the weights of a file, all of them, and take over the image statistics that they expect.

    | file | from | mean and deviation | skipped |
    |---|---|---|---|
    | .npz | AugReg's released vision transformers | 0.5 | head, pre_logits |
    | .npy | OpenAI's CLIP, pickled by name | CLIP's | text encoder, visual.proj |
    | .safetensors | `save_backbone_weights` | the file's, if it has them | - |

    Positions made for another image size are resampled as timm resamples those of its own releases: the grid
    bicubically with antialiasing, the class token's left alone. The class token after the last norm is the feature.
    Source: pinned by golden/backbones.

    Raises:
        UserError: one message that names the file and, where it is about one, the key: an unknown kind of file, a
            damaged one, a key that is missing or left over, another shape (such as another patch size), values that
            are not finite numbers, another activation or layer-norm epsilon than the weights were trained with.
    """
    path = Path(path).expanduser()
    if path.suffix == ".safetensors":
        _load_own(backbone, path)
        return
    kinds = {".npz": (AUGREG, weightfiles.read_npz), ".npy": (OPENAI_CLIP, weightfiles.read_pickled_arrays)}
    if path.suffix not in kinds:
        valid = "AugReg's .npz, CLIP's .npy, our .safetensors"
        raise UserError(f"{path}: unknown kind of weights {path.suffix or 'without ending'!r}; valid: {valid}")
    layout, read = kinds[path.suffix]
    encoder = backbone.encoder
    if not isinstance(encoder, timm.models.VisionTransformer):
        raise UserError(f"{path}: holds {layout.title}, but backbone {backbone.name!r} is no vision transformer")
    arrays = read(path)
    positions_key = layout.prefix + layout.names["pos_embed"]
    shapes = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    if "pos_embed" in shapes:
        found = arrays.get(positions_key)
        shapes["pos_embed"] = (1, found.shape[-2] if found is not None and found.ndim > 1 else 1, encoder.embed_dim)
    sources: dict[str, Source] = {}
    for ours, shape in shapes.items():
        source = layout.source(ours, shape, encoder.blocks[0].attn.num_heads)
        if source is None:
            raise UserError(f"{path}: holds {layout.title}, which has no {ours!r} as backbone {backbone.name!r} does")
        sources[ours] = source
    state = take(path, arrays, sources, skipped=layout.skipped, owner=f"backbone {backbone.name!r}")
    _check_arithmetic(path, backbone, layout)
    _fill(path, backbone, {f"encoder.{ours}": value for ours, value in state.items()}, positions_key)
    backbone.mean, backbone.std = layout.statistics


def save_backbone_weights(backbone: Backbone, path: str | Path, *, half: bool = False) -> None:
    """Write a backbone's state as safetensors, with its name, image statistics and activation as metadata.

    Args:
        path: ends in ".safetensors"; replaced whole, or left as it was.
        half: store float16 instead of float32: half the size, relative errors up to 2^-11. Tensors with values beyond
            its range (65,504) stay float32.

    Raises:
        UserError: a path with another ending.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: expected a name that ends in .safetensors")
    state = {name: value.detach().cpu().contiguous().clone() for name, value in backbone.state_dict().items()}
    for name, value in state.items():
        if half and value.dtype == torch.float32 and value.half().isfinite().all():
            state[name] = value.half()
    facts = {"name": backbone.name, "mean": backbone.mean, "std": backbone.std, "activation": activation(backbone)}
    with replacing(path) as file:
        file.write(save(state, {fact: json.dumps(value) for fact, value in facts.items()}))


def activation(backbone: Backbone) -> str | None:
    """Name the nonlinearity of a vision transformer's blocks by what it computes; None for other encoders."""
    if not isinstance(backbone.encoder, timm.models.VisionTransformer):
        return None
    act = getattr(backbone.encoder.blocks[0].mlp, "act", nn.Identity())
    points = torch.linspace(-4, 4, 65, device="cpu")
    same = [name for name, known in ACTIVATIONS.items() if torch.allclose(act(points), known(points), atol=1e-6)]
    return same[0] if same else type(act).__name__


def _load_own(backbone: Backbone, path: Path) -> None:
    found, facts = weightfiles.read_safetensors(path)
    owner = f"backbone {backbone.name!r}"
    architecture = str(facts.get("name", backbone.name)).split(".")[0]
    if architecture != backbone.name.split(".")[0]:
        raise UserError(f"{path}: holds the weights of {facts['name']!r}, found {owner}")
    wanted = backbone.state_dict()
    for name in wanted:
        if name not in found:
            raise UserError(f"{path}: key {name!r} is missing, which {owner} needs; {nearest(name, found)}")
    for name, value in found.items():
        if name not in wanted:
            raise UserError(f"{path}: key {name!r} has no place in {owner}")
        if value.is_floating_point() != wanted[name].is_floating_point():
            raise UserError(f"{path}: key {name!r} holds {value.dtype}, {owner} needs {wanted[name].dtype}")
        if not value.isfinite().all():
            raise UserError(f"{path}: key {name!r} holds values that are not finite")
    statistics = [_three_numbers(path, facts, fact, getattr(backbone, fact)) for fact in ("mean", "std")]
    trained_with = facts.get("activation")
    if trained_with is not None and trained_with != activation(backbone):
        raise UserError(_other_activation(path, backbone, str(trained_with)))
    _fill(path, backbone, found, "encoder.pos_embed")
    backbone.mean, backbone.std = statistics


def _three_numbers(path: Path, facts: Mapping[str, Any], fact: str, otherwise: tuple[float, ...]) -> tuple[float, ...]:
    values = facts.get(fact, list(otherwise))
    numbers = isinstance(values, list) and len(values) == 3 and all(type(v) in (int, float) for v in values)
    if not numbers or not all(math.isfinite(v) and (fact == "mean" or v > 0) for v in values):
        raise UserError(f"{path}: metadata {fact!r} is {values!r}, expected three numbers, one per channel")
    return tuple(float(v) for v in values)


def _check_arithmetic(path: Path, backbone: Backbone, layout: Layout) -> None:
    """Refuse an encoder whose parts without weights compute something else than what the weights were trained with."""
    if activation(backbone) != layout.activation:
        raise UserError(_other_activation(path, backbone, layout.activation))
    for name, module in backbone.encoder.named_modules():
        if isinstance(module, nn.LayerNorm) and module.eps != layout.eps:
            raise UserError(f"{path}: trained with layer norms of eps {layout.eps}, but {name!r} has {module.eps}")


def _other_activation(path: Path, backbone: Backbone, trained_with: str) -> str:
    return (
        f"{path}: trained with the activation {trained_with!r}, but backbone {backbone.name!r} has "
        f"{activation(backbone)!r}; set backbone_args={{'act_layer': {trained_with!r}}}"
    )


def _fill(path: Path, backbone: Backbone, state: Mapping[str, Tensor], positions_key: str) -> None:
    """Copy a complete state into the backbone, a vision transformer's positions resampled to the backbone's grid."""
    ours = "encoder.pos_embed"
    wanted = backbone.state_dict()
    fitting = dict(state)
    vision_transformer = isinstance(backbone.encoder, timm.models.VisionTransformer)
    if vision_transformer and ours in wanted and fitting[ours].shape[::2] == wanted[ours].shape[::2]:
        fitting[ours] = _resampled(path, backbone.encoder, fitting[ours].float(), positions_key)
    for name, value in fitting.items():
        if value.shape != wanted[name].shape:
            needed = list(wanted[name].shape)
            raise UserError(f"{path}: key {name!r} has shape {list(value.shape)}, {backbone.name!r} needs {needed}")
    backbone.load_state_dict(fitting)


def _resampled(
    path: Path, encoder: Any, positions: Float[Tensor, "1 tokens dim"], key: str
) -> Float[Tensor, "1 positions dim"]:
    if positions.shape == encoder.pos_embed.shape:
        return positions
    n_prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    side = math.isqrt(max(positions.shape[1] - n_prefix, 0))
    if side == 0 or side**2 != positions.shape[1] - n_prefix:
        raise UserError(
            f"{path}: key {key!r} holds {positions.shape[1]} positions, expected {n_prefix} and those of a square grid"
        )
    grid = list(encoder.patch_embed.grid_size)
    return timm.layers.resample_abs_pos_embed(positions, grid, [side, side], n_prefix)
