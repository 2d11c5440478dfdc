"""Arrays as flax writes them."""

from __future__ import annotations

import msgpack
import numpy as np


def entry(array: np.ndarray, dtype: str | None = None, code: int = 1) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb((array.shape, dtype or array.dtype.name, array.tobytes())))
