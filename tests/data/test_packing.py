"""Packing: one archive that reads as the catalog it was made of."""

import hashlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.helpers.catalogs import write_image_folder, write_tree, write_uned_tree, write_uned_zip
from udonlib.data.catalog import Catalog, DataError, check_images, load_catalog
from udonlib.data.decoding import decode
from udonlib.data.packing import pack
from udonlib.data.storage import Store
from udonlib.errors import UserError


def same_content(one: Catalog, other: Catalog) -> bool:
    splits = [(d.name, split) for d in one.domains for split in d.splits.values()]
    return all(
        split.paths == other[name].splits[split.name].paths
        and split.class_names == other[name].splits[split.name].class_names
        and np.array_equal(split.labels, other[name].splits[split.name].labels)
        and all(one.store.read(path) == other.store.read(path) for path in split.paths)
        for name, split in splits
    )


class TestRoundTrip:
    def test_a_packed_tree_is_the_same_catalog(self, tmp_path: Path) -> None:
        several = b'{"path": "rp2k/\xe5\xba\xb7.png", "class_id": [9, 3]}'
        nameless = b'{"path": "rp2k/a.png", "class_id": 9}'
        files = {"info_files/emoji/index.json": b"[" + several + b", " + nameless + b"]"}
        root = write_tree(write_uned_tree(tmp_path / "tree", index_of="flags"), files)
        write_tree(root, {"images/rp2k/#U5eb7.png": b"an escaped name", "images/rp2k/a.png": b"a class without a name"})
        catalog = load_catalog(str(root))
        assert pack(catalog, tmp_path / "packed.zip") == {}
        packed = load_catalog(str(tmp_path / "packed.zip"))
        assert packed.fingerprint == catalog.fingerprint
        assert packed["emoji"].splits["index"].labels.tolist() == [[9, 3], [9, -1]]
        assert same_content(catalog, packed)
        assert all(e.compress_type == zipfile.ZIP_STORED for e in zipfile.ZipFile(tmp_path / "packed.zip").infolist())

    def test_an_image_folder_keeps_its_splits(self, tmp_path: Path) -> None:
        catalog = load_catalog(str(write_image_folder(tmp_path / "own")))
        pack(catalog, tmp_path / "packed.zip")
        packed = load_catalog(str(tmp_path / "packed.zip"))
        assert packed.fingerprint == catalog.fingerprint
        assert same_content(catalog, packed)

    @pytest.mark.parametrize("short_side", [None, 12])
    def test_the_same_bytes_come_whenever_and_with_however_many_workers(
        self, tmp_path: Path, short_side: int | None
    ) -> None:
        catalog = load_catalog(str(write_uned_tree(tmp_path / "tree", image_format="JPEG", image_size=(40, 30))))
        digests = set()
        for n_workers in (0, 2):
            pack(catalog, tmp_path / "packed.zip", short_side, n_workers=n_workers)
            digests.add(hashlib.sha256((tmp_path / "packed.zip").read_bytes()).hexdigest())
            os.utime(tmp_path / "tree/images/emoji")
        assert len(digests) == 1

    def test_progress_counts_to_all_images(self, tmp_path: Path) -> None:
        catalog = load_catalog(
            str(write_uned_tree(tmp_path / "tree", sizes={"train": (70,), "val": (5,), "test": (9,)}))
        )
        calls: list[tuple[int, int]] = []
        pack(catalog, tmp_path / "packed.zip", progress=lambda done, n: calls.append((done, n)))
        assert calls == [(64, 168), (128, 168), (168, 168)]


