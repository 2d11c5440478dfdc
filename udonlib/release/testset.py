"""The run's test set, embedded in several ways at once, and searched: what a release is measured on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from udonlib.data.catalog import Catalog
from udonlib.evaluation.metrics import r_at_k, relevance
from udonlib.evaluation.reading import Embed, Images, Load, Reading
from udonlib.evaluation.search import nearest

CHUNK = 2**14  # index images embedded at a time


@dataclass(frozen=True, eq=False)
class TestSet:
    """Queries and merged index of a subset, embedded; an image that cannot be read is in neither.

    queries, index: embeddings by the name of what made them.
    query_domains, index_domains: numbers of the catalog's domains. itself: place of each query in the index, or -1.
    """

    __test__ = False  # pytest takes classes of this name for tests

    domains: tuple[str, ...]
    queries: dict[str, Float[Tensor, "query _"]]
    index: dict[str, Float[Tensor, "item _"]]
    query_domains: Int64[Tensor, "query"]
    index_domains: Int64[Tensor, "item"]
    query_labels: Int64[Tensor, "query _"]
    index_labels: Int64[Tensor, "item _"]
    itself: Int64[Tensor, "query"]

    def neighbours(
        self, queries: Float[Tensor, "query dim"], index: Float[Tensor, "item dim"], k: int
    ) -> tuple[Float[Tensor, "query k"], Int64[Tensor, "query k"]]:
        """Similarities and places in the index of the k nearest, never a query itself: exact search."""
        return nearest(queries, index, k, self.itself)

    def right(self, positions: Int64[Tensor, "query rank"]) -> Bool[Tensor, "query"]:
        """Whether the first neighbour of each query is relevant."""
        labels = self.query_labels, self.query_domains, self.index_labels, self.index_domains
        return r_at_k(relevance(positions, *labels)) > 0

    def by_domain(self, values: Float[np.ndarray, "query"]) -> dict[str, Float[np.ndarray, "1 _"]]:
        """Values of the queries, apart for each domain, as intervals are computed of them."""
        numbers = self.query_domains.numpy()
        return {name: values[numbers == number][None] for number, name in enumerate(self.domains)}


@torch.no_grad()
def embed_test(
    catalog: Catalog,
    load: Load,
    embedders: Mapping[str, Embed],
    *,
    subset: Literal["val", "test"] = "test",
    batch_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> TestSet:
    """Embed a subset's queries and index, every image read once.

    Args: as of `evaluation.evaluate.evaluate`; embedders: images to unit embeddings on the CPU, by name.
    """
    reading = Reading(catalog, subset, load, embedders, batch_size, progress)
    queries = [reading.queries(number) for number in range(len(catalog.domains))]
    index = [part for parts in reading.index(queries, CHUNK) for part in parts if part.kept]
    positions = torch.cat([part.in_index for part in index])
    in_index = torch.cat([part.in_index for part in queries])
    place = torch.searchsorted(positions, in_index).clamp(max=len(positions) - 1)
    place[positions[place] != in_index] = -1
    return TestSet(
        catalog.names,
        {name: _outputs(queries, name) for name in embedders},
        {name: _outputs(index, name) for name in embedders},
        _domains(queries),
        _domains(index),
        _labels(queries),
        _labels(index),
        place,
    )


def _outputs(parts: list[Images], name: str) -> Tensor:
    return torch.cat([part.outputs[name] for part in parts])


def _domains(parts: list[Images]) -> Tensor:
    return torch.cat([torch.full((len(part.kept),), part.number) for part in parts])


def _labels(parts: list[Images]) -> Tensor:
    """Labels of the images of all parts, padded with -1 to one width."""
    labels = [torch.from_numpy(part.split.labels[part.kept]) for part in parts]
    width = max(part.shape[1] for part in labels)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=-1) for part in labels])
