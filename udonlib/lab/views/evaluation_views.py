"""What is seen of an evaluation: what is evaluated, how far it is, what merging costs, and neighbours."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from udonlib.data.catalog import DataError
from udonlib.data.decoding import ImageError
from udonlib.lab.views import charts
from udonlib.lab.views.charts import embedder_bars, f32, line, panels
from udonlib.lab.views.live import ProgressLine
from udonlib.lab.views.sheets import Picture, contents_table, query_gallery
from udonlib.lab.views.style import TEXT, by_embedder, domain_colours, metric_label
from udonlib.lab.views.tables import Table, columns_table, facts_table, figure, lines_table
from udonlib.models.processors import pick_device, slow_precision
from udonlib.presets import EvaluateParams, RunDataParams
from udonlib.runs.evaluations import SavedEvaluation, open_evaluation
from udonlib.runs.folder import RunFolder
from udonlib.runs.run import Run
from udonlib.runs.watch import duration

UNITS = dict.fromkeys(("reading", "searching"), "vectors")
UNITS |= dict.fromkeys(("embedding", "exporting", "comparing"), "images")


def plan_table(evaluation: SavedEvaluation) -> Table:
    """Tabulate what is evaluated, on what, and where the results are."""
    source, catalog, p = evaluation.source, evaluation.catalog, evaluation.params
    queries = [len(domain.queries(p.subset)) for domain in catalog.domains]
    index = [len(domain.index(p.subset)) for domain in catalog.domains]
    asked = "all splits" if p.all_as_test else f"'{p.subset}'"
    facts = {"evaluated": f"{source.kind} {source.name}", "file": str(source.file)}
    if source.kind == "run" and (unfinished := how_far(RunFolder(source.file.parent.parent))):
        facts["unfinished"] = unfinished
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


def how_far(run: RunFolder) -> str:
    """Which model of an unfinished run is looked at; "" of a finished one."""
    return "" if run.status == "finished" else f"{run.state().text}: this is the best model so far"


def answered_by(run: Run, params: RunDataParams, live: bool | None = None) -> Run | SavedEvaluation:
    """What has answered a run's test queries: itself, or while it is not finished an evaluation of its best model.

    That one is made now, unless it has been, and shown. The run's data may be elsewhere, as `params` says.
    """
    if params.data != "auto" or params.images:
        run.move_data(params.data, params.images)
    if run.status == "finished":
        return run
    given = params.model_dump(include={"data", "images", "outputs", "device", "n_workers", "n_threads"})
    evaluation = open_evaluation(
        EvaluateParams(run=str(run.path), domains=run.catalog.names, k=run.params.k, metrics=(), **given)
    )
    measure(evaluation, live)
    return evaluation


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
    which = f"{skipped:,} images could not be read and were" if skipped > 1 else "one image could not be read and was"
    left_out = f", {which} left out" if skipped else ""
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


def metrics_table(evaluation: SavedEvaluation) -> Table:
    """Tabulate every metric of one embedder in the merged index, in percent: a row a domain, and their mean."""
    table = evaluation.table
    rows = table[(table["index"] == "merged") & (table["embedder"] == evaluation.embedder)].set_index("domain")
    columns = {}
    for metric in [name for name in rows if "_at_" in name and name.rpartition("_")[2].isdigit()]:
        ends = (rows[f"{metric}_{end}"] for end in ("low", "high"))
        columns[metric_label(metric)] = list(map(figure, rows[metric], *ends))
    return columns_table(columns, list(rows.index), (f"{evaluation.embedder}, percent",))


def recall_chart(evaluation: SavedEvaluation) -> go.Figure:
    """Draw R@k of one embedder over k, as far as neighbours are kept: a line a domain, and their mean."""
    own = [each for each in evaluation.neighbours() if each.embedder == evaluation.embedder]
    curves = {each.query_domain: 100 * (each.hit.cumsum(axis=1) > 0).mean(axis=0) for each in own}
    fig = panels(f"R@k of the {evaluation.embedder}, merged index", [""], 1, 1, height=430)
    for domain, colour in domain_colours(curves).items():
        k = np.arange(1, len(curves[domain]) + 1)
        fig.add_trace(line(domain, k, f32(curves[domain]), colour, "%{y:.1f}", True, 2))
    mean = np.mean(list(curves.values()), axis=0)
    fig.add_trace(line("mean", np.arange(1, len(mean) + 1), f32(mean), TEXT, "%{y:.1f}", True, 4))
    fig.update_xaxes(title="neighbours looked at, k", dtick=max(1, len(mean) // 10))
    return fig.update_yaxes(title="R@k, %")


def group_table(evaluation: SavedEvaluation) -> Table:
    """Tabulate R@1 by how much like a query there was to learn from: groups in columns, embedders in rows."""
    found = evaluation.by_group()
    if found is None:
        return facts_table({"no groups": "only for a run of ours on the data that it was trained on"})
    groups = found.drop_duplicates("group")
    head = ["R@1, %", *(f"{row.group} ({row.n_queries:,})" for row in groups.itertuples())]
    cells = {(row.embedder, row.group): figure(row.mean, row.low, row.high) for row in found.itertuples()}
    names = by_embedder(found)
    return lines_table(head, [[name, *(cells.get((name, group), "–") for group in groups["group"])] for name in names])


def gallery(evaluation: SavedEvaluation, n_queries: int = 16) -> Picture | Table:
    """Show queries with their neighbours, right and wrong ones; or say why there are no images to show."""
    p = evaluation.params
    try:
        shown = evaluation.neighbours(), evaluation.catalog, evaluation.embedder
        return query_gallery(*shown, n_queries, p.seed, p.k)
    except (DataError, ImageError) as error:  # descriptors need no images
        return facts_table({"no images to show": str(error)})


def files_table(evaluation: SavedEvaluation) -> Table:
    """Tabulate the files of an evaluation's folder, with what they hold."""
    holds = {
        "params.yaml": "every parameter",
        "provenance.json": "what was evaluated, versions, commit and the data's fingerprint",
        "evaluation.csv": "the results, with intervals",
        "evaluation.json": "the same, as JSON",
        "outcomes.csv.gz": "every metric of every query, and the group that it is in",
        "neighbours.npz": "the neighbours of every query in the merged index",
        "descriptors.npz": "the student's embedding of every image: arrays <domain>/<split>",
        "summary.json": "what the results belong to, and images that were left out",
    }
    return contents_table(evaluation.path, holds)
