"""What is seen of a check of the data: its progress and verdict, findings with paths, kinds of files, a run's needs."""

from __future__ import annotations

import html
import math
import time
from collections import Counter
from collections.abc import Callable

from udonlib.data.catalog import Catalog
from udonlib.data.check.datacheck import DataCheck, Finding, check_catalog
from udonlib.lab.views.live import ProgressLine
from udonlib.lab.views.tables import Table, facts_table, html_rows
from udonlib.models.processors import n_cores
from udonlib.presets import CheckParams
from udonlib.presets import load as load_preset
from udonlib.runs.watch import duration
from udonlib.training.needs import RunNeeds, measure_needs

UNITS = {"files": "images", "pixels": "images"}
SIGNS = {"broken": "✗ broken", "warning": "⚠ warning", "note": "note"}
N_SHOWN = 5  # images named for each finding
CACHE_GIB = 4  # of decoded images that a reader keeps at most
LOOK = "vertical-align: top; padding: 2px 8px; white-space: normal"


def check(
    catalog: Catalog,
    params: CheckParams,
    live: bool | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> DataCheck:
    """Check a catalog and show how it goes; the last line is the verdict.

    Args:
        live: redraw one line (True) or print lines (False); None: as `live.has_front_end` says.
        clock: seconds; for tests.
    """
    limit = math.inf if params.deep else params.seconds
    with ProgressLine(UNITS, live, clock, limit) as line:
        checked = check_catalog(catalog, None if params.deep else params.seconds, params.seed, line.progress, n_cores())
    line.say(f"Verdict: {checked.verdict}, in {duration(line.seconds())}")
    return checked


def findings_table(check: DataCheck) -> Table:
    """Tabulate what was found, the worst first, with what it means and some of the images by path."""
    rows, lines = [], []
    for finding in check.findings:
        named = _named(finding)
        cells = (SIGNS[finding.level], finding.what, f"{finding.n:,}", finding.meaning)
        rows.append([*map(html.escape, cells), "<br>".join(map(html.escape, named))])
        lines += [f"{SIGNS[finding.level]}: {finding}: {finding.meaning}", *(f"    {text}" for text in named)]
    for note in check.notes:
        rows.append(["note", html.escape(note), "", "", ""])
        lines.append(f"note: {note}")
    if not lines:
        return facts_table({"found": f"nothing wrong; {check.coverage}"})
    head = html_rows(
        [["", "found", "", "what it does", f"the first {N_SHOWN}, by path"]], "th", "th", "left", look=LOOK
    )
    end = f"{check.coverage[0].upper()}{check.coverage[1:]}."
    return Table(
        f"<table>{head}{html_rows(rows, side='left', look=LOOK)}</table><p>{end}</p>", "\n".join([*lines, end])
    )


def _named(finding: Finding) -> list[str]:
    named = [": ".join(text for text in (path or domain, about) if text) for domain, path, about in finding.images]
    more = finding.n - N_SHOWN
    return named[:N_SHOWN] + ([f"... and {more:,} more"] if more > 0 and len(named) > 1 else [])


def files_table(check: DataCheck) -> Table:
    """Tabulate what the image files of each domain are, as far as they were looked at."""
    facts = {}
    for kinds in check.kinds:
        (w0, w1, w2), (h0, h1, h2) = kinds.widths, kinds.heights
        n = kinds.formats.total()
        facts[kinds.domain] = (
            f"{n:,} files of {kinds.n_bytes / n / 1e3:,.1f} KB: {_counts(kinds.endings)}; {_counts(kinds.formats)}; "
            f"{_counts(kinds.modes)}; {w0:,} to {w2:,} pixels wide (median {w1:,}), "
            f"{h0:,} to {h2:,} high (median {h1:,})"
        )
    return facts_table(facts or {"files": "none was looked at"})


def _counts(numbers: Counter[str]) -> str:
    if len(numbers) == 1:
        return next(iter(numbers))
    return ", ".join(f"{name} {n:,}" for name, n in numbers.most_common())


def needs_table(catalog: Catalog, params: CheckParams) -> Table:
    """Tabulate how long a run of the preset `plan` reads this data here, and what memory it takes."""
    plan = load_preset(params.plan, data=params.data, images=params.images, domains=params.domains)
    needs = measure_needs(catalog, plan, seed=params.seed)
    once = needs.n_images * needs.seconds_per_image
    times = needs.n_seen / needs.n_images
    return facts_table(
        {
            "run": f"preset {params.plan}: {plan.backbone}, images of {plan.image_size} pixels",
            "steps": f"{plan.steps:,} of {plan.batch_size} images: {needs.n_images:,} are shown {times:.1f} times each",
            "reading": _reading(needs, once, times),
            "memory": f"{_size(needs.train_bytes)} for training images, {_size(needs.eval_bytes)} for validation and "
            f"test, {_size(needs.model_bytes)} for the model, its gradients and Adam; and a batch of activations",
        }
    )


def _reading(needs: RunNeeds, once: float, times: float) -> str:
    pace = f"{duration(once)} for all of them once with one process ({needs.n_measured:,} images were timed)"
    if needs.train_bytes <= CACHE_GIB * 2**30:
        return f"{pace}; from then on they come from memory"
    return f"{pace}; not all fit into {CACHE_GIB} GiB of memory, so {duration(once * times)} in all: use n_workers"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:,.0f} MiB"
