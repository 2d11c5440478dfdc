"""Programs in a process of their own, such as people run who have only a release."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Beside a CPU build of torch, PyPI's torchvision cannot load: see `models.backbones`. A whole installation needs none
# of this.
TIMM = """
import sys, torch
try:
    import timm
except RuntimeError:
    for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "timm")]:
        del sys.modules[name]
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def run_fresh(script: str, folder: Path) -> str:
    """What a script prints that runs in a folder; the test fails where it does."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
