"""Runs in their folders: killed, resumed, repeated, refused."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress

import pytest
import torch
from torch.utils import tensorboard

from tests.helpers.catalogs import write_image_folder, write_uned_tree
from tests.helpers.runs import assert_same_state, checkpoint, finish
from tests.helpers.training import SMALL
from tests.helpers.waiting import SECONDS, wait_until
from udonlib import __main__ as program
from udonlib import files
from udonlib.data.decoding import JpegDecoder
from udonlib.errors import UserError
from udonlib.models import processors
from udonlib.params import TrainParams
from udonlib.presets import EvaluateParams
from udonlib.runs import checkpoints
from udonlib.runs import run as run_module
from udonlib.runs.evaluations import find_source
from udonlib.runs.folder import RunFolder
from udonlib.runs.run import load_run, open_run
from udonlib.runs.watch import Watch
from udonlib.runs.writer import RunWriter
from udonlib.training.learner import Learner
from udonlib.training.steering import change_control


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_uned_tree(tmp_path_factory.mktemp("data"), index_of="flags")


def params(root, outputs, **changes):
    return TrainParams(**SMALL | {"data": str(root), "outputs": str(outputs), "n_threads": 1} | changes)


def test_a_run_leaves_everything_that_its_readers_need(data, tmp_path):
    run = finish(open_run(params(data, tmp_path)))
    assert run.status == "finished"
    assert set(run.evaluation()["embedder"]) == {"student", "teacher", "features", "pixels"}
    assert {"r_at_1_low", "r_at_1_high"} <= set(run.evaluation())
    assert run.losses()["step"].max() == 11
    assert run.allocation().groupby("step")["weight"].sum().round(9).eq(1).all()
    assert run.validation()["step"].unique().tolist() == [5, 10, 11]
    assert run.summary()["images"] == 88
    assert list((run.path / "tensorboard").glob("events*"))
    assert run.provenance()[0]["data_fingerprint"] == run.catalog.fingerprint
    assert {n.embedder for n in run.neighbours()} == {"student", "teacher"}
    loaded = load_run(run.path.name, str(tmp_path))
    assert loaded.params.steps == 11
    assert loaded.evaluation().equals(run.evaluation())
    json.loads((run.path / "evaluation.json").read_text())


def test_jpegs_decoded_where_the_model_trains_give_the_same_weights(tmp_path, monkeypatch):
    """On a CPU the other decoder gives the same pixels; that it is asked is seen by what it is given."""
    pytest.importorskip("nvidia.nvimgcodec", reason="nvimgcodec is made for Linux and Windows")
    data, n_files = write_uned_tree(tmp_path / "jpegs", image_format="JPEG"), []
    original = JpegDecoder.__call__

    def noting(self, files):
        n_files.append(len(files))
        return original(self, files)

    monkeypatch.setattr(JpegDecoder, "__call__", noting)
    run = finish(open_run(params(data, tmp_path)))
    assert not n_files
    other = finish(open_run(params(data, tmp_path, decoder="nvimgcodec")))
    assert other.path != run.path
    assert len(n_files) == run.params.steps
    assert all(n_files)
    assert_same_state(checkpoint(run)["model"], checkpoint(other)["model"])


def test_a_finished_run_is_shown_and_not_trained_again(data, tmp_path):
    run = finish(open_run(params(data, tmp_path)))
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    assert [record["kind"] for record in open_run(params(data, tmp_path)).train()] == ["end"]
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()} == before


def test_a_run_of_other_parameters_is_not_overwritten_unless_asked(data, tmp_path):
    finish(open_run(params(data, tmp_path, run="mine")))
    with pytest.raises(UserError, match=r"run 'mine' exists and differs in scale: 16.0 there, 20.0 here"):
        open_run(params(data, tmp_path, run="mine", scale=20.0))
    run = finish(open_run(params(data, tmp_path, run="mine", scale=20.0, overwrite=True)))
    assert run.params.scale == 20.0
    assert len(run.provenance()) == 1


def test_a_run_keeps_the_precision_that_it_began_with(data, tmp_path, monkeypatch):
    """What `auto` came to is part of the run: on another processor it goes on in the same, and says that it is slow."""
    monkeypatch.setattr(processors, "multiplies_bfloat16", lambda device: True)
    first = open_run(params(data, tmp_path, precision="auto", check_data="skip"))
    records = first.train()
    for record in records:
        if record["kind"] == "checkpoint":
            break
        assert not record.get("notices")
    records.close()
    monkeypatch.setattr(processors, "multiplies_bfloat16", lambda device: False)
    moved = open_run(params(data, tmp_path, precision="auto", check_data="skip"))
    assert moved.path == first.path
    assert moved.params.precision == RunFolder(first.path).params.precision == "bfloat16"
    start, *_ = moved.train()
    assert "'bfloat16' is slow here" in start["notices"][0]
    assert open_run(params(data, tmp_path, precision="auto", seed=1)).params.precision == "float32"
    assert load_run(first.path.name, str(tmp_path)).params.precision == "bfloat16"


def test_an_interrupted_run_goes_on_to_the_same_bits(data, tmp_path):
    whole = finish(open_run(params(data, tmp_path / "whole")))
    cut = open_run(params(data, tmp_path / "cut"))
    records = cut.train()
    for record in records:
        if record["kind"] == "checkpoint":
            break
    records.close()
    assert cut.status == "unfinished"
    start, *_ = open_run(params(data, tmp_path / "cut")).train()
    assert start["best"] == [
        (r["step"], r["r_at_1"]) for r in cut.records("validation") if r["best"] and r["step"] <= 3
    ]
    assert_same_state(checkpoint(whole), checkpoint(cut))
    assert whole.evaluation().equals(cut.evaluation())
    assert whole.losses().equals(cut.losses())
    assert [entry["from_step"] for entry in cut.provenance()] == [0, 3]


def train(values, connection):
    """Train in a process of its own, and tell of each record."""
    torch.set_num_threads(1)
    try:
        for record in open_run(TrainParams(**values)).train():
            connection.send(record["kind"])
    except UserError as error:
        connection.send(str(error))


def test_a_run_killed_at_ten_random_moments_ends_in_the_same_bits(data, tmp_path):
    changes = {"steps": 60, "checkpoint_every": 1, "eval_every": 30, "run": "killed"}
    whole = finish(open_run(params(data, tmp_path / "whole", **changes)))
    victim = open_run(params(data, tmp_path / "victim", **changes))
    values = victim.params.model_dump(mode="json")
    # Processes of a server that has imported everything: a fork of this one would inherit PyTorch's used engine.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    generator = random.Random(0)

    def start():
        ours, theirs = context.Pipe()
        process = context.Process(target=train, args=(values, theirs))
        process.start()
        theirs.close()
        assert ours.recv() == "start"
        return process, ours

    for _ in range(10):
        process, messages = start()
        # Checkpoints take a good part of this run's time, so some of the moments lie within their writing.
        for _ in range(generator.randrange(1, 7)):
            messages.recv()
        time.sleep(generator.random() * 0.03)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        messages.close()
        process.close()
    assert victim.status == "unfinished"
    process, messages = start()
    process.join()
    assert process.exitcode == 0
    messages.close()
    process.close()
    assert_same_state(checkpoint(whole), checkpoint(victim))
    assert_same_state(whole.load_model_state(), victim.load_model_state())
    assert whole.losses().equals(victim.losses())
    assert whole.evaluation().equals(victim.evaluation())
    assert len(victim.provenance()) == 11
    assert not list(victim.path.rglob("*.tmp"))


def test_two_processes_do_not_train_one_run(data, tmp_path):
    first = open_run(params(data, tmp_path)).train()
    next(first)
    with pytest.raises(UserError, match="is being trained by another process"):
        next(open_run(params(data, tmp_path)).train())
    first.close()


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    data = write_uned_tree(tmp_path / "data")
    records = open_run(params(data, tmp_path)).train()
    for record in records:
        if record["kind"] == "checkpoint":
            break
    records.close()
    finish(open_run(params(data, tmp_path, run="finished")))
    file = data / "info_files" / "flags" / "train.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:-1]))
    with pytest.raises(UserError, match=r"the data at .* has changed since it began"):
        next(open_run(params(data, tmp_path)).train())
    with pytest.raises(UserError, match=r"the data at .* has changed since it began"):
        load_run("finished", str(tmp_path)).neighbours()


def test_nothing_is_written_before_everything_is_checked(data, tmp_path):
    outputs = tmp_path / "outputs"
    for wrong in ({"backbone": "test_resnot"}, {"domains": "emoji,flagz"}, {"device": "cuda"}, {"data": "nowhere"}):
        with pytest.raises(UserError):
            finish(open_run(params(data, outputs, **wrong)))
    assert not outputs.exists()


def test_a_diverged_run_keeps_its_last_good_checkpoint(data, tmp_path, monkeypatch):
    step = Learner.step

    def diverging(self, number, images, parts, slots):
        if number == 6:
            for weights in self.model.parameters():
                weights.data.fill_(float("nan"))
        return step(self, number, images, parts, slots)

    monkeypatch.setattr(Learner, "step", diverging)
    run = open_run(params(data, tmp_path, checkpoint_every=1, log_every=1))
    with pytest.raises(UserError, match=r"step 7: .*the last checkpoint is kept"):
        finish(run)
    state = checkpoint(run)
    assert state["step"] == 6
    assert all(value.isfinite().all() for value in state["model"].values() if value.is_floating_point())
    assert run.status == "unfinished"


@pytest.mark.parametrize("rate", [1e4, 1e12])
def test_a_run_that_diverges_before_a_validation_names_rate_warm_up_and_clipping(data, tmp_path, rate):
    changes = {"learning_rate": rate, "backbone_learning_rate": rate, "eval_every": 2, "steps": 6}
    with pytest.raises(UserError, match=r"step \d+: .*Lower 'learning_rate' .*'warmup_steps', or set 'max_grad_norm'"):
        finish(open_run(params(data, tmp_path, **changes)))


def test_bad_images_are_counted_in_the_summary(tmp_path):
    data = write_uned_tree(tmp_path / "data")
    bad = next((data / "images" / "flags").iterdir())
    bad.write_bytes(b"no image")
    run = finish(open_run(params(data, tmp_path, on_bad_image="skip")))
    assert f"flags/{bad.name}" in run.summary()["skipped_images"]


def test_broken_data_is_refused_before_anything_is_written_or_trained(tmp_path):
    data = write_uned_tree(tmp_path / "data")
    cut = data / "images" / "flags" / "0007_001.png"  # a test image: training would not meet it
    cut.write_bytes(cut.read_bytes()[:-40])
    run = open_run(params(data, tmp_path / "outputs"))
    with pytest.raises(UserError, match=r"broken.*\n.*: 1 \(flags/0007_001.png: cannot be decoded"):
        next(run.train())
    assert not run.path.exists()
    start = next(open_run(params(data, tmp_path / "outputs", check_data="warn")).train())
    assert "data check: broken. images that cannot be read: 1; checked" in start["notices"][0]
    assert next(open_run(params(data, tmp_path / "outputs", check_data="skip")).train())["notices"] == []
    training = open_run(params(data, tmp_path / "outputs", on_bad_image="skip", run="skips"))
    assert training.data_check is not None
    with pytest.raises(UserError, match="flags/0007_001.png.*; on_bad_image='skip' leaves such images out"):
        finish(open_run(params(data, tmp_path / "outputs", check_data="skip", overwrite=True)))


def test_doubts_about_the_data_are_said_at_the_start_and_stop_nothing(tmp_path):
    data = write_uned_tree(tmp_path / "data", sizes={"train": (4, 3, 5), "val": (2, 3), "test": (3, 2, 1)})
    run = open_run(params(data, tmp_path))
    notices = next(run.train())["notices"]
    assert [notice.split("; checked")[0] for notice in notices] == [
        "data check: usable, with warnings. test queries without a positive: 2"
    ]


def test_a_finished_run_needs_no_check_of_its_data(data, tmp_path, monkeypatch):
    finish(open_run(params(data, tmp_path)))
    monkeypatch.setattr("udonlib.runs.run.check_quickly", None)
    again = open_run(params(data, tmp_path))
    assert again.data_check is None
    assert [record["kind"] for record in again.train()] == ["end"]


def test_more_time_is_given_to_the_check_of_more_data(data, tmp_path, monkeypatch):
    seconds = []
    monkeypatch.setattr("udonlib.runs.run.check_quickly", lambda catalog, limit, n_threads: seconds.append(limit))
    for steps in (10, 10**6, 10**8):
        with pytest.raises(AttributeError):  # no check comes back
            _ = open_run(params(data, tmp_path, steps=steps, batch_size=10)).data_check
    assert seconds == [3.0, 10.0, 60.0]


def test_a_resumed_run_says_what_its_best_validation_was_and_how_to_go_on(data, tmp_path):
    run = open_run(params(data, tmp_path, checkpoint_every=2, overwrite=True))
    training = run.train()
    for record in training:
        if record["kind"] == "checkpoint" and record["step"] == 6:
            break
    training.close()
    assert "run it again without overwrite to go on from its last checkpoint" in run.state().text
    start = next(open_run(params(data, tmp_path, checkpoint_every=2)).train())
    [validation] = run.records("validation")
    assert start["best"] == [(5, validation["r_at_1"])]


@pytest.fixture
def interruptible():
    """Interrupts interrupt, also where a shell began the tests in its background, whose jobs ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_waits_for_a_checkpoint_that_is_being_written(data, tmp_path, monkeypatch):
    run = open_run(params(data, tmp_path, checkpoint_every=3))
    save, handler = torch.save, signal.getsignal(signal.SIGINT)

    def interrupted(state, file):
        signal.raise_signal(signal.SIGINT)
        save(state, file)

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finish(run)
    assert signal.getsignal(signal.SIGINT) is handler
    assert run.state().text.startswith("stopped after step 3 of 11 (interrupted)")
    assert checkpoint(run)["step"] == 3
    monkeypatch.undo()
    assert finish(run).status == "finished"


