"""What is damaged, and how a person would read it: nine kinds of input, each with whole examples to begin with."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save

from tests.helpers.catalogs import picture, uned_files, write_uned_tree, write_zip
from tests.helpers.training import SMALL
from udonlib import presets
from udonlib.data.catalog import load_catalog
from udonlib.data.decoding import decode, prepare_eval
from udonlib.data.images import ImageReader
from udonlib.data.info_files import read_info_file
from udonlib.data.packing import pack
from udonlib.errors import UserError
from udonlib.evaluation.descriptors import read_descriptors
from udonlib.models.backbones import create_backbone
from udonlib.models.embedding_model import create_model
from udonlib.models.files.importers import load_backbone_weights, save_backbone_weights
from udonlib.params import TrainParams
from udonlib.runs.checkpoints import load_checkpoint, load_model
from udonlib.training.steering import Control, read_control

Read = Callable[[str, bytes, Path], object]  # name and content of a file, and the folder to put it in


@dataclass(frozen=True)
class Kind:
    """A kind of input. examples: whole ones, by the file's name. read: read one as a person would."""

    examples: dict[str, bytes]
    read: Read


def kinds(folder: Path) -> dict[str, Callable[[], Kind]]:
    """How each kind is made, by its name; `folder` takes the files that examples are made with."""
    made = {
        "parameters": _parameters,
        "presets": _presets,
        "info_files": _info_files,
        "manifests": _manifests,
        "control": _control,
        "images": _images,
        "checkpoints": _checkpoints,
        "packs": _packs,
        "descriptors": _descriptors,
    }
    return {name: lambda make=make: make(folder) for name, make in made.items()}


def _written(name: str, content: bytes, folder: Path) -> Path:
    file = folder / name
    file.write_bytes(content)
    return file


def _parameters(folder: Path) -> Kind:
    """A mapping of values, as papermill's -y takes them."""
    values = json.loads(TrainParams(**SMALL).model_dump_json())
    small = {name: values[name] for name in list(values)[::3]}
    one = {"backbone": "small_resnet", "kinds": ["class"], "image_size": 32, "weights": "a.pth"}

    def read(name: str, content: bytes, folder: Path) -> object:
        try:
            given = yaml.safe_load(content.decode("utf-8", "replace"))
        except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError, KeyError, AttributeError):
            return None  # papermill's own reader refuses it
        given = given if isinstance(given, dict) else dict.fromkeys(("steps", "domains", "teachers"), given)
        return presets.load("smoke", **{str(key): value for key, value in given.items() if key != "preset"})

    texts = [values, small, small | {"teachers": {"one": one}}]
    return Kind({f"{i}.yaml": yaml.safe_dump(text).encode() for i, text in enumerate(texts)}, read)


def _presets(folder: Path) -> Kind:
    shipped = Path(presets.__file__).parent.parent / "params"
    names = ("smoke", "miniuned_uneven", "unic_mini", "uned_in21k")
    examples = {f"{name}.yaml": (shipped / f"{name}.yaml").read_bytes() for name in names}
    return Kind(examples, lambda name, content, folder: presets.load(_written(name, content, folder)))


def _info_files(folder: Path) -> Kind:
    files = uned_files()
    examples = {path.replace("/", "-"): held for path, held in files.items() if path.startswith("info_files")}
    entries = [{"path": f"{i}.png", "class_id": [i, i + 1], "class": "x", "source": "y"} for i in range(3)]
    examples["several.json"] = json.dumps(entries).encode()
    return Kind(examples, lambda name, content, folder: read_info_file(content, name))


def _manifests(folder: Path) -> Kind:
    splits = enumerate(("train", "val", "test") * 2)
    rows = [f"{c}/{i}.png,{('emoji', 'flags')[c // 3]},class {c},{s}" for c, s in splits for i in range(3)]
    csv = "\n".join(["path,domain,class,split", *rows, ""]).encode()
    examples = {"a.csv": csv, "b.csv": b"\xef\xbb\xbf" + csv.replace(b"\n", b"\r\n")}
    try:
        import pandas as pd

        table = io.BytesIO()
        pd.read_csv(io.BytesIO(csv)).to_parquet(table)
        examples["c.parquet"] = table.getvalue()
    except ImportError:  # pyarrow is not always there
        pass
    return Kind(examples, lambda name, content, folder: load_catalog(str(_written(name, content, folder))))


