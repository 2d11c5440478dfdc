"""Whether a run has room on its device, asked before memory is taken or anything is written.

The model is built without memory, on PyTorch's meta device, and shown a batch there. Only what is certainly needed
at one time is counted, so that nothing is refused that fits; more may be needed in the end.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from udonlib.data.catalog import Catalog
from udonlib.data.check.catalog_images import CatalogImages
from udonlib.data.images import Decoder
from udonlib.errors import ParameterError
from udonlib.models.embedding_model import EmbeddingModel, create_model
from udonlib.models.processors import dtype_of
from udonlib.params import TrainParams

FLOAT = 4  # bytes


class Need(NamedTuple):
    """Memory that something takes, and the parameters that it depends on."""

    what: str
    n_bytes: float
    names: tuple[str, ...]


def check_room(
    params: TrainParams,
    n_classes: Mapping[str, int],
    n_images: int,
    device: torch.device,
    free: float | None = None,
    n_processes: int = 1,
) -> None:
    """Refuse a run whose model or batches cannot fit.

    Args:
        n_classes: training classes of each domain.
        n_images: in the largest split that is evaluated.
        free: bytes; None: what is free on the device.
        n_processes: that share each batch, and the classes where there are many.

    Raises:
        ParameterError: how much is needed and free, and the parameters to lower.
    """
    needs = list_needs(params, n_classes, n_images, device, n_processes)
    total = sum(need.n_bytes for need in needs)
    room = free_memory(device) if free is None else free
    if total > room:
        most = max(needs, key=lambda need: need.n_bytes)
        lower = ", ".join(f"{name} ({getattr(params, name)!r})" for name in most.names)
        problem = (
            f"this run needs at least {_gib(total)} of memory on {device}, and {_gib(room)} are free; "
            f"{_gib(most.n_bytes)} are for {most.what}: lower {lower}"
        )
        raise ParameterError({most.names[0]: problem})


def list_needs(
    params: TrainParams, n_classes: Mapping[str, int], n_images: int, device: torch.device, n_processes: int = 1
) -> list[Need]:
    """What each process of a run holds at the same time, at least; nothing where its model takes memory to build."""
    p = params
    thaws = p.frozen_steps < p.steps or p.frozen_backbone == "zero_lr"
    trains_backbone = p.steps > 0 and p.backbone_learning_rate > 0 and thaws
    try:
        with torch.device("meta"):
            model = create_model(p.model_copy(update={"pretrained": False, "weights": None}), n_classes)
            n_ours = p.batch_size // n_processes or 1
            saved = saved_bytes(model.backbone, n_ours, p.image_size) if trains_backbone else 0
            widest = widest_bytes(model.backbone, min(p.eval_batch_size, n_images), p.image_size)
            n_slices = n_processes if sum(n_classes.values()) >= p.split_classes_from else 1
            backbone, student, teachers = _parameters(model, n_slices)
    except Exception:  # whatever is wrong with it, building it in earnest says so
        return []
    copies = 2 + (p.average_decay > 0)  # the model as it was before training is kept, to compare with
    moments = 2 if p.steps else 0  # Adam's
    if p.steps and device.type == "cpu":  # a checkpoint is written from a copy, while training goes on
        copies, moments = copies + 1 + (p.average_decay > 0), 2 * moments
    # The backbone's gradients are whole when a batch is gone; those of heads come and go with their domains.
    gradients = FLOAT * backbone * trains_backbone
    half = dtype_of(p.precision, device).itemsize / FLOAT
    joint, largest = sum(n_classes.values()), max(n_classes.values(), default=0)
    rows = p.batch_size if p.classifier == "joint" else p.batch_size // p.domains_per_batch
    logits = FLOAT * rows * (joint if p.classifier == "joint" else largest) * p.class_sample / n_slices * (p.steps > 0)
    in_turn = p.sampler != "dynamic" or p.sampler_init == "round_robin"  # then the schedule is drawn at once
    return [
        Need(
            f"a backbone of {backbone / 1e6:,.1f} M parameters",
            FLOAT * backbone * (copies + moments * trains_backbone) + gradients,
            ("backbone", "backbone_args"),
        ),
        Need("the student's head", FLOAT * student * (copies + moments), ("student_dim", "head_hidden_dims")),
        Need("the teachers' heads", FLOAT * teachers * (copies + moments), ("teacher_dim", "teacher_hidden_dims")),
        max(
            Need("a batch", max(0.0, saved * half + logits - gradients), ("batch_size", "image_size", "backbone")),
            Need("a batch to embed", max(0.0, widest * half - gradients), ("eval_batch_size", "image_size")),
            key=lambda need: need.n_bytes,
        ),
        Need(
            "the schedule",
            8 * p.domains_per_batch * (p.steps if in_turn else min(p.steps, p.update_every)),
            ("steps", "domains_per_batch"),
        ),
    ]


def _parameters(model: EmbeddingModel, n_slices: int) -> tuple[int, int, int]:
    """How many parameters of backbone, student and teachers a process holds; of prototypes one of so many slices."""

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    student = count(model.student) + count(model.student_prototypes) // n_slices
    teachers = count(model.teachers) + count(model.teacher_prototypes) // n_slices
    return count(model.backbone), student, teachers


class _PlainAttention(TorchFunctionMode):
    """Attention that keeps no matrix of all pairs, as the fused ones do not."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, _, value = (*args, *(kwargs or {}).values())[:3]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **(kwargs or {}))


