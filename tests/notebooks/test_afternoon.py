"""The worked afternoon at the end of search.ipynb does what it says: each of its commands, in order, made small."""

import re
import shlex
import subprocess
import sys

import nbformat
import numpy as np
import pytest

from tests import PROJECT
from tests.helpers.notebookfiles import NOTEBOOKS, papermill, text
from udonlib.runs.folder import RunFolder

STORY = nbformat.read(NOTEBOOKS / "search.ipynb", 4).cells[-1].source
SMALL = shlex.split("-p steps 4 -p warmup_steps 1 -p eval_every 4 -p n_threads 1")


def blocks():
    """Its indented blocks: programs, and commands."""
    found = re.findall(r"(?:^ {4}.*\n?|^\n(?= {4}))+", STORY, flags=re.MULTILINE)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE).strip() for block in found]


def python(program, folder):
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def told():
    """The program that makes the folders, the commands, and the program that loads the release."""
    programs = [block for block in blocks() if block.startswith(("from ", "import "))]
    commands = [block for block in blocks() if block not in programs]
    assert [shlex.split(command)[:2] for command in commands] == [
        ["make", "train"],
        ["papermill", "notebooks/search.ipynb"],
        ["make", "release"],
    ]
    return *programs, commands


def test_each_command_does_what_the_story_says(told, tmp_path):
    folders, alone, (train, search, release) = told
    python(folders, tmp_path)
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"digits", "temple", "flower"}

    results = ["-p", "outputs", str(tmp_path / "outputs")]
    [options] = [word.removeprefix("ARGS=") for word in shlex.split(train) if word.startswith("ARGS=")]
    some = ["-p", "domains", "digits, temple, flower, flags"]
    options = [*shlex.split(options), *SMALL, *some, *results]
    done = papermill(NOTEBOOKS / "train.ipynb", tmp_path / "train.ipynb", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    run = RunFolder(tmp_path / "outputs" / "runs" / "afternoon")
    assert set(run.evaluation()["domain"]) == {"digits", "temple", "flower", "flags", "mean"}

    _, notebook, _, *options = shlex.split(search)
    done = papermill(PROJECT / notebook, tmp_path / "search.ipynb", *options, *results, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2,277 images are searched" in text(tmp_path / "search.ipynb")

    [name] = [word.removeprefix("RUN=") for word in shlex.split(release) if word.startswith("RUN=")]
    command = [sys.executable, "-m", "udonlib", "release", name, "--outputs", str(tmp_path / "outputs")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = np.array(re.findall(r"-?\d+\.\d+(?:e-?\d+)?|-?\d+\.", python(alone, tmp_path)), dtype=float).reshape(3, 3)
    assert np.allclose(np.diag(rows), 1)
    assert np.allclose(rows, rows.T, atol=1e-5)
    assert rows[0, 1] > rows[0, 2]
