"""Images that are the same are found in pairs, and images that only look like one kind are not."""

import numpy as np
import pytest

from udonlib.data.check import duplicates
from udonlib.data.check.duplicates import BITS_APART, equal_groups, near_pairs


def thumbnails(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 192), dtype=np.uint8)


def test_equal_keys_are_grouped_in_the_order_of_their_first():
    keys = np.array([7, 5, 9, 5, 7, 7], np.uint64)
    assert [group.tolist() for group in equal_groups(keys)] == [[0, 4, 5], [1, 3]]
    assert equal_groups(np.zeros(0, np.uint64)) == []


@pytest.mark.parametrize("n_bits", range(6))
def test_a_pair_is_found_wherever_its_few_different_bits_are(n_bits):
    rng = np.random.default_rng(n_bits)
    hashes = rng.integers(0, 2**63, 200, dtype=np.uint64)
    images = thumbnails(200)
    for pair in range(100):  # 100 pairs, each apart in other bits
        bits = rng.choice(64, n_bits, replace=False)
        hashes[100 + pair] = hashes[pair] ^ np.bitwise_or.reduce(np.uint64(1) << bits.astype(np.uint64), initial=0)
        images[100 + pair] = images[pair]
    expected = [[i, 100 + i] for i in range(100)] if n_bits <= BITS_APART else []
    assert near_pairs(hashes, images).tolist() == expected


def test_equal_hashes_are_no_pair_where_thumbnails_differ():
    images = thumbnails(4)
    images[2] = np.clip(images[0].astype(int) + 3, 0, 255)  # a little brighter
    images[3] = images[1] // 2 + 64  # the same at half the contrast: another picture
    assert near_pairs(np.zeros(4, np.uint64), images).tolist() == [[0, 2]]


def test_images_of_one_colour_have_no_near_duplicates():
    flat = np.full((3, 192), 255, np.uint8)
    assert near_pairs(np.zeros(3, np.uint64), flat).tolist() == []
    assert near_pairs(np.zeros(0, np.uint64), flat[:0]).shape == (0, 2)


def test_a_bucket_of_very_many_is_bounded_and_so_are_the_pairs(monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_BUCKET", 2)
    monkeypatch.setattr(duplicates, "MAX_PAIRS", 3)
    images = np.repeat(thumbnails(1), 5, axis=0)
    assert near_pairs(np.zeros(5, np.uint64), images).tolist() == [[0, 1], [0, 2], [0, 3]]
    monkeypatch.setattr(duplicates, "MAX_PAIRS", 100)
    assert near_pairs(np.zeros(5, np.uint64), images).tolist() == [[0, i] for i in range(1, 5)] + [
        [1, i] for i in range(2, 5)
    ]


def test_pairs_do_not_depend_on_the_size_of_blocks(monkeypatch):
    hashes = np.random.default_rng(1).integers(0, 4, 60, dtype=np.uint64)
    images = thumbnails(3)[np.random.default_rng(2).integers(0, 3, 60)]
    whole = near_pairs(hashes, images).tolist()
    monkeypatch.setattr(duplicates, "BLOCK", 256)
    assert near_pairs(hashes, images).tolist() == whole != []
