from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from udonlib.errors import UserError
from udonlib.models.backbones import Backbone, create_backbone, timm
from udonlib.models.files.importers import load_backbone_weights, save_backbone_weights

AUGREG, CLIP = "vit_base_patch16_224.augreg_in21k", "vit_base_patch16_clip_quickgelu_224.openai"
TINY = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 3}


def make(name=AUGREG, seed=0, image_size=32, **arguments) -> Backbone:
    torch.manual_seed(seed)
    backbone = create_backbone(name, pretrained=False, image_size=image_size, arguments=TINY | arguments).eval()
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.3)  # norms and biases too, so that no two tensors are alike
    return backbone


def augreg_arrays(backbone: Backbone) -> dict[str, np.ndarray]:
    """A vision transformer as AugReg's files hold it, written from their description alone."""
    state = {name: value.numpy() for name, value in backbone.encoder.state_dict().items()}
    heads, dim = backbone.encoder.blocks[0].attn.num_heads, backbone.feature_dim
    out = {
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": np.zeros((dim, 5), np.float32),
        "head/bias": np.zeros(5, np.float32),
        "pre_logits/kernel": np.zeros((dim, dim), np.float32),
        "pre_logits/bias": np.zeros(dim, np.float32),
    }
    for i in range(len(backbone.encoder.blocks)):
        theirs, ours = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        for norm, number in (("norm1", 0), ("norm2", 2)):
            out[f"{theirs}LayerNorm_{number}/scale"] = state[f"{ours}{norm}.weight"]
            out[f"{theirs}LayerNorm_{number}/bias"] = state[f"{ours}{norm}.bias"]
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        for j, which in enumerate(("query", "key", "value")):
            rows = slice(j * dim, (j + 1) * dim)
            weight = state[f"{ours}attn.qkv.weight"][rows]  # [heads * width, dim]
            out[f"{attention}{which}/kernel"] = weight.reshape(heads, dim // heads, dim).transpose(2, 0, 1)
            out[f"{attention}{which}/bias"] = state[f"{ours}attn.qkv.bias"][rows].reshape(heads, dim // heads)
        projection = state[f"{ours}attn.proj.weight"]  # [dim, heads * width]
        out[f"{attention}out/kernel"] = projection.reshape(dim, heads, dim // heads).transpose(1, 2, 0)
        out[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"]
        for j in (0, 1):
            out[f"{theirs}MlpBlock_3/Dense_{j}/kernel"] = state[f"{ours}mlp.fc{j + 1}.weight"].T
            out[f"{theirs}MlpBlock_3/Dense_{j}/bias"] = state[f"{ours}mlp.fc{j + 1}.bias"]
    return out


def clip_arrays(backbone: Backbone) -> dict[str, np.ndarray]:
    """A vision transformer among the text encoder's arrays, as OpenAI's CLIP holds it."""
    renamed = [
        *(("cls_token", "class_embedding"), ("pos_embed", "positional_embedding"), ("patch_embed.proj", "conv1")),
        *(("norm_pre", "ln_pre"), ("norm1", "ln_1"), ("norm2", "ln_2"), ("norm", "ln_post")),
        *(("blocks", "transformer.resblocks"), ("attn.qkv.", "attn.in_proj_"), ("attn.proj", "attn.out_proj")),
        *(("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")),
    ]
    out: dict[str, np.ndarray] = {}
    for ours, value in backbone.encoder.state_dict().items():
        theirs = ours
        for before, after in renamed:
            theirs = theirs.replace(before, after)
        out[f"visual.{theirs}"] = value.numpy().reshape(value.shape[1:] if ours == "pos_embed" else value.shape)
    out["visual.class_embedding"] = out["visual.class_embedding"].reshape(-1)
    text = {"positional_embedding": (7, 4), "ln_final.weight": (4,), "transformer.resblocks.0.ln_1.weight": (4,)}
    out |= {name: np.ones(shape, np.float16) for name, shape in text.items()}
    return out | {"visual.proj": np.ones((16, 4), np.float16), "vocab_size": np.array(50), "logit_scale": np.array(4.6)}


def write(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        np.save(path, arrays, allow_pickle=True)
    return path


@pytest.fixture
def augreg(tmp_path):
    """The arrays of a file, and what writes them, changed or not."""
    source = make(seed=1)
    return augreg_arrays(source), lambda arrays: write(tmp_path / "weights.npz", arrays), source


def assert_same(found: Backbone, expected: Backbone, tolerance: float = 0):
    state = expected.state_dict()
    assert set(found.state_dict()) == set(state)
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, state[name], atol=tolerance, rtol=tolerance)


# Released files


def test_an_augreg_file_fills_every_parameter(augreg):
    arrays, written, source = augreg
    backbone = make(seed=2)
    backbone.mean = backbone.std = (0.1, 0.2, 0.3)
    load_backbone_weights(backbone, written(arrays))
    assert_same(backbone, source)
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)


def test_timm_reads_the_same_from_an_augreg_file(augreg):
    arrays, written, _ = augreg
    path = written({name: value for name, value in arrays.items() if not name.startswith("pre_logits")})
    ours, theirs = make(seed=2), make(seed=3)
    load_backbone_weights(ours, path)
    theirs.encoder.load_pretrained(str(path))
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_clip_file_fills_every_parameter_and_its_text_is_skipped(tmp_path, dtype):
    source, backbone = make(CLIP, seed=1), make(CLIP, seed=2)
    arrays = {name: a.astype(dtype) if a.dtype.kind == "f" else a for name, a in clip_arrays(source).items()}
    load_backbone_weights(backbone, write(tmp_path / "clip.npy", arrays))
    assert_same(backbone, source, 0 if dtype == np.float32 else 1e-3)
    assert backbone.mean == (0.48145466, 0.4578275, 0.40821073)
    assert backbone.std == (0.26862954, 0.26130258, 0.27577711)


def test_a_released_layout_of_twelve_blocks_loads_at_its_own_size(tmp_path):
    narrow = {"patch_size": 16, "embed_dim": 24, "depth": 12, "num_heads": 12, "mlp_ratio": 4}
    for name, arrays_of, file in ((AUGREG, augreg_arrays, "b.npz"), (CLIP, clip_arrays, "b.npy")):
        source, backbone = (make(name, seed, image_size=224, **narrow) for seed in (1, 2))
        load_backbone_weights(backbone, write(tmp_path / file, arrays_of(source)))
        images = torch.randn(2, 3, 224, 224)
        with torch.no_grad():
            assert torch.equal(backbone(images), source(images))


def test_positions_of_another_image_size_are_resampled_as_timm_does(augreg):
    arrays, written, source = augreg
    backbone = make(seed=2, image_size=48)
    load_backbone_weights(backbone, written(arrays))
    assert backbone(torch.zeros(1, 3, 48, 48)).shape == (1, 16)
    adapted = timm.models.vision_transformer.checkpoint_filter_fn(source.encoder.state_dict(), backbone.encoder)
    torch.testing.assert_close(backbone.encoder.pos_embed.detach(), adapted["pos_embed"])
    assert torch.equal(backbone.encoder.pos_embed[:, 0], source.encoder.pos_embed[:, 0])
    level = np.full_like(arrays["Transformer/posembed_input/pos_embedding"], 0.25)
    load_backbone_weights(backbone, written(arrays | {"Transformer/posembed_input/pos_embedding": level}))
    torch.testing.assert_close(backbone.encoder.pos_embed.detach(), torch.full((1, 37, 16), 0.25))


BLOCK = "Transformer/encoderblock_1/"


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (f"{BLOCK}LayerNorm_2/scale", None, "is missing, which backbone 'vit_base.*' needs; did you mean"),
        ("cls", None, "is missing"),
        ("Transformer/posembed_input/pos_embedding", None, "is missing"),
        (f"{BLOCK}MlpBlock_3/Dense_0/kernel", lambda a: a.T, r"has shape \[48, 16\], .* needs \[16, 48\]"),
        (
            "embedding/kernel",
            lambda a: np.zeros((16, 16, 3, 16), np.float32),
            r".*\[16, 16, 3, 16\], .* \[8, 8, 3, 16\]",
        ),
        (
            *(f"{BLOCK}MultiHeadDotProductAttention_1/key/kernel", lambda a: a.reshape(16, 4, 4)),
            r"has shape \[16, 4, 4\], .* needs \[16, 2, 8\]",
        ),
        ("cls", lambda a: a.astype(int), "holds int64, expected real numbers"),
        ("cls", lambda a: a * np.inf, "holds values that are not finite"),
        ("cls", lambda a: a.astype(np.float64) + 1e300, "holds values that are not finite in float32"),
        ("cls", lambda a: a * np.nan, "holds values that are not finite"),
        ("cls", lambda a: a.astype(object), "is an array of objects"),
        ("Transformer/posembed_input/pos_embedding", lambda a: a[:, :-1], "holds 16 positions, expected 1 and those"),
        ("Transformer/posembed_input/pos_embedding", lambda a: a[0, 0], r"has shape \[16\]"),
        ("Transformer/encoderblock_2/LayerNorm_0/scale", lambda a: np.ones(16), "has no place in backbone"),
    ],
)
def test_an_array_that_does_not_fit_is_named_and_nothing_is_changed(augreg, key, change, message):
    arrays, written, _ = augreg
    backbone, before = make(seed=2), make(seed=2)
    changed = {name: value for name, value in arrays.items() if name != key}
    if change:
        changed[key] = change(arrays.get(key))
    with pytest.raises(UserError, match=rf"weights\.npz: key '{key}' {message}"):
        load_backbone_weights(backbone, written(changed))
    assert_same(backbone, before)


def test_every_cut_of_a_file_is_noticed(augreg):
    arrays, written, _ = augreg
    path = written(arrays)
    content = path.read_bytes()
    for length in range(0, len(content), len(content) // 20):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"weights\.npz: "):
            load_backbone_weights(make(), path)


def test_another_activation_is_refused_with_what_mends_it(augreg, tmp_path):
    arrays, written, _ = augreg
    untagged = "vit_base_patch16_224"
    mend = r"set backbone_args={'act_layer': 'gelu_tanh'}"
    with pytest.raises(UserError, match=rf"trained with the activation 'gelu_tanh', .* has 'gelu'; {mend}"):
        load_backbone_weights(make(untagged), written(arrays))
    mended = make(untagged, act_layer="gelu_tanh")
    load_backbone_weights(mended, written(arrays))
    clip = write(tmp_path / "clip.npy", clip_arrays(make(CLIP)))
    with pytest.raises(UserError, match="activation 'quick_gelu', but backbone 'vit_base_patch16_clip_224.openai'"):
        load_backbone_weights(make("vit_base_patch16_clip_224.openai"), clip)


def test_another_epsilon_is_refused(augreg):
    arrays, written, _ = augreg
    other = make(norm_layer=partial(nn.LayerNorm, eps=1e-5))
    with pytest.raises(UserError, match="layer norms of eps 1e-06, but 'blocks.0.norm1' has 1e-05"):
        load_backbone_weights(other, written(arrays))


def test_backbones_that_a_file_cannot_fill_are_refused(augreg, tmp_path):
    arrays, written, _ = augreg
    path = written(arrays)
    small = create_backbone("small_resnet", pretrained=False, image_size=32, arguments={"width": 2})
    with pytest.raises(UserError, match="holds an AugReg vision transformer, but backbone 'small_resnet' is no"):
        load_backbone_weights(small, path)
    with pytest.raises(UserError, match="which has no 'dist_token' as backbone 'deit_tiny_distilled_patch16_224' does"):
        load_backbone_weights(make("deit_tiny_distilled_patch16_224"), path)
    with pytest.raises(UserError, match="which has no 'norm_pre.weight' as backbone"):
        load_backbone_weights(make(CLIP), path)
    with pytest.raises(UserError, match="key 'visual.conv1.bias' is missing"):
        load_backbone_weights(make(), write(tmp_path / "clip.npy", clip_arrays(make(CLIP))))


# Of PyTorch: timm's, the hub's, training scripts'


def written_by_torch(tmp_path, content, name="pytorch_model.bin"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "w.pth", "w.npz"])
def test_a_state_dict_fills_every_parameter_whatever_its_file_is_called(tmp_path, name):
    source, backbone = make(seed=1), make(seed=2)
    state = {f"module.{key}": value for key, value in source.encoder.state_dict().items()}
    state |= {"module.head.bias": torch.ones(5), "module.head.weight": torch.ones(5, 16)}
    if name == "model.safetensors":
        save_file(state, tmp_path / name)
    else:
        written_by_torch(tmp_path, {"state_dict": state, "epoch": 3}, name)
    load_backbone_weights(backbone, tmp_path / name)
    assert_same(backbone, source)
    where = "module" if name == "model.safetensors" else "state_dict.module"
    assert backbone.loaded == (
        f"weights: 30 tensors of {name} in '{where}'; without head.bias, head.weight; "
        "images normalised by mean 0.5, deviation 0.5"
    )


def test_what_does_not_fit_is_told_with_the_file_and_the_place_in_it(tmp_path):
    backbone, before = make(seed=2), make(seed=2)
    state = {f"backbone.{key}": value for key, value in make(seed=1).encoder.state_dict().items()}
    del state["backbone.norm.bias"]
    path = written_by_torch(tmp_path, {"model": state})
    message = (
        r"pytorch_model\.bin: in 'model\.backbone': key 'norm\.bias' is missing, which backbone 'vit_base_patch16_"
    )
    with pytest.raises(UserError, match=message):
        load_backbone_weights(backbone, path)
    assert_same(backbone, before)


def test_files_of_another_kind_are_called_by_their_name(tmp_path):
    for content, message in (
        (b"", "an empty file"),
        (b"<!doctype html>", "a web page"),
        (b"\x01\x02", "of no known kind"),
    ):
        (tmp_path / "w.pth").write_bytes(content)
        with pytest.raises(UserError, match=rf"w\.pth: {message}.*, expected weights \(safetensors, PyTorch's"):
            load_backbone_weights(make(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"none\.pth: no such file"):
        load_backbone_weights(make(), tmp_path / "none.pth")


TIMM_CONFIG = {
    "architecture": "vit_base_patch16_224",
    "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
}
TRANSFORMERS_CONFIG = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


@pytest.mark.parametrize(
    ("name", "content", "brings"),
    [
        ("config.json", json.dumps(TIMM_CONFIG), True),
        ("preprocessor_config.json", json.dumps(TRANSFORMERS_CONFIG), True),
        ("config.json", json.dumps(TIMM_CONFIG | {"architecture": "vit_small_patch16_224"}), False),
        ("config.json", json.dumps({"model_type": "vit"}), False),
        ("config.json", "{", False),
        ("preprocessor_config.json", "[1]", False),
    ],
)
def test_the_hub_s_description_beside_its_file_brings_mean_and_deviation(tmp_path, name, content, brings):
    source = make(seed=1)
    save_file(source.encoder.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / name).write_text(content)
    backbone = make(seed=2)
    load_backbone_weights(backbone, tmp_path / "model.safetensors")
    expected = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)) if brings else (source.mean, source.std)
    assert (backbone.mean, backbone.std) == expected
    assert ("mean 0.1 0.2 0.3, deviation 0.4 0.5 0.6" in backbone.loaded) == brings
    (tmp_path / "model.safetensors").rename(tmp_path / "mine.safetensors")  # nobody says that it describes this one
    other = make(seed=2)
    load_backbone_weights(other, tmp_path / "mine.safetensors")
    assert (other.mean, other.std) == (source.mean, source.std)


