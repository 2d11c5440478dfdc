"""Use a trained model: embed images, index their vectors, and search them."""

from udonlib.search.classify import calibrate
from udonlib.search.find import Finder, open_finder
from udonlib.search.index import Index, build_index, open_index
from udonlib.search.load import Embedder, load

__all__ = ["Embedder", "Finder", "Index", "build_index", "calibrate", "load", "open_finder", "open_index"]
