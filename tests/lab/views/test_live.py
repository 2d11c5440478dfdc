"""What is shown while a run trains: few lines in a log, one output in a cell, an honest estimate of the time."""

import io
import itertools
import math
import re
from contextlib import redirect_stdout

import pandas as pd
import pytest

from udonlib.errors import UserError
from udonlib.lab.views import live
from udonlib.lab.views.live import ProgressLine
from udonlib.params import TrainParams
from udonlib.runs import watch
from udonlib.runs.run import Run

PARAMS = TrainParams(steps=1000, frozen_steps=0, eval_every=300, log_every=10)
DOMAINS = ["emoji", "<b>flags"]


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self):
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def train(step: int, value: float = 2.0) -> dict:
    losses = {name: {"total": value + place} for place, name in enumerate(DOMAINS)}
    return {"kind": "train", "step": step, "images_per_s": 1150.4, "losses": losses}


def validation(step: int, value: float, best: bool) -> dict:
    rows = [
        ("student", "emoji", "merged", value + 5),
        ("student", "mean", "merged", value),
        ("student", "mean", "separate", 99.0),
    ]
    table = pd.DataFrame(rows, columns=["embedder", "domain", "index", "r_at_1"])
    return {"kind": "validation", "step": step, "r_at_1": value, "best": best, "table": table}


def records(clock: Clock, first: int = 0, step_seconds: float = 0.1, validation_seconds: float = 7.0, stop: int = 1000):
    """A run's records, with the time that it takes between them."""
    yield {"kind": "start", "step": first}
    yield {
        "kind": "allocation",
        "step": first,
        "weights": {DOMAINS[0]: 0.3, DOMAINS[1]: 0.7},
        "images_seen": dict.fromkeys(DOMAINS, 64),
    }
    for step in range(first + 10, stop + 1, 10):
        clock.now += 10 * step_seconds
        yield train(step)
        if step % 300 == 0 or step == 1000:
            clock.now += validation_seconds
            yield validation(step, step / 20, step != 900)
    if stop == 1000:
        yield {"kind": "end", "step": 1000, "seconds": 754.0, "test_r_at_1": 41.23}


def after(step: int, **options) -> watch.Progress:
    clock = Clock()
    progress = watch.Progress(PARAMS, clock)
    for record in records(clock, **options):
        if record["step"] > step:
            break
        progress.update(record)
    return progress


def test_the_line_says_step_speed_loss_recall_and_remaining_time():
    line = "step 400/1000 (40%)  1150 images/s  loss 2.50  R@1 15.0 (best) at step 300  1 min 21 s left"
    assert after(400).line() == line
    assert after(300).line().endswith("R@1 15.0 (best)  1 min 31 s left")
    assert "R@1 45.0 (best 30.0 at step 600)" in after(900).line()


def test_the_estimate_counts_the_steps_and_the_validations_to_come():
    # 600 steps of 0.1 s and, at 600, 900 and 1000, three validations of 7 s
    assert after(400).seconds_left() == pytest.approx(60 + 3 * 7)
    assert after(1000).seconds_left() == 0


def test_the_estimate_follows_a_changed_pace():
    clock = Clock()
    progress = watch.Progress(PARAMS, clock)
    progress.update({"kind": "start", "step": 0})
    for step in range(10, 801, 10):
        clock.now += 1 if step <= 400 else 5
        progress.update(train(step))
    assert progress.seconds_left() == pytest.approx(200 * 0.5)


def test_there_is_no_estimate_before_ten_steps():
    clock = Clock()
    progress = watch.Progress(PARAMS, clock)
    progress.update({"kind": "start", "step": 0})
    clock.now += 9
    progress.update(train(9))
    assert progress.seconds_left() is None
    assert progress.line().endswith("estimating the time")


