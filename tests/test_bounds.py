import pytest

from udonlib import presets
from udonlib.bounds import long_name
from udonlib.errors import UserError
from udonlib.home import run_path
from udonlib.notebookparams import CheckParams, EmbeddingsParams, EvaluateParams, GapParams, GridParams, SamplerParams
from udonlib.params import DataParams, TrainParams

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
    assert len(GridParams(base="b" * 250 + ".yaml").folder.name) < 200
