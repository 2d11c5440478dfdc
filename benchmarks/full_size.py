"""A dry run at the true size of the UnED benchmark, without its images: time and memory.

    python benchmarks/full_size.py [--fraction 0.05] [--parts heads evaluation] [--threads 2] [--device cpu]

1. heads: the model with 316,446 classes in 8 domains and a small backbone, its optimizer, and training steps on random
   pixels, a batch of each domain in turn, with both ways to treat the heads of absent domains.
2. evaluation: 241,986 queries against 1,397,126 index vectors of 64 dimensions through `evaluation.evaluate.evaluate`:
   merged and separate index, outcomes, neighbours, intervals. A query has the same label as about ten index images and
   resembles them; beyond that, embeddings are random.

Counts are UnED's own (ICCV 2023); its test classes are not in the table, so about ten images share one. A fraction
shrinks images and classes alike; what it took is then extrapolated: the product grows with the fraction's square.
Each part runs in a process of its own. Memory is the peak above the process before the part (Linux): of the heads, all
that model and optimizer hold; of the evaluation, all but the embeddings themselves.

Found on two AMD Zen 5 cores (AVX-512 with bfloat16), other work beside it: the evaluation takes 131 s (43.3 TFLOP, 331
GFLOP/s in all) and 0.84 GB; float32 products alone reach 95 GFLOP/s a core. Weights, gradients and moments of model and
optimizer take 1.2 GB, 1.65 GB where absent heads decay; a step of 128 images about a second, one thread.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from udonlib.data.catalog import Catalog, Domain, Split
from udonlib.data.storage import Store
from udonlib.evaluation.evaluate import evaluate
from udonlib.models.embedding_model import create_model
from udonlib.models.processors import n_cores
from udonlib.params import TrainParams
from udonlib.training.learner import Learner

# domain: training classes, test queries, images of an index of its own (0: the queries are the index)
COUNTS = {
    "food2k": (900, 9_979, 0),
    "cars": (78, 8_131, 0),
    "sop": (9_054, 60_502, 0),
    "inshop": (3_198, 14_218, 12_612),
    "inat": (4_552, 136_093, 0),
    "met": (224_408, 1_003, 397_121),
    "gldv2": (73_182, 1_129, 761_757),
    "rp2k": (1_074, 10_931, 0),
}
DIM, K, IMAGES_PER_CLASS = 64, 5, 10
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def gigabytes(field: str) -> float:
    """Return VmRSS (memory now) or VmHWM (its peak) of this process; NaN where there is no /proc."""
    if not STATUS.exists():
        return float("nan")
    return int(STATUS.read_text().split(field + ":")[1].split()[0]) * 1024 / 1e9


class Measured:
    """What one piece of work takes: seconds and GB above the memory at its beginning."""

    def __init__(self, rows: list[dict[str, object]], what: str, tflop: float = 0.0) -> None:
        self.rows, self.what, self.tflop = rows, what, tflop

    def __enter__(self) -> Measured:
        if RESET.exists():
            RESET.write_text("5")  # the peak counts from here
        self.before, self.start = gigabytes("VmRSS"), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self.start
        speed = round(1000 * self.tflop / seconds) if self.tflop else None
        peak = gigabytes("VmHWM") - self.before
        self.rows.append({"what": self.what, "seconds": round(seconds, 2), "peak_gb": round(peak, 2), "gflop_s": speed})


# --- heads -----------------------------------------------------------------------------------------------------------


def heads(fraction: float, n_threads: int, device: str) -> list[dict[str, object]]:
    """Build model and optimizer, and take steps: one of each domain to allocate the moments, one that is timed."""
    torch.set_num_threads(n_threads)
    rows: list[dict[str, object]] = []
    n_classes = {name: max(2, round(fraction * counts[0])) for name, counts in COUNTS.items()}
    for absent in ("skip", "decay"):
        params = TrainParams(
            backbone="small_resnet",
            pretrained=False,
            image_size=32,
            frozen_steps=0,
            batch_size=128,
            absent_heads=absent,
        )
        with Measured(rows, f"heads, {absent}: model of {sum(n_classes.values()):,} classes"):
            learner = Learner(create_model(params, n_classes).to(device), params)
        for what in ("first steps (moments)", "steps"):
            with Measured(rows, f"heads, {absent}: {what}, one per domain, 128 images"):
                for number, (name, n) in enumerate(n_classes.items()):
                    images = torch.randint(0, 256, (params.batch_size, 3, 32, 32), device=device).float()
                    terms, _ = learner.step(number, images, [(name, torch.randint(n, (len(images),), device=device))])
                    if not all(bool(value.isfinite()) for value in terms[name].values()):
                        raise RuntimeError(f"{name}: a loss is not finite: {terms[name]}")
        rows.append(
            {
                "what": f"heads, {absent}: tensors of weights, gradients and moments",
                "peak_gb": round(held_gigabytes(learner), 2),
            }
        )
        del learner
    return rows


def held_gigabytes(learner: Learner) -> float:
    """Return the size of all weights, gradients and moments."""
    weights = list(learner.model.parameters())
    moments = [value for state in learner.optimizer.state.values() for value in state.values()]
    tensors = [*weights, *(weight.grad for weight in weights if weight.grad is not None), *moments]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e9


# --- evaluation ------------------------------------------------------------------------------------------------------


def embedded_catalog(fraction: float) -> tuple[Catalog, dict[tuple[str, str], Tensor]]:
    """Return a catalog of UnED's counts without images, and unit vectors [image, DIM] of each domain and split."""
    generator = torch.Generator().manual_seed(0)
    domains, vectors = [], {}
    for name, (_, n_queries, n_index) in COUNTS.items():
        splits, sizes = {}, {"test": n_queries, "index": n_index}
        n_classes = max(2, round(fraction * (n_index or n_queries) / IMAGES_PER_CLASS))
        centres = torch.randn(n_classes, DIM, generator=generator)
        for split, size in {split: max(2, round(fraction * n)) for split, n in sizes.items() if n}.items():
            labels = torch.randint(n_classes, (size,), generator=generator)
            noisy = torch.randn(size, DIM, generator=generator).add_(centres[labels])
            vectors[name, split] = noisy.div_(noisy.norm(dim=1, keepdim=True))
            paths = tuple(f"{name}/{split}/{number:07}.jpg" for number in range(size))
            splits[split] = Split(split, paths, labels.numpy()[:, None])
        domains.append(Domain(name, splits))
    return Catalog("full_size", Path(), tuple(domains), Store(Path())), vectors


