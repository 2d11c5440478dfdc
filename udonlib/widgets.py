"""The steering panel: a person's hand on a run while it trains, in this kernel or in any other process.

    steer(run)          # a run of this notebook, before the cell that trains it
    steer("NAME")       # a run that papermill, another notebook or another program trains

Controls write control.json and nothing else; a thread reads the run's files and draws. The two never touch the same
widget, so that no change is lost, and a panel works alike for every process that trains.
"""

from __future__ import annotations

import html
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ipywidgets
from IPython.display import DisplayHandle, display

from udonlib import panelviews
from udonlib.controls import answering, button, named
from udonlib.errors import UserError
from udonlib.live import has_front_end
from udonlib.runfolder import RunFolder, find_run
from udonlib.steering import VERSION, change_control, read_control
from udonlib.style import domain_colours
from udonlib.watching import Watch

FACTORS = (0.0, 0.1, 0.2, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
BUTTONS = {  # name -> text, explanation, icon
    "pause": ("Pause", "wait after this step; the state is saved", "pause"),
    "resume": ("Resume", "go on", "play"),
    "stop": ("Stop", "end after this step; running the notebook again goes on from there", "stop"),
    "evaluate": ("Evaluate now", "validate the model as it is", "check"),
    "save": ("Save now", "write a checkpoint", "save"),
    "by-loss": ("By loss", "UDON's own allocation: no multipliers, no locks"),
    "uniform": ("Uniform", "lock all domains at the same share"),
    "by-size": ("By size", "lock all domains at their share of the training images"),
    "only": ("Only ticked", "give the domains without a tick no steps"),
}
NAME_WIDTH = 72  # pixels; up to twice that for long names
SMALL = {"width": "28px", "flex": "0 0 auto", "padding": "0"}  # a button that is an icon
STYLE = "<style>.udon-panel .widget-readout { min-width: 38px; max-width: 38px; text-align: right; }</style>"
STRETCHED = {"flex": "1 1 96px", "width": "auto", "min_width": "96px", "max_width": "240px"}  # a slider
POLL_SECONDS = 0.15  # between two looks at the run's files
DRAW_SECONDS = 0.5  # between two redraws


Wish = tuple[Mapping[str, float], Mapping[str, float]]
_open: dict[Path, Panel] = {}  # the panels of this kernel, by the run's folder


def steer(run: RunFolder | str, outputs: str = "auto") -> Panel | None:
    """Show the panel of a run. Where it has finished, or nobody looks at the kernel, a line says where it stands.

    Args:
        run: the run, its name or path, or "latest": the one that trains now, or that wrote last.
        outputs: folder of results, for a name.

    Raises: UserError "no run ..." with the nearest name; or for a run whose parameters cannot be read.
    """
    if isinstance(run, str):
        run = find_run(run, outputs)
    _ = run.params
    finished = run.status == "finished" and not run.params.overwrite
    if has_front_end() and not finished:
        if (before := _open.pop(run.path, None)) is not None:
            before.close()  # the cell was run again, and nobody sees the former panel any more
        panel = _open[run.path] = Panel(run)
        panel.start(display(panel.widget, display_id=True))
        return panel
    text = run.state().text
    how = "" if finished else f'; to steer it: notebooks/steer.ipynb with run = "{run.path.name}"'
    print(f"{run.path.name}: {text}{how}", flush=True)
    return None


class Panel:
    """The widgets of one panel, and the thread that draws. `widget` is what to display."""

    def __init__(self, folder: RunFolder) -> None:
        self.watch = Watch(folder)
        self.name = f"{Path(os.environ.get('JPY_SESSION_NAME', 'panel')).name} {secrets.token_hex(2)}"
        self._folder = folder.path
        self._silent = False  # controls are being set, not moved by a person
        self._sent: tuple[int, float] | None = None  # number and time of a change that is not in force yet
        self._answer, self._problem = "", ""
        self._foreign = ""
        self._wished: Wish = ({}, {})  # the multipliers and locks that this panel knows of
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._place: DisplayHandle | None = None
        self.watch.update()
        self.domains = self.watch.domains()
        self._build()
        self._show_values()

    # Controls: written by the person

    def _build(self) -> None:
        self.status, self.charts = (named(ipywidgets.HTML(), name) for name in ("status", "charts"))
        self.buttons = {name: button(name, *said) for name, said in BUTTONS.items()}
        actions: dict[str, Callable[[Any], None]] = {
            "pause": lambda _: self._ask(paused=True),
            "resume": lambda _: self._ask(paused=False),
            "stop": lambda _: self._ask(stop=True, paused=False),
            "evaluate": lambda _: self._ask(evaluate=True),
            "save": lambda _: self._ask(save=True),
            "by-loss": lambda _: self._set({}, {}),
            "uniform": lambda _: self._set({}, dict.fromkeys(self.domains, 1 / len(self.domains))),
            "by-size": lambda _: self._set({}, self._by_size()),
            "only": lambda _: self._only_ticked(),
        }
        for name, action in actions.items():
            self.buttons[name].on_click(action)
        self.adopt = button("adopt", "Show its values", "set these sliders to what is in force", "refresh")
        self.adopt.on_click(lambda _: self._show_values())
        self.adopt.layout.display = "none"
        self.ticks: dict[str, ipywidgets.Checkbox] = {}
        self.sliders: dict[str, ipywidgets.SelectionSlider] = {}
        self.locks: dict[str, ipywidgets.ToggleButton] = {}
        self.resets: dict[str, ipywidgets.Button] = {}
        self.numbers: dict[str, ipywidgets.HTML] = {}
        for domain in self.domains:
            self._build_controls(domain)
        requests = self._row("pause", "resume", "stop", "evaluate", "save")
        parts = [ipywidgets.HTML(STYLE), self.status, requests, *self._rows(), self.charts]
        self.widget = named(ipywidgets.VBox(parts), "panel")

    def _build_controls(self, domain: str) -> None:
        tick = answering(ipywidgets.Checkbox(indent=False, layout={"width": "18px", "flex": "0 0 auto"}))
        options = [(f"×{factor:g}" if factor else "none", factor) for factor in FACTORS]
        look = {"continuous_update": False, "layout": dict(STRETCHED)}
        slider = answering(ipywidgets.SelectionSlider(options=options, value=1.0, **look))
        lock = ipywidgets.ToggleButton(icon="lock", tooltip="pin the share that it has now", layout=dict(SMALL))
        reset = button(f"reset-{domain}", "", "back to ×1, unlocked", "undo")
        reset.layout = dict(SMALL)
        slider.observe(lambda change: self._moved(domain, change["new"]), "value")
        lock.observe(lambda change: self._locked(domain, change["new"]), "value")
        reset.on_click(lambda _: self._reset(domain))
        self.ticks[domain] = named(tick, f"tick-{domain}")
        self.sliders[domain] = named(slider, f"w-{domain}")
        self.locks[domain] = named(answering(lock), f"lock-{domain}")
        self.resets[domain] = reset
        self.numbers[domain] = named(ipywidgets.HTML(), f"numbers-{domain}")

    def _row(self, *names: str, before: Sequence[ipywidgets.Widget] = ()) -> ipywidgets.Widget:
        layout = {"flex_flow": "row wrap", "align_items": "center"}
        return ipywidgets.HBox([*before, *(self.buttons[name] for name in names)], layout=layout)

    def _rows(self) -> Iterator[ipywidgets.Widget]:
        label = ipywidgets.HTML('<span style="font-size:12px">allocation:</span>', layout={"width": "76px"})
        yield self._row("by-loss", "uniform", "by-size", "only", before=[label])
        yield self.adopt
        width = NAME_WIDTH if max(map(len, self.domains)) < 9 else 2 * NAME_WIDTH
        spaces = [{"flex": "0 0 auto", "width": f"{pixels}px"} for pixels in (18, width)]
        spaces += [STRETCHED, SMALL, SMALL]
        empty = [ipywidgets.HTML(layout=dict(space)) for space in spaces]
        yield ipywidgets.HBox([*empty, ipywidgets.HTML(panelviews.headings(panelviews.COLUMNS))])
        colours = domain_colours(self.domains)
        for domain in self.domains:
            name = ipywidgets.HTML(
                f'<div style="overflow:hidden;text-overflow:ellipsis;white-space:nowrap" title="{html.escape(domain)}">'
                f'<span style="color:{colours[domain]}">■</span> {html.escape(domain)}</div>',
                layout={"width": f"{width}px", "flex": "0 0 auto"},
            )
            controls = [self.ticks[domain], name, self.sliders[domain], self.locks[domain], self.resets[domain]]
            yield ipywidgets.HBox([*controls, self.numbers[domain]], layout={"align_items": "center"})

    @contextmanager
    def _silently(self) -> Iterator[None]:
        """Set controls without taking that for a person's hand."""
        before, self._silent = self._silent, True
        try:
            yield
        finally:
            self._silent = before

    def _ask(self, **changes: Any) -> None:
        """Write what a person wants into the control file."""
        if self._silent:
            return
        try:
            wanted = change_control(self._folder, self.name, **changes)
        except UserError as error:
            self._problem = str(error)
            return
        self._problem = ""
        self._sent, self._wished = (wanted.number, time.monotonic()), (wanted.multipliers, wanted.locks)

    def _set(self, multipliers: Mapping[str, float], locks: Mapping[str, float]) -> None:
        """Steer all domains at once, and let the controls say so."""
        nothing = dict.fromkeys(self.domains)
        self._ask(multipliers={**nothing, **multipliers}, locks={**nothing, **locks})
        self._show_values(multipliers, locks)

    def _only_ticked(self) -> None:
        ticked = [domain for domain in self.domains if self.ticks[domain].value]
        if not ticked:
            self._problem = "Tick the domains first that are to be trained."
            return
        self._set({domain: 0.0 for domain in self.domains if domain not in ticked}, {})

    def _by_size(self) -> dict[str, float]:
        sizes = self.watch.n_images
        return {domain: n / sum(sizes.values()) for domain, n in sizes.items()}

    def _moved(self, domain: str, factor: float) -> None:
        self._ask(multipliers={domain: factor})

    def _locked(self, domain: str, locked: bool) -> None:
        self.sliders[domain].disabled = locked
        if not self._silent:
            share = self.watch.progress.shares.get(domain, 1 / len(self.domains))
            self._ask(locks={domain: share if locked else None})

    def _reset(self, domain: str) -> None:
        self._ask(multipliers={domain: None}, locks={domain: None})
        with self._silently():
            self.sliders[domain].value, self.locks[domain].value = 1.0, False

    def _show_values(
        self, multipliers: Mapping[str, float] | None = None, locks: Mapping[str, float] | None = None
    ) -> None:
        """Set the controls to these values, or to those of the control file."""
        if multipliers is None or locks is None:
            with suppress(UserError):
                wanted = read_control(self._folder)
                multipliers, locks = wanted.multipliers, wanted.locks
                self._wished, self._foreign = (wanted.multipliers, wanted.locks), ""
                self.adopt.layout.display = "none"
        with self._silently():
            for domain in self.domains:
                wish = (multipliers or {}).get(domain, 1.0)
                self.sliders[domain].value = min((abs(factor - wish), factor) for factor in FACTORS)[1]
                self.locks[domain].value = domain in (locks or {})

    def _shown(self) -> tuple[dict[str, float], set[str]]:
        """What the controls show: multipliers other than 1, and locked domains."""
        factors = {domain: slider.value for domain, slider in self.sliders.items() if slider.value != 1}
        return factors, {domain for domain, lock in self.locks.items() if lock.value}

    # Displays: written by the thread

    def start(self, place: DisplayHandle | None = None) -> None:
        """Draw from now on, until `close()`, the run's end or that of the kernel.

        Args:
            place: where the panel is displayed; plain HTML takes its place when the run has finished, since a saved
                notebook keeps no widgets.
        """
        if self._thread is None:
            self._place = place
            self._draw()
            self._thread = threading.Thread(target=self._follow, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop drawing."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _follow(self) -> None:
        drawn, due = 0.0, True
        while not self._stop.wait(POLL_SECONDS):
            try:
                due |= self.watch.update()
                answered = self._look_for_answers()
                if answered or ((due or self._problem) and time.monotonic() - drawn >= DRAW_SECONDS):
                    self._draw()
                    drawn, due = time.monotonic(), False
                if self._place is not None and self.watch.state.name == "finished":
                    self._draw()
                    self._place.update(panelviews.page(self.watch.progress, self.status.value))
                    return
            except Exception as error:  # a thread that ends would leave a panel that looks alive
                self._problem = f"The panel cannot follow the run: {error!r}"
                self._draw_status()

    def _look_for_answers(self) -> bool:
        """Whether the change that was asked for last is in force now; and whether somebody else asked for one."""
        control = self.watch.control
        wish = control.multipliers, control.locks
        if self._foreign and self._shown() == (control.multipliers, set(control.locks)):
            self._foreign, self.adopt.layout.display = "", "none"
        elif self._sent is None and wish != self._wished and control.panel != self.name:
            self._wished = wish
            who = f"Another panel ({control.panel})" if control.panel else "Somebody"
            self._foreign = f"{who} has changed the allocation that is wanted; for each domain the last change counts."
            self.adopt.layout.display = ""
        if self._sent is None:
            return False
        number, when = self._sent
        taken = [e for e in self.watch.interventions if e.number >= number and e.panel == self.name]
        if not taken:
            return False
        self._sent = None
        seconds = time.monotonic() - when
        self._answer = f"After step {taken[-1].step:,}, {seconds:.1f} s after you asked: {taken[-1]}."
        if taken[-1].refused:
            self._show_values()  # what was refused has been taken back
        return True

    def _draw(self) -> None:
        progress = self.watch.progress
        self._draw_status()
        for domain, numbers in self.numbers.items():
            numbers.value = panelviews.numbers(progress, domain)
        self.charts.value = panelviews.charts(progress) if progress.allocations else ""

    def _draw_status(self) -> None:
        state = self.watch.state
        going, heard = state.name in ("training", "paused"), self._is_heard()
        notes = [self.watch.problem, self._problem, self._foreign]
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
        elif self._sent is not None and time.monotonic() - self._sent[1] > DRAW_SECONDS:
            notes.append("Sent; waiting for the end of the step.")
        n_steered = sum(entry.matters for entry in self.watch.interventions)
        notes += [self._answer, f"Interventions so far: {n_steered}." if n_steered else ""]
        said = list(filter(None, notes))
        self.status.value = panelviews.status(self.watch.progress, self._folder.name, state.text, said)
        for name, control in self.buttons.items():
            wrong_time = (name == "pause" and state.name != "training") or (name == "resume" and state.name != "paused")
            request = name in ("stop", "evaluate", "save")
            control.disabled = not heard or state.name == "finished" or wrong_time or (request and not going)
        for domain in self.domains:
            idle = not heard or state.name in ("finished", "new", "unreadable")
            for control in (self.locks[domain], self.resets[domain], self.ticks[domain]):
                control.disabled = idle
            self.sliders[domain].disabled = idle or self.locks[domain].value

    def _is_heard(self) -> bool:
        """Whether the process that trains the run reads the control file as this version writes it."""
        notes = self.watch.folder.provenance()
        return not notes or notes[-1].get("steering") == VERSION
