"""Very many classes: each process holds the prototypes of a part of them, and a step may look at a sample of those.

C classes of d dimensions take 16 C d bytes: weights, gradients, two moments. Where several processes train, each can
hold a slice of the classes. The rows of a batch are in every process anyway, so each computes their cosines to its own
classes, and what it tells the others is a number or two for each image:

    log sum_c exp z_c = log sum_r exp(log sum_{c of process r} exp z_c)

Softmax, margins and distillation are then those over all classes, forward and backward, to rounding; the gradients of
prototypes need not be summed at all, which is most of what would be sent. A checkpoint holds all classes, so a run may
go on with another number of processes.

A sample is every class of the batch's images and some of the others, drawn anew in each step, each standing for as many
as were not drawn:

    sum_c exp z_c  ~  sum_{c own} exp z_c + (n_others / n_drawn) sum_{c drawn} exp z_c

Source of the idea: PartialFC (An et al., 2021), which leaves the factor out. The sum is unbiased, its logarithm too low
by about half its relative variance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from udonlib.models.embedding_model import EmbeddingModel
from udonlib.models.heads import ByDomain
from udonlib.training.parallel.world import ONE, World

KINDS = ("student_prototypes", "teacher_prototypes")


@dataclass(frozen=True)
class Columns:
    """The classes that the columns of cosines stand for.

    Args:
        n_classes: of all columns, whoever holds them.
        first: the first class that this process holds.
        n_here: how many it holds, one after another; None: all.
        sample: which of these have a column, rising; None: all.
        log_counts: for each column, also of other domains beside these, the logarithm of the number of classes it
            stands for; None: of one each.
        world: the processes whose columns together are all classes.
    """

    n_classes: int
    first: int = 0
    n_here: int | None = None
    sample: Int[Tensor, "columns"] | None = None
    log_counts: Float[Tensor, "_"] | None = None
    world: World = ONE

    @property
    def are_all(self) -> bool:
        """Whether each class has its column here."""
        return self.world.size == 1 and self.sample is None

    def of(self, prototypes: Float[Tensor, "here dim"]) -> Float[Tensor, "columns dim"]:
        """The rows of the columns' classes, from those that this process holds."""
        return prototypes if self.sample is None else prototypes[self.sample]

    def of_all(self, prototypes: Float[Tensor, "classes dim"]) -> Float[Tensor, "columns dim"]:
        """The same from the rows of all classes, for a head that every process holds whole."""
        stop = None if self.n_here is None else self.first + self.n_here
        return self.of(prototypes[self.first : stop])

    def beside(self, others: Iterable[Columns]) -> Columns:
        """These columns and, after them, those of other domains, to which no image of this one belongs."""
        everything = [self, *others]
        counts = [columns.log_counts for columns in everything if columns.log_counts is not None]
        n_classes = sum(columns.n_classes for columns in everything)
        return replace(self, n_classes=n_classes, log_counts=torch.cat(counts) if counts else None)

    def place(self, labels: Int[Tensor, "batch"]) -> tuple[Int[Tensor, "_"], Int[Tensor, "_"]]:
        """The images whose class has its column here, and these columns."""
        rows = torch.arange(len(labels), device=labels.device)
        if self.n_here is None or self.are_all:
            return rows, labels
        here = labels - self.first
        inside = (here >= 0) & (here < self.n_here)
        rows, here = rows[inside], here[inside]
        return rows, here if self.sample is None else torch.searchsorted(self.sample, here)

    def log_sums(self, *logits: Float[Tensor, "batch columns"]) -> list[Float[Tensor, "batch"]]:
        """log sum_c exp z_c over all classes, of each of these logits."""
        counts = 0 if self.log_counts is None else self.log_counts
        parts = torch.stack([torch.logsumexp(each + counts, dim=1) for each in logits])
        return list(torch.logsumexp(self._of_each(parts), dim=0))

    def sums(self, *values: Float[Tensor, "batch"]) -> list[Float[Tensor, "batch"]]:
        """The sums of what each process has of its columns."""
        return list(self._of_each(torch.stack(values)).sum(0))

    def total(self, values: Float[Tensor, "batch columns"]) -> Float[Tensor, "batch"]:
        """The sum over this process's columns, each as often as it stands for a class."""
        return (values if self.log_counts is None else values * self.log_counts.exp()).sum(1)

    def _of_each(self, part: Tensor) -> Tensor:
        """What each process has, by rank. As `World.gather`: gradients are those of the sum of all losses."""
        return self.world.gather(part[None], self.world.size, self.world.rank)


