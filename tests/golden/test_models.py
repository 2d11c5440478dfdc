"""heads.npz, model_vit.npz and model_clip.npz."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tests.golden.reference import build_model, reference_params, state_from_reference
from udonlib.models.heads import Head, cosine_logits, unit
from udonlib.training.losses import Batch, UdonObjective

TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


def head_state(params: dict[str, np.ndarray], head: str) -> dict[str, torch.Tensor]:
    """State of a `Head` from `<head>/Dense_i`, `<head>/LayerNorm_i`: ours alternate linear, norm, gelu."""
    state = {}
    for name, value in params.items():
        if match := re.fullmatch(rf"{re.escape(head)}/(Dense|LayerNorm)_(\d+)/(kernel|bias|scale)", name):
            position = 3 * int(match[2]) + (match[1] == "LayerNorm")
            key = f"layers.{position}.{'bias' if match[3] == 'bias' else 'weight'}"
            state[key] = torch.from_numpy(value.T.copy())
    return state


def test_heads_of_every_depth(golden, agree):
    arrays = golden("heads")
    heads = sorted({match[1] for key in arrays if (match := re.fullmatch(r"(.+)/pre_norm", key))})
    assert heads
    for name in heads:
        n_layers = sum(re.fullmatch(rf"{name}/Dense_\d+/kernel", key) is not None for key in arrays)
        kernels = [arrays[f"{name}/Dense_{i}/kernel"] for i in range(n_layers)]
        head = Head(kernels[0].shape[0], kernels[-1].shape[1], [kernel.shape[1] for kernel in kernels[:-1]])
        head.load_state_dict(head_state(arrays, name))
        cls = torch.tensor(arrays["cls"], requires_grad=True)
        weights = torch.tensor(arrays[f"{name}/prototypes"].T.copy(), requires_grad=True)
        feature = unit(cls)
        agree("backbone_out", feature, arrays["backbone_out"], TOLERANCE)
        agree(f"{name}/pre_norm", head.layers(feature), arrays[f"{name}/pre_norm"], TOLERANCE)
        embedding = head(feature)
        agree(f"{name}/embedding", embedding, arrays[f"{name}/embedding"], TOLERANCE)
        cosines = cosine_logits(embedding, weights)
        agree(f"{name}/cosine_logits", cosines, arrays[f"{name}/cosine_logits"], TOLERANCE)
        (torch.from_numpy(arrays[f"{name}/R"]) * cosines).sum().backward()
        agree(f"{name}/grad_cls", cls.grad, arrays[f"{name}/grad_cls"], GRADIENT_TOLERANCE)
        agree(f"{name}/grad_prototypes", weights.grad.mT, arrays[f"{name}/grad_prototypes"], GRADIENT_TOLERANCE)
        expected = head_state({key.replace("/grad/", "/"): v for key, v in arrays.items() if "/grad/" in key}, name)
        assert set(expected) == {key for key, _ in head.named_parameters()}
        for key, parameter in head.named_parameters():
            agree(f"{name}/grad/{key}", parameter.grad, expected[key].numpy(), GRADIENT_TOLERANCE)


@pytest.mark.parametrize("file", ["model_vit", "model_clip"])
def test_the_whole_model_and_its_gradients(golden, agree, file):
    arrays = golden(file)
    params = {key.removeprefix("params/"): value for key, value in arrays.items() if key.startswith("params/")}
    n_classes = arrays["n_classes"].tolist()
    model = build_model(params, n_classes, int(arrays["num_heads"]), int(arrays["patch_size"]))
    images = torch.from_numpy(arrays["images_u8"].transpose(0, 3, 1, 2).copy())
    agree("backbone_out", model.features(images), arrays["backbone_out"], TOLERANCE)
    agree("student_embedding", model.embed(images), arrays["student_embedding"], TOLERANCE)
    objective = UdonObjective(reference_params(len(images)))
    with_gradients = 0
    for d in range(len(n_classes)):
        model.zero_grad(set_to_none=True)
        features = model.features(images)
        labels = torch.from_numpy(arrays[f"domain{d}/label"]).long()
        out = model.outputs(features, str(d))
        agree(f"domain{d} teacher", out.teacher, arrays[f"domain{d}/teacher_embedding"], TOLERANCE)
        agree(f"domain{d} student logits", out.student_cosines, arrays[f"domain{d}/student_logits"], TOLERANCE)
        agree(f"domain{d} teacher logits", out.teacher_cosines, arrays[f"domain{d}/teacher_logits"], TOLERANCE)
        total = objective.terms(model, Batch(images, [(str(d), labels)]))[str(d)]["total"]
        agree(f"domain{d} total", total, arrays[f"domain{d}/total_loss"], TOLERANCE)
        total.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norm = np.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        agree(f"domain{d} norm", norm, arrays[f"domain{d}/grad_global_norm"], GRADIENT_TOLERANCE)
        prefix = f"domain{d}/grad/"
        listed = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
        if listed:
            with_gradients += 1
            expected = state_from_reference(model, listed)
            for name, gradient in gradients.items():
                wanted = expected.get(name, torch.zeros_like(gradient))
                agree(f"{prefix}{name}", gradient, wanted.numpy(), GRADIENT_TOLERANCE)
            assert set(expected) <= set(gradients)
    assert with_gradients
