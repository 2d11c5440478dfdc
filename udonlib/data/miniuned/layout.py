"""Which image stands in which split, and the info files in UnED's form that say so."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from udonlib.data.miniuned.artwork import Drawing, generator
from udonlib.data.miniuned.collected import Collected, stable_order
from udonlib.data.miniuned.dedupe import near_pictures, repeats_of, thumbnails

DOMAINS = ("emoji", "flags", "logos", "icons", "fonts", "kanji", "fashion", "earth")
TRAIN_SHARE, VAL_SHARE = 0.6, 0.1  # of a domain's classes; the rest is test
WEBP_QUALITY = 82
MIN_IMAGES = 2  # of a class, after all near-duplicates across splits are gone


@dataclass(frozen=True)
class Entry:
    """One image of the benchmark before it has a number. `split` is train, val, test or index."""

    domain: str
    class_name: str
    split: str
    drawing: Drawing
    content: bytes = b""  # WebP


def split_of_class(position: int, n_classes: int) -> str:
    """The split of the class at this position of the domain's stable order."""
    n_train, n_val = round(TRAIN_SHARE * n_classes), round(VAL_SHARE * n_classes)
    return "train" if position < n_train else "val" if position < n_train + n_val else "test"


def place(domain: Collected) -> list[Entry]:
    """Every drawing of a domain with its split: by class, or by its role where it has one.

    fashion: roles are splits. earth: in test places a query crop is a query and an index crop stands in the index;
    train and val take both.
    """
    entries = []
    names = stable_order(domain.name, domain.classes)
    for position, name in enumerate(names):
        by_class = split_of_class(position, len(names))
        for drawing in domain.classes[name]:
            split = drawing.role if drawing.role in ("train", "val", "test") else by_class
            if split == "test" and drawing.role == "index":
                split = "index"
            entries.append(Entry(domain.name, name, split, drawing))
    return entries


def without_repeated_artwork(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """Drop from train (and val) the artwork that test (and val) show, whatever its colour; and what was dropped."""
    dropped: set[int] = set()
    for lower, higher in (("val", ("test",)), ("train", ("val", "test"))):
        low = [i for i, entry in enumerate(entries) if entry.split == lower]
        high = [e.drawing for i, e in enumerate(entries) if e.split in higher and i not in dropped]
        repeats = repeats_of([entries[i].drawing for i in low], high)
        dropped.update(low[k] for k in repeats)
    words = [f"{entries[i].split} drawing {entries[i].drawing.source}: held-out artwork" for i in sorted(dropped)]
    return [entry for i, entry in enumerate(entries) if i not in dropped], words


def encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=WEBP_QUALITY, method=6)
    return buffer.getvalue()


def decode_pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def develop(domain: Collected, entries: Sequence[Entry]) -> list[Entry]:
    """Compose and compress every drawing, each with a generator of its own."""
    return [
        Entry(
            entry.domain, entry.class_name, entry.split, entry.drawing,
            encode(domain.finish(entry.drawing.image, generator(domain.name, entry.class_name, entry.drawing.source))),
        )
        for entry in entries
    ]  # fmt: skip


def without_near_pictures(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """Drop from train (and val) the pictures that are near-duplicates of any held-out picture as decoded."""
    thumbs = thumbnails(np.stack([decode_pixels(entry.content) for entry in entries]))
    dropped: dict[int, str] = {}
    for lower, higher in (("val", ("test",)), ("train", ("val", "test", "index"))):
        low = [i for i, entry in enumerate(entries) if entry.split == lower]
        high = [i for i, entry in enumerate(entries) if entry.split in higher and i not in dropped]
        for i, j, value in near_pictures(thumbs[low], thumbs[high]):
            dropped.setdefault(low[i], f"{entries[high[j]].drawing.source} ({value:.3f})")
    words = [
        f"{entries[i].split} picture {entries[i].drawing.source}: near {other}" for i, other in sorted(dropped.items())
    ]
    return [entry for i, entry in enumerate(entries) if i not in dropped], words


def number(entries: Sequence[Entry]) -> tuple[dict[str, bytes], dict[str, dict[str, list[dict[str, object]]]]]:
    """Images by path, and per domain and split the rows of the info files.

    class_id counts a domain's classes in their stable order, over all splits. Index splits: fashion searches its train
    images (val: every second of them); earth's test searches the other crops of its places among all val images.
    """
    images: dict[str, bytes] = {}
    info: dict[str, dict[str, list[dict[str, object]]]] = {}
    for domain in dict.fromkeys(entry.domain for entry in entries):
        by_class: dict[str, list[Entry]] = defaultdict(list)
        for entry in entries:
            if entry.domain == domain:
                by_class[entry.class_name].append(entry)
        names = stable_order(domain, [name for name, members in by_class.items() if len(members) >= MIN_IMAGES])
        splits: dict[str, list[dict[str, object]]] = {split: [] for split in ("train", "val", "test")}
        for class_id, name in enumerate(names):
            for i, entry in enumerate(by_class[name]):
                path = f"{domain}/{class_id:04d}_{i:03d}.webp"
                images[path] = entry.content
                row = {"path": path, "class_id": class_id, "class": name, "source": entry.drawing.source}
                splits.setdefault(entry.split, []).append(row)
        if domain == "fashion":
            splits["index"] = splits["train"]
            splits["small_index"] = splits["train"][::2]
        if domain == "earth":
            splits["index"] = splits["index"] + splits["val"]
        info[domain] = splits
    return images, info
