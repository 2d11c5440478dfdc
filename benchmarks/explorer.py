"""The embedding explorer in a real browser: seconds from running its cell to the first picture, and of what follows.

    python benchmarks/explorer.py --points 9000 25000 200000
    python benchmarks/explorer.py --points 25000 --run NAME --screenshots shots

JupyterLab on loopback and a headless Chromium, which draws WebGL on the CPU. Points beyond the run's own images are
these again, moved a little. What is measured, in seconds:

    picture      from running the cell, embeddings at hand, until points show in both maps
    thumbnail    from the pointer's rest until its image shows; 0.5 of it is the pause that counts as a rest
    layout       the same, until both maps are laid out by neighbours: computed, and not kept
    click        from a click on a point until the neighbours' tiles have changed
    lasso        the same for a region of a tenth of the points
    frame        mean between two frames while zooming by the wheel
    kernel       what the kernel needs of this: to build the widgets, to answer a region and a thumbnail

The targets: a picture in less than 5 s with 25,000 points; a layout of 8,000 in 5 s, of 25,000 in 10 s. Without --run
a run of a few steps is trained first.
"""

import argparse
import ast
import sys
import tempfile
import time
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.browser.lab import Lab, Server, browser, find_chromium

PREPARE = """
import dataclasses, time, numpy as np
from udonlib.lab.explore import embedding_explorer, embedding_map, embedding_sheets
from udonlib.presets import EmbeddingsParams

found = embedding_map.open_map(EmbeddingsParams(run=RUN, outputs=OUTPUTS, max_points=10**7))
found.embed()
rng = np.random.default_rng(0)
rows = np.arange(N) % len(found.points)
features = found.features[rows] + rng.normal(scale=0.02, size=(N, 1)).astype(np.float32)
found = dataclasses.replace(found, points=found.points.iloc[rows].reset_index(drop=True), features=features)
found.params = found.params.model_copy(update={"seed": int(time.time())})  # nothing of it is kept
found.model
"""
SHOW = """
began = time.perf_counter()
shown = embedding_explorer.EmbeddingExplorer(found)
built = time.perf_counter() - began
shown.box
"""
KERNEL = """
def seconds(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began

region = rng.permutation(N)[: N // 10]
asked = [seconds(lambda: embedding_sheets.thumbnail(found.catalog, path)) for path in found.points["path"][:500]]
print({"build": built, "region": seconds(lambda: shown._select(region)), "thumbnail": float(np.median(asked))})
"""
# Both maps hold points: pixels that differ from the first one's. A map has further canvases, which stay empty.
DRAWN = """() => [...document.querySelectorAll(".udon-explorer canvas")].filter((canvas) => {
    const copy = document.createElement("canvas");
    [copy.width, copy.height] = [100, 100];
    const context = copy.getContext("2d");
    context.drawImage(canvas, 0, 0, 100, 100);
    const pixels = new Uint32Array(context.getImageData(0, 0, 100, 100).data.buffer);
    return canvas.width > 100 && pixels.filter((pixel) => pixel !== pixels[0]).length > 100;
}).length >= 2"""
THUMBNAIL = """() => [...document.querySelectorAll(".udon-explorer *")].some((each) => each.offsetWidth
    && each.style.backgroundImage.includes("data:image"))"""
TILES = "[...document.querySelectorAll('.udon-gallery img')].map((each) => each.src).join()"
CHANGED = f"(before) => {TILES} !== before"
LAID_OUT = """() => document.querySelectorAll(".udon-explorer-caption").length
    && [...document.querySelectorAll(".udon-explorer-caption")].every((each) => each.innerText.includes("laid out"))"""
FRAMES = """() => { window.udonFrames = []; const note = (now) => {
    window.udonFrames.push(now); if (window.udonFrames.length < 2000) requestAnimationFrame(note); };
    requestAnimationFrame(note); }"""
FORGET = """() => document.querySelectorAll(".udon-explorer *").forEach((each) => {
    each.style.backgroundImage &&= "none"; })"""


def trained(folder: Path) -> tuple[str, str]:
    """A run of a few steps, so that there is something to show; its name and folder of results."""
    from udonlib import presets, runs

    run = runs.open_run(presets.load("smoke", outputs=str(folder), run="benchmark"))
    for _ in run.train():
        pass
    return "benchmark", str(folder)


