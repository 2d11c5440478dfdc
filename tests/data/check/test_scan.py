"""Many files are looked at in bounded time; what was not looked at is known."""

import numpy as np
import pytest

from tests.helpers.catalogs import picture, write_tree
from udonlib.data.check import scan as imagescan
from udonlib.data.check.probe import FileFacts, probe_file
from udonlib.data.check.scan import ImageScan
from udonlib.data.storage import Store

N = 10


@pytest.fixture
def paths(tmp_path) -> list[str]:
    contents = {f"{i}.png": picture(i) for i in range(N)} | {"3.png": b"", "5.png": picture(5)[:100]}
    write_tree(tmp_path / "images", contents)
    return list(contents)


def scan(tmp_path, paths: list[str], seconds: float | None = None, progress=None) -> ImageScan:
    return ImageScan(Store(tmp_path / "images"), paths, seconds, progress)


def test_files_and_pixels_of_all_images_are_read_and_bad_ones_noted(tmp_path, paths, monkeypatch):
    monkeypatch.setattr(imagescan, "CHUNK", 3)
    said: list[tuple[str, int, int]] = []
    found = scan(tmp_path, [*paths, "gone.png"], progress=lambda *state: said.append(state))
    found.note_missing(iter([N]))
    found.read_files(np.arange(N + 1))
    assert (found.n_files, found.read.sum()) == (N + 1, N - 1)
    found.read_pixels(None, 0)
    assert (found.n_pixels, found.decoded.sum()) == (N - 1, N - 2)
    assert sorted(found.problems) == [3, 5, 10]
    assert found.problems[3] == "the file is empty"
    assert found.problems[5].startswith("cannot be decoded: ")
    assert found.problems[10] == "no such file"
    assert found.kinds == [("PNG", "RGB")]
    assert found.sizes[found.read].tolist() == [[24, 20]] * (N - 1)
    assert said == [("files", n, 11) for n in (4, 7, 10, 11)] + [("pixels", n, 9) for n in (3, 6, 9)]


def test_what_looks_cut_is_decoded_first_and_besides_the_sample(tmp_path, paths):
    found = scan(tmp_path, paths)
    found.read_files(np.arange(N))
    found.read_pixels(2, 0)
    assert found.n_pixels == 3
    assert 5 in found.problems
    assert found.decoded.sum() == 2


def test_nothing_more_is_read_when_the_time_is_up(tmp_path, paths):
    found = scan(tmp_path, paths, seconds=0)
    found.read_files(np.arange(N))
    found.read_pixels(None, 0)
    assert (found.n_files, found.n_pixels, found.read.sum()) == (0, 0, 0)


def test_files_are_read_in_the_order_given_until_their_share_of_the_time_is_up(tmp_path, paths, monkeypatch):
    now = [0.0]

    def probe(store: Store, path: str) -> FileFacts:
        now[0] += 1
        return probe_file(store, path)

    monkeypatch.setattr(imagescan, "CHUNK", 1)
    monkeypatch.setattr(imagescan, "probe_file", probe)
    monkeypatch.setattr(imagescan.time, "perf_counter", lambda: now[0])
    order = np.array([7, 2, 9] * 6 + [0] * 12)
    found = scan(tmp_path, paths, seconds=20)
    found.read_files(order)
    assert 15 <= found.n_files <= 17  # two are under way when three quarters of the time are over
    assert np.flatnonzero(found.read).tolist() == [2, 7, 9]
    now[0] = 19.5
    found.read_pixels(None, 0)
    assert found.n_pixels > 0  # what is left is theirs


def test_an_interrupt_ends_it(tmp_path, paths):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(tmp_path, paths, progress=interrupt).read_files(np.arange(N))
