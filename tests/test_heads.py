from __future__ import annotations

import pytest
import torch
from torch import nn

from udonlib.heads import Head, prototypes


@pytest.mark.parametrize("hidden_dims", [(), (32,), (32, 24)])
def test_embeddings_are_unit_rows_of_the_asked_size(hidden_dims):
    head = Head(16, 8, hidden_dims, torch.Generator().manual_seed(0))
    embeddings = head(torch.randn(5, 16))
    assert embeddings.shape == (5, 8)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(5))


def test_nothing_stands_behind_the_last_linear_layer():
    assert [type(layer) for layer in Head(4, 2, (3,)).layers] == [nn.Linear, nn.LayerNorm, nn.GELU, nn.Linear]


def test_initial_weights_have_variance_one_over_fan_in_and_no_outliers():
    weight = Head(400, 300, generator=torch.Generator().manual_seed(0)).layers[0].weight
    assert weight.std().item() == pytest.approx(400**-0.5, rel=0.01)
    assert weight.abs().max().item() <= 2 * 400**-0.5 / 0.8796 + 1e-6


def test_the_same_generator_state_gives_the_same_head():
    first, second = (Head(8, 4, (6,), torch.Generator().manual_seed(3)) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_prototypes_are_uniform_with_expected_squared_norm_one():
    weights = prototypes(2000, 64, torch.Generator().manual_seed(0))
    assert weights.abs().max().item() <= (3 / 64) ** 0.5
    assert weights.square().sum(1).mean().item() == pytest.approx(1, rel=0.02)
