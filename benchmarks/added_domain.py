"""Add a domain to a trained model, against training all domains together for as many steps.

    python benchmarks/added_domain.py [DOMAIN [SEED]]

Short runs of the preset `miniuned_imagenet`: all domains but one, for N steps; then all, for N more, from its weights
(`start`), once as the dynamic sampler allocates them, once with a fixed share of 40% for the new domain; and all
together, for 2 N steps. Printed is R@1 before, after and together, of the added domain and of the others.
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
SHARE = 0.4  # of the steps, for the new domain
SETTINGS = {"frozen_steps": 0, "eval_every": STEPS, "update_every": 50, "checkpoint_every": 1000, "n_threads": 1}


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
    shares = {name: (1 - SHARE) / len(others) for name in others} | {ADDED: SHARE}
    added = {
        "added, allocated by loss": trained(folder, "added", STEPS, start="before"),
        f"added, {SHARE:.0%} of the steps": trained(
            folder, "shared", STEPS, start="before", sampler="fixed", fixed_shares=shares
        ),
    }
    together = trained(folder, "together", 2 * STEPS)
    rows = together.evaluation().query("embedder == 'student' and index == 'merged'").set_index("domain")
    for title, run in added.items():
        table = run.since_start()
        table["together"] = [
            rows.loc[others, "r_at_1"].mean() if name == "mean" else rows.loc[name, "r_at_1"]
            for name in table["domain"]
        ]
        print(f"{title}\n{table.round(1).to_string(index=False)}", flush=True)
