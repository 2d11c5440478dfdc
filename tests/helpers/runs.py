"""A run brought to its end, what its checkpoint holds, and processes of runs that a test leaves."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

from udonlib.runs.apart.process import Worker, read_sign
from udonlib.runs.folder import RunFolder


def finish(run):
    for _ in run.train():
        pass
    return run


def checkpoint(run):
    return torch.load(run.last, weights_only=True)


def flat(state, prefix=""):
    """Every tensor and number of a checkpoint by its path."""
    if isinstance(state, dict | list):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: value for k, v in items for key, value in flat(v, f"{prefix}/{k}").items()}
    return {prefix: state}


def assert_same_state(first, second):
    first, second = flat(first), flat(second)
    assert set(first) == set(second)
    for key, value in first.items():
        if key.endswith("/seconds"):
            continue
        same = torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
        assert same, key


def end_workers(folder: Path) -> None:
    """Kill the processes that train runs somewhere in a folder: they outlive whoever began them, tests too."""
    for file in folder.rglob("worker.lock"):
        run = RunFolder(file.parent)
        if Worker(run).is_alive and (number := read_sign(run).get("pid")):
            os.kill(number, signal.SIGKILL)