def measure(server: Server, lab: Lab, n_points: int, run: str, outputs: str, shots: Path | None) -> dict[str, float]:
    """Open a notebook that shows so many points, and do what a person does."""
    given = f"N, RUN, OUTPUTS = {n_points}, {run!r}, {outputs!r}"
    sources = [f"{given}\n{PREPARE}", SHOW, KERNEL]
    cells = [nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)]
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)"}
    name = f"explorer-{n_points}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), server.root / name)
    notebook = lab.open(name)
    page, took = notebook.page, {}
    notebook.run_cell("cell-0")
    notebook.wait_idle(300)
    began = time.perf_counter()
    notebook.run_cell("cell-1")
    notebook.wait_for(DRAWN, seconds=120)
    took["picture"] = time.perf_counter() - began
    notebook.wait_for(LAID_OUT, seconds=600)
    took["layout"] = time.perf_counter() - began
    notebook.wait_idle()
    page.evaluate("() => document.querySelector('.udon-explorer').scrollIntoView()")
    page.wait_for_timeout(1000)
    box = page.locator(".udon-explorer-student canvas").first.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def tiles() -> str:
        return page.evaluate(f"() => {TILES}")

    for _ in range(40):  # to the right of the middle, until the pointer is on a point
        page.mouse.move(x, y)
        page.wait_for_timeout(900)
        if page.evaluate(THUMBNAIL):
            break
        x += 3
    page.mouse.move(box["x"] + 5, box["y"] + box["height"] - 5)
    page.wait_for_timeout(800)
    page.evaluate(FORGET)
    page.mouse.move(x, y)
    began = time.perf_counter()
    notebook.wait_for(THUMBNAIL)
    took["thumbnail"] = time.perf_counter() - began
    if shots:
        page.screenshot(path=shots / f"{n_points}-thumbnail.png")
    before, began = tiles(), time.perf_counter()
    page.mouse.click(x, y)
    notebook.wait_for(CHANGED, before)
    took["click"] = time.perf_counter() - began
    page.locator(".udon-explorer-student button").nth(1).click()
    corners = [(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -0.9)]
    reach, before = 55, tiles()
    page.mouse.move(x - reach, y - reach)
    page.mouse.down()
    for right, down in corners:
        page.mouse.move(x + reach * right, y + reach * down, steps=12)
    began = time.perf_counter()
    page.mouse.up()
    notebook.wait_for(CHANGED, before)
    took["lasso"] = time.perf_counter() - began
    if shots:
        page.screenshot(path=shots / f"{n_points}-lasso.png")
    page.evaluate(FRAMES)
    for _ in range(40):
        page.mouse.wheel(0, -30)
        page.wait_for_timeout(10)
    frames = page.evaluate("() => window.udonFrames")
    took["frame"] = (frames[-1] - frames[0]) / 1000 / max(1, len(frames) - 1)
    notebook.run_cell("cell-2")
    notebook.wait_idle(120)
    assert not notebook.cell_errors(), notebook.cell_errors()
    kernel_seconds = ast.literal_eval(notebook.text("cell-2").strip())
    return took | {f"kernel {what}": value for what, value in kernel_seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, nargs="+", default=[25_000])
    parser.add_argument("--run", help="name or path of a finished run with teachers")
    parser.add_argument("--outputs", default="auto", help="folder of results")
    parser.add_argument("--screenshots", type=Path, help="folder for pictures of what was measured")
    options = parser.parse_args()
    executable = find_chromium()
    if executable is None:
        print("no Chromium here: the explorer is not measured")
        return
    if options.screenshots:
        options.screenshots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run, outputs = (options.run, options.outputs) if options.run else trained(Path(folder) / "results")
        with browser(executable) as chromium, Server(Path(folder) / "lab") as server:
            for n_points in options.points:
                lab = Lab(server, chromium)
                took = measure(server, lab, n_points, run, outputs, options.screenshots)
                lab.close()
                words = "   ".join(f"{name} {value:.2g}" for name, value in took.items())
                print(f"{n_points:,} points: {words}", flush=True)


if __name__ == "__main__":
    main()
