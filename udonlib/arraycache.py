"""Arrays that took time to compute, kept in a folder under the fingerprint of all that they depend on."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from udonlib.files import DiskError, replacing

Arrays = Mapping[str, np.ndarray]


def fingerprint(*parts: object) -> str:
    """Return the SHA-256 of arrays (their type, shape and bytes) and of anything else by its `repr`."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).view(np.uint8).data)
        else:
            digest.update(repr(part).encode() + b"\0")
    return digest.hexdigest()


def file_of(folder: Path, kind: str, key: str) -> Path:
    """Return where arrays of a kind are kept: `<folder>/<kind>-<first 16 digits of the fingerprint>.npz`."""
    return folder / f"{kind}-{key[:16]}.npz"


def kept(
    folder: Path, kind: str, key: str, compute: Callable[[], Arrays], note: Callable[[str], None] | None = None
) -> dict[str, np.ndarray]:
    """Read arrays that were kept under this fingerprint, or compute and keep them.

    A file is replaced whole or not at all. One that cannot be read, or that is another fingerprint's or lacks an array,
    is computed anew.
    A folder that cannot be written to costs the next person the same time, and nothing else.

    Args:
        folder: of the cache; made where it does not exist.
        kind: begins the file's name.
        key: of `fingerprint`.
        compute: makes the arrays, by name.
        note: called with one sentence where a file is broken or cannot be written.
    """
    file, say = file_of(folder, kind, key), note or (lambda text: None)
    if file.exists():
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as opened:
                arrays = dict(opened)
            if arrays.pop("fingerprint").tolist() == [key, *sorted(arrays)]:
                return arrays
            say(f"{file.name} holds something else; it is computed anew")
        except Exception as error:  # bytes that changed raise whatever the readers of archives happen to meet first
            say(f"{file.name} cannot be read ({type(error).__name__}); it is computed anew")
    arrays = dict(compute())
    try:
        with replacing(file) as opened:
            np.savez(opened, fingerprint=np.array([key, *sorted(arrays)]), **arrays)
    except DiskError as error:
        say(f"{file.name} cannot be kept ({error}): the next time it is computed again")
    return arrays
