from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.training import SMALL
from udonlib.errors import UserError
from udonlib.models.backbones import create_backbone
from udonlib.models.embedding_model import create_model
from udonlib.models.teachers import BackboneTokens, Teacher
from udonlib.params import TrainParams
from udonlib.training.interventions import Wish
from udonlib.training.learner import Learner
from udonlib.training.losses import Batch, UdonObjective
from udonlib.training.unic import (
    UnicObjective,
    cosine,
    kept_teachers,
    teacher_losses,
    token_loss,
    unic_terms,
    warmed_cosine,
)

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


@pytest.mark.parametrize("image_weights", ["equal", "kept"])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_a_teacher_without_weight_teaches_no_image_and_is_never_the_farthest(p, image_weights):
    losses = {name: random(6, seed=seed).abs() for seed, name in enumerate("abc")}
    losses["b"] += 10
    u = draws(6, 2)
    kinds = {name: {"class": values} for name, values in losses.items()}
    found = unic_terms(kinds, u, drop_probability=p, weights={"b": 0.0, "c": 3.0}, image_weights=image_weights)
    sums, left = torch.zeros(6), torch.zeros(6)
    for i in range(6):
        farthest = max("ac", key=lambda name, i=i: losses[name][i])
        others = [name for name in "abc" if name != farthest]
        for name, weight in {"a": 1.0, "b": 0.0, "c": 3.0}.items():
            kept = weight > 0 and (name == farthest or bool(u[i, others.index(name)] >= p))
            assert found[f"{name}/kept"][i] == kept
            sums[i] += weight * kept * losses[name][i]
            left[i] += weight * kept
    torch.testing.assert_close(found["total"], sums / (left if image_weights == "equal" else left.mean()))
    assert torch.equal(found["b/class"], losses["b"])  # it is still seen
    without = unic_terms(kinds, weights={"b": 0.0})
    torch.testing.assert_close(without["total"], (losses["a"] + losses["c"]) / 2)
    assert not without["b/kept"].any()


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


# The objective

TEACHERS = {
    "small": {"backbone": "small_resnet", "pretrained": True, "image_size": 48},
    "wide": {"backbone": "small_resnet", "pretrained": True, "image_size": 32, "kinds": ["class"], "weight": 3.0},
}


def unic_params(**changes):
    return TrainParams(**SMALL | {"recipe": "unic", "teachers": TEACHERS, "sampler": "round_robin"} | changes)


def frozen_teachers():
    made = {}
    for name, (width, side, kinds) in {"wide": (12, 32, ["class"]), "small": (8, 48, ["class", "patches"])}.items():
        torch.manual_seed(width)
        encoder = create_backbone("small_resnet", pretrained=False, image_size=side, arguments={"width": width})
        made[name] = Teacher(name, BackboneTokens(encoder), side, (0.5,) * 3, (0.5,) * 3, kinds)
    return made


def objective(params, model, **options):
    return UnicObjective(params, model, frozen_teachers(), **options).train()


def student(params):
    return create_model(params, {"a": 3, "b": 4})


def a_batch(n=8, number=0, seed=0):
    images = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 255
    first = n // 4
    slots = [("a", np.arange(first)), ("b", np.arange(n - first))]
    parts = [("a", torch.zeros(first, dtype=torch.long)), ("b", torch.ones(n - first, dtype=torch.long))]
    return Batch(images, parts, slots, number)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_weights": "kept", "drop_probability": 0.3},
        {"projector": "last", "standard": "batch"},
        {"projector": "transformer", "standard": "none"},
        {"projected_end": "block", "standard_update": "after"},
        {"projected_blocks": [0, 2]},
    ],
)
def test_a_step_loses_what_its_parts_say(changes):
    params = unic_params(**changes)
    model = student(params)
    ours, batch = objective(params, model), a_batch(number=3)
    told = {}
    ours.projectors.register_forward_hook(lambda _, __, out: told.update(said=out))
    ours.standards.register_forward_hook(lambda _, __, out: told.update(targets=out))
    found = ours.terms(model, batch)
    drawn = ours._draws(batch)
    assert drawn.shape == (8, 1)
    expected = unic_terms(
        teacher_losses(told["said"], told["targets"]),
        drawn,
        drop_probability=params.drop_probability,
        weights={"wide": 3.0},
        image_weights=params.image_weights,
    )
    assert set(found["a"]) == {"total", "small/class", "small/patches", "small/kept", "wide/class", "wide/kept"}
    for name, values in expected.items():
        assert torch.allclose(found["a"][name], values[:2].mean())
        assert torch.allclose(found["b"][name], values[2:].mean())
    found["b"]["total"].backward()
    assert all(p.grad is not None for p in ours.projectors.parameters())


@pytest.mark.parametrize("projector", ["ladder", "last", "transformer"])
def test_projectors_compute_in_the_precision_of_the_step_and_losses_in_float32(projector):
    params = unic_params(projector=projector, drop_probability=0.0)
    model = student(params)
    ours = objective(params, model)
    computed = []
    *_, linear = (part for part in ours.projectors.modules() if isinstance(part, torch.nn.Linear))
    linear.register_forward_hook(lambda _, __, out: computed.append(out.dtype))
    exact, low = (ours.terms(model, replace(a_batch(), precision=p)) for p in (torch.float32, torch.bfloat16))
    assert computed == [torch.float32, torch.bfloat16]
    for name, value in exact["b"].items():
        assert low["b"][name].dtype == torch.float32
        assert torch.allclose(low["b"][name], value, rtol=0.02), name


