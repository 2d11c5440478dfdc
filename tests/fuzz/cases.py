"""Run cases in a process of their own, which may crash, hang or want too much memory without ending the search."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.damage import damaged
from tests.fuzz.kinds import Kind, kinds
from udonlib.errors import UserError

SECONDS = 20.0  # that a case may take on a processor's clock; on the wall's, six times as many
MEMORY = 2 * 2**30  # bytes of addresses that it may take beside what its process has before


class _TooSlowError(BaseException):
    """Raised by the clock: nothing that reads input may catch it."""


@dataclass(frozen=True)
class Finding:
    """A case that ended in something else than a value or a clear message."""

    kind: str
    number: int
    file: str
    what: str
    trace: str = ""


def content_of(made: Kind, kind: str, number: int, seed: int) -> tuple[str, bytes]:
    """The file's name and content of a case, from its number alone."""
    rng = np.random.default_rng([seed, *kind.encode(), number])
    names = sorted(made.examples)
    name = names[rng.integers(len(names))]
    return name, damaged(made.examples[name], list(made.examples.values()), rng)


def search(
    kind: str, n: int, seed: int = 0, first: int = 0, progress: Callable[[int], None] | None = None
) -> list[Finding]:
    """Run cases `first` .. `first + n - 1` of a kind, and return those that ended badly.

    Args:
        progress: called with the number of each case as it begins.
    """
    found: list[Finding] = []
    at, context = first, multiprocessing.get_context("spawn")
    while at < first + n:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(theirs, kind, at, first + n, seed), daemon=True)
        process.start()
        theirs.close()
        began, name = at - 1, ""
        while True:
            try:
                # Beginning takes longer than a case: the whole library is imported.
                message: Any = ours.recv() if ours.poll(6 * SECONDS + (120 if began < at else 0)) else None
            except EOFError:
                break
            if message is None or isinstance(message, Finding):
                found.append(message or Finding(kind, began, name, f"no answer in {6 * SECONDS:.0f} seconds"))
                if message is None:
                    process.kill()
                    break
            else:
                began, name = message
                if progress:
                    progress(began)
        process.join()
        if process.exitcode and process.exitcode > 0:
            raise RuntimeError(f"{kind}: the process that runs cases failed before its first")
        if process.exitcode and process.exitcode != -signal.SIGKILL:
            ended_by = signal.Signals(-process.exitcode).name
            found.append(Finding(kind, began, name, f"the process was ended by {ended_by}"))
        at = began + 1
        ours.close()
    return found


def _work(pipe: Connection, kind: str, first: int, end: int, seed: int) -> None:
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root, suppress(BrokenPipeError):
        (Path(root) / "made").mkdir()
        made = kinds(Path(root) / "made")[kind]()
        with _bounded():
            for number in range(first, end):
                name, content = content_of(made, kind, number, seed)
                pipe.send((number, name))
                finding = run(made, kind, number, name, content, Path(root))
                if finding:
                    pipe.send(finding)
    pipe.close()


def run(made: Kind, kind: str, number: int, name: str, content: bytes, root: Path) -> Finding | None:
    """Read one damaged file in a folder of its own below `root`; returns what went wrong."""
    folder = root / "case" / "inside"
    folder.mkdir(parents=True)
    before = os.getcwd()
    os.chdir(folder)
    try:
        with _clock(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.read(name, content, folder)
    except UserError as error:
        if not str(error).strip():
            return Finding(kind, number, name, f"{type(error).__name__} without a message")
    except (Exception, _TooSlowError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:150]!r}"
        return Finding(kind, number, name, what, "".join(traceback.format_exception(error)[-12:]))
    finally:
        os.chdir(before)
        strays = {path.name for path in (root / "case").iterdir()} - {"inside"}
        shutil.rmtree(root / "case", ignore_errors=True)
    return Finding(kind, number, name, f"written outside the folder: {sorted(strays)}") if strays else None


@contextmanager
def _clock() -> Iterator[None]:
    """Interrupt what takes too long; a system without such clocks relies on the other process's patience."""

    def ring(*_: object) -> None:
        raise _TooSlowError(f"longer than {SECONDS:.0f} seconds")

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _bounded() -> Iterator[None]:
    """Hold this process to MEMORY more addresses than it has now, where the system can."""
    if sys.platform != "linux":
        yield
        return
    import resource

    own = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
