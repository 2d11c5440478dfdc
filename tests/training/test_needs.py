"""What a run needs of memory and of its data is known before it takes either."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.training import SMALL
from udonlib import presets
from udonlib.data.catalog import load_catalog
from udonlib.errors import ParameterError
from udonlib.models.embedding_model import create_model
from udonlib.params import TrainParams
from udonlib.training.needs import check_room, free_memory, list_needs, measure_needs, saved_bytes, widest_bytes

CPU = torch.device("cpu")

GIB = 2**30

CLASSES = {"a": 300, "b": 100}

UNED = {
    "food": 101,
    "cars": 98,
    "sop": 9691,
    "inat": 5690,
    "deepfashion": 3985,
    "met": 198_474,
    "gld": 96_526,
    "rp2k": 1881,
}


def total(**values: object) -> float:
    return sum(need.n_bytes for need in list_needs(TrainParams(**SMALL | values), CLASSES, 1000, CPU))


@pytest.mark.parametrize(
    ("values", "name", "lower"),
    [
        ({"backbone": "small_resnet", "backbone_args": {"width": 256}}, "backbone", "backbone_args ({'width': 256})"),
        ({"batch_size": 100_000}, "batch_size", "batch_size (100000), image_size"),
        ({"eval_batch_size": 1000, "image_size": 512, "backbone_learning_rate": 0}, "eval_batch_size", ""),
        ({"student_dim": 65_536}, "student_dim", "student_dim (65536), head_hidden_dims"),
        ({"teacher_dim": 65_536}, "teacher_dim", "teacher_dim (65536), teacher_hidden_dims"),
        ({"steps": 100_000_000}, "steps", "steps (100000000), domains_per_batch"),
    ],
)
def test_a_run_that_cannot_fit_is_refused_with_what_to_lower(values, name, lower):
    with pytest.raises(ParameterError) as caught:
        check_room(TrainParams(**SMALL | values), CLASSES, 1000, CPU, GIB / 4)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert text.startswith(f"parameter '{name}': this run needs at least ")
    assert "of memory on cpu, and 0.2 GiB are free" in text
    assert lower in text.partition(": lower ")[2]


def test_a_run_that_fits_is_not_refused():
    check_room(TrainParams(**SMALL), CLASSES, 1000, CPU)
    check_room(presets.load("smoke"), CLASSES, 1000, CPU, GIB / 4)


def test_uned_at_full_scale_fits_a_large_machine_and_no_small_one():
    assert sum(UNED.values()) == 316_446
    needs = list_needs(TrainParams(precision="bfloat16", batch_size=512), UNED, 140_000, CPU)
    assert 16 * GIB < sum(need.n_bytes for need in needs) < 64 * GIB


def test_of_several_processes_each_holds_its_part_of_the_batch_and_of_many_classes():
    params = TrainParams(precision="bfloat16", batch_size=512)
    one, eight = (list_needs(params, UNED, 140_000, CPU, n) for n in (1, 8))
    for alone, shared in zip(one, eight, strict=True):
        parts = {"the student's head": (7.8, 8), "the teachers' heads": (7, 8), "a batch": (4, 9)}.get(alone.what)
        if parts is None:
            assert shared.n_bytes == alone.n_bytes
        else:
            assert parts[0] < alone.n_bytes / shared.n_bytes < parts[1]
    whole = list_needs(params.model_copy(update={"split_classes_from": 10**6}), UNED, 140_000, CPU, 8)
    assert [need.n_bytes for need in whole[1:3]] == [need.n_bytes for need in one[1:3]]


def test_a_frozen_backbone_needs_no_room_for_gradients():
    trained, frozen = (total(backbone_learning_rate=rate, frozen_steps=0) for rate in (1e-3, 0.0))
    assert frozen < trained
    assert total(backbone_learning_rate=1e-3, frozen_steps=SMALL["steps"]) == frozen
    assert total(average_decay=0.9) > total()


class Plain(nn.Module):
    """Two layers on all pixels, with attention between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 5), nn.Linear(7, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(images.flatten(1)))
        attended = F.scaled_dot_product_attention(hidden[None], hidden[None], hidden.new_empty(1, len(images), 7))
        return self.last(attended[0])


def test_what_a_backward_pass_needs_is_counted_once_and_attention_by_its_result():
    with torch.device("meta"):
        model = Plain()
    assert saved_bytes(model, 10, 2) == 4 * 10 * (12 + 5 + 7)
    assert widest_bytes(model, 10, 2) == 4 * 10 * 12
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_cannot_be_built_so_is_left_to_whoever_builds_it():
    params = TrainParams(**SMALL | {"backbone_args": {"colour": 3}})
    assert list_needs(params, CLASSES, 1000, CPU) == []
    check_room(params, CLASSES, 1000, CPU, 0)


def test_free_memory_is_what_the_system_and_the_container_leave(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 500 kB\nSwapFree: 100 kB\nOther: x\n")
    assert free_memory(CPU, tmp_path) > 0  # not readable: what the machine has
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 500 kB\nSwapFree: 100 kB\n")
    assert free_memory(CPU, tmp_path) == 600 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert free_memory(CPU, tmp_path) == 600 * 1024
    (group / "memory.max").write_text("204800\n")
    assert free_memory(CPU, tmp_path) == 300 * 1024
    assert free_memory(torch.device("mps")) == math.inf


TINY = {"backbone": "resnet10t", "pretrained": False, "image_size": 32, "resize_size": 40, "steps": 6, "batch_size": 8}


@pytest.mark.parametrize("bad", [False, True])
def test_reading_is_timed_and_memory_counted(tmp_path, bad):
    root = write_uned_tree(tmp_path / "uned", index_of="flags")
    if bad:
        next((root / "images" / "emoji").iterdir()).write_bytes(b"")
    catalog, params = load_catalog(str(root)), TrainParams(**TINY)
    needs = measure_needs(catalog, params, seconds=60)
    assert (needs.n_images, needs.n_seen, needs.n_measured) == (24, 48, 24)
    assert 0 < needs.seconds_per_image < 1
    assert needs.train_bytes == 24 * 3 * 40 * 40
    assert needs.eval_bytes == (24 + 7 + 5 + 12) * 3 * 32 * 32  # val and test of both, flags' indexes with its train
    n = sum(parameter.numel() for parameter in create_model(params, catalog.n_classes).parameters())
    assert needs.model_bytes == 16 * n


def test_a_sample_is_enough_where_time_is_short(tmp_path, monkeypatch):
    monkeypatch.setattr("udonlib.training.needs.BATCH", 5)
    catalog = load_catalog(str(write_uned_tree(tmp_path / "uned")))
    assert measure_needs(catalog, TrainParams(**TINY), seconds=0).n_measured == 5
