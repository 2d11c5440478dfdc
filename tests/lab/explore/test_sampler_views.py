"""Figures of the sampler show the numbers of their tables, and empty ones say why."""

import numpy as np
import pytest

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.sampler import DOMAINS, opened, steer, write_sampled_run
from udonlib.errors import UserError
from udonlib.lab.explore import sampler_study, sampler_views, simulation
from udonlib.lab.explore.sampler_study import Explored
from udonlib.lab.explore.simulation import deviation, outcome
from udonlib.lab.views.style import domain_colours


@pytest.fixture
def explored(tmp_path) -> Explored:
    write_sampled_run(tmp_path / "results", "udon-s0")
    write_sampled_run(tmp_path / "results", "turns-s0", "round_robin", age=20)
    return opened(tmp_path / "results", runs="udon-s0,turns-s0")


@pytest.fixture
def drawn(tmp_path) -> Explored:
    write_uned_tree(tmp_path / "data", domains=DOMAINS)
    return opened(tmp_path / "nothing", data=str(tmp_path / "data"), steps=40)


def traces(fig, name: str) -> list:
    return [trace for trace in fig.data if trace.name == name and trace.x[0] is not None]


def titles(fig) -> list[str]:
    return [note.text for note in fig.layout.annotations]


def test_what_is_looked_at_is_named(explored, drawn):
    text = repr(sampler_views.explored_table(explored))
    assert "fitted to the teacher loss of udon-s0: recipe udon, dynamic, 300 steps" in text
    assert "300 steps of 24 images, 3 domains in a batch" in text
    assert "updated every 30 steps, smoothing 0" in text
    assert "udon-s0, turns-s0" in text
    text = repr(sampler_views.explored_table(drawn))
    assert "nothing was measured" in text
    assert "no dynamic run" in text


def test_curves_are_drawn_over_the_losses_that_they_were_fitted_to(explored):
    fig = sampler_views.curve_chart(explored)
    bars, lines = traces(fig, "measured"), traces(fig, "curve")
    assert len(bars) == len(lines) == 3
    part = explored.points[explored.points["domain"] == "emoji"]
    np.testing.assert_allclose(np.array(bars[0].y)[::3], part["loss"], rtol=1e-5)
    np.testing.assert_allclose(np.array(bars[0].x).reshape(-1, 3)[:, :2], part[["first", "last"]])
    np.testing.assert_allclose(lines[0].y, explored.curves["emoji"].loss(np.array(lines[0].x)), rtol=1e-4)
    assert [line.line.color for line in lines] == list(domain_colours(DOMAINS).values())
    assert "emoji, off by 0 %" in titles(fig)[0]


def test_curves_that_a_person_changed_do_not_pass_for_fitted(tmp_path, drawn):
    write_sampled_run(tmp_path / "results", "udon-s0")
    changed = opened(tmp_path / "results", half_images={"emoji": 50})
    found = titles(sampler_views.curve_chart(changed))
    assert found[0].endswith("emoji, changed")
    assert "off by" in found[1]
    assert traces(sampler_views.curve_chart(drawn), "measured") == []
    assert "changed by parameters: emoji" in repr(sampler_views.explored_table(changed))


def test_each_strategy_has_areas_that_add_up(explored):
    fig = sampler_views.strategy_chart(explored)
    assert titles(fig) == ["dynamic", "round_robin", "balanced", "dataset_size"]
    for axis, one in zip(("y", "y2", "y3", "y4"), explored.simulations, strict=True):
        areas = [trace for trace in fig.data if trace.yaxis == axis]
        np.testing.assert_allclose(np.sum([area.y for area in areas], axis=0), 100, rtol=1e-5)
        assert [area.name for area in areas] == list(DOMAINS)
        np.testing.assert_allclose(areas[1].y[:-1], 100 * one.shares[:, 1], rtol=1e-5)
        assert areas[0].x[-1] == 300
        assert {area.line.shape for area in areas} == {"hv"}
    assert sum(bool(trace.showlegend) for trace in fig.data) == 3


def test_an_odd_strategy_leaves_an_empty_corner_without_axes(tmp_path, drawn):
    fig = sampler_views.strategy_chart(
        opened(tmp_path / "nothing", data=drawn.params.data, strategies="dynamic,fixed,balanced")
    )
    assert fig.layout.xaxis4.visible is False
    assert fig.layout.xaxis3.visible is not False


def test_dots_show_share_passes_and_loss_and_rings_who_starves(explored):
    fig = sampler_views.outcome_chart(explored)
    found = {one.strategy: outcome(one, explored.setting.sizes) for one in explored.simulations}
    for strategy, table in found.items():
        share, passes, loss = traces(fig, strategy)
        np.testing.assert_allclose(share.x, 100 * table["share"], rtol=1e-5)
        np.testing.assert_allclose(passes.x, table["passes"], rtol=1e-5)
        np.testing.assert_allclose(loss.x, table["loss"], rtol=1e-5)
    rings = [trace for trace in fig.data if trace.name == "starves" and len(trace.x) and trace.x[0] is not None]
    ringed = sorted(round(float(x), 3) for ring in rings for x in ring.x)
    hungry = sorted(round(100 * float(x), 3) for table in found.values() for x in table["share"][table["starves"]])
    assert hungry
    np.testing.assert_allclose(ringed, hungry, atol=2e-3)
    assert len({trace.marker.symbol for trace in fig.data if trace.name in found}) == len(found)


