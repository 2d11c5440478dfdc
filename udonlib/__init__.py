"""Train, measure and look inside one compact image embedding for many visual domains (UDON, NeurIPS 2024)."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`udonlib.load` is `search.load.load`: with it come PyTorch and timm, which take seconds to import."""
    if name == "load":
        return import_module("udonlib.search.load").load
    raise AttributeError(f"module 'udonlib' has no attribute {name!r}")
