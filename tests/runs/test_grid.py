"""A grid makes the runs that its rows say, each once, in an order that works, and survives those that fail."""

import json
import sys

import pytest
import yaml

from tests import PROJECT
from tests.helpers.grids import finish, small_grid, write_base
from tests.helpers.training import SMALL
from tests.helpers.waiting import wait_until
from udonlib import presets
from udonlib.errors import ParameterError, UserError
from udonlib.presets import GridParams
from udonlib.runs.grid import ABLATIONS, TABLE, folder_of, open_grid


def labels(grid):
    return [job.label for job in grid.jobs.values()]


# --- which runs ------------------------------------------------------------------------------------------------------


def test_the_readmes_table_is_a_grid_of_three_seeds():
    grid = open_grid(GridParams())
    assert tuple(grid.rows) == TABLE
    assert {len(seeds) for seeds in grid.rows.values()} == {3}
    assert grid.folder.name == "table-miniuned_pretrained"


def test_every_ablation_is_a_row_that_differs_from_the_base_and_from_all_others():
    grid = open_grid(GridParams(rows="all", seeds=0))
    names = {path.name.removesuffix(".yaml") for path in ABLATIONS.glob("*.yaml")}
    assert set(grid.rows) == {"udon", *(name for name in names if not name.startswith("unic_"))}
    single = [jobs[0].name for seeds in grid.rows.values() for jobs in seeds.values() if len(jobs) == 1]
    assert len(set(single)) == len(grid.rows) - 1  # all but the specialists


def test_ablations_of_frozen_teachers_are_rows_of_a_base_that_has_some():
    grid = open_grid(GridParams(rows="all", seeds=0, base="unic_mini", baseline="unic"))
    names = {path.name.removesuffix(".yaml") for path in ABLATIONS.glob("unic_*.yaml")}
    assert set(grid.rows) == {"unic", *names}
    assert len({jobs[0].name for seeds in grid.rows.values() for jobs in seeds.values()}) == len(grid.rows)


def test_a_row_is_its_presets_lines_on_the_base_and_the_base_as_it_is_for_its_own_recipe(tmp_path):
    grid = small_grid(tmp_path, rows="no_kl")
    assert list(grid.rows) == ["udon", "no_kl"]
    [job] = grid.rows["no_kl"][1]
    values = {"data": str(tmp_path / "data"), "outputs": str(tmp_path / "results"), "seed": 1, "w_kl": 0.0}
    assert job.name == presets.load(tmp_path / "tiny.yaml", **values).run_name
    [base] = grid.rows["udon"][1]
    assert base.name == presets.load(tmp_path / "tiny.yaml", **values | {"w_kl": 1.0}).run_name


