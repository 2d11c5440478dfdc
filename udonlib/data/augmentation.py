"""Change training images at random, a whole batch at a time on the device where it lies, from one generator.

Which changes leave the class alone is a property of a domain: a logo stays the same logo in other colours, a flag does
not. So every image of a batch may have a kind of its own:

| kind | what it does |
|---|---|
| none | the middle of the image |
| crop_flip | a random crop, mirrored half of the time (the paper's) |
| affine | rotated, scaled, stretched, sheared, shifted a little; other brightness and contrast |
| affine_colour | affine, and colours permuted, inverted, made greyer, shifted; now and then a grey patch |
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from udonlib.errors import UserError, nearest

GREY = 127.5  # the middle of 0..255: contrast and inversion turn around it


def augment(
    images: UInt8[Tensor, "batch 3 height width"],
    kinds: str | Sequence[str],
    image_size: int,
    generator: torch.Generator,
    rows: slice | None = None,
) -> Float[Tensor, "batch 3 image_size image_size"]:
    """Return randomly changed copies of the images, with values in 0..255, `image_size` pixels high and wide.

    The result depends on the images, their kinds and the generator's state alone. Of a batch that several processes
    share each changes its own rows, as one process would change them.

    Args:
        images: as an ImageReader in mode "train" gives them. crop_flip and none cut from them, so that they must not
            be smaller than image_size; the affine kinds see the whole image and scale it.
        kinds: one name for all images or one for each.
        generator: on the device of the images.
        rows: where the images stand in the batch that `kinds` is of, if they are a part of it.

    Raises: UserError for an unknown kind, or images too small to cut from.
    """
    names = [kinds] * len(images) if isinstance(kinds, str) else list(kinds)
    for kind in dict.fromkeys(names):
        if kind not in KINDS:
            raise UserError(f"parameter 'augmentation': no kind '{kind}'; {nearest(kind, KINDS)}")
        if kind in ("none", "crop_flip") and min(images.shape[2:]) < image_size:
            found = " x ".join(map(str, images.shape[2:]))
            raise UserError(f"parameter 'image_size': cannot cut {image_size} pixels out of images of {found}")
    first, last, _ = (rows or slice(None)).indices(len(names))
    if last - first != len(images):
        raise ValueError(f"expected a kind for each of {len(images)} images, found {last - first}")
    if len(set(names)) == 1:
        return KINDS[names[0]](images, image_size, _Draws(generator, len(names), slice(first, last)))
    result = torch.empty(len(images), 3, image_size, image_size, device=images.device)
    for kind, change in KINDS.items():
        places = [i for i, name in enumerate(names) if name == kind]
        if places:
            ours = [n for n, place in enumerate(places) if first <= place < last]
            where = torch.tensor([places[n] - first for n in ours], dtype=torch.long, device=images.device)
            draws = _Draws(generator, len(places), torch.tensor(ours, dtype=torch.long, device=images.device))
            result[where] = change(images[where], image_size, draws)
    return result


class _Draws(NamedTuple):
    """Random numbers for our images among n; they are drawn for all n, so that each image always gets the same."""

    generator: torch.Generator
    n: int
    ours: slice | Tensor

    def rand(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), of this shape for each of our images."""
        return torch.rand(self.n, *shape, generator=self.generator, device=self.generator.device)[self.ours]

    def randn(self, *shape: int) -> Tensor:
        """Normal, of this shape for each of our images."""
        return torch.randn(self.n, *shape, generator=self.generator, device=self.generator.device)[self.ours]


