"""Tables say the figures they are given, and sheets show the images they name."""

import io
import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.helpers.catalogs import uned_files, write_tree, write_uned_tree
from tests.helpers.sheets import near, neighbours, pixels
from tests.helpers.tables import bold_cells, texts
from udonlib.data.catalog import Catalog, DataError, load_catalog
from udonlib.data.check.datacheck import check_quickly
from udonlib.data.decoding import ImageError
from udonlib.lab.views import sheets
from udonlib.params import TrainParams
from udonlib.runs.folder import RunFolder

A_FEW = 400  # pixels of a frame's colour that the pictures themselves may hold


@pytest.fixture
def catalog(tmp_path) -> Catalog:
    return load_catalog(str(write_uned_tree(tmp_path / "uned", index_of="flags")))


def evaluation(intervals: bool = False) -> pd.DataFrame:
    rows = [
        ("pixels", "emoji", 20.0, 10.0),
        ("pixels", "a<b", 50.0, 25.04),
        ("pixels", "mean", 35.0, 17.5),
        ("student", "emoji", 40.0, 30.0),
        ("student", "a<b", 45.0, 35.0),
        ("student", "mean", 42.5, 32.5),
    ]
    table = pd.DataFrame(rows, columns=["embedder", "domain", "r_at_1", "mmp_at_5"])
    table = table.assign(index="merged", n_queries=1200, n_index=8000)
    return table.assign(r_at_1_low=table.r_at_1 - 1, r_at_1_high=table.r_at_1 + 2) if intervals else table


def test_results_list_the_student_first_and_the_mean_last():
    table = sheets.results_table(evaluation())
    assert "merged index" in table.html
    assert table.html.index(">student<") < table.html.index(">pixels<")
    assert [row[:4] for row in texts(table)] == [
        ["emoji", "1,200", "40.0", "30.0"],
        ["a<b", "1,200", "45.0", "35.0"],
        ["mean", "1,200", "42.5", "32.5"],
    ]
    assert "a&lt;b" in table.html


def test_a_recall_that_is_surely_the_best_of_its_row_is_bold_and_nothing_else():
    sure = evaluation(intervals=True)
    assert bold_cells(sheets.results_table(sure)) == {("emoji", 1), ("a<b", 3), ("mean", 1)}
    sure.loc[sure["domain"] == "a<b", "r_at_1_high"] += 3  # 45 to 50: the intervals touch
    assert bold_cells(sheets.results_table(sure)) == {("emoji", 1), ("mean", 1)}
    assert bold_cells(sheets.results_table(evaluation())) == set()  # without intervals nothing is sure
    assert bold_cells(sheets.results_table(sure[sure["embedder"] == "student"])) == set()


def test_intervals_follow_their_value_where_there_are_some():
    table = sheets.results_table(evaluation(intervals=True))
    assert "40.0 <small>± 1.5</small>" in table.html
    assert "42.5 ± 1.5" in repr(table)
    assert "±" not in repr(sheets.results_table(evaluation()))


def test_index_sizes_are_a_column_where_they_differ():
    assert "8,000" not in repr(sheets.results_table(evaluation()))
    table = evaluation().assign(index="separate", n_index=lambda t: np.where(t["domain"] == "emoji", 100, 2000))
    assert "2,000" in repr(sheets.results_table(table, "separate"))


def test_queries_that_nothing_can_be_right_for_are_counted_and_said():
    assert "no positive" not in repr(sheets.results_table(evaluation().assign(n_without_positive=0)))
    n = {"emoji": 7, "a<b": 0, "mean": 7}
    table = sheets.results_table(evaluation().assign(n_without_positive=lambda t: t["domain"].map(n)))
    assert [row[2] for row in texts(table)] == ["7", "0", "7"]
    for text in (table.html, table.text):
        assert "7 of 2,400 queries have no other image of their class in their index" in text


