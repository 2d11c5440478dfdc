"""Two runs compared: parameters, allocation, outcomes of the queries that both were tested on.

Differences are B - A, paired by query. A comparison is only as good as what both have in common, so that
`Pair.notes` says what is missing: unfinished runs, other data, other queries, another index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pandas as pd

from udonlib import files
from udonlib.data.catalog import Catalog
from udonlib.errors import UserError
from udonlib.evaluation.evaluate import Neighbours
from udonlib.evaluation.frequency import MAX_LOOKED_AT, frequencies, of_groups
from udonlib.evaluation.intervals import paired_difference, row_interval
from udonlib.lab.compare.ablations import embedder_of
from udonlib.lab.compare.many.curves import run_curves
from udonlib.params import WITHOUT_EFFECT, TrainParams
from udonlib.runs.folder import RunFolder
from udonlib.runs.run import Run, load_run

SIDES = ("a", "b")
WHO_IS_RIGHT = ("both", "only A", "only B", "neither")  # by its first neighbour
ABSENT = "(not in this version)"
_known: dict[str, pd.DataFrame] = {}  # frequencies of the last data, by its fingerprint: they take seconds


@dataclass(frozen=True, eq=False)
class Pair:
    """Two runs, and what both made of the queries that they share.

    outcomes: side ("a", "b"), domain, path, r_at_1, mmp_at_k in 0..1: the same queries in the same order for both
    sides, in the merged index; empty where nothing can be compared. notes: what limits the comparison, in sentences.
    """

    a: RunFolder
    b: RunFolder
    outcomes: pd.DataFrame
    notes: tuple[str, ...]

    @property
    def domains(self) -> list[str]:
        """Domains with queries that both were tested on."""
        return list(dict.fromkeys(self.outcomes["domain"]))

    @property
    def metrics(self) -> list[str]:
        """The columns of outcomes that measure: r_at_1, and mmp_at_k if both have the same k."""
        return [name for name in self.outcomes if "_at_" in name]

    @property
    def runs(self) -> dict[str, RunFolder]:
        """The runs by the letter they are shown with."""
        return {"A": self.a, "B": self.b}


def open_pair(a: RunFolder, b: RunFolder, domains: Literal["all"] | Sequence[str] = "all") -> Pair:
    """Read what two runs have in common. What cannot be compared is in `notes`; nothing is raised for it."""
    notes, outcomes = [], {}
    for letter, run in zip("AB", (a, b), strict=True):
        try:
            outcomes[letter] = _outcomes(run)
        except (UserError, OSError, ValueError, KeyError) as error:
            reason = str(error) if isinstance(error, UserError) else f"damaged: {error}"
            if not (run.path / "outcomes.csv.gz").exists():
                reason = run.state().text
            notes.append(f"{letter}, {run.path.name}, has no test outcomes to compare: {reason}.")
    empty = pd.DataFrame(columns=["side", "domain", "path", "r_at_1"])
    if len(outcomes) < 2:
        return Pair(a, b, empty, tuple(notes))
    notes += _data_notes(a, b)
    for side in outcomes.values():
        side["domain"] = side["domain"].astype(object)
    if domains != "all":
        outcomes = {letter: table[table["domain"].isin(list(domains))] for letter, table in outcomes.items()}
    shared = outcomes["A"].merge(outcomes["B"][["domain", "path"]], on=["domain", "path"])[["domain", "path"]]
    notes += _query_notes(outcomes["A"], outcomes["B"], shared)
    columns = [name for name in outcomes["A"] if "_at_" in name and name in outcomes["B"]]
    if len(columns) < 2:
        notes.append("mMP@k was measured with another k: only R@1 is compared.")
    sides = [shared.merge(table, on=["domain", "path"])[["domain", "path", *columns]] for table in outcomes.values()]
    tables = [table.assign(side=side) for side, table in zip(SIDES, sides, strict=True)]
    return Pair(a, b, pd.concat(tables, ignore_index=True) if len(shared) else empty, tuple(notes))


def parameters(a: RunFolder, b: RunFolder) -> pd.DataFrame:
    """What was set, or was there, otherwise in B than in A: parameter, a, b, as texts; only what differs.

    Parameters that influence results come first; then those that do not, and the code, data and machine of the last
    start. A parameter that one run's version did not know counts as its default.
    """
    sides = [_values(run) for run in (a, b)]
    known = {name: field.get_default() for name, field in TrainParams.model_fields.items()}
    rows: list[tuple[bool, str, str, str]] = []
    for name in dict.fromkeys([*known, *sides[0], *sides[1]]):
        values = [side.get(name, known.get(name)) for side in sides]
        if _plain(values[0]) != _plain(values[1]):
            shown = [_text(value) if name in side else ABSENT for side, value in zip(sides, values, strict=True)]
            rows.append((name in WITHOUT_EFFECT, name, shown[0], shown[1]))
    rows.sort(key=lambda row: row[0])  # stable
    places = [_provenance(run) for run in (a, b)]
    for name in dict.fromkeys([*places[0], *places[1]]):
        said = [place.get(name, "–") for place in places]
        if said[0] != said[1]:
            rows.append((True, name, said[0], said[1]))
    return pd.DataFrame([row[1:] for row in rows], columns=["parameter", "a", "b"])


def between_runs(pair: Pair, metric: str = "r_at_1") -> pd.DataFrame:
    """Compare a metric by domain, with the 95% interval over queries of the difference, paired by query.

    Returns: domain ("mean": over those domains), n_queries, a, b (percent), mean, low, high (of B - A, in points).
    """
    a, b = (pair.outcomes[pair.outcomes["side"] == side].assign(seed=0) for side in SIDES)
    n_queries = a.groupby("domain", sort=False).size().to_dict() | {"mean": len(a)}
    table = paired_difference(b, a, metric)
    levels = {side: row_interval(t, metric, 1)["mean"] for side, t in zip(SIDES, (a, b), strict=True)}
    table = table.assign(**levels, n_queries=table["domain"].map(n_queries))
    return table[["domain", "n_queries", "a", "b", "mean", "low", "high"]]


def by_group(pair: Pair, data: str = "auto", images: str | None = None, metric: str = "r_at_1") -> pd.DataFrame:
    """Compare a metric by groups of queries, as `between_runs`; the column group in place of the domain.

    Groups are those of `evaluation.frequency`; means over the domains that have such queries. Empty where the data is
    very large.

    Args:
        data, images: where the runs' data is now, if it has moved.

    Raises:
        UserError: the data is not there, or is not what was searched.
    """
    catalog = max((run.catalog for run in _opened(pair, data, images)), key=lambda catalog: len(catalog.names))
    columns = ["group", "n_queries", "a", "b", "mean", "low", "high"]
    if sum(len(domain.train_labels) for domain in catalog.domains) > MAX_LOOKED_AT:
        return pd.DataFrame(columns=columns)
    if catalog.fingerprint not in _known:
        _known.clear()
        _known[catalog.fingerprint] = frequencies(catalog)
    tables = []
    for group, part in of_groups(pair.outcomes, _known[catalog.fingerprint]).items():
        means = between_runs(replace(pair, outcomes=part), metric).query("domain == 'mean'")
        tables.append(means.assign(group=group))
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def changed(pair: Pair) -> pd.DataFrame:
    """Count the queries of each domain by whose first neighbour is right: domain ("all" last), n_queries and
    WHO_IS_RIGHT.
    """
    right = {side: part.set_index(["domain", "path"])["r_at_1"] > 0 for side, part in pair.outcomes.groupby("side")}
    number = 2 * ~right["a"] + ~right["b"]  # 0 both, 1 only A, 2 only B, 3 neither
    counts = pd.crosstab(number.index.get_level_values("domain"), number.to_numpy())
    counts = counts.reindex(index=pair.domains, columns=range(len(WHO_IS_RIGHT)), fill_value=0)
    counts.columns = list(WHO_IS_RIGHT)
    counts.loc["all"] = counts.sum()
    counts = counts.rename_axis(index="domain").reset_index()
    counts.insert(1, "n_queries", counts[list(WHO_IS_RIGHT)].sum(axis=1))
    return counts


def curves(run: RunFolder) -> pd.DataFrame:
    """Losses and validation of a run as means over the domains: curve, step, value.

    Curves: ce_student (classification loss of the student), total; r_at_1, mmp_at_k (validation queries in the merged
    index, percent).
    """
    table = run_curves(run)
    return table[~table["curve"].isin(["learning_rate", "gradient_norm"])].reset_index(drop=True)


def images_seen(run: RunFolder) -> dict[str, int]:
    """Training images of each domain so far."""
    records = run.records("train") or run.records("allocation")
    return dict(records[-1]["images_seen"]) if records else {}


@lru_cache(maxsize=1)  # both galleries of a pair ask for it
def neighbours(
    pair: Pair, data: str = "auto", images: str | None = None
) -> tuple[Catalog, list[tuple[Neighbours, Neighbours]]]:
    """The neighbours of the shared queries in both runs, domain by domain, and the catalog that holds all images.

    Args:
        data, images: where the runs' data is now, if it has moved.

    Raises:
        UserError: a run keeps no such neighbours; other data than was searched.
    """
    for run in (pair.a, pair.b):
        if run.params.recipe == "features":
            raise UserError(f"run {run.path.name!r} is of recipe 'features', whose neighbours are not kept")
    opened = _opened(pair, data, images)
    sides = [{part.query_domain: part for part in run.neighbours() if part.embedder == "student"} for run in opened]
    catalogs = sorted((run.catalog for run in opened), key=lambda catalog: -len(catalog.names))
    if not set(catalogs[1].names) <= set(catalogs[0].names) or catalogs[0].root != catalogs[1].root:
        raise UserError("the images of both runs are not in one catalog, so that their neighbours cannot be shown here")
    return catalogs[0], list(_aligned(pair, sides))


def _opened(pair: Pair, data: str, images: str | None) -> list[Run]:
    """Both runs, told where their data is now if it has moved."""
    opened = [load_run(run) for run in (pair.a, pair.b)]
    for run in opened:
        if data != "auto" or images:
            run.move_data(data, images)
    return opened


def _aligned(pair: Pair, sides: list[dict[str, Neighbours]]) -> Iterator[tuple[Neighbours, Neighbours]]:
    """Both runs' neighbours of the same queries in the same order."""
    for domain, part in pair.outcomes[pair.outcomes["side"] == "a"].groupby("domain", sort=False):
        paths = tuple(part["path"])
        taken = []
        for side in sides:
            place = {path: i for i, path in enumerate(side[domain].query_paths)}
            rows = np.array([place[path] for path in paths], np.int64)
            arrays = {name: getattr(side[domain], name)[rows] for name in ("position", "similarity", "hit")}
            taken.append(replace(side[domain], query_paths=paths, **arrays))
        yield taken[0], taken[1]


