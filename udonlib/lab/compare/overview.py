"""One run as a row of the table of all runs: what its small files say, and what of them cannot be read."""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from udonlib import files
from udonlib.errors import ParameterError, UserError, nearest
from udonlib.files import runs_folder, whole_lines
from udonlib.lab.compare.ablations import embedder_of
from udonlib.lab.compare.many import notes, titles
from udonlib.params import TrainParams
from udonlib.runs.folder import METRICS, RunFolder, is_locked, read_record

# What making sense of a damaged file raises, besides errors of reading it.
DAMAGED = (ArithmeticError, AttributeError, LookupError, RecursionError, StopIteration, TypeError, ValueError)

TAIL = 1 << 23  # bytes of metrics.jsonl that are read: a hundred thousand steps of a run that logs often

UNREADABLE = "unreadable"

UNKNOWN = math.nan


@dataclass(frozen=True)
class RunRow:
    """What the files of one run say; NaN, None or "" where they do not.

    run: the folder's name. state, text: of `RunFolder.state`, a word and a sentence. problem: what cannot be read, ""
    where all can. step of steps: done, and asked for. r_at_1, mmp: of the test queries in the merged index, mean over
    the domains, in percent, with 95% intervals over queries; mmp is mMP@k. validation: the best R@1 on the validation
    queries so far. interventions: how often a person did something that the result depends on. train_seconds,
    images_per_s, n_parameters_trained: cost.
    seconds_left: at the pace since the last start, validations included; None: too early, or not training. began,
    ended: seconds since 1970, of the first start and of the last record or the summary. data: name, with the domains
    where they are not all. fingerprint: of the data. values: every parameter as it was saved. changes: those of them
    that are not what most runs of the same recipe have. title: what tells it from the other runs, in words. note: of a
    person, with tags, and whether it is archived.
    """

    run: str
    state: str = UNREADABLE
    text: str = ""
    problem: str = ""
    recipe: str = ""
    seed: int | None = None
    data: str = ""
    fingerprint: str = ""
    step: int | None = None
    steps: int | None = None
    r_at_1: float = UNKNOWN
    r_at_1_low: float = UNKNOWN
    r_at_1_high: float = UNKNOWN
    mmp: float = UNKNOWN
    mmp_low: float = UNKNOWN
    mmp_high: float = UNKNOWN
    k: int = 5
    validation: float = UNKNOWN
    interventions: int = 0
    train_seconds: float = UNKNOWN
    images_per_s: float = UNKNOWN
    n_parameters_trained: float = UNKNOWN
    seconds_left: float | None = None
    began: float = UNKNOWN
    ended: float = UNKNOWN
    values: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    note: notes.Note = field(default_factory=notes.Note)

    @property
    def length(self) -> int:
        """Steps that it was trained for, or is to be; 0: none, or unknown."""
        return self.steps or self.step or 0

    @property
    def going(self) -> bool:
        """Whether somebody trains it at this moment."""
        return self.state in ("training", "paused")

    @property
    def open(self) -> bool:
        """Whether steps are missing: it trains, or may be gone on with."""
        return self.state not in ("finished", "new", UNREADABLE)


def read_row(folder: Path) -> RunRow:
    """Read one run; `problem` says what cannot be read, and the rest is there all the same."""
    run, problems = RunFolder(folder), _Problems(folder)
    if not (folder / "params.yaml").exists():
        return RunRow(folder.name, problem="no params.yaml: not a run, or one that never began")
    values = problems.read("params.yaml", files.read_yaml, {})
    if values:
        problems.read("params.yaml", lambda path: vars(run).update(params=TrainParams(**values)), None)
    starts = problems.read("provenance.json", lambda path: run.provenance(), [])
    tail = problems.read(METRICS, _tail, [])
    steered = problems.read("steering.jsonl", lambda path: sum(each.matters for each in run.interventions()), 0)
    note = problems.read(notes.NOTES, lambda path: notes.read(folder), notes.Note())
    row = RunRow(folder.name, values=values, interventions=steered, note=note)
    row = problems.read(METRICS, lambda path: _from_start(row, starts, tail), row)
    if (folder / "summary.json").exists():
        row = replace(row, state="finished", ended=(folder / "summary.json").stat().st_mtime)
        summary = problems.read("summary.json", lambda path: _mapping(run.summary()), {})
        row = problems.read("summary.json", lambda path: _with_costs(row, summary), row)
        embedder = embedder_of(row.recipe)
        row = problems.read("evaluation.csv", lambda path: _with_test(row, run.evaluation(), embedder), row)
    if values:
        row = problems.read("the state", lambda path: _with_state(row, run), row)
    return replace(row, problem="; ".join(dict.fromkeys(problems.lines)))


