"""Presets, what each notebook takes, and how its cells become checked parameters. Training's stand in `params`.

A preset is a file under params/: values that refine another preset, named by its key `preset:`, down to 'paper', the
models' defaults. A notebook adds the values of its parameters cell and those that papermill injects behind it.
"""

import ast
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from pydantic import Field, field_validator, model_validator

from udonlib import files
from udonlib.errors import ParameterError, UserError, friendly_errors, ipython, nearest
from udonlib.fields import (
    ComputeParams,
    DataParams,
    Device,
    FolderName,
    Images,
    Metric,
    Neighbours,
    NotNegative,
    Positive,
    Processes,
    ResultParams,
    RunDataParams,
    Seed,
    Shown,
    Steps,
    Strategy,
    UnevenParams,
    different,
)
from udonlib.files import long_name, run_path
from udonlib.params import RECIPES, TrainParams

Model = TypeVar("Model", bound=DataParams)
PRESET = "parameter 'preset': "
Rule = Literal["dynamic", "relative_loss", "remaining_loss", "progress"]  # dynamic allocations that can be simulated
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
    values = files.read_yaml(_find(preset), empty=True)
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
        preset = str(run_path(str(given["replay"]), str(given.get("outputs", "auto")), "replay") / "params.yaml")
        kept = ("replay", "outputs", "device", "overwrite")
        chosen = {"run": "auto", "overwrite": False} | {name: chosen[name] for name in kept if name in chosen}
    layers = [("", {name: value for name, value in layer.items() if name != "preset"}) for layer in (chosen, injected)]
    # A misspelt name is reported even where its value is None, and so even where nobody has set it.
    layers.insert(0, ("", {name: None for name in own if name not in known}))
    return _build(model, [*_preset_layers(preset, PRESET), *layers])


def _namespace(known: Iterable[str]) -> dict[str, Any] | None:
    """Read the parameters from the notebook's names, where the cells that set them are not known; None: there are none.

    Good enough right after the parameters cell, when no name has become something else yet.
    """
    shell = ipython()
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


def _preset_layers(preset: object, place: str = "") -> list[Layer]:
    """Follow a preset to 'paper'. Returns the values of its files, the most refined last.

    Args:
        place: what stands before a message on the first preset, which no file names.
    """
    layers: list[Layer] = []
    chain: list[Path] = []
    while preset != "paper":
        path = _find(preset, chain, place)
        if path in chain:
            raise UserError(
                f"{chain[-1]}: preset '{preset}' refines itself: " + " -> ".join(p.stem for p in [*chain, path])
            )
        values = files.read_yaml(path, empty=True)
        chain.append(path)
        preset = values.pop("preset", "paper")
        layers.insert(0, (str(path), values))
    return layers


def _find(preset: object, chain: Sequence[Path] = (), place: str = "") -> Path:
    """Find the file of a preset: a name under params/, or a path, also relative to the file that refers to it."""
    file = f"{chain[-1]}: " if chain else ""
    if not isinstance(preset, str | Path) or not str(preset):
        raise UserError(f"{file}{PRESET}found {preset!r}, expected the name or the path of a preset")
    problem = long_name(str(preset))
    if problem:
        raise UserError(f"{file}{PRESET}{problem}")
    folders = [folder / "params" for folder in (files.working_folder(), files.SHARE)]
    if str(preset).endswith((".yaml", ".yml")):
        given = Path(preset).expanduser()
        candidates = [*(path.parent / given for path in chain[-1:]), given, files.SHARE / given]
    else:
        candidates = [folder / f"{preset}.yaml" for folder in folders]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    files_there = [(folder, path) for folder in folders for path in folder.rglob("*.yaml")]
    names = {"paper", *(path.relative_to(folder).with_suffix("").as_posix() for folder, path in files_there)}
    raise UserError(f"{file or place}no preset '{preset}'; {nearest(preset, names)}")


class GapParams(RunDataParams):
    """What gaps.ipynb compares: student, teachers and specialists of a finished run. Nothing is trained."""

    run: str = Field(
        "latest", min_length=1, description="name or path of a run with teachers; 'latest': it finished last"
    )
    specialists: str = Field(
        "auto",
        min_length=1,
        description="runs of one domain each: a pattern of names, a preset, 'auto' (recipe 'specialist') or 'none'",
    )
    k: Neighbours = Field(5, description="neighbours of each list that are compared and shown")
    n_bins: Shown = Field(4, description="groups of queries by the frequency of their class")
    n_queries: Shown = Field(8, description="queries in each gallery, shared by the domains")
    seed: Seed = Field(0, description="seed of the galleries' choice and of the bootstrap")


