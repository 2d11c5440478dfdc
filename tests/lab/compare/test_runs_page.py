"""The page of runs.ipynb: what a batch shows, what a person chooses, and that only what changed is drawn again."""

import json
import math
import threading

import plotly.graph_objects as go
import plotly.io as pio
import pytest

from tests.helpers.runfolders import write_results, write_run
from tests.helpers.waiting import wait_until
from udonlib.errors import ParameterError, UserError
from udonlib.lab.compare import runs_page
from udonlib.lab.compare.runs_page import RunPage
from udonlib.lab.views import front_end
from udonlib.presets import RunsParams
from udonlib.runs.folder import RunFolder
from udonlib.runs.writer import RunWriter


class Screen:
    """What cells show, in place of IPython's display."""

    def __init__(self):
        self.shown: list = []
        self.stills: list[str] = []
        self.updates: list[tuple[int, dict]] = []  # number of the output, and what it shows now

    def display(self, made, raw=False, display_id=False):
        self.shown.append(made)
        screen, number = self, len(self.shown) - 1

        class Handle:
            def update(self, bundle, raw=False):
                assert raw
                screen.updates.append((number, bundle))

        return Handle() if display_id else None

    def display_widget(self, bundle, raw, display_id):
        """A widget counts as one output; what a saved notebook keeps of it is noted apart."""
        if "text/html" not in bundle:
            return self.display(bundle, raw, display_id)
        self.stills.append(bundle["text/html"])
        screen = self

        class Handle:
            def update(self, bundle, raw):
                screen.stills.append(bundle["text/html"])

        return Handle()

    def last(self, number: int) -> str:
        found = [bundle for at, bundle in self.updates if at == number]
        return json.dumps(found[-1]) if found else ""


@pytest.fixture
def screen(monkeypatch) -> Screen:
    made = Screen()
    monkeypatch.setattr(runs_page, "display", made.display)
    monkeypatch.setattr(front_end, "display", made.display_widget)
    monkeypatch.setattr(front_end, "KEEP_SECONDS", 0)
    monkeypatch.setattr(pio.renderers, "default", "plotly_mimetype")  # as in JupyterLab
    monkeypatch.setattr(runs_page, "DisplayHandle", object)
    return made


@pytest.fixture
def runs(tmp_path):
    """Three runs: `best` is compared with `plain` where nobody chooses."""
    write_run(tmp_path, "best", {"emoji": [1, 1, 1]})
    write_run(tmp_path, "plain", {"emoji": [1, 0, 0]}, recipe="us_rr", sampler_loss="student")
    write_run(tmp_path, "third", {"emoji": [1, 1, 0]})
    return tmp_path


def page(outputs, live=False, **values) -> RunPage:
    return RunPage(RunsParams(outputs=str(outputs), **values), live)


def show_all(page: RunPage) -> None:
    page.open_runs()
    page.table()
    for cell in (page.names, page.parameters, page.curves, page.allocation, page.differences, page.changed):
        cell()
    page.gallery("B")


def test_a_batch_shows_every_part_once_and_builds_no_widget(runs, screen):
    made = page(runs)
    show_all(made)
    assert made.widget is None
    assert len(screen.shown) == 11
    assert [number for number, part in enumerate(screen.shown) if isinstance(part, go.Figure)] == [4, 5, 7]
    assert "udon-runs-table" in screen.shown[1].html
    assert "plain" in screen.shown[2].text
    for part in screen.shown[8:11:2]:  # there are no images here
        assert "cannot be read" in part.text or "pictures" in part.text


@pytest.mark.parametrize("names", [[], ["only"], ["only", "damaged"]])
def test_with_fewer_than_two_runs_every_part_says_so(tmp_path, screen, names):
    for name in names:
        folder = write_run(tmp_path, name)
        if name == "damaged":
            (folder / "params.yaml").unlink()
    show_all(page(tmp_path))
    assert ("No runs yet" in screen.shown[1].text) == (not names)
    for part in screen.shown[2:]:
        assert "Nothing to compare yet" in part.text


def test_runs_are_chosen_by_name_by_age_or_by_themselves(runs):
    assert page(runs).chosen() == ("plain", "best")
    assert page(runs, run_a="third").chosen() == ("third", "best")
    assert page(runs, run_b="plain").chosen() == ("best", "plain")  # a run is not compared with itself
    assert page(runs, run_a="best").chosen() == ("best", "plain")
    assert page(runs, run_a="best", run_b="best").chosen() == ("best", "best")  # unless somebody says so
    write_run(runs, "young", began="2026-05-01T00:00:00+0000")
    assert page(runs, run_b="latest").chosen() == page(runs, run="latest").chosen() == ("plain", "young")
    assert page(runs, run=str(runs / "runs" / "plain")).chosen() == ("best", "plain")
    with pytest.raises(ParameterError, match="parameter 'run': found 'plain' beside run_b = 'best'"):
        page(runs, run="plain", run_b="best")
    with pytest.raises(ParameterError, match=r"parameter 'run_a': run 'third' is not among those listed: runs = 'b\*'"):
        page(runs, run_a="third", runs="b*")
    with pytest.raises(UserError, match="parameter 'run_a': no run 'thrid' in .*; did you mean 'third'"):
        page(runs, run_a="thrid")
    assert [row.run for row in page(runs, runs="b*").rows] == ["best"]


