"""The search panel: a picture that is dropped, pasted, chosen or clicked, its neighbours, and the way back.

    search_panel.show(searched)     # in a notebook: the panel where a person looks, else a sheet of queries

Elements have the classes udon-find, and udon-find-stage (drop and paste here, and drag for a crop), -choose, -file,
-back, -whole, -save, -label, -said, -results, -tile, -domain, -misses, -others, -strip, -note.
"""

from __future__ import annotations

import html
from typing import Any

import anywidget
import traitlets

from udonlib.data.decoding import decode
from udonlib.errors import UserError
from udonlib.lab.use import answers, result_html, search_page
from udonlib.lab.use.answers import WHOLE, Found, Query
from udonlib.lab.use.search_views import query_sheet
from udonlib.lab.use.searched import Searched
from udonlib.lab.views.front_end import Still, answering, named
from udonlib.lab.views.live import has_front_end
from udonlib.lab.views.sheets import Picture

HINT = "Drop or paste an image here; drag for a crop; click any thumbnail to search on."
N_STRIP = 24  # images to choose from
MAX_LABELS = 5000  # classes that are suggested


class SearchWidget(anywidget.AnyWidget):
    """The page's side: what is shown goes there, what a person does comes back as messages."""

    _esm = result_html.asset("find.js")
    html = traitlets.Unicode().tag(sync=True)
    view = traitlets.Dict().tag(sync=True)


def show(searched: Searched) -> SearchPanel | Picture:
    """The panel where a person looks at this kernel's cells, else a static sheet of queries."""
    return SearchPanel(searched) if has_front_end() else query_sheet(searched)


