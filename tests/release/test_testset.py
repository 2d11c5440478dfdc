"""The test set of a release: what the evaluation finds is found here as well."""

from __future__ import annotations

import numpy as np
import torch

from tests.helpers.catalogs import write_uned_tree
from udonlib.data.catalog import load_catalog
from udonlib.data.images import ImageReader
from udonlib.evaluation.evaluate import evaluate, loading, pixels
from udonlib.release.testset import embed_test


def load_of(catalog, **options):
    return loading(ImageReader(catalog, 24, "eval", **options))


def test_neighbours_and_hits_are_those_of_the_evaluation(tmp_path):
    catalog = load_catalog(str(write_uned_tree(tmp_path, index_of="flags")))
    expected = evaluate(catalog, "test", load_of(catalog), image_embedders={"pixels": pixels}, k=4)
    test = embed_test(catalog, load_of(catalog), {"pixels": pixels}, batch_size=3)
    _, found = test.neighbours(test.queries["pixels"], test.index["pixels"], 4)
    positions = np.concatenate([expected.neighbours["pixels", name, "merged"].position for name in catalog.names])
    assert (found.numpy() == positions).all()
    outcomes = expected.outcomes[expected.outcomes["index"] == "merged"]
    assert (test.right(found).numpy() == outcomes["r_at_1"].to_numpy().astype(bool)).all()
    right = test.by_domain(test.right(found).numpy().astype(float))
    for name, part in outcomes.groupby("domain", sort=False):
        assert right[name].tolist() == [part["r_at_1"].tolist()]


def test_every_embedder_sees_every_image_once(tmp_path):
    catalog = load_catalog(str(write_uned_tree(tmp_path, index_of="flags")))
    seen = []

    def counting(images):
        seen.append(len(images))
        return pixels(images)

    test = embed_test(catalog, load_of(catalog), {"one": pixels, "two": counting})
    assert torch.equal(test.index["one"], test.index["two"])
    assert sum(seen) == sum(len({*d.queries("test").paths, *d.index("test").paths}) for d in catalog.domains)
    assert (test.itself >= 0).any()
    assert (test.itself < 0).any()


def test_an_image_that_cannot_be_read_is_left_out(tmp_path):
    write_uned_tree(tmp_path)
    catalog = load_catalog(str(tmp_path))
    domain = catalog.domains[0]
    (tmp_path / "images" / domain.queries("test").paths[1]).write_bytes(b"no image")
    test = embed_test(catalog, load_of(catalog, on_bad_image="skip"), {"pixels": pixels})
    assert len(test.queries["pixels"]) == sum(len(d.queries("test")) for d in catalog.domains) - 1
    assert len(test.index["pixels"]) == sum(len(d.index("test")) for d in catalog.domains) - 1
    own = test.index["pixels"][test.itself]
    assert torch.equal(own, test.queries["pixels"])
