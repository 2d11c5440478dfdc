"""The simulated sampler is the real one, and the sentences about who starves say what its tables hold."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udonlib.errors import UserError
from udonlib.lab.explore import simulation
from udonlib.lab.explore.simulation import (
    LearningCurve,
    Setting,
    compare,
    deviation,
    fit,
    fit_points,
    guessed,
    outcome,
    simulate,
    verdict,
)
from udonlib.training.sampler import ImageOrder, Sampler

SIZES = {"emoji": 500, "flags": 100, "logos": 300}
CURVES = {
    "emoji": LearningCurve(6.0, 0.5, 2000.0),
    "flags": LearningCurve(4.0, 0.1, 100.0, 2.0),
    "logos": LearningCurve(5.0, 0.2, 600.0, 0.5),
}
SETTING = Setting(SIZES, steps=330, batch_size=24, domains_per_batch=3, update_every=50, seed=3)


def trained(setting: Setting, strategy: str) -> list[tuple[int, list[float], dict[str, int]]]:
    """Step, allocation and images seen at each window of a training, step by step and image by image."""
    parts = setting.domains_per_batch
    sampler = Sampler(
        list(setting.sizes),
        list(setting.sizes.values()),
        strategy=strategy,
        n_slots=setting.steps * parts,
        update_every=setting.update_every * parts,
        initial=setting.initial,
        shares=dict.fromkeys(setting.sizes, 1.0),
        smoothing=setting.smoothing,
        seed=setting.seed,
        alpha=setting.alpha,
        signal=setting.signal,
        n_classes=[setting.n_classes.get(name, 2) for name in setting.sizes],
        floor=setting.floor,
        order=setting.order,
    )
    order = ImageOrder(list(setting.sizes), list(setting.sizes.values()))
    rows = []
    step = 0
    while step < setting.steps:
        rows.append((step, sampler.weights.tolist(), order.n_seen()))
        for slots in sampler.window().reshape(-1, parts):
            for d in slots:
                name, n = sampler.names[d], setting.batch_size // parts
                seen = order.n_seen()[name]
                order.take(name, n)
                sampler.record(name, float(CURVES[name].loss(seen + np.arange(n) + 0.5).sum()), n)
            step += 1
        sampler.advance()
    return [*rows, (step, [], order.n_seen())]


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("dynamic", {}),
        ("dynamic", {"smoothing": 0.7}),
        ("dynamic", {"initial": "dataset_size", "domains_per_batch": 1}),
        ("round_robin", {}),
        ("balanced", {}),
        ("dataset_size", {"update_every": 1000}),
        ("fixed", {}),
        ("square_root", {}),
        ("temperature", {"alpha": 0.7}),
        ("dynamic", {"signal": "relative_loss", "n_classes": {"emoji": 40, "flags": 9, "logos": 20}}),
        ("dynamic", {"signal": "remaining_loss"}),
        ("dynamic", {"signal": "progress", "floor": 0.3}),
        ("dynamic", {"order": "even"}),
        ("dataset_size", {"order": "even"}),
    ],
)
def test_a_simulation_is_what_a_training_with_these_losses_would_do(strategy, changes):
    setting = dataclasses.replace(SETTING, **changes)
    *windows, end = trained(setting, strategy)
    found = simulate(CURVES, setting, strategy)
    assert found.starts.tolist() == [step for step, _, _ in windows]
    np.testing.assert_allclose(found.shares, [weights for _, weights, _ in windows], atol=2e-5)
    np.testing.assert_array_equal(found.seen[:-1], [list(seen.values()) for _, _, seen in windows])
    np.testing.assert_array_equal(found.seen[-1], list(end[2].values()))
    assert found.seen[-1].sum() == setting.steps * setting.batch_size


@pytest.mark.parametrize("rule", ["relative_loss", "remaining_loss", "progress"])
def test_a_rule_named_as_a_strategy_is_the_dynamic_sampler_with_that_signal(rule):
    named = simulate(CURVES, dataclasses.replace(SETTING, floor=0.2), rule)
    asked = simulate(CURVES, dataclasses.replace(SETTING, floor=0.2, signal=rule))
    np.testing.assert_array_equal(named.shares, asked.shares)
    assert named.strategy == rule
    assert not np.array_equal(named.shares, simulate(CURVES, SETTING).shares)


def test_progress_without_a_floor_is_simulated_with_one():
    assert simulate(CURVES, SETTING, "progress").shares.min() >= 0.2 / 3 - 1e-9


def test_losses_are_those_of_the_curves_at_the_images_seen():
    found = simulate(CURVES, SETTING)
    for d, name in enumerate(found.names):
        np.testing.assert_allclose(found.losses[:, d], CURVES[name].loss(found.seen[:, d]))


def test_the_dynamic_sampler_feeds_slow_learners_and_smoothing_slows_it():
    table = outcome(simulate(CURVES, SETTING), SIZES).set_index("domain")
    assert table["share"].idxmax() == "emoji"
    assert table["share"].idxmin() == "flags"
    steps = [
        np.abs(np.diff(simulate(CURVES, dataclasses.replace(SETTING, smoothing=s)).shares, axis=0)).max()
        for s in (0.0, 0.5, 0.9)
    ]
    assert steps[0] > 1.5 * steps[1] > 2 * steps[2]


def test_shares_by_size_follow_the_images_and_fixed_ones_the_wish():
    by_size = outcome(simulate(CURVES, SETTING, "dataset_size"), SIZES)
    np.testing.assert_allclose(by_size["share"], np.array([5, 1, 3]) / 9, atol=0.05)
    assert by_size["passes"].max() < 1.5 * by_size["passes"].min()
    wish = dataclasses.replace(SETTING, shares={"emoji": 0.0, "flags": 30.0, "logos": 10.0})
    np.testing.assert_allclose(outcome(simulate(CURVES, wish, "fixed"), SIZES)["share"], [0, 0.75, 0.25], atol=0.03)


def test_who_starves_has_less_than_half_of_what_its_loss_claims():
    level = {"emoji": LearningCurve(6.0, 6.0), "flags": LearningCurve(1.0, 1.0), "logos": LearningCurve(1.0, 1.0)}
    equal = simulate(level, SETTING, "round_robin")
    table = outcome(equal, SIZES)
    np.testing.assert_allclose(table["claim"], [0.75, 0.125, 0.125])
    np.testing.assert_allclose(table["fed"], [4 / 9, 8 / 3, 8 / 3])
    assert table["starves"].tolist() == [True, False, False]
    np.testing.assert_allclose(table["passes"], np.array([1, 1, 1]) * 330 * 8 / np.array([500, 100, 300]))
    text = verdict(table)
    assert text.startswith("emoji starves (33.3% of the images, its loss claims 75.0%); fewest passes: emoji, 5.3")
    assert text.endswith("shares are equal.")
    fed = verdict(outcome(simulate(level, SETTING), SIZES))
    assert fed.startswith("nobody starves; fewest passes: logos")
    assert "least share: " in fed


def test_a_training_without_losses_left_starves_nobody():
    perfect = dict.fromkeys(SIZES, LearningCurve(1.0, 0.0, 1e-9, 3.0))
    table = outcome(simulate(perfect, SETTING, "dataset_size"), SIZES)
    assert np.isfinite(table.select_dtypes("number")).all().all()


def recorded(found: simulation.Simulation, shift: float = 0.0) -> pd.DataFrame:
    rows = [
        (step, name, share + shift * (-1) ** d)
        for step, shares in zip(found.starts, found.shares, strict=True)
        for d, (name, share) in enumerate(zip(found.names, shares, strict=True))
    ]
    return pd.DataFrame(rows, columns=["step", "domain", "weight"])


def test_a_run_that_did_as_simulated_is_off_by_nothing_and_one_that_did_not_by_as_much():
    found = simulate(CURVES, SETTING)
    assert deviation(compare(found, recorded(found)))[0] == 0
    assert deviation(compare(found, recorded(found, 0.02)))[0] == pytest.approx(2)
    updated = np.abs(found.shares[1:] - 1 / 3).mean()
    assert deviation(compare(found, recorded(found)))[1] == pytest.approx(100 * updated)


def test_rows_between_windows_and_windows_after_the_end_do_not_count():
    found = simulate(CURVES, SETTING)
    rows = recorded(found)
    between = pd.DataFrame({"step": [120] * 3, "domain": found.names, "weight": [1.0, 0.0, 0.0]})
    early = pd.concat([rows[rows["step"] <= 150], between])
    compared = compare(found, early)
    assert sorted(set(compared["step"])) == [0, 50, 100, 150]
    assert deviation(compared)[0] == 0


def test_a_run_without_an_update_says_nothing():
    found = simulate(CURVES, dataclasses.replace(SETTING, update_every=1000))
    assert np.isnan(deviation(compare(found, recorded(found)))).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"domains_per_batch": 5}, "parameter 'domains_per_batch': found 5, expected a divisor of batch_size = 24"),
        (
            {"shares": {"emoji": 1.0}},
            "parameter 'fixed_shares': found emoji 1, expected a share for each of emoji, flags",
        ),
        ({"shares": dict.fromkeys(SIZES, 0.0)}, "not all of them 0"),
    ],
)
def test_a_setting_that_cannot_be_trained_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SETTING, **values)


def test_what_would_take_too_long_counts_windows_parts_of_a_batch_and_strategies(monkeypatch):
    draws = 330 * 3 * 7  # slots of the schedule, once for each window
    monkeypatch.setattr(simulation, "MAX_DRAWS", draws)
    assert len(simulation.simulate_all(CURVES, SETTING, ["dynamic"])) == 1
    with pytest.raises(UserError, match="'update_every': found 50 for 330 steps, but 7 windows would take too long"):
        simulation.simulate_all(CURVES, SETTING, ["dynamic", "balanced"])
    monkeypatch.setattr(simulation, "MAX_DRAWS", draws - 1)
    with pytest.raises(UserError, match="7 windows would take too long"):
        simulation.simulate_all(CURVES, SETTING, ["dynamic"])


CURVE = LearningCurve(start=6.0, floor=0.3, half_images=700.0, power=1.5)

curves = st.builds(
    lambda start, part, half, power: LearningCurve(start, part * start, half, power),
    st.floats(0.1, 20),
    st.floats(0, 1),
    st.floats(1, 1e5),
    st.sampled_from([0.3, 0.5, 1.0, 1.5, 3.0]),
)


def stretches(n_points: int, n_images: int) -> tuple[np.ndarray, np.ndarray]:
    ends = np.linspace(0, n_images, n_points + 1).round()
    return ends[:-1], ends[1:]


def measured(curve: LearningCurve, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Mean loss over the images of each stretch, image by image."""
    return np.array([curve.loss(np.arange(a, b) + 0.5).mean() for a, b in zip(first, last, strict=True)])


