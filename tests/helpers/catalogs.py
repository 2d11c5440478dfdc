"""Small benchmarks of generated images, written in each of the forms that `load_catalog` reads."""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

# domain -> images per class of each split
SIZES = {"train": (4, 3, 5), "val": (2, 3), "test": (3, 2, 2)}


def picture(seed: int, size: tuple[int, int] = (24, 20), image_format: str = "PNG", mode: str = "RGB") -> bytes:
    """Encode smooth random colours; size is width x height."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer, image_format)
    return buffer.getvalue()


def uned_files(
    domains: Sequence[str] = ("emoji", "flags"),
    sizes: Mapping[str, Sequence[int]] = SIZES,
    index_of: str | None = None,
    image_format: str = "PNG",
    image_size: tuple[int, int] = (24, 20),
) -> dict[str, bytes]:
    """Return path -> content of a benchmark in UnED's form.

    Classes are disjoint between splits. `index_of` names a domain that gets Met's form besides: `index` holds other
    images of the test classes and the train images, `small_index` other images of the val classes.
    """
    files: dict[str, bytes] = {}
    for d, domain in enumerate(domains):
        entries: dict[str, list[dict[str, object]]] = {}
        label = 0
        for split, counts in sizes.items():
            for count in counts:
                for i in range(count):
                    path = f"{domain}/{label:04d}_{i:03d}.{image_format.lower()}"
                    entry = {"path": path, "class_id": label, "class": f"class {label}"}
                    entries.setdefault(split, []).append(entry)
                    files[f"images/{path}"] = picture(1000 * d + 10 * label + i, image_size, image_format)
                label += 1
        if domain == index_of:
            for split, index in (("val", "small_index"), ("test", "index")):
                others = [{**e, "path": str(e["path"]).replace("_", "_x")} for e in entries[split]]
                files.update(
                    {f"images/{e['path']}": picture(i, image_size, image_format) for i, e in enumerate(others)}
                )
                entries[index] = others + (entries["train"] if index == "index" else [])
        for split, rows in entries.items():
            files[f"info_files/{domain}/{split}.json"] = json.dumps(rows).encode()
    return files


def write_tree(root: Path, files: Mapping[str, bytes]) -> Path:
    """Write path -> content below `root`."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def write_zip(path: Path, files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Write path -> content into an archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_uned_tree(root: Path, **options: object) -> Path:
    """Write a benchmark in UnED's form into a folder; options as of `uned_files`."""
    return write_tree(root, uned_files(**options))  # type: ignore[arg-type]


def write_uned_zip(path: Path, **options: object) -> Path:
    """Write a benchmark in UnED's form into an archive; options as of `uned_files`."""
    return write_zip(path, uned_files(**options))  # type: ignore[arg-type]


def write_image_folder(
    root: Path, domains: Sequence[str] = ("cats", "dogs"), n_classes: int = 10, n_images: int = 3
) -> Path:
    """Write domain/class/image: JPEG and PNG in turn."""
    for d, domain in enumerate(domains):
        for c in range(n_classes):
            for i in range(n_images):
                name, image_format = (f"{i}.jpg", "JPEG") if i % 2 else (f"{i}.PNG", "PNG")
                content = picture(1000 * d + 10 * c + i, image_format=image_format)
                write_tree(root, {f"{domain}/class {c}/{name}": content})
    return root


def with_entries(root: Path, entries: object, file: str = "emoji/train.json") -> Path:
    """Write a benchmark whose one info file is replaced."""
    content = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return write_tree(write_uned_tree(root), {f"info_files/{file}": content})
