"""Encoders: any timm model by name, and a small one for the images of the embedded benchmark."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import itertools
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from udonlib.errors import UserError
from udonlib.models.depthwise import quicken


@functools.cache
def import_timm() -> ModuleType:
    """Import timm, also where torchvision's compiled operators cannot load.

    PyPI's Linux build of torchvision is linked against CUDA. Beside a CPU build of torch its operators are missing, and
    its import then stops at the shape functions of two of them. timm needs neither: declaring both lets it import.
    """
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "timm")]:
        del sys.modules[name]
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("timm")


class _Timm(ModuleType):
    """timm, imported when something of it is first used: it takes a second or two, and who only looks on needs none."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_timm(), name)


timm = _Timm("timm")

IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


Kind = Literal["class", "patches"]
# Tokens by kind: class [batch, dim], patches [batch, position, dim], the positions row by row.
Tokens = Mapping[Kind, Tensor]


class Backbone(nn.Module):
    """An encoder of images with the facts that its users need: `feature_dim`, and the `mean` and `std` it expects.

    `loaded` says in words what a file of weights brought, "" where there was none.

    Calling it maps normalised images [batch, 3, size, size] to features [batch, feature_dim]: the class token, or the
    pooled map, whatever the model's own classifier would see. `tokens` gives what its blocks see.
    """

    def __init__(
        self, name: str, encoder: nn.Module, feature_dim: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.name = name
        self.encoder = encoder
        self.feature_dim = feature_dim
        self.mean = mean
        self.std = std
        self.loaded = ""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.encoder(images)

    @property
    def block_dims(self) -> list[int]:
        """Width of the tokens of each block: of a transformer its blocks, of a ConvNet its stages, as timm counts them.

        timm counts the stem of a ResNet as stage 0, and takes an EfficientNet's blocks of one size of map as a stage.

        Raises:
            UserError: "parameter 'backbone': ... shows no tokens ..." for a model whose blocks cannot be seen.
        """
        encoder: Any = self.encoder
        if not hasattr(encoder, "forward_intermediates"):
            raise UserError(f"parameter 'backbone': {self.name!r} shows no tokens of its blocks, only its feature")
        return [stage["num_chs"] for stage in encoder.feature_info]

    def tokens(
        self, images: Float[Tensor, "batch 3 height width"], blocks: Sequence[int] = (), end: bool = False
    ) -> list[Tokens]:
        """Class and patch tokens of some blocks, in their order, from one pass; gradients flow through all of them.

        Of a block the tokens are as it leaves them, before any last norm, without registers. The class token of a model
        that has none there is the mean over the patches; patches of a ConvNet are the positions of its map.

        Args:
            images: normalised.
            blocks: numbers from 0, or from -1 for the last one down; see `block_dims`.
            end: one entry more, the last: the feature as class token, the same bits as calling the backbone gives; and
                the patches that go into it, after a transformer's last norm, an EfficientNet's last convolution.

        Raises:
            UserError: "blocks: found 12, expected 0 to 11 ..."; a model that has no tokens.
        """
        n = len(self.block_dims) if blocks else 0
        encoder: Any = self.encoder
        for block in blocks:
            if not -n <= block < n:
                raise UserError(
                    f"blocks: found {block}, expected 0 to {n - 1}, or -1 (the last) to -{n}: {self.name!r} has {n}"
                )
        places = sorted({block % n for block in blocks})
        options: dict[str, Any] = {"intermediates_only": not end, "stop_early": not end}
        if "return_prefix_tokens" in inspect.signature(encoder.forward_intermediates).parameters:
            options |= {"return_prefix_tokens": self._n_others > 0, "output_fmt": "NLC"}
        if places:
            given = encoder.forward_intermediates(images, indices=places, **options)
            final, seen = given if end else (None, given)
        else:
            final, seen = encoder.forward_features(images) if end else None, ()
        by_place = dict(zip(places, map(self._of_block, seen), strict=True))
        tokens = [by_place[block % n] for block in blocks]
        return [*tokens, {"class": encoder.forward_head(final), "patches": self._patches(final)}] if end else tokens

    def _of_block(self, given: Tensor | tuple[Tensor, Tensor]) -> Tokens:
        """Tokens from what timm gives of a block: patches, perhaps beside class token and registers, or a map."""
        if isinstance(given, tuple):
            patches, others = given
            return {"class": others[:, 0] if self._has_class_token else patches.mean(dim=1), "patches": patches}
        patches = given if given.ndim == 3 else given.flatten(2).mT
        return {"class": patches.mean(dim=1), "patches": patches}

    def _patches(self, final: Any) -> Tensor:
        """Patch tokens from what the encoder hands to its pool: a sequence, or a map in either layout."""
        if isinstance(final, Tensor) and final.ndim == 4:
            channels_last = getattr(self.encoder, "output_fmt", "NCHW") == "NHWC"
            return final.flatten(1, 2) if channels_last else final.flatten(2).mT
        if not isinstance(final, Tensor) or final.ndim != 3 or final.shape[1] == self._n_others:
            raise UserError(f"parameter 'backbone': {self.name!r} has no patch tokens in the end, only its feature")
        return final[:, self._n_others :]

    @property
    def _has_class_token(self) -> bool:
        return getattr(self.encoder, "cls_token", None) is not None

    @property
    def _n_others(self) -> int:
        """Tokens that stand before the patches: class token and registers."""
        return int(getattr(self.encoder, "num_prefix_tokens", self._has_class_token))


class SmallResNet(nn.Module):
    """A ResNet of basic blocks for images of 32 to 64 pixels.

    It halves the image before its first block; timm's ResNets quarter it, which leaves too little of a small one.

    Args:
        width: channels of the first stage; every later stage has twice as many, the last its features.
        blocks: blocks per stage.
    """

    def __init__(self, width: int = 32, blocks: Sequence[int] = (1, 1, 1, 1)) -> None:
        super().__init__()
        channels = [width * 2**stage for stage in range(len(blocks))]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        for before, after, n_blocks in zip([width, *channels], channels, blocks, strict=False):
            layers += [_Block(before, after)] + [_Block(after, after) for _ in range(n_blocks - 1)]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self._ends = [2 + n for n in itertools.accumulate(blocks)]  # the place of each stage's last layer
        self.feature_info = [{"num_chs": n} for n in channels]  # this and the methods below: as timm's models have them

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """The last stage's map."""
        return self.layers[:-2](images)

    def forward_head(self, maps: torch.Tensor) -> torch.Tensor:
        """The feature from the last stage's map."""
        return self.layers[-2:](maps)

    def forward_intermediates(
        self, images: torch.Tensor, indices: Sequence[int], intermediates_only: bool, stop_early: bool
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of some stages, in ascending order, beside the last one's unless they alone are wanted."""
        wanted = [self._ends[stage] for stage in indices]
        maps, seen = images, []
        for place, layer in enumerate(list(self.layers)[: wanted[-1] + 1 if stop_early else -2]):
            maps = layer(maps)
            if place in wanted:
                seen.append(maps)
        return seen if intermediates_only else (maps, seen)


class _Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut; halves the map where it adds channels."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.convolutions = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut: nn.Module = nn.Identity()
        if before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.convolutions(maps) + self.shortcut(maps))


OWN = {"small_resnet": SmallResNet}


def create_backbone(
    name: str, *, pretrained: bool, image_size: int, arguments: Mapping[str, Any] | None = None
) -> Backbone:
    """Build an encoder: timm's model `name` without its classifier, or our own of that name.

    Args:
        name: "small_resnet" (ours, for small images, not pretrained), or as in `timm.list_models()`, weights' tag
            included ("vit_base_patch16_224.augreg_in21k").
        pretrained: load the published weights (from the hub or its local cache).
        image_size: side of the images in pixels; position embeddings are made for it.
        arguments: more arguments of timm's constructor, for example `channels` of a ResNet.

    Raises:
        UserError: "parameter 'backbone': unknown ..." with the nearest names; "'backbone_args'" that the model does not
            take; weights that cannot be loaded; an image size that the model cannot take.
    """
    if name in OWN:
        if pretrained:
            raise UserError(f"parameter 'pretrained': {name!r} has no published weights; set pretrained=false")
        try:
            own = OWN[name](**dict(arguments or {}))
        except (TypeError, ValueError, RuntimeError) as error:  # the last one where its size is beyond all numbers
            raise UserError(f"parameter 'backbone_args': {name!r} cannot be built: {error}") from error
        return Backbone(name, own, _probe(name, own, image_size), *IMAGENET_MEAN_STD)
    architecture = name.split(".")[0]
    known = timm.list_models()
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, [*known, *OWN], n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "timm.list_models() lists the valid names"
        raise UserError(f"parameter 'backbone': unknown timm model {name!r}; {hint}")
    given = constructor_arguments(name, image_size, arguments)
    try:
        encoder = timm.create_model(name, pretrained=pretrained, num_classes=0, **given)
    except (TypeError, AssertionError, ValueError, AttributeError) as error:
        raise UserError(
            f"parameters 'backbone', 'backbone_args', 'image_size': timm cannot build {name!r} with "
            f"{dict(arguments or {})} for images of {image_size} pixels: {error}"
        ) from error
    except (RuntimeError, OSError) as error:  # hub and network errors, weights that do not fit
        raise UserError(
            f"parameter 'pretrained': the weights of {name!r} could not be loaded ({type(error).__name__}: {error}); "
            "connect once so that they are cached, or set pretrained=false"
        ) from error
    quicken(encoder)
    config = encoder.pretrained_cfg
    probe = _probe(name, encoder, image_size)
    return Backbone(name, encoder, probe, tuple(config.get("mean", (0.5,) * 3)), tuple(config.get("std", (0.5,) * 3)))


def constructor_arguments(name: str, image_size: int, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `create_backbone` gives to the constructor of this encoder, so that another program can build it as well.

    Args: as for `create_backbone`, which has accepted them.
    """
    given = dict(arguments or {})
    if name in OWN:
        return given
    defaults: dict[str, Any] = {"img_size": image_size} if _takes_image_size(name.split(".")[0]) else {}
    if ".augreg_" in name:  # trained with GELU's tanh form, where timm computes the exact one
        defaults["act_layer"] = "gelu_tanh"
    return defaults | given


def flops_per_image(backbone: Backbone, image_size: int) -> int:
    """Operations of one forward pass on one image: two for a multiplication with its addition."""
    training = backbone.training
    device = next(backbone.parameters()).device
    backbone.eval()
    # Fused attention of some devices is not counted; its plain form, two matrix products, is on all of them.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        backbone(torch.zeros(1, 3, image_size, image_size, device=device))
    backbone.train(training)
    return counter.get_total_flops()


def _takes_image_size(architecture: str) -> bool:
    """Whether the model's constructor has fixed positions, hence an `img_size`: timm says so by `fixed_input_size`."""
    return bool(timm.get_pretrained_cfg(architecture, allow_unregistered=True).fixed_input_size)


def check_size(backbone: Backbone, image_size: int, parameter: str) -> None:
    """Refuse, by the name of the parameter that asks for it, a size of images that an encoder cannot take."""
    _probe(backbone.name, backbone.encoder, image_size, parameter)


def _probe(name: str, encoder: nn.Module, image_size: int, parameter: str = "image_size") -> int:
    """Feature size, seen on one black image, so that a model that returns a map or a tuple is refused at once."""
    training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            out = encoder(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"parameter '{parameter}': {name!r} cannot take images of {image_size} pixels: {error}"
        ) from error
    finally:
        encoder.train(training)
    if not isinstance(out, torch.Tensor) or out.ndim != 2:
        found = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, torch.Tensor) else type(out).__name__
        raise UserError(f"parameter 'backbone': {name!r} gives {found} instead of one feature vector per image")
    return out.shape[1]


def normalise(
    images: Float[Tensor, "batch 3 height width"] | UInt8[Tensor, "batch 3 height width"],
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Tensor, "batch 3 height width"]:
    """Return (x / 255 - mean) / std per channel. Pinned by golden/preprocess.npz.

    Args:
        mean, std: of each channel, for values in 0..1; std > 0.
    """
    shift = torch.tensor(mean, dtype=torch.float32, device=images.device)[:, None, None]
    scale = torch.tensor(std, dtype=torch.float32, device=images.device)[:, None, None]
    return (images.float() - 255 * shift) / (255 * scale)
