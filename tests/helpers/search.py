"""A model that is a small picture of the image, and embeddings without images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from udonlib.data.decoding import decode, prepare_eval
from udonlib.search.embed import Embeddings, ModelFacts

SIZE = 8
MODEL = ModelFacts("f" * 64, "small", "somewhere/small", "float32", 12)
OTHER = MODEL._replace(fingerprint="0" * 64, name="other")


def embed(images):
    """Mean colours of four quarters, to unit norm."""
    assert images.dtype == torch.uint8
    return F.normalize(F.adaptive_avg_pool2d(images.float() + 1.0, 2).flatten(1), dim=1)


def one(data: bytes) -> np.ndarray:
    """The vector of an image's file, by itself."""
    return embed(prepare_eval(decode(data, "x"), SIZE)[None])[0].numpy()


class Counting:
    """The model, which counts the images that it is shown, and may stop after some."""

    def __init__(self, stop_after: float = float("inf")) -> None:
        self.n, self.stop_after = 0, stop_after

    def __call__(self, images):
        if self.n >= self.stop_after:
            raise KeyboardInterrupt
        self.n += len(images)
        return embed(images)


def clusters(n: int, dim: int = 12, n_classes: int = 20, spread: float = 0.3, seed: int = 0) -> Embeddings:
    """Unit vectors around random centres; columns id, domain (two of them), label, size."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, n_classes, n)
    centres = np.random.default_rng(99).standard_normal((n_classes, dim))
    vectors = centres[classes] + spread * rng.standard_normal((n, dim))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    images = pd.DataFrame(
        {
            "id": [f"{seed}/{i}.png" for i in range(n)],
            "domain": np.where(classes % 2 == 0, "even", "odd"),
            "label": [f"class {c}" for c in classes],
            "size": rng.integers(1, 4, n),
        }
    )
    return Embeddings(vectors, images, MODEL._replace(dim=dim))


def files_of(folder: Path) -> dict[str, bytes]:
    """What a folder's files hold, by their names."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
