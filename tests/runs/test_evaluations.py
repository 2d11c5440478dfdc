"""Any run, checkpoint or descriptors, on any catalog: the same figures, in a folder of their own."""

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests import PROJECT
from tests.helpers.catalogs import picture, write_image_folder, write_tree, write_uned_tree
from tests.helpers.evaluations import figures, stamps
from tests.helpers.training import SMALL
from udonlib.errors import ParameterError, UserError
from udonlib.evaluation.files import load_outcomes
from udonlib.evaluation.frequency import frequencies
from udonlib.files import DiskError, take_lock
from udonlib.lab.views import evaluation_views
from udonlib.params import TrainParams
from udonlib.presets import EvaluateParams
from udonlib.runs import evaluations
from udonlib.runs.evaluations import Source, lost_by_merging, open_evaluation
from udonlib.runs.run import open_run

SETTINGS = {"eval_batch_size": 4, "n_threads": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on two domains, one of them with an index of its own."""
    folder = tmp_path_factory.mktemp("run")
    data = write_uned_tree(folder / "data", index_of="flags")
    params = TrainParams(
        **SMALL | {"data": str(data), "outputs": str(folder / "outputs"), "run": "small", "nested_dims": (4,)},
        n_threads=1,
        eval_batch_size=4,
    )
    run = open_run(params)
    for _ in run.train():
        pass
    return run


@pytest.fixture
def evaluated(run, tmp_path):
    """Open an evaluation of the run, or of something else, with results in a folder of the test."""

    def evaluated(**values):
        source = {} if {"checkpoint", "descriptors"} & set(values) else {"run": str(run.path)}
        return open_evaluation(EvaluateParams(**SETTINGS | source | {"outputs": str(tmp_path / "out")} | values))

    return evaluated


def test_a_run_on_its_own_data_has_its_own_figures(run, evaluated):
    before = stamps(run.path)
    evaluation = evaluated()
    embedders = ("student", "teacher", "student_4")
    pd.testing.assert_frame_equal(
        figures(evaluation.measure(), *embedders), figures(run.evaluation(), *embedders), check_exact=True
    )
    assert stamps(run.path) == before
    assert evaluation.path.parent.name == "evaluations"
    assert {path.name for path in evaluation.path.iterdir()} == {
        *("params.yaml", "provenance.json", "summary.json", "outcomes.csv.gz", "neighbours.npz"),
        *("evaluation.csv", "evaluation.json", "lock"),
    }
    theirs = {(n.embedder, n.query_domain): n for n in run.neighbours()}
    ours = {(n.embedder, n.query_domain): n for n in evaluation.neighbours()}
    assert set(theirs) <= set(ours)
    for key, found in theirs.items():
        assert np.array_equal(found.position, ours[key].position[:, :5])
        assert found.of(0) == ours[key].of(0)[:5]


def test_metrics_are_asked_for_by_name(evaluated):
    table = evaluated(metrics="map_at_3, r_at_2, r_at_7").measure()
    found = table.query("embedder == 'student' and index == 'merged' and domain == 'mean'").iloc[0]
    assert found["r_at_1"] <= found["r_at_2"] <= found["r_at_7"] <= 100
    assert found["map_at_3_low"] <= found["map_at_3"] <= found["map_at_3_high"]
    with pytest.raises(ParameterError, match=r"(?s)metrics.*ndcg_at_3"):
        evaluated(metrics="ndcg_at_3")


def test_r_at_k_is_drawn_as_far_as_neighbours_are_kept(evaluated):
    evaluation = evaluated(metrics="r_at_7")
    table = evaluation.measure().query("embedder == 'student' and index == 'merged'").set_index("domain")
    drawn = {trace.name: trace.y for trace in evaluation_views.recall_chart(evaluation).data}
    assert set(drawn) == {"emoji", "flags", "mean"}
    for name, curve in drawn.items():
        assert len(curve) == 7
        assert curve[[0, 6]] == pytest.approx([table.loc[name, "r_at_1"], table.loc[name, "r_at_7"]], abs=1e-3)
    shown = evaluation_views.metrics_table(evaluation)
    assert all(name in shown.text for name in ("R@1", "mMP@5", "R@7", f"{table.loc['flags', 'r_at_7']:.1f} ±"))


def test_queries_stand_in_groups_where_the_run_knows_its_training_images(run, evaluated, tmp_path):
    evaluation = evaluated()
    evaluation.measure()
    known = frequencies(run.catalog)
    outcomes = load_outcomes(evaluation.path / "outcomes.csv.gz")
    student = outcomes.query("embedder == 'student' and index == 'merged'").merge(known, on=["domain", "path"])
    assert (student["group_x"] == student["group_y"]).all()
    found = evaluation.by_group().set_index(["embedder", "group"])
    for group, part in student.groupby("size_x"):
        mean = 100 * part.groupby("domain")["r_at_1"].mean().mean()
        assert found.loc[("student", group), "mean"] == pytest.approx(mean)
        assert found.loc[("student", group), "n_queries"] == len(part)
    assert "large domains" in evaluation_views.group_table(evaluation).text
    elsewhere = evaluated(data=str(write_image_folder(tmp_path / "pets")))
    elsewhere.measure()
    assert elsewhere.by_group() is None
    assert "only for a run" in evaluation_views.group_table(elsewhere).text


def test_results_say_what_they_belong_to(run, evaluated):
    evaluation = evaluated(domains="emoji", k=3)
    table = evaluation.measure()
    assert "mmp_at_3" in table
    provenance = json.loads((evaluation.path / "provenance.json").read_text())
    assert provenance["of"]["kind"] == "run"
    assert provenance["of"]["file"] == str(run.best)
    assert provenance["data_fingerprint"] == evaluation.catalog.fingerprint
    assert {"commit", "packages", "time"} <= set(provenance)
    assert yaml.safe_load((evaluation.path / "params.yaml").read_text())["k"] == 3


def test_the_validation_queries_have_an_index_of_their_own(run, evaluated):
    table = evaluated(subset="val").measure()
    validated = run.validation().query(f"step == {run.summary()['best_step']}")
    pd.testing.assert_frame_equal(
        figures(table, "student"), figures(validated, "student"), check_exact=True, check_dtype=False
    )


def test_a_student_needs_no_domain_and_a_teacher_does(run, evaluated, tmp_path):
    folder = evaluated(data=str(write_image_folder(tmp_path / "pets"))).measure()
    assert set(folder["embedder"]) == {"student", "student_4"}
    assert set(folder["domain"]) == {"cats", "dogs", "mean"}
    mixed = write_uned_tree(tmp_path / "mixed", domains=("emoji", "cats"))
    table = evaluated(data=str(mixed)).measure()
    assert table.query("embedder == 'teacher'")["domain"].tolist() == ["emoji", "emoji"]
    assert table.query("embedder == 'student'")["domain"].tolist() == ["emoji", "cats", "mean"] * 2
    assert evaluation_views.merging_chart(evaluated(data=str(mixed)).lost_by_merging()).data[1].x == ("emoji",)


def test_domains_of_the_runs_own_data_may_be_chosen(run, evaluated):
    assert evaluated().catalog.names == ("emoji", "flags")
    assert evaluated(domains="flags").catalog.names == ("flags",)
    with pytest.raises(UserError, match=r"no domain 'flaks'; did you mean 'flags'\?"):
        evaluated(domains="flaks")


def test_a_checkpoint_needs_its_params_and_not_its_data(run, evaluated, tmp_path):
    folder, data = tmp_path / "given", str(write_uned_tree(tmp_path / "other", domains=("stamps", "coins")))
    shutil.copytree(run.path / "checkpoints", folder / "checkpoints")
    params = yaml.safe_load((run.path / "params.yaml").read_text()) | {"data": str(tmp_path / "gone")}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    best = evaluated(checkpoint=str(folder / "checkpoints" / "best.pt"), data=data)
    assert figures(best.measure(), "student").equals(figures(evaluated(data=data).measure(), "student"))
    last = evaluated(checkpoint=str(folder / "checkpoints" / "last.pt"), data=data)
    last.measure()
    assert best.path.name.startswith("given-best-on-other-test-")
    assert last.path.name.startswith("given-last-on-other-test-")
    shutil.copy(folder / "params.yaml", folder / "checkpoints")
    (folder / "params.yaml").unlink()
    assert evaluated(checkpoint=str(folder / "checkpoints" / "best.pt"), data=data).is_finished is False  # other name
    (folder / "checkpoints" / "params.yaml").unlink()
    with pytest.raises(UserError, match=r"best\.pt: no params\.yaml beside it or above"):
        evaluated(checkpoint=str(folder / "checkpoints" / "best.pt"), data=data)


def test_the_kept_average_is_what_a_last_checkpoint_gives(run, evaluated, tmp_path):
    folder = tmp_path / "averaged"
    shutil.copytree(run.path, folder)
    state = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    best = torch.load(folder / "checkpoints" / "best.pt", weights_only=True)
    broken = {name: torch.zeros_like(value) for name, value in state["model"].items()}
    torch.save(state | {"model": broken, "average": best["model"]}, folder / "checkpoints" / "last.pt")
    table = evaluated(checkpoint=str(folder / "checkpoints" / "last.pt")).measure()
    assert figures(table, "student").equals(figures(run.evaluation(), "student"))


def test_exported_descriptors_give_the_same_table(run, evaluated):
    evaluation = evaluated(save_descriptors=True)
    table = evaluation.measure()
    exported = evaluation.path / "descriptors.npz"
    with np.load(exported) as arrays:
        assert {key: len(arrays[key]) for key in arrays.files} == {
            f"{d.name}/{name}": len(split) for d in run.catalog.domains for name, split in d.splits.items()
        }
    theirs = evaluated(descriptors=str(exported), data=run.params.data)
    again = theirs.measure()
    one, other = figures(table, "student"), figures(again, "descriptors")
    assert one.drop(columns="embedder").equals(other.drop(columns="embedder"))
    ours = {n.query_domain: n for n in evaluation.neighbours() if n.embedder == "student"}
    for found in theirs.neighbours():
        assert np.array_equal(found.position, ours[found.query_domain].position)
    lost = evaluation.lost_by_merging().query("embedder == 'student'").drop(columns="embedder")
    assert lost.equals(theirs.lost_by_merging().drop(columns="embedder"))
    assert evaluation_views.gallery(theirs).data == evaluation_views.gallery(evaluation).data


def test_descriptors_need_no_images_and_may_be_of_more_domains(run, evaluated, tmp_path):
    evaluation = evaluated(save_descriptors=True)
    evaluation.measure()
    tree = tmp_path / "tree"
    shutil.copytree(run.catalog.root / "info_files", tree / "info_files")
    theirs = evaluated(descriptors=str(evaluation.path / "descriptors.npz"), data=str(tree), domains="flags")
    assert set(theirs.measure()["domain"]) == {"flags", "mean"}
    assert "no images to show" in evaluation_views.gallery(theirs).text
    with pytest.raises(UserError, match=r"descriptors\.npz: .* has no domain 'emoji'; did you mean 'emoji_2'"):
        (tree / "info_files" / "emoji").rename(tree / "info_files" / "emoji_2")
        evaluated(descriptors=str(evaluation.path / "descriptors.npz"), data=str(tree)).measure()


def test_the_same_evaluation_is_shown_again_and_not_made_again(evaluated, monkeypatch):
    evaluation = evaluated()
    table = evaluation.measure()
    before = stamps(evaluation.path)
    with monkeypatch.context() as context:
        context.setattr(evaluations, "evaluate", None)
        again = evaluated()
        assert again.is_finished
        assert again.measure().equals(table)
        assert stamps(evaluation.path) == before
        for other in ({"k": 2}, {"seed": 1}, {"subset": "val"}, {"domains": "emoji"}, {"precision": "bfloat16"}):
            assert not evaluated(**other).is_finished
            assert evaluated(**other).path != evaluation.path
    forced = evaluated(overwrite=True)
    assert not forced.is_finished
    assert forced.measure().equals(table)
    assert forced.is_finished
    assert stamps(evaluation.path) != before


def test_a_later_wish_for_descriptors_does_not_evaluate_again(evaluated, monkeypatch):
    evaluation = evaluated()
    evaluation.measure()
    monkeypatch.setattr(evaluations, "evaluate", None)
    evaluated(save_descriptors=True).measure()
    assert (evaluation.path / "descriptors.npz").exists()


def test_an_evaluation_that_was_cut_short_is_made_again(evaluated):
    evaluation = evaluated()
    table = evaluation.measure()
    (evaluation.path / "summary.json").unlink()
    (evaluation.path / "evaluation.csv").write_text("half a ta")
    assert not evaluated().is_finished
    assert evaluated().measure().equals(table)


def test_a_changed_model_or_changed_data_is_another_evaluation(run, evaluated, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(run.path, folder)
    data = shutil.copytree(run.catalog.root, tmp_path / "data")
    values = {"run": str(folder), "data": str(data), "name": "results"}
    evaluated(**values).measure()
    assert evaluated(**values).is_finished
    state = torch.load(folder / "checkpoints" / "best.pt", weights_only=True)
    torch.save(state | {"step": 0}, folder / "checkpoints" / "best.pt")
    message = r"evaluation 'results' exists and is of another model, data or parameters: run mine on data \(test\)"
    with pytest.raises(UserError, match=message):
        evaluated(**values)
    evaluated(**values, overwrite=True).measure()
    assert evaluated(**values).is_finished
    file = data / "info_files" / "emoji" / "test.json"
    file.write_text(json.dumps(json.loads(file.read_text())[1:]))
    with pytest.raises(UserError, match="exists and is of another model, data or parameters"):
        evaluated(**values)


def test_images_that_cannot_be_read_stop_it_or_are_left_out(run, evaluated, tmp_path, capsys):
    data = shutil.copytree(run.catalog.root, tmp_path / "data")
    bad = next((data / "images" / "emoji").glob("0005_*"))
    bad.write_bytes(b"no image")
    with pytest.raises(UserError, match=rf"{bad.name}.*on_bad_image='skip'"):
        evaluated(data=str(data)).measure()
    evaluation = evaluated(data=str(data), on_bad_image="skip")
    table = evaluation_views.measure(evaluation, live=False)
    assert table.query("embedder == 'student' and domain == 'emoji'")["n_queries"].tolist() == [6, 6]
    assert capsys.readouterr().out.endswith("one image could not be read and was left out\n")
    with pytest.raises(
        UserError, match=rf"emoji/test: 'emoji/{bad.name}' cannot be read: descriptors need every image"
    ):
        evaluated(data=str(data), on_bad_image="skip", save_descriptors=True).measure()
    assert not (evaluation.path / "descriptors.npz").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"run": None}, r"parameter 'run': found none of run, checkpoint and descriptors, expected exactly one"),
        ({"run": "a", "descriptors": "b.npz"}, r"parameter 'descriptors': found run and descriptors of"),
        ({"descriptors": "b.npz", "save_descriptors": True}, r"parameter 'save_descriptors': found True, but"),
        ({"run": "a", "subset": "tset"}, r"parameter 'subset': found 'tset' .*; did you mean 'test'"),
        ({"run": "a", "name": "../b"}, r"parameter 'name': found '../b'"),
        ({"run": "a", "subsett": 1}, r"^parameter 'subsett': no such parameter; did you mean 'subset'\?$"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ParameterError, match=message):
        EvaluateParams(**values)


def test_where_nothing_is_named_the_latest_run_is_meant():
    assert EvaluateParams().run == "latest"
    assert EvaluateParams(descriptors="b.npz").run is None


def test_what_is_not_there_is_named_with_what_is(run, evaluated, tmp_path):
    home = str(run.path.parent.parent)
    with pytest.raises(UserError, match=r"parameter 'run': no run 'smal' in .*; did you mean 'small'\?"):
        evaluated(run="smal", outputs=home)
    with pytest.raises(UserError, match=r"parameter 'checkpoint': no file '.*bets\.pt'; did you mean 'best\.pt'\?"):
        evaluated(checkpoint=str(run.path / "checkpoints" / "bets.pt"))
    with pytest.raises(UserError, match=r"parameter 'descriptors': no file"):
        evaluated(descriptors=str(tmp_path / "none.npz"))
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(run.path / "params.yaml", begun)
    with pytest.raises(UserError, match=r"run 'begun' has no checkpoint yet: it is unfinished, .* at step 5"):
        evaluated(run=str(begun))


def test_files_that_are_no_checkpoints_are_refused(run, evaluated, tmp_path):
    shutil.copy(run.path / "params.yaml", tmp_path)
    for content in (b"", b"no pickle", b"PK\x03\x04", b"<html>", run.best.read_bytes()[:-1000]):
        (tmp_path / "best.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"best\.pt: cannot be read as a file of torch\.save: "):
            evaluated(checkpoint=str(tmp_path / "best.pt"), data=run.params.data).measure()
    shutil.copy(run.best, tmp_path)
    params = yaml.safe_load((run.path / "params.yaml").read_text()) | {"student_dim": 16}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    message = (
        r"best\.pt: another model than its params\.yaml says: \d+ of \d+ tensors differ, .* has shape \[.*expected \["
    )
    with pytest.raises(UserError, match=message):
        evaluated(checkpoint=str(tmp_path / "best.pt"), data=run.params.data).measure()
    with pytest.raises(UserError, match=r"checkpoint_-1: "):
        (tmp_path / "checkpoint_-1").write_bytes(b"no msgpack")
        evaluated(checkpoint=str(tmp_path), data=run.params.data).measure()
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: an encoder's weights, .* recipe=features"):
        evaluated(checkpoint=str(tmp_path / "model.safetensors"), data=run.params.data)
    assert not (tmp_path / "out").exists()


def test_checkpoints_of_other_programs_end_in_one_message(run, tmp_path):
    """Whatever stands where the weights of a run would: the form is checked before anything is made of it."""
    good = torch.load(run.best, weights_only=True)
    prototypes = next(name for name in good["model"] if name.startswith("student_prototypes."))
    tensor = torch.ones(2)
    others = [
        *({}, {"a": 1}, [1, 2], torch.zeros(3), 7, "text", None, {1: tensor}, {"a": tensor}, {"model": tensor}),
        *({"model": {}}, {"model": [tensor]}, {"model": {1: tensor}}, {"model": {"a": 1}}, {"model": {"a": {}}}),
        *({"model": {"a": tensor}}, {"average": {"a": tensor}}, {"average": 3, "model": good["model"]}),
        *({"state_dict": good["model"]}, {"model": {prototypes: torch.ones(())}}, {"model": {prototypes: tensor}}),
        *(good | {"model": good["model"] | change} for change in ({"more": tensor}, {prototypes: torch.ones(3, 5)})),
        *(good | {"model": good["model"] | {prototypes: good["model"][prototypes] * x}} for x in (torch.nan, 1j)),
        *(
            good | {"statistics": x}
            for x in (1, [1, 2], [[1, 2, 3]], [[1, 2, "a"], [1, 2, 3]], [[1, 2, torch.nan]] * 2)
        ),
        {"model": {name: value for name, value in good["model"].items() if "layers.0" not in name}},
        {"model": torch.nn.Linear(2, 2)},
    ]
    for number, other in enumerate(others):
        torch.save(other, tmp_path / "best.pt")
        source = Source("checkpoint", "theirs", tmp_path / "best.pt", run.params)
        with pytest.raises(UserError, match=r"^\S*best\.pt: (not a checkpoint|another model|holds)") as caught:
            source.load_model()
            pytest.fail(f"number {number} was taken for a model")
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)
    torch.save(good, tmp_path / "best.pt")
    assert source.load_model().domains == run.load_model().domains


def test_a_checkpoint_of_the_reference_is_evaluated(run, evaluated):
    folder = PROJECT / "tests" / "golden" / "data" / "ckpt"
    evaluation = evaluated(checkpoint=str(folder), data=run.params.data)
    table = evaluation.measure()
    assert evaluation.source.file.name == "checkpoint_-1"
    assert set(table["embedder"]) == {"student"}
    assert table.query("embedder == 'student'")["r_at_1"].between(0, 100).all()
    assert evaluated(checkpoint=str(folder / "checkpoint_-1"), data=run.params.data).is_finished


def test_what_merging_loses_is_the_paired_difference(evaluated):
    evaluation = evaluated()
    table = evaluation.measure().set_index(["embedder", "domain", "index"])["r_at_1"]
    lost = evaluation.lost_by_merging()
    assert len(lost) == 3 * 3
    for row in lost.itertuples():
        expected = table[row.embedder, row.domain, "separate"] - table[row.embedder, row.domain, "merged"]
        assert row.lost == pytest.approx(expected)
        assert 0 <= row.low <= row.lost <= row.high
    paths = [f"{i}" for i in range(1000)]
    merged, separate = np.arange(1000) < 400, np.arange(1000) < 500
    both = {"embedder": "e", "domain": "d", "path": paths}
    outcomes = pd.concat(
        [
            pd.DataFrame(both | {"index": "merged", "r_at_1": merged.astype(float)}),
            pd.DataFrame(both | {"index": "separate", "r_at_1": separate.astype(float)}).sample(frac=1, random_state=0),
        ]
    )
    found = lost_by_merging(outcomes).set_index("domain").loc["d"]
    assert found["lost"] == pytest.approx(10)
    # Of 1000 queries 100 are lost: sqrt(0.1 x 0.9 / 1000) is 0.95 points, where two separate means would give 2.2.
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * 0.95, rel=0.1)


def test_figures_name_the_queries(evaluated):
    for subset, title in (("test", "Test queries, merged index"), ("val", "Validation queries, merged index")):
        evaluation = evaluated(subset=subset)
        evaluation.measure()
        assert evaluation_views.results_chart(evaluation).layout.title.text == title


def test_images_may_lie_elsewhere(run, evaluated, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(run.catalog.root / "info_files", tree / "info_files")
    table = evaluated(data=str(tree), images=str(run.catalog.root)).measure()
    assert figures(table, "student").equals(figures(run.evaluation(), "student"))


def test_a_benchmark_with_a_test_split_only_is_evaluated(evaluated, tmp_path):
    official = write_uned_tree(tmp_path / "official", domains=("emoji",), sizes={"test": (3, 2)})
    assert set(evaluated(data=str(official)).measure()["n_queries"]) == {5}
    with pytest.raises(UserError, match=r"val\.json: no such file"):
        evaluated(data=str(official), subset="val")
    for name in ("a", "b"):
        write_tree(tmp_path / "pets/test", {f"{name}/{i}.png": picture(i) for i in range(3)})
    evaluation = evaluated(data=tmp_path / "pets", name="folders")
    assert set(evaluation.measure()["n_queries"]) == {6}
    assert evaluation.catalog.names == ("pets",)
    assert "pets: its folders say what is test" in evaluation_views.plan_table(evaluation).text


def test_every_image_may_be_a_test_query(run, evaluated, tmp_path):
    folder = write_image_folder(tmp_path / "pets", ("cats",), n_classes=2, n_images=2)
    with pytest.raises(UserError, match="cats: train, val and test need a class folder each, found 2"):
        evaluated(data=str(folder))
    evaluation = evaluated(data=str(folder), all_as_test=True)
    assert set(evaluation.measure()["n_queries"]) == {4}
    whole = evaluated(all_as_test=True)
    assert {d.name: d.sizes for d in whole.catalog.domains} == {"emoji": {"test": 24}, "flags": {"test": 36}}
    splits = [split for domain in run.catalog.domains for split in domain.splits.values()]
    labels = {path: row for split in splits for path, row in zip(split.paths, split.labels, strict=True)}
    for domain in whole.catalog.domains:
        test = domain.splits["test"]
        assert all((labels[path] == row).all() for path, row in zip(test.paths, test.labels, strict=True))
    with pytest.raises(ParameterError, match="parameter 'all_as_test': found True beside subset 'val'"):
        evaluated(all_as_test=True, subset="val")


def test_what_is_shown_says_what_was_evaluated(run, evaluated, capsys):
    evaluation = evaluated()
    assert "(finished: shown again)" not in evaluation_views.plan_table(evaluation).text
    evaluation_views.measure(evaluation, live=False, clock=lambda: 0.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("embedding 4/")
    assert "finished in 0 s" in lines[-1]
    plan = evaluation_views.plan_table(evaluated()).text
    assert "run small" in plan
    assert "14 of 'test', which search a merged index of 26" in plan
    assert "(finished: shown again)" in plan
    evaluation_views.measure(evaluated(), live=False)
    assert capsys.readouterr().out.endswith("evaluated before\n")
    assert evaluation_views.gallery(evaluation).data[:4] == b"RIFF"
    assert "evaluation.csv" in evaluation_views.files_table(evaluation).text
    figure = evaluation_views.merging_chart(evaluation.lost_by_merging())
    assert [bar.name for bar in figure.data] == ["student", "teacher", "student_4"]
    assert list(figure.data[0].x) == ["emoji", "flags", "mean"]


def test_a_folder_of_the_wanted_name_keeps_what_is_not_an_evaluations(evaluated, tmp_path):
    folder = tmp_path / "out" / "evaluations" / "mine"
    folder.mkdir(parents=True)
    others = ("notes.txt", "table.tmp", "evaluation.csv.tmp", "new.1.tmp.txt")
    for name in others:
        (folder / name).write_text("mine")
    evaluated(name="mine").measure()
    evaluated(name="mine", seed=1, overwrite=True).measure()
    assert {(folder / name).read_text() for name in others} == {"mine"}
    assert {path.name for path in folder.iterdir()} == {*others, *evaluations.FILES, "lock"} - {"descriptors.npz"}


def test_a_file_of_a_name_of_ours_that_is_not_ours_is_replaced_only_if_asked(evaluated, tmp_path):
    folder = tmp_path / "out" / "evaluations" / "mine"
    folder.mkdir(parents=True)
    (folder / "evaluation.csv").write_text("mine")
    with pytest.raises(UserError, match=r"mine/evaluation.csv: is there already, and not of an evaluation: give this"):
        evaluated(name="mine")
    assert (folder / "evaluation.csv").read_text() == "mine"
    evaluated(name="mine", overwrite=True).measure()
    assert evaluated(name="mine").is_finished


def test_the_old_results_stay_until_the_new_ones_are_whole(evaluated, monkeypatch):
    first = evaluated(name="mine", save_descriptors=True)
    table = first.measure()
    before = stamps(first.path)

    def full(path, value):
        raise DiskError("no room")

    with monkeypatch.context() as context:
        context.setattr(evaluations, "write_json", full)
        with pytest.raises(DiskError, match="no room"):
            evaluated(name="mine", seed=1, overwrite=True).measure()
    del before[first.path / "lock"]
    assert {file: stamp for file, stamp in stamps(first.path).items() if file.name != "lock"} == before
    assert evaluated(name="mine", save_descriptors=True).is_finished
    assert evaluated(name="mine").table.equals(table)
    second = evaluated(name="mine", seed=1, overwrite=True)
    second.measure()
    assert not (second.path / "descriptors.npz").exists()  # it was another one's


def test_a_kill_while_results_take_their_places_leaves_none_that_pass_for_whole(evaluated, monkeypatch):
    evaluated(name="mine").measure()
    replace = os.replace
    for after in range(6):
        done = []

        def killed(source, target, after=after, done=done):
            if Path(target).parent.name == "mine":  # those that take their places
                if len(done) == after:
                    raise KeyboardInterrupt
                done.append(target)
            replace(source, target)

        with monkeypatch.context() as context:
            context.setattr(os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                evaluated(name="mine", seed=after + 1, overwrite=True).measure()
        assert not evaluated(name="mine").is_finished
        assert not evaluated(name="mine", seed=after + 1).is_finished
        evaluated(name="mine").measure()


def test_two_that_evaluate_at_once_leave_one_whole_result(evaluated):
    first, second = evaluated(name="mine"), evaluated(name="mine")
    assert first.measure().equals(second.measure())
    other, last = evaluated(name="other"), evaluated(name="other", seed=1)
    other.measure()
    with pytest.raises(UserError, match="evaluation 'other' exists and is of another model, data or parameters"):
        last.measure()
    assert evaluated(name="other").is_finished


def test_who_writes_waits_for_the_other_one(evaluated):
    evaluation = evaluated(name="mine")
    lock = take_lock(evaluation.path / "lock")
    threading.Timer(0.3, lock.close).start()
    evaluation.measure()
    assert lock.closed
    assert evaluated(name="mine").is_finished


@pytest.mark.parametrize("content", ["", "{}", "[" * 100_000, '{"fingerprint": "x", "of"', "\xff"])
def test_a_damaged_summary_is_named_with_the_way_out(evaluated, content):
    evaluation = evaluated(name="mine")
    evaluation.measure()
    (evaluation.path / "summary.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"summary.json: not the summary of an evaluation .*name=.*overwrite=true"):
        evaluated(name="mine")
    assert not evaluated(name="mine", overwrite=True).is_finished


def test_results_that_were_cut_are_not_shown_as_the_whole(evaluated):
    evaluation = evaluated(name="mine")
    evaluation.measure()
    file = evaluation.path / "evaluation.csv"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[: len(lines) // 2]))
    with pytest.raises(UserError, match=r"evaluation.csv: damaged: it holds \d+ rows, evaluation.json \d+; eval"):
        _ = evaluated(name="mine").table
    file.unlink()
    with pytest.raises(UserError, match=r"evaluation.csv: missing; evaluate again \(overwrite=true\)"):
        evaluated(name="mine").measure()


def test_the_latest_run_is_the_one_whose_model_was_kept_last(run, tmp_path):
    outputs = tmp_path / "results"
    values = {**SETTINGS, "outputs": str(outputs), "run": "latest"}
    with pytest.raises(UserError, match=r"'run': found 'latest', but there is no run with a checkpoint in"):
        open_evaluation(EvaluateParams(**values))
    for age, name in enumerate(("second", "last", "first")):
        shutil.copytree(run.path, outputs / "runs" / name)
        moment = 1_000_000_000 + (0, 50, -50)[age]
        os.utime(outputs / "runs" / name / "checkpoints" / "best.pt", (moment, moment))
    (outputs / "runs" / "new").mkdir()
    assert open_evaluation(EvaluateParams(**values)).source.name == "last"


def test_a_model_whose_file_has_changed_is_not_evaluated(run, evaluated, tmp_path):
    shutil.copytree(run.path, tmp_path / "copy")
    file = tmp_path / "copy" / "checkpoints" / "best.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x55
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"best\.pt: .*damaged"):
        evaluated(run=str(tmp_path / "copy")).measure()
