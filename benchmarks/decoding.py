"""Images per second of one core: reading MiniUnED, decoding photographs to what a network sees, and augmentation.

    python benchmarks/decoding.py [seconds per row, 2]

Times are this process's CPU time, so that other work on the machine disturbs little. The parameter `decoder`'s
nvimgcodec is measured where it is installed: on a GPU if there is one, by the clock on the wall, and else on the CPU.
"""

import importlib.util
import io
import itertools
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image

from udonlib.data.augmentation import KINDS, augment
from udonlib.data.catalog import load_catalog
from udonlib.data.decoding import JpegDecoder, decode, prepare_train
from udonlib.data.images import ImageReader


def photograph(width: int, height: int, n_bytes: int) -> bytes:
    """Encode a made-up photograph as a JPEG of about `n_bytes`: smooth shapes, and noise that decides the size."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    best = b""
    for noise in range(1, 40):
        pixels = np.asarray(coarse) + rng.normal(0, noise, (height, width, 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=80)
        best = buffer.getvalue()
        if len(best) >= n_bytes:
            break
    return best


def to_train(data: bytes) -> torch.Tensor:
    return prepare_train(decode(data, "x"), 256)


def all_to_train(jpegs: JpegDecoder, files: list[bytes]) -> torch.Tensor:
    def work() -> torch.Tensor:
        return torch.stack([prepare_train(image, 256) for image in jpegs(files) if image is not None])

    images = jpegs.beside(work)
    if len(images) < len(files):
        raise SystemExit(f"nvimgcodec has decoded {len(images)} of {len(files)} images")
    return images[0, 0, 0, 0].cpu()  # waits for a GPU


def per_second(
    call: Callable[[], object], n_images: int, seconds: float, clock: Callable[[], float] = time.process_time
) -> float:
    """Images per second of a call that handles `n_images`, by default per CPU second: the median of its repetitions."""
    call()
    rates: list[float] = []
    end = clock() + seconds
    while clock() < end or len(rates) < 3:
        start = clock()
        call()
        rates.append(n_images / (clock() - start))
    return float(np.median(rates))


def main(seconds: float) -> None:
    torch.set_num_threads(1)
    rows: list[tuple[str, float]] = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    jpegs = JpegDecoder(device) if importlib.util.find_spec("nvidia.nvimgcodec") else None
    for width, height, n_bytes in ((400, 320, 29_000), (1024, 768, 130_000)):
        data = photograph(width, height, n_bytes)
        name = f"JPEG {width} x {height}, {len(data) // 1000} KB"
        rows.append((f"{name}, to 256 x 256", per_second(partial(to_train, data), 1, seconds)))
        if jpegs is not None:
            rate = per_second(partial(all_to_train, jpegs, [data] * 64), 64, seconds, clock)
            rows.append((f"{name}, the same by nvimgcodec, {device.type}", rate))
        shrunk = per_second(partial(decode, data, "x", at_least=128), 1, seconds)
        rows.append((f"{name}, decoded for packing at 128", shrunk))

    catalog = load_catalog()
    train = np.arange(len(catalog.domains[0].splits["train"]))
    domain = catalog.domains[0].name
    reader = ImageReader(catalog, 48, "train", cache=False)
    batches = itertools.cycle(np.array_split(train, len(train) // 128))
    rate = per_second(lambda: reader.read(domain, "train", next(batches)), 128, seconds)
    rows.append(("MiniUnED, 48 x 48, from the archive", rate))
    kept = ImageReader(catalog, 48, "train")
    kept.read(domain, "train", train)
    rate = per_second(lambda: kept.read(domain, "train", next(batches)), 128, seconds)
    rows.append(("MiniUnED, 48 x 48, from memory", rate))

    generator = torch.Generator().manual_seed(0)
    for size, n_images in ((48, 128), (224, 32)):
        images = torch.randint(0, 256, (n_images, 3, size * 8 // 7, size * 8 // 7), dtype=torch.uint8)
        for kind in KINDS:
            rate = per_second(partial(augment, images, kind, size, generator), n_images, seconds)
            rows.append((f"augment {n_images} x 3 x {size} x {size}, {kind}", rate))

    print(f"{'one core':60s} {'images/s':>10s} {'ms/image':>10s}")
    for name, rate in rows:
        print(f"{name:60s} {rate:10.0f} {1000 / rate:10.3f}")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 2.0)