def test_choosing_another_run_redraws_the_comparison_and_not_the_table(runs, screen):
    made = page(runs, live=True)
    show_all(made)
    made.refresh()
    assert screen.updates == []
    sent = []
    made.widget.observe(lambda change: sent.append(change["name"]), ["rows", "html"])
    made.widget.a = "third"  # as the browser does
    made.refresh()
    assert made.widget.shown == {"a": "third", "b": "best"}
    assert {number for number, _ in screen.updates} == set(range(2, 11))
    assert "third" in screen.last(2)
    assert sent == []
    before = len(screen.updates)
    made.refresh()
    assert len(screen.updates) == before


def test_a_figure_is_redrawn_in_an_output_of_its_own_height(runs, screen):
    """JupyterLab keeps a plotly output as it was first drawn; a placeholder of its height makes it begin anew."""
    made = page(runs, live=True)
    made.curves()
    made.table()
    made.widget.a = "third"
    made.refresh()
    empty, figure = (bundle for _, bundle in screen.updates)
    height = figure[runs_page.PLOTLY]["layout"]["height"]
    assert empty == {"text/html": f'<div style="height:{height}px"></div>'}
    assert figure[runs_page.PLOTLY]["data"][0]["name"] == "A: third"


def test_a_run_that_moves_changes_its_row_and_only_what_depends_on_it(runs, screen):
    made = page(runs, live=True)
    show_all(made)
    going = write_run(runs, "going", finished=False, step=20)
    made.refresh()
    assert "going" in made.widget.rows
    assert {number for number, _ in screen.updates} == {0}  # what is open; nothing that is compared has changed
    assert "ended without a word" in screen.last(0)
    before, others = made.widget.rows["going"], made.widget.rows["best"]
    write_results(going, {"emoji": [1, 1, 0], "flags": [1, 1]})
    made.refresh()
    assert made.widget.rows["going"] != before
    assert "finished" in made.widget.rows["going"]
    assert made.widget.rows["best"] == others


def test_a_chosen_run_that_moves_is_drawn_again_after_a_rest(runs, screen, monkeypatch):
    going = write_run(runs, "going", {"emoji": [1, 1, 0]}, finished=False, step=20)
    made = page(runs, live=True, run_b="going")
    show_all(made)
    assert "no test outcomes" in screen.shown[6]["text/plain"]
    write_results(going, {"emoji": [1, 1, 0]})
    made._rest_until = math.inf
    made.refresh()
    assert {number for number, _ in screen.updates} == {0}
    made._rest_until = 0.0
    made.refresh()
    assert "no test outcomes" not in screen.last(6)
    assert "emoji" in screen.last(6)


def test_who_chooses_again_while_it_is_redrawn_does_not_wait_for_what_is_out_of_date(runs, screen, monkeypatch):
    made = page(runs, live=True)
    true = runs_page.pair_views.names_table

    def choose_again(pair, titles):
        if pair.a.path.name == "third":
            made.widget.a = "plain"
        return true(pair, titles)

    monkeypatch.setattr(runs_page.pair_views, "names_table", choose_again)
    show_all(made)
    made.widget.a = "third"
    made.refresh()
    assert {number for number, _ in screen.updates} == {2}
    made.refresh()
    assert {number for number, _ in screen.updates} == set(range(2, 11))
    assert "plain" in screen.last(2)


def test_what_could_not_be_redrawn_is_tried_again(runs, screen, monkeypatch):
    monkeypatch.setattr(runs_page, "POLL_SECONDS", 0.01)
    made, broken = page(runs, live=True), []
    true = runs_page.pair_views.allocation_chart

    def fail_once(pair):
        if broken:
            raise broken.pop()
        return true(pair)

    monkeypatch.setattr(runs_page.pair_views, "allocation_chart", fail_once)
    show_all(made)
    broken.append(RuntimeError("no screen"))
    made.widget.a = "third"
    made._count_views({"views": 1})
    wait_until(lambda: screen.last(9))
    made.close()
    assert broken == []


def test_of_a_run_that_trains_figures_are_redrawn_without_their_images(runs, screen, monkeypatch):
    folder = write_run(runs, "going", finished=False, step=20)
    writer = RunWriter(RunFolder(folder))
    try:
        made = page(runs, live=True, run_b="going")
        made.curves()
        made.table()
        monkeypatch.setattr(go.Figure, "_repr_mimebundle_", lambda figure: pytest.fail("an image takes long"))
        made.widget.a = "third"
        made.refresh()
        assert list(screen.updates[-1][1]) == [runs_page.PLOTLY]
    finally:
        writer.close()


