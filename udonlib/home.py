"""Where presets and notebooks are, and where results go: in a clone of the project, or where udonlib is installed."""

import os
from pathlib import Path

from udonlib.bounds import long_name
from udonlib.errors import UserError, nearest

PACKAGE = Path(__file__).resolve().parent
# A clone has params/ and notebooks/ beside the package. A wheel carries them within it (pyproject.toml says so).
INSTALLED = (PACKAGE / "share").is_dir()
SHARE = PACKAGE / "share" if INSTALLED else PACKAGE.parent


def working_folder() -> Path:
    """The folder whose outputs/ holds results: the clone, or the folder that one works in.

    A kernel of JupyterLab works in its notebook's folder, one of papermill where papermill was called: for both it is
    the folder that holds notebooks/.
    """
    if not INSTALLED:
        return SHARE
    here = Path.cwd()
    return here.parent if here.name == "notebooks" and (here / "train.ipynb").exists() else here


def results_folder(outputs: str = "auto") -> Path:
    """Folder of all results: the project's, or another."""
    return working_folder() / "outputs" if outputs == "auto" else Path(outputs).expanduser().absolute()


def runs_folder(outputs: str = "auto") -> Path:
    """Folder of all runs."""
    return results_folder(outputs) / "runs"


def run_path(name: str, outputs: str = "auto") -> Path:
    """Folder of an existing run, by its name or path. Raises: UserError "no run ..." with the nearest name."""
    folder, problem = runs_folder(outputs), long_name(name)
    if problem:
        raise UserError(f"no run {name[:40]!r}...: {problem}")
    for path in (folder / name, Path(name).expanduser().absolute()):
        if (path / "params.yaml").exists():
            return path
    names = [path.parent.name for path in folder.glob("*/params.yaml")]
    raise UserError(f"no run {name!r} in {folder}; {nearest(name, names) if names else 'it holds no runs yet'}")


def located(path: str | None) -> str | None:
    """Write a path of data from the root, in one form: it is found from every folder, and `data/` is `data`.

    None stays None, and the names that are no paths: "miniuned", which ships with the package, and "auto".
    """
    return path if path in (None, "miniuned", "auto") else os.path.abspath(os.path.expanduser(path))
