"""Packs of Parquet files, shards, in the layout of the `datasets` library: many images in few files, read at random.

    images-00000-of-00003.parquet, ...    a row an image: image {bytes, path}, domain, label, class, split, ...

`datasets.load_dataset("parquet", data_files="pack/*.parquet")` reads them, and shows the images as such. Here an image
is read where it lies: its bytes stand in the file as they are, uncompressed, one after the other in each row group, so
that their places follow from their sizes, which are a column. Only that index is read by pyarrow; a worker process
needs the index and the files, which it opens for itself. Each image is held against its checksum when it is read.
"""

import importlib
import json
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from udonlib.data.storage import DataError, name_key
from udonlib.data.tables.manifest import needed
from udonlib.files import replacing

NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.parquet")
GROUP = 64  # images of a row group, and so of a page
GROUP_BYTES = 2**28  # of their content: a page's size is a number of 31 bits
BYTES, BAD = "image.bytes", "udonlib.bad"
_ROW = np.dtype([("key", "<u8"), ("offset", "<u8"), ("size", "<u4"), ("crc", "<u4"), ("shard", "<u2")])


def shard_name(number: int, count: int) -> str:
    """Name a shard as the `datasets` library does."""
    return f"images-{number:05d}-of-{count:05d}.parquet"


def find_shards(folder: Path) -> list[Path]:
    """Return the shards of a folder in order; none where it holds no pack.

    Raises: DataError where some of them are missing, or are of two packs.
    """
    found = {path: match for path in sorted(folder.iterdir()) if (match := NAME.fullmatch(path.name))}
    for stem in dict.fromkeys(match["stem"] for match in found.values()):
        mine = {path: match for path, match in found.items() if match["stem"] == stem}
        counts = {int(match["count"]) for match in mine.values()}
        numbers = {int(match["number"]) for match in mine.values()}
        if len(counts) > 1:
            raise DataError(f"{folder}: shards of two packs: {', '.join(path.name for path in list(mine)[:4])}")
        [count] = counts
        if missing := sorted(set(range(count)) - numbers):
            raise DataError(
                f"{folder}: {len(missing)} of {count} shards are missing, the first is number {missing[0]} (from 0): "
                "pack again into the same folder, which goes on where it stopped"
            )
    return list(found)


class Shards:
    """The images of a pack by their paths: what `Store` reads archives with, in 26 bytes an image.

    Raises: DataError for shards that are missing, damaged, or laid out so that images cannot be read where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folders: set[bytes] = set()
        self._files = find_shards(folder)
        self._open: dict[int, int] = {}
        rows = np.concatenate([_index(file, number) for number, file in enumerate(self._files)])
        self._rows = rows[np.argsort(rows["key"], kind="stable")]
        self._keys = self._rows["key"].copy()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}  # file descriptors mean nothing in another process

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    def contains(self, names: Sequence[str]) -> Bool[np.ndarray, "n"]:
        """Return whether there is an image of each name."""
        return np.isin(np.array([name_key(name.encode()) for name in names], dtype="<u8"), self._keys)

    def names(self) -> Iterator[str]:
        """Yield the names of all images."""
        for file in self._files:
            with _opened(file) as parquet:
                try:
                    names = parquet.read(columns=["image.path"])["image"].combine_chunks().field("path").to_pylist()
                except UNREADABLE as error:
                    raise DataError(f"{file}: damaged: {error}") from None
                yield from names

    def content(self, name: str) -> bytes | None:
        """Return an image's bytes, checked against their checksum; None where there is no such image."""
        key = np.uint64(name_key(name.encode()))
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._rows) or self._keys[at] != key:
            return None
        _, offset, size, crc, shard = self._rows[at].tolist()
        content = self._bytes(shard, offset - 4, size + 4)
        file = self._files[shard]
        if len(content) != size + 4 or struct.unpack_from("<I", content)[0] != size:
            raise DataError(f"{file}: image '{name}' is not where its row group says: damaged, or changed since")
        if zlib.crc32(content[4:]) != crc:
            raise DataError(f"{file}: image '{name}' is damaged: its checksum differs")
        return content[4:]

    def _bytes(self, shard: int, offset: int, count: int) -> bytes:
        file = self._files[shard]
        try:
            if not hasattr(os, "pread"):  # Windows
                with file.open("rb") as opened:
                    opened.seek(offset)
                    return opened.read(count)
            if shard not in self._open:
                self._open[shard] = os.open(file, os.O_RDONLY)
            return os.pread(self._open[shard], count, offset)
        except OverflowError:  # beyond what a file can hold: whoever asks says what is wrong
            return b""
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from error


UNREADABLE = (OSError, ValueError, NotImplementedError)  # what pyarrow says of damaged files


def _opened(file: Path) -> Any:
    try:
        return needed("pyarrow.parquet").ParquetFile(file)
    except UNREADABLE as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: cut short or damaged, or not a Parquet file: {error}") from None


