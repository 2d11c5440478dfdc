"""`make` in a clone whose path has a space."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import PROJECT


@pytest.fixture
def clone(tmp_path):
    """A Makefile that would run in a folder with a space in its name."""
    folder = tmp_path / "my clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(PROJECT / name, folder)
    (folder / "notebooks").mkdir()
    shutil.copy(PROJECT / "notebooks" / "train.ipynb", folder / "notebooks")
    return folder


def words(command: str, folder: Path) -> list[str]:
    """What a shell makes of a line: its words, one a line."""
    told = 'for word in "$@"; do printf "%s\\n" "$word"; done'
    script = f"tell() {{ {told}; }}\ntell {command}"
    done = subprocess.run(["sh", "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "target", ["train", "distill", "ablations", "results", "embed", "lab", "thumbnails", "check", "test", "release"]
)
def test_make_works_in_a_folder_with_a_space(clone, target):
    python = clone / "my python"
    python.symlink_to(sys.executable)
    command = ["make", "-n", target, "VENV=", f"PYTHON={python}"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace("\\\n", " ").splitlines()
    run = [line for line in lines if "-m " in line or ".py" in line]
    assert run
    for line in run:
        line = re.sub(r'^(\w+="[^"]*"\s+)+', "", line)  # what goes into the environment
        assert words(line, clone)[0] == str(python)


def test_make_release_hands_on_the_run_and_what_is_stated(clone):
    for given, told in (
        ([], ["latest"]),
        (["RUN=my run", "ARGS=--licence 'CC BY 4.0'"], ["my run", "--licence", "CC BY 4.0"]),
    ):
        command = ["make", "-n", "release", "VENV=", f"PYTHON={sys.executable}", *given]
        line = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=True).stdout
        assert words(line, clone) == [sys.executable, "-m", "udonlib", "release", *told]


def test_jupyterlab_finds_its_settings_in_a_folder_with_a_space(clone):
    shown = "import os; print(os.environ['JUPYTER_CONFIG_PATH'])"
    (clone / "jupyter.py").write_text(shown)  # what `python -m jupyter` finds first
    command = ["make", "lab", "VENV=", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split(":")[0] == str(clone / "notebooks" / ".jupyter")


@pytest.mark.parametrize(("failing", "good"), [("none", True), ("tests/browser", False), ("-n", False), ("all", False)])
def test_all_tests_run_although_some_fail_and_any_failure_is_one(clone, failing, good):
    stand_in = (  # what `python -m pytest` finds first: it fails where its first argument is the failing one
        "import sys",
        "open('ran', 'a').write(' '.join(sys.argv[1:]) + '\\n')",
        f"sys.exit({failing!r} in ('all', sys.argv[1]))",
    )
    (clone / "pytest.py").write_text("\n".join(stand_in))
    command = ["make", "test", "VENV=", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    units, browser = (clone / "ran").read_text().splitlines()
    assert units.endswith("--ignore tests/browser")
    assert browser == "tests/browser"
    assert (done.returncode == 0) == good


def test_make_builds_its_environment_in_a_folder_with_a_space(clone):
    command = ["make", "-n", "train", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = [line for line in done.stdout.splitlines() if " -m venv " in line]
    assert [words(line, clone) for line in built] == [[sys.executable, "-m", "venv", ".venv"]]
