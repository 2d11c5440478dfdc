"""A folder of images as vectors on the disk, of which only what is new or changed is computed again."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests import PROJECT
from tests.helpers.catalogs import picture, write_image_folder, write_tree, write_uned_tree, write_zip
from tests.helpers.search import MODEL, OTHER, SIZE, Counting, embed, files_of, one
from udonlib.data.catalog import load_catalog
from udonlib.data.decoding import ImageError
from udonlib.data.storage import DataError, Store
from udonlib.errors import UserError
from udonlib.search import folders
from udonlib.search.folders import embed_folder, find_embeddings, list_images, read_embeddings


@pytest.fixture
def images(tmp_path):
    """Twelve images in two domains of two classes."""
    return write_image_folder(tmp_path / "images", n_classes=2, n_images=3)


@pytest.fixture
def run(tmp_path):
    """Embed a folder, with results in a folder of the test."""

    def run(data, model=embed, facts=MODEL, **options):
        values = {"batch_size": 4, "n_threads": 2, "outputs": str(tmp_path / "out")}
        return embed_folder(model, facts, data, SIZE, **values | options)

    return run


@pytest.fixture
def settled(monkeypatch):
    """Files count as settled at once."""
    monkeypatch.setattr(folders, "SETTLED_NS", -(10**18))


def expected(root):
    """Path -> vector of every image of a folder, each by itself."""
    files = [path for path in root.rglob("*") if path.suffix in (".jpg", ".PNG", ".png")]
    return {path.relative_to(root).as_posix(): one(path.read_bytes()) for path in files}


def assert_holds(found, vectors):
    assert sorted(found.ids) == sorted(vectors)
    for image, vector in zip(found.ids, found.vectors, strict=True):
        assert np.allclose(vector, vectors[image], atol=1e-6), image


def test_every_image_of_a_folder_has_its_vector_and_its_row(images, run):
    found = run(images)
    assert_holds(found, expected(images))
    row = found.images.set_index("id").loc["dogs/class 1/2.PNG"]
    assert (row["domain"], row["label"], row["width"], row["height"]) == ("dogs", "class 1", 24, 20)
    assert found.images["hash"].nunique() == 12
    assert max(Image.open(io.BytesIO(row["thumbnail"])).size) == 24
    assert {path.name for path in found.folder.iterdir()} == {*folders.FILES, "lock"}
    assert found.folder.parent.name == "embeddings"
    assert found.folder.name.startswith("images-by-small-")
    assert isinstance(found.vectors, np.memmap)
    assert np.array_equal(np.load(found.folder / "vectors.npy"), found.vectors)


def test_domains_are_known_where_folders_or_info_files_tell_them(tmp_path):
    flat = write_tree(tmp_path / "flat", {"b.png": picture(1), "a.png": picture(2), "deep/er/still/c.png": picture(3)})
    assert {entry.path: entry.domain for entry in list_images(flat)[1]}.keys() == {
        "a.png",
        "b.png",
        "deep/er/still/c.png",
    }
    assert {entry.domain for entry in list_images(write_tree(tmp_path / "f2", {"a.png": picture(2)}))[1]} == {None}
    split = {f"train/c{i}/a.png": picture(i) for i in range(3)} | {f"test/d{i}/a.png": picture(i) for i in range(3)}
    assert {entry.label for entry in list_images(write_tree(tmp_path / "of", split))[1]} == {
        *(f"c{i}" for i in range(3)),
        *(f"d{i}" for i in range(3)),
    }
    uned = list_images(write_uned_tree(tmp_path / "uned"))[1]
    assert {(entry.domain, entry.label) for entry in uned if entry.path == "emoji/0000_000.png"} == {
        ("emoji", "class 0")
    }
    packed = write_zip(tmp_path / "z.zip", {f"top/cats/c{i}/a.png": picture(i) for i in range(3)})
    store, entries = list_images(packed)
    assert (entries[0].path, entries[0].domain, entries[0].label) == ("top/cats/c0/a.png", "cats", "c0")
    assert store.read(entries[0].path) == picture(0)


def test_of_a_catalog_the_test_images_are_embedded_queries_and_index(tmp_path, run):
    root = write_uned_tree(tmp_path / "uned", index_of="flags")
    catalog = load_catalog(root)
    found = run(catalog)
    wanted = {path for d in catalog.domains for path in (*d.queries("test").paths, *d.index("test").paths)}
    assert sorted(found.ids) == sorted(wanted)
    assert set(found.images["domain"]) == {"emoji", "flags"}
    assert found.folder.name.startswith("uned-test-by-small-")
    assert Path(found.data) == root
    assert len(run(root)) > len(found)  # in a folder of its own
    counting = Counting()
    assert run(catalog, counting).ids == found.ids
    assert counting.n == 0


def test_a_folder_without_images_or_none_at_all_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: holds no images"):
        list_images(tmp_path / "empty")
    with pytest.raises(DataError, match="none: no such folder"):
        list_images(tmp_path / "none")


def test_nothing_is_computed_or_written_where_nothing_is_new(images, run):
    first = run(images)
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    again = run(images, Counting(stop_after=0))
    assert np.array_equal(again.vectors, first.vectors)
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == before


def test_files_that_have_neither_other_size_nor_time_are_not_read(images, run, settled, monkeypatch):
    run(images)
    read = []
    monkeypatch.setattr(Store, "read", lambda self, path: read.append(path))
    run(images, Counting(stop_after=0))
    assert read == []


def test_a_file_that_was_changed_just_before_is_read_again(images, run, monkeypatch):
    monkeypatch.setattr(folders, "SETTLED_NS", 10**18)
    run(images)
    counting = Counting()
    file = images / "cats" / "class 0" / "0.PNG"
    stat, data = file.stat(), picture(77)
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert_holds(run(images, counting), expected(images))
    assert counting.n == 1


def test_only_what_is_new_or_changed_is_computed(images, run, settled):
    run(images)
    (images / "cats" / "class 0" / "new.png").write_bytes(picture(501))
    (images / "cats" / "class 0" / "0.PNG").write_bytes(picture(502))
    (images / "cats" / "class 1" / "0.PNG").rename(images / "dogs" / "class 0" / "moved.png")
    (images / "dogs" / "class 1" / "0.PNG").unlink()
    counting = Counting()
    found = run(images, counting)
    assert counting.n == 2
    assert_holds(found, expected(images))
    moved = found.images.set_index("id").loc["dogs/class 0/moved.png"]
    assert (moved["domain"], moved["label"]) == ("dogs", "class 0")
    assert found.ids[-2:] == ["cats/class 0/0.PNG", "cats/class 0/new.png"]  # the others keep their order


def test_a_copy_of_an_image_is_an_image_of_its_own(images, run):
    run(images)
    shutil.copyfile(images / "cats" / "class 0" / "0.PNG", images / "cats" / "class 0" / "copy.png")
    found = run(images)
    assert_holds(found, expected(images))
    by_id = found.images.set_index("id")
    assert by_id.loc["cats/class 0/0.PNG", "hash"] == by_id.loc["cats/class 0/copy.png", "hash"]
    assert by_id.loc["cats/class 0/copy.png", "width"] == 24


CHANGES = st.lists(
    st.tuples(st.sampled_from(["put", "remove", "move", "copy"]), st.integers(0, 5), st.integers(0, 5)), max_size=6
)


@settings(max_examples=12)
@given(rounds=st.lists(CHANGES, min_size=1, max_size=4))
def test_whatever_is_done_to_a_folder_its_vectors_follow(rounds, tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    data = write_tree(root / "data", {"always.png": picture(1000)})
    for changes in rounds:
        for what, number, other in changes:
            file, target = data / f"{number}.png", data / f"{other}.png"
            if what == "put":
                file.write_bytes(picture(other))
            elif file.exists() and what == "remove":
                file.unlink()
            elif file.exists() and file != target:
                {"move": file.replace, "copy": lambda t, f=file: shutil.copyfile(f, t)}[what](target)
        found = embed_folder(embed, MODEL, data, SIZE, 2, n_threads=1, outputs=str(root / "out"))
        assert_holds(found, expected(data))


KILLED = """
import os, sys
from tests.helpers import search
from udonlib.search import folders

