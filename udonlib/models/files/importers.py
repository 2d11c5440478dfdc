"""Weights of other makers' encoders into a `Backbone`, complete or not at all; and ours, written and read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn

from udonlib.errors import UserError
from udonlib.files import replacing
from udonlib.models.backbones import Backbone, timm
from udonlib.models.files import weight_files
from udonlib.models.files.layouts import AUGREG, OPEN_CLIP, OPENAI_CLIP, Layout, Source, take
from udonlib.models.files.onnx_files import read_onnx_weights
from udonlib.models.files.state_dicts import find, mappings
from udonlib.models.files.state_dicts import take as take_state
from udonlib.models.files.torch_files import read_torch
from udonlib.models.files.weight_files import Arrays

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
CLIP_BEGINS = "visual.class_embedding"
# Files that the hub keeps with a description beside them.
HUB_NAMES = ("model.safetensors", "pytorch_model.bin")


def load_backbone_weights(backbone: Backbone, path: str | Path) -> None:
    """Fill a backbone with the weights of a file, all of them, and take over the image statistics that they expect.

    | content | from | mean and deviation |
    |---|---|---|
    | npz | AugReg's released vision transformers | 0.5 |
    | npy | OpenAI's CLIP, pickled by name | CLIP's |
    | safetensors | `save_backbone_weights` | the file's |
    | safetensors, or of torch.save | timm, the hub, training scripts, CLIP, DINOv2, efficientnet_pytorch: see \
      `state_dicts` | those that a `config.json` or `preprocessor_config.json` of the hub beside the file says; \
      CLIP's; the backbone's own |
    | of torch.save | a checkpoint of a run of ours | the run's |
    | ONNX | a graph that was exported from transformers or timm, read and not executed | the backbone's own |

    The kind is seen in the content, whatever the name ends in. Positions made for another image size are resampled as
    timm resamples those of its own releases. Classifiers and text encoders are left aside. The backbone is filled as a
    whole, or left as it was. Source: pinned by golden/backbones.

    What was taken, what was left aside, and the statistics are told by `backbone.loaded`.

    Raises:
        UserError: one message that names the file: an unknown kind of file, a damaged one; how many keys are missing or
            left over, with the nearest; another shape (such as another patch size), values that are not finite numbers,
            another activation or layer-norm epsilon than the weights were trained with.
    """
    backbone.loaded = _load(backbone, Path(path).expanduser())


def _load(backbone: Backbone, path: Path) -> str:
    kind = weight_files.kind_of_weights(path)
    if kind == "npz":
        return _load_layout(backbone, path, AUGREG, weight_files.read_npz(path))
    if kind == "npy":
        return _load_layout(backbone, path, OPENAI_CLIP, weight_files.read_pickled_arrays(path))
    readers: Mapping[str, Callable[[Path], tuple[Any, dict[str, Any]]]] = {
        "safetensors": weight_files.read_safetensors,
        "torch": _read_checkpoint,
        "onnx": lambda path: (read_onnx_weights(path), {}),
    }
    content, facts = readers[kind](path)
    for _, tensors in mappings(content):
        for name in tensors:
            if name.endswith(CLIP_BEGINS):
                prefix = name.removesuffix(CLIP_BEGINS)
                arrays = {n[len(prefix) :]: _array(v) for n, v in tensors.items() if n.startswith(prefix)}
                layout = OPENAI_CLIP if "input_resolution" in arrays else OPEN_CLIP
                return _load_layout(backbone, path, layout, arrays)
    return _load_state(backbone, path, content, _facts_beside(backbone, path) | facts)


def _load_layout(backbone: Backbone, path: Path, layout: Layout, arrays: Arrays) -> str:
    encoder = backbone.encoder
    if not isinstance(encoder, timm.models.VisionTransformer):
        raise UserError(f"{path}: holds {layout.title}, but backbone {backbone.name!r} is no vision transformer")
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
    if "pos_embed" in state:
        state["pos_embed"] = _resampled(path, encoder, state["pos_embed"], positions_key)
    encoder.load_state_dict(state)
    backbone.mean, backbone.std = layout.statistics
    used = {name for source in sources.values() for name in source.names}
    return _said(path, backbone, len(used), f"of {layout.title}", [], len(arrays) - len(used))


def _load_state(backbone: Backbone, path: Path, content: Any, facts: Mapping[str, Any]) -> str:
    owner = f"backbone {backbone.name!r}"
    architecture = str(facts.get("name", backbone.name)).split(".")[0]
    if architecture != backbone.name.split(".")[0]:
        raise UserError(f"{path}: holds the weights of {facts['name']!r}, found {owner}")
    statistics = [_three_numbers(path, facts, fact, getattr(backbone, fact)) for fact in ("mean", "std")]
    trained_with = facts.get("activation")
    if trained_with is not None and trained_with != activation(backbone):
        raise UserError(_other_activation(path, backbone, str(trained_with)))
    match = find(content, backbone.encoder)
    inside = f"{path}: in '{match.where}': " if match.where else f"{path}: "
    try:
        state, heads = take_state(match, backbone.encoder, owner)
    except UserError as error:
        raise UserError(f"{inside}{error}") from error
    backbone.encoder.load_state_dict(state)
    backbone.mean, backbone.std = statistics
    where = f"in '{match.where}'" if match.where else ""
    return _said(path, backbone, len(match.tensors) - len(heads), where, heads, match.n_beside)


def _said(path: Path, backbone: Backbone, n_taken: int, where: str, heads: Sequence[str], n_beside: int) -> str:
    """Say what was loaded, in a line."""
    parts = [f"weights: {n_taken} tensors of {path.name} {where}".strip()]
    if heads:
        parts.append(f"without {', '.join(heads[:4])}{', ..' if len(heads) > 4 else ''}")
    if n_beside:
        parts.append(f"{n_beside} others left aside")
    mean, std = (" ".join(f"{value:.4g}" for value in dict.fromkeys(v)) for v in (backbone.mean, backbone.std))
    return f"{'; '.join(parts)}; images normalised by mean {mean}, deviation {std}"


def _read_checkpoint(path: Path) -> tuple[Any, dict[str, Any]]:
    """Read what torch.save wrote; a checkpoint of ours says which statistics its images had."""
    content = read_torch(path)
    said = content.get("statistics") if isinstance(content, Mapping) else None
    if isinstance(said, list | tuple) and len(said) == 2:
        return content, {fact: list(values) for fact, values in zip(("mean", "std"), said, strict=True)}
    return content, {}


def _facts_beside(backbone: Backbone, path: Path) -> dict[str, Any]:
    """What the hub's files beside its weights say about the images: timm's of the same architecture, transformers'."""
    if path.name not in HUB_NAMES:
        return {}
    facts: dict[str, Any] = {}
    for name, of_timm in (("preprocessor_config.json", False), ("config.json", True)):
        try:
            said = json.loads((path.parent / name).read_bytes())
            if of_timm and str(said["architecture"]).split(".")[0] != backbone.name.split(".")[0]:
                continue
            values = said["pretrained_cfg"] if of_timm else {"mean": said["image_mean"], "std": said["image_std"]}
            facts |= {fact: values[fact] for fact in ("mean", "std")}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # none there, or of something else
            continue
    return facts


