"""A run looked at from outside: read as it grows, begun again where it is, timed without its pauses."""

from __future__ import annotations

import fcntl
import json
import time

import pytest
import yaml

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.runs import finish
from tests.helpers.training import SMALL
from tests.helpers.waiting import Clock
from udonlib.params import TrainParams
from udonlib.runs import watch as watching
from udonlib.runs.folder import RunFolder
from udonlib.runs.run import open_run
from udonlib.runs.watch import Progress, Watch
from udonlib.training.interventions import Intervention
from udonlib.training.steering import change_control

NAMES = ("emoji", "flags")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_uned_tree(tmp_path_factory.mktemp("data"))


def params(root, outputs, **changes):
    fixed = {"data": str(root), "outputs": str(outputs), "n_threads": 1, "log_every": 1, "steps": 6}
    return TrainParams(**SMALL | fixed | changes)


def seen(progress: Progress) -> dict:
    """All that is known but what depends on the time."""
    names = ("step", "losses", "terms", "allocations", "weights", "shares", "interventions", "images_seen")
    return {name: getattr(progress, name) for name in (*names, "r_at_1", "best", "last_is_best", "images_per_s")}


def train(step: int, pace: float = 80.0) -> dict:
    losses = {name: {"total": 2.0 + step} for name in NAMES}
    images = dict.fromkeys(NAMES, 4 * step)
    return {"kind": "train", "step": step, "images_per_s": pace, "losses": losses, "images_seen": images}


def validation(step: int) -> dict:
    row = {"embedder": "student", "domain": "mean", "index": "merged", "r_at_1": 50.0}
    return {"kind": "validation", "step": step, "r_at_1": 50.0, "best": True, "table": [row]}


class Written:
    """A run's folder, written by hand."""

    def __init__(self, path, **changes):
        self.path = path
        path.mkdir()
        values = SMALL | {"steps": 100, "eval_every": 20, "batch_size": 8} | changes
        (path / "params.yaml").write_text(yaml.safe_dump(TrainParams(**values).model_dump(mode="json")))
        self.file = path / "metrics.jsonl"
        self.file.touch()
        self.now = 1.7e9
        self.add({"kind": "start", "step": 0, "n_images": {"emoji": 30, "flags": 10}})

    def add(self, record, seconds=0.0):
        self.now += seconds
        with self.file.open("a") as file:
            file.write(json.dumps(record | {"time": self.now}) + "\n")


@pytest.fixture
def written(tmp_path):
    return Written(tmp_path / "run")


def test_a_watch_knows_what_the_one_who_trains_knows(data, tmp_path):
    run = open_run(params(data, tmp_path))
    watch = Watch(run)
    watch.update()
    assert (watch.state.name, watch.domains(), watch.progress.step) == ("new", NAMES, 0)
    progress = Progress(run.params, time.monotonic)
    for record in run.train():
        if record["kind"] == "start":
            change_control(run.path, "mine", multipliers={"emoji": 2.0})
        if record["kind"] in ("start", "train", "allocation", "validation", "steering"):
            progress.update(record)
            assert watch.update()
            assert seen(watch.progress) == seen(progress)
            assert watch.state.name == "training"
            assert watch.progress.state == "running"
    assert watch.update()
    assert (watch.state.name, watch.progress.state) == ("finished", "finished")
    assert watch.control.multipliers == {"emoji": 2.0}
    assert [str(entry) for entry in watch.interventions] == ["emoji ×2"]
    assert watch.n_images == {"emoji": 12, "flags": 12}
    late = Watch(RunFolder(run.path))
    late.update()
    assert seen(late.progress) == seen(watch.progress)
    assert late.domains() == NAMES


def test_looking_again_where_nothing_is_new_reads_nothing(written, monkeypatch):
    Clock(monkeypatch, watching)
    watch = Watch(RunFolder(written.path))
    assert watch.update()
    monkeypatch.setattr(RunFolder, "state", lambda self: pytest.fail("read again"))
    monkeypatch.setattr(RunFolder, "interventions", lambda self: pytest.fail("read again"))
    assert [watch.update() for _ in range(5)] == [False] * 5


