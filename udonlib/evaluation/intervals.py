"""How sure a mean of outcomes is: intervals over queries and, where there are several, over seeds.

Every run of a comparison answers the same queries, so outcomes are a table of seeds by queries for each domain, and the
difference of two rows of results is such a table, too: paired by query and by seed.

Seeds are few. Drawing three of them with replacement understates their variance by a third, and a mean of three is
spread like Student's t, not like a normal variable. So a resample takes both parts for what they are:

    mean* = mean + t* s / sqrt(S) + mean over domains of r_d (mean of the drawn queries - mean of all queries)

t* follows Student's t with S - 1 degrees of freedom, s^2 is the variance of the S seeds' means, and queries are drawn
with replacement within each domain. s^2 holds what differs between seeds on the whole and query by query; the second
must not count again when queries are drawn, so that their deviations are scaled down to the queries' own variance:

    r_d^2 = 1 - e_d^2 / (S v_d)     e_d^2: mean square of the residuals of seeds x queries,
                                    v_d: variance over queries of their means over the seeds

With one seed, nothing is known about seeds: the interval is then over queries alone. In simulations with three seeds
95% intervals cover 93 to 98% whatever part is large (tests/evaluation/test_intervals.py), where drawing seeds with
replacement covers 85% if most of the spread is between seeds, and 99% if most of it is between single answers.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

N_T = 200  # values of t* that meet each draw of queries


def bootstrap_interval(
    outcomes: Mapping[str, Float[np.ndarray, "seed query"]],
    generator: np.random.Generator,
    n_resamples: int = 1000,
    level: float = 0.95,
) -> pd.DataFrame:
    """Return percentile intervals over queries and seeds, for each domain and for the mean over domains.

    A metric takes few distinct values, and how often each of them is drawn is multinomial: drawing that is the same as
    drawing queries and takes no pass over them.

    Args:
        outcomes: by domain, of each query under each seed; the same seeds in all domains.
        generator: where the draws come from.
        n_resamples: draws of queries, >= 1.
        level: share of the resamples inside the interval, between 0 and 1.

    Returns:
        Columns domain, mean, low, high; a row for each domain, then "mean".

    Raises:
        ValueError: "domain 'cars' has no queries"; domains of different seeds; a level or number out of range.
    """
    if not 0 < level < 1 or n_resamples < 1:
        raise ValueError(f"level is {level}, n_resamples is {n_resamples}; valid: 0 < level < 1, n_resamples >= 1")
    n_seeds = {len(values) for values in outcomes.values()}
    if len(n_seeds) != 1 or not min(n_seeds):
        raise ValueError(f"domains have {sorted(n_seeds)} seeds; valid: one number of seeds >= 1 for all domains")
    by_seed: dict[str, Float[np.ndarray, "seed"]] = {}
    resampled: dict[str, Float[np.ndarray, "resample"]] = {}
    for domain, values in outcomes.items():
        if not values.shape[1]:
            raise ValueError(f"domain '{domain}' has no queries")
        by_seed[domain] = values.mean(axis=1, dtype=np.float64)
        resampled[domain] = _query_deviations(values.astype(np.float64), generator, n_resamples)
    by_seed["mean"] = np.mean(list(by_seed.values()), axis=0)
    resampled["mean"] = np.mean(list(resampled.values()), axis=0)
    tails = [(1 - level) / 2, (1 + level) / 2]
    rows = []
    for name, means in by_seed.items():
        drawn = means.mean() + resampled[name]
        if len(means) > 1:
            error = means.std(ddof=1) / np.sqrt(len(means))
            drawn = drawn[:, None] + error * t_values(len(means) - 1, N_T)
        rows.append((name, means.mean(), *np.quantile(drawn, tails, method="hazen")))
    return pd.DataFrame(rows, columns=["domain", "mean", "low", "high"])


def t_values(df: int, n: int) -> Float[np.ndarray, "n"]:
    """Quantiles of Student's t with df >= 1 degrees of freedom, at n probabilities (i + 1/2) / n.

    t = sqrt(df) tan(a),   where the angle a in (-pi/2, pi/2) has a density proportional to cos(a)^(df - 1)
    """
    edges = np.linspace(-np.pi / 2, np.pi / 2, 20_001)
    share = np.concatenate([[0.0], np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2) ** (df - 1))])
    return np.sqrt(df) * np.tan(np.interp((np.arange(n) + 0.5) / n, share / share[-1], edges))


def row_interval(outcomes: pd.DataFrame, metric: str, n_resamples: int = 1000, level: float = 0.95) -> pd.DataFrame:
    """Return the interval of one row of results: `bootstrap_interval` of a metric in percent, with column n_seeds.

    Args:
        outcomes: of the row's runs: seed, domain, path, and the metric in 0..1; one line for each seed and query.
    """
    return _percent(by_query(outcomes, metric), n_resamples, level)


def paired_difference(
    row: pd.DataFrame, baseline: pd.DataFrame, metric: str, n_resamples: int = 1000, level: float = 0.95
) -> pd.DataFrame:
    """Return the interval of row - baseline in percentage points, as `row_interval` does, and column excludes_zero.

    Pairs are formed by query and seed; seeds that only one of the two has are left out. With a single seed nothing
    is said to exclude zero: that interval knows nothing of how far another seed would land.

    Raises:
        ValueError: no seed in common; other domains or queries.
    """
    seeds = sorted(set(row["seed"]) & set(baseline["seed"]))
    if not seeds:
        found = [sorted({int(seed) for seed in side["seed"]}) for side in (row, baseline)]
        raise ValueError(f"no seed in common: {found[0]} and {found[1]}")
    ours, theirs = (side[side["seed"].isin(seeds)] for side in (row, baseline))
    both = by_query(pd.concat([ours.assign(side=0), theirs.assign(side=1)]), metric, ["side", "seed"])
    n = len(seeds)
    found = _percent({domain: values[:n] - values[n:] for domain, values in both.items()}, n_resamples, level)
    return found.assign(excludes_zero=((found["low"] > 0) | (found["high"] < 0)) & (n > 1))


def worst_interval(outcomes: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the interval of the domain that is lowest as the mean over seeds, as `row_interval`; a row."""
    found = row_interval(outcomes, metric)
    found = found[found["domain"] != "mean"]
    return found[found["mean"] == found["mean"].min()].head(1)