class TestShrinking:
    @pytest.mark.parametrize("image_format", ["jpeg", "webp"])
    def test_large_images_get_the_short_side_asked_for_and_small_ones_stay(
        self, tmp_path: Path, image_format: str
    ) -> None:
        root = write_uned_tree(tmp_path / "tree", image_format="JPEG", image_size=(200, 150))
        small = (write_uned_tree(tmp_path / "small") / "images/emoji/0000_000.png").read_bytes()
        write_tree(root, {"images/emoji/0000_000.jpeg": small})
        catalog = load_catalog(str(root))
        pack(catalog, tmp_path / "packed.zip", 30, image_format)
        packed = load_catalog(str(tmp_path / "packed.zip"))
        assert packed.fingerprint == catalog.fingerprint
        assert packed.store.read("emoji/0000_000.jpeg") == small
        for path in catalog["flags"].splits["train"].paths:
            content = packed.store.read(path)
            assert Image.open(io.BytesIO(content)).format == image_format.upper()
            found = decode(content, path)
            assert found.size == (40, 30)
            whole = decode(catalog.store.read(path), path).resize((40, 30), Image.Resampling.BOX)
            assert np.abs(np.asarray(found).astype(int) - np.asarray(whole)).mean() < 4

    def test_quality_counts(self, tmp_path: Path) -> None:
        catalog = load_catalog(str(write_uned_tree(tmp_path / "tree", image_format="JPEG", image_size=(200, 150))))
        sizes = []
        for quality in (20, 95):
            pack(catalog, tmp_path / "packed.zip", 100, quality=quality)
            sizes.append((tmp_path / "packed.zip").stat().st_size)
        assert sizes[0] < sizes[1]


class TestBadImages:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        root = write_tree(write_uned_tree(tmp_path / "tree"), {"images/flags/0000_001.png": b"broken"})
        (root / "images/flags/0000_003.png").unlink()
        return root

    def test_an_error_leaves_an_older_archive_as_it_was(self, tmp_path: Path, root: Path) -> None:
        (tmp_path / "packed.zip").write_bytes(b"older")
        for short_side, message in (
            (None, r"no file 'images/flags/0000_003\.png'"),
            (10, r"flags/0000_001\.png: not an im"),
        ):
            with pytest.raises(DataError, match=message):
                pack(load_catalog(str(root)), tmp_path / "packed.zip", short_side)
        assert (tmp_path / "packed.zip").read_bytes() == b"older"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["packed.zip", "tree"]

    def test_skipping_keeps_damaged_images_and_reports_them_with_missing_ones(self, tmp_path: Path, root: Path) -> None:
        catalog = load_catalog(str(root))
        bad = pack(catalog, tmp_path / "packed.zip", 10, on_bad_image="skip")
        assert list(bad) == ["flags/0000_001.png", "flags/0000_003.png"]
        packed = load_catalog(str(tmp_path / "packed.zip"))
        assert packed.fingerprint == catalog.fingerprint
        assert packed.store.read("flags/0000_001.png") == b"broken"
        with pytest.raises(DataError, match="flags: 1 of 24 images missing"):
            check_images(packed)


