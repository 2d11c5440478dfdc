"""Weights of an encoder out of an ONNX graph, read as data: nothing of the graph is executed, nor is `onnx` needed.

A graph is a protocol buffer: numbered fields, each a number or a piece of bytes, which may hold fields again. Of its
schema the few that say where weights stand are read here, some forty lines; the package `onnx` would bring a compiler
of schemas for them. Exporters keep the names of most weights, and lose those of matrices and of what they have
computed ahead; these are found again by where the graph uses them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from udonlib.errors import UserError
from udonlib.models.files.weight_files import Arrays, reading

# Numbers of the fields that are read. Source: onnx.proto of ONNX, IR version 3 on.
GRAPH = 7
NODE, INITIALIZER, GRAPH_OUTPUT = 1, 5, 12
INPUT, OUTPUT, NODE_NAME, OPERATION = 1, 2, 3, 4
DIMS, TYPE, FLOATS, TENSOR_NAME, RAW, PLACE = 1, 2, 4, 8, 9, 14
TYPES = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2", 11: "<f8"}
FLOAT = 1


@dataclass
class Node:
    """An operation of a graph: its name, what it does, and the names of what it takes and gives."""

    name: str = ""
    operation: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


def read_onnx(path: Path) -> tuple[Arrays, list[Node]]:
    """The constant arrays of a graph by name, and its operations in their order.

    Raises:
        UserError: "<path>: ..." for a file that is missing, cut short or no graph; an array whose size is not what the
            file holds for it, or which lies in another file.
    """
    with reading(path, "an ONNX graph"):
        graphs = [value for number, value in _fields(path.read_bytes()) if number == GRAPH]
        if len(graphs) != 1:
            raise UserError(f"{len(graphs)} graphs, expected one: no ONNX file")
        arrays: Arrays = {}
        nodes = []
        for number, value in _fields(_bytes(graphs[0])):
            if number == NODE:
                nodes.append(_node(_bytes(value)))
            elif number == INITIALIZER:
                name, array = _array(_bytes(value))
                arrays[name] = array
        return arrays, nodes


def read_onnx_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a graph under the names that they had before it was exported.

    A matrix is named by the bias that is added to its product: beside `x.bias` it is `x.weight`, [in, out] in the graph
    and [out, in] here. Positions of a vision transformer that were cut into class and patches are put together again.
    All other arrays keep their names.

    Raises:
        UserError: as `read_onnx` does.
    """
    arrays, nodes = read_onnx(path)
    weights = dict(arrays)
    products = {node.outputs[0]: node for node in nodes if node.operation == "MatMul" and node.outputs}
    for node in nodes:
        biases = [name for name in node.inputs if name in arrays and name.endswith("bias")]
        factors = [products[name].inputs[-1] for name in node.inputs if name in products and products[name].inputs]
        if node.operation == "Add" and biases and factors and factors[0] in arrays:
            matrix = arrays[factors[0]]
            if matrix.ndim == 2:
                weights[f"{biases[0].removesuffix('bias')}weight"] = matrix.T
                weights.pop(factors[0], None)
    weights |= _positions(arrays, nodes)
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in weights.items()}


def with_outputs(content: bytes, names: Sequence[str]) -> bytes:
    """A graph that gives further values of its inside, after its own outputs.

    Pieces of one field that stand apart are parts of the same value, so that what is added goes to the end of the file.
    """
    return content + _piece(GRAPH, b"".join(_piece(GRAPH_OUTPUT, _piece(INPUT, name.encode())) for name in names))


def _piece(number: int, content: bytes) -> bytes:
    return _as_varint(number << 3 | 2) + _as_varint(len(content)) + content


def _as_varint(value: int) -> bytes:
    head = b""
    while value > 127:
        head, value = head + bytes([value & 127 | 128]), value >> 7
    return head + bytes([value])


def _positions(arrays: Arrays, nodes: list[Node]) -> Arrays:
    """Put the positions of class and patches together, where an exporter has cut them: [1, 1, dim] and [1, n, dim]."""
    parts: dict[str, dict[bool, np.ndarray]] = {}
    for node in nodes:
        if match := re.fullmatch(r"/(.*embeddings)/[^/]*", node.name):
            owner = match[1].replace("/", ".")
            for name in node.inputs:
                array = arrays.get(name)
                if array is not None and array.ndim == 3 and len(array) == 1 and not name.startswith(f"{owner}."):
                    parts.setdefault(owner, {})[array.shape[1] > 1] = array
    return {
        f"{owner}.position_embeddings": np.concatenate([found[False], found[True]], axis=1)
        for owner, found in parts.items()
        if len(found) == 2 and found[False].shape[2] == found[True].shape[2]
    }


def _fields(data: bytes | memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of each field of a protocol buffer: an integer, or the piece of bytes that it holds."""
    data, at = memoryview(data), 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise UserError(f"damaged, or no protocol buffer: field {number} is of kind {kind}")
        if length > len(data) - at:
            raise UserError("cut short")
        yield number, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """The integer that begins at a byte, seven bits in each of at most ten, and where it ends."""
    value = 0
    for place in range(10):
        byte = data[at + place]
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise UserError("damaged, or no protocol buffer: an integer that does not end")


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise UserError("damaged, or no ONNX graph: a number where fields should be")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_bytes(value)).decode()


def _node(data: memoryview) -> Node:
    node = Node()
    for number, value in _fields(data):
        if number == INPUT:
            node.inputs.append(_text(value))
        elif number == OUTPUT:
            node.outputs.append(_text(value))
        elif number == NODE_NAME:
            node.name = _text(value)
        elif number == OPERATION:
            node.operation = _text(value)
    return node


def _array(data: memoryview) -> tuple[str, np.ndarray]:
    name, shape, kind = "", [], 0
    content: list[memoryview] = []
    for number, value in _fields(data):
        if number == DIMS and isinstance(value, int):
            shape.append(value)
        elif number == DIMS:
            shape += _packed(_bytes(value))
        elif number == TYPE and isinstance(value, int):
            kind = value
        elif number == TENSOR_NAME:
            name = _text(value)
        elif number in (RAW, FLOATS):  # plain bytes, or floats one by one or in a row: in memory they are the same
            content.append(_bytes(value))
        elif number == PLACE and value:
            raise UserError(f"array {name!r} lies in another file, expected all in this one")
    if kind not in TYPES:
        return name, np.empty(0, np.float32)  # of a kind that no weight of ours has: it will be found missing
    dtype, found = np.dtype(TYPES[kind]), b"".join(content)
    if not content and math.prod(shape) > 0 and kind != FLOAT:
        return name, np.empty(0, dtype)  # integers one by one: no weights
    if math.prod(shape) * dtype.itemsize != len(found):
        raise UserError(f"array {name!r} of shape {shape} and type {dtype} is held in {len(found)} bytes")
    return name, np.frombuffer(found, dtype).reshape(shape)


def _packed(data: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values
