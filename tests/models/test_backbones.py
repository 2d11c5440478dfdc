from __future__ import annotations

import pytest
import torch

from udonlib.errors import UserError
from udonlib.models.backbones import Backbone, create_backbone, flops_per_image


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


def noise(size, n=2):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


VITS = {
    "class_token": ("test_vit", {}),
    "registers": ("test_vit", {"reg_tokens": 4}),
    "registers_alone": ("test_vit", {"reg_tokens": 4, "class_token": False, "global_pool": "avg"}),
    "patches_alone": ("test_vit", {"class_token": False, "global_pool": "avg"}),
    "relative_positions": ("vit_relpos_small_patch16_224", {"embed_dim": 64, "depth": 2, "num_heads": 2}),
}


@pytest.mark.parametrize(("name", "arguments"), VITS.values(), ids=VITS)
def test_a_transformer_s_tokens_are_those_that_leave_its_blocks(name, arguments):
    backbone = create_backbone(name, pretrained=False, image_size=48, arguments=arguments).eval()
    encoder, images, left = backbone.encoder, noise(48), []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, given, made: left.append(made))
    expected = encoder.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    left.clear()
    found = backbone.tokens(images, range(len(backbone.block_dims)))
    assert len(found) == len(left) == len(encoder.blocks)
    assert backbone.block_dims == [64] * len(left)
    n_others = encoder.num_prefix_tokens
    for tokens, whole, timms in zip(found, left, expected, strict=True):
        assert torch.equal(tokens["patches"], whole[:, n_others:])
        assert torch.equal(tokens["patches"], timms)
        assert tokens["patches"].shape == (2, 9, 64)
        has_class = encoder.cls_token is not None
        assert torch.equal(tokens["class"], whole[:, 0] if has_class else whole[:, n_others:].mean(1))


@pytest.mark.parametrize(("name", "arguments"), VITS.values(), ids=VITS)
def test_a_transformer_s_end_is_its_last_block_after_the_last_norm(name, arguments):
    backbone = create_backbone(name, pretrained=False, image_size=48, arguments=arguments).eval()
    encoder, images = backbone.encoder, noise(48)
    [expected] = encoder.forward_intermediates(images, 1, norm=True, output_fmt="NLC", intermediates_only=True)
    last, end = backbone.tokens(images, [-1], end=True)
    assert torch.equal(end["patches"], expected)
    assert torch.equal(end["class"], backbone(images))
    if encoder.cls_token is not None:
        assert torch.equal(end["class"], encoder.norm(last["class"]))
        assert not torch.equal(end["class"], last["class"])


CONVNETS = {
    "test_resnet": {},
    "test_convnext": {},
    "test_efficientnet": {},
    "efficientnet_lite0": {},
    "small_resnet": {"width": 4, "blocks": [1, 2, 1]},
}


@pytest.mark.parametrize(("name", "arguments"), CONVNETS.items(), ids=CONVNETS)
def test_a_convnet_s_tokens_are_the_positions_of_its_stages_maps(name, arguments):
    backbone = create_backbone(name, pretrained=False, image_size=64, arguments=arguments).eval()
    images = noise(64)
    found = backbone.tokens(images, range(len(backbone.block_dims)))
    if name == "small_resnet":
        expected = [backbone.encoder.layers[: n + 1](images) for n in (3, 5, 6)]
    else:
        expected = backbone.encoder.forward_intermediates(images, intermediates_only=True)
    assert len(found) == len(expected) == len(backbone.block_dims)
    for tokens, maps in zip(found, expected, strict=True):
        height, width = maps.shape[2:]
        assert torch.equal(tokens["patches"].unflatten(1, (height, width)), maps.permute(0, 2, 3, 1))
        torch.testing.assert_close(tokens["class"], maps.mean((2, 3)))
    assert backbone.block_dims == [maps.shape[1] for maps in expected]


@pytest.mark.parametrize(("name", "arguments"), CONVNETS.items(), ids=CONVNETS)
def test_a_convnet_s_end_is_what_it_pools(name, arguments):
    backbone = create_backbone(name, pretrained=False, image_size=64, arguments=arguments).eval()
    images = noise(64)
    [end] = backbone.tokens(images, end=True)
    maps = backbone.encoder.forward_features(images)
    assert torch.equal(end["patches"], maps.permute(0, 2, 3, 1).flatten(1, 2))
    assert torch.equal(end["class"], backbone(images))
    assert end["class"].shape == (2, backbone.feature_dim)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "small_resnet"])
def test_all_tokens_come_from_one_pass_and_gradients_flow_through_them(name):
    backbone = create_backbone(name, pretrained=False, image_size=64)
    calls = []
    for layer in backbone.modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda module, given, made: calls.append(module))
    backbone(noise(64))
    once = len(calls)
    calls.clear()
    first, again, end = backbone.tokens(noise(64), [0, -len(backbone.block_dims)], end=True)
    assert len(calls) == once
    assert torch.equal(first["class"], again["class"])
    calls.clear()
    backbone.tokens(noise(64), [0])
    assert 0 < len(calls) < once  # what comes after the last block that is asked for is left out
    early, late = next(backbone.parameters()), list(backbone.parameters())[-1]
    first["patches"].square().sum().backward(retain_graph=True)
    assert early.grad.abs().sum() > 0
    assert late.grad is None
    (end["class"].square().sum() + end["patches"].square().sum()).backward()
    assert late.grad is not None


def test_a_map_whose_channels_come_last_is_laid_out_as_any_other():
    backbone = create_backbone(
        "swin_tiny_patch4_window7_224",
        pretrained=False,
        image_size=56,
        arguments={"depths": (1, 1), "num_heads": (2, 2), "embed_dim": 8, "window_size": 7},
    ).eval()
    last, end = backbone.tokens(noise(56), [-1], end=True)
    torch.testing.assert_close(backbone.encoder.norm(last["patches"]), end["patches"])
    assert torch.equal(end["class"], backbone(noise(56)))


def test_a_block_that_is_not_there_is_answered_with_those_that_are():
    backbone = create_backbone("test_vit", pretrained=False, image_size=48)
    n = len(backbone.block_dims)
    for block in (n, -n - 1):
        with pytest.raises(
            UserError,
            match=rf"blocks: found {block}, expected 0 to {n - 1}, or -1 \(the last\) to -{n}: 'test_vit' has",
        ):
            backbone.tokens(noise(48), [0, block])


def test_models_that_have_no_patch_tokens_say_so():
    backbone = create_backbone("crossvit_tiny_240", pretrained=False, image_size=240).eval()
    with pytest.raises(UserError, match=r"parameter 'backbone': 'crossvit_tiny_240' has no patch tokens in the end"):
        backbone.tokens(noise(240, 1), end=True)
    backbone = create_backbone("pit_ti_224", pretrained=False, image_size=224).eval()
    with pytest.raises(UserError, match=r"parameter 'backbone': 'pit_ti_224' has no patch tokens in the end"):
        backbone.tokens(noise(224, 1), end=True)
    without = Backbone("plain", torch.nn.Flatten(), 8, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(
        UserError, match=r"parameter 'backbone': 'plain' shows no tokens of its blocks, only its feature"
    ):
        without.tokens(noise(8), [0])
