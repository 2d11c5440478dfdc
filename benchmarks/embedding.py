"""Images per second that `Embedder.embed` embeds, beside the bare forward pass and beside decoding alone.

    python benchmarks/embedding.py [--model RUN] [--images 512] [--width 1024] [--rounds 3]

In memory: uint8 images as the model sees them; the ratio is time over that of `model.embed` on the same batches.
From files: JPEGs of made-up photographs, into a folder of vectors; the ratio is speed over that of decoding alone. On a
CPU both share the cores, so that the network's own time sets the ratio: 1 / (1 / decode + 1 / network) is what full
cores allow. Ratios are taken within a round; other work on the machine weighs on both sides.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from decoding import photograph

from udonlib.data.decoding import decode
from udonlib.search.folders import list_images
from udonlib.search.load import load
from udonlib.search.pictures import PictureLoader


def per_second(call, n: int) -> float:
    start = time.perf_counter()
    call()
    return n / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="latest")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024, help="of the photographs, 4:3")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    n = arguments.images
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = load(arguments.model)
        object.__setattr__(model, "outputs", str(folder / "out"))
        size = model.image_size
        pixels = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)
        height = arguments.width * 3 // 4
        data = photograph(arguments.width, height, arguments.width * height // 6)
        (folder / "images").mkdir()
        for i in range(n):
            (folder / "images" / f"{i}.jpg").write_bytes(data + bytes(str(i), "ascii"))  # each another content
        store, entries = list_images(folder / "images")

        def decode_all() -> None:
            loader = PictureLoader(lambda i: decode(store.read(entries[i].path), entries[i].path), size)
            for _ in loader("", "", [range(i, min(i + 128, n)) for i in range(0, n, 128)]):
                pass

        def bare() -> None:
            with torch.inference_mode():
                for batch in pixels.split(128):
                    model(batch)

        for number in range(arguments.rounds):
            bare()
            forward, embedded = per_second(bare, n), per_second(lambda: model.embed(pixels), n)
            print(f"in memory: forward {forward:.0f}/s, embed {embedded:.0f}/s: time {forward / embedded:.2f} of it")
            decoded = per_second(decode_all, n)
            made = per_second(lambda name=f"r{number}": model.embed(folder / "images", name=name), n)
            full = 1 / (1 / decoded + 1 / embedded)
            print(
                f"JPEG {arguments.width} x {height}: decode {decoded:.0f}/s, embed {made:.0f}/s: {made / decoded:.2f} "
                f"of it; full cores allow {full / decoded:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
