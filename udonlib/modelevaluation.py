"""A model of ours, evaluated with all its heads, and the files of it that a run keeps."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from udonlib.domains import Catalog
from udonlib.embedding import Embed, Load, pixels
from udonlib.evaluation import Evaluation, Head, evaluate
from udonlib.evaluationfiles import save_neighbours, save_outcomes, save_table
from udonlib.models import EmbeddingModel
from udonlib.params import TrainParams
from udonlib.processors import dtype_of


def evaluate_model(
    model: EmbeddingModel,
    catalog: Catalog,
    params: TrainParams,
    subset: Literal["val", "test"],
    load: Load,
    untrained: EmbeddingModel | None = None,
) -> Evaluation:
    """Evaluate student and teachers; beside an untrained model, baselines and shorter embeddings as well.

    The model is left in evaluation mode.
    """
    model.eval()
    device = next(model.parameters()).device
    precision = dtype_of(params.precision, device)

    def features(network: EmbeddingModel, images: Tensor) -> Tensor:
        return network.features(images.to(device), precision)

    heads: dict[str, Head | Mapping[str, Head]] = {"student": model.student}
    if len(model.teachers):
        heads["teacher"] = dict(model.teachers.items())
    baselines: dict[str, Embed] = {}
    if untrained is not None:
        untrained.eval()
        heads |= {f"student_{dim}": partial(model.short_embedding, dim) for dim in params.nested_dims}
        baselines = {
            "features": lambda images: torch.nn.functional.normalize(features(untrained, images), dim=1),
            "pixels": pixels,
        }
    batch_size, embed = params.eval_batch_size, partial(features, model)
    return evaluate(catalog, subset, load, embed, heads, baselines, k=params.k, batch_size=batch_size)


def save_evaluation(evaluation: Evaluation, folder: Path, seed: int) -> pd.DataFrame:
    """Write the table with its intervals, the outcome of every query, and the neighbours in the merged index.

    Args:
        evaluation: on the test queries.
        folder: of the run.
        seed: of the bootstrap.

    Returns:
        The table.
    """
    table = evaluation.with_intervals(seed)
    save_table(table, folder)
    save_outcomes(evaluation.outcomes, folder / "outcomes.csv.gz")
    searched = [found for found in evaluation.neighbours.values() if found.embedder in ("student", "teacher")]
    save_neighbours(searched, folder / "neighbours.npz")
    return table
