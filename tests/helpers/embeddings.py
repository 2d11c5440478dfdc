"""A small finished run whose test images are a map: what the tests of the embedding explorer look at."""

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.catalogs import write_uned_tree
from udonlib import presets, runs
from udonlib.lab import projections
from udonlib.lab.explore import embedding_map
from udonlib.presets import EmbeddingsParams

# Classes of each split and their images: 2 x (6 + 5 + 4) queries, and one domain with an index of its own.
SIZES = {"train": (4, 3, 5), "val": (3, 3), "test": (6, 5, 4)}
N_QUERIES, N_INDEX = 30, 42  # flags: 15 other images of the test classes, 12 train images


def train(folder: Path, name: str = "small", **values: object) -> Path:
    """Train a run of two domains for two steps on a tree beside its results; returns the folder of results."""
    data = folder / "data"
    if not data.exists():
        write_uned_tree(data, sizes=SIZES, index_of="flags")
    settings = {"data": str(data), "outputs": str(folder / "results"), "run": name, "steps": 2, "eval_every": 2}
    settings |= {"domains_per_batch": 2, "batch_size": 8, "n_threads": 1, "warmup_steps": 1, "precision": "float32"}
    run = runs.open_run(presets.load("smoke", **settings | values))
    for _ in run.train():
        pass
    return folder / "results"


def quick_umap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let UMAP be something else than PCA that is computed at once: tests/test_projections.py tests the true one."""

    def turned(vectors: np.ndarray, settings: projections.Umap) -> np.ndarray:
        return projections.pca(vectors)[0][:, ::-1].copy()

    monkeypatch.setattr(projections, "_fit", turned)


def open_small(results: Path, **values: object) -> embedding_map.EmbeddingMap:
    """The map of the last run, not embedded."""
    return embedding_map.open_map(EmbeddingsParams(outputs=str(results), n_threads=1, **values))


def clouds(n: int = 60, dim: int = 8, seed: int = 0) -> np.ndarray:
    """Unit vectors around two directions."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(scale=0.2, size=(n, dim))
    vectors[:, 0] += np.where(np.arange(n) < n // 2, 1, -1)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
