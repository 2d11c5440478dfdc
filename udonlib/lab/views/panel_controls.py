"""The steering panel's controls as widgets: its buttons, and a row for each domain. What they do is in `widgets.py`."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import ipywidgets

from udonlib.lab.views.front_end import answering, button, named
from udonlib.lab.views.style import domain_colours

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
STRETCHED = {"flex": "1 1 96px", "width": "auto", "min_width": "96px", "max_width": "240px"}  # a slider
STYLE = "<style>.udon-panel .widget-readout { min-width: 38px; max-width: 38px; text-align: right; }</style>"


def buttons() -> dict[str, ipywidgets.Button]:
    """The buttons above the domains, by name."""
    return {name: button(name, *said) for name, said in BUTTONS.items()}


def toolbar(controls: Sequence[ipywidgets.Widget]) -> ipywidgets.Widget:
    """Controls side by side, on a second line where there is no room."""
    return ipywidgets.HBox(controls, layout={"flex_flow": "row wrap", "align_items": "center"})


class DomainRow:
    """A domain's controls: tick, slider, lock and reset, with its name and its numbers. `widget` is what to display."""

    def __init__(self, domain: str, colour: str, width: int) -> None:
        tick = ipywidgets.Checkbox(indent=False, layout={"width": "18px", "flex": "0 0 auto"})
        options = [(f"×{factor:g}" if factor else "none", factor) for factor in FACTORS]
        look = {"continuous_update": False, "layout": dict(STRETCHED)}
        slider = ipywidgets.SelectionSlider(options=options, value=1.0, **look)
        lock = ipywidgets.ToggleButton(icon="lock", tooltip="pin the share that it has now", layout=dict(SMALL))
        name = ipywidgets.HTML(
            f'<div style="overflow:hidden;text-overflow:ellipsis;white-space:nowrap" title="{html.escape(domain)}">'
            f'<span style="color:{colour}">■</span> {html.escape(domain)}</div>',
            layout={"width": f"{width}px", "flex": "0 0 auto"},
        )
        self.tick = named(answering(tick), f"tick-{domain}")
        self.slider = named(answering(slider), f"w-{domain}")
        self.lock = named(answering(lock), f"lock-{domain}")
        self.reset = button(f"reset-{domain}", "", "back to ×1, unlocked", "undo")
        self.reset.layout = dict(SMALL)
        self.numbers = named(ipywidgets.HTML(), f"numbers-{domain}")
        parts = [self.tick, name, self.slider, self.lock, self.reset, self.numbers]
        self.widget = ipywidgets.HBox(parts, layout={"align_items": "center"})

    def show(self, factor: float, locked: bool) -> None:
        """Set slider and lock; the slider has steps, so it takes the nearest."""
        self.slider.value = min((abs(step - factor), step) for step in FACTORS)[1]
        self.lock.value = locked

    def enable(self, enabled: bool) -> None:
        """Let a person move the controls, or not. The slider of a domain that is locked stays where it is."""
        for control in (self.lock, self.reset, self.tick):
            control.disabled = not enabled
        self.slider.disabled = not enabled or self.lock.value


def rows(domains: Sequence[str]) -> dict[str, DomainRow]:
    """A row for each domain, all as wide as the longest name needs."""
    return {domain: DomainRow(domain, colour, _width(domains)) for domain, colour in domain_colours(domains).items()}


def table(rows: Mapping[str, DomainRow], headings: str) -> list[ipywidgets.Widget]:
    """The rows under the headings of their numbers, which are HTML."""
    spaces = [{"flex": "0 0 auto", "width": f"{pixels}px"} for pixels in (18, _width(list(rows)))]
    empty = [ipywidgets.HTML(layout=dict(space)) for space in (*spaces, STRETCHED, SMALL, SMALL)]
    return [ipywidgets.HBox([*empty, ipywidgets.HTML(headings)]), *(row.widget for row in rows.values())]


def _width(domains: Sequence[str]) -> int:
    return NAME_WIDTH if max(map(len, domains)) < 9 else 2 * NAME_WIDTH
