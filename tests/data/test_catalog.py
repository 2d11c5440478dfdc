"""Catalogs: the forms that are read, and what comes out."""

import hashlib
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.catalogs import (
    picture,
    uned_files,
    with_entries,
    write_image_folder,
    write_tree,
    write_uned_tree,
    write_zip,
)
from udonlib.data.catalog import DataError, check_images, load_catalog
from udonlib.errors import UserError


class TestOfficialForm:
    def test_splits_hold_paths_labels_and_class_names(self, tmp_path: Path) -> None:
        catalog = load_catalog(str(write_uned_tree(tmp_path / "bench")))
        assert catalog.name == "bench"
        assert catalog.names == ("emoji", "flags")
        train = catalog["flags"].splits["train"]
        assert train.paths[:2] == ("flags/0000_000.png", "flags/0000_001.png")
        assert train.labels.tolist() == [[0]] * 4 + [[1]] * 3 + [[2]] * 5
        assert train.labels.dtype == np.int64
        assert train.class_names == {0: "class 0", 1: "class 1", 2: "class 2"}
        assert catalog["flags"].sizes == {"train": 12, "val": 5, "test": 7}

    def test_train_labels_count_the_train_classes_without_gaps(self, tmp_path: Path) -> None:
        entries = [{"path": f"{i}.png", "class_id": label} for i, label in enumerate([70, 5, 70, 2**62])]
        domain = load_catalog(str(with_entries(tmp_path, entries)))["emoji"]
        assert domain.train_labels.tolist() == [1, 0, 1, 2]
        assert domain.n_classes == 3

    def test_queries_search_the_index_split_where_there_is_one_and_themselves_otherwise(self, tmp_path: Path) -> None:
        catalog = load_catalog(str(write_uned_tree(tmp_path, index_of="flags")))
        assert catalog["emoji"].index("test") is catalog["emoji"].queries("test") is catalog["emoji"].splits["test"]
        assert catalog["emoji"].index("val") is catalog["emoji"].splits["val"]
        assert catalog["flags"].index("test") is catalog["flags"].splits["index"]
        assert catalog["flags"].index("val") is catalog["flags"].splits["small_index"]
        assert catalog["flags"].queries("val") is catalog["flags"].splits["val"]

    def test_several_labels_of_an_image_are_padded_with_minus_one(self, tmp_path: Path) -> None:
        entries = [
            {"path": "a.png", "class_id": [4, 9]},
            {"path": "b.png", "class_id": 3},
            {"path": "c", "class_id": [1]},
        ]
        test = load_catalog(str(with_entries(tmp_path, entries, "emoji/test.json")))["emoji"].splits["test"]
        assert test.labels.tolist() == [[4, 9], [3, -1], [1, -1]]

    def test_folder_and_archive_give_the_same_catalog_and_bytes(self, tmp_path: Path) -> None:
        folder = load_catalog(str(write_uned_tree(tmp_path / "tree", index_of="flags")))
        path = folder["flags"].splits["train"].paths[3]
        for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            packed = load_catalog(str(write_zip(tmp_path / "b.zip", uned_files(index_of="flags"), compression)))
            assert packed.fingerprint == folder.fingerprint
            assert packed.store.read(path) == folder.store.read(path)
            assert check_images(packed) == check_images(folder) == 24 + 24 + 5 + 7

    def test_images_may_lie_elsewhere_with_or_without_a_folder_images(self, tmp_path: Path) -> None:
        files = uned_files()
        info = write_zip(tmp_path / "info.zip", {k: v for k, v in files.items() if k.startswith("info_files/")})
        images = {k: v for k, v in files.items() if k.startswith("images/")}
        write_tree(tmp_path / "a", images)
        write_zip(tmp_path / "b.zip", images)
        for where in ("a", "a/images", "b.zip"):
            assert check_images(load_catalog(str(info), images=str(tmp_path / where))) == 48

    def test_domains_come_in_the_usual_order_or_as_asked_for(self, tmp_path: Path) -> None:
        root = str(write_uned_tree(tmp_path, domains=("aardvark", "cars", "zebra", "earth", "emoji", "food2k")))
        assert load_catalog(root).names == ("food2k", "cars", "emoji", "earth", "aardvark", "zebra")
        assert load_catalog(root, "earth, cars").names == ("earth", "cars")
        assert load_catalog(root, ["zebra"]).names == ("zebra",)

    def test_names_that_an_unpacker_escaped_are_found(self, tmp_path: Path) -> None:
        path = "rp2k/康师傅_😀/a.png"
        entries = [{"path": path, "class_id": 0}]
        root = with_entries(tmp_path / "tree", entries)
        write_tree(root, {"images/rp2k/#U5eb7#U5e08#U5085_#L01f600/a.png": b"found"})
        files = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for data in (root, write_zip(tmp_path / "b.zip", files)):
            catalog = load_catalog(str(data), "emoji")
            assert catalog.store.read(path) == b"found"
            assert check_images(catalog) == 13
        write_tree(root, {f"images/{path}": b"its own name comes first"})
        assert load_catalog(str(root)).store.read(path) == b"its own name comes first"

    def test_byte_order_mark_spaces_and_unknown_keys_do_no_harm(self, tmp_path: Path) -> None:
        content = (
            b'\xef\xbb\xbf \n[ {"path" : "a.png", "class_id": 1, "width": 3} \r\n,\t{"path":"b/c.png","class_id":0}]\n'
        )
        assert load_catalog(str(with_entries(tmp_path, content)))["emoji"].splits["train"].paths == ("a.png", "b/c.png")


