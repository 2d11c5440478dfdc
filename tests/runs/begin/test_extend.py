"""More steps for a finished run: from its last checkpoint, with a schedule of their own, resumed and repeated."""

import pytest

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.runs import assert_same_state, checkpoint, finish
from tests.helpers.training import SMALL
from udonlib.errors import UserError
from udonlib.params import TrainParams
from udonlib.runs.folder import RunFolder
from udonlib.runs.run import load_run, open_run
from udonlib.training.learner import learning_rate_factor


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_uned_tree(tmp_path_factory.mktemp("data"))


def params(root, outputs, **changes):
    fixed = {"data": str(root), "outputs": str(outputs), "n_threads": 1, "check_data": "skip"}
    return TrainParams(**SMALL | fixed | {"rate_schedule": "cosine", "warmup_steps": 2} | changes)


def test_the_rates_of_a_part_come_down_by_themselves(data, tmp_path):
    p = params(data, tmp_path, steps=30, seams=(10, 15))
    assert [p.part_at(step) for step in (0, 9, 10, 14, 15, 29, 30)] == [
        *((0, 10), (0, 10), (10, 5), (10, 5), (15, 15), (15, 15), (15, 15))
    ]
    rates = [learning_rate_factor(step, p) for step in range(30)]
    assert rates[:10] == [learning_rate_factor(step, params(data, tmp_path, steps=10)) for step in range(10)]
    assert rates[10] == rates[15] == 1.0  # without a warm-up
    assert rates[10:15] == sorted(rates[10:15], reverse=True)
    with pytest.raises(UserError, match=r"'seams': found \[40\], expected rising steps"):
        params(data, tmp_path, steps=30, seams=(40,))


def test_a_finished_run_goes_on_and_can_be_killed_and_repeated(data, tmp_path):
    run = finish(open_run(params(data, tmp_path / "one")))
    more = open_run(params(data, tmp_path / "one", extend=7))
    assert more.path == run.path
    assert not more.is_over
    start, *records = more.train()
    assert start["step"] == 11
    assert "finished at step 11 and is given 7 more; in these the learning rates begin anew" in start["notices"][0]
    assert more.summary()["steps"] == records[-1]["step"] == 18
    assert [note["from_step"] for note in more.provenance()] == [0, 11]
    assert {r["step"] for r in more.records("validation")} == {5, 10, 11, 15, 18}

    for same in ({"extend": 7}, {}):  # what it was given already, and what it had before
        assert [record["kind"] for record in open_run(params(data, tmp_path / "one", **same)).train()] == ["end"]
    assert load_run(run.path.name, str(tmp_path / "one")).params.steps == 18

    whole = finish(open_run(params(data, tmp_path / "whole", extend=7)))  # begun anew, it is all of that at once
    assert whole.path.name == run.path.name
    assert_same_state(checkpoint(more), checkpoint(whole))

    cut = finish(open_run(params(data, tmp_path / "cut")))
    records = open_run(params(data, tmp_path / "cut", extend=7)).train()
    next(record for record in records if (record["kind"], record["step"]) == ("checkpoint", 12))
    records.close()
    assert RunFolder(cut.path).status == "unfinished"
    assert_same_state(checkpoint(more), checkpoint(finish(open_run(params(data, tmp_path / "cut", extend=7)))))


def test_steps_alone_lengthen_a_run_that_is_finished_and_no_other(data, tmp_path):
    records = open_run(params(data, tmp_path, run="mine")).train()
    next(record for record in records if record["kind"] == "checkpoint")
    records.close()
    with pytest.raises(UserError, match="differs in steps: 11 there, 14 here"):
        open_run(params(data, tmp_path, run="mine", steps=14))
    finish(open_run(params(data, tmp_path, run="mine")))
    with pytest.raises(UserError, match="differs in steps: 11 there, 9 here"):
        open_run(params(data, tmp_path, run="mine", steps=9))
    with pytest.raises(UserError, match="differs in scale"):
        open_run(params(data, tmp_path, run="mine", steps=14, scale=20.0))
    longer = finish(open_run(params(data, tmp_path, run="mine", steps=14)))
    assert (longer.params.seams, longer.params.steps) == ((11,), 14)
    again = finish(open_run(params(data, tmp_path, run="mine", steps=14, extend=2)))
    assert again.params.seams == (11, 14)
    assert again.summary()["steps"] == 16


def test_a_run_that_ended_early_goes_on_but_is_not_repeated(data, tmp_path):
    run = open_run(params(data, tmp_path, run="early", patience=1, eval_every=1, learning_rate=1e-9))
    finish(run)
    ended = run.summary()["steps"]
    assert ended < 11
    changes = {"patience": 1, "eval_every": 1, "learning_rate": 1e-9}
    more = finish(open_run(params(data, tmp_path, run="early", extend=3, **changes)))
    assert more.params.seams == (ended,)
    assert more.summary()["steps"] > ended
    again = more.params.model_copy(update={"run": "again", "replay": "early"})
    with pytest.raises(UserError, match="ended before its last step and was given more: that cannot be repeated"):
        finish(open_run(again))
