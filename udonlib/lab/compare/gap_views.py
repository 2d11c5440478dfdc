"""What is seen of the gaps between student, teachers and specialists: tables of `compare.gaps` in, figures out.

Student, teacher and specialist are told apart by symbol and line as well as by colour; a domain keeps its colour.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from IPython.display import display
from ipywidgets import HTML, Image, VBox

from udonlib.data.catalog import Catalog
from udonlib.data.decoding import decode
from udonlib.evaluation.evaluate import Neighbours
from udonlib.evaluation.outcomes import EMBEDDERS, GROUPS
from udonlib.lab.compare.gaps import (
    DIFFERENCE,
    NOTHING,
    RIGHT,
    WRONG_CLASS,
    GapRun,
    between_embedders,
    first_neighbours,
    in_short,
    kinds_found,
    levels,
    pairs,
)
from udonlib.lab.pictures import pictures
from udonlib.lab.views.charts import (
    cell,
    dots,
    error_bars,
    f32,
    grid,
    label_grid,
    line,
    marker,
    name_rows,
    panels,
    row_heights,
)
from udonlib.lab.views.evaluation_views import how_far
from udonlib.lab.views.front_end import Still, named
from udonlib.lab.views.live import has_front_end
from udonlib.lab.views.sheets import GAP, INK, LINE, RIGHT_INK, WRONG_INK, Picture, Sheet, class_map
from udonlib.lab.views.style import EMBEDDER_LOOKS, PNG_WIDTH, TEXT, domain_colours, metric_labels
from udonlib.lab.views.tables import Table, columns_table, difference, facts_table, figure, with_shares
from udonlib.presets import GapParams

# Group of queries -> colour and symbol: the colour of whoever is right.
GROUP_LOOKS = {
    "all": (TEXT, "line-ns-open"),
    "both": (TEXT, "square"),
    "teacher only": (EMBEDDER_LOOKS["teacher"].colour, "diamond-open"),
    "student only": (EMBEDDER_LOOKS["student"].colour, "circle"),
    "neither": (TEXT, "x-thin-open"),
}
GREY = "#8c8c8c"
OTHER_CLASS = "own domain, other class"
PANEL = 170  # pixels, height of one of many panels


def compared(gaps: GapRun, seed: int = 0) -> Table:
    """Sum up who leads, and tabulate what is compared: the run, its specialists, how many queries search what."""
    run, p = gaps.run, gaps.run.params
    specialists = ", ".join(folder.path.name for folder in gaps.specialists.values())
    n_index = sum(map(len, gaps.neighbours[0].searched.paths))
    n_queries = gaps.outcomes.query("index == 'merged' and embedder == 'student'").groupby("domain", sort=False).size()
    facts = facts_table(
        {
            "run": f"{run.path.name}: recipe {p.recipe}, {p.steps:,} steps at most, seed {p.seed}",
            **({"unfinished": unfinished} if (unfinished := how_far(run)) else {}),
            "student": f"{p.student_dim} dimensions, one for all domains",
            "teachers": f"{p.teacher_dim} dimensions, one for each domain, on the student's backbone",
            "specialists": specialists
            or "none; 'auto' needs a run of recipe 'specialist', with this one's backbone, for each domain",
            "queries": ", ".join(f"{domain} {n:,}" for domain, n in n_queries.items()),
            "merged index": f"{n_index:,} images of {', '.join(run.catalog.names)}",
        }
    )
    said = in_short(gaps.outcomes, seed)
    return Table(f"<p><b>{html.escape(said)}</b></p>{facts.html}", f"{said}\n{facts.text}")


def difference_table(gaps: GapRun, seed: int = 0) -> Table:
    """Tabulate each embedder's metrics in percent and their paired differences to the student's, in points.

    ± is half the width of the 95% interval over queries; a difference is bold where its interval excludes zero.
    """
    labels = metric_labels(gaps.outcomes)
    order = [*gaps.domains, "mean"]
    columns: dict[tuple[str, str], list[str]] = {}
    by_metric = {metric: levels(gaps.outcomes, metric, seed=seed) for metric in labels}
    embedders = list(dict.fromkeys(by_metric["r_at_1"]["embedder"]))
    for embedder in embedders:
        for metric, label in labels.items():
            rows = by_metric[metric].query("embedder == @embedder").set_index("domain").reindex(order)
            columns[embedder, label] = [figure(row.mean, row.low, row.high) for row in rows.itertuples()]
    for one in embedders[1:]:
        for metric, label in labels.items():
            rows = between_embedders(gaps.outcomes, metric, seed=seed).query("one == @one and other == 'student'")
            rows = rows.set_index("domain").reindex(order)
            columns[f"{one} − student", label] = [difference(row.mean, row.low, row.high) for row in rows.itertuples()]
    return columns_table(columns, order, ("merged index,", "percent"))


def difference_chart(gaps: GapRun, seed: int = 0) -> go.Figure:
    """Draw how far teachers and specialists lead the student in each domain, with paired 95% intervals."""
    labels = metric_labels(gaps.outcomes)
    order = [*gaps.domains, "mean"]
    title = "Lead over the student, same queries, merged index"
    fig = panels(title, [f"{label}, percentage points" for label in labels.values()], 1, 2, 150 + 40 * len(order))
    for column, metric in enumerate(labels, 1):
        rows = between_embedders(gaps.outcomes, metric, seed=seed).query("other == 'student'")
        leaders = list(dict.fromkeys(rows["one"]))
        for place, one in enumerate(leaders):
            part = rows[rows["one"] == one].set_index("domain").reindex(order).reset_index()
            y = row_heights(len(order), 0.17 * (len(leaders) - 1 - 2 * place))
            look = EMBEDDER_LOOKS[one]
            points = dots(
                one, f32(part["mean"]), y, marker(look.colour, look.symbol), "%{text}: %{x:+.1f}", column == 1
            )
            points.update(error_x=error_bars(part, colour=look.colour), text=part["domain"])
            fig.add_trace(points, row=1, col=column)
        fig.add_vline(x=0, line={"color": TEXT, "width": 1.5}, row=1, col=column)
    name_rows(fig, order, borders=False)
    fig.update_xaxes(title="← student ahead    student behind →")
    return fig.update_layout(hovermode="closest")


def validation_chart(validation: pd.DataFrame, metric: str = "r_at_1", index: str = "merged") -> go.Figure:
    """Draw student and teacher at each validation, one panel a domain. Older runs validated the student alone."""
    rows = validation[validation["index"] == index].sort_values("step", kind="stable")
    rows = rows[rows["embedder"].isin(EMBEDDERS)]
    names = list(dict.fromkeys(rows["domain"]))
    alone = "" if "teacher" in set(rows["embedder"]) else " (the teachers were not validated in this run)"
    fig = grid(f"Validation: student and teacher over training{alone}", names, panel=PANEL, gap=75)
    label = metric_labels(rows)[metric] if len(rows) else "R@1"
    for place, domain in enumerate(names):
        for embedder in (name for name in EMBEDDERS if name in set(rows["embedder"])):
            part = rows[(rows["domain"] == domain) & (rows["embedder"] == embedder)]
            look = EMBEDDER_LOOKS[embedder]
            curve = line(embedder, part["step"], part[metric], look.colour, "%{y:.1f}", place == 0, dash=look.dash)
            looks = {"symbol": look.symbol, "size": 8, "line": {"width": 2, "color": look.colour}}
            fig.add_trace(curve.update(mode="lines+markers", marker=looks), **cell(place))
    fig.update_xaxes(rangemode="tozero", nticks=5, tickformat=",")
    label_grid(fig, len(names), "step", f"{label}, %")
    return fig


def counts_table(counts: pd.DataFrame) -> Table:
    """Tabulate `right_and_wrong`: for each domain a two by two of student and teacher, queries and their share."""
    share = {group: with_shares(counts[group], counts["n_queries"]) for group in GROUPS}
    columns = {
        ("", "queries"): [f"{n:,}" for n in counts["n_queries"]],
        ("teacher right", "student right"): share["both"],
        ("teacher right", "student wrong"): share["teacher only"],
        ("teacher wrong", "student right"): share["student only"],
        ("teacher wrong", "student wrong"): share["neither"],
    }
    return columns_table(columns, list(counts["domain"]), ("first neighbour", ""))


def frequency_chart(*tables: pd.DataFrame) -> go.Figure:
    """Draw R@1 by the frequency of the queries' class, one panel a domain.

    Args:
        tables: of `by_frequency`; of several kinds of count, a domain is drawn by the last one that it has.
    """
    rows = pd.concat([table for table in tables if len(table)], ignore_index=True)
    several = rows["count"].nunique() > 1
    kinds = list(dict(zip(rows["domain"], rows["count"], strict=True)).items())
    notes = [", training images" if several and count == "n_train" else "" for _, count in kinds]
    fig = grid("R@1 by frequency of the class", [domain for domain, _ in kinds], notes, PANEL, 95)
    for place, (domain, count) in enumerate(kinds):
        part = rows[(rows["domain"] == domain) & (rows["count"] == count)]
        shown = [name for name in EMBEDDERS if name in set(part["embedder"])]
        for shift, embedder in zip((np.arange(len(shown)) - (len(shown) - 1) / 2) * 0.26, shown, strict=True):
            bins, look = part[part["embedder"] == embedder], EMBEDDER_LOOKS[embedder]
            looks, texts = marker(look.colour, look.symbol, 8, 2), [f"{n:,} queries" for n in bins["n_queries"]]
            points = dots(embedder, bins["bin"] + shift, f32(bins["mean"]), looks, "%{y:.1f} %, %{text}", place == 0)
            fig.add_trace(points.update(error_y=error_bars(bins, colour=look.colour), text=texts), **cell(place))
        lead = part[part["embedder"] == DIFFERENCE]
        ticks = {"tickvals": lead["bin"], "ticktext": [_bin_label(row) for row in lead.itertuples()], "tickangle": 0}
        fig.update_xaxes(**ticks, tickfont_size=11, range=[-0.6, len(lead) - 0.4], showgrid=False, **cell(place))
    label_grid(fig, len(kinds), "images of the class<br>teacher − student", "R@1, %", standoff=5)
    return fig.update_layout(hovermode="closest")


def overlap_chart(means: pd.DataFrame, k: int = 5) -> go.Figure:
    """Draw how many of the k nearest neighbours student and teacher share, by domain and by who is right."""
    order = [*dict.fromkeys(name for name in means["domain"] if name != "mean"), "mean"]
    groups = [name for name in GROUP_LOOKS if name in set(means["group"])]
    fig = panels(f"Agreement of student and teacher, merged index, k = {k}", [""], 1, 1, 150 + 60 * len(order))
    for place, group in enumerate(groups):
        part = means[means["group"] == group].set_index("domain").reindex(order).reset_index()
        y = row_heights(len(order), 0.3 - 0.6 * place / max(1, len(groups) - 1))
        colour, symbol = GROUP_LOOKS[group]
        name = "all queries" if group == "all" else f"right: {group}"
        hover = "%{x:.1f} %, rank-biased %{customdata[0]} %, %{customdata[1]:,.0f} queries"
        points = dots(name, f32(part["mean"]), y, marker(colour, symbol, 10), hover)
        points.update(error_x=error_bars(part, colour=colour), customdata=part[["rbo", "n_queries"]].round(1))
        fig.add_trace(points)
    name_rows(fig, order)
    fig.update_xaxes(title=f"mean share of the first {k} neighbours found by both, %")
    return fig.update_layout(hovermode="closest")


def first_neighbour_chart(first: pd.DataFrame) -> go.Figure:
    """Draw what wrong first neighbours are: two stacked bars a domain, in percent of the domain's queries."""
    order = list(dict.fromkeys(first["domain"]))
    wrong = first[first["found"] != RIGHT]
    fig = panels("Wrong first neighbours, merged index", [""], 1, 1, height=560)
    bars = pd.MultiIndex.from_product([order, ["student", "teacher"]], names=["domain", "embedder"])
    looks = {WRONG_CLASS: GREY} | domain_colours([*order, *(set(wrong["found"]) - {WRONG_CLASS, NOTHING} - set(order))])
    looks |= {NOTHING: "#444444"} if NOTHING in set(wrong["found"]) else {}
    for kind, colour in looks.items():
        part = wrong[wrong["found"] == kind].set_index(["domain", "embedder"])[["percent", "n_queries"]]
        part = part.reindex(bars, fill_value=0)
        name = OTHER_CLASS if kind == WRONG_CLASS else kind
        bar = go.Bar(name=name, x=list(zip(*bars, strict=True)), y=f32(part["percent"]), customdata=part["n_queries"])
        pattern = {"shape": ["", "/"] * len(order), "size": 6, "solidity": 0.25, "fillmode": "overlay"}
        bar.update(marker={"color": colour, "pattern": pattern | {"fgcolor": "white"}, "line": {"width": 0}})
        fig.add_trace(bar.update(hovertemplate="%{x}: %{y:.1f} %, %{customdata:,} queries"))
    fig.update_xaxes(showgrid=False, dividercolor=GREY, tickangle=-90)
    fig.update_yaxes(title="share of the domain's queries, %", rangemode="tozero")
    fig.update_layout(barmode="stack", bargap=0.2, hovermode="closest", margin_b=110)
    return fig.update_layout(legend_title={"text": "the neighbour is of", "font_size": 13})