@given(curves)
def test_a_curve_falls_from_its_start_through_halfway_to_its_floor(curve):
    n = np.geomspace(1, 1e9, 50)
    losses = curve.loss(n)
    assert np.all(np.diff(losses) <= 1e-12)
    assert np.all(losses >= curve.floor - 1e-12)
    assert curve.loss(np.array([0.0])) == pytest.approx(curve.start)
    assert curve.loss(np.array([curve.half_images])) == pytest.approx((curve.start + curve.floor) / 2)


@given(curves, st.integers(0, 5000), st.integers(1, 400))
def test_the_mean_of_a_stretch_is_the_mean_over_its_images(curve, first, n_images):
    n = first + (np.arange(100 * n_images) + 0.5) / 100
    assert curve.mean(float(first), float(first + n_images)) == pytest.approx(curve.loss(n).mean(), rel=1e-3)


@pytest.mark.parametrize("values", [(0.0,), (1.0, 2.0), (1.0, -0.1), (1.0, 0.0, 0.0), (1.0, 0.0, 9.0, 0.0), (np.nan,)])
def test_values_that_make_no_curve_are_refused(values):
    with pytest.raises(UserError, match="learning curve: found start .*expected 0 <= floor <= start"):
        LearningCurve(*values)


@pytest.mark.parametrize(
    "curve", [CURVE, LearningCurve(9.0, 0.0, 150.0, 0.5), LearningCurve(2.0, 0.5, 4000.0, 3.0)], ids=str
)
def test_a_fit_finds_the_curve_that_made_the_points(curve):
    first, last = stretches(12, 10_000)
    found = fit(first, last, measured(curve, first, last))
    assert found.residual < 0.01
    n = np.linspace(400, 10_000, 30)
    np.testing.assert_allclose(found.curve.loss(n), curve.loss(n), rtol=0.03)


