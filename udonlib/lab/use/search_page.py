"""A search as one HTML file that holds everything: it needs no network, no script and no server.

file = save_page(searched, find(searched, query))
"""

from __future__ import annotations

import html
import re
import time
from pathlib import Path

from udonlib.files import results_folder, write_text
from udonlib.lab.use import result_html
from udonlib.lab.use.answers import WHOLE, Found
from udonlib.lab.use.searched import Searched
from udonlib.search.kinds import told

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>{title}</title>
{style}
<style>body {{ font-family: Inter, "Segoe UI", Helvetica, Arial, sans-serif; margin: 24px; }}
.udon-find-top {{ height: auto; align-items: start; }} .udon-find-stage {{ cursor: default; }}
@media (max-width: 800px) {{ .udon-find-top {{ grid-template-columns: minmax(0, 1fr); }} }}</style></head>
<body><h1>{title}</h1><div class="udon-find">
<div class="udon-find-top"><div class="udon-find-left"><div class="udon-find-stage">{picture}</div>
<div class="udon-find-said">{said}</div></div><div class="udon-find-results">{results}</div></div>
<p>{facts}</p></div></body></html>
"""


def page(searched: Searched, found: Found) -> str:
    """The page of a search."""
    index, model = searched.index, searched.model
    facts = [
        f"{len(index):,} images searched by {model.name} ({model.fingerprint[:12]}), {index.model.dim} dimensions",
        told(index.measured[-1]) if index.measured else index.structure.kind,
        "a number is the inner product of two unit vectors; ✓: of the query's class",
        time.strftime("%Y-%m-%d %H:%M"),
    ]
    alt = html.escape(found.query.name, quote=True)
    picture = f'<img src="{result_html.picture_of(found.query)}" alt="{alt}">'
    if found.query.crop != WHOLE:
        picture = (
            f'<img src="{result_html.data_uri(result_html.jpeg(found.query.image, result_html.STAGE))}" alt="{alt}">'
        )
    return PAGE.format(
        title=html.escape(f"Search for {found.query.name}"),
        style=result_html.style(),
        picture=picture,
        said=result_html.said(searched, found, live=False),
        results=result_html.results(searched, found, live=False),
        facts=html.escape("; ".join(facts)),
    )


def save_page(searched: Searched, found: Found, file: str | Path | None = None) -> Path:
    """Write the page of a search; returns its file.

    Args:
        file: where; None: in outputs/searches, named after the query; one that is there stays, and gets a neighbour.

    Raises: UserError where it cannot be written.
    """
    if file is None:
        folder = results_folder(searched.params.outputs) / "searches"
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(found.query.name).stem)[:80].strip("_") or "search"
        names = (f"{stem}{number}.html" for number in ("", *(f"-{i}" for i in range(2, 10_000))))
        file = next(path for name in names if not (path := folder / name).exists())
    path = Path(file).expanduser().absolute()
    write_text(path, page(searched, found))
    return path
