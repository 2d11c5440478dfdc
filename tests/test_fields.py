"""Values as people write them, in cells, files and at papermill: read, bounded, or refused in one line."""

from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from udonlib import presets
from udonlib.errors import UserError
from udonlib.fields import DataParams, read_as
from udonlib.files import long_name, run_path
from udonlib.params import TrainParams
from udonlib.presets import CheckParams, EmbeddingsParams, EvaluateParams, GapParams, GridParams, SamplerParams
from udonlib.runs.grid import folder_of

MODELS = (TrainParams, CheckParams, EvaluateParams, GapParams, GridParams, SamplerParams, EmbeddingsParams)

# Shares and the like end by what they are, or are compared with another parameter.
NUMBERS = ("integer", "number")


def complaint(model: type[DataParams], **values: object) -> str:
    with pytest.raises(UserError) as caught:
        model(**values)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def numbers(schema: dict) -> list[dict]:
    """The numbers that a JSON schema holds, wherever in it."""
    inner = [*schema.get("anyOf", ())]
    inner += [schema[key] for key in ("items", "additionalProperties") if isinstance(schema.get(key), dict)]
    return [schema] * (schema.get("type") in NUMBERS) + [number for each in inner for number in numbers(each)]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_number_has_both_bounds(model):
    for name, schema in model.model_json_schema()["properties"].items():
        for number in numbers(schema):
            assert {"minimum", "exclusiveMinimum"} & set(number), name
            assert {"maximum", "exclusiveMaximum"} & set(number), name


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("batch_size", 8_000_000_000, "a whole number >= 2 and <= 1000000"),
        ("n_threads", 10**9, "a whole number >= 0 and <= 1024"),
        ("n_workers", 10**5, "a whole number >= 0 and <= 1024"),
        ("steps", 10**12, "a whole number >= 0 and <= 100000000"),
        ("steps", 10**400, "a whole number >= 0 and <= 100000000"),
        ("steps", "1e999", "a whole number >= 0 and <= 100000000"),
        ("student_dim", 10**10, "a whole number >= 1 and <= 65536"),
        ("head_hidden_dims", [10**10], "a list (each: a whole number >= 1 and <= 65536)"),
        ("image_size", 10**6, "a whole number >= 8 and <= 8192"),
        ("learning_rate", 1e300, "a number > 0 and <= 1e+30"),
        ("k", 10**9, "a whole number >= 1 and <= 10000"),
        ("device", "cuda:99999999999999999999", "text (auto, cpu, cuda or cuda:N)"),
    ],
)
def test_what_nobody_means_is_refused_with_the_bound(name, value, bound):
    assert f"expected {bound}" in complaint(TrainParams, **{name: value})


def test_uned_at_full_scale_is_within_the_bounds():
    TrainParams(steps=2_000_000, batch_size=4096, student_dim=1024, teacher_dim=4096, image_size=518, resize_size=576)


@pytest.mark.parametrize(
    "name", ["con", "NUL.1", "com1", "Lpt9.log", "a.", "..", "-x", "a b", "\u00e9", "a/b", "", "a" * 201]
)
def test_names_that_are_no_folder_on_some_system_are_refused(name):
    for model, field in ((TrainParams, "run"), (GridParams, "grid")):
        assert complaint(model, **{field: name}).startswith(f"parameter '{field}': found ")
    assert "at most 200 characters" in complaint(TrainParams, run="a" * 300)


@pytest.mark.parametrize("name", ["console", "nul1", "a.b-c+d_e", "2024", "a" * 200])
def test_other_names_are_taken(name):
    assert TrainParams(run=name).run == EvaluateParams(run="x", name=name).name == name


def test_a_part_of_a_path_that_no_system_takes_is_refused_with_its_length():
    assert complaint(TrainParams, data="a" * 300 + "/b") == (
        "parameter 'data': found a name of 300 bytes, expected at most 255"
    )
    assert "parameter 'outputs'" in complaint(GapParams, outputs="x/" + "\u00e9" * 128)
    assert "parameter 'run'" in complaint(GapParams, run="a" * 256)
    assert long_name("a" * 255 + "/" + "b" * 255) is None
    with pytest.raises(UserError, match="no run 'aaa.*found a name of 300 bytes"):
        run_path("a" * 300)
    with pytest.raises(UserError, match="parameter 'preset': found a name of 300 bytes"):
        presets.load("a" * 300)


def test_an_automatic_name_is_short_enough_for_a_folder():
    assert len(TrainParams(data="a" * 250 + ".zip").run_name) < 150
    assert len(folder_of(GridParams(base="b" * 250 + ".yaml")).name) < 200


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


@pytest.mark.parametrize("value", ["emoji, kanji", "emoji,kanji", ["emoji", "kanji"], ("emoji", "kanji")])
def test_domains_may_be_a_list_or_text_with_commas(value):
    assert DataParams(domains=value).domains == ("emoji", "kanji")


def test_all_domains_are_all_in_a_list_too():
    assert DataParams(domains=["all"]).domains == DataParams(domains="all").domains == "all"


def test_data_parameters_alone_know_nothing_of_training():
    assert DataParams(data="x", domains="a").domains == ("a",)
    with pytest.raises(UserError, match="no such parameter"):
        DataParams(steps=3)
