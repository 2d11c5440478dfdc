"""Tables of a grid say what the files of its runs say, with intervals over queries and seeds."""

import numpy as np
import pandas as pd
import pytest

from tests.helpers.grids import finish, small_grid
from udonlib.errors import UserError
from udonlib.evaluation.files import load_outcomes, save_outcomes
from udonlib.lab.compare import ablations
from udonlib.lab.compare.ablations import CLOSED, _between, collect, export, markdown
from udonlib.lab.views.style import metric_label
from udonlib.training.interventions import Intervention


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Four rows of two seeds, all finished, and one that has not begun."""
    grid = small_grid(tmp_path_factory.mktemp("grid"), rows="no_kl,features,specialist,w_kl_4")
    finish(grid, "udon", "no_kl", "features", "specialist")
    return grid


def pick(table, row, metric="r_at_1", domain="mean"):
    [found] = table.query("row == @row and metric == @metric and domain == @domain").to_dict("records")
    return found


@pytest.mark.parametrize(("row", "embedder"), [("udon", "student"), ("no_kl", "student"), ("features", "features")])
def test_means_are_those_of_the_runs_evaluations(grid, row, embedder):
    tables = collect(grid)
    for metric in ("r_at_1", "mmp_at_5"):
        evaluations = [grid.rows[row][seed][0].run.evaluation() for seed in (0, 1)]
        for domain in ("emoji", "flags", "mean"):
            where = f"embedder == '{embedder}' and index == 'merged' and domain == '{domain}'"
            expected = np.mean([evaluation.query(where)[metric].item() for evaluation in evaluations])
            found = pick(tables.results, row, metric, domain)
            assert found["mean"] == pytest.approx(expected)
            assert found["low"] <= found["mean"] <= found["high"]
            assert found["n_seeds"] == 2


def test_differences_are_those_of_the_means_and_rows_without_runs_are_left_out(grid):
    tables = collect(grid)
    assert tables.rows == ["udon", "no_kl", "features", "specialist"]
    assert list(dict.fromkeys(tables.differences["row"])) == ["no_kl", "features", "specialist"]
    assert tables.domains == ["emoji", "flags"]
    for row in ("no_kl", "specialist"):
        expected = pick(tables.results, row)["mean"] - pick(tables.results, "udon")["mean"]
        assert pick(tables.differences, row)["mean"] == pytest.approx(expected)


def test_a_row_without_a_finished_baseline_has_no_difference(grid, tmp_path):
    other = small_grid(grid.folder.parents[2], rows="no_kl", baseline="w_kl_4")
    tables = collect(other)
    assert tables.baseline == "w_kl_4"
    assert tables.rows == ["no_kl"]
    assert tables.differences.empty
    assert "| no_kl | 2 |" in markdown(tables)


def test_a_grid_without_any_finished_run_has_empty_tables(tmp_path):
    tables = collect(small_grid(tmp_path))
    assert tables.rows == tables.domains == []
    assert tables.mmp == "mmp_at_5"
    assert markdown(tables).startswith("| row | seeds |")


def test_costs_are_the_runs_own_and_sums_over_specialists(grid):
    costs = collect(grid).costs.set_index("row")
    udon = [jobs[0].run.summary() for jobs in grid.rows["udon"].values()]
    specialists = [job.run.summary() for job in grid.rows["specialist"][0]]
    assert costs.loc["udon", "n_parameters_trained"] == udon[0]["n_parameters_trained"]
    assert costs.loc["udon", "images_per_s"] == pytest.approx(np.mean([s["images_per_s"] for s in udon]))
    shipped = [s["n_parameters_shipped"] for s in specialists]
    assert costs.loc["specialist", "n_parameters_shipped"] == sum(shipped)
    assert costs.loc["specialist", "gflops_per_image"] == pytest.approx(specialists[0]["gflops_per_image"])


def test_allocations_of_single_runs_are_kept_by_row_and_seed(grid):
    allocation = collect(grid).allocation
    assert set(allocation["row"]) == {"udon", "no_kl"}
    expected = grid.rows["no_kl"][1][0].run.allocation()
    found = allocation.query("row == 'no_kl' and seed == 1")
    np.testing.assert_array_equal(found["weight"], expected["weight"])


def test_specialists_are_put_together_once_and_again_after_one_is_trained_anew(grid):
    def files():
        return {path: path.stat().st_mtime_ns for path in grid.folder.glob("specialist-s*-outcomes.csv.gz")}

    collect(grid)
    before = files()
    assert [path.name[:14] for path in sorted(before)] == ["specialist-s0-", "specialist-s1-"]
    assert all(set(pd.read_csv(path)["domain"]) == {"emoji", "flags"} for path in before)
    collect(grid)
    assert files() == before
    outcomes = grid.rows["specialist"][0][1].run.path / "outcomes.csv.gz"
    content = outcomes.read_bytes()
    outcomes.write_bytes(content + b"\0")
    collect(grid)
    outcomes.write_bytes(content)
    [new] = files().keys() - before.keys()
    assert new.name.startswith("specialist-s0-")
    new.unlink()
    assert files() == before


def test_the_row_of_specialists_is_the_queries_specialist_searching_all(grid):
    collect(grid)
    kept = {path: path.read_bytes() for path in grid.folder.glob("specialist-s*-outcomes.csv.gz")}
    for path in kept:
        outcomes = load_outcomes(path)
        outcomes["r_at_1"] = ((outcomes["embedder"] == "specialist") & (outcomes["index"] == "merged")).astype(float)
        save_outcomes(outcomes, path)
    results = collect(grid).results.query("row == 'specialist' and metric == 'r_at_1'")
    assert set(results["mean"]) == {100.0}
    for path, content in kept.items():
        path.write_bytes(content)


def test_specialists_of_another_grid_in_the_same_folder_are_not_taken_for_this_one_s(grid):
    collect(grid)
    part = small_grid(grid.folder.parents[2], rows="no_kl,features,specialist,w_kl_4", domains="emoji")
    assert part.folder == grid.folder
    assert set(collect(part).results.query("row == 'specialist'")["domain"]) == {"emoji", "mean"}
    assert set(collect(grid).results.query("row == 'specialist'")["domain"]) == {"emoji", "flags", "mean"}


def test_exported_files_hold_the_tables(grid):
    tables = collect(grid)
    paths = export(tables, grid)
    assert [path.name for path in paths] == ["results.csv", "differences.csv", "costs.csv", "results.md"]
    pd.testing.assert_frame_equal(pd.read_csv(paths[0]), tables.results, check_dtype=False)
    assert pd.read_csv(paths[1])["excludes_zero"].tolist() == tables.differences["excludes_zero"].tolist()
    lines = paths[3].read_text().splitlines()
    assert lines[0].startswith("| row | seeds | R@1, % | − udon | mMP@5, % | − udon | images/s |")
    assert [line.split(" | ")[0] for line in lines[2:6]] == ["| udon", "| no_kl", "| features", "| specialist"]
    assert lines[7] == "| R@1, % | emoji | flags | mean |"
    widths = {line.count("|") for line in lines[:6]}
    assert len(widths) == 1


def test_sure_differences_are_bold_and_signed(grid):
    tables = collect(grid)
    differences = tables.differences.assign(mean=-2.04, low=-3.0, high=-1.0, excludes_zero=True)
    object.__setattr__(tables, "differences", differences)
    assert "| **−2.0 ± 1.0** |" in markdown(tables)
    object.__setattr__(tables, "differences", differences.assign(mean=1.0, low=-0.5, high=2.5, excludes_zero=False))
    assert "| +1.0 ± 1.5 |" in markdown(tables)


def test_a_difference_of_one_seed_is_never_bold(grid):
    tables = collect(grid)
    alone = tables.differences.assign(mean=-2.04, low=-3.0, high=-1.0, excludes_zero=False)
    groups = tables.groups.assign(mean=-2.04, low=-3.0, high=-1.0, excludes_zero=False)
    object.__setattr__(tables, "differences", alone)
    object.__setattr__(tables, "groups", groups)
    assert "−2.0 ± 1.0" in markdown(tables)
    assert "**" not in markdown(tables)


def test_metrics_have_names_to_show():
    assert [metric_label(name) for name in ("r_at_1", "mmp_at_5", "mmp_at_10")] == ["R@1", "mMP@5", "mMP@10"]


def test_a_run_that_a_person_steered_is_not_counted_as_what_its_parameters_do(grid):
    run = grid.rows["no_kl"][1][0].run
    file = run.path / "steering.jsonl"
    assert not file.exists()
    try:
        file.write_text(Intervention(number=1, step=2, save=True).model_dump_json() + "\n")
        assert "no_kl" in collect(grid).rows  # what does not change the weights does no harm
        for asked in ({"steers": True, "multipliers": {"emoji": 2.0}}, {"evaluate": True}):
            file.write_text(Intervention(number=1, step=2, **asked).model_dump_json() + "\n")
            with pytest.raises(UserError, match=f"a person intervened in run '{run.path.name}' of row 'no_kl'"):
                collect(grid)
    finally:
        file.unlink()
    assert "no_kl" in collect(grid).rows


def test_groups_of_queries_are_those_of_all_rows_and_make_up_the_mean(grid):
    tables = collect(grid)
    own = tables.groups[~tables.groups["difference"].astype(bool)]
    assert set(own["row"]) == {"udon", "no_kl", "features", "specialist"}
    large, small = (
        own.query(f"row == 'no_kl' and group == '{size} domains'")["mean"].item() for size in ("large", "small")
    )
    assert (large + small) / 2 == pytest.approx(pick(tables.results, "no_kl")["mean"])
    against = tables.groups.query("difference and group == 'large domains' and row == 'no_kl'")["mean"].item()
    theirs = own.query("row == 'udon' and group == 'large domains'")["mean"].item()
    assert against == pytest.approx(large - theirs)
    assert "large domains" in markdown(tables)
    domains = tables.results.query("metric == 'r_at_1' and domain != 'mean'")
    for row in ("udon", "no_kl"):
        lowest = domains[domains["row"] == row]["mean"].min()
        assert own.query(f"row == '{row}' and group == 'worst domain'")["mean"].item() == pytest.approx(lowest)
    assert "worst domain" in markdown(tables)


def test_a_row_has_a_share_of_the_specialists_lead_and_they_and_the_baseline_have_none(grid, monkeypatch):
    of_runs = ablations._outcomes

    def better(grid, row, *given):
        found = of_runs(grid, row, *given)
        return found.assign(r_at_1=1.0) if row == "specialist" else found

    monkeypatch.setattr(ablations, "_outcomes", better)
    tables = collect(grid)
    means = {row: pick(tables.results, row)["mean"] for row in ("udon", "no_kl", "features", "specialist")}
    assert means["specialist"] == 100 > means["udon"]
    closed = tables.groups[tables.groups["group"] == CLOSED].set_index("row")["mean"]
    lead = 100 - means["udon"]
    assert closed.to_dict() == pytest.approx(
        {row: 100 * (means[row] - means["udon"]) / lead for row in ("no_kl", "features")}
    )
    assert f"| {CLOSED} |" in markdown(tables)
    assert _between(-12.4, float("nan"), 310.2) == "−12 (? to 310)"
