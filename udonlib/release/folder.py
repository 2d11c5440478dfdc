"""A released model as a folder: what is in it, and how it is written, checked and loaded.

    config.json          timm's keys, so that `timm.create_model("local-dir:FOLDER", pretrained=True)` builds the
                         encoder; ours under "udonlib", with the SHA-256 of every other file
    model.safetensors    the encoder, under timm's names
    head.safetensors     the student head; none where the embedding is the unit feature itself
    model.onnx           all of it, images to embeddings: see `release.onnx_export`
    metrics.json         what was measured
    README.md            the model card

Nothing in it is a pickle or code. timm reads only a file of the encoder alone, hence two files of weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from huggingface_hub import ModelHubMixin, snapshot_download
from jaxtyping import UInt8
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from udonlib import __version__
from udonlib.data.decoding import decode, prepare_eval
from udonlib.errors import UserError
from udonlib.files import replacing, write_json, write_text
from udonlib.models.backbones import OWN, constructor_arguments, create_backbone
from udonlib.models.embedding_model import EmbeddingModel
from udonlib.models.files.weight_files import read_safetensors
from udonlib.models.heads import Head
from udonlib.params import TrainParams

CONFIG, ENCODER, HEAD, ONNX, METRICS, CARD = NAMES = (
    *("config.json", "model.safetensors", "head.safetensors", "model.onnx", "metrics.json", "README.md"),
)
FILES = (ENCODER, HEAD, ONNX, METRICS, CARD, CONFIG)  # in the order of writing: the config says what the others are
FORMAT = 1
# Arguments by which timm reads files, or builds something that is no encoder.
REFUSED = {
    "checkpoint_path",
    "cache_dir",
    "pretrained",
    "pretrained_strict",
    "features_only",
    "num_classes",
    "in_chans",
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class PretrainedConfig(_Part):
    """What timm wants to know of weights."""

    tag: str = "udonlib"
    custom_load: bool = False
    input_size: tuple[int, int, int]
    fixed_input_size: bool
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_classes: Literal[0] = 0
    first_conv: str | tuple[str, ...] | None = None
    classifier: str | tuple[str, ...] | None = None


class OwnConfig(_Part):
    """What makes the encoder's feature an embedding, and what the folder's files are."""

    format: int = FORMAT
    version: str
    name: str
    embedding_dim: int
    nested_dims: tuple[int, ...] = ()
    head: Literal["student", "feature"]
    head_hidden_dims: tuple[int, ...] = ()
    normalise_features: bool
    preprocessing: str
    domains: tuple[str, ...] = ()
    sha256: dict[str, str] = {}


class ReleaseConfig(_Part):
    """config.json."""

    architecture: str
    num_classes: Literal[0] = 0
    num_features: int
    model_args: dict[str, Any] = {}
    pretrained_cfg: PretrainedConfig
    udonlib: OwnConfig

    @property
    def image_size(self) -> int:
        """Side of the images that the model sees, pixels."""
        return self.pretrained_cfg.input_size[1]

    @property
    def is_timms(self) -> bool:
        """Whether timm knows the encoder."""
        return self.architecture not in OWN


def config_of(model: EmbeddingModel, params: TrainParams, name: str, domains: Iterable[str] = ()) -> ReleaseConfig:
    """The config of a run's model. params: the run's. name: of the release."""
    arguments = constructor_arguments(params.backbone, params.image_size, params.backbone_args)
    known = getattr(model.backbone.encoder, "pretrained_cfg", None) or {}
    known = {} if model.backbone.name in OWN else dict(known if isinstance(known, Mapping) else vars(known))
    head = model.student
    size = params.image_size
    return ReleaseConfig(
        architecture=params.backbone.split(".")[0],
        num_features=model.backbone.feature_dim,
        model_args=json.loads(json.dumps(arguments)),
        pretrained_cfg=PretrainedConfig(
            input_size=(3, size, size),
            fixed_input_size="img_size" in arguments,
            mean=tuple(model.backbone.mean),
            std=tuple(model.backbone.std),
            first_conv=known.get("first_conv"),
            classifier=known.get("classifier"),
        ),
        udonlib=OwnConfig(
            version=__version__,
            name=name,
            embedding_dim=head.out_dim,
            nested_dims=params.nested_dims,
            head="student" if isinstance(head, Head) else "feature",
            head_hidden_dims=tuple(layer.out_features for layer in _linear(head)[:-1]),
            normalise_features=model.normalise_features,
            preprocessing=(
                f"RGB, transparency on white; short side to {size} pixels, bilinear without antialiasing; the middle "
                f"{size} x {size}; rounded to whole values; (x / 255 - mean) / std"
            ),
            domains=tuple(domains),
        ),
    )


def _linear(head: nn.Module) -> list[nn.Linear]:
    return [layer for layer in head.modules() if isinstance(layer, nn.Linear)]


class ReleasedModel(EmbeddingModel, ModelHubMixin, library_name="udonlib", tags=["image-feature-extraction"]):
    """A released model, in evaluation mode, on the CPU: `embed(images)` as of every `EmbeddingModel`.

    model = ReleasedModel.from_pretrained("FOLDER")
    model.embed(model.read("photo.jpg")[None])
    """

    def __init__(self, config: ReleaseConfig) -> None:
        own = config.udonlib
        strange = REFUSED & set(config.model_args) or {n for n in config.model_args if n.startswith("pretrained_cfg")}
        if strange:
            raise UserError(f"{CONFIG}: 'model_args' holds {', '.join(sorted(strange))}, which no encoder needs")
        backbone = create_backbone(
            config.architecture, pretrained=False, image_size=config.image_size, arguments=config.model_args
        )
        backbone.mean, backbone.std = config.pretrained_cfg.mean, config.pretrained_cfg.std
        super().__init__(
            backbone,
            {},
            student_dim=own.embedding_dim if own.head == "student" else 0,
            teacher_dim=0,
            hidden_dims=own.head_hidden_dims,
            normalise_features=own.normalise_features,
        )
        self.config = config
        self.eval().requires_grad_(False)

    def read(self, path: str | Path) -> UInt8[Tensor, "3 size size"]:
        """An image file as this model sees it. Raises: ImageError, beginning with the path."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        return prepare_eval(decode(data, str(path)), self.config.image_size)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> ReleasedModel:
        """Load a release from a folder, or from the Hugging Face Hub by its name there ("owner/name").

        Args:
            options: those of `huggingface_hub.ModelHubMixin.from_pretrained`, which matter for the Hub alone.

        Raises:
            UserError: no such folder; a file that is missing, damaged or another one than was released.
        """
        place = Path(pretrained_model_name_or_path).expanduser()
        if place.is_dir():
            return load_release(place)
        name = str(pretrained_model_name_or_path)
        if place.exists() or name.startswith((".", "~")) or place.is_absolute() or name.count("/") != 1:
            raise UserError(f"{place}: no folder of a release")
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> ReleasedModel:
        known = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        fetched = snapshot_download(
            model_id, allow_patterns=list(NAMES), **{name: options[name] for name in known if name in options}
        )
        return load_release(Path(fetched))

    def _save_pretrained(self, save_directory: Path) -> None:
        write_weights(save_directory, self)
        write_text(save_directory / CARD, f"# {self.config.udonlib.name}\n\nAn image embedding, saved by udonlib.\n")
        write_config(save_directory, self.config)