def gap_gallery(
    neighbours: Iterable[Neighbours], catalog: Catalog, group: str, n_queries: int = 8, k: int = 5, seed: int = 0
) -> Picture:
    """Show random queries of a group with the student's and the teacher's neighbours, right and wrong ones marked.

    Args:
        neighbours: in the merged index, of student and teacher in each domain.
        catalog: that was searched.
        group: one of GROUPS, such as "teacher only".
        n_queries: in all, shared by the domains as far as they have such queries.
        k: neighbours of each.
        seed: of the choice.
    """
    wanted = (group in ("both", "student only"), group in ("both", "teacher only"))
    titles = ("student's neighbours", "teacher's neighbours")
    return paired_gallery(list(pairs(neighbours)), catalog, wanted, titles, n_queries, k, seed)


def paired_gallery(
    pairs_of: Sequence[tuple[Neighbours, Neighbours]],
    catalog: Catalog,
    wanted: tuple[bool, bool],
    titles: tuple[str, str],
    n_queries: int = 8,
    k: int = 5,
    seed: int = 0,
) -> Picture:
    """Show random queries with two lists of neighbours, right and wrong ones marked.

    Args:
        pairs_of: two lists of the same queries, domain by domain.
        catalog: that was searched.
        wanted: whether the first neighbour of the one and of the other list is right.
        titles: of the two lists.
        n_queries: in all, shared by the domains as far as they have such queries.
        k: neighbours of each list.
        seed: of the choice.
    """
    return _sheet(_choose(pairs_of, wanted, n_queries, np.random.default_rng(seed)), catalog, titles, k)


