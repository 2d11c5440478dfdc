"""The steering panel: a person's hand on a run while it trains, in this kernel or in any other process.

    steer(run)          # a run of this notebook, before the cell that trains it
    steer("NAME")       # a run that papermill, another notebook or another program trains

Controls write control.json and nothing else; a thread reads the run's files and draws. It moves a control only where
the run has refused something, or another panel has asked for something else; that is silent in the thread alone, so
that what a person moves meanwhile is not lost. A panel works alike for every process that trains.
"""

from __future__ import annotations

import html
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ipywidgets

from udonlib.errors import UserError
from udonlib.lab.views import panel_views
from udonlib.lab.views.controls import rows
from udonlib.lab.views.controls.rows import Row
from udonlib.lab.views.front_end import Still, named
from udonlib.lab.views.live import has_front_end, on_show
from udonlib.lab.views.style import STYLE
from udonlib.runs.find import RUN, find_run
from udonlib.runs.folder import RunFolder
from udonlib.runs.watch import Watch
from udonlib.training.interventions import Wish, changed, changes_between
from udonlib.training.steering import REQUESTS, Control, change_control, read_control

POLL_SECONDS = 0.15  # between two looks at the run's files
DRAW_SECONDS = 0.5  # between two redraws
GOING = ("training", "paused")  # states of a run that a process trains

_open: dict[Path, Panel] = {}  # the panels of this kernel, by the run's folder


def steer(run: RunFolder | str, outputs: str = "auto") -> Panel | None:
    """Show the panel of a run. Where it has finished, or nobody looks at the kernel, a line says where it stands.

    Args:
        run: the run, its name or path, or "latest": the one that trains now, or that wrote last.
        outputs: folder of results, for a name.

    Raises: UserError "no run ..." with the nearest name; or for a run whose parameters cannot be read.
    """
    if isinstance(run, str):
        run = find_run(run, RUN, outputs)
    _ = run.params
    finished = run.is_over
    if has_front_end() and not finished:
        if (before := _open.pop(run.path, None)) is not None:
            before.close()  # the cell was run again, and nobody sees the former panel any more
        panel = _open[run.path] = Panel(run)
        panel.start(Still(panel.widget, panel.page()))
        return panel
    text = run.state().text
    how = "" if finished else f'; to steer it: notebooks/steer.ipynb with run = "{run.path.name}"'
    print(f"{run.path.name}: {text}{how}", flush=True)
    return None


class _Sent(NamedTuple):
    """A change that is not in force yet."""

    number: int
    time: float
    request: bool  # one of REQUESTS: it is always answered

    @property
    def is_late(self) -> bool:
        return time.monotonic() - self.time > DRAW_SECONDS


class _Silence(threading.local):
    """Whether this thread sets controls, which is no person's hand."""

    here = False


