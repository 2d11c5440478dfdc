"""The dry run at true size, at a thousandth of it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_dry_run_trains_and_evaluates_every_domain():
    """The script itself compares neighbours with a sort of all products, and losses with infinity."""
    command = [sys.executable, "benchmarks/full_size.py", "--fraction", "0.001", "--threads", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "neighbours of 50 queries compared with a sort of all products: equal" in done.stdout
    assert "model of 320 classes" in done.stdout
    assert "244 queries in 1,398 vectors" in done.stdout
