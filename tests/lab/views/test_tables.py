"""Tables say their texts as HTML and as text, figures with their intervals; drawings are where their numbers are."""

import re

import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter

from tests.helpers.tables import body, bold_cells, texts
from udonlib.lab.views import tables

NAN = float("nan")


def test_names_and_texts_of_facts_are_text_and_not_markup():
    table = tables.facts_table({"<i>a": "<b>one", "b": "two"})
    assert "&lt;i&gt;a</th>" in table.html
    assert "&lt;b&gt;one</td>" in table.html
    assert table.text == "<i>a  <b>one\nb     two"


def test_a_table_shows_as_html_and_as_text():
    table = tables.lines_table(["row", "x<y"], [["a<b", "**1.0 ± 0.5**"], ["c", "–"]])
    shown, _ = DisplayFormatter().format(table)
    assert shown == {"text/html": table.html, "text/plain": table.text}
    assert body(table) == [["a&lt;b", "<b>1.0 <small>± 0.5</small></b>"], ["c", "–"]]
    assert "x&lt;y</th>" in table.html
    assert [line.split() for line in table.text.splitlines()] == [
        ["row", "x<y"],
        ["a<b", "1.0", "±", "0.5"],
        ["c", "–"],
    ]


def test_a_text_that_only_begins_as_bold_is_not_bold():
    assert tables.as_html("**a") == "**a"


def test_a_part_of_a_cell_may_be_bold():
    assert tables.as_html("9.8; **+3.5 ± 3.3**") == "9.8; <b>+3.5 <small>± 3.3</small></b>"


def test_columns_stand_under_their_groups_and_sums_under_a_rule():
    columns = {("", "n"): ["1", "2"], ("student", "R@1"): ["**3**", "4"], ("student", "mMP@5"): ["5", "6"]}
    table = tables.columns_table(columns, ["emoji", "mean"], ("merged index,", "percent"))
    assert re.findall(r'colspan="2"[^>]*>([^<]*)<', table.html) == ["student"]
    assert texts(table) == [["emoji", "1", "3", "5"], ["mean", "2", "4", "6"]]
    assert bold_cells(table) == {("emoji", 1)}
    emoji, mean = table.html.split("<tbody>")[1].split("</tr>")[:2]
    assert ("border-top" in emoji, mean.count("border-top")) == (False, 4)
    assert "**" not in table.text


def test_figures_have_half_the_width_of_their_interval_and_differences_their_sign():
    assert tables.figure(52.34, 51.6, 53.0) == "52.3 ± 0.7"
    assert tables.figure(52.34) == tables.figure(52.34, NAN, NAN) == "52.3"
    assert tables.figure(NAN, NAN, NAN) == "–"
    assert tables.difference(-1.0, -1.5, -0.5) == "**−1.0 ± 0.5**"
    assert tables.difference(1.0, 0.5, 1.5) == "**+1.0 ± 0.5**"
    assert tables.difference(0.5, -0.5, 1.5) == "+0.5 ± 1.0"
    assert tables.difference(NAN, NAN, NAN) == "–"


def test_a_curve_goes_from_corner_to_corner_and_not_beyond():
    frame = tables.Frame(110, 60, left=10, bottom=5, top=5)
    assert 'points="10.0,55.0 110.0,5.0 110.0,5.0"' in frame.line([(0, 0), (1, 1), (1.5, 1)], "red")


def test_areas_stack_and_hold_until_the_next_end():
    frame = tables.Frame(100, 100, left=0, bottom=0, top=0)
    made = frame.areas(np.array([0.0, 0.5, 1.0]), np.array([[0.2, 0.8], [0.6, 0.4]]), [("red", "a<b"), ("blue", "b")])
    first, second = re.findall(r'points="([^"]*)"', made)
    assert first == "0.0,80.0 50.0,80.0 50.0,40.0 100.0,40.0 100.0,100.0 50.0,100.0 50.0,100.0 0.0,100.0"
    assert second.split()[:2] == ["0.0,0.0", "50.0,0.0"]
    assert second.split()[-1] == "0.0,80.0"
    assert "<title>a&lt;b</title>" in made
    assert frame.areas(np.zeros(1), np.zeros((0, 2)), []) == ""


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_bar_is_as_long_as_its_share(share):
    assert f"width:{share:.2%}" in tables.bar(share)
