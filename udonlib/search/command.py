"""`python -m udonlib embed FOLDER`, `index EMBEDDINGS` and `search INDEX IMAGE`: what they do and say."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from udonlib.errors import UserError, nearest
from udonlib.search.classify import NONE, calibrate
from udonlib.search.embed import Progress
from udonlib.search.find import open_finder
from udonlib.search.folders import read_embeddings
from udonlib.search.index import INDEX, Index, build_index, index_folder, open_index
from udonlib.search.kinds import told
from udonlib.search.load import load

# A context that shows progress: activity -> what it counts.
Shown = Callable[[dict[str, str]], AbstractContextManager[Progress]]


def embed(arguments: argparse.Namespace, shown: Shown) -> None:
    """Embed a folder, and say where its vectors are. Raises: UserError."""
    a = arguments
    model = load(a.model, precision=a.precision, device=a.device, outputs=a.outputs)
    with shown({"embedding": "images"}) as progress:
        found = model.embed(
            a.folder, batch_size=a.batch_size, on_bad_image=a.on_bad_image, progress=progress, name=a.name,
            overwrite=a.overwrite,
        )  # fmt: skip
    if found.folder is None:
        raise UserError(f"parameter 'folder': found the file '{a.folder}', expected a folder or zip of images")
    for image, problem in list(found.skipped.items())[:20]:
        print(f"left out: {image}: {problem}")
    print(f"{len(found):,} vectors of {found.model.dim} numbers by {found.model.name}: {found.folder}")


def index(arguments: argparse.Namespace, shown: Shown) -> None:
    """Build an index or bring it up to date, and say what was measured. Raises: UserError."""
    a = arguments
    embeddings = read_embeddings(a.embeddings, a.outputs)
    assert embeddings.folder is not None
    name = embeddings.folder.name if a.name == "auto" else a.name
    if (index_folder(name, a.outputs) / INDEX).exists():
        built = open_index(name, a.outputs)
        n_added, n_removed = built.update(embeddings)
        print(f"{n_added:,} images added, {n_removed:,} removed")
    else:
        limits: dict[str, Any] = {"max_ms": a.max_ms, "max_bytes": 1e6 * a.max_mb, "recall": a.recall}
        with shown({"indexing": "vectors"}) as progress:
            built = build_index(embeddings, a.kind, **limits, progress=progress)
        for measured in built.measured:
            print(f"{'chosen' if measured is built.measured[-1] else 'tried'}: {told(measured)}")
    _calibrate(built)
    print(f"{len(built):,} images: {built.save(name, a.outputs)}")


def _calibrate(index: Index) -> None:
    """Find the threshold of answers where there are labels enough, and say what it costs."""
    try:
        found = calibrate(index)
    except UserError as error:
        index.answers = {}
        print(f"no answers by class: {error}")
        return
    print(
        f"answers by class: of {found['n_checked']} images {found['answered']:.0%} are answered, {found['right']:.0%} "
        f"of these rightly; of unknown classes {found['false_labels']:.0%} are, the others are '{NONE}'"
    )


def search(arguments: argparse.Namespace, shown: Shown) -> None:
    """Show the most similar images, and the class of each query where it can be told. Raises: UserError."""
    a = arguments
    model = load(a.model, outputs=a.outputs) if a.model else None
    finder = open_finder(a.index, model, a.outputs)
    found = finder.search(a.images, a.k, _where(a.where, finder.index), "all")
    answers = finder.classify(a.images)["answer"].tolist() if finder.index.answers else []
    for number, image in enumerate(a.images):
        mine = found[found["query"] == image].drop(columns=["query", *({"hash"} & {*found})])
        print(f"{image}" + (f": {answers[number]}" if answers else ""))
        print(mine.to_string(index=False, float_format=lambda value: f"{value:.3f}"))


def _where(texts: list[str], index: Index) -> dict[str, list[Any]]:
    where: dict[str, list[Any]] = {}
    for text in texts:
        column, sign, value = text.partition("=")
        if not sign or column not in index.images:
            hint = nearest(column, map(str, index.images))
            raise UserError(f"parameter 'where': found {text!r}, expected COLUMN=VALUE; {hint}")
        values = {str(known): known for known in index.images[column].dropna().unique().tolist()}
        where.setdefault(column, []).append(values.get(value, value))
    return where
