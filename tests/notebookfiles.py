"""Copies of the notebooks with other parameters, for tests that cannot inject them as papermill does."""

import ast
from pathlib import Path

import nbformat

from tests import PROJECT

NOTEBOOKS = PROJECT / "notebooks"


def sources() -> list[Path]:
    """The project's notebooks, without copies that papermill has executed beside them."""
    paths = sorted(NOTEBOOKS.glob("*.ipynb"))
    return [path for path in paths if "papermill" not in nbformat.read(path, 4).metadata]


def parameters_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The cell that papermill would put values behind."""
    [cell] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return cell


def parameter_names(path: Path) -> list[str]:
    """What the parameters cell of a notebook assigns."""
    body = ast.parse(parameters_cell(nbformat.read(path, 4)).source).body
    return [line.target.id for line in body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)]


def copy_with(path: Path, out: Path, **values: object) -> Path:
    """Write a copy of a notebook whose parameters cell ends with other values, as a person would type them there."""
    notebook = nbformat.read(path, 4)
    cell = parameters_cell(notebook)
    cell.source += "".join(f"\n{name}: {type(value).__name__} = {value!r}" for name, value in values.items())
    out.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, out)
    return out
