"""The test images of a run as points: what they are, how they were answered, and where they lie in two dimensions.

space = open_map(params)         # the run, its images and outcomes; seconds
space.embed(say)                 # the backbone's features, kept on the disk
space.layout("student", "quick") # coordinates
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float32, Int

from udonlib.data.catalog import Catalog, Domain
from udonlib.data.images import ImageReader
from udonlib.errors import UserError, nearest
from udonlib.evaluation.outcomes import paired, whose_is_right
from udonlib.evaluation.reading import in_batches, loading
from udonlib.files import results_folder
from udonlib.lab import projections
from udonlib.lab.explore.neighbourhoods import Lists, gather
from udonlib.lab.projections import fingerprint, kept
from udonlib.lab.quick_layout import preserved
from udonlib.lab.views.evaluation_views import answered_by
from udonlib.models.embedding_model import EmbeddingModel
from udonlib.models.processors import dtype_of, pick_device
from udonlib.presets import EmbeddingsParams
from udonlib.runs.evaluations import Source
from udonlib.runs.find import find_run, that_tested
from udonlib.runs.run import Run, load_run
from udonlib.training.threads import use_threads

NO_QUERY = "not a query"
RIGHT, WRONG = "right", "wrong"
TEACHER_OF = "teacher of "  # begins the name of the view of one teacher
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class MapLayout:
    """Coordinates of all points in one view, in [-1, 1]; what they are, in words; and names to write at places.

    kept: share of a point's nearest neighbours in the space that are among its nearest in the layout, in percent.
    """

    xy: Float32[np.ndarray, "point 2"]
    caption: str
    labels: list[tuple[str, float, float]] = field(default_factory=list)
    kept: float = float("nan")


@dataclass(eq=False)
class EmbeddingMap:
    """A run's test images, queries and index alike, as points.

    points: domain, path, class (its first name), split (where it is read) and row (there); position in the merged index
        and query (row in `lists`), -1 where it is none; result (of `params.embedder`'s first neighbour: right, wrong or
        not a query); gap (one of `gaps.GROUPS`, or not a query), where the run has teachers.
    lists: the neighbours of all queries of `domains`, by embedder. names: the class of every test image of the run, by
        domain and path, on the map or not.
    """

    params: EmbeddingsParams
    run: Run
    catalog: Catalog
    domains: tuple[str, ...]
    points: pd.DataFrame
    n_images: int
    lists: dict[str, Lists]
    r_at_1: dict[str, float]
    names: dict[tuple[str, str], str]
    features: Float32[np.ndarray, "point feature_dim"] | None = None
    _row_of: dict[tuple[str, str], int] = field(default_factory=dict, repr=False)

    @property
    def has_teachers(self) -> bool:
        return "teacher" in self.lists

    @property
    def views(self) -> tuple[str, ...]:
        """What can be laid out: the student, each domain by its own teacher, or all images by one domain's teacher."""
        if not self.has_teachers:
            return ("student",)
        return ("student", "teacher", *(TEACHER_OF + name for name in self.domains))

    @cached_property
    def model(self) -> EmbeddingModel:
        """The best model of the run, on its device, in evaluation mode."""
        return self.run.load_model().to(pick_device(self.params.device))

    def embed(self, progress: Callable[[int, int], None] | None = None, say: Say | None = None) -> bool:
        """Compute the backbone's features of all points, or read them where they were kept; says whether it computed.

        Points whose image cannot be read are dropped, where the run skips such images.

        Args:
            progress: called with (images done, images in all).
            say: called with one sentence where the cache is broken.
        """
        p, trained = self.params, self.run.params
        use_threads(p.n_threads)
        digest = Source("run", self.run.path.name, self.run.best, trained).digest
        images = "\n".join(self.points["domain"] + "/" + self.points["path"])
        key = fingerprint("features", digest, self.catalog.fingerprint, images, trained.precision)
        computed: list[bool] = []

        def compute() -> dict[str, np.ndarray]:
            computed.append(True)
            features = np.full((len(self.points), self.model.backbone.feature_dim), np.nan, np.float32)
            for done, (rows, values) in enumerate_rows(self._embedded()):
                features[rows] = values
                if progress:
                    progress(done, len(self.points))
            return {"features": features}

        features = kept(cache_of(p), "features", key, compute, say)["features"]
        readable = np.isfinite(features[:, 0])
        self.points = self.points[readable].reset_index(drop=True)
        self.features = features[readable]
        return bool(computed)

    def _embedded(self) -> Iterator[tuple[Int[np.ndarray, "_"], Float32[np.ndarray, "_ dim"]]]:
        """Yield rows of `points` and their features, batch by batch."""
        trained, device = self.run.params, pick_device(self.params.device)
        reader = ImageReader(self.catalog, trained.image_size, "eval", trained.on_bad_image, cache=False)
        load = loading(reader, self.params.n_workers)
        for (domain, split), part in self.points.groupby(["domain", "split"], sort=False):
            rows, places = part.index.to_numpy(), part["row"].to_numpy()
            start = 0
            for batch, read, images in in_batches(load, domain, split, places.tolist(), trained.eval_batch_size):
                here = rows[start : start + len(batch)]
                start += len(batch)
                with torch.no_grad():
                    values = self.model.features(images.to(device), dtype_of(trained.precision, device))
                yield here[np.isin(batch, read)], values.cpu().numpy()

    def vectors(self, view: str, rows: Int[np.ndarray, "_"] | slice = slice(None)) -> Float32[np.ndarray, "_ dim"]:
        """Embed points by the student, or by the teacher of one domain.

        Args:
            view: "student", or "teacher of " and a domain.
            rows: which points, by default all.

        Raises:
            UserError: no such view; or `embed` has not been called.
        """
        heads: dict[str, Any] = {"student": self.model.student}
        heads |= {TEACHER_OF + name: head for name, head in self.model.teachers.items()}
        if view not in heads:
            raise UserError(f"no view '{view}'; {nearest(view, heads)}")
        if self.features is None:
            raise UserError("the images are not embedded yet: run the cell that embeds them first")
        device = next(self.model.parameters()).device
        with torch.no_grad():
            parts = [heads[view](part.to(device)).cpu() for part in torch.from_numpy(self.features[rows]).split(2**14)]
        return torch.cat(parts).float().numpy()

    @property
    def row_of(self) -> dict[tuple[str, str], int]:
        """The row of each point, by domain and path."""
        if len(self._row_of) != len(self.points):  # `embed` drops what cannot be read
            pictures = zip(self.points["domain"], self.points["path"], strict=True)
            self._row_of = {picture: row for row, picture in enumerate(pictures)}
        return self._row_of

    def groups(self) -> Int[np.ndarray, "point"]:
        """The number of each point's domain among `domains`."""
        return pd.Categorical(self.points["domain"], self.domains).codes.astype(np.int64)

    @property
    def settings(self) -> projections.Umap:
        return projections.Umap(self.params.umap_neighbours, self.params.umap_distance, self.params.seed)

    def parts(self, view: str) -> list[Float32[np.ndarray, "_ dim"]]:
        """The sets of vectors of a view that compare with each other: all, or for "teacher" those of each domain."""
        if view != "teacher":
            return [self.vectors(view)]
        group = self.groups()
        return [self.vectors(TEACHER_OF + name, np.flatnonzero(group == i)) for i, name in enumerate(self.domains)]

    def is_kept(self, view: str, projection: str = "umap") -> bool:
        """Say whether the UMAP or quick layout of a view comes from the cache, at once; a PCA always does."""
        parts, folder = self.parts(view), cache_of(self.params)
        return projection == "pca" or all(projections.is_kept(p, self.settings, folder, projection) for p in parts)

    def layout(self, view: str, projection: str, say: Say | None = None) -> MapLayout:
        """Lay all points out in one view.

        The view "teacher" puts the domains side by side, each laid out for itself by its own teacher: embeddings of two
        teachers do not compare.

        Args:
            view: one of `views`.
            projection: "quick", "umap" or "pca"; see `is_kept`.
            say: called with one sentence where the cache is broken.
        """
        parts, folder = self.parts(view), cache_of(self.params)
        n_dims = f"{parts[0].shape[1]} dimensions" if parts else ""
        flat = [projections.pca(part) for part in parts]
        if projection == "pca":
            laid = [xy for xy, _ in flat]
            shares = [100 * sum(of_both) for _, of_both in flat]
            how = f"PCA, {min(shares):.0f}"
            how += f" to {max(shares):.0f}% of the variance" if len(shares) > 1 else "% of the variance"
        else:
            make = projections.quick if projection == "quick" else projections.umap
            laid = [make(part, self.settings, folder, say) for part in parts]
            how = f"{'laid out' if projection == 'quick' else 'UMAP'} by {self.params.umap_neighbours} neighbours"
        k = self.params.umap_neighbours
        triples = [(part, xy, first) for part, xy, (first, _) in zip(parts, laid, flat, strict=True) if len(part) > 1]
        share = float("nan")
        if triples:
            kept = [preserved(part, [xy, first], k) for part, xy, first in triples]
            share, of_pca = 100 * np.average(kept, axis=0, weights=[len(part) for part, _, _ in triples])
            how += f"; {share:.0f}% of an image's {k} nearest are kept"
            how += "" if projection == "pca" else f" (PCA: {of_pca:.0f}%)"
        if view != "teacher":
            return MapLayout(laid[0], f"{view}, {n_dims}: {how}", kept=share)
        xy, middles = projections.side_by_side(laid, self.groups())
        labels = [(name, x, y) for name, (x, y) in zip(self.domains, middles, strict=True)]
        return MapLayout(xy, f"each domain by its own teacher, {n_dims}: {how}", labels, share)


