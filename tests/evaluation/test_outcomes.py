"""One row a query: paired whatever the order, grouped by who is right."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.gaps import outcomes
from udonlib.errors import UserError
from udonlib.evaluation.outcomes import GROUPS, paired, right_and_wrong


def test_outcomes_are_paired_by_query_whatever_their_order():
    table = outcomes(
        {"student": {"emoji": [1, 0, 1], "flags": [0, 1]}, "teacher": {"emoji": [0, 0, 1], "flags": [1, 1]}}
    )
    shuffled = table.sample(frac=1, random_state=1)
    found = paired(shuffled).sort_values(["domain", "path"])
    assert found["student"].tolist() == [1, 0, 1, 0, 1]
    assert found["teacher"].tolist() == [0, 0, 1, 1, 1]
    assert paired(table, index="separate")["teacher"].sum() == 0
    assert paired(table, "mmp_at_5")["student"].max() == 0.5


@pytest.mark.parametrize("specialist", [[1, 0], [1, 0, 1, 1]])
def test_embedders_that_were_asked_other_queries_are_refused(specialist):
    table = outcomes({"student": {"emoji": [1, 0, 1]}, "specialist": {"emoji": specialist}})
    with pytest.raises(UserError, match="domain 'emoji': specialist and student were tested on different queries"):
        paired(table)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30), st.integers(1, 5))
def test_right_and_wrong_counts_every_query_once(queries, n_more):
    student, teacher = ([int(pair[i]) for pair in queries] for i in (0, 1))
    right = {"student": {"flags": [1] * n_more, "emoji": student}, "teacher": {"flags": [0] * n_more, "emoji": teacher}}
    found = right_and_wrong(outcomes(right)).set_index("domain")
    names = {(1, 1): "both", (0, 1): "teacher only", (1, 0): "student only", (0, 0): "neither"}
    naive = Counter(names[pair] for pair in zip(student, teacher, strict=True))
    assert list(found.index) == ["flags", "emoji", "all"]
    assert {group: found.loc["emoji", group] for group in GROUPS} == {g: naive[g] for g in GROUPS}
    assert found.loc["flags", "student only"] == found.loc["flags", "n_queries"] == n_more
    assert found.loc["all", "n_queries"] == len(queries) + n_more
