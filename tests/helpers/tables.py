"""What stands in a table's HTML."""

import re
from html import unescape

from udonlib.lab.views.tables import Table


def body(table: Table) -> list[list[str]]:
    """The cells of the rows below the titles, as HTML."""
    rows = table.html.split("<tbody>")[1].split("</tr>")[:-1]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def texts(table: Table) -> list[list[str]]:
    """The cells of the rows below the titles, as text."""
    return [[unescape(re.sub(r"<[^>]*>", "", cell)) for cell in row] for row in body(table)]


def bold_cells(table: Table) -> set[tuple[str, int]]:
    """Names of the rows and numbers of the columns, 0 after the name, of the cells that are bold."""
    rows = ((row[0], number, cell) for row in body(table) for number, cell in enumerate(row[1:]))
    return {(unescape(name), number) for name, number, cell in rows if cell.startswith("<b>")}
