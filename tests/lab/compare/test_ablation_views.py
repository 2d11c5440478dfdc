"""What is seen of a grid says the numbers of its tables and the states of its runs."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.helpers.grids import small_grid
from tests.helpers.runfolders import write_run
from udonlib.lab.compare import ablation_views
from udonlib.lab.compare.ablations import COSTS, INTERVAL, GridTables
from udonlib.lab.views import live, style
from udonlib.runs.grid import Grid, Progress, State

DOMAINS = ["emoji", "flags"]


def tables(rows=("udon", "no_kl", "us_rr")) -> GridTables:
    """R@1 of no_kl surely lower than udon's, of us_rr not surely."""
    results, differences, allocation = [], [], []
    for place, row in enumerate(rows):
        for metric in ("r_at_1", "mmp_at_5"):
            for domain in (*DOMAINS, "mean"):
                results.append((row, metric, domain, 50.0 - place, 49.0 - place, 51.0 - place, 3))
                low, high = (-1.5, -0.5) if row == "no_kl" else (-3.0, 1.0)
                if place:
                    differences.append((row, metric, domain, (low + high) / 2, low, high, 3, row == "no_kl"))
        for seed in (0, 1):
            for step, shift in ((0, 0.0), (4, 0.1 * seed)):
                allocation += [
                    (row, seed, step, d, 0.5 + sign * shift, 0) for d, sign in zip(DOMAINS, (1, -1), strict=True)
                ]
    costs = [(row, 3, 1000.0, 81e4, 2.3e6, 0.0206, 220.0) for row in rows]
    return GridTables(
        "udon",
        pd.DataFrame(results, columns=INTERVAL),
        pd.DataFrame(differences, columns=[*INTERVAL, "excludes_zero"]),
        pd.DataFrame(costs, columns=["row", "n_seeds", *COSTS]),
        pd.DataFrame(allocation, columns=["row", "seed", "step", "domain", "share", "images_seen"]),
    )


def cells(table) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", table.html)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def test_results_show_means_differences_and_costs():
    head, udon, no_kl, us_rr = cells(ablation_views.results_table(tables()))
    assert head[2:6] == ["R@1, %", "− udon", "mMP@5, %", "− udon"]
    assert udon == [
        "udon",
        "3",
        "50.0 <small>± 1.0</small>",
        "–",
        "50.0 <small>± 1.0</small>",
        "–",
        "1,000",
        "0.81 M / 2.30 M",
        "0.0206",
    ]
    assert no_kl[3] == "<b>−1.0 <small>± 0.5</small></b>"
    assert us_rr[3] == "−1.0 <small>± 2.0</small>"


def test_domains_show_figures_or_differences_with_the_mean_last():
    shown = cells(ablation_views.domain_table(tables()))
    assert shown[0] == ["R@1, %", "emoji", "flags", "mean"]
    assert [row[0] for row in shown[1:]] == ["udon", "no_kl", "us_rr"]
    shown = cells(ablation_views.domain_table(tables(), "mmp_at_5", differences=True))
    assert shown[0][0] == "mMP@5 − udon, points"
    assert [row[0] for row in shown[1:]] == ["no_kl", "us_rr"]


def test_the_difference_chart_marks_what_excludes_zero():
    fig = ablation_views.difference_chart(tables())
    sure = [trace for trace in fig.data if trace.name == "interval excludes zero"]
    unsure = [trace for trace in fig.data if trace.name == "interval holds zero"]
    assert [list(trace.y) for trace in sure] == [["no_kl"]] * 2
    assert [list(trace.y) for trace in unsure] == [["us_rr"]] * 2
    assert {trace.marker.symbol for trace in sure} == {"circle"}
    assert {trace.marker.symbol for trace in unsure} == {"circle-open"}
    np.testing.assert_allclose([sure[0].error_x.array[0], unsure[0].error_x.arrayminus[0]], [0.5, 2.0])
    assert [note.text for note in fig.layout.annotations] == ["R@1", "mMP@5"]
    assert fig.layout.xaxis.title.text == "percentage points"
    assert sum(trace.showlegend for trace in fig.data) == 2


def test_the_difference_chart_says_where_there_is_nothing_to_compare():
    fig = ablation_views.difference_chart(tables(rows=("udon",)))
    assert "nothing to compare" in fig.layout.annotations[0].text


def test_allocations_stand_side_by_side_in_the_domains_colours():
    fig = ablation_views.allocation_charts(tables())
    assert [note.text for note in fig.layout.annotations] == ["udon", "no_kl", "us_rr"]
    for domain, colour in style.domain_colours(DOMAINS).items():
        areas = [trace for trace in fig.data if trace.name == domain]
        assert len(areas) == 3
        assert {area.fillcolor for area in areas} == {colour}
        assert sum(area.showlegend for area in areas) == 1
    emoji = next(trace for trace in fig.data if trace.name == "emoji")
    np.testing.assert_allclose(emoji.y, [50, 55, 55])  # the mean of two seeds; the last window lasts as long
    assert emoji.x.tolist() == [0, 4, 8]


