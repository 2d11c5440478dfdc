"""release.ipynb: makes the release of a run, and shows what is in it, what was compared, and that it loads.

released = made(params)
comparison_table(released), vectors_table(released), files_table(released), card_of(released)
same_table(released, {"onnxruntime alone": embedding, ...})
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from IPython.display import Markdown
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import normalize

from udonlib.data.decoding import decode, prepare_eval, to_rgb
from udonlib.errors import UserError
from udonlib.files import replacing, results_folder
from udonlib.lab.use.use_params import ReleaseParams
from udonlib.lab.views.charts import dots, error_bars, marker, panels
from udonlib.lab.views.live import ProgressLine
from udonlib.lab.views.sheets import contents_table
from udonlib.lab.views.style import EMBEDDER_LOOKS, TEXT
from udonlib.lab.views.tables import Table, facts_table, lines_table
from udonlib.release.card import Licences
from udonlib.release.folder import CARD, CONFIG, ENCODER, FILES, HEAD, METRICS, ONNX, ReleaseConfig, load_release
from udonlib.release.quantised import HOPELESS
from udonlib.release.release import MAX_DIFFERENCE, MAX_FILES_DIFFERENCE, Released, release
from udonlib.runs.find import ANSWERED, find_run
from udonlib.runs.run import load_run
from udonlib.runs.watch import duration

UNITS = {"exporting": "files", "embedding": "images", "calibrating": "images", "comparing": "parts"}
HOLDS = {
    CONFIG: "what timm needs to know, and udonlib; the checksums of all other files",
    ENCODER: "the encoder, under timm's names",
    HEAD: "the student head",
    ONNX: "all of it, from images of any size to embeddings",
    METRICS: "what was measured, for programs",
    CARD: "the model card",
}


@dataclass(frozen=True)
class Photo:
    """An image as a file, and as the encoder sees it: [1, 3, size, size], standardised."""

    file: Path
    ready: torch.Tensor


def made(params: ReleaseParams, live: bool | None = None, clock: Callable[[], float] = time.monotonic) -> Released:
    """Release a run, and show how far that is.

    Args:
        live, clock: as of `views.live.ProgressLine`.

    Raises: UserError as of `release.release.release`.
    """
    p = params
    run = load_run(find_run(p.run, ANSWERED, p.outputs))
    if p.data != "auto" or p.images:
        run.move_data(p.data, p.images)
    stated = Licences(p.licence, p.data_licence, p.weights_licence, p.teachers_licence)
    folder = None if p.folder == "auto" else Path(p.folder).expanduser().absolute()
    with ProgressLine(UNITS, live, clock) as line:
        released = release(run, folder, stated, p.overwrite, line.progress)
    line.say(f"run {run.path.name} is released, in {duration(line.seconds())}: {released.folder}")
    return released


def files_table(released: Released) -> Table:
    """Tabulate the files, with what they hold and their sizes."""
    return contents_table(released.folder, {name: HOLDS[name] for name in reversed(FILES)})


def comparison_table(released: Released) -> Table:
    """Tabulate how the ONNX file was held against PyTorch: embeddings, and neighbours of every test query."""
    onnx = released.metrics["onnx"]
    facts = {
        "embeddings": f"of {onnx['n_images']:,} test images: values differ by at most {onnx['max_difference']:.1e} "
        f"(more than {MAX_DIFFERENCE:.0e} is refused)",
        "neighbour lists": f"of {onnx['n_queries']:,} queries: {onnx['n_same']:,} are the same {onnx['k']} images in "
        f"the same order; {onnx['n_ties']:,} differ in neighbours whose similarities differ by less than "
        f"{onnx['tie']:.0e}",
        "preprocessing": f"of {onnx['n_files']:,} images of their own size and stretched: embeddings differ by at most "
        f"{onnx['files_max_difference']:.1e} (more than {MAX_FILES_DIFFERENCE:.0e} is refused)",
    }
    return facts_table(facts)


def vectors_table(released: Released) -> Table:
    """Tabulate what smaller vectors lose, with and without re-ranking by the whole ones, and what is hopeless."""
    rows = released.metrics["vectors"]
    lines = []
    for row in rows:
        lost = f"{row['lost']:.2f} ({row['low']:.2f} to {row['high']:.2f})" if row["verdict"] else ""
        verdict = f"**{row['verdict']}**" if row["verdict"] == "hopeless" else row["verdict"]
        again = f"the first {row['reranked']}" if row["reranked"] else "–"
        lines.append([row["vectors"], f"{row['bytes']:g}", again, f"{row['r_at_1']:.2f}", lost, verdict])
    head = ["vectors", "bytes", "re-ranked", "R@1, %", "lost (95%)", ""]
    shown = lines_table(head, lines)
    hopeless = [
        f"{row['vectors']}{' re-ranked' * bool(row['reranked'])}" for row in rows if row["verdict"] == "hopeless"
    ]
    said = f"Hopeless for this model, which means at least {HOPELESS:g} points lost: {', '.join(hopeless)}."
    if not hopeless:
        said = "None of these is hopeless for this model."
    return Table(f"{shown.html}<p>{said}</p>", f"{shown.text}\n{said}")


def vectors_chart(released: Released) -> go.Figure:
    """Draw what smaller vectors lose in R@1, with intervals: alone, and re-ranked by the whole ones."""
    table = pd.DataFrame(released.metrics["vectors"])
    table = table[table["vectors"] != "float32"]
    names = list(dict.fromkeys(table["vectors"]))
    bytes_of = dict(zip(table["vectors"], table["bytes"], strict=True))
    fig = panels("R@1 that smaller vectors lose, percent points", [], height=330)
    ways = (("alone", False, -0.08, "teacher", "diamond-open"), ("re-ranked", True, 0.08, "student", "circle"))
    for name, again, shift, colour, symbol in ways:
        part = table[(table["reranked"] > 0) == again]
        look = marker(EMBEDDER_LOOKS[colour].colour, symbol)
        bars = error_bars(part, "lost", colour=look["color"])
        x = [names.index(way) + shift for way in part["vectors"]]
        fig.add_trace(dots(name, x, part["lost"].tolist(), look, "%{y:.2f} lost", error_y=bars))
    fig.add_hline(y=HOPELESS, line={"color": TEXT, "width": 1, "dash": "dot"})
    ticks = [f"{way}<br>{bytes_of[way]:g} bytes" for way in names]
    fig.update_xaxes(tickvals=list(range(len(names))), ticktext=ticks, range=[-0.5, len(names) - 0.5], showgrid=False)
    return fig.update_yaxes(title_text="R@1 lost")


def card_of(released: Released) -> Markdown:
    """The model card, without what only the Hub reads, a heading deeper than in its file."""
    text = (released.folder / CARD).read_text(encoding="utf-8").split("---\n", 2)[-1].strip()
    lines, inside = [], False  # a block of code, whose comments are no headings
    for line in text.splitlines():
        inside ^= line.startswith("```")
        lines.append(f"##{line}" if line.startswith("#") and not inside else line)
    return Markdown("\n".join(lines))


def photo(released: Released, params: ReleaseParams) -> Photo:
    """A test image of the run as a file, 120 pixels high, to try what is loaded: in outputs/cache/photo.png."""
    run = load_run(find_run(params.run, ANSWERED, params.outputs))
    if params.data != "auto" or params.images:
        run.move_data(params.data, params.images)
    path = run.catalog.domains[0].queries("test").paths[0]
    image = decode(run.catalog.store.read(path), path)
    image = image.resize((round(120 * image.width / image.height), 120))
    file = results_folder(params.outputs) / "cache" / "photo.png"
    with replacing(file) as opened:
        image.save(opened, "PNG")
    return Photo(file, _standardised(released.config, image))


def _standardised(config: ReleaseConfig, image: Image.Image) -> torch.Tensor:
    pixels = prepare_eval(to_rgb(image, "photo"), config.image_size)[None].float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.pretrained_cfg.mean, config.pretrained_cfg.std))
    return (pixels - mean) / std


def same_table(released: Released, embeddings: Mapping[str, Any]) -> Table:
    """Hold embeddings of the photo, by the way in which they were made, against the first of them.

    Raises: UserError where one differs by more than the release lets through.
    """
    arrays = {way: np.asarray(value, dtype=np.float32).reshape(-1) for way, value in embeddings.items()}
    [first, *_] = arrays.values()
    lines = []
    for way, vector in arrays.items():
        difference = float(np.abs(vector - first).max()) if vector.shape == first.shape else float("inf")
        if not difference <= MAX_FILES_DIFFERENCE:
            raise UserError(f"{released.folder}: {way} gives another embedding: values differ by {difference:.2g}")
        shown = ", ".join(f"{value:+.4f}" for value in vector[:4])
        lines.append([way, f"{len(vector)}", f"{shown}, …", f"{difference:.1e}"])
    return lines_table(["loaded by", "dimensions", "embedding of the photo", "largest difference"], lines, side="left")


def encoder(released: Released, create: Callable[..., Any]) -> Any:
    """The encoder by timm alone; one of udonlib's own, which timm does not know, by udonlib, and that is said.

    Args:
        create: `timm.create_model`.
    """
    if released.config.is_timms:
        return create(f"local-dir:{released.folder}", pretrained=True).eval()
    print(f"timm does not know the encoder '{released.config.architecture}', which is udonlib's own: udonlib loads it.")
    return load_release(released.folder).backbone.encoder


def headed(released: Released, features: torch.Tensor) -> torch.Tensor:
    """Make embeddings of the encoder's features, as the card's code does; of a head of several layers, by udonlib."""
    own = released.config.udonlib
    if own.head_hidden_dims:
        model = load_release(released.folder)
        return model.student(model.scaled(features))
    features = normalize(features) if own.normalise_features else features
    if own.head != "student":
        return normalize(features)
    head = load_file(released.folder / HEAD)
    return normalize(features @ head["layers.0.weight"].T + head["layers.0.bias"])