def test_teachers_see_the_batch_and_are_no_part_of_what_is_kept():
    params = unic_params(standard="none")
    model = student(params)
    ours, batch = objective(params, model), a_batch()
    seen = ours._ask(batch, 1)
    expected = {name: teacher(batch.images, 1) for name, teacher in frozen_teachers().items()}
    for name, kinds in expected.items():
        for kind, value in kinds.items():
            assert torch.equal(seen[name][kind], value)
    assert not any("encoder" in name for name in ours.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in ours.projectors.parameters())


def test_known_features_stand_for_the_teachers_on_the_students_grid():
    params = unic_params(standard="none")
    model = student(params)
    asked = objective(params, model)
    known = {name: teacher(a_batch().images) for name, teacher in frozen_teachers().items()}
    assert known["small"]["patches"].shape[1] == 9
    told = objective(params, model, features=lambda batch: known)
    first, second = (some.eval().terms(model.eval(), a_batch()) for some in (asked, told))
    for domain in "ab":
        for name in first[domain]:
            assert torch.allclose(first[domain][name], second[domain][name]), name


def test_in_validation_nobody_is_dropped_and_statistics_stay():
    params = unic_params(drop_probability=1.0)
    model = student(params)
    ours = objective(params, model)
    ours.terms(model, a_batch())
    before = {name: value.clone() for name, value in ours.standards.state_dict().items()}
    terms = ours.eval().terms(model, a_batch(seed=1))
    assert terms["a"]["small/kept"] == terms["a"]["wide/kept"] == 1
    assert all(torch.equal(value, before[name]) for name, value in ours.standards.state_dict().items())
    again = ours.train().terms(model, a_batch(seed=1))
    assert (again["a"]["small/kept"] + again["a"]["wide/kept"]).item() == pytest.approx(1)


def test_momentum_falls_from_the_first_step_to_the_last():
    params = unic_params(steps=10, standard_momentum=0.8, standard_momentum_end=0.2)
    model = student(params)
    ours, seen = objective(params, model), []
    ours.standards.register_forward_hook(lambda _, inputs, __: seen.append(inputs[1]))
    for number in (0, 5, 9):
        ours.terms(model, a_batch(number=number))
    assert seen == [pytest.approx(x) for x in (0.8, 0.5, cosine(0.8, 0.2, 9, 10))]


def test_a_student_learns_what_its_teachers_say():
    params = unic_params(steps=60, batch_size=16)
    model = student(params)
    learner = Learner(model, params, objective(params, model))
    losses = []
    for number in range(60):
        batch = a_batch(16, seed=number % 2)
        terms, _ = learner.step(number, batch.images, batch.parts, batch.slots)
        losses.append(terms["b"]["total"].item())
    assert np.mean(losses[-6:]) < 0.6 * np.mean(losses[2:8])


def test_with_labels_it_stands_beside_udons_from_one_pass_of_the_backbone():
    params = unic_params(recipe="udon", w_unic=2.0, sampler="dynamic")
    model = student(params)
    udon = UdonObjective(params)
    ours, batch = objective(params, model, labelled=udon), a_batch()
    passes = []
    model.backbone.encoder.layer1.register_forward_hook(lambda *_: passes.append(1))
    found = ours.terms(model, batch)
    assert len(passes) == 1
    expected = udon.terms(model, batch)
    assert ours.allocates_by == "ce_teacher"
    for domain in "ab":
        for name in ("ce_student", "ce_teacher", "kl", "rel"):
            assert torch.allclose(found[domain][name], expected[domain][name], atol=1e-5)
        total = expected[domain]["total"] + 2 * found[domain]["unic"]
        assert torch.allclose(found[domain]["total"], total, atol=1e-5)


def test_a_person_steers_the_weights_and_the_probability_and_takes_them_back():
    params = unic_params(drop_probability=0.4)
    ours = objective(params, student(params))
    assert ours.taught_by == ("small", "wide")
    before = {"small": 1.0, "wide": 3.0}
    assert (ours.weights, ours.drop_probability) == (before, 0.4)
    ours.steer(Wish(teachers={"wide": 0.5, "small": 0.0}, drop_probability=0.0, multipliers={"a": 2.0}))
    assert (ours.weights, ours.drop_probability) == ({"small": 0.0, "wide": 1.5}, 0.0)
    with pytest.raises(UserError, match="no teacher 'wid'; did you mean 'wide'"):
        ours.steer(Wish(teachers={"wid": 0.5}))
    with pytest.raises(UserError, match="no teacher is left"):
        ours.steer(Wish(teachers={"wide": 0.0, "small": 0.0}))
    ours.steer(Wish(multipliers={"a": 2.0}))
    assert (ours.weights, ours.drop_probability) == (before, 0.4)


def test_an_objective_without_frozen_teachers_refuses_them_and_nothing_else():
    udon = UdonObjective(TrainParams(**SMALL))
    udon.steer(Wish(multipliers={"a": 2.0}, locks={"b": 0.5}))
    for wish in (Wish(teachers={"a": 2.0}), Wish(drop_probability=0.5)):
        with pytest.raises(UserError, match="this run has no frozen teachers"):
            udon.steer(wish)


def test_matrices_decay_alone():
    params = unic_params()
    model = student(params)
    ours = objective(params, model)
    decaying = {name for name, p in ours.named_parameters() if ours.decays(p)}
    assert decaying == {name for name, _ in ours.named_parameters() if name.endswith("weight")}