class CheckParams(UnevenParams):
    """How thoroughly data.ipynb checks, and for which run it says what this data needs."""

    deep: bool = Field(False, description="read and decode every image, however long that takes")
    seconds: Positive = Field(60.0, description="after which no more images are read, unless `deep`")
    plan: str = Field("miniuned", min_length=1, description="preset of the run whose reading and memory are estimated")
    seed: Seed = Field(0, description="seed of the order in which images are read, and of the samples")


class EvaluateParams(ComputeParams):
    """What evaluate.ipynb evaluates: one of a run, a checkpoint, and descriptors made elsewhere."""

    data: str = Field(
        "auto", min_length=1, description="'auto': the run's own, or miniuned where there is none; or a folder or zip"
    )
    run: str | None = Field(None, min_length=1, description="name or path of a run; 'latest': its model was kept last")
    checkpoint: str | None = Field(None, min_length=1, description="a run's .pt, or a checkpoint of the reference")
    descriptors: str | None = Field(
        None, min_length=1, description="vectors of the images: .json, .npz, or UnED's descriptors_step_N.pkl"
    )
    subset: Literal["test", "val"] = Field("test", description="the queries, with the index that they search")
    all_as_test: bool = Field(False, description="every image of the data is a test query, whatever its split or class")
    k: Neighbours = Field(5, description="neighbours counted by mMP@k")
    metrics: tuple[Metric, ...] = Field(
        ("map_at_5", "r_at_5", "r_at_20"), description="beside R@1 and mMP@k: r_at_<k>, mmp_at_<k>, map_at_<k>"
    )
    save_descriptors: bool = Field(False, description="write the student's embeddings of every split as well")
    name: FolderName = Field("auto", description="folder under outputs/evaluations; 'auto': from what is evaluated")
    overwrite: bool = Field(False, description="evaluate anew where the folder holds an evaluation already")
    seed: Seed = Field(0, description="seed of the bootstrap and of the gallery's choice")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the backbone; 'auto': the run's, or float32 where there is none"
    )
    eval_batch_size: Images = Field(256, ge=1, description="images per step of embedding")
    on_bad_image: Literal["error", "skip"] = Field(
        "error", description="stop at an image that cannot be read, or leave it out of queries and index"
    )
    cache_images: bool = Field(True, description="keep decoded images in memory where they fit")

    @classmethod
    def implied(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The latest run, where nothing is named that could be evaluated."""
        return {} if {"run", "checkpoint", "descriptors"} & values.keys() else {"run": "latest"}

    @model_validator(mode="after")
    def _one_source(self) -> "EvaluateParams":
        given = [name for name in ("run", "checkpoint", "descriptors") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            text = f"found {found} of run, checkpoint and descriptors, expected exactly one"
            raise ParameterError({given[-1] if given else "run": text})
        if self.all_as_test and self.subset != "test":
            raise ParameterError({"all_as_test": f"found True beside subset {self.subset!r}: only test is left"})
        if self.descriptors and self.save_descriptors:
            raise ParameterError({"save_descriptors": "found True, but descriptors are given: there is no model"})
        return self


class GridParams(ResultParams):
    """What ablations.ipynb runs and compares: rows, each a small change of one base preset, times seeds."""

    rows: tuple[str, ...] = Field(
        ("table",),
        description="'table' (those of RESULTS.md), 'all' (params/ablations, of the base's kind), recipes and presets",
    )
    base: str = Field("miniuned_pretrained", min_length=1, description="name or path of the preset that rows change")
    seeds: tuple[Seed, ...] = Field((0, 1, 2), description="seeds of each row")
    baseline: str = Field("udon", min_length=1, description="row that the others are compared with; it always runs")
    jobs: Processes = Field(1, ge=1, description="runs at a time; they share the CPU's cores")
    steps: Steps | None = Field(
        None, ge=1, description="steps of every row that does not set its own; None: as the base says"
    )
    grid: FolderName = Field("auto", description="folder under outputs/ablations; 'auto': from the rows and the base")
    n_threads: Processes = Field(0, ge=0, description="threads of each run; 0: the cores, shared by `jobs`")
    train: Literal["auto", "yes", "no"] = Field(
        "auto", description="whether to train what is missing; 'auto': unless a person looks, who is shown the plan"
    )
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")

    _different = field_validator("rows", "seeds")(different)


class SamplerParams(RunDataParams):
    """What sampler.ipynb simulates and compares. Nothing is trained. None: as the run whose curves are fitted says."""

    run: str = Field(
        "auto",
        min_length=1,
        description="name or path of a finished run to fit the learning curves to; 'latest': the last of several "
        "domains that finished, if there is one a dynamic one without offline teachers; 'drawn': none, they come from "
        "numbers of classes and images; 'auto': 'latest' where there is one, else 'drawn'",
    )
    start_loss: dict[str, Positive] = Field(
        {}, description="domain -> loss before its first image, where it is to be another than fitted or drawn"
    )
    floor_loss: dict[str, NotNegative] = Field(
        {}, description="domain -> loss that endless training would reach, the same"
    )
    half_images: dict[str, Positive] = Field(
        {}, description="domain -> images of it after which its loss is halfway to the floor, the same"
    )
    strategies: tuple[Strategy | Rule, ...] = Field(
        ("dynamic", "round_robin", "balanced", "dataset_size"),
        description="strategies side by side; a dynamic one may be named by its signal: 'relative_loss'",
    )
    fixed_shares: dict[str, NotNegative] = Field(
        {}, description="domain -> share of steps for 'fixed', any scale; {}: equal"
    )
    steps: Steps | None = Field(None, ge=1, description="optimizer steps")
    batch_size: Images | None = Field(None, ge=1, description="images per step")
    domains_per_batch: Images | None = Field(None, ge=1, description="equal parts of a batch, each of one domain")
    update_every: Steps | None = Field(
        None, ge=1, description="steps per window, between two updates of the allocation"
    )
    sampler_smoothing: float | None = Field(
        None, ge=0, lt=1, description="share of the old allocation in each update of the dynamic one"
    )
    sampler_floor: float | None = Field(None, ge=0, lt=1, description="part of the dynamic one that is shared equally")
    sampler_alpha: float | None = Field(None, ge=0, le=1, description="of 'temperature': shares as images^alpha")
    sampler_init: Strategy | None = Field(None, description="allocation of the dynamic sampler's first window")
    check: str = Field(
        "auto",
        min_length=1,
        description="dynamic run whose recorded allocation the simulation is held against; 'latest': it finished last; "
        "'auto': that of `run`",
    )
    runs: tuple[str, ...] = Field(
        ("auto",),
        description="runs whose allocations are overlaid: names or patterns with commas; 'latest', the last that "
        "finished; 'auto': that of `run` and its other seeds",
    )
    seed: Seed | None = Field(None, description="seed of the schedules")

    _different = field_validator("strategies", "runs")(different)


class EmbeddingsParams(RunDataParams, ComputeParams):
    """What embeddings.ipynb shows: the test images of a finished run in two dimensions, and who is near whom."""

    run: str = Field("latest", min_length=1, description="name or path of a run; 'latest': it finished last")
    embedder: Literal["student", "teacher"] = Field(
        "student", description="whose neighbours, hubs and confusions are shown; the map shows both"
    )
    projection: Literal["quick", "umap", "pca"] = Field("quick", description="quick: seconds; umap: minutes; or pca")
    max_points: Images = Field(25_000, ge=10, description="images on the map; of more, an equal number of each domain")
    k: Neighbours = Field(5, description="neighbours of each query that count and are shown")
    n_hubs: int = Field(8, ge=1, le=40, description="hubs of the index that are shown")
    umap_neighbours: int = Field(15, ge=2, le=200, description="UMAP: neighbours that a point keeps close; few: detail")
    umap_distance: float = Field(0.1, ge=0, le=1, description="UMAP: how close points may come; 0: the tightest clumps")
    seed: Seed = Field(0, description="seed of the choice of points and of UMAP")


class RunsParams(ResultParams):
    """What runs.ipynb lists, and which two runs it compares."""

    data: str = Field(
        "auto", min_length=1, description="'auto': the runs'; or the folder or zip where their data is now"
    )
    runs: str = Field("all", min_length=1, description="pattern of the names to list, such as 'udon*'; or 'all'")
    run_a: str = Field(
        "auto",
        min_length=1,
        description="name or path of a run; 'latest': it trains, or wrote last; 'auto': the best of another recipe",
    )
    run_b: str = Field("auto", min_length=1, description="the same of B; 'auto': the best one")
    run: str | None = Field(None, min_length=1, description="B by the name that other notebooks have for a run")
    smoothing: float = Field(0.0, ge=0, lt=1, description="of the curves at first: weight of what was, 0 to 1")
    log_axis: bool = Field(False, description="whether losses, rate and gradient have logarithmic axes at first")
    k: Neighbours = Field(5, description="neighbours that the galleries show of each list")
    n_queries: Shown = Field(8, description="queries in each gallery, shared by the domains")
    seed: Seed = Field(0, description="seed of the galleries' choice")


class SteerParams(ResultParams):
    """Which run steer.ipynb looks at and steers."""

    run: str = Field(
        "latest", min_length=1, description="name or path of a run; 'latest': the one that trains, or wrote last"
    )