class TestMiniUned:
    def test_it_is_read_through_the_same_code_and_complete(self) -> None:
        catalog = load_catalog()
        assert catalog.names == ("emoji", "flags", "logos", "icons", "fonts", "kanji", "fashion", "earth")
        assert check_images(catalog) > 20_000
        assert catalog["fashion"].index("test").paths == catalog["fashion"].splits["train"].paths
        assert set(catalog["fashion"].index("val").paths) < set(catalog["fashion"].splits["train"].paths)
        assert catalog["earth"].index("val") is catalog["earth"].queries("val")
        assert set(catalog["earth"].queries("val").paths) < set(catalog["earth"].index("test").paths)


class TestImageFolders:
    def test_classes_are_dealt_whole_to_splits_of_60_10_and_30_percent(self, tmp_path: Path) -> None:
        catalog = load_catalog(str(write_image_folder(tmp_path, n_classes=20)))
        assert catalog.names == ("cats", "dogs")
        for domain in catalog.domains:
            classes = {name: set(split.labels[:, 0].tolist()) for name, split in domain.splits.items()}
            assert {name: len(c) for name, c in classes.items()} == {"train": 12, "val": 2, "test": 6}
            assert set.union(*classes.values()) == set(range(20))
            for split in domain.splits.values():
                for path, label in zip(split.paths, split.labels[:, 0].tolist(), strict=True):
                    assert path.startswith(f"{domain.name}/{split.class_names[label]}/")
        assert check_images(catalog) == 120

    def test_the_deal_depends_on_names_alone(self, tmp_path: Path) -> None:
        one = load_catalog(str(write_image_folder(tmp_path / "a")))
        other = load_catalog(str(write_image_folder(tmp_path / "b", domains=("dogs", "cats"))))
        assert one.fingerprint == other.fingerprint
        order = sorted(range(10), key=lambda c: hashlib.sha256(f"cats/class {c}".encode()).digest())
        names = {f"class {c}" for c in order[:6]}
        assert set(one["cats"].splits["train"].class_names.values()) == names

    @pytest.mark.parametrize("n_classes", [3, 4, 5, 7])
    def test_no_split_stays_empty(self, tmp_path: Path, n_classes: int) -> None:
        catalog = load_catalog(str(write_image_folder(tmp_path, n_classes=n_classes)))
        assert all(len(split) > 0 for domain in catalog.domains for split in domain.splits.values())

    def test_other_files_and_hidden_ones_are_left_out(self, tmp_path: Path) -> None:
        root = write_image_folder(tmp_path)
        write_tree(
            root, {"cats/class 1/Thumbs.db": b"x", "cats/class 1/.a.jpg": b"x", ".git/x/a.jpg": b"", "a.txt": b""}
        )
        assert check_images(load_catalog(str(root))) == 60

    def test_a_linked_class_folder_is_followed(self, tmp_path: Path) -> None:
        root = write_image_folder(tmp_path / "data", n_classes=3)
        write_tree(tmp_path, {"elsewhere/1.png": picture(1)})
        os.symlink(tmp_path / "elsewhere", root / "cats" / "linked")
        assert check_images(load_catalog(str(root), "cats")) == 10

    def test_too_few_classes_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="cats: train, val and test need a class folder each, found 2 with images"):
            load_catalog(str(write_image_folder(tmp_path, n_classes=2)))

    def test_an_image_outside_of_a_class_folder_is_named(self, tmp_path: Path) -> None:
        root = write_tree(write_image_folder(tmp_path), {"dogs/lost.jpg": b"x"})
        with pytest.raises(
            DataError, match=r"dogs/lost\.jpg: an image outside of a class folder; expected domain/class"
        ):
            load_catalog(str(root))

    def test_an_empty_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="holds neither info_files/ nor folders domain/class/image"):
            load_catalog(str(tmp_path))

    def test_images_apart_make_no_sense_without_info_files(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"parameter 'images': .* holds no info_files/"):
            load_catalog(str(write_image_folder(tmp_path)), images=str(tmp_path))


