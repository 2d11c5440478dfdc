"""backbones/: released encoders' files, and what the original programs make of images with them."""

from __future__ import annotations

import re

import pytest
import torch

from tests.golden.conftest import GOLDEN
from udonlib.models.backbones import create_backbone
from udonlib.models.files.importers import load_backbone_weights
from udonlib.models.files.layouts import AUGREG, OPENAI_CLIP
from udonlib.models.files.weight_files import read_npz, read_pickled_arrays
from udonlib.models.heads import unit

TOLERANCE = 1e-5

# Presets name these backbones; here they get the sizes of the golden files. (file, backbone, how it is read, layout,
# a norm of every block, a bias of the first block's hidden layer)
CASES = {
    "augreg": (
        *("T_8-tiny-augreg.npz", "vit_base_patch16_224.augreg_in21k", read_npz, AUGREG),
        *(r"Transformer/encoderblock_\d+/LayerNorm_0/scale", "Transformer/encoderblock_0/MlpBlock_3/Dense_0/bias"),
    ),
    "clip": (
        *("clip_tiny.npy", "vit_base_patch16_clip_quickgelu_224.openai", read_pickled_arrays, OPENAI_CLIP),
        *(r"visual\..*\.ln_1\.weight", "visual.transformer.resblocks.0.mlp.c_fc.bias"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_released_file_gives_the_reference_s_features(golden, agree, case):
    file, name, read, layout, norm, hidden_bias = CASES[case]
    arrays = golden(f"backbones/{case}_expected")
    weights = read(GOLDEN / "backbones" / file)
    dim = arrays["backbone_out"].shape[1]
    sizes = {
        "patch_size": int(arrays["patch_size"]),
        "num_heads": int(arrays["num_heads"]),
        "embed_dim": dim,
        "depth": sum(re.fullmatch(norm, key) is not None for key in weights),
        "mlp_ratio": weights[hidden_bias].size / dim,
    }
    image_size = arrays["images_u8"].shape[1]
    backbone = create_backbone(name, pretrained=False, image_size=image_size, arguments=sizes).eval()
    load_backbone_weights(backbone, GOLDEN / "backbones" / file)
    assert (backbone.mean, backbone.std) == layout.statistics
    images = torch.from_numpy(arrays["images_u8"]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        features = unit(backbone((images - 0.5) / 0.5))
    agree("backbone_out", features, arrays["backbone_out"], TOLERANCE)
