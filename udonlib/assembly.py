"""Specialists put together: an oracle knows each query's domain, and its specialist answers.

| embedder | embeds a query | embeds the index |
|---|---|---|
| `specialist` | the specialist of its domain | that specialist too, all domains: like a teacher |
| `routed` | the specialist of its domain | the specialist of each image's own domain |

Both search the merged index. Not a universal embedding, but the anchor that one is measured against: as many models as
domains, and an oracle. Source: UnED (ICCV 2023) sec. 5, "specialist + oracle".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from udonlib.domains import load_catalog
from udonlib.errors import UserError
from udonlib.evaluation import Evaluation, evaluate, loading
from udonlib.images import ImageReader
from udonlib.models import EmbeddingModel
from udonlib.processors import dtype_of, pick_device
from udonlib.runs import Run

# What specialists must share: the images they see, where those come from, and the size of their embedding.
SHARED = ("data", "images", "image_size", "precision", "on_bad_image", "k", "student_dim")


def evaluate_assembly(
    specialists: Sequence[Run],
    subset: Literal["val", "test"] = "test",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate finished runs of one domain each on all their domains together.

    Args:
        specialists: one run for each domain, in any order.
        progress: called with (images done, images in all).

    Raises:
        UserError: a run that is not finished or trained on several domains, two of one domain, none at all, or runs
            that see different images.
    """
    runs = _by_domain(specialists)
    params = next(iter(runs.values())).params
    catalog = load_catalog(params.data, list(runs), params.images)
    device = pick_device(params.device)
    models = {domain: runs[domain].load_model().to(device) for domain in catalog.names}

    def embed(model: EmbeddingModel, images: Tensor) -> Tensor:
        return model.embed(images.to(device), dtype_of(params.precision, device))

    def embed_by_all(images: Tensor) -> Tensor:
        return torch.cat([embed(model, images) for model in models.values()], dim=1)

    def part(number: int, embeddings: Tensor) -> Tensor:
        return embeddings.unflatten(1, (len(models), -1))[:, number]

    reader = ImageReader(catalog, params.image_size, "eval", params.on_bad_image, params.cache_images)
    return evaluate(
        catalog,
        subset,
        loading(reader, params.n_workers),
        embed_by_all,
        {"specialist": {domain: partial(part, number) for number, domain in enumerate(catalog.names)}},
        {"routed": {domain: partial(embed, model) for domain, model in models.items()}},
        k=params.k,
        batch_size=params.eval_batch_size,
        progress=progress,
    )


def _by_domain(specialists: Sequence[Run]) -> Mapping[str, Run]:
    """Check that the runs can stand side by side."""
    if not specialists:
        raise UserError("an assembly needs at least one finished run of one domain; found none")
    runs: dict[str, Run] = {}
    first = specialists[0].params.model_dump(include=set(SHARED))
    for run in specialists:
        if run.status != "finished":
            raise UserError(f"run {run.path.name!r} is {run.status}; an assembly needs finished runs: train it first")
        if len(run.catalog.names) != 1:
            raise UserError(
                f"run {run.path.name!r} is trained on {', '.join(run.catalog.names)}; an assembly needs runs of one "
                "domain each"
            )
        [domain] = run.catalog.names
        if domain in runs:
            raise UserError(
                f"runs {runs[domain].path.name!r} and {run.path.name!r} are both of domain '{domain}'; an assembly "
                "needs one run for each domain"
            )
        values = run.params.model_dump(include=set(SHARED))
        differing = [name for name in SHARED if values[name] != first[name]]
        if differing:
            name = differing[0]
            raise UserError(
                f"runs {specialists[0].path.name!r} and {run.path.name!r} differ in {name}: {first[name]!r}, "
                f"{values[name]!r}; an assembly needs runs that share it"
            )
        runs[domain] = run
    return runs
