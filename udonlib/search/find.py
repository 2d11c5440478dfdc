"""Search an index by images, paths, vectors or ids, one or many of them.

finder = open_finder("mine")
finder.search("some/photo.jpg", k=10, where={"domain": "flags"})
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from PIL import Image

from udonlib.errors import UserError, nearest
from udonlib.files import results_folder
from udonlib.search.classify import classify
from udonlib.search.embed import Embeddings, ModelFacts, Vectors
from udonlib.search.folders import FACTS, read_embeddings
from udonlib.search.index import INDEX, Index, build_index, index_folder, open_index
from udonlib.search.load import load

BYTES = ("thumbnail", "stamp")  # columns that results leave out, unless they are asked for


@runtime_checkable
class EmbedsImages(Protocol):
    """What embeds queries: `search.load.Embedder`, or anything that says which model it is."""

    @property
    def facts(self) -> ModelFacts:
        """Which model it is."""

    def embed(self, images: Any) -> Embeddings:
        """Unit vectors of images of any kind."""


class _Asked(NamedTuple):
    """Queries: what they are called, their vectors, and their rows in the index, -1 where they are not in it."""

    names: list[Any]
    vectors: Vectors
    rows: np.ndarray


class Finder:
    """An index, and the model that embeds what is searched for.

    Args:
        index: of `search.index`.
        model: None: the one that the index names, loaded once an image has to be embedded.

    Raises: UserError where the model is another one than the index's.
    """

    def __init__(self, index: Index, model: EmbedsImages | None = None) -> None:
        self.index = index
        if model is not None:
            index.check_model(model.facts)
            self.__dict__["model"] = model

    @cached_property
    def model(self) -> EmbedsImages:
        """The model that made the index's vectors. Raises: UserError where it is gone, or another one by now."""
        facts = self.index.model
        model = load(facts.source, precision=facts.precision)
        self.index.check_model(model.facts)
        return model

    def search(
        self, query: Any, k: int = 10, where: Mapping[str, Any] | None = None, columns: str = "all"
    ) -> pd.DataFrame:
        """Find the k most similar images.

        Args:
            query: an id of the index, whose image is not found itself; a path; an image of any kind that
                `search.pictures.open_picture` takes; a vector [dim] of float numbers, or several [n, dim]; a list of
                ids, paths and images. A text that is both an id and a path is taken for the id.
            where: column -> value or values that an image must have, such as {"domain": "flags"}.
            columns: "all" that the index has but thumbnails; "thumbnails" too.

        Returns:
            A row for each image found: query (as it was called), rank from 1, similarity, and the index's columns.

        Raises: UserError: neither an id nor a file; an image that cannot be read; an unknown column or value.
        """
        asked = self._asked(query)
        similarities, rows = self.index.search(asked.vectors, k, where, asked.rows)
        here = rows >= 0
        images = self.index.images
        left_out = [name for name in BYTES if name in images and (columns != "thumbnails" or name == "stamp")]
        found = images.drop(columns=left_out).iloc[rows[here]].reset_index(drop=True)
        n_found = here.sum(axis=1)
        names = [name for name, n in zip(asked.names, n_found.tolist(), strict=True) for _ in range(n)]
        found.insert(0, "query", pd.Series(names, dtype=object))
        found.insert(1, "rank", np.broadcast_to(np.arange(1, k + 1), rows.shape)[here])
        found.insert(2, "similarity", similarities[here])
        return found

    def classify(self, query: Any, where: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Say which class each query shows, or "none of these": see `search.classify`; queries as of `search`."""
        asked = self._asked(query)
        answers = classify(self.index, asked.vectors, where, asked.rows)
        answers.insert(0, "query", pd.Series(asked.names, dtype=object))
        return answers

    def _asked(self, query: Any) -> _Asked:
        if isinstance(query, np.ndarray) and query.dtype.kind == "f":
            vectors = np.atleast_2d(query).astype(np.float32)
            if not np.isfinite(vectors).all() or not vectors.any(axis=1).all():
                raise UserError("parameter 'query': found a vector that is zero or not finite: it has no direction")
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            return _Asked(list(range(len(vectors))), vectors, np.full(len(vectors), -1))
        single = isinstance(query, str | Path | Image.Image) or getattr(query, "ndim", 4) < 4 or not _is_list(query)
        queries = [query] if single else query
        is_row = {i: self._row(queries[i]) for i in range(len(queries))} if not hasattr(query, "ndim") else {}
        fresh = [i for i in range(len(queries)) if is_row.get(i, -1) < 0]
        rows = np.array([is_row.get(i, -1) for i in range(len(queries))], dtype=np.int64)
        vectors = np.empty((len(queries), self.index.model.dim), np.float32)
        if len(fresh) < len(queries):
            vectors[rows >= 0] = self.index.vectors[rows[rows >= 0]]
        if fresh:
            pictures = queries if len(fresh) == len(queries) else [queries[i] for i in fresh]
            vectors[fresh] = self.model.embed(pictures).vectors
        names = [self._name(queries[i], i) for i in range(len(queries))]
        return _Asked(names, vectors, rows)

    @staticmethod
    def _name(query: Any, position: int) -> Any:
        return str(query) if isinstance(query, Path) else query if isinstance(query, str | int) else position

    def _row(self, query: Any) -> int:
        """The row of what is an id, -1 for what is to be embedded."""
        if not isinstance(query, str | int | np.integer):
            return -1
        if self.index.has(query):
            return self.index.row(query)
        if isinstance(query, str) and Path(query).expanduser().is_file():
            return -1
        ids = self.index.images["id"].iloc[:5000].map(str)
        raise UserError(
            f"parameter 'query': '{query}' is no file, and no image of {self.index.name}; {nearest(query, ids)}"
        )


def _is_list(query: Any) -> bool:
    return hasattr(query, "__len__") and hasattr(query, "__getitem__") and not isinstance(query, Mapping)


def open_finder(name: str | Path, model: EmbedsImages | None = None, outputs: str = "auto") -> Finder:
    """Open an index to search, or embeddings of a folder, which are searched exactly then.

    Args:
        name: of an index in outputs/indexes or of a folder in outputs/embeddings, or a path of either.
        model: as of `Finder`.

    Raises: UserError: nothing of this name, with the nearest; what is damaged; another model than the index's.
    """
    path = Path(name).expanduser()
    home = results_folder(outputs)
    if (path / INDEX).exists() or (index_folder(name, outputs) / INDEX).exists():
        return Finder(open_index(name, outputs), model)
    if (path / FACTS).exists() or (home / "embeddings" / name / FACTS).exists():
        return Finder(build_index(read_embeddings(name, outputs), "exact"), model)
    names = [p.parent.name for p in (*home.glob(f"indexes/*/{INDEX}"), *home.glob(f"embeddings/*/{FACTS}"))]
    raise UserError(f"no index '{name}' in {home / 'indexes'}, nor vectors in {home / 'embeddings'}; "
                    f"{nearest(path.name, names)}")  # fmt: skip
