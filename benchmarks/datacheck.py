"""Seconds and memory of the check of data: of 100,000 small photographs on the disk, and of MiniUnED.

    python benchmarks/datacheck.py [--images 100000] [--seconds 60] [--cores 2] [--folder DIR]

The photographs are JPEGs of 100 x 100 to 400 x 320 pixels, cut out of a few large made-up ones, so that few are alike,
in 10 domains of classes of 20; they are kept in the folder for the next time. Each measurement has a process of its
own: listing and the thorough check, as data.ipynb does it; the quick check, as training does it; MiniUnED's both.
Memory is the peak of that process, with all that it has loaded. Beside other work, CPU seconds say more than seconds.
"""

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

PER_CLASS, DOMAINS = 20, 10
MEASURE = """
import json, resource, sys, time
from udonlib.data.check.datacheck import check_catalog, check_quickly
from udonlib.data.catalog import load_catalog
from udonlib.models.processors import n_cores
began, cpu = time.perf_counter(), time.process_time()
catalog = load_catalog(sys.argv[1])
listed = time.perf_counter()
seconds = float(sys.argv[3])
n = n_cores()
if sys.argv[2] == "quick":
    check = check_quickly(catalog, n_threads=n)
else:
    check = check_catalog(catalog, seconds, n_threads=n)
print(json.dumps({
    "listing": listed - began, "all": time.perf_counter() - began, "cpu": time.process_time() - cpu,
    "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "verdict": check.verdict,
    "found": [str(finding) for finding in check.findings],
}))
"""


def photographs(folder: Path, n: int) -> None:
    """Write n JPEGs, about a third of them small, as domain/class/image."""
    rng = np.random.default_rng(0)
    sources = []
    for _ in range(8):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((2000, 1500), Image.Resampling.BICUBIC)) + rng.normal(0, 6, (1500, 2000, 3))
        sources.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    for number in range(n):
        width, height = ((100, 100), (250, 200), (400, 320))[number % 3]
        left, top = rng.integers(0, 2000 - width), rng.integers(0, 1500 - height)
        path = folder / f"domain{number % DOMAINS}" / f"class{number // DOMAINS // PER_CLASS:05d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        sources[number % 8].crop((left, top, left + width, top + height)).save(buffer, "JPEG", quality=80)
        path.write_bytes(buffer.getvalue())
    (folder / ".complete").write_text(str(n))


def measure(data: str, how: str, seconds: float, cores: int) -> dict:
    """Check some data in a process of its own."""
    pinned = sorted(os.sched_getaffinity(0))[:cores]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, data, how, str(seconds)],
        preexec_fn=lambda: os.sched_setaffinity(0, pinned),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def processor() -> str:
    """Name the processor, as well as the system does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=60.0, help="limit of the thorough check")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "udonlib-datacheck")
    arguments = parser.parse_args()
    folder = arguments.folder / str(arguments.images)
    if not (folder / ".complete").exists():
        print(f"writing {arguments.images:,} photographs to {folder}", flush=True)
        photographs(folder, arguments.images)
    print(f"{processor()}, {arguments.cores} cores, load {os.getloadavg()[0]:.1f}")
    for data in (str(folder), "miniuned"):
        for how in ("thorough", "quick"):
            found = measure(data, how, arguments.seconds, arguments.cores)
            name, listing = f"{Path(data).name}, {how}", f"listing {found['listing']:.1f} s among them"
            print(
                f"{name:20s} {found['all']:6.1f} s, {listing}, {found['cpu']:6.1f} s of CPU, {found['mib']:,} MiB"
                f"\n    {found['verdict']}\n    {'; '.join(found['found']) or 'nothing found'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
