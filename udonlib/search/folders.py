"""A folder of images as vectors on the disk, of which only what is new or changed is computed the next time.

    outputs/embeddings/<name>/
        vectors.npy       unit vectors, float32 [image, dim]
        images.parquet    a row for each: id (its path), domain and label where they are known, width, height, hash of
                          its file, thumbnail (a JPEG), and when the file was changed last
        embeddings.json   which model made them, how many there are, the files' checksums; written last
        parts/            what an embedding that was stopped had done so far

An image is known by the hash of its content: renamed or moved, it keeps its vector. A file that has neither another
size nor another time than before is not read at all. Images that are gone leave; new ones follow the others. What a
killed process had done is found again but for the last PART_SECONDS, and files that it had only to put in their places
are put there.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from udonlib.data.catalog import Catalog, DataError, load_catalog
from udonlib.data.decoding import ImageError, decode
from udonlib.data.listing import Listing
from udonlib.data.storage import Store
from udonlib.data.tables.manifest import is_manifest
from udonlib.errors import UserError, nearest
from udonlib.evaluation.reading import Embed
from udonlib.files import replacing, replacing_together, results_folder, take_lock, write_json
from udonlib.search.embed import Embeddings, ModelFacts, Progress, vectors_of
from udonlib.search.pictures import PictureLoader
from udonlib.search.tables import ROWS, TableWriter, check_sums, checksum, damaged, needed, pieces_of, read_table

VECTORS, IMAGES, FACTS = "vectors.npy", "images.parquet", "embeddings.json"
FILES = (VECTORS, IMAGES, FACTS)
VERSION = 1
PART_ROWS = 4096  # after which what is done is written down, or PART_SECONDS
PART_SECONDS = 20.0
THUMBNAIL = 64  # pixels of the long side
SETTLED_NS = 2 * 10**9  # a file that was changed less than this before it was read may change again unseen


class Entry(NamedTuple):
    """An image of a folder: its path, and its domain and label where the folders tell them."""

    path: str
    domain: str | None
    label: str | None


class Seen(NamedTuple):
    """What is known of an image beside its vector."""

    hash: str
    width: int
    height: int
    thumbnail: bytes
    stamp: str


def list_images(data: str | Path | Catalog) -> tuple[Store, list[Entry]]:
    """The images of a folder or archive, by path in order.

    Args:
        data: UnED's form, "miniuned"; a table of images; domain/class/image or domain/split/class/image; or images in
            any other order, whose domains are not known then. A catalog: its test images, queries and index.

    Raises: DataError for a folder that does not exist or holds no images.
    """
    if isinstance(data, Catalog):
        return data.store, sorted(set(_entries(data, "")))
    listed = data == "miniuned" or is_manifest(Path(data).expanduser())
    store = None if listed else Store(Path(data).expanduser())
    homes = [store, *map(store.below, store.folders())] if store is not None else []
    if store is None or any(home.has_folder("info_files") for home in homes):
        catalog = load_catalog(data, all_as_test=True)
        return catalog.store, sorted(_entries(catalog, ""))
    paths = Listing(store).paths
    if not paths:
        raise DataError(f"{data}: holds no images")
    known: dict[str, Entry] = {}
    with suppress(DataError):  # images that no folder gives a domain are embedded as well
        catalog = load_catalog(data, all_as_test=True)
        known = {entry.path: entry for entry in _entries(catalog, catalog.store.prefix)}
    return store, [known.get(path, Entry(path, None, None)) for path in paths]


def _entries(catalog: Any, prefix: str) -> Iterator[Entry]:
    for domain in catalog.domains:
        for split in {split.name: split for split in (domain.queries("test"), domain.index("test"))}.values():
            for path, label in zip(split.paths, split.labels[:, 0].tolist(), strict=True):
                yield Entry(prefix + path, domain.name, split.class_names.get(label, str(label)))


def embed_folder(
    embed: Embed,
    model: ModelFacts,
    data: str | Path | Catalog,
    size: int,
    batch_size: int = 128,
    on_bad_image: str = "error",
    n_threads: int = 0,
    progress: Progress | None = None,
    *,
    outputs: str = "auto",
    name: str = "auto",
    overwrite: bool = False,
) -> Embeddings:
    """Embed the images of a folder that have no vector of this model yet, and return those of all.

    Args:
        embed, model, size, batch_size, on_bad_image, n_threads, progress: as of `search.embed.embed_pictures`.
        data: see `list_images`.
        outputs: folder of results. name: of the folder of the vectors; "auto": from the data and the model.
        overwrite: compute all of them anew.

    Raises:
        UserError: no images; one that cannot be read, unless these are skipped; a folder of that name that holds
            vectors of another model, or damaged ones; a full disk.
    """
    store, entries = list_images(data)
    root, part = (data.root, "-test") if isinstance(data, Catalog) else (data, "")
    where = str(root) if root == "miniuned" else str(Path(root).expanduser().absolute())
    if name == "auto":
        key = hashlib.sha256(json.dumps([where + part, model.fingerprint, model.precision]).encode()).hexdigest()
        stem = re.sub(r"[^A-Za-z0-9._+-]+", "_", f"{Path(where).stem}{part}-by-{model.name}")[:200]
        name = f"{stem}-{key[:6]}"
    folder = results_folder(outputs) / "embeddings" / name
    lock = take_lock(folder / "lock")
    try:
        _settle(folder)
        kept = _Kept(folder, model, overwrite)
        work = _Work(kept, store, entries)
        loader = PictureLoader(work.open, size, on_bad_image, n_threads)
        work.embed(embed, loader, batch_size, progress)
        skipped = {entries[i].path: problem for i, problem in sorted(loader.problems.items())}
        if work.claims or not skipped:
            kept.save(work.claims, where, skipped)
        else:
            raise ImageError(f"{data}: none of the {len(entries)} images can be read; {next(iter(skipped.values()))}")
    finally:
        lock.close()
    return read_embeddings(folder, outputs)


def _settle(folder: Path) -> None:
    """Put files in their places that a process wrote whole, and was killed while it put them there.

    `files.replacing_together` takes the old FACTS away first, and puts the new one there last.
    """
    for fresh in folder.glob(f"new.*.tmp/{FACTS}"):
        if not (folder / FACTS).exists():
            for name in FILES:
                with suppress(FileNotFoundError):
                    os.replace(fresh.with_name(name), folder / name)


def find_embeddings(name: str | Path, outputs: str = "auto") -> Path:
    """Folder of vectors, by its name or path. Raises: UserError "no embeddings ..." with the nearest name."""
    home = results_folder(outputs) / "embeddings"
    for path in (home / name, Path(name).expanduser().absolute()):
        if (path / FACTS).exists():
            return path
    names = [path.parent.name for path in home.glob(f"*/{FACTS}")]
    raise UserError(f"no embeddings '{name}' in {home}; {nearest(Path(name).name, names)}")


def read_embeddings(name: str | Path, outputs: str = "auto") -> Embeddings:
    """Read the vectors of a folder, which stay on the disk until they are looked at.

    Raises: UserError for what is missing, or damaged.
    """
    folder = find_embeddings(name, outputs)
    facts = _read_facts(folder)
    with damaged(folder / FACTS):
        model, skipped = ModelFacts(**facts["model"]), dict(facts["skipped"])
    columns = ["id", "domain", "label", "width", "height", "hash", "thumbnail"]
    return Embeddings(_vectors(folder), read_table(folder / IMAGES, columns), model, skipped, folder, facts["data"])


def _read_facts(folder: Path) -> dict[str, Any]:
    """What is said of the vectors, once their files are as they were written."""
    with damaged(folder / FACTS):
        facts = json.loads((folder / FACTS).read_bytes())
        version, sums = facts["version"], dict(facts["sums"])
    if version != VERSION or set(sums) != {VECTORS, IMAGES}:
        raise UserError(f"{folder / FACTS}: found version {version!r}, expected {VERSION}; embed again (overwrite)")
    check_sums(folder, sums, "vectors")
    return facts


def _vectors(folder: Path) -> np.ndarray:
    with damaged(folder / VECTORS):
        return np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)


class _Kept:
    """Rows that are on the disk: those of the finished vectors, then those of parts of unfinished ones."""

    def __init__(self, folder: Path, model: ModelFacts, overwrite: bool) -> None:
        self.folder, self.model = folder, model
        self.parts = sorted((folder / "parts").glob("*.parquet"))
        self._n_parts = len(self.parts)
        self.facts: dict[str, Any] = {}
        if overwrite:
            self._drop_parts()
        elif (folder / FACTS).exists():
            self.facts = _read_facts(folder)
            ModelFacts(**self.facts["model"]).check(model, "holds vectors", folder)
        tables = [read_table(folder / IMAGES, ["id", "domain", "label", "stamp", "hash"])] if self.facts else []
        self.n_saved = len(tables[0]) if tables else 0
        for part in self.parts:
            rows = read_table(part, ["id", "hash", "stamp", "model"])
            if set(rows.pop("model")) - {model.fingerprint}:
                raise UserError(f"{part}: of another model than '{model.name}'; give another name, or embed anew")
            tables.append(rows)
        self.rows = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["id", "hash", "stamp"])

    def add(self, rows: pd.DataFrame, vectors: np.ndarray) -> int:
        """Write a part; returns the number of its first row."""
        first = len(self.rows)
        file = self.folder / "parts" / f"{self._n_parts:06d}.parquet"
        self._n_parts += 1
        packed = [row.tobytes() for row in vectors]
        table = rows.assign(vector=packed, model=self.model.fingerprint)
        with replacing(file) as opened, TableWriter(opened) as writer:
            writer.write(table)
        self.parts.append(file)
        self.rows = pd.concat([self.rows, rows[["id", "hash", "stamp"]]], ignore_index=True)
        return first

    def save(self, claims: dict[int, tuple[Entry, str]], where: str, skipped: dict[str, str]) -> None:
        """Write the rows that images of today claim, unless all is as it was.

        claims: number of a row -> the image whose vector it is, and when its file was changed.
        """
        if self.facts and not self.parts and len(claims) == self.n_saved and self.facts["skipped"] == skipped:
            columns = self.rows[["id", "domain", "label", "stamp"]].astype(object)
            rows = columns.where(columns.notna(), None).itertuples(index=False, name=None)
            if all(row == (*claims[number][0], claims[number][1]) for number, row in enumerate(rows)):
                return
        with replacing_together(self.folder, FILES) as fresh:
            shape = (len(claims), self.model.dim)
            vectors = np.lib.format.open_memmap(fresh / VECTORS, "w+", np.float32, shape)
            done = number = 0
            with TableWriter(fresh / IMAGES) as writer:
                for rows, made in self._pieces():
                    mine = [i for i in range(len(rows)) if number + i in claims]
                    if mine:
                        entered = [claims[number + i] for i in mine]
                        table = rows.iloc[mine].assign(
                            id=[entry.path for entry, _ in entered],
                            domain=pd.Series([entry.domain for entry, _ in entered], dtype=object, index=mine),
                            label=pd.Series([entry.label for entry, _ in entered], dtype=object, index=mine),
                            stamp=[stamp for _, stamp in entered],
                        )
                        writer.write(_typed(table))
                        vectors[done : done + len(mine)] = made[mine]
                    done, number = done + len(mine), number + len(rows)
            vectors.flush()
            del vectors
            sums = {name: checksum(fresh / name) for name in (VECTORS, IMAGES)}
            facts = {"version": VERSION, "model": self.model._asdict(), "n": done, "data": where, "skipped": skipped}
            write_json(fresh / FACTS, facts | {"sums": sums})
        self._drop_parts()

    def _pieces(self) -> Iterator[tuple[pd.DataFrame, np.ndarray]]:
        if self.facts:
            saved, start = _vectors(self.folder), 0
            for rows in pieces_of(self.folder / IMAGES):
                yield rows, np.asarray(saved[start : start + len(rows)])
                start += len(rows)
        for part in self.parts:
            for rows in pieces_of(part):
                yield rows, np.stack([np.frombuffer(vector, np.float32) for vector in rows["vector"]])

    def _drop_parts(self) -> None:
        for part in self.parts:
            part.unlink(missing_ok=True)
        with suppress(OSError):
            (self.folder / "parts").rmdir()
        self.parts = []


def _typed(rows: pd.DataFrame) -> pd.DataFrame:
    """Columns of `images.parquet`, in their order."""
    return rows[["id", "domain", "label", "width", "height", "hash", "stamp", "thumbnail"]].reset_index(drop=True)


class _Work:
    """Which rows the images of a folder have already, and the making of those that are missing."""

    def __init__(self, kept: _Kept, store: Store, entries: Sequence[Entry]) -> None:
        needed("pyarrow.parquet")  # before hours of work
        self._kept, self._store, self._entries = kept, store, entries
        self.claims: dict[int, tuple[Entry, str]] = {}
        self._seen: dict[int, Seen] = {}
        by_path = dict(zip(kept.rows["id"], range(len(kept.rows)), strict=True))  # of a path's rows the last
        self._by_hash: dict[str, list[int]] = {}
        hashes, stamps = kept.rows["hash"].tolist(), kept.rows["stamp"].tolist()
        self.todo: list[int] = []
        for position, entry in enumerate(entries):
            row = by_path.get(entry.path)
            if row is not None and stamps[row] and stamps[row] == self._stamp(entry.path):
                self.claims[row] = (entry, stamps[row])
            else:
                self.todo.append(position)
        for row, value in enumerate(hashes):
            if row not in self.claims:
                self._by_hash.setdefault(value, []).append(row)

    def _stamp(self, path: str) -> str:
        """Size and times of a file in a folder; "" in an archive, and where it may change again within its time."""
        if self._store.is_archive:
            return ""
        try:
            stat = os.stat(self._store.root / (self._store.prefix + path))
        except OSError:
            return ""
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) < SETTLED_NS:
            return ""
        return f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}"

    def open(self, position: int) -> Image.Image | None:
        """Read an image; None where its vector is known by its content. Called in several threads."""
        path = self._entries[position].path
        stamp = self._stamp(path)
        data = self._store.read(path)
        value = hashlib.blake2b(data, digest_size=16).hexdigest()
        if value in self._by_hash:
            self._seen[position] = Seen(value, 0, 0, b"", stamp)
            return None
        image = decode(data, path)
        self._seen[position] = Seen(value, *image.size, _thumbnail(image), stamp)
        return image

    def embed(self, embed: Embed, loader: PictureLoader, batch_size: int, progress: Progress | None) -> None:
        """Give every image a row."""
        todo = self.todo
        while todo:
            done = len(self._entries) - len(todo)
            self._make(vectors_of(embed, loader, todo, batch_size, progress, done))
            again = []
            for position in sorted(self._seen):  # the others' content is known
                seen, rows = self._seen[position], self._by_hash[self._seen[position].hash]
                if rows:
                    self.claims[rows.pop()] = (self._entries[position], seen.stamp)
                else:
                    again.append(position)
            self._by_hash = {value: rows for value, rows in self._by_hash.items() if rows}
            self._seen.clear()
            todo = again

    def _make(self, batches: Iterator[tuple[Sequence[int], np.ndarray]]) -> None:
        positions: list[int] = []
        made: list[np.ndarray] = []
        since = time.monotonic()
        try:
            for read, vectors in batches:
                positions += read
                made.append(vectors)
                if len(positions) >= PART_ROWS or time.monotonic() - since > PART_SECONDS:
                    self._write(positions, made)
                    positions, made, since = [], [], time.monotonic()
        finally:  # also where a person or a bad image stops it
            self._write(positions, made)

    def _write(self, positions: Sequence[int], made: Sequence[np.ndarray]) -> None:
        if not positions:
            return
        entries = [self._entries[p] for p in positions]
        seen = pd.DataFrame([self._seen.pop(p) for p in positions], columns=Seen._fields)
        rows = seen.assign(id=[entry.path for entry in entries])
        for start in range(0, len(rows), ROWS):
            vectors = np.concatenate(made)[start : start + ROWS]
            piece = rows.iloc[start : start + ROWS].reset_index(drop=True)
            first = self._kept.add(piece, vectors)
            for i, (entry, stamp) in enumerate(zip(entries[start : start + ROWS], piece["stamp"], strict=True)):
                self.claims[first + i] = (entry, stamp)


def _thumbnail(image: Image.Image) -> bytes:
    small = image.copy() if max(image.size) <= THUMBNAIL else image.reduce(max(1, max(image.size) // (2 * THUMBNAIL)))
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