def test_the_residual_is_how_far_points_typically_lie_from_the_curve():
    first, last = stretches(60, 20_000)
    noise = np.exp(np.random.default_rng(0).choice([-0.1, 0.1], size=60))
    found = fit(first, last, measured(CURVE, first, last) * noise)
    assert found.residual == pytest.approx(0.1, abs=0.02)


def test_one_record_that_is_far_off_does_not_bend_the_curve():
    first, last = stretches(20, 10_000)
    loss = measured(CURVE, first, last)
    loss[12] *= 8
    n = np.linspace(300, 10_000, 30)
    np.testing.assert_allclose(fit(first, last, loss).curve.loss(n), CURVE.loss(n), rtol=0.08)


def test_losses_that_do_not_fall_give_their_level():
    first, last = stretches(10, 5000)
    rising = fit(first, last, np.linspace(1.0, 1.1, 10)).curve
    assert rising.loss(np.array([5000.0])) == pytest.approx(1.05, abs=0.03)
    assert rising.loss(np.array([1000.0])) - rising.loss(np.array([5000.0])) < 0.02


def test_two_points_are_too_few_for_a_fall():
    found = fit(np.array([0.0, 300.0]), np.array([300.0, 400.0]), np.array([4.0, 2.0]))
    assert found.curve.start == found.curve.floor == pytest.approx(3.5)  # weighted by images


