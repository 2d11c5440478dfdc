"""Runs are found by name, path and age; who finds none is told what there is."""

from pathlib import Path

import pytest

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.gaps import plain, write_run
from udonlib.errors import ParameterError, UserError
from udonlib.files import take_lock
from udonlib.runs.find import ANSWERED, KEPT, RUN, find_run, that_tested, trained_now


@pytest.fixture
def outputs(tmp_path) -> Path:
    write_uned_tree(tmp_path / "data")
    return tmp_path / "results"


def test_latest_is_the_run_with_teachers_that_finished_last(outputs):
    write_run(outputs, "older", age=50)
    write_run(outputs, "newer", age=20)
    plain(outputs)
    (write_run(outputs, "unfinished") / "summary.json").unlink()
    assert find_run("latest", that_tested("teacher"), str(outputs)).path.name == "newer"
    assert find_run("older", that_tested("teacher"), str(outputs)).path.name == "older"
    assert find_run(str(outputs / "runs" / "older"), that_tested("student")).path.name == "older"


def test_a_run_without_teachers_is_refused_with_the_runs_that_have_some(outputs):
    write_run(outputs, "taught")
    plain(outputs)
    with pytest.raises(
        UserError, match=r"'plain' \(recipe 'us_rr'\) has no teacher; finished runs with teachers: taught$"
    ):
        find_run("plain", that_tested("teacher"), str(outputs))


def test_a_run_is_latest_in_its_own_way_for_each_question_and_messages_name_the_parameter(outputs):
    write_run(outputs, "finished", age=50)
    written = write_run(outputs, "written", age=90)
    (written / "metrics.jsonl").touch()
    assert find_run("latest", RUN, str(outputs)).path.name == "written"
    assert find_run("latest", ANSWERED, str(outputs)).path.name == "finished"
    with pytest.raises(
        ParameterError, match=r"^parameter 'run_b': run 'written' has no checkpoint yet: .*; runs with a"
    ):
        find_run("written", KEPT, str(outputs), "run_b")
    with pytest.raises(
        ParameterError, match=r"^parameter 'run': found 'latest', but there is no run with a checkpoint"
    ):
        find_run("latest", KEPT, str(outputs))
    (written / "neighbours.npz").unlink()
    with pytest.raises(ParameterError, match=r"run 'written' has no neighbours.npz; finished runs: finished$"):
        find_run("written", that_tested("student"), str(outputs))


def test_an_unfinished_run_is_found_by_its_name_where_it_has_kept_a_model(outputs):
    half = write_run(outputs, "half")
    (half / "summary.json").unlink()
    (half / "checkpoints").mkdir(exist_ok=True)
    (half / "checkpoints" / "best.pt").touch()
    for embedder in ("student", "teacher"):
        assert find_run("half", that_tested(embedder), str(outputs)).path.name == "half"
    with pytest.raises(UserError, match="found 'latest', but there is no finished run with teachers"):
        find_run("latest", that_tested("teacher"), str(outputs))
    plain(outputs)
    (outputs / "runs" / "plain" / "summary.json").unlink()
    (outputs / "runs" / "plain" / "checkpoints").mkdir(exist_ok=True)
    (outputs / "runs" / "plain" / "checkpoints" / "best.pt").touch()
    assert find_run("plain", that_tested("student"), str(outputs)).path.name == "plain"
    with pytest.raises(UserError, match=r"'plain' \(recipe 'us_rr'\) has no teacher"):
        find_run("plain", that_tested("teacher"), str(outputs))


def test_an_unfinished_run_and_a_misspelt_one_are_refused(outputs):
    (write_run(outputs, "half") / "summary.json").unlink()
    missing = "'half' has no checkpoint yet: it is unfinished, .*; finished runs with teachers: none yet"
    with pytest.raises(UserError, match=missing):
        find_run("half", that_tested("teacher"), str(outputs))
    with pytest.raises(UserError, match="no run 'hafl'.*did you mean 'half'"):
        find_run("hafl", that_tested("teacher"), str(outputs))


def test_a_run_of_another_version_is_not_the_latest(outputs):
    write_run(outputs, "ours", age=50)
    params = write_run(outputs, "foreign") / "params.yaml"
    params.write_text(params.read_text() + "colour: blue\n")
    assert find_run("latest", that_tested("teacher"), str(outputs)).path.name == "ours"


def test_without_any_run_the_message_says_what_to_do(outputs):
    with pytest.raises(
        UserError,
        match=r"'run': found 'latest', but there is no finished run with teachers in .*; train one: make train",
    ):
        find_run("latest", that_tested("teacher"), str(outputs))


def test_runs_that_a_process_trains_or_is_about_to_are_named(outputs):
    trained, begins = write_run(outputs, "trained"), outputs / "runs" / "begins"
    (write_run(outputs, "over") / "lock").touch()
    assert trained_now(str(outputs)) == "Trained now: none."
    with take_lock(trained / "lock"), take_lock(begins / "worker.lock"):
        assert trained_now(str(outputs)) == "Trained now: begins, trained."
