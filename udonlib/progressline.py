"""One line that says how far we are: redrawn where somebody looks, else printed now and then."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping

from IPython.display import HTML, display

from udonlib.live import LINE_SECONDS, REDRAW_SECONDS, duration

MIN_SECONDS = 1.0  # of an activity before its remaining time is estimated


class ProgressLine:
    """A line of an activity's progress.

    Args:
        units: activity -> what it counts.
        live: redraw one line (True) or print lines (False).
        clock: seconds.
        limit: seconds after which all of it ends at the latest, done or not.
    """

    def __init__(
        self, units: Mapping[str, str], live: bool, clock: Callable[[], float], limit: float = math.inf
    ) -> None:
        self._units, self._clock, self._began, self._limit = units, clock, clock(), limit
        self._handle = display(HTML(""), display_id=True) if live else None
        self._what, self._since, self._next = "", 0.0, -math.inf

    def seconds(self) -> float:
        """Time since the beginning."""
        return self._clock() - self._began

    def progress(self, what: str, done: int, total: int) -> None:
        """Take note of the state of an activity: a `udonlib.evaluations.Progress`."""
        now = self._clock()
        if what != self._what:
            self._what, self._since, self._next = what, now, -math.inf
        if now < self._next and done < total:
            return
        taken = now - self._since
        left = ""
        if done < total and taken >= MIN_SECONDS:
            remaining = min(taken * (total - done) / done, max(0.0, self._limit - self.seconds()))
            left = f"  {done / taken:,.0f} {self._units[what]}/s  {duration(remaining)} left"
        self.say(f"{what} {done:,}/{total:,} {self._units[what]} ({done / total:.0%}){left}")
        pause = max(LINE_SECONDS, self.seconds() / 50) if self._handle is None else REDRAW_SECONDS
        self._next = now + pause

    def say(self, text: str) -> None:
        """Show a line."""
        if self._handle is None:
            print(text, flush=True)
        else:
            style = "font-size:13px;font-variant-numeric:tabular-nums"
            self._handle.update(HTML(f'<div class="udon-live" style="{style}">{html.escape(text)}</div>'))
