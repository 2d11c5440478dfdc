from __future__ import annotations

import shutil
import threading
import time

import numpy as np
import pytest
import torch

from udonlib.errors import UserError
from udonlib.models.feature_cache import FeatureCache, cache_key

SHAPES = {"class": (3,), "patches": (4, 2)}
N, BYTES = 10, 2 * 10 * (3 + 8)


def tokens(positions):
    at = torch.from_numpy(positions).float()
    return {"class": at[:, None] + torch.zeros(3), "patches": -at[:, None, None] + torch.zeros(4, 2)}


class Computer:
    """Counts what it was asked for; stops after some batches."""

    def __init__(self, stops_after=None):
        self.asked, self.stops_after = [], stops_after

    def __call__(self, positions):
        if self.stops_after is not None and len(self.asked) == self.stops_after:
            raise KeyboardInterrupt
        self.asked.append(positions.tolist())
        return tokens(positions)


def make(folder, key="a", max_bytes=1e6, shapes=SHAPES, n=N):
    return FeatureCache(folder, key, shapes, n, max_bytes)


def filled(folder, key="a", **options):
    cache = make(folder, key, **options)
    list(cache.fill(Computer(), 4))
    return cache


def same(cache, positions=(7, 0, 3)):
    found, expected = cache[np.array(positions)], tokens(np.array(positions))
    return all(torch.equal(found[kind].float(), expected[kind]) for kind in SHAPES)


def test_features_come_back_by_position_in_half_precision(tmp_path):
    cache, computer, seen = make(tmp_path), Computer(), []
    seen += cache.fill(computer, 4)
    assert computer.asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert seen == [4, 8, 10]
    assert same(cache)
    assert {t.dtype for t in cache[np.array([1])].values()} == {torch.float16}


def test_a_full_cache_is_not_computed_again_by_another_process(tmp_path):
    filled(tmp_path)
    computer, cache = Computer(), make(tmp_path)
    list(cache.fill(computer))
    assert computer.asked == []
    assert same(cache)


def test_filling_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("udonlib.models.feature_cache.SAVE_EVERY", 1)
    cache = make(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        list(cache.fill(Computer(stops_after=2), 4))
    assert cache.n_done == 8
    computer, again = Computer(), make(tmp_path)
    list(again.fill(computer, 4))
    assert computer.asked == [[8, 9]]
    assert same(again, range(10))


def test_what_was_not_noted_yet_is_computed_again(tmp_path):
    cache = make(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        list(cache.fill(Computer(stops_after=2), 4))  # fewer than are noted together
    assert cache.n_done == 0


@pytest.mark.parametrize("file", ["class.npy", "patches.npy", "cache.json"])
def test_a_damaged_cache_is_made_anew(tmp_path, file):
    path = filled(tmp_path).path / file
    path.write_bytes(path.read_bytes()[:-5])
    computer, cache = Computer(), make(tmp_path)
    list(cache.fill(computer, 10))
    assert len(computer.asked) == 1
    assert same(cache)


def test_a_cache_of_other_shapes_or_fewer_images_is_made_anew(tmp_path):
    filled(tmp_path)
    assert make(tmp_path).n_done == 10
    assert make(tmp_path, n=9).n_done == 0
    assert make(tmp_path, shapes={"class": (3,)}).n_done == 0


def test_more_than_is_allowed_is_refused_before_anything_is_touched(tmp_path):
    other = filled(tmp_path, "old")
    with pytest.raises(UserError, match=r"features of 10 images take 2\.2e-07 GB in .* all caches may take 1e-07 GB"):
        make(tmp_path, max_bytes=100)
    assert other.n_done == 10


def size(cache):
    return sum(file.stat().st_size for file in cache.path.iterdir())


def test_the_cache_that_was_opened_longest_ago_makes_room(tmp_path):
    first, second = filled(tmp_path, "first"), filled(tmp_path, "second")
    time.sleep(0.01)
    list(make(tmp_path, "first").fill(Computer()))  # opened again
    room = size(first) + BYTES + 50
    third = filled(tmp_path, "third", max_bytes=room)
    assert not second.path.exists()
    assert first.n_done == third.n_done == 10


def test_a_cache_that_is_being_filled_is_never_removed(tmp_path):
    inside, go = threading.Event(), threading.Event()

    def slow(positions):
        inside.set()
        assert go.wait(60)
        return tokens(positions)

    cache = make(tmp_path, "slow")
    thread = threading.Thread(target=lambda: list(cache.fill(slow)))
    thread.start()
    try:
        assert inside.wait(60)
        with pytest.raises(UserError, match="other processes fill .* allow more, or wait for them"):
            filled(tmp_path, "other", max_bytes=BYTES + 10)
    finally:
        go.set()
        thread.join(60)
    assert cache.n_done == 10


def test_a_disk_without_room_is_said_before_it_is_filled(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(UserError, match=r"1e-07 GB are free, the features of 10 images take 2\.2e-07 GB"):
        filled(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_what_half_precision_cannot_hold_is_refused(tmp_path, value):
    def compute(positions):
        return {kind: t + value for kind, t in tokens(positions).items()}

    with pytest.raises(UserError, match="class tokens that are not finite, or beyond 65,504"):
        list(make(tmp_path).fill(compute))


def test_an_unfilled_cache_gives_nothing(tmp_path):
    with pytest.raises(ValueError, match="fill the cache first"):
        make(tmp_path)[np.array([0])]


def test_a_key_differs_with_all_that_decides_what_is_held():
    keys = [cache_key(*key) for key in [("t", "d", 48, 9), ("u", "d", 48, 9), ("t", "e", 48, 9), ("t", "d", 96, 9)]] + [
        cache_key("t", "d", 48, None)
    ]
    assert len(set(keys)) == 5
    assert cache_key("t", "d", 48, 9) == keys[0]
