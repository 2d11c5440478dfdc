"""A run's title says what tells it from the others."""

import pytest

from udonlib.lab.compare.many import titles
from udonlib.params import TrainParams

BASE = TrainParams().model_dump(mode="json")


def test_an_ablation_has_its_name_and_its_twin_none():
    runs = [("udon", BASE | {"seed": 0}), ("udon", BASE | {"w_kl": 0.0}), ("us_rr", BASE | {"w_kl": 0.0})]
    plain, without, other = titles.unusual(runs)
    assert (plain, without, other) == ({}, {"w_kl": 0.0}, {})  # of two as frequent, the default is the usual one
    assert titles.title("udon", plain, 0) == "udon, seed 0"
    assert titles.title("udon", without, 0) == "udon no_kl, seed 0"
    assert titles.title("udon", {"w_kl": 0.0, "w_rel": 0.0}, 1) == "udon no_distillation, seed 1"


def test_what_no_ablation_sets_is_named_and_of_much_the_first():
    changes = {"w_kl": 0.5, "steps": 2000, "batch_size": 32, "weights": "some/where/best.pt"}
    assert titles.title("udon", changes, 3) == "udon, w_kl 0.5, steps 2000, 2 more, seed 3"
    assert titles.title("udon", {"steps": 12}, None, "flags") == "udon, steps 12, flags"
    assert titles.title("", {}) == "unknown"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"letters": {"file": "x"}, "dinov2": 1}, "letters, dinov2"),
        ({}, "none"),
        ([], "none"),
        ([512, 256], "512, 256"),
        (2000.0, "2000"),
        (1e-5, "1e-05"),
        (None, "null"),
        (True, "true"),
        ("a/b/c.pt", "c.pt"),
        ("x" * 50, "x" * 37 + "..."),
    ],
)
def test_values_are_written_in_few_signs(value, text):
    assert titles.in_short(value) == text


def test_what_has_no_effect_or_stands_elsewhere_is_not_unusual():
    runs = [("udon", BASE), ("udon", BASE), ("udon", BASE | {"n_threads": 7, "seed": 9, "domains": ["flags"]})]
    assert titles.unusual(runs) == [{}, {}, {}]
