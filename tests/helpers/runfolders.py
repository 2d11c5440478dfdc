"""Folders of runs as training leaves them, written by hand: any figures, any state."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from udonlib.params import TrainParams

DOMAINS = ("emoji", "flags")
SUMMARY = {
    "steps": 40,
    "train_seconds": 65.0,
    "images_per_s": 1234.0,
    "n_parameters_trained": 2_153_696,
    "best_validation_r_at_1": 60.0,
}


def write_run(
    outputs: Path,
    name: str,
    right: dict[str, Sequence[float]] | None = None,
    began: str = "2026-01-02T03:04:05+0000",
    fingerprint: str = "f" * 64,
    finished: bool = True,
    step: int = 40,
    **values: object,
) -> Path:
    """The files of a run without models.

    Args:
        outputs: folder of results. name: of the run.
        right: by domain the R@1 of each test query, whose mMP@5 is half of it; queries are "<domain>/<number>".
        finished: with summary and evaluation.
        step: of the last record.
        values: parameters.
    """
    right = {domain: [1.0, 0.0, 1.0, 0.0] for domain in DOMAINS} if right is None else right
    folder = outputs / "runs" / name
    folder.mkdir(parents=True)
    given = {"steps": 40, "run": name, "domains": list(right), "data": "somewhere/pictures", **values}
    (folder / "params.yaml").write_text(yaml.safe_dump(TrainParams(**given).model_dump(mode="json")))
    start = {"time": began, "commit": "abcdef0123456", "data": "pictures", "data_fingerprint": fingerprint}
    start |= {"device": "cpu", "threads": 1, "packages": {"torch": "2.13"}, "from_step": 0}
    (folder / "provenance.json").write_text(json.dumps([start]))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(list(right), step)))
    if finished:
        write_results(folder, right)
    return folder


def records(domains: Sequence[str], step: int) -> list[dict]:
    """Two windows, a record of losses in each, and a validation."""
    share = 1 / len(domains)
    found = []
    for at in (0, step // 2):
        found.append({"kind": "allocation", "step": at, "weights": dict.fromkeys(domains, share)})
        found[-1] |= {"images_seen": dict.fromkeys(domains, 8 * at), "shares": dict.fromkeys(domains, share)}
        end = at + step // 2
        losses = {name: {"ce_student": 4.0 - at / step + place, "total": 8.0} for place, name in enumerate(domains)}
        train = {"kind": "train", "step": end, "losses": losses, "images_per_s": 1000.0}
        found.append(train | {"images_seen": {name: 10 * end * (place + 1) for place, name in enumerate(domains)}})
    rows = [
        {"embedder": "student", "domain": name, "index": "merged", "r_at_1": 55.5, "mmp_at_5": 33.3}
        for name in (*domains, "mean")
    ]
    return [*found, {"kind": "validation", "step": step, "r_at_1": 55.5, "best": True, "table": rows}]


def write_results(folder: Path, right: dict[str, Sequence[float]]) -> None:
    """What the test leaves: summary, table, outcomes and neighbours."""
    tables = []
    for domain, values in right.items():
        table = pd.DataFrame({"path": [f"{domain}/{i}" for i in range(len(values))], "r_at_1": values})
        table = table.assign(domain=domain, embedder="student", n_positives=2, mmp_at_5=table["r_at_1"] / 2)
        tables += [table.assign(index="merged"), table.assign(index="separate", r_at_1=1.0)]
    outcomes = pd.concat(tables)
    outcomes.to_csv(folder / "outcomes.csv.gz", index=False)
    means = outcomes.groupby(["embedder", "domain", "index"], sort=False)[["r_at_1", "mmp_at_5"]].mean().reset_index()
    mean = means.groupby(["embedder", "index"])[["r_at_1", "mmp_at_5"]].mean().reset_index().assign(domain="mean")
    table = pd.concat([means, mean])
    for metric in ("r_at_1", "mmp_at_5"):
        table[metric] *= 100
        table[f"{metric}_low"], table[f"{metric}_high"] = table[metric] - 1.5, table[metric] + 2.5
    table.to_csv(folder / "evaluation.csv", index=False)
    arrays = {}
    for domain, values in right.items():
        hit = np.zeros((len(values), 3), bool)
        hit[:, 0] = np.asarray(values) > 0
        arrays |= {f"student/{domain}/query_paths": np.array([f"{domain}/{i}" for i in range(len(values))])}
        arrays |= {f"student/{domain}/position": np.tile(np.arange(3, dtype=np.int32), (len(values), 1))}
        arrays |= {f"student/{domain}/similarity": np.ones((len(values), 3), np.float32), f"student/{domain}/hit": hit}
    np.savez(folder / "neighbours.npz", **arrays)
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
