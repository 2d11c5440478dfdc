"""What the steering panel is made of: a run's state, losses and allocation as HTML and SVG, and controls as widgets.

A redraw is about 20 KB. What the controls do is in `panel.py`.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from typing import Any

import ipywidgets
import numpy as np

from udonlib.lab.views.front_end import answering, button, named
from udonlib.lab.views.style import domain_colours, square
from udonlib.lab.views.tables import Frame, Table, bar, html_rows, share_bar
from udonlib.params import TrainParams
from udonlib.runs.folder import RunFolder
from udonlib.runs.watch import Progress, duration
from udonlib.training.interventions import Wish

FRAME = Frame(520, 190, left=44, bottom=34, top=22, right=8)  # of a chart


def status(progress: Progress, name: str, text: str, notes: Sequence[str]) -> str:
    """The head of the panel: the run, a bar of its steps, what is going on, and notes below.

    Args:
        progress: from the run's records.
        name: of the run.
        text: what `RunState` says of it.
        notes: sentences for the person, plain text.
    """
    total = progress.params.steps
    left = progress.seconds_left()
    facts = [f"{text}, validating the model" if progress.is_validating else text]
    if progress.state == "running" and left is not None:
        facts.append(f"about {duration(left)} left")
    if not math.isnan(progress.images_per_s):
        facts.append(f"{progress.images_per_s:,.0f} images/s")
    if not math.isnan(progress.best[1]):
        facts.append(f"best validation R@1 {progress.best[1]:.1f} % at step {progress.best[0]:,}")
    share = min(1.0, progress.step / total) if total else 1.0
    lines = "".join(f"<div>{html.escape(note)}</div>" for note in notes)
    return (
        '<div style="line-height:1.5;font-size:13px;font-variant-numeric:tabular-nums">'
        f"<b>{html.escape(name)}</b> &nbsp; {' &nbsp;·&nbsp; '.join(map(html.escape, facts))}"
        f"{bar(share, margin='6px 0')}"
        f'<div class="udon-notes">{lines}</div></div>'
    )


def headings(columns: Sequence[str]) -> str:
    """The line above the domains' numbers; `columns` as in `numbers`."""
    wrapped = "white-space:normal;line-height:1.2;display:inline-block;font-size:11px"
    return _cells([f'<span style="{wrapped}">{html.escape(column)}</span>' for column in columns])


COLUMNS = ("adaptive weight", "share", "teacher loss", "student loss", "images seen", "R@1, %")


def numbers(progress: Progress, domain: str) -> str:
    """What a domain is doing, beside its slider: the values of COLUMNS."""
    colour = domain_colours(progress.domains or [domain]).get(domain, "currentColor")
    share = progress.shares.get(domain)
    largest = max(progress.shares.values(), default=0) or 1
    terms = progress.terms.get(domain, {})
    curve = progress.r_at_1.get(domain)
    shown = "–"
    if share is not None:
        text = f'<span style="display:inline-block;width:46px">{share:.1%}</span>'
        shown = share_bar(share / largest, 34, colour) + text
    return _cells(
        [
            f"{progress.weights[domain]:.1%}" if domain in progress.weights else "–",
            shown,
            f"{terms['ce_teacher']:.2f}" if "ce_teacher" in terms else "–",
            f"{terms['ce_student']:.2f}" if "ce_student" in terms else "–",
            f"{progress.images_seen.get(domain, 0):,}",
            f'<span title="validated after step {curve[-1][0]:,}">{curve[-1][1]:.1f}</span>' if curve else "–",
        ]
    )


TAUGHT_COLUMNS = ("weight", "images kept", "class loss", "patch loss")


def taught_numbers(progress: Progress, teacher: str) -> str:
    """What the student is to a frozen teacher, beside its slider: the values of TAUGHT_COLUMNS."""
    weight = progress.params.teachers[teacher].weight * progress.wish.teachers.get(teacher, 1.0)
    last = {kind: progress.taught.get(f"{teacher}/{kind}", [])[-1:] for kind in ("kept", "class", "patches")}
    kept, *losses = [curve[0][1] if curve else None for curve in last.values()]
    shown = "–"
    if kept is not None:
        text = f'<span style="display:inline-block;width:46px">{kept:.1%}</span>'
        shown = share_bar(kept, 34, "currentColor") + text
    return _cells([f"{weight:.3g}", shown, *("–" if loss is None else f"{loss:.3f}" for loss in losses)])


def drop_text(progress: Progress) -> str:
    """What the probability in force is of."""
    asked = progress.wish.drop_probability
    share = progress.params.drop_probability if asked is None else asked
    look = f"font-size:12px;white-space:nowrap;box-sizing:border-box;padding-left:12px;width:{sum(WIDTHS)}px"
    return f'<div style="{look}">{100 * share:g}% of an image\'s teachers but the farthest</div>'


