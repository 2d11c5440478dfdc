"""What is looked at beside the figures: HTML tables of results and of data, and sheets of images.

Both show in every viewer of notebooks. A sheet is one picture of less than 400 KB without a background, so that it
reads on light and dark pages: a WebP, which is small and transparent at once, within HTML, since exporters of
notebooks drop it where it stands alone.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool
from PIL import Image as Pixels
from PIL import ImageColor, ImageDraw, ImageFont

from udonlib.data.catalog import Catalog, DataError, Domain
from udonlib.data.check.datacheck import DataCheck
from udonlib.data.decoding import decode
from udonlib.errors import UserError
from udonlib.evaluation.evaluate import Neighbours
from udonlib.lab.views.charts import images_per_class
from udonlib.lab.views.style import TEXT, by_embedder, domain_colours, metric_labels
from udonlib.lab.views.tables import Table, columns_table, facts_table, figure
from udonlib.params import TrainParams
from udonlib.runs.run import Run

INK = TEXT
EDGE = (128, 128, 128, 80)  # around tiles: a white image on a white page
RIGHT_INK, WRONG_INK = "#00796b", "#e65100"  # told apart by tick and cross, too
GAP, LINE = 10, 18  # pixels between tiles; height of a line of captions. Even: frames keep their colours in a WebP
MAX_BYTES = 400_000
LEAST = 0.72  # of its size, to which a sheet is made smaller where the page is narrow: text of 14 pixels is still read
RUN_FILES = {
    "params.yaml": "every parameter",
    "provenance.json": "versions, device, commit and the data's fingerprint",
    "metrics.jsonl": "the records that the curves above show",
    "tensorboard": "the same, for TensorBoard",
    "checkpoints/best.pt": "the model of the best validation",
    "checkpoints/last.pt": "all that training needs to go on",
    "evaluation.csv": "the results",
    "evaluation.json": "the results, as JSON",
    "outcomes.csv.gz": "R@1 and mMP@k of every test query",
    "neighbours.npz": "the neighbours of every test query",
    "summary.json": "steps, time and skipped images",
}


@dataclass(frozen=True)
class Picture:
    """A WebP that scrolls where it would become too small to read. Where there are no images, it names its size."""

    data: bytes
    size: tuple[int, int]

    def _repr_html_(self) -> str:
        uri = f"data:image/webp;base64,{base64.b64encode(self.data).decode()}"
        width, height = self.size
        look = f"width: 100%; max-width: {width}px; min-width: {round(LEAST * width)}px"
        return f'<div style="overflow-x: auto"><img src="{uri}" style="{look}" alt="{width} × {height} pixels"></div>'

    def __repr__(self) -> str:
        return f"(a picture of {self.size[0]} × {self.size[1]} pixels: see the notebook)"


def results_table(evaluation: pd.DataFrame, index: str = "merged") -> Table:
    """Tabulate R@1 and mMP@k in percent: a row for each domain, columns for each embedder.

    Where the table has the columns `r_at_1_low`, `r_at_1_high` and so on, ± says half the width of the interval, and
    an R@1 is bold where it is surely the best: its interval lies above those of all others.
    Queries without a positive have a column where there are any, and a line below says what that means.
    """
    rows = evaluation[evaluation["index"] == index]
    order = [name for name in dict.fromkeys(rows["domain"]) if name != "mean"] + ["mean"]
    counts = rows.drop_duplicates("domain").set_index("domain").reindex(order)
    columns = {("", "queries"): [f"{n:,.0f}" for n in counts["n_queries"]]}
    if counts["n_index"].nunique() > 1:
        columns["", "index"] = [f"{n:,.0f}" for n in counts["n_index"]]
    without = counts.get("n_without_positive", pd.Series(0, order)).fillna(0)  # runs of before did not count them
    if without.any():
        columns["", "no positive"] = [f"{n:,.0f}" for n in without]
    for embedder in by_embedder(rows):
        part = rows[rows["embedder"] == embedder].set_index("domain").reindex(order)
        for metric, label in metric_labels(rows).items():
            ends = [part.get(f"{metric}_{end}", part[metric] * np.nan) for end in ("low", "high")]
            texts = map(figure, part[metric], *ends)
            sure = _surely_best(rows, embedder, order) if metric == "r_at_1" else [False] * len(order)
            columns[embedder, label] = [
                f"**{text}**" if is_best else text for text, is_best in zip(texts, sure, strict=True)
            ]
    shown = columns_table(columns, order, (f"{index} index,", "percent"))
    if not without.any():
        return shown
    n_without, n_queries = (values.drop("mean").sum() for values in (without, counts["n_queries"]))
    note = (
        f"{n_without:,.0f} of {n_queries:,.0f} queries have no other image of their class in their index: nothing can "
        "be right for them, and they count as 0. data.ipynb names them."
    )
    return Table(f"{shown.html}<p>{note}</p>", f"{shown.text}\n{note}")


def _surely_best(rows: pd.DataFrame, embedder: str, order: Sequence[str]) -> list[bool]:
    """By domain, whether the interval of an embedder's R@1 lies above those of all others."""
    if "r_at_1_low" not in rows:
        return [False] * len(order)
    own = rows[rows["embedder"] == embedder].set_index("domain")["r_at_1_low"].reindex(order)
    others = rows[rows["embedder"] != embedder].groupby("domain")["r_at_1_high"].max().reindex(order)
    return list(own > others)


