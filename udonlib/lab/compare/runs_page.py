"""The page of runs.ipynb: the table of all runs, and the comparison of two, kept up to date where a person looks.

Cells show what they show through `RunPage`. In a batch that is all. In JupyterLab the table is a widget in which two
runs are chosen, and a thread looks at the files once a second: rows that changed are sent, and the outputs of the cells
below are redrawn when another run is chosen or a chosen one has moved. The thread ends when nobody shows the table any
more, or another page is opened in the same kernel.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import anywidget
import pandas as pd
import plotly.graph_objects as go
import traitlets
from IPython.core.formatters import DisplayFormatter
from IPython.core.getipython import get_ipython
from IPython.display import DisplayHandle, display

from udonlib.errors import ParameterError, UserError
from udonlib.lab.compare import pair_views, runs_table
from udonlib.lab.compare.many import curves, notes
from udonlib.lab.compare.overview import DAMAGED, RunReader, RunRow, choose_two
from udonlib.lab.compare.pairs import Pair, open_pair
from udonlib.lab.views.front_end import Still, answering, named
from udonlib.lab.views.live import has_front_end
from udonlib.lab.views.tables import Table, lines_table
from udonlib.params import WITHOUT_EFFECT
from udonlib.presets import RunsParams
from udonlib.runs.find import RUN, find_run, runs_for
from udonlib.runs.folder import RunFolder

POLL_SECONDS = 1.0
PLOTLY = "application/vnd.plotly.v1+json"
REST = 10  # times as long as a redraw took, nothing is redrawn because a chosen run has moved
UNLIKE = (
    "No two of these runs are compared by themselves: one has more than twice the steps of the other, or they are "
    "archived. Choose both: A, B in the table, or run_a and run_b."
)
FEW = "Nothing to compare yet: {} Train another with notebooks/train.ipynb."


class RunsWidget(anywidget.AnyWidget):
    """The live table. A person writes a and b (the chosen runs) and seen (what a filter leaves; []: there is none),
    Python the rest; nothing is written by both.
    """

    _esm = runs_table.asset("runs_table.js") + runs_table.asset("runs_widget.js")
    html = traitlets.Unicode().tag(sync=True)
    rows = traitlets.Dict().tag(sync=True)
    seen = traitlets.List(traitlets.Unicode()).tag(sync=True)
    shown = traitlets.Dict().tag(sync=True)
    a = traitlets.Unicode().tag(sync=True)
    b = traitlets.Unicode().tag(sync=True)


class RunPage:
    """All runs of a folder of results, and two of them compared.

    Args:
        params: of the notebook.
        live: whether a person looks at the cells; None: as `live.has_front_end` says.

    Raises:
        ParameterError: run_a or run_b is not among the runs, with the nearest name.
    """

    _open: RunPage | None = None  # of this kernel: the one whose thread may run

    def __init__(self, params: RunsParams, live: bool | None = None) -> None:
        self.params = params
        self.live = has_front_end() if live is None else live
        self.reader = RunReader(params.outputs, params.runs)
        self.rows: list[RunRow] = self.reader.read()
        self.widget: RunsWidget | None = None
        self._still: Still | None = None
        self._is_kept = True  # whether the still shows what the widget shows
        self._panes: dict[str, tuple[DisplayHandle, Callable[[], Any], str]] = {}  # by what is shown: the last output
        self._pair: Pair | None = None
        self._names_drawn: tuple[str, str] | None = None
        self._drawn: object = None  # what the comparison was drawn from
        self._many_drawn: tuple[Any, ...] = (None,)  # what the curves of all runs were drawn from
        self._curves: dict[str, tuple[object, pd.DataFrame]] = {}  # of each run: from what, and its curves
        self._rest_until = 0.0
        self._views = 0
        self._wake, self._ended = threading.Event(), threading.Event()
        self._drawing = threading.Lock()
        self._thread: threading.Thread | None = None
        if params.run is not None and params.run_b != "auto":
            raise ParameterError({"run": f"found {params.run!r} beside run_b = {params.run_b!r}, which says the same"})
        self._wanted = [self._named(parameter) for parameter in ("run_a", "run" if params.run else "run_b")]
        if RunPage._open is not None:
            RunPage._open.close()
        RunPage._open = self

    def _named(self, parameter: str) -> str:
        """The name of the run that a parameter means; "auto" and "latest" stay: they may come to mean another one."""
        name = str(getattr(self.params, parameter))
        if name in ("auto", "latest"):
            return name
        name = find_run(name, RUN, self.params.outputs, parameter).path.name
        if all(row.run != name for row in self.rows):
            raise ParameterError({parameter: f"run {name!r} is not among those listed: runs = {self.params.runs!r}"})
        return name

    def chosen(self) -> tuple[str, str] | None:
        """The names of A and B: the person's choice, else the notebook's, else `choose_two`'s; None: too few runs."""
        there = {row.run for row in self.rows}
        picked = (self.widget.a, self.widget.b) if self.widget else ("", "")
        names: list[str | None] = []
        for pick, wanted in zip(picked, self._wanted, strict=True):
            if wanted == "latest" and pick not in there:
                runs = (run.path.name for run in runs_for(RUN, self.params.outputs))
                wanted = next((name for name in runs if name in there), "")
            names.append(next((name for name in (pick, wanted) if name in there), None))
        return choose_two(self.rows, *names)

    # What the cells show

    def open_runs(self) -> None:
        """Show what trains now and what was left unfinished."""
        self._show("open runs", lambda: runs_table.open_runs(self.rows, self.reader.home), "rows")

    def table(self) -> None:
        """Show all runs: in JupyterLab the table in which two are chosen, elsewhere one that stands by itself."""
        if not self.live:
            display(self._static())
            return
        self.widget = RunsWidget(html=runs_table.skeleton("", picks=True), **self._table_state())
        answering(named(self.widget, "runs-widget"))
        self.widget.observe(lambda change: self._wake.set(), ["a", "b", "seen"])
        self.widget.on_msg(lambda widget, content, buffers: self._told(content))
        self._still = Still(self.widget, self._static().html)

    def _static(self) -> Table:
        return runs_table.static_table(self.rows, self.reader.home, self.chosen())

    def overlaid(self) -> None:
        """Show the curves of the runs in the table, in groups of the same setting; of those that a filter leaves."""
        self._many_drawn = self._many_source()
        self._show("curves of all", self._overlaid, "many")

    def note(
        self, run: str, text: str | None = None, tags: str | None = None, archived: bool | None = None
    ) -> list[str]:
        """Note something of a run, or of all that a pattern names, or put them away; see `notes.change`."""
        changed = notes.change(run, text, tags, archived, self.params.outputs)
        self._wake.set()
        return changed

    def names(self) -> None:
        """Show which runs are compared, and what limits the comparison."""
        titles = {row.run: row.title for row in self.rows}
        self._show_pair("names", lambda pair: pair_views.names_table(pair, titles))

    def parameters(self) -> None:
        """Show the parameters that differ."""
        self._show_pair("parameters", pair_views.parameters_table)

    def curves(self) -> None:
        """Show losses and validation, overlaid."""
        self._show_pair("curves", pair_views.curves_chart)

    def allocation(self) -> None:
        """Show what each domain got."""
        self._show_pair("allocation", pair_views.allocation_chart)

    def differences(self) -> None:
        """Show B - A by domain, as a table and as a figure, and by groups of queries."""
        p = self.params
        self._show_pair("table of differences", pair_views.difference_table)
        self._show_pair("chart of differences", pair_views.difference_chart)
        self._show_pair("groups", lambda pair: pair_views.groups_table(pair, p.data, p.images))

    def changed(self) -> None:
        """Show how many queries changed side."""
        self._show_pair("changed", pair_views.changed_table)

    def gallery(self, right: str) -> None:
        """Show queries that "A" or "B" alone gets right."""
        p = self.params
        self._show_pair(
            f"gallery of {right}",
            lambda pair: pair_views.changed_gallery(pair, right, p.n_queries, p.k, p.seed, p.data, p.images),
        )

    def refresh(self) -> None:
        """Look at the files, and redraw what has changed; a run to which nothing has happened is not read again."""
        with self._drawing:
            rows = self.reader.read()
            moved = rows is not self.rows
            self.rows = rows
            names = self.chosen()
            if moved or self._names_drawn != names:
                self._send_table()
                self._is_kept = False
            if self._still is not None and not self._is_kept:
                self._is_kept = self._still.keep(lambda: self._static().html)
            if moved:
                self._redraw("rows")
            resting = time.monotonic() < self._rest_until
            many = self._many_source()
            if many != self._many_drawn and (many[0] != self._many_drawn[0] or not resting):
                self._many_drawn = many
                self._redraw("many")
            source = (names, *(self.reader.signature(name) for name in names or ()))
            if source != self._drawn and (self._names_drawn != names or not resting):
                began = time.monotonic()
                self._drawn, self._pair, self._names_drawn = source, None, names
                self._redraw("pair")
                self._rest_until = time.monotonic() + REST * (time.monotonic() - began)

    def close(self) -> None:
        """End the thread, and with it every change of what is shown."""
        self._ended.set()
        self._wake.set()

    # How it is kept up to date

    def _pair_now(self) -> Pair | None:
        names = self.chosen()
        if self._pair is None and names is not None:
            a, b = (RunFolder(self.reader.home / name) for name in names)
            self._pair = open_pair(a, b, self.params.domains)
            self._names_drawn = names
            self._drawn = (names, *(self.reader.signature(name) for name in names))
        return self._pair

    def _of_pair(self, make: Callable[[Pair], Any]) -> Any:
        """What a function makes of the two runs, or a line that says why it cannot."""
        try:
            pair = self._pair_now()
            if pair is not None:
                return make(pair)
            n = len([row for row in self.rows if row.values])
            text = FEW.format("there are no runs." if not self.rows else "two readable runs are needed.")
            text = UNLIKE if n >= 2 else text
        except (OSError, *DAMAGED) as error:
            text = str(error) if isinstance(error, UserError) else f"the files of a run cannot be read: {error}"
        return lines_table(["not shown"], [[text]], side="left")

    def _show_pair(self, what: str, make: Callable[[Pair], Any]) -> None:
        self._show(what, lambda: self._of_pair(make), "pair")

    def _show(self, what: str, make: Callable[[], Any], follows: str) -> None:
        """Show something in an output of its own; of a cell that runs again only the new output is kept up to date."""
        with self._drawing:
            made = make()
            if not self.live:
                display(made)
                return
            handle = display(_bundle(made), raw=True, display_id=True)
            if handle is not None:
                self._panes[what] = (handle, make, follows)

    def _redraw(self, what: str) -> None:
        names = self.chosen()
        quick = any(row.going for row in self.rows if row.run in (names or ()))
        for handle, make, follows in self._panes.values():
            if self.chosen() != names and what == "pair":  # a person went on meanwhile: begin anew
                self._names_drawn = None
                self._wake.set()
                return
            if follows == what:
                made = make()
                if isinstance(made, go.Figure):  # JupyterLab never draws over a plotly output: make room for a new one
                    handle.update({"text/html": f'<div style="height:{made.layout.height}px"></div>'}, raw=True)
                handle.update(_bundle(made, quick), raw=True)

    def _listed(self) -> list[RunRow]:
        """The runs whose curves are drawn: not archived, with records, and left by the filter."""
        seen = set(self.widget.seen) if self.widget else set()
        return [row for row in self.rows if row.step and (row.run in seen if seen else not row.note.archived)]

    def _many_source(self) -> tuple[Any, ...]:
        names = tuple(row.run for row in self._listed())
        return (names, *(self.reader.signature(name) for name in names))

    def _overlaid(self) -> Any:
        groups: dict[str, list[RunRow]] = {}
        for row in self._listed():
            groups.setdefault(setting(row), []).append(row)
        first = {setting(row) for row in self.rows if row.run in (self.chosen() or ())}
        order = sorted(groups, key=lambda key: key not in first)[: curves.N_GROUPS]
        drawn: dict[str, list[pd.DataFrame]] = {}
        for key in (key for key in groups if key in order):
            name = groups[key][0].title.removesuffix(f", seed {groups[key][0].seed}") or groups[key][0].run
            tables = []
            for row in groups[key]:
                with contextlib.suppress(OSError, *DAMAGED):  # the table says what cannot be read
                    tables.append(self._curves_of(row.run))
            drawn[f"{name}, {groups[key][0].run}" if name in drawn else name] = tables
        return curves.curves_chart(drawn, len(groups) - len(order), self.params.smoothing, self.params.log_axis)

    def _curves_of(self, run: str) -> pd.DataFrame:
        source = self.reader.signature(run)
        if run not in self._curves or self._curves[run][0] != source:
            self._curves[run] = (source, curves.run_curves(RunFolder(self.reader.home / run)))
        return self._curves[run][1]

    def _table_state(self) -> dict[str, Any]:
        rows = {row.run: runs_table.row_html(row, picks=True) for row in self.rows}
        return {"rows": rows, "shown": dict(zip("ab", self.chosen() or (), strict=False))}

    def _send_table(self) -> None:
        if self.widget is not None:
            for name, value in self._table_state().items():
                setattr(self.widget, name, value)

    def _told(self, content: dict[str, Any]) -> None:
        """What the table's page says: that it is shown or gone, or what a person noted of a run."""
        if "note" not in content:
            self._count_views(content)
            return
        with contextlib.suppress(UserError, KeyError):  # of a run that has gone meanwhile, or a disk that is full
            told = content["note"]
            self.note(told["run"], told.get("text"), told.get("tags"), told.get("archived"))

    def _count_views(self, content: dict[str, Any]) -> None:
        self._views = max(0, self._views + int(content.get("views", 0)))
        if self._views and (self._thread is None or not self._thread.is_alive()) and not self._ended.is_set():
            self._thread = threading.Thread(target=self._watch, name="udon-runs", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        """Refresh until nobody shows the table; what goes wrong once is tried again."""
        while self._views and not self._ended.is_set():
            try:
                self.refresh()
            except Exception:  # of files that change while they are read, or of a screen that is gone: look again
                self._drawn = None
            self._wake.wait(POLL_SECONDS)
            self._wake.clear()


def setting(row: RunRow) -> str:
    """What runs of several seeds have in common: the parameters that influence results, and the data."""
    values = {name: value for name, value in row.values.items() if name not in WITHOUT_EFFECT}
    return json.dumps([values, row.fingerprint], sort_keys=True, default=str)


def _bundle(made: Any, quick: bool = False) -> dict[str, Any]:
    """What is shown, by type. A figure goes without its image if it must be quick: the image takes longer than it."""
    if isinstance(made, go.Figure):
        return {PLOTLY: json.loads(made.to_json())} if quick else made._repr_mimebundle_()
    formatter = getattr(get_ipython(), "display_formatter", None) or DisplayFormatter()
    return formatter.format(made)[0]
