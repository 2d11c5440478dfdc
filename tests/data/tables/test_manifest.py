"""Manifests: tables of a user's own images, as people and programs write them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.helpers.catalogs import picture, write_image_folder, write_tree
from tests.helpers.missing import script_without
from udonlib.data.catalog import Catalog, DataError, check_images, load_catalog

IMAGE = picture(0)


def write(root: Path, text: str | bytes, name: str = "more.csv", paths: tuple[str, ...] = ()) -> str:
    """Write a manifest and its images; return its path."""
    write_tree(root, {name: text if isinstance(text, bytes) else text.encode(), **dict.fromkeys(paths, IMAGE)})
    return str(root / name)


def table(n_classes: int = 10, n_images: int = 2, split: str | None = None) -> str:
    """A manifest of one domain."""
    head = "path,domain,class" + ",split" * (split is not None)
    tail = f",{split}" * (split is not None)
    rows = [f"birds/{c}_{i}.png,birds,kind {c}{tail}" for c in range(n_classes) for i in range(n_images)]
    return "\n".join([head, *rows]) + "\n"


def found(catalog: Catalog, domain: str = "birds") -> dict[str, dict[str, list[str]]]:
    """Split -> class -> paths."""
    splits: dict[str, dict[str, list[str]]] = {}
    for name, split in catalog[domain].splits.items():
        for path, label in zip(split.paths, split.labels[:, 0].tolist(), strict=True):
            splits.setdefault(name, {}).setdefault(split.class_names[label], []).append(path)
    return splits


def as_test(place: str) -> dict[str, list[str]]:
    """Class -> paths of all images."""
    return found(load_catalog(place, all_as_test=True))["test"]


class TestForms:
    @pytest.mark.parametrize("separator", [",", ";", "\t"])
    @pytest.mark.parametrize("front", [b"", b"\xef\xbb\xbf"])
    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_separators_marks_and_line_ends_do_not_matter(
        self, tmp_path: Path, separator: str, front: bytes, end: str
    ) -> None:
        plain = load_catalog(write(tmp_path, table()))
        other = front + table().replace(",", separator).replace("\n", end).encode()
        assert load_catalog(write(tmp_path, other, "other.csv")).fingerprint == plain.fingerprint

    def test_a_parquet_file_is_the_same_manifest(self, tmp_path: Path) -> None:
        text = write(tmp_path, table(split="test"))
        pd.read_csv(text).to_parquet(tmp_path / "more.parquet")
        one, other = (load_catalog(str(tmp_path / f"more.{end}"), needed=("test",)) for end in ("csv", "parquet"))
        assert one.fingerprint == other.fingerprint
        assert one["birds"].splits["test"].class_names == other["birds"].splits["test"].class_names

    def test_numbers_in_a_parquet_file_are_names(self, tmp_path: Path) -> None:
        frame = pd.DataFrame({"path": ["a.png", "b.png"], "domain": ["birds"] * 2, "class": [7, 12]})
        frame.astype({"domain": "category"}).to_parquet(tmp_path / "more.parquet")
        assert as_test(str(tmp_path / "more.parquet")) == {"7": ["a.png"], "12": ["b.png"]}

    def test_cells_may_be_quoted_and_hold_separators_quotes_and_spaces(self, tmp_path: Path) -> None:
        place = write(tmp_path, 'class, domain ,path\n"heron, grey", birds,a.png\n"the ""best""",birds,"b c.png"\n\n')
        assert as_test(place) == {"heron, grey": ["a.png"], 'the "best"': ["b c.png"]}

    def test_zeros_in_front_of_a_class_stay(self, tmp_path: Path) -> None:
        place = write(tmp_path, "path,domain,class\na.png,birds,007\nb.png,birds,7\nc.png,birds,1e3\n")
        assert sorted(as_test(place)) == ["007", "1e3", "7"]

    def test_paths_of_windows_and_of_this_folder_are_read(self, tmp_path: Path) -> None:
        place = write(tmp_path, "path,domain,class\nbirds\\a.png,birds,x\n./birds/b.png,birds,x\n")
        write_tree(tmp_path, {"birds/a.png": b"a", "birds/b.png": b"b"})
        catalog = load_catalog(place, all_as_test=True)
        assert [catalog.store.read(path) for path in catalog["birds"].splits["test"].paths] == [b"a", b"b"]

    def test_images_may_lie_elsewhere(self, tmp_path: Path) -> None:
        place = write(tmp_path / "tables", table())
        write_tree(tmp_path / "far", {f"birds/{c}_{i}.png": IMAGE for c in range(10) for i in range(2)})
        with pytest.raises(DataError, match="20 of 20 images missing"):
            check_images(load_catalog(place))
        assert check_images(load_catalog(place, images=str(tmp_path / "far"))) == 20

    def test_other_columns_are_kept_with_their_images(self, tmp_path: Path) -> None:
        place = write(tmp_path, "seen,path,domain,class,by\n1999,b.png,birds,y,Ann\n,a.png,birds,x,Bo\n")
        split = load_catalog(place, all_as_test=True)["birds"].splits["test"]
        assert split.paths == ("a.png", "b.png")
        assert split.columns == {"seen": ("", "1999"), "by": ("Bo", "Ann")}

    def test_it_needs_pyarrow_only_for_parquet(self, tmp_path: Path) -> None:
        write(tmp_path, table())
        (tmp_path / "more.parquet").write_bytes(b"PAR1")
        load = "from udonlib.data.catalog import load_catalog\nload_catalog('more.{}')"
        for end, problem in (("csv", ""), ("parquet", "data in Parquet files needs pyarrow, which is not installed")):
            script = script_without({"pyarrow"}, load.format(end))
            done = subprocess.run(
                [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )  # fmt: skip
            assert (done.returncode == 0) == (not problem), done.stderr[-2000:]
            assert problem in done.stderr


class TestSplits:
    def test_classes_are_dealt_as_those_of_folders_are(self, tmp_path: Path) -> None:
        write_image_folder(tmp_path / "own", ("birds",))
        folder = load_catalog(str(tmp_path / "own"))
        rows = [f"{p.relative_to(tmp_path).as_posix()},birds,{p.parent.name}" for p in tmp_path.rglob("*.*")]
        place = write(tmp_path, "\n".join(["path,domain,class", *sorted(rows)]))
        listed = load_catalog(place, images=None)
        assert {s: sorted(c) for s, c in found(listed).items()} == {s: sorted(c) for s, c in found(folder).items()}
        assert check_images(listed) == check_images(folder)

    @pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "VALIDATION", "testing")])
    def test_those_that_are_given_are_kept(self, tmp_path: Path, names: tuple[str, ...]) -> None:
        rows = [f"{name[:2]}{i}.png,birds,{name},{name}" for name in names for i in range(2)]
        catalog = load_catalog(write(tmp_path, "\n".join(["path,domain,class,split", *rows])))
        assert {s: list(c) for s, c in found(catalog).items()} == dict(
            zip(("train", "val", "test"), ([n] for n in names), strict=True)
        )
        assert catalog.notes == ("birds: more.csv says what is train, val, test",)

    def test_all_of_it_may_be_test(self, tmp_path: Path) -> None:
        place = write(tmp_path, table(split="test"))
        assert load_catalog(place, needed=("test",))["birds"].sizes == {"test": 20}
        with pytest.raises(DataError, match=r"more.csv: domain 'birds' has no images for train; its rows are for test"):
            load_catalog(place)

    def test_an_empty_column_is_none(self, tmp_path: Path) -> None:
        plain, empty = write(tmp_path, table()), write(tmp_path, table(split=""), "empty.csv")
        assert load_catalog(plain).fingerprint == load_catalog(empty).fingerprint

    def test_train_alone_is_dealt(self, tmp_path: Path) -> None:
        assert load_catalog(write(tmp_path, table(split="train")))["birds"].sizes == {"train": 12, "val": 2, "test": 6}

    def test_too_few_classes_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"domain 'birds': train, val and test need a class each, found 2"):
            load_catalog(write(tmp_path, table(n_classes=2)))

    def test_rows_that_repeat_are_left_out_and_said(self, tmp_path: Path) -> None:
        catalog = load_catalog(write(tmp_path, table() + "birds/0_0.png,birds,kind 0\n"))
        assert sum(catalog["birds"].sizes.values()) == 20
        assert catalog.notes == ("more.csv: 1 rows that repeat an earlier one are left out",)


