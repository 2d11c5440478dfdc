"""A model of a run or a checkpoint, loaded to embed images."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import udonlib
from tests import PROJECT
from tests.helpers.catalogs import write_image_folder, write_uned_tree
from tests.helpers.training import SMALL
from udonlib.data.catalog import load_catalog
from udonlib.data.images import ImageReader
from udonlib.errors import UserError
from udonlib.params import TrainParams
from udonlib.release.release import release
from udonlib.runs.run import open_run
from udonlib.search.load import load


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = write_uned_tree(folder / "data")
    values = {"data": str(data), "outputs": str(folder / "outputs"), "run": "small", "steps": 2, "eval_every": 2}
    run = open_run(TrainParams(**SMALL | values, n_threads=1, eval_batch_size=4))
    for _ in run.train():
        pass
    return run


def outputs(run):
    return str(run.path.parents[1])


def test_a_run_or_its_checkpoint_is_the_same_model_by_whatever_name(run, tmp_path):
    first = load("small", outputs=outputs(run))
    others = [load(source, outputs=outputs(run)) for source in ("latest", run.path, str(run.path), run.best)]
    assert {other.facts.fingerprint for other in others} == {first.fingerprint}
    assert {other.source for other in others[:3]} == {str(run.path)}
    assert others[3].source == str(run.best)
    assert load(others[3].source).fingerprint == first.fingerprint
    assert first.facts.dim == 8
    assert first.facts.precision == "float32"
    assert first.preprocessing["crop"] == "the middle 32 x 32"
    assert len(first.preprocessing["mean"]) == 3


def test_a_release_of_the_run_is_the_same_model(run, tmp_path):
    folder = release(run, tmp_path / "released").folder
    found, first = load(folder), load(run.path)
    assert found.fingerprint == first.fingerprint
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(found(images), first(images))
    (folder / "head.safetensors").write_bytes((folder / "head.safetensors").read_bytes()[:-3])
    with pytest.raises(UserError, match="head.safetensors"):
        load(folder)


def test_other_weights_or_another_size_make_another_fingerprint(run):
    model = load(run.path)
    before = model.fingerprint
    changed = load(run.path)
    with torch.no_grad():
        next(changed.model.student.parameters()).view(-1)[0] += 1e-3
    assert changed.fingerprint != before
    larger = load(run.path)
    object.__setattr__(larger, "image_size", 64)
    assert larger.fingerprint != before
    taught = load(run.path)
    with torch.no_grad():
        next(taught.model.teachers.parameters()).add_(1)
    assert taught.fingerprint == before


@pytest.mark.parametrize("n_threads", [1, 2])
def test_vectors_are_those_that_the_evaluation_would_see(run, n_threads):
    catalog = load_catalog(run.params.data, all_as_test=True)
    reader = ImageReader(catalog, 32, "eval")
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        found = load(run.path, outputs=outputs(run)).embed(run.params.data, batch_size=7, name=f"t{n_threads}")
        assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
    model = run.load_model()
    by_id = dict(zip(found.ids, found.vectors, strict=True))
    for domain in catalog.domains:
        paths = domain.splits["test"].paths
        with torch.no_grad():
            expected = model.embed(reader.read(domain.name, "test", np.arange(len(paths)))).numpy()
        assert np.allclose(np.stack([by_id[path] for path in paths]), expected, atol=1e-5)
    assert np.allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-5)


def test_a_folder_a_file_and_an_array_are_told_apart(run, tmp_path):
    images = write_image_folder(tmp_path / "images", n_classes=3, n_images=1)
    model = load(run.path, outputs=str(tmp_path / "out"))
    whole = model.embed(images)
    assert whole.folder.parent == tmp_path / "out" / "embeddings"
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", images)
    assert sorted(model.embed(packed).ids) == sorted(whole.ids)
    single = model.embed(str(images / whole.ids[2]))
    assert single.folder is None
    assert np.allclose(single.vectors, whole.vectors[2:3], atol=1e-5)


def test_what_is_no_model_is_refused_with_the_nearest(run, tmp_path):
    for source, message in (
        ("smal", r"parameter 'run': no run 'smal' in .*; did you mean 'small'\?"),
        (__file__, "test_load.py"),
    ):
        with pytest.raises(UserError, match=message):
            load(source, outputs=outputs(run))
    with pytest.raises(UserError, match=r"parameter 'precision': found 'float23'; did you mean 'float32'\?"):
        load(run.path, precision="float23")
    with pytest.raises(UserError, match="there is no run with a checkpoint"):
        load(outputs=str(tmp_path))


def test_udonlib_itself_loads_nothing_heavy_until_load_is_asked_for():
    script = (
        "import sys, udonlib; assert not {'torch', 'numpy', 'timm'} & set(sys.modules); print(udonlib.load.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout.strip() == "udonlib.search.load", done.stderr
    assert udonlib.load is load
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        _ = udonlib.laod