def saved_bytes(encoder: nn.Module, n_images: int, size: int) -> int:
    """Bytes that a forward pass in float32 keeps for the backward pass, besides parameters. The encoder is on meta."""
    own = {tensor.untyped_storage()._cdata for tensor in (*encoder.parameters(), *encoder.buffers())}
    kept: dict[int, Tensor] = {}  # which also keeps an address from being used twice

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage()._cdata
        if address not in own:
            kept.setdefault(address, tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), _PlainAttention():
        encoder(torch.empty(n_images, 3, size, size, device="meta"))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def widest_bytes(encoder: nn.Module, n_images: int, size: int) -> int:
    """Bytes in float32 of the largest thing that a forward pass without gradients makes. The encoder is on meta."""
    images = torch.empty(n_images, 3, size, size, device="meta")
    largest = images.numel()

    def look(module: nn.Module, given: Any, made: Any) -> None:
        nonlocal largest
        if isinstance(made, Tensor):
            largest = max(largest, made.numel())

    hooks = [module.register_forward_hook(look) for module in encoder.modules()]
    try:
        with torch.no_grad(), _PlainAttention():
            encoder(images)
    finally:
        for hook in hooks:
            hook.remove()
    return FLOAT * largest


def free_memory(device: torch.device, system: Path = Path("/")) -> float:
    """Bytes that are free on a device; infinite where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type != "cpu":
        return math.inf
    try:
        lines = (line.split(":") for line in (system / "proc/meminfo").read_text().splitlines())
        kib = {name: int(value.split()[0]) for name, value in lines}
        return min(1024 * kib["MemAvailable"], _granted(system)) + 1024 * kib.get("SwapFree", 0)
    except (OSError, ValueError, KeyError, IndexError):
        sizes = getattr(os, "sysconf_names", {})  # macOS; Windows has none
        if {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(sizes):
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return math.inf


def _granted(system: Path) -> float:
    """Bytes that a container may use, as control groups of either version say it."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            return int((system / "sys/fs/cgroup" / name).read_text())
        except (OSError, ValueError):  # none there, or "max"
            continue
    return math.inf


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB"


BATCH = 32  # images that are read before the clock is looked at

ADAM_BYTES = 16  # of each trained parameter in float32: its value, its gradient and Adam's two moments


@dataclass(frozen=True)
class RunNeeds:
    """Needs of one run.

    n_images: that it trains on. n_seen: that its steps train on, repetitions counted. n_measured: images read to
    measure seconds_per_image, of one process. train_bytes, eval_bytes: decoded images of training, and of validation
    and test, where they are kept in memory. model_bytes: the model with its gradients and Adam's moments; what a batch
    needs besides depends on the backbone.
    """

    n_images: int
    n_seen: int
    n_measured: int
    seconds_per_image: float
    train_bytes: int
    eval_bytes: int
    model_bytes: int


def measure_needs(catalog: Catalog, params: TrainParams, seconds: float = 1.0, seed: int = 0) -> RunNeeds:
    """Measure what a run of these parameters needs on this data, for about `seconds`. Bad images do not count."""
    images = CatalogImages(catalog)
    trained = images.is_in("train")
    decoder = Decoder(catalog.store, params.resize_size, "train")
    order = np.random.default_rng(seed).permutation(np.flatnonzero(trained if trained.any() else ~trained)).tolist()
    n, began = 0, time.perf_counter()
    while n == 0 or (n < len(order) and time.perf_counter() - began < seconds):
        n += len(decoder[[images.paths[i] for i in order[n : n + BATCH]]][1])
    taken = time.perf_counter() - began
    n_evaluated = int((images.roles & ~1).astype(bool).sum())
    scratch = params.model_copy(update={"pretrained": False, "weights": None})
    model = create_model(scratch, catalog.n_classes)
    n_train = sum(len(domain.splits["train"]) for domain in catalog.domains if "train" in domain.splits)
    return RunNeeds(
        n_images=n_train,
        n_seen=params.steps * params.batch_size,
        n_measured=n,
        seconds_per_image=taken / n,
        train_bytes=n_train * 3 * params.resize_size**2,
        eval_bytes=n_evaluated * 3 * params.image_size**2,
        model_bytes=ADAM_BYTES * sum(parameter.numel() for parameter in model.parameters()),
    )