class Ends(search.Counting):
    def __call__(self, images):
        if self.n >= 8:
            os._exit(9)
        return super().__call__(images)

folders.PART_ROWS = 3
folders.embed_folder(Ends(), search.MODEL, sys.argv[1], search.SIZE, 2, n_threads=1, outputs=sys.argv[2])
"""


def test_a_killed_process_loses_little_and_the_end_is_the_same(images, run, tmp_path):
    script = [sys.executable, "-c", KILLED, str(images), str(tmp_path / "out")]
    done = subprocess.run(
        script, cwd=PROJECT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(PROJECT)}
    )
    assert done.returncode == 9, done.stderr
    with pytest.raises(UserError, match="no embeddings"):
        find_embeddings("images-by-small", str(tmp_path / "out"))
    counting = Counting()
    found = run(images, counting)
    assert counting.n == 4
    assert not (found.folder / "parts").exists()
    whole = run(images, name="whole")
    assert found.ids == whole.ids
    assert np.array_equal(found.vectors, whole.vectors)
    assert found.images.drop(columns="thumbnail").equals(whole.images.drop(columns="thumbnail"))


REPLACING = """
import os, sys
from tests.helpers import search
from udonlib.search import folders

replace, left = os.replace, int(sys.argv[3])

def replaced(source, target):
    global left
    if os.path.basename(os.path.dirname(source)).startswith("new.") and "new." not in os.path.dirname(target):
        left -= 1
        if left < 0:
            os._exit(9)
    replace(source, target)

