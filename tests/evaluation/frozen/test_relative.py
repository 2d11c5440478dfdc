"""Gains over the best teachers against counting by hand, and what cannot be compared."""

import numpy as np
import pandas as pd
import pytest

from udonlib.errors import UserError
from udonlib.evaluation.frozen.relative import AGAINST, relative_to_best
from udonlib.evaluation.intervals import bootstrap_interval

HEADLINE = {"retrieval": "r_at_1", "classification": "logistic", "dense": "mean_iou"}


def outcomes(scores: dict[str, dict[tuple[str, str], list[float]]]) -> pd.DataFrame:
    rows = []
    for encoder, tasks in scores.items():
        for (group, domain), values in tasks.items():
            for metric, factor in ((HEADLINE[group], 1.0), ("beside", 0.0)):
                names = {"encoder": encoder, "group": group, "domain": domain, "metric": metric}
                rows += [names | {"path": f"{domain}{i}", "score": factor * v} for i, v in enumerate(values)]
    return pd.DataFrame(rows)


R, S, C = ("retrieval", "x"), ("retrieval", "y"), ("classification", "x")
SCORES = {
    "student": {R: [1, 1, 1, 0], S: [1, 0], C: [1, 1, 0]},
    "a": {R: [1, 0, 0, 1], S: [1, 1], C: [1, 0, 0]},
    "b": {R: [1, 0, 0, 0], S: [1, 0], C: [1, 1, 1]},
}


def test_the_best_teacher_of_each_task_is_compared_with():
    table = relative_to_best(outcomes(SCORES), ["student"], ["a", "b"])
    best = table[table["against"] == AGAINST[0]].set_index(["group", "domain"])
    assert list(best.index) == [R, S, C, ("retrieval", "mean"), ("classification", "mean"), ("all", "mean")]
    assert best["teacher"].tolist() == ["a", "a", "b", "a", "b", ""]
    np.testing.assert_allclose(best["teacher_score"], [50, 100, 100, 75, 100, 250 / 3])
    np.testing.assert_allclose(best["points"], [25, -50, -100 / 3, -12.5, -100 / 3, (25 - 50 - 100 / 3) / 3])
    np.testing.assert_allclose(best["percent"], [50, -50, -100 / 3, 0, -100 / 3, (50 - 50 - 100 / 3) / 3], atol=1e-9)
    assert best["n_queries"].tolist() == [4, 2, 3, 6, 3, 9]
    assert (best["points_low"] <= best["points"]).all()
    assert (best["points"] <= best["points_high"]).all()


def test_the_best_single_teacher_is_the_one_of_the_highest_mean_over_tasks():
    table = relative_to_best(outcomes(SCORES), ["student"], ["a", "b"])
    single = table[table["against"] == AGAINST[1]].set_index(["group", "domain"])
    assert set(single["teacher"]) == {"a"}  # (50 + 100 + 33) / 3 against (25 + 50 + 100) / 3
    np.testing.assert_allclose(single["points"][C], 100 / 3)
    np.testing.assert_allclose(single["percent"][C], 100)


def test_intervals_are_of_differences_paired_by_query():
    """A student that is right wherever its teacher is, and once more: where both are right no doubt is left."""
    teacher = np.random.default_rng(0).integers(0, 2, 400).astype(float)
    better = teacher.copy()
    better[np.flatnonzero(teacher == 0)[:20]] = 1
    table = relative_to_best(outcomes({"s": {R: better}, "t": {R: teacher}}), ["s"], ["t"]).iloc[0]
    expected = bootstrap_interval({"x": (better - teacher)[None]}, np.random.default_rng(0)).iloc[0] * 100
    assert (table["points"], table["points_low"], table["points_high"]) == pytest.approx(
        (expected["mean"], expected["low"], expected["high"])
    )
    assert table["points_high"] - table["points_low"] < 5  # unpaired it would be 14
    assert table["points_low"] > 0


