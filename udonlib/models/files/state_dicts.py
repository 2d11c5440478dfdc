"""Which tensors of a file are an encoder's, however they are nested, prefixed and named.

Training scripts and wrappers leave the same weights in many forms: in a mapping below `state_dict`, `model` or
`state_dict_ema`, their names behind `module.`, `backbone.` or `student.encoder.`, beside a classifier without use.
No list of such words is kept: of all mappings and prefixes in a file, that one is taken which holds the most of the
tensors that the encoder needs. Names of other programs are translated by timm's own filter of the architecture, and,
where timm has none, by the tables here.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from udonlib.errors import UserError, nearest

StateDict = dict[str, Tensor]

MAX_DEPTH = 4  # of mappings in mappings
# Wrappers that torch puts inside of names.
WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Of two mappings that hold equally much the average is taken: it is what its makers evaluate.
AVERAGES = re.compile(r"average|ema(?![a-z])|teacher", re.IGNORECASE)
# What an encoder has no use for: classifiers, and what hangs on it while it is pretrained.
HEADS = re.compile(
    r"(?:head|heads|head_dist|fc|_fc|classifier|last_linear|aux_head|pre_logits|pooler|mask_token|decoder\w*)(?:\..*)?"
)
# Where names of other programs begin behind their prefix.
BEGINNINGS = re.compile(r"(?:^|\.)(?:embeddings\.(?:cls_token|class_embedding)|_conv_stem\.weight)$")


@dataclass(frozen=True)
class Match:
    """What a file holds of an encoder.

    Attributes:
        where: the mapping and the prefix inside the file; "" for a plain state dict.
        tensors: by the encoder's names; there may be more and less than it needs.
        stored: the same before timm's filter, which resamples positions.
        n_beside: tensors of the file that lie elsewhere.
    """

    where: str
    tensors: StateDict
    stored: StateDict
    n_beside: int


def find(content: Any, encoder: nn.Module) -> Match:
    """Find the mapping and the prefix that hold most of an encoder's tensors."""
    wanted = needed(encoder)
    found = sorted(mappings(content), key=lambda found: AVERAGES.search(found[0]) is None)
    n_all = sum(len(tensors) for _, tensors in found)
    best, most = Match("", {}, {}, n_all), -1
    for where, tensors in found:
        for prefix in _prefixes(tensors, wanted):
            below = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
            stored = _translated(below, encoder)
            made = _filtered(stored, encoder)
            score = len(wanted.keys() & made.keys())
            if score > most:
                best, most = Match(f"{where}{prefix}".rstrip("."), made, stored, n_all - len(below)), score
            if score == len(wanted):
                return best
    return best


def needed(encoder: nn.Module) -> StateDict:
    """The tensors of an encoder that weights must bring: all but counters, which old files do not have."""
    return {name: value for name, value in encoder.state_dict().items() if not name.endswith("num_batches_tracked")}


def take(match: Match, encoder: nn.Module, owner: str) -> tuple[StateDict, list[str]]:
    """Return the encoder's whole state, and the names of the heads that are left over.

    Raises:
        UserError: in one message, how many tensors are missing and how many have no place, with the nearest names; a
            tensor of another shape, with the likely cause; values that are no numbers or not finite.
    """
    state, wanted, found = encoder.state_dict(), needed(encoder), match.tensors
    missing = [name for name in wanted if name not in found]
    if 2 * len(missing) > len(wanted):
        some = ", ".join(f"'{name}'" for name in list(match.stored)[:3]) or "no tensors"
        n_found = len(wanted) - len(missing)
        raise UserError(
            f"holds {n_found} of the {len(wanted)} tensors of {owner}: weights of another encoder? ({some}, ..)"
        )
    left = [name for name in found if name not in state]
    heads = [name for name in left if HEADS.fullmatch(name)]
    left = [name for name in left if name not in heads]
    parts = []
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        hint = f"; {nearest(missing[0], left)}" if left else ""
        parts.append(f"{_keys(missing)} {verb} missing, which {owner} needs{hint}")
    if left:
        parts.append(f"{_keys(left)} {'has' if len(left) == 1 else 'have'} no place in {owner}")
    if parts:
        raise UserError("; ".join(parts) + _other_depth(found, wanted))
    for name in [name for name in state if name in found]:
        _check_shape(name, match, state[name], owner)
        state[name] = _checked(name, found[name], state[name], owner)
    return state, heads


