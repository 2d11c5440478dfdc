"""Checkpoints of UDON's reference implementation as an `EmbeddingModel`: backbone, student, teachers, prototypes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from udonlib.errors import UserError
from udonlib.models.backbones import Backbone, create_backbone
from udonlib.models.embedding_model import EmbeddingModel
from udonlib.models.files import weight_files
from udonlib.models.files.layouts import NOTHING, REFERENCE_CLIP, REFERENCE_VIT, Layout, Source, take
from udonlib.models.files.weight_files import Arrays
from udonlib.models.heads import ByDomain

# The order in which the reference trains UnED's domains; its checkpoints number them so.
UNED_ORDER = ("food2k", "cars", "sop", "inshop", "inat", "met", "gldv2", "rp2k")
MAX_DEPTH = 256  # blocks; released encoders have up to 48
STUDENT, STUDENT_PROTOTYPES = "universal_student_projection_domain_0", "universal_student_output_projection"
TEACHER, TEACHER_PROTOTYPES = "teacher_projection_domain", "teacher_output_projection"
BACKBONES = {
    REFERENCE_VIT.title: "vit_base_patch16_224.augreg_in21k",
    REFERENCE_CLIP.title: "vit_base_patch16_clip_quickgelu_224.openai",
}


def import_checkpoint(path: str | Path, domains: Sequence[str] | None = None) -> EmbeddingModel:
    """Load a checkpoint of the reference (flax, legacy msgpack) as a model in evaluation mode, on the CPU.

    Sizes, patch size, image size, heads of attention, hidden layers and the kind of encoder (AugReg's or CLIP's) follow
    from the arrays; `config.json` beside the file names the domains, and is held against the arrays where it says more.
    A checkpoint without teachers gives a model without.

    Args:
        path: the file ("checkpoint_-1" is the best model, "checkpoint_<step>" another), or a folder with the first.
        domains: their names in the order of the checkpoint's numbers; None: from the config, or, where there is none,
            UnED's order for eight domains.

    Raises:
        UserError: one message that names the file and the key: a file that is missing, damaged or something else; an
            array that is missing, left over, of a wrong shape or not finite; a config that contradicts the arrays;
            names that are too few, too many or repeated.

    Source: pinned by golden/ckpt.
    """
    path = Path(path).expanduser()
    path = path / "checkpoint_-1" if path.is_dir() else path
    return model_from_arrays(path, weight_files.read_flax(path), _config(path.with_name("config.json")), domains)


def model_from_arrays(
    path: Path, arrays: Arrays, config: dict[str, Any], domains: Sequence[str] | None = None
) -> EmbeddingModel:
    """Build the model that a checkpoint's parameters belong to and fill it; see `import_checkpoint`.

    Nothing is allocated before the arrays' shapes have been found to fit together: the model is made on torch's meta
    device, and then takes the file's tensors for its parameters.
    """
    counts = _n_classes(path, arrays)
    taught = any(name.startswith("teacher_") for name in arrays)
    names = _domain_names(path, len(counts), config, domains)
    student = _head_widths(path, arrays, STUDENT)
    teacher = _head_widths(path, arrays, f"{TEACHER}_0") if taught else [0]
    with torch.device("meta"):
        layout, backbone, n_heads = _backbone(path, arrays, config)
        model = EmbeddingModel(
            backbone,
            dict(zip(names, counts, strict=True)),
            student_dim=student[-1],
            teacher_dim=teacher[-1],
            hidden_dims=student[:-1],
            teacher_hidden_dims=teacher[:-1],
        )
    sources = reference_sources(model, layout, n_heads)
    model.load_state_dict(take(path, arrays, sources, skipped=NOTHING, owner="its model"), assign=True)
    return model.eval()


def reference_sources(model: EmbeddingModel, layout: Layout, n_heads: int) -> dict[str, Source]:
    """Say where each parameter of a model is among the reference's: our name -> `Source`.

    Heads alternate Dense_i and LayerNorm_i, where ours count linear, norm and activation: 3 i and 3 i + 1.
    """
    number = {ByDomain.key(domain): i for i, domain in enumerate(model.domains)}
    sources: dict[str, Source] = {}
    for ours, value in model.state_dict().items():
        part, _, rest = ours.partition(".")
        shape = tuple(value.shape)
        if part == "backbone":
            source = layout.source(rest.removeprefix("encoder."), shape, n_heads)
            if source is None:
                raise ValueError(f"{layout.title} has no {rest!r}")
            sources[ours] = source
            continue
        if part.endswith("_prototypes"):
            whose = STUDENT_PROTOTYPES if part.startswith("student") else TEACHER_PROTOTYPES
            name = f"{whose}_{number[rest]}/kernel"
        else:
            *domain, _, position, leaf = rest.split(".")
            head = f"{TEACHER}_{number[domain[0]]}" if domain else STUDENT
            norm = int(position) % 3 == 1
            kind = "bias" if leaf == "bias" else "scale" if norm else "kernel"
            name = f"{head}/{'LayerNorm' if norm else 'Dense'}_{int(position) // 3}/{kind}"
        sources[ours] = Source((name,), shape[::-1], lambda found: found[0].T)
    return sources


def _config(path: Path) -> dict[str, Any]:
    """Return the run's configuration, {} where there is none."""
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model", {}), dict):
        raise UserError(f"{path}: expected a mapping, with a mapping 'model' in it")
    return config


