"""Groups of queries by how much like them there was to learn from."""

import numpy as np
import pandas as pd
import pytest
import torch

from tests.helpers.catalogs import write_uned_tree
from udonlib.data.catalog import load_catalog
from udonlib.data.imbalance import uneven
from udonlib.evaluation.frequency import frequencies, grouped, of_groups


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    sizes = {"train": (6, 3, 1), "val": (2, 2), "test": (3, 2, 2)}
    return load_catalog(write_uned_tree(tmp_path_factory.mktemp("tree"), domains=("a", "b"), sizes=sizes))


def fields_of(numbers):
    """Images of one colour field each, at a place that the number says: alike only where numbers are equal."""
    images = torch.zeros(len(numbers), 3, 32, 32, dtype=torch.uint8)
    for row, number in enumerate(numbers):
        images[row, :, 2 * number : 2 * number + 2] = 200
    return images


def test_a_query_has_the_images_of_the_training_class_that_looks_like_it(catalog):
    def load(domain, split, batches):
        for batch in batches:
            labels = catalog[domain].train_labels if split == "train" else np.array([0, 1, 2, 0, 1, 2, 0])
            yield fields_of(labels[np.asarray(batch)]), list(batch)

    table = frequencies(catalog, load=load)
    assert table["n_train"].tolist() == [6, 3, 1, 6, 3, 1, 6] * 2
    assert table["group"].tolist() == ["head", "middle", "tail", "head", "middle", "tail", "head"] * 2
    assert table["path"].tolist() == [path for d in catalog.domains for path in d.splits["test"].paths]


def test_images_that_cannot_be_read_are_left_out(catalog):
    def load(domain, split, batches):
        for batch in batches:
            read = [i for i in batch if i != 1]
            yield fields_of([i % 3 for i in read]), read

    table = frequencies(catalog, load=load)
    assert catalog["a"].splits["test"].paths[1] not in set(table["path"])
    assert len(table) == 12


def test_the_benchmarks_larger_domains_are_large_and_groups_do_not_depend_on_the_model():
    cut = uneven(load_catalog(domains="flags, fonts"), 4, 5)
    table = frequencies(cut)
    sizes = {domain.name: len(domain.splits["train"]) for domain in cut.domains}
    assert set(table.loc[table["size"] == "large domains", "domain"]) == {max(sizes, key=lambda name: sizes[name])}
    assert set(table["group"]) == {"head", "middle", "tail"}
    pd.testing.assert_frame_equal(table, frequencies(cut))


def test_thirds_keep_equal_counts_together():
    assert grouped(np.array([1, 2, 3])) == ["tail", "middle", "head"]
    assert grouped(np.array([1, 1, 1, 1, 9, 9])) == ["tail"] * 4 + ["head"] * 2
    assert grouped(np.array([4, 4, 4])) == ["", "", ""]


def test_outcomes_are_told_apart_by_query_whatever_the_seed():
    known = pd.DataFrame(
        {
            "domain": ["a", "a", "b"],
            "path": ["1", "2", "1"],
            "n_train": [9, 1, 5],
            "group": ["head", "tail", ""],
            "size": ["large domains", "large domains", "small domains"],
        }
    )
    outcomes = pd.DataFrame(
        {"seed": [0, 0, 0, 1, 1, 1], "domain": list("aab") * 2, "path": list("121") * 2, "r_at_1": range(6)}
    )
    found = of_groups(outcomes, known)
    assert {name: part["r_at_1"].tolist() for name, part in found.items()} == {
        "head": [0, 3],
        "tail": [1, 4],
        "large domains": [0, 1, 3, 4],
        "small domains": [2, 5],
    }
    assert list(found["head"]) == list(outcomes)
