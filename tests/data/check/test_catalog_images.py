"""Every image of a catalog once, with its splits and classes; labels alone tell which queries cannot be right."""

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.catalogs import picture, uned_files, write_image_folder, write_tree, write_uned_tree
from udonlib.data.catalog import Domain, Split, load_catalog
from udonlib.data.check.catalog_images import CatalogImages, single_images, without_positives


def test_an_image_of_two_splits_stands_there_once(tmp_path):
    catalog = load_catalog(str(write_uned_tree(tmp_path / "uned", index_of="flags")))
    images = CatalogImages(catalog)
    assert len(images) == len({(d.name, p) for d in catalog.domains for s in d.splits.values() for p in s.paths})
    assert len(images.paths) == len(images.domain) == len(images.roles) == len(images)
    both = np.flatnonzero(images.is_in("train") & images.is_in("index"))
    assert len(both) == 12
    at = int(both[0])
    assert images.splits(at) == ["train", "index"]
    assert images.where(at) == f"flags, train and index, class '{next(iter(images.classes(at).values()))}'"


def test_classes_of_two_domains_are_never_the_same(tmp_path):
    images = CatalogImages(load_catalog(str(write_uned_tree(tmp_path / "uned"))))
    first = int(np.flatnonzero(images.domain == 0)[0])
    same = [i for i in range(len(images)) if i != first and images.share_a_class(first, i)]
    assert same
    assert {int(images.domain[i]) for i in same} == {0}
    assert all(images.classes(i) == images.classes(first) for i in same)


def test_test_images_and_their_index_come_first_in_random_order(tmp_path):
    images = CatalogImages(load_catalog(str(write_uned_tree(tmp_path / "uned", index_of="flags"))))
    order = images.evaluated_first(0)
    assert sorted(order.tolist()) == list(range(len(images)))
    places = [images.is_in(name)[order] for name in ("test", "index", "val")]
    groups = [next((i for i, place in enumerate(places) if place[at]), 3) for at in range(len(order))]
    assert groups == sorted(groups)
    assert len(set(groups)) == 4
    n_test = groups.count(0)
    assert order[:n_test].tolist() != sorted(order[:n_test].tolist())
    assert images.evaluated_first(1).tolist() != order.tolist()


def test_missing_images_are_found_by_their_positions(tmp_path):
    root = write_image_folder(tmp_path / "pets")
    catalog = load_catalog(str(root))
    images = CatalogImages(catalog)
    assert list(images.missing()) == []
    (root / images.paths[4]).unlink()
    assert list(images.missing()) == [4]


def test_queries_without_a_positive_are_those_alone_in_their_class(tmp_path):
    files = uned_files(["emoji"])
    entries = [{"path": f"emoji/{i}.png", "class_id": label} for i, label in enumerate((50, 50, 51, [52, 50]))]
    files |= {f"images/emoji/{i}.png": picture(i) for i in range(4)}
    files["info_files/emoji/test.json"] = json.dumps(entries).encode()
    domain = load_catalog(str(write_tree(tmp_path / "a", files))).domains[0]
    assert without_positives(domain, "test").tolist() == [False, False, True, False]
    assert not without_positives(domain, "val").any()
    # In an index of their own it counts what lies there, and not the queries.
    files["info_files/emoji/index.json"] = json.dumps([entries[1], entries[2]]).encode()
    domain = load_catalog(str(write_tree(tmp_path / "b", files))).domains[0]
    assert without_positives(domain, "test").tolist() == [False, True, True, False]


LABELLED = st.dictionaries(
    st.sampled_from("abcdef"), st.tuples(st.integers(0, 3), st.integers(-1, 3)), min_size=1, max_size=6
)


def split_of(name: str, images: dict[str, tuple[int, int]]) -> Split:
    return Split(name, tuple(images), np.array(list(images.values()), np.int64))


@given(LABELLED, st.none() | LABELLED)
def test_queries_without_positives_are_those_that_share_no_label_with_another_image(queries, index):
    """Labels of an index may name one class twice, and a query may stand in it, or not."""
    if index is not None:  # an image has the same labels wherever it stands
        index = {path: queries.get(path, labels) for path, labels in index.items()}
    splits = {"test": split_of("test", queries)} | ({} if index is None else {"index": split_of("index", index)})
    searched = queries if index is None else index
    expected = [
        not any(other != path and {*labels} & {*theirs} - {-1} for other, theirs in searched.items())
        for path, labels in queries.items()
    ]
    assert without_positives(Domain("d", splits), "test").tolist() == expected


def test_images_alone_in_their_training_class_are_named(tmp_path):
    root = write_uned_tree(tmp_path / "uned", sizes={"train": (4, 1, 3, 1), "val": (2,), "test": (2,)})
    domain = load_catalog(str(root)).domains[0]
    assert [domain.splits["train"].paths[i] for i in single_images(domain)] == [
        "emoji/0001_000.png",
        "emoji/0003_000.png",
    ]
