"""Files of results that were cut, changed or lost are named, and never pass for the whole."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from udonlib.data.catalog import Catalog
from udonlib.errors import UserError
from udonlib.evaluation.files import load_neighbours, load_outcomes, load_table, save_outcomes, save_table

ROWS = 16


@pytest.fixture
def table():
    generator = np.random.default_rng(0)
    names = ["emoji", "2020", "NA", "mean"] * 4
    frame = pd.DataFrame({"embedder": ["student"] * ROWS, "domain": names, "index": ["merged"] * ROWS})
    values = 100 * generator.random(ROWS)
    values[3] = np.nan
    return frame.assign(r_at_1=values, n_queries=np.arange(ROWS))


@pytest.fixture
def folder(table, tmp_path):
    save_table(table, tmp_path)
    return tmp_path


def test_what_was_written_is_read(folder, table):
    pd.testing.assert_frame_equal(load_table(folder), table, check_dtype=False)


def test_every_cut_of_the_table_is_noticed(folder):
    file = folder / "evaluation.csv"
    whole = file.read_bytes()
    for size in range(0, len(whole), 7):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"evaluation.csv: damaged: "):
            load_table(folder)


def test_half_of_the_rows_is_not_the_whole(folder):
    file = folder / "evaluation.csv"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:9]))
    with pytest.raises(UserError, match=r"evaluation.csv: damaged: it holds 8 rows, evaluation.json 16"):
        load_table(folder)


def test_a_changed_number_or_name_is_noticed(folder, table):
    for name, value in (("r_at_1", 50.0), ("domain", "flags"), ("n_queries", 99)):
        changed = table.copy()
        changed.loc[5, name] = value
        changed.to_csv(folder / "evaluation.csv", index=False)
        with pytest.raises(UserError, match=f"damaged: other values of {name} than in evaluation.json"):
            load_table(folder)


@pytest.mark.parametrize("content", ["", "[" * 100_000, "[]", "[1, 2]", '[{"embedder": "student"}', "null"])
def test_a_damaged_twin_is_named(folder, content):
    (folder / "evaluation.json").write_text(content)
    with pytest.raises(UserError, match=r"evaluation.json: damaged: "):
        load_table(folder)


def test_results_of_versions_that_wrote_one_file_are_read(folder, table):
    (folder / "evaluation.json").unlink()
    pd.testing.assert_frame_equal(load_table(folder), table, check_dtype=False)
    (folder / "evaluation.csv").unlink()
    with pytest.raises(UserError, match=r"evaluation.csv: missing"):
        load_table(folder)


def test_outcomes_and_neighbours_that_were_cut_are_named(tmp_path):
    outcomes, neighbours = tmp_path / "outcomes.csv.gz", tmp_path / "neighbours.npz"
    save_outcomes(pd.DataFrame({"path": [f"a/{i}" for i in range(500)], "r_at_1": range(500)}), outcomes)
    np.savez(neighbours, **{"student/a/hit": np.ones((500, 5))})
    nothing = Catalog.__new__(Catalog)
    object.__setattr__(nothing, "domains", ())
    for file, read in ((outcomes, load_outcomes), (neighbours, lambda file: load_neighbours(file, nothing, "test"))):
        whole = file.read_bytes()
        for content in (whole[: len(whole) // 2], whole[:-9], b"", b"no such thing"):
            file.write_bytes(content)
            with pytest.raises(UserError, match=f"{file.name}: damaged: "):
                read(file)
        file.unlink()
        with pytest.raises(UserError, match=f"{file.name}: missing"):
            read(file)


def test_the_twin_is_plain_json(folder):
    assert len(json.loads((folder / "evaluation.json").read_bytes())) == ROWS