def test_a_run_is_named_as_the_notebook_names_it(tmp_path):
    [job] = small_grid(tmp_path, rows="us_rr", steps=7).rows["us_rr"][0]
    values = {name: value for name, value in job.values.items() if name != "preset"}
    injected = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in job.values.items())
    notebook = json.loads((PROJECT / "notebooks" / "train.ipynb").read_text())
    cell = next("".join(c["source"]) for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", ()))
    assert presets.from_notebook([cell, injected]).run_dir == job.params.run_dir
    assert job.params.steps == 7
    assert values["n_threads"] >= 1


def test_rows_may_be_files_and_equal_rows_share_their_runs(tmp_path):
    (tmp_path / "mine.yaml").write_text("preset: miniuned\nw_kl: 0.0\n")
    grid = small_grid(tmp_path, rows=["no_kl", str(tmp_path / "mine.yaml")])
    assert list(grid.rows) == ["udon", "no_kl", "mine"]
    assert grid.rows["mine"] == grid.rows["no_kl"]
    assert len(grid.jobs) == 4


def test_specialists_are_one_run_for_each_domain(tmp_path):
    grid = small_grid(tmp_path, rows="specialist", seeds=0)
    assert labels(grid) == ["udon-s0", "specialist-emoji-s0", "specialist-flags-s0"]
    assert [job.params.domains for job in grid.rows["specialist"][0]] == [("emoji",), ("flags",)]


def test_offline_teachers_are_trained_first_on_the_same_base(tmp_path):
    grid = small_grid(tmp_path, rows="offline_teachers", seeds=0, steps=5)
    [job] = grid.rows["offline_teachers"][0]
    assert labels(grid)[1:] == ["specialist-emoji-s0", "specialist-flags-s0", "offline_teachers-s0"]
    assert [grid.jobs[name].params.steps for name in job.needs] == [5, 5]
    finish(grid, "udon")
    progress = grid.run()
    next(progress)  # writes what the teachers are
    progress.close()
    where = {"data": job.params.data, "outputs": job.params.outputs, "seed": 0}
    taught_by = [presets.load(job.params.offline_teachers, domains=[name], **where) for name in grid.domains]
    assert tuple(teacher.run_name for teacher in taught_by) == job.needs


def test_offline_teachers_of_the_usual_base_are_the_usual_preset():
    [job] = open_grid(GridParams(rows="offline_teachers", seeds=0)).rows["offline_teachers"][0]
    assert job.params.offline_teachers == "ablations/specialist"
    assert len(job.needs) == 8


def test_steps_of_the_grid_leave_a_row_its_own(tmp_path):
    grid = small_grid(tmp_path, rows="features,no_kl", seeds=0, steps=4)
    assert [grid.rows[row][0][0].params.steps for row in grid.rows] == [4, 0, 4]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": "no_kll"}, "parameter 'rows': no row 'no_kll'; did you mean 'no_kl'"),
        ({"baseline": "udno"}, "no row 'udno'; did you mean 'udon'"),
        ({"base": "smok"}, "parameter 'base': no preset 'smok'; did you mean 'smoke'"),
        (
            {"rows": "fixed_shares", "domains": "emoji,flags"},
            "run fixed_shares-s0: parameter 'fixed_shares': found dom",
        ),
        ({"rows": ["no_kl", "{folder}/no_kl.yaml"]}, "two rows are named 'no_kl'"),
    ],
)
def test_an_impossible_grid_ends_in_one_message(tmp_path, values, message):
    (tmp_path / "no_kl.yaml").write_text("preset: miniuned\nw_kl: 0.5\n")
    if isinstance(values.get("rows"), list):
        values = {"rows": [row.format(folder=tmp_path) for row in values["rows"]]}
    with pytest.raises(UserError, match=message):
        open_grid(GridParams(**{"seeds": 0} | values))
    assert list(tmp_path.iterdir()) == [tmp_path / "no_kl.yaml"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeds": "0,a"}, r"parameter 'seeds': found '0,a' \(str\), expected a list"),
        ({"seeds": "0,0"}, "parameter 'seeds': found '0,0', expected one or more different values"),
        ({"rows": "no_kl,"}, "parameter 'rows': found 'no_kl,', expected one or more different values"),
        ({"jobs": 0}, "parameter 'jobs': found 0"),
        ({"row": "no_kl"}, "parameter 'row': no such parameter; did you mean 'rows'"),
    ],
)
def test_wrong_parameters_of_a_grid_are_named(values, message):
    with pytest.raises(ParameterError, match=message):
        GridParams(**values)


def test_seeds_and_rows_are_lists_or_texts():
    assert GridParams(seeds=3).seeds == GridParams(seeds="3").seeds == GridParams(seeds=[3]).seeds == (3,)
    assert GridParams(rows="a, b").rows == ("a", "b")
    assert folder_of(GridParams(rows="temperature_0.2", base="smoke")).name == "temperature_0.2-smoke"
    assert len(folder_of(GridParams(rows=[f"row{n}" for n in range(50)])).name) < 60


# --- running them ----------------------------------------------------------------------------------------------------