HEAD = "path,domain,class,split\n"
GOOD = "a.png,birds,x,test\n"
WRONG = {
    "empty": (b"", r"more.csv: no column 'path'; found: none"),
    "header alone": (HEAD, r"more.csv: holds no row; expected one at least, with path, domain, class"),
    "no class": ("path,domain,klass\n", r"no column 'class'; found: path.*; is 'klass' meant to be 'class'\?"),
    "twice": ("path,domain,class,Class\n", r"two columns are called 'class'"),
    "short": (HEAD + GOOD + "b.png,birds,x\n", r"more.csv, line 3: found 3 cells, expected 4: path, domain, class"),
    "long": (HEAD + "b.png,birds,x,test,\n", r"line 2: found 5 cells"),
    "no path": (HEAD + ",birds,x,test\n", r"line 2, column 'path': found an empty cell, expected text"),
    "no domain": (HEAD + "a.png, ,x,test\n", r"line 2, column 'domain': found an empty cell"),
    "no label": (HEAD + GOOD + "\nb.png,birds,,test\n", r"line 4, column 'class': found an empty cell"),
    "above": (HEAD + "../a.png,birds,x,test\n", r"line 2, column 'path': path '../a.png' is not a plain relative path"),
    "above, Windows": (HEAD + "b\\..\\..\\a.png,birds,x,test\n", r"path 'b/../../a.png' is not a plain relative"),
    "absolute": (HEAD + "/etc/a.png,birds,x,test\n", r"column 'path': path '/etc/a.png' is not a plain relative path"),
    "drive": (HEAD + "C:\\a.png,birds,x,test\n", r"column 'path': path 'C:/a.png' is not a plain relative path"),
    "deep domain": (HEAD + "a.png,b/c,x,test\n", r"column 'domain': found 'b/c', expected a name as a folder may have"),
    "control": (HEAD + "a.png,birds,x\x07,test\n", r"column 'class': found 'x\\x07', which holds characters"),
    "split": (HEAD + "a.png,birds,x,tets\n", r"line 2, column 'split': found 'tets'; did you mean 'test'\?"),
    "some splits": (HEAD + GOOD + "b.png,birds,x,\n", r"line 3, column 'split': found nothing, but other rows"),
    "two classes": (HEAD + GOOD + "a.png,birds,y,test\n", r"line 3, .*'a.png' is birds, 'y', test here .* in line 2"),
    "two splits": (HEAD + GOOD + "./a.png,birds,x,train\n", r"'a.png' is birds, 'x', train here and birds, 'x', test"),
    "open quote": (HEAD + GOOD + '"b.png,birds,x,test\n', r"more.csv, line 3: not CSV: unexpected end of data"),
    "UTF-16": (HEAD.encode("utf-16"), r"more.csv, line 1: not UTF-8 text: byte 0xff; save it as CSV in UTF-8"),
    "Latin-1": ((HEAD + "é.png,birds,x,test\n").encode("latin-1"), r"more.csv, line 2: not UTF-8 text: byte 0xe9"),
    "reserved": (HEAD + "a.png,mean,x,test\n", r"a domain cannot be called 'mean'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, name: str) -> None:
    text, message = WRONG[name]
    with pytest.raises(DataError, match=message):
        load_catalog(write(tmp_path, text), needed=("test",))


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    pd.DataFrame({"path": ["a.png"] * 900, "domain": "birds", "class": "x"}).to_parquet(tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    for damaged in (content[:-20], b"", b"path,domain,class\n"):
        with pytest.raises(DataError, match=r"b.parquet: damaged, or not a Parquet file"):
            load_catalog(write(tmp_path, damaged, "b.parquet"))
    frame = pd.DataFrame({"path": ["a.png", None], "domain": "birds", "class": "x"})
    frame.to_parquet(tmp_path / "c.parquet")
    with pytest.raises(DataError, match=re.escape("c.parquet, row 1 (from 0), column 'path': found an empty cell")):
        load_catalog(str(tmp_path / "c.parquet"))
