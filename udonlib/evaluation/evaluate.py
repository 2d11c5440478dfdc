"""Evaluate embedders on a catalog: R@1, mMP@k and more per domain, in the merged and in each domain's separate index.

Every image runs through the backbone once, whatever the number of heads. The queries' features are kept; the index goes
by in chunks, each embedded by every head, searched, and forgotten. So memory grows with the queries, not the index.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from udonlib.data.catalog import Catalog
from udonlib.errors import UserError
from udonlib.evaluation.intervals import bootstrap_interval
from udonlib.evaluation.metrics import count_positives, measure, ranks_of, relevance
from udonlib.evaluation.reading import Embed, EmbedByDomain, Helpers, Images, Load, Reading, loading, pixels
from udonlib.evaluation.search import nearest
from udonlib.models.embedding_model import EmbeddingModel
from udonlib.models.processors import dtype_of
from udonlib.params import TrainParams

__all__ = [
    "Evaluation",
    "MergedIndex",
    "Neighbours",
    "evaluate",
    "loading",
    "pixels",
]

Head = Callable[[Float[Tensor, "image feature_dim"]], Float[Tensor, "image dim"]]
FEATURES = "features of embed"  # its name among the image embedders
UNIT_TOLERANCE = 0.01  # of an embedding's norm: generous enough for bfloat16


class EmbeddingError(UserError):
    """An embedding without a direction: what made it has left all bounds."""


@dataclass(frozen=True, eq=False)
class MergedIndex:
    """The index images of all domains one after another; a position counts through them in this order."""

    domains: tuple[str, ...]
    paths: tuple[tuple[str, ...], ...]

    def locate(self, position: int) -> tuple[str, str]:
        """Return the domain and the path of the image at a position."""
        for domain, paths in zip(self.domains, self.paths, strict=True):
            if position < len(paths):
                return domain, paths[position]
            position -= len(paths)
        raise IndexError("position lies beyond the merged index")


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest neighbours of one domain's queries in one index, nearest first.

    position: in the merged index, also where a domain's separate index was searched; -1 for an absent neighbour, whose
    similarity is -inf. hit: whether the neighbour is relevant.
    """

    embedder: str
    query_domain: str
    index: str
    query_paths: tuple[str, ...]
    position: Int64[np.ndarray, "query rank"]
    similarity: Float[np.ndarray, "query rank"]
    hit: Bool[np.ndarray, "query rank"]
    searched: MergedIndex

    def of(self, query: int) -> list[tuple[str, str]]:
        """Return (domain, path) of each neighbour of one query, nearest first; absent ones are left out."""
        return [self.searched.locate(int(position)) for position in self.position[query] if position >= 0]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found.

    table: one row per embedder, index ("merged", "separate") and domain, and one for their mean (over domains, not
        queries; none of an embedder that some domains lack): embedder, domain, index, n_queries,
        n_without_positive (of them, those for which nothing in the index can be right), n_index, and the metrics in
        percent: r_at_1, mmp_at_<k>, and those that were asked for.
    outcomes: one row per embedder, index and query: embedder, domain, index, path, n_positives, and the metrics in
        0..1.
    neighbours: by (embedder, domain, index).
    skipped: images that could not be read and took no part: domain, split, path.
    """

    table: pd.DataFrame
    outcomes: pd.DataFrame
    neighbours: dict[tuple[str, str, str], Neighbours]
    skipped: pd.DataFrame

    def with_intervals(self, seed: int = 0, n_resamples: int = 1000, level: float = 0.95) -> pd.DataFrame:
        """Return the table with <metric>_low and <metric>_high, in percent: `bootstrap_interval` over queries."""
        table = self.table.copy()
        generator = np.random.default_rng(seed)
        for metric in [name for name in table.columns if name in self.outcomes.columns and "_at_" in name]:
            intervals = {}
            for (embedder, index), group in self.outcomes.groupby(["embedder", "index"], sort=False):
                parts = group.groupby("domain", sort=False)[metric]
                values = {name: part.to_numpy(float)[None] for name, part in parts}
                for row in bootstrap_interval(values, generator, n_resamples, level).itertuples():
                    intervals[embedder, row.domain, index] = (100 * row.low, 100 * row.high)
            keys = zip(table["embedder"], table["domain"], table["index"], strict=True)
            table[[f"{metric}_low", f"{metric}_high"]] = [intervals[key] for key in keys]
        return table


@torch.no_grad()
def evaluate(
    catalog: Catalog,
    subset: Literal["val", "test"],
    load: Load,
    embed: Embed | None = None,
    heads: Mapping[str, Head | Mapping[str, Head | None]] | None = None,
    image_embedders: Mapping[str, Embed | EmbedByDomain] | None = None,
    *,
    k: int = 5,
    metrics: Sequence[str] = (),
    batch_size: int = 256,
    chunk_size: int = 2**16,
    progress: Callable[[int, int], None] | None = None,
    helpers: Helpers | None = None,
) -> Evaluation:
    """Embed the queries and index images of a subset, search both indexes, and measure.

    A neighbour is relevant if it is of the query's domain and shares a label. A query is never its own neighbour:
    (domain, path) is an image's identity, whichever splits it stands in. Queries without a relevant index image count
    as 0. Source: UnED (ICCV 2023) sec. 3.

    Memory: n queries x (feature_dim + dims of their embeddings) floats, chunk_size x feature_dim, and the search's.
    The result does not depend on batch_size or chunk_size, as far as `embed` and the heads do not.

    Args:
        load: reads batches of images: `loading(reader)`.
        embed: images to features, for `heads`: a backbone in evaluation mode that moves them to its own device.
        heads: features to embeddings of unit norm, by the embedder's name: one head for all domains, or one per domain,
            which then embeds the queries of that domain and all that they are searched in; None leaves a domain out,
            and the embedder has no mean.
        image_embedders: images to embeddings of unit norm, by name: baselines such as `pixels`; one for all domains, or
            one per domain, which then embeds the images of that domain, whoever searches them.
        k: of mMP@k.
        metrics: what is measured beside R@1 and mMP@k, by the names of `metrics.measure`; as many neighbours are
            searched as the largest k of all.
        batch_size: images per call of embed.
        chunk_size: index images embedded between two searches.
        progress: called with (images done, images in all).
        helpers: the processes that share the reading and embedding, of which all call this; the first one searches and
            returns what was found, the others nothing.

    Raises:
        EmbeddingError: embeddings that are not finite or not of unit norm, with the embedder and the image.
        ValueError: heads that miss a domain; a subset that is neither val nor test; a domain of which no query or no
            index image can be read.
    """
    if subset not in ("val", "test"):
        raise ValueError(f"subset is {subset!r}; valid: 'val', 'test'")
    heads, image_embedders = heads or {}, image_embedders or {}
    embedders: dict[str, tuple[str, Head | Mapping[str, Head | None]]] = {}  # name -> source, head
    embedders |= {name: (FEATURES, head) for name, head in heads.items()}
    embedders |= {name: (name, _as_it_is) for name in image_embedders}
    if not embedders or (heads and embed is None):
        raise ValueError("nothing to evaluate; valid: embed together with heads, or image_embedders, or both")
    for name, (_, head) in embedders.items():
        missing = [domain for domain in catalog.names if isinstance(head, Mapping) and domain not in head]
        if missing:
            raise ValueError(f"embedder '{name}' has no head for {', '.join(missing)}; valid: one head for each domain")
    sources = dict(image_embedders) | ({FEATURES: embed} if heads and embed else {})

    reading = Reading(catalog, subset, load, sources, batch_size, progress, helpers)
    if helpers is not None and helpers.rank > 0:
        reading.help(chunk_size)
        return Evaluation(pd.DataFrame(), pd.DataFrame(), {}, pd.DataFrame())
    queries = [reading.queries(number) for number in range(len(catalog.domains))]
    names = tuple(dict.fromkeys(("r_at_1", f"mmp_at_{k}", *metrics)))
    searches, n_ranks = [], max(map(ranks_of, names))
    for name, (source, head) in embedders.items():
        if isinstance(head, Mapping):
            own = [(of_domain, q) for q in queries if (of_domain := head[q.domain.name]) is not None]
            searches += [_Search(name, source, of_domain, [q], n_ranks) for of_domain, q in own]
        else:
            searches.append(_Search(name, source, head, queries, n_ranks))
    for parts in reading.index(queries, chunk_size):
        for search in searches:
            search.add(parts)
    return _measure(catalog, subset, reading, searches, names)


class _Search:
    """One head, the queries it embeds, and their best neighbours so far, in the merged and in the separate indexes."""

    def __init__(self, name: str, source: str, head: Head, queries: list[Images], n_ranks: int) -> None:
        self.name, self.source, self.head, self.images = name, source, head, queries
        self.queries = torch.cat([self._embed(images) for images in queries])
        self.in_index = torch.cat([images.in_index for images in queries])
        self.domains = torch.cat([torch.full((len(images.kept),), images.number) for images in queries])
        nothing = torch.full((len(self.queries), n_ranks), -torch.inf, dtype=torch.float64)
        nowhere = torch.full((len(self.queries), n_ranks), -1)
        self.neighbours = {index: (nothing.clone(), nowhere.clone()) for index in ("merged", "separate")}

    def _embed(self, images: Images) -> Float[Tensor, "image dim"]:
        embeddings = self.head(images.outputs[self.source])
        norms = torch.linalg.vector_norm(embeddings, dim=1, dtype=torch.float32)
        wrong = ~((norms - 1).abs() <= UNIT_TOLERANCE) & (norms != 0)  # NaN is wrong; a flat image may be 0
        if wrong.any():
            row = int(wrong.nonzero()[0])
            image = f"{images.domain.name}, '{images.split.paths[images.kept[row]]}'"
            what = f"embedding of {image} has norm {float(norms[row]):g}; valid: 1"
            raise EmbeddingError(f"embedder '{self.name}': {what}")
        return embeddings

    def add(self, parts: list[Images]) -> None:
        """Search some more of the merged index: parts of one domain each, in its order."""
        parts = [images for images in parts if images.kept]
        if not parts:
            return
        embedded = [self._embed(images) for images in parts]
        everyone, alone = torch.ones_like(self.domains, dtype=torch.bool), len(parts) == 1
        known = {name: best[:, -1] for name, (best, _) in self.neighbours.items()}  # no worse ones are looked for
        own = (self.domains == parts[0].number) & alone  # these find their separate neighbours by the same search
        lowest = torch.where(own, known["separate"], known["merged"])
        merged = self._nearest(everyone, torch.cat(embedded), torch.cat([images.in_index for images in parts]), lowest)
        self._keep("merged", everyone, *merged)
        for images, index in zip(parts, embedded, strict=True):
            own = self.domains == images.number
            if own.any() and alone:
                self._keep("separate", own, merged[0][own], merged[1][own])
            elif own.any():
                self._keep("separate", own, *self._nearest(own, index, images.in_index, known["separate"][own]))

    def _nearest(self, queries: Tensor, index: Tensor, positions: Tensor, lowest: Tensor) -> tuple[Tensor, Tensor]:
        """Return similarities and positions in the merged index of some queries' neighbours in a part of it."""
        in_index = self.in_index[queries]
        itself = torch.searchsorted(positions, in_index).clamp(max=len(positions) - 1)
        itself[positions[itself] != in_index] = -1
        device, k = index.device, self.neighbours["merged"][0].shape[1]
        wanted = self.queries[queries.to(device)]
        similarity, row = (t.cpu() for t in nearest(wanted, index, k, itself.to(device), lowest.to(device)))
        return similarity, torch.where(row >= 0, positions[row], -1)

    def _keep(self, name: str, queries: Tensor, similarity: Tensor, position: Tensor) -> None:
        """Keep the best of the neighbours found before and now."""
        best, where = self.neighbours[name]
        # What was searched before has lower positions: a stable sort still breaks ties by lower position.
        similarities, order = torch.cat([best[queries], similarity], dim=1).sort(dim=1, descending=True, stable=True)
        positions = torch.cat([where[queries], position], dim=1).gather(1, order)
        k = best.shape[1]
        best[queries], where[queries] = similarities[:, :k], positions[:, :k]


