"""The start page in JupyterLab: it is rendered, with its pictures, and its links open the notebooks."""

import shutil

from tests.browser.lab import Lab
from tests.helpers.notebookfiles import NOTEBOOKS, sources


def test_the_start_page_shows_pictures_and_opens_notebooks(lab: Lab):
    shutil.copytree(NOTEBOOKS / "images", lab.server.root / "images")
    for path in (NOTEBOOKS / "README.md", NOTEBOOKS / "data.ipynb"):
        shutil.copy(path, lab.server.root)
    page = lab.visit("README.md")
    viewer = page.locator(".jp-MarkdownViewer")
    viewer.locator("h1").get_by_text("The notebooks").wait_for()
    page.wait_for_function(
        """(n) => {
            const images = [...document.querySelectorAll(".jp-MarkdownViewer img")];
            return images.length === n && images.every((image) => image.complete && image.naturalWidth > 300);
        }""",
        arg=len(sources()),
    )
    viewer.get_by_role("link", name="Look at the data").first.click()
    page.locator(".jp-NotebookPanel h1").get_by_text("Look at the data").wait_for()
