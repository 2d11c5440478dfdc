"""Where released files keep each parameter of a vision transformer, and in which order of axes.

Every parameter of ours is asked for by its name in the file, so that none is left as it was, and nothing in the file is
left over but what its layout skips.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from udonlib.errors import UserError, nearest
from udonlib.models.files.weight_files import Arrays

NOTHING = r"(?!)"  # the pattern that matches no name


@dataclass(frozen=True)
class Source:
    """Where one of our tensors comes from: its arrays' names in the file, their shape there, and how ours is made."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    convert: Callable[[Sequence[np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class Layout:
    """How one kind of file holds a vision transformer (timm's `VisionTransformer` with a class token).

    Attributes:
        title: what the files are, in words.
        names: our module or parameter -> its name in the file; those of a block without the block's own name.
        block: name of block {} in the file, with the separator behind it.
        flax: kernels are stored [in, out], [height, width, in, out] or by heads; otherwise as in PyTorch.
        flat_tokens: class token and positions are stored without the leading 1.
        activation: the nonlinearity that the weights were trained with; None where files of this kind differ.
        eps: of every layer norm.
        statistics: mean and deviation of the images that the weights expect, in 0..1.
        prefix: before every name.
        skipped: pattern of the names that an encoder has no use for.
    """

    title: str
    names: Mapping[str, str]
    block: str
    flax: bool
    flat_tokens: bool
    activation: str | None
    eps: float
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    prefix: str = ""
    skipped: str = NOTHING

    def source(self, ours: str, shape: Sequence[int], n_heads: int) -> Source | None:
        """Say where our parameter of this name and shape is in the file; None where the file has no such thing."""
        block, module, leaf = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+?)(?:\.(weight|bias))?", ours).groups()  # type: ignore[union-attr]
        prefix = self.prefix + (self.block.format(block) if block else "")
        part = module.removeprefix("attn.") if module in ("attn.qkv", "attn.proj") else ""
        name = self.names.get("attn" if part else module)
        if name is None:
            return None
        name, dim = prefix + name, shape[-1]
        if leaf is None:
            stored = tuple(shape) if not self.flat_tokens else tuple(shape[2:] if ours == "cls_token" else shape[1:])
            return Source((name,), stored, lambda found: found[0].reshape(1, -1, dim))
        if not self.flax:
            torch_names = {"qkv": f"{name}.in_proj_{leaf}", "proj": f"{name}.out_proj.{leaf}", "": f"{name}.{leaf}"}
            return Source((torch_names[part],), tuple(shape), lambda found: found[0])
        flax_leaf = "bias" if leaf == "bias" else "scale" if "norm" in module else "kernel"
        if part == "qkv":
            whose = tuple(f"{name}/{which}/{flax_leaf}" for which in ("query", "key", "value"))
            width = shape[0] // 3
            stored = (n_heads, width // n_heads) if leaf == "bias" else (dim, n_heads, width // n_heads)
            return Source(whose, stored, lambda found: np.concatenate([a.reshape(*a.shape[:-2], -1).T for a in found]))
        if part == "proj" and leaf == "weight":
            stored = (n_heads, dim // n_heads, shape[0])
            return Source((f"{name}/out/kernel",), stored, lambda found: found[0].reshape(-1, found[0].shape[-1]).T)
        name += "/out" if part else ""
        if len(shape) == 4:
            stored = (shape[2], shape[3], shape[1], shape[0])
            return Source((f"{name}/kernel",), stored, lambda found: found[0].transpose(3, 2, 0, 1))
        return Source((f"{name}/{flax_leaf}",), tuple(shape)[::-1], lambda found: found[0].T)


# Ours (timm's): AugReg's files, the reference's own vision transformer, CLIP.
_POSITIONS = "Transformer/posembed_input/pos_embedding"
_NAMES: Mapping[str, tuple[str | None, str | None, str]] = {
    "cls_token": ("cls", "cls", "class_embedding"),
    "pos_embed": (_POSITIONS, _POSITIONS, "positional_embedding"),
    "patch_embed.proj": ("embedding", "embedding", "conv1"),
    "norm_pre": (None, None, "ln_pre"),
    "norm": ("Transformer/encoder_norm", "Transformer/encoder_norm", "ln_post"),
    "norm1": ("LayerNorm_0", "LayerNorm_0", "ln_1"),
    "attn": ("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0", "attn"),
    "norm2": ("LayerNorm_2", "LayerNorm_1", "ln_2"),
    "mlp.fc1": ("MlpBlock_3/Dense_0", "MlpBlock_0/Dense_0", "mlp/c_fc"),
    "mlp.fc2": ("MlpBlock_3/Dense_1", "MlpBlock_0/Dense_1", "mlp/c_proj"),
}


def _names(column: int, separator: str = "/") -> dict[str, str]:
    return {ours: name.replace("/", separator) for ours, row in _NAMES.items() if (name := row[column])}


AUGREG = Layout(
    title="an AugReg vision transformer",
    names=_names(0),
    block="Transformer/encoderblock_{}/",
    flax=True,
    flat_tokens=False,
    activation="gelu_tanh",
    eps=1e-6,
    statistics=((0.5,) * 3, (0.5,) * 3),
    skipped=r"(head|pre_logits)/(kernel|bias)",
)
REFERENCE_VIT = replace(AUGREG, title="the reference's vision transformer", names=_names(1), skipped=NOTHING)
OPENAI_CLIP = Layout(
    title="OpenAI's CLIP",
    names=_names(2, "."),
    prefix="visual.",
    block="transformer.resblocks.{}.",
    flax=False,
    flat_tokens=True,
    activation="quick_gelu",
    eps=1e-5,
    statistics=((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    skipped=r"(?!visual\.).*|visual\.proj",  # the text encoder; the projection into the space shared with text
)
# The same of other makers' CLIP: some of theirs were trained with quick_gelu, some without.
OPEN_CLIP = replace(OPENAI_CLIP, title="CLIP as open_clip stores it", activation=None)
REFERENCE_CLIP = replace(
    OPENAI_CLIP,
    title="the reference's CLIP",
    names=_names(2),
    prefix="",
    block="transformer/resblocks.{}/",
    flax=True,
    skipped=NOTHING,
)


def take(path: Path, arrays: Arrays, sources: Mapping[str, Source], *, skipped: str, owner: str) -> dict[str, Tensor]:
    """Make our tensors, in float32, from a file's arrays, each of which is used once.

    Args:
        sources: our name -> where it comes from.
        skipped: pattern of names in the file that may be left over.
        owner: who asks, for the messages.

    Raises:
        UserError: "<path>: key '...' is missing", "... has shape ..., expected ...", "... is not finite", "... has no
            place in <owner>".
    """
    for source in sources.values():
        for name in source.names:
            if name not in arrays:
                raise UserError(f"{path}: key {name!r} is missing, which {owner} needs; {nearest(name, arrays)}")
            found = arrays[name]
            if found.shape != source.shape:
                raise UserError(
                    f"{path}: key {name!r} has shape {list(found.shape)}, {owner} needs {list(source.shape)}"
                )
            if found.dtype.kind != "f":
                raise UserError(f"{path}: key {name!r} holds {found.dtype}, expected real numbers")
            if not (np.abs(found) <= np.finfo(np.float32).max).all():
                raise UserError(f"{path}: key {name!r} holds values that are not finite in float32")
    used = {name for source in sources.values() for name in source.names}
    for name in arrays:
        if name not in used and not re.fullmatch(skipped, name):
            raise UserError(f"{path}: key {name!r} has no place in {owner}")
    return {
        ours: torch.from_numpy(np.array(source.convert([arrays[name] for name in source.names]), np.float32, order="C"))
        for ours, source in sources.items()
    }
