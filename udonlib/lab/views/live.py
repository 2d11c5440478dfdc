"""What a person sees while a run trains: one cell that redraws itself, or plain lines where nobody looks at a cell.

train(run)                    # apart from the kernel where a person looks, so that the run outlives the page
show(run.train(), params)     # here
"""

from __future__ import annotations

import html
import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ipywidgets
from IPython.core.getipython import get_ipython
from IPython.display import HTML, display

from udonlib.errors import ParameterError, UserError
from udonlib.lab.kernel.reception import Reception
from udonlib.lab.views.front_end import Still, named
from udonlib.lab.views.style import domain_colours, square, teacher_looks
from udonlib.lab.views.tables import BARE, bar, html_rows, inline_svg, polyline, share_bar
from udonlib.params import TrainParams
from udonlib.runs.apart.process import Worker
from udonlib.runs.folder import METRICS
from udonlib.runs.run import Run
from udonlib.runs.watch import Curve, Progress, Record, Watch, duration

POLL_SECONDS = 0.1  # between two looks at a run that is trained apart, and at what the kernel is asked
REDRAW_SECONDS = 0.5
LINE_SECONDS = 5.0  # between two lines at first; later a fiftieth of the time that the run has taken


def train(run: Run, live: bool | None = None) -> Record:
    """Train a run to its end, or look on until somebody else has, and show how it goes.

    Where a person looks, the run is trained by a process of its own, which outlives the page, the kernel and the
    server: whoever runs this cell again, in whatever notebook, looks on with it. Interrupting the cell stops the run
    after its step, with a checkpoint. Elsewhere, as under papermill, the run is trained here, and ends with this
    process.

    Args:
        live: whether a person looks; None: as `has_front_end` says.

    Returns:
        The last record; {} where another page took over.

    Raises: what training raises.
    """
    looked_at = has_front_end() if live is None else live
    if not looked_at or run.is_over:
        if (n := run.params.processes) > 1 and not run.is_over:
            how = f"from a terminal: torchrun --nproc-per-node {n} -m udonlib train PRESET -p NAME VALUE"
            found = f"found {n}, but nobody looks at this notebook, whose kernel trains alone; expected 1, or {how}"
            raise ParameterError({"processes": found})
        return show(run.train(), run.params, looked_at)
    return _Look(run).to_the_end()


on_show: set[Path] = set()  # folders of runs that a cell of this kernel looks at: it says how long they take


class _Look:
    """Looking on while a run is trained apart."""

    def __init__(self, run: Run) -> None:
        self._run, self._worker, self._watch = run, Worker(run), Watch(run)
        self._began_before: int | None = None  # of the records of a run that is about to be begun anew
        if not self._worker.trains:
            _ = run.data_check  # what is wrong with it is said here, before a process is started
            records = run.path / METRICS
            self._began_before = records.stat().st_ino if records.exists() and run.params.overwrite else None
            self._worker.start(run.params.processes)
        self._view = _Training(self._watch.progress, True, time.monotonic, apart=True)

    def to_the_end(self) -> Record:
        """Look on until the run ends. See `train`."""
        progress = self._watch.progress
        on_show.add(self._run.path)
        try:
            with Reception() as self._reception:
                if not self._reception.works:
                    print(DEAD, flush=True)
                try:
                    while self._worker.trains and not self._reception.is_replaced:
                        self._look()
                except KeyboardInterrupt:
                    self._stop()
                    raise
            if self._reception.is_replaced:
                print("The run goes on: it is looked at from another page now.", flush=True)
                return {}
            self._look(now=True)
            self._worker.check_end()
            summary = self._run.summary()
            last = {"kind": "end", "step": summary["steps"]} | summary
            progress = self._watch.progress
            progress.update(last)
            progress.state = "finished"
        except BaseException:
            progress = self._watch.progress
            progress.state = "stopped"
            raise
        finally:
            on_show.discard(self._run.path)
            self._view.progress = progress
            self._view.draw(now=True)
            self._view.leave()
        return last

    def _look(self, now: bool = False) -> None:
        """Answer the kernel's messages, read what is new, draw it where it is time, and wait for a moment."""
        self._reception.serve()
        if self._is_there():
            self._watch.update()
        self._view.progress = self._watch.progress
        self._view.draw(now)
        time.sleep(POLL_SECONDS)

    def _is_there(self) -> bool:
        """Whether the run's records are not those of a run that is about to be begun anew."""
        if self._began_before is not None:
            records = self._run.path / METRICS
            if not records.exists() or records.stat().st_ino == self._began_before:
                return False
            self._began_before = None
        return True

    def _stop(self) -> None:
        """Have the run stop after its step, and wait for that. A second interrupt ends it where it is.

        Nobody has interrupted it where another program trains it, or where it is the kernel that is to end.
        """
        if not self._worker.is_alive or self._reception.is_ending():
            return
        try:
            self._worker.stop()
            while self._worker.is_alive:
                self._look()
        except KeyboardInterrupt:
            self._worker.interrupt()
            while self._worker.is_alive:
                self._look()


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
    view = _Training(progress, live, clock)
    last: Record = {}
    try:
        for last in records:
            progress.update(last)
            view.draw(now=last["kind"] in ("start", "validation", "steering"))
        progress.state = "finished"
    except BaseException:
        progress.state = "stopped"
        raise
    finally:
        if isinstance(records, Generator):
            records.close()  # an interrupt may come while we draw: let go of the run all the same
        view.draw(now=True)
    return last


