"""ckpt/: a checkpoint as the reference writes it, and the embeddings that it gives."""

from __future__ import annotations

import json

import torch

from tests.golden.conftest import GOLDEN
from udonlib.models.reference import import_checkpoint

TOLERANCE = 1e-5


def test_a_checkpoint_gives_the_reference_s_embeddings(golden, agree):
    arrays = golden("ckpt_expected")
    model = import_checkpoint(GOLDEN / "ckpt" / "checkpoint_-1")
    names = json.loads((GOLDEN / "ckpt" / "config.json").read_text())["dataset_name"].split(",")
    assert model.domains == tuple(names)
    encoder = model.backbone.encoder
    assert encoder.blocks[0].attn.num_heads == arrays["num_heads"]
    assert encoder.patch_embed.patch_size == (arrays["patch_size"],) * 2
    images = torch.from_numpy(arrays["images_u8"].transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        features = model.features(images)
        agree("backbone_out", features, arrays["backbone_out"], TOLERANCE)
        agree("student_embedding", model.embed(images), arrays["student_embedding"], TOLERANCE)
        for i, (domain, n_classes) in enumerate(zip(names, arrays["n_classes"].tolist(), strict=True)):
            out = model.outputs(features, domain)
            agree(f"teacher of {domain}", out.teacher, arrays[f"domain{i}/teacher_embedding"], TOLERANCE)
            assert out.student_cosines.shape == out.teacher_cosines.shape == (len(images), n_classes)
            for ours, theirs in (
                (model.student_prototypes[domain], f"params/universal_student_output_projection_{i}/kernel"),
                (model.teacher_prototypes[domain], f"params/teacher_output_projection_{i}/kernel"),
            ):
                agree(theirs, ours.mT, arrays[theirs], 0.0)