@pytest.mark.parametrize("in_a_cell", [True, False])
def test_what_is_to_be_known_at_the_start_is_said_once(capsys, in_a_cell):
    clock = Clock()
    progress = watch.Progress(PARAMS, clock)
    progress.update({"kind": "start", "step": 0, "notices": ["<slow> here"]})
    if in_a_cell:
        assert "Note: &lt;slow&gt; here." in live.page(progress)
    else:
        view = live._Training(progress, False, clock)
        for step in (10, 20):
            clock.now += 10
            progress.update(train(step))
            view.draw(now=True)
        assert capsys.readouterr().out.count("Note: <slow> here.\n") == 1


def slow(step: int) -> dict:
    return {"kind": "progress", "step": step, "images_per_s": 25.0}


def test_a_slow_run_has_an_estimate_before_its_first_record(capsys):
    """At 25 images/s a step of 128 takes five seconds, and fifty of them four minutes."""
    clock = Clock()
    progress = watch.Progress(PARAMS, clock)
    view = live._Training(progress, False, clock)
    progress.update({"kind": "start", "step": 0})
    clock.now += 9.0  # the first step loads libraries and images
    progress.update(slow(1))
    assert progress.seconds_left() is None
    clock.now += 5.12
    progress.update(slow(2))
    assert progress.seconds_left() == pytest.approx(998 * 5.12)
    view.draw(now=False)
    assert capsys.readouterr().out == "step 2/1000 (0%)  25 images/s  1 h 25 min left\n"


def test_the_estimate_knows_validations_and_test_before_the_first_of_them():
    clock = Clock()
    progress = watch.Progress(PARAMS, clock)
    progress.update({"kind": "start", "step": 0, "n_evaluated": {"val": 640, "test": 1280}})
    for step in (10, 20):
        clock.now += 1.28
        progress.update(train(step))
    per_image = 0.001 / 3
    expected = 980 * 0.128 + 4 * 640 * per_image + 2 * 1280 * per_image
    assert progress.seconds_left() == pytest.approx(expected)
    clock.now += 7
    progress.update(validation(20, 3.0, True))
    assert progress.seconds_left() == pytest.approx(980 * 0.128 + 4 * 7 + 2 * 14)


def test_small_images_are_not_taken_for_a_fast_run():
    """Three stages: steps of 24, 32 and 40 pixels, then of 48, each as costly as its pixels and an eighth."""
    clock = Clock()
    growing = PARAMS.model_copy(update={"image_size": 48, "start_image_size": 24, "growing_steps": 300})
    progress = watch.Progress(growing, clock)
    progress.update({"kind": "start", "step": 0})

    def cost(size: int) -> float:
        return 0.1 * (0.125 + 0.875 * (size / 48) ** 2)

    for step in (10, 20):
        clock.now += 10 * cost(24)
        progress.update(train(step))
    assert progress.seconds_left() == pytest.approx(80 * cost(24) + 100 * cost(32) + 100 * cost(40) + 700 * 0.1)


def test_a_resumed_run_is_not_taken_for_a_fast_one():
    assert after(720, first=700).seconds_left() == pytest.approx(280 * 0.1, abs=1e-6)


def test_frozen_steps_are_not_taken_for_a_fast_run():
    """A forward pass alone is a third of a step."""
    clock = Clock()
    progress = watch.Progress(PARAMS.model_copy(update={"frozen_steps": 500}), clock)
    progress.update({"kind": "start", "step": 0})
    for step in (10, 20):
        clock.now += 10 * 0.1 / 3
        progress.update(train(step))
    assert progress.seconds_left() == pytest.approx(480 * 0.1 / 3 + 500 * 0.1)
    assert progress.line().endswith("1 min 06 s left")


def test_lines_come_every_few_seconds_and_at_each_validation(capsys):
    clock = Clock()
    live.show(records(clock), PARAMS, live=False, clock=clock)
    lines = capsys.readouterr().out.splitlines()
    validated = [line for line in lines if re.match(r"step (300|600|900|1000)/", line)]
    assert sum("R@1 15.0 (best)  " in line for line in lines) == 1
    assert len(validated) >= 4
    assert len(lines) < 40
    assert lines[-1].endswith("test R@1 41.2, finished in 12 min 34 s")
    assert len(set(lines)) == len(lines)


