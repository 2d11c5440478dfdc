from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from udonlib.training.sampler import (
    ImageOrder,
    Sampler,
    claims,
    draw_schedule,
    effective_shares,
    even_schedule,
    initial_weights,
    steps_per_domain,
    updated_weights,
)

# of up to six domains: weight, multiplier or None, lock or None
wishes = st.lists(
    st.tuples(
        st.floats(0.01, 100),
        st.none() | st.just(0.0) | st.floats(0.01, 10),
        st.none() | st.just(0.0) | st.floats(0.01, 1),
    ),
    min_size=1,
    max_size=6,
)
weight_lists = st.lists(st.floats(0.01, 100), min_size=1, max_size=9)


@given(weight_lists, st.integers(1, 500), st.integers(0, 2**32), st.data())
def test_an_even_order_shares_out_every_stretch_as_the_whole(weights, n_steps, seed, data):
    weights = np.array(weights) / sum(weights)
    schedule = even_schedule(weights, n_steps, np.random.default_rng(seed))
    counts = steps_per_domain(weights, n_steps)
    assert np.bincount(schedule, minlength=len(weights)).tolist() == counts.tolist()
    start = data.draw(st.integers(0, n_steps))
    stop = data.draw(st.integers(start, n_steps))
    found = np.bincount(schedule[start:stop], minlength=len(weights))
    # Slots of one domain are as far apart as they can be; those of others move the stretch by one each, at most.
    off = np.abs(found - counts * (stop - start) / n_steps)
    assert off.max() <= 1 + (len(weights) + 1) * counts.max() / n_steps + 1e-9


def test_an_even_order_is_drawn_and_repeated():
    one, again, other = (even_schedule(np.array([0.5, 0.3, 0.2]), 40, np.random.default_rng(n)) for n in (1, 1, 2))
    assert one.tolist() == again.tolist() != other.tolist()
    sampler = make("dataset_size", order="even")
    batches = sampler.window().reshape(-1, 4)
    assert all(2 <= (batch == 2).sum() <= 4 for batch in batches)  # of 0.7
    resumed = make("dataset_size", order="even", seed=5)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert resumed.window().tolist() == sampler.window().tolist()
    assert make("dataset_size").window().tolist() != sampler.window().tolist()


def make(strategy="dynamic", n_slots=40, update_every=8, seed=0, names=("a", "b", "c"), **options):
    return Sampler(
        names, [10, 20, 70][: len(names)], strategy=strategy, n_slots=n_slots, update_every=update_every, seed=seed,
        **options,
    )  # fmt: skip


def run(sampler, losses):
    """All windows of a sampler whose domains have constant losses; returns the schedule that was followed."""
    followed = []
    while len(window := sampler.window()):
        followed += window.tolist()
        for d in window:
            sampler.record(sampler.names[d], 4 * losses[d], 4)
        sampler.advance()
    return followed


@given(weight_lists, st.integers(1, 5000))
def test_steps_of_all_domains_sum_to_the_schedule(weights, n_steps):
    weights = np.array(weights) / np.sum(weights)
    counts = steps_per_domain(weights, n_steps)
    assert counts.sum() == n_steps
    assert np.all(counts[:-1] == np.floor(n_steps * weights[:-1]))


@given(weight_lists, st.integers(1, 500), st.integers(0, 2**32))
def test_a_schedule_has_exactly_these_steps(weights, n_steps, seed):
    weights = np.array(weights) / np.sum(weights)
    schedule = draw_schedule(weights, n_steps, np.random.default_rng(seed))
    assert np.array_equal(np.bincount(schedule, minlength=len(weights)), steps_per_domain(weights, n_steps))


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 9)), min_size=2, max_size=8))
def test_updated_weights_sum_to_one_and_are_never_negative(window):
    losses, counts = np.array([loss * n for loss, n in window]), np.array([n for _, n in window])
    new = updated_weights(np.full(len(window), 1 / len(window)), losses, counts)
    assert new.sum() == pytest.approx(1)
    assert np.all(new >= 0)


def test_domains_with_larger_losses_get_more():
    new = updated_weights(np.array([0.5, 0.5]), np.array([1.0, 9.0]), np.array([1, 3]))
    assert new.tolist() == [0.25, 0.75]


def test_an_unseen_domain_keeps_its_weight_before_all_are_divided_by_their_sum():
    new = updated_weights(np.array([0.2, 0.3, 0.5]), np.array([2.0, 2.0, 0.0]), np.array([1, 1, 0]))
    np.testing.assert_allclose(new, np.array([0.5, 0.5, 0.5]) / 1.5)


