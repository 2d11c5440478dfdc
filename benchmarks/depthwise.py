"""Gradients of depthwise convolutions on small maps: the library's and ours, on one thread.

    python benchmarks/depthwise.py
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python benchmarks/depthwise.py

The first table is of the layers of an EfficientNet-Lite0 on 64 images of 48 pixels; then the whole encoder.
"""

import copy
import time

import torch
from torch import nn

from udonlib.models.backbones import timm
from udonlib.models.depthwise import quicken

LAYERS = [(1152, 2, 5, 1), (1152, 2, 3, 1), (672, 3, 5, 1), (672, 3, 5, 2), (480, 3, 5, 1), (480, 4, 5, 1)]


def milliseconds(step, n: int = 5) -> float:
    best = float("inf")
    for _ in range(n):
        began = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - began)
    return 1000 * best


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{torch.backends.cpu.get_cpu_capability()}; milliseconds of one forward and backward pass of 64 images")
    for channels, size, kernel, stride in LAYERS:
        layer = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
        maps = torch.randn(64, channels, size, size).to(memory_format=torch.channels_last).requires_grad_()
        ours = copy.deepcopy(layer)
        quicken(ours)
        before, after = (milliseconds(lambda f=f, maps=maps: f(maps).sum().backward()) for f in (layer, ours))
        print(f"{channels:5} x {size} x {size}, {kernel} x {kernel} stride {stride}: {before:6.1f} -> {after:5.1f}")
    plain = timm.create_model("tf_efficientnet_lite0", num_classes=0).to(memory_format=torch.channels_last)
    quick = copy.deepcopy(plain)
    quicken(quick)
    images = torch.randn(64, 3, 48, 48).to(memory_format=torch.channels_last)
    for name, encoder in (("library", plain), ("ours", quick)):
        took = milliseconds(lambda encoder=encoder: encoder(images).square().mean().backward(), 8)
        print(f"EfficientNet-Lite0, {name}: {64_000 / took:.0f} images/s")


if __name__ == "__main__":
    main()
