"""A learning curve is the formula that it says, and a fit finds it again in a run's noisy means."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udonlib import learningcurves
from udonlib.errors import UserError
from udonlib.learningcurves import LearningCurve, fit, fit_points, guessed

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
    merged = learningcurves._merge(first, last, measured(CURVE, first, last))
    assert len(merged[0]) == learningcurves.MAX_POINTS
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
