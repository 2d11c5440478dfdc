"""Those who teach a run's student: frozen teachers, asked in each step or once for all; and finished specialists.

    outputs/features/<key>/                       what a teacher says of all training images: see `models.feature_cache`
    outputs/teachers/<key>/encoder_scores.csv.gz  how good some teachers are, each alone and all together
    outputs/runs/<run>/encoder_scores.csv.gz      how good the student is, on the same tasks

The first two are for all runs that ask the same.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from udonlib.data.augmentation import augment
from udonlib.data.catalog import Catalog
from udonlib.data.images import ImageReader
from udonlib.errors import UserError
from udonlib.evaluation.frozen.encoders import SCORES, Encoder, EncoderScores, evaluate_encoders, model_encoder
from udonlib.evaluation.reading import loading
from udonlib.files import results_folder
from udonlib.models.embedding_model import EmbeddingModel, weights_file
from udonlib.models.feature_cache import FeatureCache, cache_key
from udonlib.models.ladder import Tokens
from udonlib.models.processors import dtype_of, pick_device, pick_precision
from udonlib.models.teachers import Images, Teacher, check_teachers, create_teacher
from udonlib.params import TrainParams
from udonlib.presets import load as load_preset
from udonlib.runs.checkpoints import load_model
from udonlib.runs.find import KEPT, find_run
from udonlib.training.losses import Batch, Objective, UdonObjective
from udonlib.training.parallel.world import ONE, World
from udonlib.training.unic import UnicObjective

STUDENT = "student"
N_LOOKED_AT = 16  # images by which teachers are checked
DRAW_SEED = 0  # of what an evaluation draws: the same for all runs, so that seeds of one student compare
BATCH = 64  # images that a teacher is given at once


def open_teachers(params: TrainParams, images: Images) -> dict[str, Teacher]:
    """The frozen teachers of a run, by name, checked on some of its images; on the CPU.

    Raises:
        UserError: "teacher '...': ..." for whatever is wrong with one.
    """

    def open_run(name: str) -> tuple[EmbeddingModel, int]:
        folder = find_run(name, KEPT, params.outputs)
        return load_model(folder.best, folder.params), folder.params.image_size

    teachers = {name: create_teacher(name, teacher, open_run) for name, teacher in sorted(params.teachers.items())}
    check_teachers(teachers, images)
    return teachers


def teacher_files(params: TrainParams) -> dict[str, Path]:
    """The files that frozen teachers are made of, by what they are to a person."""
    files: dict[str, Path] = {}
    for name, teacher in params.teachers.items():
        if teacher.run is not None:
            files[f"teacher '{name}'"] = find_run(teacher.run, KEPT, params.outputs).best
        elif teacher.weights is not None or teacher.onnx is not None:
            files[f"teacher '{name}'"] = weights_file(str(teacher.weights or teacher.onnx))
    return files


class CachedFeatures:
    """What each teacher says of every training image, unaugmented: computed once, kept, and looked up in each step.

    A teacher is given the middle of an image, as augmentation 'none' leaves it, and computes in the run's precision;
    patches are kept on the student's grid.

    Args:
        params: of the run.
        reader: of its training images.
        teachers: on the device where they compute.
        n_positions: of the student's grid.
    """

    def __init__(
        self, params: TrainParams, reader: ImageReader, teachers: Mapping[str, Teacher], n_positions: int
    ) -> None:
        self.params, self.reader, self.teachers = params, reader, teachers
        self.n_positions = n_positions
        sizes = {domain.name: len(domain.splits["train"]) for domain in reader.catalog.domains}
        ends = np.cumsum(list(sizes.values()))
        self._start = dict(zip(sizes, (ends - list(sizes.values())).tolist(), strict=True))
        self._ends, self.n_images = ends, int(ends[-1])
        self._caches: dict[str, FeatureCache] = {}

    def fill(self) -> Iterator[dict[str, Any]]:
        """Compute what is missing; yields records of kind `features`: teacher, images done, images in all.

        Raises:
            UserError: there is no room, or features do not fit into half precision.
        """
        p = self.params
        precision = pick_precision(p.precision, pick_device(p.device))
        looks = f"{self.reader.catalog.fingerprint} {p.decoder} {p.resize_size} {p.image_size} {precision}"
        folder = results_folder(p.outputs) / "features"
        for name, teacher in self.teachers.items():
            shapes = {k: (w,) if k == "class" else (self.n_positions, w) for k, w in teacher.widths.items()}
            grid = self.n_positions if "patches" in teacher.kinds else None  # the class alone is the same on any
            key = cache_key(teacher.fingerprint(), looks, teacher.image_size, grid)
            cache = self._caches[name] = FeatureCache(folder, key, shapes, self.n_images, p.max_cache_gb * 1e9)
            began, first = time.monotonic(), cache.n_done
            for done in cache.fill(partial(self._compute, teacher), BATCH):
                pace = (done - first) / max(1e-6, time.monotonic() - began)
                record = {"kind": "features", "teacher": name, "n_done": done, "n_images": self.n_images}
                yield record | {"images_per_s": pace}

    def __call__(self, batch: Batch) -> dict[str, Tokens]:
        """Of this process's images of a batch, in single precision."""
        positions = np.concatenate([self._start[domain] + indices for domain, indices in batch.slots])
        return {
            name: {kind: value.to(batch.images.device).float() for kind, value in cache[positions].items()}
            for name, cache in self._caches.items()
        }

    def _compute(self, teacher: Teacher, positions: Int[np.ndarray, "n"]) -> Tokens:
        parts = []
        for number, (domain, start) in enumerate(self._start.items()):
            inside = positions[(positions >= start) & (positions < self._ends[number])]
            if len(inside):
                parts.append(self.reader.read(domain, "train", inside - start))
        images = plain(torch.cat(parts), self.params.image_size)
        device = next(iter(teacher.parameters()), images).device
        return teacher(images.to(device), self.n_positions, dtype_of(self.params.precision, device))


