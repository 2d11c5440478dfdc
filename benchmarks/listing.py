"""How long it takes to read what a folder or an archive of images holds, before any image is opened.

    python benchmarks/listing.py [--images 100000]

Empty files are enough: domain/class/image, 10 domains of 100 classes, in a temporary folder and in a zip of it.
`catalog` lists them, deals classes and numbers labels; `check` looks besides that every image is there.

Found with 100,000 images on one core beside other work (load 20), seconds of the processor: folder 0.4, with the check
0.6; archive 0.7. Folders are listed as wholes; no file is asked for by itself.
"""

import argparse
import os
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from udonlib.data.catalog import check_images, load_catalog


def measure(what: str, call: Callable[[], object]) -> None:
    """Print the seconds that passed and those of the processor."""
    began, busy = time.perf_counter(), time.process_time()
    call()
    print(f"{what:18} {time.perf_counter() - began:6.2f} s, of the processor {time.process_time() - busy:.2f} s")


def main() -> None:
    """Write the files, read them, and say how busy the machine was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root, packed = Path(temporary) / "images", Path(temporary) / "images.zip"
        with zipfile.ZipFile(packed, "w") as archive:
            for number in range(arguments.images):
                path = f"domain{number % 10}/class{number // 10 % 100:02d}/{number:07d}.jpg"
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).touch()
                archive.writestr(path, b"")
        measure("folder: catalog", lambda: load_catalog(root))
        measure("folder: check", lambda: check_images(load_catalog(root)))
        measure("archive: catalog", lambda: load_catalog(packed))
    print(f"load of the machine: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
