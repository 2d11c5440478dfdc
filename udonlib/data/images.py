"""Batches of a catalog's images as uint8: read from memory or decoded, and planned ahead for a window of steps.

A worker's job ends at uint8 pixels. Augmentation and normalisation work on batches, on the device that trains
(`data.augmentation`), so that no random number is drawn in a worker and the number of workers changes nothing.
"""

import multiprocessing
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from udonlib.data.catalog import Catalog
from udonlib.data.decoding import ImageError, JpegDecoder, decode, is_plain_jpeg, prepare_eval, prepare_train
from udonlib.data.storage import Store
from udonlib.errors import UserError, nearest

Slot = tuple[str, Int[np.ndarray, "_"]]  # a domain, and positions in one of its splits
Decoded = tuple[UInt8[Tensor, "_ 3 _ _"], list[str | None]]  # images, and what is wrong with each
Left = dict[int, bytes]  # files of rows that are to be decoded where the model trains
Sent = tuple[Tensor | np.ndarray, list[str | None], Left]  # all of these, as from a worker: see `_to_send`


@dataclass(frozen=True)
class Decoder(Dataset):
    """Reads images by their paths: all that a worker process has to know.

    Args:
        leaves: plain JPEGs, undecoded, to a `JpegDecoder`.
    """

    store: Store
    size: int
    mode: str
    leaves: bool = False

    def __getitem__(self, paths: Sequence[str]) -> Sent:
        """Return images, for each path None or why it cannot be read, and the files that are left.

        An image that cannot be read is black; one that is left is none of the images.
        """
        images: list[Tensor] = []
        problems: list[str | None] = [None] * len(paths)
        left: Left = {}
        for row, path in enumerate(paths):
            try:
                data = self.store.read(path)
                if self.leaves and is_plain_jpeg(data, path):
                    left[row] = data
                else:
                    images.append(self.prepare(decode(data, path)))
            except UserError as error:
                problems[row] = str(error)
                images.append(self.black())
        return torch.stack(images) if images else self.black()[None][:0], problems, left

    def prepare(self, image: Image.Image | Tensor) -> UInt8[Tensor, "3 size size"]:
        """The pixels that a network is given."""
        return (prepare_train if self.mode == "train" else prepare_eval)(image, self.size)

    def black(self) -> UInt8[Tensor, "3 size size"]:
        """What stands for an image that cannot be read."""
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8)


