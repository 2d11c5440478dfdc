"""Pack a catalog into one archive: a benchmark of millions of small files becomes one file that is read at random.

    info_files/<domain>/<split>.json, images/<path>      stored uncompressed, in the catalog's order

Large images can be made smaller once, here, instead of at every reading.
"""

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from udonlib.data.catalog import Catalog, Split
from udonlib.data.decoding import decode
from udonlib.data.images import main_unseen, start_workers
from udonlib.data.storage import DataError, Store
from udonlib.errors import UserError, nearest

CHUNK = 64  # images of one task


def pack(
    catalog: Catalog,
    out: str | Path,
    short_side: int | None = None,
    image_format: str = "jpeg",
    quality: int = 90,
    on_bad_image: str = "error",
    n_workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Write the catalog with its images to the archive `out`; reading that gives the same catalog.

    The same catalog and settings give the same bytes. The archive appears under its name when it is complete.

    Args:
        short_side: images whose short side is longer are scaled to it (antialiased, unlike the training pipeline's own
            resizing) and encoded anew, under their old path; None: every file as it is.
        image_format, quality: of the images encoded anew: "jpeg" or "webp"; 1 to 100.
        on_bad_image: "error": stop at an image that is missing or, if it is to be scaled, cannot be decoded. "skip":
            leave a missing one out and take a damaged one as it is, and return them.
        n_workers: processes that read and scale; 0: this one.
        progress: called with the images done and the images in all.

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
    if not target.parent.is_dir() or target.is_dir():
        raise UserError(f"parameter 'out': '{target}' has to be a file in a folder that exists")
    if target.exists() and target.samefile(catalog.store.root):
        raise UserError(f"parameter 'out': '{target}' is the archive that the images are read from")

    paths = list(dict.fromkeys(path for d in catalog.domains for s in d.splits.values() for path in s.paths))
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    shrinker = Shrinker(catalog.store, short_side, image_format, quality)
    if n_workers:
        with main_unseen():
            results: Iterator[Shrunk] = iter(start_workers(shrinker, chunks, n_workers))
    else:
        results = map(shrinker.__getitem__, chunks)

    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    bad: dict[str, str] = {}
    n_done = 0
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            for domain in catalog.domains:
                for name, split in domain.splits.items():
                    _write(archive, f"info_files/{domain.name}/{name}.json", _info_file(split))
            for chunk, contents in zip(chunks, results, strict=True):
                for path, (content, problem) in zip(chunk, contents, strict=True):
                    if problem and on_bad_image == "error":
                        raise DataError(problem)
                    if problem:
                        bad[path] = problem
                    if content is not None:
                        _write(archive, f"images/{path}", content)
                n_done += len(chunk)
                if progress:
                    progress(n_done, len(paths))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return bad


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
