"""Frozen teachers: encoders of any make that say what they see in an image, each in the form that it expects.

A teacher is given the images that the student sees, with values in 0..255 and augmented, and brings them to its own
size, mean and deviation. What it says are tokens: `class`, what a classifier of its own would see, and `patches`, the
map that this is pooled from, or stands beside. A map of another grid than the student's is resampled to that, here and
nowhere else.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from udonlib.errors import UserError, nearest
from udonlib.fields import TeacherParams
from udonlib.models.backbones import Backbone, create_backbone, normalise
from udonlib.models.embedding_model import EmbeddingModel, find_weights
from udonlib.models.files.importers import load_backbone_weights
from udonlib.models.files.onnx_files import read_onnx, with_outputs
from udonlib.models.ladder import Kind, Tokens, resample
from udonlib.models.processors import computing_in

Images = Float[Tensor, "batch 3 height width"] | UInt8[Tensor, "batch 3 height width"]
# Of features of different images: a spread below this part of their size is none.
CONSTANT = 1e-4


class Teacher(nn.Module):
    """A frozen encoder. It never trains, has no gradients, and stays in evaluation mode.

    Args:
        name: in losses and messages.
        encoder: gives tokens by kind for normalised images.
        image_size: side of the images that it sees, in pixels.
        mean, std: of each channel, for values in 0..1.
        kinds: of its tokens that count.
        bgr: its images have blue first.
        source: what it is, in words.
        licence: of its weights.
        identity: what tells it from others beside its weights.

    Attributes:
        widths: of the tokens of each kind.
        grid: patches along a side; 0: none count.

    Raises:
        UserError: "teacher '...': ..." for a size that the encoder cannot take, or a kind of token that it has not.
    """

    def __init__(
        self,
        name: str,
        encoder: nn.Module,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        kinds: Sequence[Kind] = ("class", "patches"),
        *,
        bgr: bool = False,
        source: str = "",
        licence: str = "",
        identity: str = "",
    ) -> None:
        super().__init__()
        self.name, self.source, self.licence, self.bgr = name, source, licence, bgr
        self.encoder = encoder
        self.image_size, self.mean, self.std = image_size, tuple(mean), tuple(std)
        self.kinds = tuple(kinds)
        self._identity = identity
        self.requires_grad_(False).eval()
        self.widths, self.grid = self._probe()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode, whatever is asked of the module that holds this one."""
        return super().train(False)

    @property
    def patch_size(self) -> float:
        """Pixels of the teacher's images along a side of a patch; infinite where patches do not count."""
        return self.image_size / self.grid if self.grid else math.inf

    def forward(
        self, images: Images, n_positions: int | None = None, precision: torch.dtype = torch.float32
    ) -> dict[Kind, Tensor]:
        """Tokens that count, in float32: class [batch, dim], patches [batch, position, dim].

        Args:
            images: values in 0..255, of any size.
            n_positions: of the student's square grid, to which patches are resampled; None: the teacher's own.
            precision: bfloat16 runs the encoder under autocast.
        """
        resized = images.float()
        if images.shape[2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            resized = F.interpolate(resized, size, mode="bicubic", antialias=True).clamp(0, 255)
        resized = resized.flip(1) if self.bgr else resized
        normalised = normalise(resized, self.mean, self.std).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), computing_in(precision, images.device):
            said: Tokens = self.encoder(normalised)
        tokens = {kind: said[kind].float() for kind in self.kinds}
        if n_positions is not None and "patches" in tokens:
            tokens["patches"] = resample(tokens["patches"], n_positions)
        return tokens

    def _probe(self) -> tuple[dict[Kind, int], int]:
        """Widths and grid, seen on one grey image, so that a teacher which lacks something is refused at once."""
        with torch.no_grad():
            try:
                said = self.encoder(torch.zeros(1, 3, self.image_size, self.image_size))
            except (RuntimeError, AssertionError) as error:
                raise UserError(
                    f"teacher '{self.name}': {self.source} cannot take images of {self.image_size} pixels: {error}"
                ) from error
        missing = [kind for kind in self.kinds if kind not in said]
        if missing:
            raise UserError(
                f"teacher '{self.name}': {self.source} has no {missing[0]} tokens; "
                f"set its kinds to [{', '.join(said) or 'none'}]"
            )
        grid = math.isqrt(said["patches"].shape[1]) if "patches" in self.kinds else 0
        if grid and grid**2 != said["patches"].shape[1]:
            n = said["patches"].shape[1]
            raise UserError(f"teacher '{self.name}': {self.source} gives {n} patches, expected those of a square")
        return {kind: said[kind].shape[-1] for kind in self.kinds}, grid

    def fingerprint(self) -> str:
        """SHA-256 of all that decides what it says: weights, size and statistics of its images, what it is."""
        facts = [
            self._identity,
            self.image_size,
            self.mean,
            self.std,
            self.bgr,
            self.kinds,
            type(self.encoder).__name__,
        ]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class BackboneTokens(nn.Module):
    """Tokens of a backbone after its last norm: class, its feature; patches, its map."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Tokens:
        """Both kinds, or the class alone where the encoder gives no map."""
        try:
            return self.backbone.tokens(images, end=True)[0]
        except (UserError, AttributeError):  # it shows none
            return {"class": self.backbone(images)}


class EmbeddingTokens(nn.Module):
    """The embedding of a model of ours as its class token."""

    def __init__(self, model: EmbeddingModel) -> None:
        super().__init__()
        self.backbone, self.student = model.backbone, model.student
        self.normalise_features = model.normalise_features

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> dict[Kind, Tensor]:
        """The class alone."""
        features = self.backbone(images)
        return {"class": self.student(F.normalize(features, dim=-1) if self.normalise_features else features)}


class OnnxTokens(nn.Module):
    """Tokens out of an ONNX graph with one input of images, executed by onnxruntime, on the CPU.

    Outputs are told by their shapes: [batch, dim] is class; [batch, n + 1, dim] is class and n patches, n a square
    number; [batch, n, dim] and [batch, dim, height, width] are patches alone. The first of each kind counts. Where no
    class is given it is the mean over the positions, and those of no square grid are no patches.

    Args:
        outputs: names of values in the graph that are read instead of what it gives.
    """

    def __init__(self, file: Path, outputs: Sequence[str] = ()) -> None:
        super().__init__()
        try:
            runtime = importlib.import_module("onnxruntime")
        except ImportError:
            raise UserError(f"{file}: an ONNX file is executed by onnxruntime: pip install onnxruntime") from None
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        self.outputs = list(outputs)
        if outputs:
            inside = {name for node in read_onnx(file)[1] for name in node.outputs}
            for name in outputs:
                if name not in inside:
                    raise UserError(f"{file}: no value '{name}' in this graph; {nearest(name, sorted(inside))}")
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors alone: it warns of what it makes quicker
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            content = with_outputs(file.read_bytes(), list(outputs)) if outputs else str(file)
            self.session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library has a class for each reason
            reason = " ".join(str(error).split())
            raise UserError(f"{file}: onnxruntime cannot open it: {reason:.200}") from error
        inputs = self.session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(entry.name for entry in inputs)
            raise UserError(f"{file}: takes {len(inputs)} inputs ({names}), expected images alone")
        self.input = inputs[0].name

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> dict[Kind, Tensor]:
        """What the graph gives of both kinds."""
        try:
            outputs = self.session.run(self.outputs or None, {self.input: images.contiguous().cpu().numpy()})
        except Exception as error:
            raise RuntimeError(" ".join(str(error).split())[:200]) from error
        tokens: dict[Kind, Tensor] = {}
        pooled = None
        for output in outputs:
            value = torch.from_numpy(output).to(images.device)
            value = value.flatten(2).mT if value.ndim == 4 else value
            if value.ndim == 2:
                tokens.setdefault("class", value)
            elif value.ndim == 3 and not _is_square(value.shape[1]) and _is_square(value.shape[1] - 1):
                tokens.setdefault("class", value[:, 0])
                tokens.setdefault("patches", value[:, 1:])
            elif value.ndim == 3:
                pooled = value.mean(1) if pooled is None else pooled
                if _is_square(value.shape[1]):
                    tokens.setdefault("patches", value)
        if pooled is not None:
            tokens.setdefault("class", pooled)
        return tokens


def _is_square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n


def create_teacher(
    name: str, params: TeacherParams, load_model: Callable[[str], tuple[EmbeddingModel, int]] | None = None
) -> Teacher:
    """Build a teacher with its weights, on the CPU.

    Args:
        name: of the teacher.
        params: of it.
        load_model: opens a run or checkpoint of ours, and says the side of its images.

    Raises:
        UserError: "teacher '...': ..." for whatever is wrong with its name, its files, its sizes or its kinds.
    """
    try:
        return _create(name, params, load_model)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith("teacher '") else f"teacher '{name}': {text}") from error


def _create(
    name: str, params: TeacherParams, load_model: Callable[[str], tuple[EmbeddingModel, int]] | None
) -> Teacher:
    if params.onnx is not None:
        file = find_weights(params.onnx, "onnx")
        graph = OnnxTokens(file, params.outputs)
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest() + " ".join(params.outputs)
        size, mean, std = params.image_size or 0, params.mean or (), params.std or ()  # all are given: it says none
        source = f"the ONNX file '{params.onnx}'"
        return Teacher(
            name,
            graph,
            size,
            mean,
            std,
            params.kinds,
            bgr=params.bgr,
            source=source,
            licence=params.licence,
            identity=digest,
        )
    if params.run is not None:
        if load_model is None:
            raise ValueError("a teacher that is a run needs `load_model`")
        model, own_size = load_model(params.run)
        backbone, size, source = model.backbone, params.image_size or own_size, f"the run '{params.run}'"
        encoder: nn.Module = EmbeddingTokens(model) if params.embedding else BackboneTokens(backbone)
    else:
        backbone, size, source = _backbone(params), params.image_size or 0, f"the encoder '{params.backbone}'"
        encoder = BackboneTokens(backbone)
    return Teacher(
        name,
        encoder,
        size,
        params.mean or backbone.mean,
        params.std or backbone.std,
        params.kinds,
        bgr=params.bgr,
        source=source,
        licence=params.licence,
        identity=f"{backbone.name} {json.dumps(params.backbone_args, sort_keys=True)}",
    )


def _backbone(params: TeacherParams) -> Backbone:
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are loaded
        backbone = create_backbone(
            str(params.backbone),
            pretrained=params.pretrained,
            image_size=params.image_size or 0,
            arguments=params.backbone_args,
        )
    if params.weights is not None:
        load_backbone_weights(backbone, find_weights(params.weights))
    return backbone


def check_teachers(teachers: Mapping[str, Teacher], images: Images, precision: torch.dtype = torch.float32) -> None:
    """Let every teacher look at some different images, before anything is trained.

    Raises:
        UserError: "teacher '...': ..." whose features are not finite, or the same for all of these images, as those of
            weights that were never loaded, or of images normalised by another range, may be.
    """
    for name, teacher in teachers.items():
        for kind, tokens in teacher(images, precision=precision).items():
            if not tokens.isfinite().all():
                n = int((~tokens.isfinite().flatten(1).all(1)).sum())
                raise UserError(
                    f"teacher '{name}': its {kind} tokens of {n} of {len(images)} images are not finite; "
                    "other weights, or float32 instead of a precision that its values exceed?"
                )
            flat = tokens.flatten(1)
            spread, size = flat.std(0).norm(), flat.norm(dim=1).mean()
            if len(images) > 1 and not spread > CONSTANT * size:
                raise UserError(
                    f"teacher '{name}': its {kind} tokens are the same for {len(images)} different images: "
                    f"weights of another encoder, or another mean and std ({teacher.mean}, {teacher.std})?"
                )
