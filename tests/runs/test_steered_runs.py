"""Runs that a person steers while they train: what changes when, what is repeated, to the same bits."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.runs import assert_same_state, checkpoint, finish
from tests.helpers.taught import taught_params, write_teachers
from tests.helpers.training import SMALL, make, same, weights
from tests.helpers.waiting import Clock, wait_until
from udonlib import files, presets
from udonlib.data.catalog import load_catalog
from udonlib.errors import UserError
from udonlib.params import TrainParams
from udonlib.runs import run as run_module
from udonlib.runs.find import RUN, find_run
from udonlib.runs.folder import STATES, RunFolder, last_step
from udonlib.runs.run import open_run
from udonlib.runs.writer import RunWriter
from udonlib.training import steering
from udonlib.training import trainer as training
from udonlib.training.interventions import Intervention, Wish
from udonlib.training.sampler import effective_shares
from udonlib.training.steering import change_control
from udonlib.training.trainer import RunStoppedError

NAMES = ("emoji", "flags", "earth")
# Within windows, which end at 4, 8 and 11; at a checkpoint's step, at a validation's, and at neither.
SCRIPT = {
    2: {"multipliers": {"emoji": 3.0}},
    5: {"locks": {"flags": 0.5}},
    7: {"evaluate": True},
    9: {"multipliers": {"emoji": None, "earth": 0.0}},
}


# Of frozen teachers: alone, with a domain, without weight, and back to the parameters.
TEACHING = {
    2: {"teachers": {"two": 3.0}},
    5: {"drop_probability": 0.0, "multipliers": {"emoji": 3.0}},
    7: {"teachers": {"two": 0.0}},
    9: {"teachers": {"two": None}, "drop_probability": None},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_uned_tree(tmp_path_factory.mktemp("data"), domains=NAMES)


@pytest.fixture(scope="module")
def catalog(data):
    return load_catalog(str(data))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Where two finished runs are, which no test changes."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def plain(data, outputs):
    return finish(open_run(params(data, outputs, run="plain")))


@pytest.fixture(scope="module")
def steered(data, outputs):
    run = open_run(params(data, outputs, run="steered"))
    drive(run, SCRIPT)
    return run


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return write_teachers(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def taught(data, encoders, outputs):
    """A run whose frozen teachers are steered."""
    run = open_run(taught_params(data, outputs, encoders, log_every=1, run="taught"))
    drive(run, TEACHING)
    return run


def params(root, outputs, **changes):
    fixed = {"data": str(root), "outputs": str(outputs), "n_threads": 1, "log_every": 1}
    return TrainParams(**SMALL | fixed | changes)


def drive(run, script, until=None):
    """Train with changes that come after the steps of the script, up to the record of step `until`; or to the end.

    With a record of every step, what is changed at one is seen right after it.
    """
    records, training = [], run.train()
    for record in training:
        records.append(record)
        if record["kind"] == "train" and record["step"] == until:
            training.close()
            break
        if record["kind"] in ("start", "train"):
            change = script.get(record["step"])
            if change is not None:
                change_control(run.path, "test", **change)
    return records


def from_step(step, script=SCRIPT):
    return {at: change for at, change in script.items() if at >= step}


def assert_same_run(first, second):
    """Everything that a run leaves but its times."""
    assert_same_state(checkpoint(first), checkpoint(second))
    assert_same_state(first.load_model_state(), second.load_model_state())
    assert first.losses().equals(second.losses())
    assert first.allocation().equals(second.allocation())
    assert first.validation().equals(second.validation())
    assert first.evaluation().equals(second.evaluation())


def assert_same_training(first, second):
    """Everything but how often something was logged."""
    apart = ("n_records", "seconds", "n_interventions")
    states = [{name: value for name, value in checkpoint(run).items() if name not in apart} for run in (first, second)]
    assert_same_state(*states)
    assert_same_state(first.load_model_state(), second.load_model_state())
    assert first.evaluation().equals(second.evaluation())


def what_was_done(run):
    return [(entry.step, entry.multipliers, entry.locks, entry.evaluate) for entry in run.interventions()]


def taught_at(run):
    """Step -> share of images that each teacher taught, by name, over all domains."""
    rows = run.losses().assign(n=lambda table: table["value"] * table["images"])
    sums = rows[rows["term"].str.endswith("/kept")].groupby(["step", "term"])[["n", "images"]].sum()
    shares = (sums["n"] / sums["images"]).unstack()
    return shares.rename(columns=lambda term: term.split("/")[0]).T.to_dict()


# What steering does


def test_shares_change_at_the_step_of_the_intervention_and_weights_stay_adaptive(steered):
    allocation = steered.allocation()
    assert allocation["step"].unique().tolist() == [0, 2, 4, 5, 8, 9]
    table = {step: rows.set_index("domain") for step, rows in allocation.groupby("step")}
    for step, multipliers, locks in (
        (0, {}, {}),
        (2, {"emoji": 3.0}, {}),
        (4, {"emoji": 3.0}, {}),
        (5, {"emoji": 3.0}, {"flags": 0.5}),
        (8, {"emoji": 3.0}, {"flags": 0.5}),
        (9, {"earth": 0.0}, {"flags": 0.5}),
    ):
        expected = effective_shares(table[step]["weight"].to_numpy(), NAMES, multipliers, locks)
        assert table[step]["share"].tolist() == expected.tolist()
    assert table[2]["weight"].equals(table[0]["weight"])
    assert table[5]["weight"].equals(table[4]["weight"])
    assert not table[4]["weight"].equals(table[2]["weight"])
    assert table[9].loc["earth", "share"] == 0
    assert what_was_done(steered) == [
        (2, {"emoji": 3.0}, {}, False),
        (5, {"emoji": 3.0}, {"flags": 0.5}, False),
        (7, {"emoji": 3.0}, {"flags": 0.5}, True),
        (9, {"earth": 0.0}, {"flags": 0.5}, False),
    ]
    assert steered.summary()["interventions"] == 4
    seen = steered.records("train")[-1]["images_seen"]
    assert seen["earth"] == table[9].loc["earth", "images_seen"]
    assert sum(seen.values()) == 88


def test_a_run_that_nobody_steers_has_shares_that_are_its_weights(plain):
    allocation = plain.allocation()
    assert allocation["share"].equals(allocation["weight"])
    assert plain.interventions() == []
    assert plain.summary()["interventions"] == 0


def test_each_record_of_what_was_done_stands_before_what_it_did(steered):
    kinds = [json.loads(line) for line in (steered.path / "metrics.jsonl").read_text().splitlines()]
    pairs = [(a["kind"], b["kind"], b["step"]) for a, b in pairwise(kinds)]
    assert [pair for pair in pairs if pair[0] == "steering"] == [
        ("steering", "allocation", 2),
        ("steering", "allocation", 5),
        ("steering", "validation", 7),
        ("steering", "allocation", 9),
    ]
    assert all("time" in record for record in kinds)


@pytest.mark.parametrize("step", [4, 8])
def test_an_intervention_at_the_end_of_a_window_shows_in_the_next_one_s_shares(data, tmp_path, step):
    run = open_run(params(data, tmp_path))
    drive(run, {step: {"multipliers": {"emoji": 3.0}}})
    allocation = run.allocation()
    assert not allocation.duplicated(["step", "domain"]).any()
    assert allocation["step"].unique().tolist() == [0, 4, 8]
    table = {at: rows.set_index("domain") for at, rows in allocation.groupby("step")}
    assert not table[step]["weight"].equals(table[step - 4]["weight"])  # those of the window that begins here
    expected = effective_shares(table[step]["weight"].to_numpy(), NAMES, {"emoji": 3.0}, {})
    assert table[step]["share"].tolist() == expected.tolist()


class Script:
    """Stands for the commands of a run: interventions by step."""

    def __init__(self, *entries):
        self.entries = list(entries)

    def take(self, step):
        if self.entries and self.entries[0].step == step:
            return self.entries.pop(0)
        return None


def test_by_loss_at_the_end_of_a_window_shows_the_next_one_s_shares_while_the_run_is_paused(catalog):
    trainer = make(catalog)
    left = Intervention(number=2, step=8, steers=True)
    locked = left.model_copy(update={"number": 1, "step": 2, "locks": {"emoji": 1.0}})
    paused = Intervention(number=3, step=8, paused=True)
    trainer.commands = Script(locked, left, paused)
    records = list(trainer.train())
    kinds = [(record["kind"], record["step"]) for record in records]
    at = kinds.index(("allocation", 8))
    assert kinds[at - 1 : at + 2] == [("steering", 8), ("allocation", 8), ("steering", 8)]
    assert kinds.count(("allocation", 8)) == 1  # the window begins with what was said already
    assert records[at]["shares"] == dict(zip(NAMES, trainer.sampler.shares.tolist(), strict=True))
    assert max(records[at]["shares"].values()) < 1


def test_a_learning_rate_that_is_steered_is_resumed_and_replayed(data, tmp_path):
    run = open_run(params(data, tmp_path, run="hand"))
    drive(run, {3: {"rate": 0.5}})
    rates = {record["step"]: record["learning_rate"] for record in run.records("train")}
    assert (rates[3], rates[4], rates[11]) == (0.01, 0.005, 0.005)
    assert str(run.interventions()[0]) == "learning rate ×0.5"
    again = finish(open_run(params(data, tmp_path, run="again", replay="hand")))
    assert_same_state(checkpoint(run), checkpoint(again))
    cut = open_run(params(data, tmp_path, run="cut"))
    drive(cut, {3: {"rate": 0.5}}, until=7)
    assert_same_state(checkpoint(run), checkpoint(finish(open_run(params(data, tmp_path, run="cut")))))


def watched(trainer):
    """The images that were trained, by domain, in their order; filled while the trainer trains."""
    load, trained = trainer._loader, {name: [] for name in NAMES}

    def loader(plan):
        for images, slots in load(plan):
            for name, indices in slots:
                trained[name] += indices.tolist()
            yield images, slots

    trainer._loader = loader
    return trained


@pytest.mark.parametrize("changes", [{}, {"domains_per_batch": 2}, {"sampler": "round_robin"}])
def test_every_image_is_trained_once_per_pass_whatever_is_steered(catalog, changes):
    trainer = make(catalog, steps=40, update_every=10, eval_every=40, **changes)
    factors = [(step, dict(zip(NAMES, factor, strict=True))) for step, factor in (
        (0, (1.0, 2.0, 3.0)), (3, (0.0, 5.0, 1.0)), (4, (3.0, 0.0, 3.0)), (4, (2.0, 1.0, 1.0)), (10, (1.0, 1.0, 9.0)),
        (17, (9.0, 0.1, 1.0)), (25, (0.0, 0.0, 1.0)), (33, (1.0, 1.0, 1.0)),
    )]  # fmt: skip
    steers = [Intervention(number=n, step=s, steers=True, multipliers=m) for n, (s, m) in enumerate(factors)]
    others = [Intervention(number=9, step=step, save=True) for step in (13, 20, 30)]
    entries = sorted([*steers, *others], key=lambda entry: entry.step)
    trainer.commands, trained = Script(*entries), watched(trainer)
    records = list(trainer.train())
    assert sum(map(len, trained.values())) == 40 * 8
    for images in trained.values():
        for start in range(0, len(images), 12):
            part = images[start : start + 12]
            assert len(set(part)) == len(part)
    assert {name: len(images) for name, images in trained.items()} == trainer.images_seen
    windows = {record["step"] for record in records if record["kind"] == "allocation"}
    assert {0, 10, 20, 30} <= windows  # they end where they would have ended


def test_a_domain_without_a_share_gets_no_step_and_one_that_is_locked_at_all_gets_every_one(catalog):
    trainer = make(catalog)
    zero = {"emoji": 0.0, "earth": 0.0}
    trainer.commands = Script(
        Intervention(number=1, step=0, steers=True, multipliers=zero),
        Intervention(number=2, step=6, steers=True, locks={"earth": 1.0}),
    )
    trained = watched(trainer)
    list(trainer.train())
    assert {name: len(images) for name, images in trained.items()} == {"emoji": 0, "flags": 48, "earth": 40}


def test_losses_of_a_window_count_whatever_is_steered_within_it(catalog):
    trainer = make(catalog, log_every=1, steps=8)
    trainer.commands = Script(
        Intervention(number=1, step=2, steers=True, multipliers={"emoji": 3.0}),
        Intervention(number=2, step=3, steers=True, locks={"earth": 0.5}),
    )
    records = list(trainer.train())
    sums, counts = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0)
    for record in records:
        if record["kind"] == "train" and record["step"] <= 4:
            for domain, losses in record["losses"].items():
                sums[domain] += losses["ce_teacher"]
                counts[domain] += 1
    before = np.array(list(records[0]["weights"].values()))
    seen = np.array([counts[name] > 0 for name in NAMES])
    means = np.array([sums[name] / max(1, counts[name]) for name in NAMES])
    expected = np.where(seen, means / means.sum(), before)
    last = [record for record in records if record["kind"] == "allocation"][-1]
    assert last["step"] == 4
    np.testing.assert_allclose(list(last["weights"].values()), expected / expected.sum(), rtol=1e-5)


def test_a_steered_run_ends_in_other_weights(catalog):
    plain, other = make(catalog), make(catalog)
    other.commands = Script(Intervention(number=1, step=2, steers=True, multipliers={"emoji": 3.0}))
    list(plain.train())
    list(other.train())
    assert not same(weights(plain), weights(other))


def test_a_steered_run_has_the_same_weights_whatever_reads_its_images(data, steered, tmp_path):
    run = open_run(params(data, tmp_path, n_workers=2))
    drive(run, SCRIPT)
    assert_same_run(steered, run)


def test_teachers_are_weighted_and_dropped_as_wished_from_the_step_on(taught):
    shares = taught_at(taught)
    for step in (6, 7):
        assert shares[step] == {"one": 1, "two": 1}  # nobody is dropped
    for step in (8, 9):
        assert shares[step] == {"one": 1, "two": 0}  # no weight
    assert all(1 <= sum(shares[step].values()) < 2 for step in (1, 2, 3, 4, 10, 11))
    assert [str(entry) for entry in taught.interventions()] == [
        "teacher two ×3",
        "emoji ×3, teacher two ×3, teachers dropped at 0%",
        "emoji ×3, teacher two ×0, teachers dropped at 0%",
        "emoji ×3",
    ]
    assert checkpoint(taught)["wish"] == dict(Wish(multipliers={"emoji": 3.0}))
    start = json.loads((taught.path / "metrics.jsonl").read_text().splitlines()[0])
    assert start["teachers"] == ["one", "two"]


def test_teachers_alone_leave_the_allocation_and_its_images_as_they_are(data, encoders, tmp_path):
    wishes = {2: {"teachers": {"two": 3.0}}, 5: {"drop_probability": 0.2}, 6: {"teachers": {"two": 0.0}}}
    options = {"log_every": 1, "sampler": "dataset_size"}
    untouched = finish(open_run(taught_params(data, tmp_path, encoders, **options, run="untouched")))
    steered = open_run(taught_params(data, tmp_path, encoders, **options, run="steered"))
    drive(steered, wishes)
    first, second = (run.losses().groupby("step")["domain"].unique().map(list).tolist() for run in (untouched, steered))
    assert first == second
    seen = [[record["images_seen"] for record in run.records("train")] for run in (untouched, steered)]
    assert seen[0] == seen[1]
    assert not untouched.losses().equals(steered.losses())


# Requests


def test_a_validation_that_is_asked_for_is_one_of_the_run_s(data, plain, tmp_path):
    run = open_run(params(data, tmp_path))
    drive(run, {5: {"evaluate": True}, 7: {"evaluate": True}, 10: {"evaluate": True}})
    assert run.validation()["step"].unique().tolist() == [5, 7, 10, 11]
    assert [record["step"] for record in run.records("validation")] == [5, 7, 10, 11]  # none of them twice
    assert_same_training_weights(plain, run)
    assert checkpoint(run)["n_interventions"] == 3


def assert_same_training_weights(first, second):
    for name in ("model", "optimizer", "sampler", "order"):
        assert_same_state(checkpoint(first)[name], checkpoint(second)[name])


@pytest.mark.parametrize("validates", [True, False], ids=["validates", "was validated"])
def test_a_run_that_is_finished_by_hand_is_tested_and_can_be_repeated(data, plain, tmp_path, validates):
    run = open_run(params(data, tmp_path, run="short", **({} if validates else {"eval_every": 6})))
    records = drive(run, {6: {"finish": True}})
    assert run.status == "finished"
    assert records[-1]["kind"] == "end"
    assert run.summary()["steps"] == 6
    assert run.summary()["interventions"] == 1
    assert [record["step"] for record in run.records("validation")] == [5, 6][not validates :]  # at 6 once
    assert run.evaluation()["r_at_1"].notna().all()
    assert "finished before its last step" in str(run.interventions()[-1])
    assert last_step(run.path) == 6
    again = finish(open_run(run.params.model_copy(update={"replay": "short", "run": "again"})))
    assert_same_run(run, again)


def test_a_run_that_was_killed_while_it_was_tested_after_its_end_by_hand_trains_no_more(data, tmp_path, monkeypatch):
    run = open_run(params(data, tmp_path))

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run_module, "save_evaluation", killed)
        drive(run, {5: {"finish": True}})
    assert run.status == "unfinished"
    finish(open_run(run.params))
    assert run.summary()["steps"] == 5
    assert run.records("train")[-1]["step"] == 5


def test_a_validation_that_is_asked_for_counts_for_the_best_and_for_patience(catalog):
    trainer = make(catalog, steps=40, eval_every=4, patience=2)
    scores = iter([3.0, 5.0, 4.0, 4.5, 9.0])
    row = {"embedder": "student", "index": "merged", "domain": "mean"}
    trainer._validate = lambda model: pd.DataFrame([row | {"r_at_1": next(scores)}])
    trainer.commands = Script(*(Intervention(number=s, step=s, evaluate=True) for s in (1, 8, 9)))
    records = [record for record in trainer.train() if record["kind"] == "validation"]
    assert [(record["step"], record["best"]) for record in records] == [(1, True), (4, True), (8, False), (9, False)]
    assert trainer.done
    again = make(catalog, steps=40, eval_every=4, patience=2)
    again.load_state_dict(trainer.state_dict())
    assert list(again.train()) == []


def test_a_validation_that_is_asked_for_is_saved_at_once(catalog):
    trainer = make(catalog, eval_every=100, checkpoint_every=100)
    trainer.commands = Script(Intervention(number=1, step=3, evaluate=True))
    records = [record["kind"] for record in trainer.train() if record["step"] == 3]
    assert records == ["train", "steering", "validation", "checkpoint"]


def test_nothing_more_is_asked_for_once_a_validation_has_ended_the_training(catalog):
    trainer = make(catalog, steps=40, eval_every=4, patience=1)
    scores = iter([3.0, 2.0])
    row = {"embedder": "student", "index": "merged", "domain": "mean"}
    trainer._validate = lambda model: pd.DataFrame([row | {"r_at_1": next(scores)}])
    trainer.commands = Script(Intervention(number=1, step=6, evaluate=True), Intervention(number=2, step=6, stop=True))
    records = list(trainer.train())
    assert records[-1] == {"kind": "checkpoint", "step": 6}
    assert trainer.done


def test_images_are_counted_up_to_the_step_of_an_intervention_however_rarely_is_logged(catalog):
    trainer = make(catalog, log_every=100, eval_every=100, checkpoint_every=100)
    trainer.commands = Script(Intervention(number=1, step=3, steers=True, multipliers={"emoji": 3.0}))
    seen = {r["step"]: sum(r["images_seen"].values()) for r in trainer.train() if r["kind"] == "allocation"}
    assert seen == {0: 0, 3: 24, 4: 32, 8: 64}


def test_a_checkpoint_that_is_asked_for_is_written(data, tmp_path):
    run = open_run(params(data, tmp_path, checkpoint_every=100, eval_every=100))
    drive(run, {7: {"save": True}}, until=9)
    assert checkpoint(run)["step"] == 7
    assert [entry.step for entry in run.interventions() if entry.save] == [7]


@pytest.mark.parametrize("step", [0, 3, 4, 8, 10])
def test_saving_changes_nothing_within_a_window_and_at_its_end(data, plain, tmp_path, step):
    run = open_run(params(data, tmp_path))
    drive(run, {step: {"save": True}})
    assert [(entry.step, str(entry)) for entry in run.interventions()] == [(step, "saved")]
    assert_same_training(plain, run)
    assert plain.losses().equals(run.losses())
    assert plain.allocation().equals(run.allocation())


def test_a_stopped_run_goes_on_to_the_bits_of_one_that_was_not(data, plain, tmp_path):
    run = open_run(params(data, tmp_path, checkpoint_every=100))
    with pytest.raises(RunStoppedError, match=r"stopped after step 7 of 11, .*run the same again to go on"):
        drive(run, {7: {"stop": True}})
    assert run.status == "unfinished"
    assert checkpoint(run)["step"] == 7
    assert run.state().name == "stopped"
    assert "stopped after step 7 of 11 (asked for in its control panel); run it again" in run.state().text
    finish(open_run(params(data, tmp_path, checkpoint_every=100)))
    assert_same_training(plain, run)
    assert not (run.path / "ended.json").exists()
    assert run.state().name == "finished"


def test_a_pause_stops_the_steps_saves_and_costs_no_time(data, plain, tmp_path, monkeypatch):
    run = open_run(params(data, tmp_path, checkpoint_every=100, eval_every=100, run="paused"))
    clock, seen = Clock(monkeypatch, steering, run_module, training), []
    clock.tick = 0.001

    def look_and_resume(nap):
        n_bytes = (run.path / "metrics.jsonl").stat().st_size
        seen.append((run.state().text, n_bytes))
        if nap == 100:
            wait_until(run.last.exists)  # it is written meanwhile
            change_control(run.path, paused=False)

    clock.while_asleep = look_and_resume
    drive(run, {3: {"paused": True}})
    [(text, _)] = set(seen)  # nothing is recorded meanwhile
    assert (len(seen), text) == (100, "paused after step 3 of 11")
    assert 0 < run.summary()["train_seconds"] <= run.summary()["seconds"] < 100 * steering.POLL_SECONDS
    paces = {record["step"]: record["images_per_s"] for record in run.records("train")}
    assert paces[4] > 8 / (100 * steering.POLL_SECONDS)
    assert [(entry.step, str(entry)) for entry in run.interventions()] == [(3, "paused"), (3, "resumed")]
    assert_same_training_weights(plain, run)


def test_a_run_that_was_killed_while_paused_is_not_paused_when_it_goes_on(data, tmp_path, monkeypatch):
    run = open_run(params(data, tmp_path))

    def interrupt(nap):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        Clock(patched, steering).while_asleep = interrupt
        with pytest.raises(KeyboardInterrupt):
            drive(run, {3: {"paused": True}})
    assert run.state().name == "stopped"
    training = open_run(params(data, tmp_path)).train()
    for record in training:
        if record["kind"] == "train":
            assert run.state().name == "training"
            break
    training.close()


def test_what_is_asked_for_after_the_last_step_is_not_said_to_be_done(data, tmp_path):
    run = open_run(params(data, tmp_path))
    drive(run, {11: {"multipliers": {"emoji": 3.0}, "stop": True}})
    assert run.status == "finished"
    assert run.summary()["interventions"] == sum(entry.matters for entry in run.interventions())
    assert not any(entry.stop for entry in run.interventions())


def test_a_control_file_broken_by_hand_does_not_end_the_run(data, plain, tmp_path):
    run = open_run(params(data, tmp_path))
    for record in run.train():
        if record["kind"] == "train" and record["step"] == 4:
            (run.path / "control.json").write_text('{"multipliers": {"emoji": 2.0')
    [refused] = run.records("steering")
    assert refused["step"] == 4
    assert "control.json: " in refused["refused"]
    assert [entry.refused for entry in run.interventions()] == [refused["refused"]]
    assert_same_training(plain, run)


def test_what_is_asked_of_a_run_while_it_loads_is_done_before_its_first_step(data, tmp_path, monkeypatch):
    run = open_run(params(data, tmp_path, steps=3))
    anew = open_run(params(data, tmp_path, steps=3, overwrite=True))
    start = RunWriter.start

    def ask_and_start(writer, *values):
        change_control(run.path, save=True)
        start(writer, *values)

    monkeypatch.setattr(RunWriter, "start", ask_and_start)
    for each in (run, anew):  # the second one is asked as often as the first, whose requests are gone
        finish(each)
        assert [(entry.step, str(entry)) for entry in each.interventions()] == [(0, "saved")]


# What is repeated


@pytest.mark.parametrize("at", [1, 2, 4, 5, 6, 8, 10])
def test_a_steered_run_that_was_interrupted_ends_in_the_same_bits(data, steered, tmp_path, at):
    run = open_run(params(data, tmp_path))
    drive(run, SCRIPT, until=at)
    drive(open_run(params(data, tmp_path)), from_step(at))
    assert_same_run(steered, run)
    assert what_was_done(run) == what_was_done(steered)
    assert run.summary()["interventions"] == 4


@pytest.mark.parametrize("at", [2, 6, 8, 10])
def test_a_run_whose_teachers_are_steered_ends_in_the_same_bits_when_it_is_interrupted(
    data, encoders, taught, tmp_path, at
):
    run = open_run(taught_params(data, tmp_path, encoders, log_every=1))
    drive(run, TEACHING, until=at)
    drive(open_run(run.params), from_step(at, TEACHING))
    assert_same_run(taught, run)
    assert [entry.wish for entry in run.interventions()] == [entry.wish for entry in taught.interventions()]


def test_a_checkpoint_holds_what_was_wished_of_teachers_at_its_step(data, encoders, tmp_path):
    run = open_run(taught_params(data, tmp_path, encoders, log_every=1, checkpoint_every=8, eval_every=100))
    drive(run, TEACHING, until=9)
    wish = dict(Wish(multipliers={"emoji": 3.0}, teachers={"two": 0.0}, drop_probability=0.0))
    assert (checkpoint(run)["step"], checkpoint(run)["wish"]) == (8, wish)
    finish(open_run(run.params))
    assert taught_at(run)[9] == {"one": 1, "two": 0}


def test_a_checkpoint_of_the_version_before_teachers_were_steered_goes_on_to_the_same_bits(data, steered, tmp_path):
    run = open_run(params(data, tmp_path))
    drive(run, SCRIPT, until=7)
    state = checkpoint(run)
    del state["wish"]
    torch.save(state, run.last)
    drive(open_run(params(data, tmp_path)), from_step(7))
    assert_same_run(steered, run)


def test_interventions_after_the_last_checkpoint_come_again_by_themselves(data, tmp_path):
    rare = {"checkpoint_every": 100, "eval_every": 100}
    script = {step: change for step, change in SCRIPT.items() if "evaluate" not in change}
    whole = open_run(params(data, tmp_path / "whole", **rare))
    drive(whole, script)
    run = open_run(params(data, tmp_path / "cut", **rare))
    drive(run, script, until=10)
    assert not run.last.exists()
    log = (run.path / "steering.jsonl").read_bytes()
    finish(open_run(params(data, tmp_path / "cut", **rare)))
    assert (run.path / "steering.jsonl").read_bytes() == log
    assert_same_run(whole, run)


def test_a_new_change_during_the_repeated_part_takes_the_run_another_way(data, tmp_path):
    rare = {"checkpoint_every": 100, "eval_every": 100}
    script = {2: {"multipliers": {"emoji": 3.0}}, 4: {"multipliers": {"emoji": None, "earth": 5.0}}}
    expected = open_run(params(data, tmp_path / "expected", **rare))
    drive(expected, script)
    run = open_run(params(data, tmp_path / "run", **rare))
    drive(run, {2: script[2], 6: {"locks": {"flags": 0.9}}, 8: {"evaluate": False, "locks": {"flags": 0.1}}}, until=9)
    again = {"multipliers": {"emoji": None, "earth": 5.0}, "locks": {"flags": None}}
    drive(open_run(params(data, tmp_path / "run", **rare)), {4: again})
    assert what_was_done(run) == what_was_done(expected)
    assert_same_run(expected, run)


def train_and_die(values, script, at):
    """Train in a process of its own, that is killed when it has logged a step."""
    torch.set_num_threads(1)
    run = open_run(TrainParams(**values))
    training = run.train()
    for record in training:
        if record["kind"] == "train" and record["step"] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        if record["kind"] in ("start", "train") and (change := script.get(record["step"])):
            change_control(run.path, "test", **change)


def test_a_steered_run_that_was_killed_is_lost_and_ends_in_the_same_bits(data, steered, tmp_path):
    run = open_run(params(data, tmp_path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=train_and_die, args=(run.params.model_dump(mode="json"), SCRIPT, 6))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process.close()
    assert checkpoint(run)["step"] == 5
    assert checkpoint(run)["n_interventions"] == 1
    assert [entry.step for entry in run.interventions()] == [2, 5]
    assert run.state().name == "lost"
    assert "without a word after step 6 of 11" in run.state().text
    drive(open_run(params(data, tmp_path)), from_step(6))
    assert_same_run(steered, run)
    assert what_was_done(run) == what_was_done(steered)
    assert run.state().name == "finished"


def test_a_run_whose_teachers_were_steered_and_that_was_killed_ends_in_the_same_bits(data, encoders, taught, tmp_path):
    run = open_run(taught_params(data, tmp_path, encoders, log_every=1))
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=train_and_die, args=(run.params.model_dump(mode="json"), TEACHING, 6))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process.close()
    assert checkpoint(run)["wish"]["teachers"] == {"two": 3.0}
    drive(open_run(run.params), from_step(6, TEACHING))
    assert_same_run(taught, run)


def test_a_checkpoint_of_the_version_before_steering_goes_on_to_the_same_bits(data, plain, tmp_path):
    for at in (7, 9):  # the last checkpoints are those of steps 6, within a window, and of 8, at its end
        folder = tmp_path / str(at)
        run = open_run(params(data, folder, checkpoint_every=2))
        drive(run, {}, until=at)
        state = checkpoint(run)
        for name in ("images_seen", "allocated", "validated", "n_interventions", "wish"):
            del state[name]
        for name in ("stop", "multipliers", "locks"):
            del state["sampler"][name]
        torch.save(state, run.last)
        for name in ("control.json", "control.lock", "ended.json"):
            (run.path / name).unlink()
        records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        without = [{name: v for name, v in record.items() if name not in ("time", "shares")} for record in records]
        (run.path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in without))
        assert run.allocation()["share"].equals(run.allocation()["weight"])
        assert run.interventions() == []
        finish(open_run(params(data, folder, checkpoint_every=2)))
        assert_same_training(plain, run)
        assert plain.losses().equals(run.losses())
        assert plain.allocation().equals(run.allocation())


# Replays


def replay(name, outputs, **values):
    """The run that train.ipynb opens for `-p replay NAME`."""
    cell = "preset: str = 'smoke'\nreplay: str = None\noutputs: str = None"
    given = {"replay": name, "outputs": str(outputs)} | values
    injected = "# Parameters\n" + "\n".join(f"{key} = {value!r}" for key, value in given.items())
    return open_run(presets.from_notebook([cell, injected]))


def test_a_replay_ends_in_the_same_bits(steered, tmp_path):
    shutil.copytree(steered.path, tmp_path / "runs" / "steered")
    again = finish(replay("steered", str(tmp_path)))
    assert again.path.name not in ("steered", "plain")
    assert again.params.replay == "steered"
    assert_same_run(steered, again)
    assert what_was_done(again) == what_was_done(steered)
    assert again.summary()["interventions"] == 4


def test_a_replay_repeats_what_was_wished_of_teachers(taught, tmp_path):
    shutil.copytree(taught.path, tmp_path / "runs" / "taught")
    values = {"replay": "taught", "outputs": str(tmp_path), "run": "again"}
    again = finish(open_run(taught.params.model_copy(update=values)))
    assert_same_run(taught, again)
    assert [entry.wish for entry in again.interventions()] == [entry.wish for entry in taught.interventions()]


def test_a_replay_can_be_killed_and_cannot_be_steered(steered, tmp_path):
    shutil.copytree(steered.path, tmp_path / "runs" / "steered")
    run = replay("steered", str(tmp_path), run="again")
    drive(run, {4: {"multipliers": {"flags": 9.0}}}, until=8)
    [refused] = [record for record in run.records("steering") if record["refused"]]
    assert (refused["step"], refused["steers"]) == (4, False)
    assert "repeats another one's interventions" in refused["refused"]
    assert steering.read_control(run.path).multipliers == steered.interventions()[-1].multipliers  # taken back
    drive(run, {8: {"finish": True}}, until=9)
    assert run.records("train")[-1]["step"] == 9  # it goes as far as the other one
    finish(replay("steered", str(tmp_path), run="again"))
    assert_same_training(steered, run)
    assert run.allocation().equals(steered.allocation())
    assert [entry[0] for entry in what_was_done(run)] == [2, 4, 5, 7, 9]


def test_a_replay_can_itself_be_repeated(steered, tmp_path):
    shutil.copytree(steered.path, tmp_path / "runs" / "steered")
    finish(replay("steered", str(tmp_path), run="second"))
    third = finish(replay("second", str(tmp_path), run="third"))
    assert_same_run(steered, third)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "parameter 'replay': run 'steered' differs in seed: 0 there, 1 here"),
        ({"learning_rate": 0.02}, "parameter 'replay': run 'steered' differs in learning_rate: 0.01 there, 0.02 here"),
        ({"replay": "steerd"}, "no run 'steerd' in .*; did you mean 'steered'?"),
        ({"replay": "unfinished"}, "parameter 'replay': run 'unfinished' is not finished: .*step 11 of 11"),
        ({"replay": "elsewhere"}, "parameter 'replay': run 'elsewhere' was trained on other data"),
        ({"replay": "untouched"}, "parameter 'replay': run 'untouched' has nothing to repeat"),
    ],
)
def test_only_a_finished_run_of_the_same_parameters_and_data_is_repeated(data, steered, tmp_path, changes, message):
    for name in ("steered", "unfinished", "elsewhere", "untouched"):
        shutil.copytree(steered.path, tmp_path / "runs" / name)
    (tmp_path / "runs" / "unfinished" / "summary.json").unlink()
    (tmp_path / "runs" / "untouched" / "steering.jsonl").unlink()
    notes = tmp_path / "runs" / "elsewhere" / "provenance.json"
    notes.write_text(notes.read_text().replace(steered.catalog.fingerprint, "0" * 16))
    run = open_run(params(data, tmp_path, **{"replay": "steered", "run": "mine"} | changes))
    with pytest.raises(UserError, match=message):
        finish(run)
    assert not run.path.exists()


def test_a_run_cannot_replace_itself_by_its_own_replay(data, steered, tmp_path):
    shutil.copytree(steered.path, tmp_path / "runs" / "steered")
    run = open_run(params(data, tmp_path, replay="steered", run="steered", overwrite=True))
    with pytest.raises(UserError, match="parameter 'replay'"):
        next(run.train())
    assert what_was_done(run) == what_was_done(steered)
    assert run.status == "finished"


def test_where_and_how_a_replay_is_computed_may_differ(data, steered, tmp_path):
    shutil.copytree(steered.path, tmp_path / "runs" / "steered")
    run = open_run(params(data, tmp_path, replay="steered", run="mine", log_every=3, checkpoint_every=4))
    training = run.train()
    assert next(training)["kind"] == "start"
    training.close()


# What is going on


def test_a_run_says_what_is_going_on(data, steered, tmp_path):
    run = open_run(params(data, tmp_path))
    assert run.state() == ("new", "not started yet")
    training = run.train()
    for record in training:
        if record["kind"] == "train" and record["step"] == 3:
            break
    assert run.state() == ("training", "training, step 3 of 11")
    training.close()
    assert run.state().name == "stopped"
    assert run.state().text.startswith("stopped after step 3 of 11 (interrupted); run it again to begin anew")
    (run.path / "ended.json").unlink()
    assert run.state().name == "lost"
    assert run.state().text.endswith("killed, or its machine went down; run it again to begin anew")
    assert steered.state() == ("finished", "finished after 11 steps")
    assert {"new", "training", "stopped", "lost", "finished", "paused", "failed", "unreadable"} == set(STATES)


def test_a_run_with_a_checkpoint_says_that_it_goes_on_from_there(steered, tmp_path):
    shutil.copytree(steered.path, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    assert RunFolder(tmp_path / "run").state().text.endswith("run it again to go on from its last checkpoint")


def test_a_run_that_failed_says_why(data, tmp_path):
    run = open_run(params(data, tmp_path, learning_rate=1e30, backbone_learning_rate=1e30))
    with pytest.raises(UserError):
        finish(run)
    assert run.state().name == "failed"
    assert "the last checkpoint is kept" in run.state().text
    assert "failed after step " in run.state().text


def test_a_run_that_another_process_trains_is_being_trained(steered, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(steered.path, folder)
    (folder / "summary.json").unlink()
    work = (
        "import fcntl, sys\nlock = open(sys.argv[1], 'w')\nfcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", work, str(folder / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        assert RunFolder(folder).state() == ("training", "training, step 11 of 11")
        paused = Intervention(number=9, step=11, paused=True)
        with (folder / "steering.jsonl").open("a") as log:
            log.write(paused.model_dump_json() + "\n")
        change_control(folder, paused=True)
        assert RunFolder(folder).state() == ("paused", "paused after step 11 of 11")
        other.kill()
    assert RunFolder(folder).state().name == "lost"


def test_a_pause_before_what_is_yet_to_be_repeated_is_seen(data, tmp_path):
    run = open_run(params(data, tmp_path, checkpoint_every=2))
    drive(run, {9: {"multipliers": {"emoji": 3.0}}}, until=10)
    first = open_run(params(data, tmp_path / "first", checkpoint_every=2))
    drive(first, {}, until=3)
    shutil.copy(run.path / "steering.jsonl", first.path)  # as if it had been killed at once after step 9
    again = open_run(first.params)
    seen = []

    def follow():
        wait_until(lambda: again.state().name == "paused")
        seen.append(again.state().name)
        seen.append(change_control(again.path, paused=False).number)

    person = threading.Thread(target=follow)
    for record in again.train():
        if record["kind"] == "start":
            change_control(again.path, paused=True)
            person.start()
    person.join()
    done = again.interventions()
    assert [(entry.step, entry.paused, entry.steers) for entry in done] == [
        (2, True, False),
        (2, False, False),
        (9, False, True),
    ]
    assert seen == ["paused", done[1].number]
    assert again.status == "finished"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("params.yaml", "- none"),
        ("params.yaml", "steps: many"),
        ("metrics.jsonl", "no record\n"),
        ("metrics.jsonl", "{}\n"),
        ("steering.jsonl", "no intervention\n"),
        ("summary.json", "{"),
        ("summary.json", "{}"),
    ],
)
def test_a_run_with_a_broken_file_is_unreadable_and_names_it(steered, tmp_path, name, content):
    shutil.copytree(steered.path, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    state = RunFolder(tmp_path / "run").state()
    assert state.name == "unreadable"
    assert name in state.text or "parameter 'steps'" in state.text


@pytest.mark.parametrize("content", ["[]", "{", '{"kind": 3}', '"stopped"', '{"kind": "odd", "reason": ""}'])
def test_a_run_whose_end_cannot_be_read_is_lost(steered, tmp_path, content):
    shutil.copytree(steered.path, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "ended.json").write_text(content)
    assert RunFolder(tmp_path / "run").state().name == "lost"


@pytest.mark.parametrize("content", ["{", "[]", "[{}]", "{}", "[[1]]", "3"])
def test_a_provenance_that_is_none_is_named(steered, tmp_path, content):
    shutil.copytree(steered.path, tmp_path / "run")
    (tmp_path / "run" / "provenance.json").write_text(content)
    with pytest.raises(UserError, match=r"provenance\.json: not a run's provenance"):
        RunFolder(tmp_path / "run").provenance()


@pytest.mark.parametrize("line", ["[1]", "{}", "3", '{"kind": "train"}', '{"kind": "train", "step": null}'])
def test_a_record_that_is_none_is_named_with_its_line(steered, tmp_path, line):
    shutil.copytree(steered.path, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("r+") as file:
        content = file.read()
        file.seek(0)
        file.write(line + "\n" + content)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: not a record"):
        RunFolder(tmp_path / "run").records("train")


@pytest.mark.parametrize("length", [10, 20_000, 300_000])
def test_the_last_step_is_found_behind_lines_of_any_length(tmp_path, length):
    file = tmp_path / "metrics.jsonl"
    assert last_step(tmp_path) == 0
    file.write_bytes(b"")
    assert last_step(tmp_path) == 0
    lines = [json.dumps({"kind": "train", "step": step, "table": "x" * length}) + "\n" for step in (1, 2, 3)]
    file.write_text("".join(lines))
    assert last_step(tmp_path) == 3
    for cut in (1, length // 2, length):
        file.write_text("".join(lines)[:-cut])
        assert last_step(tmp_path) == 2
    file.write_text(lines[0][:-1])
    assert last_step(tmp_path) == 0


@pytest.mark.parametrize("nap", [1, 3])
def test_asking_for_the_state_while_a_run_starts_does_not_make_it_fail(data, tmp_path, monkeypatch, nap):
    run = open_run(params(data, tmp_path))
    run.path.mkdir(parents=True)
    (run.path / "lock").touch()
    with (run.path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as whoever asks does

        def release(number):
            if number == nap:
                fcntl.flock(lock, fcntl.LOCK_UN)

        clock = Clock(monkeypatch, files)
        clock.while_asleep = release
        RunWriter(run).close()
    assert len(clock.naps) == nap


def test_a_run_that_somebody_always_asks_about_starts_and_finishes(data, tmp_path):
    run, over = open_run(params(data, tmp_path, steps=3)), threading.Event()
    names = set()

    def ask():
        while not over.wait(0.001):
            names.add(run.state().name)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: "new" in names)
        for record in run.train():
            if record["kind"] == "start":
                wait_until(lambda: "training" in names)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert names <= {"new", "training", "lost", "finished"}
    assert run.status == "finished"


def test_the_latest_run_is_the_one_that_trains_or_else_the_one_that_wrote_last(steered, tmp_path):
    home = tmp_path / "runs"
    with pytest.raises(UserError, match="parameter 'run': found 'latest', but there is no run in"):
        find_run("latest", RUN, str(tmp_path))
    for name, age in (("old", 300), ("new", 100), ("older", 500)):
        shutil.copytree(steered.path, home / name)
        os.utime(home / name / "metrics.jsonl", (time.time() - age,) * 2)
    assert find_run("latest", RUN, str(tmp_path)).path.name == "new"
    assert find_run("old", RUN, str(tmp_path)).path.name == "old"
    with pytest.raises(UserError, match="parameter 'run': no run 'odl' in .*did you mean 'old'?"):
        find_run("odl", RUN, str(tmp_path))
    with (home / "older" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert find_run("latest", RUN, str(tmp_path)).path.name == "older"


# What a run that went another way must not keep


def test_the_best_model_of_a_way_that_was_left_is_not_kept(data, tmp_path):
    run = open_run(params(data, tmp_path, eval_every=5, checkpoint_every=5))
    training = run.train()
    for record in training:
        if record["kind"] == "train" and record["step"] == 7:
            change_control(run.path, evaluate=True)
        if record["kind"] == "validation" and record["step"] == 7:
            break  # killed before the checkpoint that knows of this validation
    if record["best"]:
        assert (run.path / "checkpoints" / "next.pt").exists()
    else:  # make it the best, so that the test holds whatever this tiny model finds
        torch.save(run.load_model_state() | {"step": 7, "r_at_1": 99.0}, run.path / "checkpoints" / "next.pt")
    training.close()
    change_control(run.path, multipliers={"emoji": 0.0})
    finish(open_run(run.params))
    validated = dict(zip(run.validation()["step"], run.validation()["r_at_1"], strict=True))
    assert 7 not in validated
    assert run.summary()["best_step"] in validated
    assert not (run.path / "checkpoints" / "next.pt").exists()


def test_a_best_model_that_the_checkpoint_knows_is_kept(data, plain, tmp_path):
    shutil.copytree(plain.path, tmp_path / "runs" / "plain")
    run = open_run(plain.params.model_copy(update={"outputs": str(tmp_path)}))
    (run.path / "summary.json").unlink()
    state = checkpoint(run)
    best = run.load_model_state() | {"step": state["validated"], "r_at_1": state["best"]}
    torch.save(best, run.best.with_name("next.pt"))  # killed between the two files
    run.best.unlink()
    finish(run)
    assert run.summary()["best_step"] == state["validated"]
    assert run.evaluation().equals(plain.evaluation())


def test_muting_all_that_has_a_share_is_refused_and_the_run_goes_on(data, tmp_path):
    shares = {"emoji": 1.0, "flags": 1.0, "earth": 0.0}
    run = open_run(params(data, tmp_path, sampler="fixed", fixed_shares=shares))
    drive(run, {3: {"multipliers": {"emoji": 0.0, "flags": 0.0}}})
    [entry] = run.interventions()
    assert "no domain is left to train" in entry.refused
    assert run.state().name == "finished"


def test_a_muted_domain_keeps_its_weight_until_it_is_let_go(data, tmp_path):
    run = open_run(params(data, tmp_path, update_every=2))
    drive(run, {2: {"multipliers": {"emoji": 0.0}}, 8: {"multipliers": {"emoji": None}}})
    table = run.allocation().pivot(index="step", columns="domain")
    muted = table.loc[4:7]
    assert muted["weight"]["emoji"].nunique() == 1
    assert muted["weight"]["emoji"].iloc[0] > 0.2
    assert (muted["share"]["emoji"] == 0).all()
    assert table["weight"].sum(axis=1).to_numpy() == pytest.approx(1)
    assert table.loc[8]["share"]["emoji"] == pytest.approx(table.loc[8]["weight"]["emoji"])


def test_several_changes_at_a_step_leave_one_allocation_of_it(data, tmp_path):
    run = open_run(params(data, tmp_path))
    waits = threading.Event()

    def steer_while_paused():
        while run.state().name != "paused" and not waits.wait(0.01):
            pass
        for factor in (2.0, 3.0):
            number = change_control(run.path, multipliers={"emoji": factor}).number
            while run.interventions()[-1].number < number and not waits.wait(0.01):
                pass
        change_control(run.path, paused=False)

    thread = threading.Thread(target=steer_while_paused, daemon=True)
    thread.start()
    drive(run, {3: {"paused": True}})
    waits.set()
    thread.join()
    table = run.allocation()
    assert not table.duplicated(["step", "domain"]).any()
    found = table[table["step"] == 3].set_index("domain")
    weights, names = found["weight"].to_numpy(), list(found.index)
    assert found["share"].to_numpy() == pytest.approx(effective_shares(weights, names, {"emoji": 3.0}, {}))
