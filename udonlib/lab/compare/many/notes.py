"""What a person noted of a run: a sentence, tags, and whether it is put away; in the run's folder, as notes.json.

Nothing that trains or evaluates reads the file, and only `change` writes it.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from udonlib.errors import ParameterError, nearest
from udonlib.files import runs_folder, write_json

NOTES = "notes.json"
MOST = 2000  # signs of a note or of a tag


@dataclass(frozen=True)
class Note:
    """A note in words, tags, and whether the run is archived: not listed, unless somebody asks for it."""

    text: str = ""
    tags: tuple[str, ...] = ()
    archived: bool = False


def read(folder: Path) -> Note:
    """The note of a run; an empty one where there is none. Raises ValueError where the file is damaged."""
    file = folder / NOTES
    if not file.exists():
        return Note()
    try:
        found = json.loads(file.read_text("utf-8"))
    except RecursionError:
        raise ValueError("lists and mappings too deep") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected names and values, found {type(found).__name__}")
    text, tags, archived = (found.get(name, default) for name, default in asdict(Note()).items())
    if not isinstance(text, str) or not isinstance(tags, list | tuple) or not isinstance(archived, bool):
        raise ValueError("expected a text, a list of tags, and true or false")
    return Note(text, tuple(map(str, tags)), archived)


def change(
    pattern: str,
    text: str | None = None,
    tags: str | Iterable[str] | None = None,
    archived: bool | None = None,
    outputs: str = "auto",
) -> list[str]:
    """Note something of runs, or put them away; what is None stays as it is. Returns their names.

    Args:
        pattern: a run's name, or one such as "smoke-*".
        text: the note; "" takes it away.
        tags: words, or one text with commas.
        archived: True hides the run from the table and from what is chosen by itself; nothing is deleted.
        outputs: folder of results; "auto": the project's outputs/.

    Raises:
        ParameterError: no run is called so, with the nearest name; a text is too long.
    """
    home = runs_folder(outputs)
    names = sorted(path.parent.name for path in home.glob("*/params.yaml"))
    found = [name for name in names if name == pattern] or fnmatch.filter(names, pattern)
    if not found:
        raise ParameterError({"pattern": f"no run in {home} is called {pattern!r}; {nearest(pattern, names)}"})
    words = tags.split(",") if isinstance(tags, str) else tags
    known = None if words is None else tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
    for name, value in (("text", text or ""), ("tags", ", ".join(known or ()))):
        if len(value) > MOST:
            raise ParameterError({name: f"found {len(value):,} signs, expected at most {MOST:,}"})
    given: dict[str, Any] = {"text": text, "tags": known, "archived": archived}
    for name in found:
        try:
            before = read(home / name)
        except ValueError:  # a damaged note gives way to a whole one
            before = Note()
        write_json(
            home / name / NOTES,
            asdict(replace(before, **{key: value for key, value in given.items() if value is not None})),
        )
    return found
