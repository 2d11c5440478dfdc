from __future__ import annotations

import collections
import io
import os
import pickle
import resource
import struct
import zipfile

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.helpers.weightfiles import entry, spoil
from udonlib.errors import UserError
from udonlib.models.files.weight_files import (
    kind_of_weights,
    read_flax,
    read_npz,
    read_pickled_arrays,
    read_safetensors,
)

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "plain": RANDOM.normal(size=(3, 4)).astype(np.float32),
    "half": RANDOM.normal(size=5).astype(np.float16),
    "double": RANDOM.normal(size=(2, 2)),
    "columns": np.asfortranarray(RANDOM.normal(size=(3, 2)).astype(np.float32)),
    "swapped": RANDOM.normal(size=4).astype(">f4"),
    "one": np.array(2.5, np.float32),
    "count": np.array([7, 8]),
    "flags": np.array([True, False]),
}


def same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].shape == np.shape(value)


def npy(payload: bytes) -> bytes:
    """A pickle as numpy.save stores one: behind the header of an array of one object."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
    return file.getvalue() + payload


def pickled(value: object, protocol: int) -> bytes:
    whole = np.empty((), dtype=object)
    whole[()] = value
    return npy(pickle.dumps(whole, protocol=protocol))


# npz


def test_an_npz_gives_its_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", **ARRAYS)
    same(read_npz(tmp_path / "a.npz"), ARRAYS)


def test_an_npz_of_objects_is_refused_by_key(tmp_path):
    np.savez(tmp_path / "a.npz", good=np.zeros(2), bad=np.array([{}, []], dtype=object))
    with pytest.raises(UserError, match=r"a\.npz: key 'bad' is an array of objects"):
        read_npz(tmp_path / "a.npz")


def test_an_npz_that_would_fill_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", zeros=np.zeros(10_000))
    same(read_npz(tmp_path / "a.npz"), {"zeros": np.zeros(10_000)})
    monkeypatch.setattr("udonlib.models.files.weight_files.SMALL", 10_000)
    with pytest.raises(UserError, match=r"a\.npz: its 0\.0 MB would unfold to 0 MB"):
        read_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("shape", [(2**40,), (2**31, 2**31), (3, 5), (-1, 4)])
def test_an_array_that_claims_more_than_it_holds_takes_no_memory(tmp_path, shape):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("big.npy", header.getvalue() + bytes(48))
    with pytest.raises(
        UserError, match=r"a\.npz: (key 'big' is damaged: 48 bytes for float32|holds an array of shape)"
    ):
        read_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("read", [read_npz, read_pickled_arrays, read_flax, read_safetensors])
def test_missing_files_folders_and_files_of_another_kind_are_named(tmp_path, read):
    with pytest.raises(UserError, match="nowhere: no such file"):
        read(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: a folder, expected"):
        read(tmp_path / "folder")
    for content in (b"", b"something else entirely", bytes(1000)):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(UserError, match="other: "):
            read(tmp_path / "other")


# Pickles


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_pickled_arrays_of_every_protocol_are_read(tmp_path, protocol):
    path = tmp_path / "a.npy"
    path.write_bytes(pickled(ARRAYS, protocol))
    same(read_pickled_arrays(path), ARRAYS)


def test_a_dictionary_is_read_as_numpy_saves_it_with_numbers_of_all_kinds(tmp_path):
    whole = collections.OrderedDict(ARRAYS | {"scalar": np.float32(1.5), "number": 3, "fraction": 0.5})
    np.save(tmp_path / "a.npy", whole, allow_pickle=True)  # type: ignore[arg-type]
    same(read_pickled_arrays(tmp_path / "a.npy"), whole)


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("place", ["whole", "beside an array", "as a key's array"])
def test_a_malicious_pickle_is_refused_and_nothing_in_it_is_executed(tmp_path, protocol, place):
    mark = tmp_path / "executed"
    evil = Evil(os.mkdir, str(mark))
    value = {"whole": evil, "beside an array": {"a": np.zeros(2), "b": [evil]}, "as a key's array": {"a": evil}}[place]
    payload = pickle.dumps(value, protocol=protocol)
    (tmp_path / "a.npy").write_bytes(npy(payload))
    with pytest.raises(UserError, match=r"a\.npy: its pickle asks for '(posix|nt)\.mkdir'.* nothing .*executed"):
        read_pickled_arrays(tmp_path / "a.npy")
    assert not mark.exists()
    pickle.loads(payload)
    assert mark.exists(), "the pickle is harmless: this test shows nothing"


@pytest.mark.parametrize(
    ("module", "name"),
    [("builtins", "eval"), ("builtins", "getattr"), ("numpy", "load"), ("numpy._core.multiarray", "fromfile")],
)
def test_names_beside_the_admitted_ones_are_refused(tmp_path, module, name):
    (tmp_path / "a.npy").write_bytes(npy(f"c{module}\n{name}\n(tR.".encode()))
    with pytest.raises(UserError, match=f"asks for '{module}.{name}'"):
        read_pickled_arrays(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": np.array([{}, []], dtype=object)}, "array of objects"),
        ({"a": np.zeros(2, dtype=[("x", "f4")])}, "array of type 'V4'|array of records"),
        ({"a": np.array(["text"])}, "array of type 'U4'"),
        ({"a": "text"}, "key 'a' is str, expected an array"),
        ({"a": [1.0, 2.0]}, "key 'a' is list"),
        ({1: np.zeros(2)}, "something else than a dictionary of arrays by name"),
        ([np.zeros(2)], "something else than a dictionary"),
    ],
)
def test_what_is_no_array_of_numbers_by_name_is_refused(tmp_path, value, message):
    (tmp_path / "a.npy").write_bytes(pickled(value, 4))
    with pytest.raises(UserError, match=message):
        read_pickled_arrays(tmp_path / "a.npy")


def test_a_plain_array_is_not_taken_for_a_dictionary(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 3)))
    with pytest.raises(UserError, match=r"holds an array \[2, 3\] of float64, expected a dictionary"):
        read_pickled_arrays(tmp_path / "a.npy")


@pytest.mark.parametrize(
    "payload",
    [
        b"\x80\x04" + b"r" + struct.pack("<I", 2**31 - 1) + b".",  # a memo of two billion places
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",  # bytes longer than the file
        b"\x80\x04\x82\x01.",  # a registered extension
        b"\x80\x04P1\n.",  # a persistent reference
        b"\x80\x04cnumpy\ndtype\n}N\x86b.",  # a state for a class instead of an object
        b"\x80\x04c_codecs\nencode\n}}\x86b.",
        b"(" * 100_000 + b"l" * 99_999 + b".",
    ],
)
def test_pickles_made_to_harm_end_in_one_message(tmp_path, payload):
    (tmp_path / "a.npy").write_bytes(npy(payload))
    with pytest.raises(UserError, match=r"a\.npy: "):
        read_pickled_arrays(tmp_path / "a.npy")


def test_bytes_that_a_file_does_not_hold_take_no_memory(tmp_path):
    payload = b"\x80\x05\x96" + struct.pack("<Q", 2**31) + b"abc."  # claims a bytearray of 2 GiB
    (tmp_path / "a.npy").write_bytes(npy(payload))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"a\.npy: "):
        read_pickled_arrays(tmp_path / "a.npy")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB


@given(st.data())
def test_a_damaged_pickle_ends_in_a_message_or_in_arrays(tmp_path_factory, data):
    content = bytearray(pickled({"a": ARRAYS["plain"], "b": ARRAYS["one"]}, 4))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "a.npy"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        found = read_pickled_arrays(path)
    except UserError:
        return
    assert all(isinstance(value, np.ndarray) and value.dtype.kind in "fiub" for value in found.values())


# Flax


def flax(tmp_path, params: object, **others: object):
    path = tmp_path / "checkpoint_1"
    path.write_bytes(msgpack.packb({"opt_state": {"0": {"mu": entry(np.zeros(9))}}, "params": params, **others}))
    return path


def test_a_flax_branch_is_flattened_and_the_others_skipped(tmp_path):
    plain = {name: value for name, value in ARRAYS.items() if name != "swapped"}
    nested = {
        "a": {name: entry(value) for name, value in plain.items()},
        "empty": {},
        "n": entry(ARRAYS["one"], code=3),
    }
    found = read_flax(flax(tmp_path, nested, metadata={"text": "x", "list": [1, 2.5, None]}))
    same(found, {f"a/{name}": value for name, value in plain.items()} | {"n": ARRAYS["one"]})


def test_a_chunked_array_is_joined(tmp_path):
    array = RANDOM.normal(size=(7, 5)).astype(np.float32)
    pieces = [array.reshape(-1)[i : i + 13] for i in range(0, array.size, 13)]
    chunked = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 7, "1": 5},
        "chunks": {str(i): entry(piece) for i, piece in enumerate(pieces)},
    }
    same(read_flax(flax(tmp_path, {"w": chunked})), {"w": array})
    for damage in ({"shape": {"0": 7, "1": 6}}, {"shape": {"0": -1, "1": 5}}, {"chunks": {"1": entry(array)}}):
        with pytest.raises(UserError, match="key 'w': an array in pieces that do not fit together"):
            read_flax(flax(tmp_path, {"w": chunked | damage}))


def test_bfloat16_becomes_float32_of_the_same_value(tmp_path):
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    raw = values.view(torch.int16).numpy()
    found = read_flax(flax(tmp_path, {"w": entry(raw, "bfloat16")}))["w"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, values.float().numpy())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (msgpack.ExtType(1, msgpack.packb(((3,), "float32", bytes(8)))), r"shape \[3\] and type float32 in 8 bytes"),
        (msgpack.ExtType(1, msgpack.packb(((2**40, 2**40), "float32", b""))), "in 0 bytes"),
        (msgpack.ExtType(1, msgpack.packb(((-1, -8), "int8", bytes(8)))), r"shape \[-1, -8\]"),
        (msgpack.ExtType(1, msgpack.packb(((1,), "object", bytes(8)))), "array of type 'object'"),
        (msgpack.ExtType(1, b"\xc1"), "cannot be read as a flax checkpoint"),
        (msgpack.ExtType(2, b""), "msgpack extension 2"),
        ("text", "key 'w' is str, expected an array"),
        (b"\x00" * 8, "key 'w' is bytes"),
    ],
)
def test_entries_that_are_no_arrays_are_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_flax(flax(tmp_path, {"w": content}))


@pytest.mark.parametrize("depth", [40, 5000])
def test_maps_nested_without_end_are_refused(tmp_path, depth):
    path = tmp_path / "checkpoint_1"
    path.write_bytes(b"\x81\xa6params" + b"\x81\xa1a" * depth + b"\x80")
    with pytest.raises(UserError, match="nested deeper than 32|StackError"):
        read_flax(path)


def test_a_file_that_claims_more_than_it_holds_is_cut_short(tmp_path):
    path = tmp_path / "checkpoint_1"
    for claim in (
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa6params\xdd\xff\xff\xff\xff",
        b"\x81\xa6params\xc9\x7f\xff\xff\xff\x01",
    ):
        path.write_bytes(claim)
        with pytest.raises(UserError, match="checkpoint_1: cannot be read as a flax checkpoint"):
            read_flax(path)


def test_every_cut_and_what_follows_the_end_are_noticed(tmp_path):
    path = flax(tmp_path, {"w": entry(ARRAYS["plain"])}, last=1)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="checkpoint_1: "):
            read_flax(path)
    path.write_bytes(content + b"\x00")
    with pytest.raises(UserError, match="more follows after its end"):
        read_flax(path)


def test_a_branch_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    path = tmp_path / "checkpoint_1"
    path.write_bytes(msgpack.packb({"target": {}, "step": 1}))
    with pytest.raises(UserError, match=r"checkpoint_1: has no 'params'; found: step, target"):
        read_flax(path)


# Safetensors


def test_safetensors_come_with_their_metadata(tmp_path):
    save_file({"a": torch.arange(3.0)}, tmp_path / "a.safetensors", {"mean": "[0.5]", "note": "plain text"})
    tensors, metadata = read_safetensors(tmp_path / "a.safetensors")
    torch.testing.assert_close(tensors, {"a": torch.arange(3.0)})
    assert metadata == {"mean": [0.5], "note": "plain text"}
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(content[:-2])
    with pytest.raises(UserError, match=r"a\.safetensors: cannot be read as a safetensors file"):
        read_safetensors(tmp_path / "a.safetensors")


def safetensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(16)


@pytest.mark.parametrize(
    "content",
    [
        safetensors(b"{}", 2**62),
        safetensors(b"{}", 99_999_999),
        safetensors(b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'),
        safetensors(b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,16]}}'),
        safetensors(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
        safetensors(b'{"__metadata__":{"mean":"' + b"[" * 100_000 + b'"}}'),
        safetensors(b'{"a":' * 100_000),
    ],
)  # fmt: skip
def test_headers_of_safetensors_that_claim_what_is_not_there_end_in_one_message(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"a\.safetensors: cannot be read as a safetensors file"):
        read_safetensors(tmp_path / "a.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


# Of which kind a file is


def test_the_kind_is_seen_in_the_content_whatever_the_name(tmp_path):
    path = tmp_path / "weights.bin"
    state = {"a": torch.ones(2)}
    writers = {
        "safetensors": lambda: save_file(state, path),
        "torch": lambda: torch.save(state, path),
        "npz": lambda: np.savez(tmp_path / "a.npz", a=np.ones(2)),
        "npy": lambda: np.save(tmp_path / "a.npy", state, allow_pickle=True),
    }
    for kind, write in writers.items():
        write()
        for written in tmp_path.glob("a.*"):
            written.replace(path)
        assert kind_of_weights(path) == kind
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert kind_of_weights(path) == "torch"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file, expected weights"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b" <html>", "a web page"),
        (b'{"weight_map": {}}', "a JSON text"),
        (
            b"\x01\x02\x03\x04",
            r"of no known kind, expected weights \(safetensors, PyTorch's \.pth, \.pt or \.bin, AugReg's",
        ),
        (b"PK\x03\x04 and no more", "cannot be read as weights .*: cut short, damaged"),
    ],
)
def test_what_is_no_weights_is_called_by_its_name(tmp_path, content, message):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=rf"w\.pth: {message}"):
        kind_of_weights(tmp_path / "w.pth")


@settings(max_examples=200)
@given(st.data(), st.sampled_from(["npz", "flax", "safetensors"]))
def test_a_damaged_file_ends_in_a_message_or_in_arrays(tmp_path_factory, data, kind):
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / "checkpoint_1"
    if kind == "npz":
        np.savez_compressed(folder / "a.npz", **ARRAYS)
        (folder / "a.npz").replace(path)
    elif kind == "flax":
        flax(folder, {"w": entry(ARRAYS["plain"]), "inner": {"v": entry(ARRAYS["half"])}})
    else:
        save_file({"a": torch.ones(3, 4), "b": torch.zeros(2)}, path, {"mean": "[0.5, 0.5, 0.5]"})
    spoil(path, data)
    try:
        found = {"npz": read_npz, "flax": read_flax, "safetensors": read_safetensors}[kind](path)
    except UserError as error:
        said = str(error)
    else:
        said = f"{path}: {len(found)} arrays"
    assert said.startswith(f"{path}: ")
