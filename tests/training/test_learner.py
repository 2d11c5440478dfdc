from __future__ import annotations

import pytest
import torch

from tests.helpers.training import predicting
from udonlib.models.backbones import create_backbone
from udonlib.models.embedding_model import EmbeddingModel
from udonlib.params import TrainParams
from udonlib.training.learner import Learner, learning_rate_factor
from udonlib.training.losses import Batch, UdonObjective, logit_distillation, relational_distillation

IMAGES = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


VALUES = {"steps": 10, "frozen_steps": 0, "batch_size": 6}


def make(**changes):
    params = TrainParams(**VALUES | changes)
    torch.manual_seed(0)
    backbone = create_backbone("test_vit", pretrained=False, image_size=32)
    model = EmbeddingModel(
        backbone, {"a": 3, "b": 4}, student_dim=8, teacher_dim=12 if params.has_teachers else 0, seed=0
    )
    return Learner(model, params)


def snapshot(learner):
    return {name: p.detach().clone() for name, p in learner.model.named_parameters()}


def terms_of(learner, domain="a", labels=LABELS, images=IMAGES):
    """The terms of images of one domain."""
    return learner.objective.terms(learner.model, Batch(images, [(domain, labels)]))[domain]


def moved(learner, before):
    """First parts of the names of parameters that differ from `before`."""
    changed = {name for name, p in learner.model.named_parameters() if not torch.equal(p, before[name])}
    return {".".join(name.split(".")[: 1 if name.startswith(("backbone", "student.")) else 2]) for name in changed}


def test_a_step_moves_the_active_heads_only():
    learner = make()
    before = snapshot(learner)
    learner.step(0, IMAGES, [("a", LABELS)])
    assert moved(learner, before) == {
        "backbone",
        "student",
        "student_prototypes.a",
        "teachers.a",
        "teacher_prototypes.a",
    }


def test_absent_heads_move_on_if_they_decay():
    learner = make(absent_heads="decay", weight_decay=0.1)
    learner.step(0, IMAGES, [("a", LABELS)])
    before = snapshot(learner)
    learner.step(1, IMAGES, [("b", LABELS)])
    assert {"teachers.a", "teacher_prototypes.a", "student_prototypes.a"} <= moved(learner, before)


@pytest.mark.parametrize("how", ["no_grad", "zero_lr"])
def test_a_frozen_backbone_stays_for_exactly_the_frozen_steps(how):
    learner = make(frozen_steps=2, frozen_backbone=how, weight_decay=0.1)
    for number in range(3):
        before = snapshot(learner)
        learner.step(number, IMAGES, [("a", LABELS)])
        assert ("backbone" in moved(learner, before)) == (number >= 2)


def test_a_frozen_backbone_keeps_its_batch_statistics():
    torch.manual_seed(0)
    backbone = create_backbone("test_resnet", pretrained=False, image_size=32)
    model = EmbeddingModel(backbone, {"a": 3}, student_dim=8, teacher_dim=12)
    learner = Learner(model, TrainParams(steps=4, frozen_steps=2, batch_size=6))
    statistics = {k: v.clone() for k, v in model.named_buffers()}
    learner.step(0, IMAGES, [("a", LABELS)])
    assert all(torch.equal(v, statistics[k]) for k, v in model.named_buffers())
    learner.step(2, IMAGES, [("a", LABELS)])
    assert not all(torch.equal(v, statistics[k]) for k, v in model.named_buffers())


def test_a_batch_of_two_domains_has_the_gradient_of_its_parts():
    together, apart = make(), make()
    parts = [("a", LABELS[:4]), ("b", LABELS[4:])]
    together.step(0, IMAGES, parts)
    for (domain, labels), images in zip(parts, IMAGES.split([4, 2]), strict=True):
        total = terms_of(apart, domain, labels, images)["total"]
        (len(images) / 6 * total).backward()
    gradients = dict(apart.model.named_parameters())
    for name, p in together.model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name].grad, atol=1e-6, rtol=1e-4)


def test_terms_are_named_and_the_total_is_their_mean():
    terms, norm = make().step(0, IMAGES, [("a", LABELS)])
    assert set(terms["a"]) == {"ce_student", "ce_teacher", "kl", "rel", "total"}
    assert terms["a"]["total"].item() == pytest.approx(sum(v.item() for k, v in terms["a"].items() if k != "total") / 4)
    assert norm > 0


