"""Outcomes, one row a query: those of several embedders side by side, and who of them finds a right first neighbour."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Bool

from udonlib.errors import UserError

EMBEDDERS = ("student", "teacher", "specialist")

GROUPS = ("both", "teacher only", "student only", "neither")  # whose first neighbour is right

KEYS = ("domain", "path", "n_positives", "n_train")  # columns that say which query, not what was found


def paired(outcomes: pd.DataFrame, metric: str = "r_at_1", index: str = "merged") -> pd.DataFrame:
    """Put the outcomes of a query side by side.

    Returns: one row per query of the student: domain, path, n_positives (n_train, if known), and a column for each
        embedder of `outcomes` with its metric in 0..1; NaN in domains that it did not search.

    Raises:
        UserError: an embedder that searched for other queries of a domain than the student.
    """
    rows = outcomes[outcomes["index"] == index]
    by_embedder = dict(iter(rows.groupby("embedder", sort=False)))
    table = rows.loc[rows["embedder"] == "student", [name for name in KEYS if name in rows]].reset_index(drop=True)
    queries = pd.MultiIndex.from_frame(table[["domain", "path"]])
    for name in sorted(by_embedder, key=[*EMBEDDERS, *by_embedder].index):
        part = by_embedder[name]
        values = part.set_index(["domain", "path"])[metric]
        searched = table["domain"].isin(part["domain"].unique()).to_numpy()
        table[name] = values.reindex(queries).to_numpy()
        strange = searched & table[name].isna().to_numpy()
        if strange.any() or len(values) != searched.sum():
            domain = table["domain"][strange].iloc[0] if strange.any() else part["domain"].iloc[0]
            raise UserError(
                f"domain '{domain}': {name} and student were tested on different queries ({len(values):,} and "
                f"{searched.sum():,} in all); a comparison needs runs on the same data"
            )
    return table


def right_and_wrong(outcomes: pd.DataFrame, index: str = "merged") -> pd.DataFrame:
    """Count the queries of each domain by who finds a right first neighbour; the last row, "all", sums up.

    Returns: domain, n_queries, and the groups "both", "teacher only", "student only", "neither".
    """
    table = paired(outcomes, "r_at_1", index)
    group = pd.Categorical(whose_is_right(table["student"].to_numpy() > 0, table["teacher"].to_numpy() > 0), GROUPS)
    domains = pd.Categorical(table["domain"], table["domain"].unique())
    counts = pd.crosstab(domains, group, dropna=False)
    counts.loc["all"] = counts.sum()
    counts = counts.rename_axis(index="domain", columns=None).reset_index()
    counts.insert(1, "n_queries", counts[list(GROUPS)].sum(axis=1))
    return counts.astype({"domain": object})


def whose_is_right(student: Bool[np.ndarray, "query"], teacher: Bool[np.ndarray, "query"]) -> np.ndarray:
    """The group of each query, a name of GROUPS, from whether the first neighbour of either embedder is right."""
    return np.array(GROUPS, dtype=object)[2 * ~teacher + ~student]
