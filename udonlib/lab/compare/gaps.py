"""Where student, teachers and specialists of a finished run differ: tidy tables from the files of the run.

All of them answered the same test queries in the same index, so that every comparison is paired by query. "Right" means
that the first neighbour is relevant. Tables come as they are drawn by `compare.gap_views`; a share is in percent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from udonlib.data.catalog import Catalog
from udonlib.errors import UserError, nearest
from udonlib.evaluation.evaluate import Neighbours
from udonlib.evaluation.intervals import bootstrap_interval
from udonlib.evaluation.outcomes import GROUPS, KEYS, paired, whose_is_right
from udonlib.lab.views.evaluation_views import answered_by
from udonlib.presets import GapParams
from udonlib.runs.find import find_run, that_tested
from udonlib.runs.folder import RunFolder
from udonlib.runs.run import Run, load_run
from udonlib.runs.specialists import find_specialists, specialist_outcomes

RIGHT, WRONG_CLASS, NOTHING = "right", "wrong class", "no neighbour"
DIFFERENCE = "teacher - student"
N_RESAMPLES = 2000


def levels(outcomes: pd.DataFrame, metric: str = "r_at_1", index: str = "merged", seed: int = 0) -> pd.DataFrame:
    """Tabulate each embedder's mean metric by domain, with its 95% bootstrap interval over queries.

    Returns: embedder, domain, mean, low, high, in percent. The domain "mean" is that over domains; an embedder that has
        not searched all of them has none.
    """
    table = paired(outcomes, metric, index)
    tables = []
    for name in _embedders(table):
        known = table.dropna(subset=name)
        means = _intervals({domain: part[name] for domain, part in known.groupby("domain", sort=False)}, seed)
        everywhere = len(known) == len(table)
        tables.append((means if everywhere else means[means["domain"] != "mean"]).assign(embedder=name))
    return pd.concat(tables, ignore_index=True)[["embedder", "domain", "mean", "low", "high"]]


def between_embedders(
    outcomes: pd.DataFrame, metric: str = "r_at_1", index: str = "merged", seed: int = 0
) -> pd.DataFrame:
    """Tabulate the difference of each pair of embedders by domain, with its paired 95% bootstrap interval.

        difference = mean over queries of (outcome of one - outcome of other)

    A resample draws queries, not outcomes: what both find easy or hard does not widen the interval.

    Returns: one, other (embedders, e.g. teacher and student), domain, n_queries, mean, low, high, in points of percent.
        The domain "mean" is that over the domains which both searched.
    """
    table = paired(outcomes, metric, index)
    tables = []
    for other, one in combinations(_embedders(table), 2):
        known = table.dropna(subset=[one, other])
        values = {domain: part[one] - part[other] for domain, part in known.groupby("domain", sort=False)}
        n_queries = {domain: len(part) for domain, part in values.items()} | {"mean": len(known)}
        means = _intervals(values, seed)
        tables.append(means.assign(one=one, other=other, n_queries=means["domain"].map(n_queries)))
    return pd.concat(tables, ignore_index=True)[["one", "other", "domain", "n_queries", "mean", "low", "high"]]


def frequency_bins(counts: Int[np.ndarray, "query"], n_bins: int) -> Int[np.ndarray, "query"]:
    """Number the bin of each count, 0 upwards: quantiles, as far as equal counts stay together.

    A bin ends at a quantile, that count included; 0 has a bin of its own.
    """
    positive = counts[counts > 0]
    shares = np.arange(1, n_bins) / n_bins
    edges = np.unique(np.quantile(positive, shares, method="inverted_cdf")) if len(positive) else np.zeros(0)
    numbers = np.where(counts > 0, 1 + np.searchsorted(edges, counts), 0)
    return np.unique(numbers, return_inverse=True)[1].astype(np.int64)


def by_frequency(
    outcomes: pd.DataFrame, count: str = "n_positives", n_bins: int = 4, index: str = "merged", seed: int = 0
) -> pd.DataFrame:
    """Tabulate R@1 by how frequent the queries' class is, with 95% bootstrap intervals over queries.

    Queries without any relevant index image are left out: nobody can find what is not there.

    Args:
        count: column that says how frequent: n_positives, images of the class in the index without the query itself; or
            n_train of `with_train_images`.
        n_bins: of each domain; see `frequency_bins`.

    Returns: domain, count, embedder, bin, lowest, highest (of the counts), n_queries, mean, low, high (in percent). The
        embedder DIFFERENCE is that of teacher and student, paired by query.
    """
    table = paired(outcomes[outcomes["n_positives"] > 0], "r_at_1", index)
    tables = []
    for domain, part in table.groupby("domain", sort=False):
        part = part.assign(**{DIFFERENCE: part["teacher"] - part["student"]})
        binned = part.assign(bin=frequency_bins(part[count].to_numpy(np.int64), n_bins)).groupby("bin")
        sizes = binned[count].agg(lowest="min", highest="max", n_queries="size").reset_index()
        for embedder in _embedders(part.dropna(axis=1, how="all")):
            means = _intervals({number: queries[embedder] for number, queries in binned}, seed)[:-1]
            means = pd.concat([sizes, means[["mean", "low", "high"]]], axis=1)
            tables.append(means.assign(domain=domain, count=count, embedder=embedder))
    columns = ["domain", "count", "embedder", "bin", "lowest", "highest", "n_queries", "mean", "low", "high"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def with_train_images(outcomes: pd.DataFrame, catalog: Catalog) -> pd.DataFrame:
    """Add n_train, the training images of each query's classes; domains that train no class of a query are left out."""
    tables = []
    for domain, part in outcomes.groupby("domain", sort=False):
        train, queries = catalog[domain].splits["train"], catalog[domain].queries("test")
        n_of_class = dict(zip(*np.unique(train.labels, return_counts=True), strict=True))
        n_of_class.pop(-1, None)  # pads images with fewer labels
        n_train = [sum(n_of_class.get(label, 0) for label in set(labels)) for labels in queries.labels.tolist()]
        of_path = dict(zip(queries.paths, n_train, strict=True))
        if any(n_train):
            tables.append(part.assign(n_train=part["path"].map(of_path)))
    return pd.concat(tables) if tables else outcomes.iloc[:0].assign(n_train=0)


