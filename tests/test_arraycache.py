"""What was computed once is read again; whatever is wrong with the file costs the time once more, and nothing else."""

import numpy as np
import pytest

from udonlib.arraycache import file_of, fingerprint, kept

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
