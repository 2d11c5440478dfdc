"""Make the start page's thumbnails out of executed notebooks.

    papermill notebooks/train.ipynb outputs/train.ipynb       # and so on
    python notebooks/images/make.py [folder of executed notebooks, else outputs/]

One figure of each notebook, drawn anew in the size of a thumbnail; notebooks that have not been executed keep theirs.
"""

import base64
import io
import re
import sys
from pathlib import Path

import kaleido
import nbformat
from PIL import Image

FOLDER = Path(__file__).parent
PLOTLY = "application/vnd.plotly.v1+json"
WIDTH, HEIGHT = 480, 300  # as the figure is laid out; pages show it 320 wide
SCALE = 4 / 3  # pixels of the file: sharp on fine screens, too
SHOWN = {  # notebook -> the cell whose figure says most about it, and the figure's font size
    "data": ("data-04", 0),
    "train": ("train-10", 15),
    "evaluate": ("evaluate-12", 13),
    "distill": ("distill-04", 11),
    "ablations": ("ablations-10", 11),
    "gaps": ("gaps-06", 11),
    "sampler": ("sampler-08", 11),
    "embeddings": ("embeddings-04", 10),
    "runs": ("runs-14", 13),
    "steer": ("steer-07", 15),
    "search": ("search-04", 0),
    "release": ("release-07", 13),
    "cost": ("cost-06", 13),
}


def picture(cell: nbformat.NotebookNode, font_size: int) -> Image.Image:
    """The first figure or sheet of images that a cell shows."""
    shown = [output.data for output in cell.outputs if "data" in output]
    for data in shown:
        if PLOTLY in data:
            return draw(data[PLOTLY], font_size)
        if found := re.search(r"data:image/webp;base64,([\w+/=]+)", data.get("text/html", "")):
            sheet = Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGBA").crop((0, 0, WIDTH, HEIGHT))
            return Image.alpha_composite(Image.new("RGBA", sheet.size, "white"), sheet).convert("RGB")
    raise SystemExit(f"cell {cell.id} shows no figure")


def draw(figure: dict, font_size: int) -> Image.Image:
    """A figure in the size of a thumbnail, without title and legend, on white for dark pages, too."""
    layout = figure["layout"]
    size = {"size": font_size, "color": "#555555"}
    layout |= {"width": WIDTH, "height": HEIGHT, "showlegend": False, "paper_bgcolor": "white", "font": size}
    layout |= {"margin": {"l": 60, "r": 14, "t": 30, "b": 48}, "updatemenus": [], "sliders": []}
    layout["title"] = {}  # the page says what it is
    for name, axis in layout.items():
        if name.startswith(("xaxis", "yaxis")):
            axis["title"] = {"text": axis.get("title", {}).get("text", ""), "font": size}
            axis["tickfont"] = size
    for note in layout.get("annotations", ()):  # titles of panels among them
        note["font"] = size
        # How much of a map is shown is too long here.
        note["text"] = re.sub(r":( |<br>)(PCA|UMAP|laid out).*", "", note.get("text", ""))
    image = kaleido.calc_fig_sync(figure, opts={"format": "png", "width": WIDTH, "height": HEIGHT, "scale": SCALE})
    return Image.open(io.BytesIO(image))


def main() -> None:
    executed = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER.parents[1] / "outputs"
    kaleido.start_sync_server(silence_warnings=True, mathjax=False, timeout=60)
    for name, (shown, font_size) in SHOWN.items():
        path = executed / f"{name}.ipynb"
        if not path.exists():
            print(f"{name}: not executed, {path} is missing")
            continue
        [cell] = [cell for cell in nbformat.read(path, 4).cells if cell.id == shown]
        out = FOLDER / f"{name}.png"
        image = picture(cell, font_size).convert("RGB")
        image.quantize(256 if font_size else 128).save(out, optimize=True)  # photographs take more room
        print(f"{out}: {out.stat().st_size / 1000:.0f} KB")
    kaleido.stop_sync_server(silence_warnings=True)


if __name__ == "__main__":
    main()
