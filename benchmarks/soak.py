"""A run of very many steps: whether memory, open files or threads grow, and whether its pace falls.

    python benchmarks/soak.py                     100,000 steps of a toy model, about a quarter of an hour
    python benchmarks/soak.py --steps 20000

Everything that a long run does happens often: windows, records, checkpoints, validations, and somebody who steers. What
the process holds is looked at ten times; after the first tenth, when all caches are full, nothing may grow any more.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

from udonlib import presets
from udonlib.runs.run import open_run
from udonlib.training.steering import change_control

MOST = 1.05  # times the memory of the first tenth


def held() -> tuple[float, int, int]:
    """MiB of memory, open files, threads of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024, len(os.listdir("/proc/self/fd")), threading.active_count()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        params = presets.load(
            "smoke",
            outputs=folder,
            run="soak",
            steps=steps,
            domains=["emoji", "flags"],
            backbone_args={"width": 2},
            image_size=16,
            resize_size=16,
            batch_size=4,
            domains_per_batch=2,
            n_threads=1,
            update_every=50,
            log_every=50,
            checkpoint_every=max(1, steps // 200),
            eval_every=max(1, steps // 20),
            check_data="skip",
        )
        run, seen, began, last = open_run(params), [], time.monotonic(), 0
        for record in run.train():
            tenth = 10 * record["step"] // steps
            if record["kind"] == "allocation" and tenth > last:
                last = tenth
                change_control(run.path, multipliers={"emoji": 1.0 + tenth / 10})
                seen.append(held())
                megabytes, n_files, n_threads = seen[-1]
                pace = record["step"] / (time.monotonic() - began)
                said = f"step {record['step']:9,}: {megabytes:7.1f} MiB, {n_files} open files, {n_threads} threads"
                print(f"{said}, {pace:.0f} steps/s so far", flush=True)
        grown = seen[-1][0] / seen[0][0]
        print(f"memory at the end / after the first tenth: {grown:.3f}; files {seen[0][1]} -> {seen[-1][1]}")
        if grown > MOST or seen[-1][1] > seen[0][1] + 1 or seen[-1][2] > seen[0][2]:
            raise SystemExit("something grows")


if __name__ == "__main__":
    main()
