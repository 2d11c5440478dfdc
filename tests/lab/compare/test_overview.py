"""Every folder of a run is a row: right figures where it can be read, and what is wrong where it cannot."""

import json
import math
import os
from pathlib import Path

import pandas as pd
import pytest

from tests.helpers.runfolders import write_run
from udonlib.errors import UserError
from udonlib.lab.compare import overview, runs_table
from udonlib.lab.compare.overview import RunReader, RunRow, choose_two, with_changes
from udonlib.runs.folder import RunFolder
from udonlib.runs.writer import RunWriter
from udonlib.training.interventions import Intervention


def rows(outputs: Path, pattern: str = "all") -> dict[str, RunRow]:
    return {row.run: row for row in RunReader(str(outputs), pattern).read()}


def test_a_finished_run_says_what_it_found_and_cost(tmp_path):
    write_run(
        tmp_path, "first", {"emoji": [1, 1, 1, 0], "flags": [1, 0]}, recipe="us_rr", sampler_loss="student", seed=7
    )
    row = rows(tmp_path)["first"]
    assert (row.state, row.problem, row.recipe, row.seed, row.data) == (
        "finished",
        "",
        "us_rr",
        7,
        "pictures: emoji, flags",
    )
    assert (row.step, row.steps, row.k, row.interventions) == (40, 40, 5, 0)
    assert (row.r_at_1, row.r_at_1_low, row.r_at_1_high) == (62.5, 61.0, 65.0)
    assert (row.mmp, row.mmp_low, row.mmp_high) == (31.25, 29.75, 33.75)
    assert (row.train_seconds, row.images_per_s, row.n_parameters_trained, row.validation) == (65, 1234, 2_153_696, 60)
    assert row.began == 1767323045
    assert row.ended == (tmp_path / "runs" / "first" / "summary.json").stat().st_mtime
    assert not row.open


def test_the_best_run_comes_first_and_runs_without_a_test_last(tmp_path):
    write_run(tmp_path, "bad", {"emoji": [0, 0]})
    write_run(tmp_path, "good", {"emoji": [1, 1]})
    write_run(tmp_path, "older", finished=False, began="2026-01-01T00:00:00+0000")
    write_run(tmp_path, "newer", finished=False, began="2026-02-01T00:00:00+0000")
    assert list(rows(tmp_path)) == ["good", "bad", "newer", "older"]
    assert list(rows(tmp_path, "*er")) == ["newer", "older"]


def test_a_pattern_that_no_run_has_is_reported(tmp_path):
    assert rows(tmp_path, "nobody") == {}  # no runs yet is another matter
    write_run(tmp_path, "good", {"emoji": [1, 1]})
    with pytest.raises(UserError, match="parameter 'runs': no run in .* is called 'god'; did you mean 'good'"):
        rows(tmp_path, "god")


