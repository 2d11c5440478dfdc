"""train.ipynb in JupyterLab: it shows what happens, and however it is stopped it goes on from there."""

import json
import time
from pathlib import Path

import pytest

from tests.browser.lab import Lab, Notebook, only_run
from tests.helpers.catalogs import write_uned_tree
from tests.helpers.waiting import wait_until
from udonlib.runs.folder import RunFolder
from udonlib.training.steering import change_control

TRAINING, FILES = "train-06", "train-19"
FIGURES = ["train-08", "train-09", "train-10", "train-13", "train-15"]


def test_all_of_it_runs_and_shows(lab: Lab, tmp_path):
    values = {"preset": "smoke", "domains": "flags, earth", "domains_per_batch": 2, "n_threads": 1}
    notebook = lab.open("train.ipynb", **values, outputs=str(tmp_path))
    notebook.run_all()
    notebook.wait_idle()
    assert notebook.cell_errors() == []
    assert notebook.errors == []

    live = notebook.output(TRAINING).first  # what stays of it when the run has ended
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
    stopped = run.interventions()[-1].step  # after its step, with a checkpoint
    goes_on_to_the_end(notebook, run, [0, stopped])


def test_a_training_outlives_its_kernel_that_is_restarted_or_killed(long):
    notebook, results = long
    notebook.run_all()
    wait_until_it_trains(results, 20)
    run = only_run(results)
    change_control(run.path, paused=True)  # else it may end before the kernel does
    notebook.restart()
    notebook.run_all()
    notebook.wait_text(TRAINING, "paused")
    notebook.kill_kernel()
    assert "run this notebook again" in notebook.text(TRAINING)
    change_control(run.path, paused=False)
    goes_on_to_the_end(notebook, run, [0])


def test_a_page_that_is_reloaded_sees_and_steers_its_run_and_gets_the_results(lab: Lab, tmp_path):
    data = write_uned_tree(tmp_path / "data")
    values = {"preset": "smoke", "data": str(data), "domains_per_batch": 1, "batch_size": 8, "n_threads": 1}
    values |= {"steps": 400_000, "checkpoint_every": 20, "log_every": 20, "eval_every": 400_000}
    results = tmp_path / "results"
    notebook = lab.open("train.ipynb", **values, outputs=str(results))
    notebook.run_all()
    wait_until_it_trains(results, 20)
    notebook.wait_text(TRAINING, "images/s")
    notebook.reload()

    page, run = notebook.page, only_run(results)
    status = page.locator(".udon-panel .udon-status")
    looked = page.locator(".udon-looked-on")
    for place in (status, looked):  # both come alive by themselves, while the cell still looks on
        place.get_by_text("step").first.wait_for()
        before = place.inner_text()
        wait_until(lambda place=place, before=before: place.inner_text() != before, "a redraw")
    page.locator(".udon-pause").click()
    wait_until(lambda: run.state().name == "paused", "the pause")

    notebook.run_all()  # its cells take over from those of the page that is gone
    began = time.monotonic()
    wait_until(lambda: looked.count() and looked.is_visible() and "paused" in looked.inner_text(), "the run to be seen")
    print(f"from run all to the run: {time.monotonic() - began:.1f} s")
    page.locator(".udon-finish").click()
    notebook.wait_idle()
    assert notebook.cell_errors() == notebook.errors == []
    assert "finished in" in notebook.text(TRAINING)
    assert notebook.output(FIGURES[-1]).and_(page.locator(".jp-RenderedPlotly")).count() == 1
    assert [note["from_step"] for note in run.provenance()] == [0]


def goes_on_to_the_end(notebook: Notebook, run: RunFolder, starts: list[int]) -> None:
    """Run all again: the run is found, or resumed from its checkpoint, and finished; `starts` are its first steps."""
    notebook.run_all()
    notebook.wait_idle()
    assert notebook.cell_errors() == []
    assert [note["from_step"] for note in run.provenance()] == starts
    assert run.summary()["steps"] == 300
    steps = [record["step"] for record in run.records("train")]
    assert steps == sorted(set(steps))  # nothing of the lost steps is left, nothing is missing
    assert set(range(5, 301, 5)) <= set(steps)
    assert "finished in" in notebook.text(TRAINING)
