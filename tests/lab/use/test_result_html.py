"""What was found as HTML."""

import re

from PIL import Image

from udonlib.lab.use import result_html
from udonlib.lab.use.answers import cropped, find, of_picture, of_row, some


def test_every_neighbour_is_there_with_its_mark_and_can_be_clicked(searched):
    found = find(searched, of_row(searched, 4))
    shown = result_html.results(searched, found)
    rows = list(map(int, re.findall(r'data-row="(\d+)"', shown)))
    expected = [*found.student["all domains"].rows]
    for name in found.order:
        expected += [*found.student[name].rows, *found.teacher[name].rows]
    assert rows == expected
    right = sum(searched.labels[row] == found.query.label for row in expected)
    assert shown.count("<i>✓</i>") == right
    assert shown.count("<i>✗</i>") == len(expected) - right
    assert "data-row" not in result_html.results(searched, found, live=False)


def test_it_says_where_the_right_class_stands_and_shows_what_stands_first(searched):
    row = next(row for row in some(searched, 20, misses=True) if find(searched, of_row(searched, row)).why)
    found = find(searched, of_row(searched, row))
    said = result_html.said(searched, found)
    assert f"stands at rank {found.why.rank:,} of {found.why.n:,}" in said
    assert f'data-row="{found.why.first}"' in said
    assert f'data-row="{found.why.right}"' in said
    crop = find(searched, cropped(found.query, (0, 0, 0.6, 0.6)))
    assert "a part of it" in result_html.said(searched, crop)


def test_names_of_files_are_text_and_never_html(searched):
    query = of_picture(searched, Image.new("RGB", (9, 9)), "<script>x</script>.png")
    said = result_html.said(searched, find(searched, query))
    assert "<script>" not in said
    assert "&lt;script&gt;" in said
