"""What people wait for without a progress line: reading a long info file, and comparing two rows of results.

    python benchmarks/tables.py [--entries 1000000]

Targets: 20 s for a million entries of an info file (about 4 s on an idle core), and 1 s for the comparison of two rows
of five seeds on eight domains of 812 queries.
"""

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import pandas as pd

from udonlib.data.info_files import read_info_file
from udonlib.evaluation.intervals import paired_difference


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def info_file(n: int) -> bytes:
    entries = [{"path": f"gldv2/images/train/{i % 16:x}/{i:016x}.jpg", "class_id": i % 73_182} for i in range(n)]
    return json.dumps(entries).encode()


def outcomes(seed: int) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    index = pd.MultiIndex.from_product(
        [range(5), [f"domain {d}" for d in range(8)], [f"{q}.png" for q in range(812)]],
        names=["seed", "domain", "path"],
    )
    return pd.DataFrame({"r_at_1": generator.integers(0, 6, len(index)) / 5}, index=index).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000)
    n = parser.parse_args().entries
    content = info_file(n)
    print(
        f"an info file of {n:,} entries: {seconds(lambda: read_info_file(content, 'f')):.1f} s (target {n / 5e4:.0f})"
    )
    row, baseline = outcomes(0), outcomes(1)
    print(f"two rows compared: {seconds(lambda: paired_difference(row, baseline, 'r_at_1')):.2f} s (target 1)")


if __name__ == "__main__":
    main()
