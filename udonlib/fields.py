"""Parameters in general: the types and bounds of their values, how text is read as such, and which images.

Bounds lie beyond what anybody means, so that a slip of the keyboard is refused at once; what a machine has room for is
asked when a run begins (`training.needs`).
"""

import re
from collections.abc import Mapping
from os import PathLike, fspath
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from udonlib.errors import ParameterError, UserError, nearest, problems
from udonlib.files import located, long_name, read_yaml_text

# Years of training; the schedule of a sampler that does not change takes 8 bytes a step.
Steps = Annotated[int, Field(le=100_000_000)]
# Similarities of a batch are a square matrix: of a million, four terabytes.
Images = Annotated[int, Field(le=1_000_000)]
# A decoded image has three bytes a pixel: at 8,192, 200 MB.
Side = Annotated[int, Field(ge=8, le=8192)]
# Embeddings and hidden layers of known models end at some 16,000.
Width = Annotated[int, Field(ge=1, le=65_536)]
# Each is a process or thread of the system; no machine has as many cores.
Processes = Annotated[int, Field(le=1024)]
# Kept for every query.
Neighbours = Annotated[int, Field(ge=1, le=10_000)]
# Pictures of a notebook.
Shown = Annotated[int, Field(ge=1, le=1000)]
# Computed with in float32, which ends at 3e38.
Positive = Annotated[float, Field(gt=0, le=1e30)]
NotNegative = Annotated[float, Field(ge=0, le=1e30)]
# Of the sizes of long-tailed data; the largest known ones fall by some thousands.
Factor = Annotated[float, Field(ge=1, le=1e6)]
# What every generator takes.
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _portable(name: str) -> str:
    """Refuse names that Windows keeps for devices, or writes otherwise."""
    if re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name, re.IGNORECASE) or name.endswith("."):
        raise ValueError("expected a name that is a folder's on every system: no CON or NUL, no dot at the end")
    return name


# Short enough for names that are made of it, such as those of logs.
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=200), AfterValidator(_portable)]

# What is measured of each query: R@k, mMP@k, mAP@k.
Metric = Annotated[
    str, Field(pattern=r"^(r|mmp|map)_at_[1-9]\d{0,2}$", description="r_at_<k>, mmp_at_<k> or map_at_<k>, k to 999")
]

Strategy = Literal["round_robin", "balanced", "dataset_size", "square_root", "temperature", "fixed"]
Signal = Literal["loss", "relative_loss", "remaining_loss", "progress", "gap"]

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,4})?)$")]


def read_as(kind: Any, value: Any) -> Any:
    """Read a value as what a type holds; what does not fit is left as it is, for whoever checks types.

    Args:
        kind: a parameter's annotation. Of `Literal["all"] | tuple[str, ...]` and `float | None` the part counts that
            text can be read as.
        value: as it was written. Lists are text with commas or in brackets, mappings text in braces, and numbers may
            have YAML's or Python's forms (1e-3, 50_000). A whole number is a name where a name is expected; another
            number is none, since 1.10 and 12e4567 are not what they were any more.
    """
    for part in _parts(kind):
        origin = get_origin(part)
        if origin is tuple:
            return _read_list(get_args(part)[0], value)
        if origin is dict:
            return _read_mapping(get_args(part)[1], value)
        if part in (int, float):
            return _read_number(value)
        if part is str and isinstance(value, PathLike):
            return fspath(value)
        if part is str and isinstance(value, int) and not isinstance(value, bool):
            return str(value)
    return value


