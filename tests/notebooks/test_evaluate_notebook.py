"""evaluate.ipynb, run as a user runs it: by papermill, on a run, on descriptors, and on a tree of UnED's layout."""

import re
import shutil

import nbformat
import numpy as np
import pandas as pd
import pytest

from tests import PROJECT
from tests.helpers.catalogs import write_image_folder, write_uned_tree
from tests.helpers.evaluations import figures, stamps
from tests.helpers.notebookfiles import MAX_BYTES, PLOTLY, SHEET, outputs, papermill, text
from tests.helpers.training import SMALL
from tests.helpers.uned_tree import write_uned_tree as write_official_tree
from udonlib.params import TrainParams
from udonlib.runs.run import open_run

NOTEBOOK = PROJECT / "notebooks" / "evaluate.ipynb"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = write_uned_tree(folder / "data", index_of="flags")
    params = TrainParams(**SMALL | {"data": str(data), "outputs": str(folder / "outputs"), "run": "small"}, n_threads=1)
    run = open_run(params)
    for _ in run.train():
        pass
    return run


def evaluate(papermill, out, outputs, **values):
    """Run the notebook; values are parameters."""
    options = [text for name, value in values.items() for text in ("-p", name, str(value))]
    return papermill(NOTEBOOK, out, "-p", "outputs", str(outputs), "-p", "n_threads", "1", *options)


def html(path):
    return [data["text/html"] for data in outputs(path) if "text/html" in data]


def table(folder):
    return pd.read_csv(folder / "evaluation.csv")


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    """A folder with the executed notebook, its results beside it and the images that were evaluated."""
    folder = tmp_path_factory.mktemp("evaluate")
    pets = write_image_folder(folder / "pets")
    done = evaluate(papermill, folder / "out.ipynb", folder / "o", run=run.path, data=pets, save_descriptors="true")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_a_run_is_evaluated_on_somebodys_own_folder(run, evaluated):
    out = evaluated / "out.ipynb"
    [results] = (evaluated / "o" / "evaluations").iterdir()
    assert results.name.startswith("small-on-pets-test-")
    found = table(results)
    assert set(found["embedder"]) == {"student"}
    assert found["domain"].tolist() == ["cats", "dogs", "mean"] * 2
    tables = [part for part in html(out) if "R@1</th>" in part]
    corners = [re.findall("merged index,|student, percent|separate index,", part) for part in tables]
    assert corners == [["merged index,"], ["student, percent"], ["separate index,"]]
    figures_of = [len(re.findall(r"\d+\.\d <small>± \d+\.\d<", part)) for part in tables]
    assert figures_of == [3 * 2, 3 * 5, 3 * 2]  # R@1 and mMP@5, and beside them mAP@5, R@5 and R@20
    for value in found.query("index == 'merged'")["r_at_1"]:
        assert f"{value:.1f} <small>" in tables[0]
    shown = outputs(out)
    titles = [data[PLOTLY]["layout"]["title"]["text"] for data in shown if PLOTLY in data]
    assert [title.split()[0] for title in titles] == ["Test", "R@k", "Lost"]
    assert all(len(data["image/png"]) > 5_000 for data in shown if PLOTLY in data)
    assert sum(SHEET in data.get("text/html", "") for data in shown) == 1
    assert any(str(results) in part for part in html(out))
    assert out.stat().st_size < MAX_BYTES
    assert "widgets" not in nbformat.read(out, 4).metadata
    lines = text(out).splitlines()
    assert re.match(r"embedding \d+/\d+ images \(\d+%\)", lines[0])
    assert re.match(r"student: R@1 \d+\.\d merged, \d+\.\d separate; finished in \d+ s$", lines[-1])
    assert len(lines) <= 6


def test_it_is_shown_again_without_evaluating(run, evaluated, warm_papermill):
    [results] = (evaluated / "o" / "evaluations").iterdir()
    before = stamps(results)
    again = evaluated / "again.ipynb"
    done = evaluate(
        warm_papermill, again, evaluated / "o", run=run.path, data=evaluated / "pets", save_descriptors="true"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert stamps(results) == before
    assert text(again).splitlines()[-1].endswith("separate; evaluated before")
    assert any("(finished: shown again)" in part for part in html(again))
    assert sum(PLOTLY in data for data in outputs(again)) == 3


def test_a_mistake_ends_in_one_message_and_leaves_nothing(tmp_path, warm_papermill):
    out = tmp_path / "out.ipynb"
    done = evaluate(warm_papermill, out, tmp_path / "o")
    assert done.returncode != 0
    assert "parameter 'run': found 'latest', but there is no run with a checkpoint in" in done.stderr
    assert "train one: make train" in done.stderr
    assert "Traceback" not in "".join(str(data) for data in outputs(out))
    assert not (tmp_path / "o").exists()


def test_uneds_own_layout_with_a_run_and_with_descriptors(run, tmp_path, warm_papermill):
    tree = write_official_tree(tmp_path / "uned")
    out = tmp_path / "run.ipynb"
    done = evaluate(warm_papermill, out, tmp_path / "o", run=run.path, data=tree, name="ours", save_descriptors="true")
    assert done.returncode == 0, done.stderr[-3000:]
    ours = tmp_path / "o" / "evaluations" / "ours"
    found = table(ours)
    assert list(dict.fromkeys(found["domain"])) == "food2k cars sop inshop inat met gldv2 rp2k mean".split()
    n_index = found.query("index == 'separate'").set_index("domain")["n_index"]
    assert n_index[["inshop", "met", "gldv2"]].tolist() == [5, 13, 19]
    assert sum(SHEET in data.get("text/html", "") for data in outputs(out)) == 1

    theirs = tmp_path / "theirs.json"
    with np.load(ours / "descriptors.npz") as arrays:
        domains = dict.fromkeys(key.split("/")[0] for key in arrays.files)
        lines = {
            d: [f'"{k.split("/")[1]}": {arrays[k].tolist()}' for k in arrays.files if k.startswith(f"{d}/")]
            for d in domains
        }
    theirs.write_text("{" + ", ".join(f'"{d}": {{{", ".join(parts)}}}' for d, parts in lines.items()) + "}")
    shutil.rmtree(tree / "images")  # vectors need none
    again = tmp_path / "descriptors.ipynb"
    done = evaluate(warm_papermill, again, tmp_path / "o", descriptors=theirs, data=tree, name="theirs")
    assert done.returncode == 0, done.stderr[-3000:]
    other = figures(table(tmp_path / "o" / "evaluations" / "theirs"), "descriptors")
    assert figures(found, "student").drop(columns="embedder").equals(other.drop(columns="embedder"))
    assert any(">descriptors<" in part for part in html(again))
    assert any("no images to show" in part for part in html(again))
