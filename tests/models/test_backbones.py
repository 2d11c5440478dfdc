from __future__ import annotations

import pytest
import torch

from udonlib.errors import UserError
from udonlib.models.backbones import create_backbone, flops_per_image


@pytest.mark.parametrize(
    ("name", "image_size", "dim"), [("test_vit", 48, 64), ("test_resnet", 32, 96), ("test_convnext", 64, 64)]
)
def test_any_timm_model_with_one_feature_per_image_works_by_name(name, image_size, dim):
    backbone = create_backbone(name, pretrained=False, image_size=image_size)
    assert backbone.feature_dim == dim
    assert backbone(torch.zeros(2, 3, image_size, image_size)).shape == (2, dim)
    assert backbone.training


def test_backbone_args_reach_timm():
    backbone = create_backbone(
        "resnet18", pretrained=False, image_size=32, arguments={"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}
    )
    assert backbone.feature_dim == 8


def test_the_weights_tag_brings_their_mean_and_deviation():
    backbone = create_backbone("vit_tiny_patch16_224.augreg_in21k", pretrained=False, image_size=32)
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(
        UserError, match=r"parameter 'backbone': unknown timm model 'resnet81'; did you mean 'resnet18'"
    ):
        create_backbone("resnet81", pretrained=False, image_size=32)


def test_arguments_that_the_model_does_not_take_are_named():
    with pytest.raises(UserError, match=r"'backbone_args'.*unexpected keyword argument 'chanels'"):
        create_backbone("resnet18", pretrained=False, image_size=32, arguments={"chanels": 1})


def test_an_image_size_that_does_not_fit_is_named():
    with pytest.raises(UserError, match="cannot take images of 8 pixels|cannot build"):
        create_backbone("test_vit", pretrained=False, image_size=8)


def test_weights_that_are_not_to_be_had_are_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import udonlib.models.backbones

    def unreachable(*_args, **_options):
        raise OSError("no connection")

    monkeypatch.setattr(udonlib.models.backbones.timm, "create_model", unreachable)
    with pytest.raises(UserError, match=r"parameter 'pretrained': the weights of 'resnet18' could not be loaded"):
        create_backbone("resnet18", pretrained=True, image_size=32)


def test_pretrained_weights_are_loaded_by_timm_from_a_file(tmp_path):
    source = create_backbone("test_vit", pretrained=False, image_size=160)
    from safetensors.torch import save_file

    save_file(source.encoder.state_dict(), tmp_path / "model.safetensors")
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "model.safetensors"), "num_classes": 0}}
    loaded = create_backbone("test_vit", pretrained=True, image_size=160, arguments=overlay)
    for name, value in source.encoder.state_dict().items():
        assert torch.equal(value, loaded.encoder.state_dict()[name])


def test_operations_of_attention_count_whether_it_is_fused_or_not():
    backbone = create_backbone("test_vit", pretrained=False, image_size=32)
    fused = flops_per_image(backbone, 32)
    for block in backbone.encoder.blocks:
        assert block.attn.fused_attn
        block.attn.fused_attn = False
    assert fused == flops_per_image(backbone, 32)


def test_the_small_resnet_halves_once_before_its_first_block_and_takes_width_and_blocks():
    backbone = create_backbone(
        "small_resnet", pretrained=False, image_size=48, arguments={"width": 4, "blocks": [1, 2, 1]}
    )
    assert backbone.feature_dim == 16
    stem = backbone.encoder.layers[:3](torch.zeros(1, 3, 48, 48))
    assert stem.shape == (1, 4, 24, 24)
    assert sum(type(layer).__name__ == "_Block" for layer in backbone.encoder.layers) == 4


def test_the_small_resnet_says_what_it_cannot_do():
    with pytest.raises(UserError, match="'small_resnet' has no published weights"):
        create_backbone("small_resnet", pretrained=True, image_size=48)
    with pytest.raises(UserError, match=r"'backbone_args': 'small_resnet' cannot be built: .*'widht'"):
        create_backbone("small_resnet", pretrained=False, image_size=48, arguments={"widht": 4})
    with pytest.raises(UserError, match="did you mean 'small_resnet'"):
        create_backbone("smal_resnet", pretrained=False, image_size=48)
