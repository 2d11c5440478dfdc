"""An evaluation as files: the table, the outcome of every query, the neighbours in the merged index."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from udonlib.domains import Catalog
from udonlib.evaluation import MergedIndex, Neighbours
from udonlib.storage import replacing

TEXT = ("embedder", "domain", "index", "path", "row", "metric")  # columns of names, in any table that is written


def save_neighbours(neighbours: Iterable[Neighbours], file: Path) -> None:
    """Write neighbours in the merged index as arrays "<embedder>/<domain>/..."; `load_neighbours` reads them."""
    arrays: dict[str, np.ndarray] = {}
    for found in (found for found in neighbours if found.index == "merged"):
        key = f"{found.embedder}/{found.query_domain}"
        arrays |= {
            f"{key}/query_paths": np.array(found.query_paths),
            f"{key}/position": found.position.astype(np.int32),
            f"{key}/similarity": found.similarity.astype(np.float32),
            f"{key}/hit": found.hit,
        }
    with replacing(file) as opened:
        np.savez_compressed(opened, **arrays)  # type: ignore[arg-type]


def load_neighbours(file: Path, catalog: Catalog, subset: Literal["val", "test"]) -> list[Neighbours]:
    """Read what `save_neighbours` wrote; the catalog has to be the one that was searched."""
    searched = MergedIndex(catalog.names, tuple(domain.index(subset).paths for domain in catalog.domains))
    with np.load(file) as opened:
        arrays: dict[str, np.ndarray] = dict(opened)
    found = []
    for key in dict.fromkeys(key.rpartition("/")[0] for key in arrays):
        embedder, domain = key.split("/")
        paths = tuple(arrays[f"{key}/query_paths"].tolist())
        position, similarity, hit = (arrays[f"{key}/{name}"] for name in ("position", "similarity", "hit"))
        position = position.astype(np.int64)
        found.append(Neighbours(embedder, domain, "merged", paths, position, similarity, hit, searched))
    return found


def save_outcomes(outcomes: pd.DataFrame, file: Path) -> None:
    """Write the outcome of every query as a gzipped CSV: the same bytes for the same outcomes."""
    with replacing(file) as opened:
        outcomes.to_csv(opened, index=False, compression={"method": "gzip", "mtime": 0})


def load_outcomes(file: Path) -> pd.DataFrame:
    """Read what `save_outcomes` wrote."""
    return read_table(file)


def read_table(file: Path) -> pd.DataFrame:
    """Read a CSV of ours as it was written: names stay text, be they digits, "True", "NA" or "null"."""
    numbers = pd.read_csv(file, nrows=0).columns.difference(TEXT)
    return pd.read_csv(
        file, dtype=dict.fromkeys(TEXT, str), keep_default_na=False, na_values={name: ["", "nan"] for name in numbers}
    )


def save_table(table: pd.DataFrame, folder: Path) -> None:
    """Write a table as evaluation.json (a list of rows) and evaluation.csv; a file is replaced whole or not at all."""
    records = json.loads(table.to_json(orient="records", double_precision=15))
    contents = {
        "evaluation.json": json.dumps(records, indent=1) + "\n",
        "evaluation.csv": table.to_csv(index=False, lineterminator="\n"),
    }
    for name, content in contents.items():
        with replacing(folder / name) as file:
            file.write(content.encode())
