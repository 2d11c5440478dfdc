"""Training speed: the real data pipeline against a cached batch, and UDON's step against the plainest one.

    python benchmarks/training.py

1. Images/s of training the embedded benchmark's preset with everything a run does (order, cache, augmentation), and of
   the same step on one batch that is ready: their ratio is what the pipeline costs. Beside it GFLOP/s (three forward
   passes an image), and their share of what a large product of matrices in float32 reaches in the same minute.
2. Seconds of a step of UDON (student, teacher, distillation) and of one with a 64-d head and one classification loss,
   on the paper's backbone, ViT-B/16 at 224 pixels.

Each pair is measured in turns, so that a drift of the machine's speed cancels; medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from udonlib import presets
from udonlib.data.catalog import load_catalog
from udonlib.data.images import ImageReader, WindowLoader
from udonlib.models.backbones import flops_per_image
from udonlib.models.embedding_model import create_model
from udonlib.models.processors import multiplies_bfloat16
from udonlib.params import TrainParams
from udonlib.training.learner import Learner
from udonlib.training.threads import use_threads
from udonlib.training.trainer import Trainer


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak(n: int = 2048) -> float:
    """GFLOP/s of a product of two n x n matrices in float32."""
    a, b = torch.rand(n, n), torch.rand(n, n)
    _ = a @ b
    return 2 * n**3 / 1e9 / min(seconds(lambda: a @ b) for _ in range(5))


def pipeline(precision: str, n_rounds: int, n_steps: int) -> None:
    # With images of their final size from the first step on: the costliest ones.
    params = presets.load("miniuned", precision=precision, start_image_size=None, growing_steps=0)
    catalog = load_catalog(params.data)

    def trainer() -> Trainer:
        reader = ImageReader(catalog, params.resize_size, "train")
        for domain in catalog.domains:  # a run decodes every image once, in its first pass
            reader.read(domain.name, "train", torch.arange(len(domain.train_labels)).numpy())
        return Trainer(
            create_model(params, catalog.n_classes),
            catalog,
            params,
            WindowLoader(reader),
            lambda model: None,
        )

    real, cached = trainer(), trainer()
    loader = WindowLoader(real._loader.reader)
    plan = real.plan_window()
    images, slots = next(iter(loader(plan[:1])))
    batch = images.float()
    parts = [(name, real._labels[name][torch.from_numpy(indices)]) for name, indices in slots]

    def train() -> None:
        for planned_images, planned_slots in loader(plan[:n_steps]):
            real._train_step(planned_images, planned_slots, planned_slots)
        real._flush()

    def step() -> None:
        for number in range(n_steps):
            cached.learner.step(number, batch, parts)

    train(), step()
    gflops = 3 * flops_per_image(cached.model.backbone, params.image_size) / 1e9
    rounds = [(seconds(train), seconds(step), peak()) for _ in range(n_rounds)]
    pairs = [(a, b) for a, b, _ in rounds]
    best = statistics.median(c for *_, c in rounds)
    speeds = [n_steps * params.batch_size / statistics.median(times) for times in zip(*pairs, strict=True)]
    ratio = statistics.median(b / a for a, b in pairs)
    print(
        f"miniuned preset, {precision}: {speeds[0]:.0f} images/s with the pipeline, {speeds[1]:.0f} on a cached batch: "
        f"{ratio:.3f}. {speeds[0] * gflops:.0f} GFLOP/s of {best:.0f}: {speeds[0] * gflops / best:.0%}"
    )


def heads(n_rounds: int, batch_size: int) -> None:
    catalog = load_catalog("miniuned", "emoji")
    images = torch.randint(0, 256, (batch_size, 3, 224, 224)).float()
    parts = [("emoji", torch.arange(batch_size) % catalog.domains[0].n_classes)]
    learners = {}
    for recipe in ("udon", "us_rr"):
        extra = {"sampler_loss": "student"} if recipe == "us_rr" else {}
        params = TrainParams(recipe=recipe, pretrained=False, frozen_steps=0, batch_size=batch_size, **extra)
        learners[recipe] = Learner(create_model(params, catalog.n_classes), params)
    times: dict[str, list[float]] = {recipe: [] for recipe in learners}
    for number in range(n_rounds + 1):
        for recipe, learner in learners.items():
            spent = seconds(lambda learner=learner, number=number: learner.step(number, images, parts))
            if number:
                times[recipe].append(spent)
    ratio = statistics.median(a / b for a, b in zip(times["udon"], times["us_rr"], strict=True))
    medians = {recipe: statistics.median(values) for recipe, values in times.items()}
    print(
        f"ViT-B/16, {batch_size} images: UDON {medians['udon']:.2f} s a step, one head and one loss "
        f"{medians['us_rr']:.2f} s: {ratio:.3f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="steps per round of the pipeline")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step of ViT-B/16")
    arguments = parser.parse_args()
    use_threads()
    pipeline("float32", arguments.rounds, arguments.steps)
    if multiplies_bfloat16(torch.device("cpu")):
        pipeline("bfloat16", arguments.rounds, arguments.steps)
    heads(arguments.rounds, arguments.batch_size)