class TestShards:
    def test_a_folder_of_shards_is_the_same_catalog(self, tmp_path: Path) -> None:
        several = b'{"path": "rp2k/\xe5\xba\xb7.png", "class_id": [9, 3]}'
        files = {"info_files/emoji/index.json": b"[" + several + b', {"path": "rp2k/a.png", "class_id": 9}]'}
        root = write_tree(
            write_uned_tree(tmp_path / "tree", domains=("emoji", "flags", "cars"), index_of="flags"), files
        )
        write_tree(root, {"images/rp2k/#U5eb7.png": b"an escaped name", "images/rp2k/a.png": b"a class without a name"})
        catalog = load_catalog(str(root))
        assert pack(catalog, tmp_path / "packed", shard_images=64) == {}
        names = sorted(p.name for p in (tmp_path / "packed").iterdir())
        assert names == ["images-00000-of-00002.parquet", "images-00001-of-00002.parquet", "info_files", "packing.json"]
        packed = load_catalog(str(tmp_path / "packed"))
        assert packed.fingerprint == catalog.fingerprint
        assert same_content(catalog, packed)
        assert check_images(packed) == check_images(catalog)
        paths = {path for d in catalog.domains for split in d.splits.values() for path in split.paths}
        assert set(packed.store.files()) == paths

    def test_rows_say_what_a_table_says_of_its_images(self, tmp_path: Path) -> None:
        table = b"path,domain,class,split,by\na.png,birds,heron,test,Ann\nb.png,birds,kite,test,Bo\n"
        write_tree(tmp_path, {"t.csv": table, "a.png": b"1", "b.png": b"22"})
        pack(load_catalog(str(tmp_path / "t.csv"), needed=("test",)), tmp_path / "packed")
        rows = pd.read_parquet(tmp_path / "packed" / "images-00000-of-00001.parquet")
        assert rows["image"].tolist() == [{"bytes": b"1", "path": "a.png"}, {"bytes": b"22", "path": "b.png"}]
        columns = {"domain": ["birds", "birds"], "label": [0, 1], "class": ["heron", "kite"], "split": ["test", "test"]}
        assert {name: rows[name].tolist() for name in (*columns, "by")} == {**columns, "by": ["Ann", "Bo"]}

    def test_packing_goes_on_where_it_was_killed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = write_uned_tree(tmp_path / "tree", domains=("emoji", "flags", "cars"), index_of="flags")
        (root / "images/emoji/0000_000.png").unlink()
        catalog, out = load_catalog(str(root)), tmp_path / "packed"
        bad = pack(catalog, tmp_path / "whole", on_bad_image="skip", shard_images=64)

        def killed(done: int, _: int) -> None:
            if done > 64:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pack(catalog, out, on_bad_image="skip", shard_images=64, progress=killed)
        first = (out / "images-00000-of-00002.parquet").stat().st_mtime_ns
        assert not list(out.glob("images-00001*"))
        with pytest.raises(DataError, match=r"packed: 1 of 2 shards are missing, the first is number 1 .*: pack again"):
            load_catalog(str(out))
        (out / "images-00001-of-00002.parquet.123.tmp").write_bytes(b"left by a process that was killed")
        read = []
        monkeypatch.setattr(Store, "read", lambda store, path, real=Store.read: read.append(path) or real(store, path))
        assert pack(catalog, out, on_bad_image="skip", shard_images=64) == bad
        assert list(bad) == ["emoji/0000_000.png"]
        assert len(read) == len({p for d in catalog.domains for s in d.splits.values() for p in s.paths}) - 64
        assert (out / "images-00000-of-00002.parquet").stat().st_mtime_ns == first
        contents = [{p.name: p.read_bytes() for p in sorted(place.glob("*.*"))} for place in (out, tmp_path / "whole")]
        assert contents[0] == contents[1]
        assert pack(catalog, out, on_bad_image="skip", shard_images=64) == bad, "nothing is left to do"

    def test_a_folder_of_something_else_is_refused(self, tmp_path: Path) -> None:
        catalog = load_catalog(str(write_uned_tree(tmp_path / "tree")))
        write_tree(tmp_path, {"other/a.txt": b""})
        with pytest.raises(UserError, match=r"parameter 'out': .*other' is a folder of other files; expected"):
            pack(catalog, tmp_path / "other")
        with pytest.raises(UserError, match="is the archive that the images are read from"):
            pack(catalog, tmp_path / "tree")
        with pytest.raises(UserError, match="parameter 'shard_images': found 100, expected a multiple of 64"):
            pack(catalog, tmp_path / "packed", shard_images=100)
        pack(catalog, tmp_path / "packed")
        with pytest.raises(UserError, match="packed' was begun with another short_side: expected the same, or a new"):
            pack(catalog, tmp_path / "packed", short_side=8)

    def test_a_missing_image_stops_it_with_its_name(self, tmp_path: Path) -> None:
        root = write_uned_tree(tmp_path / "tree")
        (root / "images/flags/0000_003.png").unlink()
        with pytest.raises(DataError, match=r"no file 'images/flags/0000_003\.png'"):
            pack(load_catalog(str(root)), tmp_path / "packed")
        assert not list((tmp_path / "packed").glob("*.parquet*"))


class TestSettings:
    def test_impossible_settings_are_refused(self, tmp_path: Path) -> None:
        catalog = load_catalog(str(write_uned_zip(tmp_path / "b.zip")))
        out = tmp_path / "out.zip"
        with pytest.raises(UserError, match="parameter 'image_format': found 'jpg'; did you mean 'jpeg'"):
            pack(catalog, out, image_format="jpg")
        for options in ({"quality": 0}, {"quality": 101}, {"short_side": 0}):
            with pytest.raises(UserError, match="expected quality of 1 to 100 and short_side >= 1"):
                pack(catalog, out, **options)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="parameter 'out': .* has to be a file in a folder that exists"):
            pack(catalog, tmp_path / "nowhere" / "out.zip")
        before = (tmp_path / "b.zip").read_bytes()
        with pytest.raises(UserError, match="is the archive that the images are read from"):
            pack(catalog, tmp_path / "b.zip")
        assert (tmp_path / "b.zip").read_bytes() == before
        assert not out.exists()
