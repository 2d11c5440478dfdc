"""The dense task: which patches are figure, and which are ground, by one linear layer on frozen patch tokens.

An image whose alpha is known tells figure (alpha >= 1/2) from ground. Masks are of MASK_SIDE pixels a side, cut from
the image as the encoder's own images are. Encoders differ in their grid of patches, and meet on the pixels of the mask:

    training     each patch of a training image is a sample, its target the share of figure among the pixels it covers
    testing      the logits of an image's patches are upsampled bilinearly to the mask's pixels; > 0 is figure

    score of an image = (IoU of figure + IoU of ground) / 2,     IoU = |said and true| / |said or true|

A class that neither mask nor prediction has counts as found. A token's channels are standardised over the training
patches, as the batch norm before such a layer does. Source: DINOv2 (TMLR 2024) sec. 7.4, the linear layer of UNIC (ECCV
2024) sec. 4; here the layer is a logistic regression.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from udonlib.data.catalog import Catalog, Domain
from udonlib.data.decoding import ImageError, decode_alpha, resize_eval
from udonlib.data.miniuned import ARCHIVE
from udonlib.data.miniuned.masks import shipped_masks
from udonlib.errors import UserError
from udonlib.evaluation.frozen.probes import regressions

MASK_SIDE = 48  # pixels: MiniUnED's own
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # values of C that are tried
MOST_PATCHES = 10_000  # that the layer is trained on
HELD_OUT = 0.2  # of the training images, to choose C by


@dataclass(frozen=True, eq=False)
class Masked:
    """Images of a split whose figure is known: their positions, rising, and masks, true where figure is."""

    positions: list[int]
    masks: Bool[Tensor, "image side side"]


def draw_masked(catalog: Catalog, domain: Domain, split: str, n: int, generator: np.random.Generator) -> Masked:
    """Draw up to n images of a split at random, and keep those whose figure is known.

    MiniUnED's drawings have masks that ship with it; of other images the alpha channel is the mask. Images without
    transparent pixels, or that cannot be decoded, have none.
    """
    paths = domain.splits[split].paths
    drawn = np.sort(generator.permutation(len(paths))[:n]).tolist()
    shipped = shipped_masks(domain.name) if catalog.root.resolve() == ARCHIVE.resolve() else None
    positions, masks = [], []
    for position in drawn:
        if shipped is not None:
            mask = shipped.get(paths[position])
        else:
            mask = _from_alpha(catalog, paths[position])
        if mask is not None:
            positions.append(position)
            masks.append(torch.from_numpy(mask))
    return Masked(positions, torch.stack(masks) if masks else torch.zeros(0, MASK_SIDE, MASK_SIDE, dtype=torch.bool))


def _from_alpha(catalog: Catalog, path: str) -> Bool[np.ndarray, "side side"] | None:
    try:
        alpha = decode_alpha(catalog.store.read(path), path)
    except ImageError:
        return None
    if alpha is None:
        return None
    as_rgb = np.repeat(np.asarray(alpha)[:, :, None], 3, axis=2)
    return resize_eval(as_rgb, MASK_SIDE)[0].numpy() >= 127.5


def grid_side(n_positions: int, encoder: str) -> int:
    """Patches along a side of a square map.

    Raises: UserError "encoder '...' gives 7 patches an image, expected those of a square".
    """
    side = math.isqrt(n_positions)
    if side**2 != n_positions:
        raise UserError(f"encoder '{encoder}' gives {n_positions} patches an image, expected those of a square")
    return side


@dataclass(frozen=True, eq=False)
class FigureProbe:
    """A linear layer that tells figure from ground; `strength`: its C; `tried`: mean score of held-out images by C."""

    weight: Float[Tensor, "dim"]
    bias: float
    strength: float
    tried: dict[float, float]

    def logits(self, patches: Float[Tensor, "image position dim"]) -> Float[Tensor, "image side side"]:
        """The logit of figure at each pixel of a mask."""
        side = math.isqrt(patches.shape[1])
        coarse = (patches @ self.weight + self.bias).reshape(-1, 1, side, side)
        return F.interpolate(coarse, (MASK_SIDE, MASK_SIDE), mode="bilinear", align_corners=False)[:, 0]

    def score(
        self, patches: Float[Tensor, "image position dim"], masks: Bool[Tensor, "image side side"]
    ) -> Float[np.ndarray, "image"]:
        """Mean IoU of each image, in 0..1."""
        return mean_iou(self.logits(patches) > 0, masks)


def figure_probe(
    patches: Float[Tensor, "image position dim"],
    masks: Bool[Tensor, "image side side"],
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
) -> FigureProbe:
    """Train a `FigureProbe`: logistic regression of single patches, C by the mean score of held-out images.

        minimise  C sum_i -[m_i log p_i + (1 - m_i) log(1 - p_i)]  +  |w|^2 / 2,    p = sigmoid(w x + b)

    m_i: share of figure in patch i. At most MOST_PATCHES patches are trained on, drawn at random.

    Args:
        patches: tokens of a square grid, row by row.
        masks: of the same images.
    """
    generator = np.random.default_rng(seed)
    side = math.isqrt(patches.shape[1])
    shares = F.adaptive_avg_pool2d(masks[:, None].double(), side).flatten(1)
    order = generator.permutation(len(patches))
    n_held = round(HELD_OUT * len(patches))
    held, kept = torch.from_numpy(order[:n_held]), torch.from_numpy(order[n_held:])
    tried: dict[float, float] = {}
    if n_held and len(strengths) > 1:
        for strength, (weight, bias) in zip(strengths, _fits(patches, shares, kept, strengths, seed), strict=True):
            probe = FigureProbe(weight, bias, strength, {})
            tried[strength] = float(probe.score(patches[held], masks[held]).mean())
    best = max(tried, key=lambda strength: (tried[strength], -strength), default=strengths[0])
    [(weight, bias)] = _fits(patches, shares, torch.arange(len(patches)), [best], seed)
    return FigureProbe(weight, bias, best, tried)


def _fits(
    patches: Tensor, shares: Tensor, images: Tensor, strengths: Sequence[float], seed: int
) -> list[tuple[Float[Tensor, "dim"], float]]:
    """Weight and bias, for tokens as they are, of each C."""
    flat, target = patches[images].flatten(0, 1), shares[images].flatten().numpy()
    rows = np.random.default_rng(seed).permutation(len(flat))[:MOST_PATCHES]
    vectors, target = flat[rows].double().numpy(), target[rows]
    mean, std = vectors.mean(axis=0), vectors.std(axis=0)
    std[std <= 1e-6 * np.abs(mean)] = 1  # a channel that says nothing
    std[std == 0] = 1
    vectors = (vectors - mean) / std
    # A patch that is figure in part is two samples, one of each class, with its shares as weights.
    figure, ground = np.flatnonzero(target > 0), np.flatnonzero(target < 1)
    if not len(figure) or not len(ground):
        return [(torch.zeros(vectors.shape[1]), 1.0 if len(figure) else -1.0)] * len(strengths)
    both = np.concatenate([figure, ground])
    labels = np.repeat([1, 0], [len(figure), len(ground)])
    weights = np.concatenate([target[figure], 1 - target[ground]])
    found = []
    for classifier in regressions(vectors[both], labels, strengths, weights):
        weight = classifier.coef_[0] / std
        found.append((torch.from_numpy(weight).float(), float(classifier.intercept_[0] - weight @ mean)))
    return found


def mean_iou(
    said: Bool[Tensor, "image side side"], true: Bool[Tensor, "image side side"]
) -> Float[np.ndarray, "image"]:
    """Mean over figure and ground of each image's IoU; a class in neither mask counts as 1."""
    ious = []
    for one, other in ((said, true), (~said, ~true)):
        common, either = (one & other).sum((1, 2)).double(), (one | other).sum((1, 2)).double()
        ious.append(torch.where(either > 0, common / either.clamp(min=1), 1.0))
    return torch.stack(ious).mean(0).numpy()