def start_table(run: Run) -> Table | None:
    """Tabulate what a run gained and lost on the test queries since the run that it began with; None for other runs."""
    table = run.since_start()
    if table is None:
        return None
    columns: dict[tuple[str, str], list[str]] = {("", "queries"): [f"{n:,.0f}" for n in table["n_queries"]]}
    columns["", "known before"] = ["yes" if known else "new" for known in table["known"]]
    columns |= {("R@1", name): [f"{value:.1f}" for value in table[name]] for name in ("before", "after")}
    triples = zip(table["difference"], table["low"], table["high"], strict=True)
    columns["R@1", "difference"] = [f"{value:+.1f} ({low:+.1f} to {high:+.1f})" for value, low, high in triples]
    shown = columns_table(columns, [*table["domain"]], ("since the start,", "percent"))
    note = (
        f"Before: the student of run {run.params.start} on the same queries, in the same merged index. The mean is of "
        "the domains that were known before; intervals are of 95% over queries, paired."
    )
    return Table(f"{shown.html}<p>{html.escape(note)}</p>", f"{shown.text}\n{note}")


def split_table(catalog: Catalog) -> Table:
    """Tabulate what a catalog holds: by domain the classes and images of each split, and images per training class."""
    columns: dict[tuple[str, str], list[str]] = {}
    for part in ("classes", "images"):
        for name in ("train", "val", "test", "index", "small_index"):
            splits = [domain.splits.get(name) for domain in catalog.domains]
            counts = [(images_per_class(s.labels).size if part == "classes" else len(s)) if s else 0 for s in splits]
            if any(splits):
                texts = [f"{n:,}" if s else "–" for n, s in zip(counts, splits, strict=True)]
                columns[part, name] = [*texts, f"{sum(counts):,}"]
    sizes = [images_per_class(domain.splits["train"].labels) for domain in catalog.domains]
    for label, quantile in {"min": 0.0, "median": 0.5, "max": 1.0}.items():
        columns["images per train class", label] = [
            f"{np.quantile(s, quantile):,.0f}" for s in (*sizes, np.concatenate(sizes))
        ]
    return columns_table(columns, [*catalog.names, "all"], ("", ""))


