"""sampler.ipynb as a user runs it, on a small trained run and without any."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests import PROJECT
from tests.helpers.notebookfiles import MAX_BYTES, PLOTLY, outputs, papermill
from udonlib import presets, runs

NOTEBOOK = PROJECT / "notebooks" / "sampler.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Path:
    """A folder with the executed notebook and, beside it, the run that its curves were fitted to."""
    folder = tmp_path_factory.mktemp("sampler")
    values = {"domains": ["flags", "earth"], "domains_per_batch": 2, "outputs": str(folder / "results"), "n_threads": 1}
    for _ in runs.open_run(presets.load("smoke", **values)).train():
        pass
    done = papermill(NOTEBOOK, folder / "sampler.ipynb", "-p", "outputs", str(folder / "results"))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def titles(path: Path) -> list[str]:
    return [data[PLOTLY]["layout"]["title"]["text"] for data in outputs(path) if PLOTLY in data]


def test_a_run_is_fitted_simulated_and_checked(executed):
    run = next((executed / "results" / "runs").iterdir()).name
    found = titles(executed / "sampler.ipynb")
    assert found[:3] == [
        "Learning curves, fitted and measured",
        "Allocation by strategy, simulated",
        "What each domain gets, simulated",
    ]
    assert re.match(rf"{run}: simulated from its own losses.*mean absolute difference \d+\.\d\d percentage", found[3])
    assert found[4] == "Allocations of finished runs"
    html = "".join(data.get("text/html", "") for data in outputs(executed / "sampler.ipynb"))
    assert "fitted to the teacher loss of" in html
    assert "fewest passes: " in html


def test_the_figures_show_everywhere_and_nothing_is_stored_of_widgets(executed):
    shown = outputs(executed / "sampler.ipynb")
    if shutil.which("chromium") or shutil.which("google-chrome"):
        assert all(len(data["image/png"]) > 10_000 for data in shown if PLOTLY in data)
        command = [sys.executable, "-m", "nbconvert", "--to", "html", "sampler.ipynb"]
        done = subprocess.run(command, cwd=executed, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        html = (executed / "sampler.html").read_text()
        assert len(re.findall(r'src="data:image/png;base64,[\w+/]{10000}', html)) == 5
    assert (executed / "sampler.ipynb").stat().st_size < MAX_BYTES
    assert "widgets" not in nbformat.read(executed / "sampler.ipynb", 4).metadata
    assert not any("widget-view" in kind for data in shown for kind in data)


def test_without_a_run_curves_are_drawn_and_changed_by_parameters(tmp_path, warm_papermill):
    values = ["-p", "strategies", "dynamic, fixed", "-p", "update_every", "20", "-y", "half_images: {fonts: 9000}"]
    done = warm_papermill(NOTEBOOK, tmp_path / "out.ipynb", "-p", "outputs", str(tmp_path / "results"), *values)
    assert done.returncode == 0, done.stderr[-3000:]
    found = titles(tmp_path / "out.ipynb")
    assert [title.split(",")[0] for title in found][:2] == ["Learning curves", "Allocation by strategy"]
    assert found[3:] == ["Simulated against recorded", "Allocations of finished runs"]
    html = "".join(data.get("text/html", "") for data in outputs(tmp_path / "out.ipynb"))
    assert "nothing was measured; changed by parameters: fonts" in html
    assert "updated every 20 steps" in html
    assert not (tmp_path / "results").exists()


def test_a_misspelt_strategy_ends_in_one_message(tmp_path, warm_papermill):
    done = warm_papermill(NOTEBOOK, tmp_path / "out.ipynb", "-p", "strategies", "dynamic,roundrobin")
    assert done.returncode != 0
    assert "parameter 'strategies': found 'dynamic,roundrobin'" in done.stderr
    assert "Traceback" not in "".join(str(data) for data in outputs(tmp_path / "out.ipynb"))