def has_front_end() -> bool:
    """Whether a person looks at this kernel's cells, in JupyterLab, VS Code, Colab or any other front end.

    Who sent the cell says whether somebody can be asked for input: front ends do, papermill, nbconvert and nbval do
    not. Where the kernel does not hand that on, a session that JupyterLab started counts.

    The environment variable UDON_LIVE (0 or 1) decides otherwise. Raises UserError on any other value of it.
    """
    chosen = os.environ.get("UDON_LIVE", "")
    if chosen not in ("", "0", "1"):
        raise UserError(f"environment variable UDON_LIVE: found {chosen!r}, expected 0 or 1")
    if chosen:
        return chosen == "1"
    shell: Any = get_ipython()
    if not hasattr(shell, "kernel"):
        return False
    with suppress(AttributeError, KeyError, TypeError):  # another kernel, or a thread that no cell runs in
        return bool(shell.kernel.get_parent("shell")["content"]["allow_stdin"])
    return bool(os.environ.get("JPY_SESSION_NAME"))


HERE = "If the kernel stops or dies, run this notebook again: it goes on from the last checkpoint."
APART = (
    "The run goes on without this page and its kernel. If nothing moves here any more, as after a restart, run this "
    "notebook again: it finds the run. To interrupt this cell stops the run, with a checkpoint to go on from."
)
DEAD = (
    "The panel's controls answer when this cell has ended: this kernel hears nothing while a cell runs. To steer the "
    "run meanwhile, run steer.ipynb beside this notebook."
)


class Output:
    """What says how far something is: one output that redraws itself where a person looks, or plain lines.

    An output is HTML alone and redrawn at most twice a second, so that a saved notebook shows the last state. Lines are
    few enough for a log, and for the output of an executed notebook.

    Args:
        live: redraw (True) or print (False); None: as `has_front_end` says.
        clock: seconds; for tests.
        wait: seconds before the first line.
        place: where to redraw; None: an output of the cell.
    """

    def __init__(
        self,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        wait: float = -math.inf,
        place: _Place | None = None,
    ) -> None:
        self.live = has_front_end() if live is None else live
        self._clock, self._began = clock, clock()
        self._next, self._last = -math.inf if self.live else self._began + wait, ""
        self._handle = place or (display(HTML(""), display_id=True) if self.live else None)

    def seconds(self) -> float:
        """Time since the beginning."""
        return self._clock() - self._began

    def is_due(self) -> bool:
        """Whether enough time has passed since what was shown last."""
        return self._clock() >= self._next

    def show(self, text: str, page: str, news: Sequence[str] = ()) -> None:
        """Redraw the page, or print what is new and the text, unless it was printed last."""
        if self._handle is not None:
            self._handle.update(HTML(page))
        elif news or text != self._last:
            print(*news, text, sep="\n", flush=True)
        self._last = text
        self._next = self._clock() + (REDRAW_SECONDS if self.live else max(LINE_SECONDS, self.seconds() / 50))