def _parts(kind: Any) -> tuple[Any, ...]:
    """The types that a parameter may have, without the bounds that are annotated."""
    if get_origin(kind) is Annotated:
        return _parts(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return tuple(inner for part in get_args(kind) for inner in _parts(part))
    return (kind,)


def _read_list(kind: Any, value: Any) -> Any:
    if isinstance(value, str):
        plain = _plain(value, "[")
        value = [part.strip() for part in value.split(",")] if plain is None else plain
    elif isinstance(value, int | float) and not isinstance(value, bool):
        value = [value]
    return [read_as(kind, item) for item in value] if isinstance(value, list | tuple) else value


def _read_mapping(kind: Any, value: Any) -> Any:
    plain = _plain(value, "{") if isinstance(value, str) else value
    if not isinstance(plain, Mapping):
        return value
    return {read_as(str, name): read_as(kind, item) for name, item in plain.items()}


def _plain(text: str, bracket: str) -> Any:
    """What text in brackets holds; None where it is none."""
    try:
        return read_yaml_text(text) if text.lstrip().startswith(bracket) else None
    except UserError:
        return None


def _read_number(value: Any) -> Any:
    """The number that text is, if it is one; True is left to be refused as text, and does not pass for 1."""
    if not isinstance(value, str | bool) or len(str(value)) > 400:  # Python reads no thousands of digits
        return value
    text = str(value).strip()
    if re.fullmatch(r"[-+]?\d+(_\d+)*", text):
        return int(text)
    if re.fullmatch(r"[-+]?(\d+(_\d+)*\.?\d*|\.\d+)([eE][-+]?\d+)?", text):
        return float(text)
    return str(value)


class Checked(BaseModel):
    """Values that are checked together, from whatever text or YAML has made of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, /, **values: Any) -> None:
        """Check all values together. Raises ParameterError naming every parameter that is unknown or wrong."""
        try:
            fields = type(self).model_fields
            read = {name: read_as(fields[name].annotation, value) for name, value in values.items() if name in fields}
            super().__init__(**self.implied(values) | values | read)
        except ValidationError as error:
            raise ParameterError(problems(type(self), error, values)) from None

    @classmethod
    def implied(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values that others bring along where they are not given themselves."""
        return {}


class DataParams(Checked):
    """Which images: what every notebook that reads a catalog takes."""

    data: str = Field(
        "miniuned", min_length=1, description="'miniuned', a folder, zip or table of images, or a list of such: [a, b]"
    )
    images: str | None = Field(None, min_length=1, description="root of the images where it is not under `data`")
    domains: Literal["all"] | tuple[str, ...] = Field("all", description="'all' or names: a list, or text with commas")

    @model_validator(mode="after")
    def _name_what_can_be(self) -> "DataParams":
        texts = {name: value for name in type(self).model_fields if isinstance(value := getattr(self, name), str)}
        wrong = {name: problem for name, text in texts.items() if (problem := long_name(text))}
        if wrong:
            raise ParameterError(wrong)
        return self

    _locate = field_validator("data", "images", mode="before")(located)

    @field_validator("domains")
    @classmethod
    def _name_domains(cls, names: Literal["all"] | tuple[str, ...]) -> Literal["all"] | tuple[str, ...]:
        if names == "all" or names == ("all",):
            return "all"
        return different(names, "'all' or one or more different names")


class ResultParams(DataParams):
    """Which images, and where results are."""

    outputs: str = Field("auto", min_length=1, description="folder of results; 'auto': the project's outputs/")


class RunDataParams(ResultParams):
    """Results, and the images that they are of."""

    data: str = Field("auto", min_length=1, description="'auto': the run's; or the folder or zip where its data is now")


class UnevenParams(DataParams):
    """Which images, and how uneven their training part is made: see `data.imbalance`."""

    imbalance_between: Factor = Field(
        1.0, description="classes of the largest domain / of the smallest, exponential between; 1: as they are"
    )
    imbalance_within: Factor = Field(
        1.0, description="training images of a domain's largest class / of its smallest, the same"
    )


class AllocationParams(DataParams):
    """Which images, and how the steps of a training are shared among their domains: see `training.sampler`."""

    sampler: Strategy | Literal["dynamic"] = Field(
        "dynamic",
        description="how steps are allocated to domains; dynamic: by `sampler_signal`; dataset_size, square_root, "
        "temperature: by training images to the power of 1, 0.5, `sampler_alpha`",
    )
    sampler_init: Strategy = Field("round_robin", description="allocation of the dynamic sampler's first window")
    sampler_alpha: float = Field(0.3, ge=0, le=1, description="of 'temperature': images^alpha, 0: equal shares")
    sampler_order: Literal["random", "even"] = Field(
        "random", description="of the domains' slots; random: the paper's; even: each domain's at equal distances"
    )
    fixed_shares: dict[str, NotNegative] = Field(
        {}, description="domain -> share of steps for 'fixed'; scaled to sum 1"
    )
    update_every: Steps = Field(1000, ge=1, description="steps per window, between two updates of the allocation")
    sampler_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of the old allocation in each update of the dynamic one"
    )
    sampler_floor: float = Field(0.0, ge=0, lt=1, description="part of the dynamic one shared equally, whoever claims")
    sampler_loss: Literal["teacher", "student"] = Field("teacher", description="whose loss drives the dynamic sampler")
    sampler_signal: Signal = Field(
        "loss",
        description="what a domain claims by in a window: loss, the paper's; relative_loss: over that of a guess, ln "
        "classes; remaining_loss: over its first window's; progress: the fall since the window before, per image; gap: "
        "the student's loss less the teacher's",
    )

    @field_validator("fixed_shares")
    @classmethod
    def _scale_shares(cls, shares: dict[str, float]) -> dict[str, float]:
        total = sum(shares.values())
        if shares and not total > 0:
            raise ValueError("expected shares that sum to more than 0")
        if abs(total - 1) < 1e-9:  # scaled already: reading saved parameters must not change the last bit
            return shares
        return {name: share / total for name, share in shares.items()}

    @model_validator(mode="after")
    def _allocate(self) -> "AllocationParams":
        wrong: dict[str, str] = {}
        dynamic = self.sampler == "dynamic"
        fixed = self.sampler == "fixed" or (dynamic and self.sampler_init == "fixed")
        if fixed and not self.fixed_shares:
            wrong["fixed_shares"] = "found {}, expected a share for each domain, since the allocation is 'fixed'"
        if self.fixed_shares and not fixed:
            wrong["fixed_shares"] = f"found {self.fixed_shares}, but sampler '{self.sampler}' uses no fixed shares"
        elif self.fixed_shares and self.domains != "all":
            strangers = [domain for domain in self.fixed_shares if domain not in self.domains]
            without = [domain for domain in self.domains if domain not in self.fixed_shares]
            if strangers:
                hint = nearest(strangers[0], without or self.domains)
                wrong["fixed_shares"] = f"found domain '{strangers[0]}', which is not trained; {hint}"
            elif without:
                wrong["fixed_shares"] = f"found no share for domain '{without[0]}'"
        if dynamic and self.sampler_signal in ("progress", "gap") and self.sampler_floor == 0:
            found = f"found 0, expected more, such as 0.2, beside sampler_signal '{self.sampler_signal}'"
            wrong["sampler_floor"] = f"{found}: a domain that claims nothing once would never be seen again"
        if wrong:
            raise ParameterError(wrong)
        return self


