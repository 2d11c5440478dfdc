"""Small depthwise convolutions: the library's outputs to the bit, its gradients to rounding; copies are as quick."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from udonlib.models.backbones import create_backbone, timm
from udonlib.models.depthwise import MAX_PIXELS, _is_slow, quicken


def gradients(layer: nn.Module, maps: torch.Tensor) -> list[torch.Tensor]:
    maps = maps.clone().requires_grad_()
    found = layer(maps)
    draw = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    return [found, *torch.autograd.grad(found, [maps, *layer.parameters()], draw)]


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (4, 4), (2, 5), (1, 7)])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_the_librarys(size, kernel, stride, bias):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 6, kernel, stride, kernel // 2, groups=6, bias=bias)
    ours = copy.deepcopy(layer)
    quicken(ours)
    maps = torch.randn(3, 6, *size).to(memory_format=torch.channels_last)
    assert _is_slow(maps, ours.weight) == (size[0] * size[1] <= MAX_PIXELS)
    found, expected = gradients(ours, maps), gradients(layer, maps)
    assert torch.allclose(found[0], expected[0], atol=1e-6)
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_timms_padding_depends_on_the_size(size, stride):
    same = type(
        next(m for m in timm.create_model("tf_efficientnet_lite0").modules() if type(m).__name__ == "Conv2dSame")
    )
    torch.manual_seed(0)
    layer = same(6, 6, 5, stride, groups=6)
    ours = copy.deepcopy(layer)
    quicken(ours)
    maps = torch.randn(3, 6, size, size)
    for one, other in zip(gradients(ours, maps), gradients(layer, maps), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_quick_encoder_has_the_same_names_and_features_and_can_be_copied():
    torch.manual_seed(0)
    plain = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    backbone = create_backbone("tf_efficientnet_lite0", pretrained=False, image_size=48)
    assert list(backbone.encoder.state_dict()) == list(plain.state_dict())
    backbone.encoder.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 48, 48)
    for quick in (backbone.eval(), copy.deepcopy(backbone).eval()):
        features = quick(images)  # with gradients: on the quick way
        assert torch.equal(features, plain(images))
        features.sum().backward()
        assert any("Depthwise" in type(module).__name__ for module in quick.modules())
    weights = dict(plain.named_parameters())
    plain(images).sum().backward()
    for name, parameter in backbone.encoder.named_parameters():
        scale = weights[name].grad.abs().max() + 1e-6
        assert ((parameter.grad - weights[name].grad).abs().max() / scale) < 1e-4, name


def test_convolutions_that_are_not_depthwise_stay_as_they_are():
    encoder = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, dilation=2, groups=4))
    quicken(encoder)
    assert {type(module) for module in encoder} == {nn.Conv2d}


def test_nothing_is_computed_by_hand_without_gradients():
    layer = nn.Conv2d(4, 4, 3, 1, 1, groups=4, bias=False)
    quicken(layer)
    maps = torch.randn(1, 4, 2, 2)
    with torch.no_grad():
        assert not _is_slow(maps, layer.weight)
        assert torch.equal(layer(maps), F.conv2d(maps, layer.weight, None, 1, 1, 1, 4))
