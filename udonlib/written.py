"""What a value means that was written as text, or that papermill took for a number, by the type of its parameter.

papermill's `-p` passes text, except what Python takes for a number, True, False or None: `-p nested_dims 8,16` is text,
and `-p run 2024` a number.
"""

import re
from collections.abc import Mapping
from os import PathLike, fspath
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from udonlib import plainyaml
from udonlib.errors import UserError


def read_as(kind: Any, value: Any) -> Any:
    """Read a value as what a type holds; what does not fit is left as it is, for whoever checks types.

    Args:
        kind: a parameter's annotation. Of `Literal["all"] | tuple[str, ...]` and `float | None` the part counts that
            text can be read as.
        value: as it was written. Lists are text with commas or in brackets, mappings text in braces, and numbers may
            have YAML's or Python's forms (1e-3, 50_000). A whole number is a name where a name is expected; another
            number is none, since 1.10 and 12e4567 are not what they were any more.
    """
    for part in _parts(kind):
        origin = get_origin(part)
        if origin is tuple:
            return _read_list(get_args(part)[0], value)
        if origin is dict:
            return _read_mapping(get_args(part)[1], value)
        if part in (int, float):
            return _read_number(value)
        if part is str and isinstance(value, PathLike):
            return fspath(value)
        if part is str and isinstance(value, int) and not isinstance(value, bool):
            return str(value)
    return value


def _parts(kind: Any) -> tuple[Any, ...]:
    """The types that a parameter may have, without the bounds that are annotated."""
    if get_origin(kind) is Annotated:
        return _parts(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return tuple(inner for part in get_args(kind) for inner in _parts(part))
    return (kind,)


def _read_list(kind: Any, value: Any) -> Any:
    if isinstance(value, str):
        plain = _plain(value, "[")
        value = [part.strip() for part in value.split(",")] if plain is None else plain
    elif isinstance(value, int | float) and not isinstance(value, bool):
        value = [value]
    return [read_as(kind, item) for item in value] if isinstance(value, list | tuple) else value


def _read_mapping(kind: Any, value: Any) -> Any:
    plain = _plain(value, "{") if isinstance(value, str) else value
    if not isinstance(plain, Mapping):
        return value
    return {read_as(str, name): read_as(kind, item) for name, item in plain.items()}


def _plain(text: str, bracket: str) -> Any:
    """What text in brackets holds; None where it is none."""
    try:
        return plainyaml.read_text(text) if text.lstrip().startswith(bracket) else None
    except UserError:
        return None


def _read_number(value: Any) -> Any:
    """The number that text is, if it is one; True is left to be refused as text, and does not pass for 1."""
    if not isinstance(value, str | bool) or len(str(value)) > 400:  # Python reads no thousands of digits
        return value
    text = str(value).strip()
    if re.fullmatch(r"[-+]?\d+(_\d+)*", text):
        return int(text)
    if re.fullmatch(r"[-+]?(\d+(_\d+)*\.?\d*|\.\d+)([eE][-+]?\d+)?", text):
        return float(text)
    return str(value)
