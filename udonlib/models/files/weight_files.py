"""Arrays by name out of weight files that nobody vouches for: npz, pickled dictionaries, flax's msgpack, safetensors.

Nothing in a file is ever executed, no array is larger than the bytes that the file holds for it (a compressed npz may
unfold to UNFOLDS times its size), and whatever is wrong with a file is one `UserError` that names it, and says what it
is where that can be seen. What `torch.save` wrote is read by `models.files.torch_files`.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgpack
import numpy as np
from safetensors import safe_open
from torch import Tensor

from udonlib.errors import UserError

Arrays = dict[str, np.ndarray]
# Compressed weights are hardly smaller than plain ones, compressed zeros a thousandth: what unfolds to more than this
# many times the file's size is refused, unless it is small.
UNFOLDS, SMALL = 32, 2**26

# How files begin that stand where weights, checkpoints or descriptors should be: pattern of the first bytes -> what
# that is.
ONNX = "an ONNX graph"
SIGNATURES: Mapping[bytes, str] = {
    rb"\Z": "an empty file",
    rb"\0+\Z": "nothing but zero bytes, as a write that was cut off leaves",
    rb"version https://git-lfs": "a pointer of Git LFS: the file itself was not fetched, 'git lfs pull' does that",
    rb"\s*(?i:<!doctype|<html|<head|<\?xml)": "a web page, as a download that was refused leaves",
    rb"\s*[{\[]\s*[\"\[{\]}0-9-]": "a JSON text",
    rb"\x89HDF": "an HDF5 file, as Keras writes",
    rb"\x08[\x01-\x0f]\x12.{0,80}?(?i:pytorch|onnx|tf2onnx)": ONNX,
    rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd": "a packed file: unpack it first",
    rb".{257}ustar": "a tar archive: unpack it first",
    rb"[\t\n\r -~]+\Z": "a text",
}


def what_it_is(path: Path) -> str | None:
    """Say what a file is by its first bytes, in words; None where they tell nothing."""
    with path.open("rb") as file:
        head = file.read(1024)
    return next((words for pattern, words in SIGNATURES.items() if re.match(pattern, head, re.DOTALL)), None)


WEIGHTS = "weights (safetensors, PyTorch's .pth, .pt or .bin, AugReg's .npz, CLIP's .npy, an ONNX graph)"


def kind_of_weights(path: Path) -> Literal["safetensors", "torch", "npz", "npy", "onnx"]:
    """Say of what kind a file of weights is, by its content: names end in anything.

    Raises: UserError "<path>: ..." for a file that is missing or of another kind; what it is, where that can be seen.
    """
    with reading(path, WEIGHTS), path.open("rb") as file:
        head = file.read(9)
        if head.startswith(b"PK"):
            with zipfile.ZipFile(file) as archive:
                pickles = any(name.endswith(("/data.pkl", "/constants.pkl")) for name in archive.namelist())
            return "torch" if pickles else "npz"
        if head.startswith(b"\x93NUMPY"):
            return "npy"
        if head.startswith(b"\x80"):
            return "torch"
        if head[8:] == b"{":
            return "safetensors"
        found = what_it_is(path)
        if found == ONNX:
            return "onnx"
        raise UserError(f"{found or 'of no known kind'}, expected {WEIGHTS}")


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a damaged or hostile file makes its parser raise into one message.

    Parsers of foreign bytes raise nearly anything (EOFError, IndexError, struct.error, MemoryError, ..), so all of it
    is caught here; only the code that reads the file runs inside.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: a folder, expected {kind}") from error
    except PermissionError as error:
        raise UserError(f"{path}: may not be read: {error.strerror}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        found = what_it_is(path) or f"cut short, damaged or something else ({reason:.200})"
        raise UserError(f"{path}: cannot be read as {kind}: {found}") from error


def read_npz(path: Path) -> Arrays:
    """Read the arrays of an npz archive; arrays of objects, which would be pickles, are refused.

    Raises:
        UserError: "<path>: ..." for a file that is missing, no archive, cut short, damaged, or of which a small part
            would fill the memory; "key '...' is an array of objects".
    """
    with reading(path, "an npz archive of arrays"), zipfile.ZipFile(path) as archive:
        check_size(path, archive)
        arrays = {}
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            with archive.open(entry) as file:
                shape, fortran, dtype = read_array_header(file)
                if dtype.kind == "O":
                    raise UserError(f"key {name!r} is an array of objects")
                data = file.read()
            if len(data) != math.prod(shape) * dtype.itemsize or dtype.hasobject:
                raise UserError(f"key {name!r} is damaged: {len(data)} bytes for {dtype} of shape {list(shape)}")
            arrays[name] = np.frombuffer(bytearray(data), dtype).reshape(shape, order="F" if fortran else "C")
        return arrays


def check_size(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse an archive that would unfold beyond reason, by what its directory says; more is never unpacked."""
    packed, unpacked = path.stat().st_size, sum(entry.file_size for entry in archive.infolist())
    if unpacked > max(SMALL, UNFOLDS * packed):
        raise UserError(f"its {packed / 1e6:,.1f} MB would unfold to {unpacked / 1e6:,.0f} MB")


