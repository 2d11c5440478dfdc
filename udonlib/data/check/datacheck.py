"""Check a catalog before hours are spent on it: files, pixels, copies, labels; findings with paths, and a verdict.

    check = check_catalog(load_catalog("path/to/folder"))
    print(check.verdict)

Labels are looked at whole. Then the ends of every file are read, which tells missing, empty and foreign files, sizes,
modes and equal files, and which are likely to be cut; those are decoded, and then the others in random order. Both
stop when the time is up, queries and index having come first, and what was not looked at is said.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Int64

from udonlib.data.catalog import Catalog
from udonlib.data.check.catalog_images import CatalogImages, single_images, without_positives
from udonlib.data.check.duplicates import MAX_PAIRS, equal_groups, near_pairs
from udonlib.data.check.probe import END
from udonlib.data.check.scan import ImageScan, Progress
from udonlib.data.decoding import ending
from udonlib.errors import UserError

Level = Literal["broken", "warning", "note"]
Example = tuple[str, str, str]  # a domain, a path, and what about it

LEVELS: tuple[Level, ...] = ("broken", "warning", "note")
MAX_LISTED = 1000  # images that a finding names
QUICK_PIXELS = 1000  # images that the quick check decodes beside those that look cut
DARK = 64  # of 255: where no image of a domain is brighter, 16-bit files use a small part of their range
MEANINGS = {
    "unreadable": "training and evaluation stop at them, or leave them out with on_bad_image='skip'",
    "unmeasured": "R@1 can only be 0 there, and no checkpoint can be chosen by it",
    "no positive": "no other image of their class lies in their index: nothing can be right, and they count as 0",
    "single": "nothing shows what the images of such a class have in common",
    "leak": "results look better than they are: what is tested was trained on",
    "conflict": "one content in two classes: one of the two cannot be right",
    "copies": "where a query has a copy in its index, R@1 looks better than it is",
    "narrow": "scaled as 16 bits they are nearly black: scale their values to the whole range",
    "flat": "there is nothing in them to learn from, or to find",
}


@dataclass(frozen=True)
class Finding:
    """One kind of thing that was found.

    kind: of MEANINGS, or "left out". level: "broken" data is not trained on; a "note" does no harm in most data.
    what: in the plural. n: how many. meaning: what comes of it. images: some of them, at most MAX_LISTED. others: of
    pairs, the path of the other image of each.
    """

    kind: str
    level: Level
    what: str
    n: int
    meaning: str
    images: tuple[Example, ...] = ()
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.what}: {self.n:,}"


@dataclass(frozen=True)
class FileKinds:
    """What the image files of a domain are: how many of each format, mode and ending, their bytes in all, and the
    smallest, median and largest width and height."""

    domain: str
    formats: Counter[str]
    modes: Counter[str]
    endings: Counter[str]
    n_bytes: int
    widths: tuple[int, int, int]
    heights: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class DataCheck:
    """What was found in a catalog.

    findings: the worst first. kinds: of each domain of which files were read. notes: on how the data was read.
    n_images: in all, each once; n_files: whose files were looked at; n_pixels: that were decoded. seconds: it took.
    """

    root: str
    findings: tuple[Finding, ...]
    kinds: tuple[FileKinds, ...]
    notes: tuple[str, ...]
    n_images: int
    n_files: int
    n_pixels: int
    seconds: float

    def of_level(self, level: Level) -> list[Finding]:
        """Return the findings of one level."""
        return [finding for finding in self.findings if finding.level == level]

    @property
    def is_sound(self) -> bool:
        """Whether there is nothing to worry about, as far as was looked."""
        return not self.of_level("broken") and not self.of_level("warning")

    @property
    def coverage(self) -> str:
        """Say how much was looked at."""
        looked = ("all" if n == self.n_images else f"{n:,}" for n in (self.n_files, self.n_pixels))
        files, pixels = looked
        return f"checked the files of {files} and the pixels of {pixels} of {self.n_images:,} images"

    @property
    def verdict(self) -> str:
        """Say in one line whether this data is fit to train on, and why not."""
        broken, warnings = self.of_level("broken"), self.of_level("warning")
        sound = "sound" if self.n_files == self.n_images else "sound as far as was looked"
        word = "broken" if broken else "usable, with warnings" if warnings else sound
        reasons = "; ".join(map(str, (*broken, *warnings))) or "nothing wrong was found"
        return f"{word}. {reasons}; {self.coverage}"

    def refuse_broken(self, on_bad_image: str = "error") -> None:
        """Raise UserError where the data is not fit to train on; where bad images are skipped they do not count."""
        broken = [f for f in self.of_level("broken") if f.kind != "unreadable" or on_bad_image == "error"]
        if not broken:
            return
        lines = []
        for finding in broken:
            shown = [f"{path}: {about}" if path else about for _, path, about in finding.images[:3]]
            lines.append(f"{finding} ({'; '.join(shown)}{'; ...' if finding.n > 3 else ''})")
        skip = "leave such images out (on_bad_image='skip'), " * any(f.kind == "unreadable" for f in broken)
        end = f"notebooks/data.ipynb shows more. Mend the data, {skip}or train all the same (check_data='warn')"
        raise UserError("\n".join([f"{self.root}: the data is broken, so training does not begin", *lines, end]))


def check_quickly(
    catalog: Catalog, seconds: float = 3.0, progress: Progress | None = None, n_threads: int = 1
) -> DataCheck:
    """Check what a few seconds allow: labels, what exists, files of queries and index first, some pixels.

    Near-duplicates are not looked for.
    """
    return _check(catalog, seconds, QUICK_PIXELS, 0, progress, n_threads)


def check_catalog(
    catalog: Catalog,
    seconds: float | None = 60.0,
    seed: int = 0,
    progress: Progress | None = None,
    n_threads: int = 1,
) -> DataCheck:
    """Check everything.

    Args:
        seconds: after which no more images are read; None: all are, whatever it takes.
        seed: of the order in which images are read.
        progress: called with "files" or "pixels", the images done, and all.
        n_threads: that read images at the same time.
    """
    return _check(catalog, seconds, None, seed, progress, n_threads)


def _check(
    catalog: Catalog,
    seconds: float | None,
    max_pixels: int | None,
    seed: int,
    progress: Progress | None,
    n_threads: int,
) -> DataCheck:
    began = time.perf_counter()
    images = CatalogImages(catalog)
    scan = ImageScan(catalog.store, images.paths, seconds, progress, n_threads)
    scan.note_missing(images.missing())
    scan.read_files(images.evaluated_first(seed))
    scan.read_pixels(max_pixels, seed)
    findings = [
        *_unreadable(images, scan),
        *_labels(catalog),
        *_copies(images, scan, quick=max_pixels is not None),
        *_pixels(images, scan),
        *_left_out(catalog),
    ]
    findings.sort(key=lambda finding: LEVELS.index(finding.level))
    kinds = tuple(_file_kinds(images, scan, number) for number in range(len(catalog.domains)))
    return DataCheck(
        str(catalog.root),
        tuple(finding for finding in findings if finding.n),
        tuple(kind for kind in kinds if kind.formats),
        catalog.notes,
        *(len(images), scan.n_files, scan.n_pixels, time.perf_counter() - began),
    )


def _finding(kind: str, level: Level, what: str, images: Sequence[Example], n: int | None = None) -> Finding:
    return Finding(kind, level, what, len(images) if n is None else n, MEANINGS[kind], tuple(images[:MAX_LISTED]))


def _unreadable(images: CatalogImages, scan: ImageScan) -> Iterator[Finding]:
    examples = [_example(images, position, problem) for position, problem in sorted(scan.problems.items())]
    yield _finding("unreadable", "broken", "images that cannot be read", examples)


def _example(images: CatalogImages, position: int, about: str) -> Example:
    return images.catalog.names[images.domain[position]], images.paths[position], about


def _labels(catalog: Catalog) -> Iterator[Finding]:
    words = {"test": "test", "val": "validation"}
    for subset in ("test", "val"):
        alone: list[Example] = []
        for domain in (domain for domain in catalog.domains if subset in domain.splits):
            queries = domain.queries(subset)
            rows = np.flatnonzero(without_positives(domain, subset)).tolist()
            alone += [(domain.name, queries.paths[row], f"a query of {subset}") for row in rows]
            if len(rows) == len(queries):
                about = f"none of the {len(rows):,} {subset} queries of domain '{domain.name}' has one"
                yield _finding("unmeasured", "broken", "domains without any positive", [(domain.name, "", about)])
        yield _finding("no positive", "warning", f"{words[subset]} queries without a positive", alone)
    single = [
        (domain.name, domain.splits["train"].paths[row], "alone in its class")
        for domain in catalog.domains
        if "train" in domain.splits
        for row in single_images(domain)
    ]
    yield _finding("single", "note", "training classes of one image", single)


def _copies(images: CatalogImages, scan: ImageScan, quick: bool) -> Iterator[Finding]:
    """Find equal files, and near-duplicates of them that differ."""
    good = scan.read.copy()
    good[list(scan.problems)] = False
    readable = np.flatnonzero(good)
    pairs, repeats = [], np.zeros(len(images), bool)
    for group in equal_groups(scan.keys[readable]):
        for first, *others in _equal_files(images, scan, readable[group], quick):
            pairs += [(first, other) for other in others]
            repeats[others] = True
    yield from _pairs(images, "equal files", np.array(pairs, np.int64).reshape(-1, 2), "warning")
    if not quick:
        firsts = np.flatnonzero(scan.decoded & ~repeats)
        near = firsts[near_pairs(scan.hashes[firsts], scan.thumbnails[firsts])]
        yield from _pairs(images, "near-duplicates", near, "note")


def _equal_files(
    images: CatalogImages, scan: ImageScan, group: Int64[np.ndarray, "_"], quick: bool
) -> Iterator[list[int]]:
    """Split files of equal size and ends into files that are equal throughout; in a hurry not the large ones."""
    if scan.n_bytes[group[0]] <= 2 * END:
        yield group.tolist()
    elif not quick:
        store = images.catalog.store
        digests = np.array([store.digest(images.paths[position]) for position in group.tolist()], np.uint64)
        yield from (group[same].tolist() for same in equal_groups(digests))


def _pairs(
    images: CatalogImages, what: str, pairs: Int64[np.ndarray, "pair 2"], same_class: Level
) -> Iterator[Finding]:
    """Tell apart what pairs of images that are the same do to results."""
    trained, asked = images.is_in("train"), images.is_in("test") | images.is_in("val")
    leak = (trained[pairs] & asked[pairs][:, ::-1]).any(axis=1)
    alike = np.array([images.share_a_class(a, b) for a, b in pairs.tolist()], bool)
    at_least = ", at least" if len(pairs) >= MAX_PAIRS else ""
    groups: tuple[tuple[str, np.ndarray, str, Level], ...] = (
        ("leak", leak, "in training and in a test or validation query", "warning"),
        ("conflict", ~leak & ~alike, "in two classes", "warning"),
        ("copies", ~leak & alike, "within a class", same_class),
    )
    for kind, chosen, words, level in groups:
        listed = [
            _example(images, a, f"{images.where(a)}; as {images.paths[b]}: {images.where(b)}")
            for a, b in pairs[chosen][:MAX_LISTED].tolist()
        ]
        found = _finding(kind, level, f"pairs of {what} {words}{at_least}", listed, int(chosen.sum()))
        yield replace(found, others=tuple(images.paths[b] for _, b in pairs[chosen][:MAX_LISTED].tolist()))


def _pixels(images: CatalogImages, scan: ImageScan) -> Iterator[Finding]:
    deep = [number for number, (_, mode) in enumerate(scan.kinds) if mode == "I" or mode.startswith("I;16")]
    sixteen = scan.decoded & np.isin(scan.kind, deep)
    narrow: list[Example] = []
    for number in np.unique(images.domain[sixteen]).tolist():
        members = np.flatnonzero(sixteen & (images.domain == number)).tolist()
        top = int(scan.brightest[members].max())
        if top <= DARK:
            about = f"16 bits; no image of its domain is brighter than about {257 * top:,} of 65,535"
            narrow += [_example(images, position, about) for position in members]
    yield _finding("narrow", "warning", "16-bit images that use a small part of their range", narrow)
    colours = scan.thumbnails.reshape(len(images), -1, 3)
    flat = np.flatnonzero(scan.decoded & (np.ptp(colours, axis=1) == 0).all(axis=1)).tolist()
    yield _finding("flat", "note", "images of one colour", [_example(images, i, "one colour") for i in flat])


def _left_out(catalog: Catalog) -> Iterator[Finding]:
    """What of a folder was passed over; images of the user's among it are missed."""
    for left in catalog.left_out:
        level: Level = "warning" if left.is_image else "note"
        yield Finding("left out", level, f"left out, {left.kind}", left.count, left.reason, (("", left.path, "first"),))


def _file_kinds(images: CatalogImages, scan: ImageScan, number: int) -> FileKinds:
    members = np.flatnonzero(scan.read & (images.domain == number))
    formats, modes, endings = Counter[str](), Counter[str](), Counter[str]()
    for kind, n in zip(*np.unique(scan.kind[members], return_counts=True), strict=True):
        form, mode = scan.kinds[kind]
        formats[form] += int(n)
        modes[mode] += int(n)
    for position in members.tolist():
        endings[ending(images.paths[position].rpartition("/")[2]) or "none"] += 1
    ranges = []
    for side in scan.sizes[members].T:
        values = np.quantile(side, (0, 0.5, 1)) if len(side) else np.zeros(3)
        ranges.append(tuple(values.astype(int).tolist()))
    widths, heights = ranges
    n_bytes = int(scan.n_bytes[members].sum())
    return FileKinds(images.catalog.names[number], formats, modes, endings, n_bytes, widths, heights)
