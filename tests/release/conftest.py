"""A run of seconds, and its release."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.runs import finish
from tests.helpers.training import SMALL
from udonlib.models.backbones import create_backbone
from udonlib.models.files.importers import save_backbone_weights
from udonlib.params import TrainParams
from udonlib.release.release import release
from udonlib.runs.run import open_run


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_uned_tree(tmp_path_factory.mktemp("data"), index_of="flags", image_size=(41, 37))


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """Make a finished run: SMALL with some parameters changed. The same ones give the same run again."""
    outputs = tmp_path_factory.mktemp("outputs")

    def make(**changes):
        values = SMALL | {"data": str(data), "outputs": str(outputs), "n_threads": 1} | changes
        return finish(open_run(TrainParams(**values)))

    return make


@pytest.fixture(scope="session")
def run(finished):
    return finished(nested_dims=[4])


@pytest.fixture(scope="session")
def taught(finished, tmp_path_factory):
    """A run that a frozen encoder taught: its model has no head."""
    file = tmp_path_factory.mktemp("weights") / "one.safetensors"
    torch.manual_seed(0)
    encoder = create_backbone("small_resnet", pretrained=False, image_size=32, arguments={"width": 8})
    save_backbone_weights(encoder, file)
    one = {"backbone": "small_resnet", "backbone_args": {"width": 8}, "image_size": 32, "weights": str(file)}
    one["licence"] = "CC-BY-NC-4.0"
    return finished(recipe="unic", teachers={"one": one}, augmentation="none")


@pytest.fixture(scope="session")
def released_of():
    """Release a run, each once: an export takes seconds."""
    made = {}

    def make(run):
        if run.path not in made:
            made[run.path] = release(run)
        return made[run.path]

    return make


@pytest.fixture(scope="session")
def released(run, released_of):
    return released_of(run)
