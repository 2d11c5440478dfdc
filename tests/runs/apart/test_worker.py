"""What a process says that trains a run apart from a notebook."""

import json

import pytest

from udonlib.errors import ParameterError, UserError
from udonlib.files import take_lock
from udonlib.runs.apart.worker import signs
from udonlib.training.trainer import RunStoppedError


def said(folder):
    return json.loads((folder / "worker.json").read_text())


def test_it_says_what_the_records_of_the_run_do_not_hold(tmp_path):
    with signs(tmp_path) as words:
        assert said(tmp_path)["end"] is None
        words.take({"kind": "start", "step": 0, "notices": ["slow here"]})
        assert said(tmp_path)["notices"] == ["slow here"]
        words.take({"kind": "features", "step": 0, "n_done": 3})
        words.take({"kind": "train", "step": 1})
        assert said(tmp_path)["record"] == {}  # what the run's records hold, they say
        words._next = 0.0
        words.take({"kind": "progress", "step": 2, "images_per_s": 5.0})
        assert said(tmp_path)["record"]["step"] == 2
        assert said(tmp_path)["notices"] == ["slow here"]
    assert said(tmp_path) | {"pid": 0, "notices": []} == {"pid": 0, "notices": [], "record": {}, "end": ["", ""]}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RunStoppedError("stopped"), "RunStoppedError"),
        (ParameterError({"steps": "found 0"}), "UserError"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_it_says_how_it_ended(tmp_path, error, kind):
    with pytest.raises(type(error)), signs(tmp_path):
        raise error
    assert said(tmp_path)["end"] == [kind, str(error)]


def test_an_exit_tells_its_cause(tmp_path):
    with pytest.raises(SystemExit), signs(tmp_path):
        raise SystemExit(0) from RunStoppedError("stopped")
    assert said(tmp_path)["end"] == ["RunStoppedError", "stopped"]
    with pytest.raises(SystemExit), signs(tmp_path):
        raise SystemExit(143)
    assert said(tmp_path)["end"] == ["SystemExit", "143"]


def test_there_is_one_process_for_a_run(tmp_path):
    with take_lock(tmp_path / "worker.lock"):
        with pytest.raises(UserError, match="is being trained by another process; wait, or stop it"):
            with signs(tmp_path):
                pass
        with signs(tmp_path, held=True):  # by whoever has started it
            pass