def _outcomes(run: RunFolder) -> pd.DataFrame:
    """Of the test queries in the merged index: domain, path and the metrics."""
    table = run.outcomes()
    embedder = embedder_of(_values(run).get("recipe"))
    table = table[(table["embedder"] == embedder) & (table["index"] == "merged")]
    return table[["domain", "path", *(name for name in table if "_at_" in name)]].reset_index(drop=True)


def _data_notes(a: RunFolder, b: RunFolder) -> list[str]:
    prints = [_provenance(run).get("data", "–") for run in (a, b)]
    if prints[0] == prints[1]:
        return []
    matched = "queries are matched by domain and path, and nothing tells whether these are the same images."
    return [f"The data of A and B has other fingerprints ({prints[0]}; {prints[1]}): {matched}"]


def _query_notes(a: pd.DataFrame, b: pd.DataFrame, shared: pd.DataFrame) -> list[str]:
    """Which queries are left out, and whether what they search is the same."""
    sizes = [table.groupby("domain", sort=False).size() for table in (a, b, shared)]
    names = list(dict.fromkeys([*sizes[0].index, *sizes[1].index]))
    notes = []
    for letter, here, there in (("A", 0, 1), ("B", 1, 0)):
        alone = [name for name in sizes[here].index if name not in sizes[there].index]
        if alone:
            notes.append(f"Only {letter} was tested on {', '.join(alone)}: left out.")
    both = [name for name in names if name in sizes[0].index and name in sizes[1].index]
    part = [
        f"{name} ({sizes[2].get(name, 0):,} of {sizes[0][name]:,} and {sizes[1][name]:,})"
        for name in both
        if not sizes[2].get(name, 0) == sizes[0][name] == sizes[1][name]
    ]
    if part:
        notes.append(f"The queries agree in part only, and only those are compared: {', '.join(part)}.")
    if len(both) < len(names):
        notes.append(
            "The merged index of one run holds other domains than the other's, which makes hits easier or harder."
        )
    return notes if len(shared) else [*notes, "No query is shared: outcomes cannot be compared."]


def _values(run: RunFolder) -> dict[str, Any]:
    """The parameters as they were saved, also by another version."""
    try:
        return files.read_yaml(run.path / "params.yaml")
    except UserError:
        return {}


def _provenance(run: RunFolder) -> dict[str, str]:
    """Code, data and machine of the last start, as short texts."""
    try:
        last = run.provenance()[-1]
        packages = {f"version of {name}": str(version) for name, version in last.get("packages", {}).items()}
        dirty = " with uncommitted changes" if last.get("uncommitted_changes") else ""
        return {
            "code": str(last.get("commit") or "unknown")[:10] + dirty,
            "data": f"{last.get('data')}, fingerprint {str(last.get('data_fingerprint'))[:10]}",
            "machine": f"{last.get('device')}, {last.get('threads')} threads",
            **packages,
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    texts = isinstance(value, list | tuple) and value and all(isinstance(part, str) for part in value)
    return "–" if value is None else ", ".join(value) if texts else str(_plain(value))
