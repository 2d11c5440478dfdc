"""Files of ours on a disk that may be full or read-only, beside other processes that write there.

Whatever is written, is written whole: `replacing`. A lock belongs to the process that holds it, and is free as soon as
that process ends, however it ends.

Of YAML only what JSON can say is read: text, numbers, true, false, null, lists and mappings. Tags, aliases, dates, sets
and numbers of base 60 are left out: with them a file of a few lines can take all memory, or mean what nobody meant. A
whole number is one only where writing it again gives the same text, and a key is always text: `run: 007` and a domain
called `no` keep their names. What `yaml.safe_dump` writes of such values reads back the same.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import yaml
from filelock import lock_descriptor

from udonlib.errors import ParameterError, UserError, nearest

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
POLL_SECONDS = 0.02  # between two attempts at a lock that another process holds
LOOKS, LOOK_SECONDS = 3, 0.001  # where two who look see each other: how often, and how long apart


class DiskError(UserError):
    """A file or folder that cannot be written: which, why, and how much room there is."""


class HeldError(UserError):
    """A lock that another process holds."""


def disk_error(path: Path, error: OSError, n_bytes: int = 0) -> DiskError:
    """Say what could not be written, why, and what to do.

    Args:
        n_bytes: size of what was to be written, where that is known.
    """
    text = f"{path}: cannot be written: {error.strerror or error}"
    if error.errno in FULL:
        with suppress(OSError):
            n_bytes = max(n_bytes, path.stat().st_size)
        there = next((folder for folder in path.parents if folder.is_dir()), Path())
        free = shutil.disk_usage(there).free
        text += f": it takes {_size(n_bytes)}, {_size(free)} are free there" if n_bytes else f": {_size(free)} are free"
        text += "; make room, or choose another folder of results (outputs=...)"
    elif error.errno == errno.ENAMETOOLONG:
        longest = max(path.parts, key=lambda part: len(os.fsencode(part)))
        text += f": {longest[:20]}... has {len(os.fsencode(longest))} bytes, most systems allow 255"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        text += "; get the right to write there, or choose another folder of results (outputs=...)"
    return DiskError(text)


def _size(n_bytes: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} GB"


@contextmanager
def writing(path: Path, n_bytes: int = 0) -> Iterator[None]:
    """Name the file or folder where the system refuses what is done to it. Raises: DiskError."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error, n_bytes) from error


class _File(io.FileIO):
    """A file that remembers why it could not be written: PyTorch's archives do not hand that on."""

    problem: OSError | None = None

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            self.problem = error
            raise


