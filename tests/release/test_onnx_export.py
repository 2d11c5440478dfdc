"""The ONNX file: the same preparation and the same embeddings, for images of any size and number."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.fresh import run_fresh
from udonlib.data.decoding import prepare_eval
from udonlib.errors import UserError
from udonlib.models.backbones import create_backbone
from udonlib.models.embedding_model import EmbeddingModel
from udonlib.release import onnx_export as module
from udonlib.release.onnx_export import OnnxEmbedder, check_packages, export

SIZES = [(32, 32), (64, 64), (32, 48), (37, 200), (300, 33), (7, 9), (31, 33), (480, 641)]  # width, height


def model_of(name, size, **arguments):
    torch.manual_seed(1)
    backbone = create_backbone(name, pretrained=False, image_size=size, arguments=arguments)
    backbone.mean, backbone.std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    return EmbeddingModel(backbone, {}, student_dim=8, teacher_dim=0).eval()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    model, file = model_of("small_resnet", 32, width=4), tmp_path_factory.mktemp("onnx") / "model.onnx"
    export(model, 32, file)
    return model, OnnxEmbedder(file, 1), file


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_of_any_size_are_prepared_inside(small, size):
    model, onnx, _ = small
    rng = np.random.default_rng(sum(size))
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    raw = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = model.embed(prepare_eval(image, 32)[None])
    # A pixel halfway between two values may be rounded otherwise by a processor without fused operations.
    assert (onnx(raw) - expected).abs().max() < 1e-3
    assert onnx(raw).norm().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "size", "arguments"),
    [
        ("small_resnet", 32, {"width": 4}),
        ("test_efficientnet", 48, {}),
        ("tf_efficientnet_lite0", 48, {}),
        ("test_vit", 32, {}),
    ],
)
def test_batches_of_any_number_are_embedded_alike(name, size, arguments, tmp_path):
    model = model_of(name, size, **arguments)
    export(model, size, tmp_path / "model.onnx")
    onnx = OnnxEmbedder(tmp_path / "model.onnx", 1)
    images = torch.randint(0, 256, (17, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        expected = model.embed(images)
    for n in (1, 2, 17):
        assert (onnx(images[:n]) - expected[:n]).abs().max() < 1e-5
    [entry] = onnx._session.get_inputs()
    assert (entry.name, entry.type, entry.shape) == ("images", "tensor(uint8)", ["batch", "height", "width", 3])
    [out] = onnx._session.get_outputs()
    assert (out.name, out.type, out.shape[1]) == ("embeddings", "tensor(float)", 8)


def test_a_model_that_trains_is_exported_as_it_evaluates_and_goes_on_training(tmp_path):
    model = model_of("small_resnet", 32, width=4).train()
    export(model, 32, tmp_path / "model.onnx")
    assert model.training
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert (OnnxEmbedder(tmp_path / "model.onnx")(images) - model.eval().embed(images)).abs().max() < 1e-5


def test_what_the_exporter_cannot_write_is_said_in_one_message(tmp_path):
    class Strange(torch.nn.Module):
        def forward(self, images):
            return torch.from_numpy(np.linalg.pinv(images.mean((2, 3)).numpy())).mT

    model = model_of("small_resnet", 32, width=4)
    model.backbone.encoder = Strange()
    with pytest.raises(UserError, match="'small_resnet' cannot be written as ONNX: "):
        export(model, 32, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_too_large_for_one_file_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="bytes: one ONNX file holds 1,000"):
        export(model_of("small_resnet", 32, width=4), 32, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_package_that_is_missing_is_said_with_what_to_install(monkeypatch, tmp_path, name):
    check_packages()
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"'{name}' is missing: pip install 'udonlib\[release\]'"):
        export(model_of("small_resnet", 32, width=4), 32, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_release_is_loaded_without_what_writes_it(released):
    script = f"""
import sys
sys.modules.update(dict.fromkeys(["onnx", "onnxscript", "onnxruntime"]))
import udonlib.release.release
from udonlib.release.folder import ReleasedModel
print(ReleasedModel.from_pretrained({str(released.folder)!r}).config.udonlib.name)
"""
    assert run_fresh(script, released.folder).strip() == released.folder.name


def test_a_damaged_file_is_said(small, tmp_path):
    (tmp_path / "model.onnx").write_bytes(small[2].read_bytes()[:500])
    with pytest.raises(UserError, match="model.onnx: onnxruntime cannot open it"):
        OnnxEmbedder(tmp_path / "model.onnx")
