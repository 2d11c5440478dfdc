"""The parameters of the notebooks that look at results, such as gaps.ipynb; training's are in `params`."""

import hashlib
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from udonlib.bounds import Device, FolderName, Images, Neighbours, NotNegative, Positive, Processes, Seed, Shown, Steps
from udonlib.dataparams import DataParams, different
from udonlib.errors import ParameterError
from udonlib.home import results_folder
from udonlib.params import Strategy


class GapParams(DataParams):
    """What gaps.ipynb compares: student, teachers and specialists of a finished run. Nothing is trained."""

    data: str = Field("auto", min_length=1, description="'auto': the run's; or the folder or zip where its data is now")
    run: str = Field(
        "latest", min_length=1, description="name or path of a finished run; 'latest': the last one with teachers"
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
    outputs: str = Field("auto", min_length=1, description="folder of results; 'auto': the project's outputs/")


class CheckParams(DataParams):
    """How thoroughly data.ipynb checks, and for which run it says what this data needs."""

    deep: bool = Field(False, description="read and decode every image, however long that takes")
    seconds: Positive = Field(60.0, description="after which no more images are read, unless `deep`")
    plan: str = Field("miniuned", min_length=1, description="preset of the run whose reading and memory are estimated")
    seed: Seed = Field(0, description="seed of the order in which images are read, and of the samples")


class EvaluateParams(DataParams):
    """What evaluate.ipynb evaluates: one of a run, a checkpoint, and descriptors made elsewhere."""

    data: str = Field(
        "auto", min_length=1, description="'auto': the run's own, or miniuned where there is none; or a folder or zip"
    )
    run: str | None = Field(None, min_length=1, description="name or path of a run, or 'latest': its best checkpoint")
    checkpoint: str | None = Field(None, min_length=1, description="a run's .pt, or a checkpoint of the reference")
    descriptors: str | None = Field(
        None, min_length=1, description="vectors of the images: .json, .npz, or UnED's descriptors_step_N.pkl"
    )
    subset: Literal["test", "val"] = Field("test", description="the queries, with the index that they search")
    all_as_test: bool = Field(False, description="every image of the data is a test query, whatever its split or class")
    k: Neighbours = Field(5, description="neighbours counted by mMP@k")
    save_descriptors: bool = Field(False, description="write the student's embeddings of every split as well")
    name: FolderName = Field(
        "auto",
        description="folder name under outputs/evaluations; 'auto': from what is evaluated, and how",
    )
    outputs: str = Field("auto", min_length=1, description="folder of results; 'auto': the project's outputs/")
    overwrite: bool = Field(False, description="evaluate anew where the folder holds an evaluation already")
    seed: Seed = Field(0, description="seed of the bootstrap and of the gallery's choice")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the backbone; 'auto': the run's, or float32 where there is none"
    )
    eval_batch_size: Images = Field(256, ge=1, description="images per step of embedding")
    n_workers: Processes = Field(0, ge=0, description="processes that decode images; 0: this process itself")
    n_threads: Processes = Field(
        0, ge=0, description="threads of PyTorch on the CPU; 0: as many as there are cores for us"
    )
    on_bad_image: Literal["error", "skip"] = Field(
        "error", description="stop at an image that cannot be read, or leave it out of queries and index"
    )
    cache_images: bool = Field(True, description="keep decoded images in memory where they fit")

    @model_validator(mode="after")
    def _one_source(self) -> "EvaluateParams":
        given = [name for name in ("run", "checkpoint", "descriptors") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            text = f"found {found} of run, checkpoint and descriptors, expected exactly one"
            raise ParameterError({given[-1] if given else "run": text})
        if self.all_as_test and self.subset != "test":
            raise ParameterError(
                {"all_as_test": f"found True beside subset {self.subset!r}: there is no split but test"}
            )
        if self.descriptors and self.save_descriptors:
            raise ParameterError({"save_descriptors": "found True, but descriptors are given: there is no model"})
        return self


class GridParams(DataParams):
    """What ablations.ipynb runs and compares: rows, each a small change of one base preset, times seeds."""

    rows: tuple[str, ...] = Field(
        ("table",),
        description="'table' (those of README's table), 'all' (every preset of params/ablations), recipes and presets",
    )
    base: str = Field(
        "miniuned_pretrained", min_length=1, description="preset that every row changes: its name or path"
    )
    seeds: tuple[Seed, ...] = Field((0, 1, 2), description="seeds of each row")
    baseline: str = Field("udon", min_length=1, description="row that the others are compared with; it always runs")
    jobs: Processes = Field(1, ge=1, description="runs at a time; they share the CPU's cores")
    steps: Steps | None = Field(
        None, ge=1, description="steps of every row that does not set its own; None: as the base says"
    )
    grid: FolderName = Field(
        "auto",
        description="folder name under outputs/ablations; 'auto': from the rows and the base",
    )
    outputs: str = Field("auto", min_length=1, description="folder of results; 'auto': the project's outputs/")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")

    _different = field_validator("rows", "seeds")(different)

    @property
    def folder(self) -> Path:
        """Folder of the grid: executed notebooks, logs and tables."""
        names = (re.sub(r"\.ya?ml$", "", Path(row).name) for row in self.rows)
        name = "+".join(re.sub(r"[^A-Za-z0-9._]+", "_", name) for name in names)
        if len(name) > 60:
            name = f"{len(self.rows)}rows-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
        auto = f"{name}-{Path(self.base).stem[:100]}"
        return results_folder(self.outputs) / "ablations" / (auto if self.grid == "auto" else self.grid)


class SamplerParams(DataParams):
    """What sampler.ipynb simulates and compares. Nothing is trained. None: as the run whose curves are fitted says."""

    data: str = Field("auto", min_length=1, description="'auto': the run's; or the folder or zip where its data is now")
    curves: str = Field(
        "auto",
        min_length=1,
        description="learning curves: name or path of a finished run to fit them to; 'latest', the last one, if there "
        "is one a dynamic one without offline teachers; 'drawn', from numbers of classes and images; "
        "'auto': 'latest' where a run has finished, else 'drawn'",
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
    strategies: tuple[Literal["dynamic", "round_robin", "balanced", "dataset_size", "fixed"], ...] = Field(
        ("dynamic", "round_robin", "balanced", "dataset_size"), description="strategies side by side"
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
    sampler_init: Strategy | None = Field(None, description="allocation of the dynamic sampler's first window")
    check: str = Field(
        "auto",
        min_length=1,
        description="dynamic run whose recorded allocation the simulation is held against; 'auto': that of `curves`",
    )
    runs: tuple[str, ...] = Field(
        ("auto",),
        description="runs whose allocations are overlaid: names or patterns with commas; 'latest', the last that "
        "finished; 'auto': that of `curves` and its other seeds",
    )
    seed: Seed | None = Field(None, description="seed of the schedules")
    outputs: str = Field("auto", min_length=1, description="folder of results; 'auto': the project's outputs/")

    _different = field_validator("strategies", "runs")(different)


class EmbeddingsParams(DataParams):
    """What embeddings.ipynb shows: the test images of a finished run in two dimensions, and who is near whom."""

    data: str = Field("auto", min_length=1, description="'auto': the run's; or the folder or zip where its data is now")
    run: str = Field("latest", min_length=1, description="name or path of a finished run; 'latest': the last one")
    embedder: Literal["student", "teacher"] = Field(
        "student", description="whose neighbours, hubs and confusions are shown; the map shows both"
    )
    projection: Literal["pca", "umap"] = Field("pca", description="pca: at once; umap: a minute or more, then kept")
    max_points: Images = Field(25_000, ge=10, description="images on the map; of more, an equal number of each domain")
    k: Neighbours = Field(5, description="neighbours of each query that count and are shown")
    n_hubs: int = Field(8, ge=1, le=40, description="hubs of the index that are shown")
    umap_neighbours: int = Field(15, ge=2, le=200, description="UMAP: neighbours that a point keeps close; few: detail")
    umap_distance: float = Field(0.1, ge=0, le=1, description="UMAP: how close points may come; 0: the tightest clumps")
    seed: Seed = Field(0, description="seed of the choice of points and of UMAP")
    outputs: str = Field("auto", min_length=1, description="folder of results; 'auto': the project's outputs/")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    n_workers: Processes = Field(0, ge=0, description="processes that decode images; 0: this process itself")
    n_threads: Processes = Field(
        0, ge=0, description="threads of PyTorch on the CPU; 0: as many as there are cores for us"
    )

    @property
    def cache(self) -> Path:
        """Folder of what is computed once: features and UMAPs. It may be deleted at any time."""
        return results_folder(self.outputs) / "cache"


class RunsParams(DataParams):
    """What runs.ipynb lists, and which two runs it compares."""

    data: str = Field(
        "auto", min_length=1, description="'auto': the runs'; or the folder or zip where their data is now"
    )
    runs: str = Field("all", min_length=1, description="pattern of the names to list, such as 'udon*'; or 'all'")
    run_a: str = Field(
        "auto",
        min_length=1,
        description="name of a run, 'latest', or 'auto': the best of another recipe than B",
    )
    run_b: str = Field("auto", min_length=1, description="name of a run, 'latest', or 'auto': the best one")
    k: Neighbours = Field(5, description="neighbours that the galleries show of each list")
    n_queries: Shown = Field(8, description="queries in each gallery, shared by the domains")
    seed: Seed = Field(0, description="seed of the galleries' choice")
    outputs: str = Field("auto", min_length=1, description="folder of results; 'auto': the project's outputs/")


class SteerParams(DataParams):
    """Which run steer.ipynb looks at and steers."""

    run: str = Field(
        "latest", min_length=1, description="name or path of a run; 'latest': the one that trains, or that wrote last"
    )
    outputs: str = Field("auto", min_length=1, description="folder of results; 'auto': the project's outputs/")
