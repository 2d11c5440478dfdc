"""A student beside its frozen teachers: what each is good at, what it keeps of the best, and which queries it gets.

Tables are `evaluation.frozen.encoders`' outcomes and `evaluation.frozen.relative`'s comparison. An encoder is told from
others by symbol as well as by colour, in the order in which it was evaluated: the student first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float

from udonlib.data.decoding import decode
from udonlib.data.images import ImageReader
from udonlib.evaluation.frozen.encoders import TOGETHER, Encoder, EncoderScores, model_encoder
from udonlib.evaluation.frozen.relative import AGAINST
from udonlib.evaluation.frozen.tasks import HEADLINES
from udonlib.lab import projections
from udonlib.lab.views.charts import cell, dots, error_bars, f32, marker, name_rows, panels, row_heights
from udonlib.lab.views.live import ProgressLine
from udonlib.lab.views.sheets import GAP, LINE, RIGHT_INK, WRONG_INK, Picture, Sheet, class_map
from udonlib.lab.views.style import ACCENT, EMBEDDER_LOOKS, TEXT, domain_colours, teacher_looks
from udonlib.lab.views.tables import Table, columns_table, difference, facts_table, figure, lines_table, with_shares
from udonlib.models.heads import unit
from udonlib.runs.run import Run
from udonlib.runs.teachers import STUDENT, probes

METRICS = {"r_at_1": "R@1", "mmp_at_5": "mMP@5", "knn": "k-NN", "logistic": "linear", "mean_iou": "mean IoU"}
TITLES = {"retrieval": "retrieval, R@1", "classification": "linear classifier", "dense": "figure from ground, IoU"}
ROW = 34  # pixels of a row of a chart
WHY = "below the best teacher"


def _looks(encoders: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and symbol of each encoder."""
    fixed = {STUDENT: (EMBEDDER_LOOKS[STUDENT].colour, "circle"), TOGETHER: (TEXT, "line-ns-open")}
    teachers = teacher_looks(name for name in encoders if name not in fixed)
    return fixed | {name: (look.colour, look.symbol) for name, look in teachers.items()}


def progress_line() -> ProgressLine:
    """A line of the progress of all that this page finds: images that are looked at, probes that are trained."""
    whose = ("teachers", STUDENT)
    return ProgressLine(dict.fromkeys((*whose, "maps"), "images") | {probes(name): "probes" for name in whose})


def teachers_table(run: Run) -> Table:
    """Tabulate who teaches: what it is, what it sees, what of it counts, and its licence."""
    head = ["teacher", "what it is", "sees, pixels", "tokens that count", "weight", "licence"]
    lines = []
    for name, p in sorted(run.params.teachers.items()):
        what = p.run or p.onnx or f"{p.backbone}{', released weights' if p.pretrained else f', {p.weights}'}"
        kinds = "embedding" if p.embedding else " and ".join(p.kinds)
        seen = str(p.image_size or "as its run")
        lines.append([name, what, seen, kinds, f"{p.weight:g}", p.licence or "not stated"])
    return lines_table(head, lines, "left")


def scores_table(scores: EncoderScores) -> Table:
    """Tabulate every score of every encoder, in percent; the best single one of a task's headline metric is bold."""
    table = scores.table()
    domains = [name for name in table if name not in ("group", "metric", "encoder")]
    columns: dict[tuple[str, str], list[str]] = {}
    for (group, metric), rows in table.groupby(["group", "metric"], sort=False):
        single = rows[rows["encoder"] != TOGETHER]
        for _, row in rows.iterrows():
            texts = [figure(row[name]) for name in domains]
            if metric == HEADLINES[str(group)] and row["encoder"] != TOGETHER:
                best = [row[name] == single[name].max() for name in domains]
                texts = [f"**{text}**" if first else text for text, first in zip(texts, best, strict=True)]
            columns[f"{group}: {METRICS.get(str(metric), str(metric))}", row["encoder"]] = texts
    return columns_table(columns, domains, ("", ""))


def scores_chart(scores: EncoderScores) -> go.Figure:
    """Draw the headline score of every encoder in every task, domain by domain."""
    table = scores.table()
    table = table[table["metric"] == table["group"].map(HEADLINES)]
    names = [name for name in table if name not in ("group", "metric", "encoder")]
    fig, groups = _group_panels("What each encoder is good at", table, names)
    looks = _looks(list(dict.fromkeys(table["encoder"])))
    for place, group in enumerate(groups):
        for encoder, rows in table[table["group"] == group].groupby("encoder", sort=False):
            colour, symbol = looks[str(encoder)]
            shift = 0.12 if encoder == STUDENT else 0.0
            trace = dots(
                str(encoder),
                f32(rows[names].to_numpy()[0]),
                row_heights(len(names), shift),
                marker(colour, symbol, 10, 2),
                "%{x:.1f} %",
                legend=place == 0,
            )
            fig.add_trace(trace, **cell(place))
    return fig


