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
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests import PROJECT
from tests.helpers.missing import script_without
from udonlib import files
from udonlib.errors import UserError
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


SCALARS = st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.floats(allow_nan=False, allow_infinity=False)

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])) | st.from_regex(
    r"[-+]?[0-9_]{1,4}[.:eE]?[0-9_]{0,3}", fullmatch=True
)


def yaml_complaint(text: str) -> str:
    with pytest.raises(UserError) as caught:
        files.read_yaml_text(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{width: 8, name: wide}", {"width": 8, "name": "wide"}),
        ('{"width":8}', {"width": 8}),
        ("[512, 256]", [512, 256]),
        ("[a, 'b, c', [1.5, -2, 1.0e-05]]", ["a", "b, c", [1.5, -2, 1e-5]]),
        ("a:\nb: ~\nc: true\n", {"a": None, "b": None, "c": True}),
        ("", None),
    ],
)
def test_what_json_can_say_is_read(text, value):
    assert files.read_yaml_text(text) == value


@pytest.mark.parametrize(
    "text", ["no", "on", "Yes", "007", "0x1F", "12:30", "2024-11-01", "1_000", "1e-3", ".inf", "+5", "="]
)
def test_what_is_not_plainly_something_else_is_text(text):
    assert files.read_yaml_text(text) == text


def test_keys_are_text_whatever_they_look_like():
    assert files.read_yaml_text("{2020: 1, no: 2, 007: 3, 1.50: 4}") == {"2020": 1, "no": 2, "007": 3, "1.50": 4}


@given(
    st.recursive(
        SCALARS | TEXTS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=8,
    )
)
def test_what_is_written_reads_back_the_same(value):
    assert files.read_yaml_text(yaml.safe_dump(value)) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: 1\nb: !!timestamp 2020-01-01",
            "line 2: found the tag !!timestamp, expected a plain value, a list or a map",
        ),
        ("!!set {a, b}", "line 1: found the tag !!set"),
        ("a: !!python/object:os.x 1", "line 1: found the tag !!python/object:os.x"),
        ("a: ! b", "line 1: found the tag !,"),
        ("a: &x [1]\nb: *x", "line 2: found the alias *x, expected the value itself"),
        ("[" * 1500 + "]" * 1500, "line 1: found lists and mappings more than 20 deep"),
        ("{a: " * 1500, "line 1: found lists and mappings more than 20 deep"),
        ("a: 1\nb: {c: 1,\n c: 2}", "line 3: 'c' is set twice, first in line 2"),
        ("? [1]\n: 2", "line 1: found a list or a mapping as a name"),
        ("[1", "line 1: not valid YAML: "),
        ("a: 1\n---\nb: 1", "line 2: not valid YAML: "),
        ("\x07", "not valid YAML: "),
    ],
)
def test_what_is_more_than_that_is_refused_in_one_line(text, message):
    assert yaml_complaint(text).startswith(message)


def test_aliases_that_unfold_take_neither_memory_nor_time():
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    assert yaml_complaint(bomb) == "line 2: found the alias *a0, expected the value itself"


def test_sizes_are_bounded(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "MAX_VALUES", 50)
    monkeypatch.setattr(files, "MAX_BYTES", 400)
    assert len(files.read_yaml_text("[" + "a," * 49 + "]")) == 49
    assert yaml_complaint("[" + "a," * 50 + "]") == "line 1: found more than 50 values"
    assert yaml_complaint("a" * 401) == "not valid YAML: found more than 400 characters"
    file = tmp_path / "long.yaml"
    file.write_text("# " + "a" * 400)
    with pytest.raises(UserError, match=r"long\.yaml: not valid YAML: found more than 400 characters"):
        files.read_yaml(file)


def test_a_file_holds_names_and_values(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("seed: 1\nrun: 007\n")
    assert files.read_yaml(file) == {"seed": 1, "run": "007"}
    file.write_text("# nothing\n")
    assert files.read_yaml(file, empty=True) == {}
    for content, message in (
        (b"# nothing\n", ": expected lines"),
        (b"\n- a\n", ", line 2: expected lines"),
        (b"a: \xff", ", line 1: not UTF-8"),
        (b"a: *x", ", line 1: found the alias"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError) as caught:
            files.read_yaml(file)
        assert str(caught.value).startswith(f"{file}{message}")
    with pytest.raises(UserError, match="cannot be read"):
        files.read_yaml(tmp_path)


def test_several_places_of_data_are_a_list_in_brackets():
    assert files.sources("my/folder") == ("my/folder",)
    assert files.sources("[miniuned, my/folder,more.csv]") == ("miniuned", "my/folder", "more.csv")
    assert files.sources(["a", Path("b")]) == ("a", "b")
    one = files.located(["miniuned", "my, folder", 'a"b'])
    assert files.sources(one) == ("miniuned", os.path.abspath("my, folder"), os.path.abspath('a"b'))
    assert files.located(one) == one
    assert files.located("[x]") == os.path.abspath("x")
    for wrong in ("[]", "[a, a/]", "[a, ]", "[auto, a]", []):
        with pytest.raises(ValueError, match="expected one place, or a list of different ones"):
            files.located(wrong)
