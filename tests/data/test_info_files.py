"""Info files: every way in which one can be wrong is named by file and entry, and long ones are read quickly."""

import json
import sys
import tracemalloc
from collections import Counter
from functools import partial
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.catalogs import uned_files, with_entries, write_tree, write_uned_tree, write_zip
from udonlib.data import info_files
from udonlib.data.catalog import DataError, load_catalog

GOOD = {"path": "a.png", "class_id": 1}
BAD_ENTRIES = {
    "no path": ({"class_id": 1}, "key 'path' is missing"),
    "a misspelt key": ({"path": "x", "clas_id": 1}, "key 'class_id' is missing.*is 'clas_id' meant to be 'class_id'"),
    "not an object": ("x.png", "expected an object with path and class_id, found 'x.png'"),
    "a list": (["x.png", 1], "expected an object"),
    "path a number": ({"path": 3, "class_id": 1}, "path must be a string, found 3"),
    "label a string": ({"path": "x", "class_id": "1"}, "class_id must be an integer >= 0 or a list of such, found '1'"),
    "label a boolean": ({"path": "x", "class_id": True}, "class_id must be an integer .* found True"),
    "label negative": ({"path": "x", "class_id": -1}, "class_id must be an integer >= 0 .* found -1"),
    "label a fraction": ({"path": "x", "class_id": 1.0}, r"class_id must be an integer .* found 1\.0"),
    "label null": ({"path": "x", "class_id": None}, "class_id must be an integer .* found None"),
    "label too large": ({"path": "x", "class_id": 2**63}, "class_id must be an integer"),
    "no label": ({"path": "x", "class_id": []}, r"class_id must be an integer .* found \[\]"),
    "a boolean among labels": ({"path": "x", "class_id": [1, False]}, "class_id must be an integer"),
    "labels nested": ({"path": "x", "class_id": [[1]]}, "class_id must be an integer"),
    "a label twice": ({"path": "x", "class_id": [1, 1]}, "class_id names a class twice"),
    "two labels in train": ({"path": "x", "class_id": [1, 2]}, r"a train image has one class_id, found \[1, 2\]"),
    "class not a string": ({"path": "x", "class_id": 2, "class": 7}, "class must be a string, found 7"),
    "source not a string": ({"path": "x", "class_id": 2, "source": []}, r"source must be a string, found \[\]"),
    "a path twice": ({"path": "a.png", "class_id": 1}, "path 'a.png' stands in entry 0 already"),
}
BAD_PATHS = [
    "/etc/passwd",
    "../a",
    "a/../b",
    "a/..",
    "..",
    ".",
    "./a",
    "",
    "a//b",
    "a/",
    "\\\\host\\a",
    "..\\a",
    "a\\b",
    "C:/a",
]
BAD_PATHS += ["a\0b", "a\nb", "\na", "a\n", "a\rb", "a\tb", "c:a"]


