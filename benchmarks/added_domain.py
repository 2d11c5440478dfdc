"""Add a domain to a trained model, against training all domains together for as many steps.

    python benchmarks/added_domain.py [DOMAIN [SEED]]

Three runs of the preset `miniuned`, smaller: all domains but one, for N steps; then all, for N more, from its weights
(`start`); and all together, for 2 N steps. Printed are R@1 of the added domain, and what the others lost.
"""

import sys
import tempfile
import time

from udonlib import presets, runs
from udonlib.data.catalog import load_catalog
from udonlib.runs.run import Run

ADDED = sys.argv[1] if len(sys.argv) > 1 else "flags"
SEED = int(sys.argv[2]) if len(sys.argv) > 2 else 0
STEPS = 150
SETTINGS = {"frozen_steps": 0, "eval_every": 50, "update_every": 50, "checkpoint_every": 1000, "n_threads": 1}


def trained(outputs: str, name: str, steps: int, **values: object) -> Run:
    began = time.perf_counter()
    settings = SETTINGS | {"run": name, "steps": steps, "outputs": outputs, "seed": SEED}
    run = runs.open_run(presets.load("miniuned_imagenet", **settings | values))
    for _ in run.train():
        pass
    print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    return run


with tempfile.TemporaryDirectory() as folder:
    others = [name for name in load_catalog().names if name != ADDED]
    trained(folder, "before", STEPS, domains=others)
    added = trained(folder, "added", STEPS, start="before")
    together = trained(folder, "together", 2 * STEPS)
    table = added.since_start()
    rows = together.evaluation().query("embedder == 'student' and index == 'merged'").set_index("domain")
    table["together"] = rows["r_at_1"].reindex(table["domain"]).to_numpy()
    others_mean = rows.loc[others, "r_at_1"].mean()
    table.loc[table["domain"] == "mean", "together"] = others_mean
    print(table.round(1).to_string(index=False))
