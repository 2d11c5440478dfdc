"""The package away from its clone: presets, notebooks and data travel along, and results go where one works."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import PROJECT
from udonlib import home
from udonlib.home import results_folder
from udonlib.models import weights_file
from udonlib.presets import load

BUILT = ("pyproject.toml", "LICENSE", "udonlib", "params", "notebooks")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with udonlib as its wheel brings it, and nothing of the clone."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "clone").mkdir()
    for name in BUILT:
        source, leave = PROJECT / name, shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.egg-info")
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        copy(source, folder / "clone" / name, **({"ignore": leave} if source.is_dir() else {}))
    (folder / "clone" / "notebooks" / "out.ipynb").write_text("{}")  # as papermill leaves it there
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "dist", folder / "clone"]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    install = ["install", "--no-deps", "--no-compile", "--no-index", "--target", folder / "site"]
    subprocess.run([*pip, *install, *(folder / "dist").iterdir()], check=True, capture_output=True)
    shutil.rmtree(folder / "clone")
    return folder / "site"


def python(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python in a folder, with the installed udonlib before any other."""
    command = [sys.executable, *arguments]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_every_module_preset_and_notebook(installed):
    package = installed / "udonlib"
    files = {p.relative_to(PROJECT) for p in (PROJECT / "udonlib").rglob("*") if p.is_file()}
    found = {p.relative_to(installed) for p in package.rglob("*") if p.is_file()}
    assert {p for p in files if "__pycache__" not in p.parts} == {p for p in found if "share" not in p.parts}
    for name, pattern in (("params", "*.yaml"), ("notebooks", "*.png")):
        here = {p.relative_to(PROJECT) for p in (PROJECT / name).rglob(pattern)}
        assert here
        assert here == {p.relative_to(package / "share") for p in (package / "share" / name).rglob(pattern)}
    assert (package / "share" / "notebooks" / "train.ipynb").exists()
    assert not (package / "share" / "notebooks" / "out.ipynb").exists()


TRAIN = """
import json, sys
import torch
import udonlib
from udonlib import presets, runs
torch.set_num_threads(1)
params = presets.load("smoke", domains="flags,earth", steps=2, eval_every=2, domains_per_batch=2, n_threads=1)
run = runs.open_run(params)
ends = [record for record in run.train() if record["kind"] == "end"]
note = run.provenance()[0]
print(json.dumps([udonlib.__file__, ends[0]["steps"], str(run.path), note["commit"], note["version"]]))
"""


def test_an_installed_udonlib_trains_a_preset_and_writes_where_one_works(installed, tmp_path):
    done = python(installed, tmp_path, "-c", TRAIN)
    assert done.returncode == 0, done.stderr
    file, steps, path, commit, version = json.loads(done.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(installed)
    assert (steps, commit, version) == (2, None, "0.1.0")
    assert Path(path).parent == tmp_path / "outputs" / "runs"
    assert (Path(path) / "summary.json").exists()
    assert not (installed / "outputs").exists()


def test_a_workspace_is_notebooks_presets_and_a_place_for_results(installed, tmp_path):
    done = python(installed, tmp_path, "-m", "udonlib", "workspace", "mine")
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"notebooks", "params", "outputs"}
    train, preset = tmp_path / "mine" / "notebooks" / "train.ipynb", tmp_path / "mine" / "params" / "smoke.yaml"
    assert train.read_bytes() == (PROJECT / "notebooks" / "train.ipynb").read_bytes()
    train.write_text("mine")
    preset.unlink()
    again = python(installed, tmp_path / "mine", "-m", "udonlib", "workspace")
    assert again.stdout.splitlines()[0] == "left as it is, since it differs: notebooks/train.ipynb"
    assert train.read_text() == "mine"
    assert preset.exists()
    (tmp_path / "taken").write_text("")
    refused = python(installed, tmp_path, "-m", "udonlib", "workspace", "taken")
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    assert "taken" in refused.stderr


def test_a_clone_is_a_workspace_already():
    done = python(PROJECT, PROJECT, "-m", "udonlib", "workspace")
    assert done.returncode == 1
    assert str(PROJECT) in done.stderr


@pytest.fixture
def away(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with udonlib installed elsewhere."""
    monkeypatch.setattr(home, "INSTALLED", True)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_notebooks_and_their_folder_share_the_results(away, monkeypatch):
    assert results_folder() == away / "outputs"
    monkeypatch.chdir(away / "notebooks")
    assert results_folder() == away / "notebooks" / "outputs"  # of somebody else, by that name
    (away / "notebooks" / "train.ipynb").write_text("{}")
    assert results_folder() == away / "outputs"


def test_own_presets_come_before_those_of_the_package(away):
    assert load("smoke").steps != 3
    (away / "params").mkdir()
    (away / "params" / "smoke.yaml").write_text("steps: 3\n")
    (away / "params" / "mine.yaml").write_text("preset: smoke\nseed: 2\n")
    assert (load("smoke").steps, load("mine").steps, load("mine").seed) == (3, 3, 2)
    assert load("miniuned").steps > 3


def test_the_weights_that_come_with_udonlib_are_found_from_anywhere(away):
    assert weights_file("udonlib/miniuned/backbone.safetensors").exists()
    (away / "own.safetensors").write_text("")
    assert weights_file("own.safetensors").exists()


def test_weights_are_found_in_an_installed_package_that_is_not_imported(away, monkeypatch):
    (away / "elsewhere" / "some_weights" / "models").mkdir(parents=True)
    (away / "elsewhere" / "some_weights" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    file = away / "elsewhere" / "some_weights" / "models" / "net.pth"
    file.write_text("")
    monkeypatch.syspath_prepend(away / "elsewhere")
    assert weights_file("some_weights/models/net.pth") == file
    assert not weights_file("some_weights/models/other.pth").exists()
