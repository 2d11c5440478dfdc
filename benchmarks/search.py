"""Time and memory of `evaluation.search.nearest` beside a bare blocked product + top-k, and faiss where installed.

    python benchmarks/search.py [--queries 20000] [--index 100000] [--dim 64] [--k 5] [--rounds 3] [--threads 2]

Every round runs all of them one after another. Ratios are taken within a round, so that other work on the machine
weighs on both sides: of wall time, and of CPU time over all threads. The floor is the best of several block sizes.
Memory is the peak above the embeddings, in a process of its own (Linux).
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from udonlib.evaluation.search import nearest

FLOOR_BLOCKS = [(1000, 1000), (512, 2048), (384, 2048), (250, 10_000), (64, 100_000)]  # queries x index rows


def embeddings(n_queries: int, n_items: int, dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries, index = torch.randn(n_queries, dim, generator=generator), torch.randn(n_items, dim, generator=generator)
    for vectors in (queries, index):
        vectors /= vectors.norm(dim=1, keepdim=True)
    return queries, index


def floor(queries: Tensor, index: Tensor, k: int, n_queries: int, n_items: int) -> Tensor:
    """Search with nothing but products and top-k, keeping the best between blocks of the index."""
    results = []
    for block in queries.split(n_queries):
        best, where = block.new_empty((len(block), 0)), torch.empty((len(block), 0), dtype=torch.int64)
        for start in range(0, len(index), n_items):
            values, rows = (block @ index[start : start + n_items].T).topk(min(k, len(index) - start))
            best, order = torch.cat([best, values], dim=1).topk(k)
            where = torch.cat([where, rows + start], dim=1).gather(1, order)
        results.append(where)
    return torch.cat(results)


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Return wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


MEMORY = """
import torch
from pathlib import Path
from benchmarks.search import embeddings, nearest
torch.set_num_threads({threads})
queries, index = embeddings({queries}, {index}, {dim})
nearest(queries[:600], index[:2000], {k})  # libraries allocate at their first use
kib = lambda name: int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = kib("VmRSS")
nearest(queries, index, {k})
print((kib("VmHWM") - before) // 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"queries": 20_000, "index": 100_000, "dim": 64, "k": 5, "rounds": 3, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    queries, index = embeddings(arguments.queries, arguments.index, arguments.dim)
    k = arguments.k + 1  # one more than wanted: the floor has no other way to leave out the query itself
    exclude = torch.full((len(queries),), -1)
    runs: dict[str, Callable[[], object]] = {"nearest": lambda: nearest(queries, index, arguments.k, exclude)}
    for n_queries, n_items in FLOOR_BLOCKS:
        runs[f"floor {n_queries} x {n_items}"] = partial(floor, queries, index, k, n_queries, n_items)
    try:
        import faiss

        faiss.omp_set_num_threads(arguments.threads)
        flat = faiss.IndexFlatIP(arguments.dim)
        flat.add(index.numpy())
        runs["faiss flat"] = lambda: flat.search(queries.numpy(), k)
    except ImportError:
        print("faiss is not installed: left out")

    warm = queries[:600]
    nearest(warm, index, arguments.k)
    agree = torch.equal(nearest(warm, index, k)[1], floor(warm, index, k, 600, 5000))
    print(f"same neighbours as the floor's for {len(warm)} queries: {agree}")
    for number in range(arguments.rounds):
        took = {name: seconds(run) for name, run in runs.items()}
        print(f"round {number + 1}: " + ", ".join(f"{name} {wall:.2f} s" for name, (wall, _) in took.items()))
        floors = [times for name, times in took.items() if name.startswith("floor")]
        wall, cpu = (took["nearest"][i] / min(times[i] for times in floors) for i in (0, 1))
        print(f"         nearest / best floor: wall {wall:.2f}, CPU {cpu:.2f}")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY.format(**vars(arguments))], capture_output=True, text=True, check=True
    )
    print(f"peak memory above the embeddings: {int(done.stdout)} MiB")


if __name__ == "__main__":
    main()
