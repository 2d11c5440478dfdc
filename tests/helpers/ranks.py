"""Trainings in one process and in several: `python -m tests.helpers.ranks FOLDER RANK SIZE CASE...` is one of these.

Each does its cases on the data in FOLDER/data and leaves what came out in FOLDER/<rank>.pt.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import PROJECT
from tests.helpers.training import SMALL, make, predicting, weights
from udonlib.data.catalog import load_catalog
from udonlib.models.backbones import create_backbone
from udonlib.models.embedding_model import create_model
from udonlib.models.teachers import BackboneTokens, Teacher
from udonlib.params import TrainParams
from udonlib.training.interventions import Intervention
from udonlib.training.losses import UdonObjective
from udonlib.training.parallel.class_shards import KINDS
from udonlib.training.parallel.world import ONE, Processes, World
from udonlib.training.unic import UnicObjective

# Layer norm, no attention: batch statistics would be of each process's own images; and of a key's bias, whose gradient
# is 0 but for rounding, Adam would make as much as of any other.
COMMON = {
    "backbone": "test_convnext",
    "steps": 20,
    "learning_rate": 1e-3,
    "backbone_learning_rate": 1e-4,
    "log_every": 3,
    "eval_every": 10,
    "max_grad_norm": 0.5,
}
FROZEN = {
    "first": {"backbone": "test_resnet", "pretrained": True, "image_size": 32},
    "second": {"backbone": "test_convnext", "pretrained": True, "image_size": 48, "kinds": ["class"]},
}
CASES: dict[str, dict[str, Any]] = {
    "udon": {},
    "mixed": {"domains_per_batch": 2, "augmentation_by_domain": {"emoji": "affine_colour"}},
    "joint": {"recipe": "uj_ds", "average_decay": 0.9, "frozen_steps": 5, "augmentation": "crop_flip"},
    "offline": {"domains_per_batch": 2, "offline_teachers": "x"},
    "steered": {"sampler_loss": "student", "absent_heads": "decay"},
    "predicting": {"domains_per_batch": 4},
    "unic": {"domains_per_batch": 2, "recipe": "unic", "sampler": "dataset_size", "teachers": FROZEN},
    "split": {"classification": "arcface", "margin": 0.1, "absent_heads": "decay", "average_decay": 0.9},
    "split_joint": {"recipe": "uj_rr", "domains_per_batch": 2, "label_smoothing": 0.1, "nested_dims": [4]},
    "split_offline": {"domains_per_batch": 2, "offline_teachers": "x"},
}
SPLIT = {case for case in CASES if case.startswith("split")}


WISHES = {
    "steered": {"multipliers": {"emoji": 5.0}, "evaluate": True},
    "unic": {"teachers": {"second": 0.2}, "drop_probability": 0.9},
}


class Person:
    """Wants something after six steps, once: of a domain and a validation, or of teachers; asked as `Commands` are."""

    def __init__(self, case: str) -> None:
        self.wishes = [Intervention(number=1, step=6, steers=True, **WISHES[case])]

    def take(self, step: int) -> Intervention | None:
        return self.wishes.pop() if step == 6 and self.wishes else None


def _teachers() -> dict[str, Teacher]:
    """The frozen teachers of case `unic`, with weights drawn from a seed."""
    made = {}
    for name, values in FROZEN.items():
        torch.manual_seed(len(name))
        backbone = create_backbone(values["backbone"], pretrained=False, image_size=values["image_size"])
        kinds = values.get("kinds", ["class", "patches"])
        made[name] = Teacher(name, BackboneTokens(backbone), values["image_size"], (0.5,) * 3, (0.5,) * 3, kinds)
    return made


def train(data: Path, case: str, world: World = ONE) -> dict[str, Any]:
    """Model, records (as far as they do not depend on the clock) and norms of the gradients, of one of the cases."""
    catalog = load_catalog(str(data))
    changes = COMMON | CASES[case] | {"split_classes_from": 2 if case in SPLIT else 10**9}
    objective = None
    if "offline_teachers" in changes:
        values = {**changes, "recipe": "us_rr", "offline_teachers": None, "pretrained": False, "image_size": 32}
        teacher = create_model(TrainParams(**values, seed=3, student_dim=12, resize_size=32), catalog.n_classes)
        objective = UdonObjective(TrainParams(offline_teachers="x"), dict.fromkeys(catalog.names, teacher))
    if case == "unic":
        params = TrainParams(**SMALL | changes)
        objective = UnicObjective(params, create_model(params, catalog.n_classes), _teachers(), world=world)
    if case == "predicting":
        objective = predicting(TrainParams(**SMALL | changes))
    trainer = make(catalog, objective, world, **changes)
    trainer.commands = Person(case) if case in WISHES and world.is_first else None  # type: ignore[assignment]
    step, norms = trainer.learner.step, []

    def watched(*batch: Any) -> Any:
        terms, norm = step(*batch)
        norms.append(norm.item())
        return terms, norm

    trainer.learner.step = watched  # type: ignore[method-assign]
    records = [dict(record) for record in trainer.train()]
    for record in records:
        record.pop("images_per_s", None)
        record.pop("table", None)
    state, held = trainer.state_dict(), weights(trainer)
    left = {"weights": state["model"], "kept": trainer.kept_state()}
    if not world.is_first:  # what is whole there is of no use here
        left = {
            part: {name: value for name, value in of_part.items() if not name.startswith(KINDS) or case not in SPLIT}
            for part, of_part in left.items()
        }
    n_held = {name: len(value) for name, value in held.items() if name.startswith(KINDS)}
    moments = {
        f"{number}/{name}": moment
        for number, of_one in state["optimizer"]["state"].items()
        for name, moment in of_one.items()
    }
    return left | {"records": records, "norms": norms, "n_held": n_held, "moments": moments}


def train_together(folder: Path, size: int, cases: list[str]) -> list[dict[str, Any]]:
    """What each of `size` processes leaves, by its rank; the data is in `folder`."""
    settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    command = [sys.executable, "-m", "tests.helpers.ranks", str(folder)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(size), *cases], cwd=PROJECT, env=os.environ | settings, stderr=subprocess.PIPE
        )
        for rank in range(size)
    ]
    try:
        ends = [rank.communicate(timeout=300)[1].decode() for rank in ranks]
    finally:  # one that waits for another would wait for ever
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(ends)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def main(folder: Path, rank: int, size: int, cases: list[str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{size}", rank=rank, world_size=size)
    world = Processes()
    left: dict[str, Any] = {"sums": sums(world), "words": [world.broadcast(word if rank == 0 else 0) for word in WORDS]}
    left |= {case: train(folder / "data", case, world) for case in cases}
    torch.save(left, folder / f"{rank}.pt")
    dist.destroy_process_group()


WORDS = [None, "stop", {"emoji": 2.0}, "x" * 100_000]


def sums(world: World) -> dict[str, Any]:
    """What the operations of a world make of known numbers: 7 rows of 3, and tensors that hold the rank + 1."""
    everything = torch.arange(21.0).view(7, 3)
    ours = everything[world.rows(7)].clone().requires_grad_()
    whole = world.gather(ours, 7)
    ((world.rank + 1) * whole.square()).sum().backward()
    some = world.gather(
        torch.tensor([world.rank + 1]) if world.rank < 2 else torch.empty(0, dtype=torch.long), 2, world.rank
    )
    maps = torch.full((2, 3, 4, 4), world.rank + 1.0).contiguous(memory_format=torch.channels_last)
    maps[0, 1, 2, 3] = 0
    counts, mean = torch.tensor([world.rank + 1, 5]), torch.full((2,), world.rank + 1.0)
    world.sum_([maps, counts])
    total = world.sum(torch.tensor(2.0))
    holder, passed = torch.nn.Linear(2, 1), []
    with torch.no_grad():
        holder.weight.fill_(world.rank)
    world.share(holder)
    for number in range(20 * (not world.is_first)):  # more than may be on their way
        world.send((world.rank, number))
    sent = [world.receive(rank) for _ in range(20) for rank in range(1, world.size)] if world.is_first else []
    for _ in world.in_turn(range(2)):
        passed.append(time.monotonic_ns())  # one clock for all processes
        time.sleep(0.01)
    world.average_([mean])
    return {
        "rows": [world.rows(7).start, world.rows(7).stop],
        "whole": whole.detach(),
        "gradient": ours.grad,
        "some": some,
        "maps": maps,
        "counts": counts,
        "total": total,
        "mean": mean,
        "shared": holder.weight.tolist(),
        "sent": sent,
        "passed": passed,
        "collected": world.collect(f"of {world.rank}"),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
