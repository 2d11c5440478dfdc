"""The steering panel without a browser: what its controls write, and what it shows of a run."""

from __future__ import annotations

import json
import time

import pytest
from IPython.display import DisplayHandle

from tests.catalogs import write_uned_tree
from tests.test_training import SMALL
from udonlib import panelviews, widgets
from udonlib.errors import UserError
from udonlib.params import TrainParams
from udonlib.runs import Run, open_run
from udonlib.steering import change_control, read_control


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


def test_a_slider_multiplies_its_domain_alone(panel, begun):
    first, second = panel.domains[:2]
    panel.sliders[first].value = 2.0
    panel.sliders[second].value = 0.5
    assert wanted(begun[0]).multipliers == {first: 2.0, second: 0.5}
    panel.sliders[first].value = 1.0
    assert wanted(begun[0]).multipliers == {second: 0.5}


def test_a_lock_pins_the_share_that_the_domain_has_now(panel, begun):
    domain = panel.domains[0]
    panel.watch.update()
    share = panel.watch.progress.shares[domain]
    panel.locks[domain].value = True
    assert wanted(begun[0]).locks == {domain: share}
    assert panel.sliders[domain].disabled
    panel.locks[domain].value = False
    assert wanted(begun[0]).locks == {}
    assert not panel.sliders[domain].disabled


def test_reset_takes_both_back_in_one_change(panel, begun):
    domain = panel.domains[0]
    panel.sliders[domain].value = 5.0
    panel.locks[domain].value = True
    number = wanted(begun[0]).number
    panel.resets[domain].click()
    after = wanted(begun[0])
    assert (after.multipliers, after.locks, after.number) == ({}, {}, number + 1)
    assert (panel.sliders[domain].value, panel.locks[domain].value) == (1.0, False)


def test_presets_set_all_domains_and_the_controls_show_it(panel, begun):
    run, _ = begun
    panel.watch.update()
    n = len(panel.domains)
    panel.buttons["uniform"].click()
    assert wanted(run).locks == pytest.approx(dict.fromkeys(panel.domains, 1 / n))
    assert all(lock.value for lock in panel.locks.values())
    panel.buttons["by-size"].click()
    sizes = {domain.name: len(domain.splits["train"]) for domain in run.catalog.domains}
    assert wanted(run).locks == pytest.approx({name: size / sum(sizes.values()) for name, size in sizes.items()})
    panel.buttons["by-loss"].click()
    assert (wanted(run).multipliers, wanted(run).locks) == ({}, {})
    assert not any(lock.value for lock in panel.locks.values())


def test_only_the_ticked_domains_get_steps_and_at_least_one_has_to_be(panel, begun):
    run, _ = begun
    panel.buttons["only"].click()
    assert wanted(run).number == 0
    panel.start()
    assert "Tick the domains" in panel.status.value
    chosen, *others = panel.domains
    panel.ticks[chosen].value = True
    panel.buttons["only"].click()
    assert wanted(run).multipliers == dict.fromkeys(others, 0.0)
    assert [panel.sliders[name].value for name in panel.domains] == [1.0, *([0.0] * len(others))]


def test_buttons_ask_for_what_they_say(panel, begun):
    run, _ = begun
    for name, field, value in (
        ("evaluate", "evaluate", 1),
        ("save", "save", 1),
        ("pause", "paused", True),
        ("resume", "paused", False),
        ("stop", "stop", 1),
    ):
        panel.buttons[name].click()
        assert getattr(wanted(run), field) == value, name


def test_what_was_asked_for_is_answered_with_its_step(panel, begun):
    run, records = begun
    panel.start()
    panel.sliders[panel.domains[0]].value = 3.0
    for record in records:
        if record["kind"] == "allocation" and record["shares"] != record["weights"]:
            break
    step = run.interventions()[0].step
    wait_until(lambda: f"After step {step}, " in panel.status.value)
    assert f"{panel.domains[0]} ×3" in panel.status.value
    assert "Interventions so far: 1." in panel.status.value
    wait_until(lambda: "<polygon" in panel.charts.value)  # drawn after the status
    assert f"step {step}: {panel.domains[0]} ×3" in panel.charts.value  # the mark's title
    assert "%" in panel.numbers[panel.domains[0]].value


def test_a_second_panel_says_that_another_one_steers_and_can_take_its_values_over(panel, begun):
    first, second = panel, widgets.Panel(begun[0])
    domain = first.domains[0]
    first.start(), second.start()
    first.sliders[domain].value = 2.0
    wait_until(lambda: f"Another panel ({first.name})" in second.status.value)
    assert second.adopt.layout.display == ""
    assert second.sliders[domain].value == 1.0  # a person's hand alone moves it
    number = wanted(begun[0]).number
    second.adopt.click()
    assert second.sliders[domain].value == 2.0
    assert wanted(begun[0]).number == number  # showing is not asking
    second.sliders[second.domains[1]].value = 5.0
    assert wanted(begun[0]).multipliers == {domain: 2.0, second.domains[1]: 5.0}
    second.close()


def test_a_panel_opens_with_what_is_in_force(begun):
    run, _ = begun
    domain, locked = run.catalog.names[:2]
    change_control(run.path, "somebody", multipliers={domain: 5.0}, locks={locked: 0.25})
    opened = widgets.Panel(run)
    assert opened.sliders[domain].value == 5.0
    assert opened.locks[locked].value
    assert wanted(run).number == 1


def test_a_finished_run_can_be_looked_at_and_not_steered(run):
    for _ in run.train():
        pass
    opened = widgets.Panel(run)
    opened.start()
    assert "finished after" in opened.status.value
    assert all(button.disabled for button in opened.buttons.values())
    assert all(slider.disabled for slider in opened.sliders.values())
    opened.close()


def test_a_panel_leaves_plain_html_in_its_place_when_the_run_has_finished(begun):
    run, records = begun
    shown = []

    class Place(DisplayHandle):
        def update(self, what):
            shown.append(what)

    opened = widgets.Panel(run)
    opened.start(Place())
    assert shown == []
    for _ in records:
        pass
    opened._thread.join(20)
    [left] = shown
    assert "finished after" in left.data
    assert "share of steps" in left.data
    seen = run.records("train")[-1]["images_seen"]
    assert all(f"{n:,}" in left.data for n in seen.values())
    assert not opened._thread.is_alive()
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
    assert not opened.sliders[domain].disabled
    opened.sliders[domain].value = 0.0
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
    panel.sliders[panel.domains[0]].value = 2.0
    assert (run.path / "control.json").read_text() == "{"  # nobody's words are lost
    (run.path / "control.json").unlink()
    panel.sliders[panel.domains[0]].value = 3.0
    assert wanted(run).multipliers == {panel.domains[0]: 3.0}


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
    said = panelviews.report(run).data
    assert "steered by hand" in said
    assert f"{run.catalog.names[0]} ×2" in said
    assert "&lt;me&gt;" in said
    (run.path / "steering.jsonl").unlink()
    assert "Nobody steered this run." in panelviews.report(run).data


def wait_until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
