"""Tables and small drawings as HTML and SVG, which show in every viewer of notebooks.

Text takes the page's colour, so that it reads on light and dark pages.
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from udonlib.lab.views.style import ACCENT, GRID

LOOK = "padding: 2px 7px; white-space: nowrap"  # of a cell
BARE = 'style="border-collapse: collapse; color: inherit; font: inherit"'  # of a table without lines
Cell = str | tuple[str, int]  # HTML; with the number of columns that it spans
Point = tuple[float, float]


@dataclass(frozen=True)
class Table:
    """A table that shows as HTML where there is HTML, and as text elsewhere."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def facts_table(facts: Mapping[str, str]) -> Table:
    """Format names and what is to say about them, one a line."""
    rows = html_rows(([html.escape(part) for part in fact] for fact in facts.items()), first="th", side="left", look="")
    width = max(map(len, facts)) + 2
    return Table(f"<table>{rows}</table>", "\n".join(f"{name:{width}}{text}" for name, text in facts.items()))


def lines_table(head: Sequence[str], lines: Sequence[Sequence[str]], side: str = "right") -> Table:
    """Format texts as a table whose first column names the row and whose others stand on a side; **text** is bold."""
    titles = html_rows(
        [[html.escape(title) for title in head]], "th", "th", side, look=LOOK.replace("nowrap", "normal")
    )
    body = html_rows(([as_html(cell) for cell in cells] for cells in lines), side=side)
    shown = f'<table class="dataframe"><thead>{titles}</thead><tbody>{body}</tbody></table>'
    text = pd.DataFrame(list(map(_plain, lines)), columns=list(head)).to_string(index=False)
    return Table(f'<div style="overflow-x: auto">{shown}</div>', text)


def columns_table(
    columns: Mapping[str, Sequence[str]] | Mapping[tuple[str, str], Sequence[str]],
    names: Sequence[str],
    corner: Sequence[str] = ("",),
) -> Table:
    """Format columns of texts, a row for each domain; **text** is bold, and a rule stands above the last row's sums.

    Args:
        columns: title, or group and title -> texts.
        names: of the rows.
        corner: what stands above them, for each level of titles.
    """
    levels = list(zip(*(title if isinstance(title, tuple) else (title,) for title in columns), strict=True))
    heads: list[list[Cell]] = [list(map(html.escape, (c, *line))) for c, line in zip(corner, levels, strict=True)]
    if len(levels) > 1:
        heads[0][1:] = [(html.escape(group), len(list(same))) for group, same in itertools.groupby(levels[0])]
    titles = html_rows([*heads, ["domain"] + [""] * len(columns)], "th", "th", name_side="right")
    lines = [[as_html(cell) for cell in line] for line in zip(names, *columns.values(), strict=True)]
    body = html_rows(lines[:-1], first="th", name_side="right")
    body += html_rows(lines[-1:], first="th", name_side="right", look=f"{LOOK}; border-top: 1px solid currentColor")
    cells = {title: _plain(column) for title, column in columns.items()}
    plain = pd.DataFrame(cells, index=pd.Index(list(names), name="domain"))
    if len(levels) > 1:
        plain.columns = pd.MultiIndex.from_tuples(columns, names=corner)
    shown = f'<table class="dataframe"><thead>{titles}</thead><tbody>{body}</tbody></table>'
    return Table(f'<div style="overflow-x: auto">{shown}</div>', plain.to_string())


def html_rows(
    rows: Iterable[Sequence[Cell]],
    tag: str = "td",
    first: str = "td",
    side: str = "right",
    name_side: str = "left",
    look: str = LOOK,
) -> str:
    """Rows of a table from cells of HTML.

    Args:
        tag: of the cells, and `first`, that of the first one.
        side: where their text stands, and `name_side`, that of the first one; over several columns, in the middle.
        look: what else is said of their style.
    """
    made = []
    for cells in rows:
        made.append("<tr>")
        for place, cell in enumerate(cells):
            text, span = cell if isinstance(cell, tuple) else (cell, 1)
            where = "center" if span > 1 else side if place else name_side
            kind, wide = tag if place else first, f' colspan="{span}"' if span > 1 else ""
            made.append(f'<{kind}{wide} style="text-align: {where}; {look}">{text}</{kind}>')
        made.append("</tr>")
    return "".join(made)


def figure(value: float, low: float | None = None, high: float | None = None, sign: str = "") -> str:
    """Write a value with half the width of its interval, 52.3 ± 0.7, or alone; a dash where there is none."""
    if np.isnan(value):
        return "–"
    half = "" if low is None or high is None or np.isnan(low) else f" ± {(high - low) / 2:.1f}"
    return f"{value:{sign}.1f}{half}".replace("-", "−")


def difference(value: float, low: float, high: float, sure: bool | None = None) -> str:
    """Write a difference with its sign as `figure` does, **bold** if sure; None: where its interval excludes zero."""
    text = figure(value, low, high, "+")
    return f"**{text}**" if (low > 0 or high < 0 if sure is None else sure) else text