def test_splits_are_counted_for_each_domain_and_in_all(catalog):
    emoji, flags, total = texts(sheets.split_table(catalog))
    assert emoji == ["emoji", "3", "2", "3", "–", "–", "12", "5", "7", "–", "–", "3", "4", "5"]
    assert flags == ["flags", "3", "2", "3", "6", "2", "12", "5", "7", "19", "5", "3", "4", "5"]
    assert total == ["all", "6", "4", "6", "6", "2", "24", "10", "14", "19", "5", "3", "4", "5"]


def test_the_plan_names_data_model_and_length_of_a_run(catalog):
    params = TrainParams(backbone="resnet10t", pretrained=False, steps=30, frozen_steps=10, batch_size=8, eval_every=15)
    text = repr(sheets.plan_table(params, catalog))
    for fact in (
        "emoji, flags",
        "24 of 6 classes",
        "resnet10t, from scratch, its first 10 steps frozen",
        "every 15 steps",
    ):
        assert fact in text
    assert "30 of 8 images: 10.0 times each on average" in text
    check = check_quickly(catalog)
    assert f"data check       {check.verdict}" in repr(sheets.plan_table(params, catalog, check=check))
    weights = TrainParams(pretrained=False, weights="a_package/models/net.pth")
    assert "from net.pth" in repr(sheets.plan_table(weights, catalog))
    assert "no teachers" in repr(sheets.plan_table(TrainParams(recipe="us_rr", sampler_loss="student"), catalog))
    assert "2 domains in a batch" in repr(sheets.plan_table(TrainParams(domains_per_batch=8), catalog))
    assert "warning" not in text


def test_the_plan_warns_of_a_split_with_one_class(catalog):
    emoji, flags = catalog.domains
    test = emoji.splits["test"]
    single = replace(emoji, splits=emoji.splits | {"test": replace(test, labels=np.zeros_like(test.labels))})
    text = repr(sheets.plan_table(TrainParams(), replace(catalog, domains=(single, flags))))
    assert "emoji: a single class to train on, to validate or to test on" in text


def test_the_files_of_a_run_are_named_with_their_sizes_and_others_are_not(tmp_path):
    write_tree(tmp_path, {"evaluation.csv": b"x" * 1234, "checkpoints/best.pt": b"x" * 2_340_000, "notes.txt": b"x"})
    lines = repr(sheets.files_table(tmp_path)).splitlines()
    assert lines[0].split() == ["folder", str(tmp_path)]
    assert [line.split()[0] for line in lines[1:]] == ["checkpoints/best.pt", "evaluation.csv"]
    assert lines[1].endswith("(2.3 MB)")
    assert lines[2].endswith("(1.2 KB)")
    assert RunFolder(tmp_path).best.relative_to(tmp_path).as_posix() in sheets.RUN_FILES


def test_the_gallery_frames_right_and_wrong_neighbours(catalog):
    right = sheets.query_gallery([neighbours(catalog, "emoji", [[True] * 5])], catalog)
    wrong = sheets.query_gallery([neighbours(catalog, "emoji", [[False] * 5])], catalog)
    # Below the line that explains the marks.
    n_right, n_wrong = (near(sheets.RIGHT_INK, pixels(image)[40:]).sum() for image in (right, wrong))
    assert n_right > 5 * 4 * 90 * 2  # five frames of four sides: see `near`
    assert n_wrong < A_FEW
    assert near(sheets.WRONG_INK, pixels(wrong)[40:]).sum() > 5 * 4 * 90 * 2
    assert Image.open(io.BytesIO(right.data)).format == "WEBP"