def test_a_student_that_is_its_teacher_is_no_better_without_a_doubt():
    table = relative_to_best(outcomes({"s": SCORES["a"], "a": SCORES["a"]}), ["s"], ["a"])
    columns = [f"{name}{end}" for name in ("points", "percent") for end in ("", "_low", "_high")]
    np.testing.assert_allclose(table[columns], 0, atol=1e-9)


def test_intervals_in_percent_are_those_of_the_ratio():
    """Against a bootstrap of the ratio itself, both means drawn anew."""
    generator = np.random.default_rng(1)
    teacher = (generator.random(600) < 0.5).astype(float)
    student = np.where(generator.random(600) < 0.8, teacher, generator.random(600) < 0.7).astype(float)
    row = relative_to_best(outcomes({"s": {R: student}, "t": {R: teacher}}), ["s"], ["t"]).iloc[0]
    drawn = generator.integers(0, 600, (4000, 600))
    low, high = np.quantile(100 * (student[drawn].mean(1) / teacher[drawn].mean(1) - 1), [0.025, 0.975])
    assert row["percent"] == pytest.approx(100 * (student.mean() / teacher.mean() - 1))
    assert (row["percent_low"], row["percent_high"]) == pytest.approx((low, high), abs=0.12 * (high - low))


def test_several_students_are_seeds_of_one():
    scores = {"s0": {R: [1, 1, 0, 0]}, "s1": {R: [1, 1, 1, 0]}, "t": {R: [1, 0, 0, 0]}}
    row = relative_to_best(outcomes(scores), ["s0", "s1"], ["t"]).iloc[0]
    alone = relative_to_best(outcomes(scores), ["s0"], ["t"]).iloc[0]
    assert (row["points"], row["student_score"], row["n_students"]) == (37.5, 62.5, 2)
    assert row["percent"] == pytest.approx(150)
    assert row["points_high"] - row["points_low"] > alone["points_high"] - alone["points_low"]


def test_tasks_that_the_student_or_all_teachers_lack_are_left_out():
    d, e = ("dense", "x"), ("dense", "y")
    scores = {
        "s": {R: [1, 0], d: [0.5, 0.6], e: [0.1]},
        "a": {R: [1, 1], C: [1]},
        "b": {R: [0, 0], C: [1], d: [0.4, 0.4]},
    }
    table = relative_to_best(outcomes(scores), ["s"], ["a", "b"])
    best, single = (table[table["against"] == name] for name in AGAINST)
    assert best["teacher"].tolist() == ["a", "b", "a", "b", ""]
    assert list(zip(single["group"], single["domain"], strict=True)) == [R, ("retrieval", "mean"), ("all", "mean")]
    assert set(single["teacher"]) == {"a"}  # where both were tested, which is retrieval alone


def test_a_teacher_that_scores_nothing_leaves_the_percentage_open():
    table = relative_to_best(outcomes({"s": {R: [1, 0], S: [1, 1]}, "t": {R: [0, 0], S: [1, 0]}}), ["s"], ["t"])
    best = table[table["against"] == AGAINST[0]].set_index(["group", "domain"])
    assert best["points"][R] == 50
    assert np.isnan(best["percent"][R])
    assert np.isnan(best["percent"]["all", "mean"])
    assert best["percent"][S] == 100


def test_what_cannot_be_compared_is_refused():
    table = outcomes(SCORES)
    with pytest.raises(UserError, match="teachers: found c; evaluated are student, a, b"):
        relative_to_best(table, ["student"], ["a", "c"])
    with pytest.raises(UserError, match="students: found none"):
        relative_to_best(table, [], ["a"])
    with pytest.raises(UserError, match="students and teachers have no task in common: s, t"):
        relative_to_best(outcomes({"s": {R: [1]}, "t": {S: [1]}}), ["s"], ["t"])
    other = outcomes({"s": {R: [1, 0]}, "t": {R: [1, 0, 1]}})
    with pytest.raises(UserError, match="retrieval of 'x': 't' and 's' were tested on different images"):
        relative_to_best(other, ["s"], ["t"])
