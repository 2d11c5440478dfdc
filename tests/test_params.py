import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests import PROJECT
from udonlib import files
from udonlib.errors import ParameterError, UserError, nearest
from udonlib.fields import DataParams
from udonlib.params import RECIPES, WITHOUT_EFFECT, TrainParams

TEACHER = {"backbone": "small_resnet", "weights": "w.pth", "image_size": 32}


def complaint(**values: object) -> str:
    with pytest.raises(UserError) as caught:
        TrainParams(**values)
    return str(caught.value)


def test_defaults_are_the_papers_values():
    params = TrainParams()
    assert (params.student_dim, params.teacher_dim, params.batch_size, params.image_size) == (64, 256, 128, 224)
    assert (params.steps, params.frozen_steps, params.update_every) == (221_180, 44_236, 1000)
    assert params.frozen_steps == params.steps // 5  # two of ten epochs
    assert (params.learning_rate, params.backbone_learning_rate, params.weight_decay) == (1e-3, 1e-5, 1e-6)
    assert (params.classification, params.scale, params.sampler) == ("normface", 16.0, "dynamic")


def test_every_parameter_says_what_it_is():
    assert not [name for name, field in TrainParams.model_fields.items() if not field.description]


def test_parameters_cannot_be_changed_once_checked():
    params = TrainParams()
    with pytest.raises(ValidationError, match="frozen"):
        params.steps = 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"domainz": "all"}, "parameter 'domainz': no such parameter; did you mean 'domains'?"),
        ({"learning_rate": "abc"}, "parameter 'learning_rate': found 'abc' (str), expected a number > 0"),
        ({"learning_rate": 0}, "parameter 'learning_rate': found 0 (int), expected a number > 0"),
        ({"learning_rate": float("nan")}, "parameter 'learning_rate': found nan (float), expected a number > 0"),
        ({"scale": float("inf")}, "parameter 'scale': found inf (float), expected a number > 0"),
        ({"steps": 1.5}, "parameter 'steps': found 1.5 (float), expected a whole number >= 0"),
        ({"steps": None}, "parameter 'steps': found None, expected a whole number >= 0"),
        ({"seed": True}, "parameter 'seed': found True (bool), expected a whole number >= 0 and < 4294967296"),
        ({"pretrained": "maybe"}, "parameter 'pretrained': found 'maybe' (str), expected True or False"),
        (
            {"recipe": "udom"},
            "parameter 'recipe': found 'udom' (str), expected one of 'udon', 'udon_plus', 'us_rr', 'us_ds', 'uj_rr', "
            "'uj_ds', 'specialist', 'adapter', 'features', 'unic'; did you mean 'udon'?",
        ),
        ({"device": "gpu"}, "parameter 'device': found 'gpu' (str), expected text (auto, cpu, cuda or cuda:N)"),
        (
            {"max_grad_norm": -1},
            "parameter 'max_grad_norm': found -1 (int), expected a number > 0 and <= 1e+30 or None",
        ),
        ({"head_hidden_dims": [0]}, "parameter 'head_hidden_dims': found [0] (list), expected a list (each: a whole"),
        ({"backbone_args": 3}, "parameter 'backbone_args': found 3 (int), expected a mapping"),
        ({"domains": "emoji,"}, "parameter 'domains': found 'emoji,', expected 'all' or one or more different names"),
        ({"domains": ["kanji", "kanji"]}, "parameter 'domains': found ['kanji', 'kanji'], expected 'all' or"),
        (
            {"domains": 2.5},
            "parameter 'domains': found 2.5 (float), expected 'all' or a list (each: text); a name that reads as a "
            "number or as true stays text in quotes, or by papermill's -r domains",
        ),
        ({"domains": [True]}, "parameter 'domains': found [True] (list), expected 'all' or a list (each: text)"),
        ({"run": float("12e4567")}, "parameter 'run': found inf (float), expected text (folder name under outputs/run"),
        ({"run": "../x"}, "parameter 'run': found '../x' (str), expected text (folder name"),
    ],
)
def test_a_wrong_value_is_reported_with_what_was_found_and_what_is_valid(values, message):
    assert complaint(**values).startswith(message)
    assert "\n" not in complaint(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "parameter 'steps': found 0, expected at least 1 for recipe 'udon'"),
        ({"recipe": "specialist", "domains": "a,b"}, "parameter 'domains': found a, b, expected one domain for recipe"),
        (
            {"w_ce_teacher": 0, "sampler_loss": "student"},
            "parameter 'w_ce_teacher': found 0 beside w_kl = 1.0 and w_rel",
        ),
        ({"recipe": "us_rr", "w_ce_student": 0}, "parameter 'w_ce_student': found 0, and there are no teachers"),
        (
            {"recipe": "us_rr", "offline_teachers": "x"},
            "parameter 'offline_teachers': found 'x', but recipe 'us_rr' has",
        ),
        ({"weights": "x.npz"}, "parameter 'pretrained': found True beside weights from a file: expected False"),
        ({"nested_dims": [16, 64]}, "parameter 'nested_dims': found 64, expected less than student_dim = 64"),
        (
            {"recipe": "adapter", "backbone_learning_rate": 1.0},
            "parameter 'backbone_learning_rate': found 1.0, but reci",
        ),
        ({"margin": 0.2}, "parameter 'margin': found 0.2, but normface has none: expected 0, or cosface or arcface"),
        ({"domains_per_batch": 3}, "parameter 'domains_per_batch': found 3, expected a divisor of batch_size = 128"),
        ({"image_size": 300}, "parameter 'image_size': found 300, expected at most resize_size = 256 for crop_flip"),
        ({"w_ce_teacher": 0}, "parameter 'sampler_loss': found 'teacher', but w_ce_teacher = 0 trains none"),
        ({"sampler_signal": "progress"}, "parameter 'sampler_floor': found 0, expected more, such as 0.2"),
        (
            {"sampler_signal": "gap", "sampler_floor": 0.1, "sampler_loss": "student", "recipe": "unic"},
            "parameter 'sampler_signal': found 'gap', but nobody teaches",
        ),
        ({"sampler": "fixed"}, "parameter 'fixed_shares': found {}, expected a share for each domain"),
        ({"fixed_shares": {"a": 1}}, "parameter 'fixed_shares': found {'a': 1.0}, but sampler 'dynamic' uses no fixed"),
        ({"sampler": "fixed", "fixed_shares": {"a": 0}}, "parameter 'fixed_shares': found {'a': 0}, expected shares"),
        (
            {"sampler": "fixed", "domains": "emoji,kanji", "fixed_shares": {"emojy": 1, "kanji": 1}},
            "parameter 'fixed_shares': found domain 'emojy', which is not trained; did you mean 'emoji'?",
        ),
        (
            {"sampler": "fixed", "domains": "emoji,kanji", "fixed_shares": {"kanji": 1}},
            "parameter 'fixed_shares': found no share for domain 'emoji'",
        ),
        (
            {"start_image_size": 300, "growing_steps": 9},
            "parameter 'start_image_size': found 300, expected at most image_size = 224",
        ),
        ({"start_image_size": 96}, "parameter 'growing_steps': found 0 beside start_image_size = 96: expected both"),
        ({"growing_steps": 96}, "parameter 'growing_steps': found 96 beside start_image_size = None: expected both"),
        (
            {"recipe": "us_rr", "sampler": "balanced"},
            "parameter 'sampler': found 'balanced', but recipe 'us_rr' fixes it to 'round_robin'",
        ),
    ],
)
def test_values_that_cannot_go_together_are_refused(values, message):
    assert complaint(**values).startswith(message)


