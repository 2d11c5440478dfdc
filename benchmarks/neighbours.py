"""Pace of training beside other busy processes, for several ways in which threads may wait for each other.

    python benchmarks/neighbours.py

Steps of the embedded benchmark's preset on one ready batch, in a process of its own for each setting: alone, beside one
process that keeps a core busy, and beside four. Between two parallel regions an OpenMP thread spins for a while before
it sleeps: long spins are fast on idle cores, and collapse when one of the threads loses its core. The first row is what
runs do (`training.threads`), the others what the environment alone can set. Whatever else the machine did is printed
with each figure, in cores: trust those of an idle one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SETTINGS: dict[str, dict[str, str]] = {
    "udonlib's": {},
    "OpenMP's default": {"GOMP_SPINCOUNT": "300000"},
    "spin 100": {"GOMP_SPINCOUNT": "100"},
    "spin 1,000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10,000": {"GOMP_SPINCOUNT": "10000"},
    "spin 100,000": {"GOMP_SPINCOUNT": "100000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BUSY = (0, 1, 4)


def ticks(file: str = "/proc/stat") -> tuple[int, int]:
    """Ticks that the machine's cores were busy, and in all, since it started."""
    numbers = [int(number) for number in Path(file).read_text().split("\n", 1)[0].split()[1:9]]
    return sum(numbers) - numbers[3] - numbers[4], sum(numbers)


def measure(precision: str, seconds: float, ours: bool) -> None:
    """Print images/s, and the cores' worth of other work, for each number of busy neighbours."""
    import torch

    from udonlib import presets
    from udonlib.data.catalog import load_catalog
    from udonlib.models.embedding_model import create_model
    from udonlib.models.processors import n_cores
    from udonlib.training.learner import Learner
    from udonlib.training.threads import use_threads

    params = presets.load("miniuned", precision=precision)
    catalog = load_catalog(params.data)
    threads = int(os.environ.get("OMP_NUM_THREADS", n_cores()))
    use_threads(threads) if ours else torch.set_num_threads(threads)
    learner = Learner(create_model(params, catalog.n_classes).to(memory_format=torch.channels_last), params)
    n_each = params.batch_size // len(catalog.domains)
    parts = [(domain.name, torch.arange(n_each) % domain.n_classes) for domain in catalog.domains]
    images = torch.randint(0, 256, (params.batch_size, 3, params.image_size, params.image_size)).float()
    learner.step(0, images, parts)
    for n_busy in BUSY:
        n = 0
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_busy)]
        try:
            settled = time.perf_counter() + 3.0  # the watcher of `training.threads` needs a moment, and a calm one
            while time.perf_counter() < settled:
                learner.step(n, images, parts)
            (busy, total), own, start, n = ticks(), time.process_time(), time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                learner.step(n, images, parts)
                n += 1
            spent, own = time.perf_counter() - start, time.process_time() - own
        finally:
            for loop in loops:
                loop.kill()
                loop.wait()
        now_busy, now_total = ticks()
        cores = (now_busy - busy) / max(1, now_total - total) * (os.cpu_count() or 1)
        print(n * params.batch_size / spent, max(0.0, cores - own / spent - min(n_busy, 9)))


def main(precision: str, seconds: float, rounds: int, names: list[str]) -> None:
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            command = [sys.executable, __file__, "--measure", "--precision", precision, "--seconds", str(seconds)]
            command += [] if SETTINGS[name] else ["--ours"]
            output = subprocess.check_output(command, env=os.environ | SETTINGS[name], text=True)
            found[name].append([float(line.split()[0]) for line in output.splitlines()])
            print(name, output.split(), flush=True)
    print(f"{'images/s, median':20s}" + "".join(f"{f'beside {n}':>12s}" for n in BUSY))
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    for name, values in medians.items():
        print(f"{name:20s}" + "".join(f"{value:12.0f}" for value in values))
    best, ours = max(values[0] for values in medians.values()), medians[names[0]]
    shares = ", ".join(f"beside {n} {value / ours[0]:.2f} of it" for n, value in zip(BUSY[1:], ours[1:], strict=True))
    print(f"{names[0]}: idle {ours[0] / best:.2f} of the best, {shares}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="one setting, that of the environment")
    parser.add_argument("--ours", action="store_true", help="with what runs do")
    parser.add_argument("--precision", default="float32", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each figure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.precision, arguments.seconds, arguments.ours)
    else:
        main(arguments.precision, arguments.seconds, arguments.rounds, arguments.settings)
