"""How many threads compute, and how they wait for each other where other processes want the same cores.

Between two parallel regions a thread of GNU's OpenMP, which PyTorch's Linux builds use, spins for milliseconds before
it sleeps. On idle cores nothing is faster. Where one of two threads has lost its core to another process the other one
spins in vain, and training falls to a third of its pace beside one busy process and to an eighth beside four. OpenMP
itself knows the cure, but not when it is needed: it hardly spins while more of its threads exist than there are cores.
So a watcher looks, every half second, at how long our threads stood in line for a core, and while that is long it keeps
further threads of OpenMP that do nothing. The threads that compute stay the same, and so does every bit of the results.
`benchmarks/neighbours.py` measures it.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from udonlib.models.processors import n_cores

LOOK_SECONDS = 0.5
STOOD_IN_LINE = 0.12  # share of its time that a thread stands in line above which others are at work; 0.02 when idle
CALM_LOOKS = 4  # looks in a row without that before threads spin again
MOST_TEAMS = 8  # beyond, on machines of many cores of which we use few, another core is free anyway


def use_threads(n: int = 0) -> None:
    """Compute with `n` threads, or with as many as there are cores for us (0), which make way for other processes."""
    n_threads = n or n_cores()
    torch.set_num_threads(n_threads)
    if n_threads > 1 and sys.platform == "linux":
        if not (_watchers and _watchers[0].is_alive()):  # a process that was forked has none
            _watchers[:] = [Watcher(n_threads)]
            _watchers[0].start()
        _watchers[0].n_threads = n_threads


class Watcher(threading.Thread):
    """Looks at how long this process's threads stand in line for a core, and keeps `Team`s while that is long.

    Args:
        n_threads: that compute.
        waited: seconds in which threads of this process were ready to run and had no core, so far.
    """

    def __init__(self, n_threads: int, waited: Callable[[], float] | None = None) -> None:
        super().__init__(name="udonlib-watcher", daemon=True)
        self.n_threads = n_threads
        self.waited = waited or _seconds_in_line
        self.teams: list[Team] = []
        self._calm = 0
        self._before = self.waited()
        self._at = time.monotonic()

    def run(self) -> None:
        """Look every LOOK_SECONDS, as long as the process lives."""
        while True:
            time.sleep(LOOK_SECONDS)
            self.look(time.monotonic())

    def look(self, now: float) -> None:
        """Begin or end to make way, by how long threads stood in line since the last look, at the time `now`."""
        waited = self.waited()
        share = (waited - self._before) / max(1e-6, now - self._at) / self.n_threads
        self._before, self._at = waited, now
        self._calm = 0 if share > STOOD_IN_LINE else self._calm + 1
        if self._calm == 0 and not self.teams:
            self.teams = [Team() for _ in range(_n_teams(self.n_threads))]
        elif self._calm >= CALM_LOOKS:
            for team in self.teams:
                team.end()
            self.teams = []


class Team:
    """Threads of OpenMP that exist and sleep, as many as `torch` computes with: one parallel operation makes them."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._hold, name="udonlib-team", daemon=True)
        self._thread.start()

    def _hold(self) -> None:
        torch.zeros(2**20).add_(1.0)
        self._ended.wait()

    def end(self) -> None:
        """Let these threads end, and wait until they have."""
        self._ended.set()
        self._thread.join()


_watchers: list[Watcher] = []  # of this process: one, once it computes with several threads


def _n_teams(n_threads: int) -> int:
    """Teams after which OpenMP has more threads than cores; 0 where that would take too many."""
    if not hasattr(os, "sched_getaffinity"):  # macOS, Windows: there nobody says either how long threads wait
        return 0
    cores = len(os.sched_getaffinity(0))
    n = math.ceil((cores - n_threads + 1) / (n_threads - 1))
    return n if 0 < n <= MOST_TEAMS else 0


def _seconds_in_line(tasks: Path = Path("/proc/self/task")) -> float:
    """Seconds in which threads of this process were ready and had no core; 0 where the kernel keeps no account.

    Threads that have ended are not in it: the sum may fall.
    """
    total = 0
    for task in tasks.glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # the thread has just ended
            continue
    return total / 1e9
