"""Descriptors made elsewhere: read and check anyone's embeddings of a catalog's images, and write our own.

Three forms, each with the vectors of a split in the order of its info file's entries. The content tells which one it
is, whatever the file is called:

    JSON     {"cars": {"test": [[[0.1, 0.2, ...], ...]], ...}, ...}    UnED's own program, in descriptors_step_N.pkl
    JSON     {"cars": {"test": [[0.1, 0.2, ...], ...], ...}, ...}      the same without a list around all vectors
    npz      arrays [n, dim] of numbers under the keys "cars/test", .. ours: what evaluate.ipynb saves

A file is read piece by piece: millions of vectors need hardly more memory than they take in float32.
"""

import json
import os
import re
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from udonlib.data.catalog import Catalog, DataError
from udonlib.errors import nearest
from udonlib.evaluation.reading import Batch
from udonlib.files import replacing
from udonlib.models.files.weight_files import read_array_header, what_it_is

FORMS = "JSON as UnED's program writes it (descriptors_step_N.pkl), or .npz"
BLOCK = 2**12  # vectors that are checked at once
BLOCK_NUMBERS = 2**22  # numbers of a JSON file, which take 32 bytes each, that are held at once, and more than a vector
CHUNK = 2**22  # characters of a JSON file that are read at once, and more than one vector takes
# Norms of unit vectors in float32 deviate from 1 by less than this. Such vectors are kept bit for bit, so that exported
# embeddings give the neighbours that the model gives.
ROUNDING = 2.0**-18
# What reading a broken file raises; RuntimeError: an archive with a password, or packed in an unknown way.
BAD_HEADER = (ValueError, EOFError, SyntaxError, TypeError, tokenize.TokenError)  # what numpy's parser may meet
UNREADABLE = (OSError, EOFError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error, MemoryError, RuntimeError)

Key = tuple[str, str]  # domain, split
Block = list[Any] | np.ndarray  # some consecutive vectors of a split, unchecked


