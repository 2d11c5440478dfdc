"""The notebook of ablations, run as a user runs it: it trains what is not finished, and outlives a run that fails."""

import json
from pathlib import Path

import pandas as pd
import pytest

from tests import PROJECT
from tests.helpers.grids import finish, small_grid
from tests.helpers.notebookfiles import MAX_BYTES, PLOTLY, outputs, papermill, text

NOTEBOOK = PROJECT / "notebooks" / "ablations.ipynb"
BROKEN = "preset: miniuned\nbackbone: resnet17\n"  # the name is looked up when the run begins


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Path:
    """A folder with the executed notebook: two rows by two seeds, three of them trained before, and a broken row."""
    folder = tmp_path_factory.mktemp("ablations")
    (folder / "broken.yaml").write_text(BROKEN)
    rows = f"no_kl,{folder / 'broken.yaml'}"
    grid = small_grid(folder, rows=rows)
    finish(grid, "udon")
    [left] = grid.rows["no_kl"].pop(1)
    finish(grid, "no_kl")
    before = stamps(folder)
    p = grid.params
    values = {
        "rows": rows,
        "seeds": "0,1",
        "jobs": 2,
        "data": p.data,
        "base": p.base,
        "outputs": p.outputs,
        "grid": "g",
    }
    options = [text for name, value in values.items() for text in ("-p", name, str(value))]
    done = papermill(NOTEBOOK, folder / "ablations.ipynb", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert left.run.status == "finished"
    after = stamps(folder)
    assert {path: after[path] for path in before} == before  # finished runs are left as they are
    return folder


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder / "results" / "runs").rglob("*") if path.is_file()}


def html(folder: Path) -> list[str]:
    return [data["text/html"] for data in outputs(folder / "ablations.ipynb") if "text/html" in data]


def test_only_what_is_left_is_trained(executed):
    notebooks = sorted(path.name for path in (executed / "results" / "ablations" / "g").glob("*.ipynb"))
    assert notebooks == ["broken-s0.ipynb", "broken-s1.ipynb", "no_kl-s1.ipynb"]
    said = text(executed / "ablations.ipynb")
    assert "no_kl-s1 finished" in said
    assert "udon-s0 finished" not in said


def test_a_run_that_fails_is_shown_with_its_message_and_the_rest_goes_on(executed):
    said = text(executed / "ablations.ipynb")
    assert "broken-s0 failed: UserError: " in said
    assert "4 of 6 finished, 2 failed" in said
    [status] = [table for table in html(executed) if "✗ failed" in table]
    log = executed / "results" / "ablations" / "g" / "broken-s1.log"
    assert "resnet17" in status
    assert str(log) in status
    assert "resnet17" in log.read_text()


def test_results_and_differences_are_shown_with_intervals(executed):
    shown = outputs(executed / "ablations.ipynb")
    titles = [data[PLOTLY]["layout"]["title"]["text"] for data in shown if PLOTLY in data]
    assert titles == ["Difference to udon, mean of the domains, 95%", "Curves of all runs above", "Allocation"]
    tables = [table for table in html(executed) if "no_kl</td>" in table]
    assert len(tables) == 4
    assert tables[0].count("±") == 2 * 2 + 2  # two metrics of two rows, and two differences
    assert (executed / "ablations.ipynb").stat().st_size < MAX_BYTES


def test_tables_are_written_as_files(executed):
    folder = executed / "results" / "ablations" / "g"
    results = pd.read_csv(folder / "results.csv")
    assert set(results["row"]) == {"udon", "no_kl"}
    assert set(results["n_seeds"]) == {2}
    assert "| no_kl | 2 |" in (folder / "results.md").read_text()
    printed = text(executed / "ablations.ipynb").splitlines()
    assert str(folder / "results.md") in printed


def test_a_misspelt_row_ends_in_one_message_and_runs_nothing(tmp_path, warm_papermill):
    out = tmp_path / "out.ipynb"
    done = warm_papermill(NOTEBOOK, out, "-p", "rows", "no_kll", "-p", "outputs", str(tmp_path / "results"))
    assert done.returncode != 0
    assert "parameter 'rows': no row 'no_kll'; did you mean 'no_kl'?" in done.stderr
    assert "Traceback" not in json.dumps(outputs(out))
    assert not (tmp_path / "results").exists()
