"""The sampler under a person's hands: sliders for learning curves and setting, the allocations redrawn at each move.

Sliders are written by the person alone and the picture by the code alone; a reset makes new sliders. The picture is
HTML with SVG in it: a few tens of kilobytes, where one interactive figure puts megabytes into a saved notebook.
"""

from __future__ import annotations

import dataclasses
import html
import math
import shlex
from collections.abc import Iterable, Sequence

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
import yaml

from udonlib.errors import UserError
from udonlib.lab.explore.sampler_study import SHAPES, Explored
from udonlib.lab.explore.sampler_views import strategy_chart
from udonlib.lab.explore.simulation import (
    STRATEGIES,
    LearningCurve,
    Setting,
    Simulation,
    outcome,
    simulate_all,
    verdict,
)
from udonlib.lab.views.front_end import Still, answering, named
from udonlib.lab.views.live import has_front_end
from udonlib.lab.views.style import GRID, domain_colours

WIDTH, HEIGHT = 330, 150  # pixels of one picture
LEFT, BOTTOM = 34, 18  # for the ticks
MAX_WINDOWS = 150  # per area
READOUTS = "<style>.udon-sim .widget-readout {min-width: 46px; margin: 0 2px}</style>"  # longer tracks
TEXT_STYLE = "color:inherit;font-size:13px;line-height:1.45;font-variant-numeric:tabular-nums"
HEADS = {"start": "loss at the start", "floor": "lowest loss", "half_images": "images to halfway"}
Points = Iterable[tuple[float, float]]


def explore(explored: Explored) -> go.Figure | Explorer:
    """The explorer where a person looks at the notebook; elsewhere its first state as a figure."""
    return Explorer(explored) if has_front_end() else strategy_chart(explored)


