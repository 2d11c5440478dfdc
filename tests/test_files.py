"""Files replaced whole, full disks, locks, and what is not ours."""

from __future__ import annotations

import ast
import errno
import importlib.metadata
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests import PROJECT
from tests.helpers.missing import script_without
from udonlib import files
from udonlib.files import (
    DiskError,
    HeldError,
    is_held,
    remove,
    remove_leftovers,
    replacing,
    results_folder,
    take_lock,
    whole_lines,
)
from udonlib.models.embedding_model import weights_file
from udonlib.presets import load

PACKAGE = Path(__file__).parent.parent / "udonlib"


@contextmanager
def room_for(n_bytes):
    """Let no file grow beyond this: the system then refuses to write, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_keeps_its_old_content_if_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_there_before_may_be_kept_aside(tmp_path):
    path, aside = tmp_path / "file", tmp_path / "before"
    for text in ("first", "second", "third"):
        with replacing(path, aside=aside) as file:
            file.write(text.encode())
    assert (path.read_text(), aside.read_text()) == ("third", "second")


@pytest.mark.parametrize("n_bytes", [100, 300_000])
def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path, n_bytes):
    path = tmp_path / "file"
    path.write_text("old")
    content = bytes(2 * n_bytes)
    with (
        room_for(n_bytes),
        pytest.raises(DiskError, match=r"file: cannot be written: .* it takes 5 MB, .* are free there; make room"),
        replacing(path, 5_000_000) as file,
    ):
        file.write(content)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_pytorch_does_not_hide_that_the_disk_is_full(tmp_path):
    path = tmp_path / "model.pt"
    with room_for(100_000), pytest.raises(DiskError, match=r"model.pt: cannot be written: File too large"):
        with replacing(path) as file:
            torch.save({"weights": torch.zeros(100_000)}, file)
    assert not list(tmp_path.iterdir())


def test_errors_of_whoever_writes_are_not_taken_for_the_disks(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "file"):
        (tmp_path / "other").read_text()


@pytest.mark.parametrize(
    ("number", "hint"),
    [(errno.EROFS, "get the right to write"), (errno.EACCES, "outputs="), (errno.ENOSPC, "are free; make room")],
)
def test_a_folder_that_cannot_be_made_is_named_with_the_way_out(tmp_path, monkeypatch, number, hint):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DiskError, match=f"below.file: cannot be written: {os.strerror(number)}.*{hint}"):
        with replacing(tmp_path / "below" / "file"):
            pass


def test_a_name_that_is_too_long_is_said_with_its_length(tmp_path):
    with pytest.raises(DiskError, match=r"nnnnnnnnnnnnnnnnnnnn\.\.\. has 300 bytes, most systems allow 255"):
        with replacing(tmp_path / ("n" * 300) / "file"):
            pass


def test_only_named_files_are_removed_and_what_is_left_of_their_writing(tmp_path):
    ours = ("a.csv", "a.csv.12.tmp", "below/b.pt", "below/b.pt.3.tmp")
    others = ("notes.txt", "notes.12.tmp", "a.csv.old.tmp", "a.csv.tmp", "xa.csv.1.tmp", "below/c.pt")
    (tmp_path / "below").mkdir()
    for name in (*ours, *others):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, "a.csv")
    assert not (tmp_path / "a.csv.12.tmp").exists()
    remove(tmp_path, ["a.csv", "below/b.pt", "gone"])
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == set(others)


def test_a_line_that_was_cut_off_is_no_line(tmp_path):
    file = tmp_path / "lines"
    assert whole_lines(file) == []
    for content, lines in ((b"one\ntwo\nthr", [b"one", b"two"]), (b"one\n", [b"one"]), (b"", [])):
        file.write_bytes(content)
        assert whole_lines(file) == lines
    file.write_bytes(b"one\ntwo\nthree\n")
    assert whole_lines(file, 4) == [b"two", b"three"]
    assert whole_lines(file, -8) == [b"three"]  # it falls into the second line
    assert whole_lines(file, -100) == [b"one", b"two", b"three"]


def test_a_lock_is_held_by_one_and_free_when_it_is_closed(tmp_path):
    path = tmp_path / "lock"
    assert not is_held(path)
    assert not path.exists()  # who looks writes nothing
    with take_lock(path):
        assert is_held(path)
        with pytest.raises(HeldError, match="held by another process"):
            take_lock(path, seconds=0)
    assert not is_held(path)
    take_lock(path, seconds=0).close()


def test_a_killed_process_leaves_its_lock_free(tmp_path):
    path = tmp_path / "lock"
    code = "import sys; from pathlib import Path; from udonlib.files import take_lock\n"
    code += "lock = take_lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        assert is_held(path)
        process.kill()
        process.wait()
        assert not is_held(path)


def test_a_system_without_shared_locks_sees_who_holds_one(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)  # as on Windows
    path = tmp_path / "lock"
    assert not is_held(path)
    with take_lock(path):
        assert is_held(path)
    assert not is_held(path)


def test_those_who_look_do_not_see_each_other(tmp_path):
    path = tmp_path / "lock"
    path.touch()
    code = "import sys; from pathlib import Path; from udonlib.files import is_held\n"
    code += "print(sum(is_held(Path(sys.argv[1])) for _ in range(2000)))"
    command = [sys.executable, "-c", code, str(path)]
    watchers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    assert [watcher.communicate()[0] for watcher in watchers] == [b"0\n", b"0\n"]


# What one system has and another has not: modules (None), and names of modules that all have.
ONLY_SOME = {
    **dict.fromkeys(("fcntl", "msvcrt", "resource", "pwd", "grp", "termios", "winreg")),
    "os": {"sched_getaffinity", "fork", "geteuid", "getuid", "killpg", "mkfifo", "statvfs", "pread", "O_DIRECTORY"},
    "signal": {"SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "setitimer", "alarm", "pthread_sigmask"},
    "time": {"tzset", "clock_gettime"},
}


def _line(node):
    return getattr(node, "lineno", 0)


def test_nothing_that_only_some_systems_have_is_used_unguarded():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text()
        tree = ast.parse(source)
        guarded = {line for node in ast.walk(tree) if isinstance(node, ast.Try) for line in map(_line, node.body)}
        for node in ast.walk(tree):
            if _line(node) in guarded and isinstance(node, ast.Import):
                continue
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found += [f"{path.name}:{node.lineno}: {name}" for name in names if ONLY_SOME.get(name, ()) is None]
            if isinstance(node, ast.ImportFrom) and node.module in ONLY_SOME:
                taken = {alias.name for alias in node.names} & (ONLY_SOME[node.module] or set())
                found += [f"{path.name}:{node.lineno}: {name}" for name in taken]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                guard = f'hasattr({node.value.id}, "{node.attr}")'
                if node.attr in (ONLY_SOME.get(node.value.id) or ()) and guard not in source:
                    found.append(f"{path.name}:{node.lineno}: {node.value.id}.{node.attr}")
    assert not found


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


def extra(installed: Path, name: str) -> set[str]:
    """The packages that the wheel's metadata lists for one of its extras."""
    [metadata] = installed.glob("udonlib-*.dist-info")
    requirements = importlib.metadata.PathDistribution(metadata).requires or []
    return {re.split(r"[<>=!;]", line)[0] for line in requirements if f'extra == "{name}"' in line}


def test_an_installed_udonlib_trains_a_preset_and_writes_where_one_works(installed, tmp_path):
    """Without the packages of the extra `lab`, which only notebooks need."""
    lab = extra(installed, "lab")
    assert {"plotly", "ipywidgets", "jupyterlab", "papermill"} <= lab
    done = python(installed, tmp_path, "-c", script_without(lab, TRAIN))
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
    monkeypatch.setattr(files, "INSTALLED", True)
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
    assert weights_file("udonlib/data/miniuned/backbone.safetensors").exists()
    assert weights_file("udonlib/miniuned/backbone.safetensors").exists()  # where runs of before the rooms say it is
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
