"""Descriptors made elsewhere: both forms, every kind of mistake, and sizes that do not fit at once."""

import io
import json
import os
import pickle
import re
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.catalogs import write_uned_tree
from udonlib.data.catalog import DataError, load_catalog
from udonlib.evaluation import descriptors
from udonlib.evaluation.descriptors import read_descriptors, save_descriptors
from udonlib.evaluation.evaluate import evaluate

DIM = 6


@pytest.fixture
def catalog(tmp_path):
    """emoji: queries search themselves; flags: an index of its own for test and val."""
    return load_catalog(str(write_uned_tree(tmp_path / "data", index_of="flags")))


@pytest.fixture
def vectors(catalog):
    """Random vectors of any norm for every split: domain -> split -> array."""
    rng = np.random.default_rng(0)
    return {
        domain.name: {name: rng.normal(size=(len(split), DIM)) for name, split in domain.splits.items()}
        for domain in catalog.domains
    }


def as_lists(vectors):
    return {domain: {name: array.tolist() for name, array in splits.items()} for domain, splits in vectors.items()}


def write(path, vectors, **options):
    """Write descriptors in the form of the file's suffix."""
    if path.suffix == ".json":
        path.write_text(json.dumps(vectors, default=np.ndarray.tolist, **options))
    else:
        arrays = {f"{domain}/{name}": array for domain, splits in vectors.items() for name, array in splits.items()}
        np.savez(path, **arrays)
    return path


def unit(array):
    return array / np.linalg.norm(array, axis=1, keepdims=True)


@pytest.mark.parametrize("suffix", [".json", ".npz"])
@pytest.mark.parametrize(("subset", "index"), [("test", "index"), ("val", "small_index")])
def test_the_vectors_that_a_subset_needs_are_read_and_scaled(catalog, vectors, tmp_path, suffix, subset, index):
    read = read_descriptors(write(tmp_path / f"d{suffix}", vectors), catalog, subset)
    assert set(read.vectors) == {("emoji", subset), ("flags", subset), ("flags", index)}
    for (domain, split), found in read.vectors.items():
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, torch.from_numpy(unit(vectors[domain][split])).float())
    assert read.dim == DIM
    assert read.n_scaled == len(read) == sum(map(len, read.vectors.values()))


def deeper(vectors):
    """As UnED's own program writes them: one list around all vectors of a split."""
    return {domain: {name: [rows] for name, rows in splits.items()} for domain, splits in as_lists(vectors).items()}


@pytest.mark.parametrize("spaces", [{}, {"separators": (",", ":")}, {"indent": 2}])
def test_what_uned_s_own_program_writes_is_read(catalog, vectors, tmp_path, monkeypatch, spaces):
    plain = read_descriptors(write(tmp_path / "d.json", vectors), catalog)
    path = tmp_path / "descriptors_step_221180.pkl"
    path.write_text(json.dumps(deeper(vectors), **spaces))
    batches = {d: {s: [a[:2], a[2:]] for s, a in splits.items()} for d, splits in as_lists(vectors).items()}
    for content in (path.read_text(), json.dumps(batches, **spaces), "\ufeff \n" + path.read_text()):
        path.write_text(content, encoding="utf-8")
        for size in (2**22, 260):
            monkeypatch.setattr(descriptors, "CHUNK", size)
            found = read_descriptors(path, catalog)
            assert all(torch.equal(found.vectors[key], plain.vectors[key]) for key in plain.vectors)


def test_a_form_is_known_by_its_content_whatever_the_file_is_called(catalog, vectors, tmp_path):
    plain = read_descriptors(write(tmp_path / "d.json", vectors), catalog)
    write(tmp_path / "d.npz", vectors).rename(tmp_path / "d.json")
    found = read_descriptors(tmp_path / "d.json", catalog)
    assert all(torch.equal(found.vectors[key], plain.vectors[key]) for key in plain.vectors)
    columns = {d: {s: np.asfortranarray(a) for s, a in splits.items()} for d, splits in vectors.items()}
    found = read_descriptors(write(tmp_path / "columns.npz", columns), catalog)
    assert all(torch.equal(found.vectors[key], plain.vectors[key]) for key in plain.vectors)


def test_vectors_in_too_many_lists_are_refused_in_few_words(catalog, vectors, tmp_path):
    path = write(tmp_path / "d.json", {d: {s: [v] for s, v in splits.items()} for d, splits in deeper(vectors).items()})
    with pytest.raises(DataError, match=r"'emoji', split 'test', vector 0 \(from 0\): found a list of 6 values among"):
        read_descriptors(path, catalog)


