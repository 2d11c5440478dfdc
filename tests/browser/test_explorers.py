"""The notebooks that look at finished runs, with a person's hands on them: sampler, runs, embeddings."""

from pathlib import Path

import pytest

from tests.browser.lab import Lab, Notebook, check_stills
from tests.helpers.waiting import wait_until
from udonlib import presets, runs

TILE = ".udon-explorer-listed .udon-gallery-tile"
THUMBNAIL = """() => [...document.querySelectorAll(".udon-explorer *")].some((each) => each.offsetWidth
    && each.style.backgroundImage.includes("data:image"))"""
# Images that are loaded, apart from each other, on both maps.
IMAGES_ON_MAP = """() => ["student", "teachers"].every((name) => {
    const images = [...document.querySelectorAll(`.udon-explorer-${name} .udon-on-map img`)];
    const boxes = images.map((image) => image.getBoundingClientRect());
    const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
    return images.length > 3 && images.every((image) => image.naturalWidth > 20)
        && boxes.every((a, i) => boxes.every((b, j) => i === j || apart(a, b)));
})"""
# All points of both maps are in view, narrow as they are.
ALL_IN_VIEW = """() => ["student", "teachers"].every((name) => {
    const plot = [...document.querySelectorAll(`.udon-explorer-${name} div`)].find((each) => each.api)?.api;
    return plot?.get("isPointsDrawn") && plot.get("pointsInView").length === plot.get("filteredPoints").length;
})"""
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
    assert sorted([first, order()]) == [
        ["one", "third", "other"],
        ["other", "third", "one"],
    ]  # by title: udon, uj_rr, us_rr

    compared, differences = notebook.text("runs-06"), notebook.text("runs-14")
    [left] = [name for name in first if name not in compared]
    page.locator(f'.udon-runs-widget tr[data-run="{left}"] .udon-runs-a').click()
    notebook.wait_text("runs-06", left)
    wait_until(lambda: notebook.text("runs-14") != differences, "the differences of the new pair")
    for width in (1440, 1024):
        page.set_viewport_size({"width": width, "height": 900})
        box = page.locator(".udon-runs-widget .udon-runs-scroll")
        assert box.evaluate("box => box.scrollWidth - box.clientWidth") <= 0
        assert page.locator(".udon-runs-widget .udon-runs-sort-r_at_1").is_visible()
    assert "udon, seed 0" in page.locator('.udon-runs-widget tr[data-run="one"] th').inner_text()

    page.locator('.udon-runs-widget tr[data-run="other"] .udon-runs-edit').click()
    page.locator(".udon-runs-editor input").first.fill("a short try")
    page.locator(".udon-runs-editor button", has_text="archive").click()
    page.locator('.udon-runs-widget tr[data-run="other"]').wait_for(state="hidden")
    assert "a short try" in (results / "runs" / "other" / "notes.json").read_text()
    notebook.wait_for("() => !document.querySelector('.udon-runs-widget tr[data-run=other]').checkVisibility()")
    page.locator(".udon-runs-widget .udon-runs-show-archived").check()
    page.locator('.udon-runs-widget tr[data-run="other"]').wait_for()

    wait_until(lambda: "uj_rr" in str(notebook.outputs("runs-22")), "the curves, drawn anew for what is shown")
    page.locator(".udon-runs-widget .udon-runs-filter").fill("uj_rr")
    alone = "the curves of one run alone"
    wait_until(lambda: "uj_rr" in (drawn := str(notebook.outputs("runs-22"))) and "'udon'" not in drawn, alone)
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

    on_map = page.locator(".udon-explorer-student .udon-on-map img")
    notebook.wait_for(IMAGES_ON_MAP)
    notebook.wait_for(ALL_IN_VIEW)
    placed = on_map.evaluate_all("images => images.map((image) => [image.dataset.row, image.style.transform])")
    page.mouse.move(x, y)
    page.mouse.wheel(0, -600)  # nearer
    notebook.wait_for(
        """(placed) => placed.every(([row, where]) => {
            const image = document.querySelector(`.udon-explorer-student .udon-on-map img[data-row="${row}"]`);
            return !image || image.style.transform !== where;
        })""",
        placed,
    )
    page.mouse.wheel(0, 600)
    page.locator(".udon-explorer-images input").uncheck()
    notebook.wait_for("() => !document.querySelector('.udon-on-map img')")
    page.locator(".udon-explorer-images input").check()
    notebook.wait_for(IMAGES_ON_MAP)

    page.mouse.move(x - 30, y - 30)
    page.mouse.move(x, y, steps=5)
    notebook.wait_for(THUMBNAIL)

    facts = page.locator(".udon-explorer-facts")
    assert "purity" not in facts.inner_text()
    page.locator(".udon-explorer-student button").nth(1).click()  # the lasso
    page.mouse.move(x - 60, y - 60)
    page.mouse.down()
    for corner in ((60, -60), (60, 60), (-60, 60), (-60, -55)):
        page.mouse.move(x + corner[0], y + corner[1], steps=12)
    page.mouse.up()
    facts.get_by_text("purity").wait_for()
    tiles = page.locator(TILE)
    assert tiles.first.locator("img").evaluate("image => image.naturalWidth") > 20
    tiles.first.click()
    page.locator(".udon-explorer-near .udon-gallery-head").get_by_text("nearest first").or_(
        page.locator(".udon-explorer-near").get_by_text("index image")
    ).first.wait_for()
    assert "chosen" in tiles.first.get_attribute("class")
    page.locator(".udon-explorer-shown select").select_option("flags")  # what was selected before is gone
    facts.get_by_text("purity: 100% flags").wait_for()
    notebook.wait_for(
        "() => document.querySelector('.udon-explorer-listed .udon-gallery-tile').title.endsWith('flags')"
    )
    first = tiles.first.get_attribute("data-row")
    page.locator(".udon-gallery-on").click()
    page.locator(".udon-gallery-head").get_by_text("page 2 of").wait_for()
    assert tiles.first.get_attribute("data-row") != first
    page.locator(".udon-explorer-search input").fill("no such class")
    page.locator(".udon-explorer-search input").press("Enter")
    page.locator(".udon-explorer-status").get_by_text("No image").wait_for()
    page.locator(".udon-explorer-search input").fill("")
    page.locator(".udon-explorer-search input").press("Enter")
    page.locator(".udon-explorer-export").click()
    page.locator(".udon-explorer-status").get_by_text("images written to").wait_for()
    assert list((results / "selections").glob("one-*.csv"))
    assert notebook.errors == []
    check_stills(lab, notebook, "[class^=udon-still] img", ".udon-explorer")