def _middle(images: Tensor, size: int, draws: _Draws) -> Tensor:
    top, left = ((side - size) // 2 for side in images.shape[2:])
    return images[:, :, top : top + size, left : left + size].float()


def _crop_flip(images: Tensor, size: int, draws: _Draws) -> Tensor:
    n, _, height, width = images.shape
    at = draws.rand(3)
    top = (at[:, 0] * (height - size + 1)).long()
    left = (at[:, 1] * (width - size + 1)).long()
    windows = images.unfold(2, size, 1).unfold(3, size, 1)  # a view: [batch, 3, top, left, size, size]
    crops = windows[torch.arange(n, device=images.device), :, top, left]
    return torch.where(at[:, 2, None, None, None] < 0.5, crops, crops.flip(3)).float()


def _affine(images: Tensor, size: int, draws: _Draws) -> Tensor:
    warped = _warp(images, size, draws)
    drawn = draws.rand(2, 1, 1, 1)
    contrast, brightness = _contrast(drawn[:, 0]), _brightness(drawn[:, 1])
    return warped.sub_(GREY).mul_(contrast).add_(brightness + GREY).clamp_(0, 255)


def _affine_colour(images: Tensor, size: int, draws: _Draws) -> Tensor:
    """Recolour by one 3 x 3 matrix for each image: permutation, saturation, inversion and contrast are all linear."""
    n, device = len(images), images.device
    warped = _warp(images, size, draws)
    drawn = draws.rand(16)
    straight = torch.arange(3, device=device)
    order = torch.where(drawn[:, :1] < 0.5, drawn[:, 1:4].argsort(1), straight)
    saturation = torch.where(drawn[:, 4] < 0.15, 0.0, torch.where(drawn[:, 4] < 0.5, drawn[:, 5], 1.0))[:, None, None]
    sign = torch.where(drawn[:, 6] < 0.4, -1.0, 1.0)
    matrix = saturation * torch.eye(3, device=device)[order] + (1 - saturation) / 3
    matrix = matrix * (sign * _contrast(drawn[:, 7]))[:, None, None]
    # matrix (x - GREY) + GREY + brightness, as matrix x + offset
    offset = GREY - matrix.sum(2) * GREY + _brightness(drawn[:, 8:11])
    coloured = torch.baddbmm(offset[:, :, None], matrix, warped.reshape(n, 3, size * size)).clamp_(0, 255)

    # a grey patch of 10 to 30% of height and width, in a quarter of the images
    sides = torch.where(drawn[:, 11:12] < 0.25, 0.1 + 0.2 * drawn[:, 12:14], 0.0)
    corners = drawn[:, 14:16] * (1 - sides)
    at = (torch.arange(size, device=device) + 0.5) / size
    inside = (at >= corners[:, :, None]) & (at < (corners + sides)[:, :, None])
    patch = (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None].float()
    return coloured.view(n, 3, size, size).mul_(1 - patch).add_(GREY * patch)


def _warp(images: Tensor, size: int, draws: _Draws) -> Float[Tensor, "batch 3 size size"]:
    """Sample every image on a rotated, scaled, stretched, sheared and shifted grid; beyond the border, its edge."""
    n, device = len(images), images.device
    normal = draws.randn(4)
    angle, shear = 0.14 * normal[:, 0], 0.08 * normal[:, 1]
    scale, aspect = (0.12 * normal[:, 2]).exp(), (0.08 * normal[:, 3]).exp()
    shift = (draws.rand(2) - 0.5) * 0.3
    cos, sin = scale * angle.cos(), scale * angle.sin()
    at = (2 * torch.arange(size, device=device) + 1) / size - 1
    x, y = at[None, None, :], at[None, :, None]
    grid = torch.empty(n, 2, size, size, device=device)
    for i, (a, b) in enumerate(((cos * aspect, shear - sin), (sin, cos / aspect))):
        torch.add(a[:, None, None] * x, b[:, None, None] * y + shift[:, i, None, None], out=grid[:, i])
    return F.grid_sample(
        images.float(), grid.permute(0, 2, 3, 1), mode="bilinear", padding_mode="border", align_corners=False
    )


def _contrast(draw: Tensor) -> Tensor:
    return 0.7 + 0.6 * draw


def _brightness(draw: Tensor) -> Tensor:
    return 255 * 0.2 * (draw - 0.5)


KINDS: dict[str, Callable[[Tensor, int, _Draws], Tensor]] = {
    "none": _middle,
    "crop_flip": _crop_flip,
    "affine": _affine,
    "affine_colour": _affine_colour,
}