def _domain_names(path: Path, count: int, config: dict[str, Any], domains: Sequence[str] | None) -> list[str]:
    listed = config.get("dataset_name")
    where = path.with_name("config.json")
    if domains is not None:
        names, source = list(domains), "parameter 'domains'"
    elif isinstance(listed, str):
        names, source = [name.strip() for name in listed.split(",")], f"{where}: 'dataset_name'"
    elif count == len(UNED_ORDER):
        return list(UNED_ORDER)
    else:
        raise UserError(f"{path}: holds {count} domains, and no {where.name} names them: name them in their order")
    if len(names) != count or len(set(names)) != count or "" in names:
        raise UserError(f"{source}: found {', '.join(names)!r}, expected {count} different names: {path} has {count}")
    return names


def _n_classes(path: Path, arrays: Arrays) -> list[int]:
    """Classes of each domain, from the student's prototypes [dim, classes]; domains without gaps."""
    pattern = rf"(?:{STUDENT_PROTOTYPES}|{TEACHER_PROTOTYPES})_([0-9]{{1,9}})/kernel"
    numbers = [int(found[1]) for name in arrays if (found := re.fullmatch(pattern, name))]
    if not numbers:
        raise UserError(f"{path}: key '{STUDENT_PROTOTYPES}_0/kernel' is missing: no checkpoint of UDON's reference")
    return [_shape(path, arrays, f"{STUDENT_PROTOTYPES}_{i}/kernel", 2)[1] for i in range(max(numbers) + 1)]


def _head_widths(path: Path, arrays: Arrays, head: str) -> list[int]:
    """Output sizes of a head's layers, in their order; at least one layer, or its key is found missing."""
    found = [name for name in arrays if re.fullmatch(rf"{head}/Dense_[0-9]{{1,9}}/kernel", name)]
    return [_shape(path, arrays, f"{head}/Dense_{i}/kernel", 2)[1] for i in range(max(1, len(found)))]


def _shape(path: Path, arrays: Arrays, name: str, n_dims: int) -> tuple[int, ...]:
    if name not in arrays:
        raise UserError(f"{path}: key {name!r} is missing")
    shape = arrays[name].shape
    if len(shape) != n_dims or 0 in shape:
        raise UserError(f"{path}: key {name!r} has shape {list(shape)}, expected {n_dims} dimensions, none of them 0")
    return shape


def _backbone(path: Path, arrays: Arrays, config: dict[str, Any]) -> tuple[Layout, Backbone, int]:
    """Build the encoder that the arrays' shapes describe, and return it with its layout and heads of attention."""
    layout = REFERENCE_CLIP if REFERENCE_CLIP.names["cls_token"] in arrays else REFERENCE_VIT
    names, block = layout.names, layout.block.format(0)
    patch, width, _, dim = _shape(path, arrays, f"{names['patch_embed.proj']}/kernel", 4)
    _, n_heads, _ = _shape(path, arrays, f"{block}{names['attn']}/query/kernel", 3)
    _, hidden = _shape(path, arrays, f"{block}{names['mlp.fc1']}/kernel", 2)
    *_, n_tokens, _ = _shape(path, arrays, names["pos_embed"], 2 if layout.flat_tokens else 3)
    grid = round((n_tokens - 1) ** 0.5)
    if patch != width or grid < 1 or grid**2 != n_tokens - 1 or dim % n_heads:
        raise UserError(
            f"{path}: patches of {patch} x {width}, {n_tokens} positions and {n_heads} heads in {dim} channels, "
            "expected square patches, 1 and a square number of positions, and heads that divide the channels"
        )
    pattern = re.escape(layout.block).replace(r"\{\}", r"(\d+)")
    depth = len({found[1] for name in arrays if (found := re.match(pattern, name))})
    said = config.get("model", {})
    sizes: dict[str, Any] = {"hidden_size": dim, "num_heads": n_heads, "mlp_dim": hidden, "num_layers": depth}
    for key, size in [*sizes.items(), ("patches", {"size": [patch, patch]})]:
        if key in said and said[key] != size:
            where = path.with_name("config.json")
            raise UserError(f"{where}: 'model.{key}' is {said[key]!r}, but the arrays of {path} have {size!r}")
    if depth > MAX_DEPTH:
        raise UserError(f"{path}: has {depth} blocks, expected at most {MAX_DEPTH}")
    ratio = (hidden + 0.5) / dim  # timm rounds the product down
    arguments = {"patch_size": patch, "embed_dim": dim, "depth": depth, "num_heads": n_heads, "mlp_ratio": ratio}
    name = BACKBONES[layout.title]
    return layout, create_backbone(name, pretrained=False, image_size=grid * patch, arguments=arguments), n_heads
