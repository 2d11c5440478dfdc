"""Pack a catalog: a benchmark of millions of small files becomes one file, or a few, that are read at random.

    a.zip:      info_files/<domain>/<split>.json, images/<path>     stored uncompressed, in the catalog's order
    a folder:   info_files/<domain>/<split>.json, images-00000-of-00003.parquet, ...    see `data.tables.shards`

Shards are read by other programs, too, and packing that was killed goes on behind the last one that is whole. Large
images can be made smaller once, here, instead of at every reading.
"""

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from udonlib.data.catalog import Catalog, Split
from udonlib.data.decoding import decode
from udonlib.data.images import main_unseen, start_workers
from udonlib.data.storage import DataError, Store
from udonlib.data.tables.shards import GROUP, bad_in, shard_name, write_shard
from udonlib.errors import UserError, nearest
from udonlib.files import remove_leftovers, replacing, write_json

CHUNK = GROUP  # images of one task, and of one row group


def pack(
    catalog: Catalog,
    out: str | Path,
    short_side: int | None = None,
    image_format: str = "jpeg",
    quality: int = 90,
    on_bad_image: str = "error",
    n_workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    shard_images: int = 8192,
) -> dict[str, str]:
    """Write the catalog with its images to the archive or folder `out`; reading that gives the same catalog.

    The same catalog and settings give the same bytes. An archive appears under its name when it is complete, and so
    does each shard of a folder.

    Args:
        out: a file, which becomes a zip archive; or a name without an ending, which becomes a folder of shards. In one
            that was begun with the same catalog and settings, packing goes on.
        short_side: images whose short side is longer are scaled to it (antialiased, unlike the training pipeline's own
            resizing) and encoded anew, under their old path; None: every file as it is.
        image_format, quality: of the images encoded anew: "jpeg" or "webp"; 1 to 100.
        on_bad_image: "error": stop at an image that is missing or, if it is to be scaled, cannot be decoded. "skip":
            leave a missing one out and take a damaged one as it is, and return them.
        n_workers: processes that read and scale; 0: this one.
        progress: called with the images done and the images in all.
        shard_images: of a shard, a multiple of 64.

    Returns: path -> message of the bad images.

    Raises: UserError for impossible settings, or an archive that is the catalog's own; DataError or ImageError for a
        bad image.
    """
    target = Path(out)
    for name, value, valid in (
        ("image_format", image_format, ("jpeg", "webp")),
        ("on_bad_image", on_bad_image, ("error", "skip")),
    ):
        if value not in valid:
            raise UserError(f"parameter '{name}': found '{value}'; {nearest(value, valid)}")
    if not 1 <= quality <= 100 or (short_side is not None and short_side < 1):
        raise UserError(f"expected quality of 1 to 100 and short_side >= 1, found {quality} and {short_side}")
    in_shards = target.suffix == ""
    if not target.parent.is_dir() or (target.is_dir() and not in_shards) or (target.is_file() and in_shards):
        raise UserError(f"parameter 'out': '{target}' has to be a file in a folder that exists, or a folder of its own")
    if target.exists() and any(
        place.exists() and target.samefile(place) for place in (catalog.root, catalog.store.root)
    ):
        raise UserError(f"parameter 'out': '{target}' is the archive that the images are read from")
    if shard_images < CHUNK or shard_images % CHUNK:
        raise UserError(f"parameter 'shard_images': found {shard_images}, expected a multiple of {CHUNK}")

    paths = list(dict.fromkeys(path for d in catalog.domains for s in d.splits.values() for path in s.paths))
    shrinker = Shrinker(catalog.store, short_side, image_format, quality)
    settings = {
        "short_side": short_side,
        "image_format": image_format,
        "quality": quality,
        "shard_images": shard_images,
    }
    done, n_done, bad = _begin_shards(catalog, target, len(paths), settings) if in_shards else ([], 0, {})
    chunks = [paths[i : i + CHUNK] for i in range(n_done, len(paths), CHUNK)]
    if n_workers and chunks:
        with main_unseen():
            results: Iterator[Shrunk] = iter(start_workers(shrinker, chunks, n_workers))
    else:
        results = map(shrinker.__getitem__, chunks)
    contents = _contents(chunks, results, on_bad_image, bad, n_done, len(paths), progress)
    if in_shards:
        count = -(-len(paths) // shard_images)
        _write_shards(catalog, target, contents, range(len(done), count), shard_images // CHUNK, bad)
    else:
        _write_archive(catalog, target, contents)
    return bad


Chunk = list[tuple[str, bytes]]  # path and content of those that are there


def _contents(
    chunks: Sequence[Sequence[str]],
    results: Iterator["Shrunk"],
    on_bad_image: str,
    bad: dict[str, str],
    n_done: int,
    n_images: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Chunk]:
    """Yield the images of each chunk; note in `bad` what is wrong, or stop at it."""
    for chunk, contents in zip(chunks, results, strict=True):
        found: Chunk = []
        for path, (content, problem) in zip(chunk, contents, strict=True):
            if problem and on_bad_image == "error":
                raise DataError(problem)
            if problem:
                bad[path] = problem
            if content is not None:
                found.append((path, content))
        n_done += len(chunk)
        if progress:
            progress(n_done, n_images)
        yield found


def _write_archive(catalog: Catalog, target: Path, contents: Iterator[Chunk]) -> None:
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            for domain in catalog.domains:
                for name, split in domain.splits.items():
                    _write(archive, f"info_files/{domain.name}/{name}.json", _info_file(split))
            for chunk in contents:
                for path, content in chunk:
                    _write(archive, f"images/{path}", content)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


# --- shards ----------------------------------------------------------------------------------------------------------


def _begin_shards(
    catalog: Catalog, target: Path, n_images: int, settings: Mapping[str, Any]
) -> tuple[list[Path], int, dict[str, str]]:
    """Write what stands beside the shards; return those that are whole already, their images, and the bad ones."""
    facts = {"fingerprint": catalog.fingerprint, "domains": list(catalog.names), **settings}
    count, note = -(-n_images // settings["shard_images"]), target / "packing.json"
    if target.is_dir() and any(target.iterdir()):
        try:
            before = json.loads(note.read_text())
        except (OSError, ValueError):
            raise UserError(f"parameter 'out': '{target}' is a folder of other files; expected a new name") from None
        differing = [name for name in facts if before.get(name) != facts[name]]
        if differing:
            found = f"was begun with another {', '.join(differing)}"
            raise UserError(f"parameter 'out': '{target}' {found}: expected the same, or a new name")
    write_json(note, facts)
    for domain in catalog.domains:
        for name, split in domain.splits.items():
            with replacing(target / "info_files" / domain.name / f"{name}.json") as file:
                file.write(_info_file(split))
    done: list[Path] = []
    for number in range(count):
        remove_leftovers(target, shard_name(number, count))
        if len(done) == number and (target / shard_name(number, count)).exists():
            done.append(target / shard_name(number, count))
    bad = {path: problem for file in done for path, problem in bad_in(file).items()}
    return done, min(n_images, len(done) * settings["shard_images"]), bad


def _write_shards(
    catalog: Catalog, target: Path, contents: Iterator[Chunk], numbers: range, n_chunks: int, bad: dict[str, str]
) -> None:
    columns = list(dict.fromkeys(name for d in catalog.domains for s in d.splits.values() for name in s.columns))
    facts = _Facts(catalog)
    for number in numbers:
        known = dict(bad)
        news: dict[str, str] = {}

        def groups(known: dict[str, str] = known, news: dict[str, str] = news) -> Iterator[list[dict[str, Any]]]:
            for chunk in islice(contents, n_chunks):
                yield [facts.of(path) | {"path": path, "content": content} for path, content in chunk]
            news.update({path: problem for path, problem in bad.items() if path not in known})

        write_shard(target / shard_name(number, numbers.stop), groups(), columns, news)


class _Facts:
    """What a row says of an image beside its bytes; made for one domain at a time, as images come by domain."""

    def __init__(self, catalog: Catalog) -> None:
        self._domains = iter(catalog.domains)
        self._known: dict[str, dict[str, Any]] = {}

    def of(self, path: str) -> dict[str, Any]:
        """Return domain, labels, class, split and further columns of an image."""
        while path not in self._known:
            domain = next(self._domains)
            self._known = {}
            for name, split in domain.splits.items():
                for i, (path_here, row) in enumerate(zip(split.paths, split.labels.tolist(), strict=True)):
                    labels = [label for label in row if label >= 0]
                    row_of = {"domain": domain.name, "labels": labels, "class": split.class_names.get(labels[0])}
                    known = self._known.setdefault(path_here, row_of | {"split": "", "columns": {}})
                    known["split"] = f"{known['split']},{name}".lstrip(",")
                    known["columns"] |= {column: cells[i] for column, cells in split.columns.items()}
        return self._known[path]


# --- what both have ---------------------------------------------------------------------------------------------------


Shrunk = list[tuple[bytes | None, str | None]]  # of each path: content, and what is wrong with it


@dataclass(frozen=True)
class Shrinker(Dataset):
    """Reads image files and scales those that are too large: all that a worker process has to know."""

    store: Store
    short_side: int | None
    image_format: str
    quality: int

    def __getitem__(self, paths: Sequence[str]) -> Shrunk:
        """Return for each path the bytes to store, None where it is missing, and None or a message."""
        results: Shrunk = []
        for path in paths:
            content = None
            try:
                content = self.store.read(path)
                results.append((self._shrunk(content, path), None))
            except UserError as error:
                results.append((content, str(error)))
        return results

    def _shrunk(self, content: bytes, path: str) -> bytes:
        if self.short_side is None:
            return content
        image = decode(content, path, at_least=self.short_side)
        short = min(image.size)
        if short <= self.short_side:
            return content
        width, height = (round(side * self.short_side / short) for side in image.size)
        buffer = io.BytesIO()
        scaled = image.resize((width, height), Image.Resampling.LANCZOS)
        scaled.save(buffer, self.image_format, quality=self.quality)
        return buffer.getvalue()


def _info_file(split: Split) -> bytes:
    entries = []
    for path, row in zip(split.paths, split.labels.tolist(), strict=True):
        labels = [label for label in row if label >= 0]
        entry = {"path": path, "class_id": labels[0] if len(labels) == 1 else labels}
        if len(labels) == 1 and labels[0] in split.class_names:
            entry["class"] = split.class_names[labels[0]]
        entries.append(entry)
    return json.dumps(entries, ensure_ascii=False).encode()


def _write(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))  # the same bytes whenever it is packed
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, content)
