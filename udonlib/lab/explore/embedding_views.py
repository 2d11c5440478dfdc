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
from jaxtyping import Int

from udonlib.errors import UserError, nearest
from udonlib.evaluation.outcomes import GROUPS
from udonlib.lab.explore.embedding_map import NO_QUERY, RIGHT, WRONG, EmbeddingMap, MapLayout, cache_of
from udonlib.lab.explore.neighbourhoods import confused_domains, confusions, hubness, purity
from udonlib.lab.projections import QUICK, seconds
from udonlib.lab.views.charts import dots, f32, panels
from udonlib.lab.views.evaluation_views import how_far
from udonlib.lab.views.live import ProgressLine
from udonlib.lab.views.sheets import RIGHT_INK, WRONG_INK
from udonlib.lab.views.style import EMBEDDER_LOOKS, PALETTE, TEXT, domain_colours
from udonlib.lab.views.tables import Table, columns_table, facts_table, figure
from udonlib.runs.watch import duration

OTHERS = "others"  # of classes that have no colour
PALE = "#a3a3a3"  # points that say nothing: what is no query has no outcome
GAP_COLOURS = {
    "teacher only": EMBEDDER_LOOKS["teacher"].colour,
    "student only": EMBEDDER_LOOKS["student"].colour,
    "both": "#8fb3de",
    "neither": "#4d4d4d",
    NO_QUERY: PALE,
}
# Whose first neighbour is right, in words that need no legend.
WHOSE = {
    "both": "teacher's and student's",
    "teacher only": "the teacher's alone",
    "student only": "the student's alone",
    "neither": "neither teacher's nor student's",
    NO_QUERY: NO_QUERY,
}
RESULT_COLOURS = {RIGHT: RIGHT_INK, WRONG: WRONG_INK, NO_QUERY: PALE}
LAYOUTS = {"quick": "the layout", "umap": "UMAP", "pca": "PCA"}
STYLE = "font-size:13px;line-height:1.45;color:inherit"
MAX_DRAWN = 4_000  # points of one map in a figure; the explorer draws all
# Percent of queries -> colour: opaque, so that the numbers on it read on light and dark pages.
HEAT = [[0, "#6a737a"], [0.3, "#8a5a3a"], [1, "#b02a00"]]  # white text reads on all of it, on light and dark pages


@dataclass(frozen=True, eq=False)
class Colouring:
    """How points are coloured: the number of each point's kind, and each kind's name and colour.

    note: what else has to be known, a sentence or nothing.
    """

    kind: Int[np.ndarray, "point"]
    names: tuple[str, ...]
    colours: tuple[str, ...]
    note: str = ""


def colourings(space: EmbeddingMap) -> dict[str, str]:
    """What points can be coloured by: the name to choose, and its label."""
    labels = {"domain": "domain", "class": "class", "result": f"hit or miss of the {space.params.embedder}"}
    return labels | ({"gap": "who is right: teacher, student"} if space.has_teachers else {})


def colouring(space: EmbeddingMap, by: str, rows: Int[np.ndarray, "_"] | None = None) -> Colouring:
    """Colour the points by "domain", "class", "result" (of the first neighbour) or "gap" (teacher against student).

    Of more classes than there are colours the most frequent among `rows` have one, by default among all; others are
    grey.

    Raises:
        UserError: another name, or "gap" of a run without teachers.
    """
    if by not in colourings(space):
        raise UserError(f"no colouring '{by}'; {nearest(by, colourings(space))}")
    if by == "class":
        names = space.points["class"].astype(str) + " (" + space.points["domain"] + ")"
        counts = (names if rows is None else names.iloc[rows]).value_counts()
        shown = sorted(counts.index, key=lambda name: (-counts[name], name))[: len(PALETTE)]
        kind = names.map({name: number for number, name in enumerate(shown)}).fillna(len(shown)).to_numpy(np.int64)
        n_others = names.nunique() - len(shown)
        if not n_others:
            return Colouring(kind, tuple(shown), PALETTE[: len(shown)])
        note = f"the {len(shown)} most frequent of {names.nunique():,} classes; a search or a domain chooses others"
        return Colouring(kind, (*shown, OTHERS), (*PALETTE[: len(shown)], PALE), note)
    if by == "domain":
        looks = domain_colours(space.catalog.names)
        looks = {name: looks[name] for name in space.domains}
    else:
        looks = RESULT_COLOURS if by == "result" else {name: GAP_COLOURS[name] for name in (*GROUPS, NO_QUERY)}
    kind = pd.Categorical(space.points[by], list(looks)).codes.astype(np.int64)
    return Colouring(kind, tuple(looks), tuple(looks.values()))


