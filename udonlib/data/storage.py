"""Read the files of a folder or of one packed archive by their relative path: the same calls, the same errors.

A `Store` can be pickled and may be used by many processes at once, forked or spawned: an archive is read with
positioned reads, which share no file offset, and every process opens the file for itself where it has to.
"""

import hashlib
import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from udonlib.errors import UserError, nearest

# Anything but plain names between single forward slashes: empty, "." and ".." parts, absolute paths, drive letters,
# backslashes, control characters and surrogates, which no file name can hold. Works on many paths at once when they are
# joined by line feeds.
UNSAFE_PATH = re.compile(r"^/|^[A-Za-z]:|[\\\x00-\x09\x0b-\x1f\ud800-\udfff]|(?:^|/)\.{0,2}(?:/|$)", re.MULTILINE)


MAX_FILE = 2**29  # bytes of one file, unfolded: no image is as large, and UnED's longest info file is half of it


class DataError(UserError):
    """Images, info files or archives that are missing or wrong; the message names the file and the entry."""


def path_problem(path: str) -> str | None:
    """Say why `path` may not be read below a root, or None where it may."""
    if not path.isprintable() and any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in path):
        return f"path {path!r} holds a control character, such as a line feed, or bytes that are not UTF-8"
    if UNSAFE_PATH.search(path):
        return f"path {path!r} is not a plain relative path (forward slashes, no '.' or '..', nothing absolute)"
    return None