def test_arrays_that_claim_more_than_they_hold_or_than_there_is_room_take_no_memory(catalog, tmp_path, monkeypatch):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (7, 2**40)})
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("emoji/test.npy", header.getvalue() + bytes(64))
    with pytest.raises(DataError, match=r"d\.npz: array 'emoji/test' cannot be read: cut short"):
        read_descriptors(tmp_path / "d.npz", catalog)
    for order in "CF":
        with zipfile.ZipFile(tmp_path / "d.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open("emoji/test.npy", "w") as member:
                np.lib.format.write_array(member, np.ones((7, 50_000), np.float32, order))
        monkeypatch.setattr(os, "sysconf", lambda name: 1000)
        with pytest.raises(DataError, match=r"d\.npz: .* vectors of 50,000 dimensions take \d+ GB, more than there is"):
            read_descriptors(tmp_path / "d.npz", catalog)


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    return load_catalog(str(write_uned_tree(tmp_path_factory.mktemp("emoji"), domains=("emoji",))))


@given(st.data(), st.sampled_from(["json", "deeper", "npz"]))
def test_a_damaged_file_ends_in_a_message_or_in_vectors(emoji, data, form):
    folder, catalog = emoji.root, emoji
    whole = {
        "emoji": {name: np.arange(1.0, 1 + 3 * len(s)).reshape(-1, 3) for name, s in catalog["emoji"].splits.items()}
    }
    path = write(folder / ("d.npz" if form == "npz" else "d.json"), deeper(whole) if form == "deeper" else whole)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.integers(0, 2)):
            case 0:
                content[at] = data.draw(st.integers(0, 255))
            case 1:
                content[at:at] = data.draw(st.sampled_from([b"[", b"]", b"{", b'"', b"1e999", b"null", b"\xff", b",,"]))
            case 2:
                del content[at : at + data.draw(st.integers(1, 20))]
    path.write_bytes(content)
    try:
        said = f"{path}: {len(read_descriptors(path, catalog))} vectors"
    except DataError as error:
        said = str(error)
    assert said.startswith(f"{path}: ")


@pytest.mark.parametrize("spaces", [{}, {"separators": (",", ":")}, {"indent": 2}])
def test_json_is_the_same_however_it_is_cut(catalog, vectors, tmp_path, monkeypatch, spaces):
    path = write(tmp_path / "d.json", vectors, **spaces)
    whole = read_descriptors(path, catalog)
    monkeypatch.setattr(descriptors, "BLOCK", 3)
    for size in (260, 261, 700):
        monkeypatch.setattr(descriptors, "CHUNK", size)
        cut = read_descriptors(path, catalog)
        assert all(torch.equal(cut.vectors[key], whole.vectors[key]) for key in whole.vectors)


def test_unit_vectors_keep_their_bits_and_others_their_direction(catalog, vectors, tmp_path):
    units = {d: {s: unit(a).astype(np.float32) for s, a in splits.items()} for d, splits in vectors.items()}
    units["emoji"]["test"][1] = np.float32(3) * units["emoji"]["test"][1]
    for suffix in (".json", ".npz"):
        read = read_descriptors(write(tmp_path / f"d{suffix}", units), catalog)
        assert read.n_scaled == 1
        found = read.vectors["emoji", "test"].numpy()
        assert np.array_equal(np.delete(found, 1, axis=0), np.delete(units["emoji"]["test"], 1, axis=0))
        np.testing.assert_allclose(found[1], units["emoji"]["test"][1] / 3, rtol=1e-6)


@pytest.mark.parametrize("factor", [1e-200, 1e-30, 1e200])
def test_norms_of_any_size_are_scaled(catalog, vectors, tmp_path, factor):
    large = {d: {s: a * factor for s, a in splits.items()} for d, splits in vectors.items()}
    read = read_descriptors(write(tmp_path / "d.json", large), catalog)
    torch.testing.assert_close(read.vectors["emoji", "test"], torch.from_numpy(unit(vectors["emoji"]["test"])).float())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8])
def test_arrays_may_be_of_any_kind_of_number(catalog, vectors, tmp_path, dtype):
    numbers = {d: {s: (20 * a).round().astype(dtype) for s, a in splits.items()} for d, splits in vectors.items()}
    read = read_descriptors(write(tmp_path / "d.npz", numbers), catalog)
    expected = unit((20 * vectors["flags"]["index"]).round())
    torch.testing.assert_close(read.vectors["flags", "index"], torch.from_numpy(expected).float())


