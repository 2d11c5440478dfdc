"""What a run costs: the arithmetic by hand, and what must hold whatever the numbers are."""

import pytest

from udonlib.errors import UserError
from udonlib.lab.use import cost
from udonlib.lab.use.use_params import CostParams

PARAMS = CostParams(n_gpus=(1, 8, 64))


@pytest.fixture(scope="module")
def costs():
    return cost.estimates(PARAMS)


def test_a_ring_sends_all_but_a_part_twice():
    assert cost.ring_seconds(1e9, 1, 1e9, 1) == 0
    assert cost.ring_seconds(1e9, 2, 1e9, 0) == pytest.approx(1)  # half of it there, half of it back
    assert cost.ring_seconds(1e9, 4, 1e9, 0.1) == pytest.approx(1.5 + 0.6)


def test_nodes_send_a_part_for_each_of_their_gpus():
    params = CostParams(node_gb_per_s=1, network_gb_per_s=0.5, gpus_per_node=4, latency_us=0)
    assert cost.summing_seconds(1e9, 4, params) == pytest.approx(1.5)
    assert cost.summing_seconds(1e9, 8, params) == pytest.approx(1.5 + 0.25 / 0.5)


def test_uned_on_one_gpu_is_what_can_be_computed_by_hand(costs):
    one = costs[0]
    # ViT-B/16 at 224 pixels: 17.5 G multiplications with their additions; a fifth of the steps has no backward pass.
    flops = 128 * 35.1e9 * (0.2 + 0.8 * 3)
    assert one.computing == pytest.approx(flops / (0.4 * 989e12), rel=0.02)
    assert one.sending == 0
    assert one.steps == 221_180
    assert one.hours == pytest.approx((221_180 * one.computing + one.evaluating) / 3600)
    assert one.euros == pytest.approx(3 * one.hours)
    assert one.slices == 1


def test_with_more_gpus_the_images_are_the_same_and_only_sending_costs_more(costs):
    for c in costs:
        assert c.batch == 128 * c.n
        assert c.steps * c.batch == pytest.approx(221_180 * 128, rel=1e-3)
        assert c.memory > 2**30
    hours = [c.hours for c in costs]
    assert hours[0] > 7 * hours[1] > 7 * 6 * hours[2]
    assert costs[0].euros < costs[1].euros < costs[2].euros < 1.3 * costs[0].euros
    assert costs[1].slices == 8
    # The gradients of a whole backbone, for four fifths of the steps; those of prototypes are not sent.
    assert costs[1].gradients == pytest.approx(4 * 85.8e6 * 0.8, rel=0.02)
    assert costs[2].sending > costs[1].sending


def test_classes_cost_what_student_and_teacher_compare_with_them():
    n = sum(cost.N_CLASSES.values())
    udon, joint, plain = (
        cost.describe(cost.planned(CostParams(plan=p))) for p in ("uned_in21k", "uned_uj_rr", "uned_us_rr")
    )
    assert udon.class_flops == 2 * (64 + 256) * n / 8
    assert plain.class_flops == 2 * 64 * n / 8
    assert joint.class_flops == 2 * 64 * n


def test_a_measured_pace_takes_the_place_of_the_assumed_one():
    slow = cost.estimate(CostParams(images_per_s=500), 1)
    assert slow.batch / slow.computing == pytest.approx(500 * 3 / 2.6, rel=0.01)  # frozen steps are quicker
    assert "measured" in cost.known(CostParams(images_per_s=500)).text
    assert "assumed" in cost.known(PARAMS).text


def test_tables_and_figure_have_a_column_for_each_number_of_gpus(costs):
    text = cost.table(costs).text
    assert "64 GPUs" in text
    assert f"{costs[1].hours:,.2f}" in text
    bars = cost.chart(costs).data
    total = sum(bar.y[0] for bar in bars)
    assert total == pytest.approx(costs[0].hours, rel=1e-4)
    assert [bar.name for bar in bars] == ["computing", "sending", "validations and test"]


def test_an_unknown_preset_is_named():
    with pytest.raises(UserError, match="uned_in2k"):
        cost.estimate(CostParams(plan="uned_in2k"), 1)
