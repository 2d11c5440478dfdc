"""gaps.ipynb as a user runs it, on a small run of two domains and its specialists."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests import PROJECT
from tests.helpers.notebookfiles import MAX_BYTES, PLOTLY, SHEET, outputs, papermill
from udonlib import presets, runs

NOTEBOOK = PROJECT / "notebooks" / "gaps.ipynb"
DOMAINS = ["flags", "earth"]


def train(results: Path, **values: object) -> Path:
    run = runs.open_run(presets.load("smoke", outputs=str(results), n_threads=1, **values))
    for _ in run.train():
        pass
    return run.path


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Path:
    """A folder with the executed notebook and, beside it, the runs that it looked into."""
    folder = tmp_path_factory.mktemp("gaps")
    for domain in DOMAINS:
        train(folder / "results", recipe="specialist", domains=[domain], domains_per_batch=1)
    train(folder / "results", domains=DOMAINS, domains_per_batch=2)
    done = papermill(NOTEBOOK, folder / "gaps.ipynb", "-p", "outputs", str(folder / "results"))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_figure_and_gallery_shows(executed):
    shown = outputs(executed / "gaps.ipynb")
    titles = [data[PLOTLY]["layout"]["title"]["text"] for data in shown if PLOTLY in data]
    assert [title.split()[0] for title in titles] == ["Lead", "Validation:", "R@1", "Agreement", "Wrong"]
    assert "not validated" not in titles[1]
    assert sum(SHEET in data.get("text/html", "") for data in shown) == 2
    assert all(len(data["image/png"]) > 5_000 for data in shown if PLOTLY in data)
    assert (executed / "gaps.ipynb").stat().st_size < MAX_BYTES


def test_the_table_compares_student_teacher_and_specialist_as_the_run_measured_them(executed):
    html = "".join(data.get("text/html", "") for data in outputs(executed / "gaps.ipynb"))
    for column in ("student", "teacher", "specialist", "teacher − student", "specialist − student"):
        assert f">{column}<" in html
    [run] = (executed / "results" / "runs").glob("udon-*")
    measured = pd.read_csv(run / "evaluation.csv").query("index == 'merged' and domain == 'mean'")
    for embedder in ("student", "teacher"):
        value = measured.set_index("embedder")["r_at_1"][embedder]
        assert f">{value:.1f} <small>± " in html
    assert "specialist-miniuned-s0-" in html


def test_what_specialists_find_is_kept_outside_the_runs(executed):
    [file] = (executed / "results" / "gaps").glob("specialists-*.csv.gz")
    kept = pd.read_csv(file)
    assert set(kept["embedder"]) == {"specialist"}
    assert set(kept["domain"]) == set(DOMAINS)
    own = pd.concat(pd.read_csv(path) for path in (executed / "results" / "runs").glob("specialist-*/outcomes.csv.gz"))
    own = own.query("embedder == 'student' and index == 'separate'").set_index(["domain", "path"])["r_at_1"]
    separate = kept.query("index == 'separate'").set_index(["domain", "path"])["r_at_1"]
    assert (separate.sort_index() == own.sort_index()).mean() > 0.99  # bfloat16 and batches may turn a near tie


def test_exported_html_holds_every_figure(executed):
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "gaps.ipynb"]
    done = subprocess.run(command, cwd=executed, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    html = (executed / "gaps.html").read_text()
    assert len(re.findall(r'src="data:image/png;base64,[\w+/]{5000}', html)) == 5
    assert len(re.findall(r'src="data:image/webp;base64,[\w+/]{10000}', html)) == 2
    assert len(html) < MAX_BYTES


def test_a_folder_without_runs_ends_in_one_message(tmp_path, warm_papermill):
    done = warm_papermill(NOTEBOOK, tmp_path / "out.ipynb", "-p", "outputs", str(tmp_path / "nothing"))
    assert done.returncode != 0
    assert "parameter 'run': found 'latest', but there is no finished run with teachers in" in done.stderr
    assert "Traceback" not in "".join(str(data) for data in outputs(tmp_path / "out.ipynb"))
    assert not (tmp_path / "nothing").exists()
