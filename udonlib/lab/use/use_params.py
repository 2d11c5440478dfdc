"""What search.ipynb, release.ipynb and cost.ipynb take."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from udonlib.fields import Device, Positive, Processes, ResultParams, RunDataParams, Seed, Shown


class SearchParams(ResultParams):
    """What search.ipynb searches, by which model, and what it shows."""

    model: str = Field(
        "latest", min_length=1, description="a run, a checkpoint or a folder of a release; 'latest': a run, kept last"
    )
    data: str = Field(
        "auto",
        min_length=1,
        description="images that are searched: a folder, a zip, a manifest, 'miniuned', or several of these in "
        "brackets; 'auto': the test images of the run's data, or of miniuned where the model is no run",
    )
    index: str | None = Field(
        None, min_length=1, description="embeddings or an index that are there already, by name or path, not data"
    )
    k: int = Field(10, ge=1, le=50, description="neighbours that are shown of each domain")
    kind: Literal["auto", "exact", "ivf", "hnsw", "sq8", "ivf_sq8", "ivf_pq"] = Field(
        "auto", description="of index; 'auto': exact, or the first that keeps to max_ms and recall"
    )
    max_ms: Positive = Field(20.0, description="milliseconds that a query may take, of kind 'auto'")
    recall: float = Field(0.95, ge=0, le=1, description="least share of the exact neighbours to be found, the same")
    false_labels: float = Field(
        0.05, gt=0, lt=1, description="images of unknown classes that may be given a label: sets 'none of these'"
    )
    teachers: bool = Field(
        True, description="also what each domain's teacher finds in it, where the model is a run with teacher heads"
    )
    n_queries: Shown = Field(8, description="queries of the static sheet and of the table of misses")
    on_bad_image: Literal["error", "skip"] = Field(
        "skip", description="stop at a file that is no image, or leave it out"
    )
    seed: Seed = Field(0, description="of the choice of queries, and of the samples that are measured")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    n_threads: Processes = Field(0, ge=0, description="threads on the CPU; 0: as many as there are cores for us")


class ReleaseParams(RunDataParams):
    """Which run release.ipynb releases, where to, and what its card is to say."""

    run: str = Field("latest", min_length=1, description="name or path of a finished run; 'latest': it finished last")
    folder: str = Field("auto", min_length=1, description="of the release; 'auto': outputs/releases/<run>")
    overwrite: bool = Field(False, description="replace another run's release in that folder")
    licence: str | None = Field(None, min_length=1, description="of the model, for its card")
    data_licence: str | None = Field(None, min_length=1, description="of the data")
    weights_licence: str | None = Field(None, min_length=1, description="of the weights that it began with")
    teachers_licence: str | None = Field(None, min_length=1, description="of frozen teachers")


class CostParams(ResultParams):
    """Which run cost.ipynb computes the cost of, and on what.

    What is known of a machine has the maker's figures as defaults (an H100 SXM, eight of them in a node); what has to
    be measured there has an assumption, and says so.
    """

    plan: str = Field("uned_in21k", min_length=1, description="preset of the run, which is taken to see all of UnED")
    n_gpus: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field((1, 8, 64), description="numbers of GPUs")
    images_per_gpu: int = Field(128, ge=1, le=65_536, description="of a step; steps are as many as the images need")
    peak_tflops: Positive = Field(989.0, description="of a GPU: dense bfloat16; an H100 SXM's, by its maker")
    utilisation: float = Field(0.4, gt=0, le=1, description="share of the peak that training reaches: assumed")
    images_per_s: Positive | None = Field(
        None, description="that one GPU trains, measured there; then `utilisation` does not count"
    )
    gpus_per_node: int = Field(8, ge=1, le=1024, description="GPUs that are linked closely")
    node_gb_per_s: Positive = Field(450.0, description="of a GPU to the others of its node, each way: NVLink 4")
    network_gb_per_s: Positive = Field(50.0, description="of a GPU to other nodes, each way: 400 Gbit/s")
    latency_us: float = Field(10.0, ge=0, le=1e6, description="of a message, microseconds: assumed")
    image_kb: Positive = Field(30.0, description="of an image file on the disk, kilobytes: assumed, 256 pixels high")
    decoded_per_s: Positive = Field(440.0, description="images that a core decodes and scales in a second: assumed")
    euros_per_gpu_hour: float = Field(3.0, ge=0, le=1e6, description="that a GPU costs, with its part of the node")
