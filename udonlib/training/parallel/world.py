"""The processes that train one model together: which part of a batch is whose, and how their parts add up.

The trainer is given a `World` and asks it; nothing else knows how many processes there are. Each process holds the
whole model, encodes its rows of a batch, and computes the loss of the *whole* batch from the gathered rows: heads and
losses are small beside the encoder, the relational loss needs all pairs, and losses, allocation and records are then
the same everywhere. Gradients are summed, so that a step is that of one process with the whole batch, up to rounding.

`torchrun` starts the processes, notices those that die, and starts all of them again; `join` finds the others. Nobody
but the first process touches the run's folder: what is there it tells the others, so that they need not see its disk.
"""

from __future__ import annotations

import atexit
import os
import pickle
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from udonlib.errors import UserError
from udonlib.training.steering import RunStoppedError

Value = TypeVar("Value")

LONG = timedelta(days=365)  # that others wait for the first process: a person may pause it; torchrun notices the dead
SHORT = timedelta(
    minutes=30
)  # that processes in the midst of a step wait for each other: one may read from a slow disk
AHEAD = 8  # values that a process has sent and that the first one has not taken yet
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets for those who join


class LostError(UserError):
    """Another process of this training has ended, or cannot be reached."""


@runtime_checkable
class Stateful(Protocol):
    """What can be brought into the state of another one like it."""

    def state_dict(self) -> dict[str, Any]:
        """All of its state."""

    def load_state_dict(self, state: Mapping) -> None:
        """Take over a state."""


class World:
    """One process alone, to which everything belongs; and what those of several processes can do.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        n_here: of them, those on this machine.
    """

    rank = 0
    size = 1
    n_here = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reads control.json, searches, and reads and writes the run's files."""
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

    def share(self, holder: Stateful, state: Mapping | None = None) -> None:
        """Bring what the other processes hold into the first one's state.

        Args:
            state: that of all, as the first process has loaded it already; None: all are as they were made.
        """

    def send(self, value: object) -> None:
        """Give the first process a value: it takes those of each process in their order."""

    def receive(self, rank: int) -> Any:
        """The next value that this process has sent to us, the first. Waits for it."""

    def collect(self, value: Value) -> list[Value]:
        """The values of all processes by rank, in the first one; nothing in the others."""
        return [value]

    def in_turn(self, values: Iterable[Value]) -> Iterator[Value]:
        """Go through these in the first process, and only then in the others: they find what it has made."""
        yield from values

    def device(self, device: torch.device) -> torch.device:
        """The one of its kind that this process computes on."""
        return device

    def cause(self, error: BaseException) -> BaseException:
        """Why all processes end where this one ends with an error: the first one that was met in any of them."""
        return error

    def leave(self, error: BaseException) -> None:
        """End this process without a word where another one was first to say why all of them end."""


ONE = World()