def read_array_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read how an array in numpy's format begins: its shape, whether columns come first, and its type."""
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(file)
    if not all(type(n) is int and n >= 0 for n in shape):
        raise UserError(f"holds an array of shape {shape}")
    return shape, fortran, dtype


def read_pickled_arrays(path: Path) -> Arrays:
    """Read a dictionary of arrays that `numpy.save` wrote, which is a pickle, without executing it.

    Numpy itself is never asked: the pickle's few names stand for passive records (`_NAMES`), whose contents are checked
    before they become arrays. Any other name in it ends the reading.

    Raises:
        UserError: "<path>: its pickle asks for 'os.system' ..."; a file that is missing, cut short, no such file, or
            holds something else than arrays and numbers by name.
    """
    with reading(path, "a pickled dictionary of arrays"), path.open("rb") as file:
        shape, _, dtype = read_array_header(file)
        if dtype.kind != "O" or shape != ():
            raise UserError(f"holds an array {list(shape)} of {dtype}, expected a dictionary of arrays")
        whole = _ArraysOnly(file, encoding="latin1").load()
        named = whole.value if isinstance(whole, _Array) else whole
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named):
            raise UserError("holds something else than a dictionary of arrays by name")
        return {name: _as_array(name, value) for name, value in named.items()}


def _as_array(name: str, value: Any) -> np.ndarray:
    found = value.value if isinstance(value, _Array) else value
    if isinstance(found, bool | int | float):
        return np.asarray(found)
    if not isinstance(found, np.ndarray):
        what = "an array of objects" if isinstance(value, _Array) else type(found).__name__
        raise UserError(f"key {name!r} is {what}, expected an array of numbers")
    return found


# pickle's own Unpickler in C lets a file size its memo, so a few bytes could claim all memory; the one in Python has a
# dictionary there. Every name that it resolves is a class with a `__setstate__` or a built-in: a pickle can neither
# replace their attributes nor reach anything behind them.
class _ArraysOnly(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise UserError(
                f"its pickle asks for '{module}.{name}'; only numpy arrays and plain containers are read from pickles, "
                "and nothing in this one was executed"
            )
        return _NAMES[module, name]

    def _load_bytearray8(self: Any) -> None:
        """Append bytes of a claimed length as they are read; pickle's own form fills all of it with zeros first."""
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: _load_bytearray8}


class _Dtype:
    """A type of numbers as pickled: numpy.dtype(code, align, copy), then its byte order."""

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>=|]?([fiu][1248]|b1|O8?)", code):
            raise UserError(f"its pickle holds an array of type {code!r}, expected numbers")
        self.code, self.order = code.lstrip("<>=|"), "="

    def __setstate__(self, state: Any) -> None:
        _, order, *rest = state
        if order not in ("<", ">", "=", "|") or rest[:3] != [None, None, None]:
            raise UserError("its pickle holds an array of records, expected numbers")
        self.order = order

    def array(self, data: Any, shape: Any, fortran: bool) -> np.ndarray:
        if isinstance(data, str):  # bytes, as Python 2 pickled them
            data = data.encode("latin1")
        numbers = np.frombuffer(data, np.dtype(self.order + self.code))
        return numbers.reshape(shape, order="F" if fortran else "C")


class _Array:
    """An array as pickled: numpy's _reconstruct(ndarray, (0,), b"b"), then shape, type and bytes.

    `value` is an array of numbers; or, for an array of one object, which is how numpy.save stores a dictionary, that
    object.
    """

    def __init__(self, *_: object) -> None:
        self.value: Any = None

    def __setstate__(self, state: Any) -> None:
        shape, dtype, fortran, data = state[-4:]
        if dtype.code.startswith("O"):
            if shape != () or not isinstance(data, list):
                raise UserError("its pickle holds an array of objects, expected numbers")
            [self.value] = data
        else:
            self.value = dtype.array(data, shape, fortran)


class _ArrayFromBuffer(_Array):
    """An array as protocol 5 pickles it: numpy's _frombuffer(bytes, type, shape, order)."""

    def __init__(self, data: Any, dtype: Any, shape: Any, order: Any) -> None:
        self.value = dtype.array(data, shape, order == "F")


class _Scalar(_Array):
    """A number as pickled: numpy's scalar(type, bytes)."""

    def __init__(self, dtype: Any, data: Any) -> None:
        self.value = dtype.array(data, (), False)


