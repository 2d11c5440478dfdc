"""Runs that were searched, written by hand, and outcomes of queries that are right and wrong."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from udonlib.params import TrainParams

DOMAINS = ("emoji", "flags")


def write_run(
    outputs: Path,
    name: str,
    domains: Sequence[str] = DOMAINS,
    embedders: Sequence[str] = ("student", "teacher"),
    age: int = 0,
    **values: object,
) -> Path:
    """The files of a finished run on the tree beside `outputs`; each query finds itself a place among emoji."""
    data = str(outputs.parent / "data")
    values = {"precision": "float32", **values}  # a run keeps what "auto" chose
    params = TrainParams(data=data, domains=list(domains), run=name, outputs=str(outputs), **values)
    folder = outputs / "runs" / name
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    tables, arrays = [], {}
    for embedder in embedders:
        for domain in domains:
            # The test classes of the tree are 5, 6 and 7, of 3, 2 and 2 images.
            paths = [f"{domain}/{label:04d}_{i:03d}.png" for label, n in ((5, 3), (6, 2), (7, 2)) for i in range(n)]
            table = pd.DataFrame({"path": paths, "n_positives": 1, "r_at_1": 1.0, "mmp_at_5": 0.5})
            table = table.assign(embedder=embedder, domain=domain)
            tables += [table.assign(index="merged"), table.assign(index="separate")]
            arrays[f"{embedder}/{domain}/query_paths"] = np.array(paths)
            arrays[f"{embedder}/{domain}/position"] = np.tile(np.arange(3, dtype=np.int32), (len(paths), 1))
            arrays[f"{embedder}/{domain}/similarity"] = np.ones((len(paths), 3), np.float32)
            arrays[f"{embedder}/{domain}/hit"] = np.ones((len(paths), 3), bool)
    outcomes = pd.concat(tables)
    outcomes.to_csv(folder / "outcomes.csv.gz", index=False)
    means = outcomes.groupby(["embedder", "domain", "index"], sort=False)["r_at_1"].mean().reset_index()
    means.assign(n_index=14).to_csv(folder / "evaluation.csv", index=False)
    np.savez(folder / "neighbours.npz", **arrays)
    (folder / "summary.json").write_text("{}")
    os.utime(folder / "summary.json", (1_000_000 - age, 1_000_000 - age))
    return folder


A = {"emoji": [1, 1, 0, 0, 1, 0], "flags": [1, 0, 0, 0]}

B = {"emoji": [1, 0, 1, 1, 1, 1], "flags": [1, 0, 1, 0]}


def outcomes(right: dict[str, dict[str, list[int]]], counts: dict[str, list[int]] | None = None) -> pd.DataFrame:
    """Outcomes in the merged index from embedder -> domain -> right or not; elsewhere all are wrong."""
    tables = []
    for embedder, domains in right.items():
        for domain, values in domains.items():
            n_positives = (counts or {}).get(domain, [3] * len(values))
            paths = [f"{domain}/q{i}" for i in range(len(values))]
            table = pd.DataFrame({"path": paths, "n_positives": n_positives, "r_at_1": np.array(values, float)})
            table = table.assign(embedder=embedder, domain=domain, mmp_at_5=table["r_at_1"] / 2)
            tables += [table.assign(index="merged"), table.assign(index="separate", r_at_1=0.0)]
    return pd.concat(tables, ignore_index=True)


def write_specialists(outputs: Path, seed: int = 0, domains: Sequence[str] = DOMAINS, age: int = 0) -> None:
    for domain in domains:
        name = f"specialist-{domain}-s{seed}-{age}"
        write_run(outputs, name, [domain], ["student"], age, recipe="specialist", seed=seed)


def plain(outputs: Path, name: str = "plain", **values: object) -> Path:
    return write_run(outputs, name, embedders=["student"], recipe="us_rr", sampler_loss="student", **values)