class SearchPanel:
    """The widget, what is shown in it, and the queries before this one.

    Args:
        searched: what is searched; its first sampled image is the first query.
    """

    def __init__(self, searched: Searched) -> None:
        self.searched = searched
        self.history: list[Query] = []
        self._still: Still | None = None
        self._turn = 0
        self._domain, self._misses, self._note = "", False, ""
        self._strip = self._browsed()
        first = answers.sample(searched, 1, searched.params.seed)[0]
        self.found = answers.find(searched, answers.of_row(searched, first))
        self.widget = named(answering(SearchWidget(html=self._skeleton(), view=self._view())), "find-widget")
        self.widget.on_msg(lambda widget, content, buffers: self.act(content, buffers))

    def _ipython_display_(self) -> None:
        self._still = Still(self.widget, self._seen())

    # --- what a person does ---

    def act(self, content: dict[str, Any], buffers: list[Any] = []) -> None:  # noqa: B006  # never changed
        """Do what a message asks for, and show it; what cannot be done is said below the panel."""
        self._note = ""
        try:
            self._do(content, buffers)
        except UserError as error:
            self._note = str(error)
        self.widget.view = self._view()
        if self._still is not None:
            self._still.keep(self._seen)

    def _do(self, content: dict[str, Any], buffers: list[Any]) -> None:
        what, query = content.get("do"), self.found.query
        if what == "row":
            row = int(content["row"])
            if 0 <= row < len(self.searched.labels):
                self._go(answers.of_row(self.searched, row))
        elif what == "picture" and buffers:
            name = str(content.get("name", "image"))
            self._go(answers.of_picture(self.searched, decode(bytes(buffers[0]), name), name))
        elif what == "crop":
            self._go(answers.cropped(query, tuple(map(float, content["box"]))))  # type: ignore[arg-type]
        elif what == "whole":
            self._go(answers.cropped(query, WHOLE))
        elif what == "back" and self.history:
            self.found = answers.find(self.searched, self.history.pop())
        elif what == "label":
            self.found = answers.find(self.searched, answers.labelled(self.searched, query, str(content["label"])))
        elif what == "browse":
            self._domain, self._misses = str(content.get("domain", "")), bool(content.get("misses"))
            self._turn += 1
            self._strip = self._browsed()
        elif what == "save":
            self._note = f"saved: {search_page.save_page(self.searched, self.found)}"
        elif what == "problem":
            raise UserError(str(content.get("text")))

    def _go(self, query: Query) -> None:
        found = answers.find(self.searched, query)
        self.history.append(self.found.query)
        self.found = found

    def _browsed(self) -> list[int]:
        """Images to choose from: of a domain or all, any or those that are found wrong; others each time."""
        return answers.some(self.searched, N_STRIP, self._domain, self._misses, self.searched.params.seed + self._turn)

    # --- what is shown ---

    def _view(self) -> dict[str, Any]:
        searched, query = self.searched, self.found.query
        if not hasattr(self, "_drawn") or self._drawn[0] is not self.found:
            self._drawn: tuple[Found, str, str] = (
                self.found,
                result_html.results(searched, self.found),
                result_html.said(searched, self.found),
            )
        return {
            "picture": result_html.picture_of(query),
            "name": query.name,
            "crop": list(query.crop),
            "label": query.label or "",
            "results": self._drawn[1],
            "said": self._drawn[2],
            "strip": result_html.strip(searched, self._strip) or "no such image",
            "domain": self._domain,
            "misses": self._misses,
            "note": html.escape(self._note),
            "can_back": bool(self.history),
        }

    def _skeleton(self) -> str:
        names = [name for name in self.searched.domains if name]
        options = "".join(f'<option value="{html.escape(n, quote=True)}">{html.escape(n)}</option>' for n in names)
        known = dict.fromkeys(label for label in self.searched.labels if label is not None)
        labels = "".join(f'<option value="{html.escape(n, quote=True)}">' for n in list(known)[:MAX_LABELS])
        return f"""{result_html.style()}<div class="udon-find" data-lm-suppress-shortcuts="true">
<div class="udon-find-top"><div class="udon-find-left">
<div class="udon-find-stage" tabindex="0" role="img" aria-label="the query: drop or paste an image"><img
class="udon-find-picture" alt=""><div class="udon-find-crop" hidden></div></div>
<p class="udon-find-hint">{HINT}</p>
<div class="udon-find-bar"><button type="button" class="udon-find-choose">Image…</button>
<input type="file" class="udon-find-file" accept="image/*" hidden>
<button type="button" class="udon-find-back" title="the query before">← Back</button>
<button type="button" class="udon-find-whole" title="no crop">Whole</button>
<button type="button" class="udon-find-save" title="one HTML file that holds everything">Save</button></div>
<input type="text" class="udon-find-label" list="udon-find-labels" placeholder="right class, if you know it"
aria-label="right class of the query"><datalist id="udon-find-labels">{labels}</datalist>
<div class="udon-find-said" role="status" tabindex="0"></div></div>
<div class="udon-find-results" role="region" aria-label="neighbours" tabindex="0"></div></div>
<div class="udon-find-note" role="alert"></div>
<div class="udon-find-browse"><div class="udon-find-bar"><b>Images that are searched</b>
<select class="udon-find-domain" aria-label="domain"><option value="">all domains</option>{options}</select>
<label><input type="checkbox" class="udon-find-misses"> found wrong</label>
<button type="button" class="udon-find-others">Others</button></div>
<div class="udon-find-strip"></div></div></div>"""

    def _seen(self) -> str:
        """What a saved notebook keeps of it."""
        parts = result_html.said(self.searched, self.found, live=False), self._results_without_buttons()
        picture = f'<img src="{result_html.picture_of(self.found.query, 250)}" alt="">'
        return (
            f'{result_html.style()}<div class="udon-find"><div class="udon-find-top"><div class="udon-find-left">'
            f'<div class="udon-find-stage">{picture}</div><div class="udon-find-said">{parts[0]}</div></div>'
            f'<div class="udon-find-results">{parts[1]}</div></div></div>'
        )

    def _results_without_buttons(self) -> str:
        return result_html.results(self.searched, self.found, live=False)
