"""Resizing, cropping and normalisation against what the original input pipeline gave."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from udonlib.data.decoding import prepare_eval, prepare_train, resize_eval, resize_train
from udonlib.models.backbones import normalise

Arrays = dict[str, np.ndarray]
TOLERANCE = 2e-4  # of values in 0..255; of values divided by 255 and by a standard deviation, relative to their range


@pytest.fixture
def arrays(golden: Callable[[str], Arrays]) -> Arrays:
    return golden("preprocess")


def cases(arrays: Arrays) -> list[str]:
    names = sorted(key.split("/")[0] for key in arrays if key.endswith("/input_u8"))
    assert names
    return names


def channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def test_training_images_are_squashed_as_in_the_original(arrays: Arrays) -> None:
    for case in cases(arrays):
        resized = resize_train(arrays[f"{case}/input_u8"], int(arrays["resize_size"]))
        expected = channels_first(arrays[f"{case}/train_resized_0_255"])
        torch.testing.assert_close(resized, expected, atol=TOLERANCE, rtol=0)


def test_evaluation_images_are_resized_and_cropped_as_in_the_original(arrays: Arrays) -> None:
    for case in cases(arrays):
        cropped = resize_eval(arrays[f"{case}/input_u8"], int(arrays["image_size"]))
        expected = channels_first(arrays[f"{case}/eval_0_255"])
        torch.testing.assert_close(cropped, expected, atol=TOLERANCE, rtol=0)


def test_images_are_normalised_as_in_the_original(arrays: Arrays) -> None:
    statistics = [key.removeprefix("mean_") for key in arrays if key.startswith("mean_")]
    assert statistics
    for case in cases(arrays):
        cropped = resize_eval(arrays[f"{case}/input_u8"], int(arrays["image_size"]))[None]
        for name in statistics:
            mean, std = (arrays[f"{kind}_{name}"].tolist() for kind in ("mean", "std"))
            expected = channels_first(arrays[f"{case}/eval_normalised_{name}"])
            torch.testing.assert_close(
                normalise(cropped, mean, std)[0], expected, atol=TOLERANCE / 255 / min(std), rtol=1e-6
            )


def test_stored_pixels_are_the_original_ones_rounded(arrays: Arrays) -> None:
    for case in cases(arrays):
        image = Image.fromarray(arrays[f"{case}/input_u8"])
        for prepare, size, key in (
            (prepare_train, "resize_size", "train_resized_0_255"),
            (prepare_eval, "image_size", "eval_0_255"),
        ):
            stored = prepare(image, int(arrays[size]))
            assert stored.dtype == torch.uint8
            expected = channels_first(arrays[f"{case}/{key}"])
            assert (stored.float() - expected).abs().max() <= 0.5 + TOLERANCE
