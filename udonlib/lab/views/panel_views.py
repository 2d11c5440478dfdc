"""What the steering panel draws: a run's state, its losses and its allocation, as small pieces of HTML and SVG.

Text takes the page's colour, so that it reads on light and dark pages; a redraw is about 20 KB.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence

from udonlib.lab.views.sheets import Table
from udonlib.lab.views.style import EMBEDDERS, GRID, domain_colours
from udonlib.runs.folder import RunFolder
from udonlib.runs.watch import Progress, duration

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 520, 190, 44, 34, 22  # of a chart and its margins, in pixels
Point = tuple[float, float]


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
    facts = [text]
    if progress.state == "running" and left is not None:
        facts.append(f"about {duration(left)} left")
    if not math.isnan(progress.images_per_s):
        facts.append(f"{progress.images_per_s:,.0f} images/s")
    if not math.isnan(progress.best[1]):
        facts.append(f"best validation R@1 {progress.best[1]:.1f} % at step {progress.best[0]:,}")
    share = min(1.0, progress.step / total) if total else 1.0
    bar = f'<div style="width:{share:.2%};height:8px;border-radius:4px;background:{EMBEDDERS["student"][0]}"></div>'
    lines = "".join(f"<div>{html.escape(note)}</div>" for note in notes)
    return (
        '<div style="line-height:1.5;font-size:13px;font-variant-numeric:tabular-nums">'
        f"<b>{html.escape(name)}</b> &nbsp; {' &nbsp;·&nbsp; '.join(map(html.escape, facts))}"
        f'<div style="background:{GRID};border-radius:4px;margin:6px 0">{bar}</div>'
        f'<div style="opacity:0.8">{lines}</div></div>'
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
    bar = ""
    if share is not None:
        rect = f'<rect width="{34 * share / largest:.1f}" height="10" y="3" rx="2" fill="{colour}"/>'
        text = f'<span style="display:inline-block;width:46px">{share:.1%}</span>'
        bar = f'<svg width="36" height="16" style="vertical-align:middle">{rect}</svg>{text}'
    return _cells(
        [
            f"{progress.weights[domain]:.1%}" if domain in progress.weights else "–",
            bar or "–",
            f"{terms['ce_teacher']:.2f}" if "ce_teacher" in terms else "–",
            f"{terms['ce_student']:.2f}" if "ce_student" in terms else "–",
            f"{progress.images_seen.get(domain, 0):,}",
            f'<span title="validated after step {curve[-1][0]:,}">{curve[-1][1]:.1f}</span>' if curve else "–",
        ]
    )


WIDTHS = (48, 92, 46, 48, 58, 36)  # pixels


def _cells(texts: Sequence[str]) -> str:
    style = "display:inline-block;text-align:right;white-space:nowrap;width:{}px"
    cells = "".join(
        f'<span style="{style.format(width)}">{text}</span>' for width, text in zip(WIDTHS, texts, strict=True)
    )
    return f'<div style="font-size:12px;font-variant-numeric:tabular-nums;white-space:nowrap">{cells}</div>'


def page(progress: Progress, head: str) -> str:
    """The panel without its controls: what a saved notebook keeps. `head` is of `status`."""
    colours = domain_colours(progress.domains)
    name = '<td style="text-align:left;padding:0 12px 0 0"><span style="color:{}">■</span> {}</td><td>{}</td>'
    rows = [name.format("transparent", "", headings(COLUMNS))]
    rows += [name.format(colour, html.escape(domain), numbers(progress, domain)) for domain, colour in colours.items()]
    table = f'<table style="font-size:13px;margin:0 0 8px">{"".join(f"<tr>{row}</tr>" for row in rows)}</table>'
    return f'<div class="udon-panel">{head}{table}{charts(progress) if progress.allocations else ""}</div>'


def charts(progress: Progress) -> str:
    """The losses and the allocation over the steps, side by side, with a mark at what a person did to the result."""
    return f'<div style="display:flex;flex-wrap:wrap;gap:12px">{loss_chart(progress)}{allocation_chart(progress)}</div>'


def loss_chart(progress: Progress) -> str:
    """The total loss of each domain over the steps."""
    curves = {name: curve for name, curve in progress.losses.items() if curve}
    values = [value for curve in curves.values() for _, value in curve]
    high = _round_up(max(values, default=1.0))
    colours = domain_colours(progress.domains)
    lines = [
        f'<polyline points="{_points(curve, progress, high)}" fill="none" stroke="{colours[name]}" stroke-width="1.6"/>'
        for name, curve in curves.items()
    ]
    return _chart("total loss", "".join(lines) + _marks(progress), progress, high, "{:g}")


def allocation_chart(progress: Progress) -> str:
    """The shares of steps as stacked areas; what has not been trained yet shows what is in force."""
    colours, areas = domain_colours(progress.domains), []
    allocations = _spread(progress)
    steps = [step for step, _ in allocations]
    ends = [*steps[1:], max(progress.step, steps[-1])] if steps else []
    base = [0.0] * len(steps)
    for name, colour in colours.items():
        tops = [low + shares.get(name, 0.0) for low, (_, shares) in zip(base, allocations, strict=True)]
        upper = [point for a, b, y in zip(steps, ends, tops, strict=True) for point in ((a, y), (b, y))]
        lower = [point for a, b, y in zip(steps, ends, base, strict=True) for point in ((a, y), (b, y))]
        if upper:
            outline = _points([*upper, *reversed(lower)], progress, 1.0)
            areas.append(f'<polygon points="{outline}" fill="{colour}"><title>{html.escape(name)}</title></polygon>')
        base = tops
    return _chart("share of steps", "".join(areas) + _marks(progress), progress, 1.0, "{:.0%}")


def _spread(progress: Progress) -> list[tuple[int, dict[str, float]]]:
    """The allocations that can be told apart in the chart: a pixel apart, or made by an intervention."""
    apart, marked = _end(progress) / WIDTH, {entry.step for entry in progress.interventions if entry.steers}
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
        x = _x(entry.step, progress)
        title = f"<title>step {entry.step:,}: {html.escape(str(entry))}</title>"
        line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="currentColor" '
        marks.append(f'{line}stroke-dasharray="2 3"/><path d="M{x - 5:.1f} {TOP - 8}h10l-5 8z" fill="currentColor">')
        marks.append(f"{title}</path>")
    return "".join(marks)


def _chart(title: str, content: str, progress: Progress, high: float, form: str) -> str:
    """A frame with a title, three grid lines with their values, and the steps below."""
    lines = []
    for part in (0.0, 0.5, 1.0):
        y = _y(part * high, high)
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{y}" y2="{y}" stroke="{GRID}"/>')
        text = form.format(part * high)
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{text}</text>')
    for part in (0.0, 0.5, 1.0):
        step = round(part * _end(progress))
        anchor = {0.0: "start", 0.5: "middle", 1.0: "end"}[part]
        place = f'x="{_x(step, progress):.0f}" y="{HEIGHT - BOTTOM + 15}"'
        lines.append(f'<text {place} text-anchor="{anchor}">{step:,}</text>')
    middle = (LEFT + WIDTH) / 2
    lines.append(f'<text x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    lines.append(f'<text x="{LEFT}" y="11" font-weight="bold">{html.escape(title)}</text>')
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" style="width:100%;max-width:{WIDTH}px;min-width:320px;flex:1 1 320px"'
    grid, rest = "".join(lines[:6:2]), "".join([*lines[1:6:2], *lines[6:]])
    return f'<svg {size} font-size="11" fill="currentColor" role="img">{grid}{content}{rest}</svg>'


def _x(step: float, progress: Progress) -> float:
    return LEFT + (WIDTH - 8 - LEFT) * min(1.0, step / _end(progress))


def _end(progress: Progress) -> int:
    """The last step of the axis: of the run, or while it is young, not far beyond now."""
    near = _round_up(max(20.0, 1.5 * progress.step))
    return max(1, min(progress.params.steps, round(near)))


def _y(value: float, high: float) -> float:
    return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value / high, 1)


def _points(curve: Sequence[Point], progress: Progress, high: float) -> str:
    return " ".join(f"{_x(step, progress):.1f},{_y(value, high)}" for step, value in curve)


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
        which = f"This run was {'steered' if any(entry.steers for entry in done) else 'validated'} by hand"
        which = f"This run repeats what a person did to {name}" if run.params.replay else which
        text = (
            f"<b>{which}</b>: its figures are not those of its parameters alone. The parameter "
            f"<code>replay = {name}</code> of train.ipynb repeats it, step by step."
        )
    left = '<td style="text-align:left">'
    rows = "".join(
        f'<tr><td style="text-align:right">{entry.step:,}</td>{left}{html.escape(str(entry))}</td>'
        f"{left}{html.escape(entry.panel)}</td></tr>"
        for entry in done
    )
    table = f"<table><tr><th>after step</th><th>what was done</th><th>by</th></tr>{rows}</table>"
    plain = [f"after step {entry.step:,}: {entry}" for entry in done]
    return Table(f"<p>{text}</p>{table}", "\n".join([html.unescape(re.sub(r"<.*?>", "", text)), *plain]))