def of_one_domain(params: TrainParams, model: EmbeddingModel, n_domains: int) -> str:
    """What is to be known of a student whose batches are of one domain each; "" where nothing is."""
    normed = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.backbone.modules())
    if params.recipe != "unic" or params.domains_per_batch > 1 or not normed or n_domains < 2:
        return ""
    return (
        "domains_per_batch is 1 and the backbone has batch norm: its statistics are then those of no mixture that is "
        "ever tested, which costs a student several points of R@1; better as many domains as there are"
    )


def plain(images: torch.Tensor, image_size: int) -> torch.Tensor:
    """Images as augmentation 'none' leaves them."""
    return augment(images, ["none"] * len(images), image_size, torch.Generator())


def create_objective(
    params: TrainParams,
    model: EmbeddingModel,
    reader: ImageReader,
    teachers: Mapping[str, Teacher],
    offline: Mapping[str, EmbeddingModel],
    world: World = ONE,
) -> tuple[Objective, CachedFeatures | None]:
    """What a run's steps minimise, and the features that are to be filled before, if they are cached.

    Args:
        model: on its device.
        teachers: frozen ones.
        offline: finished specialists, by domain.
        world: the processes that share each batch.
    """
    udon = None if params.recipe == "unic" else UdonObjective(params, offline)
    if not teachers:
        return udon or UdonObjective(params), None
    cached = None
    if params.teacher_features == "cached":
        device = next(model.parameters()).device
        side = params.image_size
        with torch.no_grad():
            [end] = model.eval().tokens(torch.zeros(1, 3, side, side, device=device), end=True)
        cached = CachedFeatures(params, reader, teachers, end["patches"].shape[1])
    return UnicObjective(params, model, teachers, cached, udon, world), cached


