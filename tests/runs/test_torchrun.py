"""Runs of several processes, as torchrun starts them: what one trains, killed, stopped and gone on with."""

from __future__ import annotations

import signal
import sys

import numpy as np
import pytest

from tests.helpers.catalogs import uned_files, write_tree, write_uned_tree
from tests.helpers.ranks import COMMON
from tests.helpers.runs import assert_same_state, checkpoint, finish
from tests.helpers.torchrun import Torchrun
from tests.helpers.training import SMALL
from tests.helpers.waiting import wait_until
from udonlib.params import TrainParams
from udonlib.runs.folder import RunFolder
from udonlib.runs.run import open_run
from udonlib.training.interventions import Intervention

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")

STEERED = Intervention(number=1, step=22, steers=True, multipliers={"emoji": 5.0})  # between two checkpoints


def values(data, outputs, **changes):
    """50 steps with the dynamic sampler, steered in the middle: the log says so, as that of a resumed run does.

    Where there are several processes, each holds a part of the classes.
    """
    given = {"steps": 50, "update_every": 5, "eval_every": 20, "checkpoint_every": 5, "log_every": 5}
    given |= {"data": str(data), "outputs": str(outputs), "run": "toy", "n_threads": 1, "eval_batch_size": 4}
    given["split_classes_from"] = 2
    folder = outputs / "runs" / "toy"
    folder.mkdir(parents=True)
    (folder / "steering.jsonl").write_text(STEERED.model_dump_json() + "\n")
    return {**SMALL, **COMMON, **given, "check_data": "skip", **changes}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_uned_tree(tmp_path_factory.mktemp("data"), index_of="flags")


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The run in one process."""
    return finish(open_run(TrainParams(**values(data, tmp_path_factory.mktemp("alone")))))


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """The run in two processes, and what they said."""
    started = Torchrun(2, values(data, tmp_path_factory.mktemp("two")))
    assert started.wait() == 0, started.said()
    return started.folder, started.said()


def assert_trained_alike(run, expected):
    """The same allocation, the same weights and evaluation but for rounding."""
    for kind in ("allocation", "train", "validation"):
        pairs = list(zip(run.records(kind), expected.records(kind), strict=True))
        assert [found["step"] for found, _ in pairs] == [wanted["step"] for _, wanted in pairs]
        for found, wanted in pairs:
            assert found.get("images_seen") == wanted.get("images_seen")  # which images, to the last one
            assert found.get("shares", {}) == pytest.approx(wanted.get("shares", {}), abs=1e-6)
            assert found.get("table") == wanted.get("table")
    found, wanted = checkpoint(run), checkpoint(expected)
    assert found["step"] == wanted["step"] == 50
    off = {name: (value - wanted["model"][name]).abs().max().item() for name, value in found["model"].items()}
    assert {name: size for name, size in off.items() if size > 1e-5} == {}
    assert run.evaluation().equals(expected.evaluation())
    similar = [np.load(of.path / "neighbours.npz")["student/emoji/similarity"] for of in (run, expected)]
    assert np.abs(similar[0] - similar[1]).max() < 1e-5


def test_two_processes_train_what_one_trains_and_one_of_them_says_so(alone, two):
    run, said = two
    assert_trained_alike(run, alone)
    shares = {record["step"]: record["shares"]["emoji"] for record in run.records("allocation")}
    assert shares[22] > shares[20] + 0.1
    assert said.count("step 50/50") == 2  # the validation, and the end
    assert [start["processes"] for start in run.provenance()] == [2]
    assert run.summary()["interventions"] == 1


def test_three_processes_that_are_told_to_end_leave_a_checkpoint_and_one_goes_on(data, alone, tmp_path):
    given = values(data, tmp_path)
    started = Torchrun(3, given)
    started.wait_for_step(25)
    started.process.send_signal(signal.SIGTERM)
    wait_until(lambda: started.folder.state().name != "training")
    assert started.folder.state().name == "stopped"
    assert "by SIGTERM" in started.folder.state().text
    started.wait()
    assert started.said().count("as SIGTERM asked for; run the same again to go on") == 1
    step = checkpoint(started.folder)["step"]
    assert step == started.folder.step >= 25
    again = open_run(TrainParams(**given))
    start, *_ = again.train()
    assert start["step"] == step
    assert [note["processes"] for note in again.provenance()] == [3, 1]
    last, wanted = checkpoint(again), checkpoint(alone)
    assert last["images_seen"] == wanted["images_seen"]
    assert max((value - wanted["model"][name]).abs().max().item() for name, value in last["model"].items()) < 1e-5
    assert again.evaluation().equals(alone.evaluation())


def test_a_killed_process_is_started_again_with_all_others_to_the_same_bits(data, two, tmp_path):
    whole, _ = two
    started = Torchrun(2, values(data, tmp_path), "--max-restarts=1")
    started.wait_for_step(25)
    started.kill_rank(1)
    assert started.wait() == 0, started.said()
    first, second = started.folder.provenance()
    assert first["from_step"] == 0
    assert second["from_step"] >= 20
    assert_same_state(checkpoint(whole), checkpoint(started.folder))
    assert whole.evaluation().equals(started.folder.evaluation())
    assert whole.losses().equals(started.folder.losses())


def test_what_is_wrong_for_all_processes_is_said_once(data, tmp_path):
    started = Torchrun(3, values(data, tmp_path, batch_size=2))
    assert started.wait() == 1
    assert started.said().count("parameter 'batch_size': found 2 images for 3 processes") == 1
    assert "udonlib/runs/run.py" not in started.said()  # no traceback of ours


def test_an_image_that_one_process_cannot_read_ends_all_of_them_with_its_message(tmp_path):
    # None of those that are looked at before the run begins.
    data = write_tree(tmp_path / "data", uned_files() | {"images/emoji/0000_002.png": b"no image"})
    started = Torchrun(2, values(data, tmp_path / "outputs"))
    assert started.wait() == 1
    assert started.said().count("on_bad_image='skip' leaves such images out") == 1
    assert "udonlib/runs/run.py" not in started.said()
    state = RunFolder(started.folder.path).state()
    assert state.name == "failed"
    assert "on_bad_image" in state.text
