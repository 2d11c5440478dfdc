"""The explorer's picture follows its sliders, and the parameters that it names make the same simulation."""

import dataclasses
import re
import shlex
import subprocess

import numpy as np
import plotly.graph_objects as go
import pytest
import yaml

from tests.helpers.sampler import opened, write_sampled_run
from udonlib import presets
from udonlib.lab.explore import sampler_explorer, simulation
from udonlib.lab.explore.sampler_explorer import SamplerExplorer
from udonlib.lab.explore.simulation import outcome, simulate


@pytest.fixture
def outputs(tmp_path):
    write_sampled_run(tmp_path / "results", "udon-s0")
    return tmp_path / "results"


@pytest.fixture
def explorer(outputs) -> SamplerExplorer:
    return SamplerExplorer(opened(outputs))


def rows(explorer: SamplerExplorer) -> dict[str, list[str]]:
    """Cells of the table by domain."""
    found = re.findall(r"■</span> ([^<]+)</td>(.*?)</tr>", explorer.figures.value)
    return {name: re.findall(r">(?:<b>)?([^<>]+)(?:</b>)?</td>", cells) for name, cells in found}


def test_a_person_gets_sliders_and_a_log_a_figure(outputs, monkeypatch):
    monkeypatch.setenv("UDON_LIVE", "0")
    assert isinstance(sampler_explorer.explore(opened(outputs)), go.Figure)
    monkeypatch.setenv("UDON_LIVE", "1")
    assert "udon-sim" in sampler_explorer.explore(opened(outputs)).box._dom_classes


def test_a_saved_notebook_keeps_the_picture_as_it_was_last(explorer, monkeypatch):
    stills = []

    class Kept:
        def __init__(self, widget, html):
            assert widget is explorer.box
            stills.append(html)

        def keep(self, make, now):
            assert now
            stills.append(make())

    monkeypatch.setattr(sampler_explorer, "Still", Kept)
    explorer._ipython_display_()
    explorer.strategies["dynamic"].value = not explorer.strategies["dynamic"].value
    assert len(stills) == 2
    assert stills[0] != stills[1] == explorer.picture.value + explorer.figures.value
    assert all("<svg" in html and "<table" in html for html in stills)


def test_the_table_holds_what_the_simulation_gives(explorer):
    e = explorer.explored
    for place, one in enumerate(e.simulations):
        for row in outcome(one, e.setting.sizes).itertuples():
            share, passes, loss = rows(explorer)[row.domain][3 * place : 3 * place + 3]
            assert float(share.lstrip("▼ ")) == pytest.approx(100 * row.share, abs=0.051)
            assert share.startswith("▼") == row.starves
            assert float(passes) == pytest.approx(row.passes, abs=0.051)
            assert float(loss) == pytest.approx(row.loss, abs=0.0051)
    assert explorer.picture.value.count("<svg") == 5  # the curves, and a picture for each strategy
    assert "emoji starves" in explorer.figures.value


@pytest.mark.parametrize(
    ("move", "changes"),
    [
        (lambda x: setattr(x.setting["update_every"], "value", 100), True),
        (lambda x: setattr(x.setting["smoothing"], "value", 0.8), True),
        (lambda x: setattr(x.curves["emoji"]["half_images"], "value", 5.0), True),
        (lambda x: setattr(x.curves["flags"]["start"], "value", 0.2), True),
        (lambda x: setattr(x.curves["logos"]["floor"], "value", 1.2), True),
        (lambda x: setattr(x.setting["steps"], "value", 600), True),
        (lambda x: setattr(x.strategies["balanced"], "value", False), True),
        (lambda x: setattr(x.shares["emoji"], "value", 0.5), False),  # nothing is fixed
    ],
    ids=["window", "smoothing", "speed", "start", "floor", "steps", "strategy", "share"],
)
def test_moving_a_slider_redraws(explorer, move, changes):
    before = explorer.picture.value, explorer.figures.value
    move(explorer)
    assert ((explorer.picture.value, explorer.figures.value) != before) == changes


def test_every_control_waits_for_the_hand_to_let_go_and_has_a_class_for_tests(explorer):
    sliders = [*explorer.setting.values(), *explorer.shares.values()]
    sliders += [slider for row in explorer.curves.values() for slider in row.values()]
    assert not any(slider.continuous_update for slider in sliders)
    classes = [next(name for name in slider._dom_classes if name.startswith("udon-sim-")) for slider in sliders]
    assert len(set(classes)) == len(classes) == 4 + 3 + 9
    assert "udon-sim-half_images-emoji" in classes


def test_the_parameters_that_it_names_make_the_same_simulation(outputs, explorer):
    explorer.setting["update_every"].value = 50
    explorer.setting["smoothing"].value = 0.35
    explorer.setting["batch_size"].value = 48
    explorer.curves["emoji"]["half_images"].value = 77.0
    explorer.curves["flags"]["start"].value = 0.05
    explorer.curves["logos"]["floor"].value = 0.5
    explorer.strategies["fixed"].value = True
    explorer.shares["logos"].value = 0.2
    words = shlex.split(explorer.command())
    values: dict[str, object] = {}
    while words:
        option = words.pop(0)
        if option == "-p":
            name = words.pop(0)
            values[name] = words.pop(0)
        else:
            assert option == "-y"
            values |= yaml.safe_load(words.pop(0))
    e = opened(outputs, **values)
    curves, setting, strategies = explorer.state()
    assert e.setting == setting
    assert set(e.params.strategies) == set(strategies)
    for strategy in strategies:
        named, moved = (simulate(c, s, strategy) for c, s in ((e.curves, e.setting), (curves, setting)))
        np.testing.assert_array_equal(named.shares, moved.shares)


