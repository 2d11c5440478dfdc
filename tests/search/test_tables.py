"""Parquet files piece by piece, checksums, and packages that are not there."""

import json

import numpy as np
import pandas as pd
import pytest

from udonlib.errors import UserError
from udonlib.search import tables
from udonlib.search.tables import check_sums, checksum, needed, pieces_of, read_table, write_table

TABLE = pd.DataFrame(
    {
        "id": [f"é{i}" for i in range(25)],
        "n": range(25),
        "domain": [None, "a"] * 12 + [None],
        "thumbnail": [b"\x00\xff"] * 25,
    }
)


def test_a_table_is_read_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROWS", 10)
    write_table(tmp_path / "t.parquet", TABLE)
    assert [len(piece) for piece in pieces_of(tmp_path / "t.parquet")] == [10, 10, 5]
    read = read_table(tmp_path / "t.parquet")
    assert list(read) == list(TABLE)
    assert read["id"].tolist() == TABLE["id"].tolist()
    assert read["domain"].isna().tolist() == TABLE["domain"].isna().tolist()
    assert read["thumbnail"].tolist() == TABLE["thumbnail"].tolist()
    assert list(read_table(tmp_path / "t.parquet", ["n"])) == ["n"]


def test_a_column_may_be_empty_at_first(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROWS", 1)
    write_table(tmp_path / "t.parquet", pd.DataFrame({"domain": [None, "a", None]}, dtype=object))
    read = read_table(tmp_path / "t.parquet")["domain"]
    assert read.isna().tolist() == [True, False, True]
    assert read[1] == "a"


def test_a_table_without_rows_keeps_its_columns(tmp_path):
    write_table(tmp_path / "t.parquet", TABLE.iloc[:0])
    assert list(read_table(tmp_path / "t.parquet")) == list(TABLE)


@pytest.mark.parametrize("size", [0, 3, 40, 300])
def test_a_damaged_table_is_told_in_one_line(tmp_path, size):
    file = tmp_path / "t.parquet"
    write_table(file, TABLE)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match=r"t\.parquet: damaged: ") as error:
        read_table(file)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"none\.parquet: missing"):
        read_table(tmp_path / "none.parquet")


def test_changed_files_and_names_that_lead_elsewhere_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(b"12")
    (tmp_path / "b").write_bytes(b"12")
    sums = {"a": checksum(tmp_path / "b")}
    check_sums(tmp_path / "in", sums, "index")
    with pytest.raises(UserError, match=r"names a file '\.\./b' outside"):
        check_sums(tmp_path / "in", {"../b": sums["a"]}, "index")
    (tmp_path / "in" / "a").write_bytes(b"13")
    with pytest.raises(UserError, match="a: damaged: not the file that was written here; make the index anew"):
        check_sums(tmp_path / "in", sums, "index")


def test_a_package_that_is_not_there_is_named_with_how_to_get_it(monkeypatch):
    assert needed("json") is json
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(UserError, match=r"search needs faiss-cpu, .* pip install faiss-cpu, .*\.\[search\]"):
        needed("faiss")


def test_numbers_keep_their_type(tmp_path):
    write_table(tmp_path / "t.parquet", pd.DataFrame({"n": np.arange(3, dtype=np.int32)}))
    assert read_table(tmp_path / "t.parquet")["n"].dtype == np.int32
