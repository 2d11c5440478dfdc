"""The steering panel without a browser: what its controls write, and what it shows of a run."""

from __future__ import annotations

import json
import re
import threading
import time

import pandas as pd
import pytest
from ipywidgets import HTML

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.taught import taught_params, write_teachers
from tests.helpers.training import SMALL
from tests.helpers.waiting import SECONDS, wait_until
from udonlib.errors import UserError
from udonlib.lab.views import panel as widgets
from udonlib.lab.views import panel_views as panelviews
from udonlib.lab.views.front_end import Still
from udonlib.params import TrainParams
from udonlib.runs.run import Run, open_run
from udonlib.runs.watch import Progress
from udonlib.training.interventions import Intervention, Wish
from udonlib.training.steering import change_control, read_control


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_uned_tree(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(data, tmp_path) -> Run:
    return open_run(TrainParams(**SMALL | {"data": str(data), "outputs": str(tmp_path), "n_threads": 1}))


@pytest.fixture
def begun(run):
    """A run that is being trained: its generator waits at a step."""
    records = run.train()
    for record in records:
        if record["kind"] == "train":
            break
    yield run, records
    records.close()


@pytest.fixture
def panel(begun):
    made = widgets.Panel(begun[0])
    yield made
    made.close()


def wanted(run):
    return read_control(run.path)


def shown(panel):
    """What the domains' controls say: multipliers other than 1, and locked domains."""
    factors = {domain: row.slider.value for domain, row in panel.rows.items() if row.slider.value != 1}
    return factors, {domain for domain, row in panel.rows.items() if row.lock.value}


def test_a_slider_multiplies_its_domain_alone(panel, begun):
    first, second = panel.domains[:2]
    panel.rows[first].slider.value = 2.0
    panel.rows[second].slider.value = 0.5
    assert wanted(begun[0]).multipliers == {first: 2.0, second: 0.5}
    panel.rows[first].slider.value = 1.0
    assert wanted(begun[0]).multipliers == {second: 0.5}


def test_a_lock_pins_the_share_that_the_domain_has_now(panel, begun):
    domain = panel.domains[0]
    panel.watch.update()
    share = panel.watch.progress.shares[domain]
    panel.rows[domain].lock.value = True
    assert wanted(begun[0]).locks == {domain: share}
    assert panel.rows[domain].slider.disabled
    panel.rows[domain].lock.value = False
    assert wanted(begun[0]).locks == {}
    assert not panel.rows[domain].slider.disabled


def test_reset_takes_both_back_in_one_change(panel, begun):
    domain = panel.domains[0]
    panel.rows[domain].slider.value = 5.0
    panel.rows[domain].lock.value = True
    number = wanted(begun[0]).number
    panel.rows[domain].reset.click()
    after = wanted(begun[0])
    assert (after.multipliers, after.locks, after.number) == ({}, {}, number + 1)
    assert (panel.rows[domain].slider.value, panel.rows[domain].lock.value) == (1.0, False)


def test_presets_set_all_domains_and_the_controls_show_it(panel, begun):
    run, _ = begun
    panel.watch.update()
    n = len(panel.domains)
    panel.buttons["uniform"].click()
    assert wanted(run).locks == pytest.approx(dict.fromkeys(panel.domains, 1 / n))
    assert all(row.lock.value for row in panel.rows.values())
    panel.buttons["by-size"].click()
    sizes = {domain.name: len(domain.splits["train"]) for domain in run.catalog.domains}
    assert wanted(run).locks == pytest.approx({name: size / sum(sizes.values()) for name, size in sizes.items()})
    panel.buttons["by-loss"].click()
    assert (wanted(run).multipliers, wanted(run).locks) == ({}, {})
    assert not any(row.lock.value for row in panel.rows.values())


def test_only_the_ticked_domains_get_steps_and_at_least_one_has_to_be(panel, begun):
    run, _ = begun
    panel.buttons["only"].click()
    assert wanted(run).number == 0
    panel.start()
    assert "Tick the domains" in panel.status.value
    chosen, *others = panel.domains
    panel.rows[chosen].tick.value = True
    panel.buttons["only"].click()
    assert wanted(run).multipliers == dict.fromkeys(others, 0.0)
    assert [panel.rows[name].slider.value for name in panel.domains] == [1.0, *([0.0] * len(others))]


def test_buttons_ask_for_what_they_say(panel, begun):
    run, _ = begun
    for name, field, value in (
        ("evaluate", "evaluate", 1),
        ("save", "save", 1),
        ("pause", "paused", True),
        ("resume", "paused", False),
        ("stop", "stop", 1),
        ("finish", "finish", 1),
    ):
        panel.buttons[name].click()
        assert getattr(wanted(run), field) == value, name


def test_what_was_asked_for_is_answered_with_its_step(panel, begun):
    run, records = begun
    panel.start()
    panel.rows[panel.domains[0]].slider.value = 3.0
    for record in records:
        if record["kind"] == "allocation" and record["shares"] != record["weights"]:
            break
    step = run.interventions()[0].step
    wait_until(lambda: f"After step {step}, " in panel.status.value)
    assert f"{panel.domains[0]} ×3" in panel.status.value
    assert "Interventions so far: 1." in panel.status.value
    wait_until(lambda: "<polygon" in panel.charts.value)  # drawn after the status
    assert f"step {step}: {panel.domains[0]} ×3" in panel.charts.value  # the mark's title
    assert "%" in panel.rows[panel.domains[0]].numbers.value


def test_a_second_panel_follows_the_first_one_and_names_it(panel, begun):
    first, second = panel, widgets.Panel(begun[0])
    domain = first.domains[0]
    first.start(), second.start()
    first.rows[domain].slider.value = 3.0
    wait_until(lambda: f"Changed by another panel ({first.name}): {domain} ×3." in second.status.value)
    assert second.rows[domain].slider.value == 3.0
    assert wanted(begun[0]).panel == first.name  # following is not asking
    second.rows[second.domains[1]].slider.value = 5.0
    assert wanted(begun[0]).multipliers == {domain: 3.0, second.domains[1]: 5.0}
    wait_until(lambda: "Changed by" not in second.status.value)  # what it has changed itself came later
    wait_until(lambda: f"{second.domains[1]} ×5" in first.status.value)
    second.close()


def test_a_share_that_is_typed_pins_the_domain_to_it(panel, begun):
    run, (first, second) = begun[0], panel.domains[:2]
    row = panel.rows[first]
    row.share.value = "12,5 %"
    assert wanted(run).locks == {first: 0.125}
    assert (row.lock.value, row.share.value, row.slider.disabled) == (True, "12.5", True)
    panel.rows[second].share.value = "101"
    panel._draw()
    assert f"{second}: found &#x27;101&#x27;, expected a share from 0 to 100 percent" in panel.status.value
    assert panel.rows[second].share.value == ""
    row.share.value = ""
    assert wanted(run).locks == {}
    assert (row.lock.value, row.slider.disabled) == (False, False)
    row.lock.value = True
    assert float(row.share.value) == pytest.approx(100 * wanted(run).locks[first], rel=1e-3)


def test_undo_takes_back_the_last_change_of_this_panel_and_nobody_else_s(panel, begun):
    run, (first, second) = begun[0], panel.domains[:2]
    panel.buttons["undo"].click()
    assert "nothing to undo" in panel._problem
    panel.rows[first].slider.value = 2.0
    panel.buttons["uniform"].click()
    change_control(run.path, "other", multipliers={second: 5.0}, rate=0.5)
    panel.buttons["undo"].click()
    assert (wanted(run).multipliers, wanted(run).locks) == ({first: 2.0, second: 5.0}, {})
    assert panel.rows[first].slider.value == 2.0
    assert not panel.rows[first].lock.value
    panel.buttons["undo"].click()
    assert (wanted(run).multipliers, wanted(run).rate) == ({second: 5.0}, 0.5)
    panel.buttons["undo"].click()
    assert wanted(run).multipliers == {second: 5.0}


def test_the_learning_rate_is_steered_on_its_schedule(panel, begun):
    run, records = begun
    panel.start()
    panel.rate.slider.value = 0.5
    assert wanted(run).rate == 0.5
    rates = [record["learning_rate"] for record in records if record["kind"] == "train"]
    assert rates[-1] == run.params.learning_rate / 2
    assert str(run.interventions()[0]) == "learning rate ×0.5"
    wait_until(lambda: "0.005 for the heads" in panel.rate.numbers.value)


def test_a_panel_opens_with_what_is_in_force(begun):
    run, _ = begun
    domain, locked = run.catalog.names[:2]
    change_control(run.path, "somebody", multipliers={domain: 5.0}, locks={locked: 0.25})
    opened = widgets.Panel(run)
    assert opened.rows[domain].slider.value == 5.0
    assert opened.rows[locked].lock.value
    assert wanted(run).number == 1


def test_a_finished_run_can_be_looked_at_and_not_steered(run):
    for _ in run.train():
        pass
    opened = widgets.Panel(run)
    opened.start()
    assert "finished after" in opened.status.value
    assert all(button.disabled for button in opened.buttons.values())
    assert all(row.slider.disabled for row in opened.rows.values())
    opened.close()


class Place(Still):
    """Where a panel is displayed: what a saved notebook keeps of it meanwhile, and what takes the panel's place."""

    def __init__(self):
        self.kept, self.left = [], []

    def keep(self, make, now=False):
        self.kept.append((make(), now))

    def leave(self, html):
        self.left.append(html)


def test_a_saved_notebook_keeps_the_panel_of_a_run_that_has_stopped(begun):
    run, records = begun
    place = Place()
    opened = widgets.Panel(run)
    opened.start(place)
    assert "share of steps" in place.kept[0][0]
    records.close()
    said = "What you set now takes effect when the run goes on."
    wait_until(lambda: said in place.kept[-1][0])
    assert next(now for page, now in place.kept if said in page)  # at once
    assert place.left == []
    opened.close()


def test_a_panel_leaves_plain_html_in_its_place_when_the_run_has_finished(begun):
    run, records = begun
    place = Place()
    opened = widgets.Panel(run)
    opened.start(place)
    for record in records:
        if record["kind"] == "test":
            opened.rows[opened.domains[0]].slider.value = 2.0
    opened._thread.join()
    [left] = place.left
    assert "finished after" in left
    assert "Your last change came after the last step." in left
    assert "share of steps" in left
    seen = run.records("train")[-1]["images_seen"]
    assert all(f"{n:,}" in left for n in seen.values())
    assert not opened._thread.is_alive()
    opened.close()


def test_a_run_that_is_begun_anew_keeps_its_panel_until_it_has_finished_again(run):
    for _ in run.train():
        pass
    again = open_run(run.params.model_copy(update={"overwrite": True}))
    place = Place()
    opened = widgets.Panel(again)
    looks, look = [], opened.watch.update
    opened.watch.update = lambda: looks.append(look()) or looks[-1]
    opened.start(place)
    wait_until(lambda: len(looks) > 3)
    assert place.left == []  # the summary that is there still is of the run before
    for record in again.train():
        if record["kind"] == "train":
            wait_until(lambda: opened.watch.state.name == "training")
    opened._thread.join()
    assert len(place.left) == 1
    opened.close()


def test_a_run_that_stopped_says_how_it_goes_on_and_takes_wishes_for_then(begun):
    run, records = begun
    records.close()
    opened = widgets.Panel(run)
    opened.start()
    assert "stopped after step" in opened.status.value
    assert "run it again to" in opened.status.value
    assert "takes effect when the run goes on" in opened.status.value
    assert opened.buttons["pause"].disabled
    domain = opened.domains[0]
    assert not opened.rows[domain].slider.disabled
    opened.rows[domain].slider.value = 0.0
    opened.close()
    shares = [r["shares"] for r in open_run(run.params).train() if r["kind"] == "allocation"]
    assert shares[-1][domain] == 0.0


def test_a_run_of_another_version_is_not_steered(begun):
    run, _ = begun
    notes = run.provenance()
    del notes[-1]["steering"]
    (run.path / "provenance.json").write_text(json.dumps(notes))
    opened = widgets.Panel(run)
    opened.start()
    assert "another version of udonlib" in opened.status.value
    assert all(button.disabled for button in opened.buttons.values())
    opened.close()


def test_a_broken_control_file_is_named_and_the_panel_lives(panel, begun):
    run, _ = begun
    panel.start()
    (run.path / "control.json").write_text("{")
    wait_until(lambda: "control.json" in panel.status.value)
    panel.rows[panel.domains[0]].slider.value = 2.0
    assert (run.path / "control.json").read_text() == "{"  # nobody's words are lost
    (run.path / "control.json").unlink()
    panel.rows[panel.domains[0]].slider.value = 3.0
    assert wanted(run).multipliers == {panel.domains[0]: 3.0}


def test_a_run_that_is_not_there_yet_is_not_steered_and_the_controls_say_so(run):
    opened = widgets.Panel(run)
    opened.start()
    assert "not started yet" in opened.status.value
    assert all(button.disabled for button in opened.buttons.values())
    opened.buttons["uniform"].click()
    opened.rows[opened.domains[0]].slider.value = 2.0
    assert shown(opened) == ({}, set())
    wait_until(lambda: "there is no run in" in opened.status.value)
    assert not run.path.exists()
    opened.close()


def test_what_cannot_be_written_is_taken_back_by_its_control(panel, begun):
    run, _ = begun
    first, second = panel.domains[:2]
    panel.rows[first].slider.value = 2.0
    panel.rows[second].lock.value = True
    (run.path / "control.json").write_text("{")
    before = shown(panel)
    assert before == ({first: 2.0}, {second})
    panel.rows[first].slider.set_state({"index": 0})  # as the browser does it
    assert shown(panel) == before
    panel.rows[first].lock.value = True
    assert shown(panel) == before
    panel.rows[second].lock.value = False
    panel.rows[first].reset.click()
    panel.rows[second].reset.click()
    for name in ("by-loss", "uniform", "by-size"):
        panel.buttons[name].click()
    assert shown(panel) == before
    assert [panel.rows[name].slider.disabled for name in (first, second)] == [False, True]


def test_a_panel_opened_on_a_broken_control_file_shows_what_is_in_force(begun):
    run, records = begun
    domain = run.catalog.names[0]
    change_control(run.path, "somebody", multipliers={domain: 5.0})
    next(record for record in records if record["kind"] == "steering")
    (run.path / "control.json").write_text("{")
    opened = widgets.Panel(run)
    opened.start()
    assert shown(opened) == ({domain: 5.0}, set())
    assert opened.status.value.count("control.json") == 1
    (run.path / "control.json").unlink()
    change_control(run.path, "somebody", multipliers={domain: 5.0})
    wait_until(lambda: "control.json" not in opened.status.value)
    assert opened._foreign == ""
    opened.close()


def test_a_change_that_changes_nothing_waits_for_no_answer(panel, begun):
    run, records = begun
    panel.start()
    panel.buttons["by-loss"].click()
    assert panel._sent is None
    panel.rows[panel.domains[0]].slider.value = 2.0
    panel.rows[panel.domains[0]].slider.value = 1.0  # within one step
    next(record for record in records if record["kind"] == "train")
    assert run.interventions() == []
    wait_until(lambda: panel._sent is None)
    wait_until(lambda: "waiting" not in panel.status.value)


def test_a_request_is_waited_for_although_the_allocation_is_in_force(panel, begun):
    _, records = begun
    panel.start()
    panel.buttons["save"].click()
    panel.rows[panel.domains[0]].slider.value = 2.0
    panel.rows[panel.domains[0]].slider.value = 1.0
    wait_until(lambda: "Sent; waiting" in panel.status.value)
    next(record for record in records if record["kind"] == "train")
    wait_until(lambda: "after you asked: saved" in panel.status.value)
    panel.buttons["save"].click()
    records.close()  # and with the process, its requests
    wait_until(lambda: panel._sent is None)


def test_what_somebody_else_asks_for_is_said_while_a_change_waits(panel, begun):
    run, _ = begun
    first, second = panel.domains[:2]
    panel.start()
    panel.rows[first].slider.value = 2.0
    change_control(run.path, "other", multipliers={second: 5.0})
    wait_until(lambda: f"Changed by another panel (other): {second} ×5." in panel.status.value)
    assert panel._sent is not None
    change_control(run.path, "third", multipliers={second: 3.0})
    panel.rows[first].slider.value = 3.0  # before the thread has looked
    wait_until(lambda: "another panel (third)" in panel.status.value)
    assert shown(panel) == ({first: 3.0, second: 3.0}, set())


def test_a_run_that_does_not_say_its_sizes_cannot_be_allocated_by_them(panel, begun):
    panel.start()
    assert not panel.buttons["by-size"].disabled
    panel.watch.n_images = {}
    panel._draw_status()
    assert panel.buttons["by-size"].disabled
    assert not panel.buttons["uniform"].disabled


def test_what_a_person_moves_while_the_thread_sets_controls_is_written(panel, begun):
    domain = panel.domains[0]
    moving, moved = threading.Event(), threading.Event()

    def set_controls():
        with panel._silently():
            moving.set()
            moved.wait(SECONDS)

    thread = threading.Thread(target=set_controls)
    thread.start()
    moving.wait(SECONDS)
    panel.rows[domain].slider.value = 2.0
    moved.set()
    thread.join()
    assert wanted(begun[0]).multipliers == {domain: 2.0}


@pytest.mark.parametrize("name", ["provenance.json", "steering.jsonl", "metrics.jsonl"])
def test_a_broken_file_is_named_and_the_panel_lives(panel, begun, name):
    run, _ = begun
    panel.start()
    with (run.path / name).open("a") as file:
        file.write("[1]\n")
    wait_until(lambda: name in panel.status.value)
    assert panel._thread.is_alive()
    opened = widgets.Panel(run)
    opened.start()
    assert name in opened.status.value
    opened.close()


def test_a_panel_that_cannot_follow_says_so_and_goes_on_when_it_can(panel, begun, monkeypatch):
    def fails():
        raise PermissionError("not yours")

    panel.start()
    monkeypatch.setattr(panel.watch, "update", fails)
    monkeypatch.setattr(panel, "_draw_status", fails)
    wait_until(lambda: "cannot follow the run: PermissionError" in panel.status.value)
    monkeypatch.undo()
    wait_until(lambda: "training, step" in panel.status.value)
    assert "cannot follow" not in panel.status.value


def test_a_run_that_does_not_exist_is_named_with_the_nearest(run, tmp_path, monkeypatch):
    monkeypatch.setenv("UDON_LIVE", "1")
    next(records := run.train())
    with pytest.raises(UserError, match=f"no run 'udom.*did you mean '{run.path.name}'"):
        widgets.steer(run.path.name.replace("udon", "udom"), str(tmp_path))
    records.close()


def test_where_nobody_looks_a_line_says_where_the_run_stands(run, monkeypatch, capsys):
    monkeypatch.setenv("UDON_LIVE", "0")
    assert widgets.steer(run) is None
    said = capsys.readouterr().out
    assert f"{run.path.name}: not started yet" in said
    assert "steer.ipynb" in said


def test_the_report_says_whether_a_person_had_a_hand_in_it(run):
    records = run.train()
    next(records)
    change_control(run.path, "<me>", multipliers={run.catalog.names[0]: 2.0})
    for _ in records:
        pass
    said = panelviews.report(run).html
    assert "steered by hand" in said
    assert f"{run.catalog.names[0]} ×2" in said
    assert "&lt;me&gt;" in said
    printed = repr(panelviews.report(run))
    assert "steered by hand" in printed
    assert f"after step {run.interventions()[0].step}: {run.catalog.names[0]} ×2" in printed
    assert not re.search(r"<(?!me>)", printed)
    (run.path / "steering.jsonl").unlink()
    assert "Nobody steered this run." in panelviews.report(run).html


@pytest.mark.parametrize(
    ("done", "said", "listed"),
    [
        ({"evaluate": True}, "<b>This run was validated by hand</b>: its figures", "validated"),
        ({"refused": "no domain 'x'"}, "Nobody steered this run: its figures do not depend", "refused: no domain"),
        ({"paused": True}, "Nobody steered this run: its figures do not depend", "paused"),
    ],
)
def test_the_report_says_steered_only_of_the_allocation(begun, done, said, listed):
    run, _ = begun
    entry = Intervention(number=1, step=2, panel="me", **done)
    (run.path / "steering.jsonl").write_text(entry.model_dump_json() + "\n")
    text = panelviews.report(run).html
    assert said in text
    assert listed in text
    assert "steered by hand" not in text


def test_each_number_of_a_domain_stands_in_its_column():
    progress = Progress(TrainParams(**SMALL), time.monotonic)
    weights, shares = {"emoji": 0.25, "flags": 0.75}, {"emoji": 0.5, "flags": 0.5}
    seen = {"emoji": 1234, "flags": 16}
    progress.update({"kind": "allocation", "step": 0, "weights": weights, "shares": shares, "images_seen": seen})
    losses = {"emoji": {"ce_teacher": 1.5, "ce_student": 2.5, "total": 9.0}}
    progress.update({"kind": "train", "step": 2, "losses": losses, "images_seen": seen, "images_per_s": 80.0})
    rows = [
        {"embedder": "student", "domain": name, "index": "merged", "r_at_1": 61.5, "mmp_at_5": 3.0}
        for name in ("emoji", "mean")
    ]
    progress.update({"kind": "validation", "step": 2, "r_at_1": 61.5, "best": True, "table": pd.DataFrame(rows)})
    texts = texts_of(panelviews.numbers(progress, "emoji"))
    expected = ["25.0%", "50.0%", "1.50", "2.50", "1,234", "61.5"]
    assert dict(zip(panelviews.COLUMNS, texts, strict=True)) == dict(zip(panelviews.COLUMNS, expected, strict=True))


# Frozen teachers


@pytest.fixture
def encoders(tmp_path):
    return write_teachers(tmp_path)


@pytest.fixture
def taught(data, encoders, tmp_path):
    """A run with frozen teachers that is being trained, and its panel."""
    run = open_run(taught_params(data, tmp_path, encoders, drop_probability=0.35))
    records = run.train()
    next(record for record in records if record["kind"] == "train")
    opened = widgets.Panel(run)
    yield run, records, opened
    opened.close()
    records.close()


def test_a_run_without_frozen_teachers_shows_nothing_of_them(panel):
    assert panel.taught == []
    panel.start()
    assert "images kept" not in panel.page() + "".join(w.value for w in widgets_of(panel.widget))


def widgets_of(box):
    """The HTML in a box, at any depth."""
    for child in box.children:
        yield from widgets_of(child) if hasattr(child, "children") else [child] if isinstance(child, HTML) else []


def test_sliders_weight_teachers_and_drop_them_and_reset_takes_it_back(taught):
    run, _, panel = taught
    one, two, drop = panel.taught
    assert [row.name for row in panel.taught] == ["one", "two", "teachers dropped"]
    assert drop.slider.value == 0.35
    two.slider.value = 3.0
    drop.slider.value = 0.2
    assert wanted(run).wish == Wish(teachers={"two": 3.0}, drop_probability=0.2)
    panel.buttons["by-loss"].click()  # domains alone
    assert wanted(run).wish == Wish(teachers={"two": 3.0}, drop_probability=0.2)
    drop.slider.value = 0.35  # as the parameters say
    assert wanted(run).wish == Wish(teachers={"two": 3.0})
    drop.slider.value = 1.0
    for row in (two, drop):
        row.reset.click()
    assert (two.slider.value, drop.slider.value) == (1.0, 0.35)
    assert wanted(run).wish == Wish()
    one.slider.value = 0.0
    panel.rows[panel.domains[0]].slider.value = 2.0
    assert wanted(run).wish == Wish(multipliers={panel.domains[0]: 2.0}, teachers={"one": 0.0})


def test_a_teacher_s_row_says_its_weight_its_losses_and_the_images_it_is_kept_for(taught):
    _, records, panel = taught
    panel.start()
    one, two, drop = panel.taught
    two.slider.value = 3.0
    drop.slider.value = 0.0
    wait_until(lambda: "35%" in drop.numbers.value)
    for record in records:
        if record["kind"] == "train" and record["step"] >= 4 and not record["step"] % 2:
            break
    wait_until(lambda: "teacher two ×3, teachers dropped at 0%" in panel.status.value)
    wait_until(lambda: panel.watch.progress.step == record["step"])  # all that was written is read, too
    terms = {term: curve[-1][1] for term, curve in panel.watch.progress.taught.items()}
    losses = [f"{terms[term]:.3f}" for term in ("one/class", "one/patches")]
    wait_until(lambda: texts_of(one.numbers.value) == ["1", "100.0%", *losses, "", ""])
    assert texts_of(two.numbers.value) == ["3", "100.0%", f"{terms['two/class']:.3f}", "–", "", ""]
    assert ">0% of an image's teachers" in drop.numbers.value
    page = panel.page()
    assert all(row.numbers.value in page for row in panel.taught)
    records.close()


def texts_of(numbers):
    """The texts of a row's columns."""
    cells = numbers.split("text-align:right")[1:]
    return [re.sub("<[^>]*>", "", cell).split(">")[1].split("<")[0] for cell in cells]


def test_muting_the_last_teacher_is_refused_and_its_slider_goes_back(taught):
    run, records, panel = taught
    panel.start()
    one, two, _ = panel.taught
    one.slider.value = 0.0
    next(record for record in records if record["kind"] == "steering")
    two.slider.value = 0.0
    assert next(record for record in records if record["kind"] == "steering")["refused"]
    wait_until(lambda: "no teacher is left to learn from" in panel.status.value)
    wait_until(lambda: two.slider.value == 1.0)
    assert one.slider.value == 0.0
    assert wanted(run).teachers == {"one": 0.0}


def test_teachers_that_another_panel_steers_are_said_and_followed(taught):
    run, _, panel = taught
    panel.start()
    change_control(run.path, "other", teachers={"one": 2.0}, drop_probability=0.5)
    said = "Changed by another panel (other): teacher one ×2, teachers dropped at 50%."
    wait_until(lambda: said in panel.status.value)
    assert [row.slider.value for row in panel.taught] == [2.0, 1.0, 0.5]


def test_a_panel_that_is_opened_again_ends_the_former_one(begun, monkeypatch):
    monkeypatch.setenv("UDON_LIVE", "1")
    first, second = widgets.steer(begun[0]), widgets.steer(begun[0])
    assert not first._thread.is_alive()
    assert second._thread.is_alive()
    second.close()


def test_locks_of_more_than_everything_are_said_to_be_divided(panel, begun):
    change_control(begun[0].path, locks=dict.fromkeys(panel.domains[:2], 0.8))
    panel.start()
    wait_until(lambda: "The locks sum to 160%" in panel.status.value)


def test_a_run_that_trains_can_be_paused_and_one_that_is_paused_resumed(panel, begun):
    run, records = begun
    panel.start()
    assert [panel.buttons[name].disabled for name in ("pause", "resume")] == [False, True]
    change_control(run.path, paused=True)
    next(record for record in records if record["kind"] == "steering")
    wait_until(lambda: [panel.buttons[name].disabled for name in ("pause", "resume")] == [True, False])


def test_the_charts_mark_what_the_result_depends_on(begun):
    progress = Progress(begun[0].params, time.monotonic)
    for step, done in enumerate(({"steers": True}, {"evaluate": True}, {"paused": True}, {"refused": "why"}), 1):
        progress.update(Intervention(number=step, step=step, **done).record())
    assert panelviews.loss_chart(progress).count("<path") == 2
