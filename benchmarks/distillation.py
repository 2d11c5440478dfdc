"""What learning from frozen teachers costs beside the student's own step and the teachers' own forward passes.

    python benchmarks/distillation.py --preset unic_mini --rounds 6

Three times, in turns, the median over rounds of each and of the ratios within a round: a step of the student alone on
the same images (its tokens, one squared mean, backward, optimizer), the teachers' forward passes on them, and the whole
step that asks the teachers, or looks their features up. Targets: asking / (student + teachers) <= 1.1, and
looking up / student <= 1.1. Teachers' packages are those of `make distill`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from udonlib import presets, runs
from udonlib.data.images import ImageReader
from udonlib.models.processors import dtype_of
from udonlib.models.teachers import Teacher
from udonlib.runs.teachers import plain
from udonlib.training.learner import Learner
from udonlib.training.losses import Batch, Objective
from udonlib.training.unic import UnicObjective


class Alone(Objective):
    """What the student's step takes without anybody to learn from."""

    def terms(self, model, batch):
        [end] = model.tokens(batch.images, (), True, batch.precision, batch.frozen)
        loss = end["class"].square().mean()
        return {domain: {"total": loss} for domain, _ in batch.parts}


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="unic_mini")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3, help="steps of each kind in a round")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    params = presets.load(options.preset)
    run = runs.open_run(params)
    reader = ImageReader(run.catalog, params.resize_size, "train")
    domain = run.catalog.domains[0]
    indices = np.arange(params.batch_size) % len(domain.splits["train"])
    images = plain(reader.read(domain.name, "train", indices), params.image_size)
    parts = [(domain.name, torch.from_numpy(domain.train_labels[indices]))]
    teachers: dict[str, Teacher] = run.frozen_teachers()

    def learner(objective: Callable[[torch.nn.Module], Objective]) -> Learner:
        model = run.create_model().to(memory_format=torch.channels_last)
        return Learner(model, params, objective(model))

    precision = dtype_of(params.precision, images.device)  # training asks teachers in its own
    model = run.create_model()
    with torch.no_grad():
        [end] = model.tokens(images[:1], end=True)
    n_positions = end["patches"].shape[1]
    known = {name: teacher(images, n_positions, precision) for name, teacher in teachers.items()}

    def look_up(batch: Batch):
        return known

    students = {
        "student alone": learner(lambda model: Alone()),
        "asking": learner(lambda model: UnicObjective(params, model, teachers)),
        "looking up": learner(lambda model: UnicObjective(params, model, teachers, look_up)),
    }

    def step(name: str) -> None:
        for _ in range(options.steps):
            students[name].step(params.frozen_steps, images, parts, [(domain.name, indices)])

    def ask() -> None:
        for _ in range(options.steps):
            for teacher in teachers.values():
                teacher(images, n_positions, precision)

    works = {name: (lambda name=name: step(name)) for name in students} | {"teachers": ask}
    for work in works.values():  # the first use of all code
        work()
    rounds = [{name: seconds(work) / options.steps for name, work in works.items()} for _ in range(options.rounds)]
    for name in works:
        print(f"{name:14} {1000 * statistics.median(r[name] for r in rounds):7.1f} ms a step of {params.batch_size}")
    asked = statistics.median(r["asking"] / (r["student alone"] + r["teachers"]) for r in rounds)
    looked = statistics.median(r["looking up"] / r["student alone"] for r in rounds)
    print(f"asking / (student + teachers) {asked:.3f}   looking up / student {looked:.3f}")


if __name__ == "__main__":
    main()
