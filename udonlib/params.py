"""Every parameter of a training run, checked before anything is computed or written.

The models are flat and frozen; a field's description and bounds are its documentation. A mistake of the user's making
is one `UserError`: it names the parameter or file, what was found, what is valid, and the nearest valid name.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from udonlib.errors import ParameterError
from udonlib.fields import (
    AllocationParams,
    DistillParams,
    FolderName,
    Images,
    Neighbours,
    NotNegative,
    Positive,
    Processes,
    Seed,
    Side,
    Steps,
    UnevenParams,
    Width,
)
from udonlib.files import runs_folder, sources

Recipe = Literal["udon", "udon_plus", "us_rr", "us_ds", "uj_rr", "uj_ds", "specialist", "adapter", "features", "unic"]
Augmentation = Literal["none", "crop_flip", "affine", "affine_colour"]

# What a recipe fixes; everything else stays free. UnED's plain universal models have no teachers to learn from.
NO_TEACHERS = {"w_ce_teacher": 0.0, "w_kl": 0.0, "w_rel": 0.0}
RECIPES: dict[str, dict[str, Any]] = {
    "udon": {},
    "udon_plus": {"classifier": "joint", "w_kl": 0.0, "sampler_order": "even"},
    "us_rr": {"classifier": "separate", "sampler": "round_robin", **NO_TEACHERS},
    "us_ds": {"classifier": "separate", "sampler": "dataset_size", **NO_TEACHERS},
    "uj_rr": {"classifier": "joint", "sampler": "round_robin", **NO_TEACHERS},
    "uj_ds": {"classifier": "joint", "sampler": "dataset_size", **NO_TEACHERS},
    "specialist": {"sampler": "round_robin", **NO_TEACHERS},
    "adapter": {"backbone_learning_rate": 0.0, "sampler": "round_robin", **NO_TEACHERS},
    "features": {"steps": 0, "sampler": "round_robin", **NO_TEACHERS},
    "unic": {"w_ce_student": 0.0, "sampler_loss": "student", **NO_TEACHERS},
}
# Recipes whose values are a start: each may be set otherwise, to see what it gives. Measured for pretrained backbones.
OPEN_RECIPES = {"udon_plus"}
# Where a run happens and how it reports, not what it computes: outside the run's automatic name, like the seed, which
# stands in the name by itself, so that the seeds of one setting share the name's last part.
WITHOUT_EFFECT = {
    *("run", "outputs", "seed", "device", "n_workers", "n_threads", "cache_images"),
    *("eval_batch_size", "log_every", "checkpoint_every", "overwrite", "check_data"),
    *("max_cache_gb", "processes", "split_classes_from"),
}


class TrainParams(DistillParams, AllocationParams, UnevenParams):
    """One training run. Defaults: the paper's, for a ViT-B/16 pretrained on ImageNet-21k and trained on UnED."""

    recipe: Recipe = Field(
        "udon",
        description=(
            "udon; udon_plus: with our changes; UnED's universal models without teachers, with separate (us_) or joint "
            "(uj_) classifiers, domains in turn (_rr) or by size (_ds); specialist: one domain alone; adapter: frozen "
            "backbone and linear layer; features: the backbone as it is; unic: learns from frozen teachers, no labels"
        ),
    )
    run: FolderName = Field(
        "auto",
        description="folder name under outputs/runs; 'auto': from the parameters that influence results",
    )
    overwrite: bool = Field(False, description="begin anew where the run's folder holds a run already")
    seed: Seed = Field(0, description="seed of every generator")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description=(
            "of the backbone's forward pass, of the projectors on its tokens, and of frozen teachers; "
            "auto: bfloat16 where the processor or GPU multiplies it, else float32; "
            "a run keeps what it began with"
        ),
    )
    on_bad_image: Literal["error", "skip"] = Field(
        "error", description="stop at an image that cannot be read, or skip and count it"
    )
    check_data: Literal["refuse", "warn", "skip"] = Field(
        "refuse",
        description="before training, look at the data for seconds: refuse broken data, say what was found, or do not",
    )
    processes: Processes = Field(
        1, ge=1, description="that share each batch of a run begun in a notebook; from a terminal torchrun says it"
    )
    cache_images: bool = Field(True, description="keep decoded images in memory where they fit")
    decoder: Literal["pillow", "nvimgcodec"] = Field(
        "pillow",
        description="of training's JPEGs: pillow, in n_workers processes; nvimgcodec, on the GPU, none kept in memory",
    )

    backbone: str = Field(
        "vit_base_patch16_224.augreg_in21k",
        min_length=1,
        description="name of a timm model with a pooled or class-token feature",
    )
    backbone_args: dict[str, Any] = Field({}, description="further arguments of timm.create_model")
    pretrained: bool = Field(True, description="start from timm's released weights; False: from scratch")
    weights: str | None = Field(
        None,
        min_length=1,
        description=(
            "file of the backbone's weights (.safetensors, .pth, .bin, .npz, .npy, .onnx): here, in the project, or in "
            "an installed package (PACKAGE/FILE)"
        ),
    )
    image_size: Side = Field(224, description="side of the image that the backbone sees, pixels")
    start: str | None = Field(
        None, min_length=1, description="a run to begin with: its weights, where domain and class have the same name"
    )
    start_image_size: Side | None = Field(
        None, description="side of the first steps' training images, pixels; None: image_size"
    )
    growing_steps: Steps = Field(
        0, ge=0, description="steps over which training images grow to image_size, 8 pixels at a time"
    )
    resize_size: Side = Field(
        256, description="side of the square that a training image is squashed to before augmentation, pixels"
    )

    student_dim: Width = Field(64, description="dimensions of the universal embedding")
    teacher_dim: Width = Field(256, description="dimensions of each domain's teacher embedding")
    head_hidden_dims: tuple[Width, ...] = Field(
        (), description="widths of every head's hidden layers; []: one linear layer"
    )
    teacher_hidden_dims: tuple[Width, ...] | None = Field(
        None, description="the same of the teacher heads alone; None: as head_hidden_dims"
    )
    nested_dims: tuple[Width, ...] = Field(
        (), description="shorter embeddings, the first dimensions of the student's, that are trained besides"
    )
    normalise_features: bool = Field(True, description="scale features to unit norm before the heads")

    steps: Steps = Field(221_180, ge=0, description="optimizer steps; 221,180 is 10 epochs of UnED")
    extend: Steps = Field(0, ge=0, description="steps beyond `steps` that a finished run is given: see `part_at`")
    seams: tuple[Annotated[Steps, Field(ge=1)], ...] = Field(
        (), description="steps at which the run was given more; it writes them itself"
    )
    patience: Steps = Field(
        0, ge=0, description="validations without a better one, frozen steps aside, after which training stops; 0: none"
    )
    frozen_steps: Steps = Field(44_236, ge=0, description="first steps, in which the backbone is frozen")
    batch_size: Images = Field(128, ge=2, description="images per step")
    domains_per_batch: Images = Field(1, ge=1, description="equal parts of a batch, each of one domain")
    learning_rate: Positive = Field(1e-3, description="Adam's rate for heads and prototypes")
    backbone_learning_rate: NotNegative = Field(1e-5, description="the same for the backbone once it thaws; 0: never")
    weight_decay: NotNegative = Field(1e-6, description="decoupled decay per step, times the rate")
    beta2: float = Field(0.999, gt=0, lt=1, description="Adam's decay of squared gradients")
    warmup_steps: Steps = Field(0, ge=0, description="steps over which the rates rise linearly from 0")
    rate_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="rates after the warm-up: constant, or a half cosine to 0"
    )
    max_grad_norm: Positive | None = Field(
        None, description="gradients are clipped to this global norm; None: not clipped"
    )
    absent_heads: Literal["skip", "decay"] = Field(
        "skip", description="heads of domains absent from a batch: left alone, or stepped with zero gradients"
    )
    frozen_backbone: Literal["no_grad", "zero_lr"] = Field(
        "no_grad", description="freeze by computing no gradients, or by a rate of 0 (moments still move)"
    )

    average_decay: float = Field(
        0.0, ge=0, lt=1, description="decay per step of a moving average of the model, which is then what is kept"
    )

    classifier: Literal["separate", "joint"] = Field(
        "separate", description="the student's softmax: over the classes of the image's domain, or of all domains"
    )
    class_sample: float = Field(
        1.0, gt=0, le=1, description="share of the classes, besides those of its images, that a step's softmax sees"
    )
    split_classes_from: int = Field(
        20_000,
        ge=1,
        le=1_000_000_000,
        description="classes of all domains from which on each of several processes holds a part of them",
    )
    classification: Literal["normface", "cosface", "arcface"] = Field(
        "normface", description="margin softmax of student and teachers"
    )
    margin: float = Field(0.0, ge=0, lt=2, description="cosface: of the cosine; arcface: of the angle, radians")
    scale: Positive = Field(16.0, description="factor of cosines in the classification losses")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    w_ce_student: NotNegative = Field(1.0, description="weight of the student's classification loss")
    w_ce_teacher: NotNegative = Field(1.0, description="weight of the teachers' classification loss")
    w_kl: NotNegative = Field(1.0, description="weight of logit distillation")
    w_rel: NotNegative = Field(1.0, description="weight of relational distillation")
    teacher_temperature: Positive = Field(0.1, description="of the teacher's logits in logit distillation")
    student_temperature: Positive = Field(0.1, description="of the student's logits in logit distillation")
    relational: Literal["squared", "excess"] = Field(
        "squared", description="difference of similarities that counts: all of it, or where the student's is higher"
    )
    distillation_ramp: Steps = Field(
        0, ge=0, description="steps over which the weights of both distillation losses rise linearly from 0"
    )
    offline_teachers: str | None = Field(
        None,
        min_length=1,
        description="preset of finished specialist runs, one per domain, that teach in place of the teacher heads",
    )
    relational_scale: Positive = Field(32.0, description="factor of the mean square over the B x B similarities")

    augmentation: Augmentation = Field(
        "crop_flip",
        description="of training images; the paper's: crop_flip; affine turns and scales; affine_colour recolours too",
    )
    augmentation_by_domain: dict[str, Augmentation] = Field({}, description="domain -> augmentation, where it differs")

    eval_every: Steps = Field(22_118, ge=1, description="steps between validations, which select the best checkpoint")
    eval_batch_size: Images = Field(256, ge=1, description="images per step of embedding")
    k: Neighbours = Field(5, description="neighbours counted by mMP@k")
    replay: str | None = Field(
        None,
        min_length=1,
        description="a run of the same parameters that a person steered: its interventions are repeated at their steps",
    )
    log_every: Steps = Field(50, ge=1, description="steps between two records of the losses")
    checkpoint_every: Steps = Field(1000, ge=1, description="steps between two checkpoints to resume from")

    @classmethod
    def implied(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the recipe fixes."""
        recipe = values.get("recipe")
        return RECIPES.get(recipe, {}) if isinstance(recipe, str) else {}

    @model_validator(mode="after")
    def _agree(self) -> "TrainParams":
        """Refuse values that are possible one by one and impossible together."""
        wrong: dict[str, str] = {}
        for name, value in RECIPES[self.recipe].items():
            if getattr(self, name) != value and self.recipe not in OPEN_RECIPES:
                wrong[name] = f"found {getattr(self, name)!r}, but recipe '{self.recipe}' fixes it to {value!r}"
        if self.margin > 0 and self.classification == "normface":
            wrong["margin"] = f"found {self.margin}, but normface has none: expected 0, or cosface or arcface"
        if self.batch_size % self.domains_per_batch:
            wrong["domains_per_batch"] = (
                f"found {self.domains_per_batch}, expected a divisor of batch_size = {self.batch_size}"
            )
        if "crop_flip" in {self.augmentation, *self.augmentation_by_domain.values()}:
            if self.image_size > self.resize_size:
                wrong["image_size"] = (
                    f"found {self.image_size}, expected at most resize_size = {self.resize_size} for crop_flip"
                )
        if (self.start_image_size or self.image_size) > self.image_size:
            wrong["start_image_size"] = (
                f"found {self.start_image_size}, expected at most image_size = {self.image_size}"
            )
        if (self.start_image_size is None) != (self.growing_steps == 0):
            wrong["growing_steps"] = (
                f"found {self.growing_steps} beside start_image_size = {self.start_image_size}: "
                "expected both, or neither (0 and None)"
            )
        if self.sampler == "dynamic" and self.sampler_loss == "teacher" and not self.is_taught:
            wrong["sampler_loss"] = "found 'teacher', but w_ce_teacher = 0 trains none: expected 'student'"
        if self.sampler == "dynamic" and self.sampler_signal == "gap" and not self.is_taught:
            wrong["sampler_signal"] = "found 'gap', but nobody teaches: there is no gap; expected another signal"
        if not self.is_taught and (self.w_kl > 0 or self.w_rel > 0):
            found = f"w_kl = {self.w_kl} and w_rel = {self.w_rel}"
            wrong["w_ce_teacher"] = f"found 0 beside {found}: nobody teaches; expected more than 0, or both 0"
        if self.recipe == "unic" and not self.teachers:
            wrong["teachers"] = "found none, expected one or more for recipe 'unic': name -> teacher"
        if self.teachers and self.recipe in ("features", "adapter"):
            wrong["teachers"] = f"found {', '.join(self.teachers)}, but recipe '{self.recipe}' trains no backbone"
        if self.w_ce_student == 0 and not self.is_taught and self.recipe != "unic":
            wrong["w_ce_student"] = "found 0, and there are no teachers: nothing would be learned"
        if self.offline_teachers is not None and RECIPES[self.recipe].get("w_ce_teacher") == 0:
            wrong["offline_teachers"] = f"found {self.offline_teachers!r}, but recipe '{self.recipe}' has no teachers"
        if self.steps == 0 and self.recipe != "features":
            wrong["steps"] = f"found 0, expected at least 1 for recipe '{self.recipe}'"
        if list(self.seams) != sorted({seam for seam in self.seams if 0 < seam < self.steps}):
            wrong["seams"] = f"found {list(self.seams)}, expected rising steps before the last of {self.steps}"
        if self.recipe == "specialist" and self.domains != "all" and len(self.domains) > 1:
            wrong["domains"] = f"found {', '.join(self.domains)}, expected one domain for recipe 'specialist'"
        if self.weights is not None and self.pretrained:
            wrong["pretrained"] = "found True beside weights from a file: expected False"
        if self.start is not None and not self.has_head:
            wrong["start"] = f"found {self.start!r}, but recipe '{self.recipe}' has no student head to go on with"
        if self.nested_dims and max(self.nested_dims) >= self.student_dim:
            wrong["nested_dims"] = f"found {max(self.nested_dims)}, expected less than student_dim = {self.student_dim}"
        if wrong:
            raise ParameterError(wrong)
        return self

    def image_size_at(self, step: int) -> int:
        """Side of the training images of a step (from 0), pixels.

        It grows from `start_image_size` to `image_size` over `growing_steps`, in equal stages of 8 pixels.
        """
        if self.start_image_size is None or step >= self.growing_steps:
            return self.image_size
        n_stages = math.ceil((self.image_size - self.start_image_size) / 8)
        return self.start_image_size + 8 * (step * n_stages // self.growing_steps)

    def part_at(self, step: int) -> tuple[int, int]:
        """First step and length of the part of the training that a step (from 0) belongs to.

        A run that was given more steps has a part until each seam, and one after the last. Each part follows the
        schedule by itself: with `cosine` the rates begin anew at their full height, without a warm-up, and come down to
        0 at its end (a warm restart: Loshchilov and Hutter, SGDR, 2017); with `constant` they stay. So the steps that
        were done already are those of the run as it was, and the same parameters repeat all of it.
        """
        ends = [*self.seams, self.steps]
        end = next((end for end in ends if step < end), self.steps)
        start = max((seam for seam in self.seams if seam < end), default=0)
        return start, end - start

    def part_end(self, step: int) -> int:
        """The step after the last one of the part that a step belongs to."""
        return sum(self.part_at(step))

    @property
    def has_teachers(self) -> bool:
        """Whether teacher heads are trained."""
        return self.w_ce_teacher > 0 and self.offline_teachers is None

    @property
    def has_head(self) -> bool:
        """Whether there is a student head; else the embedding is the backbone's feature."""
        return self.recipe not in ("features", "unic")

    @property
    def is_taught(self) -> bool:
        """Whether the student has teachers: heads that are trained with it, or finished specialists."""
        return self.w_ce_teacher > 0 or self.offline_teachers is not None

    @property
    def run_name(self) -> str:
        """Name of the run's folder: `run`, or <recipe>-<data stem>-s<seed>-<6 hex digits>.

        The digits are of a hash of the values that influence results and differ from the defaults, without the seed:
        so seeds of one setting share them, and a parameter added later leaves old names as they are.
        """
        if self.run != "auto":
            return self.run
        values = self.model_dump(mode="json", exclude=WITHOUT_EFFECT | {"extend"}, exclude_defaults=True)
        digits = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]
        stem = re.sub(r"[^A-Za-z0-9_]+", "_", "_".join(Path(place).stem for place in sources(self.data))) or "data"
        return f"{self.recipe}-{stem[:100]}-s{self.seed}-{digits}"

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return runs_folder(self.outputs) / self.run_name