class TestWrongPlaces:
    def test_an_unknown_domain_gets_the_nearest_name(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"parameter 'domains': .* has no domain 'emojis'; did you mean 'emoji'\?"):
            load_catalog(str(write_uned_tree(tmp_path)), "flags,emojis")
        with pytest.raises(DataError, match=r"no domain 'flag'; did you mean 'flags'"):
            load_catalog(str(tmp_path))["flag"]

    @pytest.mark.parametrize("domains", ["emoji,emoji", []])
    def test_domains_twice_or_none_are_refused(self, tmp_path: Path, domains: str | list[str]) -> None:
        with pytest.raises(DataError, match="parameter 'domains': every domain once, and one at least"):
            load_catalog(str(write_uned_tree(tmp_path)), domains)

    def test_a_missing_data_folder_gets_the_nearest_name(self, tmp_path: Path) -> None:
        write_uned_tree(tmp_path / "unedata")
        with pytest.raises(DataError, match=r"parameter 'data': no folder or archive .*; did you mean 'unedata'"):
            load_catalog(str(tmp_path / "uned_data"))
        with pytest.raises(DataError, match=r"parameter 'data': .*did you mean 'miniuned'"):
            load_catalog("miniunde")
        with pytest.raises(DataError, match=r"parameter 'images': no folder or archive"):
            load_catalog(str(tmp_path / "unedata"), images=str(tmp_path / "nowhere"))

    def test_info_files_without_a_split_are_refused(self, tmp_path: Path) -> None:
        root = write_tree(tmp_path, {"info_files/readme.txt": b""})
        with pytest.raises(DataError, match=r"info_files/ holds no <domain>/<split>\.json"):
            load_catalog(str(root))

    def test_all_errors_are_mistakes_that_the_user_can_mend(self) -> None:
        assert issubclass(DataError, UserError)


class TestFingerprint:
    def test_it_is_the_same_for_another_place_order_and_layout_of_the_files(self, tmp_path: Path) -> None:
        one = load_catalog(str(write_uned_tree(tmp_path / "a")))
        root = write_uned_tree(tmp_path / "b")
        for file in root.rglob("*.json"):
            file.write_text(json.dumps(json.loads(file.read_text()), indent=2))
        assert one.fingerprint == load_catalog(str(root), "flags,emoji").fingerprint
        assert len(one.fingerprint) == 64

    def test_it_changes_with_every_path_label_and_split(self, tmp_path: Path) -> None:
        entries = [{"path": "a.png", "class_id": 1}, {"path": "b.png", "class_id": 2}]
        changed = [
            [entries[1], entries[0]],
            [entries[0], {"path": "b.png", "class_id": 3}],
            [entries[0], {"path": "c.png", "class_id": 2}],
            entries[:1],
        ]
        prints = {load_catalog(str(with_entries(tmp_path, e))).fingerprint for e in [entries, *changed]}
        assert len(prints) == 5

    def test_it_is_pinned(self, tmp_path: Path) -> None:
        """A run is resumed on the data it began with: the fingerprint must not change between versions."""
        assert load_catalog(str(write_uned_tree(tmp_path))).fingerprint[:16] == "83b6719dabf5c72a"


@pytest.mark.parametrize("name", ["mean", "all"])
def test_a_domain_cannot_be_called_as_a_row_of_the_results(name, tmp_path):
    folder = write_image_folder(tmp_path / "pets")
    sorted(folder.iterdir())[0].rename(folder / name)
    with pytest.raises(UserError, match=f"a domain cannot be called '{name}'"):
        load_catalog(str(folder))


