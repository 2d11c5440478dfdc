"""Release a finished run: a folder that is written whole, after its parts were compared with each other, or not at all.

released = release(load_run("latest"))
released.folder, released.metrics
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from udonlib.data.catalog import Catalog
from udonlib.data.decoding import decode, prepare_eval
from udonlib.data.images import ImageReader
from udonlib.errors import UserError
from udonlib.evaluation.reading import Embed, loading
from udonlib.files import replacing_together, results_folder, write_json, write_text
from udonlib.models.embedding_model import EmbeddingModel
from udonlib.models.processors import pick_device
from udonlib.release import quantised
from udonlib.release.card import UNSTATED, Facts, Licences, card
from udonlib.release.folder import (
    CARD,
    CONFIG,
    FILES,
    METRICS,
    ONNX,
    ReleaseConfig,
    ReleasedModel,
    config_of,
    load_release,
    read_config,
    sha256,
    write_config,
    write_weights,
)
from udonlib.release.onnx_export import OnnxEmbedder, check_packages, export
from udonlib.release.testset import TestSet, embed_test
from udonlib.runs.run import Run
from udonlib.training.threads import use_threads

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much

K = 10  # neighbours that are compared
MAX_DIFFERENCE = 1e-5  # of a value of an embedding of prepared images
MAX_FILES_DIFFERENCE = 1e-2  # of images of any size: other processors may round a pixel the other way
TIE = 1e-6  # similarities of two neighbours that may change places
N_FILES = 200  # images that are compared as they are in their files, and stretched


@dataclass(frozen=True, eq=False)
class Released:
    """A release: where it is, its config, and what metrics.json says."""

    folder: Path
    config: ReleaseConfig
    metrics: dict[str, Any]


def release(
    run: Run,
    folder: Path | None = None,
    licences: Licences = UNSTATED,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Released:
    """Write the release of a finished run, its best model.

    Args:
        folder: where; None: <results>/releases/<run>.
        licences: what a person states; the card says what is not.
        overwrite: replace the release of another run there.
        progress: called with what is done ("exporting", "embedding", ...), how much of it, of how much.

    Raises:
        UserError: the run is not finished, or its data is missing or has changed; packages that are missing; a folder
            that holds something else; an ONNX file that does not find what the model finds, with the figures.
    """
    report = progress or (lambda what, done, total: None)
    name, p = run.path.name, run.params
    if run.status != "finished":
        raise UserError(f"run {name!r} is not finished: {run.state().text}; a release holds the figures of its test")
    check_packages()
    folder = folder or results_folder(p.outputs) / "releases" / name
    _refuse_others(folder, name, overwrite)
    use_threads(p.n_threads)
    catalog, model, summary = run.catalog, run.load_model(), run.summary()
    starts = run.provenance()
    if starts and starts[0]["data_fingerprint"] != catalog.fingerprint:
        raise UserError(f"run {name!r}: the data at {p.data!r} has changed since it began; restore it first")
    config = config_of(model, p, name, catalog.names)
    with replacing_together(folder, FILES) as fresh:
        write_weights(fresh, model)
        report("exporting", 0, 1)
        export(model, p.image_size, fresh / ONNX)
        report("exporting", 1, 1)
        write_config(fresh, config)
        embedder = OnnxEmbedder(fresh / ONNX, torch.get_num_threads())
        released = load_release(fresh)  # what others will load is what is measured
        tested, calibration = _embedded(run, released, embedder, report)
        onnx = compare(tested) | compare_files(released, embedder, catalog)
        report("comparing", 1, 2)
        vectors = quantised.measure(tested, "torch", calibration, p.nested_dims, p.seed)
        report("comparing", 2, 2)
        table = run.evaluation()
        metrics = {
            "release": {"name": name, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "best_pt": sha256(run.best)},
            "run": summary,
            "data": {"name": catalog.name, "fingerprint": catalog.fingerprint},
            "evaluation": json.loads(table.to_json(orient="records")),
            "onnx": onnx,
            "vectors": json.loads(vectors.to_json(orient="records")),
        }
        write_json(fresh / METRICS, metrics)
        known = getattr(model.backbone.encoder, "pretrained_cfg", None) or {}
        licence = known.get("license") if isinstance(known, Mapping) else getattr(known, "license", None)
        facts = Facts(config, p, catalog, table, vectors, onnx, summary, starts[0] if starts else {}, licence)
        write_text(fresh / CARD, card(facts, licences))
        config = write_config(fresh, config)
    return Released(folder, config, metrics)


def _refuse_others(folder: Path, name: str, overwrite: bool) -> None:
    """Refuse to replace what is not this run's release, unless it may be; other people's files never go."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file, expected a folder for the release")
    there = [file for file in FILES if (folder / file).exists()]
    if not there or overwrite:
        return
    other = "something that is no release of udonlib's"
    if (folder / CONFIG).exists():
        try:
            other = f"the release of run {read_config(folder).udonlib.name!r}"
        except UserError:
            other = "a release that is damaged"
    if other != f"the release of run {name!r}":
        raise UserError(f"{folder}: holds {other}; choose another folder, or replace it (--overwrite)")


