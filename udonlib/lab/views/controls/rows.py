"""The controls of the steering panel, as widgets. What they do is in `panel.py`, what they show in `panel_views.py`."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import ipywidgets

from udonlib.lab.views import panel_views
from udonlib.lab.views.front_end import answering, button, named
from udonlib.lab.views.style import domain_colours, square
from udonlib.params import TrainParams
from udonlib.runs.watch import Progress
from udonlib.training.interventions import Wish

FACTORS = (0.0, 0.1, 0.2, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
STEPS = [(f"×{factor:g}" if factor else "none", factor) for factor in FACTORS]  # of a slider
RATES = STEPS[1:]  # a rate of 0 would train for nothing
SHARES = [step / 10 for step in range(11)]
BUTTONS = {  # name -> text, explanation, icon
    "pause": ("Pause", "wait after this step; the state is saved", "pause"),
    "resume": ("Resume", "go on", "play"),
    "stop": ("Stop", "end after this step; running the notebook again goes on from there", "stop"),
    "finish": ("Finish now", "train no more: test the best model so far, and end the run", "flag-checkered"),
    "evaluate": ("Evaluate now", "validate the model as it is", "check"),
    "save": ("Save now", "write a checkpoint", "save"),
    "undo": ("Undo", "take back the last change that was made here", "undo"),
    "by-loss": ("By loss", "UDON's own allocation: no multipliers, no locks"),
    "uniform": ("Uniform", "lock all domains at the same share"),
    "by-size": ("By size", "lock all domains at their share of the training images"),
    "only": ("Only ticked", "give the domains without a tick no steps"),
}
OPEN, CLOSED = "unlock", "lock"
SHARE = "share of the steps to pin it to, in percent; empty: it moves"
PIN, UNPIN = "pin the share that it has now", "let the share move again"
NAME_WIDTH = 72  # pixels; up to twice that for long names
TICK = {"width": "18px", "flex": "0 0 auto"}
TYPED = {"width": "52px", "flex": "0 0 auto"}  # what a person types a number into
AFTER = {"width": "84px", "flex": "0 0 auto", "margin": "0"}  # what stands between a slider and its reset
SMALL = {"width": "28px", "flex": "0 0 auto", "padding": "0"}  # a button that is an icon
STRETCHED = {"flex": "1 1 96px", "width": "auto", "min_width": "96px", "max_width": "240px"}  # a slider


def buttons() -> dict[str, ipywidgets.Button]:
    """The buttons above the domains, by name."""
    return {name: button(name, *said) for name, said in BUTTONS.items()}


def toolbar(controls: Sequence[ipywidgets.Widget]) -> ipywidgets.Widget:
    """Controls side by side, on a second line where there is no room."""
    return ipywidgets.HBox(controls, layout={"flex_flow": "row wrap", "align_items": "center"})


class Row:
    """A slider for a part of a wish, between its name and its numbers, and its reset. `widget` is what to display.

    Args:
        key: name to be found by.
        name: of what is steered, and `label`, HTML of it.
        options: text and value of the slider's steps.
        default: the value that asks for nothing.
        width: of the name, pixels.
        tip: of the reset.
        before: what stands before all of it, and `after`, after the slider; None: an empty place.
    """

    def __init__(
        self,
        key: str,
        name: str,
        label: str,
        options: Sequence[tuple[str, float]],
        default: float,
        width: int,
        tip: str,
        before: ipywidgets.Widget | None = None,
        after: ipywidgets.Widget | None = None,
    ) -> None:
        self.name, self.default = name, default
        look = {"continuous_update": False, "layout": dict(STRETCHED)}
        slider = ipywidgets.SelectionSlider(options=options, value=default, **look)
        text = ipywidgets.HTML(
            f'<div style="overflow:hidden;text-overflow:ellipsis;white-space:nowrap" title="{html.escape(name)}">'
            f"{label}</div>",
            layout={"width": f"{width}px", "flex": "0 0 auto"},
        )
        self.slider = named(answering(slider), f"w-{key}")
        self.reset = button(f"reset-{key}", "", tip, "undo")
        self.reset.layout = dict(SMALL)
        self.numbers = named(ipywidgets.HTML(), f"numbers-{key}")
        ends = before or ipywidgets.HTML(layout=dict(TICK)), after or ipywidgets.HTML(layout=dict(AFTER))
        parts = [ends[0], text, self.slider, ends[1], self.reset, self.numbers]
        self.widget = ipywidgets.HBox(parts, layout={"align_items": "center"})

    def wished(self, wish: Wish) -> float:
        """The slider's value in a wish."""
        raise NotImplementedError

    def change(self, value: float | None) -> dict[str, Any]:
        """What `change_control` is to be told for a value; None takes it out of the wish."""
        raise NotImplementedError

    def show(self, wish: Wish) -> None:
        """Set the controls to what is wanted; the slider has steps, so it takes the nearest."""
        value = self.wished(wish)
        self.slider.value = min((abs(step - value), step) for _, step in self.slider.options)[1]

    def shows(self, wish: Wish) -> bool:
        """Whether the controls say what is wanted."""
        return self.slider.value == self.wished(wish)

    def draw(self, progress: Progress) -> None:
        """Write the numbers."""
        raise NotImplementedError

    def enable(self, enabled: bool) -> None:
        """Let a person move the controls, or not."""
        self.slider.disabled = self.reset.disabled = not enabled