class _Latin1(bytes):
    """Bytes as protocols below 3 pickle them: _codecs.encode(text, "latin1")."""

    def __new__(cls, text: str, codec: str = "latin1") -> _Latin1:
        if codec != "latin1":
            raise UserError(f"its pickle asks for the codec {codec!r}")
        return super().__new__(cls, text.encode("latin1"))

    def __setstate__(self, state: Any) -> None:
        raise UserError("its pickle gives bytes a state")


_NAMES: Mapping[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _Latin1,
    ("collections", "OrderedDict"): dict,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _ArrayFromBuffer for core in ("core", "_core")},
}


def read_flax(path: Path, branch: str = "params") -> Arrays:
    """Read one branch of a legacy flax checkpoint; names of nested maps are joined by '/'.

    An array is msgpack's extension 1, a scalar extension 3: msgpack of (shape, name of the type, bytes in C order).
    Arrays over 1 GiB are maps of a shape and flat pieces (`__msgpack_chunked_array__`). bfloat16 comes back as float32.
    Other branches, such as the optimizer's, are skipped without being held in memory. Source: flax.serialization.

    Raises:
        UserError: "<path>: ..." for a file that is missing, cut short or no such checkpoint; a branch that is not
            there; an entry whose bytes, type or shape disagree, or maps nested deeper than 32.
    """
    with reading(path, "a flax checkpoint (msgpack)"), path.open("rb") as file:
        size = path.stat().st_size
        unpacker = msgpack.Unpacker(
            file, read_size=max(1, min(size, 2**20)), max_buffer_size=max(size, 1), ext_hook=_flax_array,
            max_array_len=2**16, max_map_len=2**16,
        )  # fmt: skip
        tree, seen = None, []
        for _ in range(unpacker.read_map_header()):
            seen.append(str(unpacker.unpack()))
            if seen[-1] == branch:
                tree = unpacker.unpack()
            else:
                unpacker.skip()
        if unpacker.tell() != size:
            raise UserError("more follows after its end: damaged, or no flax checkpoint")
        if not isinstance(tree, dict):
            raise UserError(f"has no {branch!r}; found: {', '.join(sorted(seen)) or 'nothing'}")
        arrays: Arrays = {}
        for name, value in _leaves(tree, ""):
            if name in arrays:
                raise UserError(f"key {name!r} is there twice")
            arrays[name] = value
        return arrays


def _leaves(tree: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    if prefix.count("/") > 32:
        raise UserError(f"key {prefix[:80]!r}: nested deeper than 32")
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and "__msgpack_chunked_array__" in value:
            yield name, _joined(name, value)
        elif isinstance(value, dict):
            yield from _leaves(value, f"{name}/")
        elif isinstance(value, np.ndarray):
            yield name, value
        else:
            raise UserError(f"key {name!r} is {type(value).__name__}, expected an array")


def _joined(name: str, value: Mapping[str, Any]) -> np.ndarray:
    """Join the flat pieces of a chunked array."""
    try:
        shape = [int(value["shape"][str(i)]) for i in range(len(value["shape"]))]
        pieces = [value["chunks"][str(i)] for i in range(len(value["chunks"]))]
        if min(shape, default=0) < 0:
            raise ValueError(f"shape {shape}")
        return np.concatenate(pieces).reshape(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"key {name!r}: an array in pieces that do not fit together ({error})") from error


def _flax_array(code: int, data: bytes) -> np.ndarray:
    if code not in (1, 3):
        raise UserError(f"holds msgpack extension {code}, expected arrays and scalars (1, 3)")
    shape, raw_name, content = msgpack.unpackb(data, raw=True, max_array_len=64)
    name = raw_name.decode("ascii", "replace")
    if not re.fullmatch(r"bool|bfloat16|float(16|32|64)|u?int(8|16|32|64)", name):
        raise UserError(f"holds an array of type {name!r}, expected real numbers")
    dtype = np.dtype("<u2" if name == "bfloat16" else name)
    if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(content):
        raise UserError(f"holds an array of shape {shape} and type {name} in {len(content)} bytes")
    array = np.frombuffer(content, dtype).reshape(shape)
    if name == "bfloat16":  # the upper half of a float32
        return (array.astype("<u4") << 16).view("<f4")
    return array


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors of a safetensors file, and its metadata, each value parsed as JSON where it is JSON.

    Raises: UserError "<path>: ..." for a file that is missing, cut short or no such file.
    """
    with reading(path, "a safetensors file"):
        path.open("rb").close()  # the library's own message for a missing file names no file
        with safe_open(path, framework="pt") as file:
            metadata = {name: _parsed(text) for name, text in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (no mapping)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
