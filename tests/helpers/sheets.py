"""Neighbours of a catalog's queries, and the pixels of a sheet."""

import io

import numpy as np
from PIL import Image

from udonlib.data.catalog import Catalog
from udonlib.evaluation.evaluate import MergedIndex, Neighbours
from udonlib.lab.views import sheets


def neighbours(catalog: Catalog, domain: str, hit: list[list[bool]], embedder: str = "student") -> Neighbours:
    """The first queries of a domain with neighbours that are of their class, or not, as asked."""
    hits, labels = np.array(hit), catalog[domain].index("test").labels[:, 0]
    searched = MergedIndex(catalog.names, tuple(d.index("test").paths for d in catalog.domains))
    start = sum(len(d.index("test")) for d in catalog.domains[: catalog.names.index(domain)])
    queries = catalog[domain].queries("test")
    position = np.zeros(hits.shape, np.int64)
    for query, rank in np.ndindex(hits.shape):
        fitting = np.flatnonzero((labels == queries.labels[query, 0]) == hits[query, rank])
        position[query, rank] = start + fitting[rank % len(fitting)]
    paths = queries.paths[: len(hits)]
    return Neighbours(embedder, domain, "merged", paths, position, np.zeros(hits.shape, np.float32), hits, searched)


def pixels(image: sheets.Picture) -> np.ndarray:
    """A sheet on a white page."""
    opened = Image.open(io.BytesIO(image.data))
    return np.asarray(Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened).convert("RGB")).astype(int)


def near(colour: str, found: np.ndarray) -> np.ndarray:
    """Where an image has a colour, as far as WebP keeps it: of a frame's four pixels about half, those inside."""
    return (np.abs(found - [int(colour[i : i + 2], 16) for i in (1, 3, 5)]) < 16).all(axis=2)
