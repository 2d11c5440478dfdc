"""Copies of the notebooks with other parameters, for tests that cannot inject them as papermill does."""

import ast
import os
import subprocess
import sys
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


PLOTLY = "application/vnd.plotly.v1+json"
SHEET = "data:image/webp;base64,"  # within HTML


SMOKE = ["-f", str(PROJECT / "params" / "smoke.yaml"), "-p", "domains", "flags, earth", "-p", "domains_per_batch", "2"]


MAX_BYTES = 3_000_000


def papermill(notebook: Path, out: Path, *options: str, cwd: Path = PROJECT, **environment: str):
    environment = {**os.environ, "UDON_LIVE": "0", **environment}
    command = [sys.executable, "-m", "papermill", str(notebook), str(out), "--no-progress-bar", *options]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def outputs(path: Path) -> list[dict]:
    """Everything that the cells of a notebook show, by type."""
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    found = [output for cell in cells for output in cell.outputs]
    return [output.get("data", {"stream": output.get("text", "")}) for output in found]


def text(path: Path) -> str:
    return "".join("".join(data.get("stream", "")) for data in outputs(path))