class TestWrongInfoFiles:
    @pytest.mark.parametrize("case", BAD_ENTRIES)
    def test_a_wrong_entry_is_named_by_file_and_number(self, tmp_path: Path, case: str) -> None:
        entry, message = BAD_ENTRIES[case]
        root = with_entries(tmp_path, [GOOD, {"path": "b.png", "class_id": 2}, entry, {"path": "c.png", "class_id": 2}])
        with pytest.raises(DataError, match=rf"info_files/emoji/train\.json, entry 2 \(from 0\): {message}"):
            load_catalog(str(root))

    @pytest.mark.parametrize("path", BAD_PATHS)
    @pytest.mark.parametrize("packed", [False, True])
    def test_a_path_that_leaves_the_root_is_refused_in_folders_and_archives(
        self, tmp_path: Path, path: str, packed: bool
    ) -> None:
        files = uned_files()
        files["info_files/emoji/train.json"] = json.dumps([GOOD, {"path": path, "class_id": 1}]).encode()
        if packed:
            root = write_zip(tmp_path / "b.zip", {**files, f"images/{path}".replace("\0", ""): b"outside"})
        else:
            root = write_tree(tmp_path / "tree", files)
        unprintable = any(ord(letter) < 32 for letter in path)
        reason = "holds a control character" if unprintable else "is not a plain relative path"
        with pytest.raises(DataError, match=rf"train\.json, entry 1 \(from 0\): path .* {reason}"):
            load_catalog(str(root))
        write_tree(tmp_path / "good", uned_files())
        with pytest.raises(DataError, match=reason):
            load_catalog(str(tmp_path / "good")).store.read(path)

    def test_half_a_character_is_no_name_of_a_file(self, tmp_path: Path) -> None:
        entries = [GOOD, {"path": "a\ud83d.jpg", "class_id": 1}]
        with pytest.raises(DataError, match=r"entry 1 \(from 0\): path 'a.ud83d\.jpg' holds .* not UTF-8"):
            load_catalog(str(with_entries(tmp_path, entries)))
        whole = [GOOD, {"path": "a\U0001f600.jpg", "class_id": 1}]  # json writes it as two halves
        train = load_catalog(str(with_entries(tmp_path / "whole", whole)))["emoji"].splits["train"]
        assert train.paths == ("a.png", "a\U0001f600.jpg")

    @pytest.mark.parametrize(
        "path", ["a", "...", "..a/b..", ".hidden", "a b/c'd\"e", "ü/康.png", "ab:c", "#U5eb7/x", "a/.../b"]
    )
    def test_odd_but_plain_paths_are_taken(self, tmp_path: Path, path: str) -> None:
        entries = [{"path": path, "class_id": 1}]
        root = write_tree(with_entries(tmp_path, entries), {f"images/{path}": b"content"})
        catalog = load_catalog(str(root))
        assert catalog["emoji"].splits["train"].paths == (path,)
        assert catalog.store.read(path) == b"content"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", r"train\.json: expected a JSON list of entries, found 'nothing'"),
            (b'{"path": "a"}', r"train\.json: expected a JSON list of entries, found"),
            (b"hello", r"train\.json: expected a JSON list of entries, found 'hello'"),
            (b"[]", r"train\.json: the list is empty"),
            (b"\xff\xfe[", r"train\.json: not UTF-8 text"),
            (b'[{"path": "a", "class_id": 1}', r"entry 0 \(from 0\): neither a comma nor the list's end follows"),
            (b'[{"path": "a", "class_id": 1}, {"path": "b", "cla', r"entry 1 \(from 0\): broken JSON"),
            (b'[{"path": "a", "class_id": 1},]', r"entry 1 \(from 0\): broken JSON"),
            (b'[{"path": "a", "class_id": 1}] [', r"train\.json: more text after the list: '\['"),
            (b"[" * 100_000, r"entry 0 \(from 0\): broken JSON"),
        ],
    )
    def test_what_is_not_a_json_list_is_refused(self, tmp_path: Path, content: bytes, message: str) -> None:
        with pytest.raises(DataError, match=message):
            load_catalog(str(with_entries(tmp_path, content)))

    def test_one_path_with_different_labels_in_two_splits_is_refused(self, tmp_path: Path) -> None:
        root = with_entries(tmp_path, [{"path": "emoji/0005_000.png", "class_id": 1}, GOOD])
        message = (
            r"test\.json, entry 0 \(from 0\): 'emoji/0005_000.png' has class_id \[5\] here and \[1\] in train\.json"
        )
        with pytest.raises(DataError, match=message):
            load_catalog(str(root))

    def test_one_path_with_the_same_labels_in_another_order_is_right(self, tmp_path: Path) -> None:
        root = with_entries(tmp_path, [{"path": "x", "class_id": [2, 1]}], "emoji/test.json")
        index = json.dumps([{"path": "y", "class_id": 3}, {"path": "x", "class_id": [1, 2]}]).encode()
        write_tree(root, {"info_files/emoji/index.json": index})
        assert load_catalog(str(root))["emoji"].sizes["index"] == 2

    def test_two_names_for_one_class_are_refused(self, tmp_path: Path) -> None:
        entries = [{"path": "a", "class_id": 3, "class": "cat"}, {"path": "b", "class_id": 3, "class": "dog"}]
        with pytest.raises(
            DataError, match=r"entry 1 \(from 0\): class_id 3 is called 'dog' here and 'cat' in an earlier"
        ):
            load_catalog(str(with_entries(tmp_path, entries)))

    def test_a_wrong_entry_far_into_a_long_file_has_its_number(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(info_files, "BLOCK", 7)
        entries = [{"path": f"{i}", "class_id": i} for i in range(100)]
        assert len(load_catalog(str(with_entries(tmp_path, entries)))["emoji"].splits["train"]) == 100
        entries[61]["class_id"] = -4
        with pytest.raises(DataError, match=r"entry 61 \(from 0\): class_id must be"):
            load_catalog(str(with_entries(tmp_path, entries)))

    def test_a_missing_info_file_is_named_with_the_nearest(self, tmp_path: Path) -> None:
        root = write_uned_tree(tmp_path)
        (root / "info_files/flags/test.json").rename(root / "info_files/flags/tset.json")
        with pytest.raises(DataError, match=r"info_files/flags/test\.json: no such file; did you mean 'tset\.json'"):
            load_catalog(str(root))

    json_value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=4,
    )
    entry = st.fixed_dictionaries(
        {}, optional={"path": st.text("ab./\\\n:", max_size=5) | json_value, "class_id": st.integers(0, 3) | json_value}
    )

    @given(entries=st.lists(entry | json_value, min_size=1, max_size=4))
    def test_the_quick_check_of_many_entries_agrees_with_the_check_of_each(self, entries: list[object]) -> None:
        problems = [i for i, value in enumerate(entries) if info_files.entry_problem(value)]
        read = partial(info_files.read_info_file, json.dumps(entries).encode(), "f")
        if problems:
            with pytest.raises(DataError, match=rf"^f, entry {problems[0]} \(from 0\): "):
                read()
        elif len({value["path"] for value in entries}) < len(entries):  # type: ignore[index]
            with pytest.raises(DataError, match="stands in entry"):
                read()
        else:
            assert read()[0] == [value["path"] for value in entries]  # type: ignore[index]

    @staticmethod
    def long_file(n: int) -> bytes:
        rows = [{"path": f"gldv2/images/train/{i % 16:x}/{i:016x}.jpg", "class_id": i % 73_182} for i in range(n)]
        return json.dumps(rows).encode()

    def test_an_entry_costs_few_calls_however_many_there_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(info_files, "entry_problem", lambda entry: pytest.fail("looked at one by one"))
        n_calls: Counter[int] = Counter()

        def note(frame: FrameType, event: str, _: object) -> None:
            n_calls[n] += event in ("call", "c_call") and frame.f_code.co_filename == info_files.__file__

        for n in (1_000, 4_000):
            content = self.long_file(n)
            sys.setprofile(note)
            try:
                paths, ids, _ = info_files.read_info_file(content, "f")
            finally:
                sys.setprofile(None)
            assert (len(paths), ids[-1]) == (n, n - 1)
        assert n_calls[4_000] - n_calls[1_000] < 16 * 3_000

    def test_reading_takes_little_more_memory_than_the_text_and_what_is_kept(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(info_files, "BLOCK", 500)
        content = self.long_file(20_000)
        tracemalloc.start()
        result = info_files.read_info_file(content, "f")
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(result[0]) == 20_000
        assert peak - kept < 3 * len(content)  # the text and a set of the paths; all entries parsed would be 8 times