def test_a_run_of_recipe_features_counts_as_its_features(tmp_path):
    folder = write_run(tmp_path, "features", recipe="features", steps=0, sampler_loss="student")
    table = pd.read_csv(folder / "evaluation.csv")
    own = table.query("index == 'merged' and domain == 'mean'").assign(embedder="features", r_at_1=77.0)
    pd.concat([table, own]).to_csv(folder / "evaluation.csv", index=False)
    row = rows(tmp_path)["features"]
    assert row.r_at_1 == 77


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("params.yaml", "a: [", "params.yaml: damaged: "),
        ("params.yaml", "- 1\n", "params.yaml: damaged: line 1: expected lines of the form 'name: value'"),
        (
            "params.yaml",
            "recipe: udon\nlost_parameter: 3\n",
            "params.yaml: of another version: parameter 'lost_parameter'",
        ),
        ("params.yaml", "", "params.yaml: damaged: expected lines of the form 'name: value', found none"),
        ("params.yaml", "[" * 1500, "params.yaml: damaged: line 1: found lists and mappings more than 20 deep"),
        ("params.yaml", "seed: !!set {1}", "params.yaml: damaged: line 1: found the tag !!set"),
        ("params.yaml", b"\xff\xfe", "params.yaml: damaged: "),
        ("provenance.json", "{}", "provenance.json: damaged: not a run's provenance"),
        ("provenance.json", "", "provenance.json: damaged: "),
        ("metrics.jsonl", "no json\n", "metrics.jsonl: damaged: "),
        ("metrics.jsonl", '{"kind": "train"}\n', "damaged: "),
        ("summary.json", '{"steps": 4', "summary.json: damaged: "),
        ("summary.json", '{"steps": "many"}', "summary.json: damaged: "),
        ("evaluation.csv", "", "evaluation.csv: damaged: "),
        ("evaluation.csv", "embedder,domain,index,r_at_1\n", "evaluation.csv: damaged: no mean of student"),
        ("evaluation.csv", None, "evaluation.csv: missing"),
        ("steering.jsonl", "{}\n", "steering.jsonl: damaged: "),
        *((name, "[" * 100_000, f"{name}: damaged: ") for name in ("provenance.json", "summary.json")),
        ("metrics.jsonl", '{"kind":' * 50_000 + "\n", "metrics.jsonl: damaged: "),
        ("metrics.jsonl", '{"kind": "train", "step": 1e999, "images_per_s": 1}\n', "metrics.jsonl: damaged: "),
        ("summary.json", '{"steps": 40, "train_seconds": 1e999}', "summary.json: damaged: train_seconds: found an inf"),
        ("summary.json", '{"steps": Infinity}', "summary.json: damaged: "),
        ("summary.json", bytes(range(256)), "summary.json: damaged: "),
        (
            "evaluation.csv",
            "embedder,domain,index,r_at_1,mmp_at_5\nstudent,mean,merged,inf,1\n",
            "damaged: r_at_1: found",
        ),
        *((name, "a folder", f"{name}: ") for name in ("provenance.json", "metrics.jsonl", "summary.json")),
        *((name, "a folder", f"{name}: ") for name in ("params.yaml", "evaluation.csv", "steering.jsonl")),
    ],
)
def test_a_damaged_run_is_a_row_that_says_what_is_wrong(tmp_path, file, content, problem):
    write_run(tmp_path, "whole")
    path = write_run(tmp_path, "damaged") / file
    if path.exists():
        path.unlink()
    if content == "a folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = rows(tmp_path)
    assert problem in found["damaged"].problem
    assert "\n" not in found["damaged"].problem
    assert (found["whole"].problem, found["whole"].state) == ("", "finished")
    assert "damaged" in runs_table.static_table(list(found.values()), tmp_path).html


def test_a_folder_that_holds_no_run_is_listed_and_files_are_not(tmp_path):
    write_run(tmp_path, "whole")
    (tmp_path / "runs" / "nothing").mkdir()
    (tmp_path / "runs" / "notes.txt").write_text("")
    found = rows(tmp_path)
    assert list(found) == ["whole", "nothing"]
    assert found["nothing"].problem == "no params.yaml: not a run, or one that never began"
    assert RunReader(str(tmp_path / "elsewhere")).read() == []


def test_a_run_of_another_version_keeps_what_can_be_read(tmp_path):
    folder = write_run(tmp_path, "old", recipe="us_rr", sampler_loss="student")
    with (folder / "params.yaml").open("a") as file:
        file.write("lost_parameter: 3\n")
    row = rows(tmp_path)["old"]
    assert row.problem == "params.yaml: of another version: parameter 'lost_parameter': no such parameter"
    assert (row.recipe, row.r_at_1, row.steps) == ("us_rr", 50, 40)


