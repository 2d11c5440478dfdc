"""Intervals over queries and seeds: right where the answer is known, and near their level in simulations."""

import numpy as np
import pandas as pd
import pytest

from udonlib.evaluation.intervals import (
    bootstrap_interval,
    by_query,
    closed_share,
    paired_difference,
    row_interval,
    t_values,
    worst_difference,
    worst_interval,
)


def outcomes(values: dict[str, np.ndarray], seeds: tuple[int, ...] | None = None) -> pd.DataFrame:
    """The lines of some runs' queries: domain -> outcomes of seeds by queries."""
    rows = [
        (seed, domain, f"{query}.png", value)
        for domain, table in values.items()
        for seed, answers in zip(seeds or range(len(table)), table, strict=True)
        for query, value in enumerate(answers)
    ]
    return pd.DataFrame(rows, columns=["seed", "domain", "path", "r_at_1"])


# --- one seed: over queries ------------------------------------------------------------------------------------------


def test_bootstrap_agrees_with_resampling_queries_one_by_one():
    generator = np.random.default_rng(0)
    values = {"a": (generator.random(400) < 0.3).astype(float), "b": generator.integers(0, 6, 100) / 5}
    tables = {name: v[None] for name, v in values.items()}
    found = bootstrap_interval(tables, np.random.default_rng(1), n_resamples=20000).set_index("domain")
    drawn = {name: v[generator.integers(0, len(v), (20000, len(v)))].mean(axis=1) for name, v in values.items()}
    drawn["mean"] = (drawn["a"] + drawn["b"]) / 2
    for name, resampled in drawn.items():
        low, high = np.quantile(resampled, [0.025, 0.975])
        assert found.loc[name, "low"] == pytest.approx(low, abs=0.006)
        assert found.loc[name, "high"] == pytest.approx(high, abs=0.006)
    assert found.loc["mean", "mean"] == pytest.approx((values["a"].mean() + values["b"].mean()) / 2)


def test_bootstrap_repeats_with_the_same_generator_and_is_a_point_where_all_answers_agree():
    values = {"a": np.ones((2, 50)), "b": np.arange(40).reshape(2, 20) / 20}
    first, second = (bootstrap_interval(values, np.random.default_rng(3), n_resamples=50) for _ in range(2))
    assert first.equals(second)
    assert first.iloc[0].tolist() == ["a", 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("values", "level", "message"),
    [
        ({"cars": np.zeros((1, 0))}, 0.95, "domain 'cars' has no queries"),
        ({"cars": np.zeros((1, 3))}, 1.0, "level is 1"),
        ({"cars": np.zeros((1, 3)), "sop": np.zeros((2, 3))}, 0.95, r"domains have \[1, 2\] seeds"),
        ({"cars": np.zeros((0, 3))}, 0.95, r"domains have \[0\] seeds"),
    ],
)
def test_bootstrap_refuses_what_has_no_interval(values, level, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, np.random.default_rng(0), level=level)


# --- several seeds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("df", "tabulated"), [(1, 12.706), (2, 4.303), (4, 2.776), (30, 2.042)])
def test_t_values_are_those_of_the_tables(df, tabulated):
    values = t_values(df, 1000)
    assert np.quantile(values, 0.975) == pytest.approx(tabulated, rel=0.02)
    np.testing.assert_allclose(values, -values[::-1], atol=1e-6 * values[-1])


def test_where_only_seeds_differ_the_interval_is_students_t():
    means = np.array([0.50, 0.53, 0.47])
    values = {name: np.repeat(means[:, None], 40, axis=1) for name in ("a", "b")}
    found = bootstrap_interval(values, np.random.default_rng(0)).set_index("domain").loc["mean"]
    half = 4.303 * means.std(ddof=1) / np.sqrt(3)
    assert found["high"] - found["mean"] == pytest.approx(half, rel=0.04)
    assert found["mean"] - found["low"] == pytest.approx(half, rel=0.04)


def test_where_seeds_agree_the_interval_is_that_of_one_seed():
    answers = (np.random.default_rng(5).random((1, 200)) < 0.4).astype(float)
    one = bootstrap_interval({"a": answers}, np.random.default_rng(0))
    three = bootstrap_interval({"a": np.repeat(answers, 3, axis=0)}, np.random.default_rng(0))
    pd.testing.assert_frame_equal(one, three)


def spread(generator, seeds: float, queries: float, answers: float, n_seeds: int = 3) -> dict[str, np.ndarray]:
    """Outcomes of true mean 0: normal parts of each seed, each query, and each answer, in two domains."""
    of_seeds = generator.normal(0, seeds, (n_seeds, 1))
    return {
        name: of_seeds + generator.normal(0, queries, (1, 50)) + generator.normal(0, answers, (n_seeds, 50))
        for name in ("a", "b")
    }


