"""Parse and check one info file of a benchmark: a JSON list of {"path", "class_id", "class"?, "source"?}.

A file may hold millions of entries, so that they are scanned in blocks: only paths and labels stay in memory, a block
is checked with a few passes over its columns, and entries are looked at one by one only where something is wrong.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from udonlib.data.storage import UNSAFE_PATH, DataError, path_problem
from udonlib.errors import misspelt

BLOCK = 1 << 14  # entries
MAX_CLASS_ID = 2**63 - 1


def read_info_file(content: bytes, file: str) -> tuple[list[str], list[int | list[int]], dict[int, str]]:
    """Return paths, class ids (one, or a list of several) and the classes' names.

    Args:
        content: the file's bytes. Keys other than the four above are ignored.
        file: its name, for messages.

    Raises: DataError with the file, the entry's number from 0, what was found and what is valid: not a JSON list, a
        missing key, a wrong type, a path that leaves the root or stands there twice, two names for one class, no entry.
    """
    paths: list[str] = []
    ids: list[int | list[int]] = []
    class_names: dict[int, str] = {}
    for block in _blocks(content, file):
        if not _is_plain(block):
            for number, entry in enumerate(block, start=len(paths)):
                if problem := entry_problem(entry):
                    raise DataError(f"{file}, entry {number} (from 0): {problem}")
        for number, entry in enumerate(block, start=len(paths)):
            if "class" in entry and isinstance(entry["class_id"], int):
                label, name = entry["class_id"], entry["class"]
                if (known := class_names.setdefault(label, name)) != name:
                    problem = f"class_id {label} is called '{name}' here and '{known}' in an earlier entry"
                    raise DataError(f"{file}, entry {number} (from 0): {problem}")
        paths.extend([entry["path"] for entry in block])
        ids.extend([entry["class_id"] for entry in block])
    if not paths:
        raise DataError(f"{file}: the list is empty; expected one entry at least")
    if len(set(paths)) < len(paths):
        first: dict[str, int] = {}
        number = next(i for i, path in enumerate(paths) if first.setdefault(path, i) != i)
        problem = f"path '{paths[number]}' stands in entry {first[paths[number]]} already"
        raise DataError(f"{file}, entry {number} (from 0): {problem}")
    return paths, ids, class_names


def entry_problem(entry: Any) -> str | None:
    """Say what is wrong with one entry of an info file, or None where nothing is."""
    if not isinstance(entry, dict):
        return f"expected an object with path and class_id, found {entry!r:.60}"
    for key in ("path", "class_id"):
        if key not in entry:
            return f"key '{key}' is missing; found: {', '.join(entry) or 'none'}{misspelt(key, entry)}"
    for key in ("path", "class", "source"):
        if not isinstance(entry.get(key, ""), str):
            return f"{key} must be a string, found {entry[key]!r:.60}"
    if problem := path_problem(entry["path"]):
        return problem
    labels = entry["class_id"] if isinstance(entry["class_id"], list) else [entry["class_id"]]
    if not labels or any(type(label) is not int or not 0 <= label <= MAX_CLASS_ID for label in labels):
        return f"class_id must be an integer >= 0 or a list of such, found {entry['class_id']!r:.60}"
    if len(set(labels)) < len(labels):
        return f"class_id names a class twice: {labels!r:.60}"
    return None


def _is_plain(block: list[Any]) -> bool:
    """Say whether no entry can have a problem, by a few passes over the block; False only asks for a closer look."""
    if set(map(type, block)) != {dict}:
        return False
    paths = [entry.get("path") for entry in block]
    ids = [entry.get("class_id") for entry in block]
    texts = [entry[key] for key in ("class", "source") for entry in block if key in entry]
    if set(map(type, paths)) != {str} or set(map(type, ids)) != {int} or not set(map(type, texts)) <= {str}:
        return False
    joined = "\n".join(paths)
    plain_paths = joined.count("\n") == len(paths) - 1 and UNSAFE_PATH.search(joined) is None
    return plain_paths and min(ids) >= 0 and max(ids) <= MAX_CLASS_ID


_SPACE = re.compile(r"[ \t\r\n]*")


def _blocks(content: bytes, file: str) -> Iterator[list[Any]]:
    """Yield the elements of a JSON list, up to `BLOCK` at a time."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text: {error}") from error
    scan: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder())["scan_once"]

    def after_space(at: int) -> int:
        return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # an empty match is a match

    at = after_space(0)
    if text[at : at + 1] != "[":
        raise DataError(f"{file}: expected a JSON list of entries, found {text[at : at + 20] or 'nothing'!r}")
    at = after_space(at + 1)
    block: list[Any] = []
    number, closed = 0, text[at : at + 1] == "]"
    while not closed:
        try:
            entry, at = scan(text, at)
        except (StopIteration, ValueError, RecursionError) as error:
            raise DataError(f"{file}, entry {number} (from 0): broken JSON at or after character {at}") from error
        block.append(entry)
        if len(block) == BLOCK:
            yield block
            block = []
        at = after_space(at)
        closed = text[at : at + 1] == "]"
        if not closed:
            if text[at : at + 1] != ",":
                raise DataError(f"{file}, entry {number} (from 0): neither a comma nor the list's end follows it")
            at = after_space(at + 1)
            number += 1
    if rest := text[after_space(at + 1) :]:
        raise DataError(f"{file}: more text after the list: {rest[:20]!r}")
    if block:
        yield block
