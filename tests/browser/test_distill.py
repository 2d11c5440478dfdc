"""distill.ipynb in JupyterLab: who teaches what is seen before the training, steered during it, and compared after."""

import pytest
import yaml

from tests.browser.lab import Lab, only_run
from tests.helpers.catalogs import write_uned_tree
from tests.helpers.taught import small_teachers, write_teachers
from tests.helpers.waiting import wait_until

BEFORE, PANEL, TRAINING, VERDICT, MAPS = "distill-04", "distill-06", "distill-07", "distill-10", "distill-16"
CHARTS = [BEFORE, "distill-08", "distill-11", MAPS]


@pytest.fixture
def values(tmp_path) -> dict[str, object]:
    """Parameters of a run with two small teachers, of some minutes if nobody ends it."""
    given = {"preset": "smoke", "recipe": "unic", "teachers": small_teachers(write_teachers(tmp_path))}
    given |= {"domains_per_batch": 2, "batch_size": 8, "n_threads": 1, "drop_probability": 0.0}
    given |= {"steps": 400, "log_every": 20, "eval_every": 400, "checkpoint_every": 50, "update_every": 200}
    preset = tmp_path / "small.yaml"
    preset.write_text(yaml.safe_dump(given))
    data = write_uned_tree(tmp_path / "data", index_of="flags")
    return {"preset": str(preset), "data": str(data), "outputs": str(tmp_path / "results")}


def test_a_person_weighs_teachers_and_sees_what_the_student_keeps(lab: Lab, values, tmp_path):
    notebook = lab.open("distill.ipynb", **values)
    notebook.run_all()
    wait_until(lambda: list((tmp_path / "results").glob("runs/*/metrics.jsonl")), "a run")
    run = only_run(tmp_path / "results")
    wait_until(lambda: run.records("train"), "its first step")

    page = notebook.page
    page.locator(".udon-w-teacher-one .noUi-handle").press("ArrowRight")
    wait_until(lambda: run.interventions() and run.interventions()[-1].teachers, "the teacher's weight")
    assert run.interventions()[-1].teachers["one"] > 1
    page.locator(".udon-w-teachers-dropped .noUi-handle").press("ArrowRight")
    wait_until(lambda: run.interventions()[-1].drop_probability, "the drop probability")
    assert "one" in notebook.text(TRAINING)

    notebook.wait_idle()
    assert notebook.cell_errors() == []
    assert notebook.errors == []
    assert "the student keeps or beats the best teacher in" in notebook.text(VERDICT)
    for cell in CHARTS:
        figure = notebook.output(cell).and_(page.locator(".jp-RenderedPlotly"))
        figure.scroll_into_view_if_needed()
        assert figure.bounding_box()["width"] > 600
    kept = [of_step["losses"] for of_step in run.records("train")][-1]
    assert any(term == "two/kept" and value < 1 for terms in kept.values() for term, value in terms.items())
