"""A tree of exactly UnED's official layout, a few small images per split: what the full benchmark is, but for its size.

    info_files/<domain>/<split>.json    as the benchmark's info_files.zip unpacks
    images/                             cars/car_ims, deepfashion/inshop/img, ..., as its project page asks for

With what is awkward in the real one: names of RP2K that an unpacker escaped, spaces and capitals in names, labels that
are a number, a list of one or a list of several, one image per class in Met, whose index is its train split, and an
index of GLDv2 most of whose images no query asks for. Images of one class look alike and those of others do not, so
that even raw pixels find the right neighbour, wherever labels and images belong together.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from udonlib.data.storage import escaped_path

Entry = dict[str, Any]
# domain -> images per class in train, val and test
CLASSES = {
    "food2k": ((4, 4, 4), (3, 3), (3, 3, 2)),
    "cars": ((5, 4, 3), (3, 3), (4, 3)),
    "sop": ((3, 2, 4, 3), (2, 3), (2, 2, 3)),
    "inshop": ((4, 4, 4), (3, 3), (2, 3)),
    "inat": ((6, 3, 3), (4, 2), (3, 3)),
    "met": ((1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1), (1, 1, 1), (1, 1, 1, 1)),
    "gldv2": ((7, 3, 2), (3, 3), (2, 1, 1)),
    "rp2k": ((4, 4, 4), (3, 3), (3, 3)),
}
SHELVES = ("康师傅 冰红茶(大)", "奥利奥_😀", "Café 500ml", "蒙牛", "a-1", "伊利", "洽洽", "统一")
KINDS = ("bicycle", "coffee_maker", "chair")


def image_path(domain: str, split: str, label: int, number: int) -> str:
    """Name the image of a class as the domain's own files are called."""
    shelf, half = SHELVES[label % len(SHELVES)], "test" if split == "test" else "train"
    code = f"{label:02x}{number:02x}{sum(map(ord, domain + split)):04x}"
    return {
        "cars": f"cars/car_ims/{label:03d}{number:03d}.jpg",
        "sop": f"sop/{KINDS[label % 3]}_final/1110{label}_{number}.JPG",
        "inshop": f"deepfashion/inshop/img/WOMEN/Blouses_Shirts/id_{label:08d}/{split}_{number:02d}_1_front.jpg",
        "inat": f"inat/iNaturalist/train_val2018/Aves/{label}/{code}.jpg",
        "met": f"met/{'test_met' if split in ('val', 'test') else 'MET'}/{label}/{split} {number}.jpg",
        "gldv2": f"gldv2/images/{'train' if split == 'val' else split}/{code[0]}/{code[1]}/{code[2]}/{code}.jpg",
        "food2k": f"food2k/Food2k_complete/{label}/{number}.jpg",
        "rp2k": f"rp2k/all/{half}/{shelf}/{number}_{split}.jpg",
    }[domain]


def info_files() -> dict[str, dict[str, list[Entry]]]:
    """Return domain -> split -> entries."""
    files: dict[str, dict[str, list[Entry]]] = {}
    for domain, counts in CLASSES.items():
        first, splits = 0, files.setdefault(domain, {})
        for split, of_classes in zip(("train", "val", "test"), counts, strict=True):
            # Met asks for the classes of its train split, the others for classes of their own.
            labels = range(len(of_classes)) if domain == "met" else range(first, first + len(of_classes))
            splits[split] = list(entries(domain, split, dict(zip(labels, of_classes, strict=True))))
            first += len(of_classes)
    files["met"] |= {"index": files["met"]["train"], "small_index": files["met"]["train"][:5]}
    files["inshop"]["index"] = list(entries("inshop", "index", {5: 2, 6: 3}))
    files["gldv2"]["index"] = list(entries("gldv2", "index", {5: 3, 6: 1, 40: 5, 41: 6, 42: 4}))
    files["gldv2"]["test"][0]["class_id"] = [5, 6]  # two landmarks in one picture
    for entry in files["met"]["train"]:
        entry["class_id"] = [entry["class_id"]]
    return files


def entries(domain: str, split: str, counts: dict[int, int]) -> Iterator[Entry]:
    """Yield the entries of the given classes (class id -> images)."""
    for label, n_images in counts.items():
        for number in range(n_images):
            yield {"path": image_path(domain, split, label, number), "class_id": label}


def picture(domain: str, label: int, number: int) -> bytes:
    """Encode the n-th image of a class: the class's colours, and a little noise and a size of its own."""
    colours = np.random.default_rng([*domain.encode(), label]).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    size = (36 + number % 5, 34 + number % 3)
    pixels = np.asarray(Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)).astype(float)
    pixels += np.random.default_rng(number).normal(0, 4, pixels.shape)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.convert("L" if domain == "sop" and label % 3 == 0 else "RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def write_uned_tree(folder: Path) -> Path:
    """Write the benchmark below `folder` and return it. The same bytes every time."""
    written: set[str] = set()
    for domain, splits in info_files().items():
        (folder / "info_files" / domain).mkdir(parents=True)
        for split, rows in splits.items():
            (folder / "info_files" / domain / f"{split}.json").write_text(json.dumps(rows))
            for path, label in ((row["path"], row["class_id"]) for row in rows if row["path"] not in written):
                # One shelf has kept its own name, the others went through an unpacker without Unicode.
                on_disk = folder / "images" / (path if SHELVES[0] in path else escaped_path(path))
                on_disk.parent.mkdir(parents=True, exist_ok=True)
                on_disk.write_bytes(picture(domain, label[0] if isinstance(label, list) else label, len(written)))
                written.add(path)
    return folder
