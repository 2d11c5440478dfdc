from __future__ import annotations

import json

import msgpack
import numpy as np
import pytest
import torch

from tests import PROJECT
from tests.helpers.weightfiles import entry
from udonlib.errors import UserError
from udonlib.models.files.importers import load_backbone_weights, save_backbone_weights
from udonlib.models.files.weight_files import read_flax
from udonlib.models.reference import UNED_ORDER, import_checkpoint

DATA = PROJECT / "tests" / "golden" / "data"
PARAMS = read_flax(DATA / "ckpt" / "checkpoint_-1")
CONFIG = json.loads((DATA / "ckpt" / "config.json").read_text())
NAMES = ("alpha", "beta", "gamma")
IMAGES = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def clip_params() -> dict[str, np.ndarray]:
    with np.load(DATA / "trajectory_clipvit.npz") as file:
        return {name.removeprefix("init/"): file[name] for name in file.files if name.startswith("init/")}


def nested(params, pack=entry) -> dict:
    tree: dict = {}
    for name, value in params.items():
        *folders, leaf = name.split("/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[leaf] = pack(value)
    return tree


def write(folder, params, config=None, pack=entry):
    path = folder / "checkpoint_40"
    path.write_bytes(msgpack.packb({"opt_state": {}, "params": nested(params, pack), "global_step": 40}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return path


def chunked(value):
    pieces = [value.reshape(-1)[i : i + 100] for i in range(0, value.size, 100)]
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): n for i, n in enumerate(value.shape)},
        "chunks": {str(i): entry(piece) for i, piece in enumerate(pieces)},
    }


def low(value):
    return entry(torch.from_numpy(value.copy()).bfloat16().view(torch.int16).numpy(), "bfloat16")


def state(model):
    return dict(model.state_dict())


def test_arrays_in_one_piece_and_in_many_give_the_same_model(tmp_path):
    whole = import_checkpoint(DATA / "ckpt")
    pieces = import_checkpoint(write(tmp_path, PARAMS, CONFIG, chunked))
    torch.testing.assert_close(state(pieces), state(whole), rtol=0, atol=0)
    assert pieces.domains == NAMES
    assert not pieces.training
    assert {value.device.type for value in [*pieces.parameters(), *pieces.buffers()]} == {"cpu"}
    assert all(parameter.requires_grad for parameter in pieces.parameters())


def test_bfloat16_arrays_are_read_as_their_values(tmp_path):
    model = import_checkpoint(write(tmp_path, PARAMS, CONFIG, low))
    rounded = {name: value.bfloat16().float() for name, value in state(import_checkpoint(DATA / "ckpt")).items()}
    torch.testing.assert_close(state(model), rounded, rtol=0, atol=0)


def test_a_clip_checkpoint_brings_clip_s_statistics_and_arithmetic(tmp_path):
    params = clip_params()
    model = import_checkpoint(write(tmp_path, params), domains=NAMES)
    assert model.backbone.mean == (0.48145466, 0.4578275, 0.40821073)
    assert model.backbone.name == "vit_base_patch16_clip_quickgelu_224.openai"
    prototypes = params["teacher_output_projection_1/kernel"]
    np.testing.assert_array_equal(model.teacher_prototypes["beta"].detach().numpy(), prototypes.T)
    assert model.embed(IMAGES).shape == (2, 16)


def test_heads_may_have_hidden_layers_of_their_own(tmp_path):
    random = np.random.default_rng(0)

    def deeper(head, params):
        kernel = params.pop(f"{head}/Dense_0/kernel")
        bias = params.pop(f"{head}/Dense_0/bias")
        layers = {
            "Dense_0/kernel": (48, 20),
            "Dense_0/bias": (20,),
            "LayerNorm_0/scale": (20,),
            "LayerNorm_0/bias": (20,),
        }
        layers |= {"Dense_1/kernel": (20, kernel.shape[1]), "Dense_1/bias": bias.shape}
        params |= {f"{head}/{name}": random.normal(size=shape).astype(np.float32) for name, shape in layers.items()}

    params = dict(PARAMS)
    for number in range(3):
        deeper(f"teacher_projection_domain_{number}", params)
    model = import_checkpoint(write(tmp_path, params, CONFIG))
    assert len(model.student.layers) == 1
    norm, last = model.teachers["gamma"].layers[1], model.teachers["gamma"].layers[3]
    np.testing.assert_array_equal(norm.weight.detach(), params["teacher_projection_domain_2/LayerNorm_0/scale"])
    np.testing.assert_array_equal(last.weight.detach(), params["teacher_projection_domain_2/Dense_1/kernel"].T)
    assert model.outputs(model.features(IMAGES), "gamma").teacher.shape == (2, 24)


def test_a_checkpoint_without_teachers_gives_a_model_without(tmp_path):
    params = {name: value for name, value in PARAMS.items() if not name.startswith("teacher")}
    model = import_checkpoint(write(tmp_path, params, CONFIG))
    assert not model.teachers
    torch.testing.assert_close(model.embed(IMAGES), import_checkpoint(DATA / "ckpt").embed(IMAGES))


def test_its_backbone_can_be_kept_as_weights_of_a_run(tmp_path):
    model, other = import_checkpoint(DATA / "ckpt"), import_checkpoint(DATA / "ckpt")
    save_backbone_weights(model.backbone, tmp_path / "w.safetensors")
    for parameter in other.backbone.parameters():
        torch.nn.init.zeros_(parameter)
    load_backbone_weights(other.backbone, tmp_path / "w.safetensors")
    torch.testing.assert_close(other.embed(IMAGES), model.embed(IMAGES), rtol=0, atol=0)