def mappings(content: Any) -> Iterator[tuple[str, StateDict]]:
    """Yield every mapping with tensors in it, each once, and where it is: "state_dict." for example."""
    waiting, seen = [("", 0, content)], set()
    while waiting:
        where, depth, value = waiting.pop(0)
        if not isinstance(value, Mapping | list | tuple) or id(value) in seen or depth > MAX_DEPTH:
            continue
        seen.add(id(value))
        inner = {str(k): v for k, v in (value.items() if isinstance(value, Mapping) else enumerate(value))}
        tensors = {WRAPPERS.sub("", key): found.detach() for key, found in inner.items() if isinstance(found, Tensor)}
        if tensors:
            yield where, tensors
        waiting += [(f"{where}{key}.", depth + 1, found) for key, found in inner.items()]


def _prefixes(tensors: StateDict, wanted: Collection[str]) -> list[str]:
    """Prefixes behind which an encoder may be: where its own names begin, another program's, or those of most names."""
    begins: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        for i in range(min(len(parts), 12)):
            if ".".join(parts[i:]) in wanted:
                begins[".".join([*parts[:i], ""]).removeprefix(".")] += 1
    found = [prefix for prefix, _ in begins.most_common(4)]
    found += [name[: match.start() + 1].strip(".") for name in tensors if (match := BEGINNINGS.search(name))]
    prefix = ""
    for _ in range(6):
        found.append(prefix)
        names = [name[len(prefix) :] for name in tensors if name.startswith(prefix)]
        [(first, n_first)] = Counter(name.partition(".")[0] for name in names).most_common(1)
        if 2 * n_first < len(names) or n_first == 1:
            break
        prefix += f"{first}."
    found = [f"{prefix}." if prefix and not prefix.endswith(".") else prefix for prefix in found]
    return sorted(dict.fromkeys(found), key=lambda prefix: (prefix not in begins, AVERAGES.search(prefix) is None))


# --- names of other programs -----------------------------------------------------------------------------------------

# transformers' ViT, DINOv2 (with and without registers) and CLIP -> timm's, or those that timm's filter knows.
TRANSFORMERS: Sequence[tuple[str, str]] = (
    (r"embeddings\.(?:cls_token|class_embedding)", "cls_token"),
    (r"embeddings\.(?:position_embeddings|position_embedding\.weight)", "pos_embed"),
    (r"embeddings\.(mask_token|register_tokens)", r"\1"),
    (r"embeddings\.patch_embedding(?:s\.projection)?\.(\w+)", r"patch_embed.proj.\1"),
    (r"(?:encoder\.)?layers?\.(\d+)\.(.*)", r"blocks.\1.\2"),
    (
        r"(blocks\.\d+\.)(?:attention|self_attn)\.(?:attention\.)?(query|key|value|[qkv])(?:_proj)?\.(\w+)",
        r"\1attn.\2.\3",
    ),
    (r"(blocks\.\d+\.)(?:attention|self_attn)\.(?:output\.dense|out_proj|o_proj)\.(\w+)", r"\1attn.proj.\2"),
    (r"(blocks\.\d+\.)(?:layernorm_before|layer_norm1)\.(\w+)", r"\1norm1.\2"),
    (r"(blocks\.\d+\.)(?:layernorm_after|layer_norm2)\.(\w+)", r"\1norm2.\2"),
    (r"(blocks\.\d+\.)(?:intermediate\.dense|mlp\.weights_in)\.(\w+)", r"\1mlp.fc1.\2"),
    (r"(blocks\.\d+\.)(?:output\.dense|mlp\.weights_out)\.(\w+)", r"\1mlp.fc2.\2"),
    (r"(blocks\.\d+\.)layer_scale([12])\.lambda1", r"\1ls\2.gamma"),
    (r"pre_layrnorm\.(\w+)", r"norm_pre.\1"),
    (r"(?:post_layernorm|layernorm)\.(\w+)", r"norm.\1"),
)
# A block of efficientnet_pytorch and of the Lite models after it -> timm's: first one that does not expand.
EFFICIENTNET = (
    {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"},
    {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    | {"_project_conv": "conv_pwl", "_bn2": "bn3"},
)
EFFICIENTNET_SE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
EFFICIENTNET_ENDS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}


def _translated(tensors: StateDict, encoder: nn.Module) -> StateDict:
    """Give timm's names to tensors that other programs named; others keep theirs."""
    if "_conv_stem.weight" in tensors and isinstance(getattr(encoder, "blocks", None), nn.Sequential):
        return _from_efficientnet(tensors, encoder)
    if not {"embeddings.cls_token", "embeddings.class_embedding"} & tensors.keys():
        return tensors
    made = {}
    for name, value in tensors.items():
        for pattern, ours in TRANSFORMERS:
            name = re.sub(f"^{pattern}$", ours, name)
        made[name] = value
    made.pop("embeddings.position_ids", None)
    if made["cls_token"].ndim == 1:  # CLIP
        made["cls_token"] = made["cls_token"].reshape(1, 1, -1)
        if "pos_embed" in made and made["pos_embed"].ndim == 2:
            made["pos_embed"] = made["pos_embed"][None]
    for name in list(made):
        if found := re.fullmatch(r"(.*attn\.)(query|q)\.(\w+)", name):
            start, first, leaf = found.groups()
            three = [f"{start}{which}.{leaf}" for which in ((first, "key", "value") if first == "query" else "qkv")]
            if all(part in made for part in three):
                parts = [made.pop(part) for part in three]
                if len({part.shape[1:] for part in parts}) == 1 and parts[0].ndim:
                    made[f"{start}qkv.{leaf}"] = torch.cat(parts)
    return made


def _from_efficientnet(tensors: StateDict, encoder: nn.Module) -> StateDict:
    places = [f"blocks.{i}.{j}" for i, stage in enumerate(encoder.blocks) for j in range(len(stage))]  # type: ignore[arg-type]
    made = {}
    for name, value in tensors.items():
        parts = name.split(".")
        ends = EFFICIENTNET_ENDS.get(parts[0])
        if parts[0] == "_blocks" and len(parts) > 3 and parts[1].isdecimal() and int(parts[1]) < len(places):
            expands = f"_blocks.{parts[1]}._expand_conv.weight" in tensors
            ours = (EFFICIENTNET[expands] | EFFICIENTNET_SE).get(parts[2])
            name = ".".join([places[int(parts[1])], ours, *parts[3:]]) if ours else name
        elif ends:
            name = ".".join([ends, *parts[1:]])
        made[name] = value
    return made


def _filtered(tensors: StateDict, encoder: nn.Module) -> StateDict:
    """Let timm's own filter of the architecture translate names and resample positions, where it has one."""
    convert = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    try:
        made = convert(dict(tensors), encoder)
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}
    except Exception:  # not made for such names or shapes: they are told as they are
        return tensors


