"""Augmentation: what each kind may and may not change, reproducibly and for each image by itself."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from udonlib.data import augmentation
from udonlib.data.augmentation import KINDS, augment
from udonlib.errors import UserError
from udonlib.models.backbones import normalise
from udonlib.params import TrainParams


def noise(n: int, size: int = 20, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(n: int, size: int = 48) -> Tensor:
    """Images that change little from pixel to pixel."""
    coarse = torch.rand(n, 3, 3, 3, generator=seeded(5)) * 255
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    return fine.clamp(0, 255).to(torch.uint8)


class TestEveryKind:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("image_size", [20, 16, 7])
    def test_results_have_the_asked_size_and_range(self, kind: str, image_size: int) -> None:
        views = augment(noise(50), kind, image_size, seeded())
        assert views.shape == (50, 3, image_size, image_size)
        assert views.dtype == torch.float32
        assert views.min() >= 0
        assert views.max() <= 255

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_same_state_of_the_generator_gives_the_same_images_bit_for_bit(self, kind: str) -> None:
        images, generator = noise(9), seeded(3)
        state = generator.get_state()
        first = augment(images, kind, 16, generator)
        generator.set_state(state)
        torch.rand(7)  # the global generator plays no part
        assert torch.equal(augment(images, kind, 16, generator), first)

    @pytest.mark.parametrize("kind", KINDS)
    def test_images_given_are_left_alone(self, kind: str) -> None:
        images = noise(5)
        before = images.clone()
        augment(images, kind, 20, seeded())
        augment(images, kind, 20, seeded())
        assert torch.equal(images, before)

    @pytest.mark.parametrize("kind", sorted(set(KINDS) - {"none"}))
    def test_every_image_is_changed_by_itself_and_anew_each_time(self, kind: str) -> None:
        images, generator = noise(1).expand(12, -1, -1, -1), seeded()
        views = torch.cat([augment(images, kind, 13, generator), augment(images, kind, 13, generator)])
        assert len(torch.unique(views.flatten(1), dim=0)) >= 20  # a few of 128 possible crops may coincide

    def test_the_kinds_are_those_that_parameters_allow(self) -> None:
        for kind in KINDS:
            assert TrainParams(augmentation=kind).augmentation == kind

    def test_an_unknown_kind_gets_the_nearest_name(self) -> None:
        with pytest.raises(UserError, match="no kind 'affine_color'; did you mean 'affine_colour'"):
            augment(noise(2), "affine_color", 20, seeded())

    @pytest.mark.parametrize("kind", ["none", "crop_flip"])
    def test_cutting_more_than_there_is_is_refused(self, kind: str) -> None:
        with pytest.raises(UserError, match="parameter 'image_size': cannot cut 21 pixels out of images of 20 x 20"):
            augment(noise(2), kind, 21, seeded())

    def test_kinds_have_to_be_as_many_as_images(self) -> None:
        with pytest.raises(ValueError, match="expected a kind for each of 3 images, found 2"):
            augment(noise(3), ["none", "affine"], 20, seeded())


class TestMixedBatches:
    @given(kinds=st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=9), seed=st.integers(0, 99))
    def test_an_image_is_changed_as_its_kind_says(self, kinds: list[str], seed: int) -> None:
        images = noise(len(kinds), seed=seed)
        views = augment(images, kinds, 16, seeded(seed))
        generator = seeded(seed)
        for kind in KINDS:
            rows = [i for i, name in enumerate(kinds) if name == kind]
            if rows:
                assert torch.equal(views[rows], augment(images[rows], kind, 16, generator))


class TestNone:
    def test_the_middle_is_cut_out(self) -> None:
        images = noise(3, 21)
        assert torch.equal(augment(images, "none", 16, seeded()), images[:, :, 2:18, 2:18].float())
        assert torch.equal(augment(images, "none", 21, seeded()), images.float())


class TestCropFlip:
    def test_results_are_crops_mirrored_or_not_and_all_of_them_occur(self) -> None:
        image = noise(1, 6)
        crops = {}
        for top, left, mirrored in itertools.product(range(3), range(3), (False, True)):
            crop = image[0, :, top : top + 4, left : left + 4].float()
            crops[top, left, mirrored] = crop.flip(2) if mirrored else crop
        views = augment(image.expand(2000, -1, -1, -1), "crop_flip", 4, seeded())
        counts = [int((views == crop).all(dim=(1, 2, 3)).sum()) for crop in crops.values()]
        assert sum(counts) == 2000
        assert min(counts) > 60  # 111 expected of each; 5 standard deviations below

    def test_an_image_of_the_right_size_is_only_mirrored(self) -> None:
        image = noise(1)
        views = augment(image.expand(100, -1, -1, -1), "crop_flip", 20, seeded())
        straight = (views == image).all(dim=(1, 2, 3))
        mirrored = (views == image.flip(3)).all(dim=(1, 2, 3))
        assert (straight | mirrored).all()
        assert 30 < straight.sum() < 70


def channel_spread(images: Tensor) -> Tensor:
    """How much the channels of a pixel differ, per image: 0 for grey images."""
    return (images.amax(1) - images.amin(1)).flatten(1).amax(1)


class TestAffine:
    def test_the_warp_agrees_with_sampling_by_the_same_matrices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The grid is built by hand, for speed: against PyTorch's own."""
        images, seen = smooth(6), {}
        sample = torch.nn.functional.grid_sample

        def spy(pixels: Tensor, grid: Tensor, **options: object) -> Tensor:
            seen["grid"] = grid.clone()
            return sample(pixels, grid, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(augmentation.F, "grid_sample", spy)
        augment(images, "affine", 40, seeded(1))
        generator = seeded(1)
        normal = torch.randn(6, 4, generator=generator)
        shift = (torch.rand(6, 2, generator=generator) - 0.5) * 0.3
        angle, shear = 0.14 * normal[:, 0], 0.08 * normal[:, 1]
        scale, aspect = torch.exp(0.12 * normal[:, 2]), torch.exp(0.08 * normal[:, 3])
        matrices = torch.zeros(6, 2, 3)
        for i in range(6):
            s, a, t = float(scale[i]), float(aspect[i]), angle[i]
            matrices[i, 0] = torch.tensor([s * t.cos() * a, shear[i] - s * t.sin(), shift[i, 0]])
            matrices[i, 1] = torch.tensor([s * t.sin(), s * t.cos() / a, shift[i, 1]])
        expected = torch.nn.functional.affine_grid(matrices, [6, 3, 40, 40], align_corners=False)
        torch.testing.assert_close(seen["grid"], expected, atol=1e-5, rtol=0)

    def test_without_chance_the_image_stays_as_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.zeros(*shape))
        monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, 0.5))
        images = smooth(4)
        for kind in ("affine", "affine_colour"):
            torch.testing.assert_close(augment(images, kind, 48, seeded()), images.float(), atol=1e-2, rtol=0)

    def test_images_stay_recognisable(self) -> None:
        images = smooth(200)
        views = augment(images, "affine", 48, seeded())
        flat_images, flat_views = images.float().mean(1).flatten(1), views.mean(1).flatten(1)
        correlation = torch.corrcoef(torch.cat([flat_images, flat_views]))[:200, 200:].diagonal()
        assert correlation.median() > 0.7

    def test_channels_never_change_places_and_grey_stays_grey(self) -> None:
        grey = smooth(100)[:, :1].expand(-1, 3, -1, -1).contiguous()
        assert channel_spread(augment(grey, "affine", 48, seeded())).max() < 1e-2
        red = torch.zeros(200, 3, 8, 8, dtype=torch.uint8)
        red[:, 0] = 200
        views = augment(red, "affine", 8, seeded()).mean((2, 3))
        assert (views[:, 0] > views[:, 1] + 100).all()
        assert torch.allclose(views[:, 1], views[:, 2], atol=1e-3)

    def test_beyond_the_border_its_pixels_go_on(self) -> None:
        even = torch.full((100, 3, 12, 12), 90, dtype=torch.uint8)
        views = augment(even, "affine", 12, seeded())
        assert (views.amax((1, 2, 3)) - views.amin((1, 2, 3))).max() < 1e-2


