"""Take the README's pictures of JupyterLab at work: the steering panel beside a run that trains, and a map explored.

    python -m notebooks.images.screenshots RUN [outputs folder of that run, else outputs/]

from the project's folder, with the environment that runs the tests, and a Chromium. RUN is a finished run for the map.
The run that is steered is begun for the picture, in a temporary folder, and stopped: two minutes on two CPU cores.
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page

from tests.browser.lab import Lab, Notebook, Server, browser, find_chromium, only_run
from tests.browser.test_explorers import POINT
from tests.helpers.waiting import wait_until

FOLDER = Path(__file__).parent
WIDTH, HEIGHT = 1280, 860
STEERED = {  # trains from scratch, with an allocation that moves often enough for a picture
    "preset": "miniuned",
    "check_data": "skip",
    "batch_size": 64,
    "update_every": 20,
    "log_every": 20,
    "eval_every": 1000,
    "checkpoint_every": 1000,
    "n_threads": 1,
}


def save(page: Page, name: str) -> None:
    """The window as it is, with a palette of 256 colours: a third of the bytes, and no difference to the eye."""
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    out = FOLDER / f"{name}.png"
    image.quantize(256, dither=Image.Dither.NONE).save(out, optimize=True)
    print(f"{out}: {out.stat().st_size / 1000:.0f} KB")


def show(notebook: Notebook, selector: str) -> None:
    """Put the first element that is found near the upper edge of the window, and the sidebars away."""
    notebook.page.evaluate(
        """(selector) => {
            window.jupyterapp.shell.collapseLeft();
            document.querySelector(selector).scrollIntoView({ block: "start" });
        }""",
        selector,
    )
    notebook.page.mouse.move(WIDTH - 5, 5)


def steer(lab: Lab, results: Path) -> None:
    """A run with one domain favoured and one pinned, after some windows of its allocation."""
    notebook = lab.open("train.ipynb", **STEERED, outputs=str(results))
    notebook.run_all()
    page = notebook.page
    wait_until(lambda: list(results.glob("runs/*/metrics.jsonl")), "a run")
    run = only_run(results)
    step = lambda: max((record["step"] for record in run.records("allocation")), default=0)  # noqa: E731
    wait_until(lambda: step() >= 100, "some windows of the allocation")
    favoured = page.locator(".udon-w-kanji .noUi-handle")
    favoured.focus()
    for _ in range(3):
        favoured.press("ArrowRight")
    wait_until(lambda: run.interventions(), "the multiplier")
    wait_until(lambda: step() >= 220, "more windows of the allocation")
    page.locator(".udon-lock-earth").click()
    wait_until(lambda: run.interventions()[-1].locks, "the lock")
    wait_until(lambda: step() >= 400, "more windows of the allocation")
    show(notebook, ".udon-panel")
    save(page, "panel")
    page.locator(".udon-stop").click()
    notebook.wait_idle()


def explore(lab: Lab, run: str, outputs: Path) -> None:
    """The map of a run's embedding with a line drawn around some of its points."""
    notebook = lab.open("embeddings.ipynb", run=run, outputs=str(outputs))
    notebook.run_all()
    notebook.wait_idle()
    page = notebook.page
    show(notebook, ".udon-explorer")
    notebook.wait_for(POINT)
    box, (right, down) = page.locator(".udon-explorer-student canvas").first.bounding_box(), page.evaluate(POINT)
    x, y = box["x"] + right, box["y"] + down
    page.locator(".udon-explorer-student button").nth(1).click()  # the lasso
    page.mouse.move(x - 45, y - 45)
    page.mouse.down()
    for corner in ((45, -45), (60, 10), (30, 55), (-40, 45), (-55, 0), (-45, -42)):
        page.mouse.move(x + corner[0], y + corner[1], steps=12)
    page.mouse.up()
    page.locator(".udon-explorer-facts").get_by_text("purity").wait_for()
    show(notebook, ".udon-explorer")
    page.wait_for_timeout(2000)  # the last image at the pointer fades away
    save(page, "explorer")


def main() -> None:
    run, outputs = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "outputs").absolute()
    executable = find_chromium()
    if executable is None:
        sys.exit("a Chromium is needed: it shows JupyterLab")
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(Path(folder) / "lab") as server,
        browser(executable) as chromium,
    ):
        lab = Lab(server, chromium, WIDTH, HEIGHT)
        explore(lab, run, outputs)
        steer(lab, Path(folder) / "results")
        lab.close()


if __name__ == "__main__":
    main()
