"""trajectory_*.npz: whole trainings of the reference, step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.golden.reference import build_model, reference_params, state_from_reference
from udonlib.training.learner import Learner

STEP_TOLERANCE, FINAL_TOLERANCE, KEY_BIAS_TOLERANCE = 5e-5, 1e-4, 3e-3


def stripped(arrays, prefix):
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def split_key_bias(name, tensor):
    """The part of a fused attention bias that belongs to the keys, whose gradient is rounding noise, and the rest."""
    if not name.endswith("attn.qkv.bias"):
        return None, tensor
    query, key, value = tensor.chunk(3)
    return key, torch.cat([query, value])


@pytest.mark.parametrize("file", ["trajectory_clip", "trajectory_noclip_wd", "trajectory_clipvit"])
def test_training_follows_the_reference(golden, agree, file):
    arrays = golden(file)
    init = stripped(arrays, "init/") or stripped(golden("trajectory_clip"), "init/")
    n_classes = arrays["n_classes"].tolist()
    model = build_model(init, n_classes, int(arrays["num_heads"]), int(arrays["patch_size"]))
    n_steps, batch_size = arrays["label"].shape
    limit = float(arrays["max_grad_norm"])
    params = reference_params(
        batch_size,
        steps=n_steps,
        batch_size=batch_size,
        learning_rate=float(arrays["base_lr"]),
        backbone_learning_rate=float(arrays["backbone_lr"]),
        frozen_steps=int(arrays["frozen_steps"]) + 1,  # theirs also freezes the step with that number
        weight_decay=float(arrays["weight_decay"]),
        beta2=float(arrays["beta2"]),
        max_grad_norm=None if limit < 0 else limit,
        classification=str(arrays["transform"]),
        margin=float(arrays["margin"]),
        scale=float(arrays["scale"]),
        absent_heads="decay",
        frozen_backbone="zero_lr",
    )
    learner = Learner(model, params)
    groups = arrays["step/delta_norm_groups"].tolist()
    for i in range(n_steps):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        images = torch.from_numpy(arrays["images_u8"][i].transpose(0, 3, 1, 2).copy())
        domain = str(arrays["domain_of_step"][i])
        labels = torch.from_numpy(arrays["label"][i]).long()
        terms, norm = learner.step(i, images, [(domain, labels)])
        for name, value in terms[domain].items():
            agree(f"step {i} {name}", value, arrays[f"step/{name}"][i], STEP_TOLERANCE)
        clipped = min(float(norm), limit) if limit >= 0 else float(norm)
        agree(f"step {i} gradient", clipped, arrays["step/grad_norm_after_clipping"][i], FINAL_TOLERANCE)
        heads, backbone = learner.optimizer.param_groups
        agree(f"step {i} rate", heads["lr"], arrays["step/classifier_lr"][i], 1e-9)
        agree(f"step {i} backbone rate", backbone["lr"], arrays["step/backbone_lr"][i], 1e-9)
        deltas = {name: float((p.detach() - before[name]).norm()) for name, p in model.named_parameters()}
        for group, expected in zip(groups, arrays["step/delta_norm"][i], strict=True):
            found = np.sqrt(sum(delta**2 for name, delta in deltas.items() if group_of(name) == group))
            agree(f"step {i} change of {group}", found, expected, 1e-3 if group == "backbone" else FINAL_TOLERANCE)
    final = state_from_reference(model, stripped(arrays, "final/"))
    found = dict(model.named_parameters())
    assert set(final) == set(found)
    for name, expected in final.items():
        for part, wanted, tolerance in zip(
            split_key_bias(name, found[name].detach()),
            split_key_bias(name, expected),
            (KEY_BIAS_TOLERANCE, FINAL_TOLERANCE),
            strict=True,
        ):
            if part is not None:
                agree(f"final {name}", part, wanted.numpy(), tolerance)
    for moment, key in (("final_adam_m/", "exp_avg"), ("final_adam_v/", "exp_avg_sq")):
        for name, expected in state_from_reference(model, stripped(arrays, moment)).items():
            agree(moment + name, learner.optimizer.state[found[name]][key], expected.numpy(), FINAL_TOLERANCE)


def group_of(name: str) -> str:
    """The reference's group of parameters that one of ours belongs to."""
    module, _, rest = name.partition(".")
    domain = rest.partition(".")[0]
    return {
        "backbone": "backbone",
        "student": "universal_student_projection_domain_0",
        "student_prototypes": f"universal_student_output_projection_{domain}",
        "teachers": f"teacher_projection_domain_{domain}",
        "teacher_prototypes": f"teacher_output_projection_{domain}",
    }[module]