def test_a_run_that_trains_says_how_far_it_is_and_how_long_it_needs(tmp_path):
    folder = write_run(tmp_path, "going", finished=False, step=10)
    began = rows(tmp_path)["going"].began
    os.utime(folder / "metrics.jsonl", (began + 20, began + 20))  # 10 steps in 20 seconds
    writer = RunWriter(RunFolder(folder))
    try:
        reader = RunReader(str(tmp_path))
        row = reader.read()[0]
        assert (row.state, row.going, row.open) == ("training", True, True)
        assert (row.step, row.steps, row.seconds_left) == (10, 40, 60)
        assert (row.validation, row.images_per_s) == (55.5, 1000)
        assert math.isnan(row.r_at_1)
    finally:
        writer.close()
    row = reader.read()[0]  # no file has changed, but its process is gone
    assert (row.state, row.going, row.open, row.seconds_left) == ("lost", False, True, None)


def test_while_nothing_changes_nothing_is_read_again(tmp_path, monkeypatch):
    for name in ("one", "two", "three"):
        write_run(tmp_path, name)
    reader = RunReader(str(tmp_path))
    first = reader.read()
    read: list[str] = []
    true = overview.read_row
    monkeypatch.setattr(overview, "read_row", lambda folder: read.append(folder.name) or true(folder))
    assert reader.read() is first
    assert read == []
    (tmp_path / "runs" / "two" / "summary.json").write_text(json.dumps({"steps": 12}))
    second = reader.read()
    assert read == ["two"]
    assert second is not first
    assert next(row for row in second if row.run == "two").step == 12
    (tmp_path / "runs" / "one").rename(tmp_path / "one")
    assert {row.run for row in reader.read()} == {"two", "three"}
    assert reader.signature("one") == ()
    assert reader.signature("two") != ()


def test_a_run_that_was_left_is_not_read_again_until_somebody_trains_it(tmp_path, monkeypatch):
    folder = write_run(tmp_path, "left", finished=False, step=20)
    reader = RunReader(str(tmp_path))
    first = reader.read()
    assert [row.state for row in first] == ["lost"]
    reads: list[Path] = []
    true = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *args: reads.append(path) or true(path, *args))
    before = reader.signature("left")
    assert reader.read() is first
    assert reads == []
    writer = RunWriter(RunFolder(folder))
    assert [row.state for row in reader.read()] == ["training"]
    assert reader.signature("left") != before
    writer.close()
    assert [row.state for row in reader.read()] == ["lost"]


@pytest.mark.parametrize(
    "name",
    [
        *("params.yaml", "provenance.json", "metrics.jsonl", "summary.json", "evaluation.csv", "outcomes.csv.gz"),
        *("control.json", "steering.jsonl", "ended.json"),
    ],
)
def test_a_run_is_looked_at_again_when_any_of_its_files_changes(tmp_path, name):
    folder = write_run(tmp_path, "one")
    reader = RunReader(str(tmp_path))
    reader.read()
    before = reader.signature("one")
    with (folder / name).open("a") as file:
        file.write("\n")
    reader.read()
    assert reader.signature("one") != before


def test_a_note_of_the_end_that_is_damaged_is_not_laid_to_another_file(tmp_path):
    (write_run(tmp_path, "left", finished=False, step=20) / "ended.json").write_text("[]")
    row = rows(tmp_path)["left"]
    assert (row.state, row.problem) == ("lost", "")


def test_a_state_that_cannot_be_told_has_a_line_of_its_own(tmp_path, monkeypatch):
    def fail(run: RunFolder) -> None:
        raise TypeError("no state")

    monkeypatch.setattr(RunFolder, "state", fail)
    write_run(tmp_path, "left", finished=False)
    assert rows(tmp_path)["left"].problem == "the state: damaged: no state"


def test_only_interventions_that_change_what_is_trained_count_as_steering(tmp_path):
    folder = write_run(tmp_path, "steered")
    done = [Intervention(number=1, step=4, steers=True, multipliers={"emoji": 2.0})]
    done += [Intervention(number=2, step=5, paused=True), Intervention(number=3, step=6, evaluate=True)]
    (folder / "steering.jsonl").write_text("".join(each.model_dump_json() + "\n" for each in done))
    assert rows(tmp_path)["steered"].interventions == 2