def printable(path: str) -> str:
    """Write a name as it can be printed and stored: escape what is no text, such as bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in path)


def escaped_path(path: str) -> str:
    """Write `path` as unpackers without Unicode names do: every non-ASCII character as #Uxxxx or #Lxxxxxx.

    Source: Info-ZIP's unzip; RP2K of UnED circulates in this form.
    """
    if path.isascii():
        return path
    codes = (ord(character) for character in path)
    return "".join(chr(c) if c < 128 else f"#U{c:04x}" if c < 65536 else f"#L{c:06x}" for c in codes)


class Store:
    """The files below `root`, a folder or a zip archive; `prefix` ("" or "images/") is put before every path.

    Raises: DataError where the root does not exist or is a damaged archive.
    """

    def __init__(self, root: str | Path, prefix: str = "") -> None:
        self.root = Path(root)
        self.prefix = prefix
        if not self.root.exists():
            raise DataError(f"{self.root}: no such folder or archive")
        self._archive: Any = None if self.root.is_dir() else _Archive(self.root)

    @classmethod
    def over(cls, root: Path, archive: Any) -> "Store":
        """Return a store of what an archive of another kind holds, as `tables.shards.Shards`, which lies at `root`."""
        store = object.__new__(cls)
        store.root, store.prefix, store._archive = root, "", archive
        return store

    @property
    def is_archive(self) -> bool:
        """Whether the files lie in an archive."""
        return self._archive is not None

    @property
    def start(self) -> Path:
        """Where paths begin, for messages; in a folder it exists."""
        return self.root / self.prefix

    def below(self, folder: str) -> "Store":
        """Return the same store with paths that count from `folder`."""
        other = object.__new__(Store)
        other.root, other.prefix, other._archive = self.root, f"{self.prefix}{folder}/", self._archive
        return other

    def read(self, path: str) -> bytes:
        """Return the content of one file; one that is missing is looked for under its escaped name too.

        Raises: DataError where the path leaves the root, or the file is missing, cut short or damaged.
        """
        if problem := path_problem(path):
            raise DataError(f"{self.root}: {problem}")
        for name in dict.fromkeys((path, escaped_path(path))):
            content = self._content(self.prefix + name)
            if content is not None:
                return content
        raise DataError(f"{self.root}: no file '{self.prefix}{path}'")

    def ends(self, path: str, n_bytes: int) -> tuple[bytes, bytes, int]:
        """Return the first and the last bytes of one file, `n_bytes` of them or all that it has, and its size.

        So much is read of a file in a folder, and of one that an archive stores as it is; its checksum says nothing
        then. Missing files and errors as in `read`.
        """
        if self._archive is None and path_problem(path) is None:
            for name in dict.fromkeys((path, escaped_path(path))):
                if (found := _ends(self.root / (self.prefix + name), n_bytes)) is not None:
                    return found
        content = self.read(path)
        return content[:n_bytes], content[-n_bytes:], len(content)

    def digest(self, path: str) -> int:
        """Return 64 bits that are equal for files of equal content. Raises as `read` does."""
        return name_key(self.read(path))

    def files(self, folder: str = "") -> Iterator[str]:
        """Yield the path of every file below `folder` ("" or "a/b"), counted from there, in no particular order."""
        below = self.prefix + (f"{folder}/" if folder else "")
        if self._archive:
            yield from (name[len(below) :] for name in self._archive.names() if name.startswith(below))
            return
        start = self.root / below
        for where, _, names in os.walk(start, followlinks=True):
            parent = Path(where).relative_to(start).as_posix()
            yield from (name if parent == "." else f"{parent}/{name}" for name in names)

    def folders(self) -> list[str]:
        """Return the names of the folders where paths begin, in order."""
        if self._archive:
            names = {name.decode(errors="surrogateescape") for name in self._archive.folders}
            return sorted(name for name in names if "/" not in name) if not self.prefix else []
        return sorted(entry.name for entry in os.scandir(self.start) if entry.is_dir())

    def has_folder(self, folder: str) -> bool:
        """Say whether there is a folder of this name where paths begin; in an archive at most one folder down."""
        if self._archive:
            return f"{self.prefix}{folder}".encode(errors="surrogateescape") in self._archive.folders
        return (self.start / folder).is_dir()

    def missing(self, paths: Sequence[str]) -> list[str]:
        """Return those of `paths` that do not exist, in their order.

        Every folder is listed once instead of asking for each file, which takes seconds where millions of separate
        questions to a network drive take hours.
        """
        absent = [path for path, found in zip(paths, self._found(paths), strict=True) if not found]
        escaped = self._found([escaped_path(path) for path in absent])
        return [path for path, found in zip(absent, escaped, strict=True) if not found]

    def _found(self, paths: Sequence[str]) -> Sequence[bool]:
        if self._archive:
            return self._archive.contains([self.prefix + path for path in paths]).tolist()
        folders: dict[str, set[str]] = {}
        found = []
        for path in paths:
            parent, _, name = path.rpartition("/")
            if parent not in folders:
                where = self.root / self.prefix / parent
                folders[parent] = _names(where) if where.is_dir() else set()
            found.append(name in folders[parent])
        return found

    def _content(self, name: str) -> bytes | None:
        """Return the file's content, or None where there is no such file."""
        if self._archive:
            return self._archive.content(name)
        try:
            with open(self.root / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > MAX_FILE:
                    raise DataError(f"{self.root / name}: holds {_too_large(size)}")
                return file.read(size)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise DataError(f"{self.root / name}: cannot be read: {error.strerror}") from error


class JoinedStore(Store):
    """Several stores side by side: each domain's images are read from its own, by paths that begin with its name.

    Args:
        root: what to call all of them in messages.
        domains: name -> the store of its images, and their paths there.
    """

    def __init__(self, root: Path, domains: Mapping[str, tuple[Store, Sequence[str]]]) -> None:
        self.root, self.prefix, self._archive = root, "", None
        self._stores = {name: (store, _begin_with(name, paths)) for name, (store, paths) in domains.items()}

    @staticmethod
    def names(domain: str, paths: Sequence[str]) -> dict[str, str]:
        """Return path in the domain's own store -> path here: with the name in front, unless all begin with it."""
        front = "" if _begin_with(domain, paths) else f"{domain}/"
        return {path: front + path for path in paths}

    def read(self, path: str) -> bytes:
        """Return the content of one file, as `Store.read`."""
        store, own = self._own(path)
        return store.read(own)

    def ends(self, path: str, n_bytes: int) -> tuple[bytes, bytes, int]:
        """Return the first and the last bytes of one file, and its size, as `Store.ends`."""
        store, own = self._own(path)
        return store.ends(own, n_bytes)

    def missing(self, paths: Sequence[str]) -> list[str]:
        """Return those of `paths` that do not exist, in their order."""
        by_store: dict[str, list[str]] = {}
        for path in paths:
            by_store.setdefault(path.partition("/")[0], []).append(path)
        absent: set[str] = set()
        for domain, members in by_store.items():
            own = {self._own(path)[1]: path for path in members}
            absent |= {own[path] for path in self._stores[domain][0].missing(list(own))}
        return [path for path in paths if path in absent]

    def _own(self, path: str) -> tuple[Store, str]:
        domain, _, rest = path.partition("/")
        if domain not in self._stores:
            raise DataError(f"{self.root}: no domain has a file '{path}'; {nearest(domain, self._stores)}")
        store, begin = self._stores[domain]
        return store, path if begin else rest


def _begin_with(domain: str, paths: Sequence[str]) -> bool:
    return all(path.startswith(f"{domain}/") for path in paths)


def _names(folder: Path) -> set[str]:
    """Return the names of a folder's files; links that lead nowhere are none."""
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if not entry.is_symlink() or os.path.exists(entry.path)}