@dataclass(frozen=True, eq=False)
class Descriptors:
    """Unit vectors of the queries and index images of a catalog.

    vectors: by domain and split, in the order of the split. n_scaled: vectors that had another norm than 1.
    """

    vectors: Mapping[Key, Float[Tensor, "image dim"]]
    n_scaled: int

    @property
    def dim(self) -> int:
        """Size of every vector."""
        return next(iter(self.vectors.values())).shape[1]

    def __len__(self) -> int:
        return sum(map(len, self.vectors.values()))

    def load(self, domain: str, split: str, batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Yield vectors in place of images: a `evaluation.reading.Load`, whose embedder returns what it gets."""
        for batch in batches:
            yield self.vectors[domain, split][torch.as_tensor(batch)], list(batch)


def read_descriptors(
    path: str | Path,
    catalog: Catalog,
    subset: Literal["val", "test"] = "test",
    others: Literal["error", "skip"] = "error",
    progress: Callable[[int, int], None] | None = None,
) -> Descriptors:
    """Read the descriptors that a subset's evaluation needs, and scale them to unit norm.

    Splits that are not needed are counted, not kept. An image in several splits may have a vector in each;
    `evaluation.evaluate` takes the query's.

    Args:
        path: a file of one of the three forms.
        catalog: whose images they describe.
        subset: whose queries and index are needed.
        others: domains of the file that the catalog does not have: a mistake, or left out.
        progress: called with (vectors read, vectors that the subset has).

    Raises:
        DataError: the file is of none of the forms or broken; an unknown domain or split, with the nearest name; a
            domain or split that is missing; another number of vectors than images, found and expected for each split; a
            vector that is no list of finite numbers, is zero, or has another dimension than those before; vectors that
            this machine's memory cannot hold.
    """
    sizes = {(d.name, name): len(split) for d in catalog.domains for name, split in d.splits.items()}
    splits = {(d.name, split.name): split for d in catalog.domains for split in (d.queries(subset), d.index(subset))}
    vectors: dict[Key, Float32[np.ndarray, "image dim"]] = {}
    counts: dict[Key, int] = {}
    in_file: dict[str, None] = {}
    dim, n_scaled, n_read = 0, 0, 0
    for domain, name, block in _blocks(Path(path)):
        key = domain, name
        in_file[domain] = None
        if domain not in catalog.names and others == "skip":
            continue
        if domain not in catalog.names:
            raise DataError(f"{path}: {catalog.root} has no domain '{domain}'; {nearest(domain, catalog.names)}")
        if key not in sizes:
            raise DataError(f"{path}: domain '{domain}' has no split '{name}'; {nearest(name, catalog[domain].splits)}")
        first = counts.get(key, 0)
        counts[key] = first + len(block)
        if key not in splits or counts[key] > sizes[key] or not len(block):
            continue
        rows = _rows(block, dim, f"{path}: domain '{domain}', split '{name}'", first)
        if not dim:
            dim = rows.shape[1]
            _check_room(path, sum(sizes[wanted] for wanted in splits), dim)
        if key not in vectors:
            vectors[key] = np.empty((sizes[key], dim), np.float32)
        vectors[key][first : first + len(rows)], scaled = _unit(
            rows, f"{path}: domain '{domain}', split '{name}'", first
        )
        n_scaled, n_read = n_scaled + scaled, n_read + len(rows)
        if progress:
            progress(n_read, sum(sizes[wanted] for wanted in splits))
    for domain, name in splits:
        if domain not in in_file:
            raise DataError(f"{path}: no descriptors of domain '{domain}'; {nearest(domain, in_file)}")
        if (domain, name) not in counts:
            there = ", ".join(split for other, split in counts if other == domain)
            needed = ", ".join(split for other, split in splits if other == domain)
            raise DataError(f"{path}: domain '{domain}' has no split '{name}'; found: {there}; needed: {needed}")
    wrong = [
        f"{d}/{name}: found {n:,}, expected {sizes[d, name]:,}"
        for (d, name), n in counts.items()
        if n != sizes[d, name]
    ]
    if wrong:
        raise DataError("\n".join([f"{path}: a split needs one vector for each image", *wrong]))
    return Descriptors({key: torch.from_numpy(array) for key, array in vectors.items()}, n_scaled)


def save_descriptors(path: str | Path, parts: Iterable[tuple[str, str, Float[Tensor, "image dim"]]]) -> None:
    """Write vectors as an .npz that `read_descriptors` reads, in float32: one split in memory at a time.

    Args:
        path: of the file; it is replaced whole or not at all.
        parts: domain, split and the vectors of its images in their order.
    """
    with replacing(Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        for domain, split, vectors in parts:
            with archive.open(f"{domain}/{split}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, vectors.detach().float().cpu().numpy(), allow_pickle=False)


# --- checking --------------------------------------------------------------------------------------------------------


def _rows(block: Block, dim: int, where: str, first: int) -> Float64[np.ndarray, "image dim"]:
    """Return a block as one array, or say which of its vectors, counted from `first`, is none.

    dim: of the vectors before; 0 where there are none.
    """
    if isinstance(block, np.ndarray):
        if dim and block.shape[1] != dim:
            raise DataError(f"{where}: found {block.shape[1]} dimensions, the vectors before have {dim}")
        return block.astype(np.float64)
    for i, vector in enumerate(block, first):
        if type(vector) is not list or not vector:
            raise DataError(f"{where}, vector {i} (from 0): found {_named(vector)}, expected a list of numbers")
        dim = dim or len(vector)
        if len(vector) != dim:
            raise DataError(
                f"{where}, vector {i} (from 0): found {len(vector)} dimensions, the vectors before have {dim}"
            )
    if not set(map(type, chain.from_iterable(block))) <= {int, float}:
        i, value = next((i, v) for i, row in enumerate(block, first) for v in row if type(v) not in (int, float))
        raise DataError(f"{where}, vector {i} (from 0): found {_named(value)} among its numbers")
    try:
        return np.array(block, dtype=np.float64)
    except OverflowError:
        raise DataError(f"{where}, vectors from {first} (from 0): a whole number that no float can hold") from None


def _named(value: object) -> str:
    """Name a value of JSON that is in the place of another one."""
    if isinstance(value, list | dict) and value:
        what = "a list" if isinstance(value, list) else "an object"
        return f"{what} of {len(value):,} {'value' if len(value) == 1 else 'values'}"
    return f"{value!r:.60}"


def _check_room(path: str | Path, n: int, dim: int) -> None:
    """Refuse more vectors than the machine has memory for, before any is kept."""
    needed = 4 * n * dim
    names = getattr(os, "sysconf_names", {})  # not everywhere
    if "SC_PHYS_PAGES" in names and needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise DataError(f"{path}: {n:,} vectors of {dim:,} dimensions take {needed / 1e9:,.0f} GB, more than there is")


def _unit(
    rows: Float64[np.ndarray, "image dim"], where: str, first: int
) -> tuple[Float32[np.ndarray, "image dim"], int]:
    """Scale vectors to unit norm; returns them, and how many had another norm."""
    finite = np.isfinite(rows).all(axis=1)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    for problem, wrong in (("is not finite", ~finite), ("is zero: it has no direction", largest[:, 0] == 0)):
        if wrong.any():
            number, others = first + int(wrong.argmax()), int(wrong.sum()) - 1
            more = f", and {others} of the next {len(rows):,} too" if others else ""
            raise DataError(f"{where}, vector {number} (from 0): {problem}{more}")
    with np.errstate(over="ignore", under="ignore"):  # dividing first keeps the squares of all numbers in range
        small = rows / largest
        norms = np.linalg.norm(small, axis=1, keepdims=True)
        is_unit = np.abs(largest * norms - 1) <= ROUNDING
        return np.where(is_unit, rows, small / norms).astype(np.float32), int((~is_unit).sum())


# --- reading ---------------------------------------------------------------------------------------------------------


def _blocks(path: Path) -> Iterator[tuple[str, str, Block]]:
    """Yield domain, split and some of its vectors, in the order of the file; an empty split gives an empty block."""
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        raise DataError(f"no descriptors at {path}; {nearest(path.name, [entry.name for entry in folder.iterdir()])}")
    try:
        with path.open("rb") as file:
            head = file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip()
        if head.startswith(b"\x80"):
            raise DataError(f"{path}: a pickle, which is not opened: that would execute it; valid: {FORMS}")
        if not head.startswith((b"PK", b"{")):
            raise DataError(f"{path}: {what_it_is(path) or 'of no known form'}; valid: {FORMS}")
        yield from _npz_blocks(path) if head.startswith(b"PK") else _json_blocks(path)
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _npz_blocks(path: Path) -> Iterator[tuple[str, str, Block]]:
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            key = entry.filename.removesuffix(".npy")
            domain, slash, split = key.partition("/")
            if not slash or not split:
                raise DataError(f"{path}: found an array '{key}', expected the form '<domain>/<split>'")
            with archive.open(entry) as file:
                try:
                    (*shape,), fortran, dtype = read_array_header(file)
                except BAD_HEADER as error:
                    raise DataError(f"{path}: array '{key}' cannot be read: {error}") from error
                if len(shape) != 2 or dtype.kind not in "fiu" or not shape[1]:
                    raise DataError(f"{path}: array '{key}': found {dtype} of shape {shape}, expected numbers [n, dim]")
                n, dim = shape
                if n * dim * dtype.itemsize >= entry.file_size:  # the header takes some of it
                    raise DataError(f"{path}: array '{key}' cannot be read: cut short")
                step = n if fortran else max(1, min(BLOCK, BLOCK_NUMBERS // dim))
                if fortran:  # no part of it is a vector
                    _check_room(path, n, dim)
                for start in range(0, max(1, n), max(1, step)):
                    count = min(step, n - start)
                    data = file.read(count * dim * dtype.itemsize)
                    if len(data) != count * dim * dtype.itemsize:
                        raise DataError(f"{path}: array '{key}' cannot be read: cut short")
                    yield domain, split, np.frombuffer(data, dtype).reshape((count, dim), order="F" if fortran else "C")
                file.read()  # to its end, where its checksum is compared


def _json_blocks(path: Path) -> Iterator[tuple[str, str, Block]]:
    with path.open(encoding="utf-8-sig") as file:
        text = _Json(file, path)
        for domain in text.members():
            for split in text.members():
                block: list[Any] = []
                yield domain, split, []
                for vector in text.vectors():
                    block.append(vector)
                    numbers = len(block) * (len(vector) if isinstance(vector, list) else 1)
                    if len(block) == BLOCK or numbers >= BLOCK_NUMBERS:
                        yield domain, split, block
                        block = []
                yield domain, split, block
        text.end()


class _Json:
    """A JSON text of which only a piece is in memory: its outer braces and brackets are walked through one by one."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._at, self._before = "", 0, 0
        self._scan: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder())["scan_once"]

    def members(self) -> Iterator[str]:
        """Walk through an object: yields each key, with its value to be taken before the next."""
        seen: set[str] = set()
        for key in self._walk("{", "}"):
            if not isinstance(key, str):
                raise self._broken(f"found {key!r:.60}, expected a name in quotes")
            if key in seen:
                raise self._broken(f"'{key}' stands there twice")
            seen.add(key)
            self._take(":")
            yield key

    def vectors(self) -> Iterator[Any]:
        """Walk through a list of vectors, or of lists of vectors, as they follow each other: yields each vector."""
        for _ in self._places("[", "]"):
            self._next()
            while len(self._text) - self._at < AHEAD and self._more():
                pass
            if NESTED.match(self._text, self._at):
                yield from self._walk("[", "]")
            else:
                yield self._value()

    def end(self) -> None:
        """Make sure that nothing follows."""
        if self._next():
            raise self._broken(f"more text after its end: {self._text[self._at : self._at + 20]!r}")

    def _walk(self, opening: str, closing: str) -> Iterator[Any]:
        for _ in self._places(opening, closing):
            yield self._value()

    def _places(self, opening: str, closing: str) -> Iterator[None]:
        """Walk through an object or a list: stops before each of its values or keys, which is to be taken there."""
        self._take(opening)
        if self._next() == closing:
            self._take(closing)
            return
        while True:
            yield
            if self._take("," + closing) == closing:
                return

    def _value(self) -> Any:
        """Take one whole value."""
        self._next()
        while True:
            try:
                value, self._at = self._scan(self._text, self._at)
                return value
            except (StopIteration, ValueError, RecursionError):
                if len(self._text) - self._at > CHUNK or not self._more():
                    raise self._broken("broken JSON") from None

    def _take(self, valid: str) -> str:
        """Take one of some characters."""
        found = self._next()
        if not found or found not in valid:
            expected = " or ".join(f"'{character}'" for character in valid)
            raise self._broken(f"found {found or 'the end'!r}, expected {expected}")
        self._at += 1
        return found

    def _next(self) -> str:
        """The next character that is not space, left where it is; "" at the end."""
        while True:
            while self._text[self._at : self._at + 1] in (" ", "\t", "\n", "\r"):
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _more(self) -> bool:
        """Read on, and let go of what was taken; False at the file's end."""
        part = self._file.read(CHUNK)
        self._before += self._at
        self._text, self._at = self._text[self._at :] + part, 0
        return bool(part)

    def _broken(self, problem: str) -> DataError:
        return DataError(f"{self._path}: {problem}, at character {self._before + self._at} or after; {FORM}")


FORM = 'the form is {"<domain>": {"<split>": [[0.1, ...], ...]}}'
NESTED = re.compile(r"\[[ \t\r\n]*\[")
AHEAD = 128  # characters in which a list shows that lists are in it
