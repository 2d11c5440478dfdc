"""Evaluate frozen encoders side by side: retrieval, classification and dense tasks, from one pass over the images.

    load = loading(ImageReader(catalog, 48, "eval"))
    encoders = {"student": model_encoder(model), "a": teacher_a, "b": teacher_b}
    scores = evaluate_encoders(encoders, catalog, load, teachers=("a", "b"))
    scores.table()
    relative_to_best(scores, ["student"], ["a", "b"])

`evaluation.frozen.tasks` and `evaluation.frozen.dense` say what the tasks are. Source: UNIC (ECCV 2024) sec. 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import UInt8
from threadpoolctl import threadpool_limits
from torch import Tensor

from udonlib.data.catalog import Catalog, Domain
from udonlib.errors import UserError
from udonlib.evaluation.files import load_outcomes, save_outcomes
from udonlib.evaluation.frozen.dense import Masked, draw_masked, figure_probe, grid_side
from udonlib.evaluation.frozen.tasks import (
    HEADLINES,
    ClassTokens,
    Dealt,
    classification,
    deal_images,
    retrieval,
    scored,
    together,
)
from udonlib.evaluation.reading import Load, in_batches
from udonlib.models.embedding_model import EmbeddingModel
from udonlib.models.heads import unit
from udonlib.models.ladder import Tokens, resample
from udonlib.models.processors import lone_threads

# Images to tokens: class [batch, dim], and patches [batch, position, dim] where it has them. It moves images to its own
# device. A `models.teachers.Teacher` is one as it is.
Encoder = Callable[[UInt8[Tensor, "image 3 size size"]], Tokens]
TOGETHER = "all teachers"
SCORES = "encoder_scores.csv.gz"
Progress = Callable[[str, int, int], None]  # what is done ("images", "probes"), how much of it, of how much


def model_encoder(model: EmbeddingModel, precision: torch.dtype = torch.float32, patches: bool = True) -> Encoder:
    """A model of ours as an encoder: its universal embedding as class token, beside the patches of its backbone's end.

    It is left in evaluation mode.

    Args:
        patches: False for a backbone that has none in the end.
    """

    @torch.no_grad()
    def encode(images: UInt8[Tensor, "image 3 size size"]) -> Tokens:
        model.eval()
        images = images.to(next(model.parameters()).device)
        if not patches:
            return {"class": model.embed(images, precision)}
        [end] = model.tokens(images, end=True, precision=precision)
        return {"class": model.student(model.scaled(end["class"].float())), "patches": end["patches"].float()}

    return encode


@dataclass(frozen=True, eq=False)
class EncoderScores:
    """What `evaluate_encoders` found.

    outcomes: one row per encoder, task, metric and query or image: encoder, group ("retrieval", "classification",
        "dense"), domain, metric, path, score in 0..1. A task is a domain of a group; its headline metric is that of
        HEADLINES.
    skipped: images that could not be read and took no part: domain, split, path.
    """

    outcomes: pd.DataFrame
    skipped: pd.DataFrame

    def table(self) -> pd.DataFrame:
        """Means in percent: a row per group, metric and encoder, a column per domain, and their mean.

        NaN where a domain has no such task, or the encoder no such tokens.
        """
        keys = ["group", "metric", "encoder"]
        rows = self.outcomes.pivot_table("score", keys, "domain", aggfunc="mean", sort=False, observed=True) * 100
        domains = [name for name in dict.fromkeys(self.outcomes["domain"]) if name in rows]
        rows = rows[domains].assign(mean=rows.mean(axis=1))
        rows.columns.name = None
        order = {name: i for column in keys for i, name in enumerate(dict.fromkeys(self.outcomes[column]))}
        return rows.reset_index().sort_values(keys, key=lambda names: names.map(order), ignore_index=True)

    def save(self, folder: Path) -> None:
        """Write the outcomes, the same bytes for the same ones; `load` reads them."""
        save_outcomes(self.outcomes, folder / SCORES)

    @classmethod
    def load(cls, folder: Path) -> EncoderScores:
        """Read what `save` wrote; which images were skipped is not kept.

        Raises:
            UserError: "<file>: missing" or "damaged: ...".
        """
        return cls(load_outcomes(folder / SCORES), pd.DataFrame(columns=["domain", "split", "path"]))


# Products are small here: with two threads, the classifiers of MiniUnED's tasks take three times as long as with one.
@threadpool_limits.wrap(limits=1, user_api="blas")
@torch.no_grad()
def evaluate_encoders(
    encoders: Mapping[str, Encoder],
    catalog: Catalog,
    load: Load,
    *,
    teachers: Sequence[str] = (),
    seed: int = 0,
    n_dense: int = 200,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> EncoderScores:
    """Score every encoder on every task, and where there are two teachers or more, all of them together.

    Every encoder sees every image once: the test queries and their index, and up to n_dense training images of each
    domain that has masks. `together` says what all teachers together are; their patches meet on the finest grid among
    them. An encoder without patches has no dense task; of one without a class token the mean over its patches is taken.

    Memory: test images x (sum of the widths of class tokens) floats, and patch tokens of one domain at a time, for
    every encoder 2 n_dense x positions x width floats.

    Args:
        encoders: by name.
        catalog: with test and, for the dense task, train splits.
        load: reads images: `loading(reader)`; all encoders see the same pixels.
        teachers: names of those that are teachers.
        seed: of what is drawn: images of the dense task, which images are labelled, which are held out.
        n_dense: images of a domain's train and test split that the dense task draws.
        batch_size: images per call of an encoder.
        progress: called with what is done, how much of it, of how much.

    Raises:
        UserError: a teacher that is no encoder; tokens that are not finite; patches of no square; a name that is taken.
    """
    for name in teachers:
        if name not in encoders:
            raise UserError(f"teacher '{name}' is none of the encoders: {', '.join(encoders) or 'there are none'}")
    if not encoders or TOGETHER in encoders:
        raise UserError(f"encoders: found {', '.join(encoders) or 'none'}; expected one or more, none '{TOGETHER}'")
    masked = {d.name: _masked(catalog, d, n_dense, seed) for d in catalog.domains}
    reading = _Pass(encoders, load, batch_size, progress, _n_images(catalog, masked))
    tokens: dict[str, ClassTokens] = {}
    dense: list[pd.DataFrame] = []
    for domain in catalog.domains:
        tokens[domain.name], patches = _read(reading, domain, masked[domain.name])
        if len(teachers) > 1:
            tokens[domain.name].vectors[TOGETHER] = together([tokens[domain.name].vectors[name] for name in teachers])
        if masked[domain.name]:
            dense += _dense(domain, masked[domain.name], patches, teachers, seed)
    names = [*encoders, *([TOGETHER] if len(teachers) > 1 else [])]
    found = list(retrieval(catalog, tokens, names))
    dealt = {domain.name: deal_images(domain, tokens[domain.name].rows, seed) for domain in catalog.domains}
    tasks = [(name, images, encoder) for name, images in dealt.items() if images is not None for encoder in names]

    def classify(task: tuple[str, Dealt, str]) -> list[pd.DataFrame]:
        name, images, encoder = task
        return list(classification(name, images, {encoder: tokens[name].vectors[encoder]}, seed))

    with lone_threads(torch.get_num_threads(), "udonlib-probes") as pool:
        for n, tables in enumerate(pool.map(classify, tasks), 1):
            found += tables
            if progress:
                progress("probes", n, len(tasks))
    skipped = pd.DataFrame(reading.skipped, columns=["domain", "split", "path"])
    return EncoderScores(pd.concat([*found, *dense], ignore_index=True), skipped)


def _masked(catalog: Catalog, domain: Domain, n: int, seed: int) -> dict[str, Masked]:
    """Images of the dense task by split; none where a split has fewer than two."""
    if "train" not in domain.splits or not n:
        return {}
    generator = np.random.default_rng(seed)
    drawn = {split: draw_masked(catalog, domain, split, n, generator) for split in ("train", "test")}
    return drawn if min(len(of_split.positions) for of_split in drawn.values()) >= 2 else {}


def _n_images(catalog: Catalog, masked: Mapping[str, Mapping[str, Masked]]) -> int:
    n_test = sum(len({*d.queries("test").paths, *d.index("test").paths}) for d in catalog.domains)
    return n_test + sum(len(of_domain["train"].positions) for of_domain in masked.values() if of_domain)


class _Pass:
    """Shows images to every encoder, and keeps class tokens of all, patch tokens of those asked for."""

    def __init__(
        self, encoders: Mapping[str, Encoder], load: Load, batch_size: int, progress: Progress | None, n_images: int
    ) -> None:
        self.encoders, self.load, self.batch_size = encoders, load, batch_size
        self.progress, self.n_images, self.n_done = progress, n_images, 0
        self.skipped: list[tuple[str, str, str]] = []

    def __call__(
        self, domain: Domain, split: str, positions: Sequence[int], with_patches: Sequence[int]
    ) -> tuple[list[int], dict[str, Tensor], list[int], dict[str, Tensor]]:
        """Positions read and their class tokens by encoder; those of `with_patches` read, and their patch tokens."""
        wanted, paths = set(with_patches), domain.splits[split].paths
        kept: list[int] = []
        of_class: dict[str, list[Tensor]] = {name: [] for name in self.encoders}
        of_patches: dict[str, list[Tensor]] = {name: [] for name in self.encoders}
        for batch, read, images in in_batches(self.load, domain.name, split, positions, self.batch_size):
            chosen = torch.tensor([i for i, position in enumerate(read) if position in wanted], dtype=torch.int64)
            for name, encoder in self.encoders.items() if len(read) else ():
                said = encoder(images)
                of_image = said["class"] if "class" in said else said["patches"].mean(dim=1)
                of_class[name].append(self._checked(name, of_image))
                if len(chosen) and "patches" in said:
                    of_patches[name].append(self._checked(name, said["patches"][chosen.to(said["patches"].device)]))
            kept += read
            self.skipped += [(domain.name, split, paths[i]) for i in batch if i not in set(read)]
            self.n_done += len(batch)
            if self.progress:
                self.progress("images", self.n_done, self.n_images)
        whole = {name: torch.cat(parts) for name, parts in of_class.items() if parts}
        patches = {name: torch.cat(parts) for name, parts in of_patches.items() if parts}
        return kept, whole, [position for position in kept if position in wanted], patches

    @staticmethod
    def _checked(name: str, tokens: Tensor) -> Tensor:
        tokens = tokens.detach().float().cpu()
        if not tokens.isfinite().all():
            n = int((~tokens.isfinite().flatten(1).all(1)).sum())
            raise UserError(f"encoder '{name}': its tokens of {n} of {len(tokens)} images are not finite")
        return tokens


def _read(
    reading: _Pass, domain: Domain, masked: Mapping[str, Masked]
) -> tuple[ClassTokens, dict[str, tuple[list[int], dict[str, Tensor]]]]:
    """Class tokens of a domain's queries and index; by split, positions and patch tokens of the dense task's images."""
    queries, index = domain.queries("test"), domain.index("test")
    patches = {}
    if masked:
        train = masked["train"].positions
        *_, read, of_train = reading(domain, "train", train, train)
        patches["train"] = (read, of_train)
    sample = masked["test"].positions if masked else []
    kept, vectors, read, of_test = reading(domain, queries.name, range(len(queries)), sample)
    patches["test"] = (read, of_test)
    paths = [queries.paths[i] for i in kept]
    if index is not queries:
        known = set(queries.paths)
        others = [i for i, path in enumerate(index.paths) if path not in known]
        kept, more, *_ = reading(domain, index.name, others, ())
        paths += [index.paths[i] for i in kept]
        vectors = {name: torch.cat([v[name] for v in (vectors, more) if name in v]) for name in vectors or more}
    rows = {path: row for row, path in enumerate(paths)}
    return ClassTokens(rows, {name: unit(of_all) for name, of_all in vectors.items()}), patches


def _dense(
    domain: Domain,
    masked: Mapping[str, Masked],
    patches: Mapping[str, tuple[list[int], dict[str, Tensor]]],
    teachers: Sequence[str],
    seed: int,
) -> Iterator[pd.DataFrame]:
    masks, tokens = {}, {}
    for split, (read, of_split) in patches.items():
        row = {position: i for i, position in enumerate(masked[split].positions)}
        masks[split] = masked[split].masks[[row[position] for position in read]]
        for name, of_encoder in of_split.items():
            grid_side(of_encoder.shape[1], name)
        tokens[split] = dict(of_split)
    if min(map(len, masks.values())) < 2:
        return
    names = [name for name in tokens["train"] if name in tokens["test"]]
    those = [name for name in teachers if name in names]
    if len(those) > 1:
        finest = max(tokens["train"][name].shape[1] for name in those)
        for of_split in tokens.values():
            of_split[TOGETHER] = together([resample(unit(of_split[name]), finest) for name in those])
        names.append(TOGETHER)
    paths = [domain.splits["test"].paths[i] for i in patches["test"][0]]
    for name in names:
        probe = figure_probe(tokens["train"][name], masks["train"], seed)
        score = probe.score(tokens["test"][name], masks["test"])
        yield scored(name, "dense", domain.name, HEADLINES["dense"], paths, score)
