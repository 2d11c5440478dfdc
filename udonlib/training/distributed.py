"""The processes that train one model together: which part of a batch is whose, and how their parts add up.

The trainer is given a `World` and asks it; nothing else knows how many processes there are. Each process holds the
whole model, encodes its rows of a batch, and computes the loss of the *whole* batch from the gathered rows: heads and
losses are small beside the encoder, the relational loss needs all pairs, and losses, allocation and records are then
the same everywhere. Gradients are summed, so that a step is that of one process with the whole batch, up to rounding.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")

LONG = timedelta(days=365)  # that others wait for the first process: a person may pause it; torchrun notices the dead


class World:
    """One process alone, to which everything belongs; and what those of several processes can do.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank = 0
    size = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reads control.json, validates, and writes the run's files."""
        return self.rank == 0

    def rows(self, n: int) -> slice:
        """The rows of a batch of n that are this process's: consecutive ones, as many as others have, or one more."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def gather(self, rows: Tensor, n: int, start: int | None = None) -> Tensor:
        """The n rows of all processes, in each of them. Differentiable: a row's gradients in all of them are summed.

        Args:
            rows: this process's, of any type; there may be none.
            start: where they stand among the n; None: as `rows(n)` says.
        """
        return rows

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor that all processes have, without a gradient."""
        return tensor

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""

    def broadcast(self, value: Value) -> Value:
        """The first process's value, in every process. Waits for it."""
        return value


ONE = World()


class Processes(World):
    """The processes of `torch.distributed`, as `torchrun` starts them; its group is there already (gloo or nccl)."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # For what is no tensor, besides nccl: waiting for a word must not wait for the GPU.
        self._words = dist.new_group(backend="gloo", timeout=LONG)

    def gather(self, rows: Tensor, n: int, start: int | None = None) -> Tensor:
        """See `World`. The message is as long as the whole batch."""
        return _Gather.apply(rows, n, self.rows(n).start if start is None else start)

    def sum(self, tensor: Tensor) -> Tensor:
        """See `World`."""
        self.sum_([total := tensor.detach().clone()])
        return total

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """See `World`. There is one message for all tensors of a type."""
        for kind in dict.fromkeys(tensor.dtype for tensor in tensors):
            same = [tensor for tensor in tensors if tensor.dtype == kind]
            message = torch.cat([tensor.detach().reshape(-1) for tensor in same])
            dist.all_reduce(message)
            for tensor, part in zip(same, message.split([tensor.numel() for tensor in same]), strict=True):
                tensor.detach().copy_(part.view(tensor.shape))

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """See `World`."""
        self.sum_(tensors)
        for tensor in tensors:
            tensor.detach().div_(self.size)

    def broadcast(self, value: Value) -> Value:
        """See `World`. What is said is pickled: it comes from a process of this training, and from nowhere else."""
        said = pickle.dumps(value) if self.is_first and value is not None else b""
        length = torch.tensor(len(said))
        dist.broadcast(length, src=0, group=self._words)
        if not length:
            return None  # type: ignore[return-value]
        word = torch.frombuffer(bytearray(said or bytes(int(length))), dtype=torch.uint8)
        dist.broadcast(word, src=0, group=self._words)
        return value if self.is_first else pickle.loads(word.numpy().tobytes())


class _Gather(torch.autograd.Function):
    """Rows of a batch from all processes: the sum of batches that are 0 but for one's own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, n: int, start: int) -> Tensor:
        ctx.place = slice(start, start + len(rows))
        whole = rows.new_zeros((n, *rows.shape[1:]))
        whole[ctx.place] = rows
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        whole = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole)
        return whole[ctx.place], None, None