class ComputeParams(ResultParams):
    """Results that are computed, and on what."""

    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    n_workers: Processes = Field(0, ge=0, description="processes that decode images; 0: this process itself")
    n_threads: Processes = Field(
        0, ge=0, description="threads of PyTorch on the CPU; 0: as many as there are cores for us"
    )


def different(values: tuple, expected: str = "one or more different values, with commas between them") -> tuple:
    """Refuse a list that is empty, or names something twice or not at all, as text with a comma too many does."""
    if not values or "" in values or len(set(values)) < len(values):
        raise ValueError(f"expected {expected}")
    return values


class TeacherParams(Checked):
    """A frozen teacher: an encoder of timm's, a run of ours, or an ONNX file."""

    backbone: str | None = Field(None, min_length=1, description="name of an encoder, as the parameter 'backbone'")
    backbone_args: dict[str, Any] = Field({}, description="further arguments of timm.create_model")
    pretrained: bool = Field(False, description="with timm's released weights")
    weights: str | None = Field(None, min_length=1, description="file of its weights, as the parameter 'weights'")
    run: str | None = Field(None, min_length=1, description="a finished run of ours, or a checkpoint of one")
    onnx: str | None = Field(
        None, min_length=1, description="an ONNX file, which onnxruntime executes: a path, or PACKAGE/FILE"
    )
    outputs: tuple[str, ...] = Field((), description="values in the ONNX graph that are its tokens; []: its outputs")
    image_size: Side | None = Field(None, description="side of the images that it sees, pixels; None: a run's own")
    mean: tuple[float, float, float] | None = Field(
        None, description="of each channel, in 0..1; None: its weights' own"
    )
    std: tuple[Positive, Positive, Positive] | None = Field(None, description="the same of the deviation")
    bgr: bool = Field(False, description="its images have blue first, as OpenCV reads them")
    kinds: tuple[Literal["class", "patches"], ...] = Field(
        ("class", "patches"), description="tokens of it that count: class, patches"
    )
    embedding: bool = Field(False, description="of a run: its embedding is the class token, not the backbone's feature")
    weight: Positive = Field(1.0, description="of its loss beside the other teachers'")
    licence: str = Field("", description="of its weights, to be told with what is made of them")

    @field_validator("kinds")
    @classmethod
    def _kinds(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(different(kinds, "class, patches, or both")))

    @model_validator(mode="after")
    def _agree(self) -> "TeacherParams":
        given = [name for name in ("backbone", "run", "onnx") if getattr(self, name) is not None]
        if len(given) != 1:
            text = f"found {' and '.join(given) or 'none'} of backbone, run and onnx, expected exactly one"
            raise ParameterError({given[-1] if given else "backbone": text})
        wrong = {}
        if self.backbone is not None and self.pretrained == (self.weights is not None):
            found = "both" if self.pretrained else "neither: it would know nothing"
            wrong["weights"] = f"found {found} of weights and pretrained, expected one of them"
        if self.backbone is None and (self.pretrained or self.weights is not None or self.backbone_args):
            wrong["backbone"] = f"found None beside what only a backbone has, expected {given[0]} alone"
        if self.backbone is not None and self.image_size is None:
            wrong["image_size"] = "found None, expected the side of the images that the encoder sees"
        if self.outputs and self.onnx is None:
            wrong["outputs"] = f"found {', '.join(self.outputs)} beside no ONNX file, expected none"
        if self.onnx is not None and None in (self.image_size, self.mean, self.std):
            wrong["onnx"] = "expected image_size, mean and std beside it: an ONNX file does not say them"
        if self.embedding and (self.run is None or self.kinds != ("class",)):
            wrong["embedding"] = "found True, expected a run and kinds: [class]: an embedding is one of a whole image"
        if wrong:
            raise ParameterError(wrong)
        return self


