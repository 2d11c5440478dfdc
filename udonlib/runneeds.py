"""What a run needs of a machine for the data that it reads: measured on a sample of its images, not guessed."""

import time
from dataclasses import dataclass

import numpy as np

from udonlib.catalogimages import CatalogImages
from udonlib.domains import Catalog
from udonlib.images import Decoder
from udonlib.models import create_model
from udonlib.params import TrainParams

BATCH = 32  # images that are read before the clock is looked at
ADAM_BYTES = 16  # of each trained parameter in float32: its value, its gradient and Adam's two moments


@dataclass(frozen=True)
class RunNeeds:
    """Needs of one run.

    n_images: that it trains on. n_seen: that its steps train on, repetitions counted. n_measured: images read to
    measure seconds_per_image, of one process. train_bytes, eval_bytes: decoded images of training, and of validation
    and test, where they are kept in memory. model_bytes: the model with its gradients and Adam's moments; what a batch
    needs besides depends on the backbone.
    """

    n_images: int
    n_seen: int
    n_measured: int
    seconds_per_image: float
    train_bytes: int
    eval_bytes: int
    model_bytes: int


def measure_needs(catalog: Catalog, params: TrainParams, seconds: float = 1.0, seed: int = 0) -> RunNeeds:
    """Measure what a run of these parameters needs on this data, for about `seconds`. Bad images do not count."""
    images = CatalogImages(catalog)
    trained = images.is_in("train")
    decoder = Decoder(catalog.store, params.resize_size, "train")
    order = np.random.default_rng(seed).permutation(np.flatnonzero(trained if trained.any() else ~trained)).tolist()
    n, began = 0, time.perf_counter()
    while n == 0 or (n < len(order) and time.perf_counter() - began < seconds):
        n += len(decoder[[images.paths[i] for i in order[n : n + BATCH]]][1])
    taken = time.perf_counter() - began
    n_evaluated = int((images.roles & ~1).astype(bool).sum())
    scratch = params.model_copy(update={"pretrained": False, "weights": None})
    model = create_model(scratch, catalog.n_classes)
    n_train = sum(len(domain.splits["train"]) for domain in catalog.domains if "train" in domain.splits)
    return RunNeeds(
        n_images=n_train,
        n_seen=params.steps * params.batch_size,
        n_measured=n,
        seconds_per_image=taken / n,
        train_bytes=n_train * 3 * params.resize_size**2,
        eval_bytes=n_evaluated * 3 * params.image_size**2,
        model_bytes=ADAM_BYTES * sum(parameter.numel() for parameter in model.parameters()),
    )