def described(space: EmbeddingMap) -> Table:
    """Tabulate what is shown: the run, its embedders, and how many images of what."""
    p, run = space.params, space.run.params
    results = ", ".join(f"{name} {value:.1f}" for name, value in space.r_at_1.items())
    of = "" if len(space.points) == space.n_images else f", chosen of {space.n_images:,} (max_points)"
    facts = {
        "run": f"{space.run.path.name}: recipe {run.recipe}, seed {run.seed}",
        **({"unfinished": unfinished} if (unfinished := how_far(space.run)) else {}),
        "R@1, merged, %": f"{results}; mean of {', '.join(space.domains)}",
        "points": f"{len(space.points):,} test images{of}: queries, and what else is in the index",
        "neighbours": f"of the {p.embedder}, {p.k} of each of {len(space.lists[p.embedder]):,} queries",
        "kept in": str(cache_of(p)),
    }
    return facts_table(facts)


def embed(space: EmbeddingMap, live: bool | None = None, clock: Callable[[], float] = time.monotonic) -> None:
    """Embed the points, unless that was done, and show how it goes.

    Args:
        space: the map.
        live: redraw one line (True) or print lines (False); None: as `live.has_front_end` says.
        clock: seconds; for tests.
    """
    n_before = len(space.points)
    with ProgressLine({"embedding": "images"}, live, clock) as line:
        computed = space.embed(lambda done, total: line.progress("embedding", done, total), line.note)
    lost = n_before - len(space.points)
    how = f"embedded in {duration(line.seconds())}" if computed else "embedded before"
    left_out = f"; {lost:,} could not be read and are left out" if lost else ""
    line.say(f"{len(space.points):,} images {how}{left_out}")


def is_ready(space: EmbeddingMap, view: str, projection: str) -> bool:
    """Say whether a layout takes no time to speak of: a PCA, a quick one of few points, one that was kept."""
    is_small = projection == "quick" and len(space.points) <= QUICK
    return is_small or space.is_kept(view, projection)


def map_chart(space: EmbeddingMap, by: str = "domain") -> go.Figure:
    """Draw the maps of student and teachers side by side, coloured as `colouring` says.

    The projection is that of `params`. A layout that takes time and was not kept is computed, and said to be.
    """
    p = space.params
    views = [name for name in ("student", "teacher") if name in space.views]
    todo = [name for name in views if not is_ready(space, name, p.projection)]
    if todo:
        took = duration(seconds(len(space.points), p.projection))
        print(f"computing {LAYOUTS[p.projection]} of {' and '.join(todo)}: about {took} each", flush=True)
    return laid_out(
        space, by, [space.layout(name, p.projection, lambda text: print(text, flush=True)) for name in views]
    )


def laid_out(space: EmbeddingMap, by: str, layouts: Sequence[MapLayout]) -> go.Figure:
    """Draw layouts side by side, coloured as `colouring` says; of more than MAX_DRAWN points a random choice."""
    p, looks = space.params, colouring(space, by)
    chosen = np.random.default_rng(p.seed).permutation(len(space.points))[:MAX_DRAWN]
    label = colourings(space)[by]
    titles = [layout.caption.replace(": ", ":<br>", 1).replace("; ", ";<br>", 1) for layout in layouts]
    some = f" ({len(chosen):,} of {len(space.points):,} points drawn)" if len(chosen) < len(space.points) else ""
    fig = panels(f"Test images by {label}{some}", titles, 1, len(layouts), 577, horizontal_spacing=0.04)
    fig.update_annotations(font_size=12, yshift=2)
    for column, layout in enumerate(layouts, 1):
        kinds = list(enumerate(zip(looks.names, looks.colours, strict=True)))
        for number, (name, colour) in sorted(
            kinds, key=lambda kind: kind[1][0] not in (NO_QUERY, OTHERS)
        ):  # these behind the others
            here = chosen[looks.kind[chosen] == number]
            text = (space.points["class"] + ", " + space.points["domain"]).iloc[here]
            style, hover = {"color": colour, "size": 3.5, "opacity": 0.85}, "%{text}<extra></extra>"
            legend = column == 1
            points = dots(name, f32(layout.xy[here, 0]), f32(layout.xy[here, 1]), style, hover, legend, text=text)
            fig.add_trace(points, row=1, col=column)
        for name, x, y in layout.labels:
            top = y + 1 / math.ceil(math.sqrt(len(layout.labels)))
            place = {"x": x, "y": top, "yanchor": "top", "showarrow": False, "row": 1, "col": column}
            fig.add_annotation(text=f"<b>{html.escape(name)}</b>", font={"size": 11, "color": TEXT}, **place)
    fig.update_layout(hovermode="closest")
    fig.update_layout(legend={"orientation": "h", "x": 0, "y": -0.04, "yanchor": "top", "itemsizing": "constant"})
    fig.update_layout(margin={"l": 20, "r": 20, "t": 112, "b": 70})
    fig.update_xaxes(range=[-1.06, 1.06], showticklabels=False, ticks="", showgrid=False, constrain="domain")
    fig.update_yaxes(range=[-1.06, 1.06], showticklabels=False, ticks="", showgrid=False, constrain="domain")
    for column in range(1, len(layouts) + 1):
        fig.update_yaxes(scaleanchor="x" if column == 1 else f"x{column}", row=1, col=column)
    return fig


