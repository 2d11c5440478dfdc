"""What is seen of an evaluation: what is evaluated, how far it is, what merging costs, and neighbours."""

from __future__ import annotations

import time
from collections.abc import Callable

import pandas as pd
import plotly.graph_objects as go
from IPython.display import Image

from udonlib.data.catalog import DataError
from udonlib.data.decoding import ImageError
from udonlib.lab.views import charts
from udonlib.lab.views.charts import embedder_bars, panels
from udonlib.lab.views.live import ProgressLine
from udonlib.lab.views.sheets import contents_table, query_gallery
from udonlib.lab.views.tables import Table, facts_table
from udonlib.models.processors import pick_device, slow_precision
from udonlib.runs.evaluations import SavedEvaluation
from udonlib.runs.watch import duration

UNITS = {"reading": "vectors", "searching": "vectors", "embedding": "images", "exporting": "images"}


def plan_table(evaluation: SavedEvaluation) -> Table:
    """Tabulate what is evaluated, on what, and where the results are."""
    source, catalog, p = evaluation.source, evaluation.catalog, evaluation.params
    queries = [len(domain.queries(p.subset)) for domain in catalog.domains]
    index = [len(domain.index(p.subset)) for domain in catalog.domains]
    asked = "all splits" if p.all_as_test else f"'{p.subset}'"
    facts = {"evaluated": f"{source.kind} {source.name}", "file": str(source.file)}
    if source.trained is not None:
        t = source.trained
        domains = "all domains" if t.domains == "all" else ", ".join(t.domains)
        facts["model"] = f"{t.backbone}, {t.image_size} pixels, recipe {t.recipe}, trained on {t.data} ({domains})"
    facts |= {
        "data": f"{catalog.root}: {', '.join(catalog.names)}",
        "queries": f"{sum(queries):,} of {asked}, which search a merged index of {sum(index):,}",
        "results": str(evaluation.path) + (" (finished: shown again)" if evaluation.is_finished else ""),
    }
    if catalog.notes:
        facts["splits"] = "; ".join(catalog.notes)
    if evaluation.embedder == "student":
        facts["precision"] = evaluation.precision
        slow = slow_precision(evaluation.precision, pick_device(p.device))
        if slow and not evaluation.is_finished:
            facts["warning"] = slow
    return facts_table(facts)


def measure(
    evaluation: SavedEvaluation, live: bool | None = None, clock: Callable[[], float] = time.monotonic
) -> pd.DataFrame:
    """Evaluate, unless it has been done, and show how it goes; returns the table.

    Args:
        live: redraw one line (True) or print lines (False); None: as `live.has_front_end` says.
        clock: seconds; for tests.
    """
    finished = evaluation.is_finished
    with ProgressLine(UNITS, live, clock) as view:
        table = evaluation.measure(view.progress)
    means = table[table["domain"] == "mean"].set_index(["embedder", "index"])["r_at_1"]
    merged, separate = means[evaluation.embedder, "merged"], means[evaluation.embedder, "separate"]
    end = "evaluated before" if finished else f"finished in {duration(view.seconds())}"
    skipped = evaluation.n_skipped
    left_out = f", {skipped:,} images could not be read and were left out" if skipped else ""
    view.say(f"{evaluation.embedder}: R@1 {merged:.1f} merged, {separate:.1f} separate; {end}{left_out}")
    return table


def results_chart(evaluation: SavedEvaluation) -> go.Figure:
    """Draw `charts.results_chart` of the merged index under a title that names the queries."""
    queries = {"test": "Test", "val": "Validation"}[evaluation.params.subset]
    return charts.results_chart(evaluation.table).update_layout(title=f"{queries} queries, merged index")


def merging_chart(lost: pd.DataFrame) -> go.Figure:
    """Draw the share of queries whose first neighbour is right in their domain's own index and wrong in the merged one.

    Args:
        lost: of `runs.evaluations.lost_by_merging`.
    """
    fig = panels("Lost by merging: the first neighbour is of another domain", [""], 1, 1, height=430)
    embedder_bars(fig, lost, {"lost": ("low", "high")})
    return fig.update_yaxes(title="R@1 separate − merged, points")


def gallery(evaluation: SavedEvaluation, n_queries: int = 16) -> Image | Table:
    """Show queries with their neighbours, right and wrong ones; or say why there are no images to show."""
    try:
        return query_gallery(
            evaluation.neighbours(), evaluation.catalog, evaluation.embedder, n_queries, evaluation.params.seed
        )
    except (DataError, ImageError) as error:  # descriptors need no images
        return facts_table({"no images to show": str(error)})


def files_table(evaluation: SavedEvaluation) -> Table:
    """Tabulate the files of an evaluation's folder, with what they hold."""
    holds = {
        "params.yaml": "every parameter",
        "provenance.json": "what was evaluated, versions, commit and the data's fingerprint",
        "evaluation.csv": "the results, with intervals",
        "evaluation.json": "the same, as JSON",
        "outcomes.csv.gz": "R@1 and mMP@k of every query",
        "neighbours.npz": "the neighbours of every query in the merged index",
        "descriptors.npz": "the student's embedding of every image: arrays <domain>/<split>",
        "summary.json": "what the results belong to, and images that were left out",
    }
    return contents_table(evaluation.path, holds)