def enumerate_rows(batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[int, tuple]]:
    """Count the rows of batches while they pass: yields how many there were, this batch included, and the batch."""
    done = 0
    for batch in batches:
        done += len(batch[0])
        yield done, batch


def cache_of(params: EmbeddingsParams) -> Path:
    """Folder of what is computed once: features and layouts. It may be deleted at any time."""
    return results_folder(params.outputs) / "cache"


def open_map(params: EmbeddingsParams) -> EmbeddingMap:
    """Read a run, what its test images are, and how its queries were answered. Nothing is embedded yet.

    The queries of an unfinished run are asked now, of its best model so far.

    Raises:
        UserError: no such run, or one without a model; a run without the wanted embedder; unknown domains; k beyond the
            neighbours that were kept; changed data.
    """
    run = load_run(find_run(params.run, that_tested(params.embedder), params.outputs))
    answered = answered_by(run, params)
    neighbours, catalog = answered.neighbours(), run.catalog
    domains = catalog.names
    if params.domains != "all":
        unknown = next((name for name in params.domains if name not in domains), None)
        if unknown:
            raise UserError(
                f"parameter 'domains': run {run.path.name!r} has no '{unknown}'; {nearest(unknown, domains)}"
            )
        domains = tuple(name for name in domains if name in params.domains)
    outcomes = answered.outcomes()
    outcomes = outcomes[outcomes["embedder"].isin(["student", "teacher"]) & outcomes["domain"].isin(domains)]
    known = {part.embedder for part in neighbours}
    embedders = [name for name in ("student", "teacher") if name in known]
    by_embedder: dict[str, Lists] = {name: gather(neighbours, name, params.k, domains) for name in embedders}
    answers = paired(outcomes)
    images = pd.concat([_images(domain) for domain in catalog.domains], ignore_index=True)
    names = dict(zip(zip(images["domain"], images["path"], strict=True), images["class"], strict=True))
    points = images[images["domain"].isin(domains)].reset_index(drop=True)
    n_images = len(points)
    points = points.iloc[_some(points["domain"], params.max_points, params.seed)].reset_index(drop=True)
    points["position"] = _positions(points, by_embedder["student"])
    points["query"] = _lookup(points, [by_embedder["student"].query(row) for row in range(len(by_embedder["student"]))])
    points["result"] = _result(points, answers[params.embedder].to_numpy(), answers)
    if "teacher" in by_embedder:
        points["gap"] = _gap(points, answers)
    means = {name: 100 * float(answers.groupby("domain", sort=False)[name].mean().mean()) for name in by_embedder}
    return EmbeddingMap(params, run, catalog, domains, points, n_images, by_embedder, means, names)


