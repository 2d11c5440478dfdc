"""The checkpoints of a run: two to go on from, and the best model of each.

    checkpoints/last.pt             everything that the next step needs
    checkpoints/previous.pt         the same of the checkpoint before, for when the last one is damaged
    checkpoints/best.pt             the model of the best validation until the last checkpoint
    checkpoints/previous_best.pt    that until the checkpoint before, where it is another one
    checkpoints/next.pt             a best model that no checkpoint knows of yet

Each is replaced whole, and checked byte by byte when it is read: PyTorch reads on where one has changed. They are
written while training goes on (`Saving`), which waits for a copy only.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from udonlib.errors import UserError
from udonlib.files import replacing, writing
from udonlib.models.embedding_model import EmbeddingModel, create_model
from udonlib.models.files.torch_files import read_torch
from udonlib.models.heads import ByDomain
from udonlib.params import TrainParams

# How to evaluate what is no checkpoint of ours.
OTHERS = "To evaluate another encoder, run train.ipynb: recipe=features, backbone=NAME, pretrained=False, weights=FILE"
NAMES = ("last.pt", "previous.pt", "best.pt", "previous_best.pt", "next.pt")


def load_checkpoint(file: Path) -> dict[str, Any]:
    """What a checkpoint of a run holds, on the CPU.

    Its checksums are compared first (a second for 1 GB; loading it takes several).

    Raises:
        UserError: "<file>: missing", or what is wrong with it.
    """
    if not file.exists():
        raise UserError(f"{file}: missing")
    try:
        state = read_torch(file)
    except UserError as error:
        reason = str(error).removeprefix(f"{file}: ")
        raise UserError(f"{file}: damaged, or not a checkpoint of a run ({reason})") from None
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{file}: damaged, or not a checkpoint of a run (it holds no model)")
    return state


def load_model(file: Path, params: TrainParams) -> EmbeddingModel:
    """The model that a checkpoint holds, in evaluation mode, on the CPU. The run's data and first weights may be gone.

    Of a checkpoint to go on from it is the moving average, if there is one: that is what is validated.

    Args:
        params: of the run that made the checkpoint.

    Raises:
        UserError: a file that is no checkpoint of a run, or of another model than its parameters say.
    """
    state, statistics = _read_weights(file)
    prefix = "student_prototypes."
    n_classes = {
        ByDomain.domain(name.removeprefix(prefix)): len(value)
        for name, value in state.items()
        if name.startswith(prefix)
    }
    model = create_model(params.model_copy(update={"pretrained": False, "weights": None}), n_classes)
    wanted = model.state_dict()
    shapes = {
        name: [list(there[name].shape) if name in there else None for there in (state, wanted)]
        for name in wanted | state
    }
    differing = {name: both for name, both in shapes.items() if both[0] != both[1]}
    if differing:
        name, (found, expected) = next(iter(differing.items()))
        what = "is missing" if found is None else f"has shape {found}, expected {expected or 'none of this name'}"
        n = f"{len(differing)} of {len(shapes)} tensors differ, the first of them:"
        raise UserError(f"{file}: another model than its params.yaml says: {n} '{name}' {what}")
    model.load_state_dict(state)
    if statistics is not None:
        model.backbone.mean, model.backbone.std = statistics
    return model.eval()


def _read_weights(file: Path) -> tuple[dict[str, Tensor], list[tuple[float, ...]] | None]:
    """Return the weights of a checkpoint of ours that are validated, and its images' mean and deviation.

    Its form is checked as a whole, before anything is made of it: the file may be of any other program.
    """
    saved = read_torch(file)
    state = saved.get("model" if saved.get("average") is None else "average") if isinstance(saved, dict) else None
    problem = None
    if not isinstance(state, dict) or not state:
        there = ", ".join(f"'{key}'" for key in list(saved)[:4]) if isinstance(saved, dict) else type(saved).__name__
        problem = f"found {there or 'nothing'}, expected the weights under 'model'"
    else:
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                problem = (
                    f"under 'model' stands {name!r:.60}, which is {type(value).__name__}, expected tensors by name"
                )
            elif name.startswith("student_prototypes.") and value.ndim != 2:
                problem = f"'{name}' has shape {list(value.shape)}, expected a row for each class"
            elif value.is_complex() or not value.isfinite().all():
                problem = f"'{name}' holds values that are no finite numbers"
    statistics = saved.get("statistics") if isinstance(saved, dict) else None
    if problem is None and statistics is not None:
        try:
            statistics = [tuple(float(number) for number in numbers) for numbers in statistics]
            if [len(numbers) for numbers in statistics] != [3, 3] or not np.isfinite(statistics).all():
                raise ValueError
        except (TypeError, ValueError):
            problem = "'statistics' is not a mean and a deviation of three channels"
    if problem is not None:
        raise UserError(f"{file}: not a checkpoint of a run: {problem}. {OTHERS}")
    return state, statistics  # type: ignore[return-value]


class Saving:
    """A thread that writes what it is given, one after the other; whoever gives it something waits for a copy only.

    Where the one before is still being written, or could not be, the next call waits for it or raises its error.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "udonlib-saving")
        self._last: Future[None] | None = None

    def save(self, write: Callable[[Mapping[str, object]], None], state: Mapping[str, object]) -> None:
        """Have a state written as it is now."""
        self.wait()
        with _interrupts_wait():  # a pool that is interrupted as its thread starts forgets that thread
            self._last = self._thread.submit(write, _copy(state))

    def wait(self) -> None:
        """Come back when nothing is left to be written.

        Raises:
            DiskError: what was given could not be written.
        """
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """End the thread, when it has written what it was given."""
        self._thread.shutdown()