def test_a_run_s_checkpoint_brings_its_backbone_and_its_statistics(tmp_path):
    source, backbone = make(seed=1), make(seed=2)
    model = {f"backbone.{key}": value for key, value in source.state_dict().items()}
    model |= {"student.layers.0.weight": torch.ones(4, 16), "student_prototypes.emoji": torch.ones(3, 4)}
    statistics = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
    load_backbone_weights(
        backbone, written_by_torch(tmp_path, {"model": model, "step": 5, "statistics": statistics}, "best.pt")
    )
    assert_same(backbone, source)
    assert (backbone.mean, backbone.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert "of best.pt in 'model.backbone.encoder'; 2 others left aside; " in backbone.loaded
    with pytest.raises(UserError, match=r"best\.pt: metadata 'std' is \[0, 1, 1\], expected three numbers"):
        broken = {"model": model, "statistics": [[0.1, 0.2, 0.3], [0, 1, 1]]}
        load_backbone_weights(make(), written_by_torch(tmp_path, broken, "best.pt"))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_clip_is_read_as_its_makers_and_open_clip_keep_it(tmp_path, prefix):
    source = make(CLIP, seed=1)
    theirs = {f"{prefix}{name}": torch.from_numpy(value) for name, value in clip_arrays(source).items()}
    backbone = make(CLIP, seed=2)
    load_backbone_weights(backbone, written_by_torch(tmp_path, {"state_dict": theirs}, "clip.pt"))
    assert_same(backbone, source)
    assert backbone.mean == (0.48145466, 0.4578275, 0.40821073)
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in theirs.items()}
    save_file(half, tmp_path / "open_clip.safetensors")
    load_backbone_weights(backbone, tmp_path / "open_clip.safetensors")
    assert_same(backbone, source, 1e-2)


