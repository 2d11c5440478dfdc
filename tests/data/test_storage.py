"""Folders and archives: the same bytes from both, and every kind of damage noticed."""

import os
import pickle
import re
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from tests.helpers.catalogs import picture, uned_files, write_uned_tree, write_uned_zip, write_zip
from udonlib.data.catalog import DataError, check_images, load_catalog


class TestArchives:
    def test_an_archive_without_info_files_or_images_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"b\.zip: the archive holds neither info_files/ nor"):
            load_catalog(str(write_zip(tmp_path / "b.zip", {"notes/a.txt": b"x"})))

    def test_an_archive_cut_short_anywhere_is_refused_or_the_image_named(self, tmp_path: Path) -> None:
        whole = write_uned_zip(tmp_path / "whole.zip").read_bytes()
        cut = tmp_path / "cut.zip"
        for size in [0, 1, 21, 22, len(whole) // 2, *range(len(whole) - 40, len(whole), 3)]:
            cut.write_bytes(whole[:size])
            with pytest.raises(DataError, match=r"cut\.zip: (not a zip archive|cut short)"):
                load_catalog(str(cut))

    def test_missing_bytes_in_the_middle_are_noticed(self, tmp_path: Path) -> None:
        whole = write_uned_zip(tmp_path / "whole.zip").read_bytes()
        (tmp_path / "cut.zip").write_bytes(whole[:3000] + whole[3100:])
        with pytest.raises(DataError, match=r"cut\.zip: cut short or damaged"):
            load_catalog(str(tmp_path / "cut.zip"))

    def test_a_file_that_is_no_archive_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.zip").write_bytes(picture(0))
        with pytest.raises(DataError, match=r"a\.zip: not a zip archive"):
            load_catalog(str(tmp_path / "a.zip"))

    @pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    def test_a_changed_image_is_noticed_by_its_checksum(self, tmp_path: Path, compression: int) -> None:
        name = "emoji/0000_000.png"
        path = write_zip(tmp_path / "b.zip", uned_files(), compression)
        with zipfile.ZipFile(path) as archive:
            at = archive.getinfo(f"images/{name}").header_offset + 30 + len(f"images/{name}") + 5
        content = bytearray(path.read_bytes())
        content[at] ^= 255
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"entry 'images/{name}' is damaged"):
            load_catalog(str(path)).store.read(name)

    def test_other_compression_is_refused_by_name(self, tmp_path: Path) -> None:
        path = write_zip(tmp_path / "b.zip", uned_files(), zipfile.ZIP_BZIP2)
        with pytest.raises(DataError, match="is encrypted or packed by method 12; valid: stored or deflated"):
            load_catalog(str(path))

    def test_zip64_archives_are_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 500)
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 5)
        path = write_uned_zip(tmp_path / "b.zip")
        content = path.read_bytes()
        assert b"PK\x06\x06" in content
        catalog = load_catalog(str(path))
        assert check_images(catalog) == 48
        for domain in catalog.domains:
            for split in domain.splits.values():
                assert all(catalog.store.read(p) == uned_files()[f"images/{p}"] for p in split.paths)

    def test_an_entry_that_would_unfold_to_gigabytes_is_refused_before_memory_is_taken(self, tmp_path: Path) -> None:
        path = write_zip(tmp_path / "b.zip", {**uned_files(), "images/bomb": bytes(10**7)}, zipfile.ZIP_DEFLATED)
        content = path.read_bytes()
        for declared, message in (
            (3 * 10**9, "entry 'images/bomb' unfolds to 3,000,000,000 bytes, and at most 536,870,912 are read"),
            (1000, "entry 'images/bomb' is damaged: it does not hold the 1,000 bytes declared"),
            (2**32 - 1, "entry 'images/bomb' unfolds to 4,294,967,295 bytes or more"),
        ):
            path.write_bytes(content.replace(struct.pack("<I", 10**7), struct.pack("<I", declared)))
            store = load_catalog(str(path)).store
            tracemalloc.start()
            with pytest.raises(DataError, match=re.escape(message)):
                store.read("bomb")
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 10**6

    def test_sizes_and_places_that_no_file_has_are_damage(self, tmp_path: Path) -> None:
        path = write_uned_zip(tmp_path / "b.zip")
        content = path.read_bytes()
        for at in (12, 16):  # of the end record: the directory's size and place
            damaged = bytearray(content)
            struct.pack_into("<I", damaged, len(content) - 22 + at, 2**32 - 2)
            path.write_bytes(damaged)
            with pytest.raises(DataError, match="cut short or damaged"):
                load_catalog(str(path))

    def test_a_missing_image_is_named(self, tmp_path: Path) -> None:
        for data in (write_uned_tree(tmp_path / "tree"), write_uned_zip(tmp_path / "b.zip")):
            with pytest.raises(DataError, match=r"no file 'images/emoji/nothing\.png'"):
                load_catalog(str(data)).store.read("emoji/nothing.png")


class TestStores:
    @pytest.mark.parametrize("packed", [False, True])
    def test_a_pickled_store_reads_the_same_after_it_has_been_used(self, tmp_path: Path, packed: bool) -> None:
        data = write_uned_zip(tmp_path / "b.zip") if packed else write_uned_tree(tmp_path / "tree")
        catalog = load_catalog(str(data))
        path = catalog["emoji"].splits["val"].paths[0]
        content = catalog.store.read(path)
        assert pickle.loads(pickle.dumps(catalog.store)).read(path) == content

    def test_a_system_without_positioned_reads_reads_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(os, "pread")  # as on Windows
        catalog = load_catalog(str(write_uned_zip(tmp_path / "a.zip")))
        path = catalog.domains[0].splits["train"].paths[0]
        assert catalog.store.read(path) == uned_files()[f"images/{path}"]

    def test_forked_processes_share_an_archive_without_mixing_up_reads(self, tmp_path: Path) -> None:
        catalog = load_catalog(str(write_uned_zip(tmp_path / "b.zip")))
        paths = catalog["emoji"].splits["train"].paths + catalog["flags"].splits["train"].paths
        expected = [catalog.store.read(path) for path in paths]
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                same = all([catalog.store.read(p) for p in paths] == expected for _ in range(20))
                os._exit(0 if same else 1)
            children.append(child)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]

    def test_a_file_that_is_too_large_is_refused_before_memory_is_taken(self, tmp_path: Path) -> None:
        root = write_uned_tree(tmp_path)
        with (root / "info_files/emoji/val.json").open("wb") as file:
            file.truncate(2 * 10**9)  # takes no room on the disk
        with pytest.raises(DataError, match=r"val\.json: holds 2,000,000,000 bytes, and at most 536,870,912"):
            load_catalog(str(root))

    def test_images_that_do_not_exist_are_counted_by_domain(self, tmp_path: Path) -> None:
        root = write_uned_tree(tmp_path)
        assert check_images(load_catalog(str(root))) == 48
        (root / "images/flags/0001_001.png").unlink()
        (root / "images/flags/0002_004.png").unlink()
        with pytest.raises(DataError, match=r"flags: 2 of 24 images missing, first 'flags/0001_001\.png'") as error:
            check_images(load_catalog(str(root)))
        assert "emoji:" not in str(error.value)