class _Training:
    """A training on show."""

    def __init__(self, progress: Progress, live: bool | None, clock: Callable[[], float], apart: bool = False) -> None:
        self._place = _Place() if apart else None
        self.progress, self._output = progress, Output(live, clock, LINE_SECONDS, self._place)
        self._told = [0, 0]  # notices and interventions that were printed
        self._estimated = False  # the first estimate of the time is worth a line at once

    def draw(self, now: bool) -> None:
        p = self.progress
        first_estimate = not (self._output.live or self._estimated) and p.seconds_left() is not None
        self._estimated |= first_estimate
        if not (now or first_estimate or self._output.is_due()):
            return
        news = [f"Note: {notice}." for notice in p.notices[self._told[0] :]]
        news += [f"step {entry.step}: {entry}" for entry in p.interventions[self._told[1] :]]
        self._told = [len(p.notices), len(p.interventions)]
        self._output.show(p.line(), page(p, self._place is not None) if self._output.live else "", news)

    def leave(self) -> None:
        """Leave what was drawn last for good."""
        if self._place is not None:
            self._place.leave()


class _Place:
    """Where a page is drawn that comes alive again when the browser's page is reloaded: a widget, and its still."""

    def __init__(self) -> None:
        self._widget = named(ipywidgets.HTML(), "looked-on")
        self._still = Still(self._widget, "")

    def update(self, page: HTML) -> None:
        """Draw another one."""
        self._widget.value = page.data
        self._still.keep(lambda: page.data)

    def leave(self) -> None:
        """Leave the still alone in the notebook."""
        self._still.leave(self._widget.value)


MIN_SECONDS = 1.0  # of an activity before its remaining time is estimated


class ProgressLine(Output):
    """A line of the progress of activities; as a context, it says "stopped" where an error or a person ends them.

    Args:
        units: activity -> what it counts.
        live, clock: as of `Output`.
        limit: seconds after which all of it ends at the latest, done or not.
    """

    def __init__(
        self,
        units: Mapping[str, str],
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        limit: float = math.inf,
    ) -> None:
        super().__init__(live, clock)
        self._units, self._limit, self._notes = units, limit, list[str]()
        self._what, self._since = "", 0.0

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.say("stopped")

    def progress(self, what: str, done: int, total: int) -> None:
        """Take note of the state of an activity: a `runs.evaluations.Progress`."""
        now = self._clock()
        begins = what != self._what
        if begins:
            self._what, self._since = what, now
        if not (begins or done >= total or self.is_due()):
            return
        taken = now - self._since
        left = ""
        if done < total and taken >= MIN_SECONDS:
            remaining = min(taken * (total - done) / done, max(0.0, self._limit - self.seconds()))
            pace = f"{done / taken:,.{1 if done < taken else 0}f}"
            left = f"  {pace} {self._units[what]}/s  {duration(remaining)} left"
        self.say(f"{what} {done:,}/{total:,} {self._units[what]} ({done / total:.0%}){left}")

    def say(self, text: str) -> None:
        """Show a line."""
        lines = "<br>".join(map(html.escape, (*self._notes, text)))
        style = "font-size:13px;font-variant-numeric:tabular-nums"
        self.show(text, f'<div class="udon-live" style="{style}">{lines}</div>')

    def note(self, text: str) -> None:
        """Show a sentence that stays."""
        self._notes.append(text)
        if not self.live:
            print(text, flush=True)


