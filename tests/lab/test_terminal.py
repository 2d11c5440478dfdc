"""What the terminal shows while papermill executes a notebook: what the cells say, in full, and nothing else."""

import logging
from importlib.metadata import entry_points
from pathlib import Path

import nbformat
import papermill.engines  # first: it loads udonlib.lab.terminal
import pytest

from tests import PROJECT
from udonlib.lab import terminal

CELLS = [
    "print('one line'); print('and another')",
    "from udonlib.lab.views.sheets import Table, Picture\nTable('<b>R@1</b>', 'R@1 of the table')",
    "import sys; print('a warning', file=sys.stderr)",
    "Picture(b'jpeg', (3, 4))",
    "from IPython.display import HTML; display({'text/html': '<i>unseen</i>'}, raw=True)",
]


@pytest.fixture
def engine():
    """papermill with the engine of this checkout, whichever is installed."""
    engines = papermill.engines.papermill_engines
    before = dict(engines._engines)
    engines.register("udon", terminal.TerminalEngine)
    yield
    engines._engines.clear()
    engines._engines.update(before)


def execute(folder: Path, *cells: str) -> Path:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(notebook, folder / "in.ipynb")
    papermill.execute_notebook(folder / "in.ipynb", folder / "out.ipynb", engine_name="udon", progress_bar=False)
    return folder / "out.ipynb"


def test_the_terminal_shows_lines_warnings_and_tables_and_nothing_of_papermill(engine, tmp_path, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        execute(tmp_path, *CELLS)
    said = capfd.readouterr()
    assert said.out.splitlines() == ["one line", "and another", "R@1 of the table"]
    assert said.err.splitlines() == ["a warning"]  # not even the kernel's word on its sockets
    assert caplog.messages == []


def test_a_cell_that_fails_ends_papermill_with_its_message(engine, tmp_path, capfd):
    with pytest.raises(papermill.exceptions.PapermillExecutionError, match="that went wrong"):
        execute(tmp_path, "print('before')", "raise ValueError('that went wrong')", "print('never')")
    assert capfd.readouterr().out.splitlines() == ["before"]
    assert "that went wrong" in (tmp_path / "out.ipynb").read_text()  # with what the cells before have shown


def test_the_engine_is_installed_by_the_name_that_make_uses():
    [declared] = [
        line for line in (PROJECT / "pyproject.toml").read_text().splitlines() if "udonlib.lab.terminal:" in line
    ]
    assert declared == 'udon = "udonlib.lab.terminal:TerminalEngine"'
    [installed] = entry_points(group="papermill.engine", name="udon")
    assert installed.load() is terminal.TerminalEngine
    assert "--engine udon" in (PROJECT / "Makefile").read_text()