def relative_chart(relative: pd.DataFrame) -> go.Figure:
    """Draw the student's lead over the best teacher of each task; filled where its interval excludes zero."""
    rows = relative[(relative["against"] == AGAINST[0]) & (relative["group"] != "all")]
    names = [*dict.fromkeys(rows.loc[rows["domain"] != "mean", "domain"]), "mean"]
    fig, groups = _group_panels("The student against the best teacher of each task", rows, names, "points")
    for place, group in enumerate(groups):
        part = rows[rows["group"] == group].set_index("domain").reindex(names)
        sure = (part["points_low"] > 0) | (part["points_high"] < 0)
        trace = dots(
            "lead, 95% interval",
            f32(part["points"]),
            row_heights(len(names)),
            marker(ACCENT, ["circle" if is_sure else "circle-open" for is_sure in sure], 10, 2),
            "%{x:+.1f} points against %{customdata}",
            legend=place == 0,
            customdata=part["teacher"].fillna("").replace("", "the best of each"),
            error_x=error_bars(part, "points", "points_low", "points_high", ACCENT),
        )
        fig.add_trace(trace, **cell(place))
        fig.add_vline(x=0, line={"color": TEXT, "width": 1}, **cell(place))
    return fig


def _group_panels(
    title: str, table: pd.DataFrame, names: Sequence[str], unit: str = "%"
) -> tuple[go.Figure, list[str]]:
    groups = list(dict.fromkeys(table["group"]))
    titles = [TITLES.get(group, group) for group in groups]
    fig = panels(title, titles, 1, len(groups), 170 + ROW * len(names), shared_yaxes=True, horizontal_spacing=0.04)
    name_rows(fig, names)
    fig.update_xaxes(title=unit).update_layout(hovermode="closest")
    return fig, groups


def relative_table(relative: pd.DataFrame) -> Table:
    """Tabulate the student's lead over the best of each task and over the best teacher, by group and over all tasks."""
    means = relative[relative["domain"] == "mean"]
    lines = []
    for row in means.itertuples():
        points = difference(row.points, row.points_low, row.points_high)
        percent = difference(row.percent, row.percent_low, row.percent_high)
        tasks = relative[(relative["against"] == row.against) & (relative["domain"] != "mean")]
        tasks = tasks if row.group == "all" else tasks[tasks["group"] == row.group]
        kept = f"{int((tasks['points'] >= 0).sum())} of {len(tasks)}"
        whom = f"{row.against}{f': {row.teacher}' if row.teacher else ''}"
        lines.append([whom, row.group, figure(row.teacher_score), figure(row.student_score), points, percent, kept])
    head = ["against", "tasks", "teacher, %", "student, %", "lead, points", "lead, %", "tasks kept or beaten"]
    return lines_table(head, lines)


def verdict(relative: pd.DataFrame) -> Table:
    """Say in three lines what came out."""
    every = relative[relative["group"] == "all"].set_index("against")
    tasks = relative[(relative["against"] == AGAINST[0]) & (relative["domain"] != "mean")]
    kept, sure = (tasks["points"] >= 0).sum(), (tasks["points_high"] < 0).sum()
    of_each, single = (every.loc[name] for name in AGAINST)

    def lead(row: pd.Series) -> str:
        return difference(row["points"], row["points_low"], row["points_high"]).strip("*")

    facts = {
        "tasks": f"the student keeps or beats the best teacher in {kept} of {len(tasks)}; in {sure} it is surely {WHY}",
        "against the best of each": f"{lead(of_each)} points in the mean over all tasks",
        "against the best teacher": f"{lead(single)} points over {single['teacher']}, the best one over all tasks",
    }
    return facts_table(facts)


def hits(scores: EncoderScores) -> pd.DataFrame:
    """Whether each encoder's first neighbour is right: a row a query, with columns domain, path and the encoders."""
    rows = scores.outcomes
    rows = rows[(rows["group"] == "retrieval") & (rows["metric"] == HEADLINES["retrieval"])]
    table = rows.pivot(index=["domain", "path"], columns="encoder", values="score") > 0.5
    order = [name for name in dict.fromkeys(rows["encoder"]) if name in table]
    return table[order].reset_index().rename_axis(columns=None)


def only_one(found: pd.DataFrame, teachers: Sequence[str]) -> dict[str, pd.DataFrame]:
    """The queries that one teacher alone gets right, by teacher; then those that all get, and those that none gets."""
    right = found[list(teachers)]
    n = right.sum(axis=1)
    alone = {name: found[right[name] & (n == 1)] for name in teachers}
    return alone | {"every teacher": found[n == len(teachers)], "no teacher": found[n == 0]}


def only_one_table(found: pd.DataFrame, teachers: Sequence[str]) -> Table:
    """Tabulate who alone gets how many queries right, and how many of these the student gets."""
    groups = only_one(found, teachers)
    shares = with_shares((len(rows) for rows in groups.values()), [len(found)] * len(groups))
    lines = []
    for (name, rows), count in zip(groups.items(), shares, strict=True):
        [kept] = with_shares([int(rows[STUDENT].sum())], [max(1, len(rows))])
        most = rows["domain"].value_counts()
        where = ", ".join(f"{domain} {n:,}" for domain, n in most.head(3).items())
        lines.append([name if name.startswith(("every", "no ")) else f"{name} alone", count, kept, where or "–"])
    return lines_table(["right:", "queries", "of these the student gets", "most of them in"], lines, "left")


