"""What all tests share: quiet threads, shapes checked at run time, the same random examples every time."""

import os

# Before torch is imported: tests run many small kernels, where more threads only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import hypothesis
import jaxtyping

import tests.helpers.shapes

# Before udonlib is imported: every annotated shape and type is checked at each call.
jaxtyping.install_import_hook("udonlib", f"{tests.helpers.shapes.__name__}.checked")

import pytest
import torch

from udonlib.models import processors

torch.set_num_threads(1)
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest files come first, those that start kernels: the last ones then end at about the same time."""
    items.sort(key=lambda item: "notebook" not in item.path.name)


@pytest.fixture(scope="session")
def warm_papermill():
    """`papermill` for what need not have a kernel of its own."""
    from tests.helpers.kernels import Kernel

    with Kernel() as kernel:
        yield kernel.papermill


@pytest.fixture(autouse=True, scope="session")
def _same_precision_everywhere():
    """`precision: auto` means float32 in tests, on every processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processors, "multiplies_bfloat16", lambda device: False)
        yield
