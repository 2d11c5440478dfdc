"""An evaluation as files: the table, the outcome of every query, the neighbours in the merged index."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from udonlib.data.catalog import Catalog
from udonlib.errors import UserError
from udonlib.evaluation.evaluate import Evaluation, MergedIndex, Neighbours
from udonlib.files import replacing

OUTCOMES, NEIGHBOURS = "outcomes.csv.gz", "neighbours.npz"
FILES = ("evaluation.csv", "evaluation.json", OUTCOMES, NEIGHBOURS)
TEXT = (
    "embedder",
    "encoder",
    "group",
    "size",
    "domain",
    "index",
    "path",
    "row",
    "metric",
)  # columns of names, in any table that is written


def save_neighbours(neighbours: Iterable[Neighbours], file: Path) -> None:
    """Write neighbours in the merged index as arrays "<embedder>/<domain>/..."; `load_neighbours` reads them."""
    arrays: dict[str, np.ndarray] = {}
    for each in (each for each in neighbours if each.index == "merged"):
        key = f"{each.embedder}/{each.query_domain}"
        arrays |= {
            f"{key}/query_paths": np.array(each.query_paths),
            f"{key}/position": each.position.astype(np.int32),
            f"{key}/similarity": each.similarity.astype(np.float32),
            f"{key}/hit": each.hit,
        }
    with replacing(file) as opened:
        np.savez_compressed(opened, **arrays)  # type: ignore[arg-type]


def load_neighbours(file: Path, catalog: Catalog, subset: Literal["val", "test"]) -> list[Neighbours]:
    """Read what `save_neighbours` wrote; the catalog has to be the one that was searched.

    Raises:
        UserError: "<file>: missing" or "damaged: ...".
    """
    searched = MergedIndex(catalog.names, tuple(domain.index(subset).paths for domain in catalog.domains))
    neighbours = []
    with _reading(file):
        with file.open("rb") as stream, np.load(stream) as opened:
            arrays: dict[str, np.ndarray] = dict(opened)
        for key in dict.fromkeys(key.rpartition("/")[0] for key in arrays):
            embedder, domain = key.split("/")
            paths = tuple(arrays[f"{key}/query_paths"].tolist())
            position, similarity, hit = (arrays[f"{key}/{name}"] for name in ("position", "similarity", "hit"))
            position = position.astype(np.int64)
            neighbours.append(Neighbours(embedder, domain, "merged", paths, position, similarity, hit, searched))
    return neighbours


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Name the file where it cannot be read, or is not what was written."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{file}: missing") from None
    except Exception as error:  # what is cut or changed raises whatever its readers happen to meet first
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file}: damaged: {reason:.200}") from None


def save_outcomes(outcomes: pd.DataFrame, file: Path) -> None:
    """Write the outcome of every query as a gzipped CSV: the same bytes for the same outcomes."""
    with replacing(file) as opened:
        outcomes.to_csv(opened, index=False, compression={"method": "gzip", "mtime": 0})


def load_outcomes(file: Path) -> pd.DataFrame:
    """Read what `save_outcomes` wrote."""
    return read_table(file)


def read_table(file: Path) -> pd.DataFrame:
    """Read a CSV of ours as it was written: names stay text, be they digits, "True", "NA" or "null".

    Raises:
        UserError: "<file>: missing" or "damaged: ...".
    """
    with _reading(file):
        numbers = pd.read_csv(file, nrows=0).columns.difference(TEXT)
        missing = {name: ["", "nan"] for name in numbers}
        return pd.read_csv(file, dtype=dict.fromkeys(TEXT, str), keep_default_na=False, na_values=missing)


def load_table(folder: Path) -> pd.DataFrame:
    """Read the evaluation.csv that `save_table` wrote, and hold it against evaluation.json, which says the same.

    A CSV that was cut at the end of a line looks whole. Results of older versions may lack the other file.

    Raises:
        UserError: the file that is missing or damaged, and how.
    """
    file, twin = folder / "evaluation.csv", folder / "evaluation.json"
    table = read_table(file)
    with _reading(file), file.open("rb") as opened:
        opened.seek(-1, os.SEEK_END)
        if opened.read(1) != b"\n":
            raise UserError(f"{file}: damaged: its end is missing")
    if not twin.exists():
        return table
    with _reading(twin):
        rows = json.loads(twin.read_bytes())
        other = pd.DataFrame(rows)[list(table)]
    if len(table) != len(other):
        raise UserError(f"{file}: damaged: it holds {len(table)} rows, {twin.name} {len(other)}")
    for name in table:
        if name in TEXT:
            same = table[name].tolist() == other[name].tolist()
        else:
            here, there = (pd.to_numeric(each[name], errors="coerce").to_numpy(float) for each in (table, other))
            same = np.allclose(here, there, rtol=1e-9, atol=1e-9, equal_nan=True)
        if not same:
            raise UserError(f"{file}: damaged: other values of {name} than in {twin.name}")
    return table


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


def save_evaluation(
    evaluation: Evaluation, folder: Path, seed: int, embedders: Sequence[str] | None = None
) -> pd.DataFrame:
    """Write FILES: the table with its intervals, the outcome of every query, the neighbours in the merged index.

    Args:
        seed: of the bootstrap.
        embedders: whose neighbours are kept; None: all.

    Returns:
        The table.
    """
    table = evaluation.with_intervals(seed)
    save_table(table, folder)
    save_outcomes(evaluation.outcomes, folder / OUTCOMES)
    everyone = evaluation.neighbours.values()
    save_neighbours([each for each in everyone if embedders is None or each.embedder in embedders], folder / NEIGHBOURS)
    return table