class DomainRow(Row):
    """A domain's controls: tick, slider, lock and reset, with its name and its numbers."""

    def __init__(self, domain: str, colour: str, width: int) -> None:
        tick = ipywidgets.Checkbox(indent=False, layout=dict(TICK))
        lock = ipywidgets.ToggleButton(icon=OPEN, tooltip=PIN, layout=dict(SMALL))
        self.tick = named(answering(tick), f"tick-{domain}")
        self.lock = named(answering(lock), f"lock-{domain}")
        self.lock.observe(lambda change: self._look(change["new"]), "value")
        # Not continuous: it counts when the person has typed all of it.
        share = ipywidgets.Text(placeholder="%", continuous_update=False, tooltip=SHARE, layout=dict(TYPED))
        self.share = named(answering(share), f"share-{domain}")
        after = ipywidgets.HBox([self.lock, self.share], layout=dict(AFTER))
        tip = "back to ×1, unlocked"
        super().__init__(domain, domain, square(colour, domain), STEPS, 1.0, width, tip, self.tick, after)

    def _look(self, locked: bool) -> None:
        """An open and a closed lock look different."""
        self.lock.icon, self.lock.tooltip = (CLOSED, UNPIN) if locked else (OPEN, PIN)

    def wished(self, wish: Wish) -> float:
        """See `Row`: its multiplier."""
        return wish.multipliers.get(self.name, 1.0)

    def change(self, value: float | None) -> dict[str, Any]:
        """See `Row`; without a value it is unlocked, too."""
        return {"multipliers": {self.name: value}} | ({"locks": {self.name: None}} if value is None else {})

    def show(self, wish: Wish) -> None:
        """See `Row`."""
        super().show(wish)
        self.lock.value = self.name in wish.locks
        self.share.value = f"{100 * wish.locks[self.name]:.4g}" if self.lock.value else ""

    def typed(self, text: str) -> float | None:
        """The share that a person has typed, in [0, 1]; None for nothing. Raises: ValueError in words."""
        text = text.strip().removesuffix("%").strip().replace(",", ".")
        try:
            share = float(text) / 100 if text else None
        except ValueError:
            share = math.nan
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"{self.name}: found {text!r}, expected a share from 0 to 100 percent, or nothing")
        return share

    def shows(self, wish: Wish) -> bool:
        """See `Row`."""
        return super().shows(wish) and self.lock.value == (self.name in wish.locks)

    def draw(self, progress: Progress) -> None:
        """See `Row`."""
        self.numbers.value = panel_views.numbers(progress, self.name)

    def enable(self, enabled: bool) -> None:
        """See `Row`. The slider of a domain that is locked stays where it is."""
        super().enable(enabled)
        self.lock.disabled = self.tick.disabled = self.share.disabled = not enabled
        self.slider.disabled = not enabled or self.lock.value


