from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from udonlib.errors import UserError
from udonlib.notebookparams import GridParams, SamplerParams
from udonlib.params import TrainParams
from udonlib.written import read_as

Width = Annotated[int, Field(ge=1)]


@pytest.mark.parametrize("text", ["[512, 256]", "512,256", " 512, 256 ", "[512,256]"])
def test_a_list_is_text_in_brackets_or_with_commas(text):
    assert read_as(tuple[Width, ...], text) == [512, 256]
    assert TrainParams(head_hidden_dims=text, teacher_hidden_dims=text).teacher_hidden_dims == (512, 256)


@pytest.mark.parametrize("value", ["512", 512, "[512]", [512], ["512"], (512,)])
def test_a_list_of_one_is_that_one(value):
    assert TrainParams(head_hidden_dims=value).head_hidden_dims == (512,)


def test_no_layers_are_empty_brackets():
    assert TrainParams(head_hidden_dims="[]").head_hidden_dims == ()


def test_names_in_brackets_may_hold_commas():
    assert TrainParams(domains="['signs, old', emoji]").domains == ("signs, old", "emoji")
    assert TrainParams(domains="signs, emoji").domains == ("signs", "emoji")


@pytest.mark.parametrize("text", ["{width: 8, name: wide}", '{"width":8,"name":"wide"}', {"width": 8, "name": "wide"}])
def test_a_mapping_is_text_in_braces(text):
    assert TrainParams(backbone_args=text).backbone_args == {"width": 8, "name": "wide"}


def test_mappings_of_domains_read_their_numbers_and_names():
    params = TrainParams(sampler="fixed", fixed_shares="{emoji: 3, 2020: 1e0}", augmentation_by_domain="{2020: none}")
    assert params.fixed_shares == {"emoji": 0.75, "2020": 0.25}
    assert params.augmentation_by_domain == {"2020": "none"}
    assert SamplerParams(start_loss="{no: 2}").start_loss == {"no": 2.0}


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"head_hidden_dims": "[512"}, "found '[512' (str), expected a list (each: a whole number >= 1"),
        ({"head_hidden_dims": "512,"}, "found '512,' (str), expected a list"),
        ({"head_hidden_dims": True}, "found True (bool), expected a list"),
        ({"nested_dims": "a"}, "found 'a' (str), expected a list"),
        ({"backbone_args": "{width: 8"}, "found '{width: 8' (str), expected a mapping"),
        ({"backbone_args": "width=8"}, "found 'width=8' (str), expected a mapping, such as {name: value}"),
        ({"fixed_shares": "{emoji: many}"}, "found '{emoji: many}' (str), expected a mapping"),
        ({"steps": "1" * 5000}, "found '1111"),
    ],
)
def test_text_that_holds_no_such_thing_is_refused_as_it_was_written(values, found):
    with pytest.raises(UserError) as caught:
        TrainParams(**values)
    assert str(caught.value).startswith(f"parameter '{next(iter(values))}': {found}")
    assert "\n" not in str(caught.value)


def test_lists_of_other_notebooks_are_read_likewise():
    params = GridParams(rows="[no_kl, us_rr]", seeds="0, 1", steps="1e3")
    assert (params.rows, params.seeds, params.steps) == (("no_kl", "us_rr"), (0, 1), 1000)
    assert GridParams(seeds=3, rows=2020).seeds == (3,)
    assert SamplerParams(strategies="dynamic, balanced", runs=7).runs == ("7",)


@pytest.mark.parametrize(
    ("text", "number"), [("50_000", 50_000), ("1e-3", 0.001), (" -5 ", -5), (".5", 0.5), ("1e999", float("inf"))]
)
def test_numbers_may_be_written_in_pythons_forms(text, number):
    assert read_as(float, text) == read_as(int | None, text) == number


@pytest.mark.parametrize("text", ["", "e5", "0x10", "1__0", "_1", "1e", "nan", "inf", "12:30", "1" * 500])
def test_what_is_no_number_stays_text(text):
    assert read_as(float, text) == text


def test_names_are_not_taken_for_anything_else():
    for text in ("[x]", "{x}", "1e3", "007", "2020"):
        assert read_as(str | None, text) == text
    assert read_as(Literal["a", "b"], 3) == 3
    assert read_as(Any, "1e3") == "1e3"
    assert read_as(str, True) is True


@given(st.lists(st.integers(1, 65_536), max_size=4), st.dictionaries(st.text("abc", min_size=1), st.integers()))
def test_what_python_prints_is_read(dims, arguments):
    params = TrainParams(head_hidden_dims=str(dims), backbone_args=str(arguments))
    assert (params.head_hidden_dims, params.backbone_args) == (tuple(dims), arguments)
