"""losses.npz and relational_devices.npz."""

from __future__ import annotations

import re

import pytest
import torch

from udonlib.models.embedding_model import DomainOutputs
from udonlib.models.heads import cosine_logits
from udonlib.params import TrainParams
from udonlib.training.losses import (
    UdonObjective,
    classification_loss,
    logit_distillation,
    margin_logits,
    relational_distillation,
    weighted_total,
)

TOLERANCE = 1e-5
KINDS = ("normface", "cosface", "arcface")


class Case:
    """Inputs of losses.npz as leaves whose gradients are compared; prototypes are stored [dim, classes]."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.e_s = torch.tensor(arrays["student_embeddings"], requires_grad=True)
        self.e_t = torch.tensor(arrays["teacher_embeddings"], requires_grad=True)
        self.w_s = torch.tensor(arrays["student_prototypes"], requires_grad=True)
        self.w_t = torch.tensor(arrays["teacher_prototypes"], requires_grad=True)
        self.labels = torch.tensor(arrays["label"]).long()
        self.c_s = cosine_logits(self.e_s, self.w_s.mT)
        self.c_t = cosine_logits(self.e_t, self.w_t.mT)
        # n / 4 times the sum over a row, averaged over rows, is B n / 4 times the mean square.
        self.relational_scale = len(self.labels) * int(arrays["rel/n_devices"]) / 4

    def terms(self, **options):
        objective = UdonObjective(TrainParams(relational_scale=self.relational_scale, **options))
        return objective.losses(DomainOutputs(self.e_s, self.c_s, self.e_t, self.c_t), self.labels)

    def check_gradients(self, agree, prefix):
        leaves = {
            "student_embeddings": self.e_s,
            "teacher_embeddings": self.e_t,
            "student_prototypes": self.w_s,
            "teacher_prototypes": self.w_t,
        }
        checked = 0
        for name, leaf in leaves.items():
            key = f"{prefix}/grad_{name}"
            if key in self.arrays:
                found = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                agree(key, found, self.arrays[key], TOLERANCE)
                checked += 1
        assert checked


@pytest.fixture
def case(golden):
    return Case(golden("losses"))


def options_of(arrays, kind):
    return {
        "classification": kind,
        "scale": float(arrays[f"{kind}/scale"]),
        "margin": float(arrays[f"{kind}/margin"]),
    }


EQUAL = dict.fromkeys(("ce_student", "ce_teacher", "kl", "rel"), 1.0)


def test_cosine_logits_are_the_reference_s(case, agree):
    agree("student_logits", case.c_s, case.arrays["student_logits"], TOLERANCE)
    agree("teacher_logits", case.c_t, case.arrays["teacher_logits"], TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_margin_softmax_and_its_gradients(case, agree, kind, who):
    arrays = case.arrays
    scale, margin = float(arrays[f"{kind}/scale"]), float(arrays[f"{kind}/margin"])
    cosines, leaves = (case.c_s, (case.e_s, case.w_s)) if who == "student" else (case.c_t, (case.e_t, case.w_t))
    found = margin_logits(cosines, case.labels, kind, scale, margin)
    agree(f"{kind}/{who}_transformed", found, arrays[f"{kind}/{who}_transformed"], TOLERANCE)
    loss = classification_loss(cosines, case.labels, kind, scale, margin)
    agree(f"{kind}/{who}_ce", loss, arrays[f"{kind}/{who}_ce"], TOLERANCE)
    loss.backward()
    for name, leaf in zip(("embeddings", "prototypes"), leaves, strict=True):
        key = f"{kind}/{who}_ce/grad_{name}"
        agree(key, leaf.grad, arrays[key], TOLERANCE)


def test_logit_distillation_leaves_the_teacher_alone(case, agree):
    arrays = case.arrays
    loss = logit_distillation(case.c_s, case.c_t, float(arrays["kl/T_student"]), float(arrays["kl/T_teacher"]))
    agree("kl/value", loss, arrays["kl/value"], TOLERANCE)
    loss.backward()
    case.check_gradients(agree, "kl")


def test_relational_distillation(case, agree):
    loss = relational_distillation(case.e_s, case.e_t, case.relational_scale)
    agree("rel/value", loss, case.arrays["rel/value"], TOLERANCE)
    loss.backward()
    case.check_gradients(agree, "rel")


@pytest.mark.parametrize("kind", KINDS)
def test_total_of_the_defaults(case, agree, kind):
    loss = weighted_total(case.terms(**options_of(case.arrays, kind)), EQUAL)
    agree(f"{kind}/total", loss, case.arrays[f"{kind}/total"], TOLERANCE)
    loss.backward()
    case.check_gradients(agree, f"{kind}/total")


def test_total_with_other_weights_temperatures_and_label_smoothing(case, agree):
    arrays = case.arrays
    terms = case.terms(
        **options_of(arrays, "normface"),
        label_smoothing=float(arrays["alt/label_smoothing"]),
        student_temperature=float(arrays["alt/T_student"]),
        teacher_temperature=float(arrays["alt/T_teacher"]),
    )
    loss = weighted_total(terms, {name: float(arrays[f"alt/w_{name}"]) for name in EQUAL})
    agree("alt/total", loss, arrays["alt/total"], TOLERANCE)
    loss.backward()
    case.check_gradients(agree, "alt/total")


LEFT_OUT = {
    "only_teacher_ce": {"ce_student"},
    "no_kl": {"kl"},
    "no_rel": {"rel"},
    "no_distill": {"kl", "rel"},
}


def test_a_term_left_out_leaves_numerator_and_denominator(case, agree):
    names = {match[1] for key in case.arrays if (match := re.fullmatch(r"subset/(.+)/total", key))}
    assert names
    for name in names:
        weights = {term: float(term not in LEFT_OUT[name]) for term in EQUAL}
        loss = weighted_total(case.terms(**options_of(case.arrays, "normface")), weights)
        agree(f"subset/{name}/total", loss, case.arrays[f"subset/{name}/total"], TOLERANCE)


def test_relational_loss_of_shards_is_ours_with_their_scale(golden, agree):
    arrays = golden("relational_devices")
    device_counts = sorted(int(match[1]) for key in arrays if (match := re.fullmatch(r"n(\d+)/mean_value", key)))
    assert device_counts
    for n in device_counts:
        student = torch.tensor(arrays["student_embeddings"], requires_grad=True)
        teacher = torch.tensor(arrays["teacher_embeddings"])
        scale = n / 4 * (len(student) / n)
        shards = zip(student.chunk(n), teacher.chunk(n), strict=True)
        values = torch.stack([relational_distillation(s, t, scale) for s, t in shards])
        agree(f"n{n}/local_values", values, arrays[f"n{n}/local_values"], TOLERANCE)
        values.mean().backward()
        agree(f"n{n}/mean_value", values.mean(), arrays[f"n{n}/mean_value"], TOLERANCE)
        agree(f"n{n}/grad", student.grad, arrays[f"n{n}/grad_student_embeddings"], TOLERANCE)
