"""Specialists of one domain each, evaluated together; and the recipes that are their rivals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.gaps import DOMAINS, write_run, write_specialists
from udonlib.errors import UserError
from udonlib.models.backbones import create_backbone
from udonlib.models.files.importers import save_backbone_weights
from udonlib.params import TrainParams
from udonlib.runs.run import load_run, open_run
from udonlib.runs.specialists import evaluate_assembly, find_specialists


@pytest.fixture
def outputs(tmp_path) -> Path:
    write_uned_tree(tmp_path / "data")
    return tmp_path / "results"


COMMON = {
    "backbone": "small_resnet",
    "backbone_args": {"width": 8},
    "pretrained": False,
    "image_size": 32,
    "resize_size": 32,
    "batch_size": 8,
    "frozen_steps": 0,
    "student_dim": 8,
    "teacher_dim": 12,
    "update_every": 4,
    "eval_every": 4,
    "n_threads": 1,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assembly")
    write_uned_tree(folder / "tree")
    return folder


def train(home, recipe, **values):
    given = {"steps": 8, "learning_rate": 1e-2, "backbone_learning_rate": 1e-2, **COMMON, **values}
    if recipe in ("features", "adapter"):
        given.pop("backbone_learning_rate")
    if recipe == "features":
        given.pop("steps")
    run = open_run(TrainParams(recipe=recipe, data=str(home / "tree"), outputs=str(home / "out"), **given))
    for _ in run.train():
        pass
    return run


@pytest.fixture(scope="module")
def specialists(home):
    names = open_run(TrainParams(data=str(home / "tree"), outputs=str(home / "out"), pretrained=False)).catalog.names
    return [train(home, "specialist", domains=[name]) for name in names]


def figures(table, embedder, index, domain):
    """R@1 and mMP@5 of one row of a results table."""
    return (
        table.set_index(["embedder", "index", "domain"]).loc[(embedder, index, domain), ["r_at_1", "mmp_at_5"]].tolist()
    )


def test_in_its_own_domain_the_assembly_finds_what_each_specialist_finds(specialists):
    table = evaluate_assembly(specialists[::-1]).table
    for run in specialists:
        [domain] = run.catalog.names
        own = figures(run.evaluation(), "student", "merged", domain)
        for embedder in ("specialist", "routed"):
            assert figures(table, embedder, "separate", domain) == pytest.approx(own)


def test_the_merged_index_holds_all_domains_and_is_embedded_as_its_name_says(specialists):
    evaluation = evaluate_assembly(specialists)
    first = specialists[0]
    [domain] = first.catalog.names
    found = {name: evaluation.neighbours[name, domain, "merged"] for name in ("specialist", "routed")}
    assert {d for d, _ in found["specialist"].of(0) + found["routed"].of(0)} <= set(found["routed"].searched.domains)
    n_index = sum(len(paths) for paths in found["routed"].searched.paths)
    table = evaluation.table
    merged = table[(table["index"] == "merged") & (table["domain"] == domain)]
    assert set(merged["n_index"]) == {n_index}
    # Neighbours of other domains are compared by other models, so their similarities differ.
    assert not np.allclose(found["specialist"].similarity, found["routed"].similarity)


def test_runs_that_cannot_stand_side_by_side_are_refused(home, specialists):
    with pytest.raises(UserError, match="at least one finished run of one domain; found none"):
        evaluate_assembly([])
    with pytest.raises(UserError, match="are both of domain"):
        evaluate_assembly([specialists[0], specialists[0]])
    [name] = specialists[0].catalog.names
    wider = train(home, "specialist", domains=[name], student_dim=16)
    with pytest.raises(UserError, match="differ in student_dim: 8, 16"):
        evaluate_assembly([specialists[1], wider])
    everything = train(home, "us_rr")
    with pytest.raises(UserError, match="is trained on .*; an assembly needs runs of one"):
        evaluate_assembly([everything])
    unfinished = open_run(specialists[0].params.model_copy(update={"seed": 5}))
    with pytest.raises(UserError, match="is new; an assembly needs finished runs"):
        evaluate_assembly([unfinished])


def test_a_specialist_of_several_domains_is_refused(home):
    with pytest.raises(UserError, match="'domains': found 'all' .* expected one domain for recipe 'specialist'"):
        train(home, "specialist")


def test_the_recipe_features_keeps_the_backbone_as_it_is(home):
    run = train(home, "features")
    table = run.evaluation().query("index == 'merged'").set_index(["embedder", "domain"])["r_at_1"]
    assert table["student", "mean"] == pytest.approx(table["features", "mean"])
    assert run.summary()["steps"] == run.summary()["n_parameters_trained"] == 0
    fresh = run.create_model().state_dict()
    assert all(torch.equal(fresh[name], value) for name, value in run.load_model_state()["model"].items())


def test_the_recipe_adapter_trains_the_head_alone(home):
    run = train(home, "adapter")
    fresh, trained = run.create_model().state_dict(), run.load_model().state_dict()
    moved = {name.split(".")[0] for name, value in trained.items() if not torch.equal(value, fresh[name])}
    assert moved == {"student", "student_prototypes"}
    n_moved = sum(value.numel() for name, value in trained.items() if name.split(".")[0] in moved)
    assert run.summary()["n_parameters_trained"] == n_moved


def test_the_recipe_features_is_not_validated_again_when_only_its_test_is_left(home):
    run = train(home, "features", seed=5)
    (run.path / "summary.json").unlink()
    again = train(home, "features", seed=5)
    assert again.status == "finished"
    assert len(again.records("validation")) == 1


def test_offline_teachers_teach_and_stay_as_they_are(home, specialists, tmp_path):
    preset = tmp_path / "specialist.yaml"
    values = {name: value for name, value in COMMON.items() if name != "backbone_args"}
    lines = "\n".join(f"{name}: {value}" for name, value in values.items()).replace("False", "false")
    rates = "steps: 8\nlearning_rate: 1.0e-2\nbackbone_learning_rate: 1.0e-2\nbackbone_args: {width: 8}\n"
    preset.write_text(f"preset: paper\nrecipe: specialist\n{lines}\n{rates}")
    before = {path: path.read_bytes() for run in specialists for path in run.path.glob("checkpoints/*")}
    taught = train(home, "udon", offline_teachers=str(preset))
    alone = train(home, "udon", offline_teachers=str(preset), w_kl=0.0, w_rel=0.0)
    losses = taught.records("train")[0]["losses"]
    assert all(terms.keys() == {"ce_student", "ce_teacher", "kl", "rel", "total"} for terms in losses.values())
    assert not torch.equal(taught.load_model().student.layers[0].weight, alone.load_model().student.layers[0].weight)
    assert "teacher" not in set(taught.evaluation()["embedder"])
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(UserError, match="'offline_teachers': no finished specialist of domain .* train it first"):
        train(home, "udon", offline_teachers=str(preset), seed=3)


def test_a_run_does_not_pass_for_one_that_began_with_other_weights(home, tmp_path):
    weights = tmp_path / "backbone.safetensors"
    source = train(home, "us_rr", steps=1)
    save_backbone_weights(source.load_model().backbone, weights)
    first = train(home, "us_rr", weights=str(weights), steps=2)
    assert train(home, "us_rr", weights=str(weights), steps=2).path == first.path  # finished: shown again
    save_backbone_weights(train(home, "us_rr", steps=3).load_model().backbone, weights)
    with pytest.raises(UserError, match=r"the weights '.*backbone\.safetensors' has changed since it began"):
        train(home, "us_rr", weights=str(weights), steps=2)
    assert train(home, "us_rr", weights=str(weights), steps=2, overwrite=True).status == "finished"
    weights.unlink()
    assert first.load_model() is not None  # what it began with is not needed any more


def test_a_run_says_what_a_file_of_weights_brought(home, tmp_path):
    encoder = create_backbone("small_resnet", pretrained=False, image_size=32, arguments={"width": 8}).encoder
    state = {f"module.{name}": value for name, value in encoder.state_dict().items()}
    torch.save({"state_dict": state | {"module.fc.weight": torch.ones(3, 64)}}, tmp_path / "theirs.pth")
    given = COMMON | {"data": str(home / "tree"), "outputs": str(tmp_path), "steps": 1, "frozen_steps": 0}
    records = open_run(TrainParams(weights=str(tmp_path / "theirs.pth"), **given)).train()
    [notice] = [notice for notice in next(records)["notices"] if notice.startswith("weights: ")]
    records.close()
    assert " tensors of theirs.pth in 'state_dict.module'; without fc.weight; images normalised by mean" in notice


def test_specialists_that_see_other_images_do_not_teach(home, specialists, tmp_path):
    preset = tmp_path / "specialist.yaml"
    rates = "steps: 8, learning_rate: 1.0e-2, backbone_learning_rate: 1.0e-2, backbone_args: {width: 8}"
    values = {name: value for name, value in COMMON.items() if name != "backbone_args"}
    lines = ", ".join(f"{name}: {value}" for name, value in values.items()).replace("False", "false")
    preset.write_text(f"{{preset: paper, recipe: specialist, {lines}, {rates}}}")
    with pytest.raises(UserError, match="sees images of 32 pixels, this run has image_size = 40"):
        train(home, "udon", offline_teachers=str(preset), image_size=40, resize_size=40)


def test_the_best_checkpoint_holds_the_moving_average(home):
    run = train(home, "us_rr", average_decay=0.9, steps=8, eval_every=8)
    last = torch.load(run.last, weights_only=True)
    best = run.load_model_state()["model"]
    assert all(torch.equal(best[name], value) for name, value in last["average"].items())
    assert not all(torch.equal(best[name], value) for name, value in last["model"].items())


def test_specialists_are_found_by_recipe_pattern_or_not_at_all(outputs):
    run = load_run(str(write_run(outputs, "taught")))
    assert find_specialists(run, "auto", str(outputs)) == {}
    write_specialists(outputs)
    write_run(outputs, "other-emoji", ["emoji"], ["student"], recipe="us_rr", sampler_loss="student")
    found = find_specialists(run, "auto", str(outputs))
    assert {domain: folder.path.name for domain, folder in found.items()} == {
        "emoji": "specialist-emoji-s0-0",
        "flags": "specialist-flags-s0-0",
    }
    assert find_specialists(run, "none", str(outputs)) == {}
    assert find_specialists(run, "specialist-*", str(outputs)).keys() == found.keys()


@pytest.mark.parametrize("changed", [{"imbalance_within": 2.0}, {"backbone": "vit_small_patch16_224"}])
def test_specialists_of_another_backbone_or_of_other_data_are_found_only_where_they_are_named(outputs, changed):
    write_specialists(outputs)
    run = load_run(str(write_run(outputs, "taught", **changed)))
    assert find_specialists(run, "auto", str(outputs)) == {}
    assert find_specialists(run, "specialist-*", str(outputs)).keys() == {"emoji", "flags"}


def test_of_several_specialists_the_runs_seed_goes_first_then_the_last_one(outputs):
    run = load_run(str(write_run(outputs, "taught", seed=1)))
    write_specialists(outputs, seed=0, age=0)
    write_specialists(outputs, seed=1, age=30)
    write_specialists(outputs, seed=1, age=60)
    found = find_specialists(run, "auto", str(outputs))
    assert [folder.path.name for folder in found.values()] == ["specialist-emoji-s1-30", "specialist-flags-s1-30"]


def test_a_preset_names_specialists_of_the_runs_data_and_seed(outputs, tmp_path):
    run = load_run(str(write_run(outputs, "taught")))
    preset = tmp_path / "alone.yaml"
    preset.write_text("preset: paper\nrecipe: specialist\n")
    for domain in DOMAINS:
        name = TrainParams(recipe="specialist", data=run.params.data, domains=[domain]).run_name
        write_run(outputs, name, [domain], ["student"], recipe="specialist")
    found = find_specialists(run, str(preset), str(outputs))
    assert [folder.params.domains for folder in found.values()] == [("emoji",), ("flags",)]


def test_some_specialists_are_not_enough(outputs):
    run = load_run(str(write_run(outputs, "taught")))
    write_specialists(outputs, domains=["emoji"])
    assert find_specialists(run, "auto", str(outputs)) == {}
    with pytest.raises(UserError, match=r"'specialists': 'spec\*' has no finished run of flags alone"):
        find_specialists(run, "spec*", str(outputs))


def test_neither_a_run_nor_a_preset(outputs):
    run = load_run(str(write_run(outputs, "taught")))
    with pytest.raises(UserError, match="'specialists': found 'taugt', but no finished run .*did you mean 'taught'"):
        find_specialists(run, "taugt", str(outputs))
