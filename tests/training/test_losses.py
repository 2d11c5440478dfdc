from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from udonlib.models.embedding_model import DomainOutputs
from udonlib.models.heads import cosine_logits, unit
from udonlib.params import TrainParams
from udonlib.training.losses import (
    UdonObjective,
    classification_loss,
    logit_distillation,
    margin_logits,
    relational_distillation,
    weighted_total,
)


def random_units(n, dim, seed=0):
    return unit(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)))


def test_unit_rows_have_norm_one_and_a_zero_row_stays_zero():
    rows = unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    assert rows.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]


def test_cosine_logits_do_not_depend_on_the_prototypes_norms():
    embeddings, prototypes = random_units(4, 8), torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    norms = torch.tensor([0.1, 1, 10, 100, 1000])[:, None]
    torch.testing.assert_close(cosine_logits(embeddings, prototypes), cosine_logits(embeddings, norms * prototypes))


@given(cosine=st.floats(-1, 1), margin=st.floats(0, 1.5))
def test_arcface_adds_the_margin_to_the_angle(cosine, margin):
    found = margin_logits(torch.tensor([[cosine, 0.3]]), torch.tensor([0]), "arcface", scale=1.0, margin=margin)
    assert found[0, 0].item() == pytest.approx(math.cos(math.acos(cosine) + margin), abs=1e-3)
    assert found[0, 1].item() == pytest.approx(0.3)


@pytest.mark.parametrize("kind", ["normface", "cosface", "arcface"])
@pytest.mark.parametrize("cosine", [1.0, -1.0, 1.0 + 1e-7, -1.0 - 1e-7, 0.0])
def test_gradients_are_finite_at_the_poles(kind, cosine):
    cosines = torch.tensor([[cosine, 0.2, -1.0], [0.1, cosine, 1.0]], requires_grad=True)
    classification_loss(cosines, torch.tensor([0, 1]), kind, scale=64.0, margin=0.5).backward()
    assert torch.isfinite(cosines.grad).all()


def test_gradients_of_a_whole_arcface_are_finite_when_an_embedding_equals_its_prototype():
    embeddings = random_units(3, 4).requires_grad_()
    prototypes = (2 * embeddings.detach()).clone().requires_grad_()
    loss = classification_loss(cosine_logits(embeddings, prototypes), torch.arange(3), "arcface", 16.0, 0.3)
    loss.backward()
    assert torch.isfinite(embeddings.grad).all()
    assert torch.isfinite(prototypes.grad).all()


def test_a_margin_makes_the_loss_larger():
    cosines = cosine_logits(random_units(6, 8), random_units(5, 8, 1))
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    plain = classification_loss(cosines, labels, "normface", 16.0)
    assert classification_loss(cosines, labels, "cosface", 16.0, margin=0.2) > plain
    assert classification_loss(cosines, labels, "arcface", 16.0, margin=0.2) > plain


def test_logit_distillation_is_zero_for_equal_logits_and_positive_else():
    cosines = cosine_logits(random_units(6, 8), random_units(5, 8, 1))
    assert logit_distillation(cosines, cosines, 0.1, 0.1).item() == pytest.approx(0, abs=1e-7)
    assert logit_distillation(cosines, -cosines, 0.1, 0.1).item() > 0


def test_distillation_gives_the_teacher_no_gradient():
    teacher = random_units(6, 8).requires_grad_()
    student = random_units(6, 4, 1).requires_grad_()
    weights = random_units(5, 8, 2).requires_grad_(), random_units(5, 4, 3)
    kl = logit_distillation(cosine_logits(student, weights[1]), cosine_logits(teacher, weights[0]), 0.1, 0.1)
    (kl + relational_distillation(student, teacher, 32.0)).backward()
    assert teacher.grad is None
    assert weights[0].grad is None
    assert student.grad.abs().sum() > 0


def test_relational_distillation_against_a_naive_loop():
    student, teacher = random_units(5, 3), random_units(5, 7, 1)
    expected = 0.0
    for i in range(5):
        for j in range(5):
            expected += (float(student[i] @ student[j]) - float(teacher[i] @ teacher[j])) ** 2
    assert relational_distillation(student, teacher, 32.0).item() == pytest.approx(32 * expected / 25, rel=1e-5)


def test_excess_counts_only_pairs_that_the_student_holds_closer():
    student, teacher = random_units(5, 3), random_units(5, 7, 1)
    difference = (student @ student.T - teacher @ teacher.T).clamp(min=0)
    found = relational_distillation(student, teacher, 32.0, "excess")
    assert found.item() == pytest.approx(32 * difference.square().mean().item(), rel=1e-5)
    assert 0 < found < relational_distillation(student, teacher, 32.0)


def test_without_a_teacher_only_the_student_s_classification_is_left():
    student = random_units(4, 3)
    out = DomainOutputs(student, cosine_logits(student, random_units(5, 3, 1)))
    assert list(UdonObjective(TrainParams()).losses(out, torch.tensor([0, 1, 2, 3]))) == ["ce_student"]


def test_the_total_is_a_weighted_mean():
    terms = {"ce_student": torch.tensor(2.0), "kl": torch.tensor(5.0)}
    assert weighted_total(terms, {"ce_student": 1.0, "kl": 3.0, "rel": 9.0}).item() == pytest.approx((2 + 15) / 4)


def test_weights_that_sum_to_zero_are_refused():
    with pytest.raises(ValueError, match=r"loss weights of kl sum to 0; at least one must be positive"):
        weighted_total({"kl": torch.tensor(1.0)}, {"kl": 0.0})


def test_a_domain_claims_by_its_teachers_loss_or_by_how_far_the_student_lags_behind():
    values = {"ce_student": 5.0, "ce_teacher": 3.0, "total": 8.0}
    assert UdonObjective(TrainParams()).claim(values) == 3
    assert UdonObjective(TrainParams(sampler_loss="student")).claim(values) == 5
    assert UdonObjective(TrainParams(sampler_signal="relative_loss")).claim(values) == 3
    assert UdonObjective(TrainParams(sampler_signal="gap", sampler_floor=0.1)).claim(values) == 2
