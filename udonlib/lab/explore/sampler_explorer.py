"""The sampler under a person's hands: sliders for learning curves and setting, the allocations redrawn at each move.

Sliders are written by the person alone and the picture by the code alone; a reset makes new sliders. The picture is
HTML with SVG in it: a few tens of kilobytes, where one interactive figure puts megabytes into a saved notebook.
"""

from __future__ import annotations

import dataclasses
import hashlib
import html
import math
import shlex
from collections.abc import Mapping, Sequence

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
import yaml

from udonlib import presets
from udonlib.errors import UserError
from udonlib.files import working_folder, write_text
from udonlib.lab.explore.sampler_study import SHAPES, Explored, preset_of
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
from udonlib.lab.views.style import STYLE, domain_colours, square
from udonlib.lab.views.tables import BARE, Frame, html_rows

FRAME = Frame(250, 150, left=34, bottom=18)  # of one picture: two stand side by side where there are 592 pixels
MAX_WINDOWS = 150  # per area
TEXT_STYLE = "color:inherit;font-size:13px;line-height:1.45;font-variant-numeric:tabular-nums"
HEADS = {"start": "loss at the start", "floor": "lowest loss", "half_images": "images to half"}


def explore(explored: Explored) -> go.Figure | SamplerExplorer:
    """The explorer where a person looks at the notebook; elsewhere its first state as a figure."""
    return SamplerExplorer(explored) if has_front_end() else strategy_chart(explored)


class SamplerExplorer:
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
        self._controls = widgets.VBox()
        self._controls.add_class("udon-sim-controls")
        self._before: tuple[dict[str, LearningCurve], list[Simulation]] | None = None  # what the ghosts show
        self._now: tuple[dict[str, LearningCurve], list[Simulation]] | None = None
        self.said = widgets.HTML()
        self._build()
        beside = widgets.Box([self._controls, self.picture])
        beside.add_class("udon-sim-beside")
        self.box = widgets.VBox([widgets.HTML(STYLE), beside, self.figures, self.said])
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
            control.style, control.layout = {"description_width": "122px"}, {"width": "452px"}
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
        self._preset = widgets.Button(
            description="train this", tooltip="write a preset of these settings under params/, to train with"
        )
        self._preset.on_click(lambda _: self.write_preset())
        self._name_and_watch()
        self._controls.children = self._arrange()
        self.draw()

    def _name_and_watch(self) -> None:
        controls = {f"strategy-{name}": control for name, control in self.strategies.items()}
        controls |= dict(self.setting) | {f"share-{name}": control for name, control in self.shares.items()}
        controls |= {f"{part}-{name}": control for name, row in self.curves.items() for part, control in row.items()}
        for name, control in {**controls, "reset": self._reset, "preset": self._preset}.items():
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
            cells.append(widgets.HTML(square(colours[name], name)))
            cells += [row[part] for part in parts]
            for part in parts:
                row[part].layout = {"width": "122px"}
        curves = widgets.GridBox(cells, layout={"grid_template_columns": "76px repeat(3, 126px)", "grid_gap": "0"})
        cells = [widgets.HTML("<b>fixed</b>"), widgets.HTML("shares, any scale"), widgets.HTML(), widgets.HTML()]
        for name, control in self.shares.items():
            control.layout = {"width": "146px"}
            cells += [widgets.HTML(square(colours[name], name)), control]
        self._fixed = widgets.GridBox(cells, layout={"grid_template_columns": "76px 150px 76px 150px", "grid_gap": "0"})
        toggles = widgets.Box(list(self.strategies.values()), layout={"display": "flex", "flex_flow": "row wrap"})
        return [toggles, *self.setting.values(), curves, self._fixed, widgets.HBox([self._reset, self._preset])]

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
            simulations = simulate_all(curves, setting, strategies)
        except UserError as error:
            self.figures.value = f"<b>{html.escape(str(error))}</b>"
            return
        self._before, self._now = self._now, (curves, simulations)
        ghosts = self._before[0] if self._before else {}
        past = {one.strategy: one for one in self._before[1]} if self._before else {}
        pictures = [_curves_picture(curves, setting, ghosts)]
        pictures += [_areas_picture(one, past.get(one.strategy)) for one in simulations]
        flow = '<div style="display:flex;flex-wrap:wrap;gap:6px 14px">' + "".join(pictures) + "</div>"
        flow += "<div>dashed: as it was before the last change</div>" * ("udon-sim-ghost" in flow)
        told = "".join(
            f"<div><b>{one.strategy}</b>: {html.escape(verdict(outcome(one, setting.sizes)))}</div>"
            for one in simulations
        )
        table = _table(simulations, setting) if simulations else "<div>choose a strategy</div>"
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

    def write_preset(self) -> None:
        """Write the preset of this setting under params/ as a new file, and say how to train with it."""
        try:
            text = yaml.safe_dump(preset_of(self.explored, *self.state()[1:]), sort_keys=False)
            name = f"sampler-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
            file = working_folder() / "params" / f"{name}.yaml"
            write_text(file, f"# Claim:     what sampler.ipynb simulated, trained.\n\n{text}")
            presets.load(name)
        except UserError as error:
            self.said.value = f"<b>{html.escape(str(error))}</b>"
            return
        how = f"papermill notebooks/train.ipynb outputs/train.ipynb -p preset {name}"
        self.said.value = f"{html.escape(str(file))} is written; to train it: <code>{html.escape(how)}</code>"

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