def test_a_long_run_fills_no_log(capsys):
    clock = Clock()
    params = PARAMS.model_copy(update={"steps": 100_000, "eval_every": 50_000})
    live.show(
        (train(step) for step in range(10, 100_001, 10) if not setattr(clock, "now", 3.0 * step)), params, False, clock
    )
    assert len(capsys.readouterr().out.splitlines()) < 700


def test_showing_returns_the_last_record_and_takes_every_one():
    clock = Clock()
    taken = []
    with redirect_stdout(io.StringIO()):
        last = live.show((taken.append(r) or r for r in records(clock)), PARAMS, live=False, clock=clock)
    assert last == taken[-1]
    assert last["kind"] == "end"
    assert len(taken) == 107


def test_a_run_that_was_finished_before_says_when_it_was_and_not_that_it_took_no_time(capsys):
    live.show([{"kind": "end", "step": 1000, "seconds": 754.0, "test_r_at_1": 41.2}], PARAMS, live=False, clock=Clock())
    assert capsys.readouterr().out == "step 1000/1000 (100%)  test R@1 41.2, finished in 12 min 34 s\n"


def test_an_interrupt_while_drawing_ends_the_training_too(monkeypatch):
    ended = []

    def records():
        try:
            for step in range(1, 100):
                yield train(step)
        finally:
            ended.append(True)

    def interrupted(self, now):
        if self.progress.step >= 3 and self.progress.state == "running":
            raise KeyboardInterrupt

    monkeypatch.setattr(live._Training, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt) as kept:  # as IPython keeps the traceback, and with it our generator
        live.show(records(), PARAMS, live=False)
    assert ended == [True]
    assert kept


def test_an_interrupt_passes_with_the_last_state_shown(capsys):
    clock = Clock()

    def interrupted():
        yield from records(clock, stop=70)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        live.show(interrupted(), PARAMS, live=False, clock=clock)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "step 70/1000 (7%)  1150 images/s  loss 2.50  stopped after 7 s; run the same again to go on"
    )


class Screen:
    """Stands for the front end: one output, and how often it was drawn."""

    def __init__(self, monkeypatch):
        self.n_outputs, self.drawn = 0, []
        monkeypatch.setattr(live, "display", self.display)

    def display(self, content, display_id):
        self.n_outputs += 1
        return self

    def update(self, content):
        self.drawn.append(content.data)


def test_a_cell_is_one_output_redrawn_at_most_twice_a_second(monkeypatch):
    screen, clock = Screen(monkeypatch), Clock()
    live.show(records(clock, step_seconds=0.01), PARAMS, live=True, clock=clock)
    assert screen.n_outputs == 1
    seconds = 1000 * 0.01 + 4 * 7
    assert 20 <= len(screen.drawn) <= 2 * seconds + 6
    assert "finished in 12 min 34 s" in screen.drawn[-1]


def test_the_page_shows_every_domain_and_escapes_names():
    page = live.page(after(600))
    assert "step 600 / 1,000 (60%)" in page
    assert "&lt;b&gt;flags" in page
    assert "<b>flags" not in page
    assert page.count("<polyline") == 4  # losses of both domains, R@1 of one and of the mean
    assert "30.0%" in page
    assert "70.0%" in page
    assert "best validation R@1 30.0 % at step 600" in page
    assert len(page) < 20_000


def taught_page(*records: dict) -> str:
    teacher = {"backbone": "small_resnet", "pretrained": True, "image_size": 32}
    given = {"teachers": {"wide": teacher, "deep": teacher | {"kinds": ["class"]}}, "recipe": "unic"}
    progress = watch.Progress(TrainParams(steps=1000, **given), Clock())
    for record in records:
        progress.update(record)
    return live.page(progress)