def test_what_is_saved_is_read_again_bit_for_bit(catalog, tmp_path):
    generator = torch.Generator().manual_seed(0)
    parts = [
        (domain.name, name, torch.nn.functional.normalize(torch.randn(len(split), DIM, generator=generator), dim=1))
        for domain in catalog.domains
        for name, split in domain.splits.items()
    ]
    save_descriptors(tmp_path / "made" / "d.npz", iter(parts))
    read = read_descriptors(tmp_path / "made" / "d.npz", catalog)
    assert read.n_scaled == 0
    for domain, split, vectors in parts:
        if (domain, split) in read.vectors:
            assert torch.equal(read.vectors[domain, split], vectors)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["d.npz"]


def test_they_are_evaluated_like_images(catalog, vectors, tmp_path):
    """Vectors that are the class itself find nothing but hits; and the order of a split's vectors matters."""
    for domain in catalog.domains:
        for name, split in domain.splits.items():
            vectors[domain.name][name] = np.eye(64)[split.labels[:, 0] + 20 * (domain.name == "flags")]
    read = read_descriptors(write(tmp_path / "d.npz", vectors), catalog)
    found = evaluate(catalog, "test", read.load, image_embedders={"theirs": lambda v: v}, batch_size=4)
    assert (found.table["r_at_1"] == 100).all()
    vectors["emoji"]["test"] = np.roll(vectors["emoji"]["test"], 1, axis=0)
    read = read_descriptors(write(tmp_path / "d.npz", vectors), catalog)
    rolled = evaluate(catalog, "test", read.load, image_embedders={"theirs": lambda v: v}, batch_size=4)
    assert rolled.table.set_index(["domain", "index"])["r_at_1"]["emoji", "merged"] < 100


def test_progress_counts_the_vectors_that_are_needed(catalog, vectors, tmp_path):
    calls = []
    read = read_descriptors(write(tmp_path / "d.json", vectors), catalog, progress=lambda *call: calls.append(call))
    assert calls[-1] == (len(read), len(read))
    assert calls == sorted(calls)


def test_domains_that_were_not_chosen_are_left_out_when_asked(catalog, vectors, tmp_path):
    path = write(tmp_path / "d.json", vectors)
    flags = load_catalog(str(catalog.root), "flags")
    assert set(read_descriptors(path, flags, others="skip").vectors) == {("flags", "test"), ("flags", "index")}
    with pytest.raises(DataError, match=r"has no domain 'emoji'; valid: flags"):
        read_descriptors(path, flags)


def renamed(mapping, old, new):
    return {new if key == old else key: value for key, value in mapping.items()}


def without(mapping, *keys):
    return {key: value for key, value in mapping.items() if key not in keys}


@pytest.mark.parametrize("suffix", [".json", ".npz"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: renamed(v, "emoji", "emojis"), r"has no domain 'emojis'; did you mean 'emoji'\?"),
        (lambda v: without(v, "flags"), r"no descriptors of domain 'flags'; valid: emoji"),
        (
            lambda v: v | {"emoji": renamed(v["emoji"], "test", "tests")},
            r"'emoji' has no split 'tests'; did you mean 'test'",
        ),
        (
            lambda v: v | {"flags": without(v["flags"], "index", "small_index")},
            r"domain 'flags' has no split 'index'; found: train, val, test; needed: test, index",
        ),
        (
            lambda v: v | {"emoji": v["emoji"] | {"test": v["emoji"]["test"][1:], "train": v["emoji"]["train"][:3]}},
            r"one vector for each image\nemoji/train: found 3, expected 12\nemoji/test: found 6, expected 7",
        ),
        (
            lambda v: v | {"flags": v["flags"] | {"index": np.repeat(v["flags"]["index"], 2, axis=0)}},
            r"flags/index: found 38, expected 19",
        ),
        (lambda v: v | {"emoji": v["emoji"] | {"test": v["emoji"]["test"][:0]}}, r"emoji/test: found 0, expected 7"),
        (
            lambda v: v | {"flags": v["flags"] | {"test": v["flags"]["test"][:, :4]}},
            r"domain 'flags', split 'test'.*: found 4 dimensions, the vectors before have 6",
        ),
        (lambda v: with_value(v, 2, np.nan), r"domain 'flags', split 'index', vector 2 \(from 0\): is not finite$"),
        (lambda v: with_value(v, 3, np.inf), r"vector 3 \(from 0\): is not finite"),
        (lambda v: with_value(v, 1, 0.0), r"vector 1 \(from 0\): is zero: it has no direction$"),
        (lambda v: with_value(v, slice(4, 7), 0.0), r"vector 4 \(from 0\): is zero: .*, and 2 of the next 19 too"),
    ],
)
def test_a_mistake_is_named_with_its_place(catalog, vectors, tmp_path, suffix, change, message):
    path = write(tmp_path / f"d{suffix}", change(vectors))
    with pytest.raises(DataError, match=message) as caught:
        read_descriptors(path, catalog)
    assert str(caught.value).startswith(str(path))


