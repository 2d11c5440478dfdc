"""PCA is the two directions of the largest variance; UMAP is computed once, and the same in every process."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.embeddings import clouds
from udonlib.lab import projections
from udonlib.lab.projections import Umap, file_of, fingerprint, framed, kept, pca, side_by_side


def test_pca_keeps_distances_in_the_plane_of_largest_variance():
    rng = np.random.default_rng(1)
    plane = rng.normal(size=(40, 2)) * [3, 1]
    turned = np.linalg.qr(rng.normal(size=(6, 6)))[0][:2]
    xy, shares = pca(plane @ turned + 5)
    assert shares[0] > shares[1]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    between = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    expected = np.linalg.norm(plane[:, None] - plane[None], axis=2)
    ratio = between[expected > 0.1] / expected[expected > 0.1]
    assert ratio.std() / ratio.mean() < 1e-4


def test_pca_agrees_with_the_singular_vectors():
    vectors = clouds()
    centred = vectors - vectors.mean(axis=0)
    _, values, right = np.linalg.svd(centred, full_matrices=False)
    xy, shares = pca(vectors)
    np.testing.assert_allclose(shares, values[:2] ** 2 / (values**2).sum(), atol=1e-5)
    for axis in range(2):
        assert abs(np.corrcoef(xy[:, axis], centred @ right[axis])[0, 1]) == pytest.approx(1, abs=1e-5)


def test_pca_does_not_depend_on_the_order_of_vectors():
    vectors = clouds()
    order = np.random.default_rng(3).permutation(len(vectors))
    np.testing.assert_allclose(pca(vectors[order])[0], pca(vectors)[0][order], atol=1e-4)


@given(st.integers(0, 9), st.integers(1, 5), st.booleans())
def test_few_or_equal_vectors_have_coordinates_too(n, dim, equal):
    vectors = np.ones((n, dim), np.float32) if equal else np.random.default_rng(n).normal(size=(n, dim))
    xy, shares = pca(vectors.astype(np.float32))
    assert xy.shape == (n, 2)
    assert np.isfinite(xy).all()
    assert (np.abs(xy) <= 1 + 1e-6).all()
    assert 0 <= sum(shares) <= 1 + 1e-6


def test_a_frame_scales_both_axes_alike_and_fits():
    xy = framed(np.array([[0.0, 5.0], [10.0, 6.0], [4.0, 5.5]]))
    assert xy[:, 0].min() == -1
    assert xy[:, 0].max() == 1
    assert xy[1, 1] - xy[0, 1] == pytest.approx(0.2)


def test_projections_side_by_side_keep_to_their_cells():
    group = np.array([0, 1, 1, 2, 4, 0])
    corner = np.array([[-1, -1], [1, 1]], np.float32)
    parts = [corner, corner, corner[:1], corner[:0], corner[1:]]
    xy, middles = side_by_side(parts, group)
    assert len(set(middles)) == 5
    for number in range(5):
        offset = np.abs(xy[group == number] - np.array(middles[number]))
        assert (offset < 1 / 3).all()  # half of a cell of a grid of three columns
    assert xy[1].tolist() != xy[0].tolist()


def test_umap_tells_clouds_apart_and_is_computed_once(tmp_path, monkeypatch):
    vectors, settings = clouds(), Umap(n_neighbours=8)
    assert not projections.is_kept(vectors, settings, tmp_path)
    first = projections.umap(vectors, settings, tmp_path)
    assert first.shape == (60, 2)
    assert (np.abs(first) <= 1 + 1e-6).all()
    near, far = first[:30].mean(axis=0), first[30:].mean(axis=0)
    spread = max(first[:30].std(), first[30:].std())
    assert np.linalg.norm(near - far) > 2 * spread
    assert projections.is_kept(vectors, settings, tmp_path)
    computed = projections._fit
    monkeypatch.setattr(projections, "_fit", None)  # a second computation would fail
    np.testing.assert_array_equal(projections.umap(vectors, settings, tmp_path), first)
    monkeypatch.setattr(projections, "_fit", computed)
    for other in (Umap(8, seed=1), Umap(9), Umap(8, distance=0.5)):
        assert not projections.is_kept(vectors, other, tmp_path)
    assert not projections.is_kept(clouds(seed=1), settings, tmp_path)


def test_a_umap_of_another_version_is_not_taken_for_this_one_s(monkeypatch):
    before = projections.umap_key(clouds(), Umap())
    monkeypatch.setattr(projections, "version", lambda package: "0.0")
    assert projections.umap_key(clouds(), Umap()) != before


def test_umap_is_the_same_in_another_process(tmp_path):
    here = projections.umap(clouds(), Umap(8), tmp_path / "here")
    code = (
        "import sys, pathlib; from tests.helpers.embeddings import clouds;"
        "from udonlib.lab.projections import Umap, umap;"
        "umap(clouds(), Umap(8), pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], check=True, timeout=600)
    [file] = (tmp_path / "there").iterdir()
    with np.load(file) as there:
        np.testing.assert_array_equal(there["xy"], here)


def test_two_threads_that_want_the_same_umap_compute_it_once(tmp_path, monkeypatch):
    running: list[int] = []

    def fit(vectors: np.ndarray, settings: Umap) -> np.ndarray:
        running.append(len(running))
        time.sleep(0.2)
        return np.zeros((len(vectors), 2), np.float32)

    monkeypatch.setattr(projections, "_fit", fit)
    wanted = [threading.Thread(target=projections.umap, args=(clouds(), Umap(), tmp_path)) for _ in range(3)]
    for thread in wanted:
        thread.start()
    for thread in wanted:
        thread.join()
    assert running == [0]


def test_a_quick_layout_is_kept_by_its_vectors_and_settings(tmp_path, monkeypatch):
    assert not projections.is_kept(clouds(), Umap(), tmp_path, "quick")
    first = projections.quick(clouds(), Umap(), tmp_path)
    assert np.abs(first).max() == pytest.approx(1)
    assert projections.is_kept(clouds(), Umap(), tmp_path, "quick")
    assert not projections.is_kept(clouds(), Umap(), tmp_path, "umap")
    assert not projections.is_kept(clouds(), Umap(seed=1), tmp_path, "quick")
    monkeypatch.setattr(projections, "laid_out", None)  # a second computation would fail
    np.testing.assert_array_equal(projections.quick(clouds(), Umap(), tmp_path), first)
    monkeypatch.setattr(projections, "QUICK_VERSION", 2)
    assert not projections.is_kept(clouds(), Umap(), tmp_path, "quick")


@pytest.mark.parametrize("n", [0, 1, projections.LEAST - 1])
def test_too_few_vectors_for_umap_are_projected_by_pca(tmp_path, n):
    vectors = clouds(60)[:n]
    np.testing.assert_array_equal(projections.umap(vectors, Umap(), tmp_path), pca(vectors)[0])
    assert projections.is_kept(vectors, Umap(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_equal_vectors_do_not_stop_umap(tmp_path):
    vectors = np.repeat(clouds(10), 3, axis=0)
    assert np.isfinite(projections.umap(vectors, Umap(5), tmp_path)).all()


KEY = fingerprint("something")


def of(value: float, calls: list[float]):
    def compute() -> dict[str, np.ndarray]:
        calls.append(value)
        return {"values": np.full(3, value)}

    return compute


def test_a_fingerprint_tells_parts_of_every_kind_apart():
    three = np.arange(3)
    parts = [(), (1,), ("1",), (12,), (1, 2), ("a", "b"), ("ab",), (three,), (three.astype(np.int32),), (three[None],)]
    parts += [(three + 1,), (three, 1), (1, three)]
    assert len({fingerprint(*each) for each in parts}) == len(parts)


def test_arrays_are_computed_once(tmp_path):
    calls: list[float] = []
    for _ in range(2):
        assert kept(tmp_path / "new", "kind", KEY, of(1.0, calls))["values"].tolist() == [1, 1, 1]
    assert calls == [1.0]
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"kind-{KEY[:16]}.npz"]


@pytest.mark.parametrize("content", [b"", b"no archive at all", "cut"])
def test_a_broken_file_is_computed_anew_and_said_to_be(tmp_path, content):
    calls: list[float] = []
    kept(tmp_path, "kind", KEY, of(1.0, calls))
    file = file_of(tmp_path, "kind", KEY)
    file.write_bytes(file.read_bytes()[:-30] if content == "cut" else content)
    notes: list[str] = []
    assert kept(tmp_path, "kind", KEY, of(2.0, calls), notes.append)["values"].tolist() == [2, 2, 2]
    assert len(notes) == 1
    assert file.name in notes[0]
    assert "computed anew" in notes[0]
    assert kept(tmp_path, "kind", KEY, of(3.0, calls), notes.append)["values"].tolist() == [2, 2, 2]
    assert len(notes) == 1


def test_whichever_byte_of_a_file_has_changed_the_arrays_are_whole(tmp_path):
    file = file_of(tmp_path, "kind", KEY)
    kept(tmp_path, "kind", KEY, of(1.0, []))
    content = file.read_bytes()
    read_again = 0
    for place in range(len(content)):
        for flipped in (0x01, 0xFF):
            file.write_bytes(content[:place] + bytes([content[place] ^ flipped]) + content[place + 1 :])
            calls: list[float] = []
            found = kept(tmp_path, "kind", KEY, of(2.0, calls))
            assert found.keys() == {"values"}
            assert found["values"].tolist() == [2.0 if calls else 1.0] * 3
            read_again += not calls
    assert 0 < read_again < len(content)


def test_a_file_of_another_fingerprint_is_not_taken(tmp_path):
    calls: list[float] = []
    kept(tmp_path, "kind", KEY, of(1.0, calls))
    other = KEY[:16] + "0" * 48
    notes: list[str] = []
    assert kept(tmp_path, "kind", other, of(2.0, calls), notes.append)["values"].tolist() == [2, 2, 2]
    assert "something else" in notes[0]


def test_a_folder_that_cannot_be_written_to_is_said_and_the_arrays_come_all_the_same(tmp_path):
    (tmp_path / "file").write_text("")
    notes: list[str] = []
    found = kept(tmp_path / "file" / "below", "kind", KEY, of(1.0, []), notes.append)
    assert found["values"].tolist() == [1, 1, 1]
    assert "cannot be kept" in notes[0]


def test_a_failed_computation_leaves_no_file(tmp_path):
    def fail() -> dict[str, np.ndarray]:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        kept(tmp_path, "kind", KEY, fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "other",
    [np.zeros((2, 3), np.float64), np.zeros((3, 2), np.float32), np.eye(2, 3, dtype=np.float32), "zeros"],
)
def test_fingerprints_tell_types_shapes_and_values_apart(other):
    array = np.zeros((2, 3), np.float32)
    assert fingerprint(array) == fingerprint(array.copy())
    assert fingerprint(array.T) == fingerprint(np.zeros((3, 2), np.float32))
    assert fingerprint(array) != fingerprint(other)
