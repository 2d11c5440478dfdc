"""Runs with frozen teachers: from the first look at them to a resumed and finished run."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.runs import assert_same_state, checkpoint, finish
from tests.helpers.taught import taught_params as params
from tests.helpers.taught import write_teachers
from tests.helpers.training import SMALL
from udonlib.data.images import ImageReader
from udonlib.errors import UserError
from udonlib.models.teachers import Teacher
from udonlib.params import TrainParams
from udonlib.runs.run import load_run, open_run
from udonlib.runs.teachers import CachedFeatures, open_teachers, plain, some_images, teacher_scores
from udonlib.training.losses import Batch


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_uned_tree(tmp_path_factory.mktemp("data"), index_of="flags")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_teachers(tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("features", ["cached", "augmented"])
def test_a_run_is_taught_and_ends_in_the_same_weights_when_it_is_interrupted(data, files, tmp_path, features):
    given = params(data, tmp_path / "whole", files, teacher_features=features)
    whole = finish(open_run(given))
    assert set(whole.evaluation()["embedder"]) == {"student", "features", "pixels"}
    losses = whole.losses()
    assert {"one/class", "one/patches", "one/kept", "two/class", "two/kept", "total"} <= set(losses["term"])
    assert whole.load_model().embed(torch.zeros(2, 3, 32, 32)).shape[1] == whole.load_model().backbone.feature_dim

    stopped = open_run(given.model_copy(update={"outputs": str(tmp_path / "stopped")}))
    for record in stopped.train():
        if record["kind"] == "checkpoint" and record["step"] >= 6:
            break
    again = finish(open_run(stopped.params))
    assert_same_state(checkpoint(whole), checkpoint(again))
    assert whole.evaluation().equals(again.evaluation())
    assert "objective" in checkpoint(whole)
    assert not any("projectors" in name for name in torch.load(whole.best, weights_only=True)["model"])


def test_cached_features_are_those_of_the_teachers(data, files, tmp_path):
    given = params(data, tmp_path, files)
    catalog = open_run(given).catalog
    reader = ImageReader(catalog, given.resize_size, "train")
    teachers = open_teachers(given, some_images(reader, given.image_size))
    cached = CachedFeatures(given, reader, teachers, 1)
    records = list(cached.fill())
    n = sum(len(domain.splits["train"]) for domain in catalog.domains)
    assert [r["n_done"] for r in records if r["n_done"] == r["n_images"]] == [n, n]
    assert {r["teacher"] for r in records} == {"one", "two"}
    last = catalog.domains[-1].name
    slots = [(last, np.array([2, 0])), (catalog.domains[0].name, np.array([1]))]
    found = cached(Batch(torch.zeros(3, 3, 32, 32), [], slots))
    images = plain(torch.cat([reader.read(d, "train", i) for d, i in slots]), given.image_size)
    for name, teacher in teachers.items():
        for kind, value in teacher(images, 1).items():
            assert torch.allclose(found[name][kind], value, atol=1e-2, rtol=1e-2)

    asked = []
    other = CachedFeatures(
        given, reader, {k: t.register_forward_hook(lambda *_: asked.append(1)) and t for k, t in teachers.items()}, 1
    )
    assert list(other.fill()) == []
    assert asked == []


def test_teachers_are_scored_and_cached_in_the_run_s_precision(data, files, tmp_path, monkeypatch):
    forward, asked = Teacher.forward, []

    def noted(teacher, images, n_positions=None, precision=torch.float32):
        asked.append(precision)
        return forward(teacher, images, n_positions, precision)

    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        given = params(data, tmp_path, files, precision=name)
        catalog = open_run(given).catalog
        reader = ImageReader(catalog, given.resize_size, "train")
        teachers = open_teachers(given, some_images(reader, given.image_size))
        with monkeypatch.context() as patched:
            patched.setattr(Teacher, "forward", noted)
            list(CachedFeatures(given, reader, teachers, 1).fill())
            n_cached = len(asked)
            teacher_scores(given, catalog, teachers)
        assert 0 < n_cached < len(asked)
        assert set(asked) == {dtype}
        asked.clear()


def test_features_are_made_anew_for_another_teacher(data, files, tmp_path):
    finish(open_run(params(data, tmp_path, files, teacher_features="cached", steps=2)))
    caches = {path.name for path in (tmp_path / "features").iterdir() if path.is_dir()}
    assert len(caches) == 2
    other = params(data, tmp_path, files, teacher_features="cached", steps=2)
    other.teachers["one"] = other.teachers["one"].model_copy(update={"mean": (0.1, 0.2, 0.3)})
    finish(open_run(TrainParams(**other.model_dump())))
    assert len({path.name for path in (tmp_path / "features").iterdir() if path.is_dir()} - caches) == 1


def test_a_run_of_ours_teaches(data, files, tmp_path):
    finish(
        open_run(TrainParams(**SMALL | {"data": str(data), "outputs": str(tmp_path), "n_threads": 1, "run": "mine"}))
    )
    teachers = {"mine": {"run": "mine", "embedding": True, "kinds": ["class"]}, "net": {"run": "mine"}}
    run = finish(open_run(params(data, tmp_path, files, teachers=teachers)))
    assert {"mine/class", "net/class", "net/patches"} <= set(run.losses()["term"])
    assert set(run.provenance()[0]["origins"]) == {"teacher 'mine'", "teacher 'net'"}


def test_a_teacher_that_has_changed_is_noticed(data, files, tmp_path):
    mine = tmp_path / "w.safetensors"
    shutil.copy(files / "one.safetensors", mine)
    teacher = {"backbone": "small_resnet", "backbone_args": {"width": 8}, "image_size": 32, "weights": str(mine)}
    given = params(data, tmp_path, files, teachers={"a": teacher})
    finish(open_run(given))
    shutil.copy(files / "two.safetensors", mine)
    with pytest.raises(UserError, match="the teacher 'a' has changed since it began"):
        finish(open_run(given))


def test_whatever_is_wrong_with_a_teacher_is_said_before_anything_is_written(data, files, tmp_path):
    teacher = {"backbone": "small_resnet", "image_size": 32, "weights": str(tmp_path / "none.safetensors")}
    run = open_run(params(data, tmp_path, files, teachers={"a": teacher}))
    with pytest.raises(UserError, match="teacher 'a': .*none.safetensors"):
        finish(run)
    assert run.status == "new"


def test_labels_and_frozen_teachers_together(data, files, tmp_path):
    run = finish(open_run(params(data, tmp_path, files, recipe="udon", augmentation="affine")))
    assert {"ce_student", "ce_teacher", "kl", "rel", "unic", "one/class", "total"} <= set(run.losses()["term"])
    assert set(run.evaluation()["embedder"]) == {"student", "teacher", "features", "pixels"}
    assert load_run(run.path.name, str(tmp_path)).load_model().student_prototypes is not None


def test_a_student_whose_batches_are_of_one_domain_is_warned(data, files, tmp_path):
    def notices(**changes):
        return " ".join(next(open_run(params(data, tmp_path / "outputs", files, **changes)).train())["notices"])

    assert "domains_per_batch is 1 and the backbone has batch norm" in notices(domains_per_batch=1)
    assert "batch norm" not in notices(domains_per_batch=2)
    assert "batch norm" not in notices(domains_per_batch=1, domains="flags")