def _as_it_is(embeddings: Float[Tensor, "image dim"]) -> Float[Tensor, "image dim"]:
    return embeddings


def _measure(
    catalog: Catalog, subset: Literal["val", "test"], reading: Reading, searches: list[_Search], names: Sequence[str]
) -> Evaluation:
    splits = [domain.index(subset) for domain in catalog.domains]
    searched = MergedIndex(catalog.names, tuple(split.paths for split in splits))
    n_readable = [int(reading.readable[a:b].sum()) for a, b in pairwise(reading.starts)]
    for domain, split, n in zip(catalog.names, splits, n_readable, strict=True):
        if n == 0:
            raise ValueError(f"domain '{domain}': none of the {len(split)} images of '{split.name}' can be read")
    neighbours: dict[tuple[str, str, str], Neighbours] = {}
    outcomes, rows = [], []
    for search in searches:
        for images in search.images:
            of_domain = search.domains == images.number
            domain, start = catalog.names[images.number], int(reading.starts[images.number])
            index = splits[images.number]
            unreadable = ~reading.readable[start : start + len(index)]
            index_labels = torch.from_numpy(np.where(unreadable[:, None], -1, index.labels))
            labels = torch.from_numpy(images.split.labels[images.kept])
            domains, index_domains = torch.zeros(len(labels)).long(), torch.zeros(len(index)).long()
            itself = torch.where(images.in_index >= 0, images.in_index - start, -1)
            n_positives = count_positives(labels, domains, index_labels, index_domains, itself)
            paths = tuple(images.split.paths[i] for i in images.kept)
            for name, (all_similarities, all_positions) in search.neighbours.items():
                similarity, position = all_similarities[of_domain], all_positions[of_domain]
                within = (position >= start) & (position < start + len(index))  # others are of another domain
                local = torch.where(within, position - start, -1)
                hit = relevance(local, labels, domains, index_labels, index_domains)
                measured = {metric: measure(metric, hit, n_positives).numpy() for metric in names}
                key = {"embedder": search.name, "domain": domain, "index": name}
                outcomes.append(pd.DataFrame(key | {"path": paths, "n_positives": n_positives.numpy()} | measured))
                n_index = sum(n_readable) if name == "merged" else n_readable[images.number]
                percent = {metric: 100 * float(values.mean(dtype=np.float64)) for metric, values in measured.items()}
                without = int((n_positives == 0).sum())
                counts = {"n_queries": len(paths), "n_without_positive": without, "n_index": n_index}
                rows.append(key | counts | percent)
                neighbours[search.name, domain, name] = Neighbours(
                    search.name, domain, name, paths, position.numpy(), similarity.numpy(), hit.numpy(), searched
                )
    table = _with_means(pd.DataFrame(rows), len(catalog.domains))
    skipped = pd.DataFrame(reading.skipped, columns=["domain", "split", "path"])
    return Evaluation(table, pd.concat(outcomes, ignore_index=True), neighbours, skipped)