class ImageReader:
    """Reads batches of a catalog's images as uint8, from memory where they have been read before.

    Args:
        catalog: what to read.
        size: pixels of a side of the result.
        mode: "train": squashed to a square; "eval": short side to `size`, the middle.
        on_bad_image: "error": stop at an image that is missing or cannot be decoded. "skip": note it in `skipped` and
            leave it black. Training replaces it (`replace_bad`); evaluation takes it out of queries and index (`bad`).
        cache: keep decoded images in memory. A split is kept as long as all of it fits into what is left.
        cache_gib: the most that is kept, in GiB.
        jpegs: decodes plain JPEGs on a device, where the images are then; nothing is kept in memory beside it.

    Attributes:
        skipped: path -> message of every bad image met so far, each counted once.
    """

    def __init__(
        self,
        catalog: Catalog,
        size: int,
        mode: str,
        on_bad_image: str = "error",
        cache: bool = True,
        cache_gib: float = 4.0,
        jpegs: JpegDecoder | None = None,
    ) -> None:
        if mode not in ("train", "eval"):
            raise UserError(f"parameter 'mode': found '{mode}'; {nearest(mode, ('train', 'eval'))}")
        if on_bad_image not in ("error", "skip"):
            raise UserError(
                f"parameter 'on_bad_image': found '{on_bad_image}'; {nearest(on_bad_image, ('error', 'skip'))}"
            )
        self.catalog = catalog
        self.decoder = Decoder(catalog.store, size, mode, leaves=jpegs is not None)
        self.on_bad_image = on_bad_image
        self.skipped: dict[str, str] = {}
        self._jpegs = jpegs
        self._bytes_left = int(cache_gib * 2**30) if cache and jpegs is None else 0
        self._memory: dict[tuple[str, str], tuple[Tensor, np.ndarray] | None] = {}

    def read(self, domain: str, split: str, indices: Int[np.ndarray, "batch"]) -> UInt8[Tensor, "batch 3 size size"]:
        """Return the images at these positions of a split.

        Raises: ImageError or DataError for a bad image, unless they are to be skipped; IndexError for a position that
            the split does not have.
        """
        paths = self.undecoded(domain, split, indices)
        decoded = self.whole(list(paths), self.decoder[list(paths)])
        return self.assemble(domain, split, indices, paths, decoded)

    def undecoded(self, domain: str, split: str, indices: Int[np.ndarray, "batch"]) -> dict[str, int]:
        """Return path -> position, each once, of those images that are not in memory."""
        paths = self.catalog[domain].splits[split].paths
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(paths):
            found = f"{indices.min()} to {indices.max()}"
            raise IndexError(f"{domain}/{split} has positions 0 to {len(paths) - 1}, asked for {found}")
        memory = self._memory_of(domain, split)
        wanted = indices if memory is None else indices[~memory[1][indices]]
        return {paths[i]: i for i in wanted.tolist()}

    def whole(self, paths: Sequence[str], sent: Sent) -> Decoded:
        """Return the images of these paths from what the decoder has made of them, and of what it has left."""
        pixels, problems, left = torch.as_tensor(sent[0]), sent[1], sent[2]
        jpegs = self._jpegs
        if jpegs is None:
            return pixels, problems

        def work() -> Tensor:
            images = torch.empty((len(paths), *pixels.shape[1:]), dtype=torch.uint8, device=jpegs.device)
            images[[row for row in range(len(paths)) if row not in left]] = pixels.to(jpegs.device)
            for (row, data), image in zip(left.items(), jpegs(list(left.values())), strict=True):
                try:
                    images[row] = self.decoder.prepare(decode(data, paths[row]) if image is None else image)
                except UserError as error:
                    problems[row], images[row] = str(error), 0
            return images

        return jpegs.beside(work), problems

    def assemble(
        self, domain: str, split: str, indices: Int[np.ndarray, "batch"], paths: dict[str, int], decoded: Decoded
    ) -> UInt8[Tensor, "batch 3 size size"]:
        """Return the images at these positions from memory and from `decoded`, the images of `undecoded`'s `paths`."""
        pixels, problems = decoded
        for path, problem in zip(paths, problems, strict=True):
            if problem is not None and self.on_bad_image == "error":
                raise ImageError(f"{problem}; on_bad_image='skip' leaves such images out")
            if problem is not None:
                self.skipped.setdefault(path, problem)
        positions = list(paths.values())
        memory = self._memory_of(domain, split)
        if memory is not None:
            images, filled = memory
            if positions:
                images[positions] = pixels
                filled[positions] = True
            return images[torch.from_numpy(indices)]
        if positions == indices.tolist():
            return pixels
        row_of = {position: row for row, position in enumerate(positions)}
        return pixels[[row_of[i] for i in indices.tolist()]]

    def holds(self, domain: str, split: str) -> bool:
        """Say whether the whole split is in memory."""
        memory = self._memory_of(domain, split)
        return memory is not None and bool(memory[1].all())

    def bad(self, domain: str, split: str) -> Int[np.ndarray, "n"]:
        """Return the positions of the split's bad images met so far; after a whole split was read, of all."""
        paths = self.catalog[domain].splits[split].paths if self.skipped else ()
        return np.array([i for i, path in enumerate(paths) if path in self.skipped], dtype=np.int64)

    def replace_bad(
        self, domain: str, split: str, images: UInt8[Tensor, "batch 3 size size"], indices: Int[np.ndarray, "batch"]
    ) -> Int[np.ndarray, "batch"]:
        """Put the next readable image of the split in place of each bad one; return the positions now shown.

        The next one: position + 1, + 2, ... around the split's end. Labels have to follow the returned positions.

        Raises: ImageError where the split has no readable image.
        """
        paths = self.catalog[domain].splits[split].paths
        shown = indices.copy()
        for row, index in enumerate(indices.tolist()):
            for step in range(len(paths)):
                shown[row] = (index + step) % len(paths)
                if step and paths[shown[row]] not in self.skipped:
                    images[row] = self.read(domain, split, shown[row : row + 1])[0]
                if paths[shown[row]] not in self.skipped:
                    break
            else:
                raise ImageError(f"{domain}/{split}: none of {len(paths)} images can be read; {self.skipped[paths[0]]}")
        return shown

    def _memory_of(self, domain: str, split: str) -> tuple[Tensor, np.ndarray] | None:
        """Return the memory of a split and which of its rows are filled, or None where it does not fit."""
        key = domain, split
        if key not in self._memory:
            n, size = len(self.catalog[domain].splits[split]), self.decoder.size
            n_bytes = n * 3 * size * size
            fits = n_bytes <= self._bytes_left
            self._bytes_left -= n_bytes if fits else 0
            empty = torch.empty((n, 3, size, size), dtype=torch.uint8) if fits else None  # takes no memory until filled
            self._memory[key] = None if empty is None else (empty, np.zeros(n, dtype=bool))
        return self._memory[key]


class _Tasks(Sampler):
    """The paths to decode for each step of the current plan, drawn here in the main process as workers get free."""

    def __init__(self, reader: ImageReader, split: str) -> None:
        self._reader, self._split = reader, split
        self.plan: Sequence[Sequence[Slot]] = ()
        self.drawn: deque[list[dict[str, int]]] = deque()  # what was asked for, step by step, and not yet received

    def __iter__(self) -> Iterator[list[str]]:
        self.drawn.clear()
        for step in self.plan:
            asked = [self._reader.undecoded(domain, self._split, indices) for domain, indices in step]
            self.drawn.append(asked)
            yield [path for paths in asked for path in paths]


