"""Depthwise convolutions of small maps, trained on a CPU at the pace that memory allows.

A depthwise convolution filters every channel by itself. On maps of a few pixels, as deep layers make of small images,
the library's backward pass goes channel by channel on a CPU: of an EfficientNet-Lite0 on images of 48 pixels it takes
half of the whole step with AVX2, and 33 ms for a layer of 64 x 1,152 x 2 x 2 where ours takes 1.6
(`python benchmarks/depthwise.py`). The forward pass is the library's; gradients agree with its own to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

MAX_PIXELS = 16  # of an input map: on larger ones the library is as fast


def quicken(encoder: nn.Module) -> None:
    """Let every depthwise convolution of an encoder learn from small maps quickly. Weights and their names stay."""
    for module in encoder.modules():
        if type(module) is nn.Conv2d and _is_depthwise(module):
            module.__class__ = _Depthwise
        elif type(module).__name__ == "Conv2dSame" and _is_depthwise(module):  # timm's, which pads as TensorFlow does
            module.__class__ = _same(type(module))  # type: ignore[arg-type]


def _is_depthwise(module: Any) -> bool:
    plain = module.dilation == (1, 1) and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return plain and 1 < module.groups == module.in_channels == module.out_channels


class _Depthwise(nn.Conv2d):
    """A depthwise `Conv2d`. Its class is set on a layer that exists, so that its weights are the same tensors."""

    def _conv_forward(self, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not _is_slow(maps, weight):
            return super()._conv_forward(maps, weight, bias)
        found = _SmallMap.apply(maps, weight, self.stride, self.padding)
        return found if bias is None else found + bias[:, None, None]


def _same(parent: type[nn.Conv2d]) -> type[nn.Conv2d]:
    """The same for a layer whose padding depends on the image's size."""

    class DepthwiseSame(parent):  # type: ignore[misc, valid-type]
        def forward(self, maps: Tensor) -> Tensor:
            if not _is_slow(maps, self.weight):
                return super().forward(maps)
            pads = []
            for size, kernel, stride in zip(maps.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
                missing = max((-(size // -stride) - 1) * stride + kernel - size, 0)
                pads += [missing // 2, missing - missing // 2]
            found = _SmallMap.apply(F.pad(maps, pads), self.weight, self.stride, (0, 0))
            return found if self.bias is None else found + self.bias[:, None, None]

    return DepthwiseSame


def _is_slow(maps: Tensor, weight: Tensor) -> bool:
    if not (torch.is_grad_enabled() and (maps.requires_grad or weight.requires_grad)):
        return False
    small = maps.shape[-1] * maps.shape[-2] <= MAX_PIXELS
    return small and maps.device.type == "cpu" and maps.dtype == weight.dtype == torch.float32


class _SmallMap(torch.autograd.Function):
    """The library's convolution, with a backward pass that goes tap by tap of the kernel over all channels at once."""

    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Float[Tensor, "image channel height width"]:
        ctx.save_for_backward(maps, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(maps, weight, None, stride, padding, 1, weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        maps, weight = ctx.saved_tensors
        # Channels last: a tap's weights of all channels lie side by side, and so do the pixels that they meet.
        maps, gradient = (x.permute(0, 2, 3, 1).contiguous() for x in (maps, gradient))
        taps = weight[:, 0].permute(1, 2, 0).contiguous()
        of_maps, of_taps = torch.zeros_like(maps), torch.zeros_like(taps)
        for i in range(taps.shape[0]):
            inputs, outputs = _met(i, maps.shape[1], gradient.shape[1], ctx.stride[0], ctx.padding[0])
            for j in range(taps.shape[1]):
                columns, places = _met(j, maps.shape[2], gradient.shape[2], ctx.stride[1], ctx.padding[1])
                part = gradient[:, outputs, places]
                of_maps[:, inputs, columns].addcmul_(part, taps[i, j])
                of_taps[i, j] = (maps[:, inputs, columns] * part).sum((0, 1, 2))
        return of_maps.permute(0, 3, 1, 2), of_taps.permute(2, 0, 1)[:, None], None, None


def _met(tap: int, n_in: int, n_out: int, stride: int, padding: int) -> tuple[slice, slice]:
    """The rows of the input that a tap meets, and those of the output for which it does, both in order."""
    first = max(0, -((tap - padding) // stride))  # the first output whose input is not before the map
    end = max(first, min(n_out, (n_in - 1 + padding - tap) // stride + 1))
    if first == end:
        return slice(0, 0), slice(0, 0)
    return slice(first * stride - padding + tap, (end - 1) * stride - padding + tap + 1, stride), slice(first, end)
