"""Presets, and how a notebook's cells become checked parameters.

A preset is a file under params/: values that refine another preset, named by its key `preset:`, down to 'paper', the
models' defaults. A notebook adds the values of its parameters cell and those that papermill injects behind it.
"""

import ast
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from udonlib import home, plainyaml
from udonlib.bounds import long_name
from udonlib.errors import ParameterError, UserError, nearest
from udonlib.home import run_path
from udonlib.params import RECIPES, DataParams, TrainParams

Model = TypeVar("Model", bound=DataParams)
Layer = tuple[str, dict[str, Any]]  # where values were set ("" where that is plain), and the values


def load(preset: str | Path = "paper", /, **values: Any) -> TrainParams:
    """Read a preset, by name or by path of its file, and put `values` on top.

    Raises UserError naming the file and line, or the parameter and the file that set it.
    """
    return _build(TrainParams, [*_preset_layers(preset), ("", values)])


def own_values(preset: str | Path) -> dict[str, Any]:
    """Read what the file of a preset itself sets, without the preset that it refines: to put it on another one.

    Raises UserError as `load` does.
    """
    values = plainyaml.read_file(_find(preset, []), empty=True)
    values.pop("preset", None)
    return values


@overload
def from_notebook(cells: Sequence[str]) -> TrainParams: ...
@overload
def from_notebook(cells: Sequence[str], model: type[Model]) -> Model: ...
def from_notebook(cells: Sequence[str], model: type[DataParams] = TrainParams) -> DataParams:
    """Read the parameters of a notebook out of the cells that it has run (`In`).

    The preset that the notebook names, then the values of its parameters cell that are not None, then the values that
    papermill injected. With `replay` the parameters of that run, then what papermill injected. papermill accepts any
    name; this does not. Shows every later UserError as its message alone.

    Args:
        cells: sources of the cells in the order in which they ran; the last parameters cell counts. Empty ones, of a
            kernel that keeps no history: the values are those that the notebook's names have now.
        model: what to build.

    Raises:
        UserError: no parameters cell has run, or a name or value is not valid.
    """
    friendly_errors()
    known = {*model.model_fields, "preset"}
    own: dict[str, Any] | None = None
    injected: dict[str, Any] = {}
    for cell in cells:
        kind, assigned = _assignments(cell, known)
        if kind == "parameters":
            own, injected = assigned, {}
        elif kind == "injected":
            injected = injected | assigned
    if not any(cells):  # a kernel that keeps no history, such as nbval's
        own = _namespace(known)
    if own is None:
        raise UserError("no parameters cell has run: run the cell with the parameters first")
    chosen = {name: value for name, value in own.items() if value is not None}
    given = {**chosen, **injected}
    preset = given.get("preset", "paper")
    if given.get("replay") is not None and issubclass(model, TrainParams):
        # The parameters of the run to be repeated take the place of the preset and of the parameters cell.
        try:
            preset = str(run_path(str(given["replay"]), str(given.get("outputs", "auto"))) / "params.yaml")
        except UserError as error:
            raise UserError(f"parameter 'replay': {error}") from None
        kept = ("replay", "outputs", "device", "overwrite")
        chosen = {"run": "auto", "overwrite": False} | {name: chosen[name] for name in kept if name in chosen}
    layers = [("", {name: value for name, value in layer.items() if name != "preset"}) for layer in (chosen, injected)]
    # A misspelt name is reported even where its value is None, and so even where nobody has set it.
    layers.insert(0, ("", {name: None for name in own if name not in known}))
    return _build(model, [*_preset_layers(preset), *layers])


def friendly_errors() -> None:
    """Show a UserError in IPython as its message alone. The cell still fails, and so does papermill."""
    from IPython.core.getipython import get_ipython  # only notebooks need IPython

    def show(shell: Any, kind: type, error: Exception, traceback: Any, tb_offset: int | None = None) -> list[str]:
        lines = [f"{kind.__name__}: {error}"]
        shell._showtraceback(kind, error, lines)
        return lines

    shell = get_ipython()
    if shell is not None:
        shell.set_custom_exc((UserError,), show)


