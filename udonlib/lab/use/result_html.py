"""What was found as HTML: thumbnails by domain, student above teacher, and what is to say of the query."""

from __future__ import annotations

import base64
import html
import importlib.resources
from collections.abc import Iterable

from udonlib.lab.use.answers import MERGED, Found, Hits, Query, is_right
from udonlib.lab.use.searched import Searched, jpeg
from udonlib.lab.views.sheets import RIGHT_INK, WRONG_INK
from udonlib.lab.views.style import ACCENT, GRID, domain_colours, square
from udonlib.search.classify import NONE

STAGE = 500  # pixels of the query's picture: sharp on fine screens
COLOURS = {"grid": GRID, "accent": ACCENT, "right": RIGHT_INK, "wrong": WRONG_INK, "line": "rgba(128, 128, 128, 0.6)"}
COLOURS |= {"field": "transparent", "page": "var(--jp-layout-color0, Canvas)"}


def asset(name: str) -> str:
    """A file of this folder: JavaScript or CSS."""
    return importlib.resources.files(__package__).joinpath(name).read_text("utf-8")


def style() -> str:
    """The style sheet, as an element."""
    values = "; ".join(f"--udon-{name}: {value}" for name, value in COLOURS.items())
    return f"<style>.udon-find {{ {values} }}\n{asset('find.css')}</style>"


def data_uri(content: bytes) -> str:
    """A JPEG as an address that holds it."""
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


def picture_of(query: Query, side: int = STAGE) -> str:
    """The whole picture of a query, as an address."""
    return data_uri(jpeg(query.whole, side, 90))


def tile(
    searched: Searched, row: int, query: Query | None = None, similarity: float | None = None, live: bool = True
) -> str:
    """An image of the index with its class, its similarity and whether it is right.

    Args:
        live: as a button that searches on.
    """
    label, domain = searched.labels[row], searched.row_domains[row]
    name = (label or str(searched.index.images["id"].iloc[row])).removeprefix(f"{domain}/")
    right = None if query is None else is_right(searched, query, row)
    kind = {True: " udon-yes", False: " udon-no", None: ""}[right]
    mark = {True: "<i>✓</i>", False: "<i>✗</i>", None: ""}[right]
    score = "" if similarity is None else f"<span>{similarity:.3f}</span>"
    says = html.escape(f"{searched.index.images['id'].iloc[row]}  {label or domain}", quote=True)
    tag, number = ("button type='button'", f' data-row="{row}"') if live else ("div", "")
    image = f'<img src="{data_uri(searched.thumbnail(row))}" alt="{html.escape(name, quote=True)}">'
    return (
        f'<{tag} class="udon-find-tile{kind}" title="{says}"{number}>{image}{mark}{score}'
        f"<span>{html.escape(name)}</span></{tag.split()[0]}>"
    )


def strip(searched: Searched, rows: Iterable[int]) -> str:
    """Images to choose from."""
    return "".join(tile(searched, row) for row in rows)


def results(searched: Searched, found: Found, live: bool = True) -> str:
    """Neighbours: of all domains together, then of each domain, that of the nearest image first."""
    several = len(found.order) > 1
    blocks = [_block(searched, found, MERGED, "", live)] if several or not found.order else []
    colours = domain_colours(name for name in searched.domains if name)
    for name in found.order:
        title = square(colours[name], name) if name else "images"
        blocks.append(_block(searched, found, name, title, live))
    return "".join(blocks)


def _block(searched: Searched, found: Found, name: str, title: str, live: bool) -> str:
    student = found.student[name]
    title = title or f"<b>{MERGED}</b>"
    rows = [
        _row(searched, found, title + ("<br><small>student</small>" if name in found.teacher else ""), student, live)
    ]
    if name in found.teacher:
        rows.append(_row(searched, found, "<small>its teacher</small>", found.teacher[name], live))
    return f'<div class="udon-find-block" data-domain="{html.escape(name, quote=True)}">{"".join(rows)}</div>'


def _row(searched: Searched, found: Found, title: str, hits: Hits, live: bool) -> str:
    pairs = zip(hits.rows.tolist(), hits.similarities.tolist(), strict=True)
    tiles = "".join(tile(searched, row, found.query, value, live) for row, value in pairs)
    tiles = tiles or '<div class="udon-find-none">no other image</div>'
    who = f'<div class="udon-find-who">{title}</div>'
    return f'<div class="udon-find-row">{who}<div class="udon-find-tiles">{tiles}</div></div>'


def said(searched: Searched, found: Found, live: bool = True) -> str:
    """What is to say of a query: what it is, which class it is taken for, and where the right one stands."""
    query = found.query
    part = "" if query.crop == (0, 0, 1, 1) else ", a part of it"
    lines = [f"<b>{html.escape(query.name)}</b>{part}"]
    if query.label is not None:
        lines.append(f"right class: {html.escape(query.label)}")
    if found.answer is not None:
        nearest = f"; nearest is {html.escape(found.nearest_class or 'none')}" * (found.answer == NONE)
        limit = searched.index.answers.get("threshold", float("nan"))
        score = f"score {found.score:.2f}, threshold {limit:.2f}"
        lines.append(f"taken for: <b>{html.escape(found.answer)}</b>{nearest} ({score})")
    return "".join(f"<p>{line}</p>" for line in [*lines, why_text(searched, found)] if line) + _why_tiles(
        searched, found, live
    )


def why_text(searched: Searched, found: Found) -> str:
    """Where the right class stands, as HTML; "" where that is not known."""
    why, query = found.why, found.query
    if why is None:
        return "" if query.label is None else "no other image of the right class is searched"
    if why.rank == 1:
        return f"found: the right class stands first of {why.n:,} images, at {why.similarity:.3f}"
    before = ", ".join(f"{html.escape(name or 'no domain')} {n:,}" for name, n in list(why.before.items())[:4])
    more = f" and {len(why.before) - 4} more domains" if len(why.before) > 4 else ""
    return (
        f"<b>why not found</b>: the right class stands at rank {why.rank:,} of {why.n:,}, at {why.similarity:.3f}; "
        f"before it {before}{more}. First stands {html.escape(searched.labels[why.first] or 'an image')}, "
        f"at {why.first_similarity:.3f}"
    )


def _why_tiles(searched: Searched, found: Found, live: bool) -> str:
    if found.why is None or found.why.rank == 1:
        return ""
    why = found.why
    pairs = ((why.first, why.first_similarity), (why.right, why.similarity))
    tiles = "".join(tile(searched, row, found.query, value, live) for row, value in pairs)
    return f'<div class="udon-find-tiles udon-find-why">{tiles}</div>'
