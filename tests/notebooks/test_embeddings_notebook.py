"""embeddings.ipynb as a user runs it, on a small run of two domains."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests import PROJECT
from tests.helpers.embeddings import N_QUERIES, train
from tests.helpers.notebookfiles import MAX_BYTES, PLOTLY, SHEET, outputs, papermill, text

NOTEBOOK = PROJECT / "notebooks" / "embeddings.ipynb"
N_POINTS = N_QUERIES + 27


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Path:
    """A folder with the executed notebook and, beside it, the run that it shows."""
    folder = tmp_path_factory.mktemp("embeddings")
    results = train(folder)
    done = papermill(NOTEBOOK, folder / "embeddings.ipynb", "-p", "outputs", str(results), "-p", "n_hubs", "3")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_figure_and_sheet_shows(executed):
    shown = outputs(executed / "embeddings.ipynb")
    titles = [data[PLOTLY]["layout"]["title"]["text"] for data in shown if PLOTLY in data]
    assert titles == [
        "Test images by domain",
        "Test images by hit or miss of the student",
        "Wrong first neighbours, percent of a domain's queries",
    ]
    assert sum(SHEET in data.get("text/html", "") for data in shown) == 1
    assert all(len(data["image/png"]) > 5_000 for data in shown if PLOTLY in data)
    assert (executed / "embeddings.ipynb").stat().st_size < MAX_BYTES


def test_without_a_front_end_no_widget_is_stored(executed):
    assert "widgets" not in nbformat.read(executed / "embeddings.ipynb", 4).metadata
    assert not [data for data in outputs(executed / "embeddings.ipynb") if any("widget-view" in kind for kind in data)]


def test_what_was_computed_is_kept_beside_the_runs_and_taken_the_next_time(executed, warm_papermill):
    assert f"{N_POINTS} images embedded in" in text(executed / "embeddings.ipynb")
    [file] = (executed / "results" / "cache").glob("features-*")
    before = file.stat().st_mtime_ns
    again = executed / "again.ipynb"
    options = ["-p", "projection", "umap", "-p", "embedder", "teacher", "-p", "domains", "flags, emoji"]
    done = warm_papermill(NOTEBOOK, again, "-p", "outputs", str(executed / "results"), *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{N_POINTS} images embedded before" in text(again)
    assert "computing UMAP of student and teacher" in text(again)
    assert file.stat().st_mtime_ns == before
    kinds = sorted(path.name.split("-")[0] for path in file.parent.iterdir())
    assert kinds == ["features", *["quick"] * 3, *["umap"] * 3]  # of the student, and of each domain's teacher
    titles = [data[PLOTLY]["layout"]["title"]["text"] for data in outputs(again) if PLOTLY in data]
    assert titles[1] == "Test images by hit or miss of the teacher"


def test_exported_html_holds_every_figure(executed):
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "embeddings.ipynb"]
    done = subprocess.run(command, cwd=executed, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    html = (executed / "embeddings.html").read_text()
    assert len(re.findall(r'src="data:image/png;base64,[\w+/]{5000}', html)) == 3
    assert len(re.findall(r'src="data:image/webp;base64,[\w+/]{10000}', html)) == 1
    assert len(html) < MAX_BYTES


def test_a_folder_without_runs_ends_in_one_message(tmp_path, warm_papermill):
    done = warm_papermill(NOTEBOOK, tmp_path / "out.ipynb", "-p", "outputs", str(tmp_path / "nothing"))
    assert done.returncode != 0
    assert "parameter 'run': found 'latest', but there is no finished run in" in done.stderr
    assert "Traceback" not in "".join(str(data) for data in outputs(tmp_path / "out.ipynb"))
    assert not (tmp_path / "nothing").exists()