def test_losses_that_are_near_to_each_other_have_an_axis_with_numbers(explored, monkeypatch):
    def axis():
        fig = sampler_views.outcome_chart(explored)
        return fig.layout.xaxis3.type, any("(log)" in note.text for note in fig.layout.annotations)

    assert axis() == ("log", True)
    monkeypatch.setattr(sampler_views, "outcome", lambda one, sizes: outcome(one, sizes).assign(loss=6.5))
    assert axis() == (None, False)


def test_sentences_name_who_starves(explored):
    text = repr(sampler_views.verdict_table(explored))
    assert [line.split()[0] for line in text.splitlines()] == list(explored.params.strategies)
    assert "emoji starves" in text.splitlines()[1]


def test_the_check_says_how_far_off_the_simulation_is(explored):
    fig = sampler_views.check_chart(explored)
    off, equal = deviation(sampler_study.checked(explored))
    assert "udon-s0: simulated from its own losses" in fig.layout.title.text
    assert f"mean absolute difference {off:.2f} percentage points" in fig.layout.title.text
    assert f"equal shares would be off by {equal:.2f}" in fig.layout.title.text
    recorded, simulated = traces(fig, "recorded")[2], traces(fig, "simulated")[2]
    weights = explored.check.allocation().query("domain == 'logos'")["weight"]
    np.testing.assert_allclose(recorded.y[:-1], 100 * weights, rtol=1e-5)
    assert recorded.x[-1] == 300
    assert simulated.line.dash != recorded.line.dash


def test_the_check_names_the_run_that_the_curves_come_from(tmp_path, explored):
    fig = sampler_views.check_chart(opened(tmp_path / "results", run="turns-s0", check="udon-s0"))
    assert "udon-s0: simulated from the losses of turns-s0" in fig.layout.title.text


def test_runs_are_told_apart_by_dash_and_colour_and_share_a_panel_for_each_domain(explored):
    fig = sampler_views.run_chart(explored)
    dynamic, turns = traces(fig, "udon-s0"), traces(fig, "turns-s0")
    assert len(dynamic) == len(turns) == 3
    assert dynamic[0].line.dash != turns[0].line.dash
    assert dynamic[0].line.color != turns[0].line.color
    np.testing.assert_allclose(turns[1].y, 100 / 3, rtol=1e-5)
    weights = explored.source.allocation().query("domain == 'emoji'")["weight"]
    np.testing.assert_allclose(dynamic[0].y[:-1], 100 * weights, rtol=1e-5)
    assert not [trace for trace in fig.data if trace.mode == "markers"]


def test_interventions_are_marked_at_their_steps(explored):
    steer(explored.source.path, 40, {"emoji": 0.8, "flags": 0.1, "logos": 0.1}, multipliers={"<b>": 2.0})
    fig = sampler_views.run_chart(explored)
    marks = [trace for trace in fig.data if trace.mode == "markers"]
    assert [list(mark.x) for mark in marks] == [[40]] * 3
    assert marks[0].text == ("step 40: &lt;b&gt; ×2",)
    assert [trace.name for trace in fig.data if trace.x[0] is None] == ["udon-s0 (▲ steered: 1)", "turns-s0"]
    emoji = traces(fig, "udon-s0")[0]
    assert dict(zip(emoji.x, emoji.y, strict=True))[40] == pytest.approx(80)
    assert "a person steered this run" in sampler_views.check_chart(explored).layout.title.text


def test_runs_of_the_same_name_are_drawn_each_by_itself(tmp_path):
    write_sampled_run(tmp_path / "results", "udon-s0")
    other = write_sampled_run(tmp_path / "others", "udon-s0", "round_robin")
    e = opened(tmp_path / "results", runs=f"udon-s0,{other}")
    steer(other, 40, {"emoji": 0.8, "flags": 0.1, "logos": 0.1}, locks={"emoji": 0.8})
    fig = sampler_views.run_chart(e)
    keys = [trace.name for trace in fig.data if trace.x[0] is None]
    assert keys == ["results/runs/udon-s0", "others/runs/udon-s0 (▲ steered: 1)"]
    own, others = (
        next(t for t in traces(fig, f"{folder}/runs/udon-s0") if len(t.x) > 1) for folder in ("results", "others")
    )
    for line, run in ((own, e.runs[0]), (others, e.runs[1])):
        shares = run.allocation().query("domain == 'emoji'")["share"]
        np.testing.assert_allclose(line.y[:-1], 100 * shares, rtol=1e-5)
    assert "results/runs/udon-s0, others/runs/udon-s0" in repr(sampler_views.explored_table(e))


def test_strategies_are_simulated_once_for_all_that_shows_them(explored, monkeypatch):
    made = []
    true = simulation.simulate
    monkeypatch.setattr(simulation, "simulate", lambda *args: made.append(args[2]) or true(*args))
    sampler_views.strategy_chart(explored)
    sampler_views.outcome_chart(explored)
    sampler_views.verdict_table(explored)
    assert made == list(explored.params.strategies)


def test_too_many_windows_are_refused_and_a_check_of_too_many_says_so(explored, monkeypatch):
    monkeypatch.setattr(simulation, "MAX_DRAWS", 1000)
    with pytest.raises(UserError, match="'update_every': found 30 for 300 steps, but 10 windows would take too long"):
        sampler_views.strategy_chart(explored)
    [note] = sampler_views.check_chart(explored).layout.annotations
    assert "would take too long" in note.text


def test_figures_without_runs_say_so(drawn):
    for draw in (sampler_views.check_chart, sampler_views.run_chart):
        [note] = draw(drawn).layout.annotations
        assert note.text.startswith("no ")
