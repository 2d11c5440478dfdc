"""Checkpoints that are damaged, cut or gone, and processes that are killed between two steps of keeping them."""

from __future__ import annotations

import math
import os
import random
import shutil
import threading
from contextlib import suppress

import pytest
import torch

from tests.helpers.waiting import SECONDS
from udonlib.errors import UserError
from udonlib.files import DiskError
from udonlib.runs import checkpoints as runcheckpoints
from udonlib.runs.checkpoints import Checkpoints, Saving, load_checkpoint


def state(step, best=-math.inf):
    weights = torch.full((500,), float(step))
    return {"model": {"weights": weights}, "optimizer": {}, "step": step, "best": best, "n_worse": 1, "n_records": step}


def model(step, score):
    return {"model": {"weights": torch.full((50,), float(step))}, "step": step, "r_at_1": score}


def fits(_):
    return None


@pytest.fixture
def run(tmp_path):
    """A run with two checkpoints, of steps 2 and 4, each with a best model of its own."""
    checkpoints = Checkpoints(tmp_path)
    for step, score in ((2, 20.0), (4, 40.0)):
        checkpoints.save_best(model(step, score))
        checkpoints.save_last(state(step, score))
    return checkpoints


def files(folder):
    return {path.name for path in (folder / "checkpoints").iterdir()}


def spoil(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x55
    file.write_bytes(content)


def test_no_byte_changes_without_a_word(tmp_path):
    file, original = tmp_path / "last.pt", state(3, 7.0)
    torch.save(original, file)
    content = file.read_bytes()
    generator, refused = random.Random(0), 0
    unharmed = 0
    for _ in range(300):
        changed = bytearray(content)
        changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        file.write_bytes(changed)
        try:
            there = load_checkpoint(file)
        except UserError as error:
            refused += str(error).startswith(f"{file}: ")
            continue
        assert torch.equal(there.pop("model")["weights"], original["model"]["weights"])  # a byte that says nothing
        assert there == {name: value for name, value in original.items() if name != "model"}
        unharmed += 1
    assert refused + unharmed == 300
    assert refused > 200


@pytest.mark.parametrize("content", [b"", b"garbage" * 50, None], ids=["empty", "garbage", "gone"])
def test_what_is_no_checkpoint_is_named(tmp_path, content):
    file = tmp_path / "last.pt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match="last.pt: " + ("missing" if content is None else "damaged, or not a check")):
        load_checkpoint(file)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_a_checkpoint_that_was_cut_is_named(tmp_path, share):
    file = tmp_path / "last.pt"
    torch.save(state(3), file)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(UserError, match="last.pt: damaged"):
        load_checkpoint(file)


def test_a_file_of_something_else_is_no_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "last.pt")
    with pytest.raises(UserError, match="last.pt: damaged, or not a checkpoint of a run .it holds no model"):
        load_checkpoint(tmp_path / "last.pt")


def test_the_last_checkpoint_is_used_with_its_best_model(run, tmp_path):
    found = run.find(fits)
    assert (found.state["step"], found.file, found.problems) == (4, run.last, [])
    assert load_checkpoint(found.best)["step"] == 4
    run.settle(found)
    assert files(tmp_path) == {"last.pt", "previous.pt", "best.pt", "previous_best.pt"}


def spoiled(file):
    spoil(file)


def gone(file):
    file.unlink()


@pytest.mark.parametrize("harm", [spoiled, gone])
@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_the_checkpoint_before_is_used_with_its_own_best_model(run, tmp_path, harm, name):
    harm(tmp_path / "checkpoints" / name)
    found = run.find(fits)
    assert found.state["step"] == 2
    assert str(tmp_path / "checkpoints" / name) in found.problems[0]
    run.settle(found)
    again = run.find(fits)
    assert (again.state["step"], again.file, again.problems) == (2, run.last, [])
    assert load_checkpoint(tmp_path / "checkpoints" / "best.pt")["step"] == 2
    assert files(tmp_path) == {"last.pt", "best.pt"}


def test_a_best_model_that_two_checkpoints_share_is_kept_once(run, tmp_path):
    run.save_last(state(6, 40.0))
    assert files(tmp_path) == {"last.pt", "previous.pt", "best.pt"}
    spoil(run.last)
    found = run.find(fits)
    assert (found.state["step"], load_checkpoint(found.best)["step"]) == (4, 4)


def test_a_checkpoint_that_does_not_fit_the_other_files_is_passed_over(run):
    found = run.find(lambda state: "too many records" if state["n_records"] > 3 else None)
    assert found.state["step"] == 2
    assert found.problems == [f"{run.last}: too many records"]


