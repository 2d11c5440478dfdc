"""Folders of images: domains, splits and classes as people lay them out."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.helpers.catalogs import picture, write_image_folder, write_tree, write_uned_zip, write_zip
from udonlib.data.catalog import Catalog, DataError, check_images, load_catalog

IMAGE = picture(0)


def laid_out(root: Path, sizes: dict[str, Sequence[int]], first_class: dict[str, int] | None = None) -> Path:
    """Write folder/class/image; sizes: folder -> images per class."""
    first = first_class or {}
    for folder, counts in sizes.items():
        for c, n in enumerate(counts, start=first.get(folder, 0)):
            write_tree(root, {f"{folder}/c{c}/{i}.png": IMAGE for i in range(n)})
    return root


def classes(catalog: Catalog, domain: str) -> dict[str, dict[str, int]]:
    """Split -> class -> images."""
    found: dict[str, dict[str, int]] = {}
    for name, split in catalog[domain].splits.items():
        for path, label in zip(split.paths, split.labels[:, 0].tolist(), strict=True):
            known = split.class_names[label]
            assert f"/{known}/" in path
            found.setdefault(name, {}).setdefault(known, 0)
            found[name][known] += 1
    return found


class TestFoldersOfSplits:
    @pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "validation", "TESTING")])
    @pytest.mark.parametrize("packed", ["folder", "zip", "zip with a folder"])
    def test_they_are_one_domain_with_its_splits(self, tmp_path: Path, names: tuple[str, ...], packed: str) -> None:
        root = laid_out(tmp_path / "pets", dict(zip(names, ([5, 5], [2, 2], [3, 3]), strict=True)))
        if packed != "folder":
            files = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.png")}
            inside = {f"pets/{path}": content for path, content in files.items()} if " " in packed else files
            root = write_zip(tmp_path / ("pets.zip" if inside is files else "x.zip"), inside)
        catalog = load_catalog(str(root))
        assert catalog.names == ("pets",)
        assert classes(catalog, "pets") == {
            "train": {"c0": 5, "c1": 5}, "val": {"c0": 2, "c1": 2}, "test": {"c0": 3, "c1": 3},
        }  # fmt: skip
        assert check_images(catalog) == 20
        assert catalog["pets"].known_classes.tolist() == [0, 1]
        assert "2 of 2 test classes stand in train too" in catalog.notes[0]
        train, test = (catalog["pets"].splits[name] for name in ("train", "test"))
        assert train.class_names == test.class_names, "a class has one number in all splits"

    def test_a_domain_may_hold_them_too(self, tmp_path: Path) -> None:
        laid_out(tmp_path / "birds", {"train": [4, 4], "val": [2], "test": [3]}, {"val": 2, "test": 3})
        write_image_folder(tmp_path, ("cats",))
        catalog = load_catalog(str(tmp_path))
        assert catalog.names == ("birds", "cats")
        assert classes(catalog, "birds") == {"train": {"c0": 4, "c1": 4}, "val": {"c2": 2}, "test": {"c3": 3}}
        assert catalog["birds"].known_classes.tolist() == []
        assert catalog.notes == ("birds: its folders say what is train, val, test",)

    def test_without_test_val_is_taken_and_val_comes_from_train(self, tmp_path: Path) -> None:
        catalog = load_catalog(str(laid_out(tmp_path / "pets", {"train": [20, 10, 3], "val": [2, 2]})))
        found = classes(catalog, "pets")
        assert found["test"] == {"c0": 2, "c1": 2}
        assert found["val"] == {"c0": 2, "c1": 2}, "of a class with three images none is held back"
        assert found["train"] == {"c0": 18, "c1": 8, "c2": 3}
        assert check_images(catalog) == 37
        assert "val is taken for test" in catalog.notes[0]
        assert "a tenth of each train class's images is held back for val" in catalog.notes[0]

    def test_of_other_classes_than_test_has_whole_ones_are_held_back_for_val(self, tmp_path: Path) -> None:
        root = laid_out(tmp_path / "pets", {"train": [3] * 20, "test": [2, 2]}, {"test": 50})
        found = classes(load_catalog(str(root)), "pets")
        assert [len(found[split]) for split in ("train", "val", "test")] == [18, 2, 2]
        assert not set(found["train"]) & set(found["val"])

    def test_a_test_folder_without_classes_is_left_out_as_imagenets(self, tmp_path: Path) -> None:
        root = laid_out(tmp_path / "pets", {"train": [5, 5], "val": [2, 2]})
        write_tree(root, {f"test/{i}.png": IMAGE for i in range(7)})
        catalog = load_catalog(str(root))
        assert catalog["pets"].sizes == {"train": 6, "val": 4, "test": 4}
        assert [(left.kind, left.count) for left in catalog.left_out] == [("no class", 7)]

    def test_a_test_folder_that_links_to_val_is_not_read_twice(self, tmp_path: Path) -> None:
        root = laid_out(tmp_path / "pets", {"train": [5, 5], "val": [2, 2]})
        os.symlink("val", root / "test")
        assert check_images(load_catalog(str(root))) == 14

    def test_train_alone_is_dealt(self, tmp_path: Path) -> None:
        found = classes(load_catalog(str(laid_out(tmp_path / "pets", {"train": [2] * 10}))), "pets")
        assert [len(found[split]) for split in ("train", "val", "test")] == [6, 1, 3]

    def test_they_are_refused_beside_other_folders(self, tmp_path: Path) -> None:
        root = laid_out(tmp_path, {"train": [5], "test": [5], "sample": [5]})
        message = r"folders of splits stand beside others: expected domain/class/image, or folders train, val and test"
        with pytest.raises(DataError, match=message):
            load_catalog(str(root))

    def test_two_for_one_split_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="two folders of one split; found val, valid"):
            load_catalog(str(laid_out(tmp_path, {"val": [5], "valid": [5]})))

    def test_training_without_a_train_folder_is_refused(self, tmp_path: Path) -> None:
        root = str(laid_out(tmp_path / "pets", {"test": [5, 5]}))
        with pytest.raises(DataError, match="domain 'pets' has no images for train; its folders hold test"):
            load_catalog(root)
        catalog = load_catalog(root, needed=("test",))
        assert catalog["pets"].sizes == {"test": 10}
        assert catalog["pets"].n_classes == 0

    def test_a_domain_called_train_beside_others_is_a_domain(self, tmp_path: Path) -> None:
        catalog = load_catalog(str(laid_out(tmp_path, {"train": [2] * 3, "plane": [2] * 3})))
        assert catalog.names == ("plane", "train")

    def test_classes_called_as_splits_are_classes(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {f"words/{name}/{i}.png": IMAGE for name in ("train", "val", "test") for i in range(2)})
        assert sorted(load_catalog(str(tmp_path))["words"].sizes.values()) == [2, 2, 2]


class TestArchivesOfFolders:
    @pytest.mark.parametrize("top", ["", "pets/"])
    def test_they_are_read_like_folders(self, tmp_path: Path, top: str) -> None:
        root = write_image_folder(tmp_path / "pets")
        files = {f"{top}{p.relative_to(root).as_posix()}": p.read_bytes() for p in root.rglob("*.*")}
        files |= {"__MACOSX/pets/cats/._x.jpg": b"x"}
        catalog = load_catalog(str(write_zip(tmp_path / "pets.zip", files)))
        assert catalog.fingerprint == load_catalog(str(root)).fingerprint
        assert check_images(catalog) == 60
        path = catalog["cats"].splits["train"].paths[0]
        assert catalog.store.read(path) == (root / path).read_bytes()
        assert [left.kind for left in catalog.left_out] == ["__MACOSX"]

    @pytest.mark.parametrize("packed", [True, False])
    def test_the_official_form_may_lie_in_a_folder_of_its_own(self, tmp_path: Path, packed: bool) -> None:
        import zipfile

        plain = write_uned_zip(tmp_path / "plain.zip")
        with zipfile.ZipFile(plain) as archive:
            files = {f"UnED/{name}": archive.read(name) for name in archive.namelist()}
        files["__MACOSX/UnED/._info_files"] = b"x"
        data = write_zip(tmp_path / "b.zip", files) if packed else write_tree(tmp_path / "b", files)
        catalog = load_catalog(str(data))
        assert catalog.fingerprint == load_catalog(str(plain)).fingerprint
        assert check_images(catalog) == 48
        assert catalog.store.read("emoji/0000_000.png") == files["UnED/images/emoji/0000_000.png"]


class TestWhatIsPassedOver:
    def test_folders_of_the_system_and_empty_ones_beside_domains_do_no_harm(self, tmp_path: Path) -> None:
        write_image_folder(tmp_path)
        before = load_catalog(str(tmp_path)).fingerprint
        write_tree(tmp_path, {"lost+found/x/1.png": IMAGE, "__MACOSX/cats/1.png": IMAGE, "docs/readme.txt": b""})
        write_tree(tmp_path, {"stray.png": IMAGE})
        (tmp_path / "empty").mkdir()
        catalog = load_catalog(str(tmp_path))
        assert catalog.names == ("cats", "dogs")
        assert catalog.fingerprint == before
        assert {left.kind for left in catalog.left_out} == {
            "lost+found", "__MACOSX", ".txt", "empty folder", "no class",
        }  # fmt: skip

    def test_test_images_never_come_into_train_by_a_link(self, tmp_path: Path) -> None:
        write_image_folder(tmp_path, ("cats",), n_classes=10)
        before = load_catalog(str(tmp_path)).fingerprint
        for name in sorted(os.listdir(tmp_path / "cats")):
            os.symlink(name, tmp_path / "cats" / f"again {name}")
        os.symlink("cats", tmp_path / "kittens")
        catalog = load_catalog(str(tmp_path))
        assert catalog.fingerprint == before
        assert [(left.kind, left.count) for left in catalog.left_out] == [("link", 11)]

    def test_a_folder_of_nothing_readable_says_what_is_there(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {f"cats/a/{i}.heic": b"x" for i in range(3)})
        with pytest.raises(DataError, match=r"holds neither info_files/ nor .*; 3 x \.heic: .* install pillow-heif"):
            load_catalog(str(tmp_path))


class TestNames:
    @pytest.mark.parametrize("place", ["{}/a/1.png", "cats/{}/1.png", "cats/a/{}.png"])
    @pytest.mark.parametrize(("name", "shown"), [(b"caf\xe9", r"caf\\udce9"), (b"two\nlines", r"two\\nlines")])
    def test_names_that_are_no_text_are_refused_in_printable_form(
        self, tmp_path: Path, place: str, name: bytes, shown: str
    ) -> None:
        write_image_folder(tmp_path)
        folder = place.format(os.fsdecode(name))
        write_tree(tmp_path, {folder: IMAGE, folder.replace("1.png", "2.png"): IMAGE})
        with pytest.raises(DataError, match=shown) as error:
            load_catalog(str(tmp_path))
        assert str(error.value).isprintable()
        assert "a control character, such as a line feed, or bytes that are not UTF-8" in str(error.value)

    def test_such_names_in_an_archive_are_refused_as_well(self, tmp_path: Path) -> None:
        files = {f"cats/c{i}/1.png": IMAGE for i in range(4)} | {"cats/cafX/1.png": IMAGE}
        path = write_zip(tmp_path / "b.zip", files)
        path.write_bytes(path.read_bytes().replace(b"cafX", b"caf\xe9"))
        with pytest.raises(DataError, match=r"caf\\udce9.*not UTF-8"):
            load_catalog(str(path))
