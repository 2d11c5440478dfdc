"""Time in tests: waiting for what happens elsewhere, however busy the machine is, and a clock that passes as asked.

No test says how long something takes: what must not take long is measured in benchmarks/.
"""

import time
from collections.abc import Callable
from typing import TypeVar

import pytest

Value = TypeVar("Value")

SECONDS = 300.0  # after which what is waited for will not come any more


def wait_until(condition: Callable[[], Value], what: str = "it", seconds: float = SECONDS) -> Value:
    """Wait until a condition on another thread or process holds; returns its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(0.01)
    return value


class Clock:
    """Stands for the module `time` in a module under test: who sleeps wakes up at once, the given seconds later."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: object) -> None:
        self.now, self.tick = 1000.0, 0.0
        self.naps: list[float] = []
        self.while_asleep: Callable[[int], object] = lambda nap: None  # is called with the number of the nap, from 1
        for module in modules:
            monkeypatch.setattr(module, "time", self)

    def monotonic(self) -> float:
        self.now += self.tick
        return self.now

    perf_counter = monotonic

    def time(self) -> float:
        return 1.7e9 + self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.naps.append(seconds)
        self.while_asleep(len(self.naps))