def _curves_picture(
    curves: dict[str, LearningCurve], setting: Setting, before: Mapping[str, LearningCurve] | None = None
) -> str:
    """All learning curves over the images that an equal share would show, the loss on a log scale.

    Args:
        before: as they were, for their ghosts.
    """
    end = max(1, setting.steps * setting.batch_size // len(curves))
    x = np.linspace(0, end, 60)
    values = {name: np.maximum(curve.loss(x), 1e-3) for name, curve in curves.items()}
    low, high = min(v.min() for v in values.values()), max(v.max() for v in values.values()) * 1.05
    span = np.log(high / low) or 1.0
    ticks = [tick for tick in (0.001, 0.01, 0.1, 0.5, 1, 2, 5, 10, 20) if low <= tick <= high]
    lines = ""
    for name, colour in domain_colours(curves).items():
        if before and name in before and before[name] != curves[name]:
            was = np.clip(np.log(np.maximum(before[name].loss(x), 1e-3) / low) / span, 0, 1)
            lines += _ghost(FRAME.line(zip(x / end, was, strict=True), colour, f"{name}, before"))
        lines += FRAME.line(zip(x / end, np.log(values[name] / low) / span, strict=True), colour, name)
    heights = [(float(np.log(tick / low) / span), f"{tick:g}") for tick in ticks]
    return _picture("loss (log) by images seen", lines, heights, f"{end:,} images")


def _ghost(drawing: str) -> str:
    """A drawing as it was before the last change."""
    return f'<g class="udon-sim-ghost" stroke-dasharray="4 3" opacity="0.75">{drawing}</g>'


def _areas_picture(simulation: Simulation, before: Simulation | None = None) -> str:
    """A strategy's allocation as stacked areas; before: as it was, for the ghosts of their borders."""
    keep = slice(None, None, -(-len(simulation.starts) // MAX_WINDOWS))
    shares = simulation.shares[keep]
    ends = np.append(simulation.starts[keep], simulation.steps) / simulation.steps
    looks = [
        (colour, f"{name}: {100 * shares[0, d]:.1f} % at first, {100 * shares[-1, d]:.1f} % at last")
        for d, (name, colour) in enumerate(domain_colours(simulation.names).items())
    ]
    heights = [(0.0, "0"), (0.5, "50"), (1.0, "100")]
    title = f"<b>{simulation.strategy}</b>: share of steps, %"
    content = FRAME.areas(ends, shares, looks)
    if before is not None and not (
        before.shares.shape == simulation.shares.shape and np.allclose(before.shares, simulation.shares)
    ):
        some = slice(None, None, -(-len(before.starts) // MAX_WINDOWS))
        places, tops = before.starts[some] / before.steps, before.shares[some].cumsum(axis=1)[:, :-1].T
        content += "".join(
            _ghost(FRAME.line([*zip(places, top, strict=True), (1.0, top[-1])], "#ffffff")) for top in tops
        )
    return _picture(title, content, heights, f"step {simulation.steps:,}")


def _picture(title: str, content: str, heights: Sequence[tuple[float, str]], end: str) -> str:
    """A chart with a title above it, and what its right end is."""
    chart = FRAME.drawn(content, heights, [(0.0, "0"), (1.0, end)], f"width:{FRAME.width}px;max-width:100%")
    return f'<div style="max-width:100%"><div>{title}</div>{chart}</div>'


def _table(simulations: Sequence[Simulation], setting: Setting) -> str:
    """Share, passes and final loss of each domain for each strategy; a domain that starves is bold, with a sign."""
    tables = [outcome(one, setting.sizes).set_index("domain") for one in simulations]
    head = html_rows([["", *((one.strategy, 3) for one in simulations)]], "th", "th")
    head += html_rows([["", *["share %", "passes", "loss"] * len(simulations)]], "th", "th")
    lines = []
    for name, colour in domain_colours(setting.sizes).items():
        line = [square(colour, name)]
        for row in (table.loc[name] for table in tables):
            share = f"{100 * row['share']:.1f}"
            line += [f"<b>▼ {share}</b>" if row["starves"] else share, f"{row['passes']:.1f}", f"{row['loss']:.2f}"]
        lines.append(line)
    return f'<div style="overflow-x:auto;margin:6px 0"><table {BARE}>{head}{html_rows(lines)}</table></div>'