def test_a_line_that_is_being_written_is_read_when_it_is_whole(written):
    watch = Watch(RunFolder(written.path))
    line = json.dumps(train(1) | {"time": 1.0}) + "\n"
    for end in (1, len(line) // 2, len(line) - 1):
        content = written.file.read_text().split("\n")[0] + "\n" + line[:end]
        with written.file.open("r+") as file:  # the same file, in which more and more of the line stands
            file.write(content)
        watch.update()
        assert (watch.progress.step, watch.progress.losses) == (0, {})
    with written.file.open("a") as file:
        file.write(line[-1])
    assert watch.update()
    assert watch.progress.losses == {"emoji": [(1, 3.0)], "flags": [(1, 3.0)]}
    written.add(train(2))
    assert watch.update()
    assert watch.progress.losses["emoji"] == [(1, 3.0), (2, 4.0)]  # and nothing twice


def test_a_run_that_goes_on_from_its_checkpoint_has_no_records_twice(data, tmp_path):
    run = open_run(params(data, tmp_path, steps=8))
    watch = Watch(run)
    training = run.train()
    for record in training:
        if record["kind"] == "train" and record["step"] == 5:
            break
    training.close()
    watch.update()
    assert (watch.state.name, watch.progress.state, watch.progress.step) == ("stopped", "stopped", 5)
    again = open_run(params(data, tmp_path, steps=8)).train()
    assert next(again)["step"] == 3
    assert watch.update()
    assert (watch.progress.step, watch.progress.state) == (3, "running")
    for _ in again:
        watch.update()
    watch.update()
    assert sorted(step for curve in watch.progress.losses.values() for step, _ in curve) == list(range(1, 9))
    late = Watch(RunFolder(run.path))
    late.update()
    assert seen(late.progress) == seen(watch.progress)


def test_a_run_that_is_begun_again_is_read_from_its_beginning(data, tmp_path):
    run = finish(open_run(params(data, tmp_path)))
    watch = Watch(RunFolder(run.path))
    watch.update()
    assert watch.state.name == "finished"
    for record in open_run(params(data, tmp_path, overwrite=True)).train():
        if record["kind"] == "train":
            watch.update()
            assert watch.progress.step == record["step"]
            assert watch.state.name == "training"


def test_a_file_that_has_become_shorter_is_read_from_its_beginning(written):
    """A new file may have the number of one that was removed."""
    for step in range(1, 6):
        written.add(train(step))
    watch = Watch(RunFolder(written.path))
    watch.update()
    assert watch.progress.step == 5
    lines = written.file.read_text().splitlines(keepends=True)
    written.file.write_text("".join(lines[:3]))
    watch.update()
    assert watch.progress.step == 2
    written.add(train(3))
    watch.update()
    assert watch.progress.losses["emoji"] == [(1, 3.0), (2, 4.0), (3, 5.0)]


@pytest.mark.parametrize("pause", [0.0, 3600.0])
def test_pauses_do_not_slow_the_estimate(tmp_path, pause):
    run = Written(tmp_path / "run")
    for step in range(1, 21):
        run.add(train(step), 0.1)
    run.add(validation(20), 7.0)
    run.add(Intervention(number=1, step=20, paused=True).record())
    run.add(Intervention(number=2, step=20).record(), pause)
    for step in range(21, 41):
        run.add(train(step), 0.1)
    run.add(validation(40), 7.0)
    watch = Watch(RunFolder(run.path))
    watch.update()
    # 60 steps at 80 images a second, 8 in each, and validations of 7 s at 60, 80 and 100
    assert watch.progress.seconds_left() == pytest.approx(60 * 0.1 + 3 * 7.0, rel=1e-6)


def test_the_estimate_of_a_run_that_is_read_bit_by_bit_is_that_of_one_read_at_once(written):
    watch = Watch(RunFolder(written.path))
    for step in range(1, 31):
        written.add(train(step, pace=40.0 + step), 0.1)
        if step == 20:
            written.add(validation(20), 3.0)
        watch.update()
    late = Watch(RunFolder(written.path))
    late.update()
    assert watch.progress.seconds_left() == late.progress.seconds_left()
    assert late.progress.seconds_left() > 0


def test_a_run_of_the_version_before_steering_is_shown(written):
    for step in range(1, 21):
        written.add(train(step))
    weights = dict.fromkeys(NAMES, 0.5)
    written.add({"kind": "allocation", "step": 20, "weights": weights, "images_seen": weights})
    records = [json.loads(line) for line in written.file.read_text().splitlines()][1:]
    without = [{name: value for name, value in record.items() if name != "time"} for record in records]
    written.file.write_text("".join(json.dumps(record) + "\n" for record in without))
    watch = Watch(RunFolder(written.path))
    watch.update()
    assert watch.progress.shares == weights
    assert watch.domains() == NAMES
    assert (watch.interventions, watch.control.number) == ([], 0)
    assert watch.progress.seconds_left() == pytest.approx(80 * 0.1, rel=0.06)


def test_a_process_that_was_killed_is_missed_although_no_file_tells(written, monkeypatch):
    clock = Clock(monkeypatch, watching)
    watch = Watch(RunFolder(written.path))
    with (written.path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert watch.update()
        assert (watch.state.name, watch.progress.state) == ("training", "running")
    clock.now += 1.0
    assert not watch.update()
    clock.now += 1.5
    assert watch.update()
    assert (watch.state.name, watch.progress.state) == ("lost", "stopped")
    clock.now += 5.0
    assert not watch.update()


@pytest.mark.parametrize("name", ["control.json", "steering.jsonl", "provenance.json"])
def test_a_file_that_cannot_be_read_is_named(written, name):
    watch = Watch(RunFolder(written.path))
    watch.update()
    (written.path / name).write_text("{\n")
    assert watch.update()
    assert name in watch.problem
    assert not watch.update()
    assert name in watch.problem  # until it is mended
    (written.path / name).unlink()
    assert watch.update()
    assert watch.problem == ""


def test_each_file_that_cannot_be_read_is_named_and_hides_no_other(written):
    change_control(written.path, "mine", multipliers={"emoji": 2.0})
    for name in ("steering.jsonl", "provenance.json"):
        (written.path / name).write_text("{\n")
    watch = Watch(RunFolder(written.path))
    watch.update()
    assert "steering.jsonl" in watch.problem
    assert "provenance.json" in watch.problem
    assert watch.control.multipliers == {"emoji": 2.0}
    assert watch.heard  # as far as one can tell


def test_what_was_known_of_a_file_holds_while_it_cannot_be_read(written):
    change_control(written.path, "mine", multipliers={"emoji": 2.0})
    entry = Intervention(number=1, step=1, steers=True, multipliers={"emoji": 2.0})
    (written.path / "steering.jsonl").write_text(entry.model_dump_json() + "\n")
    watch = Watch(RunFolder(written.path))
    watch.update()
    for name in ("steering.jsonl", "control.json"):
        (written.path / name).write_text("{\n")
    assert watch.update()
    assert watch.interventions == [entry]
    assert watch.control.multipliers == {"emoji": 2.0}


def test_a_run_that_waits_is_paused_although_its_control_file_cannot_be_read(written):
    entry = Intervention(number=1, step=1, paused=True)
    (written.path / "steering.jsonl").write_text(entry.model_dump_json() + "\n")
    (written.path / "control.json").write_text("{")
    with (written.path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert RunFolder(written.path).state().name == "paused"


def test_a_paused_run_is_going_on_and_not_stopped_for_those_who_watch_it(written):
    entry = Intervention(number=1, step=1, paused=True)
    (written.path / "steering.jsonl").write_text(entry.model_dump_json() + "\n")
    change_control(written.path, paused=True)
    watch = Watch(RunFolder(written.path))
    with (written.path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        watch.update()
    assert (watch.state.name, watch.progress.state) == ("paused", "paused")


def test_what_could_not_be_read_is_tried_again_although_nothing_is_new(written, monkeypatch):
    watch = Watch(RunFolder(written.path))
    with monkeypatch.context() as broken:
        broken.setattr(watching, "read_control", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            watch.update()
    assert watch.update()
    assert not watch.update()


@pytest.mark.parametrize(
    "line", ['{"kind": "tra', "[1]", '{"kind": "train", "step": 11, "images_per_s": 1, "losses": {}}']
)
def test_a_record_that_cannot_be_read_is_named_and_the_run_is_followed_on(written, line):
    written.add(train(10), 1.0)
    watch = Watch(RunFolder(written.path))
    watch.update()
    with (written.path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    assert watch.update()
    assert "metrics.jsonl" in watch.problem
    written.add(train(20), 1.0)
    assert watch.update()
    assert watch.progress.step == 20


def test_a_teacher_that_looks_at_all_images_is_named_with_what_is_left(tmp_path):
    progress = Progress(params(tmp_path, tmp_path), time.monotonic)
    asked = {"kind": "features", "step": 0, "teacher": "dino", "n_images": 1000, "images_per_s": 10.0}
    progress.update(asked | {"n_done": 400})
    assert progress.time_text() == "teacher dino looks at 400 of 1,000 images, 1 min 00 s left for it"
    progress.update(asked | {"n_done": 1000})
    assert progress.time_text() == "estimating the time"
    progress.update(asked | {"n_done": 400})
    progress.update(train(1))
    assert "dino" not in progress.time_text()