def _array(value: Tensor) -> np.ndarray:
    return (value.float() if value.is_floating_point() else value).numpy()


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


def _three_numbers(path: Path, facts: Mapping[str, Any], fact: str, otherwise: tuple[float, ...]) -> tuple[float, ...]:
    values = facts.get(fact, list(otherwise))
    numbers = isinstance(values, list) and len(values) == 3 and all(type(v) in (int, float) for v in values)
    if not numbers or not all(math.isfinite(v) and (fact == "mean" or v > 0) for v in values):
        raise UserError(f"{path}: metadata {fact!r} is {values!r}, expected three numbers, one per channel")
    return tuple(float(v) for v in values)


def _check_arithmetic(path: Path, backbone: Backbone, layout: Layout) -> None:
    """Refuse an encoder whose parts without weights compute something else than what the weights were trained with."""
    if layout.activation is not None and activation(backbone) != layout.activation:
        raise UserError(_other_activation(path, backbone, layout.activation))
    for name, module in backbone.encoder.named_modules():
        if isinstance(module, nn.LayerNorm) and module.eps != layout.eps:
            raise UserError(f"{path}: trained with layer norms of eps {layout.eps}, but {name!r} has {module.eps}")


def _other_activation(path: Path, backbone: Backbone, trained_with: str) -> str:
    return (
        f"{path}: trained with the activation {trained_with!r}, but backbone {backbone.name!r} has "
        f"{activation(backbone)!r}; set backbone_args={{'act_layer': {trained_with!r}}}"
    )


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
