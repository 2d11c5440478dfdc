"""What a run needs is measured on its own images, and counted."""

import pytest

from tests.helpers.catalogs import write_uned_tree
from udonlib.domains import load_catalog
from udonlib.models import create_model
from udonlib.params import TrainParams
from udonlib.runneeds import measure_needs

SMALL = {"backbone": "resnet10t", "pretrained": False, "image_size": 32, "resize_size": 40, "steps": 6, "batch_size": 8}


@pytest.mark.parametrize("bad", [False, True])
def test_reading_is_timed_and_memory_counted(tmp_path, bad):
    root = write_uned_tree(tmp_path / "uned", index_of="flags")
    if bad:
        next((root / "images" / "emoji").iterdir()).write_bytes(b"")
    catalog, params = load_catalog(str(root)), TrainParams(**SMALL)
    needs = measure_needs(catalog, params, seconds=60)
    assert (needs.n_images, needs.n_seen, needs.n_measured) == (24, 48, 24)
    assert 0 < needs.seconds_per_image < 1
    assert needs.train_bytes == 24 * 3 * 40 * 40
    assert needs.eval_bytes == (24 + 7 + 5 + 12) * 3 * 32 * 32  # val and test of both, flags' indexes with its train
    n = sum(parameter.numel() for parameter in create_model(params, catalog.n_classes).parameters())
    assert needs.model_bytes == 16 * n


def test_a_sample_is_enough_where_time_is_short(tmp_path, monkeypatch):
    monkeypatch.setattr("udonlib.runneeds.BATCH", 5)
    catalog = load_catalog(str(write_uned_tree(tmp_path / "uned")))
    assert measure_needs(catalog, TrainParams(**SMALL), seconds=0).n_measured == 5