WIDTHS = (48, 92, 46, 48, 58, 36)  # pixels


def _cells(texts: Sequence[str]) -> str:
    style = "display:inline-block;text-align:right;white-space:nowrap;width:{}px"
    filled = [*texts, *[""] * (len(WIDTHS) - len(texts))]  # as wide whatever is said
    cells = "".join(
        f'<span style="{style.format(width)}">{text}</span>' for width, text in zip(WIDTHS, filled, strict=True)
    )
    return f'<div style="font-size:12px;font-variant-numeric:tabular-nums;white-space:nowrap">{cells}</div>'


def page(progress: Progress, head: str) -> str:
    """The panel without its controls: what a saved notebook keeps. `head` is of `status`."""
    colours = domain_colours(progress.domains)
    rows = [["", headings(COLUMNS)]]
    rows += [[square(colour, domain), numbers(progress, domain)] for domain, colour in colours.items()]
    look = "padding: 0 12px 0 0; white-space: nowrap"
    if progress.params.teachers:
        rows += [["", headings(TAUGHT_COLUMNS)]]
        rows += [[html.escape(name), taught_numbers(progress, name)] for name in sorted(progress.params.teachers)]
        rows += [["dropped", drop_text(progress)]]
    table = f'<table style="font-size:13px;margin:0 0 8px">{html_rows(rows, look=look)}</table>'
    return f'<div class="udon-panel">{head}{table}{charts(progress) if progress.allocations else ""}</div>'


def charts(progress: Progress) -> str:
    """The losses and the allocation over the steps, side by side, with a mark at what a person did to the result."""
    return f'<div style="display:flex;flex-wrap:wrap;gap:12px">{loss_chart(progress)}{allocation_chart(progress)}</div>'


def loss_chart(progress: Progress) -> str:
    """The total loss of each domain over the steps."""
    curves = {name: curve for name, curve in progress.losses.items() if curve}
    high = _round_up(max((value for curve in curves.values() for _, value in curve), default=1.0))
    colours, end = domain_colours(progress.domains), _end(progress)
    lines = (FRAME.line(((x / end, y / high) for x, y in curve), colours[name]) for name, curve in curves.items())
    return _chart("total loss", "".join(lines), progress, [(y, f"{y * high:g}") for y in (0.0, 0.5, 1.0)])


def allocation_chart(progress: Progress) -> str:
    """The shares of steps as stacked areas; what has not been trained yet shows what is in force."""
    colours, allocations = domain_colours(progress.domains), _spread(progress)
    steps = [step for step, _ in allocations]
    ends = np.array([*steps, max([progress.step, *steps[-1:]])]) / _end(progress)
    shares = np.array([[shares.get(name, 0.0) for name in colours] for _, shares in allocations])
    areas = FRAME.areas(ends, shares, [(colour, name) for name, colour in colours.items()])
    return _chart("share of steps", areas, progress, [(y, f"{y:.0%}") for y in (0.0, 0.5, 1.0)])


def _spread(progress: Progress) -> list[tuple[int, dict[str, float]]]:
    """The allocations that can be told apart in the chart: a pixel apart, or made by an intervention."""
    apart, marked = _end(progress) / FRAME.width, {entry.step for entry in progress.interventions if entry.steers}
    kept: list[tuple[int, dict[str, float]]] = []
    for step, shares in progress.allocations:
        if not kept or step - kept[-1][0] >= apart or step in marked:
            kept.append((step, shares))
    return kept


def _marks(progress: Progress) -> str:
    marks = []
    for entry in progress.interventions:
        if not entry.matters:
            continue
        x = FRAME.x(entry.step / _end(progress))
        title = f"<title>step {entry.step:,}: {html.escape(str(entry))}</title>"
        line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{FRAME.y(1)}" y2="{FRAME.y(0)}" stroke="currentColor" '
        marks.append(
            f'{line}stroke-dasharray="2 3"/><path d="M{x - 5:.1f} {FRAME.top - 8}h10l-5 8z" fill="currentColor">'
        )
        marks.append(f"{title}</path>")
    return "".join(marks)


def _chart(title: str, content: str, progress: Progress, heights: Sequence[tuple[float, str]]) -> str:
    """A chart over the steps, with the marks of what a person did."""
    end = _end(progress)
    places = [(round(part * end) / end, f"{round(part * end):,}") for part in (0.0, 0.5, 1.0)]
    style = f"width:100%;max-width:{FRAME.width}px;min-width:320px;flex:1 1 320px"
    return FRAME.drawn(content + _marks(progress), heights, places, style, title, "step")


