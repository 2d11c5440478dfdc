"""A run in a process of its own: it outlives its beginner, ends in the same bits, is found, stopped and told apart."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
import yaml

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.runs import assert_same_state, checkpoint, end_workers, finish
from tests.helpers.training import SMALL
from tests.helpers.waiting import wait_until
from udonlib.errors import UserError
from udonlib.params import TrainParams
from udonlib.runs.apart.process import Worker, WorkerError, read_sign
from udonlib.runs.folder import RunFolder
from udonlib.runs.run import Run, open_run
from udonlib.training.trainer import RunStoppedError

LONG = {"steps": 200_000, "eval_every": 200_000, "checkpoint_every": 1000}

START = """
import sys
from udonlib.params import TrainParams
from udonlib.files import read_yaml
from udonlib.runs.apart.process import Worker
from udonlib.runs.run import Run
from pathlib import Path
Worker(Run(TrainParams(**read_yaml(Path(sys.argv[1]))))).start()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_uned_tree(tmp_path_factory.mktemp("data"))


def params(root, outputs, **changes):
    return TrainParams(**SMALL | {"data": str(root), "outputs": str(outputs), "n_threads": 1} | changes)


def ended(run: Run, worker: Worker) -> None:
    wait_until(lambda: not worker.trains, "the end of the process")


@pytest.fixture
def going(data, tmp_path):
    """A long run, about to be trained in a process of its own."""
    run = Run(params(data, tmp_path, **LONG))
    worker = Worker(run)
    yield run, worker
    end_workers(tmp_path)


def test_it_ends_in_the_bits_of_a_run_that_is_trained_here(data, tmp_path):
    here = finish(open_run(params(data, tmp_path / "here")))
    there = open_run(params(data, tmp_path / "there"))
    worker = Worker(there)
    worker.start()
    Worker(there).start()  # nobody begins it twice
    ended(there, worker)
    worker.check_end()
    assert there.status == "finished"
    assert_same_state(checkpoint(here), checkpoint(there))
    assert here.evaluation().equals(there.evaluation())
    assert len(there.provenance()) == 1
    assert "step 11/11 (100%)" in worker.log.read_text()


def test_several_processes_train_it_together(data, tmp_path):
    run = open_run(params(data, tmp_path, steps=4, eval_every=4, processes=2))
    worker = Worker(run)
    worker.start(run.params.processes)
    ended(run, worker)
    worker.check_end()
    assert run.status == "finished"
    assert [note["processes"] for note in run.provenance()] == [2]


def test_a_run_outlives_its_beginner_and_is_stopped_by_another(going, tmp_path):
    run, worker = going
    file = tmp_path / "asked.yaml"
    file.write_text(yaml.safe_dump(run.params.model_dump(mode="json")))
    subprocess.run([sys.executable, "-c", START, str(file)], check=True, timeout=300)
    assert worker.is_alive  # from its first moment on
    assert run.state().text == "getting ready"
    wait_until(lambda: run.records("train"), "its first steps")
    process = psutil.Process(read_sign(run)["pid"])
    assert os.getsid(process.pid) == process.pid  # no terminal's or kernel's end reaches it
    assert worker.trains
    worker.stop()
    ended(run, worker)
    assert run.state().name == "stopped"
    step = run.interventions()[-1].step
    assert checkpoint(run)["step"] == step  # after its step, with a checkpoint
    with pytest.raises(RunStoppedError, match=f"stopped after step {step:,} of 200,000"):
        worker.check_end()


def test_one_that_is_interrupted_goes_on_from_its_last_checkpoint(going):
    run, worker = going
    worker.start()
    wait_until(lambda: read_sign(run), "its first word")
    worker.interrupt()
    ended(run, worker)
    with pytest.raises(KeyboardInterrupt):
        worker.check_end()


def test_a_process_that_is_killed_is_told_with_its_last_words(going):
    run, worker = going
    worker.start()
    wait_until(lambda: run.records("allocation"), "its beginning")
    os.kill(read_sign(run)["pid"], signal.SIGKILL)
    ended(run, worker)
    with pytest.raises(WorkerError, match=r"ended without a word after step .*\n(.*\n)*step 0/200000"):
        worker.check_end()


def test_what_is_wrong_reaches_whoever_looks_on(data, tmp_path):
    run = Run(params(data, tmp_path, replay="missing"))
    worker = Worker(run)
    worker.start()
    ended(run, worker)
    assert run.status == "new"
    with pytest.raises(UserError, match="parameter 'replay': no run 'missing'"):
        worker.check_end()
    assert "Traceback" not in worker.log.read_text()


def test_a_mistake_of_ours_is_told_with_its_log(data, tmp_path):
    worker = Worker(Run(params(data, tmp_path)))
    worker.folder.path.mkdir(parents=True)
    (worker.folder.path / "worker.json").write_text('{"end": ["ZeroDivisionError", "division by zero"]}')
    with pytest.raises(WorkerError, match=r"ended with ZeroDivisionError: division by zero; .*worker\.log"):
        worker.check_end()
    (worker.folder.path / "worker.json").write_text("[")
    with pytest.raises(WorkerError, match="not started yet"):
        worker.check_end()
    assert read_sign(RunFolder(tmp_path)) == {}