@contextmanager
def replacing(path: Path, n_bytes: int = 0, aside: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file that takes its place only when it is complete and on the disk.

    Args:
        n_bytes: about how much will be written, where that is known: said where the disk is full.
        aside: where to keep what was there before; None: nowhere.

    Raises:
        DiskError: "<file>: cannot be written: ..."; what was there before is still there then.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with writing(path, n_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = _File(temporary, "w")
    file = io.BufferedWriter(raw, 1 << 16)
    try:
        try:
            yield file
        except BaseException:
            if raw.problem is None:
                raise
            n_bytes = max(n_bytes, raw.tell())
            with suppress(OSError):  # first, so that the room it has taken counts as free
                temporary.unlink()
            raise disk_error(path, raw.problem, n_bytes) from raw.problem
        with writing(path, n_bytes):
            file.flush()
            os.fsync(raw.fileno())
            file.close()
            if aside is not None and path.exists():
                os.replace(path, aside)
            os.replace(temporary, path)
            _settle(path.parent)
    finally:
        with suppress(OSError):  # what did not fit is still in the buffer, and tries again
            file.close()
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _settle(folder: Path) -> None:
    """Have the names in a folder on the disk, too, where the system can."""
    with suppress(OSError):  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a text file whole."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file whole."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def remove(folder: Path, names: Iterable[str]) -> None:
    """Remove those of our files in a folder that exist, in this order, and what a process left that wrote them.

    Whatever else lies there stays: it is not ours.
    """
    for name in names:
        remove_leftovers(folder, name)
        with writing(folder / name):
            (folder / name).unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove what processes left that were killed while they wrote a file of ours."""
    for path in folder.glob(f"{name}.*.tmp"):
        if re.fullmatch(r"\.\d+\.tmp", path.name.removeprefix(Path(name).name)):
            with writing(path):
                path.unlink(missing_ok=True)


@contextmanager
def replacing_together(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Give a folder to write these files into; when all are written, they take their places in `folder`.

    What was there before stays until then, and goes as a whole: of a file that was not written anew, too. Whatever else
    lies there is not touched.

    Args:
        names: of our files; the last is the one without which the others do not count, so that no process that is
            killed on the way leaves old and new ones that pass for one whole.
    """
    *others, seal = names
    for left in folder.glob("new.*.tmp"):  # of a process that was killed
        remove(left, names)
        with suppress(OSError):
            left.rmdir()
    fresh = folder / f"new.{os.getpid()}.tmp"
    try:
        with writing(fresh):
            fresh.mkdir(parents=True, exist_ok=True)
        yield fresh
        with writing(folder):
            (folder / seal).unlink(missing_ok=True)
            for name in (*others, seal):
                if (fresh / name).exists():
                    os.replace(fresh / name, folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
            _settle(folder)
    finally:
        with suppress(OSError, DiskError):
            remove(fresh, names)
            fresh.rmdir()


def whole_lines(file: Path, start: int = 0) -> list[bytes]:
    """The lines of a file that were written to their end, without their ends; none of a file that is missing.

    The last one is left out while it is still being written, or where it was cut off: nobody is told of it here.

    Args:
        start: byte that the first line begins at; less than 0: counted from the file's end, and the line that it falls
            into is left out.
    """
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            begin = opened.seek(start if start >= 0 else max(0, size + start))
            lines = opened.read().split(b"\n")[:-1]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return lines[1:] if start < 0 and begin > 0 else lines


def take_lock(path: Path, seconds: float = math.inf) -> BinaryIO:
    """Hold a lock until the returned file is closed or this process ends.

    Raises:
        HeldError: another one holds it all these seconds.
        DiskError: the file cannot be made.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    until = time.monotonic() + seconds
    try:
        while not lock_descriptor(file.fileno(), blocking=False):
            if time.monotonic() >= until:
                raise HeldError(f"{path}: held by another process")
            time.sleep(POLL_SECONDS)
    except BaseException:
        file.close()
        raise
    return file


def is_held(path: Path) -> bool:
    """Whether a process holds this lock now. Looks only: nothing is written, and a missing file is no lock."""
    try:
        with path.open("rb") as file:
            if fcntl is not None:  # shared by all who look, which `filelock` cannot say
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
            for _ in range(LOOKS):
                if lock_descriptor(file.fileno(), blocking=False):
                    return False
                time.sleep(LOOK_SECONDS)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


MAX_NAME = 255  # bytes of a file's or folder's name, on every system in use


def long_name(path: str) -> str | None:
    """What is wrong with a path of which a part is longer than any system takes; None: nothing."""
    longest = max((len(part.encode("utf-8", "surrogateescape")) for part in re.split(r"[/\\]", path)), default=0)
    return f"found a name of {longest} bytes, expected at most {MAX_NAME}" if longest > MAX_NAME else None


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


def results_folder(outputs: str = "auto") -> Path:
    """Folder of all results: the project's, or another."""
    return working_folder() / "outputs" if outputs == "auto" else Path(outputs).expanduser().absolute()


def runs_folder(outputs: str = "auto") -> Path:
    """Folder of all runs."""
    return results_folder(outputs) / "runs"


def run_path(name: str, outputs: str = "auto", parameter: str = "run") -> Path:
    """Folder of an existing run, by its name or path.

    Args:
        parameter: the one that `name` was given by, for messages.

    Raises:
        ParameterError: "no run ..." with the nearest name.
    """
    folder, problem = runs_folder(outputs), long_name(name)
    if problem:
        raise ParameterError({parameter: f"no run {name[:40]!r}...: {problem}"})
    for path in (folder / name, Path(name).expanduser().absolute()):
        if (path / "params.yaml").exists():
            return path
    names = [path.parent.name for path in folder.glob("*/params.yaml")]
    hint = nearest(name, names) if names else "it holds no runs yet"
    raise ParameterError({parameter: f"no run {name!r} in {folder}; {hint}"})


def sources(data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    """What a parameter `data` names: one place, or those of a list, which text has in brackets.

    "[miniuned, my/folder, more.csv]" are three; a name with a comma stands in double quotes there.
    """
    if not isinstance(data, str | os.PathLike):
        return tuple(os.fspath(place) for place in data)
    text = os.fspath(data).strip()
    if not (text.startswith("[") and text.endswith("]")):
        return (os.fspath(data),)
    return tuple(part.strip() for part in next(csv.reader([text[1:-1]], skipinitialspace=True), []))


def located(data: Any) -> Any:
    """Write a path of data from the root, in one form: it is found from every folder, and `data/` is `data`.

    Several are text in brackets. None stays None, and the names that are no paths: "miniuned", which ships with the
    package, and "auto". What is no path is left for whoever checks types.

    Raises: ValueError for a list that is empty, or names something twice or not at all.
    """
    places = data if isinstance(data, list | tuple) else [data]
    if not all(isinstance(place, str | os.PathLike) for place in places) or data in ("", "miniuned", "auto"):
        return data
    paths = [path if path in ("", "miniuned") else os.path.abspath(os.path.expanduser(path)) for path in sources(data)]
    if len(set(paths)) < len(paths) or "" in paths or not paths or "auto" in sources(data):
        raise ValueError("expected one place, or a list of different ones: [miniuned, my/folder, more.csv]")
    quoted = ('"' + path.replace('"', '""') + '"' if "," in path or '"' in path else path for path in paths)
    return paths[0] if len(paths) == 1 else f"[{', '.join(quoted)}]"


# Ample for ten thousand domains with a share each, and read in seconds.
MAX_BYTES, MAX_VALUES, MAX_DEPTH = 1_000_000, 100_000, 20

TEXT = "tag:yaml.org,2002:str"


class _NotPlainError(yaml.MarkedYAMLError):
    """YAML that is right, and more than is read here."""


def _refusal(problem: str, at: Any) -> _NotPlainError:
    return _NotPlainError(problem=problem, problem_mark=at.start_mark)


class _Loader(yaml.SafeLoader):
    """PyYAML's loader, refusing what is not plain while it is read, before anything has grown."""

    yaml_implicit_resolvers: ClassVar[dict] = {}  # a part of PyYAML's: see below
    _n_values = _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self._n_values, self._depth = self._n_values + 1, self._depth + 1
        if isinstance(event, yaml.AliasEvent):
            raise _refusal(f"found the alias *{event.anchor}, expected the value itself", event)
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise _refusal(f"found the tag {tag}, expected a plain value, a list or a mapping", event)
        if self._depth > MAX_DEPTH:
            raise _refusal(f"found lists and mappings more than {MAX_DEPTH} deep", event)
        if self._n_values > MAX_VALUES:
            raise _refusal(f"found more than {MAX_VALUES:,} values", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refusal("found a list or a mapping as a name", key)
            if key.value in lines:
                raise _refusal(f"'{key.value}' is set twice, first in line {lines[key.value]}", key)
            lines[key.value], key.tag = key.start_mark.line + 1, TEXT
        return node


for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"0|-?[1-9][0-9]{0,399}", list("-0123456789")),
    ("float", r"-?(0|[1-9][0-9]*)\.[0-9]+([eE][-+][0-9]+)?", list("-0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$"), _first)


def read_yaml_text(text: str) -> Any:
    """Read one value. Raises UserError naming the line."""
    return _read(text)


def read_yaml(path: Path, empty: bool = False) -> dict[str, Any]:
    """Read a file of lines 'name: value'; empty: it may hold none. Raises UserError naming file and line."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text: byte 0x{content[error.start]:02x}") from None
    values = _read(text, path)
    if values is None and not empty:
        raise UserError(f"{path}: expected lines of the form 'name: value', found none")
    return values or {}


def _read(text: str, path: Path | None = None) -> Any:
    try:
        if len(text) > MAX_BYTES:
            raise yaml.YAMLError(f"found more than {MAX_BYTES:,} characters")
        loader = _Loader(text)
        node = loader.get_single_node()
        if path is not None and not isinstance(node, yaml.MappingNode | None):
            raise _refusal("expected lines of the form 'name: value'", node)
        return None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        what = "" if isinstance(error, _NotPlainError) else "not valid YAML: "
        raise UserError(f"{f'{path}, ' if path else ''}line {line}: {what}{error.problem}") from None
    except yaml.YAMLError as error:  # too long, or characters that are none
        raise UserError(f"{f'{path}: ' if path else ''}not valid YAML: {error}") from None