def _images(domain: Domain) -> pd.DataFrame:
    """The test images of a domain, each once: queries, then what else is in the index."""
    parts = []
    splits = {split.name: split for split in (domain.queries("test"), domain.index("test"))}
    for name, split in splits.items():
        labels = [next(iter(row[row >= 0].tolist()), -1) for row in split.labels]
        names = [split.class_names.get(label, str(label)) for label in labels]
        table = {"domain": domain.name, "path": split.paths, "class": names, "split": name, "row": range(len(split))}
        parts.append(pd.DataFrame(table))
    return pd.concat(parts, ignore_index=True).drop_duplicates("path", ignore_index=True)


def _some(domain: pd.Series, n: int, seed: int) -> Int[np.ndarray, "_"]:
    """Choose n rows in their order, as equally many of each domain as there are."""
    if len(domain) <= n:
        return np.arange(len(domain))
    rng = np.random.default_rng(seed)
    shuffled = pd.Series(rng.permutation(len(domain)))
    turn = shuffled.groupby(domain.to_numpy()[shuffled]).cumcount()  # the how-maniest of its domain in this order
    return np.sort(shuffled.to_numpy()[np.argsort(turn.to_numpy(), kind="stable")[:n]])


def _lookup(points: pd.DataFrame, images: list[tuple[str, str]]) -> Int[np.ndarray, "point"]:
    """The place of each point in a list of (domain, path); -1 where it is not there."""
    place = {image: number for number, image in enumerate(images)}
    places = (place.get(image, -1) for image in zip(points["domain"], points["path"], strict=True))
    return np.fromiter(places, np.int64, len(points))


def _positions(points: pd.DataFrame, lists: Lists) -> Int[np.ndarray, "point"]:
    """The position of each point in the merged index; -1 where it is not there."""
    merged = lists.searched
    return _lookup(points, [(d, path) for d, paths in zip(merged.domains, merged.paths, strict=True) for path in paths])


def _answers(points: pd.DataFrame, answers: pd.DataFrame) -> Int[np.ndarray, "point"]:
    return _lookup(points, list(zip(answers["domain"], answers["path"], strict=True)))


def _result(points: pd.DataFrame, r_at_1: Float[np.ndarray, "query"], answers: pd.DataFrame) -> np.ndarray:
    place = _answers(points, answers)
    of_query = np.where(r_at_1 > 0, RIGHT, WRONG).astype(object)
    return np.where(place >= 0, of_query[place], NO_QUERY)


def _gap(points: pd.DataFrame, answers: pd.DataFrame) -> np.ndarray:
    place = _answers(points, answers)
    student, teacher = (answers[name].to_numpy() > 0 for name in ("student", "teacher"))
    return np.where(place >= 0, whose_is_right(student, teacher)[place], NO_QUERY)