@pytest.mark.usefixtures("interruptible")
def test_a_run_that_is_interrupted_as_its_saving_thread_starts_waits_for_that_thread(data, tmp_path, monkeypatch):
    run = open_run(params(data, tmp_path, checkpoint_every=3))
    save, begin = torch.save, threading.Thread.start

    def interrupted(thread):
        begin(thread)
        if thread.name.startswith("udonlib-saving"):
            signal.raise_signal(signal.SIGINT)

    def slow(state, file):
        time.sleep(0.3)
        save(state, file)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    monkeypatch.setattr(torch, "save", slow)
    with pytest.raises(KeyboardInterrupt):
        finish(run)
    assert checkpoint(run)["step"] == 3


def test_a_run_may_lie_anywhere(data, tmp_path):
    run = finish(open_run(params(data, tmp_path)))
    elsewhere = tmp_path / "moved" / "mine"
    shutil.copytree(run.path, elsewhere)
    loaded = load_run(str(elsewhere))
    assert (loaded.path, loaded.status) == (elsewhere, "finished")
    assert loaded.load_model_state()["step"] == run.load_model_state()["step"]


def test_a_run_whose_folder_of_results_has_moved_looks_for_others_beside_itself(data, tmp_path):
    run = finish(open_run(params(data, tmp_path / "before", steps=1)))
    (tmp_path / "before").rename(tmp_path / "now")
    loaded = load_run(str(tmp_path / "now" / "runs" / run.path.name))
    assert loaded.params.outputs == str(tmp_path / "now")