@pytest.mark.parametrize("loss", [np.nan, np.inf, -1.0])
def test_losses_that_cannot_be_shared_out_are_refused(loss):
    with pytest.raises(ValueError, match="mean losses must be finite and not negative"):
        updated_weights(np.array([0.5, 0.5]), np.array([loss, 1.0]), np.array([1, 1]))


def test_initial_weights_by_strategy():
    assert initial_weights("dataset_size", [1, 3]).tolist() == [0.25, 0.75]
    assert initial_weights("fixed", [2, 2]).tolist() == [0.5, 0.5]
    assert initial_weights("balanced", [1, 3]).tolist() == [0.5, 0.5]
    assert initial_weights("square_root", [1, 9]).tolist() == [0.25, 0.75]
    np.testing.assert_allclose(initial_weights("temperature", [1, 16], 0.25), [1 / 3, 2 / 3])
    assert initial_weights("temperature", [1, 9], 1.0).tolist() == initial_weights("dataset_size", [1, 9]).tolist()
    with pytest.raises(ValueError, match="unknown allocation 'size'"):
        initial_weights("size", [1, 3])
    with pytest.raises(ValueError, match="sizes must be finite, none negative and not all 0"):
        initial_weights("dataset_size", [0, 0])


def test_round_robin_takes_the_domains_in_turn():
    assert run(make("round_robin", n_slots=7, update_every=3), [1, 1, 1]) == [0, 1, 2, 0, 1, 2, 0]


def test_a_static_allocation_never_changes():
    sampler = make("dataset_size", n_slots=1000, update_every=100)
    counts = np.bincount(run(sampler, [5, 1, 1]))
    assert sampler.weights.tolist() == [0.1, 0.2, 0.7]
    np.testing.assert_allclose(counts / 1000, [0.1, 0.2, 0.7], atol=0.06)


def test_the_dynamic_sampler_starts_in_turn_and_moves_to_the_slow_learners():
    sampler = make(n_slots=4000, update_every=400)
    followed = run(sampler, [8, 1, 1])
    assert followed[:6] == [0, 1, 2, 0, 1, 2]
    np.testing.assert_allclose(sampler.weights, [0.8, 0.1, 0.1])
    assert np.mean(np.array(followed[400:]) == 0) == pytest.approx(0.8, abs=0.03)


def test_windows_are_exact_and_the_last_one_is_cut():
    sampler = make(n_slots=20, update_every=8)
    sizes = []
    while len(window := sampler.window()):
        sizes.append(len(window))
        sampler.advance()
    assert sizes == [8, 8, 4]


def test_claims_by_hand():
    losses, n_images, n_classes = np.array([4.0, 2.0, 3.0]), np.array([10, 20, 40]), np.array([100, 10, 1])
    first, before = np.array([8.0, 2.0, 6.0]), np.array([5.0, 1.0, np.nan])

    def claimed(signal):
        return claims(signal, losses, n_images, n_classes, first, before).tolist()

    assert claimed("loss") == claimed("gap") == [4, 2, 3]
    assert claimed("relative_loss") == pytest.approx([4 / np.log(100), 2 / np.log(10), 3 / np.log(2)])
    assert claimed("remaining_loss") == [0.5, 1, 0.5]
    assert claimed("progress")[:2] == [0.1, 0]  # what rose claims nothing
    assert np.isnan(claimed("progress")[2])
    with pytest.raises(ValueError, match="unknown signal 'los'; valid are loss, gap"):
        claimed("los")


def test_the_loss_that_a_guess_would_have_is_shared_out_equally_by_the_relative_loss():
    n_classes = [300, 30, 3]
    sampler = make(n_slots=40, update_every=8, signal="relative_loss", n_classes=n_classes)
    run(sampler, np.log(n_classes))
    np.testing.assert_allclose(sampler.weights, 1 / 3)


def test_the_remaining_loss_begins_equal_and_then_follows_who_learns_slowly():
    sampler = make(n_slots=40, update_every=8, signal="remaining_loss")
    for losses, expected in (([6, 3, 1], [1 / 3, 1 / 3, 1 / 3]), ([3, 3, 0.25], [2 / 7, 4 / 7, 1 / 7])):
        for name, loss in zip(sampler.names, losses, strict=True):
            sampler.record(name, 4 * loss, 4)
        sampler.advance()
        np.testing.assert_allclose(sampler.weights, expected)


