"""search.ipynb without hands: what is searched, a sheet of queries, who was not found, what "none of these" costs."""

from __future__ import annotations

import time
from collections.abc import Callable

from udonlib.lab.use.answers import MERGED, Found, Hits, find, is_right, of_row, sample, some
from udonlib.lab.use.searched import Searched, open_search
from udonlib.lab.use.use_params import SearchParams
from udonlib.lab.views.live import ProgressLine
from udonlib.lab.views.sheets import GAP, INK, LINE, RIGHT_INK, WRONG_INK, Picture, Sheet
from udonlib.lab.views.tables import Table, facts_table, lines_table
from udonlib.runs.watch import duration
from udonlib.search.classify import tradeoff

UNITS = {"embedding": "images", "indexing": "vectors", "teachers": "images"}
SIDE, LEFT = 72, 90  # pixels of a tile, and for the words before a row
STEP = SIDE + GAP
ALLOWED = (0.01, 0.05, 0.1, 0.2, 0.5)  # shares of false labels whose cost is told


def opened(params: SearchParams, live: bool | None = None, clock: Callable[[], float] = time.monotonic) -> Searched:
    """Open what is searched, and show how that goes.

    Args:
        live, clock: as of `views.live.ProgressLine`.
    """
    with ProgressLine(UNITS, live, clock) as line:
        searched = open_search(params, line.progress, line.note)
    line.say(f"{len(searched.index):,} images are searched, after {duration(line.seconds())}")
    return searched


def index_table(searched: Searched) -> Table:
    """Tabulate what is searched, by which model, and what was measured of the index."""
    index, model, chosen = searched.index, searched.model, searched.params.domains
    named = [name for name in searched.domains if name]
    n_classes = len({label for label in searched.labels[searched.allowed] if label is not None})
    facts = {
        "model": f"{model.name}, {index.model.dim} dimensions, images of {model.image_size} pixels; {model.source}",
        "images": f"{len(index):,}" + (f", of which {int(searched.allowed.sum()):,} may be found" * (chosen != "all")),
        "domains": ", ".join(named) or "none known: images lie in no folders of domains",
        "classes": f"{n_classes:,}",
    }
    for measured in index.measured:
        last = measured is index.measured[-1]
        facts["index" if last else f"tried: {measured.kind}"] = (
            f"{measured.kind}{f', setting {measured.setting}' if measured.setting else ''}: recall@{measured.k} "
            f"{measured.recall:.3f} of the exact neighbours, {measured.ms:.2g} ms a query, "
            f"{measured.n_bytes / 1e6:,.1f} MB"
        )
    taught = searched.teachers
    facts["teachers"] = ", ".join(taught.names) if taught is not None else "none are shown"
    if index.answers:
        a = index.answers
        facts["none of these"] = (
            f"below a score of {a['threshold']:.2f}: of {a['n_checked']} known images {a['answered']:.0%} are "
            f"answered, {a['right']:.0%} of these rightly; of images of unknown classes {a['false_labels']:.0%} are"
        )
    return facts_table(facts)


def query_sheet(searched: Searched) -> Picture:
    """Show queries with their neighbours in all domains, and below what their domain's own teacher finds in it."""
    queries = sample(searched, searched.params.n_queries, searched.params.seed)
    shown = [find(searched, of_row(searched, row)) for row in queries]
    k, n_rows = searched.params.k, 1 + any(found.teacher for found in shown)
    height = n_rows * (SIDE + LINE + GAP) + GAP
    sheet = Sheet(LEFT + (k + 1) * STEP + 3 * GAP, 3 * LINE + len(shown) * height)
    sheet.mark(GAP, 6, "tick", RIGHT_INK)
    sheet.write(GAP + 24, 6, "same class")
    sheet.mark(GAP + 120, 6, "cross", WRONG_INK)
    sheet.write(GAP + 144, 6, "other class; a number is the similarity")
    for number, found in enumerate(shown):
        _query(sheet, searched, found, 2 * LINE + number * height)
    return sheet.image()


def _query(sheet: Sheet, searched: Searched, found: Found, y: int) -> None:
    query = found.query
    domain = searched.row_domains[query.row]
    label = (query.label or query.name).removeprefix(f"{domain}/")
    sheet.tile(GAP, y, SIDE, query.whole, [label], INK)
    for line, (who, hits) in enumerate((("student", found.student[MERGED]), ("teacher", found.teacher.get(domain)))):
        if hits is not None:
            _hits(sheet, searched, found, hits, who, y + line * (SIDE + LINE + GAP))


def _hits(sheet: Sheet, searched: Searched, found: Found, hits: Hits, who: str, y: int) -> None:
    left = STEP + 2 * GAP
    sheet.write(left, y + SIDE // 2 - LINE, who, LEFT)
    sheet.write(left, y + SIDE // 2, "all domains" if who == "student" else "its domain", LEFT)
    for rank, (row, value) in enumerate(zip(hits.rows.tolist(), hits.similarities.tolist(), strict=True)):
        right = is_right(searched, found.query, row)
        look = {True: (RIGHT_INK, "tick"), False: (WRONG_INK, "cross"), None: ("", "")}[right]
        sheet.tile(left + LEFT + rank * STEP, y, SIDE, searched.picture(row), [f"{value:.3f}"], *look)


def misses_table(searched: Searched) -> Table:
    """Tabulate queries whose right class does not stand first: at which rank it stands, and what stands before it."""
    lines = []
    for row in some(searched, searched.params.n_queries, misses=True, seed=searched.params.seed):
        found = find(searched, of_row(searched, row))
        why = found.why
        if why is None or why.rank == 1:
            continue
        before = ", ".join(f"{name} {n:,}" for name, n in list(why.before.items())[:3])
        first = f"{searched.labels[why.first]} ({why.first_similarity:.3f})"
        lines.append([str(found.query.label), f"{why.rank:,}", f"{why.similarity:.3f}", first, before])
    head = ["right class of the query", "its rank", "similarity", "first stands", "before it, by domain"]
    return lines_table(head, lines or [["every query that was looked at is found", "", "", "", ""]], side="left")


def costs_table(searched: Searched) -> Table:
    """Tabulate what "none of these" costs, by the share of unknown classes' images that may get a label."""
    if not searched.index.answers:
        return facts_table({"no answers": "too few of the images have another one of their class"})
    table = tradeoff(searched.index, ALLOWED, seed=searched.params.seed)
    lines = [
        [
            f"{row.allowed:.0%}",
            f"{row.threshold:.2f}",
            f"{row.answered:.0%}",
            f"{row.right:.0%}",
            f"{row.false_labels:.0%}",
        ]
        for row in table.itertuples()
    ]
    head = ["allowed", "threshold", "known images answered", "of these rightly", "unknown ones given a label"]
    return lines_table(head, lines)
