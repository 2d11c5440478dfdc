"""What is seen of an embedding without widgets: maps, hubs and confusions as figures and tables; progress of embedding.

The colours of points are those of the explorer, too: see `colouring`.
"""

from __future__ import annotations

import html
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from IPython.display import HTML, display
from jaxtyping import Int
from plotly.subplots import make_subplots

from udonlib.errors import UserError, nearest
from udonlib.evaluation.outcomes import GROUPS
from udonlib.lab.explore.embedding_map import NO_QUERY, RIGHT, WRONG, EmbeddingMap, Layout, cache_of
from udonlib.lab.explore.neighbourhoods import confused_domains, confusions, hubness, purity
from udonlib.lab.explore.projections import seconds
from udonlib.lab.views.charts import f32
from udonlib.lab.views.live import LINE_SECONDS, REDRAW_SECONDS, has_front_end
from udonlib.lab.views.sheets import RIGHT_INK, WRONG_INK, Table, facts_table, html_table
from udonlib.lab.views.style import EMBEDDERS, PALETTE, TEMPLATE, TEXT, domain_colours
from udonlib.runs.watch import duration

PALE = "#a3a3a3"  # points that say nothing: what is no query has no outcome
GAP_COLOURS = {
    "teacher only": EMBEDDERS["teacher"][0],
    "student only": EMBEDDERS["student"][0],
    "both": "#8fb3de",
    "neither": "#4d4d4d",
    NO_QUERY: PALE,
}
RESULT_COLOURS = {RIGHT: RIGHT_INK, WRONG: WRONG_INK, NO_QUERY: PALE}
STYLE = "font-size:13px;line-height:1.45;color:inherit"
MAX_DRAWN = 4_000  # points of one map in a figure; the explorer draws all
# Percent of queries -> colour: opaque, so that the numbers on it read on light and dark pages.
HEAT = [[0, "#f4f4f4"], [0.25, "#f6c9a0"], [0.6, "#e07b2f"], [1, "#7a2d00"]]


@dataclass(frozen=True, eq=False)
class Colouring:
    """How points are coloured: the number of each point's kind, and each kind's name and colour.

    note: what else has to be known, a sentence or nothing.
    """

    kind: Int[np.ndarray, "point"]
    names: tuple[str, ...]
    colours: tuple[str, ...]
    note: str = ""


def colourings(found: EmbeddingMap) -> dict[str, str]:
    """What points can be coloured by: the name to choose, and its label."""
    labels = {"domain": "domain", "class": "class", "result": f"hit or miss of the {found.params.embedder}"}
    return labels | ({"gap": "who is right: teacher, student"} if found.has_teachers else {})


def colouring(found: EmbeddingMap, by: str) -> Colouring:
    """Colour the points by "domain", "class", "result" (of the first neighbour) or "gap" (teacher against student).

    Raises:
        UserError: another name, or "gap" of a run without teachers.
    """
    if by not in colourings(found):
        raise UserError(f"no colouring '{by}'; {nearest(by, colourings(found))}")
    if by == "class":
        kind = found.points.groupby("domain", sort=False)["class"].transform(lambda part: pd.factorize(part)[0])
        kind = kind.to_numpy(np.int64) % len(PALETTE)
        n_classes = len(found.points[["domain", "class"]].drop_duplicates())
        note = f"{n_classes:,} classes share {len(PALETTE)} colours: the class stands at the pointer"
        names = tuple(f"colour {number + 1}" for number in range(len(PALETTE)))
        return Colouring(kind, names, PALETTE, note)
    if by == "domain":
        looks = domain_colours(found.catalog.names)
        looks = {name: looks[name] for name in found.domains}
    else:
        looks = RESULT_COLOURS if by == "result" else {name: GAP_COLOURS[name] for name in (*GROUPS, NO_QUERY)}
    kind = pd.Categorical(found.points[by], list(looks)).codes.astype(np.int64)
    return Colouring(kind, tuple(looks), tuple(looks.values()))


def described(found: EmbeddingMap) -> Table:
    """Tabulate what is shown: the run, its embedders, and how many images of what."""
    p, run = found.params, found.run.params
    results = ", ".join(f"{name} {value:.1f}" for name, value in found.r_at_1.items())
    of = "" if len(found.points) == found.n_images else f", chosen of {found.n_images:,} (max_points)"
    facts = {
        "run": f"{found.run.path.name}: recipe {run.recipe}, seed {run.seed}",
        "R@1, merged, %": f"{results}; mean of {', '.join(found.domains)}",
        "points": f"{len(found.points):,} test images{of}: queries, and what else is in the index",
        "neighbours": f"of the {p.embedder}, {p.k} of each of {len(found.lists[p.embedder]):,} queries",
        "kept in": str(cache_of(p)),
    }
    return facts_table(facts)


