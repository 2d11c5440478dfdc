"""Tables of images as Parquet files, some rows at a time; the packages that search needs, or how to get them."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd

from udonlib.errors import UserError

ROWS = 8192  # of a table that are in memory at once, with their thumbnails
UNPACKED = ("thumbnail", "vector")  # columns whose bytes are packed already, or cannot be


def needed(module: str) -> Any:
    """Import a package that only search needs.

    Raises: UserError "search needs faiss-cpu, which is not installed: pip install ..."
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"faiss": "faiss-cpu"}.get(module.partition(".")[0], module.partition(".")[0])
        raise UserError(
            f"search needs {package}, which is not installed or does not load ({error}): pip install {package}, or "
            "udonlib with its extra: pip install '.[search]'"
        ) from None


class TableWriter:
    """Writes a Parquet file piece by piece.

    Args:
        file: its path, or the file opened.
        notes: text that the file holds besides.
    """

    def __init__(self, file: Path | BinaryIO, notes: Mapping[str, str] | None = None) -> None:
        self._file, self._notes = file, dict(notes or {})
        self._writer: Any = None

    def write(self, rows: pd.DataFrame) -> None:
        """Add rows; all pieces have the same columns."""
        arrow = importlib.import_module("pyarrow")
        if self._writer is None:
            parquet = needed("pyarrow.parquet")
            first = arrow.Table.from_pandas(rows, preserve_index=False)
            fields = [arrow.field(f.name, arrow.string() if f.type == arrow.null() else f.type) for f in first.schema]
            self._schema = arrow.schema(fields, metadata=self._notes)
            packing = {field.name: "none" if field.name in UNPACKED else "zstd" for field in fields}
            self._writer = parquet.ParquetWriter(self._file, self._schema, compression=packing)
        self._writer.write_table(arrow.Table.from_pandas(rows, schema=self._schema, preserve_index=False))

    def close(self) -> None:
        """End the file."""
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_table(file: Path | BinaryIO, table: pd.DataFrame, notes: Mapping[str, str] | None = None) -> None:
    """Write a whole table."""
    with TableWriter(file, notes) as writer:
        writer.write(table.iloc[:ROWS])
        for start in range(ROWS, len(table), ROWS):
            writer.write(table.iloc[start : start + ROWS])


def read_table(file: Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a table, or some of its columns. Raises: UserError "<file>: missing" or "damaged: ..."."""
    with damaged(file):
        pieces = list(_pieces(file, columns))
        return pd.concat(pieces, ignore_index=True)


def pieces_of(file: Path) -> Iterator[pd.DataFrame]:
    """Yield a table some rows at a time. Raises as `read_table` does."""
    with damaged(file):
        yield from _pieces(file, None)


def _pieces(file: Path, columns: Sequence[str] | None) -> Iterator[pd.DataFrame]:
    parquet = needed("pyarrow.parquet")
    with file.open("rb") as opened:
        table = parquet.ParquetFile(opened)
        for number in range(table.num_row_groups):
            yield table.read_row_group(number, columns=columns).to_pandas()


def notes_of(file: Path) -> dict[str, str]:
    """The text that a table's file holds besides. Raises as `read_table` does."""
    with damaged(file), file.open("rb") as opened:
        notes = needed("pyarrow.parquet").ParquetFile(opened).schema_arrow.metadata or {}
        return {key.decode(): value.decode() for key, value in notes.items()}


@contextmanager
def damaged(file: Path) -> Iterator[None]:
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


def checksum(file: Path) -> str:
    """SHA-256 of a file. Raises: UserError "<file>: missing"."""
    with damaged(file), file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_sums(folder: Path, sums: Mapping[str, str], what: str) -> None:
    """Compare files with the checksums that were written beside them, before anything in them is parsed.

    Raises: UserError "<file>: damaged: ..." where one differs.
    """
    for name, expected in sums.items():
        if Path(name).name != name:
            raise UserError(f"{folder}: damaged: names a file '{name}' outside of it")
        if checksum(folder / name) != expected:
            raise UserError(f"{folder / name}: damaged: not the file that was written here; make the {what} anew")