@pytest.mark.parametrize("n", [1, 4, 5, 13])
def test_every_row_of_a_grid_has_a_panel(n):
    fig = ablation_views.allocation_charts(tables(rows=[f"row{i}" for i in range(n)]))
    assert len(fig.layout.annotations) == n
    assert fig.layout.height >= 150 + 170 * (n // 4)


def test_empty_tables_have_empty_figures():
    empty = tables(rows=())
    assert cells(ablation_views.results_table(empty))[0][:2] == ["row", "seeds"]
    assert ablation_views.allocation_charts(empty).data == ()
    assert ablation_views.difference_chart(empty).data == ()


# --- progress --------------------------------------------------------------------------------------------------------


def state(label: str, status: str, step: int = 0, message: str = "") -> State:
    return State(label, f"run-{label}", status, step, 10, message, Path("some.log") if message else None)


STORY = [
    Progress([state("a", "running"), state("b", "waiting"), state("c", "finished", 10)]),
    Progress([state("a", "running", 4), state("b", "waiting"), state("c", "finished", 10)], 61.0),
    Progress([state("a", "finished", 10), state("b", "running"), state("c", "finished", 10)], 30.0),
    Progress([state("a", "finished", 10), state("b", "failed", 2, "<no> image"), state("c", "finished", 10)], 0.0),
]


def test_progress_in_lines_tells_what_ended_and_what_failed(capsys):
    ablation_views.show(iter(STORY), live=False, clock=lambda: 0.0)
    assert capsys.readouterr().out.splitlines() == [
        "1 of 3 finished, 1 waiting; running a 0/10  estimating the time",
        "a finished",
        "2 of 3 finished; running b 0/10  30 s left",
        "b failed: <no> image (log: some.log)",
        "2 of 3 finished, 1 failed",
    ]


def test_progress_in_lines_comes_every_few_seconds(capsys):
    clock = iter(range(0, 1000, 6))
    ablation_views.show(iter([STORY[0], STORY[1], STORY[1]]), live=False, clock=lambda: next(clock))
    assert capsys.readouterr().out.splitlines()[1:] == ["1 of 3 finished, 1 waiting; running a 4/10  1 min 01 s left"]


def test_progress_in_a_cell_is_redrawn(monkeypatch):
    drawn = []

    class Handle:
        def update(self, shown):
            drawn.append(shown.data)

    monkeypatch.setattr(live, "display", lambda *_, **__: Handle())
    ablation_views.show(iter(STORY), live=True, clock=lambda: 0.0)
    assert len(drawn) == 2  # the first state at once, the last one in the end; half a second lies between others
    assert drawn[-1].count("<tr>") == 3
    assert "✗ failed" in drawn[-1]
    assert "&lt;no&gt; image (log: some.log)" in drawn[-1]


def test_an_interrupt_ends_the_runs(capsys):
    ended = []

    def runs():
        try:
            yield STORY[0]
            yield STORY[1]
        finally:
            ended.append(True)

    def clock():
        if capsys.readouterr().out:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        ablation_views.show(runs(), live=False, clock=clock)
    assert ended == [True]


def test_plan_and_status_name_rows_and_runs(tmp_path):
    grid = small_grid(tmp_path, rows="no_kl", seeds=0)
    plan = str(ablation_views.plan_table(grid))
    assert re.search(r"row no_kl +w_kl: 0\n", plan + "\n")
    assert re.search(r"row udon +recipe: udon \(baseline\)", plan)
    assert re.search(r"runs +2 different ones, 2 of them not finished yet", plan)
    shown = cells(ablation_views.status_table(grid))
    assert shown[1][:3] == ["udon-s0", "· waiting", "0 / 11"]
    grid._failed[grid.rows["no_kl"][0][0].name] = "ValueError: <b>", tmp_path / "a.log"
    assert cells(ablation_views.status_table(grid))[2][4] == f"ValueError: &lt;b&gt; (log: {tmp_path / 'a.log'})"


def test_nothing_is_trained_where_a_person_looks_and_has_not_said_yes(tmp_path, monkeypatch, capsys):
    ran: list[str] = []
    monkeypatch.setattr(Grid, "run", lambda grid: iter(ran.append(grid.params.train) or ()))
    grids = {train: small_grid(tmp_path, rows="no_kl", seeds=0, train=train) for train in ("auto", "yes", "no")}
    for train, looks in (("auto", True), ("no", True), ("no", False)):
        status = ablation_views.train(grids[train], looks)
        assert "waiting" in status.text
        assert "2 runs of the plan above are not finished, and nothing was started" in capsys.readouterr().out
        assert ran == []
    ablation_views.train(grids["auto"], False)
    ablation_views.train(grids["yes"], True)
    assert ran == ["auto", "yes"]


def test_each_run_gets_the_threads_that_were_asked_for(tmp_path):
    grid = small_grid(tmp_path, rows="no_kl", seeds=0, n_threads=3)
    assert {job.values["n_threads"] for job in grid.jobs.values()} == {3}
    assert "3 threads each" in str(ablation_views.plan_table(grid))


def test_a_row_that_sets_a_mapping_names_what_is_in_it(tmp_path, monkeypatch):
    grid = small_grid(tmp_path, rows="no_kl", seeds=0)
    grid.rows["no_kl"][0][0].values["teachers"] = {"letters": {"onnx": "x" * 300}}
    assert re.search(r"row no_kl .*teachers: letters\n", str(ablation_views.plan_table(grid)) + "\n")


def test_curves_of_rows_group_their_seeds(tmp_path):
    grid = small_grid(tmp_path, rows="no_kl", seeds="0, 1")
    assert "none of these runs" in ablation_views.curves_chart(grid).layout.annotations[0].text
    for job in grid.jobs.values():
        write_run(job.run.path.parent.parent, job.run.path.name, finished=False)
    names = {trace.name for trace in ablation_views.curves_chart(grid).data if trace.name}
    assert names == {"udon (2 runs)", "no_kl (2 runs)"}
