"""What a frozen teacher says of the images of a catalog, computed once and kept on the disk in half precision.

    <folder>/<key>/class.npy      [image, dim]
    <folder>/<key>/patches.npy    [image, position, dim]
    <folder>/<key>/cache.json     what it is of, and how many images are done; written last

Worth it where images are the same in every epoch: an augmented one is seen once. Filling goes on where it was stopped;
of two processes the second waits for the first. All caches of a folder together take so much room and no more: the one
that was opened longest ago goes first.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from udonlib.errors import UserError
from udonlib.files import is_held, take_lock, write_json, writing
from udonlib.models.ladder import Kind, Tokens

FACTS = "cache.json"
SAVE_EVERY = 16  # batches between two notes of how far it is


def cache_key(teacher: str, data: str, image_size: int, n_positions: int | None) -> str:
    """Name of a cache: another one for any other teacher, images or size.

    Args:
        teacher: its fingerprint.
        data: fingerprint of the images, their order and how they are prepared.
        image_size: side of the images that the teacher is given, in pixels.
        n_positions: to which its patches are resampled; None: its own.
    """
    return hashlib.sha256(json.dumps([teacher, data, image_size, n_positions]).encode()).hexdigest()[:32]


class FeatureCache:
    """Features of images by their positions, read from the disk as they are asked for.

    Args:
        folder: of all caches.
        key: see `cache_key`.
        shapes: of one image's tokens by kind.
        n_images: that it is to hold.
        max_bytes: that all caches of the folder may take.

    Raises:
        UserError: "... takes 12 GB, and all caches may take 5 GB", before anything is written or removed.
    """

    def __init__(
        self, folder: Path, key: str, shapes: Mapping[Kind, tuple[int, ...]], n_images: int, max_bytes: float
    ) -> None:
        self.path = folder / key
        self.shapes, self.n_images, self.max_bytes = dict(shapes), n_images, max_bytes
        self.n_bytes = 2 * n_images * sum(math.prod(shape) for shape in shapes.values())
        if self.n_bytes > max_bytes:
            raise UserError(
                f"the features of {n_images:,} images take {self.n_bytes / 1e9:.3g} GB in {folder}, and all caches "
                f"may take {max_bytes / 1e9:.3g} GB: allow more, leave patches out, or compute features anew each time"
            )
        self._arrays: dict[Kind, np.memmap] = {}

    @property
    def n_done(self) -> int:
        """Images whose features are there; 0 too where a cache is damaged, or of other shapes."""
        try:
            facts = json.loads((self.path / FACTS).read_bytes())
            arrays = {kind: self._map(kind, "r") for kind in self.shapes}  # refuses a file that was cut off
            whole = all(array.shape == (self.n_images, *self.shapes[kind]) for kind, array in arrays.items())
            return int(facts["n_done"]) if whole and facts["of"] == self._facts() else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _facts(self) -> dict[str, Any]:
        return {"n_images": self.n_images, "shapes": {kind: list(shape) for kind, shape in self.shapes.items()}}

    def fill(
        self,
        compute: Callable[[Int[np.ndarray, "n"]], Tokens],
        batch_size: int = 256,
    ) -> Iterator[int]:
        """Compute what is missing, and yield after each batch how many images are done.

        Args:
            compute: tokens of the images at some positions, which rise.

        Raises:
            UserError: features that are not finite, or too large for half precision; a full disk.
        """
        lock = take_lock(self.path.with_name(f"{self.path.name}.lock"))
        try:
            done = self.n_done
            if done == 0:
                self._make_room()
                with writing(self.path, self.n_bytes):
                    self.path.mkdir(parents=True, exist_ok=True)
                    for kind, shape in self.shapes.items():
                        self._map(kind, "w+", (self.n_images, *shape))
                    self._note(0)
            self._open("r+")
            for number, start in enumerate(range(done, self.n_images, batch_size)):
                positions = np.arange(start, min(start + batch_size, self.n_images))
                for kind, tokens in compute(positions).items():
                    half = tokens.half().cpu()
                    if not half.isfinite().all():
                        raise UserError(f"{self.path}: {kind} tokens that are not finite, or beyond 65,504")
                    self._arrays[kind][positions] = half.numpy()
                done = start + len(positions)
                if number % SAVE_EVERY == SAVE_EVERY - 1 or done == self.n_images:
                    with writing(self.path, self.n_bytes):
                        for array in self._arrays.values():
                            array.flush()
                    self._note(done)
                yield done
            self._open("r")
            os.utime(self.path / FACTS)
        finally:
            lock.close()

    def __getitem__(self, positions: Int[np.ndarray, "n"]) -> dict[Kind, Tensor]:
        """Tokens of the images at these positions, in half precision, on the CPU."""
        if not self._arrays:
            raise ValueError("fill the cache first")
        return {kind: torch.from_numpy(np.ascontiguousarray(array[positions])) for kind, array in self._arrays.items()}

    def _map(self, kind: Kind, mode: Any, shape: tuple[int, ...] | None = None) -> np.memmap:
        file = self.path / f"{kind}.npy"
        return np.lib.format.open_memmap(file, mode=mode, dtype=np.float16 if shape else None, shape=shape)

    def _open(self, mode: str) -> None:
        self._arrays = {kind: self._map(kind, mode) for kind in self.shapes}

    def _note(self, n_done: int) -> None:
        write_json(self.path / FACTS, {"n_done": n_done, "of": self._facts()})

    def _make_room(self) -> None:
        """Remove the caches that were opened longest ago, until this one has room beside the others."""
        shutil.rmtree(self.path, ignore_errors=True)  # damaged, or of other shapes
        others = [path.parent for path in self.path.parent.glob(f"*/{FACTS}") if path.parent != self.path]
        others.sort(key=lambda other: (other / FACTS).stat().st_mtime_ns)
        taken = {other: sum(file.stat().st_size for file in other.iterdir()) for other in others}
        for other in others:
            if self.n_bytes + sum(taken.values()) <= self.max_bytes:
                break
            if not is_held(other.with_name(f"{other.name}.lock")):  # somebody fills it
                shutil.rmtree(other, ignore_errors=True)
                del taken[other]
        if self.n_bytes + sum(taken.values()) > self.max_bytes:
            raise UserError(
                f"{self.path.parent}: other processes fill {sum(taken.values()) / 1e9:.3g} of the "
                f"{self.max_bytes / 1e9:.3g} GB that caches may take; allow more, or wait for them"
            )
        free = shutil.disk_usage(self.path.parent).free
        if free < self.n_bytes:  # a full disk would end the process where an array is written in memory
            raise UserError(
                f"{self.path.parent}: {free / 1e9:.3g} GB are free, the features of {self.n_images:,} images take "
                f"{self.n_bytes / 1e9:.3g} GB: make room, or compute features anew each time"
            )
