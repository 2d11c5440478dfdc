"""The notebooks that look at finished runs, with a person's hands on them: sampler, runs, embeddings."""

from pathlib import Path

import pytest

from tests.browser.lab import Lab, Notebook, check_stills
from tests.helpers.waiting import wait_until
from udonlib import presets, runs

SHEET = ".udon-explorer-sheet"
THUMBNAIL = """() => [...document.querySelectorAll(".udon-explorer *")].some((each) => each.offsetWidth
    && each.style.backgroundImage.includes("data:image"))"""
# The first point near the middle of a map, in pixels from its corner: where the drawing differs from its background.
POINT = """() => {
    const drawn = (canvas) => {
        const copy = document.createElement("canvas");
        [copy.width, copy.height] = [canvas.clientWidth, canvas.clientHeight];
        const context = copy.getContext("2d", { willReadFrequently: true });
        context.drawImage(canvas, 0, 0, copy.width, copy.height);
        const pixels = new Uint32Array(context.getImageData(0, 0, copy.width, copy.height).data.buffer);
        const full = (x, y) => [-1, 0, 1].every((down) => [-1, 0, 1].every(
            (right) => pixels[(y + down) * copy.width + x + right] !== pixels[0]));
        const places = [];
        for (let y = 40; y < copy.height - 40; y += 1)
            for (let x = 40; x < copy.width - 40; x += 1)
                if (full(x, y)) places.push([Math.hypot(x - copy.width / 2, y - copy.height / 2), x, y]);
        return places.sort((one, other) => one[0] - other[0])[0];
    };
    const maps = [...document.querySelectorAll(".udon-explorer-student canvas")].filter((c) => c.clientWidth > 100);
    return maps.map(drawn).find((place) => place)?.slice(1) ?? null;
}"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder of results with three finished runs of two domains."""
    folder = tmp_path_factory.mktemp("explorers") / "results"
    values = {"outputs": str(folder), "domains": "flags, earth", "domains_per_batch": 2, "n_threads": 1}
    for name, recipe in (("one", "udon"), ("other", "us_rr"), ("third", "uj_rr")):
        for _ in runs.open_run(presets.load("smoke", **values, recipe=recipe, run=name)).train():
            pass
    return folder


def run_all(lab: Lab, name: str, **values: object) -> Notebook:
    notebook = lab.open(name, **values)
    notebook.run_all()
    notebook.wait_idle()
    assert notebook.cell_errors() == []
    return notebook


def test_a_slider_of_the_sampler_changes_its_picture(lab, results):
    notebook = run_all(lab, "sampler.ipynb", run="one", runs="one", outputs=str(results))
    picture = notebook.page.locator(".udon-sim-picture")
    before = picture.inner_html()
    assert "<svg" in before
    handle = notebook.page.locator(".udon-sim-start-flags .noUi-handle")
    handle.focus()
    handle.press("PageUp")
    notebook.wait_for("(before) => document.querySelector('.udon-sim-picture').innerHTML !== before", before)
    assert "<svg" in picture.inner_html()
    assert notebook.errors == []
    check_stills(lab, notebook, "[class^=udon-still] svg", ".udon-sim")


def test_the_table_of_runs_sorts_and_compares(lab, results):
    notebook = run_all(lab, "runs.ipynb", outputs=str(results))
    page = notebook.page
    names = page.locator(".udon-runs-widget tbody tr")

    def order() -> list[str]:
        return [row.get_attribute("data-run") for row in names.all()]

    header = page.locator(".udon-runs-widget .udon-runs-sort-run")
    header.click()
    first = order()
    header.click()
    assert first != order()
    assert sorted([first, order()]) == [["one", "other", "third"], ["third", "other", "one"]]

    compared, differences = notebook.text("runs-06"), notebook.text("runs-14")
    [left] = [name for name in first if name not in compared]
    page.locator(f'.udon-runs-widget tr[data-run="{left}"] .udon-runs-a').click()
    notebook.wait_text("runs-06", left)
    wait_until(lambda: notebook.text("runs-14") != differences, "the differences of the new pair")
    assert notebook.cell_errors() == []
    assert notebook.errors == []
    check_stills(lab, notebook, "[class^=udon-still] table", ".udon-runs-widget")


def test_the_map_shows_images_at_the_pointer_and_of_a_region(lab, results):
    notebook = run_all(lab, "embeddings.ipynb", run="one", outputs=str(results))
    page = notebook.page
    page.locator(".udon-explorer").scroll_into_view_if_needed()
    notebook.wait_for(POINT)
    canvas = page.locator(".udon-explorer-student canvas").first
    canvas.scroll_into_view_if_needed()
    box, (right, down) = canvas.bounding_box(), page.evaluate(POINT)
    x, y = box["x"] + right, box["y"] + down

    page.mouse.move(x - 30, y - 30)
    page.mouse.move(x, y, steps=5)
    notebook.wait_for(THUMBNAIL)

    sheet = page.locator(SHEET)
    assert not sheet.is_visible()
    page.locator(".udon-explorer-student button").nth(1).click()  # the lasso
    page.mouse.move(x - 60, y - 60)
    page.mouse.down()
    for corner in ((60, -60), (60, 60), (-60, 60), (-60, -55)):
        page.mouse.move(x + corner[0], y + corner[1], steps=12)
    page.mouse.up()
    sheet.wait_for()
    assert sheet.evaluate("image => image.naturalWidth") > 200
    assert "purity" in page.locator(".udon-explorer-facts").inner_text()
    assert notebook.errors == []
    check_stills(lab, notebook, "[class^=udon-still] img", ".udon-explorer")
