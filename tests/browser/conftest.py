"""One JupyterLab and one browser for all tests of this folder.

Without a Chromium they are skipped, unless UDON_BROWSER=required, as in CI: then that is a failure.
"""

import os

import pytest

from tests.browser.lab import Lab, Server, browser, find_chromium
from tests.helpers.runs import end_workers


@pytest.fixture(scope="package")
def chromium():
    executable = find_chromium()
    if executable is None:
        missing = "no Chromium here: the notebooks are not tested in a browser"
        if os.environ.get("UDON_BROWSER") == "required":
            pytest.fail(missing)
        pytest.skip(missing)
    with browser(executable) as running:
        yield running


@pytest.fixture(scope="package")
def server(chromium, tmp_path_factory):
    with Server(tmp_path_factory.mktemp("jupyter")) as running:
        yield running


@pytest.fixture
def lab(server, chromium, tmp_path):
    opened = Lab(server, chromium)
    yield opened
    opened.close()
    end_workers(tmp_path)
