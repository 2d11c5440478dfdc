"""Runs that begin with another run's weights: what they know, what they lose, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.helpers.catalogs import write_image_folder, write_tree, write_uned_tree
from tests.helpers.runs import assert_same_state, checkpoint, finish
from tests.helpers.training import SMALL
from udonlib.errors import UserError
from udonlib.lab.views import sheets
from udonlib.params import TrainParams
from udonlib.runs.begin.start import since_start
from udonlib.runs.run import Run, load_run, open_run


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Data of three domains in two places, and a run `old` that knows two of them."""
    folder = tmp_path_factory.mktemp("start")
    write_uned_tree(folder / "tree")
    write_image_folder(folder / "own", ("cats",), n_classes=6, n_images=4)
    finish(open_run(params(folder, data=str(folder / "tree"), run="old")))
    return folder


def params(home: Path, **changes: object) -> TrainParams:
    both = f"[{home / 'tree'}, {home / 'own'}]"
    settings = {"steps": 2, "eval_every": 2, "checkpoint_every": 1, "n_threads": 1, "data": both}
    return TrainParams(**SMALL | settings | {"outputs": str(home / "out")} | changes)


def new(home: Path, **changes: object) -> Run:
    return open_run(params(home, **{"start": "old", **changes}))


@pytest.mark.parametrize("classifier", ["separate", "joint"])
def test_what_both_know_comes_from_the_start_and_the_rest_is_new(home: Path, classifier: str) -> None:
    run, old = new(home, classifier=classifier), load_run("old", str(home / "out")).load_model().state_dict()
    begun, fresh = run.create_model().state_dict(), new(home, start=None).create_model().state_dict()
    assert run.catalog.names == ("emoji", "flags", "cats")
    for name, value in begun.items():
        assert torch.equal(value, fresh[name] if "cats" in name else old[name]), name
    assert {name.split(".")[0] for name in begun if "cats" in name} == {
        "student_prototypes", "teachers", "teacher_prototypes",
    }  # fmt: skip


def test_prototypes_follow_the_names_of_classes(home: Path, tmp_path: Path) -> None:
    """The tree as a table: classes in another order, one of them renamed, another one new."""
    rows = ["path,domain,class,split"]
    for domain in ("emoji", "flags"):
        for split in ("train", "val", "test"):
            for entry in json.loads((home / "tree" / "info_files" / domain / f"{split}.json").read_text()):
                name = "zebra" if (domain, entry["class"]) == ("emoji", "class 0") else entry["class"]
                rows.append(f"{entry['path']},{domain},{name},{split}")
    rows.append("emoji/extra.png,emoji,yak,train")
    table = write_tree(tmp_path, {"all.csv": "\n".join(rows).encode()}) / "all.csv"
    shutil.copytree(home / "tree" / "images", tmp_path / "images")
    shutil.copy(tmp_path / "images/emoji/0000_000.png", tmp_path / "images/emoji/extra.png")
    run = new(home, data=str(table), images=str(tmp_path / "images"))
    old, begun = load_run("old", str(home / "out")).load_model().state_dict(), run.create_model().state_dict()
    fresh = new(home, data=str(table), images=str(tmp_path / "images"), start=None).create_model().state_dict()
    names = [run.catalog["emoji"].splits["train"].class_names[i] for i in run.catalog["emoji"].train_classes]
    assert names == ["class 1", "class 2", "yak", "zebra"]
    for kind in ("student_prototypes.emoji", "teacher_prototypes.emoji"):
        assert torch.equal(begun[kind][[0, 1]], old[kind][[1, 2]])
        assert torch.equal(begun[kind][[2, 3]], fresh[kind][[2, 3]])
    notes = next(iter(run.train()))["notices"]
    assert "begins with run 'old': 5 of 7 classes known; no domain is new" in notes


def test_a_run_says_what_its_domains_gained_and_lost(home: Path) -> None:
    run = finish(new(home, run="nine"))
    note = run.provenance()[0]
    assert (note["start"]["run"], note["start"]["known"], note["start"]["new"]) == ("old", ["emoji", "flags"], ["cats"])
    assert len(note["origins"]["model of run 'old', its start,"]) == 64
    table = run.since_start()
    assert table["domain"].tolist() == ["emoji", "flags", "cats", "mean"]
    assert table["known"].tolist() == [True, True, False, True]
    shown = run.evaluation().set_index(["embedder", "index", "domain"])["r_at_1"]
    for row in table[:3].itertuples():
        assert row.before == pytest.approx(shown["start", "merged", row.domain])
        assert row.after == pytest.approx(shown["student", "merged", row.domain])
        assert row.low <= row.difference <= row.high
    assert table["after"][3] == pytest.approx(table["after"][:2].mean()), "the mean is of what was known before"
    text = sheets.start_table(run).text
    assert "Before: the student of run old" in text
    assert "new" in text
    assert sheets.start_table(load_run("old", str(home / "out"))) is None
    assert "begins with run old" in sheets.plan_table(run.params, run.catalog).text