def test_the_thread_lives_as_long_as_somebody_shows_the_table(runs, screen, monkeypatch):
    monkeypatch.setattr(runs_page, "POLL_SECONDS", 0.01)

    def threads() -> int:
        return sum(thread.name == "udon-runs" for thread in threading.enumerate())

    def wait(n: int) -> None:
        wait_until(lambda: threads() == n)

    made = page(runs, live=True)
    made.table()
    assert threads() == 0
    made._count_views({"views": 1})
    made._count_views({"views": 1})
    wait(1)
    made._count_views({"views": -1})
    wait(1)
    made._count_views({"views": -1})
    wait(0)
    made._count_views({"views": 1})
    wait(1)
    other = page(runs, live=True)  # the notebook runs again
    wait(0)
    made._count_views({"views": 1})
    wait(0)
    other.close()


def test_curves_of_all_follow_the_filter_and_group_seeds(runs, screen):
    write_run(runs, "again", {"emoji": [1, 0, 1]}, seed=1)
    made = page(runs, live=True)
    made.table()
    made.overlaid()
    names = {trace["name"] for trace in screen.shown[1][runs_page.PLOTLY]["data"] if "name" in trace}
    assert names == {"udon (3 runs)", "us_rr"}
    made.refresh()
    assert screen.updates == []
    made.widget.seen = ["again", "plain"]
    made.refresh()
    assert {number for number, _ in screen.updates} == {1}
    shown = screen.updates[-1][1][runs_page.PLOTLY]["data"]
    assert {trace["name"] for trace in shown if "name" in trace} == {"udon", "us_rr"}


def test_a_note_that_a_person_writes_is_kept_and_shown(runs, screen):
    made = page(runs, live=True)
    made.table()
    made._told({"note": {"run": "third", "text": "too short", "tags": "try", "archived": True}})
    made._told({"note": {"run": "nobody", "text": "x"}})
    made.refresh()
    assert "too short" in made.widget.rows["third"]
    assert "udon-runs-archived" in made.widget.rows["third"]
    assert made.note("third", archived=False) == ["third"]
    made.refresh()
    assert "udon-runs-archived" not in made.widget.rows["third"]


def test_runs_of_other_lengths_are_compared_only_where_somebody_says_so(tmp_path, screen):
    write_run(tmp_path, "long", {"emoji": [1, 1]}, steps=2000)
    write_run(tmp_path, "short", {"emoji": [1, 0]}, steps=12, recipe="us_rr", sampler_loss="student")
    made = page(tmp_path)
    assert made.chosen() is None
    made.names()
    assert "more than twice the steps" in screen.shown[0].text
    assert page(tmp_path, run_a="short", run_b="long").chosen() == ("short", "long")
    write_run(tmp_path, "like", {"emoji": [0, 0]}, steps=1000)
    assert page(tmp_path).chosen() == ("like", "long")
    page(tmp_path).note("like", archived=True)
    assert page(tmp_path).chosen() is None


def test_a_chosen_run_that_vanishes_gives_way_to_another(runs, screen):
    made = page(runs, live=True)
    show_all(made)
    made.widget.b = "third"
    made.refresh()
    assert made.chosen() == ("plain", "third")
    (runs / "runs" / "third").rename(runs / "third")
    made.refresh()
    assert made.chosen() == ("plain", "best")
    assert "third" not in made.widget.rows


def test_a_run_chosen_by_name_that_vanishes_does_not_end_the_page(runs, screen):
    made = page(runs, live=True, run_b="third")
    show_all(made)
    (runs / "runs" / "third").rename(runs / "third")
    made.refresh()
    assert made.chosen() == ("plain", "best")


def test_the_saved_page_of_a_live_table_holds_the_static_one(runs, screen):
    made = page(runs, live=True)
    made.table()
    [living], [still] = screen.shown, screen.stills
    assert "<script>" in still
    assert "best" in still
    assert "application/vnd.jupyter.widget-view+json" in living
    write_run(runs, "newest", {"emoji": [1, 1, 1]})
    made.refresh()
    assert "newest" in screen.stills[-1]


@pytest.mark.parametrize(
    "line",
    ["[1]", '{"kind": "train"}', '{"kind": "train", "step": 9, "losses": [1], "images_seen": 3}'],
    ids=["no_record", "no_step", "no_losses"],
)
def test_damaged_records_are_said_where_their_figures_would_be(runs, screen, line):
    with (runs / "runs" / "best" / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    made = page(runs, run_a="plain", run_b="best")
    made.curves()
    assert "not shown" in screen.shown[0].text
    made.differences()
    assert "emoji" in screen.shown[1].text


def test_a_cell_that_runs_again_is_kept_up_to_date_in_its_new_output_alone(runs, screen):
    made = page(runs, live=True)
    made.table()
    for _ in range(3):
        made.names()
        made.gallery("A")
        made.gallery("B")
    made.widget.a = "third"
    made.refresh()
    assert [number for number, _ in screen.updates] == [7, 8, 9]


def test_the_thread_outlives_whatever_goes_wrong_once(runs, screen, monkeypatch):
    monkeypatch.setattr(runs_page, "POLL_SECONDS", 0.01)
    made = page(runs, live=True)
    made.table()
    calls = []

    def refresh() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise TypeError("damaged")
        made.close()

    monkeypatch.setattr(made, "refresh", refresh)
    made._count_views({"views": 1})
    made._thread.join()
    assert len(calls) == 2