def pairs(neighbours: Iterable[Neighbours]) -> Iterator[tuple[Neighbours, Neighbours]]:
    """The student's and the teacher's neighbours of the same queries, domain by domain."""
    parts = {(part.embedder, part.query_domain): part for part in neighbours}
    for (embedder, domain), student in parts.items():
        if embedder == "student" and ("teacher", domain) in parts:
            teacher = parts["teacher", domain]
            if teacher.query_paths != student.query_paths:
                raise UserError(f"domain '{domain}': student and teacher were tested on different queries")
            yield student, teacher


def overlaps(neighbours: Iterable[Neighbours], k: int = 5) -> pd.DataFrame:
    """Measure how far student and teacher agree on the k nearest neighbours of each query.

    Returns: domain, path, group (whose first neighbour is right), overlap and rbo (0..1), of

        overlap@k = |first k of one and of the other| / k
        RBO       = `rank_biased_overlap`, where the first ranks count most

    k counts no more than there are: where an index is smaller, its size.
    """
    tables = []
    for student, teacher in pairs(neighbours):
        shared = _shared(student.position[:, :k], teacher.position[:, :k])
        n_there = (student.position[:, :k] >= 0).sum(axis=1).clip(min=1)
        table = {
            "domain": student.query_domain,
            "path": student.query_paths,
            "group": whose_is_right(student.hit[:, 0], teacher.hit[:, 0]),
            "overlap": shared[:, -1] / n_there,
            "rbo": rank_biased_overlap(shared, n_there),
        }
        tables.append(pd.DataFrame(table))
    return pd.concat(tables, ignore_index=True)


