"""What tells runs apart, in words: `udon no_kl, seed 0` beside the folder's name `udon-miniuned-s0-435c67`."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from udonlib.errors import UserError
from udonlib.files import SHARE, working_folder
from udonlib.params import WITHOUT_EFFECT, TrainParams
from udonlib.presets import own_values

HERE = {*WITHOUT_EFFECT, "recipe", "data", "images", "domains"}  # said otherwise, or without effect
ABLATIONS = "params/ablations"
N_IN_TITLE = 2  # parameters that a title names


def unusual(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Each run's parameters whose value is not what most of these runs of the same recipe have.

    Where two values are as frequent, the one that is the default counts as the usual one, else the one that is more
    frequent among all runs.

    Args:
        runs: recipe, and every parameter.
    """
    of_recipe: dict[tuple[str, str], Counter[str]] = {}
    of_all: dict[str, Counter[str]] = {}
    for recipe, values in runs:
        for name in values.keys() - HERE:
            value = repr(values[name])
            of_recipe.setdefault((recipe, name), Counter())[value] += 1
            of_all.setdefault(name, Counter())[value] += 1
    fields = TrainParams.model_fields
    default = {name: repr(fields[name].get_default()) if name in fields else "" for name in of_all}
    usual = {
        key: max(counts, key=lambda v: (counts[v], v == default[key[1]], of_all[key[1]][v], v))
        for key, counts in of_recipe.items()
    }
    return [
        {name: value for name, value in values.items() if name not in HERE and repr(value) != usual[recipe, name]}
        for recipe, values in runs
    ]


def title(recipe: str, changes: Mapping[str, Any], seed: int | None = None, data: str = "") -> str:
    """Name a run by its recipe, by what is unusual about it, and by its seed.

    Args:
        changes: as of `unusual`. What one of the ablations under params/ sets has that one's name.
        data: where that is unusual, too.
    """
    name, rest = ablation(changes)
    words = [f"{key} {in_short(value, 24)}" for key, value in [*rest.items()][:N_IN_TITLE]]
    words += [f"{len(rest) - N_IN_TITLE} more"] if len(rest) > N_IN_TITLE else []
    words += [data] if data else []
    words += [] if seed is None else [f"seed {seed}"]
    return ", ".join([f"{recipe or 'unknown'} {name}".rstrip(), *words])


def ablation(changes: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The ablation that sets the most of these changes and nothing else, and the changes that it does not set."""
    fitting = [
        (name, values)
        for name, values in _ablations().items()
        if values and all(key in changes and _plain(changes[key]) == value for key, value in values.items())
    ]
    name, values = max(fitting, key=lambda one: len(one[1]), default=("", {}))
    return name, {key: value for key, value in changes.items() if key not in values}


@functools.cache
def _ablations() -> dict[str, dict[str, Any]]:
    """What each ablation sets besides the recipe; one that cannot be read names nothing."""
    found: dict[str, dict[str, Any]] = {}
    for home in (SHARE, working_folder()):
        for path in sorted((home / ABLATIONS).glob("*.yaml")):
            try:
                values = own_values(path)
            except UserError:
                continue
            found[path.stem] = {name: _plain(value) for name, value in values.items() if name not in HERE}
    return found


def in_short(value: Any, most: int = 40) -> str:
    """Write a parameter's value in few signs: of a mapping its names, of a path its end, 2000.0 as 2000."""
    if isinstance(value, Mapping):
        text = ", ".join(map(str, value)) if value else "none"
    elif isinstance(value, list | tuple):
        text = ", ".join(map(in_short, value)) if value else "none"
    elif isinstance(value, float):
        text = f"{value:g}"
    elif isinstance(value, str):
        text = value.rstrip("/").rpartition("/")[2] or value
    else:
        text = json.dumps(value, default=str)
    return text if len(text) <= most else text[: most - 3] + "..."


def _plain(value: Any) -> Any:
    """A value as JSON has it, so that what was saved and what stands in a preset compare."""
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return {name: _plain(part) for name, part in value.items()} if isinstance(value, Mapping) else value
