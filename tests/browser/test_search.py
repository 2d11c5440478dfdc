"""search.ipynb with a person's hands on it: a file, a paste, a click, the way back, a crop, and a page to hand on."""

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from tests.browser.lab import Lab, Notebook, check_stills
from tests.helpers.embeddings import train
from tests.helpers.waiting import wait_until

STAGE, NAME = ".udon-find-widget .udon-find-stage", ".udon-find-widget .udon-find-said p"
# An image on the clipboard, as the browser hands it to a page.
PASTE = """(content) => {
    const bytes = Uint8Array.from(atob(content), (sign) => sign.charCodeAt(0));
    const clipboardData = new DataTransfer();
    clipboardData.items.add(new File([bytes], "pasted.png", { type: "image/png" }));
    const stage = document.querySelector(".udon-find-widget .udon-find-stage");
    stage.focus();
    stage.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }));
}"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder of results with one small run with teachers."""
    return train(tmp_path_factory.mktemp("search"))


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (90, 60), colour).save(file, "PNG")
    return file.getvalue()


def wait_name(notebook: Notebook, name: str) -> None:
    """Wait until a query of this name is shown."""
    notebook.wait_for("([place, name]) => document.querySelector(place)?.textContent.startsWith(name)", [NAME, name])


def test_a_person_searches_by_file_paste_click_and_crop_and_takes_the_result_along(lab: Lab, results: Path):
    notebook = lab.open("search.ipynb", outputs=str(results), k=3)
    notebook.run_all()
    notebook.wait_idle()
    assert notebook.cell_errors() == []
    page, widget = notebook.page, notebook.page.locator(".udon-find-widget")
    stage = page.locator(STAGE)
    stage.scroll_into_view_if_needed()
    first = page.locator(NAME).first.inner_text()
    height = widget.bounding_box()["height"]

    widget.locator(".udon-find-file").set_input_files(
        {"name": "red.png", "mimeType": "image/png", "buffer": picture("red")}
    )
    wait_name(notebook, "red.png")
    assert widget.locator(".udon-find-results .udon-find-tile").count() == 3 + 2 * 2 * 3
    page.evaluate(PASTE, base64.b64encode(picture("blue")).decode())
    wait_name(notebook, "pasted.png")

    tile = widget.locator(".udon-find-results .udon-find-tile").nth(1)
    neighbour = tile.get_attribute("title").split("  ")[0]
    tile.click()
    wait_name(notebook, neighbour)
    assert widget.locator(".udon-find-results :is(.udon-yes, .udon-no)").count() > 0
    for name in ("pasted.png", "red.png"):
        widget.locator(".udon-find-back").click()
        wait_name(notebook, name)

    box = stage.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 90)
    page.mouse.down()
    page.mouse.move(box["x"] + 180, box["y"] + 150, steps=4)
    page.mouse.up()
    wait_name(notebook, "red.png, a part of it")
    assert widget.locator(".udon-find-crop").is_visible()
    widget.locator(".udon-find-whole").click()
    notebook.wait_for("(place) => document.querySelector(place).textContent === 'red.png'", NAME)

    widget.locator(".udon-find-label").fill("flags/nothing")
    widget.locator(".udon-find-label").press("Enter")
    widget.locator(".udon-find-note").get_by_text("no image of class 'flags/nothing'").wait_for()
    assert widget.bounding_box()["height"] == height  # whatever is shown, nothing moves

    n_before = len(list((results / "searches").iterdir()))
    widget.locator(".udon-find-save").click()
    wait_until(lambda: len(list((results / "searches").glob("*.html"))) > n_before, "the page of the search")
    saved = page.context.new_page()
    saved.goto((results / "searches" / "red.html").as_uri())
    assert saved.locator(".udon-find-tile").count() == 3 + 2 * 2 * 3
    assert saved.evaluate("() => [...document.images].every((image) => image.naturalWidth > 0)")
    saved.close()

    widget.locator(".udon-find-misses").check()
    notebook.wait_for("() => document.querySelector('.udon-find-widget .udon-find-misses').checked")
    assert first not in ("red.png", "pasted.png")
    assert notebook.errors == []
    assert notebook.cell_errors() == []
    check_stills(lab, notebook, "[class^=udon-still] .udon-find-results", ".udon-find-widget")
