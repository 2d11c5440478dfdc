from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from udonlib.training.unic import cosine, kept_teachers, teacher_losses, token_loss, unic_terms, warmed_cosine

WIDTHS = {"b": {"class": 4, "patches": 3}, "a": {"class": 5}}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features(seed=0, n=6):
    return {
        "a": {"class": random(n, 5, seed=seed)},
        "b": {"class": random(n, 4, seed=seed + 1), "patches": random(n, 4, 3, seed=seed + 2)},
    }


def draws(n, others, seed=0):
    return torch.rand(n, others, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def terms_of(student, targets, *drawn, **options):
    """The means over the batch."""
    return {
        name: values.mean() for name, values in unic_terms(teacher_losses(student, targets), *drawn, **options).items()
    }


# Losses


def test_a_perfect_student_loses_nothing_and_an_opposite_one_all():
    target = random(3, 5)
    assert token_loss(target, target).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert token_loss(-target, target, 1.0, 0.0).tolist() == pytest.approx([2, 2, 2])


def test_a_far_channel_counts_linearly():
    student, target = torch.zeros(1, 2), torch.tensor([[0.5, 10.0]])
    assert token_loss(student, target, 0.0, 1.0).item() == pytest.approx((0.125 + 9.5) / 2)


def test_patches_are_averaged_over_positions():
    student, target = random(2, 4, 3), random(2, 4, 3, seed=1)
    each = torch.stack([token_loss(student[:, i], target[:, i]) for i in range(4)])
    torch.testing.assert_close(token_loss(student, target), each.mean(0))


def test_no_gradient_reaches_a_target():
    target = random(2, 3).requires_grad_()
    token_loss(random(2, 3, seed=1).requires_grad_(), target).sum().backward()
    assert target.grad is None


def test_teachers_come_in_the_order_of_the_alphabet_and_count_their_own_kinds():
    student, targets = features(), features(seed=9)
    shuffled = {teacher: student[teacher] for teacher in ("b", "a")}
    found = teacher_losses(shuffled, targets)
    assert {teacher: list(kinds) for teacher, kinds in found.items()} == {"a": ["class"], "b": ["class", "patches"]}
    assert list(found) == ["a", "b"]


def test_the_total_without_dropping_is_the_mean_of_teachers_each_the_mean_of_its_kinds():
    student, targets = features(), features(seed=9)
    terms = terms_of(student, targets)
    of_b = (terms["b/class"] + terms["b/patches"]) / 2
    assert terms["total"].item() == pytest.approx(((terms["a/class"] + of_b) / 2).item())
    assert terms["a/kept"] == terms["b/kept"] == 1
    assert not any(value.requires_grad for value in terms.values())


def test_weights_of_teachers_shift_the_total():
    student, targets = features(), features(seed=9)
    terms = terms_of(student, targets, weights={"b": 3.0})
    expected = (terms["a/class"] + 3 * (terms["b/class"] + terms["b/patches"]) / 2) / 4
    assert terms["total"].item() == pytest.approx(expected.item())


def test_only_the_total_has_a_gradient():
    student = {t: {k: v.requires_grad_() for k, v in kinds.items()} for t, kinds in features().items()}
    terms = terms_of(student, features(seed=9), draws(6, 1))
    assert [name for name, value in terms.items() if value.requires_grad] == ["total"]


# Dropping


def kept_naively(losses, p, u):
    """One image after another, as it is said: the largest stays, each other consumes a draw."""
    n_teachers, n = losses.shape
    kept = torch.ones(n_teachers, n, dtype=torch.bool)
    for i in range(n):
        left = iter(u[i].tolist())
        largest = max(range(n_teachers), key=lambda t, i=i: losses[t, i])
        for t in range(n_teachers):
            if t != largest and next(left) < p:
                kept[t, i] = False
    return kept


@given(st.integers(1, 5), st.integers(1, 7), st.floats(0, 1), st.integers(0, 99))
def test_dropping_is_what_it_says_image_by_image(n_teachers, n, p, seed):
    losses, u = random(n_teachers, n, seed=seed).abs(), draws(n, n_teachers - 1, seed)
    assert torch.equal(kept_teachers(losses, p, u), kept_naively(losses, p, u))


def test_never_and_always():
    losses, u = random(3, 8).abs(), draws(8, 2)
    assert kept_teachers(losses, 0.0, u).all()
    assert torch.equal(kept_teachers(losses, 1.0, u).sum(0), torch.ones(8, dtype=torch.long))
    assert torch.equal(kept_teachers(losses, 1.0, u).int().argmax(0), losses.argmax(0))


def test_the_share_that_is_dropped_is_p():
    losses = random(4, 4000).abs()
    kept = kept_teachers(losses, 0.3, draws(4000, 3))
    assert (1 - (kept.sum().item() - 4000) / 12000) == pytest.approx(0.3, abs=0.02)


def test_where_all_are_dropped_that_can_be_the_total_is_the_largest_loss():
    student, targets = features(), features(seed=9)
    by_kind = teacher_losses(student, targets)
    losses = torch.stack([torch.stack(list(kinds.values())).mean(0) for kinds in by_kind.values()])
    for weighing in ("equal", "kept"):
        total = terms_of(student, targets, draws(6, 1), drop_probability=1.0, image_weights=weighing)["total"]
        assert total.item() == pytest.approx(losses.max(0).values.mean().item())


def test_an_image_with_more_teachers_left_weighs_more_in_the_original_alone():
    student, targets = features(n=2), features(seed=9, n=2)
    u = torch.tensor([[0.9], [0.1]], dtype=torch.float64)  # the first image keeps both, the second its largest
    by_kind = teacher_losses(student, targets)
    losses = torch.stack([torch.stack(list(kinds.values())).mean(0) for kinds in by_kind.values()])
    first, second = losses[:, 0], losses[:, 1].max()
    equal = terms_of(student, targets, u, image_weights="equal")
    original = terms_of(student, targets, u, image_weights="kept")
    assert equal["total"].item() == pytest.approx(((first.mean() + second) / 2).item())
    assert original["total"].item() == pytest.approx(((first.sum() + second) / 3).item())
    assert sorted([equal["a/kept"].item(), equal["b/kept"].item()]) == [0.5, 1.0]


# Schedules


def test_a_cosine_begins_and_ends_where_it_should():
    assert cosine(1.0, 0.001, 0, 10) == 1.0
    assert cosine(1.0, 0.001, 5, 10) == pytest.approx(0.5005)
    assert cosine(1.0, 0.001, 10, 10) == pytest.approx(0.001)


def test_a_rate_rises_to_its_peak_and_falls_from_there():
    rates = [warmed_cosine(2.0, 0.5, step, 20, 5) for step in range(20)]
    assert rates[0] == 0
    assert rates[4] == rates[5] == 2.0
    assert rates == [*sorted(rates[:5]), *sorted(rates[5:], reverse=True)]
    assert warmed_cosine(2.0, 0.5, 0, 20, 0) == 2.0
