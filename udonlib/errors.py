"""What a user did wrong, in words: the error classes, the nearest valid name, pydantic's findings."""

import difflib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError


class UserError(ValueError):
    """A mistake that the user can mend: one message, and no traceback in a notebook."""


class ParameterError(UserError):
    """Problems with parameters, all of them at once. problems: name of the parameter -> what is wrong with it."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        self.problems = dict(problems)
        super().__init__("\n".join(f"parameter '{name}': {text}" for name, text in self.problems.items()))


def nearest(name: object, valid: Iterable[str]) -> str:
    """Say which valid name is closest to `name`, or list the valid names, not too many: the end of an error message."""
    names = sorted(valid)
    folded = {known.casefold(): known for known in names}
    close = difflib.get_close_matches(str(name).casefold(), folded, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{folded[close[0]]}'?"
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return "valid: " + (", ".join(names[:20]) or "none") + more


def misspelt(name: str, found: Iterable[str]) -> str:
    """Ask whether a name found was meant to be the missing one: "; is 'klass' meant to be 'class'?", or ""."""
    folded = {other.casefold(): other for other in found}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    return f"; is '{folded[close[0]]}' meant to be '{name}'?" if close else ""


def problems(model: type[BaseModel], error: ValidationError, values: Mapping[str, Any]) -> dict[str, str]:
    """Put pydantic's findings into words, one line for each parameter: its name -> what is wrong with it."""
    schemas = model.model_json_schema()["properties"]
    problems: dict[str, str] = {}
    for finding in error.errors():
        name = str(finding["loc"][0]) if finding["loc"] else ascii(finding["input"])  # a name that is no text
        cause = finding.get("ctx", {}).get("error")
        if isinstance(cause, ParameterError):
            problems.update(cause.problems)
        elif finding["type"] == "value_error":
            problems[name] = f"found {_short(values[name])}, {cause}"
        elif finding["type"] == "extra_forbidden" or name not in schemas:
            problems[name] = f"no such parameter; {nearest(name, [*schemas, 'preset'])}"
        else:
            found, choices = values[name], schemas[name].get("enum", ())
            hint = f"; {nearest(found, choices)}" if choices and "did" in nearest(found, choices) else ""
            kind = "" if found is None else f" ({type(found).__name__})"
            if isinstance(found, bool | float) and _takes_text(schemas[name]):
                hint = f"; a name that reads as a number or as true stays text in quotes, or by papermill's -r {name}"
            problems[name] = f"found {_short(found)}{kind}, expected {_expected(schemas[name])}{hint}"
    return problems


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _takes_text(schema: Mapping[str, Any]) -> bool:
    """Whether a JSON schema holds names that one is free to choose, one or a list of them."""
    inner = [*schema.get("anyOf", ()), *([schema["items"]] if isinstance(schema.get("items"), dict) else ())]
    return (schema.get("type") == "string" and "enum" not in schema) or any(map(_takes_text, inner))


def _expected(schema: Mapping[str, Any]) -> str:
    """Put a JSON schema of one value into words: 'a number > 0', 'one of 'a', 'b'', 'a list (each: text)'."""
    if "anyOf" in schema:
        return " or ".join(_expected(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(repr(choice) for choice in schema["enum"])
    if "$ref" in schema:
        return "a mapping of its own parameters"
    if "const" in schema:
        return repr(schema["const"])
    if "pattern" in schema:
        length = f", at most {schema['maxLength']} characters" if "maxLength" in schema else ""
        return f"text ({schema['description']}){length}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema]
    words = {"integer": "a whole number", "number": "a number", "boolean": "True or False", "string": "text"}
    words |= {"null": "None", "array": "a list", "object": "a mapping, such as {name: value}"}
    inner = schema.get("items") or schema.get("additionalProperties")
    each = f" (each: {_expected(inner)})" if isinstance(inner, dict) else ""
    return words[schema["type"]] + each + (" " + " and ".join(bounds) if bounds else "")


def friendly_errors() -> None:
    """Show a UserError in IPython as its message alone. The cell still fails, and so does papermill."""

    def show(shell: Any, kind: type, error: Exception, traceback: Any, tb_offset: int | None = None) -> list[str]:
        lines = [f"{kind.__name__}: {error}"]
        shell._showtraceback(kind, error, lines)
        return lines

    shell = ipython()
    if shell is not None:
        shell.set_custom_exc((UserError,), show)


def ipython() -> Any:
    """The IPython that runs this process; None where none does, and then it need not be installed."""
    module = sys.modules.get("IPython")
    return module.get_ipython() if module is not None else None
