"""Embed the queries and index images of a catalog: every image read once, embedded once by every source, by chunks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from udonlib.data.catalog import Catalog, Domain, Split
from udonlib.data.images import ImageReader, WindowLoader

Embed = Callable[[UInt8[Tensor, "image 3 size size"]], Float[Tensor, "image dim"]]
EmbedByDomain = Mapping[str, Embed]  # each image goes to its own domain's
# load(domain, split, batches of positions in the split) gives for each batch its images and their positions: all of
# the batch but those of images that cannot be read.
# In place of images there may be whatever the sources take: descriptors that were made elsewhere.
Batch = tuple[Tensor, Sequence[int]]
Load = Callable[[str, str, Sequence[Sequence[int]]], Iterable[Batch]]
Made = tuple[list[int], dict[str, Tensor]]  # positions of images that could be read, and what each source makes of them


@runtime_checkable
class Helpers(Protocol):
    """Processes that read and embed for the first one, every so many batches: as the trainer's `World` does."""

    rank: int
    size: int

    def send(self, value: object) -> None:
        """Give the first process a value."""

    def receive(self, rank: int) -> Any:
        """The next value that a process has sent to us, the first."""


def loading(reader: ImageReader, n_workers: int = 0) -> Load:
    """Make a `Load` of a reader in mode "eval"; keep it for the next evaluation, so that its workers stay alive."""
    loaders: dict[str, WindowLoader] = {}

    def load(domain: str, split: str, batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
        if split not in loaders:
            loaders[split] = WindowLoader(reader, n_workers, split)
        plan = [np.asarray(batch) for batch in batches]
        for positions, (images, slots) in zip(plan, loaders[split]([[(domain, p)] for p in plan]), strict=True):
            readable = slots[0][1] == positions  # the loader shows another image in place of one that it cannot read
            yield images[torch.from_numpy(readable)], positions[readable].tolist()

    return load


def heeding(heed: Callable[[], None], load: Load) -> Load:
    """The same `Load`, which looks after each batch whether it is to be broken off: `heed` raises then."""

    def heeded(domain: str, split: str, batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
        for batch in load(domain, split, batches):
            heed()
            yield batch

    return heeded


def in_batches(
    load: Load, domain: str, split: str, positions: Sequence[int], size: int
) -> Iterator[tuple[Sequence[int], Sequence[int], Tensor]]:
    """Yield the positions of each batch of images of a split, those that could be read, and the images of these."""
    batches = [positions[i : i + size] for i in range(0, len(positions), size)]
    for batch, (images, read) in zip(batches, load(domain, split, batches) if batches else (), strict=True):
        yield batch, read, images


def pixels(images: UInt8[Tensor, "image 3 size size"]) -> Float[Tensor, "image 768"]:
    """Embed an image as its own small picture: mean over a 16 x 16 grid, its mean value removed, to unit norm.

    The baseline that learns nothing. Removing the mean makes it blind to overall brightness. Flat images become 0.
    """
    small = F.adaptive_avg_pool2d(images.float(), 16).flatten(1)
    return F.normalize(small - small.mean(dim=1, keepdim=True), dim=1)


@dataclass(frozen=True, eq=False)
class Images:
    """Readable images of one split of a domain, and what each source makes of them."""

    number: int  # of the domain
    domain: Domain
    split: Split
    kept: list[int]  # positions in the split, rising
    outputs: dict[str, Tensor]
    in_index: Int64[Tensor, "image"]  # positions in the merged index; -1 for a query that is not there


class Reading:
    """Reads and embeds every image once, and knows which failed and where each domain begins in the merged index."""

    def __init__(
        self,
        catalog: Catalog,
        subset: Literal["val", "test"],
        load: Load,
        sources: Mapping[str, Embed | EmbedByDomain],
        batch_size: int,
        progress: Callable[[int, int], None] | None,
        helpers: Helpers | None = None,
    ) -> None:
        self.helpers, self._n_batches = helpers, 0
        self.catalog, self.subset, self.load, self.sources = catalog, subset, load, sources
        self.batch_size, self.progress = batch_size, progress
        self.starts = np.cumsum([0, *(len(domain.index(subset)) for domain in catalog.domains)])
        self.readable = np.zeros(self.starts[-1], dtype=bool)
        self.skipped: list[tuple[str, str, str]] = []
        self.n_done = 0
        self.n_images = sum(len({*d.queries(subset).paths, *d.index(subset).paths}) for d in catalog.domains)
        self.row_of_query: dict[str, dict[str, int]] = {}  # domain -> path -> row among the kept; -1: unreadable

    def _embed(self, domain: Domain, split: Split, positions: list[int]) -> Made:
        """Embed images at these positions; batches of the whole reading go to the processes in turn.

        Batches are those of one process alone, and so are the vectors. Only the first process has them in the end.
        """
        rank, n = (self.helpers.rank, self.helpers.size) if self.helpers else (0, 1)
        batches = [positions[i : i + self.batch_size] for i in range(0, len(positions), self.batch_size)]
        owners = [(self._n_batches + number) % n for number in range(len(batches))]
        self._n_batches += len(batches)
        ours = [batch for batch, owner in zip(batches, owners, strict=True) if owner == rank]
        loaded = iter(self.load(domain.name, split.name, ours) if ours else ())
        kept: list[int] = []
        outputs: dict[str, Tensor] = {}
        for batch, owner in zip(batches, owners, strict=True):
            if owner == rank:
                read, made = self._make(domain, *next(loaded))
            elif rank == 0 and self.helpers:
                read, sent = self.helpers.receive(owner)
                made = {name: output.to(device) for name, (device, output) in sent.items()}
            if rank > 0 and self.helpers:
                if owner == rank:
                    self.helpers.send((read, {name: (made[name].device.type, made[name].cpu()) for name in made}))
                continue
            for name, output in made.items():
                if name not in outputs:
                    outputs[name] = output.new_empty((len(positions), output.shape[1]))
                outputs[name][len(kept) : len(kept) + len(read)] = output
            kept += read
            unread = set(batch).difference(read)
            self.skipped += [(domain.name, split.name, split.paths[i]) for i in batch if i in unread]
            self.n_done += len(batch)
            if self.progress:
                self.progress(self.n_done, self.n_images)
        for _ in loaded:  # to its end, so that it is not left open
            pass
        return kept, {name: whole[: len(kept)] for name, whole in outputs.items()}

    def _make(self, domain: Domain, images: Tensor, read: Sequence[int]) -> Made:
        """What the sources make of the images of a batch."""
        sources = self.sources.items() if len(read) else ()
        return list(read), {
            name: (source[domain.name] if isinstance(source, Mapping) else source)(images) for name, source in sources
        }

    def help(self, size: int) -> None:
        """Read and embed this process's share of what the first one does: `queries` of all domains, then `index`."""
        domains = self.catalog.domains
        for domain in domains:
            split = domain.queries(self.subset)
            self._embed(domain, split, list(range(len(split))))
        for domain in domains:
            index, known = domain.index(self.subset), {*domain.queries(self.subset).paths}
            for start in range(0, len(index), size):
                positions = range(start, min(start + size, len(index)))
                self._embed(domain, index, [i for i in positions if index.paths[i] not in known])

    def queries(self, number: int) -> Images:
        """Embed the queries of a domain."""
        domain = self.catalog.domains[number]
        split, index = domain.queries(self.subset), domain.index(self.subset)
        kept, outputs = self._embed(domain, split, list(range(len(split))))
        if not kept:
            raise ValueError(f"domain '{domain.name}': none of the {len(split)} images of '{split.name}' can be read")
        rows = {split.paths[i]: row for row, i in enumerate(kept)}
        self.row_of_query[domain.name] = dict.fromkeys(split.paths, -1) | rows
        place = {path: i for i, path in enumerate(index.paths, start=int(self.starts[number])) if path in rows}
        in_index = torch.tensor([place.get(split.paths[i], -1) for i in kept])
        return Images(number, domain, split, kept, outputs, in_index)

    def index(self, queries: Sequence[Images], size: int) -> Iterator[list[Images]]:
        """Embed the merged index and yield it in pieces of about `size` images: parts of one domain each, in order."""
        held: list[Images] = []
        for of_domain in queries:
            for start in range(0, len(of_domain.domain.index(self.subset)), size):
                held.append(self._part(of_domain, start, size))
                if sum(len(images.kept) for images in held) >= size:
                    yield held
                    held = []
        if held:
            yield held

    def _part(self, queries: Images, start: int, size: int) -> Images:
        """Embed some index images of a domain; those that are queries as well are taken from there."""
        split = queries.domain.index(self.subset)
        rows = self.row_of_query[queries.domain.name]
        positions = range(start, min(start + size, len(split)))
        fresh, made = self._embed(queries.domain, split, [i for i in positions if split.paths[i] not in rows])
        known = [i for i in positions if rows.get(split.paths[i], -1) >= 0]
        taken = [rows[split.paths[i]] for i in known]
        order = np.argsort([*fresh, *known])
        outputs = {}
        for name, of_queries in queries.outputs.items():
            both = torch.cat([made[name], of_queries[taken]]) if fresh else of_queries[taken]
            outputs[name] = both[order]
        kept = sorted([*fresh, *known])
        in_index = torch.tensor(kept, dtype=torch.int64) + int(self.starts[queries.number])
        self.readable[in_index.numpy()] = True
        return Images(queries.number, queries.domain, split, kept, outputs, in_index)


def n_evaluated(catalog: Catalog, subset: Literal["val", "test"]) -> int:
    """Images that an evaluation embeds: queries and index, each once."""
    return sum(len({*d.queries(subset).paths, *d.index(subset).paths}) for d in catalog.domains)
