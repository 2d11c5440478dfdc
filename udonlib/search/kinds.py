"""Kinds of faiss indexes: exact while that is fast enough, else the first that keeps to a budget, as it is measured.

| kind | holds | searches |
|---|---|---|
| exact | float32, 4 dim bytes a vector | all of them |
| ivf | float32 and 8 bytes more | the nearest of about 4 sqrt(n) cells |
| hnsw | float32 and about 270 bytes more | along a graph of near ones |
| sq8 | one byte a number | all of them |
| ivf_sq8 | one byte a number and 8 bytes more | the nearest cells |
| ivf_pq | dim / 2 bytes and 8 more | the nearest cells |

Vectors of one byte a number or less only propose RERANK k images; those are compared again with the float32 vectors,
which stay on the disk. Recall is measured each time, against the exact search of the same vectors: of random unit
vectors hardly any kind finds the nearest faster, of trained embeddings most do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float32, Int64

from udonlib.errors import ParameterError, UserError, nearest
from udonlib.search.embed import Progress, Vectors
from udonlib.search.tables import needed

Rows = Int64[np.ndarray, "_ _"]
Similarities = Float32[np.ndarray, "_ _"]

RERANK = 4  # times as many candidates as are wanted, where vectors are packed
TRAIN_PER_CELL = 40  # vectors that learn where a cell lies
ADD = 2**16  # vectors that are added between two reports
SAMPLE = 200  # queries that recall is measured on, and at most TIMED of them alone for the time
TIMED = 50


class Kind(NamedTuple):
    """How an index is built: faiss's own name of it, which setting makes it more exact, and whether it packs."""

    factory: Callable[[int, int], str]  # of the number of vectors and their dimension
    setting: str | None
    packs: bool