def with_value(vectors, row, value):
    index = vectors["flags"]["index"].copy()
    index[row] = value
    return vectors | {"flags": vectors["flags"] | {"index": index}}


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        ([1, 2], r"vector 1 \(from 0\): found 2 dimensions, the vectors before have 6"),
        ([], r"vector 1 \(from 0\): found \[\], expected a list of numbers"),
        (7, r"vector 1 \(from 0\): found 7, expected a list of numbers"),
        ("abc", r"vector 1 \(from 0\): found 'abc', expected a list of numbers"),
        ({"a": 1}, r"vector 1 \(from 0\): found an object of 1 value, expected a list of numbers"),
        ([1, 2, "3", 4, 5, 6], r"vector 1 \(from 0\): found '3' among its numbers"),
        ([1, 2, True, 4, 5, 6], r"vector 1 \(from 0\): found True among its numbers"),
        ([1, 2, None, 4, 5, 6], r"vector 1 \(from 0\): found None among its numbers"),
        ([1, 2, [3], 4, 5, 6], r"vector 1 \(from 0\): found a list of 1 value among its numbers"),
        ([10**400, 2, 3, 4, 5, 6], r"a whole number that no float can hold"),
    ],
)
def test_a_vector_of_something_else_is_named(catalog, vectors, tmp_path, vector, message):
    lists = as_lists(vectors)
    lists["emoji"]["test"][1] = vector
    with pytest.raises(DataError, match=rf"domain 'emoji', split 'test', .*{message}"):
        read_descriptors(write(tmp_path / "d.json", lists), catalog)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"an empty file; valid: JSON as UnED's program writes it"),
        ("[1]", r"a JSON text; valid: JSON as UnED's program writes it"),
        ("{", r"broken JSON, at character 1"),
        ('{"emoji": [[1]]}', r"found '\[', expected '{', at character 10"),
        ('{"emoji": {"test": {}}}', r"found '{', expected '\['"),
        ('{"emoji": {"test": [[1, 2', r"broken JSON, at character 20 or after"),
        ('{"emoji": {"test": [[1, 2]', r"found 'the end', expected ',' or '\]'"),
        ('{"emoji": {"test": [[1, 2] [3, 4]]}}', r"found '\[', expected ',' or '\]'"),
        ('{"emoji": {"test": [[1, 2],]}}', r"broken JSON"),
        ('{"emoji": {"test": [], "test": []}}', r"'test' stands there twice"),
        ('{"emoji": {}, "emoji": {}}', r"'emoji' stands there twice"),
        ("{1: {}}", r"found 1, expected a name in quotes"),
        ('{"emoji" {}}', r"found '{', expected ':'"),
        ('{"emoji": {}} 7', r"more text after its end: '7'"),
    ],
)
def test_json_of_another_form_is_refused_with_the_place(catalog, tmp_path, text, message):
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"{re.escape(str(path))}: {message}"):
        read_descriptors(path, catalog)


def test_broken_json_is_found_before_all_of_a_long_file_is_read(catalog, tmp_path, monkeypatch):
    path = tmp_path / "d.json"
    path.write_text('{"emoji": {"test": [[1, 2}, ' + "[1, 2], " * 10_000)
    monkeypatch.setattr(descriptors, "CHUNK", 200)
    reads = []
    monkeypatch.setattr(
        descriptors._Json, "_more", lambda self, original=descriptors._Json._more: reads.append(1) or original(self)
    )
    with pytest.raises(DataError, match="broken JSON"):
        read_descriptors(path, catalog)
    assert len(reads) < 5


