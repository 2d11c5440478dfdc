"""Which run, which specialists: found among the files of finished runs, or refused in one message."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.gaps import DOMAINS, write_run
from udonlib import gapruns
from udonlib.errors import UserError
from udonlib.evaluation import Evaluation
from udonlib.notebookparams import GapParams
from udonlib.params import TrainParams


@pytest.fixture
def outputs(tmp_path) -> Path:
    write_uned_tree(tmp_path / "data")
    return tmp_path / "results"


def write_specialists(outputs: Path, seed: int = 0, domains: Sequence[str] = DOMAINS, age: int = 0) -> None:
    for domain in domains:
        name = f"specialist-{domain}-s{seed}-{age}"
        write_run(outputs, name, [domain], ["student"], age, recipe="specialist", seed=seed)


def plain(outputs: Path, name: str = "plain", **values: object) -> Path:
    return write_run(outputs, name, embedders=["student"], recipe="us_rr", sampler_loss="student", **values)


# The run


def test_latest_is_the_run_with_teachers_that_finished_last(outputs):
    write_run(outputs, "older", age=50)
    write_run(outputs, "newer", age=20)
    plain(outputs)
    (write_run(outputs, "unfinished") / "summary.json").unlink()
    assert gapruns.find_run("latest", "teacher", str(outputs)).path.name == "newer"
    assert gapruns.find_run("older", "teacher", str(outputs)).path.name == "older"
    assert gapruns.find_run(str(outputs / "runs" / "older")).path.name == "older"


def test_a_run_without_teachers_is_refused_with_the_runs_that_have_some(outputs):
    write_run(outputs, "taught")
    plain(outputs)
    with pytest.raises(
        UserError, match=r"'plain' \(recipe 'us_rr'\) has no teacher; finished runs with teachers: taught$"
    ):
        gapruns.find_run("plain", "teacher", str(outputs))


def test_an_unfinished_run_and_a_misspelt_one_are_refused(outputs):
    (write_run(outputs, "half") / "summary.json").unlink()
    with pytest.raises(UserError, match="'half' is unfinished; finished runs with teachers: none yet"):
        gapruns.find_run("half", "teacher", str(outputs))
    with pytest.raises(UserError, match="no run 'hafl'.*did you mean 'half'"):
        gapruns.find_run("hafl", "teacher", str(outputs))


def test_a_run_of_another_version_is_not_the_latest(outputs):
    write_run(outputs, "ours", age=50)
    params = write_run(outputs, "foreign") / "params.yaml"
    params.write_text(params.read_text() + "colour: blue\n")
    assert gapruns.find_run("latest", "teacher", str(outputs)).path.name == "ours"


def test_without_any_run_the_message_says_what_to_do(outputs):
    with pytest.raises(UserError, match=r"no finished run with teachers in .*; train one: make train"):
        gapruns.find_run("latest", "teacher", str(outputs))


def test_domains_may_be_called_by_digits(tmp_path):
    write_uned_tree(tmp_path / "data", domains=("1", "2"))
    outputs = tmp_path / "results"
    write_run(outputs, "taught", ("1", "2"))
    found = gapruns.open_gaps(GapParams(run="taught", outputs=str(outputs), k=3, specialists="none"))
    assert list(found.outcomes["domain"].unique()) == ["1", "2"]


# Specialists


def test_specialists_are_found_by_recipe_pattern_or_not_at_all(outputs):
    run = gapruns.find_run(str(write_run(outputs, "taught")))
    assert gapruns.find_specialists(run, "auto", str(outputs)) == {}
    write_specialists(outputs)
    write_run(outputs, "other-emoji", ["emoji"], ["student"], recipe="us_rr", sampler_loss="student")
    found = gapruns.find_specialists(run, "auto", str(outputs))
    assert {domain: folder.path.name for domain, folder in found.items()} == {
        "emoji": "specialist-emoji-s0-0",
        "flags": "specialist-flags-s0-0",
    }
    assert gapruns.find_specialists(run, "none", str(outputs)) == {}
    assert gapruns.find_specialists(run, "specialist-*", str(outputs)).keys() == found.keys()


def test_of_several_specialists_the_runs_seed_goes_first_then_the_last_one(outputs):
    run = gapruns.find_run(str(write_run(outputs, "taught", seed=1)))
    write_specialists(outputs, seed=0, age=0)
    write_specialists(outputs, seed=1, age=30)
    write_specialists(outputs, seed=1, age=60)
    found = gapruns.find_specialists(run, "auto", str(outputs))
    assert [folder.path.name for folder in found.values()] == ["specialist-emoji-s1-30", "specialist-flags-s1-30"]


def test_a_preset_names_specialists_of_the_runs_data_and_seed(outputs, tmp_path):
    run = gapruns.find_run(str(write_run(outputs, "taught")))
    preset = tmp_path / "alone.yaml"
    preset.write_text("preset: paper\nrecipe: specialist\n")
    for domain in DOMAINS:
        name = TrainParams(recipe="specialist", data=run.params.data, domains=[domain]).run_name
        write_run(outputs, name, [domain], ["student"], recipe="specialist")
    found = gapruns.find_specialists(run, str(preset), str(outputs))
    assert [folder.params.domains for folder in found.values()] == [("emoji",), ("flags",)]


def test_some_specialists_are_not_enough(outputs):
    run = gapruns.find_run(str(write_run(outputs, "taught")))
    write_specialists(outputs, domains=["emoji"])
    assert gapruns.find_specialists(run, "auto", str(outputs)) == {}
    with pytest.raises(UserError, match=r"'specialists': 'spec\*' has no finished run of flags alone"):
        gapruns.find_specialists(run, "spec*", str(outputs))


def test_neither_a_run_nor_a_preset(outputs):
    run = gapruns.find_run(str(write_run(outputs, "taught")))
    with pytest.raises(UserError, match="'specialists': found 'taugt', but no finished run .*did you mean 'taught'"):
        gapruns.find_specialists(run, "taugt", str(outputs))


def test_specialists_search_once_and_again_when_one_of_them_changes(outputs, monkeypatch):
    run = gapruns.find_run(str(write_run(outputs, "taught")))
    write_specialists(outputs)
    calls = []

    def search(specialists):
        calls.append([specialist.path.name for specialist in specialists])
        outcomes = pd.concat(pd.read_csv(s.path / "outcomes.csv.gz") for s in specialists)
        both = pd.concat([outcomes.assign(embedder=name) for name in ("specialist", "routed")])
        return Evaluation(pd.DataFrame(), both, {}, pd.DataFrame())

    monkeypatch.setattr(gapruns, "evaluate_assembly", search)
    params = GapParams(run="taught", outputs=str(outputs), k=3)
    before = {file: file.stat().st_mtime_ns for file in run.path.rglob("*")}
    first, again = gapruns.open_gaps(params), gapruns.open_gaps(params)
    assert calls == [["specialist-emoji-s0-0", "specialist-flags-s0-0"]]
    assert set(first.outcomes["embedder"]) == {"student", "teacher", "specialist"}
    pd.testing.assert_frame_equal(first.outcomes, again.outcomes)
    table = outputs / "runs" / "specialist-emoji-s0-0" / "evaluation.csv"
    table.write_text(table.read_text().replace("1.0", "0.9"))
    gapruns.open_gaps(params)
    assert len(calls) == 2
    assert len(list((outputs / "gaps").iterdir())) == 2
    assert {file: file.stat().st_mtime_ns for file in run.path.rglob("*")} == before  # who looks writes nothing there


# Both together


def test_domains_choose_among_the_runs_and_the_mean_over_all_goes(outputs):
    folder = write_run(outputs, "taught")
    record = {
        "kind": "validation",
        "step": 3,
        "table": [{"domain": d, "embedder": "student"} for d in (*DOMAINS, "mean")],
    }
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    values = {"run": "taught", "outputs": str(outputs), "k": 3}
    whole = gapruns.open_gaps(GapParams(**values))
    assert whole.domains == DOMAINS
    assert whole.validation["domain"].tolist() == [*DOMAINS, "mean"]
    part = gapruns.open_gaps(GapParams(**values, domains="flags"))
    assert part.domains == ("flags",)
    assert set(part.outcomes["domain"]) == {part.query_domain for part in part.neighbours} == {"flags"}
    assert part.validation["domain"].tolist() == ["flags"]
    assert part.catalog.names == DOMAINS  # the index stays that of all
    with pytest.raises(UserError, match="'domains': run 'taught' has no 'flaggs'; did you mean 'flags'"):
        gapruns.open_gaps(GapParams(**values, domains="flaggs"))


def test_more_neighbours_than_were_kept_are_refused(outputs):
    write_run(outputs, "taught")
    with pytest.raises(UserError, match="parameter 'k': found 5, but run 'taught' kept 3; valid: 1 to 3"):
        gapruns.open_gaps(GapParams(run="taught", outputs=str(outputs)))


def test_data_that_has_moved_is_read_where_it_is_now(outputs):
    write_run(outputs, "taught")
    moved = outputs.parent / "elsewhere"
    (outputs.parent / "data").rename(moved)
    found = gapruns.open_gaps(GapParams(run="taught", outputs=str(outputs), k=3, data=str(moved)))
    assert found.catalog.root == moved


@pytest.mark.parametrize("by", ["data", "images"])
def test_a_run_whose_images_were_elsewhere_is_read_where_they_are_now(outputs, by):
    data = outputs.parent / "data"
    write_run(outputs, "taught", images=str(data / "images"))
    moved = outputs.parent / "elsewhere"
    if by == "data":
        data.rename(moved)
        values = {"data": str(moved)}
    else:
        (data / "images").rename(moved)
        values = {"images": str(moved)}
    found = gapruns.open_gaps(GapParams(run="taught", outputs=str(outputs), k=3, **values))
    domain = found.catalog.domains[0]
    assert found.catalog.store.read(domain.queries("test").paths[0])
