"""The model card of a release: what it was made of, how good it is, what it may be used for, how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, packages_distributions
from typing import Any

import pandas as pd

from udonlib.data.catalog import Catalog
from udonlib.fields import TeacherParams
from udonlib.models.backbones import OWN
from udonlib.params import TrainParams
from udonlib.release.folder import HEAD, ReleaseConfig

# Parameters that say where somebody keeps things, and those that are told in words.
NOT_SHOWN = {"data", "images", "outputs", "run", "weights", "teachers", "replay"}
NOT_STATED = "**not stated**: whoever passes this model on has to know it"
MINIUNED = (
    "MiniUnED's images are under open licences, each named with its source in `ATTRIBUTION.md` of "
    "`udonlib/data/miniuned`; logos are trademarks of their owners"
)


@dataclass(frozen=True)
class Licences:
    """What a person states; None: what is known without, or that it is not."""

    model: str | None = None
    data: str | None = None
    weights: str | None = None
    teachers: str | None = None


UNSTATED = Licences()


@dataclass(frozen=True)
class Facts:
    """What a card tells of a run.

    evaluation: the run's table with intervals. vectors: of `release.quantised.measure`. onnx: of
    `release.release.compare`. provenance: of the run's first start. encoder_licence: of the encoder's published
    weights, where they say.
    """

    config: ReleaseConfig
    params: TrainParams
    catalog: Catalog
    evaluation: pd.DataFrame
    vectors: pd.DataFrame
    onnx: Mapping[str, Any]
    summary: Mapping[str, Any]
    provenance: Mapping[str, Any]
    encoder_licence: str | None = None


def card(facts: Facts, licences: Licences = UNSTATED) -> str:
    """README.md of a release."""
    own, config, p = facts.config.udonlib, facts.config, facts.params
    size, dim = config.image_size, own.embedding_dim
    n = len(facts.catalog.domains)
    parts = [
        _front_matter(config),
        f"# {own.name}",
        f"One image embedding for {n} visual domain{'s' * (n > 1)}: {dim} dimensions of unit norm, compared by inner "
        f"product. Encoder `{config.architecture}`, images of {size} x {size} pixels, "
        f"{facts.summary['n_parameters_shipped']:,} parameters, {facts.summary['gflops_per_image']:.3g} GFLOP an "
        f"image. Released by udonlib {own.version}.",
        "## How good it is",
        _results(facts),
        "## How to load it",
        _loading(config),
        "## What it was made of",
        _made_of(facts),
        "## Smaller vectors",
        _vectors(facts.vectors),
        "## The ONNX file",
        _onnx(facts.onnx),
        "## Licences",
        _licences(p, licences, facts.encoder_licence),
        "## Limits",
        _limits(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(config: ReleaseConfig) -> str:
    library = "timm" if config.is_timms else "udonlib"
    tags = "\n".join(f"- {tag}" for tag in ("image-feature-extraction", "image-retrieval", "udonlib"))
    return f"---\nlibrary_name: {library}\npipeline_tag: image-feature-extraction\nlicense: other\ntags:\n{tags}\n---"


def _results(facts: Facts) -> str:
    table, p = facts.evaluation, facts.params
    merged = table[(table["index"] == "merged") & (table["embedder"] == "student")]
    mmp = f"mmp_at_{p.k}"
    lines = [f"| domain | queries | R@1 | mMP@{p.k} |", "|---|---|---|---|"]
    for row in merged.to_dict("records"):
        values = [f"{row[m]:.1f} ({row[f'{m}_low']:.1f} to {row[f'{m}_high']:.1f})" for m in ("r_at_1", mmp)]
        name = "**mean of the domains**" if row["domain"] == "mean" else _escaped(row["domain"])
        lines.append(f"| {name} | {row['n_queries']:,} | {values[0]} | {values[1]} |")
    n_index = int(merged["n_index"].max())
    others = table[(table["index"] == "merged") & (table["domain"] == "mean") & (table["embedder"] != "student")]
    beside = ", ".join(f"{row.embedder} {row.r_at_1:.1f}" for row in others.itertuples())
    said = (
        f"Test queries of {facts.catalog.name}, searched in one index of all domains ({n_index:,} images), in percent, "
        f"with 95% intervals over queries; one run, seed {p.seed}: what another seed gives is not in them."
    )
    return "\n".join([said, "", *lines]) + (f"\n\nR@1 of others on the same queries: {beside}." if beside else "")


def _loading(config: ReleaseConfig) -> str:
    own = config.udonlib
    blocks = [
        "The preprocessing is: " + own.preprocessing + ".",
        "**onnxruntime alone**, preprocessing inside; images of any size, all of a batch of one size:",
        _python(
            "import numpy as np",
            "import onnxruntime",
            "from PIL import Image",
            "",
            'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])',
            'image = np.asarray(Image.open("photo.jpg").convert("RGB"))  # uint8 [height, width, 3]',
            '[embedding] = session.run(None, {"images": image[None]})  # unit rows [1, ' + f"{own.embedding_dim}]",
        ),
        "**udonlib**, which reads every kind of image as in training:",
        _python(
            "from udonlib.release.folder import ReleasedModel",
            "",
            'model = ReleasedModel.from_pretrained(".")  # this folder',
            'embedding = model.embed(model.read("photo.jpg")[None])',
        ),
    ]
    if not config.is_timms:
        return "\n\n".join([*blocks, f"timm does not know `{config.architecture}`: the encoder is udonlib's own."])
    said, head = ", whose unit feature is the embedding", ["embedding = normalize(features)"]
    if own.head == "student" and not own.head_hidden_dims:
        features = "normalize(features)" if own.normalise_features else "features"
        said = " and its linear head"
        head = [
            f'head = load_file("{HEAD}")',
            f'embedding = normalize({features} @ head["layers.0.weight"].T + head["layers.0.bias"])',
        ]
    elif own.head == "student":
        said, head = "", [f"# {HEAD} holds the head: an MLP, see udonlib.models.heads.Head"]
    return "\n\n".join(
        [
            *blocks,
            f"**timm alone**, for the encoder{said}:",
            _python(
                "import timm",
                "import torch",
                *(["from safetensors.torch import load_file"] if "load_file" in head[0] else []),
                "from torch.nn.functional import normalize",
                "",
                'encoder = timm.create_model("local-dir:.", pretrained=True).eval()  # this folder',
                f"size, mean, std = {config.image_size}, {config.pretrained_cfg.mean}, {config.pretrained_cfg.std}",
                "images = torch.rand(1, 3, size, size)  # values in 0..1",
                "with torch.no_grad():",
                "    features = encoder((images - torch.tensor(mean)[:, None, None]) / "
                "torch.tensor(std)[:, None, None])",
                *head,
            ),
            "timm's own transform smooths images as it shrinks them (antialiasing); training and evaluation did not.",
        ]
    )


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _made_of(facts: Facts) -> str:
    p, catalog = facts.params, facts.catalog
    sizes = ", ".join(
        f"{_escaped(d.name)} ({len(d.splits['train']):,} images, {d.n_classes:,} classes)" for d in catalog.domains
    )
    steps, images = facts.summary["steps"], facts.summary["images"]
    lines = [
        f"- **Data**: {catalog.name}, training images of {sizes}. Fingerprint of its splits: "
        f"`{catalog.fingerprint[:16]}`. {' '.join(catalog.notes)}".rstrip(),
        f"- **Recipe**: `{p.recipe}`, seed {p.seed}; {steps:,} steps of {p.batch_size} images ({images:,} in all); "
        f"best validation at step {facts.summary['best_step']:,}; precision {p.precision}.",
        f"- **Begun with**: {_begun_with(p)}.",
        f"- **Teachers**: {_teachers(p)}.",
        f"- **Trained** {str(facts.provenance.get('time', 'at an unknown time'))[:10]} with udonlib "
        f"{facts.provenance.get('version', '?')}, commit {str(facts.provenance.get('commit') or 'unknown')[:12]}, on "
        f"{facts.provenance.get('device', 'an unknown device')}.",
    ]
    values = p.model_dump(mode="json", exclude_defaults=True, exclude=NOT_SHOWN)
    changed = ", ".join(f"`{name}: {value}`" for name, value in values.items() if name not in ("recipe", "seed"))
    return "\n".join([*lines, f"- **Parameters** that differ from the paper's: {changed or 'none'}."])


def _begun_with(p: TrainParams) -> str:
    if p.weights is not None:
        return f"`{p.backbone}` with the weights of `{_file_of(p.weights)}`"
    return f"timm's weights of `{p.backbone}`" if p.pretrained else f"`{p.backbone}` from scratch"


def _teachers(p: TrainParams) -> str:
    if p.offline_teachers is not None:
        return f"specialists, one for each domain, trained before on the same data (`{p.offline_teachers}`)"
    if p.teachers:
        frozen = ", ".join(f"{name} ({_teacher(each)})" for name, each in p.teachers.items())
        how = "by their features and not by labels" if p.recipe == "unic" else "beside the labels"
        return f"frozen encoders, {how}: {frozen}"
    return "a head for each domain, trained together with the student" if p.has_teachers else "none"


def _teacher(teacher: TeacherParams) -> str:
    """What a frozen teacher is, without anybody's folders."""
    if teacher.run is not None:
        return f"run `{_file_of(teacher.run)}`"
    if teacher.onnx is not None:
        return f"`{_file_of(teacher.onnx)}`"
    return f"`{teacher.backbone}`" + (f" with the weights of `{_file_of(teacher.weights)}`" if teacher.weights else "")