# Names of domains


def with_domains(count: int) -> dict[str, np.ndarray]:
    params = {name: value for name, value in PARAMS.items() if not name.startswith("teacher")}
    kernel = params["universal_student_output_projection_0/kernel"]
    return params | {f"universal_student_output_projection_{i}/kernel": kernel for i in range(count)}


def test_eight_domains_without_a_config_are_uned_s(tmp_path):
    assert import_checkpoint(write(tmp_path, with_domains(8))).domains == UNED_ORDER


def test_names_that_are_given_go_before_those_of_the_config(tmp_path):
    assert import_checkpoint(write(tmp_path, PARAMS, CONFIG), domains=["x", "y.z", "type"]).domains == (
        "x",
        "y.z",
        "type",
    )


@pytest.mark.parametrize(
    ("config", "domains", "message"),
    [
        (None, None, r"checkpoint_40: holds 3 domains, and no config\.json names them"),
        (None, ["a", "b"], r"parameter 'domains': found 'a, b', expected 3 different names"),
        (None, ["a", "b", "a"], "expected 3 different names"),
        ({"dataset_name": "alpha,beta"}, None, r"config\.json: 'dataset_name': found 'alpha, beta', expected 3"),
        ({"dataset_name": "alpha,,beta"}, None, "expected 3 different names"),
    ],
)
def test_names_that_cannot_be_are_refused(tmp_path, config, domains, message):
    with pytest.raises(UserError, match=message):
        import_checkpoint(write(tmp_path, PARAMS, config), domains=domains)


# Damage


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": {"num_heads": 3}}, r"config\.json: 'model\.num_heads' is 3, but the arrays of .* have 4"),
        ({"model": {"patches": {"size": [16, 16]}}}, r"'model\.patches' is .* have {'size': \[8, 8\]}"),
        ({"model": 1}, "expected a mapping, with a mapping 'model'"),
        ([], "expected a mapping"),
    ],
)
def test_a_config_that_contradicts_the_arrays_is_refused(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        import_checkpoint(write(tmp_path, PARAMS, config), domains=NAMES)


def test_a_config_that_is_no_json_is_named(tmp_path):
    path = write(tmp_path, PARAMS)
    for content in (b"{", b"\xff\xfe\x00", b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(UserError, match=r"config\.json: cannot be read as JSON"):
            import_checkpoint(path)


ENCODER = "Transformer/encoderblock_1/"
POSITIONS = "Transformer/posembed_input/pos_embedding"
QUERY = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
STUDENT_1, TEACHER_1 = "universal_student_output_projection_1/kernel", "teacher_output_projection_1/kernel"


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize("key", sorted(PARAMS))
def test_every_array_is_needed(tmp_path, key):
    params = {name: value for name, value in PARAMS.items() if name != key}
    with pytest.raises(UserError, match=r"checkpoint_40: key '.*' (is missing|has no place)"):
        import_checkpoint(write(tmp_path, params, CONFIG))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (f"{ENCODER}LayerNorm_0/scale", ones(47), r"has shape \[47\], its model needs \[48\]"),
        ("teacher_projection_domain_2/Dense_0/bias", ones(23), r"\[23\], its model needs \[24\]"),
        (TEACHER_1, ones(24, 18), r"\[24, 18\], its model needs \[24, 19\]"),
        (STUDENT_1, ones(19), "expected 2 dimensions, none of them 0"),
        (STUDENT_1, ones(16, 0), "none of them 0"),
        ("cls", ones(1, 1, 48) * np.nan, "holds values that are not finite"),
        ("cls", ones(1, 1, 48).astype(int), "holds int64, expected real numbers"),
        ("ladder/kernel", ones(2), "has no place in its model"),
    ],
)
def test_an_array_that_does_not_fit_is_named(tmp_path, key, value, message):
    with pytest.raises(UserError, match=f"checkpoint_40: key '{key}' .*{message}"):
        import_checkpoint(write(tmp_path, PARAMS | {key: value}, CONFIG))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({POSITIONS: ones(1, 16, 48)}, "16 positions .* expected square patches, 1 and a square number"),
        ({"embedding/kernel": ones(8, 4, 3, 48)}, "patches of 8 x 4"),
        ({QUERY: ones(48, 5, 9)}, "5 heads"),
        ({f"Transformer/encoderblock_{i}/x": ones(1) for i in range(300)}, "has 300 blocks, expected at most"),
        # by its word a transformer of 15 TB: refused for the first array that does not fit, before any is allocated
        ({"embedding/kernel": ones(1, 1, 1, 800_000)}, r"key '.*' has shape .*, its model needs .*800000"),
        ({"universal_student_output_projection_400000000/kernel": ones(1, 1)}, "_projection_3/kernel' is missing"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_a_model_is_built(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        import_checkpoint(write(tmp_path, PARAMS | change), domains=NAMES)


def test_what_is_no_checkpoint_of_the_reference_is_said(tmp_path):
    with pytest.raises(UserError, match="key 'universal_student_.*' is missing: no checkpoint of UDON's reference"):
        import_checkpoint(write(tmp_path, {"Dense_0/kernel": ones(2, 2)}))
    with pytest.raises(UserError, match="checkpoint_-1: no such file"):
        import_checkpoint(tmp_path)