def only_one_sheet(run: Run, found: pd.DataFrame, teachers: Sequence[str], n: int = 8, seed: int = 0) -> Picture:
    """Show random queries that one teacher alone gets right; marked is whether the student gets them."""
    rng, side = np.random.default_rng(seed), 72
    rows = {f"{name} alone": part for name, part in only_one(found, teachers).items() if name in teachers}
    chosen = {name: part.iloc[np.sort(rng.permutation(len(part))[:n])] for name, part in rows.items()}
    shown = {(row.domain, row.path) for part in chosen.values() for row in part.itertuples()}
    classes = class_map(run.catalog, shown)
    left, height = 150, side + 2 * LINE + 2 * GAP
    sheet = Sheet(left + n * (side + GAP) + GAP, len(chosen) * height + GAP)
    for line, (name, part) in enumerate(chosen.items()):
        y = GAP + line * height
        sheet.write(GAP, y, name, left - 2 * GAP)
        sheet.write(GAP, y + LINE, f"{len(rows[name]):,} queries")
        for place, row in enumerate(part.itertuples()):
            look = (RIGHT_INK, "tick") if getattr(row, STUDENT) else (WRONG_INK, "cross")
            captions = [next(iter(classes[row.domain, row.path].values()), ""), row.domain]
            image = decode(run.catalog.store.read(row.path), row.path)
            sheet.tile(left + place * (side + GAP), y, side, image, captions, *look)
    return sheet.image()


def maps(
    run: Run, n_images: int = 1200, umap: bool = False, progress: Callable[[str, int, int], None] | None = None
) -> go.Figure:
    """Draw some test images as student and teachers place them, each on a map of its own.

    Args:
        n_images: in all, the same number of each domain; drawn with the run's seed.
        umap: by UMAP, which takes a minute more and is kept; else by PCA.
        progress: called with what is done, and how much of it.
    """
    vectors, domains = _vectors(run, n_images, progress)
    titles, places = [], {}
    for name, values in vectors.items():
        if umap:
            settings = projections.Umap(seed=run.params.seed)
            places[name], note = projections.umap(values, settings, run.path.parent.parent / "projections"), ""
        else:
            places[name], shares = projections.pca(values)
            note = f" ({sum(shares):.0%} of the variance)"
        titles.append(name + note)
    n_columns = min(3, len(titles))
    n_rows = -(-len(titles) // n_columns)
    fig = panels(
        f"{len(domains):,} test images by {'UMAP' if umap else 'PCA'}", titles, n_rows, n_columns, 330 * n_rows
    )
    for place, coordinates in enumerate(places.values()):
        for domain, colour in domain_colours(domains).items():
            inside = domains == domain
            looks = {"color": colour, "size": 4, "opacity": 0.75}
            x, y = f32(coordinates[inside, 0]), f32(coordinates[inside, 1])
            fig.add_trace(dots(domain, x, y, looks, domain, legend=place == 0), **cell(place, n_columns))
    fig.update_xaxes(visible=False).update_yaxes(visible=False)
    return fig.update_layout(hovermode="closest", legend={"itemsizing": "constant"})


@torch.no_grad()
def _vectors(
    run: Run, n_images: int, progress: Callable[[str, int, int], None] | None
) -> tuple[dict[str, Float[np.ndarray, "n _"]], np.ndarray]:
    """Unit class tokens of some test images, by encoder, and the images' domains."""
    p, catalog = run.params, run.catalog
    reader = ImageReader(catalog, p.image_size, "eval", p.on_bad_image)
    encoders: dict[str, Encoder] = {STUDENT: model_encoder(run.load_model()), **run.frozen_teachers()}
    rng = np.random.default_rng(p.seed)
    found: dict[str, list[Any]] = {name: [] for name in encoders}
    domains: list[str] = []
    for domain in catalog.domains:
        n = min(n_images // len(catalog.domains), len(domain.splits["test"]))
        drawn = np.sort(rng.permutation(len(domain.splits["test"]))[:n])
        images = reader.read(domain.name, "test", drawn)
        for name, encode in encoders.items():
            parts = [encode(part)["class"].cpu() for part in images.split(64)]
            found[name].append(unit(torch.cat(parts)).numpy())
        domains += [domain.name] * n
        if progress is not None:
            progress("maps", len(domains), n_images)
    return {name: np.concatenate(parts) for name, parts in found.items()}, np.array(domains)


def teachers_of(scores: EncoderScores) -> list[str]:
    """Names of the single teachers that were evaluated."""
    names: Mapping[str, Any] = dict.fromkeys(scores.outcomes["encoder"])
    return [name for name in names if name not in (STUDENT, TOGETHER)]