def worst_difference(row: pd.DataFrame, baseline: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the interval of the lowest domain of one row minus that of another, as `paired_difference`; a row.

    Where both have the same one its queries are paired; else those of either vary by themselves, and seeds are paired.
    Its domain is that of the row.
    """
    seeds = sorted(set(row["seed"]) & set(baseline["seed"]))
    row, baseline = (side[side["seed"].isin(seeds)] for side in (row, baseline))
    ours, theirs = (worst_interval(side, metric)["domain"].item() for side in (row, baseline))
    row, baseline = row[row["domain"] == ours], baseline[baseline["domain"] == theirs]
    if ours == theirs:
        return paired_difference(row, baseline, metric).query("domain != 'mean'")
    of_row, of_baseline = by_query(row, metric), by_query(baseline, metric)
    halves = {"row": 2 * of_row[ours], "baseline": -2 * of_baseline[theirs]}  # their mean is the difference
    found = _percent(halves, 1000, 0.95).query("domain == 'mean'")
    sure = ((found["low"] > 0) | (found["high"] < 0)) & (len(seeds) > 1)
    return found.assign(domain=ours, excludes_zero=sure)


def closed_share(row: pd.DataFrame, baseline: pd.DataFrame, leader: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return how much of a leader's lead over a baseline a row has, in percent, over the domains where it leads.

        share = sum_d (row_d - baseline_d) / sum_d (leader_d - baseline_d)     over d: leader_d > baseline_d

    A share s is inside the interval where row - baseline - s (leader - baseline) is not surely different from zero
    (Fieller 1954): a ratio of means has no interval of its own where the lower one may be zero.

    Returns:
        As `row_interval`, a row, domain "mean"; of low and high, NaN where there is no such end; no row where the
        leader leads nowhere.

    Raises:
        ValueError: no seed in common; other domains or queries.
    """
    seeds = sorted(set(row["seed"]) & set(baseline["seed"]) & set(leader["seed"]))
    if not seeds:
        raise ValueError("no seed in common")
    sides = [side[side["seed"].isin(seeds)].assign(side=place) for place, side in enumerate((row, baseline, leader))]
    n = len(seeds)
    tables = by_query(pd.concat(sides), metric, ["side", "seed"])
    leads = {domain: (t[:n] - t[n : 2 * n], t[2 * n :] - t[n : 2 * n]) for domain, t in tables.items()}
    leads = {domain: pair for domain, pair in leads.items() if pair[1].mean() > 0}
    if not leads:
        return pd.DataFrame(columns=["domain", "mean", "low", "high", "n_seeds"])

    def left(share: float) -> tuple[float, float]:
        """Ends of the interval of what is left of the row's lead, less this share of the leader's."""
        rest = {domain: ours - share * theirs for domain, (ours, theirs) in leads.items()}
        of_mean = bootstrap_interval(rest, np.random.default_rng(0)).iloc[-1]
        return float(of_mean["low"]), float(of_mean["high"])

    ours, theirs = (sum(pair[place].mean() for pair in leads.values()) for place in (0, 1))
    share = ours / theirs
    ends = [_crossing(lambda s: -left(s)[0], share, -1.0), _crossing(lambda s: left(s)[1], share, 1.0)]
    percent = dict(zip(("mean", "low", "high"), (100 * share, *(100 * end for end in ends)), strict=True))
    return pd.DataFrame([{"domain": "mean", **percent, "n_seeds": n}])


def _crossing(rising: Callable[[float], float], start: float, step: float, most: float = 64.0) -> float:
    """Where a function that is above zero at the start falls to it, looking in steps that double; NaN: nowhere."""
    inside, outside = start, start + step
    while rising(outside) > 0:
        if abs(outside - start) > most:
            return float("nan")
        inside, outside = outside, start + 2 * (outside - start)
    for _ in range(20):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if rising(middle) > 0 else (inside, middle)
    return (inside + outside) / 2


def by_query(
    outcomes: pd.DataFrame, metric: str, runs: Sequence[str] = ("seed",)
) -> dict[str, Float[np.ndarray, "run query"]]:
    """Return the outcomes of a metric by domain, as a table of runs, rising, by queries.

    Args:
        outcomes: domain, path, the metric, and the columns `runs`, which tell runs apart.

    Raises:
        ValueError: "queries of domain 'cars' differ between runs (...)".
    """
    tables: dict[str, list[np.ndarray]] = {}
    paths: dict[str, np.ndarray] = {}
    for (*run, domain), part in outcomes.groupby([*runs, "domain"], sort=True):
        here = part["path"].to_numpy()
        if not np.array_equal(paths.setdefault(domain, here), here):
            raise ValueError(f"queries of domain '{domain}' differ between runs ({', '.join(runs)} = {run})")
        tables.setdefault(domain, []).append(part[metric].to_numpy(np.float64))
    if len({len(tables[domain]) for domain in tables}) > 1:
        raise ValueError(f"runs have different domains: {', '.join(f'{d} in {len(t)}' for d, t in tables.items())}")
    order = [domain for domain in dict.fromkeys(outcomes["domain"]) if domain in tables]
    return {domain: np.stack(tables[domain]) for domain in order}


def _query_deviations(
    values: Float[np.ndarray, "seed query"], generator: np.random.Generator, n_resamples: int
) -> Float[np.ndarray, "resample"]:
    """Draw how far the mean of as many queries, drawn with replacement, is from the mean of all: r_d of it."""
    n_seeds, n_queries = values.shape
    means = values.mean(axis=0)
    distinct, counts = np.unique(means.round(12), return_counts=True)
    n_at_once = max(1, 2**22 // len(distinct))  # bounds memory where every value differs
    sizes = [min(n_at_once, n_resamples - start) for start in range(0, n_resamples, n_at_once)]
    drawn = [generator.multinomial(n_queries, counts / n_queries, size) @ distinct for size in sizes]
    deviations = np.concatenate(drawn) / n_queries - means.mean()
    if n_seeds == 1 or n_queries == 1 or len(distinct) == 1:
        return deviations
    residuals = values - means - values.mean(axis=1, keepdims=True) + means.mean()
    e2 = (residuals**2).sum() / ((n_seeds - 1) * (n_queries - 1))
    return deviations * np.sqrt(max(0.0, 1 - e2 / (n_seeds * means.var(ddof=1))))


def _percent(outcomes: dict[str, Float[np.ndarray, "seed query"]], n_resamples: int, level: float) -> pd.DataFrame:
    found = bootstrap_interval(outcomes, np.random.default_rng(0), n_resamples, level)
    found[["mean", "low", "high"]] *= 100
    return found.assign(n_seeds=len(next(iter(outcomes.values()))))