class TestAffineColour:
    def test_colours_are_permuted_inverted_and_greyed(self) -> None:
        images = torch.zeros(3000, 3, 8, 8, dtype=torch.uint8)
        images[:, 0], images[:, 1], images[:, 2] = 230, 140, 20  # clearly apart, and unlike its inverse
        views = augment(images, "affine_colour", 8, seeded()).flatten(2).median(2).values
        orders = {tuple(row.tolist()) for row in views.argsort(1)}
        assert orders == set(itertools.permutations(range(3)))
        spread = views.amax(1) - views.amin(1)
        assert 0.1 < (spread < 52).float().mean() < 0.5  # grey, but for the 51 by which channels are shifted
        assert (spread > 150).float().mean() > 0.2

        black = torch.zeros(3000, 3, 8, 8, dtype=torch.uint8)
        inverted = augment(black, "affine_colour", 8, seeded()).flatten(1).median(1).values > 127.5
        assert 0.35 < inverted.float().mean() < 0.45

    def test_the_matrix_does_what_its_parts_do_one_after_the_other(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(augmentation, "_warp", lambda images, size, draws: images.float())
        images = smooth(300)
        views = augment(images, "affine_colour", 48, seeded(2))
        draws = torch.rand(300, 16, generator=seeded(2))
        n_patches = 0
        for image, view, draw in zip(images.float(), views, draws, strict=True):
            expected = image[draw[1:4].argsort()] if draw[0] < 0.5 else image
            saturation = 0.0 if draw[4] < 0.15 else float(draw[5]) if draw[4] < 0.5 else 1.0
            expected = saturation * expected + (1 - saturation) * expected.mean(0)
            expected = 255 - expected if draw[6] < 0.4 else expected
            expected = (expected - 127.5) * (0.7 + 0.6 * draw[7]) + 127.5
            expected = (expected + 51 * (draw[8:11, None, None] - 0.5)).clamp(0, 255)
            differs = ((view - expected).abs() > 1e-2).any(0)
            if draw[11] < 0.25:
                n_patches += 1
                assert (view[:, differs] == 127.5).all()
                rows, columns = differs.any(1).nonzero(), differs.any(0).nonzero()
                height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
                assert abs(height - 48 * (0.1 + 0.2 * float(draw[12]))) <= 1.01
                assert abs(width - 48 * (0.1 + 0.2 * float(draw[13]))) <= 1.01
                assert differs.sum() >= 0.9 * height * width
            else:
                assert not differs.any()
        assert 50 < n_patches < 100


class TestNormalise:
    def test_uint8_and_float_images_are_centred_and_scaled_per_channel(self) -> None:
        images = noise(2)
        mean, std = (0.1, 0.5, 0.9), (0.2, 0.5, 1.0)
        expected = torch.stack([(images[:, c] / 255 - mean[c]) / std[c] for c in range(3)], 1)
        for given_images in (images, images.float()):
            torch.testing.assert_close(normalise(given_images, mean, std), expected, atol=1e-5, rtol=0)
