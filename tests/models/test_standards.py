from __future__ import annotations

import math
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from udonlib.models.standards import (
    STANDARDS,
    FixedStandard,
    IsotropicStandard,
    RunningStandard,
    Standards,
    equalising_rotation,
)

WIDTHS = {"b": {"class": 4, "patches": 3}, "a": {"class": 5}}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features(seed=0, n=6):
    return {
        "a": {"class": random(n, 5, seed=seed)},
        "b": {"class": random(n, 4, seed=seed + 1), "patches": random(n, 4, 3, seed=seed + 2)},
    }


DEVIATIONS = torch.tensor([0.1, 1.0, 3.0, 20.0])


def batch(seed, n=64):
    return random(n, 4, seed=seed) * DEVIATIONS + torch.tensor([5.0, 0.0, -3.0, 100.0])


@pytest.mark.parametrize("name", STANDARDS)
def test_a_standard_takes_one_vector_an_image_and_maps(name):
    standard = STANDARDS[name](4)
    for shape in ((6, 4), (6, 9, 4)):
        assert standard(random(*shape), 0.5).shape == shape


@pytest.mark.parametrize("name", sorted(set(STANDARDS) - {"none"}))
def test_after_some_batches_targets_have_mean_0_and_spread_1(name):
    standard = STANDARDS[name](4)
    for step in range(10):
        standard(batch(step), 0.5)
    found = standard(batch(0, 4000), 0.0)
    assert found.mean(0).abs().max() < 0.4
    if name == "isotropic":
        assert found.std().item() == pytest.approx(1, abs=0.3)
    else:
        assert found.std(0).tolist() == pytest.approx([1] * 4, abs=0.3)


@pytest.mark.parametrize("name", sorted(set(STANDARDS) - {"batch", "none"}))
def test_validation_leaves_the_statistics_alone(name):
    standard = STANDARDS[name](4)
    standard(batch(0), 0.5)
    before = {key: value.clone() for key, value in standard.state_dict().items()}
    standard(batch(1), 0.0)
    assert before.keys() == standard.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in standard.state_dict().items())


def test_the_first_batch_is_raw_in_the_original_and_standardised_by_default():
    x = batch(0)
    torch.testing.assert_close(RunningStandard(4, update="after")(x, 1.0), x, rtol=1e-5, atol=0)
    assert RunningStandard(4)(x, 1.0).std(0).tolist() == pytest.approx([1] * 4, abs=1e-3)


def test_fixed_statistics_are_those_of_all_their_batches_and_stay():
    standard = FixedStandard(4, n_batches=3)
    for step in range(3):
        standard(batch(step), 1.0)
    together = torch.cat([batch(step) for step in range(3)])
    expected = (batch(7) - together.mean(0)) / together.std(0)
    torch.testing.assert_close(standard(batch(7) * 1, 0.0), expected, rtol=1e-4, atol=1e-4)
    standard(batch(8) * 9, 1.0)
    torch.testing.assert_close(standard(batch(7), 0.0), expected, rtol=1e-4, atol=1e-4)


def test_one_scale_after_a_rotation_keeps_distances_in_proportion_and_evens_variances():
    standard = IsotropicStandard(4, n_batches=2)
    for step in range(2):
        standard(batch(step), 1.0)
    together = torch.cat([batch(0), batch(1)])
    found = standard(together, 0.0)
    assert found.var(0).tolist() == pytest.approx([1] * 4, abs=1e-3)
    ratio = torch.pdist(found) / torch.pdist(together)
    torch.testing.assert_close(ratio, ratio.mean().expand(len(ratio)), rtol=1e-3, atol=0)


def test_rotation_waits_for_the_last_of_the_batches():
    standard = IsotropicStandard(4, n_batches=2)
    found = standard(batch(0), 1.0)
    assert torch.equal(standard.rotation, torch.eye(4))
    assert found.var(0).mean().item() == pytest.approx(1, abs=1e-3)
    standard(batch(1), 1.0)
    assert not torch.equal(standard.rotation, torch.eye(4))


@given(st.integers(1, 24), st.integers(0, 50))
def test_every_covariance_has_a_rotation_that_evens_its_variances(dim, seed):
    factors = random(dim, dim, seed=seed).double() * torch.logspace(-2, 2, dim, dtype=torch.float64)[:, None]
    covariance = factors @ factors.mT
    rotation = equalising_rotation(covariance)
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(dim, dtype=torch.float64))
    assert torch.linalg.det(rotation).item() == pytest.approx(1)
    variances = (rotation @ covariance @ rotation.mT).diagonal()
    torch.testing.assert_close(variances, covariance.diagonal().mean().expand(dim))


@pytest.mark.parametrize("name", sorted(set(STANDARDS) - {"none"}))
def test_several_processes_measure_what_one_would(name):
    whole = [batch(step, 8) for step in range(3)]
    alone = STANDARDS[name](4)
    for x in whole:
        expected = alone(x, 0.5)
    halves = [[x[:3] for x in whole], [x[3:] for x in whole]]
    standards = run_together(name, halves)
    found = torch.cat([outputs[-1] for _, outputs in standards])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for standard, _ in standards:
        for key, value in standard.state_dict().items():
            torch.testing.assert_close(value, alone.state_dict()[key], rtol=1e-4, atol=1e-3)


def run_together(name, shards):
    """Run a standard in one thread for each process, with sums over all of them."""
    n = len(shards)
    barrier, shelf = threading.Barrier(n), [None] * n

    def process(rank, results):
        def sums(tensor):
            shelf[rank] = tensor
            barrier.wait()
            total = torch.stack(list(shelf)).sum(0)
            barrier.wait()
            return total

        standard = STANDARDS[name](4, sums=sums)
        results[rank] = (standard, [standard(x, 0.5) for x in shards[rank]])

    results: list = [None] * n
    threads = [threading.Thread(target=process, args=(rank, results)) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


@pytest.mark.parametrize("name", STANDARDS)
def test_statistics_go_through_a_checkpoint_to_the_bit(name):
    standards = Standards(WIDTHS, name)
    for step in range(3):
        standards(features(step), 0.5)
    again = Standards(WIDTHS, name)
    again.load_state_dict(standards.state_dict())
    for momentum in (0.5, 0.0):
        first, second = standards(features(9), momentum), again(features(9), momentum)
        assert all(torch.equal(first[t][k], second[t][k]) for t in first for k in first[t])
    assert {t: list(kinds) for t, kinds in first.items()} == {"a": ["class"], "b": ["class", "patches"]}


def test_each_teacher_and_kind_has_statistics_of_its_own():
    standards = Standards(WIDTHS)
    found = standards(
        {"a": {"class": random(50, 5) * 100}, "b": {"class": random(50, 4), "patches": random(50, 4, 3) + 7}}, 1.0
    )
    assert all(math.isclose(x.std().item(), 1, abs_tol=0.1) for kinds in found.values() for x in kinds.values())
    assert not any(x.requires_grad for kinds in found.values() for x in kinds.values())


def test_half_precision_features_are_standardised_in_single():
    found = Standards({"a": {"class": 5}})({"a": {"class": random(6, 5).half()}}, 1.0)
    assert found["a"]["class"].dtype == torch.float32
