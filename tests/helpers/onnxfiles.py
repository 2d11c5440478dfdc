"""ONNX graphs as exporters write them, from the description of the format alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "float16": 10, "float64": 11}


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def integer(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def piece(number: int, content: bytes | str) -> bytes:
    content = content.encode() if isinstance(content, str) else content
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensor(name: str, array: np.ndarray, *, packed: bool = False, floats: bool = False) -> bytes:
    """A TensorProto. packed: its sizes in one field; floats: its numbers as floats instead of raw bytes."""
    sizes = piece(1, b"".join(map(varint, array.shape))) if packed else b"".join(integer(1, n) for n in array.shape)
    content = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return sizes + integer(2, TYPES[array.dtype.name]) + piece(8, name) + piece(4 if floats else 9, content)


def node(operation: str, inputs: Sequence[str], output: str, name: str = "") -> bytes:
    return b"".join(piece(1, i) for i in inputs) + piece(2, output) + piece(3, name) + piece(4, operation)


def graph(arrays: Mapping[str, np.ndarray], nodes: Sequence[bytes] = (), tensors: Sequence[bytes] = ()) -> bytes:
    """A ModelProto as PyTorch's exporter begins it."""
    parts = [piece(1, n) for n in nodes] + [piece(5, tensor(name, array)) for name, array in arrays.items()]
    parts += [piece(5, t) for t in tensors]
    parts.append(varint(20 << 3 | 5) + bytes(4) + varint(21 << 3 | 1) + bytes(8))  # numbers of fixed size, skipped
    return integer(1, 7) + piece(2, "pytorch") + piece(3, "2.7.0") + piece(7, b"".join(parts))


def exported_dinov2(state: Mapping[str, np.ndarray], prefix: str = "backbone") -> bytes:
    """A DINOv2 of timm as transformers' is exported: matrices without names, positions cut in two, qkv apart."""
    arrays: dict[str, np.ndarray] = {}
    nodes: list[bytes] = []

    def linear(owner: str, weight: np.ndarray, bias: np.ndarray, inputs: str = "x") -> None:
        arrays[f"onnx::MatMul_{len(arrays)}"] = np.ascontiguousarray(weight.T)
        arrays[f"{owner}.bias"] = bias
        product = f"{owner}/MatMul_output_0"
        nodes.append(node("MatMul", [inputs, [n for n in arrays if n.startswith("onnx::M")][-1]], product))
        nodes.append(node("Add", [f"{owner}.bias", product], f"{owner}/Add_output_0"))

    arrays[f"{prefix}.embeddings.cls_token"] = state["cls_token"]
    for leaf in ("weight", "bias"):
        arrays[f"{prefix}.embeddings.patch_embeddings.projection.{leaf}"] = state[f"patch_embed.proj.{leaf}"]
        arrays[f"{prefix}.layernorm.{leaf}"] = state[f"norm.{leaf}"]
    arrays["onnx::Concat_1"], arrays["onnx::Reshape_2"] = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    nodes.append(node("Reshape", ["onnx::Reshape_2", "shape"], "r", f"/{prefix}/embeddings/Reshape_1"))
    nodes.append(node("Concat", ["onnx::Concat_1", "r"], "positions", f"/{prefix}/embeddings/Concat_6"))
    dim = state["cls_token"].shape[-1]
    for i in range(sum(name.endswith("norm1.weight") for name in state)):
        ours, theirs = f"blocks.{i}.", f"{prefix}.encoder.layer.{i}."
        for norm in ("norm1", "norm2"):
            for leaf in ("weight", "bias"):
                arrays[f"{theirs}{norm}.{leaf}"] = state[f"{ours}{norm}.{leaf}"]
        for place, which in ((1, "key"), (2, "value"), (0, "query")):  # in the graph's order
            rows = slice(place * dim, (place + 1) * dim)
            weight, bias = (state[f"{ours}attn.qkv.{leaf}"][rows] for leaf in ("weight", "bias"))
            linear(f"{theirs}attention.attention.{which}", weight, bias)
        for theirs_name, name in (
            ("attention.output.dense", "attn.proj"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            linear(f"{theirs}{theirs_name}", state[f"{ours}{name}.weight"], state[f"{ours}{name}.bias"])
        for number in (1, 2):
            arrays[f"{theirs}layer_scale{number}.lambda1"] = state[f"{ours}ls{number}.gamma"]
    arrays["decoder.0.weight"] = np.ones((3, 2), np.float32)
    return graph(arrays, nodes)