def _ends(file: Path, n_bytes: int) -> tuple[bytes, bytes, int] | None:
    """Return the ends of a file and its size, or None where there is no such file."""
    try:
        with file.open("rb", buffering=0) as opened:
            first = opened.read(n_bytes) or b""
            size = os.fstat(opened.fileno()).st_size
            if size <= n_bytes:
                return first, first, len(first)
            opened.seek(-n_bytes, os.SEEK_END)
            return first, opened.read(n_bytes) or b"", size
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error


_END, _END64_AT, _END64 = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"
_ENTRY = struct.Struct("<4s4xHH4xIIIHHH8xI")  # signature flags method crc packed size name extra comment offset
_ROW = np.dtype(
    [("key", "<u8"), ("offset", "<u8"), ("packed", "<u4"), ("full", "<u4"), ("crc", "<u4"), ("method", "<u2")]
)
_LARGEST = 2**32 - 1  # what a row holds of sizes that are larger, which are all refused


def _too_large(size: int) -> str:
    more = " or more" if size == _LARGEST else ""
    return f"{size:,} bytes{more}, and at most {MAX_FILE:,} are read of one file"


def name_key(name: bytes) -> int:
    """Return 64 bits that stand for a name, or for a content."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


class _Archive:
    """A zip archive's index in 38 bytes an entry.

    `zipfile` keeps about a kilobyte for every entry, several gigabytes in each process for the millions of images of
    UnED. Here entries are rows of one array sorted by a 64-bit hash of the name; the name itself is compared when the
    file is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self.folders: set[bytes] = set()  # at the top, and right below
        rows = np.fromiter(self._index(), dtype=_ROW)
        order = np.argsort(rows["key"], kind="stable")
        self._rows, self._keys = (
            rows[order],
            rows["key"][order],
        )  # searching a column of `_rows` would copy it each time

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}  # a file descriptor means nothing in another process

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]

    def contains(self, names: Sequence[str]) -> np.ndarray:
        """Return Bool[name]: whether there is an entry of that name."""
        return np.isin(np.array([name_key(name.encode()) for name in names], dtype="<u8"), self._keys)

    def names(self) -> Iterator[str]:
        """Yield the names of all entries that are files."""
        return (name.decode(errors="surrogateescape") for name, _ in self._directory() if not name.endswith(b"/"))

    def content(self, name: str) -> bytes | None:
        """Return an entry's content, checked against its checksum; None where there is no such entry."""
        raw = name.encode()
        key = np.uint64(name_key(raw))
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._rows) or self._keys[at] != key:
            return None
        _, offset, packed, full, crc, method = self._rows[at].tolist()
        if max(packed, full) > MAX_FILE:
            raise DataError(f"{self.path}: entry '{name}' unfolds to {_too_large(max(packed, full))}")
        header = self._bytes(offset, 30 + len(raw))
        if header[:4] != b"PK\x03\x04" or header[30:] != raw:
            raise DataError(f"{self.path}: entry '{name}' is not where the archive's directory says")
        n_name, n_extra = struct.unpack_from("<HH", header, 26)
        content = self._bytes(offset + 30 + n_name + n_extra, packed)
        try:
            content = zlib.decompressobj(-15).decompress(content, full + 1) if method == 8 else content
        except zlib.error as error:
            raise DataError(f"{self.path}: entry '{name}' is damaged: {error}") from error
        if len(content) != full:
            raise DataError(f"{self.path}: entry '{name}' is damaged: it does not hold the {full:,} bytes declared")
        if zlib.crc32(content) != crc:
            raise DataError(f"{self.path}: entry '{name}' is damaged: its checksum differs")
        return content

    def _bytes(self, offset: int, count: int) -> bytes:
        if not hasattr(os, "pread"):  # Windows: a place in the file of one's own costs opening it
            with self.path.open("rb") as file:
                file.seek(offset)
                return file.read(count)
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        there = max(0, min(count, os.fstat(self._file).st_size - offset))  # memory is taken for what is asked for
        return os.pread(self._file, there, offset) if there else b""

    def _index(self) -> Iterator[tuple[int, ...]]:
        for name, row in self._directory():
            first, *others = name.split(b"/", 2)
            if others:
                self.folders.add(first)
            if len(others) == 2:
                self.folders.add(b"/".join((first, others[0])))
            offset, packed, full, crc, method = row
            yield name_key(name), offset, min(packed, _LARGEST), min(full, _LARGEST), crc, method

    def _directory(self) -> Iterator[tuple[bytes, tuple[int, int, int, int, int]]]:
        """Yield (name, (offset, packed size, size, checksum, method)) of every entry.

        Source: PKWARE's APPNOTE sec. 4.3.12, 4.3.14-16 and 4.5.3 (zip64).
        """
        try:
            size = self.path.stat().st_size
            tail_at = max(0, size - 65557)  # the end record and the longest comment
            tail = self._bytes(tail_at, size - tail_at)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error
        end = tail.rfind(_END)
        if end < 0 or len(tail) < end + 22:
            raise DataError(f"{self.path}: not a zip archive, or cut short (it has no end record)")
        n_entries, n_bytes, start = struct.unpack_from("<HII", tail, end + 10)
        directory_end = tail_at + end
        if end >= 20 and tail[end - 20 : end - 16] == _END64_AT:
            (end64_at,) = struct.unpack_from("<Q", tail, end - 12)
            end64 = self._bytes(end64_at, 56)
            if end64[:4] != _END64:
                raise DataError(f"{self.path}: cut short or damaged (its zip64 end record is missing)")
            n_entries, n_bytes, start = struct.unpack_from("<QQQ", end64, 32)
            directory_end = end64_at
        directory = self._bytes(start, n_bytes) if start + n_bytes == directory_end else b""
        if start + n_bytes != directory_end or len(directory) < n_bytes:
            raise DataError(f"{self.path}: cut short or damaged (its directory is not where the end record says)")
        at = 0
        for number in range(n_entries):
            if n_bytes - at < 46 or directory[at : at + 4] != b"PK\x01\x02":
                raise DataError(f"{self.path}: damaged directory at entry {number} of {n_entries}")
            _, flags, method, crc, packed, full, n_name, n_extra, n_comment, offset = _ENTRY.unpack_from(directory, at)
            name = directory[at + 46 : at + 46 + n_name]
            extra = directory[at + 46 + n_name : at + 46 + n_name + n_extra]
            at += 46 + n_name + n_extra + n_comment
            if flags & 1 or method not in (0, 8):
                problem = f"entry '{name.decode(errors='replace')}' is encrypted or packed by method {method}"
                raise DataError(f"{self.path}: {problem}; valid: stored or deflated, without a password")
            if 0xFFFFFFFF in (packed, full, offset):
                full, packed, offset = _zip64(extra, full, packed, offset)
            yield name, (offset, packed, full, crc, method)


def _zip64(extra: bytes, full: int, packed: int, offset: int) -> tuple[int, int, int]:
    """Return sizes and offset where the extra field holds those that need 64 bits."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            values = list(struct.unpack_from(f"<{size // 8}Q", extra, at + 4))
            wide = [values.pop(0) if value == 0xFFFFFFFF and values else value for value in (full, packed, offset)]
            return wide[0], wide[1], wide[2]
        at += 4 + size
    return full, packed, offset