def kind_gallery(
    neighbours: Iterable[Neighbours],
    catalog: Catalog,
    bar: tuple[str, str, str],
    n_queries: int = 8,
    k: int = 5,
    seed: int = 0,
) -> Picture:
    """Show random queries of one bar of `first_neighbour_chart`, as `gap_gallery` does.

    Args:
        bar: domain, embedder, and what its first neighbour is, in the words of `gaps.first_neighbours`.
    """
    domain, embedder, kind = bar
    chosen = []
    for pair in (pair for pair in pairs(neighbours) if pair[0].query_domain == domain):
        part = next(part for part in pair if part.embedder == embedder)
        fitting = np.random.default_rng(seed).permutation(np.flatnonzero(kinds_found(part) == kind))
        chosen += [(pair, int(query)) for query in fitting[:n_queries]]
    return _sheet(chosen, catalog, ("student's neighbours", "teacher's neighbours"), k)


def wrong_neighbours(gaps: GapRun, params: GapParams, live: bool | None = None) -> None:
    """Show what goes wrong; where a person looks, a click on a bar shows queries of it.

    Args:
        live: whether a person looks at the cell; None: as `live.has_front_end` says.
    """
    fig = first_neighbour_chart(first_neighbours(gaps.neighbours))
    if not (has_front_end() if live is None else live):
        display(fig)
        return
    widget = go.FigureWidget(fig.update_layout(autosize=True))
    said = HTML("<p>A click on a bar shows queries of it.</p>")
    place = named(Image(format="webp", layout={"display": "none", "max_width": "100%"}), "gaps-queries")

    def clicked(trace: Any, points: Any, state: Any) -> None:
        if points.point_inds:
            domain, embedder = (str(names[points.point_inds[0]]) for names in trace.x)
            kind = WRONG_CLASS if trace.name == OTHER_CLASS else trace.name
            image = kind_gallery(
                gaps.neighbours, gaps.catalog, (domain, embedder, kind), params.n_queries, params.k, params.seed
            )
            place.value, place.layout.display = image.data, ""
            said.value = f"<p>{html.escape(f'{domain}, {embedder}: the first neighbour is of {trace.name}')}</p>"

    for trace in widget.data:
        trace.on_click(clicked)
    still = base64.b64encode(pictures.draw(json.loads(fig.to_json()), PNG_WIDTH)).decode()
    Still(named(VBox([widget, said, place]), "gaps-wrong"), f'<img src="data:image/png;base64,{still}">')