def test_a_recipe_without_teachers_has_the_student_s_loss_alone():
    terms, _ = make(recipe="us_rr").step(0, IMAGES, [("a", LABELS)])
    assert set(terms["a"]) == {"ce_student", "total"}
    assert terms["a"]["total"] == terms["a"]["ce_student"]


def test_a_joint_classifier_competes_with_the_classes_of_all_domains():
    separate, joint = make(recipe="us_rr"), make(recipe="uj_rr")
    before = snapshot(joint)
    terms, _ = joint.step(0, IMAGES, [("a", LABELS)])
    student = separate.model.student(separate.model.features(IMAGES))
    classes = torch.cat([separate.model.student_prototypes[d] for d in "ab"])
    cosines = student @ torch.nn.functional.normalize(classes, dim=1).T
    expected = torch.nn.functional.cross_entropy(16 * cosines, LABELS)
    assert terms["a"]["ce_student"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert "student_prototypes.b" in moved(joint, before)


def test_a_joint_classifier_of_one_domain_is_a_separate_one():
    model = EmbeddingModel(create_backbone("test_vit", pretrained=False, image_size=32), {"a": 3}, teacher_dim=0)
    values = {"steps": 10, "batch_size": 6}
    losses = [terms_of(Learner(model, TrainParams(recipe=recipe, **values)))["total"] for recipe in ("us_rr", "uj_rr")]
    assert losses[0] == losses[1]


def test_distillation_ramps_up_from_nothing_to_its_weights():
    objective = UdonObjective(TrainParams(distillation_ramp=9, w_kl=2.0))
    assert objective.weights(0)["kl"] == pytest.approx(0.2)
    assert objective.weights(0)["ce_student"] == 1
    assert objective.weights(9) == objective.weights(500) == {"ce_student": 1, "ce_teacher": 1, "kl": 2, "rel": 1}


def test_nested_embeddings_each_classify_by_themselves():
    learner = make(recipe="us_rr", student_dim=8, nested_dims=(2, 4))
    features = learner.model.features(IMAGES)
    found = terms_of(learner)["ce_student"]
    losses = []
    for dim in (2, 4, 8):
        student = learner.model.student.layers(features)[:, :dim]
        parts = [
            torch.nn.functional.normalize(x, dim=1) for x in (student, learner.model.student_prototypes["a"][:, :dim])
        ]
        losses.append(torch.nn.functional.cross_entropy(16 * parts[0] @ parts[1].T, LABELS).item())
    assert found.item() == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_nested_embeddings_meet_the_classes_of_all_domains_where_the_classifier_is_joint():
    learner = make(recipe="uj_rr", student_dim=8, nested_dims=(2, 4))
    features = learner.model.features(IMAGES)
    prototypes = torch.cat([learner.model.student_prototypes[domain] for domain in ("a", "b")])
    losses = []
    for dim in (2, 4, 8):
        student = torch.nn.functional.normalize(learner.model.student.layers(features)[:, :dim], dim=1)
        classes = torch.nn.functional.normalize(prototypes[:, :dim], dim=1)
        losses.append(torch.nn.functional.cross_entropy(16 * student @ classes.T, LABELS).item())
    found = terms_of(learner)["ce_student"]
    assert found.item() == pytest.approx(sum(losses) / 3, rel=1e-5)
    apart = terms_of(make(recipe="us_rr", student_dim=8, nested_dims=(2, 4)))["ce_student"]
    assert found.item() > apart.item() + 0.1  # more classes to tell apart


def test_gradients_are_clipped_to_their_norm_and_the_norm_before_is_returned():
    free, clipped = make(), make(max_grad_norm=1e-3)
    _, norm = free.step(0, IMAGES, [("a", LABELS)])
    _, same = clipped.step(0, IMAGES, [("a", LABELS)])
    assert same == norm > 1e-3
    total = sum(p.grad.square().sum() for p in clipped.model.parameters() if p.grad is not None).sqrt()
    assert total.item() == pytest.approx(1e-3, rel=1e-3)


def test_the_two_rates_follow_warm_up_and_cosine():
    params = TrainParams(steps=100, frozen_steps=0, warmup_steps=9, rate_schedule="cosine")
    factors = [learning_rate_factor(step, params) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1)
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[-1] < 1e-3
    learner = make(warmup_steps=1)
    learner.step(0, IMAGES, [("a", LABELS)])
    assert [group["lr"] for group in learner.optimizer.param_groups] == [pytest.approx(5e-4), pytest.approx(5e-6)]


def test_a_learner_learns_a_batch_by_heart():
    learner = make(learning_rate=1e-2, backbone_learning_rate=1e-3, steps=40)
    losses = [learner.step(i, IMAGES, [("a", LABELS)])[0]["a"]["ce_student"].item() for i in range(40)]
    assert losses[-1] < 0.2 * losses[0]


def test_an_objective_s_own_parameters_learn_at_the_rate_of_the_heads():
    learner = make()
    objective = predicting(TrainParams(backbone="test_vit", image_size=32))
    learner = Learner(learner.model, TrainParams(**VALUES, max_grad_norm=1e-3, weight_decay=0.1), objective)
    before, own = snapshot(learner), {name: p.detach().clone() for name, p in objective.named_parameters()}
    _, norm = learner.step(0, IMAGES, [("a", LABELS[:2]), ("b", LABELS[2:])])
    assert moved(learner, before) == {"backbone"}
    assert all(not torch.equal(p, own[name]) for name, p in objective.named_parameters())
    parameters = [*learner.model.parameters(), *objective.parameters()]
    clipped = sum(p.grad.square().sum() for p in parameters if p.grad is not None).sqrt()
    assert clipped.item() == pytest.approx(1e-3, rel=1e-3)
    assert norm > 1e-3
    group_of = {id(p): group for group in learner.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in parameters} == set(group_of)
    backbone = {id(p) for p in learner.model.backbone.parameters()}
    for p in parameters:
        group = group_of[id(p)]
        assert group["lr"] == (1e-5 if id(p) in backbone else 1e-3)
        assert group["weight_decay"] == (0.1 if p.ndim > 1 else 0.0)


def test_udon_has_the_two_groups_of_parameters_that_checkpoints_hold():
    assert len(make().optimizer.param_groups) == 2


def test_an_objective_sees_a_frozen_backbone_without_a_graph():
    learner = make(frozen_steps=1)
    learner = Learner(learner.model, learner.params, predicting(TrainParams(backbone="test_vit", image_size=32)))
    before = snapshot(learner)
    learner.step(0, IMAGES, [("a", LABELS)])
    assert not moved(learner, before)
    assert all(p.grad is None for p in learner.model.backbone.parameters())
    learner.step(1, IMAGES, [("a", LABELS)])
    assert moved(learner, before) == {"backbone"}


def test_an_offline_teacher_teaches_with_its_own_embedding_and_classes():
    torch.manual_seed(3)
    backbone = create_backbone("test_vit", pretrained=False, image_size=32)
    teacher = EmbeddingModel(backbone, {"a": 3}, student_dim=12, teacher_dim=0, seed=3)
    learner = make(offline_teachers="x")
    learner = Learner(learner.model, learner.params, UdonObjective(learner.params, {"a": teacher}))
    found = terms_of(learner)
    known = teacher.outputs(teacher.features(IMAGES), "a")
    own = learner.model.outputs(learner.model.features(IMAGES), "a")
    assert found["kl"].item() == pytest.approx(
        logit_distillation(own.student_cosines, known.student_cosines, 0.1, 0.1).item(), rel=1e-5
    )
    assert found["rel"].item() == pytest.approx(
        relational_distillation(own.student, known.student, 32.0).item(), rel=1e-5
    )
    assert not list(learner.objective.parameters())
    assert not learner.objective.state_dict()  # the specialist is no part of what is trained, or kept


@pytest.mark.parametrize("asked_for", [True, False])
def test_a_domain_without_its_offline_teacher_is_not_taught_by_its_own_head(asked_for):
    learner = make(offline_teachers="x" if asked_for else None)
    others = {} if asked_for else {"b": learner.model}
    learner = Learner(learner.model, learner.params, UdonObjective(learner.params, others))
    with pytest.raises(ValueError, match="domain 'a' has no offline teacher"):
        learner.step(0, IMAGES, [("a", LABELS)])