class TeacherRow(Row):
    """A frozen teacher's controls: the slider of its weight."""

    def __init__(self, teacher: str, width: int) -> None:
        super().__init__(f"teacher-{teacher}", teacher, html.escape(teacher), STEPS, 1.0, width, "back to ×1")

    def wished(self, wish: Wish) -> float:
        """See `Row`: the factor of its weight."""
        return wish.teachers.get(self.name, 1.0)

    def change(self, value: float | None) -> dict[str, Any]:
        """See `Row`."""
        return {"teachers": {self.name: value}}

    def draw(self, progress: Progress) -> None:
        """See `Row`."""
        self.numbers.value = panel_views.taught_numbers(progress, self.name)


class DropRow(Row):
    """The probability to drop a frozen teacher; `default` is what the parameters say."""

    def __init__(self, default: float, width: int) -> None:
        options = [(f"{100 * share:.3g}%", share) for share in sorted({*SHARES, default})]
        tip = "back to what the parameters say"
        super().__init__("teachers-dropped", "teachers dropped", "dropped", options, default, width, tip)

    def wished(self, wish: Wish) -> float:
        """See `Row`."""
        return self.default if wish.drop_probability is None else wish.drop_probability

    def change(self, value: float | None) -> dict[str, Any]:
        """See `Row`."""
        return {"drop_probability": None if value == self.default else value}

    def draw(self, progress: Progress) -> None:
        """See `Row`."""
        self.numbers.value = panel_views.drop_text(progress)


class RateRow(Row):
    """The learning rates' factor on their schedule."""

    def __init__(self, width: int) -> None:
        super().__init__("rate", "learning rate", "learning rate", RATES, 1.0, width, "back to the schedule")

    def wished(self, wish: Wish) -> float:
        """See `Row`: the factor."""
        return wish.rate

    def change(self, value: float | None) -> dict[str, Any]:
        """See `Row`."""
        return {"rate": 1.0 if value is None else value}

    def draw(self, progress: Progress) -> None:
        """See `Row`."""
        self.numbers.value = panel_views.rate_text(progress)


def rows(domains: Sequence[str], teachers: Sequence[str] = ()) -> dict[str, DomainRow]:
    """A row for each domain, all as wide as the longest name needs, those of frozen teachers too."""
    width = _width([*domains, *teachers])
    return {domain: DomainRow(domain, colour, width) for domain, colour in domain_colours(domains).items()}


def taught_rows(params: TrainParams, domains: Sequence[str]) -> list[Row]:
    """A row for each frozen teacher, and one for the probability to drop one; none where there are no teachers."""
    names = sorted(params.teachers)
    width = _width([*domains, *names])
    drop = [DropRow(params.drop_probability, width)] if names else []
    return [*(TeacherRow(name, width) for name in names), *drop]


def rate_row(params: TrainParams, domains: Sequence[str]) -> RateRow:
    """The row of the learning rate."""
    return RateRow(_width([*domains, *params.teachers, "learning rate"]))


def table(rows: Sequence[Row], columns: str) -> list[ipywidgets.Widget]:
    """The rows under the headings of their numbers, which are HTML; nothing for no rows."""
    if not rows:
        return []
    spaces = [TICK, {"flex": "0 0 auto", "width": rows[0].widget.children[1].layout.width}, STRETCHED, AFTER, SMALL]
    empty = [ipywidgets.HTML(layout=dict(space)) for space in spaces]
    return [ipywidgets.HBox([*empty, ipywidgets.HTML(columns)]), *(row.widget for row in rows)]


def _width(names: Sequence[str]) -> int:
    return NAME_WIDTH if max(map(len, names)) < 9 else 2 * NAME_WIDTH
