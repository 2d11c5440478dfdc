import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from udonlib import plainyaml
from udonlib.errors import UserError

SCALARS = st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])) | st.from_regex(
    r"[-+]?[0-9_]{1,4}[.:eE]?[0-9_]{0,3}", fullmatch=True
)


def complaint(text: str) -> str:
    with pytest.raises(UserError) as caught:
        plainyaml.read_text(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{width: 8, name: wide}", {"width": 8, "name": "wide"}),
        ('{"width":8}', {"width": 8}),
        ("[512, 256]", [512, 256]),
        ("[a, 'b, c', [1.5, -2, 1.0e-05]]", ["a", "b, c", [1.5, -2, 1e-5]]),
        ("a:\nb: ~\nc: true\n", {"a": None, "b": None, "c": True}),
        ("", None),
    ],
)
def test_what_json_can_say_is_read(text, value):
    assert plainyaml.read_text(text) == value


@pytest.mark.parametrize(
    "text", ["no", "on", "Yes", "007", "0x1F", "12:30", "2024-11-01", "1_000", "1e-3", ".inf", "+5", "="]
)
def test_what_is_not_plainly_something_else_is_text(text):
    assert plainyaml.read_text(text) == text


def test_keys_are_text_whatever_they_look_like():
    assert plainyaml.read_text("{2020: 1, no: 2, 007: 3, 1.50: 4}") == {"2020": 1, "no": 2, "007": 3, "1.50": 4}


@given(
    st.recursive(
        SCALARS | TEXTS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=8,
    )
)
def test_what_is_written_reads_back_the_same(value):
    assert plainyaml.read_text(yaml.safe_dump(value)) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: 1\nb: !!timestamp 2020-01-01",
            "line 2: found the tag !!timestamp, expected a plain value, a list or a map",
        ),
        ("!!set {a, b}", "line 1: found the tag !!set"),
        ("a: !!python/object:os.x 1", "line 1: found the tag !!python/object:os.x"),
        ("a: ! b", "line 1: found the tag !,"),
        ("a: &x [1]\nb: *x", "line 2: found the alias *x, expected the value itself"),
        ("[" * 1500 + "]" * 1500, "line 1: found lists and mappings more than 20 deep"),
        ("{a: " * 1500, "line 1: found lists and mappings more than 20 deep"),
        ("a: 1\nb: {c: 1,\n c: 2}", "line 3: 'c' is set twice, first in line 2"),
        ("? [1]\n: 2", "line 1: found a list or a mapping as a name"),
        ("[1", "line 1: not valid YAML: "),
        ("a: 1\n---\nb: 1", "line 2: not valid YAML: "),
        ("\x07", "not valid YAML: "),
    ],
)
def test_what_is_more_than_that_is_refused_in_one_line(text, message):
    assert complaint(text).startswith(message)


def test_aliases_that_unfold_take_neither_memory_nor_time():
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    assert complaint(bomb) == "line 2: found the alias *a0, expected the value itself"


def test_sizes_are_bounded(monkeypatch, tmp_path):
    monkeypatch.setattr(plainyaml, "MAX_VALUES", 50)
    monkeypatch.setattr(plainyaml, "MAX_BYTES", 400)
    assert len(plainyaml.read_text("[" + "a," * 49 + "]")) == 49
    assert complaint("[" + "a," * 50 + "]") == "line 1: found more than 50 values"
    assert complaint("a" * 401) == "not valid YAML: found more than 400 characters"
    file = tmp_path / "long.yaml"
    file.write_text("# " + "a" * 400)
    with pytest.raises(UserError, match=r"long\.yaml: not valid YAML: found more than 400 characters"):
        plainyaml.read_file(file)


def test_a_file_holds_names_and_values(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("seed: 1\nrun: 007\n")
    assert plainyaml.read_file(file) == {"seed": 1, "run": "007"}
    file.write_text("# nothing\n")
    assert plainyaml.read_file(file, empty=True) == {}
    for content, message in (
        (b"# nothing\n", ": expected lines"),
        (b"\n- a\n", ", line 2: expected lines"),
        (b"a: \xff", ", line 1: not UTF-8"),
        (b"a: *x", ", line 1: found the alias"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError) as caught:
            plainyaml.read_file(file)
        assert str(caught.value).startswith(f"{file}{message}")
    with pytest.raises(UserError, match="cannot be read"):
        plainyaml.read_file(tmp_path)