def confusion_chart(space: EmbeddingMap) -> go.Figure:
    """Draw which domain's item a wrong first neighbour is, in percent of the query's domain, for each embedder."""
    tables = {name: confusions(lists) for name, lists in space.lists.items()}
    titles = [f"{name}, R@1 {space.r_at_1[name]:.1f}%" for name in tables]
    title, height = "Wrong first neighbours, percent of a domain's queries", 210 + 36 * len(next(iter(tables.values())))
    fig = panels(title, titles, 1, len(tables), height, horizontal_spacing=0.03, shared_yaxes=True)
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
    return fig.update_layout(margin={"b": 90, "l": 90}, hovermode="closest")


def hub_table(space: EmbeddingMap) -> Table:
    """Tabulate how unevenly the items of each domain turn up in lists: see `neighbourhoods.hubness`."""
    table = hubness(space.lists[space.params.embedder]).set_index("domain")
    columns = {
        ("", "items"): [f"{n:,}" for n in table["n_items"]],
        ("", "never found"): [f"{value:.1f} %" for value in table["percent_never"]],
        ("", "most lists"): [f"{n:,}" for n in table["most"]],
        ("", "skewness"): [figure(value) for value in table["skewness"]],
        ("share of", "the index"): [f"{value:.1f} %" for value in table["percent_index"]],
        ("share of", "all lists"): [f"{value:.1f} %" for value in table["percent_lists"]],
    }
    return columns_table(columns, list(table.index), (f"{space.params.embedder},", f"k = {space.params.k}"))


def region_text(space: EmbeddingMap, rows: Int[np.ndarray, "_"]) -> str:
    """Describe a region as HTML: how pure it is, how its queries were answered, what else is near."""
    lists = space.lists[space.params.embedder]
    held = purity(space.points, lists, rows)
    queries = space.points["query"].to_numpy()[rows]
    queries = queries[queries >= 0]
    facts = [
        f"<b>{held.n_images:,} images</b>, {held.n_queries:,} of them queries",
        f"purity: {held.percent_domain:.0f}% {html.escape(held.domain)}; most frequent class "
        f"{html.escape(held.label)} {held.percent_label:.0f}%",
    ]
    if len(queries):
        right = ", ".join(f"{name} {100 * part.hit[queries, 0].mean():.0f}%" for name, part in space.lists.items())
        facts.append(
            f"first neighbour right: {right}; same class among the {space.params.k} nearest, "
            f"{lists.embedder}: {held.same_class:.0f}%"
        )
        near = confused_domains(lists, queries)
        words = [f"{html.escape(r.domain)} ({r.percent:.0f}% of the queries)" for r in near.head(4).itertuples()]
        facts.append("other domains among the nearest: " + (", ".join(words) or "none"))
    return paragraph("<br>".join(facts), safe=True)


def caption_text(layout: MapLayout) -> str:
    """Caption a layout: what it is; the grid's order, how it was made, and what it keeps. Nothing is cut."""
    first, _, second = layout.caption.partition(": ")
    if layout.labels:
        heights = list(dict.fromkeys(y for _, _, y in layout.labels))
        rows = (", ".join(name for name, _, y in layout.labels if y == height) for height in heights)
        second = f"rows: {' / '.join(rows)}; {second}"
    small = f'<span style="font-size:12px">{html.escape(second)}</span>'
    return f'<div style="{STYLE}"><b>{html.escape(first)}</b><br>{small}</div>'


def paragraph(text: str, safe: bool = False) -> str:
    """Set text as a paragraph in the page's colour.

    safe: it is HTML already, with whatever comes from files escaped.
    """
    return f'<div style="{STYLE}">{text if safe else html.escape(text)}</div>'
