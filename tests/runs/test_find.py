"""Runs are found by name, path and age; who finds none is told what there is."""

from pathlib import Path

import pytest

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.gaps import plain, write_run
from udonlib.errors import UserError
from udonlib.runs import find


@pytest.fixture
def outputs(tmp_path) -> Path:
    write_uned_tree(tmp_path / "data")
    return tmp_path / "results"


def test_latest_is_the_run_with_teachers_that_finished_last(outputs):
    write_run(outputs, "older", age=50)
    write_run(outputs, "newer", age=20)
    plain(outputs)
    (write_run(outputs, "unfinished") / "summary.json").unlink()
    assert find.find_tested("latest", "teacher", str(outputs)).path.name == "newer"
    assert find.find_tested("older", "teacher", str(outputs)).path.name == "older"
    assert find.find_tested(str(outputs / "runs" / "older")).path.name == "older"


def test_a_run_without_teachers_is_refused_with_the_runs_that_have_some(outputs):
    write_run(outputs, "taught")
    plain(outputs)
    with pytest.raises(
        UserError, match=r"'plain' \(recipe 'us_rr'\) has no teacher; finished runs with teachers: taught$"
    ):
        find.find_tested("plain", "teacher", str(outputs))


def test_an_unfinished_run_and_a_misspelt_one_are_refused(outputs):
    (write_run(outputs, "half") / "summary.json").unlink()
    with pytest.raises(UserError, match="'half' is unfinished; finished runs with teachers: none yet"):
        find.find_tested("half", "teacher", str(outputs))
    with pytest.raises(UserError, match="no run 'hafl'.*did you mean 'half'"):
        find.find_tested("hafl", "teacher", str(outputs))


def test_a_run_of_another_version_is_not_the_latest(outputs):
    write_run(outputs, "ours", age=50)
    params = write_run(outputs, "foreign") / "params.yaml"
    params.write_text(params.read_text() + "colour: blue\n")
    assert find.find_tested("latest", "teacher", str(outputs)).path.name == "ours"


def test_without_any_run_the_message_says_what_to_do(outputs):
    with pytest.raises(UserError, match=r"no finished run with teachers in .*; train one: make train"):
        find.find_tested("latest", "teacher", str(outputs))