def n_cells(n: int) -> int:
    """Cells of n vectors: 4 sqrt(n), and enough vectors in each to learn it from."""
    return max(1, min(int(4 * n**0.5), n // TRAIN_PER_CELL))


def _n_codes(dim: int) -> int:
    return next(m for m in range(max(1, dim // 2), 0, -1) if dim % m == 0)


KINDS: Mapping[str, Kind] = {
    "exact": Kind(lambda n, dim: "Flat", None, False),
    "ivf": Kind(lambda n, dim: f"IVF{n_cells(n)},Flat", "nprobe", False),
    "hnsw": Kind(lambda n, dim: "HNSW32,Flat", "efSearch", False),
    "sq8": Kind(lambda n, dim: "SQ8", None, True),
    "ivf_sq8": Kind(lambda n, dim: f"IVF{n_cells(n)},SQ8", "nprobe", True),
    "ivf_pq": Kind(lambda n, dim: f"IVF{n_cells(n)},PQ{_n_codes(dim)}x8np", "nprobe", True),
}
FAST, SMALL = ("ivf", "hnsw"), ("sq8", "ivf_sq8", "ivf_pq")  # in the order in which they are tried


class Measured(NamedTuple):
    """What was measured of one kind on a sample of queries.

    setting: how many cells or nodes a query looks at; 0: all. recall: share of the exact k nearest that it finds.
    ms: median milliseconds of one query alone. n_bytes: of the index in memory.
    """

    kind: str
    setting: int
    k: int
    recall: float
    ms: float
    n_bytes: int
    build_seconds: float


def check_kind(name: str, valid: tuple[str, ...] = ("auto", *KINDS)) -> None:
    """Refuse an unknown kind. Raises: ParameterError "parameter 'kind': ..." with the nearest."""
    if name not in valid:
        raise ParameterError({"kind": f"found {name!r}; {nearest(name, valid)}"})


class Structure:
    """A faiss index of one kind whose ids count the vectors in the order in which they were added."""

    def __init__(self, kind: str, faiss_index: Any, setting: int = 0) -> None:
        check_kind(kind, tuple(KINDS))
        self.kind, self.setting, self.faiss = kind, setting, faiss_index

    @classmethod
    def build(cls, kind: str, vectors: Vectors, progress: Progress | None = None, seed: int = 0) -> Structure:
        """Learn what the kind learns, from a sample of the vectors, and add them all."""
        check_kind(kind, tuple(KINDS))
        faiss = needed("faiss")
        faiss.omp_set_num_threads(torch.get_num_threads())
        n, dim = vectors.shape
        description = KINDS[kind].factory(n, dim)
        index = faiss.index_factory(dim, description, faiss.METRIC_INNER_PRODUCT)
        built = cls(kind, index)
        if not index.is_trained:
            n_sample = min(n, max(256 * TRAIN_PER_CELL, n_cells(n) * TRAIN_PER_CELL))
            rows = np.sort(np.random.default_rng(seed).choice(n, n_sample, replace=False))
            _quiet(index, seed)
            index.train(np.ascontiguousarray(vectors[rows]))
        built.add(vectors, progress)
        return built

    def add(self, vectors: Vectors, progress: Progress | None = None) -> None:
        """Add vectors behind the others."""
        for start in range(0, len(vectors), ADD):
            part = np.ascontiguousarray(vectors[start : start + ADD], dtype=np.float32)
            self.faiss.add(part)
            if progress:
                progress("indexing", min(start + ADD, len(vectors)), len(vectors))

    def __len__(self) -> int:
        return int(self.faiss.ntotal)

    @property
    def n_bytes(self) -> int:
        """Bytes of the index in memory: what its file takes."""
        return len(needed("faiss").serialize_index(self.faiss)) if self.kind != "exact" else 4 * len(self) * self.dim

    @property
    def dim(self) -> int:
        """Of the vectors."""
        return int(self.faiss.d)

    @property
    def packs(self) -> bool:
        """Whether it holds less than the vectors themselves, and only proposes."""
        return KINDS[self.kind].packs

    def propose(self, queries: Vectors, k: int, mask: np.ndarray | None = None) -> tuple[Similarities, Rows]:
        """The k most similar vectors, highest first; similarity -inf, row -1 where there are no more.

        Args:
            mask: bool of each vector: whether it may be found; None: all may.
        """
        faiss = needed("faiss")
        parameters: dict[str, Any] = {}
        held: list[Any] = []  # faiss keeps pointers alone
        if mask is not None:
            bits = np.packbits(mask, bitorder="little")
            selector = faiss.IDSelectorBitmap(len(mask), faiss.swig_ptr(bits))
            held += [bits, selector]
            parameters["sel"] = selector
        setting = KINDS[self.kind].setting
        if setting:
            parameters[setting] = self.setting
        maker = {"nprobe": faiss.SearchParametersIVF, "efSearch": faiss.SearchParametersHNSW}.get(
            setting or "", faiss.SearchParameters
        )
        if self.kind == "ivf_pq":
            maker = faiss.IVFPQSearchParameters
        chosen = maker(**parameters) if parameters else None
        similarities, rows = self.faiss.search(np.ascontiguousarray(queries, np.float32), k, params=chosen)
        del held
        return np.where(rows < 0, -np.inf, similarities).astype(np.float32), rows


def _quiet(index: Any, seed: int) -> None:
    """Have k-means of an index begin with a seed, go a few rounds, and be content with TRAIN_PER_CELL vectors."""
    if hasattr(index, "cp"):
        index.cp.seed, index.cp.niter, index.cp.min_points_per_centroid = 1 + seed, 10, 1
        index.cp.max_points_per_centroid = TRAIN_PER_CELL
    if hasattr(index, "pq"):
        codes = index.pq.cp
        codes.seed, codes.niter, codes.min_points_per_centroid = 1 + seed, 10, 1
        codes.max_points_per_centroid = TRAIN_PER_CELL


def search(
    structure: Structure, vectors: Vectors, queries: Vectors, k: int, mask: np.ndarray | None = None
) -> tuple[Similarities, Rows]:
    """The k nearest that a structure finds, with their exact similarities where it only proposes."""
    if not structure.packs:
        return structure.propose(queries, k, mask)
    _, rows = structure.propose(queries, RERANK * k, mask)
    return rerank(vectors, queries, rows, k)


def rerank(vectors: Vectors, queries: Vectors, rows: Rows, k: int) -> tuple[Similarities, Rows]:
    """Order proposed rows by their exact similarities and return the k highest; -1: none."""
    asked, where = np.unique(rows, return_inverse=True)
    known = np.asarray(vectors[np.maximum(asked, 0)], dtype=np.float32)
    similarities = np.einsum("qcd,qd->qc", known[where.reshape(rows.shape)], queries, dtype=np.float32)
    similarities = np.where(rows < 0, -np.inf, similarities).astype(np.float32)
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarities, order, 1), np.take_along_axis(rows, order, 1)


def exactly(vectors: Vectors, queries: Vectors, k: int, rows: Int64[np.ndarray, "_"]) -> tuple[Similarities, Rows]:
    """The k most similar of some rows, all compared, a piece at a time; equal ones by lower row."""
    best = np.full((len(queries), 0), -np.inf, np.float32)
    found = np.zeros((len(queries), 0), np.int64)
    for start in range(0, len(rows), ADD):
        part = rows[start : start + ADD]
        similarities = np.asarray(queries, np.float32) @ np.asarray(vectors[part], np.float32).T
        best = np.concatenate([best, similarities], axis=1)
        found = np.concatenate([found, np.broadcast_to(part, similarities.shape)], axis=1)
        if best.shape[1] > 4 * k:  # a sort of all would take longer than the products
            top = np.sort(np.argpartition(-best, k - 1, axis=1)[:, :k], axis=1)
            best, found = np.take_along_axis(best, top, 1), np.take_along_axis(found, top, 1)
    order = np.lexsort((found, -best), axis=1)[:, :k]
    best, found = np.take_along_axis(best, order, 1), np.take_along_axis(found, order, 1)
    missing = ((0, 0), (0, k - best.shape[1]))
    return np.pad(best, missing, constant_values=-np.inf), np.pad(found, missing, constant_values=-1)


class Judge:
    """A sample of an index's own vectors as queries, and their exact neighbours, themselves left out."""

    def __init__(self, vectors: Vectors, k: int, seed: int = 0) -> None:
        n = len(vectors)
        self.vectors, self.k = vectors, min(k, n - 1)
        self.rows = np.sort(np.random.default_rng(seed).choice(n, min(SAMPLE, n), replace=False))
        self.queries = np.ascontiguousarray(vectors[self.rows], dtype=np.float32)
        self.exact = Structure.build("exact", vectors)
        similarities, found = self._without_self(*self.exact.propose(self.queries, self.k + 1))
        self.lowest = similarities[:, -1] if self.k else np.full(len(found), -np.inf)

    def _without_self(self, similarities: Similarities, found: Rows) -> tuple[Similarities, Rows]:
        """Take each query itself out, or else the last one found."""
        own = found == self.rows[:, None]
        own[~own.any(axis=1), -1] = True
        shape = (len(found), found.shape[1] - 1)
        return similarities[~own].reshape(shape), found[~own].reshape(shape)

    def recall(self, structure: Structure) -> float:
        """Share of the exact k nearest that are found; one that is as similar as the last of them counts as well."""
        if self.k == 0:
            return 1.0
        _, found = self._without_self(*search(structure, self.vectors, self.queries, self.k + 1))
        true, _ = rerank(self.vectors, self.queries, found, self.k)
        return float((true >= self.lowest[:, None] - 1e-6).mean())

    def ms(self, structure: Structure) -> float:
        """Median milliseconds of one query alone."""
        taken = []
        for query in self.queries[:TIMED, None]:
            start = time.perf_counter()
            search(structure, self.vectors, query, self.k + 1)
            taken.append(time.perf_counter() - start)
        return 1000 * float(np.median(taken))

    def measure(self, structure: Structure, recall: float, build_seconds: float) -> Measured:
        """Measure a structure at the smallest setting that reaches a recall, or at its largest."""
        found = 0.0
        for setting in _settings(structure):
            structure.setting = setting
            found = self.recall(structure)
            if found >= recall:
                break
        facts = self.ms(structure), structure.n_bytes, round(build_seconds, 2)
        return Measured(structure.kind, structure.setting, self.k, round(found, 4), *facts)


def _settings(structure: Structure) -> Iterator[int]:
    """Settings from the fastest to the most exact."""
    if KINDS[structure.kind].setting == "nprobe":
        cells = structure.faiss.nlist
        yield from (2**i for i in range(cells.bit_length()) if 2**i < cells)
        yield cells
    elif KINDS[structure.kind].setting == "efSearch":
        yield from (16, 32, 64, 128, 256, 512)
    else:
        yield 0


def choose(
    vectors: Vectors,
    kind: str = "auto",
    max_ms: float = 20.0,
    max_bytes: float = np.inf,
    recall: float = 0.95,
    k: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Structure, list[Measured]]:
    """Build the kind of index that keeps to the budgets, and say what was measured of each that was tried.

    Exact search comes first, and is taken where a query of it takes no longer than `max_ms` on this machine and its
    vectors no more than `max_bytes`. Otherwise FAST or SMALL kinds are tried, the latter where memory is what lacks;
    the first is taken that reaches the recall within both budgets.

    Args:
        kind: one of KINDS, which is built whatever it takes; "auto": as above.
        recall: the least recall@k, from 0 to 1.

    Returns:
        The structure, and one `Measured` for each that was built, the chosen one last.

    Raises:
        UserError: none keeps to the budgets, with what was measured; too few vectors for a kind.
    """
    check_kind(kind)
    n = len(vectors)
    if kind not in ("auto", "exact") and n < 256:
        raise UserError(f"parameter 'kind': found {kind!r} for {n} vectors, expected at least 256; valid: exact, auto")
    judge = Judge(vectors, k, seed)
    tried = [judge.measure(judge.exact, recall, 0.0)]
    if kind == "exact" or (kind == "auto" and _keeps(tried[0], max_ms, max_bytes, recall)):
        return judge.exact, tried
    names = (kind,) if kind != "auto" else (SMALL if tried[0].n_bytes > max_bytes else FAST + SMALL) if n >= 256 else ()
    for name in names:
        start = time.perf_counter()
        structure = Structure.build(name, vectors, progress, seed)
        tried.append(judge.measure(structure, recall, time.perf_counter() - start))
        if kind != "auto" or _keeps(tried[-1], max_ms, max_bytes, recall):
            return structure, tried
    raise UserError(
        f"no kind of index of {n:,} vectors keeps to {max_ms:g} ms a query, {max_bytes / 1e6:,.0f} MB and recall@{k} "
        f"{recall:g}: {'; '.join(map(told, tried))}. Allow more, or name a kind"
    )


def _keeps(measured: Measured, max_ms: float, max_bytes: float, recall: float) -> bool:
    return measured.ms <= max_ms and measured.n_bytes <= max_bytes and measured.recall >= recall


def told(measured: Measured) -> str:
    """What was measured, in words."""
    m = measured
    return f"{m.kind} {m.ms:.2g} ms, {m.n_bytes / 1e6:,.1f} MB, recall@{m.k} {m.recall:.3f}"


def table(tried: list[Measured]) -> pd.DataFrame:
    """What was measured, as a table."""
    return pd.DataFrame(tried, columns=Measured._fields)
