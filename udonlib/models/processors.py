"""What this machine computes with: how many cores are ours, and which precision its processors multiply fast."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch

from udonlib.errors import UserError

Precision = Literal["float32", "bfloat16"]
PRECISIONS: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Limits that somebody may have set on oneDNN's instructions, below those that multiply bfloat16.
WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}


def n_cores() -> int:
    """Cores that this process may use: by its affinity, where the system knows one, and its container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)  # macOS and Windows have none
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota())))


def _quota(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Cores' worth of time that a container grants, as control groups (v2) say it; infinite without one."""
    try:
        granted, period = file.read_text().split()
        return int(granted) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such system, or "max"
        return math.inf


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16; without, it is many times as slow as float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if device.type != "cpu" or limit in WITHOUT_BFLOAT16:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def pick_precision(name: Precision | Literal["auto"], device: torch.device) -> Precision:
    """The precision of a name; `auto` takes bfloat16 where the device multiplies it, float32 elsewhere."""
    if name == "auto":
        return "bfloat16" if multiplies_bfloat16(device) else "float32"
    return name


def dtype_of(precision: Precision | Literal["auto"], device: torch.device) -> torch.dtype:
    """The number format of a precision's name; `auto` as `pick_precision` says."""
    return PRECISIONS[pick_precision(precision, device)]


def computing_in(precision: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """Have layers compute in a precision, by autocast; float32: as they are."""
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)


def pick_device(name: str) -> torch.device:
    """The device of a name; `auto` takes a GPU where there is one.

    Raises:
        UserError: "parameter 'device': ..." for a device that is not here, or that cannot do all that we need.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    available = {"cpu": True, "cuda": torch.cuda.is_available()}
    kind = name.partition(":")[0]
    if not available.get(kind):
        valid = ", ".join(kind for kind, there in available.items() if there)
        lacks = "which has no float64, and search needs that" if kind == "mps" else "which this machine does not have"
        raise UserError(f"parameter 'device': found {name!r}, {lacks}; valid: auto, {valid}")
    return torch.device(name)


def slow_precision(precision: str, device: torch.device) -> str | None:
    """What to tell somebody who computes in a precision that the device has no instructions for; None: all is well."""
    if precision != "bfloat16" or multiplies_bfloat16(device):
        return None
    return (
        f"precision 'bfloat16' is slow here: this {device.type} has no instructions for it, and a convolution takes "
        f"{_times_as_long(device):.0f} times as long as in float32. A new run with precision 'auto' takes float32"
    )


def _times_as_long(device: torch.device) -> float:
    """Time of a small convolution in bfloat16 over that in float32, the best of three each."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        images, weights = (
            torch.ones(*shape, dtype=dtype, device=device) for shape in ((4, 32, 24, 24), (32, 32, 3, 3))
        )
        times = []
        for _ in range(3):
            start = time.perf_counter()
            torch.nn.functional.conv2d(images, weights).sum().item()
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] / seconds[torch.float32]


@contextmanager
def lone_threads(n: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads that each compute alone, as this one does meanwhile; what they have still to do at the end is dropped."""
    n_before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(n, name, torch.set_num_threads, (1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(n_before)
