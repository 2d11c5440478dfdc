"""Arrays as flax writes them, and files that are spoilt."""

from __future__ import annotations

from pathlib import Path

import msgpack
import numpy as np
from hypothesis import strategies as st


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