def _control(folder: Path) -> Kind:
    control = Control(number=3, panel="one", multipliers={"emoji": 2}, locks={"flags": 0.2}, rate=0.5, paused=True)
    examples = {"control.json": control.model_dump_json().encode(), "other.json": b'{"number": 1, "stop": 2}'}

    def read(name: str, content: bytes, folder: Path) -> object:
        _written("control.json", content, folder)
        return read_control(folder)

    return Kind(examples, read)


def _images(folder: Path) -> Kind:
    formats = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF"}
    examples = {f"a.{end}": picture(1, image_format=name) for end, name in formats.items()}
    for mode in ("RGBA", "L", "P", "CMYK", "I;16"):
        made = io.BytesIO()
        Image.new(mode, (20, 15), 1).save(made, "TIFF" if mode in ("CMYK", "I;16") else "PNG")
        examples[f"{mode[0]}.tif" if mode in ("CMYK", "I;16") else f"{mode}.png"] = made.getvalue()
    return Kind(examples, lambda name, content, folder: prepare_eval(decode(content, name), 16))


def _checkpoints(folder: Path) -> Kind:
    params = TrainParams(**SMALL | {"backbone": "small_resnet", "backbone_args": {"width": 4}})
    model = create_model(params, {"emoji": 3, "flags": 2})
    whole = io.BytesIO()
    torch.save({"model": model.state_dict(), "average": None, "step": 3, "statistics": [[0.5] * 3, [0.5] * 3]}, whole)
    encoder = create_backbone("small_resnet", pretrained=False, image_size=32, arguments={"width": 4})
    save_backbone_weights(encoder, folder / "encoder.safetensors")
    examples = {"best.pt": whole.getvalue(), "encoder.safetensors": (folder / "encoder.safetensors").read_bytes()}
    examples["other.safetensors"] = save({"a.weight": torch.zeros(2, 2)}, {"format": "pt"})

    def read(name: str, content: bytes, folder: Path) -> object:
        file = _written(name, content, folder)
        if not name.endswith(".pt"):
            return load_backbone_weights(encoder, file)
        try:
            return load_model(file, params)
        except UserError:
            return load_checkpoint(file)

    return Kind(examples, read)


def _packs(folder: Path) -> Kind:
    """A zip in UnED's form, and a shard of images; what can be opened is read whole."""
    few = {"train": (2, 2), "val": (2,), "test": (2,)}
    archive, whole = write_zip(folder / "bench.zip", uned_files(sizes=few)), folder / "packed"
    examples = {"bench.zip": archive.read_bytes()}
    try:
        pack(load_catalog(str(archive)), whole)
        packed = {path.name: path for path in sorted(whole.rglob("*.*"))}
        examples |= {name: path.read_bytes() for name, path in packed.items()}
    except UserError:  # pyarrow is not always there
        packed = {}

    def read(name: str, content: bytes, folder: Path) -> object:
        if name in packed:
            copied = folder / "packed"
            shutil.copytree(whole, copied)
            (copied / packed[name].relative_to(whole)).write_bytes(content)
        else:
            copied = _written(name, content, folder)
        catalog = load_catalog(str(copied))
        reader = ImageReader(catalog, 16, "eval", cache=False)
        for domain in catalog.domains[:4]:
            for split, held in domain.splits.items():
                reader.read(domain.name, split, np.arange(min(len(held), 50)))
        return catalog

    return Kind(examples, read)


def _descriptors(folder: Path) -> Kind:
    catalog = load_catalog(str(write_uned_tree(folder / "described")))
    rng = np.random.default_rng(0)
    vectors = {d.name: {s: rng.normal(size=(len(held), 4)) for s, held in d.splits.items()} for d in catalog.domains}
    arrays, parts = io.BytesIO(), ((d, s, held) for d, parts in vectors.items() for s, held in parts.items())
    np.savez(arrays, **{f"{d}/{s}": held.astype(np.float32) for d, s, held in parts})
    text = {d: {s: held.round(4).tolist() for s, held in parts.items()} for d, parts in vectors.items()}
    examples = {"a.json": json.dumps(text).encode(), "b.npz": arrays.getvalue()}
    return Kind(examples, lambda name, content, folder: read_descriptors(_written(name, content, folder), catalog))
