from __future__ import annotations

import pytest
import torch
from torch import nn

from udonlib.models.ladder import KINDS, PROJECTORS, Ladder, last_block, resample

DIMS = (6, 8, 12)
WIDTHS = {"ta": {"class": 5, "patches": 7}, "t.b": {"class": 9}, "type": {"patches": 3}}
per_projector = pytest.mark.parametrize("name", PROJECTORS)


def blocks(dims=DIMS, sides=(3, 3, 3), n=2):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "class": torch.randn(n, dim, generator=generator),
            "patches": torch.randn(n, side**2, dim, generator=generator),
        }
        for dim, side in zip(dims, sides, strict=True)
    ]


def built(name, seed=0, **options):
    return PROJECTORS[name](DIMS, WIDTHS, generator=torch.Generator().manual_seed(seed), **options)


@per_projector
def test_every_projector_gives_each_teacher_what_it_counts_and_no_more(name):
    found = built(name)(blocks())
    shapes = {teacher: {kind: tuple(t.shape) for kind, t in kinds.items()} for teacher, kinds in found.items()}
    assert shapes == {
        "ta": {"class": (2, 5), "patches": (2, 9, 7)},
        "t.b": {"class": (2, 9)},
        "type": {"patches": (2, 9, 3)},
    }


@per_projector
def test_the_same_generator_gives_the_same_weights_whatever_was_drawn_before(name):
    first = built(name).state_dict()
    torch.rand(5)
    again, other = built(name).state_dict(), built(name, seed=1).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@per_projector
def test_only_the_last_block_or_all_of_them_have_a_say(name):
    projector, seen = built(name), blocks()
    before = projector(seen)["ta"]["class"]
    seen[0] = {kind: tokens + 1 for kind, tokens in seen[0].items()}
    changed = not torch.equal(before, projector(seen)["ta"]["class"])
    assert changed == (name == "ladder")


@per_projector
def test_every_weight_learns(name):
    projector = built(name)
    sum(tokens.square().sum() for kinds in projector(blocks()).values() for tokens in kinds.values()).backward()
    assert [key for key, p in projector.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_transformer_lets_class_tokens_see_patches_and_a_ladder_does_not():
    seen, changed = blocks(), blocks()
    changed[-1]["patches"] = changed[-1]["patches"] + 1
    for name, sees in {"ladder": False, "last": False, "transformer": True}.items():
        projector = built(name)
        assert torch.equal(projector(seen)["ta"]["class"], projector(changed)["ta"]["class"]) != sees


def test_a_rung_s_width_follows_the_student_s_unless_it_is_given():
    def widths(ladder):
        rungs = ladder.heads["ta"]["class"]
        return [layer.out_features for block in rungs for layer in rungs[block][:1]]

    assert widths(built("ladder")) == [3, 3, 12]
    assert widths(built("ladder", hidden_dim=20, last_hidden_dim=48)) == [20, 20, 48]
    assert widths(built("last")) == [12]
    assert widths(built("ladder", blocks=[0, 1], hidden_dim=2)) == [2, 2]


def test_a_ladder_is_the_sum_of_its_rungs():
    ladder, seen = built("ladder"), blocks()
    rungs = ladder.heads["type"]["patches"]
    expected = sum(rungs[str(i)](tokens["patches"]) for i, tokens in enumerate(seen))
    torch.testing.assert_close(ladder(seen)["type"]["patches"], expected)


def test_patches_of_earlier_finer_maps_are_averaged_to_the_last_grid():
    ladder = built("ladder")
    fine = blocks(sides=(6, 3, 3))
    coarse = [dict(tokens) for tokens in fine]
    maps = fine[0]["patches"].reshape(2, 3, 2, 3, 2, 6)
    coarse[0]["patches"] = maps.mean((2, 4)).reshape(2, 9, 6)
    for kind in KINDS:
        torch.testing.assert_close(ladder(fine)["ta"][kind], ladder(coarse)["ta"][kind])


def test_teachers_of_class_tokens_alone_need_no_patches():
    ladder = Ladder([4, 4], {"t": {"class": 3}})
    assert ladder([{"class": torch.ones(2, 4)}] * 2)["t"]["class"].shape == (2, 3)


def test_a_projector_holds_nothing_of_the_student():
    encoder = nn.Linear(12, 12)
    before = set(encoder.state_dict())
    last_block([12], {"t": {"class": 3}})
    assert set(encoder.state_dict()) == before


def test_resampling_keeps_a_plane_and_turns_nothing():
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    plane = torch.stack([row, column], dim=-1).reshape(1, 64, 2)
    coarse = resample(plane, 16).reshape(4, 4, 2)
    assert coarse[:, 0, 0].tolist() == [0.5, 2.5, 4.5, 6.5]
    assert coarse[0, :, 1].tolist() == [0.5, 2.5, 4.5, 6.5]
    fine = resample(coarse.reshape(1, 16, 2), 64).reshape(8, 8, 2)
    torch.testing.assert_close(fine[1:7, 1:7], plane.reshape(8, 8, 2)[1:7, 1:7])
    assert resample(plane, 64) is plane


@pytest.mark.parametrize(("n", "wanted"), [(8, 4), (9, 5)])
def test_positions_of_no_square_are_refused(n, wanted):
    with pytest.raises(ValueError, match=f"{n} and {wanted} positions: expected those of square grids"):
        resample(torch.ones(1, n, 2), wanted)
