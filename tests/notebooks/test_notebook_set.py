"""The notebooks as a set: each runs under papermill and under nbval, and exports, on one small run that all share.

A notebook that is new is tested as it is found: it gets those of VALUES that its parameters cell names.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
import yaml

from tests.helpers.notebookfiles import (
    MAX_BYTES,
    NOTEBOOKS,
    PLOTLY,
    SHEET,
    copy_with,
    outputs,
    parameter_names,
    sources,
)
from tests.helpers.taught import small_teachers, write_teachers
from udonlib import runs
from udonlib.lab.pictures import pictures
from udonlib.presets import GridParams
from udonlib.runs.grid import open_grid

WIDGET = "application/vnd.jupyter.widget-view+json"
GRID = {"rows": "no_kl", "base": "smoke", "seeds": "0", "baseline": "udon", "domains": "flags, earth"}
DISTILLED = {"preset": "smoke", "recipe": "unic", "augmentation": "none", "teacher_features": "cached"}
QUIET = {"UDON_LIVE": "0", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
START = NOTEBOOKS / "README.md"

per_notebook = pytest.mark.parametrize("path", sources(), ids=lambda path: path.stem)


@dataclass
class Executed:
    """What became of a notebook."""

    notebook: Path  # as papermill left it
    html: Path
    commands: dict[str, subprocess.CompletedProcess]

    def check(self, name: str) -> None:
        done = self.commands[name]
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def execute(path: Path, folder: Path, values: dict[str, object]) -> Executed:
    """Run a copy of a notebook by papermill, export what came out, and run the copy by nbval."""
    values = {name: value for name, value in values.items() if name in parameter_names(path)}
    executed = Executed(folder / f"{path.stem}.ipynb", folder / f"{path.stem}.html", {})
    copy = copy_with(path, folder / "copies" / path.name, **values)
    options = [text for name, value in values.items() for text in ("-p", name, str(value))]
    commands = {
        "papermill": ["papermill", path, executed.notebook, "--no-progress-bar", *options],
        "nbconvert": ["nbconvert", "--to", "html", executed.notebook],
        "nbval": ["pytest", "--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider", "-q", copy],
    }
    for name, command in commands.items():
        executed.commands[name] = subprocess.run(
            [sys.executable, "-m", *map(str, command)],
            cwd=folder,
            env=os.environ | QUIET,
            capture_output=True,
            text=True,
            timeout=600,
        )
    return executed


@pytest.fixture(scope="module")
def executions(tmp_path_factory) -> Iterator[dict[Path, Future[Executed]]]:
    """All notebooks, two at a time; a test takes the result of its own."""
    folder = tmp_path_factory.mktemp("set")
    grid = open_grid(GridParams(**GRID, outputs=str(folder / "outputs"), grid="set"))
    jobs = {row: job for row, by_seed in grid.rows.items() for jobs in by_seed.values() for job in jobs}
    for job in jobs.values():  # in this process, which is quicker than a notebook for each
        for _ in runs.open_run(job.params.model_copy(update={"n_threads": 1})).train():
            pass
    run = runs.open_run(jobs["udon"].params).path.name
    values = GRID | {"run": run, "runs": run, "preset": "smoke", "grid": "set", "outputs": str(folder / "outputs")}
    distilled = folder / "distilled.yaml"
    distilled.write_text(yaml.safe_dump(DISTILLED | {"teachers": small_teachers(write_teachers(folder))}))
    own = {"distill": {"preset": str(distilled), "run": "distilled"}, "search": {"model": run, "domains": "all"}}
    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(execute, path, folder, values | own.get(path.stem, {})) for path in sources()}
        pool.shutdown(cancel_futures=True)


@per_notebook
def test_it_runs_under_papermill_and_is_small(path, executions):
    executed = executions[path].result()
    executed.check("papermill")
    assert executed.notebook.stat().st_size < MAX_BYTES


@per_notebook
def test_it_runs_under_nbval(path, executions):
    executed = executions[path].result()
    executed.check("nbval")
    [passed] = re.findall(r"(\d+) passed", executed.commands["nbval"].stdout)
    assert int(passed) == sum(cell.cell_type == "code" for cell in nbformat.read(path, 4).cells)


@per_notebook
def test_it_shows_something_without_widgets(path, executions):
    executed = executions[path].result()
    shown = outputs(executed.notebook)
    assert [data for data in shown if WIDGET in data] == []
    assert "widgets" not in nbformat.read(executed.notebook, 4).metadata
    assert (
        sum(PLOTLY in data or re.search(f"{SHEET}|<table", data.get("text/html", "")) is not None for data in shown) > 1
    )


@per_notebook
def test_its_export_holds_every_figure(path, executions):
    executed = executions[path].result()
    executed.check("nbconvert")
    html = executed.html.read_text()
    shown = outputs(executed.notebook)
    figures = [data for data in shown if PLOTLY in data]
    assert [data[PLOTLY]["layout"].get("title") for data in figures if len(data.get("image/png", "")) < 2_500] == []
    # Stored as PNG beside the interactive figure, which nbconvert's page could not draw.
    assert len(re.findall(r'src="data:image/png;base64,[\w+/]{2500}', html)) >= len(figures)
    assert html.count(SHEET) >= sum(SHEET in data.get("text/html", "") for data in shown)
    assert len(html) < MAX_BYTES


@per_notebook
def test_each_figure_can_be_drawn_without_a_browser(path, executions):
    shown = outputs(executions[path].result().notebook)
    drawn = [pictures.draw(data[PLOTLY]) for data in shown if PLOTLY in data]
    assert [len(png) for png in drawn if not 1_500 < len(png) < 100_000] == []


# The start page


def thumbnails() -> list[str]:
    return re.findall(r'<img src="(images/[\w.-]+)"', START.read_text())


def test_the_start_page_leads_to_every_notebook_and_shows_each():
    page = START.read_text()
    linked = set(re.findall(r'(?:\]\(|href=")(\w+\.ipynb)', page))
    assert linked == {path.name for path in sources()}
    assert sorted(thumbnails()) == sorted(f"images/{path.stem}.png" for path in sources())
    assert [path.name for path in sources() if f"papermill notebooks/{path.name}" not in page] == []


def test_thumbnails_exist_and_are_small():
    sizes = {name: (NOTEBOOKS / name).stat().st_size for name in thumbnails()}
    assert {name: size for name, size in sizes.items() if not 2_000 < size < 60_000} == {}


@per_notebook
def test_it_links_to_the_start_page(path):
    first = nbformat.read(path, 4).cells[0].source
    assert "](README.md)" in first