def test_changes_are_what_most_runs_of_the_recipe_have_otherwise(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, f"usual{seed}", seed=seed)
    write_run(tmp_path, "rare", w_kl=0.5, n_threads=3)
    write_run(tmp_path, "plain", recipe="us_rr", sampler_loss="student")
    changes = {name: row.changes for name, row in rows(tmp_path).items()}
    assert changes == {"usual0": {}, "usual1": {}, "rare": {"w_kl": 0.5}, "plain": {}}


def test_of_two_values_as_frequent_the_one_of_most_runs_is_usual():
    made = [RunRow(f"{recipe}{w}", recipe=recipe, values={"w_kl": w}) for recipe, w in (("a", 1), ("a", 2), ("b", 2))]
    assert [row.changes for row in with_changes(made)] == [{"w_kl": 1}, {}, {}]


def row(run: str, recipe: str, r_at_1: float, seed: int = 0, data: str = "x", step: int = 5) -> RunRow:
    values = {"recipe": recipe}
    return RunRow(run, recipe=recipe, r_at_1=r_at_1, seed=seed, fingerprint=data, step=step, values=values)


def test_the_best_trained_run_is_compared_with_the_best_of_another_recipe_on_its_data():
    listed = [
        row("alone", "specialist", 90.0, data="y"),
        row("features", "features", 80.0, step=0),
        row("best", "udon", 70.0, seed=1),
        row("same", "udon", 69.0, seed=1),
        row("other", "us_rr", 60.0, seed=0),
        row("seed", "us_rr", 50.0, seed=1),
    ]
    assert choose_two(listed) == ("seed", "best")
    assert choose_two(listed[:5]) == ("other", "best")
    assert choose_two(listed[:4]) == ("same", "best")
    assert choose_two(listed[:2]) == ("features", "alone")
    assert choose_two(listed[:1]) is None
    assert choose_two([listed[0], RunRow("damaged")]) is None


def test_the_table_has_a_column_for_everything(tmp_path):
    write_run(tmp_path, "one")
    table = overview.table(RunReader(str(tmp_path)).read())
    assert table["run"].tolist() == ["one"]
    assert table["r_at_1"].tolist() == [50]


def test_a_run_that_is_named_is_compared_with_the_best_of_another_recipe_and_its_seed(tmp_path):
    for place, (name, recipe, seed) in enumerate(
        [("best", "udon", 0), ("same_recipe", "udon", 1), ("other_seed", "us_rr", 0), ("wanted", "us_rr", 1)]
    ):
        loss = {"sampler_loss": "student"} if recipe == "us_rr" else {}
        write_run(tmp_path, name, {"emoji": [1.0] * (9 - place) + [0.0] * place}, recipe=recipe, seed=seed, **loss)
    found = RunReader(str(tmp_path)).read()
    assert [row.run for row in found] == ["best", "same_recipe", "other_seed", "wanted"]
    assert choose_two(found) == ("other_seed", "best")
    assert choose_two(found, b="same_recipe") == ("wanted", "same_recipe")
    assert choose_two(found, a="wanted") == ("wanted", "best")
    assert choose_two(found, a="best") == ("best", "other_seed")
    assert choose_two(found, a="best", b="best") == ("best", "best")


def test_the_time_left_does_not_count_pauses(tmp_path):
    folder = write_run(tmp_path, "paused", finished=False, began="2026-01-01T00:00:00+0000", step=10)
    start = 1767225600
    writer = RunWriter(RunFolder(folder))  # somebody trains it
    entry = {"kind": "steering", "step": 10, "number": 1}
    with (folder / "metrics.jsonl").open("a") as records:
        for seconds, paused in ((20, True), (3620, False)):
            records.write(json.dumps(entry | {"paused": paused, "time": start + seconds}) + "\n")
    os.utime(folder / "metrics.jsonl", (start + 3630, start + 3630))
    row = rows(tmp_path)["paused"]
    writer.close()
    assert row.state == "training"
    assert row.seconds_left == pytest.approx(90)  # 30 of 40 steps, at 3 seconds a step
