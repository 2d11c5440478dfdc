"""The sampler's notebook finds runs, fits their losses, and says in one line what is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.sampler import CURVES, DOMAINS, opened, steer, write_sampled_run
from udonlib.errors import UserError
from udonlib.lab.explore import sampler_study
from udonlib.lab.explore.simulation import Setting, deviation

SIZES = dict.fromkeys(DOMAINS, 12)  # of the tree's train split


@pytest.fixture
def outputs(tmp_path) -> Path:
    """Two seeds of a dynamic run, a newer run in turn, one that is not finished."""
    outputs = tmp_path / "results"
    write_sampled_run(outputs, "udon-s0", age=50)
    write_sampled_run(outputs, "udon-s1", age=60, seed=1)
    write_sampled_run(outputs, "turns", "round_robin", age=10)
    write_sampled_run(outputs, "half", finished=False)
    return outputs


def test_the_latest_dynamic_run_is_fitted_and_held_against_itself_with_its_seeds_beside_it(outputs):
    e = opened(outputs)
    assert e.source.path.name == e.check.path.name == "udon-s0"
    assert [run.path.name for run in e.runs] == ["udon-s0", "udon-s1"]
    n = np.linspace(300, 2000, 20)
    for name in DOMAINS:
        np.testing.assert_allclose(e.curves[name].loss(n), CURVES[name].loss(n), rtol=0.05)
        assert e.fits[name].residual < 0.01
    n_classes = dict.fromkeys(DOMAINS, 3)
    assert e.setting == Setting(SIZES, 300, 24, 3, 30, 0.0, "round_robin", {}, 0, n_classes=n_classes)
    assert e.check_setting == e.setting


def test_the_simulation_of_a_run_is_close_to_its_record_also_with_curves_of_another(outputs):
    for curves, most in (("udon-s0", 0.2), ("turns", 0.5)):
        off, equal = deviation(sampler_study.checked(opened(outputs, run=curves, check="udon-s0")))
        assert off < most < equal


def test_a_run_of_a_gap_is_held_against_nothing_since_no_curve_shows_its_signal(tmp_path):
    outputs = tmp_path / "results"
    write_sampled_run(outputs, "gap", sampler_signal="gap", sampler_floor=0.2, sampler_order="even")
    e = opened(outputs, run="gap")
    assert e.check is None
    assert (e.setting.signal, e.setting.floor, e.setting.order) == ("loss", 0.2, "even")


def test_losses_come_with_the_images_they_are_means_of(outputs):
    e = opened(outputs, run="turns")
    part = e.points[e.points["domain"] == "flags"]
    assert part["first"].tolist() == list(range(0, 2400, 240))
    assert part["last"].tolist() == list(range(240, 2640, 240))
    expected = [CURVES["flags"].mean(float(a), float(a + 240)) for a in part["first"]]
    np.testing.assert_allclose(part["loss"], expected)


def test_the_loss_is_the_one_that_steers_the_sampler(tmp_path):
    outputs = tmp_path / "results"
    both = ("ce_teacher", "ce_student")
    write_sampled_run(outputs, "teacher", terms=("ce_teacher",))
    write_sampled_run(outputs, "student", terms=("ce_student",), sampler_loss="student")
    write_sampled_run(outputs, "alone", terms=("ce_student",), recipe="us_rr", strategy="round_robin")
    write_sampled_run(outputs, "both", terms=both)
    for name, loss in (("teacher", "teacher"), ("student", "student"), ("alone", "student"), ("both", "teacher")):
        e = opened(outputs, run=name)
        assert sampler_study.steering_loss(e.source) == loss
        assert e.points["loss"].max() < 10


def test_without_a_run_curves_are_drawn_from_the_data(tmp_path):
    write_uned_tree(tmp_path / "data", domains=DOMAINS)
    e = opened(tmp_path / "nothing", data=str(tmp_path / "data"), steps=50)
    assert e.source is e.check is None
    assert e.runs == []
    assert e.setting.steps == 50
    assert {name: curve.start for name, curve in e.curves.items()} == dict.fromkeys(DOMAINS, pytest.approx(np.log(3)))
    assert sampler_study.checked(e).empty
    assert len(e.simulations) == 4
    with pytest.raises(
        UserError, match="'run': found 'latest', but there is no finished run of several domains in .*run=drawn"
    ):
        opened(tmp_path / "nothing", run="latest")


def test_parameters_change_curves_and_setting_and_then_the_run_is_no_check(outputs):
    e = opened(
        outputs, half_images={"emoji": 9000}, start_loss={"logos": 0.1}, update_every=10, sampler_smoothing="0.5"
    )
    assert e.curves["emoji"].half_images == 9000
    assert e.curves["logos"].start == 0.1
    assert e.curves["logos"].floor <= 0.1
    assert e.curves["flags"] == e.fits["flags"].curve
    assert (e.setting.update_every, e.setting.smoothing) == (10, 0.5)
    assert e.check is None
    assert opened(outputs, half_images={"emoji": 9000}, check="udon-s1").check_setting.seed == 1


def test_a_batch_that_the_runs_parts_do_not_divide_has_one_domain(outputs):
    assert opened(outputs, batch_size=25).setting.domains_per_batch == 1


def test_some_domains_alone_are_another_training_than_the_runs(outputs):
    e = opened(outputs, domains="emoji, logos")
    assert e.names == ("emoji", "logos")
    assert set(e.points["domain"]) == {"emoji", "logos"}
    assert e.check is None


def test_runs_are_chosen_by_name_and_pattern_once_each(outputs):
    chosen = opened(outputs, runs="turns, udon-*, latest")
    assert [run.path.name for run in chosen.runs] == ["turns", "udon-s0", "udon-s1"]
    for seed in range(2, 9):
        write_sampled_run(outputs, f"udon-s{seed}", seed=seed, age=70)
    assert len(opened(outputs, runs="udon-*").runs) == sampler_study.MAX_RUNS


def test_runs_of_the_same_name_are_two_and_a_run_named_twice_is_one(outputs):
    other = write_sampled_run(outputs.parent / "others", "udon-s0", "round_robin")
    chosen = opened(outputs, runs=f"udon-s0,{outputs}/../results/runs/udon-s0,{other},turns").runs
    assert sampler_study.labels(chosen) == ["results/runs/udon-s0", "others/runs/udon-s0", "turns"]


def test_the_effective_share_is_shown_where_a_run_was_steered(outputs):
    run = opened(outputs).source
    alone = sampler_study.recorded_allocation(run)
    assert alone["share"].equals(alone["weight"])
    assert sampler_study.steerings(run) == []
    steer(run.path, 40, {"emoji": 0.8, "flags": 0.1, "logos": 0.1}, locks={"emoji": 0.8})
    table = sampler_study.recorded_allocation(run).query("step == 40").set_index("domain")
    assert table["share"].to_dict() == {"emoji": 0.8, "flags": 0.1, "logos": 0.1}
    assert table["weight"].to_dict() == alone.query("step == 30").set_index("domain")["weight"].to_dict()
    assert [str(act) for act in sampler_study.steerings(run)] == ["emoji locked at 80.0%"]


def test_other_data_than_the_runs_may_be_named_where_it_has_moved(outputs):
    (outputs.parent / "data").rename(outputs.parent / "moved")
    with pytest.raises(UserError, match="run 'udon-s0' was trained on .*no folder or archive.*say where it is: data="):
        opened(outputs)
    assert opened(outputs, data=str(outputs.parent / "moved")).setting.sizes == SIZES


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"run": "udon-s9"}, "'run': no run 'udon-s9' in .*did you mean 'udon-s0'|'udon-s1'"),
        ({"run": "half"}, "'run': run 'half' is unfinished; finished runs with losses: turns, udon-s0, udon-s1"),
        ({"runs": "udom-*"}, "parameter 'runs': no finished run .* is called 'udom-\\*'; "),
        (
            {"check": "turns"},
            "'check': run 'turns' has sampler 'round_robin'.*; finished runs with a dynamic sampler: udon-s0, udon-s1",
        ),
        (
            {"check": "udon-s1", "domains": "emoji,flags"},
            "'check': run 'udon-s1' trained emoji, flags, logos, but there",
        ),
        ({"half_images": {"emojj": 5}}, "'half_images': there is no domain 'emojj'; did you mean 'emoji'"),
        ({"fixed_shares": {"flag": 5}}, "'fixed_shares': there is no domain 'flag'; did you mean 'flags'"),
        ({"fixed_shares": {"flags": 5}}, "'fixed_shares': found flags 5, expected a share for each of emoji"),
        ({"floor_loss": {"emoji": 99}}, "'floor_loss', domain 'emoji': learning curve: found start"),
        ({"batch_size": 25, "domains_per_batch": 3}, "'domains_per_batch': found 3, expected a divisor of batch_size"),
        ({"strategies": "dynamik"}, "'strategies': found 'dynamik'"),
        ({"strategies": "dynamic,dynamic"}, "'strategies': found 'dynamic,dynamic', expected one or more different"),
        ({"domains": "emoji,flagz"}, "has no domain 'flagz'; did you mean 'flags'"),
        ({"sampler_smoothing": 1}, "'sampler_smoothing': found 1"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_one_line(outputs, values, message):
    with pytest.raises(UserError, match=message) as caught:
        opened(outputs, **values)
    assert "\n" not in str(caught.value)


def test_a_run_that_trained_nothing_has_no_curves(outputs):
    folder = write_sampled_run(outputs, "features")
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="run 'features' .*trained nothing: it has no losses"):
        opened(outputs, run="features")
    assert opened(outputs).source.path.name == "udon-s0"


def test_a_domain_that_got_nothing_has_no_curve_and_can_be_left_out(outputs):
    folder = write_sampled_run(outputs, "starved")
    kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in kept:
        record.get("losses", {}).pop("flags", None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    with pytest.raises(UserError, match="run 'starved' recorded no losses of flags; leave them out"):
        opened(outputs, run="starved")
    assert opened(outputs, run="starved", domains="emoji,logos").names == ("emoji", "logos")


def test_the_latest_run_is_of_several_domains_and_for_the_curves_a_dynamic_one_if_there_is_one(outputs):
    latest = opened(outputs, run="latest", check="latest", runs="latest")
    assert latest.source.path.name == latest.check.path.name == "udon-s0"
    assert [run.path.name for run in latest.runs] == ["turns"]
    write_sampled_run(outputs, "specialist", domains=("emoji",), recipe="specialist", strategy="round_robin", age=-5)
    again = opened(outputs, run="latest", runs="latest")
    assert [run.path.name for run in (again.source, *again.runs)] == ["udon-s0", "turns"]


def test_one_domain_alone_gets_everything(outputs):
    write_sampled_run(outputs, "specialist", domains=("emoji",), recipe="specialist", strategy="round_robin", age=-5)
    assert "specialist" not in [run.path.name for run in opened(outputs, runs="*").runs]
    alone = opened(outputs, run="specialist")
    assert all((one.shares == 1).all() for one in alone.simulations)