def cells(page: str) -> list[list[str]]:
    """The texts of the last table of a page."""
    rows = page.split("<table")[-1].split("<tr>")[1:]
    return [[re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", row)] for row in rows]


def test_the_page_shows_each_frozen_teacher_s_losses_and_the_images_it_was_kept_for():
    columns = ["teacher", "", "class loss", "", "patch loss", "", "images kept"]
    nothing = ["", "–", "", "–", "", "–"]
    assert cells(taught_page({"kind": "start", "step": 0})) == [columns, ["■ deep", *nothing], ["■ wide", *nothing]]
    seen, trained = [{"emoji": 6, "flags": 2}, {"emoji": 12, "flags": 20}], []
    for step, images in enumerate(seen, 1):
        terms = {"wide/class": 1.0, "wide/patches": 2.0, "wide/kept": 0.5, "deep/class": 3.0, "deep/kept": 0.0}
        losses = {"emoji": {"total": 1.0, **terms}, "flags": {"total": 1.0, **{k: v + 0.4 for k, v in terms.items()}}}
        trained.append(train(step) | {"losses": losses, "images_seen": images})
    page = taught_page(*trained)
    # Of the 24 images of the second record 18 are of flags.
    assert cells(page)[1:] == [
        ["■ deep", "", "3.300", "", "–", "", "30.0%"],
        ["■ wide", "", "1.300", "", "2.300", "", "80.0%"],
    ]
    assert page.split("<table")[-1].count("<polyline") == 5
    assert page.split("<table")[-1].count("<svg") == 6  # an empty one where there is no curve: nothing jumps


def test_a_run_without_frozen_teachers_has_no_table_of_them():
    assert "images kept" not in live.page(after(600))


def test_curves_of_long_runs_stay_short_and_keep_their_ends():
    curve: watch.Curve = []
    for step in range(100_000):
        watch._extend(curve, step, math.sqrt(step))
    assert len(curve) <= watch.CURVE_POINTS
    assert curve[0][0] == 0
    assert curve[-1] == (99_999, math.sqrt(99_999))
    assert [step for step, _ in curve] == sorted({step for step, _ in curve})


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, False), ({"JPY_SESSION_NAME": "a.ipynb"}, True), ({"JPY_SESSION_NAME": "a.ipynb", "UDON_LIVE": "0"}, False)],
)
def test_a_front_end_is_recognised_by_its_session_and_can_be_denied(monkeypatch, environment, expected):
    class Shell:
        kernel = None

    monkeypatch.setattr(live, "get_ipython", Shell)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    monkeypatch.delenv("UDON_LIVE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert live.has_front_end() is expected


@pytest.mark.parametrize("asks", [True, False])
def test_who_sent_a_cell_says_whether_a_person_looks(monkeypatch, asks):
    """VS Code and Colab set no session; a papermill that a notebook has started inherits that notebook's."""

    class Kernel:
        def get_parent(self, channel):
            return {"content": {"allow_stdin": asks}}

    class Shell:
        kernel = Kernel()

    monkeypatch.setattr(live, "get_ipython", Shell)
    monkeypatch.delenv("UDON_LIVE", raising=False)
    monkeypatch.setenv("JPY_SESSION_NAME", "" if asks else "a.ipynb")
    assert live.has_front_end() is asks


def test_several_processes_are_for_who_looks_and_for_terminals(tmp_path):
    run = Run(PARAMS.model_copy(update={"outputs": str(tmp_path), "processes": 2}))
    with pytest.raises(UserError, match=r"'processes': found 2, but nobody looks .*: torchrun --nproc-per-node 2 -m"):
        live.train(run, live=False)


def test_plain_python_has_no_front_end_even_inside_a_session(monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    monkeypatch.delenv("UDON_LIVE", raising=False)
    assert live.has_front_end() is False
    monkeypatch.setenv("UDON_LIVE", "1")
    assert live.has_front_end() is True


def test_a_wrong_choice_of_display_is_reported(monkeypatch):
    monkeypatch.setenv("UDON_LIVE", "yes")
    with pytest.raises(UserError, match="UDON_LIVE: found 'yes', expected 0 or 1"):
        live.has_front_end()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (125, "2 min 05 s"), (3599.6, "1 h 00 min"), (3725, "1 h 02 min")]
)
def test_durations_do_not_read_as_clocks(seconds, text):
    assert watch.duration(seconds) == text


