"""Many image files looked at in bounded time: first the ends of every file, then pixels; by threads, in order.

Both passes stop when the time is up; what was not looked at is known.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from jaxtyping import Int64

from udonlib.data.check.probe import SIDE, FileFacts, PixelFacts, probe_file, probe_pixels
from udonlib.data.storage import Store
from udonlib.errors import UserError

Facts = TypeVar("Facts", FileFacts, PixelFacts)
Progress = Callable[[str, int, int], None]  # what is read, how many of it, of how many

CHUNK = 64  # images that a thread takes at a time
MAX_THREADS = 8  # more would wait for each other
FILES_SHARE = 0.75  # of the time, at most, for the ends of files: what looks cut has to be decoded still


class ImageScan:
    """What is known of images by position; columns of positions that were not looked at are 0.

    Attributes:
        problems: position -> what is wrong, of images that cannot be read.
        read, decoded: whose file was read and is an image; whose pixels were decoded.
        n_files, n_pixels: how many were looked at, bad ones among them.
        n_bytes, keys, sizes (width and height), kind, whole: of the files, as of FileFacts; `kind` is a place in
            `kinds`, pairs of format and mode.
        hashes, thumbnails, brightest: as of PixelFacts.
    """

    def __init__(
        self,
        store: Store,
        paths: Sequence[str],
        seconds: float | None,
        progress: Progress | None = None,
        n_threads: int = 1,
    ) -> None:
        n = len(paths)
        self._n_threads = min(MAX_THREADS, n_threads)
        self._store, self._paths, self._progress = store, paths, progress
        self._seconds = np.inf if seconds is None else seconds
        self._until: dict[str, float] = {}
        self.problems: dict[int, str] = {}
        self.n_files = self.n_pixels = 0
        self.read, self.decoded, self.whole = (np.zeros(n, bool) for _ in range(3))
        self.n_bytes, self.keys = np.zeros(n, np.int64), np.zeros(n, np.uint64)
        self.sizes, self.kind = np.zeros((n, 2), np.int32), np.zeros(n, np.int16)
        self.hashes, self.brightest = np.zeros(n, np.uint64), np.zeros(n, np.uint8)
        self.thumbnails = np.zeros((n, 3 * SIDE * SIDE), np.uint8)
        self._kinds: dict[tuple[str, str], int] = {}

    @property
    def kinds(self) -> list[tuple[str, str]]:
        """Format and mode of each kind."""
        return list(self._kinds)

    def note_missing(self, positions: Iterator[int]) -> None:
        """Note images that are known not to exist."""
        self.problems |= dict.fromkeys(positions, "no such file")
        self.n_files = len(self.problems)

    def read_files(self, order: Int64[np.ndarray, "_"]) -> None:
        """Read the ends of these files, in this order, but of those that are missing. The time begins here."""
        now = time.perf_counter()
        self._until = {"files": now + FILES_SHARE * self._seconds, "pixels": now + self._seconds}
        order = order[[position not in self.problems for position in order.tolist()]]
        for position, found in self._each("files", probe_file, order, self.n_files):
            self.n_files += 1
            if isinstance(found, FileFacts):
                self.read[position], self.whole[position] = True, found.seems_whole
                self.n_bytes[position], self.keys[position] = found.n_bytes, found.key
                self.sizes[position] = found.width, found.height
                self.kind[position] = self._kinds.setdefault((found.format, found.mode), len(self._kinds))

    def read_pixels(self, n: int | None, seed: int) -> None:
        """Decode what looks cut and, in random order, all that is left or `n` of it."""
        shuffled = np.random.default_rng(seed).permutation(np.flatnonzero(self.read))
        order = np.concatenate([shuffled[~self.whole[shuffled]], shuffled[self.whole[shuffled]][:n]])
        for position, found in self._each("pixels", probe_pixels, order, 0):
            self.n_pixels += 1
            if isinstance(found, PixelFacts):
                self.decoded[position] = True
                self.hashes[position], self.brightest[position] = found.hash, found.brightest
                self.thumbnails[position] = np.frombuffer(found.thumbnail, np.uint8)

    def _each(
        self, what: str, probe: Callable[[Store, str], Facts], positions: Int64[np.ndarray, "_"], done: int
    ) -> Iterator[tuple[int, Facts | None]]:
        """Yield each image with what the probe says of it, until the time is up; None for one that has a problem."""

        def probed(chunk: list[int]) -> list[Facts | str]:
            results: list[Facts | str] = []
            for path in map(self._paths.__getitem__, chunk):
                try:
                    results.append(probe(self._store, path))
                except UserError as error:
                    results.append(str(error).removeprefix(f"{path}: "))
            return results

        total = done + len(positions)
        chunks = deque(positions[i : i + CHUNK].tolist() for i in range(0, len(positions), CHUNK))
        running: deque[tuple[list[int], Future[list[Facts | str]]]] = deque()
        with ThreadPoolExecutor(self._n_threads) as pool:
            while running or (chunks and time.perf_counter() < self._until[what]):
                while chunks and len(running) < 2 * self._n_threads and time.perf_counter() < self._until[what]:
                    chunk = chunks.popleft()
                    running.append((chunk, pool.submit(probed, chunk)))
                if not running:
                    break
                chunk, future = running.popleft()
                for position, facts in zip(chunk, future.result(), strict=True):
                    if isinstance(facts, str):
                        self.problems[position] = facts
                    yield position, None if isinstance(facts, str) else facts
                done += len(chunk)
                if self._progress:
                    self._progress(what, done, total)