def plan_table(
    params: TrainParams, catalog: Catalog, precision: str | None = None, check: DataCheck | None = None
) -> Table:
    """Tabulate what a run will train, on what, and where its results go.

    Args:
        precision: what `auto` came to.
        check: of the data, where there was one.
    """
    p, n_images = params, sum(len(domain.splits["train"]) for domain in catalog.domains)
    start = "pretrained" if p.pretrained else f"from {Path(p.weights).name}" if p.weights else "from scratch"
    start = f"begins with run {p.start}" if p.start else start
    frozen = f", its first {p.frozen_steps:,} steps frozen" if p.frozen_steps else ""
    teachers = f"; a teacher head of {p.teacher_dim} for each domain" if p.has_teachers else "; no teachers"
    n_mixed = min(p.domains_per_batch, len(catalog.domains))
    mixed = f"{n_mixed} domains in a batch" if n_mixed > 1 else "one domain in a batch"
    signal = "" if p.sampler_signal == "loss" else f" by {p.sampler_signal}"
    update = f"{signal}, updated every {p.update_every:,} steps" if p.sampler == "dynamic" else ""
    facts = {
        "run": p.run_name,
        "data": f"{catalog.name}: {', '.join(catalog.names)}",
        "training images": f"{n_images:,} of {sum(domain.n_classes for domain in catalog.domains):,} classes",
        "backbone": f"{p.backbone}, {start}{frozen}; {p.image_size} pixels, {precision or p.precision}",
        "heads": f"a student head of {p.student_dim} dimensions{teachers}",
        "recipe": f"{p.recipe}, {p.classification}; allocation {p.sampler}{update}; {mixed}",
        "steps": f"{p.steps:,} of {p.batch_size} images: {p.steps * p.batch_size / n_images:.1f} times each on average",
        "validation": f"every {p.eval_every:,} steps; the best checkpoint is tested",
        "results": str(p.run_dir),
    }
    if catalog.notes:
        facts["splits"] = "; ".join(catalog.notes)
    if check is not None:
        facts["data check"] = check.verdict
    few = ", ".join(domain.name for domain in catalog.domains if _n_classes(domain) < 2)
    if few:
        facts["warning"] = (
            f"{few}: a single class to train on, to validate or to test on. Nothing can be learned from one class, and "
            "where one class is searched every neighbour is right: R@1 says nothing"
        )
    return facts_table(facts)


def _n_classes(domain: Domain) -> int:
    """Classes that are told apart in training, validation and test: the smallest number."""
    splits = (domain.splits["train"], domain.index("val"), domain.index("test"))
    return min(len(np.unique(split.labels[split.labels >= 0])) for split in splits)


def files_table(path: Path) -> Table:
    """Tabulate the files of a run's folder, with what they hold. Other files are not named."""
    return contents_table(path, RUN_FILES)


def contents_table(path: Path, holds: Mapping[str, str]) -> Table:
    """Tabulate the files and folders of a folder that are there, by what they hold, with their sizes."""
    facts = {"folder": str(path)}
    for name, content in holds.items():
        file = path / name
        size = sum(part.stat().st_size for part in (file, *file.rglob("*")) if part.is_file())
        if file.exists():
            facts[name] = f"{content} ({size / 1e6:,.1f} MB)" if size >= 50_000 else f"{content} ({size / 1e3:,.1f} KB)"
    return facts_table(facts)


