"""Softmax over a sample of the classes; what processes share among them is in test_world."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.training import make, same, weights
from udonlib.data.catalog import load_catalog
from udonlib.models.backbones import create_backbone
from udonlib.models.embedding_model import EmbeddingModel
from udonlib.models.heads import cosine_logits, unit
from udonlib.training.losses import classification_loss, logit_distillation
from udonlib.training.parallel.class_shards import ClassShards, Columns

LABELS = torch.tensor([3, 70, 3, 99])
KINDS = [("normface", 0.0, 0.0), ("normface", 0.0, 0.1), ("cosface", 0.2, 0.0), ("arcface", 0.3, 0.1)]


@pytest.fixture(scope="module")
def model():
    backbone = create_backbone("test_vit", pretrained=False, image_size=32)
    return EmbeddingModel(backbone, {"many": 100, "few": 4}, student_dim=8, teacher_dim=12)


def embeddings(dim, seed=0):
    return unit(torch.randn(4, dim, generator=torch.Generator().manual_seed(seed))).requires_grad_()


def losses(model, columns, kind, margin, smoothing, rivals=()):
    """Both losses of four images, and their gradients of embeddings and prototypes."""
    student, teacher = embeddings(8), embeddings(12, 1)
    rows = [columns.of(model.student_prototypes["many"]), *(of.of(model.student_prototypes["few"]) for of in rivals)]
    joint = torch.cat([cosine_logits(student, of_domain) for of_domain in rows], dim=1)
    cosines = cosine_logits(teacher, columns.of(model.teacher_prototypes["many"]))
    found = [
        classification_loss(joint, LABELS, kind, 16.0, margin, smoothing, columns.beside(rivals)),
        logit_distillation(joint[:, : cosines.shape[1]], cosines, 0.1, 0.2, columns),
    ]
    of = [student, model.student_prototypes["many"], *([model.student_prototypes["few"]] if rivals else [])]
    return [*found, *torch.autograd.grad(sum(found), of)]


@pytest.mark.parametrize(("kind", "margin", "smoothing"), KINDS)
@pytest.mark.parametrize("is_joint", [False, True])
def test_a_sample_of_all_classes_is_all_of_them(model, kind, margin, smoothing, is_joint):
    whole, sampled = ClassShards(model), ClassShards(model, sampled=0.999)
    columns = sampled.columns("many", LABELS)
    assert columns.sample.tolist() == list(range(100))
    assert not columns.are_all
    everything = [
        losses(model, of.columns("many", LABELS), kind, margin, smoothing, [of.columns("few")] if is_joint else [])
        for of in (whole, sampled)
    ]
    for expected, found in zip(*everything, strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_sample_holds_the_classes_of_the_images_and_some_others_that_stand_for_the_rest(model):
    shards = ClassShards(model, sampled=0.2)
    columns = shards.columns("many", LABELS, step=7)
    own = set(LABELS.tolist())
    assert own < set(columns.sample.tolist())
    assert len(columns.sample) == 20 + len(own)
    assert columns.log_counts.exp().sum().item() == pytest.approx(100, rel=1e-5)
    counts = dict(zip(columns.sample.tolist(), columns.log_counts.exp().tolist(), strict=True))
    assert {counts[c] for c in own} == {1.0}
    rows, places = columns.place(LABELS)
    assert rows.tolist() == [0, 1, 2, 3]
    assert columns.sample[places].tolist() == LABELS.tolist()
    assert columns.sample.tolist() == shards.columns("many", LABELS, step=7).sample.tolist()
    assert columns.sample.tolist() != shards.columns("many", LABELS, step=8).sample.tolist()
    assert columns.sample.tolist() != ClassShards(model, sampled=0.2, seed=1).columns("many", LABELS, 7).sample.tolist()
    assert len(shards.columns("few").sample) == 1  # rivals of a joint classifier


def test_sums_over_samples_are_unbiased_and_the_loss_comes_near(model):
    cosines, scale = cosine_logits(embeddings(8), model.student_prototypes["many"]).detach(), 4.0
    expected = (scale * cosines).logsumexp(1)
    loss = classification_loss(cosines, LABELS, "normface", scale).item()
    for sampled, off in ((0.1, 0.05), (0.5, 0.01)):
        shards, sums, losses = ClassShards(model, sampled=sampled), [], []
        for step in range(400):
            columns = shards.columns("many", LABELS, step)
            drawn = cosines[:, columns.sample]
            sums.append(columns.log_sums(scale * drawn)[0])
            losses.append(classification_loss(drawn, LABELS, "normface", scale, 0.0, 0.0, columns).item())
        assert torch.stack(sums).exp().mean(0).log().tolist() == pytest.approx(expected.tolist(), abs=off)
        bias = sum(losses) / len(losses) - loss
        spread = torch.stack(sums).std(0).square().mean().item()  # of the logarithm: about the relative one of the sum
        assert bias == pytest.approx(-spread / 2, abs=off)


def test_columns_of_all_classes_change_nothing():
    columns = Columns(5)
    assert columns.are_all
    assert columns.place(LABELS)[1] is LABELS
    prototypes = torch.ones(5, 2)
    assert columns.of(prototypes) is prototypes
    assert torch.equal(columns.of_all(prototypes), prototypes)


def test_a_training_on_samples_is_gone_on_with_to_the_same_bits(tmp_path):
    catalog = load_catalog(str(write_uned_tree(tmp_path)))
    changes = {"class_sample": 0.4, "classifier": "joint", "recipe": "udon", "precision": "float32"}
    whole = make(catalog, **changes)
    state = None
    for record in whole.train():
        if record["kind"] == "checkpoint" and state is None:
            state = torch.load(_saved(tmp_path, whole.state_dict()), weights_only=True)
    again = make(catalog, **changes)
    again.load_state_dict(state)
    assert 0 < again.step < whole.step
    list(again.train())
    assert same(weights(again), weights(whole))
    exact = make(catalog, **changes | {"class_sample": 1.0})
    list(exact.train())
    assert not same(weights(exact), weights(whole))


def _saved(folder, state):
    torch.save(state, folder / "state.pt")
    return folder / "state.pt"