def _embedded(run: Run, model: EmbeddingModel, onnx: OnnxEmbedder, report: Progress) -> tuple[TestSet, Tensor]:
    """The test set by both programs, and the model's embeddings of the validation's index, for calibration."""
    p, device = run.params, pick_device(run.params.device)
    model.to(device)

    def by_torch(images: UInt8[Tensor, "image 3 size size"]) -> Tensor:
        return model.embed(images.to(device)).cpu()

    load = loading(ImageReader(run.catalog, p.image_size, "eval", p.on_bad_image, p.cache_images), p.n_workers)
    embed = partial(embed_test, run.catalog, load, batch_size=p.eval_batch_size)
    try:
        tested = embed({"torch": by_torch, "onnx": onnx}, progress=partial(report, "embedding"))
        held_out = embed({"torch": by_torch}, subset="val", progress=partial(report, "calibrating"))
    finally:
        model.to("cpu")
    return tested, held_out.index["torch"]


def compare(test: TestSet, k: int = K) -> dict[str, Any]:
    """Hold what onnxruntime finds against what PyTorch finds, embeddings and neighbours of every query.

    Two neighbours whose similarities differ by less than TIE may have changed places: no two programs round alike.

    Args:
        test: embedded as "torch" and as "onnx".

    Returns:
        n_images, max_difference (of a value), n_queries, k, n_same (queries with the same list), n_ties (with one that
        differs in ties alone), tie.

    Raises:
        UserError: they differ, with the figures.
    """
    (queries, index), (others, other_index) = ((test.queries[n], test.index[n]) for n in ("torch", "onnx"))
    pairs = ((queries, others), (index, other_index))
    difference = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    similarities, ours = test.neighbours(queries, index, k)
    _, theirs = test.neighbours(others, other_index, k)
    differing = (ours != theirs).any(dim=1).nonzero()[:, 0]
    a, b = queries[differing].double(), index[theirs[differing].clamp(min=0)].double()
    gaps = (torch.einsum("qd,qkd->qk", a, b) - similarities[differing]).abs()
    gaps = torch.where(ours[differing] == theirs[differing], torch.zeros_like(gaps), gaps)
    n_ties = int((gaps <= TIE).all(dim=1).sum())
    n_wrong = len(differing) - n_ties
    if not difference <= MAX_DIFFERENCE or n_wrong:
        raise UserError(
            f"the ONNX file is not the model: embeddings differ by up to {difference:.2g} (at most {MAX_DIFFERENCE:g} "
            f"is let through), and {n_wrong:,} of {len(ours):,} queries have other neighbours; nothing was released"
        )
    return {
        "n_images": len(index) + int((test.itself < 0).sum()),
        "max_difference": difference,
        "n_queries": len(ours),
        "k": k,
        "n_same": len(ours) - len(differing),
        "n_ties": n_ties,
        "tie": TIE,
    }


def _prepared(image: Image.Image, size: int) -> UInt8[Tensor, "3 size size"]:
    """The image as a loader's worker prepares it, with one thread: with more, PyTorch rounds a few pixels otherwise."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return prepare_eval(image, size)
    finally:
        torch.set_num_threads(n_threads)


def compare_files(model: ReleasedModel, onnx: Embed, catalog: Catalog, n: int = N_FILES) -> dict[str, Any]:
    """Hold the graph's preprocessing against ours, on test images of their own size and stretched to odd ones.

    Returns: n_files, files_max_difference (of a value of an embedding).

    Raises:
        UserError: they differ, with the figure.
    """
    size = model.config.image_size
    paths = [path for domain in catalog.domains for path in domain.queries("test").paths]
    difference, n_compared = 0.0, 0
    for number, path in enumerate(paths[:: max(1, len(paths) // n)][:n]):
        try:
            image = decode(catalog.store.read(path), path)
        except UserError:  # a run that skips bad images has been tested without it, too
            continue
        if number % 2:
            image = image.resize((image.width + 17 * (number % 5), image.height + 13 * (number % 7)))
        raw = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        with torch.no_grad():
            expected = model.embed(_prepared(image, size)[None])
        difference = max(difference, float((onnx(raw) - expected).abs().max()))
        n_compared += 1
    if not difference <= MAX_FILES_DIFFERENCE:
        raise UserError(
            f"the ONNX file does not prepare images as the evaluation does: embeddings differ by up to "
            f"{difference:.2g} (at most {MAX_FILES_DIFFERENCE:g} is let through); nothing was released"
        )
    return {"n_files": n_compared, "files_max_difference": difference}