def page(progress: Progress, apart: bool = False) -> str:
    """The state as HTML: a bar of the steps, a row for each domain with its loss and R@1, one for each teacher.

    Text takes the page's colour, so that it reads on light and dark pages.

    Args:
        apart: the run is trained by a process of its own.
    """
    p, total = progress, progress.params.steps
    share = p.share
    facts = [f"step {p.step:,} / {total:,} ({share:.0%})", p.time_text()]
    if not math.isnan(p.images_per_s):
        facts.insert(1, f"{p.images_per_s:,.0f} images/s")
    if not math.isnan(p.best[1]):
        facts.append(f"best validation R@1 {p.best[1]:.1f} % at step {p.best[0]:,}")
    title = f"<b>{html.escape(p.params.run_name)}</b> &nbsp; {' &nbsp;·&nbsp; '.join(facts)}"
    return (
        '<div class="udon-live" style="font-size:13px;line-height:1.4;font-variant-numeric:tabular-nums">'
        f'<div style="margin:4px 0">{title}</div>'
        f"{bar(share, margin='6px 0 8px')}{_table(p) if p.domains else ''}"
        f"{_taught(p) if p.params.teachers else ''}{_footer(p, apart)}</div>"
    )


def _footer(progress: Progress, apart: bool) -> str:
    """What somebody has to know who finds this output without a kernel behind it, and what a person has done."""
    lines = [f"Note: {html.escape(notice)}." for notice in progress.notices]
    lines += [f"step {entry.step:,}: {html.escape(str(entry))}" for entry in progress.interventions[-3:]]
    if progress.state in ("running", "paused"):
        lines.append(APART if apart else HERE)
    return f'<div style="margin:6px 0;opacity:0.75">{"<br>".join(lines)}</div>' if lines else ""


def _table(progress: Progress) -> str:
    p, colours = progress, domain_colours(progress.domains)
    head = html_rows([["domain", "", "loss", "share of", "steps", "images seen", "validation", "R@1, %"]], "th", "th")
    rows: list[list[str]] = []
    largest = max(p.shares.values(), default=0.0) or 1.0
    for name, colour in colours.items():
        curve, share = p.losses.get(name, []), p.shares.get(name, 0.0)
        loss = [_curve(curve, p, 160, colour), f"{curve[-1][1]:.2f}" if curve else "–"]
        steps = [share_bar(share / largest, 100, colour), f"{share:.1%}", f"{p.images_seen.get(name, 0):,}"]
        rows.append([square(colour, name), *loss, *steps, *_scores(p, name, colour)])
    if "mean" in p.r_at_1:
        seen = f"{sum(p.images_seen.values()):,}"
        rows.append(["mean, sum", "", f"{p.loss:.2f}", "", "", seen, *_scores(p, "mean", "currentColor")])
    return f"<table {BARE}>{head}{html_rows(rows, first='th')}</table>"


def _taught(progress: Progress) -> str:
    """A row for each frozen teacher: its loss by kind of token, and the share of images that it was kept for."""
    p, columns = progress, ["class", "patches", "kept"]
    titles = {"class": "class loss", "patches": "patch loss", "kept": "images kept"}
    head = html_rows([["teacher", *(cell for kind in columns for cell in ("", titles[kind]))]], "th", "th")
    rows: list[list[str]] = []
    for teacher, look in teacher_looks(p.params.teachers).items():
        row = [square(look.colour, teacher)]
        for kind in columns:
            curve = p.taught.get(f"{teacher}/{kind}", [])
            value = f"{curve[-1][1]:{'.1%' if kind == 'kept' else '.3f'}}" if curve else "–"
            row += [_curve(curve, p, 100, look.colour), value]
        rows.append(row)
    return f'<div style="margin-top:8px"><table {BARE}>{head}{html_rows(rows, first="th")}</table></div>'


def _scores(progress: Progress, name: str, colour: str) -> list[str]:
    curve = progress.r_at_1.get(name, [])
    return [_curve(curve, progress, 100, colour), f"{curve[-1][1]:.1f}" if curve else "–"]


def _curve(curve: Curve, progress: Progress, width: int, colour: str) -> str:
    """A curve over all steps of the run, from its own smallest to its own largest value, in a line of text."""
    values = [value for _, value in curve]
    low, unit = min(values, default=0.0), width / max(1, progress.params.steps)
    span = (max(values, default=0.0) - low) or 1
    points = [(unit * x, 16 - 14 * (y - low) / span) for x, y in curve]
    return inline_svg(width, polyline(points, colour) if len(points) > 1 else "")
