"""YAML, of which only what JSON can say is read: text, numbers, true, false, null, lists and mappings.

Tags, aliases, dates, sets and numbers of base 60 are left out: with them a file of a few lines can take all memory, or
mean what nobody meant. A whole number is one only where writing it again gives the same text, and a key is always text:
`run: 007` and a domain called `no` keep their names. What `yaml.safe_dump` writes of such values reads back the same.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from udonlib.errors import UserError

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


def read_text(text: str) -> Any:
    """Read one value. Raises UserError naming the line."""
    return _read(text)


def read_file(path: Path, empty: bool = False) -> dict[str, Any]:
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
