"""What torch.save wrote, by whomever: read without executing anything, or refused in words of ours."""

from __future__ import annotations

import argparse
import os
import pickle
import resource
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers.weightfiles import spoil
from udonlib.errors import UserError
from udonlib.models.files.torch_files import StandIn, named_tensors, read_torch

STATE = OrderedDict(a=torch.arange(40.0).reshape(5, 8), b=torch.ones(3, dtype=torch.bfloat16), n=torch.tensor(7))


class Settings:
    """A class of a training script, which nobody else has."""

    def __init__(self) -> None:
        self.rate = 0.1


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def ends(path) -> str:
    """What reading a file comes to: weights, or the message."""
    try:
        read_torch(path)
        return "weights"
    except UserError as error:
        return str(error)


@pytest.fixture(params=[True, False], ids=["archive", "older form"])
def saved(request, tmp_path):
    """Save a value in each of the two forms of torch.save."""

    def saved(value):
        torch.save(value, tmp_path / "w.pth", _use_new_zipfile_serialization=request.param)
        return tmp_path / "w.pth"

    return saved


def test_tensors_come_back_as_they_were(saved):
    found = read_torch(saved({"state_dict": STATE, "epoch": 3, "parameter": nn.Parameter(torch.ones(2))}))
    torch.testing.assert_close(dict(found["state_dict"]), dict(STATE), rtol=0, atol=0)
    assert found["epoch"] == 3
    assert set(dict(named_tensors(found))) == {"state_dict.a", "state_dict.b", "state_dict.n", "parameter"}


def test_what_a_training_script_keeps_beside_them_becomes_a_stand_in(saved):
    beside = {"args": argparse.Namespace(lr=0.1), "best": np.float64(0.5), "settings": Settings()}
    found = read_torch(saved({"model": STATE} | beside))
    assert torch.equal(found["model"]["a"], STATE["a"])
    assert {name: found[name].name for name in ("args", "settings")} == {
        "args": "argparse.Namespace",
        "settings": f"{__name__}.Settings",
    }
    assert all(isinstance(found[name], StandIn) and not vars(found[name]) for name in beside)


def test_nothing_in_a_file_is_executed(saved, tmp_path):
    mark = tmp_path / "executed"
    for evil in (Evil(os.mkdir, str(mark)), Evil(eval, f"__import__('os').mkdir({str(mark)!r})")):
        path = saved({"model": STATE, "evil": evil})
        assert ends(path) == "weights" or "of which nothing was executed" in ends(path)
        assert not mark.exists()
        torch.load(path, weights_only=False)
        assert mark.exists(), "the file is harmless: this test shows nothing"
        mark.rmdir()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2)), r"holds other things than weights \(.*torch\.nn\.modules\..*\.state_dict\(\)"),
        (Settings(), r"holds an object of the class '[\w.]+\.test_torch_files\.Settings', expected weights"),
        ({"a": torch.eye(3).to_sparse()}, r"key 'a' is a tensor of another kind \(torch\.sparse_coo, cpu\)"),
        ({"a": [torch.empty(2, device="meta")]}, r"key 'a\.0' is a tensor of another kind \(torch\.strided, meta\)"),
        ({"a": torch.zeros(1).expand(10**7, 10**7)}, r"key 'a' claims the shape \[10000000, 10000000\]"),
    ],
)  # fmt: skip
def test_what_is_no_weights_is_said_without_advice_to_execute_it(saved, value, message):
    with pytest.raises(UserError, match=rf"w\.pth: {message}") as caught:
        read_torch(saved(value))
    assert "weights_only" not in str(caught.value)
    assert "safe_globals" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (bytes(2000), "nothing but zero bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS: .*'git lfs pull'"),
        (b"<!DOCTYPE html>\n<html>404", "a web page"),
        (b'{"error": "not found"}', "a JSON text"),
        (b"Access denied", "a text"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file"),
        (b"\x08\x07\x12\x07pytorch\x1a\x03", "an ONNX graph"),
        (b"\x1f\x8b\x08" + bytes(9), "a packed file: unpack it first"),
        (pickle.dumps({"a": 1}, 4), "cut short, damaged or something else"),
        (b"\x00\x01\x02" * 50, "cut short, damaged or something else"),
    ],
)
def test_a_file_of_another_kind_is_called_by_its_name(tmp_path, content, message):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=rf"w\.pth: cannot be read as a file of torch\.save: {message}"):
        read_torch(tmp_path / "w.pth")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.pth: no such file"):
        read_torch(tmp_path / "none.pth")
    with pytest.raises(UserError, match="a folder, expected a file of torch.save"):
        read_torch(tmp_path)


def test_every_cut_is_noticed(saved):
    path = saved(STATE)
    content = path.read_bytes()
    for length in range(0, len(content), 1 + len(content) // 50):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"w\.pth: cannot be read as a file of torch\.save"):
            read_torch(path)


def test_a_bit_that_flipped_in_the_numbers_of_an_archive_is_noticed(tmp_path):
    torch.save(STATE, tmp_path / "w.pth")
    content = bytearray((tmp_path / "w.pth").read_bytes())
    content[content.index(STATE["a"].numpy().tobytes()) + 7] ^= 0x55
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"w\.pth: damaged: the checksum of its entry 'w/data/0' differs"):
        read_torch(tmp_path / "w.pth")


def test_a_program_of_torchscript_is_refused_with_what_mends_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:  # as torch.jit.save writes
        for name in ("w/data.pkl", "w/code/__torch__.py", "w/constants.pkl", "w/version"):
            archive.writestr(name, b"x")
    with pytest.raises(UserError, match=r"holds a program of TorchScript, .*torch\.jit\.load\(file\)\.state_dict\(\)"):
        read_torch(tmp_path / "w.pt")


def test_an_archive_that_unfolds_is_refused_before_it_is_unpacked(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.save(STATE, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        for entry in plain.infolist():
            if entry.filename != "plain/data/0":
                archive.writestr(entry, plain.read(entry))
        with archive.open(zipfile.ZipInfo("plain/data/0"), "w", force_zip64=True) as member:
            member.write(plain.read("plain/data/0"))
    content = bytearray((tmp_path / "w.pth").read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 24 : at + 28] = (2**31).to_bytes(4, "little")  # the size that its directory claims
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"w\.pth: its entries are larger than the file"):
        read_torch(tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", bytes(10**7))
    with pytest.raises(UserError, match=r"w\.pth: its entries are compressed"):
        read_torch(tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("photos/1.jpg", b"x")
    with pytest.raises(UserError, match=r"w\.pth: a zip archive, expected .*; found in it: photos/1\.jpg"):
        read_torch(tmp_path / "w.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data(), st.booleans())
def test_a_damaged_file_ends_in_a_message_or_in_weights(tmp_path_factory, data, archive):
    path = tmp_path_factory.mktemp("damaged") / "w.pth"
    torch.save({"model": STATE, "epoch": 1}, path, _use_new_zipfile_serialization=archive)
    spoil(path, data)
    if ends(path) != "weights":
        assert ends(path).startswith(str(path))
        return
    assert all(value.numel() < 1000 for _, value in named_tensors(read_torch(path)))
