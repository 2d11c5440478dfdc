"""What search.ipynb searches: an index of images by one model, their pictures, and the run's teachers beside it.

searched = open_search(params)       # embeds what is not embedded yet
searched.picture(row), searched.thumbnail(row)
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from PIL import Image
from torch import Tensor

from udonlib.data.catalog import Catalog, load_catalog
from udonlib.data.decoding import decode, prepare_eval
from udonlib.data.storage import Store
from udonlib.errors import ParameterError, UserError
from udonlib.files import results_folder
from udonlib.lab.projections import fingerprint, kept
from udonlib.lab.use.use_params import SearchParams
from udonlib.models.processors import dtype_of
from udonlib.runs.find import find_run
from udonlib.runs.run import load_run
from udonlib.search.classify import calibrate
from udonlib.search.embed import Embeddings, Progress, vectors_of
from udonlib.search.find import open_finder
from udonlib.search.folders import list_images, read_embeddings
from udonlib.search.index import Index, build_index
from udonlib.search.kinds import exactly
from udonlib.search.load import Embedder, holds_images, load
from udonlib.search.pictures import PictureLoader
from udonlib.training.threads import use_threads

NO_DOMAIN = ""  # of images whose domain nothing tells
MAX_BYTES = 400e6  # of features that teachers are given
Say = Callable[[str], None]


@dataclass(eq=False)
class Teachers:
    """The teacher heads of a run, each of which searches the images of its own domain.

    features: of the backbone, a row for each image of the index; not finite where an image cannot be read.
    """

    model: Embedder
    domains: np.ndarray
    alive: Bool[np.ndarray, "row"]
    features: Float32[np.ndarray, "row dim"]
    _known: dict[str, tuple[Int[np.ndarray, "_"], Float32[np.ndarray, "_ dim"]]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The domains that have a teacher."""
        return tuple(self.model.model.teachers)

    def of(self, domain: str, features: Float[np.ndarray, "_ dim"]) -> Float32[np.ndarray, "_ teacher_dim"]:
        """Embed by the teacher of a domain."""
        head = self.model.model.teachers[domain]
        with torch.inference_mode():
            return head(torch.from_numpy(features).to(self.model.device)).float().cpu().numpy()

    def search(
        self, domain: str, features: Float[np.ndarray, "dim"], k: int, exclude: int = -1
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest images of a domain as its teacher sees them: similarities and rows, without missing ones."""
        if domain not in self._known:
            mine = np.flatnonzero((self.domains == domain) & self.alive & np.isfinite(self.features[:, 0]))
            self._known[domain] = mine, self.of(domain, self.features[mine])
        rows, vectors = self._known[domain]
        left = np.flatnonzero(rows != exclude)
        similarities, places = exactly(vectors, self.of(domain, features[None]), k, left)
        here = places[0] >= 0
        return similarities[0][here], rows[places[0][here]]


@dataclass(eq=False)
class Searched:
    """An index of images and the model that made it.

    allowed: bool of each row: whether it may be found. domains: those of rows that may, by name; NO_DOMAIN for the
    others. labels: "domain/class" of each row, None where nothing tells it. store: reads the images; None: they are not
    where they were, and thumbnails stand for them. teachers: None where the model has none, or they were not wanted.
    """

    params: SearchParams
    model: Embedder
    index: Index
    store: Store | None
    teachers: Teachers | None = None

    @cached_property
    def allowed(self) -> Bool[np.ndarray, "row"]:
        chosen = self.params.domains
        found = self.index.mask(None if chosen == "all" else {"domain": list(chosen)})
        return np.ones(len(self.index.images), bool) if found is None else found

    @cached_property
    def row_domains(self) -> np.ndarray:
        """The domain of each row."""
        return _texts(self.index, "domain", NO_DOMAIN)

    @cached_property
    def labels(self) -> np.ndarray:
        classes = _texts(self.index, "label", None)
        pairs = zip(self.row_domains, classes, strict=True)
        return np.array([None if c is None else f"{d}/{c}" if d else c for d, c in pairs], dtype=object)

    @cached_property
    def domains(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.row_domains[self.allowed])))

    def row_of(self, image: str) -> int:
        """The row of an image by its id. Raises: UserError with the nearest."""
        return self.index.row(image)

    def thumbnail(self, row: int) -> bytes:
        """A small JPEG of an image."""
        if "thumbnail" in self.index.images:
            return bytes(self.index.images["thumbnail"].iloc[row])
        return jpeg(self.picture(row), 64)

    def picture(self, row: int) -> Image.Image:
        """An image as it is in its file, or its thumbnail where that is gone. Raises: ImageError."""
        path = str(self.index.images["id"].iloc[row])
        if self.store is not None:
            with suppress(UserError):
                return decode(self.store.read(path), path)
        if "thumbnail" not in self.index.images:
            raise UserError(f"{path}: cannot be read where it was, and the index holds no picture of it")
        return decode(bytes(self.index.images["thumbnail"].iloc[row]), path)

    def embed(self, image: Image.Image) -> tuple[Float32[np.ndarray, "dim"], Float32[np.ndarray, "_"]]:
        """The student's vector of a picture, and the backbone's feature, which teachers are given."""
        with torch.inference_mode():
            features = _features(self.model, prepare_eval(image, self.model.image_size)[None])
            vectors = self.model.model.student(features)
        return vectors[0].float().cpu().numpy(), features[0].float().cpu().numpy()


def jpeg(image: Image.Image, side: int, quality: int = 85) -> bytes:
    """A picture within a square as a JPEG."""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((side, side))
    small.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _texts(index: Index, column: str, empty: str | None) -> np.ndarray:
    if column not in index.images:
        return np.full(len(index.images), empty, dtype=object)
    values = index.images[column].astype(object)
    return np.array([value if isinstance(value, str) else empty for value in values], dtype=object)


def _features(model: Embedder, images: Tensor) -> Tensor:
    return model.model.features(images.to(model.device), dtype_of(model.precision, model.device))


def open_search(params: SearchParams, progress: Progress | None = None, say: Say | None = None) -> Searched:
    """Load the model, embed and index what is searched, and find the threshold of "none of these".

    Args:
        progress: called with what is done ("embedding", "indexing", "teachers"), images done, and images in all.
        say: called with one sentence where something is left out.

    Raises: UserError for a model, images or an index that are not there; for what does not belong together.
    """
    say = say or (lambda text: None)
    p = params
    if p.index is not None and p.data != "auto":
        raise ParameterError({"index": f"found {p.index!r} beside data, expected one of them"})
    use_threads(p.n_threads)
    model = load(p.model, device=p.device, outputs=p.outputs)
    if p.index is not None:
        index = open_finder(p.index, model, p.outputs).index
        with suppress(UserError):  # an index keeps no images: embeddings of the same name may say where they are
            p = p.model_copy(update={"data": read_embeddings(p.index, p.outputs).data})
        store = _store(p.data) if p.data != "auto" else None
    else:
        images = _images(p, model)
        found = model.embed(images, on_bad_image=p.on_bad_image, n_threads=p.n_threads, progress=progress)
        if found.skipped:
            first = next(iter(found.skipped.items()))
            n = len(found.skipped)
            what = f"{n:,} images cannot be read and are" if n > 1 else "one image cannot be read and is"
            say(f"{what} left out: {first[0]}: {first[1]}")
        index = _indexed(params, found, progress)
        store = images.store if isinstance(images, Catalog) else list_images(images)[0]
    searched = Searched(params, model, index, store)
    try:
        calibrate(index, false_labels=p.false_labels, seed=p.seed)
    except UserError as error:
        index.answers = {}
        say(f"No answers by class: {error}.")
    if p.teachers and len(model.model.teachers):
        searched.teachers = _teachers(searched, progress, say)
    return searched


def _images(params: SearchParams, model: Embedder) -> str | Catalog:
    """What `Embedder.embed` is given."""
    p = params
    if p.data == "auto":
        try:
            run = load_run(find_run(model.source, outputs=p.outputs))
        except UserError:  # a release, or a checkpoint
            return load_catalog("miniuned", needed=("test",))
        run.move_data("auto", p.images)
        return run.catalog
    is_folder = p.data == "miniuned" or holds_images(Path(p.data))
    return p.data if is_folder and p.images is None else load_catalog(p.data, images=p.images, all_as_test=True)


def _store(data: str | None) -> Store | None:
    try:
        return list_images(data)[0] if data else None
    except UserError:  # they have moved
        return None


def _indexed(params: SearchParams, found: Embeddings, progress: Progress | None) -> Index:
    p = params
    k = min(10, max(1, len(found) - 1))
    return build_index(found, p.kind, max_ms=p.max_ms, recall=p.recall, k=k, seed=p.seed, progress=progress)


def _teachers(searched: Searched, progress: Progress | None, say: Say) -> Teachers | None:
    """The teachers with the backbone's features of all images, kept in outputs/cache; None where that is too much."""
    model, images, store = searched.model, searched.index.images, searched.store
    n, dim = len(images), model.model.backbone.feature_dim
    if store is None or 4.0 * n * dim > MAX_BYTES:
        why = "its images are not where they were" if store is None else f"{n:,} images are too many"
        say(f"Teachers are not shown: {why}.")
        return None
    paths = images["id"].astype(str).tolist()
    hashes = images["hash"].tolist() if "hash" in images else []
    key = fingerprint("search", model.fingerprint, "\n".join([*paths, *hashes]), model.precision)

    def compute() -> dict[str, np.ndarray]:
        features = np.full((n, dim), np.nan, np.float32)
        loader = PictureLoader(
            lambda i: decode(store.read(paths[i]), paths[i]), model.image_size, "skip", searched.params.n_threads
        )

        def report(what: str, done: int, total: int) -> None:
            if progress:
                progress("teachers", done, total)

        for rows, made in vectors_of(lambda batch: _features(model, batch), loader, range(n), 128, report):
            features[rows] = made
        return {"features": features}

    folder = results_folder(searched.params.outputs) / "cache"
    arrays: Any = kept(folder, "search", key, compute, say)
    return Teachers(model, searched.row_domains, searched.allowed, arrays["features"])