def with_shares(counts: Iterable[int], totals: Iterable[int]) -> list[str]:
    """Write counts with their share of totals: 12 (34.5 %)."""
    return [f"{n:,} ({100 * n / total:.1f} %)" for n, total in zip(counts, totals, strict=True)]


def as_html(text: str) -> str:
    """HTML of a text in which what follows ± is small and **text** is bold."""
    shown = re.sub(r"(± [\d.]+)", r"<small>\1</small>", html.escape(text))
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", shown)


def _plain(texts: Sequence[str]) -> list[str]:
    return [text.replace("**", "") for text in texts]


# Small drawings


def bar(share: float, width: str = "auto", margin: str = "0") -> str:
    """How much of something is done, 0..1, as a bar."""
    done = f'<div style="width:{share:.2%};height:8px;border-radius:4px;background:{ACCENT}"></div>'
    return f'<div style="width:{width};background:{GRID};border-radius:4px;margin:{margin}">{done}</div>'


def share_bar(share: float, width: int, colour: str) -> str:
    """A share of the largest one, 0..1, as a bar of at most `width` pixels in a line of text."""
    rect = f'<rect width="{width * share:.1f}" height="10" y="4" rx="2" fill="{colour}"/>'
    return inline_svg(width, rect)


def inline_svg(width: int, content: str) -> str:
    """A drawing in a line of text."""
    return f'<svg width="{width}" height="18" style="vertical-align:middle">{content}</svg>'


def polyline(points: Iterable[Point], colour: str, title: str = "") -> str:
    """A line through points in pixels; its title shows where the mouse rests."""
    style = f'fill="none" stroke="{colour}" stroke-width="1.6"'
    return f'<polyline points="{_places(points)}" {style}>{_title(title)}</polyline>'


def _places(points: Iterable[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _title(text: str) -> str:
    return f"<title>{html.escape(text)}</title>" if text else ""


@dataclass(frozen=True)
class Frame:
    """A chart as SVG, drawn from curves in the unit square. Sizes and margins are in pixels."""

    width: int
    height: int
    left: int
    bottom: int
    top: int = 6
    right: int = 0

    def x(self, place: float) -> float:
        """The pixel of a place of the unit square; what lies beyond its right side is drawn there."""
        return self.left + (self.width - self.right - self.left) * min(1.0, place)

    def y(self, place: float) -> float:
        """The pixel of a height of the unit square."""
        return self.height - self.bottom - (self.height - self.bottom - self.top) * place

    def line(self, curve: Iterable[Point], colour: str, title: str = "") -> str:
        """A curve."""
        return polyline(((self.x(x), self.y(y)) for x, y in curve), colour, title)

    def areas(self, ends: np.ndarray, shares: np.ndarray, looks: Iterable[tuple[str, str]]) -> str:
        """Stack shares, each from one end to the next.

        Args:
            ends: of n stretches, n + 1 places.
            shares: stretch x domain.
            looks: colour and title of each domain.
        """
        if not len(shares):
            return ""
        x = [self.x(place) for place in np.repeat(ends, 2)[1:-1]]
        tops = np.concatenate([np.zeros((len(shares), 1)), shares.cumsum(axis=1)], axis=1)
        y = [[self.y(place) for place in np.repeat(line, 2)] for line in tops.T]
        made = ""
        for (colour, title), low, high in zip(looks, y, y[1:], strict=False):
            outline = _places([*zip(x, high, strict=True), *reversed(list(zip(x, low, strict=True)))])
            made += f'<polygon points="{outline}" fill="{colour}">{_title(title)}</polygon>'
        return made

    def drawn(
        self,
        content: str,
        heights: Sequence[tuple[float, str]],
        places: Sequence[tuple[float, str]],
        style: str,
        title: str = "",
        label: str = "",
    ) -> str:
        """The chart around its content.

        Args:
            heights: places and texts of the lines across it, and `places`, of the ticks below it.
            style: of the drawing.
            title: above it, and `label`, below it.
        """
        lines = [
            f'x1="{self.left}" x2="{self.width - self.right}" y1="{self.y(y):.1f}" y2="{self.y(y):.1f}"'
            for y, _ in heights
        ]
        grid = "".join(f'<line {line} stroke="{GRID}"/>' for line in lines)
        texts: list[tuple[float, float, str, str]] = [
            (self.left - 6, self.y(y) + 4, "end", text) for y, text in heights
        ]
        anchors = {0.0: "start", 1.0: "end"}
        texts += [(self.x(x), self.height - self.bottom + 15, anchors.get(x, "middle"), text) for x, text in places]
        texts += [((self.left + self.width) / 2, self.height - 4, "middle", label)] if label else []
        words = "".join(f'<text x="{x:.0f}" y="{y:.1f}" text-anchor="{at}">{text}</text>' for x, y, at, text in texts)
        if title:
            words += f'<text x="{self.left}" y="11" font-weight="bold">{html.escape(title)}</text>'
        size = f'viewBox="0 0 {self.width} {self.height}" style="{style}"'
        return f'<svg {size} font-size="11" fill="currentColor" role="img">{grid}{content}{words}</svg>'
