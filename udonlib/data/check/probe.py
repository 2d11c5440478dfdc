"""What one image file is, found out at little cost: its header, whether it seems whole, and a hash of what it shows.

`probe_file` reads the ends of a file and decodes nothing; `probe_pixels` decodes the image, a JPEG at a fraction of its
size. Both are safe to call from many threads.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from udonlib.data.decoding import ImageError, decode, identify
from udonlib.data.storage import Store

END = 1 << 16  # bytes of each end of a file that are read; most files are read whole so
SIDE = 8  # of the thumbnails that are compared
MARGIN = 4  # of 255: a smaller step between two cells is noise, and no edge


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What the ends of an image file tell.

    key: equal for equal files; equal keys of files longer than two ends still have to be compared. seems_whole: whether
    the format's own end mark is where it belongs; False says nothing yet: only decoding does.
    """

    n_bytes: int
    key: int
    format: str
    mode: str
    width: int
    height: int
    seems_whole: bool


@dataclass(frozen=True, slots=True)
class PixelFacts:
    """What an image shows, in 200 bytes.

    hash: 64 bits; those of near-duplicates differ in few. thumbnail: 8 x 8 RGB, one byte each. brightest: its largest
    value, of 255.
    """

    hash: int
    thumbnail: bytes
    brightest: int


def probe_file(store: Store, path: str) -> FileFacts:
    """Read the ends of an image file. Raises: UserError where it is missing, empty, no image, or refused unseen."""
    first, last, n_bytes = store.ends(path, END)
    try:
        image = identify(first, path)
    except ImageError:
        if n_bytes <= END:
            raise
        image = identify(store.read(path), path)  # the header lies behind large metadata, or at the file's end
    digest = hashlib.blake2b(first, digest_size=8, salt=n_bytes.to_bytes(8, "little"))
    digest.update(last if n_bytes > END else b"")
    kind = str(image.format)
    whole = _seems_whole(kind, first, last[-64:], n_bytes)
    return FileFacts(n_bytes, int.from_bytes(digest.digest(), "little"), kind, image.mode, *image.size, whole)


def _seems_whole(kind: str, first: bytes, last: bytes, n_bytes: int) -> bool:
    match kind:
        case "JPEG" | "MPO":
            return b"\xff\xd9" in last
        case "PNG":
            return b"IEND" in last
        case "GIF":
            return last.endswith(b";")
        case "WEBP":
            return int.from_bytes(first[4:8], "little") + 8 <= n_bytes
    return False


def probe_pixels(store: Store, path: str) -> PixelFacts:
    """Decode an image and condense it. Raises: UserError where that fails."""
    image = decode(store.read(path), path, at_least=2 * SIDE)
    pixels = np.asarray(image)
    grey = np.asarray(image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX)).astype(np.int16)
    rising = np.diff(grey, axis=1) > MARGIN
    thumbnail = image.resize((SIDE, SIDE), Image.Resampling.BOX).tobytes()
    return PixelFacts(int.from_bytes(np.packbits(rising).tobytes(), "big"), thumbnail, int(pixels.max()))