class ClassShards:
    """The classes of a model's prototypes that this process holds; the others are taken from the model.

    Args:
        model: as `create_model` makes it, with all classes, the same in each process.
        world: the processes that share each batch.
        split_from: number of classes of all domains from which on the processes share them; with fewer, or in one
            process alone, each holds all.
        sampled: share of its classes that have a column in a step, in (0, 1]; those of its images always have one.
        seed: of the samples.
    """

    def __init__(
        self, model: EmbeddingModel, world: World = ONE, split_from: int = 1, sampled: float = 1.0, seed: int = 0
    ) -> None:
        self._prototypes = {kind: getattr(model, kind) for kind in KINDS}
        self.n_classes = {domain: len(rows) for domain, rows in model.student_prototypes.items()}
        self._sampled, self._seed = sampled, seed
        self.are_split = world.size > 1 and sum(self.n_classes.values()) >= split_from
        self.world = world if self.are_split else ONE
        self._split: dict[int, str] = {}  # the domain of prototypes, by their address
        for of_kind in self._prototypes.values() if self.are_split else ():
            for domain, rows in list(of_kind.items()):
                ours = nn.Parameter(rows.detach()[self._rows(domain)].clone())
                setattr(of_kind, ByDomain.key(domain), ours)
                self._split[id(ours)] = domain

    def _rows(self, domain: str) -> slice:
        return self.world.rows(self.n_classes[domain])

    def columns(self, domain: str, labels: Int[Tensor, "batch"] | None = None, step: int = 0) -> Columns:
        """The columns of a domain's classes in a step.

        Args:
            labels: of the step's images of this domain, whose classes a sample is to hold; None: there are none.
            step: its number, of which another sample is drawn.
        """
        rows = self._rows(domain)
        n_here = rows.stop - rows.start
        columns = Columns(self.n_classes[domain], rows.start, n_here, world=self.world)
        if self._sampled == 1:
            return columns
        device = self._prototypes[KINDS[0]][domain].device
        seed = (self._seed * 1_000_003 + step) * 1_000_003 + list(self.n_classes).index(domain)
        generator = torch.Generator(device).manual_seed((seed * 1_000_003 + self.world.rank) % 2**63)
        chance = torch.rand(n_here, generator=generator, device=device)
        if labels is not None:
            chance[columns.place(labels)[1]] = -1.0
        n_others = n_here - int((chance < 0).sum())
        n_drawn = min(n_others, math.ceil(self._sampled * n_here))
        sample = chance.topk(n_here - n_others + n_drawn, largest=False).indices.sort().values
        count = math.log(n_others / n_drawn) if n_drawn else 0.0
        return replace(columns, sample=sample, log_counts=torch.where(chance[sample] < 0, 0.0, count))

    # --- what all processes hold, as one ---

    def whole(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A model's state with all classes, in the first process, and nothing of use in the others. All call it."""
        return {name: value if self._domain(name) is None else self._joined(value) for name, value in state.items()}

    def part(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this process holds of a state with all classes."""
        return {name: self._ours(value, self._domain(name)) for name, value in state.items()}

    def whole_optimizer(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """An optimizer's state with the moments of all classes; else as `whole`."""
        state = optimizer.state_dict()
        domains = self._numbered(optimizer)
        joined = {
            number: {
                name: self._joined(value) if number in domains and value.dim() else value
                for name, value in moments.items()
            }
            for number, moments in state["state"].items()  # in the same order in all processes
        }
        return state | {"state": joined}

    def part_of_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        """What this process holds of the moments of all classes."""
        domains = self._numbered(optimizer)
        ours = {
            number: {
                name: self._ours(value, domains.get(number) if value.dim() else None) for name, value in moments.items()
            }
            for number, moments in state["state"].items()
        }
        return {**state, "state": ours}

    # --- gradients ---

    def sum_(self, parameters: Iterable[nn.Parameter], world: World) -> None:
        """Sum the gradients over the processes, but for those of prototypes of which each holds others."""
        world.sum_(self._gradients(parameters, of_split=False))

    def clip_(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Scale the gradients so that their norm, over all classes, is at most `limit`; returns the norm before."""
        parameters = list(parameters)
        norm = nn.utils.get_total_norm(self._gradients(parameters, of_split=False))
        if self._split:
            ours = nn.utils.get_total_norm(self._gradients(parameters, of_split=True))
            norm = (norm.square() + self.world.sum(ours.to(norm).square())).sqrt()
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    def _gradients(self, parameters: Iterable[nn.Parameter], of_split: bool) -> list[Tensor]:
        return [p.grad for p in parameters if p.grad is not None and (id(p) in self._split) == of_split]

    def _joined(self, value: Tensor) -> Tensor:
        parts = self.world.collect(value.cpu())
        return torch.cat(parts) if parts else value

    def _ours(self, value: Tensor, domain: str | None) -> Tensor:
        return value if domain is None else value[self._rows(domain)]

    def _domain(self, name: str) -> str | None:
        """The domain whose prototypes have this name in the model's state, where they are split."""
        kind, _, key = name.partition(".")
        return ByDomain.domain(key) if self.are_split and kind in KINDS else None

    def _numbered(self, optimizer: torch.optim.Optimizer) -> dict[int, str]:
        """The domains of the optimizer's parameters that are split, by their numbers in its state."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return {number: self._split[id(p)] for number, p in enumerate(parameters) if id(p) in self._split}