def test_progress_keeps_the_weights_until_two_windows_are_known_and_the_floor_feeds_all():
    sampler = make(n_slots=60, update_every=8, signal="progress", floor=0.3)
    for losses, expected in (([6, 3, 1], [1, 1, 1]), ([5, 3, 1.5], [2.4, 0.3, 0.3]), ([5, 3, 1.5], [2.4, 0.3, 0.3])):
        for name, loss in zip(sampler.names, losses, strict=True):
            sampler.record(name, 4 * loss, 4)
        sampler.advance()
        if losses == [5, 3, 1.5] and sampler.start == 24:  # nobody moved: the weights stay, but for the floor
            expected = [0.7 * 0.8 * 3 + 0.3, 0.7 * 0.1 * 3 + 0.3, 0.7 * 0.1 * 3 + 0.3]
        np.testing.assert_allclose(sampler.weights, np.array(expected) / 3)


def test_a_student_that_is_better_than_its_teacher_has_no_gap():
    sampler = make(n_slots=40, update_every=8, signal="gap", floor=0.3)
    for name, gap in zip(sampler.names, [-1.0, 2.0, 2.0], strict=True):
        sampler.record(name, 4 * gap, 4)
    sampler.advance()
    np.testing.assert_allclose(sampler.weights, [0.1, 0.45, 0.45])


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("dynamic", {}),
        ("dynamic", {"signal": "relative_loss", "n_classes": [9, 5, 2]}),
        ("dynamic", {"signal": "remaining_loss"}),
        ("dynamic", {"signal": "progress", "floor": 0.2}),
        ("round_robin", {}),
        ("dataset_size", {}),
        ("square_root", {}),
    ],
)
@pytest.mark.parametrize("n_windows", [0, 1, 3])
def test_a_restored_sampler_goes_on_as_the_original_would_have(strategy, options, n_windows):
    original = make(strategy, seed=5, **options)
    for window in range(n_windows):
        original.record("a", 30.0 / (1 + window), 2)
        original.record("c", 1.0, 2)
        original.advance()
    original.record("b", 7.0, 3)
    state = json.loads(json.dumps(original.state_dict()))
    restored = make(strategy, seed=99, **options)
    restored.load_state_dict(state)
    assert run(restored, [3, 2, 1]) == run(original, [3, 2, 1])
    assert restored.weights.tolist() == original.weights.tolist()


def test_the_state_of_other_domains_is_refused():
    with pytest.raises(ValueError, match=r"state of domains \['a', 'b', 'c'\] does not fit"):
        make(names=("a", "b")).load_state_dict(make().state_dict())


def test_a_smoothed_update_keeps_a_share_of_the_old_allocation():
    plain, smooth = make("dynamic"), make("dynamic", smoothing=0.75)
    before = smooth.weights.copy()
    for sampler in (plain, smooth):
        for name, loss in (("a", 6.0), ("b", 3.0), ("c", 1.0)):
            sampler.record(name, loss, 1)
        sampler.advance()
    np.testing.assert_allclose(smooth.weights, 0.75 * before + 0.25 * plain.weights)


def test_fixed_shares_are_followed():
    sampler = make("fixed", shares={"a": 1, "b": 0, "c": 3}, n_slots=400, update_every=400)
    assert np.bincount(sampler.window(), minlength=3).tolist() == [100, 0, 300]


def test_a_domain_without_a_fixed_share_is_named():
    with pytest.raises(ValueError, match="no share for c"):
        make("fixed", shares={"a": 1, "b": 1})


def test_every_pass_over_a_domain_takes_each_image_once_in_another_order():
    order = ImageOrder(["a", "b"], [7, 3], seed=1)
    passes = [order.take("a", 7).tolist() for _ in range(3)]
    assert all(sorted(images) == list(range(7)) for images in passes)
    assert passes[0] != passes[1] != passes[2]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12), st.integers(0, 11))
def test_the_order_of_images_does_not_depend_on_how_they_are_taken_or_restored(takes, cut):
    whole = ImageOrder(["a", "b"], [7, 3], seed=1).take("b", sum(takes)).tolist()
    parts = ImageOrder(["a", "b"], [7, 3], seed=1)
    taken = []
    for i, n in enumerate(takes):
        if i == cut:
            state = json.loads(json.dumps(parts.state_dict()))
            parts = ImageOrder(["a", "b"], [7, 3], seed=1)
            parts.load_state_dict(state)
        taken += parts.take("b", n).tolist()
    assert taken == whole
    assert parts.n_seen() == {"a": 0, "b": sum(takes)}


