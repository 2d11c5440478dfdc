"""A manifest: a table of a user's own images, one a row, as CSV or Parquet.

    path,domain,class,split         and any other columns, which are kept
    birds/0001.jpg,birds,heron,

Paths count from the manifest's folder, or from a root given apart. Separators are commas, semicolons or tabs. All cells
are text: a class 007 keeps its zeros. Without splits a domain's classes are dealt as those of folders are.
"""

import csv
import importlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from udonlib.data.folders import SPLIT_FOLDERS, Classes, completed, dealt
from udonlib.data.listing import LeftOut
from udonlib.data.storage import DataError, Store, path_problem, printable
from udonlib.errors import misspelt, nearest

ENDINGS = (".csv", ".tsv", ".parquet")
NEEDED = ("path", "domain", "class")
KNOWN = (*NEEDED, "split")
SEPARATORS = (",", ";", "\t")


class Row(NamedTuple):
    """One image of a manifest; place: where it stands, for messages; others: the cells of further columns."""

    path: str
    domain: str
    label: str
    split: str
    place: str
    others: tuple[str, ...]


def is_manifest(path: Path) -> bool:
    """Say whether a file is read as a manifest: by its ending."""
    return path.suffix.lower() in ENDINGS and path.is_file()


class Manifest:
    """The domains of a manifest.

    Args:
        file: the manifest.
        images: where paths count from; None: the manifest's folder.

    Attributes:
        store: reads the images' paths.
        notes: sentences on how it was read; more come as `splits` is called.

    Raises:
        DataError: "<file>, line 7, column 'class': ..." with what was found and what is valid.
    """

    says = "its rows are for"
    left_out: tuple[LeftOut, ...] = ()

    def __init__(self, file: Path, images: Store | None = None) -> None:
        self.file = file
        self.store = Store(file.absolute().parent) if images is None else images
        names, rows = _parquet_rows(file) if file.suffix.lower() == ".parquet" else _csv_rows(file)
        self.notes: list[str] = []
        self._columns = [name for name in names if name not in KNOWN]
        self._domains: dict[str, list[Row]] = {}
        self._read(names, rows)

    def _read(self, names: Sequence[str], rows: Iterator[tuple[str, list[str]]]) -> None:
        """Take all rows, each image once; each is checked by itself and against those before."""
        number = {name: i for i, name in enumerate(names)}
        rest = [number[name] for name in self._columns]
        first: dict[str, Row] = {}
        repeated = 0
        for place, cells in rows:
            where = f"{self.file}, {place}"
            if len(cells) != len(names):
                raise DataError(f"{where}: found {len(cells)} cells, expected {len(names)}: {', '.join(names)}")
            path, domain, label = (cells[number[name]].strip() for name in NEEDED)
            split = cells[number["split"]].strip() if "split" in number else ""
            path = _relative(path)
            if problem := _problem(path, domain, label, split):
                raise DataError(f"{where}, {problem}")
            row = Row(path, domain, label, SPLIT_FOLDERS.get(split.lower(), ""), place, tuple(cells[i] for i in rest))
            before = first.setdefault(path, row)
            if before is row:
                self._domains.setdefault(domain, []).append(row)
            elif before._replace(place=place, others=row.others) == row:
                repeated += 1
            else:
                raise DataError(
                    f"{where}, column 'path': '{printable(path)}' is {_said(row)} here and {_said(before)} in "
                    f"{before.place}; an image has one domain, class and split"
                )
        if not first:
            raise DataError(f"{self.file}: holds no row; expected one at least, with {', '.join(NEEDED)}")
        if repeated:
            self.notes.append(f"{self.file.name}: {repeated:,} rows that repeat an earlier one are left out")

    @property
    def names(self) -> list[str]:
        """The domains' names, in the order of the rows."""
        return list(self._domains)

    def splits(self, domain: str) -> dict[str, Classes]:
        """Return split -> class -> images of a domain: as the manifest says, or else dealt as classes in folders are.

        Raises: DataError for rows without a split beside others that have one, and too few classes to deal.
        """
        rows = self._domains[domain]
        without = [row for row in rows if not row.split]
        if len(without) == len(rows):
            return dealt(domain, _classes(rows), self.where(domain), "class")
        if without:
            found = f"found nothing, but other rows of domain '{domain}' have a split; expected train, val or test"
            raise DataError(f"{self.file}, {without[0].place}, column 'split': {found}")
        given = {split: _classes([row for row in rows if row.split == split]) for split in {row.split for row in rows}}
        if set(given) == {"train"}:
            return dealt(domain, given["train"], self.where(domain), "class")
        splits, note = completed(domain, given, f"{self.file.name} says")
        self.notes.append(note)
        return splits

    def classes(self, domain: str) -> Classes:
        """Return class -> images of a domain, of all its splits together."""
        return _classes(self._domains[domain])

    def where(self, domain: str) -> str:
        """Name a domain in messages."""
        return f"{self.file}: domain '{domain}'"

    def columns(self, domain: str) -> dict[str, dict[str, str]]:
        """Return name -> path -> cell, of the columns beside path, domain, class and split."""
        rows = self._domains[domain]
        return {name: {row.path: row.others[i] for row in rows} for i, name in enumerate(self._columns)}