def embed(found: EmbeddingMap, live: bool | None = None, clock: Callable[[], float] = time.monotonic) -> None:
    """Embed the points, unless that was done, and show how it goes.

    Args:
        found: the map.
        live: redraw one line (True) or print lines (False); None: as `live.has_front_end` says.
        clock: seconds; for tests.
    """
    line = _Line(has_front_end() if live is None else live, clock)
    n_before = len(found.points)
    computed = found.embed(line.progress, line.note)
    lost = n_before - len(found.points)
    how = f"embedded in {duration(line.seconds())}" if computed else "embedded before"
    left_out = f"; {lost:,} could not be read and are left out" if lost else ""
    line.say(f"{len(found.points):,} images {how}{left_out}")


class _Line:
    """One line that says how far we are: redrawn where somebody looks, else printed now and then."""

    def __init__(self, live: bool, clock: Callable[[], float]) -> None:
        self._clock, self._began, self._next = clock, clock(), -math.inf
        self._handle = display(HTML(""), display_id=True) if live else None
        self._notes: list[str] = []

    def seconds(self) -> float:
        """Time since the beginning."""
        return self._clock() - self._began

    def progress(self, done: int, total: int) -> None:
        now = self._clock()
        if now < self._next:
            return
        taken = now - self._began
        left = f", {duration(taken * (total - done) / done)} left" if taken >= 1 and done < total else ""
        self.say(f"embedding {done:,}/{total:,} images ({done / total:.0%}){left}")
        self._next = now + (LINE_SECONDS if self._handle is None else REDRAW_SECONDS)

    def note(self, text: str) -> None:
        """Show a sentence that stays."""
        self._notes.append(text)
        if self._handle is None:
            print(text, flush=True)

    def say(self, text: str) -> None:
        """Show a line, in place of the one before."""
        if self._handle is None:
            print(text, flush=True)
        else:
            lines = "<br>".join(html.escape(line) for line in (*self._notes, text))
            self._handle.update(HTML(f'<div class="udon-live" style="font-size:13px;color:inherit">{lines}</div>'))


def map_chart(found: EmbeddingMap, by: str = "domain") -> go.Figure:
    """Draw the maps of student and teachers side by side, coloured as `colouring` says.

    The projection is that of `params`. A UMAP that was not kept is computed, and said to be.
    """
    p = found.params
    views = [name for name in ("student", "teacher") if name in found.views]
    todo = [name for name in views if p.projection == "umap" and not found.is_kept(name)]
    if todo:
        print(f"computing UMAP of {' and '.join(todo)}: about {duration(seconds(len(found.points)))} each", flush=True)
    return laid_out(
        found, by, [found.layout(name, p.projection, lambda text: print(text, flush=True)) for name in views]
    )


def laid_out(found: EmbeddingMap, by: str, layouts: Sequence[Layout]) -> go.Figure:
    """Draw layouts side by side, coloured as `colouring` says; of more than MAX_DRAWN points a random choice."""
    p, looks = found.params, colouring(found, by)
    chosen = np.random.default_rng(p.seed).permutation(len(found.points))[:MAX_DRAWN]
    label = colourings(found)[by]
    titles = [layout.caption.replace(": ", ":<br>", 1) for layout in layouts]
    fig = make_subplots(1, len(layouts), subplot_titles=titles, horizontal_spacing=0.04)
    fig.update_annotations(font_size=12, yshift=2)
    for column, layout in enumerate(layouts, 1):
        kinds = list(enumerate(zip(looks.names, looks.colours, strict=True)))
        for number, (name, colour) in sorted(kinds, key=lambda kind: kind[1][0] != NO_QUERY):  # these behind the others
            here = chosen[looks.kind[chosen] == number]
            text = (found.points["class"] + ", " + found.points["domain"]).iloc[here]
            dots = go.Scatter(
                x=f32(layout.xy[here, 0]), y=f32(layout.xy[here, 1]), mode="markers", text=text, name=name
            )
            dots.update(marker={"color": colour, "size": 3.5, "opacity": 0.85}, hovertemplate="%{text}<extra></extra>")
            dots.update(legendgroup=name, showlegend=column == 1 and by != "class")
            fig.add_trace(dots, row=1, col=column)
        for name, x, y in layout.labels:
            top = y + 1 / math.ceil(math.sqrt(len(layout.labels)))
            place = {"x": x, "y": top, "yanchor": "top", "showarrow": False, "row": 1, "col": column}
            fig.add_annotation(text=f"<b>{html.escape(name)}</b>", font={"size": 11, "color": TEXT}, **place)
    some = f" ({len(chosen):,} of {len(found.points):,} points drawn)" if len(chosen) < len(found.points) else ""
    fig.update_layout(template=TEMPLATE, title=f"Test images by {label}{some}", height=560, hovermode="closest")
    fig.update_layout(legend={"orientation": "h", "x": 0, "y": -0.04, "yanchor": "top", "itemsizing": "constant"})
    fig.update_layout(margin={"l": 20, "r": 20, "t": 95, "b": 70})
    fig.update_xaxes(range=[-1.06, 1.06], showticklabels=False, ticks="", showgrid=False, constrain="domain")
    fig.update_yaxes(range=[-1.06, 1.06], showticklabels=False, ticks="", showgrid=False, constrain="domain")
    for column in range(1, len(layouts) + 1):
        fig.update_yaxes(scaleanchor="x" if column == 1 else f"x{column}", row=1, col=column)
    return fig


