"""All runs of a folder of results as one table: a row for each folder, also for one that cannot be read.

Nothing but small files is opened, and a run is read again only when one of them has changed or a process has begun or
ended to train it, so that the table of many runs can be asked for every second while some of them train.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from udonlib.errors import UserError, nearest
from udonlib.home import runs_folder
from udonlib.params import WITHOUT_EFFECT
from udonlib.runfolder import is_locked
from udonlib.runrows import RunRow, read_row

# What a row is made of, besides whether a process holds `lock`; `tensorboard/` says nothing that these do not.
WATCHED = (
    *("params.yaml", "provenance.json", "metrics.jsonl", "summary.json", "evaluation.csv", "outcomes.csv.gz"),
    *("control.json", "steering.jsonl", "ended.json"),
)
HERE = {*WITHOUT_EFFECT, "recipe", "data", "images", "domains"}  # not among `changes`: columns, or without effect
Signature = tuple[object, ...]


class RunReader:
    """The runs of a folder of results, read again only where files have changed.

    Args:
        outputs: folder of results; "auto": the project's outputs/.
        pattern: of the names to read, such as "udon*"; or "all".
    """

    def __init__(self, outputs: str = "auto", pattern: str = "all") -> None:
        self.home = runs_folder(outputs)
        self.pattern = "*" if pattern == "all" else pattern
        self._known: dict[str, tuple[Signature, RunRow]] = {}
        self._rows: list[RunRow] = []

    def read(self) -> list[RunRow]:
        """One row for each folder, the best test R@1 first; runs without one follow, the last that began first.

        While nothing changes it is the same list again.
        """
        known, self._known = self._known, {}
        for folder in self._folders():
            signature = _signature(folder)
            before, row = known.get(folder.name, ((), None))
            if row is None or signature != before:
                row = read_row(folder)
            self._known[folder.name] = (signature, row)
        same = known.keys() == self._known.keys() and all(known[n][1] is self._known[n][1] for n in known)
        if not same:
            rows = with_changes([row for _, row in self._known.values()])
            self._rows = sorted(rows, key=lambda row: (-_or(row.r_at_1, -1.0), -_or(row.began, 0.0), row.run))
        return self._rows

    def signature(self, run: str) -> Signature:
        """What changes whenever a file of the run does, or whether it is being trained."""
        return self._known[run][0] if run in self._known else ()

    def _folders(self) -> list[Path]:
        try:
            found = sorted(path for path in self.home.iterdir() if path.is_dir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.home}: cannot be read: {error.strerror}") from None
        fitting = [path for path in found if fnmatch.fnmatchcase(path.name, self.pattern)]
        if found and not fitting:
            near = nearest(self.pattern, [path.name for path in found])
            raise UserError(f"parameter 'runs': no run in {self.home} is called {self.pattern!r}; {near}")
        return fitting


def with_changes(rows: Sequence[RunRow]) -> list[RunRow]:
    """Fill in `changes`: each parameter whose value is not what most of these rows of the same recipe have.

    Where two values are as frequent, the one that is more frequent among all rows counts as the usual one.
    """
    of_recipe: dict[tuple[str, str], Counter[str]] = {}
    of_all: dict[str, Counter[str]] = {}
    for row in rows:
        for name in row.values.keys() - HERE:
            value = repr(row.values[name])
            of_recipe.setdefault((row.recipe, name), Counter())[value] += 1
            of_all.setdefault(name, Counter())[value] += 1
    usual = {key: max(found, key=lambda v: (found[v], of_all[key[1]][v], v)) for key, found in of_recipe.items()}
    unusual = (
        {n: v for n, v in row.values.items() if n not in HERE and repr(v) != usual[row.recipe, n]} for row in rows
    )
    return [replace(row, changes=changes) for row, changes in zip(rows, unusual, strict=True)]


def table(rows: Sequence[RunRow]) -> pd.DataFrame:
    """The rows as a table, a column for each field of RunRow."""
    return pd.DataFrame([asdict(row) for row in rows], columns=list(RunRow.__dataclass_fields__))


def find_row(rows: Sequence[RunRow], name: str, parameter: str) -> RunRow:
    """The row of a run. Raises: UserError naming the parameter, with the nearest name."""
    found = next((row for row in rows if row.run == name), None)
    if found is None:
        raise UserError(f"parameter '{parameter}': no run {name!r}; {nearest(name, [row.run for row in rows])}")
    return found


def choose_two(rows: Sequence[RunRow], a: str | None = None, b: str | None = None) -> tuple[str, str] | None:
    """Two runs that are worth comparing, (A, B): B is the best that was trained, A the best of another recipe.

    Both have the same data, that of most trained runs, and the same seed if possible. Where nothing fits, the two that
    come first; None: fewer than two that can be read.

    Args:
        rows: best first.
        a: A where it is chosen already.
        b: B where it is chosen already.
    """
    readable = [row for row in rows if row.values]
    if len(readable) < 2:
        return None
    if a is not None and b is not None:
        return a, b
    trained = [row for row in readable if row.step and not math.isnan(row.r_at_1)]
    fixed = next((row for row in rows if row.run in (a, b)), None)
    if fixed is None:
        data = Counter(row.fingerprint for row in trained)
        most = next((row.fingerprint for row in trained if data[row.fingerprint] == max(data.values())), "")
        fixed = next((row for row in trained if row.fingerprint == most), readable[0])
    others = [row for row in trained if row.run != fixed.run and row.fingerprint == fixed.fingerprint]
    others = others or [row for row in readable if row.run != fixed.run]
    if a is not None and trained and trained[0].run != a and trained[0] in others:
        return a, trained[0].run
    others.sort(key=lambda row: (row.recipe == fixed.recipe, row.seed != fixed.seed))  # stable: the better one first
    return (a, others[0].run) if a is not None else (others[0].run, fixed.run)


def _signature(folder: Path) -> Signature:
    found: list[object] = [is_locked(folder)]
    for name in WATCHED:
        try:
            stat = (folder / name).stat()
        except OSError:
            continue
        found.append((name, stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return tuple(found)


def _or(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else value
