"""Masks against what was drawn, IoU against counting by hand, the linear layer on patches that say all or nothing."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.helpers.catalogs import write_tree, write_uned_tree
from udonlib.data.catalog import load_catalog
from udonlib.data.miniuned.masks import cells, sheet, shipped_masks
from udonlib.errors import UserError
from udonlib.evaluation.frozen.dense import MASK_SIDE, draw_masked, figure_probe, grid_side, mean_iou


def blocks(n: int = 30, side: int = 6) -> torch.Tensor:
    """Masks whose squares of 8 pixels are figure or ground at random, at least one of each in an image."""
    coarse = torch.rand(n, side, side, generator=torch.Generator().manual_seed(0)) < 0.4
    coarse[:, 0, 0], coarse[:, 0, 1] = True, False
    return coarse.repeat_interleave(MASK_SIDE // side, 1).repeat_interleave(MASK_SIDE // side, 2)


def png(alpha: np.ndarray | None, side: int = 24) -> bytes:
    colours = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    pixels = colours if alpha is None else np.dstack([colours, alpha])
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_iou_is_the_mean_of_figure_and_ground():
    said = torch.tensor([[[1, 1], [0, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]], dtype=torch.bool)
    true = torch.tensor([[[1, 0], [1, 0]], [[1, 1], [1, 1]], [[1, 0], [0, 0]]], dtype=torch.bool)
    # Of the first image 1 of 3 pixels in either class; the second has no ground at all; the third says no figure.
    np.testing.assert_allclose(mean_iou(said, true), [1 / 3, 1, (0 + 3 / 4) / 2])


def test_patches_that_are_the_mask_are_told_apart_without_a_fault():
    masks = blocks()
    patches = torch.stack([masks.flatten(1), ~masks.flatten(1)], dim=-1).float()  # the grid of the mask's own pixels
    probe = figure_probe(patches, masks)
    assert probe.score(patches, masks).tolist() == [1.0] * len(masks)
    assert probe.tried[probe.strength] == max(probe.tried.values()) == 1


def test_patches_that_are_all_alike_say_what_most_pixels_are():
    masks = blocks()
    probe = figure_probe(torch.ones(len(masks), 9, 4), masks)
    assert masks.float().mean() < 0.5
    ground = (~masks).float().mean((1, 2)).double().numpy()
    np.testing.assert_allclose(probe.score(torch.ones(len(masks), 9, 4), masks), ground / 2)


def test_logits_of_a_coarse_grid_are_upsampled_bilinearly():
    masks = blocks()
    patches = F.adaptive_avg_pool2d(masks[:, None].float(), 4).flatten(1)[:, :, None]
    probe = figure_probe(patches, masks)
    coarse = (patches[..., 0] * probe.weight + probe.bias).reshape(-1, 1, 4, 4)
    expected = F.interpolate(coarse, (48, 48), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(probe.logits(patches), expected)
    constant = (~masks).float().mean() / 2
    assert probe.score(patches, masks).mean() > constant + 0.2


def test_a_patch_counts_by_its_share_of_figure():
    """Every patch is alike, and 30% of its pixels are figure: the layer says 30%, not the majority's 0%."""
    masks = torch.zeros(20, MASK_SIDE, MASK_SIDE, dtype=torch.bool)
    masks[:, :, ::10] = masks[:, :, 3::10] = masks[:, :, 6::10] = True
    share = float(masks.float().mean())
    probe = figure_probe(torch.zeros(20, 1, 3), masks)
    assert torch.sigmoid(probe.logits(torch.zeros(1, 1, 3))).mean().item() == pytest.approx(share, abs=1e-3)


def test_masks_without_ground_train_a_layer_that_says_figure():
    masks = torch.ones(4, MASK_SIDE, MASK_SIDE, dtype=torch.bool)
    patches = torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(0))
    assert figure_probe(patches, masks).score(patches, masks).tolist() == [1.0] * 4
    assert figure_probe(patches, ~masks).score(patches, ~masks).tolist() == [1.0] * 4


def test_scales_of_channels_do_not_matter():
    masks = blocks(12)
    patches = torch.randn(12, 36, 5, generator=torch.Generator().manual_seed(1))
    patches[..., 0] += F.adaptive_avg_pool2d(masks[:, None].float(), 6).flatten(1)
    scales, shifts = torch.tensor([1.0, 1e3, 1e-2, 5.0, 1.0]), torch.tensor([0.0, 9.0, -3.0, 1.0, 100.0])
    once, again = (figure_probe(p, masks).score(p, masks) for p in (patches, patches * scales + shifts))
    np.testing.assert_allclose(once, again, atol=2e-3)


def test_patches_of_no_square_are_refused():
    assert grid_side(49, "a") == 7
    with pytest.raises(UserError, match="encoder 'a' gives 50 patches an image, expected those of a square"):
        grid_side(50, "a")


def test_masks_of_own_images_are_their_alpha_cut_as_the_images_are(tmp_path):
    tree = write_uned_tree(tmp_path, domains=["emoji"])
    alpha = np.zeros((24, 48), np.uint8)
    alpha[:, :24] = 200  # the left half; the middle 24 columns, half of them figure, are what is seen
    colours = np.zeros((24, 48, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.dstack([colours, alpha])).save(buffer, "PNG")
    catalog = load_catalog(str(tree))
    paths = catalog["emoji"].splits["test"].paths
    write_tree(
        tree, {f"images/{paths[1]}": buffer.getvalue(), f"images/{paths[2]}": png(np.full((24, 24), 255, np.uint8))}
    )
    write_tree(tree, {f"images/{paths[3]}": b"no image"})
    found = draw_masked(catalog, catalog["emoji"], "test", 99, np.random.default_rng(0))
    assert found.positions == [1]  # the others have no alpha, are opaque everywhere, or cannot be decoded
    expected = torch.zeros(MASK_SIDE, MASK_SIDE, dtype=torch.bool)
    expected[:, : MASK_SIDE // 2] = True
    assert torch.equal(found.masks[0], expected)


def test_images_are_drawn_by_the_generator():
    catalog = load_catalog("miniuned", "emoji,earth")
    drawn = [draw_masked(catalog, catalog["emoji"], "test", 20, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert drawn[0].positions == drawn[1].positions != drawn[2].positions
    assert sorted(set(drawn[0].positions)) == drawn[0].positions
    assert len(drawn[0].positions) == len(drawn[0].masks) == 20
    path = catalog["emoji"].splits["test"].paths[drawn[0].positions[7]]
    assert np.array_equal(drawn[0].masks[7].numpy(), shipped_masks("emoji")[path])
    assert draw_masked(catalog, catalog["earth"], "test", 20, np.random.default_rng(0)).positions == []


def test_a_sheet_gives_its_masks_back():
    masks = np.random.default_rng(0).random((70, 48, 48)) < 0.3
    found = cells(sheet(masks))
    assert np.array_equal(found[:70], masks)
    assert not found[70:].any()
