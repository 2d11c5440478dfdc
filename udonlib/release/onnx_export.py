"""A model as one ONNX file: images as a decoder gives them, of any size and number, to unit embeddings.

    images uint8 [batch, height, width, 3], RGB  ->  embeddings float32 [batch, dim], unit rows

What evaluation does to an image is part of the graph: short side to the model's size, bilinear without antialiasing;
the middle square; rounded to whole values; normalised. Images are bytes, since that is what decoders give, and float
images would be rounded to bytes as well; all of a batch have one size.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from udonlib.errors import UserError
from udonlib.files import replacing
from udonlib.models.backbones import import_timm
from udonlib.models.embedding_model import EmbeddingModel

MAX_BYTES = 2**31 - 1  # of a protocol buffer
BATCH = 2  # of the images that the exporter traces with: 1 would be taken for a constant

# One side of the image: which two rows, or columns, each of those of the result lies between, and their weights.
# Places are computed in float64 and rounded once, as PyTorch's kernels do with fused operations.
AXIS = """
    {side} = Gather (shape, {place})
    {side}_double = Cast <to = 11> ({side})
    {side}_share = Div ({side}_double, short)
    {side}_exact = Mul ({side}_share, size_double)
    {side}_long = Cast <to = 7> ({side}_exact)
    {side}_rest = Sub ({side}_long, size)
    {side}_first = Div ({side}_rest, two)
    {side}_end = Add ({side}_first, size)
    {side}_targets = Range ({side}_first, {side}_end, one)
    {side}_targets_double = Cast <to = 11> ({side}_targets)
    {side}_from = Cast <to = 1> ({side})
    {side}_to = Cast <to = 1> ({side}_long)
    {side}_ratio = Div ({side}_from, {side}_to)
    {side}_ratio_double = Cast <to = 11> ({side}_ratio)
    {side}_centres = Add ({side}_targets_double, half)
    {side}_scaled = Mul ({side}_ratio_double, {side}_centres)
    {side}_places = Sub ({side}_scaled, half)
    {side}_rounded = Cast <to = 1> ({side}_places)
    {side}_sources = Max ({side}_rounded, zero)
    {side}_whole = Cast <to = 7> ({side}_sources)
    {side}_last = Sub ({side}, one)
    {side}_low = Min ({side}_whole, {side}_last)
    {side}_next = Add ({side}_low, one)
    {side}_high = Min ({side}_next, {side}_last)
    {side}_low_float = Cast <to = 1> ({side}_low)
    {side}_beyond = Sub ({side}_sources, {side}_low_float)
    {side}_w_high = Clip ({side}_beyond, zero, unit)
    {side}_w_low = Sub (unit, {side}_w_high)
"""

# A corner of the four that a pixel lies between, and its weight.
CORNER = """
    rows_{y}_{x} = Gather <axis = 1> (images, height_{y})
    bytes_{y}_{x} = Gather <axis = 2> (rows_{y}_{x}, width_{x})
    pixels_{y}_{x} = Cast <to = 11> (bytes_{y}_{x})
    down_{y}_{x} = Unsqueeze (height_w_{y}, down_axes)
    across_{y}_{x} = Unsqueeze (width_w_{x}, across_axes)
    weight_{y}_{x} = Mul (down_{y}_{x}, across_{y}_{x})
    weight_double_{y}_{x} = Cast <to = 11> (weight_{y}_{x})
    part_{y}_{x} = Mul (pixels_{y}_{x}, weight_double_{y}_{x})
"""

# The sum of the four, rounded to float32 after each, in the order of PyTorch's kernel.
SUM = """
    sum_1 = Cast <to = 1> (part_low_high)
    sum_1_double = Cast <to = 11> (sum_1)
    sum_2_exact = Add (sum_1_double, part_low_low)
    sum_2 = Cast <to = 1> (sum_2_exact)
    sum_2_double = Cast <to = 11> (sum_2)
    sum_3_exact = Add (sum_2_double, part_high_low)
    sum_3 = Cast <to = 1> (sum_3_exact)
    sum_3_double = Cast <to = 11> (sum_3)
    sum_4_exact = Add (sum_3_double, part_high_high)
    sum_4 = Cast <to = 1> (sum_4_exact)
    whole_values = Round (sum_4)
    prepared = Transpose <perm = [0, 3, 1, 2]> (whole_values)
