"""What the finished runs of a grid found: tidy tables with intervals, paired differences, costs; written as files.

Figures are in percent, differences in percentage points, both in the merged index. What an interval says: see
`evaluation.intervals`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from udonlib.data.imbalance import open_catalog
from udonlib.errors import UserError
from udonlib.evaluation.files import load_outcomes, save_outcomes
from udonlib.evaluation.frequency import MAX_LOOKED_AT, frequencies, of_groups
from udonlib.evaluation.intervals import (
    closed_share,
    paired_difference,
    row_interval,
    worst_difference,
    worst_interval,
)
from udonlib.files import write_text
from udonlib.lab.views.style import metric_label
from udonlib.lab.views.tables import difference, figure
from udonlib.runs.grid import Grid, Job
from udonlib.runs.run import Run
from udonlib.runs.specialists import evaluate_assembly

COSTS = ("images_per_s", "n_parameters_shipped", "n_parameters_trained", "gflops_per_image", "train_seconds")

Texts = tuple[list[str], list[list[str]]]  # of a table: its head and its lines

WORST = "worst domain"
CLOSED = "of the specialists' lead, %"
GROUPED = ["row", "group", "difference", "mean", "low", "high", "n_seeds", "excludes_zero"]
INTERVAL = ["row", "metric", "domain", "mean", "low", "high", "n_seeds"]


@dataclass(frozen=True, eq=False)
class GridTables:
    """Tables of the rows that have finished runs, in the grid's order.

    results: row, metric, domain (and "mean"), mean, low, high, n_seeds. differences: the same of row - baseline, with
    excludes_zero. costs: row, n_seeds, and medians over seeds of images_per_s (trained), n_parameters_shipped,
    n_parameters_trained, gflops_per_image (forward), train_seconds; the parameters and seconds of an assembly of
    specialists are sums over them. allocation: row, seed, step, domain, weight, share, images_seen. groups: R@1
    of queries by how much like them there was to learn from (see `evaluation.frequency`), and of the domain where it is
    lowest: row, group, difference (to the baseline, else the row's own), mean, low, high, n_seeds, excludes_zero; with
    specialists also what the row has of their lead, in percent (see `intervals.closed_share`).
    """

    baseline: str
    results: pd.DataFrame
    differences: pd.DataFrame
    costs: pd.DataFrame
    allocation: pd.DataFrame
    groups: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=GROUPED))

    @property
    def metrics(self) -> dict[str, str]:
        """Columns of outcomes, and the names to show."""
        return {name: metric_label(name) for name in dict.fromkeys(self.results["metric"])}

    @property
    def mmp(self) -> str:
        """The column of mMP@k."""
        return next((name for name in self.metrics if name.startswith("mmp")), "mmp_at_5")

    @property
    def domains(self) -> list[str]:
        return [name for name in dict.fromkeys(self.results["domain"]) if name != "mean"]

    @property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(self.results["row"]))


def embedder_of(recipe: object) -> str:
    """Whose outcomes count for a run of a recipe."""
    return "features" if recipe == "features" else "student"


def collect(grid: Grid) -> GridTables:
    """Read the finished runs of a grid; specialists that are all finished are put together and evaluated once.

    Raises:
        UserError: a run that a person steered, which does not show what its parameters do.
    """
    outcomes: dict[str, pd.DataFrame] = {}
    costs, allocations = [], []
    for row, seeds in grid.rows.items():
        finished = {seed: jobs for seed, jobs in seeds.items() if all(job.run.status == "finished" for job in jobs)}
        if not finished:
            continue
        runs = [job.run for jobs in finished.values() for job in jobs]
        touched = [run.path.name for run in runs if any(entry.matters for entry in run.interventions())]
        if touched:
            raise UserError(
                f"a person intervened in run {touched[0]!r} of row '{row}': it does not show what its parameters do. "
                "Remove or rename its folder, and run the grid again"
            )
        tables = [_outcomes(grid, row, seed, jobs).assign(seed=seed) for seed, jobs in finished.items()]
        outcomes[row] = pd.concat(tables, ignore_index=True)
        by_seed = pd.DataFrame([_cost(jobs) for jobs in finished.values()])
        costs.append({"row": row, "n_seeds": len(finished), **by_seed.median().to_dict()})
        for seed, jobs in finished.items():
            if len(jobs) == 1:
                allocations.append(jobs[0].run.allocation().assign(row=row, seed=seed))
    results, differences = [], []
    for row, table in outcomes.items():
        for metric in [name for name in table if "_at_" in name]:
            results.append(row_interval(table, metric).assign(row=row, metric=metric))
            baseline = outcomes.get(grid.baseline)
            if row != grid.baseline and baseline is not None and set(baseline["seed"]) & set(table["seed"]):
                differences.append(paired_difference(table, baseline, metric).assign(row=row, metric=metric))
    return GridTables(
        grid.baseline,
        _under(results, INTERVAL),
        _under(differences, [*INTERVAL, "excludes_zero"]),
        pd.DataFrame(costs, columns=["row", "n_seeds", *COSTS]),
        _under(allocations, ["row", "seed", "step", "domain", "weight", "share", "images_seen"]),
        _groups(grid, outcomes),
    )


def _groups(grid: Grid, outcomes: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """R@1 of groups of queries, of each row and of its difference to the baseline.

    Where data is very large there is the worst domain alone.
    """
    first = next((jobs[0] for jobs in grid.rows[grid.baseline].values()), None)
    if not outcomes or first is None:
        return pd.DataFrame(columns=GROUPED)
    catalog, known = open_catalog(first.params.model_copy(update={"domains": grid.params.domains})), None
    if sum(len(domain.train_labels) for domain in catalog.domains) <= MAX_LOOKED_AT:
        known = frequencies(catalog)
    parts = {row: {} if known is None else of_groups(table, known) for row, table in outcomes.items()}
    parts = {row: {**groups, WORST: outcomes[row]} for row, groups in parts.items()}
    tables = []
    for row, groups in parts.items():
        for group, part in groups.items():
            told = {"row": row, "group": group}
            interval, compare = (_of_mean, _difference_of_mean)
            if group == WORST:
                interval, compare = worst_interval, worst_difference
            tables.append(interval(part, "r_at_1").assign(**told, difference=False, excludes_zero=False))
            theirs = parts.get(grid.baseline, {}).get(group)
            if row != grid.baseline and theirs is not None and set(theirs["seed"]) & set(part["seed"]):
                tables.append(compare(part, theirs, "r_at_1").assign(**told, difference=True))
        tables += _closed(grid, outcomes, row)
    return _under(tables, GROUPED)


def _closed(grid: Grid, outcomes: dict[str, pd.DataFrame], row: str) -> list[pd.DataFrame]:
    """What a row has of the specialists' lead over the baseline, where the grid has all three."""
    ours, base, leader = (outcomes.get(name) for name in (row, grid.baseline, "specialist"))
    if row in (grid.baseline, "specialist") or ours is None or base is None or leader is None:
        return []
    if not set(ours["seed"]) & set(base["seed"]) & set(leader["seed"]):
        return []
    told = {"row": row, "group": CLOSED, "difference": False, "excludes_zero": False}
    return [closed_share(ours, base, leader, "r_at_1").assign(**told)]


def _of_mean(outcomes: pd.DataFrame, metric: str) -> pd.DataFrame:
    return row_interval(outcomes, metric).query("domain == 'mean'")


def _difference_of_mean(row: pd.DataFrame, baseline: pd.DataFrame, metric: str) -> pd.DataFrame:
    return paired_difference(row, baseline, metric).query("domain == 'mean'")


def export(tables: GridTables, grid: Grid) -> list[Path]:
    """Write results.csv, differences.csv, costs.csv and results.md into the grid's folder. Returns their paths."""
    contents = {
        "results.csv": tables.results.to_csv(index=False, lineterminator="\n"),
        "differences.csv": tables.differences.to_csv(index=False, lineterminator="\n"),
        "costs.csv": tables.costs.to_csv(index=False, lineterminator="\n"),
        "results.md": markdown(tables),
    }
    grid.folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_text(grid.folder / name, content)
    return [grid.folder / name for name in contents]


def markdown(tables: GridTables) -> str:
    """Two tables for a document: means with differences and costs, then the first metric of each domain."""
    metric = next(iter(tables.metrics), "r_at_1")
    told = [summary(tables), by_domain(tables, metric)] + ([by_group(tables)] if len(tables.groups) else [])
    return "\n".join(_pipes(head, lines) for head, lines in told)


def summary(tables: GridTables) -> Texts:
    """Write each row's means with their differences to the baseline, bold where they are sure, and its costs.

    A difference of several seeds is sure where its interval excludes zero; of one seed, none is.
    """
    head = ["row", "seeds"]
    for name in tables.metrics.values():
        head += [f"{name}, %", f"− {tables.baseline}"]
    head += ["images/s", "parameters, shipped / trained", "GFLOP an image"]
    lines = []
    for _, cost in tables.costs.iterrows():
        cells = [cost["row"], str(cost["n_seeds"])]
        for metric in tables.metrics:
            cells += [_mean(table, cost["row"], metric) for table in (tables.results, tables.differences)]
        lines.append([*cells, *_cost_cells(cost)])
    return head, lines


def by_domain(tables: GridTables, metric: str, differences: bool = False) -> Texts:
    """Write a metric of each row by domain and as the mean, or its differences to the baseline."""
    shown = tables.differences if differences else tables.results
    title = f"{metric_label(metric)} − {tables.baseline}, points" if differences else f"{metric_label(metric)}, %"
    order = [*tables.domains, "mean"]
    rows = [row for row in tables.rows if row in set(shown["row"])]
    return [title, *order], [[row, *(_mean(shown, row, metric, domain) for domain in order)] for row in rows]


def by_group(tables: GridTables) -> Texts:
    """Write R@1 of each row by groups of queries, the difference to the baseline behind it, bold where it is sure."""
    names = list(dict.fromkeys(tables.groups["group"]))
    lines = []
    for row in dict.fromkeys(tables.groups["row"]):
        cells = [str(row)]
        for name in names:
            part = tables.groups[(tables.groups["row"] == row) & (tables.groups["group"] == name)]
            own, against = (part[part["difference"].astype(bool) == which] for which in (False, True))
            told = [(_between if name == CLOSED else figure)(one.mean, one.low, one.high) for one in own.itertuples()]
            told += [difference(one.mean, one.low, one.high, bool(one.excludes_zero)) for one in against.itertuples()]
            cells.append("; ".join(told) or "–")
        lines.append(cells)
    return [f"R@1, %; − {tables.baseline}", *names], lines


def _between(value: float, low: float, high: float) -> str:
    """Write a value and its interval, of which an end may be missing."""
    ends = [f"{end:.0f}" if np.isfinite(end) else "?" for end in (low, high)]
    return f"{value:.0f} ({' to '.join(ends)})".replace("-", "−")


def _mean(table: pd.DataFrame, row: str, metric: str, domain: str = "mean") -> str:
    """Write one mean with its interval; a dash where there is none."""
    for one in table[(table["row"] == row) & (table["metric"] == metric) & (table["domain"] == domain)].itertuples():
        if "excludes_zero" in table:
            return difference(one.mean, one.low, one.high, bool(one.excludes_zero))
        return figure(one.mean, one.low, one.high)
    return "–"


def _cost_cells(cost: pd.Series) -> list[str]:
    pace = f"{cost['images_per_s']:,.0f}" if cost["images_per_s"] > 0 else "–"
    shipped, trained = (_count(cost[f"n_parameters_{part}"]) for part in ("shipped", "trained"))
    gflops = "–" if pd.isna(cost["gflops_per_image"]) else f"{cost['gflops_per_image']:.3g}"
    return [pace, f"{shipped} / {trained}", gflops]


def _count(n: float) -> str:
    return "–" if pd.isna(n) else f"{n / 1e6:.2f} M" if n >= 1e5 else f"{n / 1e3:.0f} k" if n else "0"


def _pipes(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _under(tables: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    """One table under the other; an empty one with the same columns where there are none."""
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def _outcomes(grid: Grid, row: str, seed: int, jobs: tuple[Job, ...]) -> pd.DataFrame:
    """Outcomes of every query in the merged index: domain, path and the metrics, in 0..1."""
    recipe = jobs[0].params.recipe
    file, embedder = jobs[0].run.path / "outcomes.csv.gz", embedder_of(recipe)
    if recipe == "specialist":
        file, embedder = _assembled(grid, row, seed, jobs), "specialist"
    table = load_outcomes(file)
    table = table[(table["embedder"] == embedder) & (table["index"] == "merged")]
    return table[["domain", "path", *(name for name in table if "_at_" in name)]]


def _assembled(grid: Grid, row: str, seed: int, jobs: tuple[Job, ...]) -> Path:
    """The outcomes of specialists put together, evaluated once for each set of runs and what these found.

    A grid of other domains or steps, whose folder may be the same, has other runs.
    """
    digest = hashlib.sha256()
    for job in jobs:
        digest.update(f"{job.name}\0".encode() + (job.run.path / "outcomes.csv.gz").read_bytes())
    file = grid.folder / f"{row}-s{seed}-{digest.hexdigest()[:6]}-outcomes.csv.gz"
    if not file.exists():
        grid.folder.mkdir(parents=True, exist_ok=True)
        outcomes = evaluate_assembly([Run(job.params) for job in jobs]).outcomes
        save_outcomes(outcomes, file)
    return file


def _cost(jobs: tuple[Job, ...]) -> dict[str, float]:
    """What one seed of a row cost: its run's figures; of several specialists sums, or means where sums say nothing."""
    figures = pd.DataFrame([job.run.summary() for job in jobs]).reindex(columns=list(COSTS)).astype(float)
    sums = figures[["n_parameters_shipped", "n_parameters_trained", "train_seconds"]].sum(min_count=len(jobs))
    return {**figures.mean().to_dict(), **sums.to_dict()}
