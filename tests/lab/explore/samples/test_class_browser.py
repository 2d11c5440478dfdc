"""Classes page by page: all of them, found by name and size."""

import pytest

from tests.helpers.catalogs import write_uned_tree
from udonlib.data.catalog import load_catalog
from udonlib.lab.explore.samples import class_browser
from udonlib.lab.explore.samples.class_browser import FEWEST, MOST, ClassBrowser, browse, classes_of
from udonlib.lab.views.sheets import Picture


@pytest.fixture
def catalog(tmp_path):
    sizes = {"train": tuple(range(2, 21)), "val": (3, 3), "test": (6, 5, 4)}
    return load_catalog(str(write_uned_tree(tmp_path, sizes=sizes)))


def test_every_image_is_in_its_class_and_classes_are_in_the_order_of_labels(catalog):
    split = catalog["emoji"].splits["train"]
    classes = classes_of(split)
    assert [len(each.rows) for each in classes] == list(range(2, 21))
    for each in classes:
        labels = split.labels[each.rows, 0].tolist()
        assert {split.class_names.get(label, str(label)) for label in labels} == {each.name}


def test_all_classes_can_be_paged_through_with_as_many_images_as_there_is_room_for(catalog):
    browser = ClassBrowser(catalog)
    seen = []
    for page in range(3):
        assert (browser.gallery.page, browser.gallery.pages) == (page, 3)
        seen += [section["title"] for section in browser.gallery.sections]
        assert all(1 <= len(section["tiles"]) <= class_browser.N_TILES for section in browser.gallery.sections)
        browser.turn({"turn": 1})
    assert len(seen) == len(set(seen)) == 19
    assert browser.gallery.page == 2  # there is no further one
    assert "19 classes, 209 images" in browser.said.value
    assert sum("10 of them" in title for title in seen) == 10
    tile = browser.gallery.sections[0]["tiles"][0]
    assert tile["src"].startswith("data:image/")


def test_classes_are_found_by_name_and_by_size(catalog):
    browser = ClassBrowser(catalog)
    browser.order.value = MOST
    assert ": 20 images" in browser.gallery.sections[0]["title"]
    browser.order.value = FEWEST
    assert browser.gallery.sections[0]["title"].endswith(": 2 images")
    browser.turn({"turn": 1})
    name = browser.shown()[5].name
    browser.words.value = f" {name.upper()} "
    assert browser.gallery.page == 0  # what is found begins on its first page
    assert browser.gallery.sections[0]["title"].startswith(name)
    browser.words.value = "no such class"
    assert browser.gallery.sections == []
    assert "no class" in browser.said.value


def test_another_domain_keeps_the_split_where_it_has_it(catalog):
    browser = ClassBrowser(catalog)
    browser.split.value = "test"
    browser.domain.value = "flags"
    assert browser.split.value == "test"
    assert "3 classes, 15 images" in browser.said.value
    paths = {path.rpartition("/")[2] for path in catalog["flags"].splits["test"].paths}
    assert {tile["name"] for section in browser.gallery.sections for tile in section["tiles"]} <= paths


def test_an_image_that_cannot_be_read_has_a_tile_that_says_so(catalog, monkeypatch):
    def broken(catalog, path):
        raise class_browser.UserError("gone")

    monkeypatch.setattr(class_browser, "thumbnail", broken)
    tile = ClassBrowser(catalog).gallery.sections[0]["tiles"][0]
    assert (tile["note"], tile["mark"], tile["src"]) == ("cannot be read", "cross", "")


def test_where_nobody_looks_on_there_is_a_sheet(catalog):
    assert isinstance(browse(catalog, live=False), Picture)
    assert isinstance(browse(catalog, live=True), ClassBrowser)
