"""Images in memory, or files by their paths, as unit vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float32
from PIL import Image
from torch import Tensor

from udonlib.data.decoding import ImageError
from udonlib.errors import UserError
from udonlib.evaluation.reading import Embed, Load, in_batches
from udonlib.search.pictures import PictureLoader, open_picture, ready

Vectors: TypeAlias = Float32[np.ndarray, "_ dim"]
Progress = Callable[[str, int, int], None]  # what is done ("embedding"), how much of it, of how much: as of evaluations


class ModelFacts(NamedTuple):
    """Which model made some vectors.

    fingerprint: of its weights and of how it sees images: vectors of equal fingerprints can be compared. name: of its
    run or file. source: what `load` finds it by.
    """

    fingerprint: str
    name: str
    source: str
    precision: str
    dim: int

    def check(self, other: ModelFacts, what: str, where: object) -> None:
        """Refuse vectors of another model: their products with ours mean nothing.

        Raises: UserError "<where>: holds vectors of model ...".
        """
        if self.fingerprint != other.fingerprint:
            raise UserError(
                f"{where}: {what} of model '{self.name}' ({self.fingerprint[:12]}), and this is model '{other.name}' "
                f"({other.fingerprint[:12]}), whose vectors mean something else: load('{self.source}'), or embed again"
            )


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Unit vectors of images.

    vectors: a row for each image that could be read; of a folder, they stay on the disk until they are looked at.
    images: a row for each: `id` (its path; its position in a list of other than paths), and what else is known of it.
    model: which made them. skipped: id -> why it could not be read. folder: of their files, if there are any. data:
    where the images of these were.
    """

    vectors: Vectors
    images: pd.DataFrame
    model: ModelFacts
    skipped: Mapping[Any, str] = field(default_factory=dict)
    folder: Path | None = None
    data: str | None = None

    @property
    def ids(self) -> list[Any]:
        """The images' ids, in the order of the vectors."""
        return self.images["id"].tolist()

    def __len__(self) -> int:
        return len(self.vectors)


def embed_pictures(
    embed: Embed,
    model: ModelFacts,
    pictures: Any,
    size: int,
    batch_size: int = 128,
    on_bad_image: str = "error",
    n_threads: int = 0,
    progress: Progress | None = None,
) -> Embeddings:
    """Embed images that are in memory, or files.

    Args:
        embed: unit vectors of a batch of uint8 images [n, 3, size, size].
        model: says what `embed` is.
        pictures: one of any kind that `pictures.open_picture` takes; a sequence of them, each taken when it is needed;
            or a batch of uint8: [n, 3, height, width] of PyTorch, [n, height, width, 3] of numpy.
        on_bad_image: "error" or "skip".
        n_threads: that decode and resize; 0: as many as there are cores.
        progress: called with ("embedding", images done, images in all).

    Raises: ImageError for an image that cannot be read, unless these are skipped; UserError for what is no image.
    """
    if isinstance(pictures, str | Path | Image.Image) or (
        isinstance(pictures, np.ndarray | Tensor) and pictures.ndim < 4
    ):
        pictures = [pictures]
    if not hasattr(pictures, "__len__") or not hasattr(pictures, "__getitem__") or isinstance(pictures, Mapping):
        raise UserError(f"parameter 'images': found {type(pictures).__name__}, expected an image, a list or a folder")

    def opened(position: int) -> Image.Image:
        picture = pictures[position]
        return open_picture(picture, f"image {position} (from 0)")

    loader = PictureLoader(opened, size, on_bad_image, n_threads)
    whole = ready(pictures, size)
    load = loader if whole is None else _sliced(whole)
    vectors = np.empty((len(pictures), model.dim), np.float32)
    kept: list[int] = []
    for positions, made in vectors_of(embed, load, range(len(pictures)), batch_size, progress):
        vectors[len(kept) : len(kept) + len(made)] = made
        kept += positions
    are_paths = whole is None and all(isinstance(pictures[i], str | Path) for i in range(len(pictures)))
    ids = [str(pictures[i]) if are_paths else i for i in kept]
    skipped = {str(pictures[i]) if are_paths else i: problem for i, problem in loader.problems.items()}
    return Embeddings(vectors[: len(kept)], pd.DataFrame({"id": ids}), model, skipped)


def _sliced(images: Tensor) -> Load:
    """Load from a batch that is as the model sees it."""

    def load(domain: str, split: str, batches: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Sequence[int]]]:
        for batch in batches:
            yield images[batch[0] : batch[-1] + 1], batch

    return load


def vectors_of(
    embed: Embed, load: Load, positions: Sequence[int], batch_size: int, progress: Progress | None = None, done: int = 0
) -> Iterator[tuple[Sequence[int], Vectors]]:
    """Yield positions and vectors of images, a batch at a time, in their order: of those that `load` gives.

    Args:
        done: images that count as done before the first.

    Raises: ImageError where a vector is not finite.
    """
    total = done + len(positions)
    for batch, read, images in in_batches(load, "", "", positions, batch_size):
        if len(read):
            with torch.inference_mode():
                made = embed(images).float().cpu().numpy()
            if not np.isfinite(made).all():
                raise ImageError(f"image {read[0]} (from 0), or after: its vector is not finite: the model is broken")
            yield read, made
        done += len(batch)
        if progress:
            progress("embedding", done, total)
