"""The simulated sampler is the real one, and the sentences about who starves say what its tables hold."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from udonlib import simulation
from udonlib.errors import UserError
from udonlib.learningcurves import LearningCurve
from udonlib.sampler import ImageOrder, Sampler
from udonlib.simulation import Setting, compare, deviation, outcome, simulate, verdict

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