def some_images(reader: ImageReader, image_size: int) -> Images:
    """A few training images of all domains, unaugmented."""
    domains = reader.catalog.domains
    n = max(1, N_LOOKED_AT // len(domains))
    parts = []
    for domain in domains[:N_LOOKED_AT]:
        n_images = len(domain.splits["train"])
        parts.append(reader.read(domain.name, "train", np.unique(np.linspace(0, n_images - 1, n).astype(int))))
    return plain(torch.cat(parts), image_size)


Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


def teacher_scores(
    params: TrainParams, catalog: Catalog, teachers: Mapping[str, Teacher], progress: Progress | None = None
) -> EncoderScores:
    """How good a run's frozen teachers are, each alone and all together: retrieval, classification and dense tasks.

    They see the test images in the size that the student sees, and compute in the run's precision. What was found
    before for the same teachers, data and precision is read, not found again.
    """
    p, device = params, pick_device(params.device)
    asked = [catalog.fingerprint, catalog.names, p.image_size, pick_precision(p.precision, device)]
    looks = [*asked, *(t.fingerprint() for t in teachers.values())]
    key = hashlib.sha256(json.dumps([looks, list(teachers)]).encode()).hexdigest()[:32]
    folder = results_folder(p.outputs) / "teachers" / key
    if not (folder / SCORES).is_file():
        for teacher in teachers.values():
            teacher.to(device)
        precision = dtype_of(p.precision, device)
        encoders = {name: _on(teacher, device, precision) for name, teacher in teachers.items()}
        found = _evaluate(p, catalog, encoders, list(teachers), progress)
        folder.mkdir(parents=True, exist_ok=True)
        found.save(folder)
    return EncoderScores.load(folder)


def student_scores(
    params: TrainParams, catalog: Catalog, model: EmbeddingModel, folder: Path, progress: Progress | None = None
) -> EncoderScores:
    """How good the student of a finished run is on the same tasks; found once.

    Args:
        model: the run's best.
        folder: of the run.
    """
    if not (folder / SCORES).is_file():
        device = pick_device(params.device)
        encoder = model_encoder(model.to(device), dtype_of(params.precision, device))
        _evaluate(params, catalog, {STUDENT: encoder}, [], progress).save(folder)
    return EncoderScores.load(folder)


def probes(who: str) -> str:
    """What progress calls the training of somebody's classifiers: "teachers, probes"."""
    return f"{who}, probes"


def _evaluate(
    params: TrainParams,
    catalog: Catalog,
    encoders: Mapping[str, Encoder],
    teachers: Sequence[str],
    progress: Progress | None,
) -> EncoderScores:
    p = params
    load = loading(ImageReader(catalog, p.image_size, "eval", p.on_bad_image), p.n_workers)
    who = "teachers" if teachers else STUDENT

    def tell(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(who if what == "images" else probes(who), done, total)

    return evaluate_encoders(encoders, catalog, load, teachers=teachers, seed=DRAW_SEED, progress=tell)


def _on(teacher: Teacher, device: torch.device, precision: torch.dtype) -> Encoder:
    return lambda images: teacher(images.to(device), precision=precision)


def specialist_params(params: TrainParams, names: Sequence[str]) -> dict[str, TrainParams]:
    """Parameters of the runs whose models teach offline, by domain."""
    p = params
    values = {"data": p.data, "images": p.images, "seed": p.seed, "outputs": p.outputs}
    return {d: load_preset(str(p.offline_teachers), **values, domains=[d]) for d in names}


def load_specialists(params: TrainParams, specialists: Mapping[str, Any]) -> dict[str, EmbeddingModel]:
    """The finished specialists that teach, by domain.

    Args:
        specialists: their runs.

    Raises:
        UserError: "no finished specialist of domain 'flags' ..." with the command that trains it.
    """
    p = params
    teachers: dict[str, EmbeddingModel] = {}
    for domain, specialist in specialists.items():
        if specialist.status != "finished":
            raise UserError(
                f"parameter 'offline_teachers': no finished specialist of domain '{domain}' in {specialist.path}; "
                f"train it first: papermill train.ipynb out.ipynb -p preset {p.offline_teachers} "
                f"-p domains {domain} -p seed {p.seed}"
            )
        if specialist.params.image_size != p.image_size:
            raise UserError(
                f"parameter 'offline_teachers': the specialist of domain '{domain}' sees images of "
                f"{specialist.params.image_size} pixels, this run has image_size = {p.image_size}"
            )
        specialist.check_data()
        teachers[domain] = specialist.load_model()
    return teachers
