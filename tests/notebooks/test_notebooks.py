"""The notebooks, run as a user runs them: by papermill, on the smoke preset, and exported."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests import PROJECT
from tests.helpers.catalogs import write_image_folder
from tests.helpers.notebookfiles import MAX_BYTES, PLOTLY, SHEET, SMOKE, outputs, papermill, text


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with the executed train.ipynb and, beside it, the results of its run."""
    folder = tmp_path_factory.mktemp("train")
    done = papermill(
        PROJECT / "notebooks" / "train.ipynb", folder / "train.ipynb", *SMOKE, "-p", "outputs", str(folder / "results")
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_train_notebook_leaves_figures_that_show_everywhere(trained):
    shown = outputs(trained / "train.ipynb")
    figures = [data for data in shown if PLOTLY in data]
    titles = [data[PLOTLY]["layout"]["title"]["text"] for data in figures]
    assert len(titles) == 5
    assert [title.split()[0] for title in titles] == ["Training", "Allocation", "Validation,", "Test,", "From"]
    assert all(len(data["image/png"]) > 5_000 for data in figures)
    assert sum(SHEET in data.get("text/html", "") for data in shown) == 1
    assert any("plot-img" in data.get("text/html", "") for data in shown)  # images no wider than JupyterLab's cells
    assert (trained / "train.ipynb").stat().st_size < MAX_BYTES


def test_the_train_notebook_reports_progress_in_few_plain_lines(trained):
    lines = text(trained / "train.ipynb").splitlines()
    assert "not started yet; to steer it: notebooks/steer.ipynb" in lines[0]
    assert re.match(r"step 0/12 \(0%\)", lines[1])
    assert re.match(
        r"step 12/12 \(100%\)  \d+ images/s  loss \d+\.\d\d  R@1 \d+\.\d .*test R@1 \d+\.\d, finished in", lines[-1]
    )
    assert len(lines) <= 12


def test_the_train_notebook_tabulates_students_teachers_and_baselines_with_intervals(trained):
    [table] = [
        data["text/html"] for data in outputs(trained / "train.ipynb") if "R@1</th>" in data.get("text/html", "")
    ]
    for column in ("student", "teacher", "features", "pixels"):
        assert f">{column}<" in table
    assert len(re.findall(r"\d+\.\d <small>± \d+\.\d<", table)) == 3 * 4 * 2


def test_the_run_is_where_the_notebook_says(trained):
    [run] = (trained / "results" / "runs").iterdir()
    assert {"params.yaml", "metrics.jsonl", "evaluation.csv", "checkpoints"} <= {path.name for path in run.iterdir()}
    assert any(str(run) in data.get("text/html", "") for data in outputs(trained / "train.ipynb"))


def test_exported_html_holds_every_figure_as_an_image(trained):
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "train.ipynb"]
    done = subprocess.run(command, cwd=trained, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    html = (trained / "train.html").read_text()
    assert len(re.findall(r'src="data:image/png;base64,[\w+/]{5000}', html)) == 5
    assert len(re.findall(r'src="data:image/webp;base64,[\w+/]{10000}', html)) == 1


def test_running_again_from_the_notebooks_folder_shows_the_finished_run(trained):
    [run] = (trained / "results" / "runs").iterdir()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    again = trained / "again.ipynb"
    done = papermill(
        Path("train.ipynb"),
        again,
        *SMOKE,
        "-p",
        "outputs",
        str(trained / "results"),
        cwd=PROJECT / "notebooks",
        UDON_LIVE="1",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    [live] = [data["text/html"] for data in outputs(again) if "udon-live" in data.get("text/html", "")]
    assert "test R@1" in live
    assert "finished in" in live
    assert sum(PLOTLY in data for data in outputs(again)) == 5
    assert again.stat().st_size < MAX_BYTES
    assert "widgets" not in nbformat.read(again, 4).metadata


def test_a_misspelt_parameter_ends_in_one_message_and_leaves_nothing(tmp_path):
    out = tmp_path / "out.ipynb"
    done = papermill(
        PROJECT / "notebooks" / "train.ipynb", out, "-p", "domainz", "all", "-p", "outputs", str(tmp_path / "o")
    )
    assert done.returncode != 0
    assert "parameter 'domainz': no such parameter; did you mean 'domains'?" in done.stderr
    assert "Traceback" not in "".join(str(data) for data in outputs(out))
    assert not (tmp_path / "o").exists()


def test_the_data_notebook_shows_somebodys_own_folder(tmp_path, warm_papermill):
    folder = write_image_folder(tmp_path / "pets")
    (folder / "cats" / "class 3" / "2.PNG").write_bytes(b"")
    out = tmp_path / "data.ipynb"
    done = warm_papermill(PROJECT / "notebooks" / "data.ipynb", out, "-p", "data", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    shown = outputs(out)
    assert sum(PLOTLY in data for data in shown) == 2
    assert sum(SHEET in data.get("text/html", "") for data in shown) == 2  # samples, augmented ones
    assert any(">cats<" in data.get("text/html", "") for data in shown)
    assert "fingerprint" in text(out)
    assert re.search(r"^Verdict: broken. images that cannot be read: 1; checked the files of all", text(out), re.M)
    assert any("cats/class 3/2.PNG: the file is empty" in data.get("text/html", "") for data in shown)
    assert out.stat().st_size < MAX_BYTES