def test_several_problems_are_reported_together():
    lines = complaint(learning_rate="fast", stepz=3, seed=-1).splitlines()
    assert [line.split("'")[1] for line in lines] == ["seed", "learning_rate", "stepz"]
    assert len(complaint(domains_per_batch=3, margin=0.2).splitlines()) == 2
    with pytest.raises(ParameterError) as caught:
        TrainParams(seed=-1)
    assert set(caught.value.problems) == {"seed"}


@given(st.floats(1e-12, 1e12), st.integers(1, 10**5))
def test_numbers_written_as_text_are_numbers(rate, count):
    params = TrainParams(learning_rate=f"{rate!r}", batch_size=str(count * 2), eval_every=f"{count}e0")
    assert (params.learning_rate, params.batch_size, params.eval_every) == (rate, count * 2, count)


def test_a_whole_number_is_a_name_where_a_name_is_expected():
    # papermill's -p makes numbers of these
    params = TrainParams(run=20241101, domains=2020, data=7)
    assert (params.run, params.domains, Path(params.data).name) == ("20241101", ("2020",), "7")
    assert TrainParams(domains=[2020, "emoji"]).domains == ("2020", "emoji")
    assert TrainParams(augmentation_by_domain={2020: "none"}).augmentation_by_domain == {"2020": "none"}


def test_text_stays_text_where_text_is_expected():
    assert TrainParams(backbone="1e3", run="7").backbone == "1e3"