def rank_biased_overlap(
    shared: Int[np.ndarray, "query k"], n_there: Int[np.ndarray, "query"], p: float = 0.8
) -> Float[np.ndarray, "query"]:
    """Rank-biased overlap of two lists, extrapolated from what they share at each depth.

        RBO = a_k p^k + (1 - p)/p sum over d = 1..k of a_d p^d,   a_d = x_d / min(d, n)

    In [0, 1]; 1 where both lists are the same. The weight of a rank falls with p, 0 < p < 1: a reader looks at
    1 / (1 - p) ranks on average. Source: RBO_EXT of Webber, Moffat and Zobel, ACM TOIS 28 (2010).

    Args:
        shared: x_d, the items that stand among the first d of both lists.
        n_there: n, the length of both lists where it is less than k.
    """
    depth = np.arange(1, shared.shape[1] + 1)
    agreement = shared / np.minimum(depth, n_there[:, None])
    return agreement[:, -1] * p ** depth[-1] + (1 - p) / p * (agreement * p**depth).sum(axis=1)


def overlap_means(overlaps: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Average overlaps by domain, over all queries and within each group, with 95% bootstrap intervals over queries.

    Returns: domain ("mean": over the domains that have such queries), group ("all" or one of GROUPS), n_queries, mean,
        low, high (of the overlap) and rbo, in percent.
    """
    tables = []
    for group in ("all", *GROUPS):
        rows = overlaps if group == "all" else overlaps[overlaps["group"] == group]
        if len(rows):
            of_domain = dict(iter(rows.groupby("domain", sort=False)))
            means = _intervals({domain: part["overlap"] for domain, part in of_domain.items()}, seed)
            rbo = {domain: 100 * part["rbo"].mean() for domain, part in of_domain.items()}
            rbo["mean"] = float(np.mean(list(rbo.values())))
            n_queries = {domain: len(part) for domain, part in of_domain.items()} | {"mean": len(rows)}
            names = means["domain"]
            tables.append(means.assign(group=group, n_queries=names.map(n_queries), rbo=names.map(rbo)))
    return pd.concat(tables, ignore_index=True)[["domain", "group", "n_queries", "mean", "low", "high", "rbo"]]


def first_neighbours(neighbours: Iterable[Neighbours]) -> pd.DataFrame:
    """Count what the first neighbour of each query is, for student and teacher.

    Returns: domain, embedder, found ("right", "wrong class" of the query's own domain, or the name of another domain),
        n_queries, percent (of the domain's queries). What never occurs has no row.
    """
    tables = []
    for pair in pairs(neighbours):
        for part in pair:
            found = kinds_found(part)
            counts = pd.Series(found).value_counts().rename_axis("found").rename("n_queries").reset_index()
            counts["percent"] = 100 * counts["n_queries"] / len(found)
            tables.append(counts.assign(domain=part.query_domain, embedder=part.embedder))
    return pd.concat(tables, ignore_index=True)[["domain", "embedder", "found", "n_queries", "percent"]]


def kinds_found(part: Neighbours) -> np.ndarray:
    """What the first neighbour of each query is, in the words of `first_neighbours`."""
    searched = part.searched
    ends = np.cumsum([len(paths) for paths in searched.paths])
    first = part.position[:, 0]
    names = np.array([*searched.domains, NOTHING], dtype=object)
    found = names[np.where(first >= 0, np.searchsorted(ends, first, side="right"), len(ends))]
    found[found == part.query_domain] = WRONG_CLASS
    found[part.hit[:, 0]] = RIGHT
    return found


def in_short(outcomes: pd.DataFrame, seed: int = 0) -> str:
    """Sum up in a sentence who leads in R@1, and where that is sure: the paired 95% interval excludes zero."""
    rows = between_embedders(outcomes, "r_at_1", seed=seed).query("one == 'teacher' and other == 'student'")
    if rows.empty:
        return "No teacher answered these queries."
    mean, named = rows[rows["domain"] == "mean"].iloc[0], rows[rows["domain"] != "mean"]
    half = (mean["high"] - mean["low"]) / 2
    leader, points = ("teachers lead" if mean["mean"] > 0 else "the student leads"), abs(mean["mean"])
    sure = "" if mean["low"] > 0 or mean["high"] < 0 else ", which is not sure"
    where = []
    for who, part in (("teachers", named[named["low"] > 0]), ("the student", named[named["high"] < 0])):
        if len(part):
            lead = [
                f"{row.domain} ({abs(row.mean):.1f})" for row in part.sort_values("mean", key=abs)[::-1].itertuples()
            ]
            where.append(f"surely {who} in {', '.join(lead)}")
    left = len(named) - sum((named["low"] > 0) | (named["high"] < 0))
    where += [f"open in {'all' if not where else 'the other'} {left} domains" if left > 1 else "open in one"] * (
        left > 0
    )
    return f"On average {leader} by {points:.1f} ± {half:.1f} points of R@1{sure}; by domain: {'; '.join(where)}."


def _embedders(table: pd.DataFrame) -> list[str]:
    return [name for name in table.columns if name not in KEYS]


def _shared(one: Int[np.ndarray, "query k"], other: Int[np.ndarray, "query k"]) -> Int[np.ndarray, "query k"]:
    """How many items stand among the first d of both lists, for d = 1..k; -1 is no item."""
    k = one.shape[1]
    same = (one[:, :, None] == other[:, None, :]) & (one[:, :, None] >= 0)
    # A pair at ranks i and j is shared from depth max(i, j) on.
    depth = np.maximum.outer(np.arange(k), np.arange(k))
    return np.stack([(same & (depth <= d)).sum(axis=(1, 2)) for d in range(k)], axis=1)


def _intervals(values: Mapping[object, pd.Series], seed: int) -> pd.DataFrame:
    """Means with bootstrap intervals in percent; each table draws anew, so that one does not depend on the others."""
    arrays = {str(name): part.to_numpy(float)[None] for name, part in values.items()}
    table = bootstrap_interval(arrays, np.random.default_rng(seed), N_RESAMPLES)
    table[["mean", "low", "high"]] *= 100
    return table


@dataclass(frozen=True, eq=False)
class GapRun:
    """A run with teachers, and what all embedders made of its test queries.

    specialists: the run of each domain that has one. domains: those to compare, in the catalog's order. outcomes: as of
        `Evaluation`, of student, teacher and, where there are some, specialist. neighbours: in the merged index.
        validation: as of `RunFolder`.
    """

    run: Run
    domains: tuple[str, ...]
    specialists: dict[str, RunFolder]
    outcomes: pd.DataFrame
    neighbours: list[Neighbours]
    validation: pd.DataFrame

    @property
    def catalog(self) -> Catalog:
        return self.run.catalog

    @property
    def metrics(self) -> list[str]:
        """The columns of outcomes that measure: r_at_1 and mmp_at_k."""
        return [name for name in self.outcomes if "_at_" in name]


def open_gaps(params: GapParams) -> GapRun:
    """Read a run and its specialists; the queries of an unfinished run are asked now, of its best model so far.

    Raises:
        UserError: no such run, or one without a model or teachers, with the names of runs that have some;
            k beyond the neighbours that were kept; specialists that do not exist, or were tested on other queries.
    """
    run = load_run(find_run(params.run, that_tested("teacher"), params.outputs))
    answered = answered_by(run, params)
    neighbours = answered.neighbours()
    n_kept, domains, name = min(part.position.shape[1] for part in neighbours), run.catalog.names, run.path.name
    if params.k > n_kept:
        raise UserError(f"parameter 'k': found {params.k}, but run {name!r} kept {n_kept}; valid: 1 to {n_kept}")
    if params.domains != "all":
        unknown = next((name for name in params.domains if name not in domains), None)
        if unknown:
            raise UserError(f"parameter 'domains': run {name!r} has no '{unknown}'; {nearest(unknown, domains)}")
        domains = tuple(name for name in domains if name in params.domains)
    outcomes = answered.outcomes()
    outcomes = outcomes[outcomes["embedder"].isin(["student", "teacher"])]
    specialists = find_specialists(run, params.specialists, params.outputs)
    if specialists:
        outcomes = pd.concat([outcomes, specialist_outcomes(run, specialists, params.outputs)], ignore_index=True)
    # The mean over domains is that of all the run's; of some of them it would be another.
    validated = [*domains, "mean"] if len(domains) == len(run.catalog.names) else domains
    validation = run.validation()
    return GapRun(
        run,
        domains,
        {name: specialists[name] for name in domains if name in specialists},
        outcomes[outcomes["domain"].isin(domains)],
        sorted(
            (part for part in neighbours if part.query_domain in domains),
            key=lambda part: domains.index(part.query_domain),
        ),
        validation[validation["domain"].isin(validated)],
    )
