"""An index of embedded images: searched by vectors, filtered by columns, added to and removed from, kept in a folder.

    index = build_index(model.embed("folder"))
    similarities, rows = index.search(vectors, k=10, where={"domain": "flags"})
    index.save("outputs/indexes/mine")

    <folder>/
        index.json              model, kind, what was measured, the other files' checksums; replaced last, as a whole
        vectors-<n>.npy         float32 [image, dim]; memory-mapped
        images-<n>.parquet      a row for each: id and all other columns
        faiss-<n>.index         where the kind is not exact

Files get new names with every saving, and those of before go when index.json names them no more: whoever is killed
leaves the one index or the other, and none in between. faiss's own files are handed to it only where their checksum is
the one in index.json. Evaluation does not search here: its own exact search (`evaluation.search`) breaks ties by
position, proves its result in float64, and so judges; this one serves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from udonlib.errors import ParameterError, UserError, nearest
from udonlib.files import replacing, results_folder, take_lock, write_json
from udonlib.search.embed import Embeddings, ModelFacts, Progress, Vectors
from udonlib.search.kinds import Measured, Rows, Similarities, Structure, choose, exactly, search
from udonlib.search.tables import check_sums, checksum, damaged, needed, read_table, write_table

INDEX = "index.json"
VERSION = 1
FEW = 20_000  # images that a filter leaves, up to which all of them are compared


class Index:
    """Vectors of one model with the table of their images; `build_index` and `open_index` make it.

    images: a row for each vector, `id` first; those that were removed are still there. alive: bool of each row: whether
    it was not. measured: of each kind that was tried. answers: what `search.classify` has calibrated.
    """

    def __init__(
        self,
        vectors: Vectors,
        images: pd.DataFrame,
        model: ModelFacts,
        structure: Structure,
        measured: Sequence[Measured] = (),
        alive: np.ndarray | None = None,
        answers: Mapping[str, Any] | None = None,
        folder: Path | None = None,
        number: int = 0,
    ) -> None:
        self.vectors, self.images, self.model, self.structure = vectors, images, model, structure
        self.measured, self.answers = list(measured), dict(answers or {})
        self.alive = np.ones(len(images), bool) if alive is None else alive
        self.folder, self._number = folder, number
        self._values: dict[str, tuple[np.ndarray, pd.Index]] = {}
        self._row_of: dict[Any, int] | None = None

    def __len__(self) -> int:
        return int(self.alive.sum())

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return str(self.folder) if self.folder else "this index"

    def row(self, image: Any) -> int:
        """The row of an image by its id. Raises: UserError "... holds no image ..." with the nearest id."""
        if self._row_of is None:
            rows = np.flatnonzero(self.alive)
            self._row_of = dict(zip(self.images["id"].iloc[rows].tolist(), rows.tolist(), strict=True))
        try:
            return self._row_of[image]
        except (KeyError, TypeError):
            hint = nearest(image, map(str, list(self._row_of)[:5000]))
            raise UserError(f"{self.name}: holds no image '{image}'; {hint}") from None

    def has(self, image: Any) -> bool:
        """Whether an image is in it, by its id."""
        try:
            return self.row(image) >= 0
        except UserError:
            return False

    def check_model(self, model: ModelFacts) -> None:
        """Refuse another model than the one whose vectors these are. Raises: UserError "... of model ..."."""
        self.model.check(model, "an index", self.name)

    # --- changes ------------------------------------------------------------------------------------------------------

    def add(self, embeddings: Embeddings) -> None:
        """Add images; nothing is built anew.

        Columns that only one side has are empty for the others.

        Raises: UserError for vectors of another model, and an id that is there already.
        """
        self.check_model(embeddings.model)
        known = [image for image in embeddings.ids if self.has(image)]
        if known or len(set(embeddings.ids)) < len(embeddings.ids):
            found = f"holds '{known[0]}' already" if known else "gets an image twice"
            raise UserError(f"{self.name}: {found}; remove it first, or use update")
        self._append(embeddings.vectors, embeddings.images)

    def _append(self, vectors: Vectors, images: pd.DataFrame) -> None:
        if not len(vectors):
            return
        self.structure.add(vectors)
        self.vectors = np.concatenate([self.vectors, vectors])
        self.images = pd.concat([self.images, images], ignore_index=True)
        self.alive = np.concatenate([self.alive, np.ones(len(vectors), bool)])
        self._forget()

    def remove(self, images: Sequence[Any]) -> None:
        """Remove images by their ids: they are found no more. Their rows stay until the index is built anew.

        Raises: UserError for an id that is not there; nothing is removed then.
        """
        rows = [self.row(image) for image in images]
        self.alive = self.alive.copy()
        self.alive[rows] = False
        self._forget()

    def update(self, embeddings: Embeddings) -> tuple[int, int]:
        """Make the index hold these images and no others; returns how many were added and removed.

        An image whose content has changed (column `hash`) is removed and added. Raises: as `add` does.
        """
        self.check_model(embeddings.model)
        has_hash = "hash" in self.images and "hash" in embeddings.images
        columns = ["id", "hash"] if has_hash else ["id"]
        there = set(self.images.loc[self.alive, columns].itertuples(index=False, name=None))
        coming = list(embeddings.images[columns].itertuples(index=False, name=None))
        gone = [key[0] for key in there.difference(coming)]
        new = np.array([i for i, key in enumerate(coming) if key not in there], dtype=np.int64)
        self.remove(gone)
        self._append(np.asarray(embeddings.vectors[new]), embeddings.images.iloc[new])
        return len(new), len(gone)

    def _forget(self) -> None:
        self._values, self._row_of = {}, None

    # --- search -------------------------------------------------------------------------------------------------------

    def mask(self, where: Mapping[str, Any] | None) -> np.ndarray | None:
        """Bool of each row: whether it may be found; None: every row.

        Args:
            where: column -> a value, or a list of values of which one must stand there.

        Raises: ParameterError "parameter 'where': ..." for a column or a value that is not there, with the nearest.
        """
        allowed = None if self.alive.all() else self.alive.copy()
        for column, wanted in (where or {}).items():
            if column not in self.images:
                raise ParameterError({"where": f"no column {column!r}; {nearest(column, map(str, self.images))}"})
            codes, values = self._codes(column)
            several = list(wanted) if isinstance(wanted, list | tuple | set | frozenset) else [wanted]
            chosen = values.get_indexer(pd.Index(several, dtype=object))
            for value, code in zip(several, chosen, strict=True):
                if code < 0:
                    hint = nearest(value, map(str, values[:1000]))
                    raise ParameterError({"where": f"no image has {column} {value!r}; {hint}"})
            here = np.isin(codes, chosen)
            allowed = here if allowed is None else allowed & here
        return allowed

    def _codes(self, column: str) -> tuple[np.ndarray, pd.Index]:
        if column not in self._values:
            codes, values = pd.factorize(self.images[column].astype(object), use_na_sentinel=True)
            self._values[column] = codes, pd.Index(values, dtype=object)
        return self._values[column]

    def search(
        self,
        queries: Vectors,
        k: int = 10,
        where: Mapping[str, Any] | None = None,
        exclude: np.ndarray | None = None,
        mask: np.ndarray | None = None,
    ) -> tuple[Similarities, Rows]:
        """Find the k most similar images of each query, highest first.

        Args:
            queries: unit vectors.
            where: what images must have: see `mask`; or `mask` itself.
            exclude: a row for each query that is not to be found: the query itself; -1: none.

        Returns:
            Similarities and rows; where fewer remain: -inf and -1.

        Raises: ParameterError for k below 1, a column or a value that is not there, queries of another dimension.
        """
        queries = np.asarray(queries, dtype=np.float32)
        if k < 1:
            raise ParameterError({"k": f"found {k}, expected at least 1"})
        if queries.ndim != 2 or queries.shape[1] != self.model.dim:
            found = list(queries.shape)
            raise ParameterError({"query": f"found vectors of shape {found}, expected [n, {self.model.dim}]"})
        if not np.isfinite(queries).all():
            raise ParameterError({"query": "found numbers that are not finite"})
        allowed = self.mask(where) if mask is None else mask
        n_wanted = k + (exclude is not None)
        n_allowed = len(self.images) if allowed is None else int(allowed.sum())
        if allowed is not None and n_allowed <= FEW:
            similarities, rows = exactly(self.vectors, queries, n_wanted, np.flatnonzero(allowed))
        else:
            similarities, rows = search(self.structure, self.vectors, queries, n_wanted, allowed)
            short = (rows >= 0).sum(axis=1) < min(
                n_wanted, n_allowed
            )  # a filter that cells or graphs lose their way in
            if short.any():
                left = np.arange(len(self.images)) if allowed is None else np.flatnonzero(allowed)
                similarities[short], rows[short] = exactly(self.vectors, queries[short], n_wanted, left)
        if exclude is None:
            return similarities, rows
        own = (rows == np.asarray(exclude)[:, None]) & (rows >= 0)
        own[~own.any(axis=1), -1] = True
        return similarities[~own].reshape(len(rows), k), rows[~own].reshape(len(rows), k)

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self, name: str | Path, outputs: str = "auto") -> Path:
        """Write the index into a folder; what is there is replaced as a whole, and only if it is this index's.

        Args:
            name: of a folder in outputs/indexes, or a path with a "/".

        Raises: UserError where the folder holds another index, or one that somebody has changed meanwhile.
        """
        folder = index_folder(name, outputs)
        with take_lock(folder / "lock"):
            before = _read_facts(folder) if (folder / INDEX).exists() else None
            own = self.folder is not None and self.folder.resolve() == folder.resolve()
            if before and not (own and before["number"] == self._number):
                what = "has been changed meanwhile: open it again" if own else "holds an index already: name another"
                raise UserError(f"{folder}: {what}, or remove that one")
            number = self._number + 1 if own else 1
            names = {"vectors": f"vectors-{number}.npy", "images": f"images-{number}.parquet"}
            with replacing(folder / names["vectors"], 4 * self.vectors.size) as file:
                np.lib.format.write_array(file, np.asarray(self.vectors, np.float32), allow_pickle=False)
            with replacing(folder / names["images"]) as file:
                write_table(file, self.images)
            if self.structure.kind != "exact":
                names["faiss"] = f"faiss-{number}.index"
                faiss = needed("faiss")
                with replacing(folder / names["faiss"]) as file:
                    faiss.write_index(self.structure.faiss, faiss.PyCallbackIOWriter(file.write))
            facts = {
                "version": VERSION,
                "number": number,
                "model": self.model._asdict(),
                "kind": self.structure.kind,
                "setting": self.structure.setting,
                "files": names,
                "sums": {name: checksum(folder / name) for name in names.values()},
                "removed": np.flatnonzero(~self.alive).tolist(),
                "measured": [measured._asdict() for measured in self.measured],
                "answers": self.answers,
            }
            write_json(folder / INDEX, facts)
            for file_name in before["sums"] if before else ():
                with suppress(OSError):  # Windows keeps files that somebody reads
                    (folder / file_name).unlink()
        self.folder, self._number = folder, number
        self.vectors = _map(folder / names["vectors"])
        return folder


def index_folder(name: str | Path, outputs: str = "auto") -> Path:
    """Folder of an index: by its name in outputs/indexes, or a path."""
    path = Path(name).expanduser()
    is_path = isinstance(name, Path) or len(path.parts) > 1
    return path.absolute() if is_path else results_folder(outputs) / "indexes" / path


def build_index(
    embeddings: Embeddings,
    kind: str = "auto",
    *,
    max_ms: float = 20.0,
    max_bytes: float = np.inf,
    recall: float = 0.95,
    k: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> Index:
    """Index vectors: exactly while that keeps to the budgets, else by the first kind that does: see `kinds.choose`.

    Args:
        embeddings: their table goes into the index as it is; any columns.
        kind: "auto", or one of `kinds.KINDS`.
        max_ms: milliseconds that one query may take. max_bytes: of memory. recall: the least recall@k of a sample.

    Raises: UserError: no vectors, an id twice; no kind keeps to the budgets, with what was measured.
    """
    if not len(embeddings):
        raise UserError("an index needs one image at least, found none")
    twice = embeddings.images["id"][embeddings.images["id"].duplicated()]
    if len(twice):
        raise UserError(f"parameter 'embeddings': the id '{twice.iloc[0]}' stands there twice")
    structure, measured = choose(embeddings.vectors, kind, max_ms, max_bytes, recall, k, seed, progress)
    return Index(embeddings.vectors, embeddings.images.copy(), embeddings.model, structure, measured)


def open_index(name: str | Path, outputs: str = "auto") -> Index:
    """Read an index, once all of its files have the checksums that were written with them.

    Raises: UserError: no index of this name, with the nearest; a file that is missing or damaged.
    """
    folder = index_folder(name, outputs)
    if not (folder / INDEX).exists() and (Path(name).expanduser() / INDEX).exists():
        folder = Path(name).expanduser().absolute()
    if not (folder / INDEX).exists():
        names = [path.parent.name for path in (results_folder(outputs) / "indexes").glob(f"*/{INDEX}")]
        raise UserError(f"no index at {folder}; {nearest(folder.name, names)}")
    facts = _read_facts(folder)
    with damaged(folder / INDEX):
        check_sums(folder, facts["sums"], "index")
        files = {kind: folder / file for kind, file in facts["files"].items()}
        model, kind, setting = ModelFacts(**facts["model"]), str(facts["kind"]), int(facts["setting"])
        measured = [Measured(**each) for each in facts["measured"]]
        vectors, images = _map(files["vectors"]), read_table(files["images"])
        alive = np.ones(len(images), bool)
        alive[facts["removed"]] = False
        if kind == "exact":
            structure = Structure.build("exact", vectors)
        else:
            structure = Structure(kind, needed("faiss").read_index(str(files["faiss"])), setting)
        sizes, dims = {len(structure), len(vectors), len(images)}, {structure.dim, vectors.shape[1], model.dim}
        if len(sizes) > 1 or len(dims) > 1:
            raise UserError(f"{folder}: damaged: of vectors, images and indexed ones there are {sorted(sizes)}")
    return Index(vectors, images, model, structure, measured, alive, facts["answers"], folder, facts["number"])


def _read_facts(folder: Path) -> dict[str, Any]:
    with damaged(folder / INDEX):
        facts = json.loads((folder / INDEX).read_bytes())
        version, files, sums = facts["version"], facts["files"], facts["sums"]
        if version != VERSION:
            raise UserError(f"{folder / INDEX}: found version {version!r}, expected {VERSION}; build the index again")
        if not set(files.values()) == set(sums) or not {"vectors", "images"} <= set(files):
            raise UserError(f"{folder / INDEX}: damaged: names other files than checksums")
        if facts["kind"] != "exact" and "faiss" not in files:
            raise UserError(f"{folder / INDEX}: damaged: names no file of faiss for kind {facts['kind']!r}")
        _ = facts["number"], facts["model"], facts["removed"], facts["answers"], facts["measured"], facts["setting"]
        return facts


def _map(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r", allow_pickle=False)
