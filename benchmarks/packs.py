"""How fast one trains from packs: images a second, in proportion to the same files held in memory.

    python benchmarks/packs.py [ROUNDS]

MiniUnED at 48 pixels and made-up JPEG files of 256 pixels; small_resnet, one thread. All
sources are read in turn in each round, so that what else the machine does hits them alike; no decoded image is kept
but where it says so. Ratios are the medians over rounds.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from udonlib import presets
from udonlib.data.catalog import Catalog, load_catalog
from udonlib.data.images import ImageReader, WindowLoader
from udonlib.data.packing import pack
from udonlib.data.storage import Store
from udonlib.models.embedding_model import create_model

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 5
STEPS = 4
torch.set_num_threads(1)


class InMemory:
    """Files by name: what `Store.over` reads."""

    def __init__(self, catalog: Catalog) -> None:
        self.folders: set[bytes] = set()
        paths = [path for domain in catalog.domains for path in domain.splits["train"].paths]
        self._contents = {path: catalog.store.read(path) for path in paths}

    def content(self, name: str) -> bytes | None:
        return self._contents.get(name)


def jpegs(folder: Path, n: int = 400, size: int = 256) -> Path:
    """Write domain/class/image of noise that is smooth, as photographs are."""
    generator = np.random.default_rng(0)
    for i in range(n):
        rough = Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        path = folder / "made_up" / f"class {i % 10}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        rough.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=90)
    return folder


def seconds(catalog: Catalog, image_size: int, cache: ImageReader | None, plan: list, model: torch.nn.Module) -> float:
    """Train on a plan of batches."""
    reader = cache or ImageReader(catalog, image_size, "train", cache=False)
    began = time.perf_counter()
    for images, _ in WindowLoader(reader)(plan):
        model.zero_grad()
        model.features(images).square().mean().backward()
    return time.perf_counter() - began


def measured(name: str, catalog: Catalog, image_size: int, batch: int, folder: Path) -> Iterator[str]:
    pack(catalog, folder / "pack")
    pack(catalog, folder / "pack.zip")
    memory = replace(catalog, store=Store.over(catalog.root, InMemory(catalog)))
    sources = {
        "files in memory": memory,
        "shards": load_catalog(folder / "pack"),
        "zip": load_catalog(folder / "pack.zip"),
    }
    params = presets.load("miniuned", image_size=image_size, resize_size=image_size)
    model = create_model(params, catalog.n_classes)
    generator = np.random.default_rng(0)
    sizes = {domain.name: len(domain.splits["train"]) for domain in catalog.domains}
    domains = generator.choice(list(sizes), STEPS)
    plan = [[(domain, generator.integers(0, sizes[domain], batch))] for domain in domains.tolist()]
    decoded = ImageReader(catalog, image_size, "train")
    times: dict[str, list[float]] = {}
    for _ in range(ROUNDS + 1):
        for source, other in sources.items():
            times.setdefault(source, []).append(seconds(other, image_size, None, plan, model))
        times.setdefault("decoded images in memory", []).append(seconds(catalog, image_size, decoded, plan, model))
    base = times["files in memory"][1:]
    for source, taken in times.items():
        ratio = median(b / t for b, t in zip(base, taken[1:], strict=True))
        yield f"{name}, {source}: {batch * STEPS / median(taken[1:]):.0f} images/s, {ratio:.3f} of files in memory"


with tempfile.TemporaryDirectory() as temporary:
    home = Path(temporary)
    for name, catalog, size, batch in (
        ("MiniUnED, 48 pixels", load_catalog(), 48, 48),
        ("JPEG, 256 pixels", load_catalog(jpegs(home / "jpegs", 60)), 256, 4),
    ):
        home = home / "packs"
        home.mkdir()
        for line in measured(name, catalog, size, batch, home):
            print(line, flush=True)