def _end(progress: Progress) -> int:
    """The last step of the axis: of the run, or while it is young, not far beyond now."""
    near = _round_up(max(20.0, 1.5 * progress.step))
    return max(1, min(progress.params.steps, round(near)))


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... above a value."""
    unit = 10.0 ** math.floor(math.log10(max(value, 1e-6)))
    return next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= value)


def report(run: RunFolder) -> Table:
    """Say whether a person had a hand in the run's result, which has to say so, and list what was done."""
    done = run.interventions()
    if not done:
        return Table("<p>Nobody steered this run.</p>", "Nobody steered this run.")
    name = html.escape(run.params.replay or run.path.name)
    text = "Nobody steered this run: its figures do not depend on what was asked of it."
    if any(entry.matters for entry in done):
        how = "steered" if any(entry.steers for entry in done) else "validated"
        how = "finished before its last step" if any(entry.finish for entry in done) else how
        which = f"This run was {how} by hand"
        which = f"This run repeats what a person did to {name}" if run.params.replay else which
        text = (
            f"<b>{which}</b>: its figures are not those of its parameters alone. The parameter "
            f"<code>replay = {name}</code> of train.ipynb repeats it, step by step."
        )
    head = html_rows([["after step", "what was done", "by"]], "th", "th", "left")
    rows = ([f"{entry.step:,}", html.escape(str(entry)), html.escape(entry.panel)] for entry in done)
    table = f"<table>{head}{html_rows(rows, side='left', name_side='right')}</table>"
    plain = [f"after step {entry.step:,}: {entry}" for entry in done]
    return Table(f"<p>{text}</p>{table}", "\n".join([html.unescape(re.sub(r"<.*?>", "", text)), *plain]))


# Controls

FACTORS = (0.0, 0.1, 0.2, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
STEPS = [(f"×{factor:g}" if factor else "none", factor) for factor in FACTORS]  # of a slider
SHARES = [step / 10 for step in range(11)]
BUTTONS = {  # name -> text, explanation, icon
    "pause": ("Pause", "wait after this step; the state is saved", "pause"),
    "resume": ("Resume", "go on", "play"),
    "stop": ("Stop", "end after this step; running the notebook again goes on from there", "stop"),
    "finish": ("Finish now", "train no more: test the best model so far, and end the run", "flag-checkered"),
    "evaluate": ("Evaluate now", "validate the model as it is", "check"),
    "save": ("Save now", "write a checkpoint", "save"),
    "by-loss": ("By loss", "UDON's own allocation: no multipliers, no locks"),
    "uniform": ("Uniform", "lock all domains at the same share"),
    "by-size": ("By size", "lock all domains at their share of the training images"),
    "only": ("Only ticked", "give the domains without a tick no steps"),
}
OPEN, CLOSED = "unlock", "lock"
PIN, UNPIN = "pin the share that it has now", "let the share move again"
NAME_WIDTH = 72  # pixels; up to twice that for long names
TICK = {"width": "18px", "flex": "0 0 auto"}
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
        ends = before or ipywidgets.HTML(layout=dict(TICK)), after or ipywidgets.HTML(layout=dict(SMALL))
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
        tip = "back to ×1, unlocked"
        super().__init__(domain, domain, square(colour, domain), STEPS, 1.0, width, tip, self.tick, self.lock)

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

    def shows(self, wish: Wish) -> bool:
        """See `Row`."""
        return super().shows(wish) and self.lock.value == (self.name in wish.locks)

    def draw(self, progress: Progress) -> None:
        """See `Row`."""
        self.numbers.value = numbers(progress, self.name)

    def enable(self, enabled: bool) -> None:
        """See `Row`. The slider of a domain that is locked stays where it is."""
        super().enable(enabled)
        self.lock.disabled = self.tick.disabled = not enabled
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
        self.numbers.value = taught_numbers(progress, self.name)


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
        self.numbers.value = drop_text(progress)


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


def table(rows: Sequence[Row], columns: str) -> list[ipywidgets.Widget]:
    """The rows under the headings of their numbers, which are HTML; nothing for no rows."""
    if not rows:
        return []
    spaces = [TICK, {"flex": "0 0 auto", "width": rows[0].widget.children[1].layout.width}, STRETCHED, SMALL, SMALL]
    empty = [ipywidgets.HTML(layout=dict(space)) for space in spaces]
    return [ipywidgets.HBox([*empty, ipywidgets.HTML(columns)]), *(row.widget for row in rows)]


def _width(names: Sequence[str]) -> int:
    return NAME_WIDTH if max(map(len, names)) < 9 else 2 * NAME_WIDTH
