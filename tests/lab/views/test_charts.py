"""Figures show the numbers of their tables, in the domains' colours, small enough for a notebook."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from udonlib.data.catalog import Catalog, Domain, Split, load_catalog
from udonlib.data.imbalance import uneven
from udonlib.lab.views import charts, style
from udonlib.training.interventions import Intervention

DOMAINS = ["emoji", "flags", "earth"]


def losses(steps: int, every: int = 1) -> pd.DataFrame:
    rows = [
        (step, domain, term, 10 / step + place + shift)
        for step in range(every, steps + 1, every)
        for place, domain in enumerate(DOMAINS)
        for term, shift in {"ce_student": 0.0, "kl": 1.0, "total": 2.0}.items()
    ]
    return pd.DataFrame(rows, columns=["step", "domain", "term", "value"])


def taught(steps: int) -> pd.DataFrame:
    """Losses of frozen teachers, `two` without patches: those of emoji are of 6 images, those of flags of 2."""
    rows = [
        (step, domain, term, value + place, n)
        for step in range(1, steps + 1)
        for place, (domain, n) in enumerate({"emoji": 6, "flags": 2}.items())
        for term, value in {"one/class": 1, "one/patches": 2, "one/kept": 0, "two/class": 3, "two/kept": 0}.items()
    ]
    return pd.DataFrame(rows, columns=["step", "domain", "term", "value", "images"])


def evaluation(k: int = 5, intervals: bool = False) -> pd.DataFrame:
    rows = []
    for e, embedder in enumerate(("pixels", "teacher", "student")):
        for index in ("merged", "separate"):
            values = [20.0 + 10 * e + 3 * d + (index == "separate") for d in range(len(DOMAINS))]
            for domain, value in [*zip(DOMAINS, values, strict=True), ("mean", float(np.mean(values)))]:
                rows.append((embedder, domain, index, 50, 500, value, value / 2))
    columns = ["embedder", "domain", "index", "n_queries", "n_index", "r_at_1", f"mmp_at_{k}"]
    table = pd.DataFrame(rows, columns=columns)
    if intervals:
        for metric in ("r_at_1", f"mmp_at_{k}"):
            table = table.assign(**{f"{metric}_low": table[metric] - 2, f"{metric}_high": table[metric] + 1})
    return table


def traces(fig: go.Figure, name: str) -> list:
    return [trace for trace in fig.data if trace.name == name]


def test_every_figure_has_a_title_axes_with_units_and_the_one_template():
    validation = evaluation().query("embedder == 'student'").assign(step=4)
    allocation = pd.DataFrame({"step": 0, "domain": DOMAINS, "weight": 1 / 3, "share": 1 / 3, "images_seen": 0})
    figures = [
        charts.loss_curves(losses(20)),
        charts.teacher_curves(taught(20)),
        charts.validation_curves(validation),
        charts.allocation_curves(allocation, 8),
        charts.results_chart(evaluation()),
        charts.gap_chart(evaluation()),
    ]
    for fig in figures:
        assert fig.layout.title.text
        assert fig.layout.template.layout.paper_bgcolor == "rgba(0,0,0,0)"
        assert fig.layout.template.layout.legend.x > 1  # beside the data, never on it
        units = "".join(axis.title.text or "" for axis in [*fig.select_xaxes(), *fig.select_yaxes()])
        units += "".join(annotation.text for annotation in fig.layout.annotations)
        assert "step" in units or "%" in units


def test_loss_curves_have_a_panel_for_each_term_and_a_line_for_each_domain_in_its_colour():
    fig = charts.loss_curves(losses(20))
    assert [a.text for a in fig.layout.annotations] == ["total", "student classification", "logit distillation"]
    assert len(fig.data) == 9
    for domain, colour in style.domain_colours(DOMAINS).items():
        assert {trace.line.color for trace in traces(fig, domain)} == {colour}
        assert sum(trace.showlegend for trace in traces(fig, domain)) == 1
    emoji_total = traces(fig, "emoji")[0]
    np.testing.assert_array_equal(emoji_total.x, np.arange(1, 21))
    np.testing.assert_allclose(emoji_total.y, 10 / np.arange(1, 21) + 2, rtol=1e-6)


def test_teachers_have_a_panel_for_each_kind_of_token_and_one_for_the_images_kept():
    fig = charts.teacher_curves(pd.concat([taught(4), losses(4).assign(images=3)]))
    assert [note.text for note in fig.layout.annotations] == ["loss, class token", "loss, patches", "images kept, %"]
    found = {(trace.name, trace.xaxis): trace for trace in fig.data}
    assert set(found) == {("one", "x"), ("one", "x2"), ("one", "x3"), ("two", "x"), ("two", "x3")}
    expected = {("one", "x"): 1.25, ("one", "x2"): 2.25, ("one", "x3"): 25, ("two", "x"): 3.25, ("two", "x3"): 25}
    for place, mean in expected.items():  # over images, 6 of 8 of which are of emoji
        assert found[place].x.tolist() == [1, 2, 3, 4]
        assert found[place].y.tolist() == [mean] * 4
    assert [trace.name for trace in fig.data if trace.showlegend] == ["one", "two"]
    assert len({trace.line.color for trace in traces(fig, "one")} | {traces(fig, "two")[0].line.color}) == 2
    assert max(len(trace.x) for trace in charts.teacher_curves(taught(2000)).data) <= charts.MAX_POINTS


def test_a_run_without_frozen_teachers_has_a_figure_that_says_so():
    assert "no frozen teachers" in charts.teacher_curves(losses(4).assign(images=3)).layout.annotations[0].text


def test_long_curves_become_means_and_stay_small():
    table = losses(20_000)
    fig = charts.loss_curves(table)
    assert max(len(trace.x) for trace in fig.data) == charts.MAX_POINTS
    shown = traces(fig, "flags")[0]
    expected = table.query("domain == 'flags' and term == 'total'")["value"].mean()
    # Bins differ in size by one point, so the mean of their means is the mean only nearly.
    assert np.mean(shown.y) == pytest.approx(expected, rel=1e-3)
    assert (np.diff(shown.x) > 0).all()
    assert len(fig.to_json()) < 60_000


def test_validation_curves_mark_the_step_whose_checkpoint_is_tested():
    table = pd.concat(
        evaluation().query("embedder == 'student'").assign(step=step, r_at_1=lambda t, v=value: t["r_at_1"] * v)
        for step, value in ((100, 0.5), (200, 1.0), (300, 0.9))
    )
    fig = charts.validation_curves(table)
    [best, _] = traces(fig, "best, step 200")
    assert best.x[0] == 200
    means = traces(fig, "mean")
    assert [line.line.width for line in means] == [4, 4]
    np.testing.assert_allclose(means[0].y, np.float32([43 * 0.5, 43, 43 * 0.9]), rtol=1e-6)
    assert best.y[0] == pytest.approx(43)


def test_a_window_of_the_allocation_lasts_until_the_next_and_the_last_to_the_end():
    rows = [(0, "emoji", 0.25, 0), (0, "flags", 0.75, 0), (100, "emoji", 0.6, 900), (100, "flags", 0.4, 3900)]
    table = pd.DataFrame(rows, columns=["step", "domain", "share", "images_seen"])
    area, seen = traces(charts.allocation_curves(table, 150), "emoji")
    assert (area.stackgroup, area.line.shape) == ("share", "hv")
    assert list(area.x) == [0, 100, 150]
    np.testing.assert_allclose(area.y, [25, 60, 60], rtol=1e-6)
    assert list(seen.y) == [0, 900]
    assert list(traces(charts.allocation_curves(table), "emoji")[0].x) == [0, 100, 200]


def test_results_put_the_student_first_and_the_mean_last_with_intervals_where_there_are_some():
    fig = charts.results_chart(evaluation(intervals=True))
    assert list(dict.fromkeys(bar.name for bar in fig.data)) == ["student", "teacher", "pixels"]
    assert fig.layout.xaxis.categoryarray == (*DOMAINS, "mean")
    student = traces(fig, "student")[0]
    np.testing.assert_allclose(student.y, [40, 43, 46, 43])
    np.testing.assert_allclose(student.error_y.array, 1)
    np.testing.assert_allclose(student.error_y.arrayminus, 2)
    assert charts.results_chart(evaluation()).data[0].error_y.array is None
    assert len({bar.marker.pattern.shape for bar in fig.data}) == 3  # not by colour alone


def test_results_name_the_k_of_the_table():
    fig = charts.results_chart(evaluation(k=10, intervals=True))
    assert [a.text for a in fig.layout.annotations] == ["R@1, %", "mMP@10, %"]


def test_a_gap_is_between_student_and_teacher_in_the_same_index():
    fig = charts.gap_chart(evaluation())
    gaps = [a.text for a in fig.layout.annotations if a.text[0] in "+−"]
    assert gaps == ["−10.0"] * 8
    student = traces(fig, "student")
    np.testing.assert_allclose(student[0].x, [43, 46, 43, 40])
    np.testing.assert_allclose(student[1].x, [44, 47, 44, 41])
    assert list(student[0].y) == ["<b>mean</b>", "earth", "flags", "emoji"]


def test_a_run_without_teachers_has_no_gap_and_the_figure_says_so():
    fig = charts.gap_chart(evaluation().query("embedder != 'teacher'"))
    assert not fig.data
    assert "no teachers" in fig.layout.annotations[0].text


def test_class_sizes_fall_and_count_images_with_several_labels_in_each():
    labels = np.array([[3, -1], [3, 5], [5, -1], [3, -1], [8, -1]])
    split = Split("train", tuple("abcde"), labels)
    catalog = Catalog.__new__(Catalog)
    object.__setattr__(catalog, "domains", (Domain("emoji", {"train": split, "val": split, "test": split}),))
    [line] = charts.class_sizes(catalog).data
    assert list(line.x) == [1, 2, 3]
    assert list(line.y) == [3, 2, 1]
    assert charts.class_sizes(catalog).layout.xaxis.ticktext == ("1", "2", "5")
    assert charts.log_ticks(1300)["ticktext"][-4:] == ["200", "500", "1,000", "2,000"]


def test_class_sizes_of_uneven_data_have_those_before_beside_them_dotted():
    whole = load_catalog(domains="emoji, fonts")
    fig = charts.class_sizes(uneven(whole, 1, 10), before=whole)
    assert {(trace.name, trace.line.dash): trace.y[-1] for trace in fig.data} == {
        ("emoji", "solid"): 1,
        ("fonts", "solid"): 3,
        ("emoji, before", "dot"): 3,
        ("fonts, before", "dot"): 14,
    }
    assert len(charts.class_sizes(whole, before=whole).data) == 2


def test_a_run_without_steps_has_figures_that_say_so():
    nothing = pd.DataFrame(columns=["step", "domain", "term", "value", "share", "images_seen"])
    for figure in (charts.loss_curves(nothing), charts.allocation_curves(nothing, 0)):
        assert [note.text for note in figure.layout.annotations] == ["nothing was trained in this run"]


def test_interventions_that_the_result_depends_on_are_marked_at_their_steps():
    rows = [(0, "emoji", 0.25, 0), (0, "flags", 0.75, 0), (40, "emoji", 0.6, 900), (40, "flags", 0.4, 3900)]
    table = pd.DataFrame(rows, columns=["step", "domain", "share", "images_seen"])
    entries = [
        Intervention(number=1, step=40, steers=True, multipliers={"emoji": 4.5}),
        Intervention(number=2, step=60, evaluate=True, multipliers={"emoji": 4.5}),
        Intervention(number=3, step=70, paused=True, multipliers={"emoji": 4.5}),
        Intervention(number=4, step=90, steers=True, locks={"flags": 0.4}),
    ]
    fig = charts.allocation_curves(table, 150, entries)
    [mark] = traces(fig, "intervention")
    assert list(mark.x) == [40, 60, 90]
    assert list(mark.text) == ["emoji ×4.5", "validated", "flags locked at 40.0%"]
    assert [(line.x0, line.x1, line.xref) for line in fig.layout.shapes] == [(x, x, "x") for x in (40, 60, 90)]
    assert fig.layout.title.text == "Allocation (interventions by hand: 3)"
    area, _ = traces(fig, "emoji")
    assert list(area.x) == [0, 40, 150]  # the mark moves nothing


@pytest.mark.parametrize("entries", [[], [Intervention(number=1, step=40, save=True)]])
def test_a_run_that_nobody_steered_has_no_marks(entries):
    table = pd.DataFrame({"step": 0, "domain": DOMAINS, "weight": 1 / 3, "share": 1 / 3, "images_seen": 0})
    fig = charts.allocation_curves(table, 150, entries)
    assert not traces(fig, "intervention")
    assert not fig.layout.shapes
    assert fig.layout.title.text == "Allocation"