def query_gallery(
    neighbours: Iterable[Neighbours],
    catalog: Catalog,
    embedder: str = "student",
    n_queries: int = 16,
    seed: int = 0,
    n_ranks: int | None = None,
) -> Picture:
    """Show test queries with their nearest neighbours, right and wrong ones marked.

    From each domain come as many queries whose first neighbour is right as wrong ones, where it has both: a look at
    what happens, not a fair sample.

    Args:
        neighbours: in one index, an item for each embedder and domain.
        catalog: that was searched.
        embedder: whose neighbours to show.
        n_queries: in all, shared by the domains.
        seed: of the choice.
        n_ranks: neighbours of each to show, at most those that are kept; None: these.

    Raises:
        ImageError: an image that cannot be read, by name.
        DataError: "... not what was searched ..." where the data has changed since.
    """
    rng = np.random.default_rng(seed)
    by_domain = {part.query_domain: part for part in neighbours if part.embedder == embedder}
    parts = [by_domain[name] for name in catalog.names if name in by_domain][:n_queries]
    chosen = [(part, q) for part in parts for q in _choose(part.hit[:, 0], max(1, n_queries // len(parts)), rng)]
    n_kept = parts[0].hit.shape[1]
    n_ranks = min(n_ranks or n_kept, n_kept)
    shown = [[(part.query_domain, part.query_paths[query]), *part.of(query)[:n_ranks]] for part, query in chosen]
    classes = class_map(catalog, {image for images in shown for image in images})
    n_blocks, side = 2 if len(chosen) > 4 else 1, 96
    n_rows = -(-len(chosen) // n_blocks)
    block, row_height = (n_ranks + 1) * (side + GAP) + 2 * GAP, side + 2 * LINE + GAP
    sheet = Sheet(n_blocks * block + (n_blocks - 1) * 3 * GAP + 2 * GAP, n_rows * row_height + 4 * LINE)
    sheet.mark(GAP, 8, "tick", RIGHT_INK)
    sheet.write(GAP + 24, 8, "same class")
    sheet.mark(GAP + 120, 8, "cross", WRONG_INK)
    sheet.write(GAP + 144, 8, "other class or other domain")
    for place, ((part, query), images) in enumerate(zip(chosen, shown, strict=True)):
        x, y = 2 * GAP + place // n_rows * (block + 3 * GAP), 4 * LINE + place % n_rows * row_height
        if place % n_rows == 0:
            sheet.write(x, y - LINE - 8, "query")
            sheet.write(x + side + 3 * GAP, y - LINE - 8, "nearest neighbours, nearest first")
        for rank, (domain, path) in enumerate(images):
            hit = domain == images[0][0] and not classes[images[0]].keys().isdisjoint(classes[domain, path])
            if rank and hit != part.hit[query, rank - 1]:
                raise DataError(f"{catalog.root}: not what was searched: '{path}' had another class; evaluate again")
            frame = (RIGHT_INK if hit else WRONG_INK, "tick" if hit else "cross") if rank else (INK, "")
            left = x + rank * (side + GAP) + (2 * GAP if rank else 0)
            name = next(iter(classes[domain, path].values()), "")
            sheet.tile(left, y, side, decode(catalog.store.read(path), path), [name, domain], *frame)
    return sheet.image()


def sample_sheet(catalog: Catalog, split: str = "train", n_classes: int = 12, seed: int = 0) -> Picture:
    """Show two images of each of some random classes of every domain, one above the other; a cross: unreadable."""
    rng = np.random.default_rng(seed)
    domains = [domain for domain in catalog.domains if split in domain.splits]
    colours = domain_colours(catalog.names)
    side, left = 64, 120
    height = 2 * side + 4 + LINE + 2 * GAP
    sheet = Sheet(left + n_classes * (side + GAP), len(domains) * height + GAP)
    for row, domain in enumerate(domains):
        part, y = domain.splits[split], GAP + row * height
        sheet.draw.rectangle((GAP, y, GAP + 6, y + 2 * side + 4), fill=colours[domain.name])
        n_all = images_per_class(part.labels).size
        for line, text in enumerate((domain.name, f"{n_all:,} classes", f"{len(part.paths):,} images")):
            sheet.write(GAP + 14, y + line * LINE, text)
        first = part.labels[:, 0]
        classes = np.unique(first)
        for column, label in enumerate(rng.permutation(classes)[:n_classes]):
            images = rng.permutation(np.flatnonzero(first == label))[:2]
            for place, number in enumerate(images):
                path = part.paths[number]
                caption = [part.class_names.get(int(label), str(label))] if place == len(images) - 1 else []
                where = (left + column * (side + GAP), y + place * (side + 4))
                try:
                    sheet.tile(*where, side, decode(catalog.store.read(path), path), caption)
                except UserError:  # the check of the data says which and why
                    sheet.tile(*where, side, Pixels.new("RGB", (side, side), "white"), caption, WRONG_INK, "cross")
    return sheet.image()


class Sheet:
    """A canvas for tiles: images with a border, a mark in the corner and captions below."""

    def __init__(self, width: int, height: int) -> None:
        # Nothing is there, and that has the text's colour: else letters would have a rim.
        self.canvas = Pixels.new("RGBA", (width, height), (*ImageColor.getrgb(INK), 0))
        self.draw = ImageDraw.Draw(self.canvas)
        self.font = ImageFont.load_default(14)

    def tile(
        self, x: int, y: int, side: int, image: Pixels.Image, captions: list[str], border: str = "", mark: str = ""
    ) -> None:
        """Put an image, squared by a centred fit on white, at a corner."""
        if border:
            self.draw.rectangle((x - 4, y - 4, x + side + 3, y + side + 3), outline=border, width=4 if mark else 1)
        else:
            self.draw.rectangle((x - 1, y - 1, x + side, y + side), outline=EDGE)
        factor = side / max(image.size)
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        self.draw.rectangle((x, y, x + side - 1, y + side - 1), fill="white")
        smooth = Pixels.Resampling.BICUBIC
        self.canvas.paste(image.resize(size, smooth), (x + (side - size[0]) // 2, y + (side - size[1]) // 2))
        if mark:
            self.mark(x + side - 14, y - 4, mark, border)
        for line, text in enumerate(captions):
            self.write(x, y + side + 4 + line * LINE, text, side + 2)

    def mark(self, x: int, y: int, mark: str, colour: str) -> None:
        """A white tick or cross on a coloured square of 18 pixels."""
        self.draw.rectangle((x, y, x + 17, y + 17), fill=colour)
        strokes = {"tick": [[(4, 9), (7, 13), (13, 4)]], "cross": [[(4, 4), (13, 13)], [(4, 13), (13, 4)]]}
        for stroke in strokes[mark]:
            self.draw.line([(x + dx, y + dy) for dx, dy in stroke], fill="white", width=3, joint="curve")

    def write(self, x: int, y: int, text: str, width: int | None = None) -> None:
        """One line of text, cut to `width` pixels. The built-in font knows Latin letters only."""
        text = text.encode("latin-1", "replace").decode("latin-1")
        if width is not None and self.font.getlength(text) > width:
            while text and self.font.getlength(text + "…") > width:
                text = text[:-1]
            text += "…"
        self.draw.text((x, y), text, fill=INK, font=self.font)

    def image(self) -> Picture:
        """The sheet as one image of at most MAX_BYTES, or of the lowest quality that is still of use."""
        for quality in (90, 80, 70, 60, 50):
            file = io.BytesIO()
            self.canvas.save(file, "WEBP", quality=quality, method=2)
            if file.tell() <= MAX_BYTES:
                break
        return Picture(file.getvalue(), self.canvas.size)


def _choose(right: Bool[np.ndarray, "query"], n: int, rng: np.random.Generator) -> list[int]:
    """Positions of n queries, right ones first: half of them, or more where there are too few wrong ones."""
    hits, misses = (rng.permutation(np.flatnonzero(right == value)) for value in (True, False))
    n_hits = min(len(hits), max((n + 1) // 2, n - len(misses)))
    return [int(query) for query in (*hits[:n_hits], *misses[: n - n_hits])]


def class_map(catalog: Catalog, images: set[tuple[str, str]]) -> dict[tuple[str, str], dict[int, str]]:
    """Names of the classes of some images by their ids; images are (domain, path)."""
    names_of: dict[tuple[str, str], dict[int, str]] = {image: {} for image in images}
    for domain in catalog.domains:
        paths = {path for name, path in images if name == domain.name}
        for split in domain.splits.values():
            for i in (i for i, path in enumerate(split.paths) if path in paths):
                labels = (int(label) for label in split.labels[i] if label >= 0)
                known = {label: split.class_names.get(label, str(label)) for label in labels}
                names_of[domain.name, split.paths[i]] = known
    return names_of
