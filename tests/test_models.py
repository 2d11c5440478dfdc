from __future__ import annotations

import pytest
import torch

from udonlib.backbones import create_backbone
from udonlib.errors import UserError
from udonlib.models import EmbeddingModel


def make(teacher_dim=24, seed=0, **options):
    torch.manual_seed(0)
    backbone = create_backbone("test_vit", pretrained=False, image_size=32)
    n_classes = {"birds": 5, "cars": 7}
    return EmbeddingModel(backbone, n_classes, student_dim=16, teacher_dim=teacher_dim, seed=seed, **options).eval()


IMAGES = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_outputs_of_a_domain_have_its_sizes():
    model = make()
    out = model.outputs(model.features(IMAGES), "cars")
    assert out.student.shape == (4, 16)
    assert out.teacher.shape == (4, 24)
    assert out.student_cosines.shape == out.teacher_cosines.shape == (4, 7)


def test_embeddings_are_unit_rows_and_the_same_for_bytes_and_floats():
    model = make()
    embeddings = model.embed(IMAGES)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(embeddings, model.embed(IMAGES.float()))


def test_features_keep_their_scale_if_asked():
    norms = make(normalise_features=False).features(IMAGES).norm(dim=1)
    assert (norms - 1).abs().min() > 0.1
    torch.testing.assert_close(make().features(IMAGES).norm(dim=1), torch.ones(4))


def test_a_model_without_teachers_has_no_teacher_parameters():
    model = make(teacher_dim=0)
    out = model.outputs(model.features(IMAGES), "birds")
    assert out.teacher is None
    assert not [name for name, _ in model.named_parameters() if name.startswith("teacher")]


def test_a_frozen_backbone_gets_no_gradient():
    model = make()
    model.outputs(model.features(IMAGES, frozen=True), "birds").student_cosines.sum().backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert model.student.layers[0].weight.grad is not None


def test_bfloat16_changes_features_little_and_leaves_them_float32():
    model = make()
    low = model.features(IMAGES, torch.bfloat16)
    assert low.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(low, model.features(IMAGES)).min() > 0.99


def test_heads_are_reproducible_by_their_seed():
    same, again, other = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(same.student.layers[0].weight, again.student.layers[0].weight)
    assert not torch.equal(same.student.layers[0].weight, other.student.layers[0].weight)


@pytest.mark.parametrize("name", ["a.b", "keys"])
def test_names_that_cannot_be_attributes_are_refused(name):
    backbone = create_backbone("test_vit", pretrained=False, image_size=32)
    with pytest.raises(UserError, match=f"domain '{name}'"):
        EmbeddingModel(backbone, {name: 3})