class Explorer:
    """Sliders beside the picture that they change. `box` is what is displayed.

    Sliders carry classes for tests: udon-sim-start-DOMAIN, udon-sim-floor-DOMAIN, udon-sim-half_images-DOMAIN,
    udon-sim-share-DOMAIN, udon-sim-update_every, udon-sim-smoothing, udon-sim-steps, udon-sim-batch_size.
    """

    def __init__(self, explored: Explored) -> None:
        self.explored = explored
        self._still: Still | None = None
        self.picture, self.figures = widgets.HTML(), widgets.HTML()
        self.picture.add_class("udon-sim-picture")
        self.figures.add_class("udon-sim-figures")
        self._controls = widgets.VBox(layout={"width": "500px", "flex": "0 1 auto"})
        self._build()
        self.picture.layout = {"flex": "1 1 330px", "min_width": "0"}
        layout = {"display": "flex", "flex_flow": "row wrap", "align_items": "flex-start"}
        beside = widgets.Box([self._controls, self.picture], layout=layout)
        self.box = widgets.VBox([widgets.HTML(READOUTS), beside, self.figures])
        self.box.add_class("udon-sim")

    def _build(self) -> None:
        """Make all controls, in the state that the parameters ask for, and draw."""
        e, s = self.explored, self.explored.setting
        wanted = e.params.strategies
        self.strategies = {
            name: widgets.Checkbox(value=name in wanted, description=name, indent=False) for name in STRATEGIES
        }
        for toggle in self.strategies.values():
            toggle.layout = {"width": "auto", "margin": "2px 10px 2px 2px"}
        self.setting = {
            "steps": _choice("steps", s.steps, _round_numbers(s.steps / 10, s.steps * 10, s.steps)),
            "batch_size": _choice("images per step", s.batch_size, _batches(s)),
            "update_every": _choice(
                "steps per window", s.update_every, _round_numbers(s.steps / 100, s.steps, s.update_every)
            ),
            "smoothing": widgets.FloatSlider(
                value=s.smoothing, min=0, max=max(0.95, s.smoothing), step=0.05, readout_format=".2f"
            ),
        }
        self.setting["smoothing"].description = "smoothing"
        for control in self.setting.values():
            control.style, control.layout = {"description_width": "120px"}, {"width": "490px"}
        starts = [curve.start for curve in e.curves.values()]
        top, least = max(starts), min(0.1, *starts)
        lowest = max(top / 4, *(2 * curve.floor for curve in e.curves.values()))
        halves = [curve.half_images for curve in e.curves.values()]
        spread = (np.floor(np.log10(min(halves))) - 1, np.ceil(np.log10(max(halves))) + 1)
        self.curves = {
            name: {
                "start": widgets.FloatSlider(
                    value=curve.start, min=least, max=1.5 * top, step=0.05, readout_format=".1f"
                ),
                "floor": widgets.FloatSlider(value=curve.floor, min=0, max=lowest, step=0.01, readout_format=".2f"),
                "half_images": widgets.FloatLogSlider(
                    value=curve.half_images, min=spread[0], max=spread[1], step=0.02, readout_format=",.0f"
                ),
            }
            for name, curve in e.curves.items()
        }
        shares = dict(s.shares) or dict.fromkeys(s.sizes, 1.0)
        largest = max(shares[name] for name in s.sizes)
        self.shares = {
            name: widgets.FloatSlider(value=shares[name], min=0, max=largest, step=largest / 100, readout_format=".2f")
            for name in s.sizes
        }
        self._reset = widgets.Button(
            description="as it was", tooltip="back to the curves and the setting of the notebook"
        )
        self._reset.on_click(lambda _: self._build())
        self._name_and_watch()
        self._controls.children = self._arrange()
        self.draw()

    def _name_and_watch(self) -> None:
        controls = {f"strategy-{name}": control for name, control in self.strategies.items()}
        controls |= dict(self.setting) | {f"share-{name}": control for name, control in self.shares.items()}
        controls |= {f"{part}-{name}": control for name, row in self.curves.items() for part, control in row.items()}
        for name, control in {**controls, "reset": self._reset}.items():
            answering(named(control, f"sim-{name}"))
            if hasattr(control, "continuous_update"):
                control.continuous_update = False
        for control in controls.values():
            control.observe(self._moved, "value")

    def _arrange(self) -> list[widgets.Widget]:
        colours = domain_colours(self.curves)
        parts = list(HEADS)
        cells: list[widgets.Widget] = [widgets.HTML("<b>curves</b>")]
        cells += [widgets.HTML(f'<div style="text-align:center">{HEADS[part]}</div>') for part in parts]
        for name, row in self.curves.items():
            cells.append(widgets.HTML(_label(name, colours[name])))
            cells += [row[part] for part in parts]
            for part in parts:
                row[part].layout = {"width": "134px"}
        curves = widgets.GridBox(cells, layout={"grid_template_columns": "80px repeat(3, 138px)", "grid_gap": "0"})
        cells = [widgets.HTML("<b>fixed</b>"), widgets.HTML("shares, any scale"), widgets.HTML(), widgets.HTML()]
        for name, control in self.shares.items():
            control.layout = {"width": "160px"}
            cells += [widgets.HTML(_label(name, colours[name])), control]
        self._fixed = widgets.GridBox(cells, layout={"grid_template_columns": "80px 165px 80px 165px", "grid_gap": "0"})
        toggles = widgets.Box(list(self.strategies.values()), layout={"display": "flex", "flex_flow": "row wrap"})
        return [toggles, *self.setting.values(), curves, self._fixed, self._reset]

    def _moved(self, _: object) -> None:
        self.draw()

    def state(self) -> tuple[dict[str, LearningCurve], Setting, list[str]]:
        """Curves, setting and strategies as the controls stand. A floor above the start counts as the start."""
        s = self.explored.setting
        curves = {}
        for name, row in self.curves.items():
            values = {part: control.value for part, control in row.items()}
            values["floor"] = min(values["floor"], values["start"])
            curves[name] = dataclasses.replace(self.explored.curves[name], **values)
        shares = {name: control.value for name, control in self.shares.items()}
        values = {name: control.value for name, control in self.setting.items()}
        shares = shares if sum(shares.values()) > 0 else {}
        return (
            curves,
            dataclasses.replace(s, **values, shares=shares),
            [n for n, t in self.strategies.items() if t.value],
        )

    def draw(self) -> None:
        """Simulate and redraw."""
        curves, setting, strategies = self.state()
        self._fixed.layout.display = "" if "fixed" in strategies else "none"
        try:
            found = simulate_all(curves, setting, strategies)
        except UserError as error:
            self.figures.value = f"<b>{html.escape(str(error))}</b>"
            return
        pictures = [_curves_picture(curves, setting), *(_areas_picture(one) for one in found)]
        flow = '<div style="display:flex;flex-wrap:wrap;gap:6px 14px">' + "".join(pictures) + "</div>"
        told = "".join(
            f"<div><b>{one.strategy}</b>: {html.escape(verdict(outcome(one, setting.sizes)))}</div>" for one in found
        )
        table = _table(found, setting) if found else "<div>choose a strategy</div>"
        told += f"<div>to have this without sliders, change: <code>{html.escape(self.command())}</code></div>"
        self.picture.value = f'<div style="{TEXT_STYLE}">{flow}</div>'
        self.figures.value = f'<div style="{TEXT_STYLE}">{table}{told}</div>'

        if self._still is not None:
            self._still.keep(self._seen, now=True)

    def _ipython_display_(self) -> None:
        self._still = Still(self.box, self._seen())

    def _seen(self) -> str:
        """What is seen without the sliders."""
        return self.picture.value + self.figures.value

    def command(self) -> str:
        """What the controls changed, as options of papermill that make the same picture."""
        curves, setting, strategies = self.state()
        before, e = self.explored.setting, self.explored
        names = {"steps": "steps", "batch_size": "batch_size", "update_every": "update_every"}
        names["smoothing"] = "sampler_smoothing"
        words = [
            f"-p {name} {getattr(setting, own)}"
            for own, name in names.items()
            if getattr(setting, own) != getattr(before, own)
        ]
        tables = {}
        for parameter, part in SHAPES.items():
            moved = {
                d: getattr(c, part)
                for d, c in curves.items()
                if not np.isclose(getattr(c, part), getattr(e.curves[d], part))
            }
            tables[parameter] = {**getattr(e.params, parameter), **moved} if moved else {}
        wished = dict(before.shares) or dict.fromkeys(curves, 1.0)
        changed = any(control.value != wished[name] for name, control in self.shares.items())
        tables["fixed_shares"] = dict(setting.shares) if changed and "fixed" in strategies else {}
        for parameter, table in tables.items():
            if table:
                text = yaml.safe_dump({parameter: table}, default_flow_style=True, sort_keys=False, width=math.inf)
                words.append(f"-y {shlex.quote(text.strip())}")
        if strategies and set(strategies) != set(e.params.strategies):
            words.append(f"-p strategies {','.join(strategies)}")
        return " ".join(words) or "nothing"


