"""Small grids: a base preset, rows, and runs that take a second."""

from pathlib import Path

import yaml

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.training import SMALL
from udonlib.presets import GridParams
from udonlib.runs.grid import Grid, open_grid
from udonlib.runs.run import open_run


def write_base(folder: Path) -> Path:
    """A preset of a tiny network, for the domains emoji and flags."""
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    return file


def small_grid(folder: Path, **values: object) -> Grid:
    """A grid whose data, base preset and results are in one folder."""
    if not (folder / "data").exists():
        write_uned_tree(folder / "data")
    given = {"data": str(folder / "data"), "base": str(write_base(folder)), "outputs": str(folder / "results")}
    return open_grid(GridParams(**given | {"seeds": (0, 1)} | values))


def finish(grid: Grid, *rows: str) -> None:
    """Train the runs of some rows in this process."""
    for row in rows:
        for jobs in grid.rows[row].values():
            for job in jobs:
                for _ in open_run(job.params.model_copy(update={"n_threads": 1})).train():
                    pass
