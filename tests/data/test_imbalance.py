"""Uneven training data: the profile, what is left of classes and images, and what nothing may change."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.catalogs import write_image_folder, write_uned_tree, write_uned_zip
from udonlib.data.catalog import load_catalog
from udonlib.data.imbalance import falling, open_catalog, uneven
from udonlib.fields import UnevenParams


def sizes_of(domain):
    """Images of each training class, the largest first."""
    return np.sort(np.bincount(domain.train_labels))[::-1].tolist()


def test_sizes_fall_exponentially_from_the_largest_to_the_smallest():
    assert falling(1000, 100, 5, 1).tolist() == [1000, 316, 100, 32, 10]
    assert falling(1000, 100, 1, 1).tolist() == [1000]
    assert falling(10, 100, 3, 2).tolist() == [10, 2, 2]


@given(st.integers(1, 10_000), st.floats(1, 1e6), st.integers(1, 300), st.integers(1, 2))
def test_sizes_never_rise_and_have_a_least_one(largest, factor, n, least):
    sizes = falling(largest, factor, n, least)
    assert len(sizes) == n
    assert (np.diff(sizes) <= 0).all()
    assert (sizes[0], sizes.min() >= least) == (max(least, largest), True)


def test_the_benchmarks_domains_and_classes_fall_by_the_factors():
    whole = load_catalog()
    cut = uneven(whole, 100, 10)
    assert sorted(cut.n_classes.values(), reverse=True) == falling(312, 100, 8, 2).tolist()
    ranked = sorted(whole.names, key=lambda name: -whole.n_classes[name])
    assert list(dict(sorted(cut.n_classes.items(), key=lambda item: -item[1]))) == ranked
    for domain in cut.domains:
        sizes = sizes_of(domain)
        profile = np.minimum(falling(sizes[0], 10, len(sizes), 1), sizes[0])
        assert (sizes <= profile).all(), domain.name
    assert sizes_of(cut["fashion"]) == [220, 70, 22]


def test_a_domain_or_class_that_is_smaller_already_stays_as_it_is():
    whole = load_catalog(domains="emoji, fonts")
    cut = uneven(whole, 2, 1)
    assert cut.n_classes == {"emoji": 312, "fonts": 66}  # 156 would be allowed
    assert sizes_of(cut["fonts"]) == sizes_of(whole["fonts"])


def test_what_is_searched_and_searched_in_is_left_whole():
    whole = load_catalog()
    cut = uneven(whole, 100, 50)
    for before, after in zip(whole.domains, cut.domains, strict=True):
        assert set(before.splits) == set(after.splits)
        assert all(after.splits[name] is before.splits[name] for name in after.splits if name != "train")
        assert set(after.splits["train"].paths) < set(before.splits["train"].paths)
        assert set(after.splits["train"].class_names) == set(after.train_classes.tolist())


def test_labels_stay_with_their_images():
    whole, cut = load_catalog(domains="kanji"), uneven(load_catalog(domains="kanji"), 1, 20)
    label = dict(zip(whole["kanji"].splits["train"].paths, whole["kanji"].splits["train"].labels[:, 0], strict=True))
    train = cut["kanji"].splits["train"]
    assert [label[path] for path in train.paths] == train.labels[:, 0].tolist()


def test_the_smaller_choice_is_part_of_the_larger_one():
    whole = load_catalog(domains="emoji, flags")
    less, more = uneven(whole, 8, 5), uneven(whole, 4, 5)
    assert set(less["flags"].train_classes) < set(more["flags"].train_classes)
    within = uneven(whole, 4, 10)
    assert set(within["flags"].splits["train"].paths) < set(more["flags"].splits["train"].paths)


def test_factors_of_one_change_nothing():
    assert open_catalog(UnevenParams()).fingerprint == load_catalog().fingerprint
    assert open_catalog(UnevenParams()).notes == ()


def test_the_same_data_is_cut_alike_however_it_is_stored(tmp_path):
    sizes = {"train": (9, 8, 7, 6, 5, 5), "val": (2, 3), "test": (3, 2)}
    tree = write_uned_tree(tmp_path / "bench", domains=("a", "b", "c"), sizes=sizes)
    packed = write_uned_zip(tmp_path / "bench.zip", domains=("a", "b", "c"), sizes=sizes)
    params = {"imbalance_between": 3, "imbalance_within": 4}
    one, other = (open_catalog(UnevenParams(data=str(path), **params)) for path in (tree, packed))
    assert one.fingerprint == other.fingerprint != load_catalog(tree).fingerprint
    assert one.n_classes == {"a": 6, "b": 3, "c": 2}  # equals are ranked by name


def test_folders_of_images_are_cut_too(tmp_path):
    root = write_image_folder(tmp_path / "own", n_classes=20, n_images=6)
    whole = load_catalog(root)
    cut = open_catalog(UnevenParams(data=str(root), imbalance_within=6))
    for domain in cut.domains:
        sizes = sizes_of(domain)
        assert sizes == falling(6, 6, domain.n_classes, 1).tolist()
        assert domain.n_classes == whole[domain.name].n_classes
    assert "imbalance_between 1, imbalance_within 6" in cut.notes[-1]


@pytest.mark.parametrize("domains", ["fonts, emoji", "fonts"])
def test_choosing_domains_changes_nothing_in_them(domains):
    params = {"imbalance_between": 100, "imbalance_within": 10}
    some, whole = open_catalog(UnevenParams(domains=domains, **params)), open_catalog(UnevenParams(**params))
    for domain in some.domains:
        assert domain.splits["train"].paths == whole[domain.name].splits["train"].paths
