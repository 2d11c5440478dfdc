"""What a person wants of a run, and what the run answers: merged, checked, logged, repeated. Nothing is trained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from tests import PROJECT
from tests.helpers.waiting import Clock
from udonlib.errors import UserError
from udonlib.training import steering
from udonlib.training.interventions import Intervention, Wish, changed, changes_between, interventions
from udonlib.training.steering import Commands, Control, Notice, RunStoppedError, change_control, read_control

NAMES = ("emoji", "flags", "earth")


def follow(folder, **options) -> Commands:
    """What the loop of a run with three domains asks; fields of a wish are what is in force."""
    wish = Wish(**{name: options.pop(name) for name in Wish.model_fields if name in options})
    return Commands(folder, NAMES, wish=wish, teachers=options.pop("teachers_known", ()), **options)


def write_log(folder, *entries: Intervention) -> bytes:
    folder.mkdir(exist_ok=True)
    content = b"".join(entry.model_dump_json().encode() + b"\n" for entry in entries)
    (folder / "steering.jsonl").write_bytes(content)
    return content


def steered(number: int, step: int, **multipliers: float) -> Intervention:
    return Intervention(number=number, step=step, steers=True, multipliers=multipliers)


def resume_in_nap(monkeypatch, folder, number: int) -> Clock:
    """Let somebody resume the run while it waits for the n-th time."""
    clock = Clock(monkeypatch, steering)
    clock.while_asleep = lambda nap: change_control(folder, paused=False) if nap == number else None
    return clock


# What is wanted


def test_what_was_asked_for_is_what_is_read(tmp_path):
    assert read_control(tmp_path) == Control()
    wanted = change_control(tmp_path, "a panel", multipliers={"emoji": 2.5}, locks={"flags": 0.25}, paused=True)
    assert read_control(tmp_path) == wanted
    assert (wanted.number, wanted.panel, wanted.paused) == (1, "a panel", True)
    assert (wanted.multipliers, wanted.locks) == ({"emoji": 2.5}, {"flags": 0.25})
    assert json.loads((tmp_path / "control.json").read_text())["version"] == steering.VERSION


def test_a_change_leaves_what_others_have_set(tmp_path):
    change_control(tmp_path, "one", multipliers={"emoji": 2.0, "earth": 3.0}, locks={"flags": 0.25})
    wanted = change_control(tmp_path, "two", multipliers={"earth": 0.5})
    assert (wanted.multipliers, wanted.locks) == ({"emoji": 2.0, "earth": 0.5}, {"flags": 0.25})
    wanted = change_control(tmp_path, "two", multipliers={"emoji": None, "earth": None}, locks={"flags": None})
    assert (wanted.multipliers, wanted.locks, wanted.number, wanted.panel) == ({}, {}, 3, "two")


def test_a_multiplier_of_one_is_none(tmp_path):
    change_control(tmp_path, multipliers={"emoji": 2.0, "flags": 1.0})
    assert read_control(tmp_path).multipliers == {"emoji": 2.0}
    assert change_control(tmp_path, multipliers={"emoji": 1}).multipliers == {}


def test_teachers_are_merged_and_the_drop_probability_stays_until_it_is_taken_back(tmp_path):
    change_control(tmp_path, "one", teachers={"dino": 2.0, "clip": 0.0}, drop_probability=0.0)
    wanted = change_control(tmp_path, "two", teachers={"clip": 1.0}, multipliers={"emoji": 3.0})
    assert wanted.wish == Wish(teachers={"dino": 2.0}, drop_probability=0.0, multipliers={"emoji": 3.0})
    assert read_control(tmp_path) == wanted
    wanted = change_control(tmp_path, teachers={"dino": None}, drop_probability=None)
    assert wanted.wish == Wish(multipliers={"emoji": 3.0})


def test_files_without_steered_teachers_are_those_of_before_and_are_read(tmp_path):
    later = {"teachers", "drop_probability", "rate", "finish"}
    change_control(tmp_path, multipliers={"emoji": 2.0}, teachers={"dino": 1.0})
    written = json.loads((tmp_path / "control.json").read_text())
    assert written.keys() == set(Control.model_fields) - later
    assert read_control(tmp_path).wish == Wish(multipliers={"emoji": 2.0})
    write_log(tmp_path, steered(1, 2, emoji=2.0))
    assert json.loads((tmp_path / "steering.jsonl").read_text()).keys() == set(Intervention.model_fields) - later
    assert interventions(tmp_path)[0].wish == Wish(multipliers={"emoji": 2.0})


def test_requests_are_counted_and_not_merged(tmp_path):
    for _ in range(3):
        change_control(tmp_path, evaluate=True, save=False)
    wanted = change_control(tmp_path, stop=True)
    assert (wanted.evaluate, wanted.save, wanted.stop) == (3, 0, 1)


def test_writers_in_threads_and_processes_lose_nothing_of_each_other(tmp_path):
    many = 25
    work = (
        "import sys, pathlib\n"
        "from udonlib.training.steering import change_control\n"
        f"for number in range({many}):\n"
        "    locks = {f'{sys.argv[1]} {number}': 0.5}\n"
        "    change_control(pathlib.Path(sys.argv[2]), sys.argv[1], evaluate=True, locks=locks)\n"
    )

    def write(name: str) -> None:
        for number in range(many):
            change_control(tmp_path, name, evaluate=True, locks={f"{name} {number}": 0.5})

    command = [sys.executable, "-c", work]
    processes = [subprocess.Popen([*command, name, str(tmp_path)], cwd=PROJECT) for name in ("a", "b")]
    threads = [threading.Thread(target=write, args=(name,)) for name in ("c", "d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait() for process in processes] == [0, 0]
    wanted = read_control(tmp_path)
    assert (wanted.number, wanted.evaluate) == (4 * many, 4 * many)
    assert wanted.locks == {f"{name} {number}": 0.5 for name in "abcd" for number in range(many)}
    assert not list(tmp_path.glob("*.tmp"))


def test_the_control_file_is_replaced_whole(tmp_path):
    change_control(tmp_path, multipliers={"emoji": 2.0})
    with (tmp_path / "control.json").open() as before:
        change_control(tmp_path, multipliers={"emoji": 3.0})
        assert json.load(before)["multipliers"] == {"emoji": 2.0}  # whoever reads has one or the other
    assert read_control(tmp_path).multipliers == {"emoji": 3.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multipliers": {"emoji": 11}}, "steering: multipliers.emoji: found 11: .*less than or equal to 10"),
        ({"multipliers": {"emoji": -0.5}}, "steering: multipliers.emoji: found -0.5: .*greater than or equal to 0"),
        ({"multipliers": {"emoji": float("nan")}}, "steering: multipliers.emoji: found nan: .*finite"),
        ({"multipliers": {"emoji": "much"}}, "steering: multipliers.emoji: found 'much': .*number"),
        ({"locks": {"flags": 1.5}}, "steering: locks.flags: found 1.5: .*less than or equal to 1"),
        ({"teachers": {"dino": 11}}, "steering: teachers.dino: found 11: .*less than or equal to 10"),
        ({"drop_probability": 1.5}, "steering: drop_probability: found 1.5: .*less than or equal to 1"),
        ({"paused": "perhaps"}, "steering: paused: found 'perhaps'"),
        ({"pausd": True}, "steering: pausd: found True"),
        ({"version": steering.VERSION + 1}, "steering: version: found 2"),
    ],
)
def test_what_is_not_valid_is_refused_and_nothing_is_written(tmp_path, changes, message):
    change_control(tmp_path, multipliers={"emoji": 2.0})
    before = (tmp_path / "control.json").read_bytes()
    with pytest.raises(UserError, match=message):
        change_control(tmp_path, **changes)
    assert (tmp_path / "control.json").read_bytes() == before


def test_a_folder_that_is_none_cannot_be_steered(tmp_path):
    with pytest.raises(UserError, match="there is no run in .*nowhere"):
        change_control(tmp_path / "nowhere", paused=True)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b'{"version": 2}', b'{"locks": {"flags": 2}}', b"[]"])
def test_a_control_file_that_cannot_be_read_is_named_and_kept(tmp_path, content):
    file = tmp_path / "control.json"
    file.write_bytes(content)
    for call in (lambda: read_control(tmp_path), lambda: change_control(tmp_path, paused=True)):
        with pytest.raises(UserError, match=r"control\.json: "):
            call()
    assert file.read_bytes() == content


# What was done


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    first, second = steered(1, 5, emoji=2.0), steered(2, 8)
    content = write_log(tmp_path, first, second)
    for end in range(content.index(b"\n") + 1, len(content)):
        (tmp_path / "steering.jsonl").write_bytes(content[:end])
        assert interventions(tmp_path) == [first]
    assert interventions(tmp_path / "nowhere") == []


@pytest.mark.parametrize("line", [b"{}\n", b"no json\n", b'{"number": 1, "step": 2, "speed": 3}\n'])
def test_a_line_that_is_none_of_ours_is_named(tmp_path, line):
    (tmp_path / "steering.jsonl").write_bytes(steered(1, 5).model_dump_json().encode() + b"\n" + line)
    with pytest.raises(UserError, match=r"steering\.jsonl, line 2: "):
        interventions(tmp_path)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"steers": True, "multipliers": {"emoji": 2.0}, "locks": {"flags": 0.3}}, "emoji ×2, flags locked at 30.0%"),
        ({"steers": True}, "the allocation left alone"),
        ({"multipliers": {"emoji": 2.0}, "evaluate": True, "save": True}, "validated, saved"),
        ({"multipliers": {"emoji": 2.0}, "paused": True}, "paused"),
        ({"stop": True}, "stopped"),
        ({"finish": True}, "finished before its last step"),
        ({}, "resumed"),
        ({"paused": True, "refused": "no domain 'x'"}, "refused: no domain 'x', paused"),
        ({"steers": True, "locks": dict.fromkeys("abcdefg", 0.1)}, "a, b, c, d, e, f, g locked at 10.0%"),
        ({"steers": True, "multipliers": {"a": 2.0}, "locks": {"a": 0.5}}, "a locked at 50.0%"),
        (
            {"steers": True, "locks": {"a": 0.5}, "teachers": {"dinov2": 2.0}, "drop_probability": 0.3},
            "a locked at 50.0%, teacher dinov2 ×2, teachers dropped at 30%",
        ),
        ({"steers": True, "drop_probability": 0.0}, "teachers dropped at 0%"),
        ({"steers": True, "teachers": dict.fromkeys("abc", 2.0)}, "teacher a, teacher b, teacher c ×2"),
    ],
)
def test_an_intervention_says_what_was_done(values, text):
    assert str(Intervention(number=1, step=5, **values)) == text


def test_only_what_changes_the_weights_matters():
    fields = ("steers", "evaluate", "save", "stop", "paused")
    matters = [Intervention(number=1, step=5, **{field: True}).matters for field in fields]
    assert matters == [True, True, False, False, False]


# What the loop is told


def test_a_change_is_done_once_and_stands_in_the_log(tmp_path):
    commands = follow(tmp_path)
    assert commands.take(0) is None
    change_control(tmp_path, "mine", multipliers={"emoji": 2.0}, locks={"flags": 0.25})
    asked = commands.take(7)
    expected = {"number": 1, "step": 7, "panel": "mine", "steers": True, "multipliers": {"emoji": 2.0}}
    assert asked == Intervention(**expected, locks={"flags": 0.25})
    assert commands.take(7) is None
    assert interventions(tmp_path) == [asked]


def test_looking_at_a_control_file_that_has_not_changed_does_not_read_it(tmp_path, monkeypatch):
    commands = follow(tmp_path)
    change_control(tmp_path, save=True)
    reads = []
    monkeypatch.setattr(steering, "read_control", lambda folder: reads.append(folder) or read_control(folder))
    assert commands.take(1).save
    assert [commands.take(step) for step in range(2, 50)] == [None] * 48
    assert len(reads) == 1


def test_setting_what_is_in_force_already_is_no_intervention(tmp_path):
    commands = follow(tmp_path)
    change_control(tmp_path, multipliers={"emoji": 2.0})
    commands.take(1)
    change_control(tmp_path, "another", multipliers={"emoji": 2.0, "flags": 1.0})
    assert commands.take(2) is None
    assert len(interventions(tmp_path)) == 1


def test_each_request_is_followed_once_and_requests_from_before_the_start_are_void(tmp_path):
    change_control(tmp_path, evaluate=True, save=True, stop=True)
    commands = follow(tmp_path)
    assert commands.take(0) is None
    change_control(tmp_path, evaluate=True)
    change_control(tmp_path, evaluate=True, save=True)
    asked = commands.take(1)
    assert (asked.evaluate, asked.save, asked.stop, asked.steers) == (True, True, False, False)
    assert commands.take(1) is None
    change_control(tmp_path, stop=True)
    assert commands.take(2).stop


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"multipliers": {"emojy": 2.0}}, "control.json: multipliers: no domain 'emojy'; did you mean 'emoji'?"),
        ({"locks": {"x": 0.5}}, "control.json: locks: no domain 'x'; valid: earth, emoji, flags"),
        ({"multipliers": dict.fromkeys(NAMES, 0.0)}, "no domain is left to train"),
        ({"locks": dict.fromkeys(NAMES, 0.0)}, "no domain is left to train"),
        ({"multipliers": {"earth": 0.0}, "locks": {"flags": 0.0, "emoji": 0.0}}, "no domain is left to train"),
    ],
)
def test_what_cannot_be_followed_is_refused_once_and_changes_nothing(tmp_path, changes, reason):
    commands = follow(tmp_path)
    change_control(tmp_path, multipliers={"emoji": 3.0})
    assert commands.take(1).steers
    change_control(tmp_path, **changes)
    asked = commands.take(2)
    assert reason in asked.refused
    assert (asked.steers, asked.matters, asked.multipliers, asked.locks) == (False, False, {"emoji": 3.0}, {})
    assert commands.take(3) is None
    assert [entry.refused != "" for entry in interventions(tmp_path)] == [False, True]
    nothing = dict.fromkeys([*NAMES, "emojy", "x"])
    change_control(tmp_path, multipliers=nothing, locks=nothing | {"flags": 0.5})
    assert commands.take(4).locks == {"flags": 0.5}


def test_domains_may_be_zero_as_long_as_one_is_left(tmp_path):
    commands = follow(tmp_path)
    change_control(tmp_path, multipliers={"emoji": 0.0, "flags": 0.0}, locks={"flags": 0.1})
    assert commands.take(1).steers
    change_control(tmp_path, multipliers={"earth": 0.0})
    assert commands.take(2).steers


@pytest.mark.parametrize(
    ("taught_by", "changes", "message"),
    [
        ((), {"teachers": {"dino": 2.0}}, "this run has no frozen teachers, whose weights or drop_probability could"),
        ((), {"drop_probability": 0.5}, "this run has no frozen teachers, whose weights or drop_probability could"),
        (("clip", "dino"), {"teachers": {"dinov": 2.0}}, "teachers: no teacher 'dinov'; did you mean 'dino'?"),
        (("clip", "dino"), {"teachers": {"clip": 0.0, "dino": 0.0}}, "no teacher is left to learn from: every factor"),
    ],
)
def test_teachers_that_are_none_or_that_are_all_muted_are_refused_and_the_rest_stays(
    tmp_path, taught_by, changes, message
):
    commands = follow(tmp_path, teachers_known=taught_by)
    change_control(tmp_path, multipliers={"emoji": 3.0})
    commands.take(1)
    change_control(tmp_path, **changes)
    asked = commands.take(2)
    assert f"control.json: {message}" in asked.refused
    assert (asked.steers, asked.wish) == (False, Wish(multipliers={"emoji": 3.0}))
    assert read_control(tmp_path).wish == asked.wish  # taken back
    assert commands.take(3) is None


def test_a_teacher_s_weight_and_the_drop_probability_are_interventions_of_their_own(tmp_path):
    commands = follow(tmp_path, teachers_known=("clip", "dino"))
    change_control(tmp_path, "me", teachers={"dino": 0.0}, drop_probability=0.25)
    asked = commands.take(3)
    assert (asked.steers, asked.matters, asked.step) == (True, True, 3)
    assert asked.wish == Wish(teachers={"dino": 0.0}, drop_probability=0.25)
    assert interventions(tmp_path) == [asked]
    change_control(tmp_path, drop_probability=None)
    assert commands.take(4).wish == Wish(teachers={"dino": 0.0})
    change_control(tmp_path, teachers={"dino": 0.0})
    assert commands.take(5) is None
    resumed = follow(tmp_path, n_taken=1, teachers_known=("clip", "dino"), **dict(asked.wish))
    assert resumed.take(3) is None
    assert resumed.take(4).wish == Wish(teachers={"dino": 0.0})


def test_the_teachers_of_the_first_record_are_known_before_the_run_is_asked(tmp_path):
    for teachers, message in (
        ([], "steering: this run has no frozen teachers"),
        (["clip", "dino"], "steering: teachers: no teacher 'clib'; did you mean 'clip'"),
    ):
        first = {"kind": "start", "step": 0, "n_images": dict.fromkeys(NAMES, 3), "teachers": teachers}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(first) + "\n")
        with pytest.raises(UserError, match=message):
            change_control(tmp_path, teachers={"clib": 2.0})
    assert change_control(tmp_path, teachers={"clip": 2.0, "of an older run": None}).teachers == {"clip": 2.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "start", "n_images": dict.fromkeys(NAMES, 3)}) + "\n")
    assert change_control(tmp_path, teachers={"any": 2.0}).teachers["any"] == 2.0  # an older record names none


@pytest.mark.parametrize("content", ["{", '{"version": 99}', '{"multipliers": {"emoji": 1e9}}'])
def test_a_file_broken_by_hand_is_refused_once_and_the_run_goes_on_with_what_was_in_force(tmp_path, content):
    commands = follow(tmp_path)
    change_control(tmp_path, multipliers={"emoji": 3.0})
    commands.take(1)
    good = (tmp_path / "control.json").read_text()
    (tmp_path / "control.json").write_text(content)
    asked = commands.take(2)
    assert "control.json: " in asked.refused
    assert (asked.multipliers, asked.steers) == ({"emoji": 3.0}, False)
    assert [commands.take(step) for step in (2, 3)] == [None, None]
    (tmp_path / "control.json").write_text(good.replace("3.0", "4.0"))
    assert commands.take(4).multipliers == {"emoji": 4.0}


def test_a_removed_control_file_asks_for_nothing_more(tmp_path):
    commands = follow(tmp_path)
    change_control(tmp_path, multipliers={"emoji": 3.0})
    commands.take(1)
    (tmp_path / "control.json").unlink()
    assert commands.take(2).multipliers == {}
    assert commands.take(3) is None


def test_a_paused_run_waits_and_can_be_steered_meanwhile(tmp_path, monkeypatch):
    commands = follow(tmp_path)
    change_control(tmp_path, paused=True)
    assert commands.take(3).paused
    change_control(tmp_path, locks={"flags": 0.5})
    meanwhile = commands.take(3)
    assert meanwhile.steers
    assert meanwhile.paused
    clock = resume_in_nap(monkeypatch, tmp_path, 10)
    asked = commands.take(3)
    assert (asked.paused, asked.matters, str(asked)) == (False, False, "resumed")
    assert clock.naps == [steering.POLL_SECONDS] * 10
    assert commands.paused_seconds == pytest.approx(10 * steering.POLL_SECONDS)
    assert commands.take(3) is None


def test_a_refusal_does_not_end_a_pause(tmp_path):
    commands = follow(tmp_path)
    change_control(tmp_path, paused=True)
    commands.take(3)
    change_control(tmp_path, multipliers={"emojy": 2.0})
    asked = commands.take(3)
    assert asked.refused
    assert asked.paused  # whoever reads the log sees that the run still waits


def test_a_control_file_broken_by_hand_does_not_end_a_pause(tmp_path):
    commands = follow(tmp_path)
    change_control(tmp_path, paused=True)
    commands.take(3)
    (tmp_path / "control.json").write_text("{")
    asked = commands.take(3)
    assert "control.json: " in asked.refused
    assert asked.paused


def test_a_pause_is_not_refused_for_an_allocation_that_is_in_force(tmp_path):
    weights = [1.0, 1.0, 1.0]
    commands = follow(tmp_path, weights=lambda: weights)
    change_control(tmp_path, multipliers={"emoji": 0.0})
    assert commands.take(1).steers
    weights[1:] = [0.0, 0.0]  # a change to this allocation would be refused now
    change_control(tmp_path, paused=True)
    asked = commands.take(2)
    assert (asked.paused, asked.refused) == (True, "")


def test_what_somebody_asks_for_while_a_change_is_refused_is_not_lost(tmp_path):
    meanwhile = [{"flags": 0.5}]

    def weights() -> list[float]:
        if meanwhile:
            change_control(tmp_path, "another", locks=meanwhile.pop())
        return [1.0, 1.0, 1.0]

    commands = follow(tmp_path, weights=weights)
    change_control(tmp_path, "me", multipliers=dict.fromkeys(NAMES, 0.0))
    assert "no domain is left" in commands.take(1).refused
    assert commands.take(2).locks == {"flags": 0.5}


def test_a_pause_ends_with_the_process_that_was_paused(tmp_path):
    change_control(tmp_path, paused=True, multipliers={"emoji": 2.0})
    commands = follow(tmp_path)
    assert read_control(tmp_path).paused is False
    asked = commands.take(0)
    assert (asked.multipliers, asked.paused) == ({"emoji": 2.0}, False)


def test_what_panels_left_half_written_when_they_were_killed_is_removed(tmp_path):
    (tmp_path / "control.json.123.tmp").write_bytes(b"{")
    follow(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["control.json", "control.lock"]


# What comes again


def test_what_the_state_does_not_hold_yet_comes_again_at_its_step(tmp_path):
    entries = [
        steered(1, 2, emoji=2.0),
        Intervention(number=2, step=3, save=True),
        steered(3, 5, flags=3.0).model_copy(update={"save": True, "stop": True, "paused": True}),
        Intervention(number=4, step=8, evaluate=True, multipliers={"flags": 3.0}),
    ]
    log = write_log(tmp_path, *entries)
    commands = follow(tmp_path, n_taken=1, multipliers={"emoji": 2.0})
    assert [commands.take(step) for step in (3, 4)] == [None, None]
    again = commands.take(5)
    assert again.multipliers == {"flags": 3.0}
    assert again.steers
    assert (again.save, again.stop, again.paused) == (False, False, False)  # those belong to the past
    assert [commands.take(step) for step in (5, 6, 7)] == [None] * 3
    assert commands.take(8).evaluate
    assert commands.take(9) is None
    assert (tmp_path / "steering.jsonl").read_bytes() == log


def test_nothing_comes_again_that_the_state_holds(tmp_path):
    write_log(tmp_path, steered(1, 2, emoji=2.0), steered(2, 5, flags=3.0))
    commands = follow(tmp_path, n_taken=2, multipliers={"flags": 3.0})
    assert [commands.take(step) for step in range(5, 20)] == [None] * 15


def test_after_a_restart_a_run_without_a_control_file_wants_what_its_log_says(tmp_path):
    write_log(tmp_path, steered(1, 2, emoji=2.0), steered(2, 5, flags=3.0))
    commands = follow(tmp_path, n_taken=1, multipliers={"emoji": 2.0})
    assert read_control(tmp_path).multipliers == {"flags": 3.0}
    assert commands.take(4) is None
    assert commands.take(5).multipliers == {"flags": 3.0}


def test_a_run_without_a_control_file_wants_the_last_of_several_that_are_to_be_repeated(tmp_path):
    write_log(tmp_path, steered(1, 2, emoji=2.0), steered(2, 5, flags=3.0))
    commands = follow(tmp_path)
    assert read_control(tmp_path).multipliers == {"flags": 3.0}
    taken = [commands.take(step) for step in range(6)]
    assert [entry.multipliers for entry in taken if entry] == [{"emoji": 2.0}, {"flags": 3.0}]


def test_what_lies_before_the_checkpoint_does_not_hold_up_what_is_to_be_repeated(tmp_path):
    write_log(tmp_path, Intervention(number=1, step=2, save=True), steered(2, 5, emoji=2.0))
    commands = follow(tmp_path)
    assert [commands.take(step) for step in (3, 4)] == [None, None]
    assert commands.take(5) == steered(2, 5, emoji=2.0)


def test_what_is_repeated_late_says_the_step_at_which_it_is_done(tmp_path):
    write_log(tmp_path, steered(1, 2, emoji=2.0))
    assert follow(tmp_path).take(4).step == 4


def test_a_refusal_has_a_number_of_its_own_also_before_what_is_to_be_repeated(tmp_path):
    write_log(tmp_path, steered(1, 5, emoji=2.0), steered(2, 8, flags=3.0))
    commands = follow(tmp_path)
    for step, content in ((3, "{"), (4, "[")):
        (tmp_path / "control.json").write_text(content)
        assert commands.take(step).refused
    assert sorted(entry.number for entry in interventions(tmp_path)) == [1, 2, 3, 4]


def test_a_new_change_during_the_repeated_part_drops_the_rest(tmp_path):
    first, second, third = steered(1, 2, emoji=2.0), steered(2, 5, flags=3.0), steered(3, 8, earth=4.0)
    write_log(tmp_path, first, second, third)
    commands = follow(tmp_path, n_taken=1, multipliers={"emoji": 2.0})
    assert commands.take(5) == second
    change_control(tmp_path, multipliers={"earth": 9.0})
    asked = commands.take(6)
    assert asked.multipliers["earth"] == 9.0
    assert [commands.take(step) for step in (7, 8, 9)] == [None] * 3
    assert interventions(tmp_path) == [first, second, asked]
    assert asked.number > second.number


def test_what_was_saved_on_the_way_that_was_left_is_dropped_too(tmp_path):
    first = steered(1, 2, emoji=2.0)
    write_log(tmp_path, first, Intervention(number=2, step=7, save=True), steered(3, 8, earth=4.0))
    commands = follow(tmp_path, n_taken=1, multipliers={"emoji": 2.0})
    change_control(tmp_path, multipliers={"flags": 9.0})
    asked = commands.take(4)
    assert interventions(tmp_path) == [first, asked]


@pytest.mark.parametrize("changes", [{"save": True}, {"panel": "another"}])
def test_what_does_not_matter_leaves_what_is_to_be_repeated(tmp_path, changes):
    """A control file says what was set last, which is not in force again yet: that alone is nothing new."""
    write_log(tmp_path, steered(1, 5, emoji=2.0))
    change_control(tmp_path, multipliers={"emoji": 2.0})
    commands = follow(tmp_path)
    change_control(tmp_path, **changes)
    asked = commands.take(3)
    assert asked is None or (asked.save and not asked.steers)
    assert commands.take(4) is None
    assert commands.take(5) == steered(1, 5, emoji=2.0)
    assert [entry for entry in interventions(tmp_path) if entry.matters] == [steered(1, 5, emoji=2.0)]


def test_a_validation_ends_the_repeating_and_what_is_wanted_comes_with_it(tmp_path):
    write_log(tmp_path, steered(1, 5, emoji=2.0))
    change_control(tmp_path, multipliers={"emoji": 2.0})
    commands = follow(tmp_path)
    change_control(tmp_path, evaluate=True)
    asked = commands.take(3)
    assert (asked.evaluate, asked.steers, asked.multipliers) == (True, True, {"emoji": 2.0})
    assert commands.take(5) is None


def test_a_slider_moved_while_nobody_trained_comes_first(tmp_path):
    write_log(tmp_path, steered(1, 2, emoji=2.0), steered(2, 5, flags=3.0))
    change_control(tmp_path, multipliers={"earth": 4.0})
    commands = follow(tmp_path, n_taken=1, multipliers={"emoji": 2.0})
    asked = commands.take(3)
    assert (asked.step, asked.multipliers) == (3, {"earth": 4.0})
    assert [commands.take(step) for step in (4, 5)] == [None, None]
    assert [entry.step for entry in interventions(tmp_path)] == [2, 3]


def test_taking_back_while_nobody_trained_what_is_still_to_be_repeated_counts_too(tmp_path):
    write_log(tmp_path, steered(1, 5, emoji=2.0))
    change_control(tmp_path, multipliers={"emoji": 2.0})
    change_control(tmp_path, multipliers={"emoji": None})
    commands = follow(tmp_path)
    asked = [commands.take(step) for step in range(3, 9)]
    assert [entry.multipliers for entry in asked if entry is not None and entry.steers] in ([], [{}])
    assert not any(entry.multipliers for entry in interventions(tmp_path))


def test_what_was_done_before_the_checkpoint_stays_in_the_log(tmp_path):
    """A stop is in the past of the state, although the state does not count it."""
    stop = Intervention(number=2, step=4, stop=True, multipliers={"emoji": 2.0})
    write_log(tmp_path, steered(1, 2, emoji=2.0), stop)
    change_control(tmp_path, multipliers={"emoji": 5.0})
    commands = follow(tmp_path, n_taken=1, multipliers={"emoji": 2.0})
    assert commands.take(4).multipliers == {"emoji": 5.0}
    assert stop in interventions(tmp_path)


def test_a_log_that_lacks_what_the_state_holds_is_named(tmp_path):
    write_log(tmp_path, steered(1, 2, emoji=2.0))
    with pytest.raises(UserError, match=r"steering\.jsonl"):
        follow(tmp_path, n_taken=2, multipliers={"emoji": 2.0})


# Replays


@pytest.fixture
def other(tmp_path):
    """A run that was steered at 2 and 6, validated at 8, and paused and saved on the way."""
    write_log(
        tmp_path / "other",
        steered(3, 2, emoji=2.0),
        Intervention(number=4, step=3, paused=True, multipliers={"emoji": 2.0}),
        Intervention(number=5, step=4, save=True, multipliers={"emoji": 2.0}),
        steered(6, 6, flags=3.0),
        Intervention(number=9, step=8, evaluate=True, multipliers={"flags": 3.0}),
    )
    (tmp_path / "mine").mkdir()
    return tmp_path / "other"


def test_a_replay_does_what_mattered_and_logs_it_as_it_is_done(tmp_path, other):
    mine = tmp_path / "mine"
    commands, steps = follow(mine, replay=other), []
    for step in range(10):
        assert [entry.step for entry in interventions(mine)] == steps
        if (asked := commands.take(step)) is not None:
            steps.append(step)
            assert asked.matters
    assert steps == [2, 6, 8]
    theirs = [entry for entry in interventions(other) if entry.matters]
    for ours, entry in zip(interventions(mine), theirs, strict=True):
        assert ours.model_copy(update={"number": entry.number}) == entry
    numbers = [entry.number for entry in interventions(mine)]
    assert numbers == sorted(set(numbers))


def test_a_replay_goes_on_after_it_was_killed(tmp_path, other):
    mine = tmp_path / "mine"
    commands = follow(mine, replay=other)
    assert [commands.take(step) is not None for step in (2, 6)] == [True, True]
    before = interventions(mine)
    commands = follow(mine, n_taken=1, multipliers={"emoji": 2.0}, replay=other)  # the last checkpoint was at step 4
    assert [commands.take(step) for step in (4, 5)] == [None, None]
    assert commands.take(6).multipliers == {"flags": 3.0}
    assert commands.take(8).evaluate
    assert [entry.step for entry in interventions(mine)] == [2, 6, 8]
    assert [entry.multipliers for entry in interventions(mine)[:2]] == [entry.multipliers for entry in before]


def test_a_replay_cannot_be_steered_and_says_so_in_its_log(tmp_path, other):
    mine = tmp_path / "mine"
    commands = follow(mine, replay=other)
    commands.take(2)
    for changes in ({"multipliers": {"earth": 7.0}}, {"evaluate": True}):
        change_control(mine, **changes)
        asked = commands.take(3)
        assert "this run repeats another one's interventions" in asked.refused
        assert not asked.matters
        assert asked.multipliers == {"emoji": 2.0}
    assert commands.take(6).multipliers == {"flags": 3.0}
    assert [entry.step for entry in interventions(mine)] == [2, 3, 3, 6]


@pytest.mark.parametrize("step", [1, 4, 9])
def test_a_replay_can_be_saved_and_stopped_at_any_step(tmp_path, other, step):
    mine = tmp_path / "mine"
    commands = follow(mine, replay=other)
    for before in range(step):
        commands.take(before)
    change_control(mine, save=True, stop=True)
    asked = commands.take(step)
    assert (asked.save, asked.stop, asked.steers, asked.refused) == (True, True, False, "")


def test_what_was_asked_of_a_replay_before_it_began_is_not_followed(tmp_path, other):
    mine = tmp_path / "mine"
    change_control(mine, multipliers={"earth": 7.0})
    commands = follow(mine, replay=other)
    assert [commands.take(step) for step in (0, 1)] == [None, None]
    assert commands.take(2).multipliers == {"emoji": 2.0}


def test_sigterm_asks_a_run_to_stop_paused_or_not_and_leaves_what_is_to_be_repeated(tmp_path):
    content = write_log(tmp_path, steered(1, 9, emoji=2.0))
    with Notice() as notice:
        commands = follow(tmp_path, notice=notice)
        notice.heed()
        assert commands.take(3) is None
        change_control(tmp_path, paused=True)
        assert commands.take(3).paused
        signal.raise_signal(signal.SIGTERM)
        asked = commands.take(3)
        assert (asked.stop, asked.panel, asked.step, asked.matters) == (True, "SIGTERM", 3, False)
        with pytest.raises(RunStoppedError, match="between two checkpoints, as SIGTERM asked for; run the same again"):
            notice.heed()
    assert (tmp_path / "steering.jsonl").read_bytes().endswith(content)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_only_the_main_thread_takes_note_of_sigterm():
    def enter():
        with Notice():
            handlers.append(signal.getsignal(signal.SIGTERM))

    handlers = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [signal.SIG_DFL]


def test_the_log_is_replaced_whole(tmp_path):
    commands = follow(tmp_path)
    change_control(tmp_path, save=True)
    commands.take(1)
    with (tmp_path / "steering.jsonl").open() as before:
        change_control(tmp_path, save=True)
        commands.take(2)
        assert len(before.readlines()) == 1
    assert len(interventions(tmp_path)) == 2
    assert os.listdir(tmp_path).count("steering.jsonl") == 1


def test_a_stop_beside_a_refused_allocation_stops_and_the_refused_is_taken_back(tmp_path):
    commands = follow(tmp_path)
    change_control(tmp_path, "me", multipliers={"emoji": 2.0})
    assert commands.take(1).multipliers == {"emoji": 2.0}
    change_control(tmp_path, "me", multipliers=dict.fromkeys(NAMES, 0.0), stop=True)
    refused = commands.take(2)
    assert "no domain is left" in refused.refused
    assert (refused.stop, refused.steers, refused.multipliers) == (True, False, {"emoji": 2.0})
    assert read_control(tmp_path).multipliers == {"emoji": 2.0}
    assert commands.take(3) is None
    change_control(tmp_path, "me", locks={"flags": 0.5})
    assert commands.take(4).locks == {"flags": 0.5}


def test_numbers_go_on_from_the_log_where_the_control_file_was_removed(tmp_path):
    commands = follow(tmp_path)
    first = change_control(tmp_path, "me", multipliers={"emoji": 2.0}).number
    commands.take(1)
    (tmp_path / "control.json").unlink()
    second = change_control(tmp_path, "me", save=True).number
    assert second > first
    assert commands.take(2).number == second


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(UserError, match="cannot be steered: .*lock: cannot be written: Permission denied"):
        change_control(tmp_path, save=True)


# While a process loads


def test_what_is_asked_for_while_the_process_loads_counts(tmp_path):
    change_control(tmp_path, stop=True, save=True, paused=True)  # of a process that is gone
    before = read_control(tmp_path)
    change_control(tmp_path, "a person", stop=True)
    asked = follow(tmp_path, before=before).take(0)
    assert (asked.step, asked.stop, asked.save, asked.paused) == (0, True, False, False)
    assert interventions(tmp_path) == [asked]


def test_a_pause_while_the_process_loads_counts(tmp_path, monkeypatch):
    before = read_control(tmp_path)
    change_control(tmp_path, paused=True)
    commands = follow(tmp_path, before=before)
    assert commands.take(0).paused
    resume_in_nap(monkeypatch, tmp_path, 3)
    assert not commands.take(0).paused
    assert commands.paused_seconds == pytest.approx(3 * steering.POLL_SECONDS)


def test_a_domain_that_the_run_does_not_have_is_refused_at_once_and_nothing_is_lost(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "start", "n_images": dict.fromkeys(NAMES, 3)}) + "\n")
    change_control(tmp_path, multipliers={"emoji": 2.0}, locks={"flags": 0.2})
    for field in ("multipliers", "locks"):
        with pytest.raises(UserError, match=f"steering: {field}: no domain 'emojy'; did you mean 'emoji'"):
            change_control(tmp_path, **{field: {"emojy": 0.5}})
    wanted = change_control(tmp_path, multipliers={"of an older run": None})  # what is taken out need not be there
    assert (wanted.multipliers, wanted.locks) == ({"emoji": 2.0}, {"flags": 0.2})


def test_a_file_that_is_damaged_while_a_change_is_refused_does_not_end_the_run(tmp_path):
    def weights():
        (tmp_path / "control.json").write_text("{")
        return [1.0, 1.0, 1.0]

    commands = follow(tmp_path, weights=weights)
    change_control(tmp_path, multipliers=dict.fromkeys(NAMES, 0.0))
    assert "no domain is left to train" in commands.take(1).refused
    assert "control.json: " in commands.take(1).refused
    assert commands.take(2) is None


def test_what_one_wish_asks_for_and_another_did_not_is_said_and_can_be_asked_for():
    before = Wish(multipliers={"emoji": 3.0}, locks={"flags": 0.2}, drop_probability=0.5, rate=0.5)
    after = Wish(multipliers={"earth": 0.0}, locks={"emoji": 0.3}, teachers={"one": 2.0})
    said = "emoji ×1, earth ×0, flags let go, emoji locked at 30.0%, teacher one ×2"
    said += ", teachers dropped as by the parameters, learning rate ×1"
    assert changed(before, after) == said
    assert changed(after, after) == ""
    assert changes_between(before, after) == {
        "multipliers": {"emoji": None, "earth": 0.0},
        "locks": {"flags": None, "emoji": 0.3},
        "teachers": {"one": 2.0},
        "drop_probability": None,
        "rate": 1.0,
    }
