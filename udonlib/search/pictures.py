"""Images of any kind as batches of pixels: decoded by threads, ahead of the network that embeds them.

Threads, not processes: Pillow and PyTorch let go of the interpreter while they work, nothing has to be sent, and a few
images need no start-up. Only AHEAD batches are held at a time, however many images there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from udonlib.data.decoding import ImageError, decode, prepare_eval, to_rgb
from udonlib.errors import UserError, nearest
from udonlib.evaluation.reading import Batch
from udonlib.models.processors import lone_threads, n_cores

# opened(position): the image in RGB; None: it is not needed any more.
Opened = Callable[[int], Image.Image | None]

AHEAD = 3  # batches that are decoded before they are asked for
PIECE = 8  # images that a thread takes at once
KINDS = "a path, a PIL image, uint8 [height, width, 3] of numpy or uint8 [3, height, width] of PyTorch"


def open_picture(picture: Any, name: str) -> Image.Image:
    """Return an image of any kind in RGB.

    Args:
        picture: a path; a PIL image of any mode; an array [height, width] (grey, uint8 or uint16), [height, width, 1],
            [.., 3] or [.., 4] (uint8); a tensor of uint8 [height, width] or [1, 3 or 4 channels, height, width].
        name: what to call it in messages.

    Raises: ImageError "<name>: ..." for what is no image, or cannot be read.
    """
    if isinstance(picture, str | Path):
        try:
            data = Path(picture).expanduser().read_bytes()
        except OSError as error:
            raise ImageError(f"{picture}: cannot be read: {error.strerror or error}") from None
        return decode(data, str(picture))
    if isinstance(picture, Image.Image):
        return to_rgb(picture, name)
    array = _last_channels(picture, name)
    return to_rgb(Image.fromarray(array), name)


def _last_channels(picture: object, name: str) -> np.ndarray:
    """An array or tensor as Pillow takes it."""
    found = type(picture).__name__
    if isinstance(picture, np.ndarray | Tensor):
        array = picture.detach().cpu().numpy() if isinstance(picture, Tensor) else picture
        found = f"{'tensor' if isinstance(picture, Tensor) else 'array'} {array.dtype} {list(array.shape)}"
        if isinstance(picture, Tensor) and array.ndim == 3:
            array = array.transpose(1, 2, 0)
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[:, :, 0]
        types = ("uint8", "uint16") if array.ndim == 2 else ("uint8",)
        if array.dtype.name in types and array.size and (array.ndim == 2 or array.shape[2:] in ((3,), (4,))):
            return np.ascontiguousarray(array)
    raise ImageError(f"{name}: found {found}, expected {KINDS}")


def ready(images: object, size: int) -> Tensor | None:
    """Return a batch [n, 3, size, size] or [n, size, size, 3] of uint8 as the model sees it; None for anything else."""
    if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[1:] == (size, size, 3):
        return torch.from_numpy(images).permute(0, 3, 1, 2)
    if isinstance(images, Tensor) and images.dtype == torch.uint8 and images.shape[1:] == (3, size, size):
        return images
    return None


class PictureLoader:
    """Makes batches of pixels of images that are opened by their positions: a `Load` of `evaluation.reading`.

    Args:
        opened: an image by its position; called in several threads at once.
        size: pixels of a side of the result: short side to `size`, the middle, as evaluation has it.
        on_bad_image: "error": stop at an image that cannot be read. "skip": leave it out, and note it in `problems`.
        n_threads: that decode; 0: as many as there are cores.

    Attributes:
        problems: position -> message of every bad image met so far.
    """

    def __init__(self, opened: Opened, size: int, on_bad_image: str = "error", n_threads: int = 0) -> None:
        if on_bad_image not in ("error", "skip"):
            raise UserError(
                f"parameter 'on_bad_image': found {on_bad_image!r}; {nearest(on_bad_image, ('error', 'skip'))}"
            )
        self._opened, self.size, self.on_bad_image = opened, size, on_bad_image
        self.n_threads = n_threads or n_cores()
        self.problems: dict[int, str] = {}

    def __call__(self, domain: str, split: str, batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Yield for each batch of positions its images [n, 3, size, size] and their positions: of those that are read.

        Raises: ImageError at the batch of a bad image, unless these are skipped.
        """
        waiting: deque[tuple[Tensor, list[Future[list[Any]]]]] = deque()
        with lone_threads(self.n_threads, "udonlib-decoder") as pool:
            asked = iter(batches)
            for batch in batches:
                while len(waiting) <= AHEAD and (coming := next(asked, None)) is not None:
                    pixels = torch.empty((len(coming), 3, self.size, self.size), dtype=torch.uint8)
                    pieces = [(coming[i : i + PIECE], pixels[i : i + PIECE]) for i in range(0, len(coming), PIECE)]
                    waiting.append((pixels, [pool.submit(self._fill, *piece) for piece in pieces]))
                pixels, futures = waiting.popleft()
                states = [state for future in futures for state in future.result()]
                for position, state in zip(batch, states, strict=True):
                    if isinstance(state, str):
                        if self.on_bad_image == "error":
                            raise ImageError(f"{state}; on_bad_image='skip' leaves such images out")
                        self.problems[position] = state
                good = [state is True for state in states]
                whole = all(good)
                positions = batch if whole else [p for p, is_good in zip(batch, good, strict=True) if is_good]
                yield (pixels if whole else pixels[torch.tensor(good)]), positions

    def _fill(self, positions: Sequence[int], pixels: Tensor) -> list[bool | str]:
        """Decode some images; says of each True, False where it is not needed, or what is wrong with it."""
        states: list[bool | str] = []
        for position, row in zip(positions, pixels, strict=True):
            try:
                image = self._opened(position)
                if image is not None:
                    row.copy_(prepare_eval(image, self.size))
                states.append(image is not None)
            except UserError as error:
                states.append(str(error))
        return states
