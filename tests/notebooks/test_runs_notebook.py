"""runs.ipynb as a user runs it: on two small runs that were trained, on none, on one, and on damaged ones."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests import PROJECT
from tests.helpers.catalogs import write_uned_tree
from tests.helpers.notebookfiles import MAX_BYTES, PLOTLY, SHEET, outputs, papermill
from tests.helpers.runfolders import write_run
from tests.helpers.training import SMALL
from udonlib import runs
from udonlib.params import TrainParams

NOTEBOOK = PROJECT / "notebooks" / "runs.ipynb"
needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") or shutil.which("google-chrome")), reason="no Chrome or Chromium here"
)


def train(folder: Path, **values: object) -> None:
    given = {"data": str(folder / "data"), "outputs": str(folder / "results"), "n_threads": 1}
    for _ in runs.open_run(TrainParams(**SMALL | given | values)).train():
        pass


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Path:
    """A folder with the executed notebook and, beside it, the runs that it looked at; one of four is damaged."""
    folder = tmp_path_factory.mktemp("runs")
    write_uned_tree(folder / "data")
    train(folder, run="student", recipe="us_rr", sampler_loss="student")
    train(folder, run="taught")
    write_run(folder / "results", "stopped", finished=False, step=20)
    (folder / "results" / "runs" / "damaged").mkdir()
    options = ["-p", "outputs", str(folder / "results"), "-p", "run_a", "student", "-p", "run_b", "taught"]
    done = papermill(NOTEBOOK, folder / "runs.ipynb", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def html(path: Path) -> str:
    return "".join(data.get("text/html", "") for data in outputs(path))


def test_every_table_figure_and_gallery_shows(executed):
    shown = outputs(executed / "runs.ipynb")
    titles = [data[PLOTLY]["layout"]["title"]["text"] for data in shown if PLOTLY in data]
    assert [title.split()[0] for title in titles] == ["Curves", "Curves", "Allocation", "What"]
    assert sum(SHEET in data.get("text/html", "") for data in shown) == 2
    text = html(executed / "runs.ipynb")
    assert [name for name in ("student", "taught", "stopped", "damaged") if f'<tr data-run="{name}">' not in text] == []
    assert "not shown" not in text
    assert "no params.yaml: not a run" in text
    assert "ended without a word after step 20 of 40" in text
    assert f"-f {executed}/results/runs/stopped/params.yaml" in text
    assert "widgets" not in nbformat.read(executed / "runs.ipynb", 4).metadata
    assert (executed / "runs.ipynb").stat().st_size < MAX_BYTES


def test_the_table_shows_what_each_run_measured(executed):
    for name in ("student", "taught"):
        table = runs.load_run(name, str(executed / "results")).evaluation()
        row = table.query("index == 'merged' and domain == 'mean' and embedder == 'student'").iloc[0]
        line = re.search(f'<tr data-run="{name}">.*?</tr>', html(executed / "runs.ipynb")).group()
        half = (row["r_at_1_high"] - row["r_at_1_low"]) / 2
        assert f">{row['r_at_1']:.1f} <small>± {half:.1f}</small><" in line
        assert "✓ finished" in line


@needs_browser
def test_the_exported_page_sorts_and_holds_every_figure(executed):
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "runs.ipynb"]
    done = subprocess.run(command, cwd=executed, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    page = (executed / "runs.html").read_text()
    assert len(re.findall(r'src="data:image/png;base64,[\w+/]{10000}', page)) == 4
    assert len(re.findall(r'src="data:image/webp;base64,[\w+/]{1500}', page)) == 2
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        executable = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        shown = browser.new_page(viewport={"width": 1024, "height": 800})
        shown.route(re.compile("^https?:"), lambda route: route.abort())
        shown.goto((executed / "runs.html").as_uri())
        shown.locator(".udon-runs-sort-run").click()
        names = "[...document.querySelectorAll('.udon-runs tbody tr')].map((row) => row.dataset.run)"
        titles = "[...document.querySelectorAll('.udon-runs tbody th')].map((cell) => cell.dataset.v)"
        upwards = shown.evaluate(titles)
        shown.locator(".udon-runs-sort-run").click()
        assert (upwards, shown.evaluate(titles)) == (sorted(upwards), sorted(upwards, reverse=True))
        assert sorted(shown.evaluate(names)) == ["damaged", "stopped", "student", "taught"]
        assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")  # wide tables scroll by themselves
        browser.close()


def test_a_folder_without_runs_and_one_with_a_single_run_are_useful(tmp_path, warm_papermill):
    done = warm_papermill(NOTEBOOK, tmp_path / "none.ipynb", "-p", "outputs", str(tmp_path / "nothing"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "No runs yet" in html(tmp_path / "none.ipynb")
    assert html(tmp_path / "none.ipynb").count("Nothing to compare yet") == 10
    assert not (tmp_path / "nothing").exists()
    write_run(tmp_path / "results", "only")
    done = warm_papermill(NOTEBOOK, tmp_path / "one.ipynb", "-p", "outputs", str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert '<tr data-run="only">' in html(tmp_path / "one.ipynb")
    assert html(tmp_path / "one.ipynb").count("Nothing to compare yet") == 10


def test_an_unknown_run_ends_in_one_message(tmp_path, warm_papermill):
    write_run(tmp_path / "results", "only")
    options = ["-p", "outputs", str(tmp_path / "results"), "-p", "run_b", "onyl"]
    done = warm_papermill(NOTEBOOK, tmp_path / "out.ipynb", *options)
    assert done.returncode != 0
    assert re.search(r"parameter 'run_b': no run 'onyl' in .*; did you mean 'only'\?", done.stderr)
    assert "Traceback" not in "".join(str(data) for data in outputs(tmp_path / "out.ipynb"))