def unpacked(domains):
    """Weights that sum to 1, names, multipliers, locks; examples that leave nothing to train are left out."""
    names = [f"d{place}" for place in range(len(domains))]
    weights = np.array([weight for weight, _, _ in domains])
    multipliers = {name: factor for name, (_, factor, _) in zip(names, domains, strict=True) if factor is not None}
    locks = {name: share for name, (_, _, share) in zip(names, domains, strict=True) if share is not None}
    assume(any(locks.get(name, multipliers.get(name, 1.0)) > 0 for name in names))
    return weights / weights.sum(), names, multipliers, locks


@given(wishes)
def test_effective_shares_sum_to_one_and_are_never_negative(domains):
    shares = effective_shares(*unpacked(domains))
    assert shares.sum() == pytest.approx(1, abs=1e-12)
    assert np.all(shares >= 0)


@given(wishes)
def test_locks_are_kept_exactly_where_others_can_take_the_rest(domains):
    weights, names, multipliers, locks = unpacked(domains)
    shares = dict(zip(names, effective_shares(weights, names, multipliers, locks).tolist(), strict=True))
    free = [name for name in names if name not in locks and multipliers.get(name, 1.0) > 0]
    if sum(locks.values()) <= 1 and free:
        assert {name: shares[name] for name in locks} == locks
    else:
        total = sum(locks.values())
        assert {name: shares[name] for name in locks} == pytest.approx({n: v / total for n, v in locks.items()})
        assert sum(shares[name] for name in names if name not in locks) == 0


@given(wishes)
def test_free_domains_share_the_rest_by_weight_times_multiplier(domains):
    weights, names, multipliers, locks = unpacked(domains)
    shares = effective_shares(weights, names, multipliers, locks)
    free = np.array([0.0 if n in locks else w * multipliers.get(n, 1.0) for n, w in zip(names, weights, strict=True)])
    pinned = sum(locks.values())
    if free.sum() > 0 and pinned <= 1:
        places = [place for place, name in enumerate(names) if name not in locks]
        np.testing.assert_allclose(shares[places], ((1 - pinned) * free / free.sum())[places], rtol=1e-9, atol=1e-12)


@given(wishes, st.floats(0.1, 10))
def test_only_the_ratio_of_multipliers_counts(domains, factor):
    weights, names, multipliers, locks = unpacked(domains)
    scaled = {name: factor * multipliers.get(name, 1.0) for name in names}
    expected = effective_shares(weights, names, multipliers, locks)
    np.testing.assert_allclose(effective_shares(weights, names, scaled, locks), expected, rtol=1e-9, atol=1e-12)


@given(weight_lists)
def test_without_steering_the_shares_are_the_weights_to_the_bit(weights):
    weights = np.array(weights) / np.sum(weights)
    names = [f"d{place}" for place in range(len(weights))]
    shares = effective_shares(weights, names, {}, {})
    assert shares.tolist() == weights.tolist()
    shares[0] = 7  # a copy: whoever changes it does not change the sampler
    assert weights[0] <= 1


def test_multipliers_and_locks_by_hand():
    weights, names = np.array([0.5, 0.3, 0.2]), "abc"
    assert effective_shares(weights, names, {"a": 0.0}, {}).tolist() == pytest.approx([0, 0.6, 0.4])
    assert effective_shares(weights, names, {"c": 4.0}, {}).tolist() == pytest.approx([0.5 / 1.6, 0.3 / 1.6, 0.5])
    assert effective_shares(weights, names, {"a": 9.0}, {"a": 0.2}).tolist() == pytest.approx([0.2, 0.48, 0.32])
    assert effective_shares(weights, names, {}, {"a": 0.9, "b": 0.9}).tolist() == pytest.approx([0.5, 0.5, 0])
    assert effective_shares(weights, names, {"c": 0.0}, {"a": 0.1, "b": 0.3}).tolist() == pytest.approx([0.25, 0.75, 0])


@pytest.mark.parametrize(("multipliers", "locks"), [({"a": 0.0, "b": 0.0}, {}), ({"a": 0.0}, {"b": 0.0})])
def test_shares_of_nothing_are_refused(multipliers, locks):
    with pytest.raises(ValueError, match="no domain is left: multipliers .*'a': 0.0"):
        effective_shares(np.array([0.5, 0.5]), "ab", multipliers, locks)