@pytest.mark.parametrize(
    "parts",
    [
        {"seeds": 0.1, "queries": 0.1, "answers": 0.1},
        {"seeds": 0.0, "queries": 0.4, "answers": 0.1},
        {"seeds": 0.0, "queries": 0.0, "answers": 0.4},
        {"seeds": 0.05, "queries": 0.3, "answers": 0.3},
    ],
    ids=["most between seeds", "most between queries", "all between answers", "all alike"],
)
def test_with_three_seeds_95_percent_intervals_cover_the_truth_about_95_times_in_100(parts):
    generator = np.random.default_rng(7)
    found = [bootstrap_interval(spread(generator, **parts), generator, 60).iloc[-1] for _ in range(400)]
    covered = np.mean([row["low"] <= 0 <= row["high"] for row in found])
    assert 0.92 <= covered <= 0.985  # 400 repetitions have a standard error of 0.011


def test_right_and_wrong_answers_are_covered_too():
    generator, covered = np.random.default_rng(8), []
    for _ in range(400):
        chances = generator.uniform(0.2, 0.8, (1, 80)) + generator.uniform(-0.1, 0.1, (3, 1))
        answers = (generator.random((3, 80)) < chances).astype(float)
        row = bootstrap_interval({"a": answers}, generator, 60).iloc[-1]
        covered.append(row["low"] <= 0.5 <= row["high"])
    assert 0.92 <= np.mean(covered) <= 0.985


# --- rows of results -------------------------------------------------------------------------------------------------


def test_a_rows_interval_is_in_percent_and_counts_its_seeds():
    table = outcomes({"b": np.array([[1.0, 0.0], [1.0, 1.0]]), "a": np.array([[0.0, 0.0], [0.0, 1.0]])})
    found = row_interval(table, "r_at_1")
    assert found["domain"].tolist() == ["b", "a", "mean"]  # the catalog's order
    assert found["mean"].tolist() == [75.0, 25.0, 50.0]
    assert set(found["n_seeds"]) == {2}


def test_a_difference_is_paired_by_query_and_seed():
    generator = np.random.default_rng(0)
    base = (generator.random((3, 300)) < 0.5).astype(float)
    better = base.copy()
    better[:, :30] = 1.0  # the same few queries are always right
    row, baseline = outcomes({"a": better}), outcomes({"a": base}).sample(frac=1, random_state=1)
    baseline = baseline.sort_values(["domain", "path"], key=lambda c: c.map(str)).reset_index(drop=True)
    row = row.sort_values(["domain", "path"], key=lambda c: c.map(str)).reset_index(drop=True)
    found = paired_difference(row, baseline, "r_at_1").iloc[-1]
    assert found["mean"] == pytest.approx(100 * (better - base).mean())
    assert found["excludes_zero"]
    apart = [row_interval(side, "r_at_1").iloc[-1] for side in (row, baseline)]
    assert found["high"] - found["low"] < 0.5 * min(side["high"] - side["low"] for side in apart)


def test_a_difference_uses_the_seeds_that_both_rows_have():
    row = outcomes({"a": np.array([[1.0, 1.0], [1.0, 0.0]])}, seeds=(4, 2))
    baseline = outcomes({"a": np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])}, seeds=(1, 2, 3))
    found = paired_difference(row, baseline, "r_at_1").iloc[-1]
    assert (found["mean"], found["n_seeds"]) == (0.0, 1)
    assert not found["excludes_zero"]
    with pytest.raises(ValueError, match=r"no seed in common: \[2, 4\] and \[1\]"):
        paired_difference(row, baseline[baseline["seed"] == 1], "r_at_1")


def rows_of(means, n_queries=400, seeds=(0, 1, 2)):
    """Outcomes of so many queries a domain and seed, of which so many percent are right; seeds differ by two points."""
    tables = []
    for seed in seeds:
        for domain, mean in means.items():
            right = np.arange(n_queries) * 997 % n_queries < (mean + 2 * seed) / 100 * n_queries
            paths = [f"{domain}/{n}" for n in range(n_queries)]
            tables.append(pd.DataFrame({"seed": seed, "domain": domain, "path": paths, "r_at_1": right.astype(float)}))
    return pd.concat(tables, ignore_index=True)


def test_the_worst_domain_is_that_of_the_lowest_mean_and_rows_may_have_another_one():
    baseline, row = rows_of({"flags": 30, "fonts": 20}), rows_of({"flags": 25, "fonts": 40})
    for table, domain, mean in ((baseline, "fonts", 22), (row, "flags", 27)):
        [worst] = worst_interval(table, "r_at_1").itertuples()
        assert (worst.domain, worst.mean) == (domain, pytest.approx(mean, abs=0.3))
        assert worst.low < worst.mean < worst.high
    [found] = worst_difference(row, baseline, "r_at_1").itertuples()
    assert (found.domain, found.mean, found.n_seeds) == ("flags", pytest.approx(5, abs=0.3), 3)
    # Queries of two domains vary by themselves: +-1.96 sqrt(2 p (1 - p) / n), and so seeds, which are paired.
    half = 196 * np.sqrt((0.27 * 0.73 + 0.22 * 0.78) / 400)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.15)
    assert not found.excludes_zero
    [sure] = worst_difference(rows_of({"flags": 60, "fonts": 50}), baseline, "r_at_1").itertuples()
    assert sure.excludes_zero
    [same] = worst_difference(rows_of({"flags": 30, "fonts": 21}), baseline, "r_at_1").itertuples()
    paired = paired_difference(rows_of({"flags": 30, "fonts": 21}), baseline, "r_at_1").set_index("domain")
    assert (same.mean, same.low, same.high) == tuple(paired.loc["fonts", ["mean", "low", "high"]])
    of_one_seed = (rows_of(means, seeds=[0]) for means in ({"flags": 60}, {"fonts": 20}))
    [one] = worst_difference(*of_one_seed, "r_at_1").itertuples()
    assert not one.excludes_zero


