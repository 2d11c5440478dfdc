"""Where presets and notebooks are, and where results go: in a clone of the project, or where udonlib is installed."""

from pathlib import Path

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