def test_the_gallery_takes_right_and_wrong_queries_of_every_domain_of_one_embedder(catalog):
    rng = np.random.default_rng(0)
    right = np.array([False, True, False, False, True, False])
    chosen = sheets._choose(right, 4, rng)
    assert right[chosen].tolist() == [True, True, False, False]
    assert right[sheets._choose(right, 6, rng)].tolist() == [True] * 2 + [False] * 4
    assert right[sheets._choose(~right, 3, rng)].sum() == 1
    assert sheets._choose(np.zeros(0, bool), 3, rng) == []
    parts = [
        neighbours(catalog, "flags", [[False] * 5]),
        neighbours(catalog, "emoji", [[False] * 5]),
        neighbours(catalog, "emoji", [[True] * 5], embedder="teacher"),
    ]
    image = sheets.query_gallery(parts, catalog)
    assert near(sheets.RIGHT_INK, pixels(image)[40:]).sum() < A_FEW
    again = sheets.query_gallery(reversed(parts), catalog)
    assert again.data == image.data


def test_the_gallery_shows_fewer_neighbours_where_there_are_fewer(catalog):
    part = neighbours(catalog, "emoji", [[True, False]])
    part.position[0, 1] = -1
    assert near(sheets.WRONG_INK, pixels(sheets.query_gallery([part], catalog))[40:]).sum() < A_FEW


def test_neighbours_of_other_data_are_refused_rather_than_marked_wrongly(catalog):
    part = neighbours(catalog, "emoji", [[True] * 5])
    part.hit[0, 3] = False
    with pytest.raises(DataError, match="not what was searched: 'emoji/.*' had another class"):
        sheets.query_gallery([part], catalog)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    files = uned_files()
    [first, *_] = [entry["path"] for entry in json.loads(files["info_files/emoji/test.json"])]
    catalog = load_catalog(str(write_tree(tmp_path, files | {f"images/{first}": b"no image"})))
    with pytest.raises(ImageError, match=first):
        sheets.query_gallery([neighbours(catalog, "emoji", [[True] * 5])], catalog)


def test_samples_are_the_same_each_time_and_small(catalog):
    first = sheets.sample_sheet(catalog)
    assert sheets.sample_sheet(catalog).data == first.data
    assert sheets.sample_sheet(catalog, seed=1).data != first.data
    assert len(first.data) < sheets.MAX_BYTES
    for colour in ("#ff6a00", "#2563c1"):  # the bars beside the two domains
        assert near(colour, pixels(first)[:, :20]).sum() > 6 * 120


def test_a_sheet_of_noise_stays_below_its_size():
    sheet = sheets.Sheet(1300, 1100)
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1300, 3), dtype=np.uint8)
    sheet.canvas.paste(Image.fromarray(noise).resize((433, 366)).resize((1300, 1100)))
    assert len(sheet.image().data) <= sheets.MAX_BYTES


def test_names_that_are_too_long_or_not_latin_are_cut_and_replaced():
    sheet = sheets.Sheet(300, 40)
    sheet.write(0, 0, "an exceedingly long name of a class", 80)
    written = np.asarray(sheet.canvas)[..., 3] > 128
    assert written[:, :84].any()
    assert not written[:, 84:].any()
    sheet.write(100, 0, "漢字")
    assert (np.asarray(sheet.canvas)[..., 3] > 128)[:, 100:].any()


def test_a_sheet_has_no_background_and_scrolls_before_its_text_is_too_small():
    sheet = sheets.Sheet(300, 200)
    sheet.tile(10, 10, 80, Image.new("RGB", (8, 8), "red"), ["a name"])
    picture = sheet.image()
    shown = np.asarray(Image.open(io.BytesIO(picture.data)))
    assert shown.shape == (200, 300, 4)
    assert shown[20, 20, 3] == 255
    assert not shown[:, 120:, 3].any()
    assert not shown[140:, :, 3].any()
    [least] = re.findall(r"min-width: (\d+)px", picture._repr_html_())
    assert int(least) / 300 * 14 > 10  # pixels of its letters


def test_a_picture_names_its_size_where_there_are_none():
    picture = sheets.Sheet(30, 20).image()
    assert Image.open(io.BytesIO(picture.data)).size == (30, 20)
    assert repr(picture) == "(a picture of 30 × 20 pixels: see the notebook)"