def _namespace(known: Iterable[str]) -> dict[str, Any] | None:
    """Read the parameters from the notebook's names, where the cells that set them are not known; None: there are none.

    Good enough right after the parameters cell, when no name has become something else yet.
    """
    from IPython.core.getipython import get_ipython  # only notebooks need IPython

    shell = get_ipython()
    names = shell.user_ns if shell is not None else {}
    wanted = {*known, *names.get("__annotations__", {})} & set(names)
    plain = str | int | float | dict | list | tuple | None
    return {name: names[name] for name in wanted if isinstance(names[name], plain)} or None


def _assignments(cell: str, known: Iterable[str]) -> tuple[str, dict[str, Any]]:
    """Tell whether a cell is the parameters cell or papermill's, and read what it assigns.

    The parameters cell holds assignments only, and annotates at least one known name; papermill's begins with its
    comment. Their right sides are evaluated anew, since a name like `run` may have become something else by now.
    """
    injected = cell.lstrip().startswith("# Parameters\n")
    try:
        body = ast.parse(cell).body
    except SyntaxError:
        return "other", {}
    if not body or not all(isinstance(line, ast.AnnAssign | ast.Assign) for line in body):
        return "other", {}
    annotated = {
        line.target.id for line in body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }
    if not injected and not annotated & set(known):
        return "other", {}
    values: dict[str, Any] = {}
    exec(compile(ast.Module(body, []), "<parameters>", "exec"), {"__builtins__": __builtins__}, values)
    values.pop("__annotations__", None)
    return "injected" if injected else "parameters", values


def _build(model: type[Model], layers: Sequence[Layer]) -> Model:
    """Build a model of values by layers, the later ones winning.

    A recipe takes back what layers below its own set and it fixes: `recipe: us_rr` on a preset of UDON is enough.
    """
    top = max((place for place, (_, values) in enumerate(layers) if "recipe" in values), default=0)
    recipe = layers[top][1].get("recipe") if layers else None
    fixed = RECIPES.get(recipe, {}) if isinstance(recipe, str) else {}
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for place, (where, values) in enumerate(layers):
        for name, value in values.items():
            if place >= top or name not in fixed:
                merged[name], origin[name] = value, where
    try:
        return model(**merged)
    except ParameterError as error:
        where_set = {name: f" (set in {origin[name]})" if origin.get(name) else "" for name in error.problems}
        raise ParameterError({name: text + where_set[name] for name, text in error.problems.items()}) from None


def _preset_layers(preset: object) -> list[Layer]:
    """Follow a preset to 'paper'. Returns the values of its files, the most refined last."""
    layers: list[Layer] = []
    chain: list[Path] = []
    while preset != "paper":
        path = _find(preset, chain)
        if path in chain:
            raise UserError(
                f"{chain[-1]}: preset '{preset}' refines itself: " + " -> ".join(p.stem for p in [*chain, path])
            )
        values = plainyaml.read_file(path, empty=True)
        chain.append(path)
        preset = values.pop("preset", "paper")
        layers.insert(0, (str(path), values))
    return layers


def _find(preset: object, chain: Sequence[Path]) -> Path:
    """Find the file of a preset: a name under params/, or a path, also relative to the file that refers to it."""
    place = f"{chain[-1]}: " if chain else ""
    if not isinstance(preset, str | Path) or not str(preset):
        raise UserError(f"{place}parameter 'preset': found {preset!r}, expected the name or the path of a preset")
    problem = long_name(str(preset))
    if problem:
        raise UserError(f"{place}parameter 'preset': {problem}")
    folders = [folder / "params" for folder in (home.working_folder(), home.SHARE)]
    if str(preset).endswith((".yaml", ".yml")):
        given = Path(preset).expanduser()
        candidates = [*(path.parent / given for path in chain[-1:]), given, home.SHARE / given]
    else:
        candidates = [folder / f"{preset}.yaml" for folder in folders]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    files = [(folder, path) for folder in folders for path in folder.rglob("*.yaml")]
    names = {"paper", *(path.relative_to(folder).with_suffix("").as_posix() for folder, path in files)}
    raise UserError(f"{place}no preset '{preset}'; {nearest(preset, names)}")