def test_a_process_that_starts_removes_what_another_left_half_written_but_not_what_a_panel_writes(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("control.json.1.tmp", "summary.json.2.tmp", "checkpoints/last.pt.3.tmp"):
        (tmp_path / name).touch()
    RunWriter(RunFolder(tmp_path)).close()
    assert [path.name for path in tmp_path.rglob("*.tmp")] == ["control.json.1.tmp"]


def test_domains_may_have_names_that_libraries_take_for_something_else(tmp_path):
    names = ["children", "a.b", "NA", "007", "training"]
    write_image_folder(tmp_path / "data", names, n_classes=3, n_images=2)
    run = finish(open_run(params(tmp_path / "data", tmp_path, steps=6, eval_every=3, checkpoint_every=2)))
    assert set(run.evaluation()["domain"]) == {*names, "mean"}
    assert_same_state(load_run(str(run.path)).load_model().state_dict(), run.load_model().state_dict())
    found = find_source(EvaluateParams(run=str(run.path))).load_model()
    assert set(found.teachers) == set(names)


def test_an_unknown_run_is_answered_with_the_nearest(data, tmp_path):
    finish(open_run(params(data, tmp_path, run="first", steps=1)))
    with pytest.raises(UserError, match=r"no run 'frist'.*did you mean 'first'"):
        load_run("frist", str(tmp_path))


def test_curves_that_go_on_forget_what_came_after_the_last_record_that_is_kept(data, tmp_path, monkeypatch):
    records = [json.dumps({"kind": "train", "step": step}) + "\n" for step in (0, 4, 8)]
    (tmp_path / "metrics.jsonl").write_text("".join(records))
    purged = []

    class Noted(tensorboard.SummaryWriter):
        def __init__(self, folder, purge_step):
            purged.append(purge_step)
            super().__init__(folder, purge_step=purge_step)

    monkeypatch.setattr(tensorboard, "SummaryWriter", Noted)
    for n_records in (2, 0):
        writer = RunWriter(RunFolder(tmp_path))
        writer.start(params(data, tmp_path), {"data_fingerprint": ""}, n_records)
        writer.close()
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(records[:n_records])
    assert purged == [5, None]


@pytest.fixture(scope="module")
def unfinished(data, tmp_path_factory):
    """A run that was stopped after step 8 of 11, with checkpoints of steps 6 and 8 and a validation at 5."""
    outputs = tmp_path_factory.mktemp("unfinished")
    run = open_run(params(data, outputs, checkpoint_every=2, run="stopped"))
    training = run.train()
    for record in training:
        if record["kind"] == "checkpoint" and record["step"] == 8:
            break
    training.close()
    return run


@pytest.fixture
def stopped(unfinished, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(unfinished.path, tmp_path / "runs" / "stopped")
    return open_run(unfinished.params.model_copy(update={"outputs": str(tmp_path)}))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The same run, not stopped."""
    return finish(open_run(params(data, tmp_path_factory.mktemp("whole"), checkpoint_every=2, run="stopped")))


def spoil(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x55
    file.write_bytes(content)


def cut_records(file):
    """Cut the last record that the last checkpoint counts."""
    file.write_bytes(file.read_bytes()[:-20])


DAMAGE = {
    "a bit": (lambda run: spoil(run.last), "last.pt: damaged"),
    "cut": (lambda run: run.last.write_bytes(run.last.read_bytes()[:5000]), "last.pt: damaged"),
    "gone": (lambda run: run.last.unlink(), "last.pt: missing"),
    "records": (
        lambda run: cut_records(run.path / "metrics.jsonl"),
        r"last.pt: it counts \d+ records, metrics.jsonl holds",
    ),
}


@pytest.mark.parametrize(("harm", "said"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_run_goes_on_from_the_checkpoint_before_to_the_same_bits(stopped, whole, harm, said):
    harm(stopped)
    start, *_ = stopped.train()
    assert re.search(said, start["notices"][0])
    assert "the run goes on from step 6" in start["notices"]
    assert start["step"] == stopped.provenance()[-1]["from_step"] == 6
    assert stopped.provenance()[-1]["damaged"] == start["notices"][:2]
    assert_same_state(checkpoint(whole), checkpoint(stopped))
    assert_same_state(whole.load_model_state(), stopped.load_model_state())
    for kind in ("train", "validation", "allocation"):
        steps = [[record["step"] for record in run.records(kind)] for run in (whole, stopped)]
        assert steps[0] == steps[1]
    assert whole.evaluation().equals(stopped.evaluation())


@pytest.mark.parametrize("at", ["train", "validation", "test"])
def test_sigterm_leaves_a_checkpoint_and_ends_the_process_and_the_run_goes_on_to_the_same_bits(
    data, whole, tmp_path, capsys, monkeypatch, at
):
    """At any step, in a validation after it, and in the final test, which have none of their own."""
    run = open_run(params(data, tmp_path, checkpoint_every=2, run="stopped"))
    if at != "train":
        evaluate_model = run_module.evaluate_model

        def evaluate(model, catalog, p, subset, *others, **more):
            if subset == {"validation": "val", "test": "test"}[at]:
                signal.raise_signal(signal.SIGTERM)
            return evaluate_model(model, catalog, p, subset, *others, **more)

        monkeypatch.setattr(run_module, "evaluate_model", evaluate)
    with pytest.raises(SystemExit) as end:
        for record in run.train():
            if record["kind"] == "allocation" and record["step"] == 8 and at == "train":
                signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 128 + signal.SIGTERM
    assert "as SIGTERM asked for; run the same again to go on" in capsys.readouterr().err
    assert run.state().text.endswith("(by SIGTERM); run it again to go on from its last checkpoint")
    monkeypatch.undo()
    step = {"train": 9, "validation": 4, "test": 11}[at]
    assert checkpoint(run)["step"] == step
    start, *_ = run.train()
    assert start["step"] == step
    assert_same_state(
        {**checkpoint(whole), "n_records": 0},
        {**checkpoint(run), "n_records": 0},  # the stop has a record
    )
    assert whole.evaluation().equals(run.evaluation())


def test_images_that_vanish_while_a_run_trains_end_it_by_their_name_or_are_left_out(tmp_path):
    def train(root, **changes):
        write_uned_tree(root)
        run = open_run(params(root, tmp_path, cache_images=False, check_data="skip", checkpoint_every=2, **changes))
        for record in run.train():
            if record["kind"] == "checkpoint" and record["step"] == 4:
                for file in (root / "images" / "emoji").glob("000[01]_*.png"):
                    file.unlink()
        return run

    with pytest.raises(UserError, match=r"emoji/000._00.\.png.*on_bad_image='skip' leaves such images out"):
        train(tmp_path / "one", run="ends")
    ended = RunFolder(tmp_path / "runs" / "ends")
    assert ended.state().name == "failed"
    assert "emoji/000" in ended.state().text
    assert checkpoint(ended)["step"] >= 4
    assert ended.checkpoint().problems == []
    left_out = train(tmp_path / "two", run="skips", on_bad_image="skip").summary()["skipped_images"]
    assert left_out
    assert all(path.startswith("emoji/000") for path in left_out)


def test_a_clock_that_is_set_back_changes_nothing_and_does_not_confuse_who_watches(data, whole, tmp_path, monkeypatch):
    now = [1.7e9]

    def back():
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", back)
    run = open_run(params(data, tmp_path, checkpoint_every=2, run="stopped"))
    watch = Watch(run)
    lines = []
    for record in run.train():
        os.utime(run.path / "control.json", (now[0], now[0]))
        if record["kind"] == "train" and record["step"] == 6:
            change_control(run.path, save=True)
        watch.update()
        lines.append(watch.progress.line())
    monkeypatch.undo()
    assert_same_state(
        {**checkpoint(whole), "n_records": 0},
        {**checkpoint(run), "n_records": 0},  # saving has a record
    )
    assert whole.evaluation().equals(run.evaluation())
    assert [entry.save for entry in run.interventions()] == [True]
    after = Watch(run)
    after.update()
    assert "finished in" in after.progress.line()
    assert not any("-" in line for line in lines)
    assert 0 <= run.summary()["train_seconds"] < 3600


def test_a_torn_end_of_the_records_is_cut_and_no_record_is_glued_to_it(stopped, whole):
    with (stopped.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "train", "step": 9, "los')
    start, *_ = stopped.train()
    assert start["step"] == 8
    assert "damaged" not in stopped.provenance()[-1]  # nothing is lost: the checkpoint does not count it
    said = r"metrics.jsonl: what follows record \d+ cannot be read and is left out \(33 bytes\)"
    assert re.search(said, start["notices"][0])
    assert whole.losses().equals(stopped.losses())


def test_what_a_checkpoint_counts_is_on_the_disk_before_it(data, tmp_path, monkeypatch):
    written, fsync = [], os.fsync

    def noted(descriptor):
        written.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    training = open_run(params(data, tmp_path)).train()
    for record in training:
        if record["kind"] == "checkpoint":
            break
    training.close()
    names = [os.path.basename(path).split(".pt.")[0] for path in written]
    assert names[names.index("last") - 1] == "metrics.jsonl"


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew_without_a_word(stopped):
    shutil.rmtree(stopped.path / "checkpoints")
    with pytest.raises(UserError, match=r"last.pt: missing, though the run came to step 8: put back a copy, or begin"):
        finish(stopped)


def test_where_no_checkpoint_is_whole_each_is_named_and_nothing_is_changed(stopped):
    for name in ("last.pt", "previous.pt"):
        spoil(stopped.last.with_name(name))
    before = (stopped.path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"last.pt: damaged.*previous.pt: damaged.*Nothing is left to go on from"):
        finish(stopped)
    assert (stopped.path / "metrics.jsonl").read_bytes() == before


def test_a_missing_best_model_is_said_before_training_and_chosen_anew(stopped):
    stopped.best.unlink()
    start, *_ = finished = list(stopped.train())
    assert "best.pt: missing" in start["notices"][0]
    assert finished[-1]["best_step"] in (10, 11)


def test_a_best_model_that_was_lost_after_the_last_step_is_found_by_validating(data, tmp_path):
    run = open_run(params(data, tmp_path))
    training = run.train()
    for record in training:
        if record["kind"] == "checkpoint" and record["step"] == 11:
            break
    training.close()
    for file in run.best.parent.glob("*best.pt"):
        file.unlink()
    run.last.with_name("previous.pt").unlink()
    assert finish(run).summary()["best_step"] == 11


def test_a_damaged_best_model_of_a_finished_run_is_named_with_the_way_out(whole, tmp_path):
    shutil.copytree(whole.path, tmp_path / "runs" / "damaged")
    run = load_run("damaged", str(tmp_path))
    spoil(run.best)
    with pytest.raises(UserError, match=r"best.pt: damaged.*evaluate.ipynb -p checkpoint .*last.pt"):
        run.load_model()


def test_interventions_that_a_checkpoint_counts_and_the_log_lacks_are_noticed(stopped):
    state = checkpoint(stopped) | {"n_interventions": 1}
    torch.save(state, stopped.last)
    start = next(stopped.train())
    assert "last.pt: it counts 1 interventions, steering.jsonl holds 0" in start["notices"][0]


def test_beginning_anew_touches_nothing_that_is_not_a_runs(stopped):
    others = ("notes.txt", "table.csv.1.tmp", "checkpoints/mine.pt", "tensorboard/sketch.png", "evaluation.old.csv")
    for name in others:
        (stopped.path / name).write_text("mine")
    anew = open_run(stopped.params.model_copy(update={"overwrite": True, "steps": 1}))
    finish(anew)
    assert {(anew.path / name).read_text() for name in others} == {"mine"}
    assert len(anew.provenance()) == 1
    assert not anew.last.with_name("previous.pt").exists()
    assert len(list((anew.path / "tensorboard").glob("events*"))) == 1


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own with little room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def step_of(checkpoint):
    return torch.load(checkpoint, weights_only=True)["step"]


def test_a_disk_that_gets_full_is_named_with_the_room_needed_and_the_run_keeps_its_checkpoint(data, small_disk):
    run = open_run(params(data, small_disk, checkpoint_every=2))
    training = run.train()
    for record in training:
        if record["kind"] == "checkpoint" and record["step"] == 4:
            break
    wait_until(lambda: step_of(run.last) == 4)
    filler = small_disk / "filler"
    with filler.open("wb") as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    with pytest.raises(
        UserError,
        match=r"t.pt: cannot be written: No space left on device: it takes .* MB, .* are free",
    ):
        for _ in training:
            pass
    assert not list(run.path.rglob("*.tmp"))
    filler.unlink()
    start = next(open_run(params(data, small_disk, checkpoint_every=2)).train())
    assert start["step"] == 4
    assert "damaged" not in run.provenance()[-1]


def test_training_goes_on_while_a_checkpoint_is_written(data, tmp_path, monkeypatch):
    seen, save, waited = threading.Event(), checkpoints._save, []

    def slow(path, *given, **named):
        if path.name == "last.pt":
            waited.append(seen.wait(SECONDS))
        save(path, *given, **named)

    monkeypatch.setattr(checkpoints, "_save", slow)
    run = open_run(params(data, tmp_path, checkpoint_every=2, log_every=1))
    for record in run.train():
        if record["kind"] == "train" and record["step"] == 3:
            assert not run.last.exists()
            seen.set()
    assert all(waited)
    assert step_of(run.last) == run.params.steps


def test_a_disk_that_becomes_read_only_is_named_and_the_run_goes_on_when_it_is_not(data, tmp_path, monkeypatch):
    def refuse(*names):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    run = open_run(params(data, tmp_path, checkpoint_every=2))
    with pytest.raises(UserError, match=r"\.pt: cannot be written: Read-only file system; get the right to write"):
        for record in run.train():
            if record["kind"] == "checkpoint" and record["step"] == 4:
                wait_until(lambda: step_of(run.last) == 4)
                monkeypatch.setattr(files.os, "replace", refuse)
    monkeypatch.undo()
    assert next(run.train())["step"] == 4
    assert not list(run.path.rglob("*.tmp"))


def test_results_on_a_disk_that_is_read_only_are_refused_before_training(data, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"lock: cannot be written: Read-only file system; get the right to write"):
        finish(open_run(params(data, small_disk)))


def test_a_folder_that_cannot_be_written_to_is_named_before_training(data, tmp_path):
    (tmp_path / "outputs").write_text("a file")
    with pytest.raises(UserError, match=r"outputs/runs.*lock: cannot be written: Not a directory"):
        finish(open_run(params(data, tmp_path / "outputs")))


def test_a_run_is_begun_and_gone_on_with_from_a_terminal(data, tmp_path, monkeypatch, capsys):
    values = SMALL | {"data": str(data), "outputs": str(tmp_path), "n_threads": 1, "run": "typed", "steps": 4}
    words = [word for name, value in values.items() for word in ("-p", name, json.dumps(value))]

    def say(*words):
        monkeypatch.setattr("sys.argv", ["udonlib", *words])
        program.main()
        return capsys.readouterr().out.splitlines()

    said = say("train", "paper", *words)
    assert said[0] == f"run {tmp_path / 'runs' / 'typed'}"
    assert any(line.startswith("step 0/4") for line in said)
    assert "test R@1" in said[-1]
    assert load_run("typed", str(tmp_path)).params == TrainParams(**values)
    assert "finished in" in say("worker", "typed", "--outputs", str(tmp_path))[-1]
    with pytest.raises(SystemExit, match="parameter 'stepz': no such parameter; did you mean 'steps'"):
        say("train", "paper", "-p", "stepz", "4")
