"""The table of all runs sorts, filters and escapes; what is unfinished comes with what to do about it."""

import json
import math
import re
import shutil
from dataclasses import replace
from html import unescape

import pytest

from tests import PROJECT
from udonlib.lab.compare import runs_table
from udonlib.lab.compare.many.notes import Note
from udonlib.lab.compare.overview import RunRow

HOME = PROJECT / "results" / "runs"
DONE = {"state": "finished", "step": 40, "steps": 40, "recipe": "udon", "seed": 0, "data": "pictures"}
ROWS = [
    RunRow("best", **DONE, r_at_1=100.0, r_at_1_low=99.0, r_at_1_high=100.0, train_seconds=65.0),
    RunRow("good", **DONE, r_at_1=9.5, r_at_1_low=8.0, r_at_1_high=11.0, n_parameters_trained=2_153_696),
    RunRow("<b>bad</b>", **DONE, r_at_1=20.0, changes={"w_kl": 0.0, "weights": "a<b"}),
    RunRow("going", **DONE | {"state": "training", "step": 10}, text="training, step 10 of 40", seconds_left=90.0),
    RunRow("killed", **DONE | {"state": "lost", "step": 5}, text="killed after step 5; run it again"),
    RunRow("broken", problem="params.yaml: damaged"),
]


def cell(html: str, run: str, column: str) -> str:
    row = re.search(f'<tr data-run="{re.escape(run)}">.*?</tr>', html).group()
    return re.search(f'udon-runs-{column}"[^>]*>(.*?)</td>', row).group(1)


def test_cells_show_figures_with_units_and_intervals():
    html = runs_table.static_table(ROWS, HOME).html
    assert cell(html, "best", "r_at_1") == "100.0 <small>± 0.5</small>"
    assert cell(html, "best", "train_seconds") == "1 min 05 s"
    assert cell(html, "good", "n_parameters_trained") == "2.15 M"
    assert cell(html, "good", "train_seconds") == "–"
    assert cell(html, "broken", "state") == "! unreadable"
    assert cell(html, "broken", "else") == "params.yaml: damaged"
    assert cell(html, "going", "step").endswith("10 / 40 <small>1 min 30 s left</small>")
    assert 'width:25.0%"' in cell(html, "going", "step")


def test_what_comes_from_files_is_escaped():
    html = runs_table.static_table(ROWS, HOME).html + runs_table.open_runs(ROWS, HOME).html
    assert "<b>bad</b>" not in html
    assert cell(html, "&lt;b&gt;bad&lt;/b&gt;", "else") == "weights a&lt;b"  # the ablation no_kl is in the title


def test_headers_are_buttons_that_say_how_the_table_is_sorted():
    html = runs_table.static_table(ROWS, HOME).html
    heads = re.findall(r"<th scope=\"col\".*?</th>", html)
    assert len(heads) == len(runs_table.COLUMNS)
    assert all("<button" in head and "aria-sort=" in head for head in heads)
    assert [head for head in heads if 'aria-sort="descending"' in head] == [h for h in heads if "sort-r_at_1" in h]


def test_the_chosen_runs_are_marked_and_can_be_picked_where_a_widget_asks():
    html = runs_table.static_table(ROWS, HOME, ("good", "best")).html
    assert re.search(r'data-v="good good" [^>]*><b>A</b> good</th>', html)
    assert re.search(r'data-v="best best" [^>]*><b>B</b> best</th>', html)
    assert 'type="radio"' not in html
    row = runs_table.row_html(ROWS[0], picks=True)
    assert re.findall(r'type="radio" class="([\w-]+)" aria-label="best as ([AB])"', row) == [
        ("udon-runs-a", "A"),
        ("udon-runs-b", "B"),
    ]
    assert row.count("<td") + row.count("<th") == runs_table.skeleton("", picks=True).count("<th scope")


def test_no_runs_say_how_to_begin():
    table = runs_table.static_table([], HOME)
    for text in (table.html, table.text):
        assert "No runs yet" in text
        assert "notebooks/train.ipynb" in text


def test_many_changes_are_shortened_and_a_steered_run_is_marked():
    row = RunRow("one", **DONE | {"changes": {f"p{i}": i for i in range(7)}}, interventions=2)
    html = runs_table.row_html(row)
    assert cell(html, "one", "else") == "p0 0, p1 1, p2 2, p3 3 and 3 more"
    titled = runs_table.row_html(replace(row, title="udon, p0 0, p1 1, 5 more, seed 0"))
    assert cell(titled, "one", "else") == "p2 2, p3 3, p4 4, p5 5 and 1 more"
    assert '<span class="udon-runs-title">udon, p0 0, p1 1, 5 more, seed 0</span><small>one</small>' in titled
    assert cell(html, "one", "state") == "✓ finished <small>2 interventions</small>"