def test_one_seed_is_never_enough_to_exclude_zero():
    better, baseline = np.ones((2, 100)), np.zeros((2, 100))
    sure = paired_difference(outcomes({"a": better}), outcomes({"a": baseline}), "r_at_1")
    unsure = paired_difference(outcomes({"a": better[:1]}), outcomes({"a": baseline[:1]}), "r_at_1")
    assert sure["excludes_zero"].all()
    assert not unsure["excludes_zero"].any()
    assert unsure["low"].min() == 100


def test_rows_of_other_queries_or_domains_are_not_compared():
    one, other = outcomes({"a": np.ones((1, 3))}), outcomes({"a": np.ones((1, 3))}).assign(path="x")
    with pytest.raises(ValueError, match="queries of domain 'a' differ between runs"):
        paired_difference(one, other, "r_at_1")
    with pytest.raises(ValueError, match="runs have different domains: a in 2, b in 1"):
        paired_difference(one, outcomes({"a": np.ones((1, 3)), "b": np.ones((1, 2))}), "r_at_1")
    with pytest.raises(ValueError, match="queries of domain 'a' differ"):
        by_query(pd.concat([one, outcomes({"a": np.ones((1, 2))}, seeds=(1,))]), "r_at_1")


@pytest.mark.parametrize("n_queries", [812, 81_200])
def test_as_many_numbers_are_drawn_as_a_metric_has_values_however_many_queries_there_are(monkeypatch, n_queries):
    n_drawn = []

    class Counting(np.random.Generator):
        def multinomial(self, n, pvals, size):
            drawn = super().multinomial(n, pvals, size)
            n_drawn.append(drawn.size)
            return drawn

    generator = np.random.default_rng(0)
    sides = [outcomes({"a": generator.integers(0, 6, (1, n_queries)) / 5}) for _ in range(2)]
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Counting(np.random.PCG64(seed)))
    paired_difference(*sides, "r_at_1", n_resamples=100)
    assert sum(n_drawn) == 100 * 11  # differences of fifths: -5/5 to 5/5


# --- shares of a lead ------------------------------------------------------------------------------------------------


def test_a_share_of_a_lead_counts_the_domains_where_there_is_one():
    base, lead = np.zeros((3, 200)), np.tile(np.repeat([1.0, 0.0], 100), (3, 1))
    half = np.tile(np.repeat([1.0, 0.0], [50, 150]), (3, 1))
    rows = {"a": half, "b": np.zeros((3, 200))}, {"a": base, "b": lead}, {"a": lead, "b": half}
    found = closed_share(*map(outcomes, rows), "r_at_1").iloc[0]
    assert found["mean"] == pytest.approx(50)  # of a alone: in b nobody leads the baseline
    assert 35 < found["low"] < 50 < found["high"] < 65
    assert found["n_seeds"] == 3
    same = closed_share(outcomes(rows[2]), outcomes(rows[1]), outcomes(rows[2]), "r_at_1").iloc[0]
    assert same[["mean", "low", "high"]].tolist() == pytest.approx([100, 100, 100], abs=0.1)
    assert len(closed_share(outcomes(rows[0]), outcomes(rows[1]), outcomes(rows[1]), "r_at_1")) == 0
    with pytest.raises(ValueError, match="no seed in common"):
        closed_share(outcomes(rows[0]), outcomes(rows[1]), outcomes(rows[2], (3, 4, 5)), "r_at_1")


def test_a_lead_that_is_not_sure_gives_a_share_without_an_end():
    generator = np.random.default_rng(0)
    rows = [{"a": (generator.random((3, 60)) < p).astype(float)} for p in (0.5, 0.5, 0.53)]
    found = closed_share(*map(outcomes, rows), "r_at_1").iloc[0]
    assert np.isnan(found[["low", "high"]].astype(float)).any()


def test_intervals_of_shares_cover_the_truth():
    true = 63.7  # of four million queries
    generator, covered = np.random.default_rng(1), 0
    for _ in range(30):
        ease = generator.normal(size=(1, 400))
        rows = []
        for level in (0.6, 0.0, 1.0):  # of logits; seeds differ by 0.1 of them
            seeds = generator.normal(scale=0.1, size=(3, 1))
            noise = generator.logistic(scale=0.5, size=(3, 400))
            rows.append({"a": (level + ease + seeds + noise > 0).astype(float)})
        found = closed_share(*map(outcomes, rows), "r_at_1").iloc[0]
        covered += bool(found["low"] <= true <= found["high"])
    assert 26 <= covered <= 30
