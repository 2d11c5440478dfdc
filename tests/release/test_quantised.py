"""Smaller vectors: what each way keeps of a value, and what it is said to lose."""

from __future__ import annotations

import pytest
import torch

from udonlib.models.heads import unit
from udonlib.release.quantised import binary, int8, measure, verdict, ways
from udonlib.release.testset import TestSet


def cluttered(n_classes=40, n_each=6, dim=32, noise=0.5, seed=0):
    """Classes of scattered unit vectors; each is a query and in the index."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_classes, dim, generator=generator).repeat_interleave(n_each, 0)
    vectors = unit(centres + noise * dim**0.5 * torch.randn(n_classes * n_each, dim, generator=generator) / 4)
    labels = torch.arange(n_classes).repeat_interleave(n_each)[:, None]
    domains = (torch.arange(len(vectors)) % 12 >= 6).long()
    return TestSet(
        ("a", "b"), {"x": vectors}, {"x": vectors}, domains, domains, labels, labels, torch.arange(len(vectors))
    )


def test_bytes_stand_for_values_within_half_a_level():
    values = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.1, 3.0])
    error = (int8(values)(values) - values).abs()
    inside = (values > 0.001 * values.amax(0)) & (values < 0.999 * values.amax(0))
    assert (error <= values.amax(0) / 255 / 2 * 1.01)[inside].all()
    assert int8(values)(values).unique().numel() <= 3 * 256


def test_values_out_of_the_levels_are_cut_to_the_last_one():
    values = torch.linspace(-1, 1, 5001)[:, None]
    small = int8(values)
    assert small(torch.tensor([[50.0], [-50.0]])).flatten().tolist() == pytest.approx([1, -1], abs=2e-3)
    assert int8(torch.zeros(10, 1))(torch.zeros(2, 1)).tolist() == [[0.0], [0.0]]  # a dimension that never moves


def test_bits_are_halved_by_the_calibrations_median():
    values = torch.randn(1001, 4, generator=torch.Generator().manual_seed(0)) + 5
    bits = binary(values)(values)
    assert set(bits.unique().tolist()) == {-1.0, 1.0}
    assert (bits.mean(0).abs() < 0.01).all()
    assert binary(values)(torch.zeros(1, 4)).tolist() == [[-1.0] * 4]


def test_each_way_has_its_bytes():
    found = {name: n_bytes for name, (n_bytes, _) in ways(torch.randn(100, 64), [8, 16]).items()}
    assert found == {"float16": 128, "int8": 64, "binary": 8, "prefix_16": 64, "prefix_8": 32}


def test_a_prefix_is_cut_off_and_scaled_to_unit_norm():
    vectors = unit(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)))
    small = {name: how for name, (_, how) in ways(vectors, [2, 4]).items()}
    assert torch.equal(small["prefix_4"](vectors), unit(vectors[:, :4]))
    assert torch.equal(small["prefix_2"](vectors), unit(vectors[:, :2]))


def test_losses_are_measured_against_float32_and_re_ranking_takes_them_back():
    test = cluttered()
    calibration = cluttered(seed=7).index["x"]
    table = measure(test, "x", calibration, [2]).set_index(["vectors", "reranked"])
    base = 100 * test.right(test.neighbours(test.queries["x"], test.index["x"], 1)[1]).double().mean().item()
    assert table["r_at_1"].iloc[0] == pytest.approx(base)
    assert 80 < base < 100
    assert (table["low"] <= table["lost"]).all()
    assert (table["lost"] <= table["high"]).all()
    assert (table["r_at_1"] + table["lost"]).round(9).eq(round(base, 9)).all()
    assert table.loc[("float16", 100), "lost"] == table.loc[("int8", 100), "lost"] == 0
    assert table.loc[("prefix_2", 0), "verdict"] == "hopeless"
    assert table.loc[("float16", 100), "verdict"] == "as good"
    binary_alone, reranked = table.loc[("binary", 0), "lost"], table.loc[("binary", 100), "lost"]
    assert binary_alone > 5
    assert reranked < binary_alone / 3


def test_a_small_index_is_re_ranked_whole():
    test = cluttered(n_classes=4)
    table = measure(test, "x", test.index["x"], [2])
    assert set(table["reranked"]) == {0, 24}
    assert (table.loc[table["reranked"] == 24, "lost"] == 0).all()


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(-1, 0.4, "as good"), (0.1, 0.4, "as good"), (-0.1, 2, "not told apart"), (0.1, 4, "worse"), (5, 9, "hopeless")],
)
def test_an_interval_is_put_into_words(low, high, said):
    assert verdict(low, high) == said
