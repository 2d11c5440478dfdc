"""Packs of Parquet shards: reading images where they lie, by any process, and what damage is told."""

import importlib.util
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.helpers.catalogs import write_image_folder
from udonlib.data.catalog import Catalog, DataError, load_catalog
from udonlib.data.check.datacheck import check_catalog
from udonlib.data.images import ImageReader, WindowLoader
from udonlib.data.packing import pack
from udonlib.data.tables import shards
from udonlib.data.tables.shards import Shards

SHARD = "images-00000-of-00002.parquet"


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return load_catalog(str(write_image_folder(tmp_path / "own", n_classes=12, n_images=4)))


@pytest.fixture
def packed(tmp_path: Path, catalog: Catalog) -> Path:
    pack(catalog, tmp_path / "packed", shard_images=64)
    return tmp_path / "packed"


def paths(catalog: Catalog) -> list[str]:
    return [path for domain in catalog.domains for split in domain.splits.values() for path in split.paths]


def test_images_are_read_in_any_order_and_by_other_processes(catalog: Catalog, packed: Path) -> None:
    store = load_catalog(str(packed)).store
    shuffled = np.random.default_rng(0).permutation(paths(catalog)).tolist()
    assert all(store.read(path) == catalog.store.read(path) for path in shuffled)
    other = pickle.loads(pickle.dumps(store))
    assert all(other.read(path) == catalog.store.read(path) for path in shuffled)
    assert store.missing(["cats/none.png", shuffled[0]]) == ["cats/none.png"]
    with pytest.raises(DataError, match=r"packed: no file 'cats/none.png'"):
        store.read("cats/none.png")


def test_workers_read_the_same_batches(catalog: Catalog, packed: Path) -> None:
    plan = [[("cats", np.array([0, 5, 3])), ("dogs", np.array([1]))], [("dogs", np.array([2, 2, 7]))]]
    batches = []
    for source, n_workers in ((catalog, 0), (load_catalog(str(packed)), 2)):
        loader = WindowLoader(ImageReader(source, 16, "train", cache=False), n_workers)
        batches.append([images for images, _ in loader(plan)])
    assert all(torch.equal(one, other) for one, other in zip(*batches, strict=True))


def test_a_page_holds_no_more_than_it_has_room_for(
    tmp_path: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "GROUP_BYTES", 5000)
    pack(catalog, tmp_path / "packed")
    facts = pq.ParquetFile(tmp_path / "packed" / "images-00000-of-00001.parquet").metadata
    groups = [facts.row_group(i) for i in range(facts.num_row_groups)]
    assert len(groups) > 2
    assert sum(group.num_rows for group in groups) == len(paths(catalog))
    store = load_catalog(str(tmp_path / "packed")).store
    assert all(store.read(path) == catalog.store.read(path) for path in paths(catalog))


def test_a_file_says_to_the_datasets_library_what_its_columns_are(packed: Path) -> None:
    features = json.loads(pq.read_schema(packed / SHARD).metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert set(features) == set(pq.read_schema(packed / SHARD).names)


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is not installed")
def test_the_datasets_library_reads_it(catalog: Catalog, packed: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = sorted(map(str, packed.glob("*.parquet")))
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == len(paths(catalog))
    assert rows[0]["image"].size == (24, 20)


class TestDamage:
    def change(self, packed: Path, at: int) -> None:
        content = bytearray((packed / SHARD).read_bytes())
        content[at] ^= 1
        (packed / SHARD).write_bytes(content)

    def place(self, packed: Path, path: str) -> int:
        archive = Shards(packed)
        key = shards.name_key(path.encode())
        return int(archive._rows["offset"][np.searchsorted(archive._keys, np.uint64(key))])

    def test_a_changed_byte_of_an_image_is_found_when_it_is_read(self, catalog: Catalog, packed: Path) -> None:
        path = paths(catalog)[0]
        for back, problem in ((0, "is damaged: its checksum differs"), (4, "is not where its row group says")):
            at = self.place(packed, path) - back
            self.change(packed, at)
            store = load_catalog(str(packed)).store
            with pytest.raises(DataError, match=rf"{SHARD}: image '{path}' {problem}"):
                store.read(path)
            assert store.read(paths(catalog)[1]) == catalog.store.read(paths(catalog)[1])
            self.change(packed, at)

    def test_a_check_of_all_data_names_it(self, catalog: Catalog, packed: Path) -> None:
        self.change(packed, self.place(packed, paths(catalog)[0]) + 40)
        check = check_catalog(load_catalog(str(packed)), seconds=None)
        [finding] = check.of_level("broken")
        assert finding.images[0][1] == paths(catalog)[0]
        assert "its checksum differs" in finding.images[0][2]

    def test_a_shard_that_is_cut_missing_or_of_another_pack_is_named(self, packed: Path) -> None:
        content = (packed / SHARD).read_bytes()
        (packed / SHARD).write_bytes(content[:-9])
        with pytest.raises(DataError, match=rf"{SHARD}: cut short or damaged, or not a Parquet file"):
            load_catalog(str(packed))
        (packed / SHARD).write_bytes(content)
        (packed / SHARD).rename(packed / SHARD.replace("00002", "00003"))
        with pytest.raises(DataError, match=r"packed: shards of two packs: images-00000-of-00003"):
            load_catalog(str(packed))

    def test_files_that_others_compressed_are_refused(self, packed: Path) -> None:
        table = pq.read_table(packed / SHARD)
        pq.write_table(table, packed / SHARD)
        with pytest.raises(DataError, match=rf"{SHARD}: its images are compressed; expected a pack of udonlib"):
            load_catalog(str(packed))
        pq.write_table(table.drop_columns(["crc32"]), packed / SHARD)
        with pytest.raises(DataError, match=rf"{SHARD}: no column 'crc32'; expected a pack of udonlib"):
            load_catalog(str(packed))


def test_a_place_beyond_any_file_is_called_damage(packed: Path, catalog: Catalog) -> None:
    found = Shards(packed)
    for offset in (2**63 + 8, 2**40):
        found._rows["offset"] = offset
        with pytest.raises(DataError, match="is not where its row group says: damaged"):
            found.content(paths(catalog)[0])


@pytest.mark.parametrize("error", [NotImplementedError("64 bits"), UnicodeDecodeError("utf-8", b"\xe5", 0, 1, "bad")])
def test_whatever_pyarrow_says_of_a_damaged_file_is_one_message(packed: Path, monkeypatch, error: Exception) -> None:
    class Broken(pq.ParquetFile):
        def read(self, *given: object, **named: object) -> None:
            raise error

    monkeypatch.setattr(pq, "ParquetFile", Broken)
    with pytest.raises(DataError, match=r"\.parquet: damaged: "):
        Shards(packed)