def test_a_note_and_tags_stand_in_their_row_and_can_be_written_where_there_is_a_widget():
    row = RunRow("one", **DONE, note=Note("a <try>", ("good", "x")))
    shown = cell(runs_table.row_html(row), "one", "else")
    assert re.sub("<[^>]*>", "|", shown) == "|good||x| |a &lt;try&gt;|"
    button = re.search('<button.*?data-note="(.*?)"', runs_table.row_html(row, picks=True))
    assert json.loads(unescape(button.group(1))) == {"text": "a <try>", "tags": "good, x"}
    assert "<button" not in runs_table.row_html(row)


def test_an_archived_run_is_marked_and_no_longer_open():
    put_away = [replace(row, note=Note(archived=True)) for row in ROWS]
    assert runs_table.row_html(put_away[0]).startswith('<tr data-run="best" class="udon-runs-archived">')
    assert "killed" not in runs_table.open_runs(put_away, HOME).text
    assert "going" in runs_table.open_runs(put_away, HOME).text  # it trains now
    assert runs_table.static_table(put_away, HOME).text == ""


def test_open_runs_come_with_what_to_do():
    table = runs_table.open_runs(ROWS, HOME)
    assert table.text.splitlines() == [
        "▶ going: training, step 10 of 40, about 1 min 30 s left; "
        'to steer it, open `notebooks/steer.ipynb` with `run = "going"`',
        "✗ killed: killed after step 5; run it again; "
        "`papermill notebooks/train.ipynb outputs/train.ipynb -f results/runs/killed/params.yaml`",
        "! broken: params.yaml: damaged",
    ]
    assert "<code>notebooks/steer.ipynb</code>" in table.html
    assert runs_table.open_runs(ROWS[:3], HOME).text == "Nothing is training, and nothing was left unfinished."
    assert "and 12 more" in runs_table.open_runs([ROWS[4]] * 20, HOME).text


def test_a_missing_number_sorts_as_missing():
    assert runs_table._sort_value(math.nan) == runs_table._sort_value(None) == ""
    assert runs_table._sort_value(0) == "0"


@pytest.fixture(scope="module")
def page():
    """The table in a page of a browser, as an exported notebook shows it."""
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if executable is None:
        pytest.skip("no Chrome or Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.set_content(runs_table.static_table(ROWS, HOME).html)
        yield page
        browser.close()


def names(page) -> list[str]:
    return page.evaluate("[...document.querySelectorAll('tbody tr:not([hidden])')].map((row) => row.dataset.run)")


def test_in_a_browser_headers_sort_numbers_as_numbers_and_words_as_words(page):
    missing = ["going", "killed", "broken"]
    assert names(page) == ["best", "<b>bad</b>", "good", *missing]
    page.locator(".udon-runs-sort-r_at_1").press("Enter")  # by keyboard
    assert names(page) == ["good", "<b>bad</b>", "best", *missing]  # 9.5 < 20 < 100; what is missing stays last
    page.locator(".udon-runs-sort-run").click()
    assert names(page) == ["<b>bad</b>", "best", "broken", "going", "good", "killed"]
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("run")
    assert page.locator("th[aria-sort=descending]").count() == 0


def test_in_a_browser_the_filter_keeps_the_rows_that_have_all_words(page):
    page.fill(".udon-runs-filter", "FINISHED good")
    assert names(page) == ["good"]
    assert page.inner_text(".udon-runs-count") == "1 of 6 runs"
    page.fill(".udon-runs-filter", "")
    assert page.inner_text(".udon-runs-count") == "6 runs"


@pytest.mark.parametrize(
    ("width", "hidden"), [(1006, set()), (790, {"ended"}), (592, {"ended", "step", "state", "mmp"})]
)
def test_in_a_browser_the_table_fits_and_what_there_is_no_room_for_can_be_had(page, width, hidden):
    page.set_viewport_size({"width": width + 16, "height": 700})
    rows = [replace(row, title="udon no_distillation, some_parameter 0.123, seed 10") for row in ROWS[:3]]
    rows.append(replace(ROWS[0], run="put_away", note=Note(archived=True)))
    body = "".join(runs_table.row_html(row, picks=True) for row in rows)  # as wide as it gets
    script = f"<script>{runs_table.asset('runs_table.js')}{runs_table.asset('runs_start.js')}</script>"
    page.set_content(runs_table.skeleton(body, picks=True) + script)
    box = "document.querySelector('.udon-runs-scroll')"
    scroll = f"{box}.scrollWidth - {box}.clientWidth"
    heads = "[...document.querySelectorAll('thead th')].filter((head) => head.offsetWidth)"
    shown = f"{heads}.map((head) => head.querySelector('button')?.className.split('sort-')[1] ?? 'A B')"
    assert page.evaluate(scroll) <= 0
    assert set(page.evaluate(shown)) == {*runs_table.COLUMNS, "A B"} - {*runs_table.MORE} - hidden
    assert "put_away" not in names(page)
    page.check(".udon-runs-show-columns")
    assert set(page.evaluate(shown)) == {*runs_table.COLUMNS, "A B"}
    assert page.evaluate(scroll) > 0
    page.check(".udon-runs-show-archived")
    assert "put_away" in names(page)
