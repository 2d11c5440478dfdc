"""A small run with teachers, and its test images as they are searched."""

from __future__ import annotations

import pytest

from tests.helpers.embeddings import train
from udonlib.lab.use.searched import open_search
from udonlib.lab.use.use_params import SearchParams


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Folder of results with one run of two domains."""
    return train(tmp_path_factory.mktemp("use"))


@pytest.fixture(scope="session")
def open_small(results):
    """Open what is searched, with some parameters."""

    def opened(**values):
        return open_search(SearchParams(**{"outputs": str(results), "n_threads": 1, "k": 3} | values))

    return opened


@pytest.fixture(scope="session")
def searched(open_small):
    return open_small()