class Processes(World):
    """The processes of `torch.distributed`, as `torchrun` starts them; its group is there already (gloo or nccl).

    Args:
        store: where they leave word for each other; None: they do not say why they end.
    """

    def __init__(self, store: dist.Store | None = None) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.n_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # For what is no tensor, besides nccl: waiting for a word must not wait for the GPU.
        self._words = dist.new_group(backend="gloo", timeout=LONG)
        self._store = store
        self._sending: deque[tuple[Any, Tensor]] = deque()
        self._last: tuple[BaseException, BaseException] | None = None  # an error of ours, and the one that counts

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
            with _others():
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
        with _others():
            while self._sending:
                self._sending.popleft()[0].wait()
            dist.broadcast(length, src=0, group=self._words)
            if not length:
                return None  # type: ignore[return-value]
            word = torch.frombuffer(bytearray(said or bytes(int(length))), dtype=torch.uint8)
            dist.broadcast(word, src=0, group=self._words)
        return value if self.is_first else pickle.loads(word.numpy().tobytes())

    def share(self, holder: Stateful, state: Mapping | None = None) -> None:
        """See `World`. The state goes by the CPU."""
        known = self.broadcast(state)
        if known is None:  # each process may hold a part of it
            known = self.broadcast(on_cpu(holder.state_dict()))
        if not self.is_first:
            holder.load_state_dict(known)

    def send(self, value: object) -> None:
        """See `World`. Waits where the first process is far behind."""
        said = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        with _others():
            for tensor in (torch.tensor(len(said)), said):
                self._sending.append((dist.isend(tensor, dst=0, group=self._words), tensor))
            while len(self._sending) > 2 * AHEAD:
                self._sending.popleft()[0].wait()

    def receive(self, rank: int) -> Any:
        """See `World`; pickled as `broadcast` says."""
        with _others():
            dist.recv(length := torch.tensor(0), src=rank, group=self._words)
            word = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(word, src=rank, group=self._words)
        return pickle.loads(word.numpy().tobytes())

    def collect(self, value: Value) -> list[Value]:
        """See `World`."""
        if not self.is_first:
            self.send(value)
            return []
        return [value, *(self.receive(rank) for rank in range(1, self.size))]

    def in_turn(self, values: Iterable[Value]) -> Iterator[Value]:
        """See `World`."""
        if not self.is_first:
            self.broadcast(None)
        yield from values
        if self.is_first:
            self.broadcast(None)

    def device(self, device: torch.device) -> torch.device:
        """See `World`: a GPU of its own for each process.

        Raises:
            UserError: a certain one, which only one process can have; fewer of them than processes.
        """
        if device.type != "cuda":
            return device
        if device.index is not None:
            found = f"found '{device}' for {self.size} processes"
            raise UserError(f"parameter 'device': {found}, expected cuda, of which each takes its own")
        local, n = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= n:
            raise UserError(f"{self.n_here} processes on a machine with GPUs: {n}; each needs one (--nproc_per_node)")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def cause(self, error: BaseException) -> BaseException:
        """See `World`: whoever fails first leaves word, before the others can notice that it is gone."""
        if self._last is not None and self._last[0] is error:
            return self._last[1]
        counts: BaseException = error
        if self._store is not None:
            ours = f"{self.rank} {error}"
            with suppress(RuntimeError, OSError):  # whoever holds the store may be gone, too
                said = self._store.compare_set("udonlib", "", ours).decode()
                counts = error if said == ours else UserError(said.partition(" ")[2])
        self._last = error, counts
        return counts

    def leave(self, error: BaseException) -> None:
        """See `World`. The exit says why, too: its cause is the error that counts."""
        if isinstance(error, RunStoppedError) and not self.is_first:  # all are stopped at once
            raise SystemExit(0) from error  # torchrun is not to start again what somebody stopped
        said = isinstance(error, RunStoppedError | SystemExit | GeneratorExit)  # by itself
        if not said and (cause := self.cause(error)) is not error:
            raise SystemExit(1) from cause


_joined: list[Processes] = []  # once this process is one of several


def join() -> World:
    """The processes that torchrun has started, of which this is one; one alone where it was not started so.

    The first call waits for the others.
    """
    size = int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in NEEDED) else 1
    if size == 1:
        return ONE
    if not _joined:
        store, rank, size = next(rendezvous("env://", timeout=SHORT))
        # Each start of the processes has words of its own: torchrun's store outlives those that it starts again.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=SHORT)
        _joined.append(Processes(store))
        atexit.register(_part)
    return _joined[0]


def _part() -> None:
    """Let the others go, unless one of them is gone already, for which a GPU would wait."""
    if _joined and _joined[0]._last is None and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def together() -> Iterator[World]:
    """The processes of this training: where one of them fails all end, and the first one to fail says why."""
    world = join()
    try:
        yield world
    except BaseException as error:
        world.leave(error)
        raise


def normed_apart(model: nn.Module, world: World) -> str:
    """What is to be known of a model that several processes train; "" where nothing is."""
    normed = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())
    said = f"batch norm sees the images of its own process, of which there are {world.size}: with another number of "
    return said + "processes the run ends elsewhere" if normed and world.size > 1 else ""


def on_cpu(state: Any) -> Any:
    """The same state with its tensors on the CPU."""
    if isinstance(state, Mapping):
        return {name: on_cpu(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(on_cpu, state))
    return state.cpu() if isinstance(state, Tensor) else state


@contextmanager
def _others() -> Iterator[None]:
    """Say that another process is gone where it does not answer."""
    try:
        yield
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), "")
        raise LostError(f"another process of this training has ended, or cannot be reached ({reason})") from error


class _Gather(torch.autograd.Function):
    """Rows of a batch from all processes: the sum of batches that are 0 but for one's own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, n: int, start: int) -> Tensor:
        ctx.place = slice(start, start + len(rows))
        whole = rows.new_zeros((n, *rows.shape[1:]))
        whole[ctx.place] = rows
        with _others():
            dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        whole = gradients[0].clone(memory_format=torch.contiguous_format)
        with _others():
            dist.all_reduce(whole)
        return whole[ctx.place], None, None