def test_only_openai_s_clip_is_known_to_be_of_quick_gelu(tmp_path):
    exact = "vit_base_patch16_clip_224.laion2b"
    theirs = {name: torch.from_numpy(value) for name, value in clip_arrays(make(exact, seed=1)).items()}
    backbone = make(exact, seed=2)
    load_backbone_weights(backbone, written_by_torch(tmp_path, theirs))
    assert_same(backbone, make(exact, seed=1))
    with pytest.raises(UserError, match="trained with the activation 'quick_gelu'"):
        openai = theirs | {"input_resolution": torch.tensor(32)}
        load_backbone_weights(backbone, written_by_torch(tmp_path, openai))


# Ours


def small(seed: int) -> Backbone:
    torch.manual_seed(seed)
    backbone = create_backbone("small_resnet", pretrained=False, image_size=32, arguments={"width": 4})
    backbone(torch.randn(8, 3, 32, 32))  # moves the running means of its norms
    return backbone.eval()


@pytest.mark.parametrize("create", [lambda seed: make(seed=seed), lambda seed: make(CLIP, seed), small])
def test_what_is_saved_comes_back(tmp_path, create):
    source, backbone = create(1), create(2)
    source.mean, source.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    save_backbone_weights(source, tmp_path / "w.safetensors")
    load_backbone_weights(backbone, tmp_path / "w.safetensors")
    assert_same(backbone, source)
    assert (backbone.mean, backbone.std) == (source.mean, source.std)


