"""What the terminal shows while papermill executes a notebook: what the cells say, in full, and nothing else."""

import json
import logging
import subprocess
import sys
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


@pytest.mark.parametrize("engine_name", [None, "udon"])
def test_a_kernel_listens_on_sockets_in_a_folder_of_its_own_that_goes_with_it(engine, engine_name, tmp_path):
    cell = nbformat.v4.new_code_cell(
        "import json, ipykernel\nprint(ipykernel.get_connection_file())\nprint(ipykernel.get_connection_info())"
    )
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), tmp_path / "in.ipynb")
    papermill.execute_notebook(
        tmp_path / "in.ipynb", tmp_path / "out.ipynb", engine_name=engine_name, progress_bar=False
    )
    said = nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs[0].text
    file, info = said.split("\n", 1)
    assert json.loads(info)["transport"] == "ipc"
    assert not Path(file).parent.exists()


@pytest.mark.parametrize(("folder", "transport"), [("short", "ipc"), ("long" * 30, "tcp")])
def test_where_paths_are_too_long_for_sockets_the_kernel_takes_ports(monkeypatch, tmp_path, folder, transport):
    monkeypatch.setattr(terminal.tempfile, "mkdtemp", lambda prefix: f"/{folder}")
    assert terminal.SocketKernels().transport == transport


def test_a_parameter_of_a_run_is_not_called_unknown_and_another_word_is(caplog):
    with caplog.at_level(logging.WARNING, logger="papermill"):
        for name in ("w_rel", "wrel"):
            terminal.logger.warning(f"Passed unknown parameter: {name}")
        terminal.logger.warning("w_rel")
    assert caplog.messages == ["Passed unknown parameter: wrel", "w_rel"]


def test_papermill_knows_it_whichever_engine_is_used(tmp_path):
    cell = nbformat.v4.new_code_cell("steps = 1", metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel})
    nbformat.write(notebook, tmp_path / "in.ipynb")
    command = [sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb", "-p", "w_rel", "2", "-p", "other", "1"]
    done = subprocess.run([*command, "--prepare-only"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Passed unknown parameter: other" in done.stderr
    assert "Passed unknown parameter: w_rel" not in done.stderr