os.replace = replaced
folders.embed_folder(search.embed, search.MODEL, sys.argv[1], search.SIZE, 2, n_threads=1, outputs=sys.argv[2])
"""


@pytest.mark.parametrize("n_replaced", [0, 1, 2])
def test_a_process_killed_while_its_files_take_their_places_loses_nothing(images, run, tmp_path, n_replaced):
    before = run(images)
    (images / "cats" / "class 0" / "new.png").write_bytes(picture(501))
    script = [sys.executable, "-c", REPLACING, str(images), str(tmp_path / "out"), str(n_replaced)]
    done = subprocess.run(
        script, cwd=PROJECT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(PROJECT)}
    )
    assert done.returncode == 9, done.stderr
    assert not (before.folder / folders.FACTS).exists()
    counting = Counting()
    assert_holds(run(images, counting), expected(images))
    assert counting.n == 0
    assert {path.name for path in before.folder.iterdir()} == {*folders.FILES, "lock"}


def test_what_a_person_stopped_is_not_computed_again(images, run):
    run(images)
    for i in range(6):
        (images / "cats" / "class 0" / f"new {i}.png").write_bytes(picture(700 + i))
    with pytest.raises(KeyboardInterrupt):
        run(images, Counting(stop_after=4))
    counting = Counting()
    assert_holds(run(images, counting), expected(images))
    assert 0 < counting.n <= 2


def test_bad_images_are_left_out_and_said_or_end_it(images, run):
    (images / "dogs" / "class 1" / "bad.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"dogs/class 1/bad\.png: not an image"):
        run(images)
    found = run(images, Counting(stop_after=0), on_bad_image="skip")  # what was done before is kept
    assert len(found) == 12
    assert list(found.skipped) == ["dogs/class 1/bad.png"]
    assert list(run(images, Counting(0), on_bad_image="skip").skipped) == ["dogs/class 1/bad.png"]


def test_a_folder_of_nothing_but_bad_images_is_an_error(tmp_path, run):
    data = write_tree(tmp_path / "bad", {"a.png": b"x", "b.png": b"y"})
    with pytest.raises(ImageError, match=r"none of the 2 images can be read; a\.png: not an image"):
        run(data, on_bad_image="skip")


def test_another_models_vectors_are_never_mixed_in(images, run):
    first = run(images, name="mine")
    with pytest.raises(UserError, match="mine: holds vectors of model 'small'"):
        run(images, facts=OTHER, name="mine")
    assert run(images, facts=OTHER).folder != run(images).folder
    assert run(images, facts=OTHER, name="mine", overwrite=True).model == OTHER
    assert first.folder == find_embeddings("mine", str(first.folder.parents[1]))
    with pytest.raises(KeyboardInterrupt):
        run(images, Counting(4), name="part")
    with pytest.raises(UserError, match="of another model than 'other'"):
        run(images, facts=OTHER, name="part")


@pytest.mark.parametrize("name", folders.FILES)
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damaged_files_are_told_in_one_line_and_can_be_made_anew(images, run, name, damage):
    found = run(images, name="mine")
    file = found.folder / name
    data = file.read_bytes()
    file.write_bytes({"cut": data[:-9], "changed": data[:-9] + b"?" + data[-8:], "gone": b""}[damage])
    for again in (lambda: read_embeddings(found.folder), lambda: run(images, name="mine")):
        with pytest.raises(UserError, match="damaged") as error:
            again()
        assert str(found.folder) in str(error.value)
        assert "\n" not in str(error.value)
    assert_holds(run(images, name="mine", overwrite=True), expected(images))


def test_an_older_or_newer_version_is_said(images, run):
    found = run(images)
    facts = json.loads((found.folder / "embeddings.json").read_text())
    (found.folder / "embeddings.json").write_text(json.dumps(facts | {"version": 99}))
    with pytest.raises(UserError, match="found version 99, expected 1"):
        read_embeddings(found.folder)


def test_embeddings_are_found_by_name_or_path_and_a_wrong_name_gets_the_nearest(images, run, tmp_path):
    found = run(images, name="holiday")
    assert find_embeddings(found.folder) == find_embeddings("holiday", str(tmp_path / "out")) == found.folder
    with pytest.raises(UserError, match=r"no embeddings 'holidays' in .*; did you mean 'holiday'\?"):
        find_embeddings("holidays", str(tmp_path / "out"))


def test_what_was_there_stays_while_the_new_is_written(images, run, monkeypatch):
    found = run(images)
    before = files_of(found.folder)
    (images / "cats" / "class 0" / "new.png").write_bytes(picture(501))

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "write_json", fails)
    with pytest.raises(OSError, match="No space"):
        run(images)
    assert files_of(found.folder) == before


def test_the_images_of_a_table_are_listed_with_domain_and_class(tmp_path):
    write_tree(tmp_path, {"more.csv": b"path,domain,class\nb/x.png,birds,heron\n", "b/x.png": b"", "b/y.png": b""})
    store, entries = list_images(tmp_path / "more.csv")
    assert entries == [("b/x.png", "birds", "heron")]
    assert store.read("b/x.png") == b""