def _file_of(path: str) -> str:
    """The last part of a path of either system."""
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _vectors(table: pd.DataFrame) -> str:
    lines = [
        "R@1 in the merged index, mean of the domains, and what is lost against float32: percent points, 95% intervals "
        "over queries, each compared with itself. Re-ranked: the first so many by small vectors are ordered by the "
        "float32 ones. Levels and medians come from images of the validation.",
        "",
        "| vectors | bytes | re-ranked | R@1 | lost | |",
        "|---|---|---|---|---|---|",
    ]
    for row in table.to_dict("records"):
        lost = f"{row['lost']:.2f} ({row['low']:.2f} to {row['high']:.2f})" if row["verdict"] else ""
        reranked = row["reranked"] or ""
        lines.append(
            f"| {row['vectors']} | {row['bytes']:g} | {reranked} | {row['r_at_1']:.2f} | {lost} | {row['verdict']} |"
        )
    hopeless = [
        f"{row['vectors']} {'re-ranked' if row['reranked'] else 'without re-ranking'}"
        for row in table.to_dict("records")
        if row["verdict"] == "hopeless"
    ]
    said = f"Hopeless for this model: {', '.join(hopeless)}." if hopeless else "None of these is hopeless."
    return "\n".join([*lines, "", said])


def _onnx(onnx: Mapping[str, Any]) -> str:
    return (
        f"Compared with PyTorch on all {onnx['n_images']:,} test images: embeddings differ by at most "
        f"{onnx['max_difference']:.1e}; the {onnx['k']} neighbours of {onnx['n_same']:,} of {onnx['n_queries']:,} "
        f"queries are the same in the same order, and of the other {onnx['n_ties']:,} they are but for neighbours "
        f"whose similarities differ by less than {onnx['tie']:.0e}. With the preprocessing, on {onnx['n_files']:,} "
        f"images of their own size and stretched: at most {onnx['files_max_difference']:.1e} (a pixel halfway between "
        "two values may be rounded otherwise on another processor)."
    )