def test_a_lost_best_model_is_said_and_chosen_anew(run, tmp_path):
    for name in ("best.pt", "previous_best.pt"):
        (tmp_path / "checkpoints" / name).unlink()
    found = run.find(fits)
    assert (found.state["step"], found.state["best"], found.state["n_worse"], found.best) == (4, -math.inf, 0, None)
    assert "best.pt: missing" in found.problems[0]
    assert "the best model until step 4 is lost" in found.problems[-1]
    run.settle(found)
    run.save_best(model(6, 1.0))
    run.save_last(state(6, 1.0))
    assert run.find(fits).problems == []


def test_where_nothing_is_left_every_file_is_named_and_the_way_out(run):
    for name in ("last.pt", "previous.pt"):
        spoil(run.last.with_name(name))
    with pytest.raises(UserError, match=r"last.pt: damaged.*previous.pt: damaged.*put back a copy, or begin anew"):
        run.find(fits)


def test_a_run_that_made_no_checkpoint_has_none(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_best(model(2, 20.0))  # killed before its checkpoint
    assert not checkpoints.exist
    assert checkpoints.find(fits) is None
    checkpoints.settle(None)
    assert files(tmp_path) == set()


class Killed(BaseException):
    """Stands for a process that ends here."""


@pytest.mark.parametrize("better", [True, False])
def test_a_kill_between_any_two_changes_of_names_leaves_a_checkpoint_and_its_best_model(tmp_path, monkeypatch, better):
    """Whatever moment a process is killed at, the next finds a pair; and so where that is killed as it tidies up."""
    moves = [0, math.inf]  # done, and after how many to be killed

    def counted(change):
        def changed(*arguments, **options):
            if moves[0] >= moves[1]:
                raise Killed
            moves[0] += 1
            return change(*arguments, **options)

        return changed

    monkeypatch.setattr(os, "replace", counted(os.replace))  # Path.replace calls it
    seen = set()
    for harmed in (None, "last.pt"):
        for first in range(1, 7):
            for second in (0, 1, 2, math.inf):
                folder = tmp_path / f"{harmed}-{first}-{second}"
                run = Checkpoints(folder)
                moves[:] = 0, math.inf
                run.save_best(model(2, 20.0))
                run.save_last(state(2, 20.0))
                moves[:] = 0, first
                try:
                    if better:
                        run.save_best(model(4, 40.0))
                    run.save_last(state(4, 40.0 if better else 20.0))
                    ended = True
                except Killed:
                    ended = False
                moves[:] = 0, math.inf
                if harmed and (folder / "checkpoints" / "previous.pt").exists() and run.last.exists():
                    spoil(run.last)
                moves[:] = 0, second
                with suppress(Killed):
                    run.settle(run.find(fits))
                moves[:] = 0, math.inf
                found = run.find(fits)
                run.settle(found)
                kept = load_checkpoint(folder / "checkpoints" / "best.pt")
                assert load_checkpoint(run.last)["step"] == found.state["step"]
                assert kept["r_at_1"] == found.state["best"]
                assert not (folder / "checkpoints" / "next.pt").exists()
                seen.add((harmed, found.state["step"], ended))
                shutil.rmtree(folder)
    assert {(None, 2, False), (None, 4, True), ("last.pt", 2, True)} <= seen


def test_a_full_disk_leaves_the_last_checkpoint_where_it_was(run, monkeypatch):
    before = run.last.read_bytes()

    def full(state, file):
        file.write(bytes(10))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runcheckpoints.torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        run.save_last(state(6, 40.0))
    assert run.last.read_bytes() == before
    assert run.find(fits).state["step"] == 4


def test_what_is_saved_is_copied_and_written_in_order_and_errors_come_with_the_next_call():
    saving, written, may_write = Saving(), [], threading.Event()

    def write(state):
        assert may_write.wait(SECONDS)
        written.append(state)

    tensor = torch.zeros(2)
    saving.save(write, {"model": {"a": tensor}, "moments": [tensor], "step": 1})
    tensor += 1
    assert written == []
    may_write.set()
    saving.save(write, {"model": {"a": tensor}, "step": 2})
    saving.wait()
    assert [state["step"] for state in written] == [1, 2]
    assert [state["model"]["a"].tolist() for state in written] == [[0, 0], [1, 1]]
    assert written[0]["moments"][0].tolist() == [0, 0]

    def refuse(state):
        raise DiskError("full")

    saving.save(refuse, {})
    with pytest.raises(DiskError, match="full"):
        saving.save(write, {"step": 3})
    saving.wait()  # said once
    saving.close()
    assert len(written) == 2
