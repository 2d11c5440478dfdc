"""What a step of UDON costs beside its backbone, beside the obvious loop, and shared out to two processes.

    python benchmarks/steps.py
    python benchmarks/steps.py --only ranks

On ViT-S/16 at 224 pixels, batches of one domain with MiniUnED's emoji classes:

1. UDON's step (student, teacher, both distillations) over forward and backward of the bare backbone, and over the step
   that one writes first: timm's model, a linear head for each domain, cross-entropy and torch.optim.AdamW. In float32,
   and in bfloat16 where the processor multiplies in it. Then the same backbone compiled (torch.compile), and the share
   of the processor's peak: what the backbone multiplies in a second of UDON's step, of what one large product does.
2. Images/s of two processes that `torchrun` starts, a thread each, over one process with two threads.

Everything is measured in turns, so that a drift of the machine's speed cancels; medians are printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from udonlib.data.catalog import load_catalog
from udonlib.models.backbones import timm
from udonlib.models.embedding_model import create_model
from udonlib.models.processors import dtype_of, multiplies_bfloat16
from udonlib.params import TrainParams
from udonlib.training.learner import Learner
from udonlib.training.parallel.world import join
from udonlib.training.threads import use_threads

BACKBONE, SIDE, DOMAIN = "vit_small_patch16_224", 224, "emoji"
CPU = torch.device("cpu")
N_CLASSES = load_catalog("miniuned").n_classes


def ours(batch_size: int, precision: str) -> Learner:
    """UDON on all domains."""
    given = {"backbone": BACKBONE, "pretrained": False, "frozen_steps": 0, "batch_size": batch_size}
    params = TrainParams(**given, precision=precision)
    return Learner(create_model(params, N_CLASSES), params, world=join())


def batch(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images as they come out of the pipeline, and their labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch_size, 3, SIDE, SIDE), generator=generator).float()
    return images, torch.randint(N_CLASSES[DOMAIN], (batch_size,), generator=generator)


class Obvious:
    """timm, AdamW, a linear head for each domain."""

    def __init__(self, precision: str, compiled: bool = False) -> None:
        self.backbone = timm.create_model(BACKBONE, num_classes=0)
        self.run = torch.compile(self.backbone) if compiled else self.backbone
        self.heads = nn.ModuleDict({name: nn.Linear(self.backbone.num_features, n) for name, n in N_CLASSES.items()})
        self.optimizer = torch.optim.AdamW([*self.backbone.parameters(), *self.heads.parameters()], lr=1e-4)
        self.dtype = dtype_of(precision, CPU)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Forward, backward, optimizer."""
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            logits = self.heads[DOMAIN](self.run(images / 255))
        loss = nn.functional.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def bare(self, images: torch.Tensor) -> None:
        """Forward and backward of the backbone alone."""
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            features = self.run(images)
        features.float().sum().backward()
        for parameter in self.backbone.parameters():
            parameter.grad = None


def medians(works: dict[str, Callable[[], object]], n_rounds: int) -> dict[str, float]:
    """Seconds of each, the median of rounds in which all take turns; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(n_rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(spent) for name, spent in times.items()}


PRODUCT = 3072  # rows and columns of the large product


def flops(work: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and attention: a multiplication and an addition are two."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it knows no other on CPUs
        work()
    return counter.get_total_flops()


def steps(n_rounds: int, batch_size: int, precision: str) -> None:
    """Print UDON's step over the bare backbone, and the obvious loop's step over UDON's."""
    images, labels = batch(batch_size)
    learner, obvious, compiled = ours(batch_size, precision), Obvious(precision), Obvious(precision, compiled=True)
    matrix = torch.ones(PRODUCT, PRODUCT, dtype=dtype_of(precision, CPU))
    found = medians(
        {
            "ours": lambda: learner.step(0, images, [(DOMAIN, labels)]),
            "obvious": lambda: obvious.step(images, labels),
            "bare": lambda: obvious.bare(images),
            "compiled": lambda: compiled.bare(images),
            "product": lambda: matrix @ matrix,
        },
        n_rounds,
    )
    peak = flops(lambda: matrix @ matrix) / found.pop("product")
    reached = flops(lambda: obvious.bare(images)) / found["ours"]
    speeds = ", ".join(f"{name} {batch_size / seconds:.1f}" for name, seconds in found.items())
    print(
        f"{precision}, {batch_size} images: step / bare backbone {found['ours'] / found['bare']:.3f} (time); images/s: "
        f"ours / the obvious loop {found['obvious'] / found['ours']:.3f}, compiled / eager backbone "
        f"{found['bare'] / found['compiled']:.3f}; {speeds}; share of the processor's peak {reached / peak:.2f} "
        f"({reached / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s)",
        flush=True,
    )


def measured(n_steps: int, batch_size: int, n_threads: int, precision: str) -> None:
    """Print the median seconds of a step: of this process, which may be one of several."""
    use_threads(n_threads)
    learner, (images, labels) = ours(batch_size, precision), batch(batch_size)
    rows = learner.world.rows(batch_size)
    times = []
    for _ in range(n_steps + 2):
        start = time.perf_counter()
        learner.step(0, images[rows], [(DOMAIN, labels)])
        times.append(time.perf_counter() - start)
    if learner.world.is_first:
        print(statistics.median(times[2:]))


def ranks(n_rounds: int, batch_size: int, precision: str, n_steps: int = 10) -> None:
    """Print the images/s of two processes over those of one."""
    own = [__file__, "--batch-size", str(batch_size), "--measure", str(n_steps), "--precision", precision]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    near = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    commands = {"one": [sys.executable, *own, "--threads", "2"], "two": [*launch, *own, "--threads", "1"]}
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(n_rounds):
        for name, command in commands.items():
            done = subprocess.run(command, env=os.environ | near, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            found[name].append(float(done.stdout.split()[-1]))
    ratio = statistics.median(one / two for one, two in zip(*found.values(), strict=True))
    speeds = ", ".join(f"{name} {batch_size / statistics.median(seconds):.1f}" for name, seconds in found.items())
    print(f"{precision}, {batch_size} images: two processes / one {ratio:.3f}. Images/s: {speeds}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--only", choices=("steps", "ranks"))
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="default: those that the processor has")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)  # steps of a process that `ranks` starts
    given = parser.parse_args()
    if given.measure:
        measured(given.measure, given.batch_size, given.threads, given.precision)
        return
    use_threads(given.threads)
    both = ["float32", *(["bfloat16"] if multiplies_bfloat16(CPU) else [])]
    for precision in [given.precision] if given.precision else both:
        if given.only != "ranks":
            steps(given.rounds, given.batch_size, precision)
        if given.only != "steps":
            ranks(max(1, given.rounds // 2), given.batch_size, precision)


if __name__ == "__main__":
    main()
