"""What `torch.save` wrote, as plain containers and tensors: state dicts, a training script's checkpoints, our own.

PyTorch's own restricted unpickler reads (`weights_only`). Beside it stand the checks that it does not make: the
archive's checksums, how large it unfolds, tensors that claim more than they hold; and one message of ours for
everything that is wrong with a file.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from udonlib.errors import UserError
from udonlib.models.files.weight_files import reading

KIND = "a file of torch.save"
OURS = ("torch.", "collections.OrderedDict")  # names that PyTorch resolves by itself, or refuses
WEIGHTS = r"torch\._utils\..*|torch\.\w*Storage|collections\.OrderedDict"  # those that tensors need


class StandIn:
    """Stands for an object of somebody's class: nothing of that class is imported, nor is the object's state kept.

    `name`: of the class.
    """

    name = ""

    def __new__(cls, *_: object) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_torch(path: Path) -> Any:
    """Read what `torch.save` wrote, in either of its forms: containers, tensors on the CPU, numbers and texts.

    A training script's settings and counters beside the weights, objects of classes that PyTorch does not know, become
    `StandIn`s.

    Raises:
        UserError: "<path>: ..." for a file that is missing, cut short, damaged or something else (what, where that can
            be seen); a whole pickled module; a program of TorchScript; a tensor of which the file holds a part only.
    """
    with reading(path, KIND), path.open("rb") as file:
        packed = file.read(4) == b"PK\x03\x04"
        names = sorted(_packed_names(path) if packed else _plain_names(file))
        foreign = [name for name in names if not name.startswith(OURS)]
        stand_ins: list[Any] = [(type("StandIn", (StandIn,), {"name": name}), name) for name in foreign]
        try:
            with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other protocols
                content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # its text says how to have the file executed
            needed = [name for name in names if not re.fullmatch(WEIGHTS, name)]
            more = f" and {len(needed) - 4} more" if len(needed) > 4 else ""
            raise UserError(
                f"holds other things than weights ({', '.join(needed[:4]) or 'damaged'}{more}), of which nothing was "
                "executed. A whole pickled model? Save its weights alone: torch.save(model.state_dict(), file)"
            ) from error
        if isinstance(content, StandIn):
            raise UserError(f"holds an object of the class {content.name!r}, expected weights: a dictionary of tensors")
        for name, value in named_tensors(content):
            _check_tensor(name, value)
        return content


def named_tensors(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor inside containers, each once, with a name that tells where."""
    waiting, seen = [("", content)], set()
    while waiting:
        name, value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            waiting += [(f"{name}.{key}" if name else f"{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple | set):
            waiting += [(f"{name}.{i}", inner) for i, inner in enumerate(value)]


def _check_tensor(name: str, value: Tensor) -> None:
    """Refuse what is no array in memory, and tensors whose strides repeat a few numbers without end."""
    if value.layout != torch.strided or value.is_quantized or value.is_nested or value.device.type != "cpu":
        raise UserError(f"key {name!r} is a tensor of another kind ({value.layout}, {value.device})")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UserError(f"key {name!r} claims the shape {list(value.shape)}, and the file holds fewer numbers")


def _packed_names(path: Path) -> set[str]:
    """Check the archive as a whole, and return the classes and functions that its pickle asks for."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename.partition("/")[2] for entry in entries]
        if "constants.pkl" in names:
            raise UserError(
                "holds a program of TorchScript, which is not executed. Save its weights alone, where you trust it: "
                "torch.save(torch.jit.load(file).state_dict(), other_file)"
            )
        if "data.pkl" not in names:
            raise UserError(f"a zip archive, expected {KIND}; found in it: {', '.join(archive.namelist()[:5])}")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UserError("its entries are compressed, as torch.save never does")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise UserError("its entries are larger than the file")
        damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"damaged: the checksum of its entry {damaged!r} differs")
        return _globals(io.BytesIO(archive.read(entries[names.index("data.pkl")])))


def _plain_names(file: Any) -> set[str]:
    """Return what the older form asks for: it is five pickles, the fourth of which is the content."""
    file.seek(0)
    return set().union(*(_globals(file) for _ in range(5)))


def _globals(file: Any) -> set[str]:
    return {str(name).replace(" ", ".") for opcode, name, _ in pickletools.genops(file) if opcode.name == "GLOBAL"}