def test_many_records_are_merged_without_loss():
    first, last = stretches(5000, 50_000)
    found = fit(first, last, measured(CURVE, first, last))
    assert found.residual < 0.01
    merged = simulation._merge(first, last, measured(CURVE, first, last))
    assert len(merged[0]) == simulation.MAX_POINTS
    assert (merged[0][0], merged[1][-1]) == (0, 50_000)
    np.testing.assert_array_equal(merged[0][1:], merged[1][:-1])
    np.testing.assert_allclose(merged[2], measured(CURVE, merged[0], merged[1]), rtol=1e-9)


def test_nothing_to_fit_is_an_error():
    with pytest.raises(UserError, match="no losses to fit a learning curve to"):
        fit(np.array([]), np.array([]), np.array([]))


def test_each_domain_has_its_own_fit_in_the_order_of_the_points():
    first, last = stretches(8, 4000)
    other = LearningCurve(1.0, 0.2, 100.0)
    tables = [
        pd.DataFrame({"domain": name, "first": first, "last": last, "loss": measured(curve, first, last)})
        for name, curve in (("zebra", CURVE), ("ant", other))
    ]
    fits = fit_points(pd.concat(tables).sample(frac=1, random_state=1).sort_values("domain", ascending=False))
    assert list(fits) == ["zebra", "ant"]
    for name, curve in (("zebra", CURVE), ("ant", other)):
        assert fits[name].curve.loss(np.array([2000.0])) == pytest.approx(curve.loss(np.array([2000.0])), rel=0.03)


def test_a_drawn_curve_begins_with_a_guess_among_the_classes():
    assert guessed(312, 2348).start == pytest.approx(np.log(312))
    assert guessed(312, 2348).half_images == 2348
    assert guessed(1, 0).start > 0