# --- what does not fit -----------------------------------------------------------------------------------------------


def _keys(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"key '{names[0]}'"
    some = ", ".join(f"'{name}'" for name in names[:3])
    return f"{len(names)} keys ({some}{f' and {len(names) - 3} more' if len(names) > 3 else ''})"


def _other_depth(found: Collection[str], wanted: Collection[str]) -> str:
    """Say where the two differ in their number of blocks, the likely cause of many such keys."""

    def depth(names: Collection[str]) -> int:
        numbers = [
            int(match[1]) for name in names if (match := re.match(r"(?:blocks|layers|stages)\.(\d{1,6})\.", name))
        ]
        return max(numbers, default=-1) + 1

    theirs, ours = depth(found), depth(wanted)
    return f"; the file has {theirs} blocks, the encoder {ours}" if theirs != ours and theirs and ours else ""


def _check_shape(name: str, match: Match, value: Tensor, owner: str) -> None:
    """Refuse another shape; only positions may have been resampled, and what is reshaped keeps its size."""
    stored, made = match.stored.get(name, match.tensors[name]), match.tensors[name]
    if made.shape == value.shape and ("pos" in name or stored.numel() == made.numel()):
        return
    shape, expected = list(stored.shape), list(value.shape)
    cause = ""
    if "pos" in name and len(shape) == len(expected) and shape[-1] == expected[-1]:
        cause = ": positions of no square grid?"
    elif len(shape) == len(expected) == 4 and shape[2:] != expected[2:]:
        cause = f": patches of {shape[-1]} pixels, not {expected[-1]}?"
    elif len(shape) == len(expected):
        cause = ": an encoder of another width?"
    raise UserError(f"key '{name}' has shape {shape}, {owner} needs {expected}{cause}")


def _checked(name: str, tensor: Tensor, value: Tensor, owner: str) -> Tensor:
    if tensor.is_floating_point() != value.is_floating_point() or tensor.is_complex():
        raise UserError(f"key '{name}' holds {tensor.dtype}, {owner} needs {value.dtype}")
    tensor = tensor.to(value.dtype)
    if not tensor.isfinite().all():
        raise UserError(f"key '{name}' holds values that are not finite")
    return tensor