def _from_start(row: RunRow, starts: list[dict[str, Any]], tail: list[dict[str, Any]]) -> RunRow:
    """What is known from the first step on: settings, data, how far it is, when it began, its pace."""
    domains = row.values.get("domains", "all")
    only = "" if domains == "all" else ": " + ", ".join(map(str, domains if isinstance(domains, list) else [domains]))
    first, last = (starts[0], starts[-1]) if starts else ({}, {})
    step = max((int(record["step"]) for record in tail), default=0)
    times = [_seconds(start.get("time", "")) for start in (first, last)]
    scores = [float(record["r_at_1"]) for record in tail if record["kind"] == "validation" and "r_at_1" in record]
    paces = sorted(float(record["images_per_s"]) for record in tail if record["kind"] == "train")
    return replace(
        row,
        recipe=str(row.values.get("recipe", "")),
        seed=row.values.get("seed") if isinstance(row.values.get("seed"), int) else None,
        data=str(first.get("data") or Path(str(row.values.get("data", ""))).stem) + only,
        fingerprint=str(first.get("data_fingerprint", "")),
        step=step,
        steps=row.values.get("steps") if isinstance(row.values.get("steps"), int) else None,
        validation=max(scores, default=UNKNOWN),
        images_per_s=paces[len(paces) // 2] if paces else UNKNOWN,
        began=times[0],
        seconds_left=None,
    )


def _with_state(row: RunRow, run: RunFolder) -> RunRow:
    """The row with the run's state at this moment, and what time is left."""
    known = run.state()
    row = replace(row, state=known.name, text=known.text)
    if not row.open:
        return row
    records = run.path / METRICS
    ended = records.stat().st_mtime if records.exists() else row.began
    return replace(row, ended=ended, seconds_left=_seconds_left(row, run, ended))


def _seconds_left(row: RunRow, run: RunFolder, until: float) -> float | None:
    """Missing steps at the pace between the last start and the last record; validations are in it, pauses are not."""
    try:
        last = run.provenance()[-1]
        began = _seconds(last["time"])
        done, seconds = (row.step or 0) - int(last.get("from_step", 0)), until - began
        seconds -= _paused_seconds(_tail(run.path / METRICS), began)
    except (IndexError, KeyError, TypeError, ValueError, OSError):
        return None
    if row.state != "training" or row.steps is None or done <= 0 or not seconds > 0:
        return None
    return max(0, row.steps - (row.step or 0)) * seconds / done


def _paused_seconds(records: list[dict[str, Any]], since: float) -> float:
    """How long a person held the run up: from each record of a pause to the next one of steering."""
    steering = [r for r in records if r["kind"] == "steering" and r.get("time", 0) >= since]
    return float(sum(b["time"] - a["time"] for a, b in itertools.pairwise(steering) if a["paused"]))


def _with_costs(row: RunRow, summary: dict[str, Any]) -> RunRow:
    numbers: dict[str, Any] = {
        name: float(summary.get(name, UNKNOWN)) for name in ("train_seconds", "n_parameters_trained")
    }
    step = int(summary["steps"]) if "steps" in summary else row.step
    return replace(
        row,
        **numbers,
        step=step,
        images_per_s=float(summary.get("images_per_s", row.images_per_s)) or UNKNOWN,
        validation=float(summary.get("best_validation_r_at_1", row.validation)),
    )


def _with_test(row: RunRow, evaluation: pd.DataFrame, embedder: str) -> RunRow:
    rows = evaluation[evaluation["embedder"] == embedder]
    rows = rows[(rows["index"] == "merged") & (rows["domain"] == "mean")]
    if rows.empty:
        raise ValueError(f"no mean of {embedder} in the merged index")
    mean = rows.iloc[0]
    mmp = next(name for name in evaluation if name.startswith("mmp_at_") and name[7:].isdigit())
    columns = {"r_at_1": "r_at_1", "mmp": mmp}
    ends = ("", "_low", "_high")
    numbers: dict[str, Any] = {
        name + end: float(mean.get(of + end, UNKNOWN)) for name, of in columns.items() for end in ends
    }
    return replace(row, **numbers, k=int(mmp[7:]))


class _Problems:
    """Reads the files of a run, and keeps what is wrong with them, a line for each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines = folder, list[str]()

    def read(self, name: str, how: Callable[[Path], Any], otherwise: Any) -> Any:
        """What `how` makes of a file, or `otherwise` where it cannot."""
        try:
            made = how(self.folder / name)
            if isinstance(made, RunRow):  # no figure of a run is infinite, and nothing that draws expects one
                infinite = [key for key, value in vars(made).items() if isinstance(value, float) and math.isinf(value)]
                if infinite:
                    raise ValueError(f"{', '.join(infinite)}: found an infinite number")
            return made
        except ParameterError as error:
            text, *more = [line.partition("; valid: ")[0] for line in str(error).splitlines()]
            self.lines.append(f"{name}: of another version: {text}" + (f" (and {len(more)} more)" if more else ""))
        except FileNotFoundError:
            self.lines.append(f"{name}: missing")
        except OSError as error:
            self.lines.append(f"{name}: cannot be read: {error.strerror}")
        except DAMAGED as e:
            text = (str(e).splitlines() or [type(e).__name__])[0]
            text = text.removeprefix(str(self.folder / name)).lstrip(":, ").removeprefix("damaged: ")
            self.lines.append(f"{name}: missing" if text == "missing" else f"{name}: damaged: {text}")
        return otherwise


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected names and values, found {type(value).__name__}")
    return value


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last records of metrics.jsonl."""
    return [read_record(line) for line in whole_lines(path, -TAIL)]


def _seconds(time: Any) -> float:
    try:
        return datetime.strptime(str(time), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return UNKNOWN


# What a row is made of, besides whether a process holds `lock`; `tensorboard/` says nothing that these do not.
WATCHED = (
    *("params.yaml", "provenance.json", METRICS, "summary.json", "evaluation.csv", "outcomes.csv.gz"),
    *("control.json", "steering.jsonl", "ended.json", notes.NOTES),
)

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
            folders = sorted(path for path in self.home.iterdir() if path.is_dir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.home}: cannot be read: {error.strerror}") from None
        fitting = [path for path in folders if fnmatch.fnmatchcase(path.name, self.pattern)]
        if folders and not fitting:
            near = nearest(self.pattern, [path.name for path in folders])
            raise UserError(f"parameter 'runs': no run in {self.home} is called {self.pattern!r}; {near}")
        return fitting


def with_changes(rows: Sequence[RunRow]) -> list[RunRow]:
    """Fill in `changes`, as of `titles.unusual`, and `title`; data is in a title where most rows have another."""
    changes = titles.unusual([(row.recipe, row.values) for row in rows])
    data = Counter(row.data for row in rows)
    usual = max(data, key=lambda name: data[name], default="")
    return [
        replace(row, changes=new, title=titles.title(row.recipe, new, row.seed, row.data * (row.data != usual)))
        for row, new in zip(rows, changes, strict=True)
    ]


def table(rows: Sequence[RunRow]) -> pd.DataFrame:
    """The rows as a table, a column for each field of RunRow."""
    return pd.DataFrame([asdict(row) for row in rows], columns=list(RunRow.__dataclass_fields__))


def choose_two(rows: Sequence[RunRow], a: str | None = None, b: str | None = None) -> tuple[str, str] | None:
    """Two runs that are worth comparing, (A, B): B is the best that was trained, A the best of another recipe.

    Both have the same data, that of most trained runs, and the same seed if possible; neither is archived, nor trained
    for more than twice as many steps as the other, unless it is chosen already. Where nothing fits, the two that come
    first; None: no two that can be read and compared.

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
    free = [row for row in readable if not row.note.archived]
    trained = [row for row in free if row.step and not math.isnan(row.r_at_1)]
    fixed = next((row for row in rows if row.run in (a, b)), None)
    if fixed is None:
        data = Counter(row.fingerprint for row in trained)
        most = next((row.fingerprint for row in trained if data[row.fingerprint] == max(data.values())), "")
        first = [*(row for row in trained if row.fingerprint == most), *free]
        fixed = next((row for row in first if any(_alike(row, other) for other in free)), None)
    if fixed is None:
        return None
    others = [row for row in trained if _alike(row, fixed) and row.fingerprint == fixed.fingerprint]
    others = others or [row for row in free if _alike(row, fixed)]
    if not others:
        return None
    if a is not None and trained and trained[0].run != a and trained[0] in others:
        return a, trained[0].run
    others.sort(key=lambda row: (row.recipe == fixed.recipe, row.seed != fixed.seed))  # stable: the better one first
    return (a, others[0].run) if a is not None else (others[0].run, fixed.run)


def _alike(one: RunRow, other: RunRow) -> bool:
    """Whether they are two runs, neither of them trained for more than twice as many steps as the other."""
    short, long = sorted((one.length, other.length))
    return one.run != other.run and (short == 0 or long <= 2 * short)


def _signature(folder: Path) -> Signature:
    signs: list[object] = [is_locked(folder)]
    for name in WATCHED:
        try:
            stat = (folder / name).stat()
        except OSError:
            continue
        signs.append((name, stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return tuple(signs)


def _or(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else value
