"""What the steering panel costs: images trained per second in a notebook's kernel with the panel, and without.

    python benchmarks/panel.py --rounds 6 --steps 120

A kernel trains stretches of one run's parameters, with a panel that draws and sends its messages as in JupyterLab, and
without, in turns; what counts is the ratio within a round. The target is a cost below 2%.
"""

import argparse
import os
import tempfile

import nbformat
from nbclient import NotebookClient

CODE = """
import statistics, time
from udonlib import presets, runs
from udonlib.lab.views import panel as panels

def pace(name, with_panel):
    values = dict(outputs=OUTPUTS, run=name, n_threads=THREADS, log_every=5, update_every=20, eval_every=10**6)
    run = runs.open_run(presets.load("miniuned", **values))
    panel, began, first = None, None, None
    records = run.train()
    for record in records:
        if record["kind"] == "start" and with_panel:
            panel = panels.steer(run)
        if record["kind"] == "train" and record["step"] >= 20 and began is None:
            began, first = time.perf_counter(), record["step"]
        if record["kind"] == "train" and record["step"] >= 20 + STEPS:
            seconds = time.perf_counter() - began
            break
    records.close()
    if panel is not None:
        panel.close()
    return (record["step"] - first) * run.params.batch_size / seconds

ratios = []
for turn in range(ROUNDS):
    order = (False, True) if turn % 2 == 0 else (True, False)
    paces = {with_panel: pace(f"round{turn}-{with_panel}", with_panel) for with_panel in order}
    ratios.append(paces[True] / paces[False])
    print(f"without {paces[False]:7.1f} images/s   with the panel {paces[True]:7.1f}   ratio {ratios[-1]:.3f}")
print(f"median ratio {statistics.median(ratios):.3f}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    os.environ |= {"UDON_LIVE": "1", "JPY_SESSION_NAME": "benchmark.ipynb"}
    with tempfile.TemporaryDirectory() as outputs:
        values = {"OUTPUTS": outputs, "ROUNDS": options.rounds, "STEPS": options.steps, "THREADS": options.threads}
        given = "\n".join(f"{name} = {value!r}" for name, value in values.items())
        cell = nbformat.v4.new_code_cell(f"{given}\n{CODE}")
        NotebookClient(nbformat.v4.new_notebook(cells=[cell]), timeout=1800, kernel_name="python3").execute()
    print("".join(output["text"] for output in cell.outputs if output.output_type == "stream"), end="")


if __name__ == "__main__":
    main()
