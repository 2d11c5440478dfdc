"""unic.npz: ladder, student, standardised targets, losses, teacher dropping with gradients, schedules."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from udonlib.models.backbones import timm
from udonlib.models.ladder import Ladder
from udonlib.models.standards import RunningStandard, Standards
from udonlib.training.unic import (
    cosine,
    kept_teachers,
    teacher_losses,
    token_loss,
    unic_terms,
    warmed_cosine,
)

TOLERANCE = 1e-5
KINDS = {"class": "cls", "patches": "patch"}  # ours -> the reference's
DROPPING = ("drop_p0.0", "drop_p0.5", "drop_p1.0")


class Case:
    """The reference's student, ladder and tokens as ours."""

    def __init__(self, arrays):
        self.arrays = arrays
        dims = map(int, arrays["teacher_dims"])
        self.widths = {
            str(name): dict.fromkeys(KINDS, dim) for name, dim in zip(arrays["teacher_names"], dims, strict=True)
        }
        self.teachers = sorted(self.widths)
        self.n_blocks = int(arrays["n_blocks"])
        self.n_registers = int(arrays["n_register_tokens"])
        self.params = {name[7:]: torch.tensor(value) for name, value in arrays.items() if name.startswith("params/")}

    @property
    def dim(self):
        return self.params["encoder.cls_token"].shape[-1]

    def ladder(self):
        a = self.arrays
        ladder = Ladder(
            [self.dim] * self.n_blocks,
            self.widths,
            hidden_dim=int(a["hidden_dim"]),
            last_hidden_dim=int(a["last_hidden_dim"]),
            blocks=[int(block) for block in a["which_blocks"]],
            prenorm=bool(a["prenorm"]),
            midnorm=bool(a["midnorm"]),
        )
        ladder.load_state_dict({name: self.params[theirs] for name, theirs in self.names_of(ladder).items()})
        return ladder

    def names_of(self, ladder):
        """Our names of the ladder's parameters -> the reference's, which numbers rungs by block, or counts them."""
        rungs = {name.split(".")[4] for name in self.params if name.startswith("lp.heads.")}
        by_block = rungs == {str(block) for block in ladder.blocks}
        names = {}
        for name in ladder.state_dict():
            _, teacher, kind, block, rest = name.split(".", 4)
            rung = block if by_block else ladder.blocks.index(int(block))
            names[name] = f"lp.heads.{teacher}.{KINDS[kind]}.{rung}.layers.{rest}"
        return names

    def encoder(self):
        """The reference's encoder in timm, where beside registers the class token has no position."""
        sizes = {name.removeprefix("encoder."): value.shape for name, value in self.params.items()}
        encoder = timm.models.VisionTransformer(
            img_size=self.arrays["image"].shape[-1],
            patch_size=int(self.arrays["patch_size"]),
            embed_dim=self.dim,
            depth=self.n_blocks,
            num_heads=int(self.arrays["num_heads"]),
            mlp_ratio=sizes["blocks.0.0.mlp.fc1.weight"][0] / self.dim,
            num_classes=0,
            reg_tokens=self.n_registers,
            no_embed_class=self.n_registers > 0,
            init_values=1.0 if "blocks.0.0.ls1.gamma" in sizes else None,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        encoder.load_state_dict(self.encoder_state(self.params))
        return encoder

    def encoder_state(self, params, gradients=False):
        """The encoder's part of parameters, or of their gradients, by our names."""
        state = {}
        for name, value in params.items():
            if name.startswith("encoder.") and name != "encoder.mask_token":
                name = re.sub(r"^blocks\.\d+\.", "blocks.", name.removeprefix("encoder."))  # chunks of blocks
                state[name.replace("register_tokens", "reg_token")] = value
        if self.n_registers:
            if not gradients:  # of a sum they are the same as of its parts
                state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
            state["pos_embed"] = state["pos_embed"][:, 1:]
        return state

    def student(self):
        """What the whole student says of the images, with its encoder and its ladder."""
        encoder, ladder = self.encoder(), self.ladder()
        blocks = encoder.forward_intermediates(
            torch.tensor(self.arrays["image"]),
            return_prefix_tokens=True,
            norm=False,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return encoder, ladder, ladder([{"class": prefix[:, 0], "patches": patches} for patches, prefix in blocks])

    def targets(self):
        """What the losses compare the student with: the batch that was standardised last."""
        last = len(self.arrays["ema/momentum"]) - 1
        return self.by_kind(
            lambda teacher, kind: torch.tensor(self.arrays[f"ema/{last}/{teacher}/{kind}/standardised"])
        )

    def by_kind(self, value):
        return {t: {ours: value(t, theirs) for ours, theirs in KINDS.items()} for t in self.teachers}

    def draws(self, name):
        return torch.tensor(self.arrays[f"{name}/uniform_draws__f64"]).reshape(-1, len(self.teachers) - 1)


@pytest.fixture
def case(golden):
    return Case(golden("unic"))


def test_a_ladder_sums_what_its_rungs_make_of_the_blocks_tokens(case, agree):
    a = case.arrays
    blocks = [
        {ours: torch.tensor(a[f"ladder/{theirs}_{i + 1}"]) for ours, theirs in KINDS.items()}
        for i in range(case.n_blocks)
    ]
    found = case.ladder()(blocks)
    for teacher in case.teachers:
        for ours, theirs in KINDS.items():
            name = f"ladder/out/{teacher}/{theirs}"
            agree(name, found[teacher][ours], a[name], TOLERANCE)


def test_the_whole_student(case, agree):
    _, _, found = case.student()
    for teacher in case.teachers:
        for ours, theirs in KINDS.items():
            name = f"student/{teacher}/{theirs}"
            agree(name, found[teacher][ours], case.arrays[name], TOLERANCE)


def test_targets_are_standardised_by_statistics_from_before_their_batch(case, agree):
    a = case.arrays
    standards = Standards(case.widths, "running", update="after")
    for step, momentum in enumerate(a["ema/momentum"]):
        batch = case.by_kind(lambda teacher, kind, step=step: torch.tensor(a[f"ema/{step}/{teacher}/{kind}/input"]))
        found = standards(batch, float(momentum))
        for teacher in case.teachers:
            for ours, theirs in KINDS.items():
                name, standard = f"ema/{step}/{teacher}/{theirs}", standards.of[teacher][ours]
                assert isinstance(standard, RunningStandard)
                agree(f"{name}/standardised", found[teacher][ours], a[f"{name}/standardised"], TOLERANCE)
                after = a[f"{name}/mean_after"]
                agree(f"{name}/mean_after", standard.mean.reshape(after.shape), after, TOLERANCE)
                agree(f"{name}/std_after", standard.deviation.reshape(after.shape), a[f"{name}/std_after"], TOLERANCE)


def test_losses_of_each_image(case, agree):
    a, targets = case.arrays, case.targets()
    student = case.by_kind(lambda teacher, kind: torch.tensor(a[f"student/{teacher}/{kind}"]))
    found = teacher_losses(student, targets, float(a["loss/lam_cos"]), float(a["loss/lam_sl1"]))
    assert list(found) == case.teachers
    for teacher in case.teachers:
        for ours, theirs in KINDS.items():
            pair = student[teacher][ours], targets[teacher][ours]
            for part, weights in (("cosine", (1.0, 0.0)), ("smooth_l1", (0.0, 1.0))):
                name = f"loss/{teacher}/{theirs}/{part}"
                expected = a[name].reshape(len(a[name]), -1).mean(1)
                agree(name, token_loss(*pair, *weights), expected, TOLERANCE)
        name = f"loss/{teacher}/per_sample"
        agree(name, torch.stack(list(found[teacher].values())).mean(0), a[name], TOLERANCE)


@pytest.mark.parametrize("name", DROPPING)
def test_which_teachers_are_dropped_and_what_that_costs(case, agree, name):
    a, draws, p = case.arrays, case.draws(name), float(case.arrays[f"{name}/drop_prob"])
    losses = torch.stack([torch.tensor(a[f"loss/{teacher}/per_sample"]) for teacher in case.teachers])
    kept = kept_teachers(losses, p, draws)
    np.testing.assert_array_equal(kept.numpy(), a[f"{name}/keep_mask"].astype(bool))
    agree(f"{name}/teacher_coefficient", kept.sum(1) / kept.sum(), a[f"{name}/teacher_coefficient"], TOLERANCE)
    student = case.by_kind(lambda teacher, kind: torch.tensor(a[f"student/{teacher}/{kind}"]))
    terms = unic_terms(teacher_losses(student, case.targets()), draws, drop_probability=p, image_weights="kept")
    agree(f"{name}/loss", terms["total"].mean(), a[f"{name}/loss"], TOLERANCE)


def test_gradients_reach_ladder_and_encoder_but_for_its_last_norm(case, agree):
    a, name = case.arrays, "drop_p0.5"
    encoder, ladder, found = case.student()
    for kinds in found.values():
        for tokens in kinds.values():
            tokens.retain_grad()
    terms = unic_terms(
        teacher_losses(found, case.targets()), case.draws(name), drop_probability=0.5, image_weights="kept"
    )
    terms["total"].mean().backward()
    for teacher in case.teachers:
        for ours, theirs in KINDS.items():
            key = f"{name}/grad_student/{teacher}/{theirs}"
            agree(key, found[teacher][ours].grad, a[key], TOLERANCE)

    prefix = f"{name}/grad/"
    theirs = {key.removeprefix(prefix): torch.tensor(value) for key, value in a.items() if key.startswith(prefix)}
    ours = {case.names_of(ladder)[key]: value for key, value in ladder.named_parameters()}
    expected = {key: value for key, value in theirs.items() if key.startswith("lp.")}
    assert len(theirs) > len(expected) > 0
    assert set(expected) == set(ours)
    for key, value in expected.items():
        agree(key, ours[key].grad, value.numpy(), TOLERANCE)
    ours = dict(encoder.named_parameters())
    compared = case.encoder_state(theirs, gradients=True)
    assert len(compared) == len(theirs) - len(expected)
    for key, value in compared.items():
        agree(key, ours[key].grad, value.numpy(), TOLERANCE)
    assert encoder.norm.weight.grad is None
    assert not any(key.startswith("encoder.norm.") for key in theirs)


def test_schedules_of_momentum_and_rate(case, agree):
    a = case.arrays
    epochs, per_epoch = int(a["schedule/epochs"]), int(a["schedule/iters_per_epoch"])
    momenta = [cosine(1.0, 1e-3, step, epochs * per_epoch) for step in range(epochs * per_epoch)]
    agree("schedule/ema_momentum__f64", momenta, a["schedule/ema_momentum__f64"], TOLERANCE)
    peak, end, warm = 3e-4 * 512 / 256, 1e-6, 2 * per_epoch
    rates = [warmed_cosine(peak, end, step, epochs * per_epoch, warm) for step in range(epochs * per_epoch)]
    agree("schedule/lr", np.array(rates) / peak, a["schedule/lr__f64"] / peak, TOLERANCE)
