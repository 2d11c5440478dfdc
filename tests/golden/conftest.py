"""Golden numbers: arrays that the original programs produced. `UDON_GOLDEN=<folder>` reads another set of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(os.environ.get("UDON_GOLDEN", Path(__file__).parent / "data"))

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Arrays]:
    """Load one file of arrays by its name without ending."""

    def load(name: str) -> Arrays:
        with np.load(GOLDEN / f"{name}.npz") as file:
            return {key: file[key] for key in file}

    return load


@pytest.fixture(scope="session")
def agree() -> Callable[..., None]:
    """Assert equality within a tolerance relative to max(1, max|expected|), and name the array that differs."""

    def check(name: str, found: object, expected: np.ndarray, tolerance: float) -> None:
        actual = found.detach().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
        assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
        size = max(1.0, float(np.abs(expected).max(initial=0)))
        worst = float(np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max(initial=0))
        assert worst <= tolerance * size, f"{name}: off by {worst:.3g}, tolerance {tolerance * size:.3g}"

    return check