def evaluation(fraction: float, n_threads: int, device: str) -> list[dict[str, object]]:
    """Evaluate random embeddings as if they were images, and draw the intervals."""
    torch.set_num_threads(n_threads)
    catalog, vectors = embedded_catalog(fraction)

    def load(domain: str, split: str, batches: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Sequence[int]]]:
        for batch in batches:
            yield vectors[domain, split][torch.as_tensor(batch)], batch

    def progress(done: int, total: int) -> None:
        if done == total or done // 2**17 > (done - 4096) // 2**17:
            print(f"  {time.perf_counter() - start:5.0f} s: {done:,} of {total:,} vectors", flush=True)

    n_queries = sum(len(domain.queries("test")) for domain in catalog.domains)
    n_index = sum(len(domain.index("test")) for domain in catalog.domains)
    tflop = 2e-12 * n_queries * n_index * DIM
    rows: list[dict[str, object]] = []
    start = time.perf_counter()
    with Measured(rows, f"evaluation: {n_queries:,} queries in {n_index:,} vectors, {tflop:.1f} TFLOP", tflop):
        embed: Callable[[Tensor], Tensor] = lambda images: images.to(device)  # noqa: E731
        found = evaluate(
            catalog, "test", load, image_embedders={"random": embed}, k=K, batch_size=4096, progress=progress
        )
    with Measured(rows, "evaluation: intervals of 1,000 resamples"):
        table = found.with_intervals()
    if fraction != 1:
        seconds = float(str(rows[0]["seconds"])) / fraction**2
        rows.append({"what": "evaluation: extrapolated to full size by the product", "seconds": round(seconds, 2)})
    check(found.neighbours["random", "inat", "merged"].position, catalog, vectors)
    shown = table[["domain", "index", "n_queries", "n_index", "r_at_1", f"mmp_at_{K}", "r_at_1_low", "r_at_1_high"]]
    print(shown.round(2).to_string(index=False))
    return rows


def check(positions: np.ndarray, catalog: Catalog, vectors: dict[tuple[str, str], Tensor], n: int = 50) -> None:
    """Compare some of inat's neighbours in the merged index with a sort of all float64 products."""
    names = [(domain.name, domain.index("test").name) for domain in catalog.domains]
    start = sum(len(vectors[name]) for name in names[: catalog.names.index("inat")])
    some = torch.linspace(0, len(positions) - 1, min(n, len(positions))).long()
    products = torch.cat([vectors[name].double() @ vectors["inat", "test"][some].double().T for name in names])
    products[start + some, torch.arange(len(some))] = -torch.inf
    if not torch.equal(products.topk(K, dim=0).indices.T, torch.from_numpy(positions)[some]):
        raise RuntimeError("the neighbours are not the exact ones")
    print(f"neighbours of {len(some)} queries compared with a sort of all products: equal")


PARTS = {"heads": heads, "evaluation": evaluation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fraction", type=float, default=1.0, help="of all counts")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=n_cores())
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if not 0 < arguments.fraction <= 1:
        parser.error(f"--fraction is {arguments.fraction}; valid: above 0, at most 1")
    rows: list[dict[str, object]] = []
    for part in arguments.parts:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows += pool.submit(PARTS[part], arguments.fraction, arguments.threads, arguments.device).result()
    print(f"\n{platform.machine()}, {arguments.threads} threads, {arguments.device}, torch {torch.__version__}")
    print(pd.DataFrame(rows).to_string(index=False, na_rep=""))


if __name__ == "__main__":
    main()