def write_weights(folder: Path, model: EmbeddingModel) -> None:
    """Write the encoder and the student head, and nothing that only training needs."""
    parts = {ENCODER: model.backbone.encoder, HEAD: model.student}
    for name, part in parts.items():
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in part.state_dict().items()}
        if tensors:
            with replacing(folder / name) as file:
                file.write(safetensors.torch.save(tensors, {"format": "pt"}))


def write_config(folder: Path, config: ReleaseConfig) -> ReleaseConfig:
    """Write config.json with the SHA-256 of each other file that is there, and of itself; returns what was written."""
    digests = {name: sha256(folder / name) for name in FILES if name != CONFIG and (folder / name).exists()}
    own = config.udonlib.model_copy(update={"sha256": digests})
    sealed = config.model_copy(update={"udonlib": own})
    digests[CONFIG] = _digest_of(sealed)
    write_json(folder / CONFIG, sealed.model_dump(mode="json"))
    return sealed


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hex digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest_of(config: ReleaseConfig) -> str:
    """SHA-256 of a config without its own digest."""
    values = config.model_dump(mode="json")
    values["udonlib"]["sha256"].pop(CONFIG, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_config(folder: Path) -> ReleaseConfig:
    """The config of a release.

    Raises:
        UserError: "<folder>: no folder of a release ..."; "<file>: damaged, or not of a release: ..."; another format.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise UserError(f"{folder}: no folder of a release: it holds no {CONFIG}")
    try:
        values = json.loads(file.read_bytes())
        format_ = values["udonlib"]["format"]
        if format_ != FORMAT:
            raise UserError(
                f"{file}: found format {format_!r}, this udonlib ({__version__}) reads format {FORMAT}; install the "
                "version that wrote it"
            )
        config = ReleaseConfig(**values)
    except UserError:
        raise
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{error.error_count()} values do not fit" if isinstance(error, ValidationError) else repr(error)
        raise UserError(f"{file}: damaged, or not of a release: {reason:.120}") from None
    if config.udonlib.sha256.get(CONFIG) != _digest_of(config):
        raise UserError(f"{file}: damaged or changed: it is not what its own checksum says; fetch the release again")
    return config


def check_files(folder: Path, config: ReleaseConfig, names: Iterable[str] = FILES) -> None:
    """Hold files of a release against their checksums.

    Args:
        names: which of them; those that the release never had are left out.

    Raises:
        UserError: "<file>: missing ..." or "<file>: damaged or changed ...".
    """
    for name in names:
        expected = config.udonlib.sha256.get(name)
        if name == CONFIG or expected is None:
            continue
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file}: missing; fetch the release again")
        found = sha256(file)
        if found != expected:
            raise UserError(
                f"{file}: damaged or changed: {file.stat().st_size:,} bytes of SHA-256 {found[:12]}..., "
                f"{CONFIG} says {expected[:12]}...; fetch the release again"
            )


def load_release(folder: Path) -> ReleasedModel:
    """The model of a release, its files held against their checksums first (a second for 1 GB).

    Raises:
        UserError: whatever is missing, damaged, or of another model than the config says.
    """
    config = read_config(folder)
    wanted = [ENCODER, *([HEAD] if config.udonlib.head == "student" else [])]
    unknown = [name for name in wanted if name not in config.udonlib.sha256]
    if unknown:
        raise UserError(f"{folder / CONFIG}: damaged, or not of a release: no checksum of {unknown[0]}")
    check_files(folder, config, wanted)
    model = ReleasedModel(config)
    for name, part in ((ENCODER, model.backbone.encoder), (HEAD, model.student)):
        if name in wanted:
            _fill(part, folder / name)
    return model


def _fill(part: nn.Module, file: Path) -> None:
    tensors, _ = read_safetensors(file)
    try:
        part.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{file}: of another model than {CONFIG} says: {' '.join(str(error).split()):.200}") from None