class WindowLoader:
    """Yields the batches of a plan in its order, decoded ahead by worker processes or, with none, on demand.

        loader = WindowLoader(reader, n_workers=4)
        for images, slots in loader([[("emoji", indices)], [("flags", indices), ("earth", indices)]]):

    The same images whatever the number of workers. Workers live as long as the loader; they get paths and return
    pixels, so that neither catalog nor memory is copied into them. An iteration may be left at any point; a new one
    ends the one before.

    Args:
        reader: what to read with; its memory is looked up first, here in the main process.
        n_workers: processes; 0: decode in this one.
        split: which split the positions count in.
    """

    def __init__(self, reader: ImageReader, n_workers: int = 0, split: str = "train") -> None:
        self.reader, self.n_workers, self.split = reader, n_workers, split
        self._tasks = _Tasks(reader, split)
        self._workers: DataLoader | None = None
        self._iteration = 0

    def __call__(
        self, plan: Sequence[Sequence[Slot]]
    ) -> Iterator[tuple[UInt8[Tensor, "batch 3 size size"], list[Slot]]]:
        """Yield for each step the images of its slots, one after the other, and the slots.

        Slots are those of the plan but where a bad image was replaced: take labels from the slots yielded.

        Raises: ImageError at the step of a bad image, unless the reader skips them; RuntimeError where this iteration
            goes on after a newer one has begun; UserError where a worker has died.
        """
        self._iteration += 1
        mine = self._iteration
        self._tasks.plan = plan
        domains = {domain for step in plan for domain, _ in step}
        if self.n_workers == 0 or all(self.reader.holds(domain, self.split) for domain in domains):
            results: Iterator[Sent] = map(self.reader.decoder.__getitem__, self._tasks)
        else:
            if self._workers is None:
                self._workers = start_workers(self.reader.decoder, self._tasks, self.n_workers, _to_send)
            with main_unseen():
                results = iter(self._workers)
        for step in plan:
            if mine != self._iteration:
                raise RuntimeError("a newer iteration of this WindowLoader has begun")
            try:
                sent = next(results)
            except (ConnectionError, EOFError, FileNotFoundError, RuntimeError) as error:  # as its death is noticed
                if self._workers is None:
                    raise
                self._workers = None
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise UserError(
                    f"parameter 'n_workers': a process that decodes images has ended ({reason}). It may have been "
                    f"killed for memory: found {self.n_workers}, fewer may do"
                ) from error
            asked = self._tasks.drawn.popleft()
            pixels, problems = self.reader.whole([path for paths in asked for path in paths], sent)
            images, slots, row = [], [], 0
            for (domain, indices), paths in zip(step, asked, strict=True):
                part = slice(row, row := row + len(paths))
                shown = self.reader.assemble(domain, self.split, indices, paths, (pixels[part], problems[part]))
                if self.reader.skipped:
                    indices = self.reader.replace_bad(domain, self.split, shown, indices)
                images.append(shown)
                slots.append((domain, indices))
            yield images[0] if len(images) == 1 else torch.cat(images), slots


def _as_it_is(result: Any) -> Any:
    return result


def start_workers(dataset: Dataset, tasks: Any, n_workers: int, send: Callable[[Any], Any] = _as_it_is) -> DataLoader:
    """Return a loader that gives `dataset[task]` for each of `tasks` in order, made ahead by worker processes.

    They start when it is first iterated, which is to be done with `main_unseen`.

    Args:
        dataset: picklable.
        tasks: iterated in this process whenever the loader is, as workers get free.
        send: what a worker makes of a result before it goes to this process.
    """
    # A server process that has loaded this module and nothing else forks the workers: they start at once, and no
    # thread, lock or GPU state of this process comes with them. Windows has none, and starts each anew.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    return DataLoader(
        dataset,
        batch_size=None,  # a task is a whole batch
        sampler=tasks,
        num_workers=n_workers,
        persistent_workers=True,
        prefetch_factor=4,
        collate_fn=send,
        multiprocessing_context=context,
        generator=torch.Generator(),  # the loader draws a seed for its workers: not from the global generator
    )


def _to_send(result: Sent) -> Sent:
    """Put a worker's images into shared memory, or, where that is full, let their bytes go through the pipe.

    Containers often have 64 MB of it. A tensor that finds no room there would be lost on the way without a word, and
    waited for for ever.
    """
    images, problems, left = result
    try:
        return torch.as_tensor(images).share_memory_(), problems, left
    except (RuntimeError, OSError):
        return np.asarray(images), problems, left


@contextmanager
def main_unseen() -> Iterator[None]:
    """Hide where the main module came from while workers start.

    They need nothing of it, and would import it again: a plain script without a `__main__` guard would run once more in
    each of them, and end it.
    """
    main = vars(sys.modules["__main__"])
    before: dict[str, Any] = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    main.pop("__file__", None)
    try:
        yield
    finally:
        main.update(before)