def test_names_of_domains_are_quoted_for_the_shell_and_for_yaml(outputs, explorer):
    names = dict(zip(("emoji", "flags", "logos"), ("it's; $HOME", "1", "on"), strict=True))
    e = explorer.explored
    curves = {names[name]: curve for name, curve in e.curves.items()}
    sizes = {names[name]: n for name, n in e.setting.sizes.items()}
    renamed = SamplerExplorer(
        dataclasses.replace(e, curves=curves, setting=dataclasses.replace(e.setting, sizes=sizes))
    )
    for row in renamed.curves.values():
        row["half_images"].value = 123.456789
    shell = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {renamed.command()}"], capture_output=True, text=True, check=True
    )
    option, text = shell.stdout.splitlines()
    assert option == "-y"
    moved = {name: row["half_images"].value for name, row in renamed.curves.items()}
    assert yaml.safe_load(text) == {"half_images": moved}


def test_a_curve_that_parameters_have_set_stays_as_they_say_when_another_is_moved(outputs):
    explorer = SamplerExplorer(opened(outputs, half_images={"flags": 321.0}))
    explorer.curves["emoji"]["half_images"].value = 77.0
    _, text = shlex.split(explorer.command())
    assert yaml.safe_load(text)["half_images"] == {"flags": 321.0, "emoji": pytest.approx(77.0, rel=0.05)}


def test_an_untouched_explorer_has_nothing_to_change(explorer):
    assert explorer.command() == "nothing"


def test_as_it_was_makes_new_sliders_with_the_first_picture(explorer):
    before, old = explorer.figures.value, explorer.curves["emoji"]["start"]
    old.value = 1.0
    assert explorer.figures.value != before
    explorer._reset.click()
    assert explorer.figures.value == before
    assert explorer.curves["emoji"]["start"] is not old
    assert explorer.curves["emoji"]["start"] in explorer._controls.children[5].children


def test_fixed_shares_show_when_they_count_and_all_zero_is_equal(explorer):
    assert explorer._fixed.layout.display == "none"
    explorer.strategies["fixed"].value = True
    assert explorer._fixed.layout.display == ""
    for slider in explorer.shares.values():
        slider.value = 0
    assert [cells[12] for cells in rows(explorer).values()] == [cells[6] for cells in rows(explorer).values()]


def test_no_strategy_and_too_many_windows_say_so(explorer, monkeypatch):
    for toggle in explorer.strategies.values():
        toggle.value = False
    assert "choose a strategy" in explorer.figures.value
    monkeypatch.setattr(simulation, "MAX_DRAWS", 1000)
    explorer.strategies["dynamic"].value = True
    assert "10 windows would take too long" in explorer.figures.value


def test_names_of_domains_are_text_and_not_markup(outputs):
    e = opened(outputs)
    found = simulate(e.curves, e.setting)
    hostile = sampler_explorer._areas_picture(sampler_explorer.dataclasses.replace(found, names=("<i>a", "b", "c")))
    assert "<i>" not in hostile
    assert "&lt;i&gt;a" in hostile


def test_what_is_stored_is_small(explorer):
    assert len(explorer.picture.value) + len(explorer.figures.value) < 60_000


def test_what_was_before_the_last_change_is_a_ghost(explorer):
    assert "udon-sim-ghost" not in explorer.picture.value
    explorer.curves["emoji"]["start"].value += 2.0
    ghosts = explorer.picture.value.count("udon-sim-ghost")
    assert ghosts >= 2  # emoji's curve, and the dynamic one's border
    assert "emoji, before" in explorer.picture.value
    explorer.strategies["balanced"].value = not explorer.strategies["balanced"].value
    assert "emoji, before" not in explorer.picture.value  # the ghost is of the last change alone


def test_a_setting_is_written_as_a_preset_that_trains_it(explorer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params").mkdir()
    monkeypatch.setattr(sampler_explorer, "working_folder", lambda: tmp_path)
    monkeypatch.setattr(presets.files, "working_folder", lambda: tmp_path)
    explorer.write_preset()
    assert "expected one: that which is to be trained" in explorer.said.value
    assert list((tmp_path / "params").iterdir()) == []
    for name, toggle in explorer.strategies.items():
        toggle.value = name == "balanced"
    explorer.setting["update_every"].value = 100
    explorer.write_preset()
    [file] = (tmp_path / "params").iterdir()
    made, source = presets.load(file.stem), explorer.explored.source.params
    assert f"-p preset {file.stem}" in explorer.said.value
    assert (made.sampler, made.update_every, made.steps) == ("balanced", 100, explorer.explored.setting.steps)
    assert (made.backbone, made.domains) == (source.backbone, source.domains)