WORK = """
import json, pathlib, sys, time
folder, log, label, ending = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3], sys.argv[4]
def say(what):
    with log.open("a") as file:
        file.write(f"{what} {label}\\n")
say("begin")
folder.mkdir(parents=True, exist_ok=True)
(folder / "params.yaml").write_text("{}")
(folder / "metrics.jsonl").write_text('{"kind": "train", "step": 6}\\n{"kind": "tr')
def is_alone():
    begun = [line for line in log.read_text().splitlines() if line.startswith("begin")]
    return len(begun) < begun.index(f"begin {label}") // 2 * 2 + 2
while ending == "hang" or ending == "meet" and is_alone():
    time.sleep(0.01)
say("end")
if ending == "fail":
    sys.exit("no memory for this")
(folder / "summary.json").write_text(json.dumps({"steps": 11, "seconds": 22.0}))
"""


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Replace training by a process that ends at once; `endings` says of which run's label it ends otherwise.

    fail: with an error; hang: never; meet: when the other one of its pair has begun.
    """
    endings: dict[str, str] = {}

    def command(self, job, notebook):
        arguments = [str(job.params.run_dir), str(tmp_path / "events"), job.label, endings.get(job.label, "well")]
        return [sys.executable, "-c", WORK, *arguments]

    monkeypatch.setattr("udonlib.runs.grid.Grid._command", command)
    monkeypatch.setattr("udonlib.runs.grid.POLL_SECONDS", 0.05)
    return endings


def events(folder):
    return (folder / "events").read_text().splitlines()


@pytest.mark.parametrize("jobs", [1, 2])
def test_so_many_runs_go_on_at_a_time(tmp_path, started, jobs):
    grid = small_grid(tmp_path, rows="no_kl", jobs=jobs)
    if jobs == 2:
        started |= {job.label: "meet" for job in grid.jobs.values()}
    most = max(progress.count("running") for progress in grid.run())
    assert most == jobs
    running, highest = 0, 0
    for event in events(tmp_path):
        running += 1 if event.startswith("begin") else -1
        highest = max(highest, running)
    assert highest == jobs
    assert [state.status for state in grid.progress().states] == ["finished"] * 4


def test_finished_runs_are_not_started_again_and_left_ones_are(tmp_path, started):
    started["no_kl-s0"] = "fail"
    grid = small_grid(tmp_path, rows="no_kl", jobs=2)
    *_, last = grid.run()
    assert [state.status for state in last.states] == ["finished", "finished", "failed", "finished"]
    failed = last.states[2]
    assert failed.message == "no memory for this"
    assert failed.log.read_text().strip() == failed.message
    started.clear()
    (tmp_path / "events").unlink()
    again = small_grid(tmp_path, rows="no_kl", jobs=2)
    assert [state.status for state in again.progress().states].count("waiting") == 1
    *_, last = again.run()
    assert events(tmp_path) == ["begin no_kl-s0", "end no_kl-s0"]
    assert last.count("finished") == 4
    assert last.seconds_left == 0


def test_a_run_waits_for_those_it_needs_and_fails_with_them(tmp_path, started):
    grid = small_grid(tmp_path, rows="offline_teachers", seeds=0, jobs=4)
    *_, last = grid.run()
    assert last.count("finished") == 4
    order = events(tmp_path)
    assert order.index("begin offline_teachers-s0") > order.index("end specialist-emoji-s0")
    assert order.index("begin offline_teachers-s0") > order.index("end specialist-flags-s0")

    (tmp_path / "other").mkdir()
    started["specialist-flags-s0"] = "fail"
    grid = small_grid(tmp_path / "other", rows="offline_teachers", seeds=0)
    *_, last = grid.run()
    assert last.states[-1].message == "needs specialist-flags-s0, which failed"
    assert last.states[-1].log is None


def test_leaving_a_grid_ends_its_processes(tmp_path, started):
    started["udon-s0"] = "hang"
    grid = small_grid(tmp_path, seeds=0, rows="no_kl")
    progress = grid.run()
    wait_until(lambda: next(progress).states[0].step)
    [running] = grid._running.values()
    progress.close()
    assert running.process.returncode < 0  # by a signal
    state = grid.progress().states[0]
    assert (state.status, state.step, state.steps) == ("waiting", 6, SMALL["steps"])


def test_the_remaining_time_comes_from_the_pace_of_finished_runs(tmp_path, started):
    baseline = small_grid(tmp_path, rows="udon", seeds=(0, 1))
    assert baseline.progress().seconds_left is None
    *_, last = baseline.run()
    assert last.seconds_left == 0
    one_by_one, in_pairs = (small_grid(tmp_path, rows="no_kl", seeds=(0, 1), jobs=jobs) for jobs in (1, 2))
    assert one_by_one.progress().seconds_left == pytest.approx(44)  # two runs of 11 steps at 2 s a step
    assert in_pairs.progress().seconds_left == pytest.approx(22)


def test_teachers_are_written_only_where_the_base_is_another(tmp_path, started):
    write_base(tmp_path)
    grid = small_grid(tmp_path, rows="offline_teachers", seeds=0)
    *_, _ = grid.run()
    [file] = grid.folder.glob("teachers-*.yaml")
    assert yaml.safe_load(file.read_text())["recipe"] == "specialist"
    small_grid(tmp_path, rows="no_kl", seeds=0)
    assert len(list(tmp_path.rglob("teachers-*.yaml"))) == 1
