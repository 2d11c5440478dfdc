"""A run whose sampler was recorded, written by hand."""

import json
import os
from pathlib import Path

import yaml

from tests.helpers.catalogs import write_uned_tree
from udonlib.lab.explore import sampler_study
from udonlib.lab.explore.simulation import LearningCurve, Setting, simulate
from udonlib.params import TrainParams
from udonlib.presets import SamplerParams
from udonlib.training.interventions import Intervention

DOMAINS = ("emoji", "flags", "logos")


CURVES = {
    "emoji": LearningCurve(6.0, 0.5, 9000.0),
    "flags": LearningCurve(4.0, 0.1, 100.0, 2.0),
    "logos": LearningCurve(5.0, 0.2, 600.0, 0.5),
}


def write_sampled_run(
    outputs: Path,
    name: str,
    strategy: str = "dynamic",
    domains: tuple[str, ...] = DOMAINS,
    age: int = 0,
    finished: bool = True,
    terms: tuple[str, ...] = ("ce_teacher",),
    **values: object,
) -> Path:
    """The files of a run whose losses are those of CURVES; other terms of the loss are 100 more."""
    values = {"steps": 300, "batch_size": 24, "domains_per_batch": 3, "update_every": 30, **values}
    if not (outputs.parent / "data").exists():
        write_uned_tree(outputs.parent / "data", domains=DOMAINS)
    data = str(outputs.parent / "data")
    params = TrainParams(
        data=data, domains=list(domains), run=name, outputs=str(outputs), sampler=strategy, eval_every=300, **values
    )
    setting = Setting(
        dict.fromkeys(domains, 12),
        steps=params.steps,
        batch_size=params.batch_size,
        domains_per_batch=params.domains_per_batch,
        update_every=params.update_every,
        smoothing=params.sampler_smoothing,
        seed=params.seed,
    )
    found = simulate(CURVES, setting, strategy)
    records = []
    for w, step in enumerate(found.starts.tolist()):
        before, after = found.seen[w], found.seen[w + 1]
        seen = dict(zip(found.names, before.tolist(), strict=True))
        weights = dict(zip(found.names, found.shares[w].tolist(), strict=True))
        records.append({"kind": "allocation", "step": step, "weights": weights, "images_seen": seen})
        losses = {}
        for d, domain in enumerate(found.names):
            if after[d] > before[d]:
                mean = CURVES[domain].mean(float(before[d]), float(after[d]))
                losses[domain] = dict.fromkeys(terms, mean) | {"total": mean + 100}
                losses[domain].setdefault("ce_student", mean + 100)
        seen = dict(zip(found.names, after.tolist(), strict=True))
        step = min(step + params.update_every, params.steps)
        records.append({"kind": "train", "step": step, "losses": losses, "images_seen": seen, "images_per_s": 1.0})
    folder = outputs / "runs" / name
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if finished:
        (folder / "summary.json").write_text(json.dumps({"steps": params.steps}))
        os.utime(folder / "summary.json", (1_000_000 - age, 1_000_000 - age))
    return folder


def opened(outputs: Path, **values: object) -> sampler_study.Explored:
    return sampler_study.open_sampler(SamplerParams(outputs=str(outputs), **values))


def steer(folder: Path, step: int, shares: dict[str, float], **done: object) -> None:
    """Let a person have changed the allocation of a written run, and paused it one step later."""
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if json.loads(line)["step"] >= step)
    before = next(json.loads(line) for line in reversed(lines[:at]) if json.loads(line)["kind"] == "allocation")
    lines.insert(at, json.dumps(before | {"step": step, "shares": shares}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    entries = [
        Intervention(number=1, step=step, steers=True, **done),
        Intervention(number=2, step=step + 1, paused=True),
    ]
    (folder / "steering.jsonl").write_text("".join(entry.model_dump_json() + "\n" for entry in entries))
