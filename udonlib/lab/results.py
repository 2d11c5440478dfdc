"""Everything behind RESULTS.md by one command, resumed where it stopped: grids of runs, choices, and their tables.

    python -m udonlib results --plan     # what is left to run, and about how long it takes
    python -m udonlib results

Each part is a grid of `runs.grid`, shown by the notebook of ablations. A part may have candidates, of which one row is
chosen before its test figures exist: candidates train under seeds of their own, only the best validation figure in the
summary of their runs is looked at, and the choice is written to outputs/results/choices.json, once. Then the chosen row
trains under the seeds of the table, beside the rows that are told whatever they find, and the notebook reads test. A
choice that stands in the file is never made again; removing the file, and the runs, begins anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from udonlib.errors import UserError, nearest
from udonlib.files import SHARE, results_folder, write_json, write_text
from udonlib.lab.compare.ablation_views import show
from udonlib.presets import GridParams
from udonlib.runs.grid import Grid, open_grid

CHOICES = "choices.json"


@dataclass(frozen=True)
class Part:
    """One grid of the results.

    rows: told whatever they find. candidates: rows of which the best on validation is told too. minutes: of a run on
    one core, roughly. seeds: of the table. choice_seeds: of the candidates.
    """

    name: str
    base: str
    baseline: str
    rows: tuple[str, ...]
    candidates: tuple[str, ...] = ()
    minutes: float = 3.0
    seeds: tuple[int, ...] = (0, 1, 2)
    choice_seeds: tuple[int, ...] = (10,)
    steps: int | None = None


PARTS = (
    Part(
        "imagenet",
        "miniuned_imagenet",
        "us_rr",
        ("us_rr", "uj_rr", "udon", "even", "adapter", "adapter_512", "features", "specialist"),
        ("udon_plus", "plus_deep_teachers", "plus_kl"),
        minutes=4.7,
    ),
    Part(
        "uneven",
        "miniuned_uneven",
        "round_robin",
        ("round_robin", "udon", "balanced", "dataset_size", "square_root", "size_0.3", "even_size"),
        ("relative_loss", "remaining_loss", "progress", "gap", "smoothing_0.5", "floor_0.2", "even"),
        minutes=3.5,
        choice_seeds=(10, 11),
    ),
    # The chosen rule once more, under seeds that no figure had been seen of.
    Part(
        "uneven_again",
        "miniuned_uneven",
        "round_robin",
        ("round_robin", "dataset_size", "even"),
        minutes=3.5,
        seeds=(3, 4, 5, 6, 7),
    ),
)


@dataclass(frozen=True)
class Results:
    """Parts whose grids and tables stand in one folder of results. jobs: runs at a time."""

    parts: tuple[Part, ...] = PARTS
    outputs: str = "auto"
    jobs: int = 1
    data: str = "miniuned"

    @property
    def folder(self) -> Path:
        """Where choices, executed notebooks and tables are."""
        return results_folder(self.outputs) / "results"

    def choices(self) -> dict[str, Any]:
        """What was chosen, by part; {} before the first choice. Raises UserError where the file is damaged."""
        file = self.folder / CHOICES
        try:
            return dict(json.loads(file.read_bytes()))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: damaged ({error!r:.80}): restore it, or remove it to choose anew") from None

    def candidates(self, part: Part) -> Grid:
        """The grid of a part's candidates, under seeds of their own."""
        rows = part.candidates
        return open_grid(GridParams(**self._values(part, "candidates", rows, part.choice_seeds), baseline=rows[0]))

    def values(self, part: Part) -> dict[str, Any]:
        """Parameters of the part's table: its rows, and the one that was chosen."""
        chosen = self.choices().get(part.name, {}).get("chosen")
        rows = dict.fromkeys((*part.rows, *([chosen] if chosen else [])))
        return self._values(part, "table", tuple(rows), part.seeds) | {"baseline": part.baseline}

    def _values(self, part: Part, kind: str, rows: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
        values: dict[str, Any] = {"base": part.base, "rows": list(rows), "seeds": list(seeds), "jobs": self.jobs}
        values |= {"grid": f"results-{part.name}-{kind}", "data": self.data, "outputs": self.outputs}
        return values | ({"steps": part.steps} if part.steps else {})

    def plan(self) -> list[tuple[str, int, int, float]]:
        """What there is to run: part, its different runs, those left, and minutes for these."""
        lines = []
        for part in self.parts:
            grids = {"table": open_grid(GridParams(**self.values(part)))}
            chosen = part.name in self.choices()
            if part.candidates and not chosen:
                grids["candidates"] = self.candidates(part)
            for kind, grid in grids.items():
                n_left = sum(job.run.status != "finished" for job in grid.jobs.values())
                waiting = len(part.seeds) if part.candidates and not chosen and kind == "table" else 0
                n_left, n_all = n_left + waiting, len(grid.jobs) + waiting
                lines.append((f"{part.name}, {kind}", n_all, n_left, n_left * part.minutes / self.jobs))
        return lines

    def choose(self, part: Part) -> None:
        """Train the candidates, and write down which is best on validation, unless that was done.

        Raises:
            UserError: a candidate that failed.
        """
        choices = self.choices()
        if not part.candidates or part.name in choices:
            return
        grid = self.candidates(part)
        show(grid.run())
        _refuse_failed(grid)
        found = {row: _validation(grid, row) for row in part.candidates}
        chosen = max(found, key=lambda row: found[row])
        choices[part.name] = {
            "chosen": chosen,
            "validation_r_at_1": found,
            "seeds": list(part.choice_seeds),
            "runs": sorted(grid.jobs),
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / CHOICES, choices)

    def command(self, part: Part) -> list[str]:
        """The papermill command that runs the part's grid and shows its tables."""
        notebook = SHARE / "notebooks" / "ablations.ipynb"
        values = {name: ", ".join(map(str, v)) if isinstance(v, list) else v for name, v in self.values(part).items()}
        command = [sys.executable, "-m", "papermill", str(notebook), str(self.folder / f"{part.name}.ipynb")]
        quietly = ["--engine", "udon", "--log-level", "WARNING", "--no-progress-bar"]
        return [*command, *quietly, "-y", yaml.safe_dump(values)]

    def run(self) -> Iterator[str]:
        """Do what is not done, part by part; yields a line when something begins or has ended.

        Raises:
            UserError: a run that failed, with its log; the others are kept, and the same call goes on.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.parts:
            if part.candidates and part.name not in self.choices():
                yield f"{part.name}: {len(part.candidates)} candidates"
            self.choose(part)
            if part.candidates:
                yield f"{part.name}: chosen on validation: {self.choices()[part.name]['chosen']}"
            yield f"{part.name}: {', '.join(self.values(part)['rows'])}"
            if subprocess.run(self.command(part)).returncode:
                raise UserError(f"{part.name}: see {self.folder / f'{part.name}.ipynb'}; the same command goes on")
            grid = open_grid(GridParams(**self.values(part)))
            _refuse_failed(grid)
            self.write()
        yield f"tables: {self.folder / 'results.md'}"

    def write(self) -> Path:
        """Write results.md: the tables of every part that has some. Returns its path."""
        texts, choices = [], self.choices()
        for part in self.parts:
            grid = open_grid(GridParams(**self.values(part)))
            table = grid.folder / "results.md"
            if table.exists():
                seeds = ", ".join(map(str, part.seeds))
                texts.append(f"## {part.name}\n\nPreset `{part.base}`, seeds {seeds}, baseline `{part.baseline}`.\n")
                if part.name in choices:
                    chosen = choices[part.name]
                    figures = ", ".join(f"`{row}` {value:.1f}" for row, value in chosen["validation_r_at_1"].items())
                    told = ", ".join(map(str, chosen["seeds"]))
                    texts.append(f"`{chosen['chosen']}` was chosen by R@1 on validation, seeds {told}: {figures}.\n")
                texts.append(table.read_text())
        file = self.folder / "results.md"
        write_text(file, "\n".join(texts))
        return file


def named(names: Sequence[str]) -> tuple[Part, ...]:
    """The parts of some names; all for none. Raises UserError with the nearest name."""
    known = {part.name: part for part in PARTS}
    for name in names:
        if name not in known:
            raise UserError(f"no part of the results is called '{name}'; {nearest(name, known)}")
    return tuple(known[name] for name in names) or PARTS


def _validation(grid: Grid, row: str) -> float:
    """The best R@1 on validation of a row's runs, their mean; nothing else of them is looked at."""
    figures = [float(job.run.summary()["best_validation_r_at_1"]) for jobs in grid.rows[row].values() for job in jobs]
    return sum(figures) / len(figures)


def _refuse_failed(grid: Grid) -> None:
    failed = [state for state in grid.progress().states if state.status != "finished"]
    if failed:
        one = failed[0]
        why = f"{one.message} (log: {one.log})" if one.message else f"is {one.status}"
        raise UserError(f"{len(failed)} runs did not finish, first {one.label}: {why}; the same command goes on")
