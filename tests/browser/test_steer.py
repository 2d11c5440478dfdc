"""The steering panel in JupyterLab: a hand on a run of this notebook, and on one that papermill trains."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import PROJECT
from tests.browser.lab import Lab, Notebook, check_stills, only_run
from tests.helpers.catalogs import write_uned_tree
from tests.helpers.waiting import wait_until
from udonlib.runs.folder import RunFolder

TRAINING, PANEL = "train-06", "steer-05"
TIMES = 10
HEIGHT = "row => row.getBoundingClientRect().top - row.closest('.udon-panel').getBoundingClientRect().top"


@pytest.fixture
def values(tmp_path) -> dict[str, object]:
    """Parameters of a run that would train for an hour, with steps of a few milliseconds."""
    data = write_uned_tree(tmp_path / "data")
    return {
        "preset": "smoke",
        "data": str(data),
        "outputs": str(tmp_path / "results"),
        "domains_per_batch": 1,
        "batch_size": 8,
        "n_threads": 1,
        "steps": 400_000,
        "update_every": 200,
        "log_every": 50,
        "eval_every": 400_000,
        "checkpoint_every": 1000,
    }


def trained(results: Path) -> RunFolder:
    """The run, once it trains."""
    wait_until(lambda: list(results.glob("runs/*/metrics.jsonl")), "a run")
    run = only_run(results)
    wait_until(lambda: run.records("train"), "its first step")
    return run


def shares(run: RunFolder) -> dict[str, float]:
    return run.records("allocation")[-1]["shares"]


def move(panel: Notebook, run: RunFolder, domain: str) -> None:
    """Move a slider to and fro, TIMES times, each time until the run's log has another allocation; print how long."""
    handle = panel.page.locator(f".udon-w-{domain} .noUi-handle")
    times = []
    for turn in range(TIMES):
        before = shares(run)[domain]
        handle.focus()
        began = time.perf_counter()
        handle.press("ArrowRight" if turn % 2 == 0 else "ArrowLeft")
        # The adaptive weights move the shares as well, but not so far.
        wait_until(lambda before=before: abs(shares(run)[domain] - before) > 0.05, "the allocation to change")
        times.append(time.perf_counter() - began)
    print(f"from hand to log, {domain}: median {statistics.median(times):.2f} s, longest {max(times):.2f} s")


def test_a_person_steers_the_run_while_it_trains(lab: Lab, values, tmp_path):
    notebook = lab.open("train.ipynb", **values)
    notebook.run_all()
    run = trained(tmp_path / "results")
    page, (first, second) = notebook.page, run.records("allocation")[0]["weights"]

    row = page.locator(f".udon-w-{first}")
    row.locator(".noUi-handle").wait_for()
    height = row.evaluate(HEIGHT)
    move(notebook, run, first)
    page.locator(".udon-status").get_by_text("after you asked").wait_for()
    assert row.evaluate(HEIGHT) == height  # what is said must not move what is about to be clicked

    page.locator(f".udon-lock-{second}").click()
    wait_until(lambda: second in run.interventions()[-1].locks, "the lock")
    pinned = run.interventions()[-1].locks[second]
    wait_until(lambda: shares(run)[second] == pytest.approx(pinned), "the share to be the lock's")
    page.locator(f".udon-reset-{second}").click()
    wait_until(lambda: not run.interventions()[-1].locks, "the lock to be taken back")

    page.locator(".udon-pause").click()
    wait_until(lambda: run.state().name == "paused", "the pause")
    page.locator(".udon-status").get_by_text("paused after step").wait_for()
    step = run.interventions()[-1].step
    page.locator(".udon-evaluate").click()
    wait_until(lambda: run.records("validation"), "the validation")
    assert run.records("validation")[-1]["step"] == step  # nothing was trained meanwhile
    page.locator(".udon-resume").click()
    wait_until(lambda: run.records("train")[-1]["step"] > step, "the training to go on")

    assert page.locator(".udon-charts polygon").count() == 2
    assert page.locator(".udon-charts path").count() > TIMES  # a mark at each intervention, in both charts

    page.locator(".udon-stop").click()
    notebook.wait_idle()
    [error] = notebook.cell_errors()
    assert "run the same again to go on" in error
    assert run.state().name == "stopped"
    assert run.last.exists()
    page.locator(".udon-status").get_by_text("run it again to go on").wait_for()
    assert notebook.errors == []


def test_a_second_notebook_steers_what_papermill_trains(lab: Lab, values, tmp_path):
    parameters = [word for name, value in values.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", "train.ipynb", str(tmp_path / "out.ipynb"), "--no-progress-bar"]
    process = subprocess.Popen(
        [*command, *parameters],
        cwd=PROJECT / "notebooks",
        env={**os.environ, "UDON_LIVE": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        run = trained(tmp_path / "results")
        panel = lab.open("steer.ipynb", outputs=values["outputs"])
        panel.run_all()
        panel.wait_idle()
        domain = next(iter(shares(run)))
        move(panel, run, domain)
        panel.page.locator(".udon-status").get_by_text("Interventions so far").wait_for()
        panel.page.locator(".udon-stop").click()
        _, said = process.communicate(timeout=600)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert "RunStoppedError: the run was stopped after step" in said
    notebook = json.loads((tmp_path / "out.ipynb").read_text())  # papermill saved what there was
    assert "as somebody asked for in its control panel" in json.dumps(notebook)
    assert panel.cell_errors() == panel.errors == []
    check_stills(lab, panel, "[class^=udon-still] svg", ".udon-stop")
