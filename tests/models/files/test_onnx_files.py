from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.onnxfiles import exported_dinov2, graph, integer, node, piece, tensor, varint
from udonlib.errors import UserError
from udonlib.models.backbones import create_backbone
from udonlib.models.files import onnx_files
from udonlib.models.files.importers import load_backbone_weights
from udonlib.models.files.onnx_files import read_onnx, read_onnx_weights, with_outputs

RANDOM = np.random.default_rng(0)
TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 14}


def write(folder, content: bytes):
    path = folder / "net.onnx"
    path.write_bytes(content)
    return path


def normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def dinov2(seed=0, image_size=56):
    torch.manual_seed(seed)
    backbone = create_backbone(
        "vit_small_patch14_dinov2", pretrained=False, image_size=image_size, arguments=TINY
    ).eval()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return backbone


def state(backbone):
    return {name: value.numpy() for name, value in backbone.encoder.state_dict().items()}


def test_arrays_of_all_forms_are_read_and_operations_are_listed(tmp_path):
    arrays = {
        "a": normal(2, 3),
        "one": np.array(2.5, np.float32),
        "half": normal(4).astype(np.float16),
        "counts": np.array([-7, 8]),
        "none": normal(0, 3),
    }
    more = [tensor("packed", arrays["a"], packed=True), tensor("floats", arrays["a"], floats=True)]
    path = write(tmp_path, graph(arrays, [node("MatMul", ["x", "a"], "y", "/n")], more))
    found, [operation] = read_onnx(path)
    assert set(found) == {*arrays, "packed", "floats"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].shape == array.shape
    np.testing.assert_array_equal(found["packed"], arrays["a"])
    np.testing.assert_array_equal(found["floats"], arrays["a"])
    assert (operation.operation, operation.inputs, operation.outputs) == ("MatMul", ["x", "a"], ["y"])


@pytest.mark.parametrize("bias_first", [True, False])
def test_a_matrix_is_named_by_the_bias_that_is_added_to_its_product(tmp_path, bias_first):
    arrays = {"onnx::MatMul_7": normal(3, 5), "fc.bias": normal(5), "scale": normal(5)}
    added = ["fc.bias", "y"] if bias_first else ["y", "fc.bias"]
    nodes = [node("MatMul", ["x", "onnx::MatMul_7"], "y"), node("Add", added, "z"), node("Add", ["z", "scale"], "o")]
    found = read_onnx_weights(write(tmp_path, graph(arrays, nodes)))
    assert set(found) == {"fc.weight", "fc.bias", "scale"}
    np.testing.assert_array_equal(found["fc.weight"], arrays["onnx::MatMul_7"].T)


def test_an_exported_dinov2_fills_the_same_encoder_and_says_the_same(tmp_path):
    source, other = dinov2(), dinov2(seed=1)
    load_backbone_weights(other, write(tmp_path, exported_dinov2(state(source))))
    assert "in 'backbone'" in other.loaded
    images = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(other(images), source(images), rtol=0, atol=0)


def test_its_positions_are_resampled_for_another_image_size(tmp_path):
    path = write(tmp_path, exported_dinov2(state(dinov2())))
    load_backbone_weights(larger := dinov2(image_size=84), path)
    assert larger.encoder.pos_embed.shape == (1, 37, 16)


def test_a_graph_of_something_else_is_refused_as_other_weights_are(tmp_path):
    with pytest.raises(UserError, match=r"net\.onnx: .*weights of another encoder"):
        load_backbone_weights(dinov2(), write(tmp_path, graph({"w": normal(2, 2)})))


def test_every_cut_is_noticed(tmp_path):
    content = exported_dinov2(state(dinov2()))
    for length in range(0, len(content) - 1, len(content) // 40):
        path = write(tmp_path, content[:length])
        with pytest.raises(UserError, match=r"net\.onnx: "):
            load_backbone_weights(dinov2(), path)


@given(st.binary(max_size=200), st.booleans())
def test_no_bytes_make_anything_but_a_message(tmp_path_factory, content, inside):
    path = tmp_path_factory.mktemp("any") / "net.onnx"
    path.write_bytes(piece(7, piece(5, content)) if inside else content)
    with suppress(UserError):
        read_onnx(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (graph({}) + graph({}), "2 graphs, expected one"),
        (piece(7, piece(5, integer(1, 9) + integer(2, 1) + piece(9, b"1234"))), r"shape \[9\] .* held in 4 bytes"),
        (
            piece(7, piece(5, piece(1, b"\xff" * 5 + b"\x01") + integer(2, 1) + piece(9, b"1234"))),
            "is held in 4 bytes",
        ),
        (piece(7, piece(5, piece(8, "w") + integer(14, 1))), "array 'w' lies in another file"),
        (varint(7 << 3 | 2) + varint(2**40), "cut short"),
        (varint(7 << 3 | 3), "field 7 is of kind 3"),
        (b"\xff" * 12, "an integer that does not end"),
        (integer(7, 3), "a number where fields should be"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, content, message):
    with pytest.raises(UserError, match=rf"net\.onnx: .*{message}"):
        read_onnx(write(tmp_path, content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.onnx: no such file"):
        read_onnx(tmp_path / "none.onnx")


def test_further_outputs_are_a_second_part_of_the_same_graph():
    content = graph({"x.bias": np.ones(3, np.float32)}, [node("Add", ["a", "x.bias"], "inside")])
    extended = with_outputs(content, ["inside", "n" * 200])
    assert extended.startswith(content)
    [(number, added)] = onnx_files._fields(extended[len(content) :])
    assert number == onnx_files.GRAPH
    outputs = [dict(onnx_files._fields(value)) for number, value in onnx_files._fields(added) if number == 12]
    assert [bytes(output[1]) for output in outputs] == [b"inside", b"n" * 200]