def test_a_path_has_one_form_and_is_found_from_every_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    expected = TrainParams(data="pets", images="here/images")
    assert (expected.data, expected.images) == (str(tmp_path / "pets"), str(tmp_path / "here/images"))
    for data in ("pets/", "./pets", "../" + tmp_path.name + "/pets", Path("pets"), tmp_path / "pets"):
        assert TrainParams(data=data, images=Path("here") / "images").run_name == expected.run_name
    monkeypatch.chdir("/")
    assert TrainParams(**expected.model_dump(mode="json")) == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TrainParams(data="~/pets").data == expected.data


@pytest.mark.parametrize("name", ["miniuned", "auto"])
def test_names_of_data_are_no_paths(name):
    assert DataParams(data=name).data == name


def test_fixed_shares_are_scaled_to_sum_to_one():
    params = TrainParams(sampler="fixed", fixed_shares={"emoji": 3, "kanji": 1})
    assert params.fixed_shares == {"emoji": 0.75, "kanji": 0.25}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_brings_its_values_along(recipe):
    params = TrainParams(recipe=recipe, teachers={"a": TEACHER} if recipe == "unic" else {})
    assert {name: getattr(params, name) for name in RECIPES[recipe]} == RECIPES[recipe]
    assert params.has_teachers == recipe.startswith("udon")


@given(
    seed=st.integers(0, 2**32 - 1),
    shares=st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
    dims=st.lists(st.integers(1, 4096), max_size=3),
    domains=st.one_of(st.just("all"), st.just(["flags", "earth"])),
)
def test_saved_parameters_read_back_equal(seed, shares, dims, domains):
    share = {f"d{i}": value for i, value in enumerate(shares)} if domains == "all" else {"flags": 1, "earth": 2}
    params = TrainParams(seed=seed, head_hidden_dims=dims, domains=domains, sampler="fixed", fixed_shares=share)
    again = TrainParams(**yaml.safe_load(yaml.safe_dump(params.model_dump(mode="json"))))
    assert again == params
    assert again.run_name == params.run_name


def test_the_run_name_tells_recipe_data_and_seed():
    assert TrainParams(recipe="us_rr", data="some/where/my photos.zip", seed=7).run_name.startswith(
        "us_rr-my_photos-s7-"
    )
    assert TrainParams(run="mine").run_name == "mine"


def test_the_run_name_is_the_same_on_every_machine_and_in_every_version():
    # A change of these names would orphan everybody's unfinished runs.
    assert TrainParams().run_name == "udon-miniuned-s0-44136f"
    assert TrainParams(steps=50_000, domains="emoji,kanji").run_name == "udon-miniuned-s0-e5ca7d"


def test_a_run_that_is_given_more_steps_keeps_its_name():
    assert TrainParams(extend=500).run_name == TrainParams().run_name


@pytest.mark.parametrize("name", sorted(set(TrainParams.model_fields) - WITHOUT_EFFECT - {"extend"}))
def test_what_influences_results_changes_the_run_name(name):
    others = {
        "data": "x",
        "images": "x",
        "domains": "x",
        "recipe": "us_ds",
        "on_bad_image": "skip",
        "decoder": "nvimgcodec",
        "precision": "bfloat16",
        "backbone": "x",
        "backbone_args": {"a": 1},
        "head_hidden_dims": [3],
        "seams": [3],
        "rate_schedule": "cosine",
        "absent_heads": "decay",
        "frozen_backbone": "zero_lr",
        "max_grad_norm": 1,
        "class_sample": 0.5,
        "sampler_order": "even",
        "classification": "arcface",
        "sampler": "balanced",
        "sampler_init": "balanced",
        "sampler_loss": "student",
        "sampler_alpha": 0.5,
        "sampler_floor": 0.5,
        "sampler_signal": "relative_loss",
        "augmentation": "affine",
        "augmentation_by_domain": {"a": "none"},
        "domains_per_batch": 4,
        "margin": 0.1,
        "label_smoothing": 0.1,
        "batch_size": 64,
        "image_size": 96,
        "beta2": 0.9,
        "pretrained": False,
        "normalise_features": False,
        "fixed_shares": {"a": 1},
        "average_decay": 0.9,
        "classifier": "joint",
        "nested_dims": [16],
        "offline_teachers": "x",
        "relational": "excess",
        "replay": "x",
        "start": "x",
        "sampler_smoothing": 0.5,
        "teacher_hidden_dims": [3],
        "weights": "x",
        "start_image_size": 64,
        "growing_steps": 7,
        "teachers": {"a": TEACHER},
        "teacher_features": "cached",
        "drop_probability": 0.2,
        "image_weights": "kept",
        "projector": "last",
        "projected_blocks": [0],
        "projected_end": "block",
        "standard": "batch",
        "standard_update": "after",
        "standard_momentum": 0.5,
        "standard_momentum_end": 0.5,
    }
    needs: dict[str, dict] = {"margin": {"classification": "cosface"}, "fixed_shares": {"sampler_init": "fixed"}}
    needs |= {"start_image_size": {"start_image_size": 32, "growing_steps": 5}}
    needs |= {"growing_steps": needs["start_image_size"], "weights": {"pretrained": False}}
    base = needs.get(name, {})
    default = TrainParams.model_fields[name].default
    value = others[name] if name in others else default + 1
    if name == "fixed_shares":
        before = TrainParams(**base, fixed_shares={"b": 1})
    else:
        before = TrainParams(**base)
    assert TrainParams(**{**base, name: value}).run_name != before.run_name