class TestSeveralSources:
    def test_they_are_read_side_by_side(self, tmp_path: Path) -> None:
        uned = write_uned_tree(tmp_path / "uned", index_of="flags")
        write_image_folder(tmp_path / "own")
        rows = [f"{c}/{i}.png,birds,{c}" for c in range(4) for i in range(2)]
        images = {f"more/{row.partition(',')[0]}": row.encode() for row in rows}
        write_tree(tmp_path, {"more/more.csv": "\n".join(["path,domain,class", *rows]).encode(), **images})
        places = [str(uned), str(tmp_path / "own"), str(tmp_path / "more" / "more.csv")]
        catalog = load_catalog(f"[{', '.join(places)}]")
        assert catalog.names == ("emoji", "flags", "birds", "cats", "dogs")
        assert catalog.name == "uned+own+more"
        alone = [load_catalog(place) for place in places]
        assert check_images(catalog) == sum(map(check_images, alone))
        for domain in (domain for other in alone for domain in other.domains):
            here = catalog[domain.name]
            assert here.n_classes == domain.n_classes
            [other] = [other for other in alone if domain.name in other.names]
            for name, split in domain.splits.items():
                contents = [other.store.read(path) for path in split.paths]
                assert [catalog.store.read(path) for path in here.splits[name].paths] == contents
                assert (here.splits[name].labels == split.labels).all()
        assert catalog["birds"].splits["test"].paths[0].startswith("birds/")
        assert catalog["emoji"].splits["test"].paths == alone[0]["emoji"].splits["test"].paths
        assert load_catalog(places[::-1]).fingerprint == catalog.fingerprint, "their order does not matter"

    def test_what_is_wrong_is_seen_through_them(self, tmp_path: Path) -> None:
        write_uned_tree(tmp_path / "uned")
        write_image_folder(tmp_path / "own")
        write_tree(tmp_path / "a", {"t.csv": b"path,domain,class,split\nx.png,birds,a,test\n"})
        places = [str(tmp_path / "uned"), str(tmp_path / "own"), str(tmp_path / "a" / "t.csv")]
        with pytest.raises(DataError, match="birds: 1 of 1 images missing, first 'birds/x.png'"):
            check_images(load_catalog(places, needed=("test",)))
        with pytest.raises(DataError, match="domain 'birds' has no images for train"):
            load_catalog(places)
        with pytest.raises(DataError, match=r"parameter 'domains': .* has no domain 'bird'; did you mean 'birds'\?"):
            load_catalog(places, "cats,bird")
        with pytest.raises(DataError, match=r"no domain has a file 'bird/x.png'; did you mean 'birds'"):
            load_catalog(places, "cats,birds", all_as_test=True).store.read("bird/x.png")

    def test_a_domain_is_in_one_of_them(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            write_image_folder(tmp_path / name, ("cats",))
        with pytest.raises(DataError, match=r"parameter 'data': domain 'cats' is in .*a and in .*b; expected"):
            load_catalog([tmp_path / "a", tmp_path / "b"])

    def test_images_apart_are_those_of_info_files_and_manifests(self, tmp_path: Path) -> None:
        uned = write_uned_tree(tmp_path / "uned")
        (uned / "images").rename(tmp_path / "far")
        write_image_folder(tmp_path / "own")
        catalog = load_catalog([uned, tmp_path / "own"], images=tmp_path / "far")
        assert check_images(catalog) == sum(sum(domain.sizes.values()) for domain in catalog.domains)
        with pytest.raises(DataError, match="parameter 'images': .*own holds no info_files/"):
            load_catalog(["miniuned", tmp_path / "own"], images=tmp_path / "far")

    def test_they_are_pickled_for_workers(self, tmp_path: Path) -> None:
        write_image_folder(tmp_path / "own")
        catalog = load_catalog(["miniuned", tmp_path / "own"], "cats,emoji")
        store = pickle.loads(pickle.dumps(catalog.store))
        for domain in catalog.domains:
            path = domain.splits["test"].paths[0]
            assert store.read(path) == catalog.store.read(path)
            first, last, size = store.ends(path, 4)
            assert (first, last, size) == (store.read(path)[:4], store.read(path)[-4:], len(store.read(path)))
            assert store.digest(path) == catalog.store.digest(path)