def _with_means(rows: pd.DataFrame, n_domains: int) -> pd.DataFrame:
    """Order rows by embedder, index and domain, and close each group of all domains with its mean over them."""
    groups = []
    for (embedder, index), group in rows.groupby(["embedder", "index"], sort=False):
        n_index = group["n_index"].max() if index == "merged" else group["n_index"].sum()
        mean = {"embedder": embedder, "domain": "mean", "index": index}
        mean |= group[["n_queries", "n_without_positive"]].sum().to_dict() | {"n_index": n_index}
        mean |= group[[name for name in rows.columns if "_at_" in name]].mean().to_dict()
        groups += [group, pd.DataFrame([mean])] if len(group) == n_domains else [group]
    return pd.concat(groups, ignore_index=True)


def evaluate_model(
    model: EmbeddingModel,
    catalog: Catalog,
    params: TrainParams,
    subset: Literal["val", "test"],
    load: Load,
    untrained: EmbeddingModel | None = None,
    helpers: Helpers | None = None,
) -> Evaluation:
    """Evaluate student and teachers; beside an untrained model, baselines and shorter embeddings as well.

    The model is left in evaluation mode. Embedders are called `student`; `teacher`, where the model has some; and
    beside an untrained model `student_<dim>` for each of `nested_dims`, `features` (its unit features), `pixels`, and,
    where it begins with another run, that one's student as `start`.

    Args:
        params: of the run: k, precision, eval_batch_size and nested_dims.
        load: reads images of the side that the model sees: `loading(reader)`.
        untrained: the model before its first step, on the same device.
        helpers: the processes that share the work, see `evaluate`.

    Raises: what `evaluate` raises.
    """
    model.eval()
    device = next(model.parameters()).device
    precision = dtype_of(params.precision, device)

    def features(network: EmbeddingModel, images: Tensor) -> Tensor:
        return network.features(images.to(device), precision)

    heads: dict[str, Head | Mapping[str, Head]] = {"student": model.student}
    if len(model.teachers):
        heads["teacher"] = dict(model.teachers.items())
    baselines: dict[str, Embed] = {}
    if untrained is not None:
        untrained.eval()
        heads |= {f"student_{dim}": partial(model.short_embedding, dim) for dim in params.nested_dims}
        baselines = {
            "features": lambda images: torch.nn.functional.normalize(features(untrained, images), dim=1),
            "pixels": pixels,
        }
        if params.start is not None:  # nothing is trained yet: the student of the run that this one begins with
            baselines["start"] = lambda images: untrained.student(features(untrained, images))
    batch_size, embed = params.eval_batch_size, partial(features, model)
    return evaluate(catalog, subset, load, embed, heads, baselines, k=params.k, batch_size=batch_size, helpers=helpers)
