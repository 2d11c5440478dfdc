"""What a machine without any Chrome or Chromium leaves shows its figures in a browser elsewhere, without a network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests import PROJECT
from tests.helpers.notebookfiles import PLOTLY, outputs
from udonlib import presets, runs

# In a mount namespace of its own: put nothing in the place of each browser that is found, then become the command.
HIDE = """
import os, subprocess, sys
from choreographer.browsers.chromium import Chromium
while found := Chromium.find_browser(skip_local=False):
    subprocess.run(["mount", "--bind", "/dev/null", found], check=True)
os.execvp(sys.argv[1], sys.argv[1:])
"""
# How many pixels of each image of the page are not transparent, in percent; 0 of one that does not show.
INK = """() => [...document.querySelectorAll('img[src^="data:image/png"]')].map((image) => {
    if (!image.complete || !image.naturalWidth || !image.getBoundingClientRect().width) return 0;
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    return 100 * pixels.filter((value, i) => i % 4 === 3 && value > 0).length / (pixels.length / 4);
})"""


def can_hide() -> bool:
    """Whether this process may mount something where nobody else sees it."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_hide(), reason="hiding the browsers of this machine needs root and Linux")
def test_figures_show_in_the_export_without_a_network(chromium: Browser, tmp_path: Path):
    values = {"outputs": str(tmp_path / "results"), "domains": "flags, earth", "domains_per_batch": 2, "n_threads": 1}
    for _ in runs.open_run(presets.load("smoke", **values)).train():  # in this process, which is quicker
        pass
    options = [word for name, value in ({"preset": "smoke"} | values).items() for word in ("-p", name, str(value))]
    notebook = tmp_path / "train.ipynb"
    command = ["papermill", str(PROJECT / "notebooks" / "train.ipynb"), str(notebook), "--no-progress-bar", *options]
    hidden = ["unshare", "-m", sys.executable, "-c", HIDE, sys.executable, "-m", *command]
    done = subprocess.run(hidden, env=os.environ | {"UDON_LIVE": "0"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    command = [sys.executable, "-m", "nbconvert", "--to", "html", str(notebook)]
    subprocess.run(command, capture_output=True, check=True, timeout=600)
    figures = [data for data in outputs(notebook) if PLOTLY in data]
    assert len(figures) == 5
    assert not [data for data in figures if "text/html" in data]  # which would be shown in the picture's place

    context = chromium.new_context(offline=True)
    context.route("http*://**", lambda route: route.abort())
    page = context.new_page()
    page.goto(notebook.with_suffix(".html").as_uri(), wait_until="domcontentloaded")
    ink = page.evaluate(INK)
    context.close()
    assert len(ink) == len(figures)
    assert min(ink) > 1
