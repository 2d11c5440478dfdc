"""What a person sees while a run trains: one cell that redraws itself, or plain lines where nobody looks at a cell.

show(run.train(), params)
"""

import html
import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Protocol

from IPython.core.getipython import get_ipython
from IPython.display import HTML, display

from udonlib.errors import UserError
from udonlib.lab.views.style import EMBEDDERS, GRID, domain_colours
from udonlib.params import TrainParams
from udonlib.runs.watch import Curve, Progress, Record, duration

REDRAW_SECONDS = 0.5
LINE_SECONDS = 5.0  # between two lines at first; later a fiftieth of the time that the run has taken


def show(
    records: Iterable[Record],
    params: TrainParams,
    live: bool | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Record:
    """Run through the records of a training and show how it goes. Interrupts pass, with the last state drawn.

    Args:
        records: of `Run.train()`; taking them is what trains.
        params: of the run.
        live: redraw one cell (True) or print lines (False); None: as `has_front_end` says.
        clock: seconds; for tests.

    Returns:
        The last record; {} where there was nothing left to train.
    """
    progress = Progress(params, clock)
    view: _View = _Cell(clock) if (has_front_end() if live is None else live) else _Lines(clock)
    last: Record = {}
    try:
        for last in records:
            progress.update(last)
            view.draw(progress, now=last["kind"] in ("start", "validation", "steering"))
        progress.state = "finished"
    except BaseException:
        progress.state = "stopped"
        raise
    finally:
        if isinstance(records, Generator):
            records.close()  # an interrupt may come while we draw: let go of the run all the same
        view.draw(progress, now=True)
    return last


def has_front_end() -> bool:
    """Whether a person looks at this kernel's cells: JupyterLab started it for a notebook.

    The environment variable UDON_LIVE (0 or 1) decides otherwise, as for a papermill that was itself started from a
    notebook and inherits that notebook's environment. Raises UserError on any other value of it.
    """
    chosen = os.environ.get("UDON_LIVE", "")
    if chosen not in ("", "0", "1"):
        raise UserError(f"environment variable UDON_LIVE: found {chosen!r}, expected 0 or 1")
    in_kernel = hasattr(get_ipython(), "kernel")
    return chosen == "1" if chosen else in_kernel and bool(os.environ.get("JPY_SESSION_NAME"))


class _View(Protocol):
    def draw(self, progress: Progress, now: bool) -> None: ...


class _Lines:
    """Plain lines: few enough for a log, and for the output of an executed notebook."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._next = clock() + LINE_SECONDS
        self._last = ""
        self._told = 0  # interventions printed
        self._noticed = 0  # notices printed
        self._estimated = False  # the first estimate of the time is worth a line at once

    def draw(self, progress: Progress, now: bool) -> None:
        text = progress.line()
        first_estimate = not self._estimated and progress.seconds_left() is not None
        self._estimated |= first_estimate
        if (now or first_estimate or self._clock() >= self._next) and text != self._last:
            for notice in progress.notices[self._noticed :]:
                print(f"Note: {notice}.", flush=True)
            self._noticed = len(progress.notices)
            for entry in progress.interventions[self._told :]:
                print(f"step {entry.step}: {entry}", flush=True)
            self._told = len(progress.interventions)
            print(text, flush=True)
            self._last = text
            self._next = self._clock() + max(LINE_SECONDS, (self._clock() - progress.began) / 50)


class _Cell:
    """One output that is redrawn at most twice a second. It is HTML alone, so a saved notebook shows the last state."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._next = -math.inf
        self._handle = display(HTML(""), display_id=True)

    def draw(self, progress: Progress, now: bool) -> None:
        if now or self._clock() >= self._next:
            self._handle.update(HTML(page(progress)))
            self._next = self._clock() + REDRAW_SECONDS


def page(progress: Progress) -> str:
    """The state as HTML: a bar of the steps, and a row for each domain with curves of its loss and R@1.

    Text takes the page's colour, so that it reads on light and dark pages.
    """
    p, total = progress, progress.params.steps
    share = p.share
    facts = [f"step {p.step:,} / {total:,} ({share:.0%})", p.time_text()]
    if not math.isnan(p.images_per_s):
        facts.insert(1, f"{p.images_per_s:,.0f} images/s")
    if not math.isnan(p.best[1]):
        facts.append(f"best validation R@1 {p.best[1]:.1f} % at step {p.best[0]:,}")
    title = f"<b>{html.escape(p.params.run_name)}</b> &nbsp; {' &nbsp;·&nbsp; '.join(facts)}"
    bar = f'<div style="width:{share:.2%};height:8px;border-radius:4px;background:{EMBEDDERS["student"][0]}"></div>'
    return (
        '<div class="udon-live" style="font-size:13px;line-height:1.4;font-variant-numeric:tabular-nums">'
        f'<div style="margin:4px 0">{title}</div>'
        f'<div style="background:{GRID};border-radius:4px;margin:6px 0 8px">{bar}</div>'
        f"{_table(p) if p.domains else ''}{_footer(p)}</div>"
    )


def _footer(progress: Progress) -> str:
    """What somebody has to know who finds this output without a kernel behind it, and what a person has done."""
    lines = [f"Note: {html.escape(notice)}." for notice in progress.notices]
    lines += [f"step {entry.step:,}: {html.escape(str(entry))}" for entry in progress.interventions[-3:]]
    if progress.state in ("running", "paused"):
        lines.append("If the kernel stops or dies, run this notebook again: it goes on from the last checkpoint.")
    return f'<div style="margin:6px 0;opacity:0.75">{"<br>".join(lines)}</div>' if lines else ""


def _table(progress: Progress) -> str:
    p, colours = progress, domain_colours(progress.domains)
    rows = [_row(["domain", "", "loss", "share of", "steps", "images seen", "validation", "R@1, %"], "th")]
    largest = max(p.shares.values(), default=0.0) or 1.0
    for name, colour in colours.items():
        curve, share = p.losses.get(name, []), p.shares.get(name, 0.0)
        bar = f'<rect width="{100 * share / largest:.1f}" height="10" y="4" rx="2" fill="{colour}"/>'
        label = f'<span style="color:{colour}">■</span> {html.escape(name)}'
        loss = [_svg(160, _polyline(curve, p, 160, colour)), f"{curve[-1][1]:.2f}" if curve else "–"]
        steps = [_svg(100, bar), f"{share:.1%}", f"{p.images_seen.get(name, 0):,}"]
        rows.append(_row([label, *loss, *steps, *_scores(p, name, colour)]))
    if "mean" in p.r_at_1:
        seen = f"{sum(p.images_seen.values()):,}"
        rows.append(_row(["mean, sum", "", f"{p.loss:.2f}", "", "", seen, *_scores(p, "mean", "currentColor")]))
    return f'<table style="border-collapse:collapse;color:inherit;font:inherit">{"".join(rows)}</table>'


def _row(cells: list[str], tag: str = "td") -> str:
    first, *others = cells
    style = 'style="text-align:{};padding:1px 7px;white-space:nowrap"'
    rest = "".join(f"<{tag} {style.format('right')}>{cell}</{tag}>" for cell in others)
    return f"<tr><th {style.format('left')}>{first}</th>{rest}</tr>"


def _scores(progress: Progress, name: str, colour: str) -> list[str]:
    curve = progress.r_at_1.get(name, [])
    return [_svg(100, _polyline(curve, progress, 100, colour)), f"{curve[-1][1]:.1f}" if curve else "–"]


def _svg(width: int, content: str) -> str:
    return f'<svg width="{width}" height="18" style="vertical-align:middle">{content}</svg>'


def _polyline(curve: Curve, progress: Progress, width: int, colour: str) -> str:
    """A curve over all steps of the run, from its own smallest to its own largest value."""
    if len(curve) < 2:
        return ""
    values = [value for _, value in curve]
    low, high = min(values), max(values)
    unit = width / max(1, progress.params.steps)
    points = " ".join(f"{unit * x:.1f},{16 - 14 * (y - low) / ((high - low) or 1):.1f}" for x, y in curve)
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>'


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
        """Take note of the state of an activity: a `runs.evaluations.Progress`."""
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
