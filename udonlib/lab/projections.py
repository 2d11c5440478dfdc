"""Vectors in two dimensions: PCA, a quick layout by neighbours, UMAP; both kept. Coordinates alone; nothing is drawn.

Every projection lies in the square [-1, 1] x [-1, 1], both axes on one scale, so that distances along them compare.
"""

import hashlib
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int

from udonlib.files import DiskError, replacing
from udonlib.lab.quick_layout import laid_out

LEAST = 8  # vectors for which UMAP has any meaning; fewer are projected by PCA
# What a first fit takes on two CPU cores, to be said beforehand: the compiler's time, and seconds for a thousand rows.
COMPILING, PER_THOUSAND = 40.0, 2.5
QUICK = 2_000  # vectors that `quick` lays out while a person waits
QUICK_VERSION = 1  # of its algorithm: part of the fingerprint
# Two threads that fit at once can end the whole process; and the second one may only have to read what the first kept.
_ALONE = threading.Lock()


@dataclass(frozen=True)
class Umap:
    """What a UMAP depends on besides its vectors.

    n_neighbours: how many neighbours a point keeps close: few for detail, many for the large shape. distance: how close
    points may come, 0..1. seed: of its random steps; the same seed gives the same coordinates.
    """

    n_neighbours: int = 15
    distance: float = 0.1
    seed: int = 0


def pca(vectors: Float[np.ndarray, "n dim"]) -> tuple[Float32[np.ndarray, "n 2"], tuple[float, float]]:
    """Project on the two directions of the largest variance; returns coordinates and each one's share of the variance.

        (X - mean) [v1 v2],   v the eigenvectors of the covariance, largest eigenvalues first

    A direction's sign is that which makes its largest component positive, so that equal vectors give equal pictures.
    """
    if not len(vectors):
        return np.zeros((0, 2), np.float32), (0.0, 0.0)
    centred = (vectors - vectors.mean(axis=0, dtype=np.float64)).astype(np.float32)  # half the memory suffices here
    values, directions = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    first = directions[:, ::-1][:, :2]
    first = first * np.sign(first[np.abs(first).argmax(axis=0), range(first.shape[1])])
    coordinates = np.zeros((len(vectors), 2))
    coordinates[:, : first.shape[1]] = centred @ first
    shares = np.zeros(2)
    shares[: first.shape[1]] = values[::-1][:2].clip(min=0) / max(values.clip(min=0).sum(), np.finfo(float).tiny)
    return framed(coordinates), (float(shares[0]), float(shares[1]))


def umap_key(vectors: Float[np.ndarray, "n dim"], settings: Umap, kind: str = "umap") -> str:
    """Return the fingerprint of a UMAP, or of a quick layout: vectors, settings and the version that computes it."""
    computed_by = version("umap-learn") if kind == "umap" else QUICK_VERSION
    return fingerprint(kind, computed_by, settings, vectors.astype(np.float32))


def is_kept(vectors: Float[np.ndarray, "n dim"], settings: Umap, folder: Path, kind: str = "umap") -> bool:
    """Say whether this UMAP, or quick layout, lies in the cache, so that it comes at once."""
    return len(vectors) < LEAST or file_of(folder, kind, umap_key(vectors, settings, kind)).exists()


def quick(
    vectors: Float[np.ndarray, "n dim"], settings: Umap, folder: Path, note: Callable[[str], None] | None = None
) -> Float32[np.ndarray, "n 2"]:
    """Project by `quick_layout.laid_out`, beginning at the PCA; read from the cache where it was computed before.

    Args:
        vectors: finite.
        settings: as UMAP's.
        folder: of the cache.
        note: called with one sentence where the cache is broken.
    """
    start = pca(vectors)[0]
    if len(vectors) < LEAST:
        return start

    def compute() -> dict[str, np.ndarray]:
        laid = laid_out(vectors, start, settings.n_neighbours, settings.distance, settings.seed)
        return {"xy": framed(laid.astype(np.float64))}

    with _ALONE:  # who asks second reads what the first one kept
        return kept(folder, "quick", umap_key(vectors, settings, "quick"), compute, note)["xy"]


def umap(
    vectors: Float[np.ndarray, "n dim"], settings: Umap, folder: Path, note: Callable[[str], None] | None = None
) -> Float32[np.ndarray, "n 2"]:
    """Project by UMAP of cosine distances, beginning at the PCA; read from the cache where it was computed before.

    The first time in a process takes about COMPILING seconds more, since the algorithm is compiled.

    Args:
        vectors: finite.
        settings: see `Umap`; n_neighbours counts no more than the other vectors.
        folder: of the cache.
        note: called with one sentence where the cache is broken.
    """
    if len(vectors) < LEAST:
        return pca(vectors)[0]
    with _ALONE:
        return kept(folder, "umap", umap_key(vectors, settings), lambda: {"xy": _fit(vectors, settings)}, note)["xy"]


def seconds(n: int, kind: str = "umap") -> float:
    """Estimate how many seconds a first UMAP of n vectors, or a quick layout, takes in a fresh process on two cores."""
    if kind == "quick":
        return n / 5000 + (n / 20_000) ** 2
    return COMPILING + PER_THOUSAND * n / 1000


def side_by_side(
    parts: list[Float32[np.ndarray, "_ 2"]], group: Int[np.ndarray, "n"]
) -> tuple[Float32[np.ndarray, "n 2"], list[tuple[float, float]]]:
    """Put projections that do not compare beside each other, in rows of a grid as square as it can be.

    Args:
        parts: a projection of the rows of each group, in their order.
        group: number of each row's group.

    Returns: coordinates of all rows, and the middle of each group's cell.
    """
    n_columns = max(1, int(np.ceil(np.sqrt(len(parts)))))
    step = 2 / n_columns
    xy = np.zeros((len(group), 2), np.float32)
    middles = []
    for number, part in enumerate(parts):
        x, y = -1 + step * (number % n_columns + 0.5), 1 - step * (number // n_columns + 0.5)
        middles.append((x, y))
        # A name fits into the cell above its points.
        xy[group == number] = np.array([x, y - 0.06 * step], np.float32) + part * np.float32(0.4 * step)
    return xy, middles


def framed(coordinates: Float[np.ndarray, "n 2"]) -> Float32[np.ndarray, "n 2"]:
    """Move and scale coordinates, both by one factor, so that their bounding box just fits [-1, 1] x [-1, 1]."""
    low, high = coordinates.min(axis=0), coordinates.max(axis=0)
    half = float((high - low).max()) / 2 or 1.0
    return ((coordinates - (low + high) / 2) / half).astype(np.float32)


def _fit(vectors: Float[np.ndarray, "n dim"], settings: Umap) -> Float32[np.ndarray, "n 2"]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # its parametric variant needs a package that we do not
        from umap import UMAP  # half a minute to import the first time, and only needed here

    start = 10 * pca(vectors)[0]
    # Equal vectors would begin, and stay, at the same point: the method's own start adds the same noise.
    start += np.random.default_rng(settings.seed).normal(scale=1e-3, size=start.shape).astype(np.float32)
    fitted = UMAP(
        n_neighbors=min(settings.n_neighbours, len(vectors) - 1),
        min_dist=settings.distance,
        metric="cosine",
        init=start,
        random_state=settings.seed,
        n_jobs=1,  # more threads would give other coordinates each time
    ).fit_transform(vectors.astype(np.float32))
    return framed(fitted.astype(np.float64))


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
