"""A student beside its teachers, from a small run: what is tabulated and drawn, against what is known of the scores."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image as Pixels

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.runs import finish
from tests.helpers.taught import small_teachers, write_teachers
from tests.helpers.training import SMALL
from udonlib.evaluation.frozen.encoders import EncoderScores
from udonlib.evaluation.frozen.relative import relative_to_best
from udonlib.lab.compare import distillation
from udonlib.params import TrainParams
from udonlib.runs.run import open_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled")
    root = write_uned_tree(folder / "data", index_of="flags")
    values = {"data": str(root), "outputs": str(folder), "n_threads": 1, "recipe": "unic"}
    return finish(open_run(TrainParams(**SMALL | values | {"teachers": small_teachers(write_teachers(folder))})))


@pytest.fixture(scope="module")
def scores(run):
    return run.encoder_scores()


def invented(**hits):
    """Scores of encoders whose first neighbours are right or wrong as said, for four queries of two domains."""
    rows = [
        {"encoder": name, "group": "retrieval", "domain": domain, "metric": "r_at_1", "path": f"{i}.png", "score": hit}
        for name, values in hits.items()
        for i, (domain, hit) in enumerate(zip("aabb", values, strict=True))
    ]
    return EncoderScores(pd.DataFrame(rows), pd.DataFrame())


SOME = {"student": [1.0, 0, 1, 0], "one": [1.0, 1, 0, 0], "two": [1.0, 0, 1, 0]}


def test_student_and_teachers_are_scored_on_the_same_tasks_once(run, scores):
    assert list(dict.fromkeys(scores.outcomes["encoder"])) == ["student", "one", "two", "all teachers"]
    assert distillation.teachers_of(scores) == ["one", "two"]
    by_encoder = scores.outcomes.groupby("encoder").size()
    assert by_encoder["one"] == by_encoder["student"]
    asked = []
    assert run.encoder_scores(lambda *done: asked.append(done)).outcomes.equals(scores.outcomes)
    assert asked == []
    student = run.evaluation().query("embedder == 'student' and index == 'merged'").set_index("domain")["r_at_1"]
    table = scores.table().query("group == 'retrieval' and metric == 'r_at_1' and encoder == 'student'")
    assert table["emoji"].item() == pytest.approx(student["emoji"])


def test_who_teaches_is_told_with_what_counts(run):
    text = distillation.teachers_table(run).text
    assert "class and patches" in text
    assert "not stated" in text
    assert "one.safetensors" in text


def test_the_best_single_teacher_of_each_task_is_bold():
    table = distillation.scores_table(invented(**SOME, **{"all teachers": [1.0, 1, 1, 1]}))
    assert table.html.count("<b>") == 6  # of a: one; of b: student and two; of the mean all three, which are equal
    assert "100.0" in table.text


def test_the_verdict_counts_tasks_and_names_the_best_teacher():
    relative = relative_to_best(invented(**SOME), ["student"], ["one", "two"])
    text = distillation.verdict(relative).text
    assert "keeps or beats the best teacher in 1 of 2" in text
    assert "over one, the best one" in text or "over two, the best one" in text
    lines = distillation.relative_table(relative).text
    assert "1 of 2" in lines


def test_queries_that_one_teacher_alone_gets():
    found = distillation.hits(invented(**SOME))
    groups = distillation.only_one(found, ["one", "two"])
    assert {name: rows["path"].tolist() for name, rows in groups.items()} == {
        "one": ["1.png"],
        "two": ["2.png"],
        "every teacher": ["0.png"],
        "no teacher": ["3.png"],
    }
    text = distillation.only_one_table(found, ["one", "two"]).text
    assert "one alone" in text
    assert "1 (100.0 %)" in text
    assert "0 (0.0 %)" in text


def test_charts_show_each_encoder_and_the_leads_with_their_intervals(scores):
    fig = distillation.scores_chart(scores)
    assert {trace.name for trace in fig.data} == {"student", "one", "two", "all teachers"}
    assert len({trace.marker.symbol for trace in fig.data}) == 4
    relative = relative_to_best(scores, ["student"], ["one", "two"])
    lead = distillation.relative_chart(relative)
    retrieval = relative[(relative["group"] == "retrieval") & (relative["against"] == "the best of each task")]
    assert np.allclose(sorted(lead.data[0].x), sorted(retrieval["points"]), atol=1e-4)
    assert lead.data[0].error_x.array is not None


def test_maps_show_the_same_images_for_all(run):
    fig = distillation.maps(run, n_images=16)
    titles = [note.text.split(" (")[0] for note in fig.layout.annotations]
    assert titles == ["student", "one", "two"]
    sizes = {(trace.xaxis, trace.name): len(trace.x) for trace in fig.data}
    assert len({tuple(n for (axis, _), n in sizes.items() if axis == kind) for kind, _ in sizes}) == 1


def test_a_sheet_shows_queries_of_each_teacher(run, scores):
    found = distillation.hits(scores)
    sheet = distillation.only_one_sheet(run, found, ["one", "two"], n=3)
    width, height = Pixels.open(io.BytesIO(sheet.data)).size
    assert width == 150 + 3 * (72 + distillation.GAP) + distillation.GAP
    assert height > 2 * 72