def _choice(description: str, value: int, options: Sequence[int]) -> widgets.SelectionSlider:
    shown = [(f"{option:,}", option) for option in options]
    return widgets.SelectionSlider(options=shown, value=value, description=description)


def _round_numbers(low: float, high: float, own: int) -> list[int]:
    """1, 2, 5, 10, 20, .. between two limits, and a value of one's own."""
    numbers = (digit * 10**power for power in range(8) for digit in (1, 1.5, 2, 3, 4, 5, 6, 8))
    return sorted({own, *(int(n) for n in numbers if n == int(n) and low <= n <= high)})


def _batches(setting: Setting) -> list[int]:
    """Sizes of a batch that its parts divide, an eighth to eight times the present one."""
    part = setting.batch_size // setting.domains_per_batch
    parts = {max(1, part // 2**k) for k in (1, 2, 3)} | {part * 2**k for k in (0, 1, 2, 3)}
    return sorted(n * setting.domains_per_batch for n in parts)


def _label(name: str, colour: str) -> str:
    return f'<span style="color:{colour}">■</span> {html.escape(name)}'


def _curves_picture(curves: dict[str, LearningCurve], setting: Setting) -> str:
    """All learning curves over the images that an equal share would show, the loss on a log scale."""
    end = max(1, setting.steps * setting.batch_size // len(curves))
    x = np.linspace(0, end, 60)
    values = {name: np.maximum(curve.loss(x), 1e-3) for name, curve in curves.items()}
    low, high = min(v.min() for v in values.values()), max(v.max() for v in values.values()) * 1.05
    span = np.log(high / low) or 1.0
    ticks = [(tick, f"{tick:g}") for tick in (0.001, 0.01, 0.1, 0.5, 1, 2, 5, 10, 20) if low <= tick <= high]
    marks = [(float(np.log(tick / low) / span), text) for tick, text in ticks]
    lines = ""
    for name, colour in domain_colours(curves).items():
        points = zip(x / end, np.log(values[name] / low) / span, strict=True)
        line = f'<polyline points="{_points(points)}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
        lines += line.replace("/>", f"><title>{html.escape(name)}</title></polyline>")
    return _frame("learning curves: loss (log) by images seen", lines, marks, f"{end:,} images")


def _areas_picture(found: Simulation) -> str:
    """A strategy's allocation as stacked areas."""
    keep = slice(None, None, -(-len(found.starts) // MAX_WINDOWS))
    shares = found.shares[keep]
    x = np.append(found.starts[keep], found.steps) / found.steps
    tops = np.concatenate([np.zeros((len(shares), 1)), shares.cumsum(axis=1)], axis=1)
    areas = ""
    for d, (name, colour) in enumerate(domain_colours(found.names).items()):
        upper = zip(np.repeat(x, 2)[1:-1], np.repeat(tops[:, d + 1], 2), strict=True)
        lower = zip(np.repeat(x, 2)[1:-1][::-1], np.repeat(tops[:, d], 2)[::-1], strict=True)
        last = f"{html.escape(name)}: {100 * shares[0, d]:.1f} % at first, {100 * shares[-1, d]:.1f} % at last"
        areas += f'<polygon points="{_points([*upper, *lower])}" fill="{colour}"><title>{last}</title></polygon>'
    marks = [(0.0, "0"), (0.5, "50"), (1.0, "100")]
    return _frame(f"<b>{found.strategy}</b>: share of steps, %", areas, marks, f"step {found.steps:,}")


def _points(points: Points) -> str:
    """Points of the unit square as SVG writes them."""
    width, height = WIDTH - LEFT, HEIGHT - BOTTOM - 6
    return " ".join(f"{LEFT + width * x:.1f},{6 + height * (1 - y):.1f}" for x, y in points)


def _frame(title: str, content: str, ticks: Sequence[tuple[float, str]], end: str) -> str:
    """A picture with a title above it, ticks at its left, and what its right end is."""
    height = HEIGHT - BOTTOM - 6
    axis = ""
    for at, text in ticks:
        y = 6 + height * (1 - at)
        axis += f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>'
        axis += f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    axis += (
        f'<text x="{LEFT}" y="{HEIGHT - 3}">0</text><text x="{WIDTH}" y="{HEIGHT - 3}" text-anchor="end">{end}</text>'
    )
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" style="max-width:100%"'
    svg += f' font-size="11" fill="currentColor">{content}{axis}</svg>'
    return f'<div style="max-width:100%"><div>{title}</div>{svg}</div>'


def _table(found: Sequence[Simulation], setting: Setting) -> str:
    """Share, passes and final loss of each domain for each strategy; a domain that starves is bold, with a sign."""
    tables = [outcome(one, setting.sizes).set_index("domain") for one in found]
    cell = 'style="text-align:right;padding:1px 7px;white-space:nowrap"'
    head = "".join(f'<th colspan="3" style="text-align:center;padding:1px 8px">{one.strategy}</th>' for one in found)
    units = f"<th {cell}>share %</th><th {cell}>passes</th><th {cell}>loss</th>" * len(found)
    rows = ""
    for name, colour in domain_colours(setting.sizes).items():
        cells = ""
        for table in tables:
            row = table.loc[name]
            share = f"{100 * row['share']:.1f}"
            share = f"<b>▼ {share}</b>" if row["starves"] else share
            cells += f"<td {cell}>{share}</td><td {cell}>{row['passes']:.1f}</td><td {cell}>{row['loss']:.2f}</td>"
        rows += f'<tr><td style="padding:1px 8px;white-space:nowrap">{_label(name, colour)}</td>{cells}</tr>'
    style = 'style="border-collapse:collapse;color:inherit;font:inherit;margin:6px 0"'
    table = f"<table {style}><tr><th></th>{head}</tr><tr><th></th>{units}</tr>{rows}</table>"
    return f'<div style="overflow-x:auto">{table}</div>'