def test_a_run_without_steps_is_done_from_the_beginning():
    progress = watch.Progress(TrainParams(recipe="features", eval_every=300), Clock())
    assert progress.line().startswith("step 0/0 (100%)")
    assert "step 0 / 0 (100%)" in live.page(progress)


def test_a_long_curve_keeps_points_that_are_evenly_spread():
    curve = []
    for step in range(5, 20_001, 5):
        watch._extend(curve, step, float(step))
    steps = [step for step, _ in curve]
    assert len(curve) <= watch.CURVE_POINTS
    assert (steps[0], steps[-1]) == (5, 20_000)
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 5 * 20_000 / watch.CURVE_POINTS


def test_a_run_that_goes_on_knows_its_best_validation():
    progress = watch.Progress(PARAMS, Clock())
    progress.update({"kind": "start", "step": 150, "best": [(150, 41.5)]})
    progress.update(validation(200, 40.0, best=False))
    assert "R@1 40.0 (best 41.5 at step 150)" in progress.line()


def test_who_began_anew_is_told_not_to_do_so_again():
    progress = watch.Progress(PARAMS.model_copy(update={"overwrite": True}), Clock(), state="stopped")
    assert "run the same again without overwrite to go on" in progress.line()


UNITS = {"embedding": "images", "exporting": "images"}


def test_progress_is_told_in_few_lines_with_the_time_that_is_left(capsys):
    now = [0.0]
    line = ProgressLine(UNITS, False, lambda: now[0])
    for done in range(0, 1001, 10):
        line.progress("embedding", done, 1000)
        now[0] += 0.5
    line.progress("exporting", 5, 10)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "embedding 0/1,000 images (0%)"
    assert lines[1] == "embedding 100/1,000 images (10%)  20 images/s  45 s left"
    assert lines[-2:] == ["embedding 1,000/1,000 images (100%)", "exporting 5/10 images (50%)"]
    assert len(lines) == 12


def test_a_cell_is_redrawn_where_somebody_looks(monkeypatch):
    shown = []

    class Handle:
        def update(self, content):
            shown.append(content.data)

    monkeypatch.setattr(live, "display", lambda content, display_id: Handle())
    now = [0.0]
    line = ProgressLine(UNITS, True, lambda: now[0])
    for done in range(11):
        line.progress("embedding", done, 10)
        now[0] += 0.2
    line.say("<done>")
    assert len(shown) == 6  # at 0, 0.6, 1.2 and 1.8 seconds, the last image, the end
    assert "embedding 10/10 images (100%)" in shown[-2]
    assert "&lt;done&gt;" in shown[-1]


def test_what_ends_at_a_limit_does_not_promise_more(capsys):
    now = [0.0]
    line = ProgressLine(UNITS, False, lambda: now[0], limit=30)
    line.progress("embedding", 0, 1000)
    now[0] = 10.0
    line.progress("embedding", 10, 1000)
    assert capsys.readouterr().out.splitlines()[1] == "embedding 10/1,000 images (1%)  1 images/s  20 s left"


def test_an_activity_that_fails_says_that_it_stopped_and_notes_stay(monkeypatch, capsys):
    with pytest.raises(KeyboardInterrupt), ProgressLine(UNITS, False, lambda: 0.0):
        raise KeyboardInterrupt
    assert capsys.readouterr().out == "stopped\n"
    screen = Screen(monkeypatch)
    with ProgressLine(UNITS, True, lambda: 0.0) as line:
        line.note("<broken>")
        line.say("done")
    assert "&lt;broken&gt;<br>done" in screen.drawn[-1]
    assert "stopped" not in screen.drawn[-1]