def _copy(value: Any) -> Any:
    """The same state, of tensors of its own on the CPU."""
    if isinstance(value, Mapping):
        return {name: _copy(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copy, value))
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


class Checkpoint(NamedTuple):
    """A checkpoint to go on from, which best model belongs to it, and what could not be used, in sentences."""

    state: dict[str, Any]
    file: Path
    best: Path | None
    problems: list[str]


class Checkpoints:
    """The checkpoints in the folder of a run."""

    def __init__(self, run: Path) -> None:
        self._folder = run / "checkpoints"
        self.last, self._previous, self._best, self._previous_best, self._next = (self._folder / n for n in NAMES)

    @property
    def exist(self) -> bool:
        """Whether there is anything to go on from, in whatever state."""
        return self.last.exists() or self._previous.exists()

    def save_best(self, state: Mapping[str, object]) -> None:
        """Keep the best model so far aside, until a checkpoint knows of it: a killed run may go on another way."""
        _save(self._next, state)

    def save_last(self, state: Mapping[str, object]) -> None:
        """Replace the checkpoint to go on from, and with it the best model; those until now are the previous ones."""
        _save(self.last, state, aside=self._previous)
        if self._next.exists():
            self._promote()
        else:  # both checkpoints have the same best model
            self._previous_best.unlink(missing_ok=True)

    def find(self, problem_of: Callable[[Mapping[str, Any]], str | None]) -> Checkpoint | None:
        """The last checkpoint that is whole, and whose best model is; else the one before; None: there are none.

        Where neither has its best model any more, the run goes on without: the best of the validations to come is it.

        Args:
            problem_of: says why a state does not fit the run's other files, if so.

        Raises:
            UserError: none of those that exist can be used, with what is wrong with each.
        """
        problems: list[str] = []
        without: Checkpoint | None = None
        for file in (self.last, self._previous) if self.exist else ():
            try:
                state = load_checkpoint(file)
                missing = {"step", "best", "n_records", "optimizer"} - state.keys()
                problem = f"it lacks {', '.join(sorted(missing))}" if missing else problem_of(state)
                if problem is not None:
                    raise UserError(f"{file}: {problem}")
            except UserError as error:
                problems.append(str(error))
                continue
            try:
                return Checkpoint(state, file, self._best_of(state), problems)
            except UserError as error:
                problems.append(str(error))
                without = without or Checkpoint(state, file, None, problems)
        if without is not None:
            step = without.state["step"]
            problems.append(f"the best model until step {step:,} is lost: those to come choose another one")
            without.state.update(best=-math.inf, n_worse=0)
            return without
        if problems:
            raise UserError(
                f"{'; '.join(problems)}. Nothing is left to go on from: put back a copy, or begin anew (overwrite=true)"
            )
        return None

    def settle(self, checkpoint: Checkpoint | None) -> None:
        """Make a found checkpoint the last one, with its best model; drop what belongs to none."""
        if checkpoint is None or checkpoint.file == self.last:
            if checkpoint is not None and checkpoint.best == self._next:
                self._promote()
            self._next.unlink(missing_ok=True)
            return
        if checkpoint.best is not None:  # before the checkpoint: who is killed here finds the same again
            _move(checkpoint.best, self._best)
            self._next.unlink(missing_ok=True)
            self._previous_best.unlink(missing_ok=True)
        _move(checkpoint.file, self.last)

    def _best_of(self, state: Mapping[str, Any]) -> Path | None:
        """The best model that a checkpoint knows of: each is better than those before it, so its score names it."""
        if state["best"] == -math.inf:
            return None
        problem = f"{self._best}: of another checkpoint"
        for file in (self._best, self._next, self._previous_best):
            try:
                kept = load_checkpoint(file)
                if kept.get("r_at_1") == state["best"] and kept.get("step", math.inf) <= state["step"]:
                    return file
            except UserError as error:
                problem = str(error) if file == self._best else problem
        raise UserError(problem)

    def _promote(self) -> None:
        if self._best.exists():
            _move(self._best, self._previous_best)
        _move(self._next, self._best)


def _move(file: Path, to: Path) -> None:
    if file != to:
        with writing(to):
            file.replace(to)


def _save(path: Path, state: Mapping[str, object], aside: Path | None = None) -> None:
    with _interrupts_wait(), replacing(path, _size(state), aside) as file:
        torch.save(dict(state), file)


def _size(value: object) -> int:
    """Bytes of the tensors in a state: about what its file takes."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(_size, parts))


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Have an interrupt wait: PyTorch's archive, cut off while it is written, raises an error of its own instead."""
    if threading.current_thread() is not threading.main_thread():  # no interrupt comes to other threads
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if came:
        signal.raise_signal(signal.SIGINT)
