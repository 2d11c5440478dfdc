"""A slice of `make fuzz`, and that it finds what it looks for."""

import numpy as np
import pytest

from tests.fuzz import cases
from tests.fuzz.cases import content_of, run, search
from tests.fuzz.damage import damaged
from tests.fuzz.kinds import Kind, kinds
from udonlib.errors import UserError

NAMES = list(kinds(None))


@pytest.mark.parametrize("kind", NAMES)
def test_damaged_input_gives_a_value_or_one_clear_message(kind, tmp_path):
    (tmp_path / "made").mkdir()
    made = kinds(tmp_path / "made")[kind]()
    for name, content in made.examples.items():
        assert run(made, kind, -1, name, content, tmp_path) is None
    for number in range(40):
        assert run(made, kind, number, *content_of(made, kind, number, 0), tmp_path) is None


@pytest.mark.parametrize("kind", NAMES)
def test_whole_examples_are_read(kind, tmp_path):
    made = kinds(tmp_path)[kind]()
    for name, content in made.examples.items():
        (tmp_path / name[:5]).mkdir(exist_ok=True)
        if name != "other.safetensors":  # whole, and of another encoder
            made.read(name, content, tmp_path / name[:5])


def test_a_case_is_its_number():
    made = Kind({"a": b"some text of a file\n" * 5, "b": b"other\n"}, lambda *_: None)
    assert content_of(made, "x", 7, 0) == content_of(made, "x", 7, 0)
    contents = {content_of(made, "x", number, 0) for number in range(60)}
    assert len(contents) > 50
    assert content_of(made, "x", 7, 0) != content_of(made, "x", 7, 1)
    with_archive = damaged(b"PK" + bytes(50), [b"x"], np.random.default_rng(1))
    assert isinstance(with_archive, bytes)


@pytest.mark.parametrize(
    ("does", "says"),
    [
        (lambda folder: 1 / 0, "ZeroDivisionError at test_fuzz.py"),
        (lambda folder: (folder.parent / "evil").write_text("x"), "written outside the folder: ['evil']"),
        (lambda folder: exec("raise UserError(' ')", {"UserError": UserError}), "UserError without a message"),
        (lambda folder: exec("while True: pass"), "_TooSlowError"),
    ],
)
def test_what_goes_wrong_is_found(does, says, tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "SECONDS", 0.1)
    made = Kind({"a": b"x"}, lambda name, content, folder: does(folder))
    assert says in run(made, "x", 0, "a", b"x", tmp_path).what
    assert not (tmp_path / "case").exists()


def test_a_search_runs_in_a_process_of_its_own():
    began = []
    assert search("info_files", 3, first=5, progress=began.append) == []
    assert began == [5, 6, 7]