def _index(file: Path, number: int) -> np.ndarray:
    """Return a row for each image of a shard: where its bytes begin in the file, how many, and their checksum."""
    with _opened(file) as parquet:
        facts = parquet.metadata
        paths = [facts.schema.column(i).path for i in range(facts.num_columns)]
        lacking = {BYTES, "image.path", "n_bytes", "crc32"}.difference(paths)
        if lacking:
            raise DataError(f"{file}: no column '{min(lacking)}'; expected a pack of udonlib.data.packing")
        try:
            table = parquet.read(columns=["image.path", "n_bytes", "crc32"])
            names = table["image"].combine_chunks().field("path").to_pylist()
        except UNREADABLE as error:
            raise DataError(f"{file}: damaged: {error}") from None
        rows = np.zeros(facts.num_rows, _ROW)
        rows["key"] = [name_key(name.encode()) for name in names]
        rows["size"], rows["crc"] = table["n_bytes"].to_numpy(), table["crc32"].to_numpy()
        rows["shard"] = number
        start = 0
        for group in range(facts.num_row_groups):
            column = facts.row_group(group).column(paths.index(BYTES))
            if column.compression != "UNCOMPRESSED" or column.has_dictionary_page:
                raise DataError(f"{file}: its images are compressed; expected a pack of udonlib.data.packing")
            part = rows[start : start + facts.row_group(group).num_rows]
            # A page's values end where it ends, each behind four bytes of its size.
            end = column.data_page_offset + column.total_compressed_size
            taken = np.cumsum((part["size"].astype(np.uint64) + 4)[::-1])[::-1]
            part["offset"] = end - taken + 4
            start += len(part)
        return rows


# --- writing ---------------------------------------------------------------------------------------------------------


def write_shard(
    file: Path, groups: Iterable[Sequence[Mapping[str, Any]]], columns: Sequence[str], bad: Mapping[str, str]
) -> None:
    """Write one shard, whole or not at all.

    Args:
        groups: lists of at most GROUP rows: path, content, domain, labels, class, split, and `columns`.
        columns: names of text that stands besides.
        bad: path -> what is wrong with it, complete when all groups have been taken: kept in the shard's notes.
    """
    parquet, arrow = needed("pyarrow.parquet"), importlib.import_module("pyarrow")
    schema = _schema(arrow, columns)
    texts = ["domain", "class", "split", *columns]
    with (
        replacing(file) as opened,
        parquet.ParquetWriter(
            opened, schema, compression="none", use_dictionary=texts, write_statistics=texts, data_page_size=2**30
        ) as writer,
    ):  # fmt: skip
        for group in groups:
            for rows in _bounded(group):
                writer.write_table(arrow.table(_arrays(arrow, schema, rows, columns), schema=schema), len(rows))
        writer.add_key_value_metadata({BAD: json.dumps(dict(bad))})


def bad_in(file: Path) -> dict[str, str]:
    """Return path -> what is wrong with it, of the bad images that were met when a shard was written."""
    with _opened(file) as parquet:
        return json.loads((parquet.metadata.metadata or {}).get(BAD.encode(), b"{}"))


def _bounded(group: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Yield the rows in pieces that a page has room for."""
    piece: list[Mapping[str, Any]] = []
    n_bytes = 0
    for row in group:
        if piece and n_bytes + len(row["content"]) > GROUP_BYTES:
            yield piece
            piece, n_bytes = [], 0
        piece.append(row)
        n_bytes += len(row["content"])
    if piece:
        yield piece


def _arrays(arrow: Any, schema: Any, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, Any]:
    values: dict[str, list[Any]] = {
        "image": [{"bytes": row["content"], "path": row["path"]} for row in rows],
        "domain": [row["domain"] for row in rows],
        "label": [row["labels"][0] for row in rows],
        "labels": [row["labels"] for row in rows],
        "class": [row["class"] for row in rows],
        "split": [row["split"] for row in rows],
        "n_bytes": [len(row["content"]) for row in rows],
        "crc32": [zlib.crc32(row["content"]) for row in rows],
    }
    values |= {name: [row["columns"].get(name, "") for row in rows] for name in columns}
    return {name: arrow.array(column, schema.field(name).type) for name, column in values.items()}


def _schema(arrow: Any, columns: Sequence[str]) -> Any:
    """The columns, with what the `datasets` library says of them in the file's notes: that `image` is an image."""
    text, number = arrow.string(), arrow.int64()
    fields = {
        "image": arrow.struct({"bytes": arrow.binary(), "path": text}),
        "domain": text,
        "label": number,
        "labels": arrow.list_(number),
        "class": text,
        "split": text,
        "n_bytes": arrow.uint32(),
        "crc32": arrow.uint32(),
        **dict.fromkeys(columns, text),
    }
    features: dict[str, Any] = {name: {"dtype": str(kind), "_type": "Value"} for name, kind in fields.items()}
    features["image"] = {"_type": "Image"}
    features["labels"] = {"feature": {"dtype": "int64", "_type": "Value"}, "_type": "List"}
    notes = {"huggingface": json.dumps({"info": {"features": features}})}
    return arrow.schema(list(fields.items()), metadata=notes)