def _classes(rows: Sequence[Row]) -> Classes:
    classes: Classes = {}
    for row in rows:
        classes.setdefault(row.label, []).append(row.path)
    return {name: sorted(classes[name]) for name in sorted(classes)}


def _said(row: Row) -> str:
    return f"{row.domain}, '{row.label}'" + f", {row.split}" * bool(row.split)


def _relative(path: str) -> str:
    """Write a path as ours are: people's tables have Windows' backslashes, and ./ in front."""
    path = path.replace("\\", "/")
    while path.startswith("./"):
        path = path[2:].lstrip("/")
    return path


def _problem(path: str, domain: str, label: str, split: str) -> str | None:
    """Say which column of a row is wrong, and why; None: none is."""
    for name, cell in zip(NEEDED, (path, domain, label), strict=True):
        if not cell:
            return f"column '{name}': found an empty cell, expected text"
        if name != "path" and not cell.isprintable():
            return f"column '{name}': found {cell!r:.60}, which holds characters that cannot be printed"
    if problem := path_problem(path):
        return f"column 'path': {problem}"
    if path_problem(domain) or "/" in domain:
        return f"column 'domain': found {domain!r:.60}, expected a name as a folder may have"
    if split and split.lower() not in SPLIT_FOLDERS:
        return f"column 'split': found {split!r:.60}; {nearest(split, SPLIT_FOLDERS)}"
    return None


# --- the two forms ---------------------------------------------------------------------------------------------------


def _header(file: Path, cells: Sequence[str]) -> list[str]:
    """Return the columns' names, the known ones in small letters."""
    names = [name.strip().lower() if name.strip().lower() in KNOWN else name.strip() for name in cells]
    for name in NEEDED:
        if name not in names:
            raise DataError(
                f"{file}: no column '{name}'; found: {', '.join(map(printable, names[:20])) or 'none'}; expected "
                f"{', '.join(NEEDED)} and, if it is known, split{misspelt(name, map(printable, names[:20]))}"
            )
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise DataError(f"{file}: two columns are called '{printable(twice[0])}'; expected different names")
    return names


def _csv_rows(file: Path) -> tuple[list[str], Iterator[tuple[str, list[str]]]]:
    """Return the columns' names and, for each row, where it stands and its cells."""
    try:
        content = file.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}, line {line}: not UTF-8 text: byte 0x{content[error.start]:02x}; save it as CSV in UTF-8"
        ) from None
    first = text.partition("\n")[0]

    def known(separator: str) -> int:
        return len({cell.strip(' "\r').lower() for cell in first.split(separator)}.intersection(KNOWN))

    separator = max(SEPARATORS, key=lambda separator: (known(separator), first.count(separator)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)

    def lines() -> Iterator[tuple[str, list[str]]]:
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(f"{file}, line {line}: not CSV: {error}") from None
            if cells and any(map(str.strip, cells)):
                yield f"line {line}", cells

    rows = lines()
    return _header(file, next(rows, ("", []))[1]), rows


def _parquet_rows(file: Path) -> tuple[list[str], Iterator[tuple[str, list[str]]]]:
    parquet = needed("pyarrow.parquet")
    arrow = importlib.import_module("pyarrow")
    try:
        opened = parquet.ParquetFile(file)
        columns = opened.schema_arrow.names
    except (OSError, ValueError) as error:  # pyarrow's own are among them
        raise DataError(f"{file}: damaged, or not a Parquet file: {error}") from None
    names = _header(file, columns)

    def rows() -> Iterator[tuple[str, list[str]]]:
        number = 0
        try:
            for group in opened.iter_batches():
                for cells in zip(*(_texts(column) for column in group.columns), strict=True):
                    yield f"row {number} (from 0)", list(cells)
                    number += 1
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{file}: damaged at or after row {number}: {error}") from None
        finally:
            opened.close()

    def _texts(column: Any) -> list[str]:
        try:
            return ["" if cell is None else cell for cell in column.cast(arrow.string()).to_pylist()]
        except arrow.ArrowNotImplementedError:  # lists, mappings
            return ["" if cell is None else str(cell) for cell in column.to_pylist()]

    return names, rows()


def needed(module: str) -> Any:
    """Import a part of pyarrow, which only data in Parquet files needs.

    Raises: UserError "data in Parquet files needs pyarrow, which is not installed: pip install ..."
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"data in Parquet files needs pyarrow, which is not installed or does not load ({error}): pip install "
            "pyarrow, or udonlib with its extra: pip install '.[search]'"
        ) from None