def _sheet(
    chosen: Sequence[tuple[tuple[Neighbours, Neighbours], int]], catalog: Catalog, titles: tuple[str, str], k: int
) -> Picture:
    """Draw queries with two lists of neighbours."""
    shown = [[(part.query_domain, part.query_paths[q]), *part.of(q)[:k]] for pair, q in chosen for part in pair]
    classes = class_map(catalog, {image for images in shown for image in images})
    side, top = 80, 3 * LINE + GAP
    step, row_height = side + GAP, side + 2 * LINE + GAP
    lefts = (step + 4 * GAP, step + k * step + 7 * GAP)  # where the query's column ends, and where the student's does
    sheet = Sheet(lefts[1] + k * step + GAP, top + max(1, len(chosen)) * row_height + GAP)
    for x, title in zip((2 * GAP, *lefts), ("query", *titles), strict=True):
        sheet.write(x, 2 * LINE - GAP // 2, title)
    if not chosen:
        sheet.write(2 * GAP, top, "no such query")
    for row, (pair, query) in enumerate(chosen):
        asked = (pair[0].query_domain, pair[0].query_paths[query])
        tiles = [(2 * GAP, asked, (INK, ""))]
        for left, part in zip(lefts, pair, strict=True):
            looks = [(RIGHT_INK, "tick") if hit else (WRONG_INK, "cross") for hit in part.hit[query]]
            tiles += [(left + rank * step, image, looks[rank]) for rank, image in enumerate(part.of(query)[:k])]
        for x, (domain, path), look in tiles:
            captions = [next(iter(classes[domain, path].values()), ""), domain]
            sheet.tile(x, top + row * row_height, side, decode(catalog.store.read(path), path), captions, *look)
    return sheet.image()


def _choose(
    pairs_of: Sequence[tuple[Neighbours, Neighbours]],
    wanted: tuple[bool, bool],
    n_queries: int,
    rng: np.random.Generator,
) -> list[tuple[tuple[Neighbours, Neighbours], int]]:
    """Random queries, one of each domain in turn until there are enough; sorted by domain."""
    left = []
    for number, (student, teacher) in enumerate(pairs_of):
        right = (student.hit[:, 0], teacher.hit[:, 0])
        fitting = np.flatnonzero((right[0] == wanted[0]) & (right[1] == wanted[1]))
        left += [(turn, number, int(query)) for turn, query in enumerate(rng.permutation(fitting))]
    taken = sorted(left)[:n_queries]
    return [(pairs_of[number], query) for _, number, query in sorted(taken, key=lambda item: item[1])]


def _bin_label(row: Any) -> str:
    """The counts of a bin, and below the teacher's lead in it: bold where its interval excludes zero."""
    counts = dict.fromkeys(f"{n:,}" if n < 1000 else f"{n / 1000:,.3g}k" for n in (row.lowest, row.highest))
    lead = figure(row.mean, sign="+")
    between = "–<br>" if sum(map(len, counts)) > 3 else "–"  # bins stand close: long counts in two lines
    return between.join(counts) + "<br>" + (f"<b>{lead}</b>" if row.low > 0 or row.high < 0 else lead)
