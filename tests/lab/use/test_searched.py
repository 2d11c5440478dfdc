"""What search.ipynb searches: which images, by which model, and what stands for images that are gone."""

import shutil

import numpy as np
import pytest
import torch

from tests.helpers.catalogs import write_image_folder
from tests.helpers.embeddings import train
from udonlib.data.decoding import decode, prepare_eval
from udonlib.errors import UserError
from udonlib.lab.use.searched import NO_DOMAIN, open_search
from udonlib.lab.use.use_params import SearchParams
from udonlib.runs.run import load_run
from udonlib.search.index import build_index
from udonlib.search.load import load


def test_of_a_run_its_test_images_are_searched_queries_and_index(searched, results):
    catalog = load_run("small", str(results)).catalog
    wanted = {path for d in catalog.domains for path in (*d.queries("test").paths, *d.index("test").paths)}
    assert set(searched.index.images["id"]) == wanted
    assert searched.domains == ("emoji", "flags")
    assert {label.split("/")[0] for label in searched.labels} == {"emoji", "flags"}
    assert searched.index.measured[-1].recall == 1.0


def test_a_vector_of_a_picture_is_the_one_that_is_indexed(searched):
    vector, feature = searched.embed(searched.picture(3))
    assert np.allclose(vector, searched.index.vectors[3], atol=1e-5)
    assert feature.shape == (searched.model.model.backbone.feature_dim,)


def test_each_teacher_searches_its_own_domain_by_its_own_vectors(searched, results):
    model = load_run("small", str(results)).load_model()
    rows = np.flatnonzero(searched.row_domains == "flags")
    images = torch.stack([prepare_eval(searched.picture(int(row)), searched.model.image_size) for row in rows])
    with torch.no_grad():
        vectors = model.teachers["flags"](model.features(images)).numpy()
    _, feature = searched.embed(searched.picture(int(rows[2])))
    similarities, found = searched.teachers.search("flags", feature, 4, exclude=int(rows[2]))
    expected = vectors @ vectors[2]
    expected[2] = -np.inf
    order = np.argsort(-expected, kind="stable")[:4]
    assert found.tolist() == rows[order].tolist()
    assert np.allclose(similarities, expected[order], atol=1e-5)


def test_teachers_features_are_kept_and_not_computed_again(searched, open_small, results):
    files = {file: file.stat().st_mtime_ns for file in (results / "cache").glob("search-*")}
    again = open_small()
    assert np.array_equal(again.teachers.features, searched.teachers.features)
    assert {file: file.stat().st_mtime_ns for file in (results / "cache").glob("search-*")} == files != {}
    assert open_small(teachers=False).teachers is None


def test_a_folder_is_searched_and_one_without_domains_too(open_small, tmp_path):
    folder = write_image_folder(tmp_path / "own", n_classes=2, n_images=2)
    (folder / "cats" / "class 0" / "bad.png").write_bytes(b"no image")
    said = []
    own = open_search(SearchParams(**dict(open_small().params) | {"data": str(folder)}), say=said.append)
    assert own.domains == ("cats", "dogs")
    assert own.teachers is not None  # of other domains: none of them is shown
    assert any("one image cannot be read and is left out: cats/class 0/bad.png" in line for line in said)
    assert any("No answers by class" in line for line in said)
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, file in enumerate(folder.rglob("*.jpg")):
        shutil.copy(file, flat / f"{number}.jpg")
    bare = open_small(data=str(flat))
    assert bare.domains == (NO_DOMAIN,)
    assert set(bare.labels) == {None}


def test_only_the_domains_that_are_named_are_found(open_small):
    only = open_small(domains="flags")
    assert only.domains == ("flags",)
    assert set(only.row_domains[only.allowed]) == {"flags"}
    with pytest.raises(UserError, match=r"no image has domain 'flag'; did you mean 'flags'\?"):
        _ = open_small(domains="flag").allowed


def test_an_index_is_opened_by_name_and_thumbnails_stand_for_what_is_gone(tmp_path):
    results = train(tmp_path)
    model = load("small", outputs=str(results))
    folder = write_image_folder(tmp_path / "own", n_classes=3, n_images=2)
    build_index(model.embed(folder, name="mine")).save("mine", str(results))
    values = {"outputs": str(results), "index": "mine", "n_threads": 1}
    there = open_search(SearchParams(**values))
    assert there.picture(0).size == decode((folder / there.index.images["id"][0]).read_bytes(), "x").size
    shutil.rmtree(folder)
    said = []
    gone = open_search(SearchParams(**values), say=said.append)
    assert gone.picture(0).size == (24, 20)
    assert "Teachers are not shown: its images are not where they were." in said
    with pytest.raises(UserError, match="parameter 'index': found 'mine' beside data"):
        open_search(SearchParams(**values | {"data": "miniuned"}))
    with pytest.raises(UserError, match="did you mean 'mine'"):
        open_search(SearchParams(**values | {"index": "mime"}))
