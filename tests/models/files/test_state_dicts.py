"""The same weights as timm, the hub, wrappers and training scripts leave them."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from udonlib.errors import UserError
from udonlib.models.backbones import create_backbone, timm
from udonlib.models.files.state_dicts import find, take

TINY = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 3}


def encoder(name="vit_small_patch14_dinov2", seed=0, size=32, **arguments) -> nn.Module:
    torch.manual_seed(seed)
    return create_backbone(name, pretrained=False, image_size=size, arguments=TINY | arguments).encoder


def taken(content, into) -> tuple[dict, list[str]]:
    return take(find(content, into), into, "the encoder")


def assert_same(state, source) -> None:
    torch.testing.assert_close(dict(state), dict(source.state_dict()), rtol=0, atol=0)


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


HEADS = {"head.weight": torch.ones(5, 16), "head.bias": torch.ones(5)}
OTHER = {"layers.0.weight": torch.ones(3, 3), "bias": torch.ones(3)}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(4), "step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    "form",
    [
        lambda s: s,
        lambda s: prefixed(s, "module."),
        lambda s: prefixed(s, "_orig_mod.module."),
        lambda s: prefixed(s, "module._orig_mod.") | {"epoch": 1},
        lambda s: prefixed(s, "backbone.") | prefixed(OTHER, "neck."),
        lambda s: prefixed(s, "model.encoder."),
        lambda s: {"model": s, "optimizer": OPTIMIZER, "epoch": 7},
        lambda s: {"state_dict": prefixed(s, "model.backbone.") | prefixed(OTHER, "model.loss."), "callbacks": {}},
        lambda s: {"net": {"weights": prefixed(s, "student.vit.")}},
        lambda s: [s, 12],
        lambda s: {re.sub(r"blocks\.(\d+)\.", r"blocks.\1._orig_mod.", name): value for name, value in s.items()},
        lambda s: prefixed(s, "visual.trunk.") | prefixed(OTHER, "text.") | {"logit_scale": torch.ones(())},
    ],
)
def test_nests_and_prefixes_of_wrappers_are_seen_through(form):
    source, into = encoder(seed=1), encoder(seed=2)
    state, heads = taken(form(source.state_dict() | HEADS), into)
    assert_same(state, source)
    assert heads == list(HEADS)


@pytest.mark.parametrize(
    "form",
    [
        lambda average, other: {"state_dict": other, "state_dict_ema": average},
        lambda average, other: {"model": prefixed(other, "module."), "model_ema": {"module": average}},
        lambda average, other: {"model": other, "average": average},
        lambda average, other: {"student": other, "teacher": average},
        lambda average, other: prefixed(other, "student.backbone.") | prefixed(average, "teacher.backbone."),
        lambda average, other: {"model": average, "average": None},
    ],
)
def test_of_two_that_fit_the_average_is_taken(form):
    average, other, into = (encoder(seed=seed) for seed in range(3))
    state, _ = taken(form(average.state_dict(), other.state_dict()), into)
    assert_same(state, average)


def test_where_they_were_found_and_what_lies_beside_is_told():
    source = encoder(seed=1)
    content = {"state_dict": prefixed(source.state_dict(), "module.backbone.") | prefixed(OTHER, "module.neck.")}
    match = find(content, encoder())
    assert (match.where, match.n_beside) == ("state_dict.module.backbone", 2)


# Names of other programs, written from their own files' names


def facebook(state):
    """DINOv2 as its makers publish it, with a mask token."""
    return {"mask_token": torch.ones(1, 16)} | state


def transformers_vit(state):
    """The transformer of Hugging Face's ViT and DINOv2."""
    out = {"embeddings.mask_token": torch.ones(1, 16), "pooler.dense.weight": torch.ones(16, 16)}
    for ours, value in state.items():
        name = ours.replace("blocks.", "encoder.layer.")
        for ours_part, theirs in (
            *(("cls_token", "embeddings.cls_token"), ("pos_embed", "embeddings.position_embeddings")),
            *(("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("ls1.gamma", "layer_scale1.lambda1")),
            *(("ls2.gamma", "layer_scale2.lambda1"), ("attn.proj", "attention.output.dense")),
        ):
            name = name.replace(ours_part, theirs)
        name = re.sub(r"^norm\.", "layernorm.", name)
        if ".attn.qkv." not in name:
            out[name] = value
            continue
        for which, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
            out[name.replace("attn.qkv", f"attention.attention.{which}")] = part.clone()
    return out


@pytest.mark.parametrize("prefix", ["", "dinov2.", "module.backbone."])
@pytest.mark.parametrize("form", [facebook, transformers_vit])
def test_dinov2_is_read_as_its_makers_and_as_the_hub_name_it(form, prefix):
    source, into = encoder(seed=1), encoder(seed=2)
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    state, _ = taken(prefixed(form(source.state_dict()), prefix), into)
    assert_same(state, source)


def test_the_older_vit_of_the_hub_is_read():
    name = "vit_base_patch16_224"
    source, into = encoder(name, 1), encoder(name, 2)
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    names |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    theirs = {
        re.sub(r"(layer\.\d+\.)(norm[12]|mlp\.fc[12])", lambda m: m[1] + names[m[2]], name): value
        for name, value in prefixed(transformers_vit(source.state_dict()), "vit.").items()
    }
    del theirs["vit.embeddings.mask_token"]
    state, heads = taken(theirs | {"classifier.weight": torch.ones(3, 16)}, into)
    assert_same(state, source)
    assert heads == ["pooler.dense.weight"]


def test_clip_s_image_encoder_is_read_as_the_hub_names_it():
    name = "vit_base_patch16_clip_quickgelu_224.openai"
    source, into = encoder(name, 1), encoder(name, 2)
    theirs = {
        "text_model.final_layer_norm.weight": torch.ones(4),
        "vision_model.embeddings.position_ids": torch.ones(1),
    }
    for ours, value in source.state_dict().items():
        name = ours.replace("blocks.", "encoder.layers.").replace("attn.proj", "self_attn.out_proj")
        name = name.replace("norm_pre", "pre_layrnorm").replace("cls_token", "embeddings.class_embedding")
        name = re.sub(r"^norm\.", "post_layernorm.", re.sub(r"(\d\.)norm", r"\1layer_norm", name))
        name = name.replace("pos_embed", "embeddings.position_embedding.weight")
        name = name.replace("patch_embed.proj", "embeddings.patch_embedding")
        parts = value.chunk(3) if "qkv" in name else [value.reshape(value.shape[ours in ("cls_token", "pos_embed") :])]
        for which, part in zip("qkv", parts, strict=False):
            part = part.reshape(-1) if ours == "cls_token" else part
            theirs[f"vision_model.{name.replace('attn.qkv', f'self_attn.{which}_proj')}"] = part.clone()
    state, _ = taken(theirs, into)
    assert_same(state, source)


def efficientnet_names(state, encoder):
    """EfficientNet's names in efficientnet_pytorch, and in the Lite models that packages ship."""
    ends = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
    plain = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    wide = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    wide |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    numbers = {f"{i}.{j}": 0 for i, stage in enumerate(encoder.blocks) for j in range(len(stage))}
    numbers = {place: number for number, place in enumerate(numbers)}
    out = {"_fc.weight": torch.ones(5, 1280), "_fc.bias": torch.ones(5)}
    for name, value in state.items():
        first, *rest = name.split(".")
        if first != "blocks":
            out[".".join([ends[first], *rest])] = value
            continue
        names = wide if f"blocks.{rest[0]}.{rest[1]}.conv_pwl.weight" in state else plain
        stage, place, part, *leaf = rest
        if part == "se":
            part, *leaf = f"_se_{leaf[0].removeprefix('conv_')}", *leaf[1:]
        out[".".join(["_blocks", str(numbers[f"{stage}.{place}"]), names.get(part, part), *leaf])] = value
    return out


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_b0"])
def test_efficientnet_s_names_of_packages_are_read(name):
    source, into = (create_backbone(name, pretrained=False, image_size=32).encoder for _ in range(2))
    state, heads = taken(efficientnet_names(source.state_dict(), source), into)
    assert_same(state, source)
    assert heads == ["_fc.weight", "_fc.bias"]


def test_timm_s_own_filter_translates_what_an_architecture_s_makers_named():
    """ConvNeXt's published names, which timm's filter of that architecture knows."""
    source, into = (create_backbone("convnext_atto", pretrained=False, image_size=32).encoder for _ in range(2))
    theirs = {}
    for ours, value in source.state_dict().items():
        name = re.sub(r"^stem\.", "downsample_layers.0.", ours)
        name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
        name = re.sub(r"^stages\.(\d)\.blocks\.(\d+)\.", r"stages.\1.\2.", name)
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv").replace("head.norm", "norm")
        theirs[name] = value.reshape(value.shape[:2]) if "pwconv" in name and value.ndim == 4 else value
    assert theirs.keys() != source.state_dict().keys()
    state, _ = taken({"model": theirs | {"head.weight": torch.ones(5, 320), "head.bias": torch.ones(5)}}, into)
    assert_same(state, source)


def test_positions_are_resampled_as_timm_does():
    source, into = encoder(seed=1, size=32), encoder(seed=2, size=48)
    state, _ = taken(prefixed(source.state_dict(), "module."), into)
    expected = timm.models.vision_transformer.checkpoint_filter_fn(source.state_dict(), into)
    assert torch.equal(state["pos_embed"], expected["pos_embed"])
    assert state["pos_embed"].shape == into.pos_embed.shape != source.pos_embed.shape


def test_counters_of_norms_may_be_missing():
    source, into = (create_backbone("resnet10t", pretrained=False, image_size=32).encoder for _ in range(2))
    source(torch.randn(4, 3, 32, 32))
    state, _ = taken({k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}, into)
    assert torch.equal(state["bn1.running_mean"], source.bn1.running_mean)
    state, _ = taken(source.state_dict(), into)
    assert_same(state, source)


# What does not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {k: v for k, v in s.items() if k != "norm.bias"},
            r"key 'norm\.bias' is missing, which the encoder needs$",
        ),
        (
            lambda s: {k.replace("blocks.1.mlp", "blocks.1.ffn"): v for k, v in s.items()},
            r"4 keys \('blocks\.1\.mlp\.fc1\.weight', .* and 1 more\) are missing, which the encoder needs; did you "
            r"mean 'blocks\.1\.ffn\.fc1\.weight'\?; 4 keys \(.*\) have no place in the encoder$",
        ),
        (
            lambda s: s | {k.replace("blocks.2.", "blocks.3."): v for k, v in s.items() if "blocks.2." in k},
            r"^14 keys \(.* and 11 more\) have no place in the encoder; the file has 4 blocks, the encoder 3$",
        ),
        (
            lambda s: {k: v for k, v in s.items() if "blocks.2." not in k},
            r"^14 keys .* are missing, .*; the file has 2 blocks, the encoder 3$",
        ),
        (lambda s: {"more": torch.ones(2)} | s, r"^key 'more' has no place in the encoder$"),
        (lambda s: OTHER, r"holds 0 of the \d+ tensors of the encoder: weights of another .*\? \('layers\.0\.weight'"),
        (lambda s: {"epoch": 3}, r"holds 0 of the \d+ tensors .* \(no tensors, \.\.\)"),
        (lambda s: s | {"norm.weight": torch.ones(16, dtype=torch.int32)}, "key 'norm.weight' holds torch.int32"),
        (lambda s: s | {"norm.weight": torch.ones(16) + 0j}, "key 'norm.weight' holds torch.complex64"),
        (lambda s: s | {"norm.weight": torch.full((16,), torch.nan)}, "key 'norm.weight' .* not finite"),
        (lambda s: s | {"norm.weight": torch.ones(16).double() * 1e300}, "key 'norm.weight' .* not finite"),
        (lambda s: s | {"pos_embed": torch.ones(1, 16, 16)}, r"'pos_embed' has .*: positions of no square grid\?"),
        (lambda s: s | {"pos_embed": torch.ones(16)}, r"key 'pos_embed' has shape \[16\], the encoder needs"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_in_one_message_with_its_likely_cause(change, message):
    into = encoder(seed=2)
    before = {name: value.clone() for name, value in into.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        taken(change(encoder(seed=1).state_dict()), into)
    assert "\n" not in str(caught.value)
    torch.testing.assert_close(dict(into.state_dict()), before, rtol=0, atol=0)


def test_another_patch_size_is_named_and_not_resampled():
    """timm's filter would resample the patches' kernels, and the features would be others than the file's."""
    with pytest.raises(UserError, match=r"key 'patch_embed\.proj\.weight' .*: patches of 16 pixels, not 8\?"):
        taken(encoder(seed=1, patch_size=16, size=64).state_dict(), encoder())


def test_another_width_is_named():
    with pytest.raises(UserError, match=r"has shape \[1, 1, 32\], the encoder needs \[1, 1, 16\]: .* another width\?"):
        taken(encoder(seed=1, embed_dim=32).state_dict(), encoder())


def test_a_file_that_refers_to_itself_ends():
    """Each mapping of 200 is named by all others: walked along every path, these would be 200^4."""
    content: list = [{"a": torch.ones(1)} for _ in range(200)]
    for mapping in content:
        mapping |= {str(i): other for i, other in enumerate(content)}
    assert len(find(content, encoder()).tensors) == 1