def test_before_is_what_the_start_finds_in_this_index(home: Path) -> None:
    old = finish(open_run(params(home, data=str(home / "tree"), run="again", start="old", learning_rate=1e-9,
                                 backbone_learning_rate=0)))  # fmt: skip
    rows = old.evaluation().query("index == 'merged'").set_index(["embedder", "domain"])["r_at_1"]
    known = load_run("old", str(home / "out")).evaluation().query("index == 'merged' and embedder == 'student'")
    for row in known.itertuples():
        assert rows["start", row.domain] == pytest.approx(row.r_at_1)


def test_a_run_with_a_start_is_resumed_to_the_bit(home: Path) -> None:
    whole = finish(new(home, run="whole"))
    cut = new(home, run="cut")
    for record in cut.train():
        if record["kind"] == "checkpoint":
            break
    finish(new(home, run="cut"))
    assert_same_state(checkpoint(whole), checkpoint(cut))
    assert whole.since_start().equals(load_run("cut", str(home / "out")).since_start())


def test_domains_that_are_not_replayed_are_left_out_and_said(home: Path) -> None:
    run = new(home, domains=["flags", "cats"])
    assert not [name for name in run.create_model().state_dict() if "emoji" in name]
    [told] = [notice for notice in next(iter(run.train()))["notices"] if "begins with" in notice]
    assert told.endswith("new: cats; not replayed, and what they lose not measured: emoji")


def test_a_start_without_teachers_is_one_as_well(home: Path) -> None:
    finish(new(home, start=None, recipe="us_rr", run="plain", data=str(home / "tree")))
    fresh, begun = (new(home, start=start).create_model().state_dict() for start in (None, "plain"))
    assert all(torch.equal(begun[name], fresh[name]) for name in begun if name.startswith("teacher"))
    taught = new(home, recipe="us_rr").create_model().state_dict()
    assert not [name for name in taught if name.startswith("teacher")]


REFUSED = {
    "name": ({"start": "odl"}, r"parameter 'start': no run 'odl' in .*; did you mean 'old'\?"),
    "backbone": (
        {"backbone_args": {"width": 12}},
        r"parameter 'start': run 'old' is of another shape: backbone_args: {} there, {'width': 12} here",
    ),
    "student": ({"student_dim": 12}, r"run 'old' is of another shape: student_dim: 8 there, 12 here"),
    "teacher": ({"teacher_dim": 7}, r"run 'old' is of another shape: teacher_dim: \d+ there, 7 here"),
    "hidden": ({"teacher_hidden_dims": [9]}, r"of another shape: teacher_hidden_dims: \(\) there, \(9,\) here"),
    "itself": ({"run": "old", "overwrite": True}, r"parameter 'start': run 'old' cannot begin with itself"),
    "features": (
        {"recipe": "features", "steps": 0},
        r"parameter 'start': found 'old', but recipe 'features' has no student head to go on with",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_begun_with_is_refused(home: Path, name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        new(home, **changes).create_model()


def test_a_start_needs_a_model_and_a_head(home: Path) -> None:
    headless = {"recipe": "features", "steps": 0, "start": None, "run": "bare", "data": str(home / "tree")}
    finish(new(home, **headless))
    with pytest.raises(UserError, match=r"run 'bare' \(recipe 'features'\) has no student head to go on with"):
        new(home, start="bare").create_model()
    unfinished = new(home, start=None, run="young", eval_every=2)
    for record in unfinished.train():
        if record["kind"] == "train":
            break
    with pytest.raises(UserError, match=r"parameter 'start': run 'young' has no checkpoint yet: it is unfinished"):
        new(home, start="young").create_model()


def test_a_start_whose_model_or_data_changed_is_refused(home: Path, tmp_path: Path) -> None:
    there = tmp_path / "home"
    shutil.copytree(home, there)
    outputs = {"outputs": str(there / "out")}
    given = yaml_of(there / "out" / "runs" / "old")
    given.write_text(given.read_text().replace(str(home), str(there)))
    finish(new(there, run="kept"))
    best = there / "out" / "runs" / "old" / "checkpoints" / "best.pt"
    state = torch.load(best, weights_only=True)
    torch.save(state | {"step": 1}, best)
    with pytest.raises(UserError, match="the model of run 'old', its start, has changed since it began"):
        finish(new(there, run="kept", **outputs))
    (there / "tree" / "info_files" / "flags" / "test.json").unlink()
    with pytest.raises(UserError, match=r"run 'old' knows its classes by the data that it was trained on: .*test.json"):
        open_run(params(there, start="old", data=str(there / "own"))).create_model()


def yaml_of(run: Path) -> Path:
    return run / "params.yaml"


def test_differences_are_paired_by_query() -> None:
    rows = []
    for embedder, right in (("student", [1, 1, 0, 0]), ("start", [1, 0, 0, 0])):
        for domain in ("a", "b"):
            rows += [(embedder, domain, "merged", str(i), float(hit)) for i, hit in enumerate(right)]
    outcomes = pd.DataFrame(rows, columns=["embedder", "domain", "index", "path", "r_at_1"])
    table = since_start(outcomes, ["a"])
    assert table["difference"].tolist() == [25.0, 25.0, 25.0]
    assert table["domain"].tolist() == ["a", "b", "mean"]
    assert table["known"].tolist() == [True, False, True]
    assert (table["low"] == 0).all()
    assert (table["high"] <= 75).all()
    assert np.isclose(table["before"], 25).all()
    assert table["n_queries"].tolist() == [4, 4, 4]