def test_half_precision_halves_the_file_and_keeps_eleven_bits(tmp_path):
    source, backbone = small(1), small(2)
    source.encoder.layers[1].running_var.fill_(1e6)  # beyond float16
    for half in (False, True):
        save_backbone_weights(source, tmp_path / f"{half}.safetensors", half=half)
    sizes = [sum(v.nbytes for v in load_file(tmp_path / f"{half}.safetensors").values()) for half in (True, False)]
    assert sizes[0] < 0.51 * sizes[1]
    load_backbone_weights(backbone, tmp_path / "True.safetensors")
    for name, value in backbone.state_dict().items():
        assert value.dtype == source.state_dict()[name].dtype
        torch.testing.assert_close(value, source.state_dict()[name], rtol=2**-11, atol=2**-25)


def test_our_files_serve_other_image_sizes(tmp_path):
    source, backbone = make(seed=1), make(seed=2, image_size=48)
    save_backbone_weights(source, tmp_path / "w.safetensors")
    load_backbone_weights(backbone, tmp_path / "w.safetensors")
    adapted = timm.models.vision_transformer.checkpoint_filter_fn(source.encoder.state_dict(), backbone.encoder)
    torch.testing.assert_close(backbone.encoder.pos_embed.detach(), adapted["pos_embed"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("encoder.norm.weight", None, "key 'norm.weight' is missing"),
        ("encoder.more", torch.zeros(1), "key 'more' has no place in backbone"),
        ("encoder.norm.weight", torch.zeros(17), r"key 'norm.weight' has shape \[17\], .* needs \[16\]"),
        ("encoder.pos_embed", torch.zeros(1, 16, 16), "key 'pos_embed' .*: positions of no square grid"),
        ("encoder.pos_embed", torch.zeros(16), r"key 'pos_embed' has shape \[16\]"),
        ("encoder.norm.weight", torch.zeros(16, dtype=torch.int32), "holds torch.int32"),
        ("encoder.norm.weight", torch.full((16,), torch.nan), "not finite"),
    ],
)
def test_our_files_are_checked_as_well(tmp_path, key, value, message):
    backbone, before = make(), make()
    state = make(seed=1).state_dict() | {key: value}
    path = tmp_path / "w.safetensors"
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    with pytest.raises(UserError, match=rf"w\.safetensors: .*{message}"):
        load_backbone_weights(backbone, path)
    assert_same(backbone, before)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"name": '"vit_small_patch16_224.dino"'}, "holds the weights of 'vit_small_patch16_224.dino', found backbone"),
        ({"activation": '"gelu"'}, "trained with the activation 'gelu', but"),
        ({"mean": "[0.5, 0.5]"}, r"metadata 'mean' is \[0.5, 0.5\], expected three numbers"),
        ({"std": "[0.5, 0.5, 0]"}, "metadata 'std'"),
        ({"mean": "[NaN, 0, 0]"}, "metadata 'mean'"),
    ],
)
def test_metadata_that_contradicts_the_backbone_is_refused(tmp_path, metadata, message):
    save_file(make(seed=1).state_dict(), tmp_path / "w.safetensors", metadata)
    with pytest.raises(UserError, match=message):
        load_backbone_weights(make(), tmp_path / "w.safetensors")


def test_a_file_without_metadata_keeps_the_backbone_s_statistics(tmp_path):
    save_file(make(seed=1).state_dict(), tmp_path / "w.safetensors")
    backbone = make()
    backbone.mean = (0.1, 0.2, 0.3)
    load_backbone_weights(backbone, tmp_path / "w.safetensors")
    assert backbone.mean == (0.1, 0.2, 0.3)
    assert_same(backbone, make(seed=1))


def test_only_safetensors_are_written(tmp_path):
    with pytest.raises(UserError, match=r"w\.npz: expected a name that ends in \.safetensors"):
        save_backbone_weights(make(), tmp_path / "w.npz")
    assert list(tmp_path.iterdir()) == []