@given(wishes, st.integers(1, 300), st.integers(0, 99))
def test_a_domain_without_a_share_gets_no_step(domains, n_steps, seed):
    shares = effective_shares(*unpacked(domains))
    schedule = draw_schedule(shares, n_steps, np.random.default_rng(seed))
    assert len(schedule) == n_steps
    assert not np.isin(schedule, np.flatnonzero(shares == 0)).any()


@pytest.mark.parametrize("strategy", ["dynamic", "round_robin", "dataset_size"])
def test_steering_changes_the_rest_of_the_window_and_nothing_else(strategy):
    sampler = make(strategy, n_slots=4000, update_every=2000)
    sampler.record("a", 30.0, 2)
    before = sampler.weights.copy()
    sampler.steer({"a": 0.0}, {"b": 0.25}, slot=500)
    assert (sampler.start, sampler.stop) == (500, 2000)
    assert sampler.weights.tolist() == before.tolist()
    assert sampler.shares.tolist() == pytest.approx([0, 0.25, 0.75])
    np.testing.assert_allclose(np.bincount(sampler.window(), minlength=3) / 1500, [0, 0.25, 0.75], atol=0.03)
    assert (sampler.loss_sums.tolist(), sampler.n_images.tolist()) == ([30.0, 0, 0], [2, 0, 0])
    sampler.advance()
    assert (sampler.start, sampler.stop) == (2000, 4000)
    np.testing.assert_allclose(np.bincount(sampler.window(), minlength=3) / 2000, [0, 0.25, 0.75], atol=0.03)


def test_a_domain_muted_within_a_window_is_updated_by_its_losses_until_then_and_keeps_that_weight():
    sampler = make()
    for name, loss in (("a", 6.0), ("b", 3.0), ("c", 1.0)):
        sampler.record(name, loss, 1)
    sampler.steer({"a": 0.0}, {}, slot=4)
    sampler.advance()
    assert sampler.weights.tolist() == pytest.approx([0.6, 0.3, 0.1])
    for name in "bc":
        sampler.record(name, 2.0, 1)
    sampler.advance()
    assert sampler.weights.tolist() == pytest.approx([0.6, 0.2, 0.2])


def test_what_is_steered_back_is_the_strategy_s_own_again():
    sampler = make("round_robin", n_slots=60, update_every=20)
    sampler.steer({"a": 5.0}, {}, slot=4)
    sampler.steer({}, {}, slot=8)
    assert sampler.window().tolist() == [n % 3 for n in range(8, 20)]
    assert run(sampler, [1, 1, 1]) == [n % 3 for n in range(8, 60)]
    sampler = make("dynamic", n_slots=60, update_every=20)
    sampler.steer({"a": 5.0}, {}, slot=4)
    sampler.steer({}, {}, slot=8)
    assert sampler.shares.tolist() == sampler.weights.tolist()


@pytest.mark.parametrize("strategy", ["dynamic", "round_robin", "dataset_size"])
def test_a_steered_sampler_that_is_restored_goes_on_as_the_original_would_have(strategy):
    original = make(strategy, seed=5)
    original.record("a", 30.0, 2)
    original.steer({"a": 3.0}, {}, slot=2)
    original.advance()
    original.record("b", 7.0, 3)
    original.steer({"a": 3.0}, {"c": 0.5}, slot=11)
    state = json.loads(json.dumps(original.state_dict()))
    restored = make(strategy, seed=99)
    restored.load_state_dict(state)
    assert (restored.start, restored.stop) == (11, 16)
    assert restored.shares.tolist() == original.shares.tolist()
    assert run(restored, [3, 2, 1]) == run(original, [3, 2, 1])


def test_a_state_from_before_there_was_steering_is_continued():
    original = make(seed=5)
    original.record("a", 30.0, 2)
    original.advance()
    state = {name: v for name, v in original.state_dict().items() if name not in ("stop", "multipliers", "locks")}
    restored = make(seed=99)
    restored.load_state_dict(state)
    assert (restored.start, restored.stop) == (8, 16)
    assert run(restored, [3, 2, 1]) == run(original, [3, 2, 1])


@given(st.integers(0, 8), st.integers(0, 8), st.floats(0, 10))
def test_steering_draws_as_often_as_a_person_wishes_and_every_window_still_ends_in_its_place(first, second, factor):
    sampler = make(n_slots=20, update_every=8)
    first, second = sorted((first, second))
    sampler.steer({"a": factor}, {}, first)
    sampler.steer({"b": factor}, {"c": 0.5}, second)
    sizes = []
    while sampler.start < sampler.n_slots:
        sizes.append(len(sampler.window()))
        sampler.advance()
    assert sizes == [8 - second, 8, 4]
