"""search.ipynb without hands."""

import pytest

from tests.helpers.catalogs import write_image_folder
from udonlib.lab.use import search_views
from udonlib.lab.use.use_params import SearchParams


def test_it_says_what_is_searched_and_what_was_measured(searched):
    text = str(search_views.index_table(searched))
    for words in (
        "small, ",
        "emoji, flags",
        "exact: recall@10 1.000 of the exact neighbours",
        "ms a query",
        "below a sc",
    ):
        assert words in text
    assert "none are shown" not in text


def test_the_sheet_shows_students_and_teachers(searched, open_small):
    sheet, without = search_views.query_sheet(searched), search_views.query_sheet(open_small(teachers=False))
    assert sheet.size[0] == without.size[0]
    assert sheet.size[1] > 1.5 * without.size[1]
    assert len(sheet.data) < 400_000


def test_misses_are_tabulated_with_what_stands_before(searched):
    text = str(search_views.misses_table(searched))
    assert "its rank" in text
    assert sum(line.strip().startswith(("emoji/", "flags/")) for line in text.splitlines()) >= 2


def test_costs_rise_with_what_is_asked_for(searched, open_small, tmp_path):
    text = str(search_views.costs_table(searched))
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["1%", "5%", "10%", "20%", "50%"]
    few = open_small(data=str(write_image_folder(tmp_path / "few", n_classes=2, n_images=2)))
    assert "too few" in str(search_views.costs_table(few))


@pytest.mark.parametrize("live", [False, True])
def test_opening_says_how_far_it_is(results, capsys, live):
    searched = search_views.opened(SearchParams(outputs=str(results), n_threads=1, k=3), live=live)
    assert len(searched.index) > 20
    if not live:
        assert "images are searched, after" in capsys.readouterr().out