def test_files_of_another_kind_are_refused(catalog, vectors, tmp_path):
    good = write(tmp_path / "mine.npz", vectors)
    cases = {
        "min.npz": r"no descriptors at .*min.npz; did you mean 'mine.npz'\?",
        "d.pt": r"d\.pt: a text; valid: JSON as UnED's program writes it \(descriptors_step_N\.pkl\), or \.npz",
        "d.pkl": r"d\.pkl: a pickle, which is not opened: that would execute it; valid: JSON",
        "lfs.json": r"lfs\.json: a pointer of Git LFS",
        "page.npz": r"page\.npz: a web page",
        "zip.npz": r"zip\.npz: found an array 'a\.jpg', expected the form",
        "cut.npz": r"cut.npz: cannot be read",
        "latin.json": r"latin.json: cannot be read: 'utf-8' codec",
    }
    (tmp_path / "d.pt").write_bytes(b"x")
    (tmp_path / "d.pkl").write_bytes(pickle.dumps({"emoji": {}}))
    (tmp_path / "lfs.json").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "page.npz").write_text("<!DOCTYPE html>")
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:
        archive.writestr("a.jpg", b"x")
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "latin.json").write_bytes(b'{"\xe9": 1}')
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            read_descriptors(tmp_path / name, catalog)


@pytest.mark.parametrize(
    ("key", "array", "message"),
    [
        ("emoji", np.ones((7, 2)), r"found an array 'emoji', expected the form '<domain>/<split>'"),
        ("emoji/test", np.ones(7), r"array 'emoji/test': found float64 of shape \[7\], expected numbers \[n, dim\]"),
        ("emoji/test", np.float32(1), r"found float32 of shape \[\]"),
        ("emoji/test", np.ones((7, 0)), r"found float64 of shape \[7, 0\]"),
        ("emoji/test", np.ones((7, 2), complex), r"found complex128 of shape \[7, 2\]"),
        ("emoji/test", np.array([["a"]]), r"found <U1 of shape \[1, 1\]"),
        ("emoji/test", np.array([[{}]], dtype=object), r"array 'emoji/test': found object of shape"),
    ],
)
def test_arrays_of_another_form_are_refused(catalog, tmp_path, key, array, message):
    np.savez(tmp_path / "d.npz", **{key: array})
    with pytest.raises(DataError, match=message):
        read_descriptors(tmp_path / "d.npz", catalog)


def test_a_damaged_array_is_refused(catalog, vectors, tmp_path):
    path = write(tmp_path / "d.npz", vectors)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("emoji/test.npy").header_offset
    content[at + 200] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"d\.npz: cannot be read: Bad CRC-32"):
        read_descriptors(path, catalog)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (zipfile.ZIP_DEFLATED, r"d\.npz: cannot be read: Error -3 while decompressing"),
        (97, r"d\.npz: cannot be read: That compression method is not supported"),
    ],
)
def test_an_array_that_cannot_be_unpacked_is_refused(catalog, tmp_path, method, message):
    path = tmp_path / "d.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("emoji/test.npy", bytes(1000), zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    directory = content.rfind(b"PK\x01\x02")
    content[8:10] = content[directory + 10 : directory + 12] = method.to_bytes(2, "little")
    content[30 + len("emoji/test.npy")] = 0xFF  # no block of deflate begins so
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_descriptors(path, catalog)


def test_an_entry_that_is_no_array_is_refused(catalog, tmp_path):
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("emoji/test", b"hello")
    with pytest.raises(DataError, match=r"array 'emoji/test' cannot be read: EOF: reading magic"):
        read_descriptors(tmp_path / "d.npz", catalog)


def test_reading_json_takes_little_memory_beside_the_vectors(catalog, tmp_path, monkeypatch):
    """A file of 4 MB in pieces of 32 KB; whole, its numbers alone would take 7 MB as Python's floats."""
    n, dim = len(catalog["emoji"].splits["test"]), 256
    rng = np.random.default_rng(0)
    train = unit(rng.normal(size=(800, dim))).tolist()
    lists = {d.name: {"test": rng.normal(size=(n, dim)).tolist()} for d in catalog.domains}
    lists["flags"]["index"] = rng.normal(size=(len(catalog["flags"].splits["index"]), dim)).tolist()
    lists["emoji"]["train"] = train
    path = write(tmp_path / "d.json", lists)
    assert path.stat().st_size > 4_000_000
    monkeypatch.setattr(descriptors, "CHUNK", 2**15)
    monkeypatch.setattr(descriptors, "BLOCK", 32)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"emoji/train: found 800, expected 12"):
            read_descriptors(path, catalog)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_500_000
