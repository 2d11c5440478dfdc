"""What a person sees while a run trains: one cell that redraws itself, or plain lines where nobody looks at a cell.

show(run.train(), params)
"""

import html
import math
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import pandas as pd
from IPython.core.getipython import get_ipython
from IPython.display import HTML, display

from udonlib.errors import UserError
from udonlib.interventions import Intervention
from udonlib.params import TrainParams
from udonlib.style import EMBEDDERS, GRID, domain_colours

Record = dict[str, Any]
Curve = list[tuple[int, float]]

REDRAW_SECONDS = 0.5
LINE_SECONDS = 5.0  # between two lines at first; later a fiftieth of the time that the run has taken
CURVE_POINTS = 200
MIN_STEPS, MIN_SECONDS = 10, 5.0  # before the remaining time is estimated: either, and more than one record
SIZELESS = 0.125  # share of a step's cost that does not depend on the images' size: heads, losses, optimizer
FORWARD = 1 / 3  # cost of a forward pass, as in validation and in frozen steps, in those of training on the images


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


@dataclass
class Progress:
    """All that is shown, kept up to date from the records."""

    params: TrainParams
    clock: Callable[[], float]
    state: str = "running"
    step: int = 0
    images_per_s: float = math.nan
    loss: float = math.nan
    losses: dict[str, Curve] = field(default_factory=dict)
    terms: dict[str, dict[str, float]] = field(default_factory=dict)  # the latest losses of each domain
    allocations: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # step, shares from there on
    weights: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    interventions: list[Intervention] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)  # what is to be known before hours are spent
    images_seen: dict[str, int] = field(default_factory=dict)
    r_at_1: dict[str, Curve] = field(default_factory=dict)
    best: tuple[int, float] = (0, math.nan)
    last_is_best: bool = False
    summary: Record = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.began = self._since = self.clock()
        self._first_step: int | None = None
        self._paces: deque[tuple[float, float]] = deque(maxlen=30)  # work, seconds
        self._n_paces = 0
        self._pauses: deque[float] = deque(maxlen=3)  # seconds of a validation
        self._n_evaluated: dict[str, int] = {"val": 0, "test": 0}
        self._work_of_cheap = [0.0]  # of the first 0, 1, 2, ... steps, while images grow or the backbone is frozen
        p = self.params
        n_frozen = p.frozen_steps if p.frozen_backbone == "no_grad" and p.backbone_learning_rate else 0
        for step in range(min(p.steps, max(p.growing_steps, n_frozen))):
            size = SIZELESS + (1 - SIZELESS) * (p.image_size_at(step) / p.image_size) ** 2
            self._work_of_cheap.append(self._work_of_cheap[-1] + (FORWARD if step < n_frozen else 1.0) * size)

    def update(self, record: Record) -> None:
        """Take in one record."""
        now, step = self.clock(), int(record.get("step", self.step))
        if self._first_step is None:
            self._first_step = self.step = step  # a resumed run begins late
        if "images_seen" in record:
            self.images_seen = dict(record["images_seen"])
        match record["kind"]:
            case "start":
                self.notices += record.get("notices", [])
                self._n_evaluated |= record.get("n_evaluated", {})
                if record.get("best"):  # a run that goes on
                    [self.best] = record["best"]
            case "progress":
                self._take_pace(step, now, record["images_per_s"])
            case "train":
                self._take_pace(step, now, record["images_per_s"])
                self.terms |= record["losses"]
                totals = {name: terms["total"] for name, terms in record["losses"].items()}
                self.loss = sum(totals.values()) / len(totals)
                for name, total in totals.items():
                    _extend(self.losses.setdefault(name, []), step, total)
            case "allocation":
                self.weights = dict(record["weights"])
                self.shares = dict(record["shares"] if "shares" in record else record["weights"])
                self.allocations.append((step, self.shares))
            case "steering":
                done = Intervention(**{name: value for name, value in record.items() if name not in ("kind", "time")})
                self.interventions.append(done)
                self.state = "paused" if done.paused else "running"
            case "validation":
                self._pauses.append(now - self._since)
                self._take_validation(step, pd.DataFrame(record["table"]), bool(record["best"]))
            case "end":
                self.summary = record
        self.step, self._since = step, now

    def _take_pace(self, step: int, now: float, images_per_s: float) -> None:
        if self._n_paces == 1:  # the first one holds the first use of all code, and the first images
            self._paces.clear()
        self._n_paces += 1
        self._paces.append((self._work(step) - self._work(self.step), now - self._since))
        self.images_per_s = images_per_s

    def _work(self, step: int) -> float:
        """Cost of all steps before this one, in those of steps that train all with images of their final size."""
        cheap = self._work_of_cheap
        return cheap[step] if step < len(cheap) else cheap[-1] + step - len(cheap) + 1

    def _take_validation(self, step: int, table: pd.DataFrame, best: bool) -> None:
        rows = table[(table["embedder"] == "student") & (table["index"] == "merged")]
        for name, value in zip(rows["domain"], rows["r_at_1"], strict=True):
            _extend(self.r_at_1.setdefault(name, []), step, float(value))
        self.last_is_best = best
        if best and self.r_at_1.get("mean"):
            self.best = self.r_at_1["mean"][-1]

    @property
    def domains(self) -> list[str]:
        """Names in the order of the allocation, which is the catalog's."""
        return list(self.shares) or list(self.losses)

    def seconds_left(self) -> float | None:
        """Remaining steps at the recent pace, remaining validations and the test; None: too early.

        Until the first validation is over, what it takes is told from the pace of training.
        """
        work, seconds = (sum(values) for values in zip(*self._paces, strict=True)) if self._paces else (0.0, 0.0)
        n_steps = self.step - (self._first_step or 0)
        if not work or not (n_steps >= MIN_STEPS or (self._n_paces > 1 and self.clock() - self.began >= MIN_SECONDS)):
            return None
        every, total = self.params.eval_every, self.params.steps
        per_step = seconds / work
        per_image = FORWARD * per_step / self.params.batch_size
        validations = total // every - self.step // every + (1 if total % every and self.step < total else 0)
        n_val, n_test = self._n_evaluated["val"], self._n_evaluated["test"]
        pause = sum(self._pauses) / len(self._pauses) if self._pauses else n_val * per_image
        test = 2 * n_test * (pause / n_val if n_val else per_image)  # of the model, and of the untrained one
        return (self._work(total) - self._work(self.step)) * per_step + validations * pause + test

    @property
    def share(self) -> float:
        """Share of the steps that are done; a run without steps (recipe `features`) is done."""
        return min(1.0, self.step / self.params.steps) if self.params.steps else 1.0

    def line(self) -> str:
        """The state in one line: step 400/1600 (25%)  1150 images/s  loss 3.21  R@1 41.2 (best)  2:05 left."""
        total = self.params.steps
        parts = [f"step {self.step}/{total} ({self.share:.0%})"]
        if not math.isnan(self.images_per_s):
            parts.append(f"{self.images_per_s:.0f} images/s")
        if not math.isnan(self.loss):
            parts.append(f"loss {self.loss:.2f}")
        if self.r_at_1.get("mean"):
            at, value = self.r_at_1["mean"][-1]
            best = " (best)" if self.last_is_best else f" (best {self.best[1]:.1f} at step {self.best[0]})"
            parts.append(f"R@1 {value:.1f}" + best + ("" if at == self.step else f" at step {at}"))
        return "  ".join([*parts, self.time_text()])

    def time_text(self) -> str:
        """What is left, or what was needed."""
        taken = duration(self.clock() - self.began)
        if self.state == "finished":
            found = f"test R@1 {self.summary['test_r_at_1']:.1f}, " if "test_r_at_1" in self.summary else ""
            n_done = self.summary.get("interventions", sum(entry.matters for entry in self.interventions))
            by_hand = f", interventions by hand: {n_done}" if n_done else ""
            return found + f"finished in {duration(self.summary.get('seconds', self.clock() - self.began))}{by_hand}"
        if self.state == "paused":
            return "paused"
        if self.state == "stopped":
            return f"stopped after {taken}; run the same again{' without overwrite' * self.params.overwrite} to go on"
        left = self.seconds_left()
        if self.step >= self.params.steps:
            return "testing"
        if left is None:
            return "estimating the time"
        return f"{duration(left)} left"


def duration(seconds: float) -> str:
    """Write seconds as 2:05 or 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


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


def _extend(curve: Curve, step: int, value: float) -> None:
    """Append a point; a curve that has grown long keeps points that are evenly spread over its steps."""
    curve.append((step, value))
    if len(curve) > CURVE_POINTS:
        apart = (step - curve[0][0]) / (CURVE_POINTS / 2)
        kept = curve[:1]
        for point in curve[1:-1]:
            if point[0] - kept[-1][0] >= apart:
                kept.append(point)
        curve[:] = [*kept, curve[-1]]