def confusion_chart(found: EmbeddingMap) -> go.Figure:
    """Draw which domain's item a wrong first neighbour is, in percent of the query's domain, for each embedder."""
    tables = {name: confusions(lists) for name, lists in found.lists.items()}
    titles = [f"{name}, R@1 {found.r_at_1[name]:.1f}%" for name in tables]
    fig = make_subplots(1, len(tables), subplot_titles=titles, horizontal_spacing=0.03, shared_yaxes=True)
    fig.update_annotations(font_size=13, yshift=4)
    highest = max(float(table.to_numpy().max(initial=0)) for table in tables.values()) or 1.0
    for column, table in enumerate(tables.values(), 1):
        values = table.to_numpy()
        text = [
            [f"{value:.0f}" if value >= 0.95 else f"{value:.1f}" if value > 0.05 else "" for value in row]
            for row in values
        ]
        heat = go.Heatmap(
            x=list(table.columns), y=list(table.index), z=f32(values), zmin=0, zmax=highest, xgap=2, ygap=2
        )
        heat.update(colorscale=HEAT, showscale=False, text=text, texttemplate="%{text}", textfont_size=12)
        heat.update(hovertemplate="queries of %{y}, first neighbour of %{x}: %{z:.1f} %<extra></extra>")
        fig.add_trace(heat, row=1, col=column)
    fig.update_yaxes(autorange="reversed", showgrid=False)
    fig.update_yaxes(title="queries of", col=1)
    fig.update_yaxes(ticks="", col=2)
    fig.update_xaxes(title="the wrong first neighbour is of", showgrid=False, tickangle=-45)
    title = "Wrong first neighbours, percent of a domain's queries"
    height = 210 + 36 * len(next(iter(tables.values())))
    return fig.update_layout(template=TEMPLATE, title=title, height=height, margin={"b": 90, "l": 90})


def hub_table(found: EmbeddingMap) -> Table:
    """Tabulate how unevenly the items of each domain turn up in lists: see `neighbourhoods.hubness`."""
    table = hubness(found.lists[found.params.embedder]).set_index("domain")
    cells = {
        ("", "items"): [f"{n:,}" for n in table["n_items"]],
        ("", "never found"): [f"{value:.1f} %" for value in table["percent_never"]],
        ("", "most lists"): [f"{n:,}" for n in table["most"]],
        ("", "skewness"): [f"{value:.1f}".replace("-", "−") for value in table["skewness"]],
        ("share of", "the index"): [f"{value:.1f} %" for value in table["percent_index"]],
        ("share of", "all lists"): [f"{value:.1f} %" for value in table["percent_lists"]],
    }
    shown = pd.DataFrame(cells, index=pd.Index(table.index, name="domain"))
    shown.columns = pd.MultiIndex.from_tuples(cells, names=[f"{found.params.embedder},", f"k = {found.params.k}"])
    return html_table(shown, set())


def region_text(found: EmbeddingMap, rows: Int[np.ndarray, "_"]) -> str:
    """Describe a region as HTML: how pure it is, how its queries were answered, what else is near."""
    lists = found.lists[found.params.embedder]
    held = purity(found.points, lists, rows)
    queries = found.points["query"].to_numpy()[rows]
    queries = queries[queries >= 0]
    facts = [
        f"<b>{held.n_images:,} images</b>, {held.n_queries:,} of them queries",
        f"purity: {held.percent_domain:.0f}% {html.escape(held.domain)}; most frequent class "
        f"{html.escape(held.label)} {held.percent_label:.0f}%",
    ]
    if len(queries):
        right = ", ".join(f"{name} {100 * part.hit[queries, 0].mean():.0f}%" for name, part in found.lists.items())
        facts.append(
            f"first neighbour right: {right}; same class among the {found.params.k} nearest, "
            f"{lists.embedder}: {held.same_class:.0f}%"
        )
        near = confused_domains(lists, queries)
        words = [f"{html.escape(r.domain)} ({r.percent:.0f}% of the queries)" for r in near.head(4).itertuples()]
        facts.append("other domains among the nearest: " + (", ".join(words) or "none"))
    return paragraph("<br>".join(facts), safe=True)


def caption_text(layout: Layout) -> str:
    """Caption a layout in two lines, so that maps stand level: what it is; the grid's order, and how it was made."""
    first, _, second = layout.caption.partition(": ")
    if layout.labels:
        heights = list(dict.fromkeys(y for _, _, y in layout.labels))
        rows = (", ".join(name for name, _, y in layout.labels if y == height) for height in heights)
        second = f"rows: {' / '.join(rows)}; {second}"
    line = "white-space:nowrap;overflow:hidden;text-overflow:ellipsis"
    lines = f'<b>{html.escape(first)}</b><br><small title="{html.escape(second)}">{html.escape(second)}</small>'
    return f'<div style="{STYLE};{line}">{lines}</div>'


def paragraph(text: str, safe: bool = False) -> str:
    """Set text as a paragraph in the page's colour.

    safe: it is HTML already, with whatever comes from files escaped.
    """
    return f'<div style="{STYLE}">{text if safe else html.escape(text)}</div>'