class Panel:
    """The widgets of one panel, and the thread that draws. `widget` is what to display."""

    def __init__(self, folder: RunFolder) -> None:
        self.watch = Watch(folder)
        self.name = f"{Path(os.environ.get('JPY_SESSION_NAME', 'panel')).name} {secrets.token_hex(2)}"
        self._folder = folder.path
        self._lock = threading.RLock()  # what is wanted is changed, or looked at, by one thread at a time
        self._silence = _Silence()
        self._sent: _Sent | None = None
        self._answer, self._problem, self._foreign = "", "", ""
        self._changes: list[tuple[Wish, Wish]] = []  # by this panel: what was wanted before, and after
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._still: Still | None = None
        self._kept_state = ""
        self.watch.update()
        self.domains = self.watch.domains()
        self._build()
        self._wished = self.watch.in_force()  # what this panel knows to be wanted
        self._show()
        self._adopt()

    # Controls: written by the person

    def _build(self) -> None:
        self.status, self.charts = (named(ipywidgets.HTML(), name) for name in ("status", "charts"))
        self.buttons = rows.buttons()
        actions: dict[str, Callable[[Any], None]] = {
            "pause": lambda _: self._ask(paused=True),
            "resume": lambda _: self._ask(paused=False),
            "stop": lambda _: self._ask(stop=True, paused=False),
            "finish": lambda _: self._ask(finish=True, paused=False),
            "evaluate": lambda _: self._ask(evaluate=True),
            "save": lambda _: self._ask(save=True),
            "undo": lambda _: self._undo(),
            "by-loss": lambda _: self._set({}, {}),
            "uniform": lambda _: self._set({}, dict.fromkeys(self.domains, 1 / len(self.domains))),
            "by-size": lambda _: self._set({}, self._by_size()),
            "only": lambda _: self._only_ticked(),
        }
        for name, action in actions.items():
            self.buttons[name].on_click(action)
        params = self.watch.folder.params
        self.rows = rows.rows(self.domains, tuple(params.teachers))
        self.taught = rows.taught_rows(params, self.domains)
        self.rate = rows.rate_row(params, self.domains)
        self._all: tuple[Row, ...] = (*self.rows.values(), *self.taught, self.rate)
        for row in self._all:
            self._connect(row)
        for domain in self.domains:
            self.rows[domain].lock.observe(lambda change, domain=domain: self._locked(domain, change["new"]), "value")
            self.rows[domain].share.observe(lambda change, domain=domain: self._typed(domain, change["new"]), "value")
        label = ipywidgets.HTML('<span style="font-size:12px">allocation:</span>', layout={"width": "76px"})
        buttons = list(self.buttons.values())
        requests = rows.toolbar(buttons[:6])
        allocations = rows.toolbar([buttons[6], label, *buttons[7:]])
        table = rows.table(list(self.rows.values()), panel_views.headings(panel_views.COLUMNS))
        table += rows.table(self.taught, panel_views.headings(panel_views.TAUGHT_COLUMNS))
        style = ipywidgets.HTML(STYLE)
        parts = [style, self.status, requests, allocations, *table, self.rate.widget, self.charts]
        self.widget = named(ipywidgets.VBox(parts), "panel")

    def _connect(self, row: Row) -> None:
        row.slider.observe(lambda change: self._moved(row, change["new"]), "value")
        row.reset.on_click(lambda _: self._change(row, None))

    @contextmanager
    def _silently(self) -> Iterator[None]:
        """Set controls without taking that for a person's hand."""
        before, self._silence.here = self._silence.here, True
        try:
            yield
        finally:
            self._silence.here = before

    def _ask(self, **changes: Any) -> None:
        """Write what a person wants into the control file. Where that fails, what was wanted before still is."""
        with self._lock:
            try:
                before = read_control(self._folder)
                wanted = change_control(self._folder, self.name, **changes)
            except UserError as error:
                self._problem = str(error)
                return
            self._problem = ""
            said = self._foreign
            self._notice(before)  # what others wanted is in this panel's own change from here on
            if wanted.wish != before.wish:
                self._foreign = self._foreign if self._foreign != said else ""
                self._changes.append((before.wish, wanted.wish))
            self._wished = wanted.wish
            if wanted.model_copy(update={"number": before.number, "panel": before.panel}) != before:
                request = any(changes.get(name) for name in REQUESTS)
                request = request or (self._sent is not None and self._sent.request)
                self._sent = _Sent(wanted.number, time.monotonic(), request)

    def _set(self, multipliers: Mapping[str, float], locks: Mapping[str, float]) -> None:
        """Steer all domains at once, and let the controls say so."""
        nothing = dict.fromkeys(self.domains)
        self._ask(multipliers={**nothing, **multipliers}, locks={**nothing, **locks})
        self._show()

    def _undo(self) -> None:
        """Take back what this panel has changed last; what others have changed besides stays."""
        if not self._changes:
            self._problem = "There is nothing to undo: nothing was changed in this panel."
            return
        *kept, (before, after) = self._changes
        self._ask(**changes_between(after, before))
        self._changes = kept  # an undo is no change to be undone
        self._show()

    def _only_ticked(self) -> None:
        ticked = [domain for domain, row in self.rows.items() if row.tick.value]
        if not ticked:
            self._problem = "Tick the domains first that are to be trained."
            return
        self._set({domain: 0.0 for domain in self.domains if domain not in ticked}, {})

    def _by_size(self) -> dict[str, float]:
        sizes = self.watch.n_images
        return {domain: n / sum(sizes.values()) for domain, n in sizes.items()}

    def _moved(self, row: Row, value: float) -> None:
        if not self._silence.here:
            self._change(row, value)

    def _change(self, row: Row, value: float | None) -> None:
        self._ask(**row.change(value))
        self._show(row)

    def _locked(self, domain: str, locked: bool) -> None:
        self.rows[domain].slider.disabled = locked
        if not self._silence.here:
            share = self.watch.progress.shares.get(domain, 1 / len(self.domains))
            self._ask(locks={domain: share if locked else None})
            self._show(self.rows[domain])

    def _typed(self, domain: str, text: str) -> None:
        """Pin a share that a person has typed."""
        if self._silence.here:
            return
        row = self.rows[domain]
        try:
            self._ask(locks={domain: row.typed(text)})
        except ValueError as error:
            self._problem = str(error)
        self._show(row)

    def _show(self, *rows: Row) -> None:
        """Set the controls of these rows, or all, to what is wanted."""
        with self._lock, self._silently():
            for row in rows or self._all:
                row.show(self._wished)

    def _adopt(self) -> None:
        """Set all controls to what the control file wants, as where something was refused."""
        with self._lock:
            try:
                wanted = read_control(self._folder)
            except UserError as error:
                self._problem = str(error)
                return
            self._wished, self._foreign = wanted.wish, ""
            self._show()

    # Displays: written by the thread

    def page(self) -> str:
        """The panel without its controls, as a saved notebook keeps it."""
        return panel_views.page(self.watch.progress, self.status.value)

    def start(self, still: Still | None = None) -> None:
        """Draw from now on, until `close()`, the run's end or that of the kernel.

        Args:
            still: that shows the panel; it takes the panel's place when the run has finished.
        """
        if self._thread is None:
            self._still = still
            self._draw()
            self._thread = threading.Thread(target=self._follow, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop drawing."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _follow(self) -> None:
        drawn, due, unfinished = 0.0, True, False
        while not self._stop.wait(POLL_SECONDS):
            try:
                # A finished run that is about to be begun anew has to be seen unfinished first.
                unfinished |= self.watch.state.name != "finished"
                with self._lock:
                    due |= self._look()
                    answered = self._look_for_answers()
                due |= bool(self._problem or self._sent)
                if answered or (due and time.monotonic() - drawn >= DRAW_SECONDS):
                    self._draw()
                    drawn, due = time.monotonic(), False
                if self._still is not None and unfinished and self.watch.state.name == "finished":
                    self._draw()
                    self._still.leave(self.page())
                    return
            except Exception as error:  # a thread that ends would leave a panel that looks alive
                due = True
                # Written here and now: what has failed might fail once more.
                self.status.value = html.escape(f"The panel cannot follow the run: {error!r}")

    def _look(self) -> bool:
        """Whether anything is new in the run's files. A problem with one of them ends when the file is mended."""
        before = self.watch.problem
        new = self.watch.update()
        if self._problem in before and self._problem not in self.watch.problem:
            self._problem = ""
        return new

    def _notice(self, control: Control) -> None:
        """Where somebody else has asked for something, let the controls follow, and say what it was."""
        if control.wish != self._wished and control.panel != self.name:
            who = f"another panel ({control.panel})" if control.panel else "somebody"
            self._foreign = f"Changed by {who}: {changed(self._wished, control.wish)}."
            self._wished = control.wish
            self._show(*(row for row in self._all if not row.shows(control)))

    def _look_for_answers(self) -> bool:
        """Whether there is nothing more to wait for; and whether somebody else has asked for something."""
        before = self._foreign
        self._notice(self.watch.control)
        if self._foreign != before:
            return True
        if (sent := self._sent) is None:
            return False
        taken = [e for e in self.watch.interventions if e.number >= sent.number and e.panel == self.name]
        if not taken and not (sent.is_late and self._is_in_force(sent)):
            return False
        self._sent = None
        if not taken:
            return True
        seconds = time.monotonic() - sent.time
        self._answer = f"After step {taken[-1].step:,}, {seconds:.1f} s after you asked: {taken[-1]}."
        if taken[-1].refused:
            self._adopt()  # what was refused has been taken back
        return True

    def _is_in_force(self, sent: _Sent) -> bool:
        """Whether a change needs no intervention, as where a slider went to and fro within one step."""
        control, state = self.watch.control, self.watch.state.name
        if sent.request and state in GOING:  # else the process has ended, and with it what was requested of it
            return False
        return control.wish == self.watch.in_force() and control.paused == (state == "paused")

    def _draw(self) -> None:
        progress = self.watch.progress
        self._draw_status()
        for row in self._all:
            row.draw(progress)
        self.charts.value = panel_views.charts(progress) if progress.allocations else ""
        if self._still is not None:  # at once where the run may be about to be left alone
            self._still.keep(self.page, now=self.watch.state.name != self._kept_state)
            self._kept_state = self.watch.state.name

    def _draw_status(self) -> None:
        state, heard = self.watch.state, self.watch.heard
        notes = [self.watch.problem, "" if self._problem in self.watch.problem else self._problem, self._foreign]
        locked = sum(self.watch.control.locks.values())
        if locked > 1.0001:
            notes.append(f"The locks sum to {locked:.0%}: each is divided by that, and the other domains get no steps.")
        if not heard and state.name != "finished":
            notes.append(
                "This run is trained by another version of udonlib, which does not read this panel's file: it can be "
                "looked at, not steered."
            )
        elif state.name in ("stopped", "failed", "lost"):
            notes.append("What you set now takes effect when the run goes on.")
        elif self._sent is not None and state.name == "finished":
            notes.append("Your last change came after the last step.")
        elif self._sent is not None and self._sent.is_late:
            busy = "validation" if self.watch.progress.is_validating else "step"
            notes.append(f"Sent; waiting for the end of the {busy}.")
        n_interventions = sum(entry.matters for entry in self.watch.interventions)
        notes += [self._answer, f"Interventions so far: {n_interventions}." if n_interventions else ""]
        said = list(filter(None, notes))
        self.status.value = panel_views.status(
            self.watch.progress, self._folder.name, state.text, said, self._folder not in on_show
        )
        steerable = heard and state.name not in ("finished", "new", "unreadable")
        usable = dict.fromkeys(REQUESTS, state.name in GOING)
        usable |= {"pause": state.name == "training", "resume": state.name == "paused"}
        usable["undo"] = bool(self._changes)
        usable["by-size"] = bool(self.watch.n_images)
        for name, control in self.buttons.items():
            control.disabled = not (steerable and usable.get(name, True))
        for row in self._all:
            row.enable(steerable)
