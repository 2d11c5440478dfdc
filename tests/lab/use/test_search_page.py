"""A search as one HTML file."""

import re

import pytest

from udonlib.errors import UserError
from udonlib.lab.use.answers import cropped, find, of_row
from udonlib.lab.use.search_page import save_page


def test_a_page_holds_all_that_it_shows(searched, tmp_path):
    found = find(searched, of_row(searched, 4))
    file = save_page(searched, found, tmp_path / "page.html")
    text = file.read_text()
    n_images = 1 + sum(len(hits) for hits in (*found.student.values(), *found.teacher.values()))
    assert text.count('src="data:image/jpeg;base64,') >= n_images
    assert not re.search(r'(src|href)="(?!data:)|url\(|<script|https?://', text)
    assert found.query.name in text
    assert searched.model.name in text


def test_pages_get_names_of_their_own_and_none_is_replaced(searched, results):
    found = find(searched, of_row(searched, 4))
    first, second = (
        save_page(searched, found),
        save_page(searched, find(searched, cropped(found.query, (0, 0, 1, 0.5)))),
    )
    assert first.parent == second.parent == results / "searches"
    assert second.stem == first.stem + "-2"
    assert first.read_text() != second.read_text()


def test_a_place_that_cannot_be_written_is_said(searched, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_page(searched, find(searched, of_row(searched, 4)), tmp_path / "file" / "page.html")