class DistillParams(ComputeParams):
    """Frozen teachers, and how a student learns from them (UNIC). Defaults: the original's, but where it says ours."""

    teachers: dict[str, TeacherParams] = Field({}, description="name -> frozen teacher: see `fields.TeacherParams`")
    teacher_features: Literal["augmented", "cached"] = Field(
        "augmented",
        description="teachers see what the student sees, in each step; or each image once, without augmentation",
    )
    max_cache_gb: Positive = Field(20.0, description="room of all cached features under outputs/features, GB")
    w_unic: NotNegative = Field(1.0, description="weight of frozen teachers beside labels, in recipes that have both")
    w_cosine: NotNegative = Field(0.5, description="weight of 1 - cosine in the distance from a teacher's token")
    w_smooth_l1: NotNegative = Field(0.5, description="weight of smooth L1 in it")
    drop_probability: float = Field(
        0.5,
        ge=0,
        le=1,
        description="of an image's teachers but the farthest one; 0: their mean, 1: the farthest alone",
    )
    image_weights: Literal["equal", "kept"] = Field(
        "equal", description="images weigh the same (ours), or as much as they have teachers left"
    )
    projector: Literal["ladder", "last", "transformer"] = Field(
        "ladder", description="from the student's tokens to a teacher's: of all blocks, of the last, attention over it"
    )
    projected_blocks: tuple[Annotated[int, Field(ge=0, le=1000)], ...] | None = Field(
        None, description="ladder: blocks beneath the last that have a rung, from 0; None: all"
    )
    projected_end: Literal["end", "block"] = Field(
        "end", description="the last rung reads what the feature is made of (ours), or the last block before its norm"
    )
    projector_hidden_dim: int = Field(0, ge=0, le=65_536, description="width of a rung; 0: a quarter of the last block")
    projector_last_hidden_dim: int = Field(0, ge=0, le=65_536, description="of the last rung; 0: as wide as its input")
    standard: Literal["running", "batch", "fixed", "isotropic", "none"] = Field(
        "running", description="how teachers' features are standardised: see `models.standards`"
    )
    standard_update: Literal["before", "after"] = Field(
        "before", description="running: a batch changes the statistics before it is standardised (ours), or after"
    )
    standard_momentum: float = Field(1.0, ge=0, le=1, description="running: weight of the first batch's statistics")
    standard_momentum_end: float = Field(0.001, ge=0, le=1, description="the same at the end, half a cosine later")

    @field_validator("teachers", mode="before")
    @classmethod
    def _teachers(cls, teachers: Any) -> Any:
        """Check each by name, so that a mistake in one names it."""
        if not isinstance(teachers, Mapping):
            return teachers
        found = {}
        for name, values in teachers.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,50}", str(name)):
                raise ValueError(f"{name!r} is no name of a teacher: expected letters, digits, _ and -")
            if isinstance(values, Mapping):
                try:
                    values = TeacherParams(**{str(key): value for key, value in values.items()})
                except ParameterError as error:
                    raise ValueError("; ".join(f"'{name}': {k}: {v}" for k, v in error.problems.items())) from None
            found[name] = values
        return found

    @model_validator(mode="after")
    def _distil(self) -> "DistillParams":
        if self.w_cosine + self.w_smooth_l1 == 0:
            raise ParameterError({"w_cosine": "found 0 beside w_smooth_l1 = 0: expected one of them above 0"})
        if self.projected_blocks is not None and self.projector != "ladder":
            found = f"found {list(self.projected_blocks)}: '{self.projector}' has no such blocks, expected None"
            raise ParameterError({"projected_blocks": found})
        return self
