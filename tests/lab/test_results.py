"""The results of one command: what is chosen, when, by which figures, and what is told."""

import json
import sys

import pytest

from tests.helpers.grids import finish, small_grid
from udonlib import presets
from udonlib.__main__ import main
from udonlib.errors import UserError
from udonlib.lab import results
from udonlib.lab.results import PARTS, Part, Results, named
from udonlib.presets import GridParams
from udonlib.runs.grid import Grid, open_grid


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A part of two candidates on a tiny network, whose runs are trained in this process."""
    base = small_grid(tmp_path, rows="us_rr")

    def run(grid):
        finish(grid, *grid.rows)
        yield grid.progress()

    monkeypatch.setattr(Grid, "run", run)
    part = Part("tiny", base.params.base, "us_rr", ("us_rr",), ("no_kl", "no_rel"), 3.0, (0, 1), (7,))
    return Results((part,), base.params.outputs, jobs=2, data=base.params.data), part


def test_rows_and_presets_of_the_results_exist():
    for part in PARTS:
        presets.load(part.base)
        for rows in (part.rows, part.candidates):
            if rows:
                grid = open_grid(GridParams(base=part.base, rows=rows, baseline=part.rows[0], seeds=(0,)))
                assert set(rows) <= set(grid.rows)
        assert part.baseline in part.rows
        assert not set(part.seeds) & set(part.choice_seeds)


def test_the_plan_counts_what_is_left_and_also_what_is_yet_to_be_chosen(small):
    all_parts, part = small
    assert all_parts.plan() == [("tiny, table", 4, 4, 6.0), ("tiny, candidates", 2, 2, 3.0)]
    all_parts.choose(part)
    assert all_parts.plan() == [("tiny, table", 4, 4, 6.0)]


def test_the_best_on_validation_is_chosen_before_its_row_has_any_run(small):
    all_parts, part = small
    all_parts.choose(part)
    grid = all_parts.candidates(part)
    best = {}
    for row in part.candidates:
        [job] = grid.rows[row][7]
        best[row] = job.run.summary()["best_validation_r_at_1"]
    chosen = json.loads((all_parts.folder / "choices.json").read_text())["tiny"]
    assert chosen["validation_r_at_1"] == best
    assert best[chosen["chosen"]] == max(best.values())
    table = open_grid(GridParams(**all_parts.values(part)))
    assert [*table.rows] == ["us_rr", chosen["chosen"]]
    assert {job.run.status for job in table.jobs.values()} == {"new"}


def test_a_choice_is_made_once(small, monkeypatch):
    all_parts, part = small
    all_parts.choose(part)
    before = (all_parts.folder / "choices.json").read_bytes()
    monkeypatch.setattr(results, "_validation", lambda grid, row: pytest.fail("looked again"))
    all_parts.choose(part)
    assert (all_parts.folder / "choices.json").read_bytes() == before


def test_nothing_but_validation_is_read_of_candidates(small, monkeypatch):
    all_parts, part = small
    finish(all_parts.candidates(part), *part.candidates)
    for job in all_parts.candidates(part).jobs.values():
        summary = json.loads((job.run.path / "summary.json").read_text())
        kept = {name: summary[name] for name in ("steps", "seconds", "best_validation_r_at_1")}
        (job.run.path / "summary.json").write_text(json.dumps(kept))
        for name in ("evaluation.csv", "evaluation.json", "outcomes.csv.gz"):
            (job.run.path / name).unlink()
    monkeypatch.setattr(Grid, "run", lambda grid: iter(()))
    all_parts.choose(part)
    assert all_parts.choices()["tiny"]["chosen"] in part.candidates


def test_candidates_that_did_not_finish_are_named_and_nothing_is_chosen(small, monkeypatch):
    all_parts, part = small
    monkeypatch.setattr(Grid, "run", lambda grid: iter(()))
    with pytest.raises(UserError, match="2 runs did not finish, first no_kl-s7: is waiting; the same command goes on"):
        all_parts.choose(part)
    assert all_parts.choices() == {}


def test_a_damaged_file_of_choices_is_named(small):
    all_parts, _ = small
    all_parts.folder.mkdir(parents=True)
    (all_parts.folder / "choices.json").write_text("{")
    with pytest.raises(UserError, match=r"choices\.json: damaged"):
        all_parts.choices()


def test_the_tables_of_all_parts_stand_in_one_file_with_what_was_chosen(small):
    all_parts, part = small
    assert all_parts.write().read_text() == ""
    all_parts.choose(part)
    grid = open_grid(GridParams(**all_parts.values(part)))
    grid.folder.mkdir(parents=True)
    (grid.folder / "results.md").write_text("| a table |\n")
    text = all_parts.write().read_text()
    assert text.startswith("## tiny\n\nPreset `")
    assert "seeds 0, 1, baseline `us_rr`" in text
    assert f"`{all_parts.choices()['tiny']['chosen']}` was chosen by R@1 on validation, seeds 7: `no_kl`" in text
    assert text.endswith("| a table |\n")


def test_the_command_says_its_plan_and_refuses_other_parts(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["udonlib", "results", "--plan", "--only", "uneven", "--outputs", str(tmp_path)])
    main()
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("uneven, table")
    minutes = 24 * named(["uneven"])[0].minutes / 2
    assert f"24 runs,  24 left, about {minutes:.0f} minutes" in shown[0]
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match="no part of the results is called 'unevn'; did you mean 'uneven'?"):
        named(["unevn"])
