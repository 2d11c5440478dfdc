"""train.ipynb in JupyterLab: it shows what happens, and however it is stopped it goes on from there."""

import json
from pathlib import Path

import pytest

from tests.browser.lab import Lab, Notebook, only_run
from tests.helpers.catalogs import write_uned_tree
from tests.helpers.waiting import wait_until
from udonlib.runs.folder import RunFolder

TRAINING, FILES = "train-06", "train-19"
FIGURES = ["train-08", "train-09", "train-10", "train-13", "train-15"]


def test_all_of_it_runs_and_shows(lab: Lab, tmp_path):
    values = {"preset": "smoke", "domains": "flags, earth", "domains_per_batch": 2, "n_threads": 1}
    notebook = lab.open("train.ipynb", **values, outputs=str(tmp_path))
    notebook.run_all()
    notebook.wait_idle()
    assert notebook.cell_errors() == []
    assert notebook.errors == []

    live = notebook.output(TRAINING).last  # below the panel
    assert live.locator(".udon-live").is_visible()
    assert live.locator(".udon-live polyline").count() == 5  # losses of two domains; R@1 of both and their mean
    assert "test R@1" in live.inner_text()
    assert "finished in" in live.inner_text()
    assert only_run(tmp_path).summary()["steps"] == 12

    for cell in FIGURES:
        figure = notebook.output(cell).and_(notebook.page.locator(".jp-RenderedPlotly"))
        figure.scroll_into_view_if_needed()
        size = figure.bounding_box()
        assert size["width"] > 600
        assert size["height"] > 250
        assert figure.locator("img.plot-img").evaluate("image => image.naturalWidth") > 600
        figure.hover()  # the picture gives way to the figure itself
        figure.locator(".main-svg").first.wait_for()
        assert figure.locator(".main-svg :is(.lines, .fills, .bars) path").count() > 0
    gallery = notebook.output("train-17").locator("img").first
    assert gallery.evaluate("image => image.complete && image.naturalWidth") > 300
    assert str(only_run(tmp_path).path) in notebook.text(FILES)


@pytest.fixture
def long(lab: Lab, tmp_path) -> tuple[Notebook, Path]:
    """A notebook that trains for some seconds, and where its results go."""
    data = write_uned_tree(tmp_path / "data")
    values = {"preset": "smoke", "data": str(data), "domains_per_batch": 2, "batch_size": 8, "n_threads": 1}
    values |= {"steps": 300, "checkpoint_every": 10, "log_every": 5, "eval_every": 150, "warmup_steps": 20}
    return lab.open("train.ipynb", **values, outputs=str(tmp_path / "results")), tmp_path / "results"


def wait_until_it_trains(results: Path, steps: int) -> None:
    """Wait until a run has a checkpoint and has gone at least so far."""

    def trains() -> bool:
        lines = [line for file in results.glob("runs/*/metrics.jsonl") for line in file.read_text().splitlines(True)]
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        return bool(whole) and whole[-1]["step"] >= steps and only_run(results).last.exists()

    wait_until(trains, f"step {steps}")


def test_an_interrupted_training_says_so_and_goes_on(long):
    notebook, results = long
    notebook.run_all()
    wait_until_it_trains(results, 20)
    notebook.interrupt()
    assert notebook.cell_errors() == ["KeyboardInterrupt: "]
    assert "run the same again to go on" in notebook.text(TRAINING)
    run = only_run(results)
    assert run.status == "unfinished"
    goes_on_to_the_end(notebook, run)


def test_a_training_whose_kernel_was_restarted_goes_on(long):
    notebook, results = long
    notebook.run_all()
    wait_until_it_trains(results, 20)
    notebook.restart()
    run = only_run(results)
    assert run.status == "unfinished"
    goes_on_to_the_end(notebook, run)


def test_a_notebook_whose_kernel_died_says_how_to_go_on(long):
    notebook, results = long
    notebook.run_all()
    wait_until_it_trains(results, 20)
    notebook.wait_text(TRAINING, "images/s")
    notebook.kill_kernel()
    run = only_run(results)
    assert run.status == "unfinished"
    assert "run this notebook again" in notebook.output(TRAINING).last.inner_text()
    goes_on_to_the_end(notebook, run)


def goes_on_to_the_end(notebook: Notebook, run: RunFolder) -> None:
    """Run all again: the run is resumed from its checkpoint, and finished."""
    notebook.run_all()
    notebook.wait_idle()
    assert notebook.cell_errors() == []
    starts = [note["from_step"] for note in run.provenance()]
    assert len(starts) == 2
    assert starts[0] == 0
    assert starts[1] >= 10
    assert starts[1] % 10 == 0
    assert run.summary()["steps"] == 300
    steps = [record["step"] for record in run.records("train")]
    assert steps == sorted(set(steps))  # nothing of the lost steps is left, nothing is missing
    assert set(range(5, 301, 5)) <= set(steps)
    assert "finished in" in notebook.text(TRAINING)
