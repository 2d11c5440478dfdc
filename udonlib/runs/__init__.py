"""What is kept on the disk: runs, grids of runs, evaluations, and what was taken from elsewhere."""

from udonlib.runs.run import Run, load_run, open_run

__all__ = ["Run", "load_run", "open_run"]