def test_what_does_not_influence_results_leaves_the_run_name_alone():
    plain = TrainParams()
    elsewhere = TrainParams(
        outputs="there", device="cpu", n_workers=2, n_threads=1, cache_images=False, log_every=1, overwrite=True
    )
    assert elsewhere.run_name == plain.run_name
    assert TrainParams(seed=3).run_name == plain.run_name.replace("-s0-", "-s3-")


def test_results_go_to_the_projects_outputs_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert TrainParams(run="a").run_dir == PROJECT / "outputs" / "runs" / "a"
    assert TrainParams(run="a", outputs="here").run_dir == tmp_path / "here" / "runs" / "a"


def test_the_nearest_name_is_found_whatever_its_case():
    assert nearest("Emojis", ["kanji", "emoji"]) == "did you mean 'emoji'?"
    assert nearest("xyz", ["kanji", "emoji"]) == "valid: emoji, kanji"
    assert nearest("xyz", []) == "valid: none"


def test_parameters_load_without_torch_or_numpy():
    code = "import sys, udonlib.presets; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'pandas')))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recipe": "unic"}, "parameter 'teachers': found none, expected one or more for recipe 'unic'"),
        ({"teachers": {"a b": TEACHER}}, "'a b' is no name of a teacher: expected letters, digits, _ and -"),
        ({"teachers": {"a": {"backbone": "x", "image_size": 32}}}, "'a': weights: found neither"),
        ({"teachers": {"a": TEACHER | {"outputs": ["x"]}}}, "'a': outputs: found x beside no ONNX file"),
        ({"teachers": {"a": 3}}, "parameter 'teachers': found {'a': 3} (dict), expected a mapping"),
        ({"teachers": "dino"}, "parameter 'teachers': found 'dino' (str), expected a mapping"),
        ({"teachers": {"a": TEACHER}, "recipe": "adapter"}, "recipe 'adapter' trains no backbone"),
        ({"w_cosine": 0, "w_smooth_l1": 0}, "parameter 'w_cosine': found 0 beside w_smooth_l1 = 0"),
        ({"projected_blocks": [1], "projector": "last"}, "found [1]: 'last' has no such blocks, expected None"),
        ({"drop_probability": 1.5}, "parameter 'drop_probability': found 1.5"),
    ],
)
def test_what_is_wrong_with_frozen_teachers_is_said(values, message):
    with pytest.raises(ParameterError, match=re.escape(message)):
        TrainParams(**values)


def test_teachers_come_from_text_and_go_through_a_file_and_back():
    params = TrainParams(recipe="unic", teachers="{a: {backbone: small_resnet, weights: w.pth, image_size: 32}}")
    assert params.teachers["a"].image_size == 32
    assert TrainParams(**params.model_dump(mode="json")) == params
    assert not params.has_head
    assert params.run_name.startswith("unic-miniuned-s0-")


def test_several_sources_of_data_are_one_parameter(tmp_path):
    place = os.path.abspath("mine/own")
    given = [TrainParams(data=data) for data in ("[miniuned, mine/own]", ["miniuned", Path("mine/own")])]
    assert {params.data for params in given} == {f"[miniuned, {place}]"}
    assert len({params.run_name for params in given}) == 1
    assert given[0].run_name.startswith("udon-miniuned_own-s0-")
    saved = files.read_yaml_text(yaml.safe_dump(given[0].model_dump(mode="json")))
    assert TrainParams(**saved) == given[0]
    with pytest.raises(ParameterError, match=r"parameter 'data': found '\[a, a\]', expected one place, or a list of"):
        TrainParams(data="[a, a]")