"""

GRAPH = """
<ir_version: {ir_version}, opset_import: ["": {opset}]>
prepare (uint8[batch, height, width, 3] images) => (float[batch, 3, {size}, {size}] prepared)
<int64 size = {{{size}}}, int64 one = {{1}}, int64 two = {{2}}, double half = {{0.5}}, float zero = {{0}},
 float unit = {{1}}, double size_double = {{{size}}}, int64[2] down_axes = {{1, 2}}, int64[2] across_axes = {{0, 2}}>
{{
    shape = Shape (images)
    height_of_all = Gather (shape, one)
    width_of_all = Gather (shape, two)
    shorter = Min (height_of_all, width_of_all)
    short = Cast <to = 11> (shorter)
{steps}}}
"""


class _Core(nn.Module):
    """The model from prepared images to embeddings, without what only training needs."""

    def __init__(self, model: EmbeddingModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, prepared: Tensor) -> Tensor:
        return self.model.embed(prepared)


@contextmanager
def _installed() -> Iterator[None]:
    """Say how to install what is missing within."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"a release holds an ONNX file, for which '{error.name}' is missing: pip install 'udonlib[release]'"
        ) from None


def check_packages() -> None:
    """Say what is missing before anything is computed. Raises: UserError that says how to install it."""
    with _installed():
        importlib.import_module("onnx")
        importlib.import_module("onnxscript")
        importlib.import_module("onnxruntime")


def export(model: EmbeddingModel, image_size: int, file: Path) -> None:
    """Write a model as ONNX, whole or not at all.

    Args:
        model: exported as it evaluates.
        image_size: side of the square that it sees, pixels.

    Raises:
        UserError: packages that are missing; an encoder that cannot be exported, or is larger than one file may be.
    """
    check_packages()
    import_timm()  # else the exporter imports torchvision first, as it cannot be imported everywhere: see there
    onnx = importlib.import_module("onnx")
    images, training = torch.zeros(BATCH, 3, image_size, image_size), model.training
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _Core(model).eval(),
                (images,),
                dynamo=True,
                verbose=False,
                input_names=["prepared"],
                output_names=["embeddings"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
        core = program.model_proto  # type: ignore[union-attr]
    except Exception as error:  # the exporter hands on whatever its many stages raise
        reason = " ".join(str(error).split())
        raise UserError(f"{model.backbone.name!r} cannot be written as ONNX: {reason:.300}") from error
    finally:
        model.train(training)
    if core.ByteSize() > MAX_BYTES:
        raise UserError(f"{model.backbone.name!r} takes {core.ByteSize():,} bytes: one ONNX file holds {MAX_BYTES:,}")
    steps = "".join(AXIS.format(side=side, place=place) for side, place in (("height", "one"), ("width", "two")))
    steps += "".join(CORNER.format(y=y, x=x) for y in ("low", "high") for x in ("low", "high")) + SUM
    opset = next(entry.version for entry in core.opset_import if entry.domain in ("", "ai.onnx"))
    text = GRAPH.format(ir_version=core.ir_version, opset=opset, size=image_size, steps=steps)
    before = onnx.compose.add_prefix(onnx.parser.parse_model(text), "prepare/", rename_inputs=False)
    whole = onnx.compose.merge_models(before, core, io_map=[("prepare/prepared", "prepared")])
    whole.producer_name, whole.doc_string = "udonlib", (__doc__ or "").strip()
    onnx.checker.check_model(whole)
    with replacing(file, whole.ByteSize()) as opened:
        opened.write(whole.SerializeToString())


@contextmanager
def _quiet() -> Iterator[None]:
    """What the exporter tells of its own inner life is nobody's concern."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class OnnxEmbedder:
    """A released ONNX file, executed by onnxruntime on the CPU."""

    def __init__(self, file: Path, n_threads: int = 0) -> None:
        with _installed():
            runtime: Any = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = n_threads
        try:
            self._session: Any = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library has a class for each reason
            raise UserError(f"{file}: onnxruntime cannot open it: {' '.join(str(error).split()):.200}") from error

    def __call__(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Embeddings of images of any size, as our decoder gives them: channels first."""
        [embeddings] = self._session.run(None, {"images": images.permute(0, 2, 3, 1).contiguous().cpu().numpy()})
        return torch.from_numpy(embeddings)
