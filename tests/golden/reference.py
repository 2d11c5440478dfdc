"""The reference's parameter names and layouts in terms of `EmbeddingModel`."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import torch
from torch import nn

from udonlib.backbones import Backbone, timm
from udonlib.heads import Head
from udonlib.models import EmbeddingModel


class QuickGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


def is_clip(params: dict[str, np.ndarray]) -> bool:
    return "class_embedding" in params


def build_model(params: dict[str, np.ndarray], n_classes: list[int], n_heads: int, patch: int) -> EmbeddingModel:
    """An EmbeddingModel with the reference's parameters; domains are called "0", "1", .."""
    clip = is_clip(params)
    positions = params["positional_embedding" if clip else "Transformer/posembed_input/pos_embedding"]
    dim = positions.shape[-1]
    side = round((positions.shape[-2] - 1) ** 0.5) * patch
    depth = 1 + max(int(m[1]) for name in params if (m := re.search(r"(?:resblocks\.|encoderblock_)(\d+)/", name)))
    hidden = next(v.shape[1] for k, v in params.items() if re.search(r"(c_fc|MlpBlock_0/Dense_0)/kernel", k))
    encoder = timm.models.VisionTransformer(
        img_size=side,
        patch_size=patch,
        embed_dim=dim,
        depth=depth,
        num_heads=n_heads,
        mlp_ratio=hidden / dim,
        num_classes=0,
        pre_norm=clip,
        norm_layer=partial(nn.LayerNorm, eps=1e-5 if clip else 1e-6),
        act_layer=QuickGELU if clip else partial(nn.GELU, approximate="tanh"),
    )
    backbone = Backbone("reference", encoder, dim, (0.5,) * 3, (0.5,) * 3)
    student, teacher = (
        _head_widths(params, head) for head in ("universal_student_projection_domain_0", "teacher_projection_domain_0")
    )
    names = {str(d): n for d, n in enumerate(n_classes)}
    model = EmbeddingModel(backbone, names, student_dim=student[-1], teacher_dim=teacher[-1])
    model.student = Head(dim, student[-1], student[:-1])
    for d in names:
        model.teachers[d] = Head(dim, teacher[-1], teacher[:-1])
    model.load_state_dict(state_from_reference(params))
    return model


def _head_widths(params: dict[str, np.ndarray], head: str) -> list[int]:
    """Output sizes of a head's layers, in their order."""
    layers = {int(m[1]): v.shape[1] for k, v in params.items() if (m := re.fullmatch(rf"{head}/Dense_(\d+)/kernel", k))}
    return [layers[i] for i in sorted(layers)]


def head_state(params: dict[str, np.ndarray], head: str) -> dict[str, torch.Tensor]:
    """State of a `Head` from `<head>/Dense_i`, `<head>/LayerNorm_i`: ours alternate linear, norm, gelu."""
    state = {}
    for name, value in params.items():
        if match := re.fullmatch(rf"{re.escape(head)}/(Dense|LayerNorm)_(\d+)/(kernel|bias|scale)", name):
            position = 3 * int(match[2]) + (match[1] == "LayerNorm")
            key = f"layers.{position}.{'bias' if match[3] == 'bias' else 'weight'}"
            state[key] = torch.from_numpy(value.T.copy() if match[3] == "kernel" else value)
    return state


def state_from_reference(params: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """All parameters (or gradients, or moments, of all or some of them) under our names and layouts."""
    out: dict[str, torch.Tensor] = {}
    fused: dict[str, dict[str, np.ndarray]] = {}
    for name, value in params.items():
        if match := re.fullmatch(r"(universal_student|teacher)_output_projection_(\d+)/kernel", name):
            who = "student" if match[1].startswith("universal") else "teacher"
            out[f"{who}_prototypes.{match[2]}"] = torch.from_numpy(value.T.copy())
        elif "projection_domain" not in name:
            _convert_encoder(name, value, out, fused)
    for key, parts in fused.items():
        if len(parts) == 3:
            out[key] = torch.from_numpy(np.concatenate([parts[n] for n in ("query", "key", "value")]))
    heads = {name.split("/")[0] for name in params if "projection_domain" in name}
    for head in heads:
        ours = "student" if head.startswith("universal") else f"teachers.{head.rsplit('_', 1)[1]}"
        out |= {f"{ours}.{key}": value for key, value in head_state(params, head).items()}
    return out


RENAMED = {
    "cls": "cls_token",
    "class_embedding": "cls_token",
    "Transformer/posembed_input/pos_embedding": "pos_embed",
    "positional_embedding": "pos_embed",
    "embedding/kernel": "patch_embed.proj.weight",
    "embedding/bias": "patch_embed.proj.bias",
    "conv1/kernel": "patch_embed.proj.weight",
    "Transformer/encoder_norm": "norm",
    "ln_post": "norm",
    "ln_pre": "norm_pre",
    "LayerNorm_0": "norm1",
    "LayerNorm_1": "norm2",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "MlpBlock_0/Dense_0": "mlp.fc1",
    "MlpBlock_0/Dense_1": "mlp.fc2",
    "mlp/c_fc": "mlp.fc1",
    "mlp/c_proj": "mlp.fc2",
}


def _convert_encoder(name: str, value: np.ndarray, out: dict, fused: dict) -> None:
    prefix = "backbone.encoder."
    if name in RENAMED:
        ours = RENAMED[name]
        if ours == "patch_embed.proj.weight":
            value = value.transpose(3, 2, 0, 1)
        elif ours in ("cls_token", "pos_embed"):
            value = value.reshape(1, -1, value.shape[-1])
        out[prefix + ours] = torch.from_numpy(value.copy())
        return
    module, leaf = name.rsplit("/", 1)
    if match := re.fullmatch(r"(?:Transformer/encoderblock_|transformer/resblocks\.)(\d+)/(.+)", module):
        prefix += f"blocks.{match[1]}."
        module = match[2]
        attention = re.fullmatch(r"(?:MultiHeadDotProductAttention_0|attn)/(query|key|value|out)", module)
        if attention and attention[1] == "out":
            weight = value.reshape(-1, value.shape[-1]).T if leaf == "kernel" else value
            out[f"{prefix}attn.proj.{'weight' if leaf == 'kernel' else 'bias'}"] = torch.from_numpy(weight.copy())
            return
        if attention:
            flat = value.reshape(value.shape[0], -1).T if leaf == "kernel" else value.reshape(-1)
            key = f"{prefix}attn.qkv.{'weight' if leaf == 'kernel' else 'bias'}"
            fused.setdefault(key, {})[attention[1]] = flat
            return
    ours = prefix + RENAMED[module] + ("." + ("bias" if leaf == "bias" else "weight"))
    out[ours] = torch.from_numpy((value.T if leaf == "kernel" else value).copy())
