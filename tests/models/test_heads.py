from __future__ import annotations

import pytest
import torch
from torch import nn

from udonlib.models import heads
from udonlib.models.heads import FEW, ByDomain, Head, cosine_logits, prototypes, unit


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


# Names that are attributes of torch's modules, that hold a dot, or that other libraries read as something else.
ODD = sorted(
    {*dir(nn.Module()), *dir(nn.ModuleDict()), *vars(nn.Module()), "a.b", "a.0", "a", ".", "a b", "NA", "007", "日本"}
)


@pytest.mark.parametrize("member", [lambda i: nn.Linear(2, i + 1), lambda i: nn.Parameter(torch.full((2,), float(i)))])
def test_members_may_have_any_name_that_a_folder_has(member):
    members = {name: member(i) for i, name in enumerate(ODD)}
    held = ByDomain(members)
    assert list(held) == ODD
    assert all(held[name] is members[name] for name in ODD)
    assert all(name in held for name in ODD)
    assert "nothing" not in held
    assert len(held) == len(ODD)
    assert dict(held.items()) == members
    again = ByDomain({name: member(i + 0) for i, name in enumerate(ODD)})
    for assign in (False, True):
        again.load_state_dict(held.state_dict(), assign=assign)
        for (name, a), (_, b) in zip(held.named_parameters(), again.named_parameters(), strict=True):
            assert torch.equal(a, b), name
    assert len(list(held.parameters())) >= len(ODD)
    assert held.train().training
    assert not held.eval().training
    held.to(torch.float64).requires_grad_(False)
    assert {p.dtype for p in held.parameters()} == {torch.float64}


def test_ordinary_names_have_the_keys_that_torchs_dictionaries_gave_them():
    modules, parameters = (
        nn.ModuleDict({"emoji": nn.Linear(2, 2)}),
        nn.ParameterDict({"b": nn.Parameter(torch.ones(1))}),
    )
    assert list(ByDomain({"emoji": modules["emoji"]}).state_dict()) == list(modules.state_dict())
    assert list(ByDomain({"b": parameters["b"]}).state_dict()) == list(parameters.state_dict())
    assert list(ByDomain({"a.b": parameters["b"]}).state_dict()) == ["a/b"]
    assert ByDomain.domain(ByDomain.key("a.b")) == "a.b"


def both_ways(monkeypatch, embeddings, weights, *wanted):
    """Cosines and gradients of a random sum of them, as the formula stands and without copies."""
    found = []
    for few in (FEW, 0):
        monkeypatch.setattr(heads, "FEW", few)
        cosines = cosine_logits(embeddings, weights)
        upstream = torch.randn(cosines.shape, generator=torch.Generator().manual_seed(2), dtype=cosines.dtype)
        found.append((cosines, *torch.autograd.grad(cosines, wanted, upstream)))
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_cosines_to_very_many_prototypes_are_those_to_few(monkeypatch, dtype, tolerance):
    monkeypatch.setattr(heads, "RUN", 16)  # 40: two runs and a shorter one
    generator = torch.Generator().manual_seed(1)
    embeddings = unit(torch.randn(5, 16, generator=generator, dtype=dtype)).requires_grad_()
    weights = (3 * torch.randn(40, 16, generator=generator, dtype=dtype)).requires_grad_()
    for wanted in ((embeddings, weights), (embeddings,), (weights,)):
        few, many = both_ways(monkeypatch, embeddings, weights, *wanted)
        for one, other in zip(few, many, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def test_a_prototype_of_zeros_has_cosine_zero_either_way(monkeypatch):
    weights = torch.zeros(3, 4, requires_grad=True)
    few, many = both_ways(monkeypatch, unit(torch.ones(2, 4)), weights, weights)
    assert not few[0].any()
    for one, other in zip(few, many, strict=True):
        torch.testing.assert_close(one, other)


def test_very_many_prototypes_are_not_copied_in_a_step():
    weights = prototypes(FEW + 1, 8).requires_grad_()
    cosines = cosine_logits(unit(torch.randn(2, 8)), weights)
    assert cosines.grad_fn.saved_tensors[1].data_ptr() == weights.data_ptr()
    as_large = [kept for kept in cosines.grad_fn.saved_tensors if kept.numel() >= weights.numel()]
    assert len(as_large) == 1