def _licences(p: TrainParams, stated: Licences, of_encoder: str | None) -> str:
    frozen = "; ".join(f"{name}: {teacher.licence or NOT_STATED}" for name, teacher in p.teachers.items())
    rows = [
        ("this model", stated.model or NOT_STATED),
        ("the data", stated.data or (MINIUNED if p.data == "miniuned" else NOT_STATED)),
        ("the weights that it began with", stated.weights or _of_weights(p, of_encoder)),
        ("the teachers", stated.teachers or frozen or "none besides: they learned with it"),
        ("udonlib", "MIT"),
    ]
    return "\n".join(["| of | licence |", "|---|---|", *(f"| {of} | {text} |" for of, text in rows)])


def _of_weights(p: TrainParams, of_encoder: str | None) -> str:
    if p.weights is None:
        return (of_encoder or NOT_STATED) if p.pretrained else "none: from scratch"
    package = p.weights.replace("\\", "/").partition("/")[0]
    if package == "udonlib":
        return "MIT, as udonlib, which holds them"
    try:
        [name, *_] = packages_distributions().get(package, [package])
        about: Any = metadata(name)
    except PackageNotFoundError:
        return NOT_STATED
    found = (about.get("License-Expression") or about.get("License") or "UNKNOWN").splitlines()[0]
    return f"{NOT_STATED}; package {name} does not say" if found == "UNKNOWN" else f"{found} (package {name})"


def _limits(facts: Facts) -> str:
    names = ", ".join(_escaped(name) for name in facts.catalog.names)
    size = facts.config.image_size
    lines = [
        f"- Measured on {names} alone; what it finds in other images was not measured.",
        f"- It sees {size} x {size} pixels of an image's middle: what is smaller than a few of these, or at the end of "
        "a long side, it does not see.",
        "- Embeddings of different models, or of two releases, cannot be compared with each other.",
        "- Whatever bias the images have, it has. It was made to find similar things, not to tell people apart.",
        "- The interval of one run does not say how far another seed would land.",
    ]
    if facts.config.architecture in OWN:
        lines.append("- The encoder is one of udonlib's own; timm cannot load it.")
    return "\n".join(lines)


def _escaped(name: str) -> str:
    return name.replace("|", "\\|")
