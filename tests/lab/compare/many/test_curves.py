"""Curves of many runs: joined over seeds, smoothed, and drawn with buttons that need no kernel."""

import json

import numpy as np
import pandas as pd
import pytest

from tests.helpers.runfolders import write_run
from udonlib.lab.compare.many import curves
from udonlib.lab.pictures import pictures
from udonlib.runs.folder import RunFolder


def table(values: dict[int, float], name: str = "total") -> pd.DataFrame:
    return pd.DataFrame({"curve": name, "step": list(values), "value": list(values.values())})


def test_a_run_gives_losses_validation_rate_and_gradient(tmp_path):
    folder = write_run(tmp_path, "one")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"learning_rate": 0.1, "gradient_norm": 2.0 * line["step"]} if line["kind"] == "train" else {}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = curves.run_curves(RunFolder(folder))
    assert set(found["curve"]) == {"ce_student", "total", "learning_rate", "gradient_norm", "r_at_1", "mmp_at_5"}
    assert found[found["curve"] == "gradient_norm"]["value"].tolist() == [40, 80]
    assert found[found["curve"] == "ce_student"]["value"].tolist() == [4.5, 4.0]  # the mean of two domains
    assert found[found["curve"] == "r_at_1"]["value"].tolist() == [55.5]


def test_runs_that_recorded_no_gradient_have_no_curve_of_it(tmp_path):
    found = curves.run_curves(RunFolder(write_run(tmp_path, "old")))
    assert "gradient_norm" not in set(found["curve"])
    (write_run(tmp_path, "new", finished=False) / "metrics.jsonl").write_text("")
    assert curves.run_curves(RunFolder(tmp_path / "runs" / "new")).empty


def test_seeds_are_joined_where_they_have_come_to():
    joined = curves.over_seeds([table({0: 4.0, 10: 2.0}), table({0: 6.0, 5: 5.0, 10: 4.0, 20: 2.0})], "total")
    assert joined["step"].tolist() == [0, 5, 10, 20]
    assert joined["mean"].tolist() == [5, 4, 3, 2]  # at 5 the first run is between its records
    assert joined["low"].tolist() == [4, 3, 2, 2]
    assert joined["high"].tolist() == [6, 5, 4, 2]
    assert joined["n"].tolist() == [2, 2, 2, 1]
    assert curves.over_seeds([], "total").empty
    assert len(curves.over_seeds([table(dict.fromkeys(range(5000), 1.0))], "total")) == curves.N_POINTS


def test_smoothing_forgets_by_its_weight_and_keeps_a_constant():
    np.testing.assert_allclose(curves.smoothed(np.full(5, 3.0), 0.9), 3.0)
    np.testing.assert_allclose(curves.smoothed(np.array([1.0, 2.0]), 0.5), [1.0, (0.25 * 1 + 0.5 * 2) / 0.75])
    np.testing.assert_allclose(curves.smoothed(np.array([1.0, 7.0]), 0.0), [1.0, 7.0])


@pytest.fixture
def groups() -> dict[str, list[pd.DataFrame]]:
    ends = {"udon": [4.0, 5.0], "us_rr": [6.0]}
    return {
        name: [
            pd.concat([table({0: end + 2, 10: end + 3, 20: end}), table({20: 50.0}, "r_at_1")], ignore_index=True)
            for end in made
        ]
        for name, made in ends.items()
    }


def test_a_group_is_a_line_and_of_several_seeds_a_band(groups):
    fig = curves.curves_chart(groups, 2)
    assert [note.text for note in fig.layout.annotations] == ["validation R@1, %", "loss: total"]
    assert "2 more" in fig.layout.title.text
    names = [trace.name for trace in fig.data if trace.fill is None]
    assert names == ["udon (2 runs)"] * 2 + ["us_rr"] * 2
    assert sum(trace.fill == "toself" for trace in fig.data) == 2
    line = next(trace for trace in fig.data if trace.fill is None and len(trace.x) == 3)
    assert list(line.y) == [6.5, 7.5, 4.5]
    assert line.hovertemplate
    assert pictures.draw(json.loads(fig.to_json()), 900)[:4] == b"\x89PNG"  # without a browser, too


def test_buttons_hold_every_trace_smoothed_and_the_axes_of_training_alone(groups):
    fig = curves.curves_chart(groups, smoothing=0.5, log=True)
    smooth, scales = fig.layout.updatemenus
    assert [button.label for button in smooth.buttons] == [
        "as recorded",
        "smoothing 0.5",
        "smoothing 0.6",
        "smoothing 0.9",
    ]
    assert smooth.active == 1
    for button in smooth.buttons:
        shown = button.args[0]["y"]
        assert [len(values) for values in shown] == [len(trace.y) for trace in fig.data]
    place = next(i for i, trace in enumerate(fig.data) if trace.fill is None and len(trace.x) == 3)
    raw, now = (smooth.buttons[i].args[0]["y"][place] for i in (0, 1))
    assert raw == [6.5, 7.5, 4.5]
    np.testing.assert_allclose(now, fig.data[place].y, rtol=1e-3)
    assert now != raw
    assert list(scales.buttons[1].args[0]) == ["yaxis2.type"]
    assert (fig.layout.yaxis2.type, fig.layout.yaxis.type) == ("log", None)


def test_where_nothing_was_trained_the_figure_says_so():
    assert "none of these runs" in curves.curves_chart({}).layout.annotations[0].text
