"""Pairs of images that are the same: of equal files, and near-duplicates by a hash that thumbnails confirm.

A hash alone takes many images of one kind for copies of each other: 9,030 pairs of MiniUnED's drawings and garments, of
which one looks the same to a person. The 8 x 8 thumbnails of a pair tell. Copies that were stored anew, made smaller or
larger, or a little brighter pass both; mirrored or cropped ones do not.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int64, UInt8, UInt64

BITS_APART = 3  # of 64, at most: so that two hashes share one of four bands of 16 bits
CORRELATION = 0.99  # of two thumbnails, at least
DIFFERENCE = 6.0  # of 255, on average, at most
MAX_BUCKET = 4000  # images that share a band; of more, these are compared with all of it
MAX_PAIRS = 200_000  # that are kept
BLOCK = 1 << 22  # pairs of hashes compared at once

Pairs = Int64[np.ndarray, "pair 2"]


def equal_groups(keys: UInt64[np.ndarray, "n"]) -> list[Int64[np.ndarray, "_"]]:
    """Return the positions of each key that stands there twice or more, rising, in the order of the first."""
    order = np.argsort(keys, kind="stable")
    cuts = np.flatnonzero(np.diff(keys[order])) + 1
    groups = [group for group in np.split(order, cuts) if len(group) > 1]
    return sorted(groups, key=lambda group: int(group[0]))


def near_pairs(hashes: UInt64[np.ndarray, "n"], thumbnails: UInt8[np.ndarray, "n dim"]) -> Pairs:
    """Return the pairs of near-duplicates, each once, the lower position first, in order.

    Images of one colour have no near-duplicates: there is nothing in them to compare. Of very many pairs the first
    MAX_PAIRS are returned.
    """
    contrast = thumbnails.astype(np.float32).std(axis=1) if len(thumbnails) else np.zeros(0)
    places = np.flatnonzero(contrast > 1)
    hashes = hashes[places]
    pairs_so_far = [np.zeros((0, 2), np.int64)]
    for pairs in _candidates(hashes):
        pairs_so_far.append(pairs[_look_alike(thumbnails[places[pairs[:, 0]]], thumbnails[places[pairs[:, 1]]])])
    return places[np.unique(np.concatenate(pairs_so_far), axis=0)][:MAX_PAIRS]


def _candidates(hashes: UInt64[np.ndarray, "n"]) -> Iterator[Pairs]:
    """Yield pairs of positions whose hashes differ in few bits; a pair may come up to four times."""
    for band in range(4):
        values = (hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        for bucket in equal_groups(values):
            some = bucket[:MAX_BUCKET]
            step = max(1, BLOCK // len(bucket))
            for start in range(0, len(some), step):
                rows = some[start : start + step]
                apart = np.bitwise_count(hashes[rows][:, None] ^ hashes[bucket][None])
                left, right = np.nonzero((apart <= BITS_APART) & (rows[:, None] < bucket[None]))
                yield np.stack([rows[left], bucket[right]], axis=1)


def _look_alike(left: UInt8[np.ndarray, "item dim"], right: UInt8[np.ndarray, "item dim"]) -> np.ndarray:
    """Return Bool[pair]: whether two thumbnails show the same, brightness and contrast aside, and nearly as bright."""
    results = [np.zeros(0, bool)]
    for start in range(0, len(left), BLOCK // 256):
        a, b = (values[start : start + BLOCK // 256].astype(np.float32) for values in (left, right))
        difference = np.abs(a - b).mean(axis=1)
        results.append((difference <= DIFFERENCE) & (_correlation(a, b) >= CORRELATION))
    return np.concatenate(results)


def _correlation(a: Float[np.ndarray, "item dim"], b: Float[np.ndarray, "item dim"]) -> Float[np.ndarray, "item"]:
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    return (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
