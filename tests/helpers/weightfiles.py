"""Arrays as flax writes them, files that are spoilt, and weights of small encoders that may teach."""

from __future__ import annotations

from pathlib import Path

import msgpack
import numpy as np
import torch
from hypothesis import strategies as st

from udonlib.models.backbones import create_backbone
from udonlib.models.files.importers import save_backbone_weights


def entry(array: np.ndarray, dtype: str | None = None, code: int = 1) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb((array.shape, dtype or array.dtype.name, array.tobytes())))


def spoil(path: Path, data: st.DataObject) -> None:
    """Change, put in or take out a few bytes of a file."""
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.integers(0, 2)):
            case 0:
                content[at] = data.draw(st.integers(0, 255))
            case 1:
                content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            case 2:
                del content[at : at + data.draw(st.integers(1, 20))]
    path.write_bytes(content)


def small_encoders(folder: Path) -> dict[str, dict]:
    """Two frozen teachers as the parameter `teachers` has them: their weights, drawn from a seed, are in the folder."""
    teacher = {"backbone": "small_resnet", "backbone_args": {"width": 8}, "image_size": 32}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        encoder = create_backbone("small_resnet", pretrained=False, image_size=32, arguments={"width": 8})
        save_backbone_weights(encoder, folder / f"{name}.safetensors")
    return {
        "one": teacher | {"weights": str(folder / "one.safetensors")},
        "two": teacher | {"weights": str(folder / "two.safetensors"), "kinds": ["class"], "image_size": 48},
    }
