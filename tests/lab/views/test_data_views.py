"""The check of the data as a person sees it: progress, a verdict, findings with paths that cannot break the page."""

import re

import pytest

from tests.helpers.catalogs import write_image_folder, write_tree, write_uned_tree
from udonlib.data.catalog import load_catalog
from udonlib.data.check.datacheck import check_catalog
from udonlib.errors import UserError
from udonlib.lab.views import data_views, sheets
from udonlib.presets import CheckParams
from udonlib.training.needs import RunNeeds


@pytest.fixture
def root(tmp_path):
    """A folder with what is odd in every way."""
    root = write_image_folder(tmp_path / "pets")
    (root / "cats" / "class 3" / "2.PNG").write_bytes(b"")
    (root / "cats" / "class 1").rename(root / "cats" / "<b>class")
    copy = (root / "dogs" / "class 2" / "0.PNG").read_bytes()
    return write_tree(root, {"dogs/class 4/0.PNG": copy, "dogs/class 4/note.svg": b"x", "cats/<b>class/0.PNG": b"x"})


def test_the_last_line_is_the_verdict(root, capsys):
    seconds = iter(range(1000))
    found = data_views.check(
        load_catalog(str(root)), CheckParams(data=str(root)), live=False, clock=lambda: float(next(seconds))
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "files 60/60 images (100%)"
    assert re.fullmatch(rf"Verdict: {re.escape(found.verdict)}, in \d+ s", lines[-1])
    assert lines[-1].startswith("Verdict: broken. images that cannot be read: 2; pairs of equal files in")


@pytest.mark.parametrize(("values", "seconds"), [({}, 60.0), ({"seconds": 5}, 5.0), ({"deep": True}, None)])
def test_only_a_deep_check_takes_as_long_as_it_takes(root, monkeypatch, values, seconds):
    asked = []
    monkeypatch.setattr(
        data_views, "check_catalog", lambda catalog, limit, *_: asked.append(limit) or check_catalog(catalog)
    )
    data_views.check(load_catalog(str(root)), CheckParams(**values), live=False)
    assert asked == [seconds]


def test_an_interrupted_check_says_so(root, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data_views, "check_catalog", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data_views.check(load_catalog(str(root)), CheckParams(), live=False)
    assert capsys.readouterr().out.splitlines() == ["stopped"]


def test_findings_are_shown_by_path_and_cannot_break_the_page(root):
    table = data_views.findings_table(check_catalog(load_catalog(str(root))))
    assert "<td" in table.html
    assert "<b>" not in table.html
    assert "cats/&lt;b&gt;class/0.PNG: not an image of a known format" in table.html
    for text in ("cats/class 3/2.PNG: the file is empty", "dogs/class 4/note.svg: first", "left out, .svg"):
        assert text in table.html
        assert text in table.text
    assert "✗ broken: images that cannot be read: 2: training and evaluation stop at them" in table.text
    assert "Checked the files of all and the pixels of 58 of 60 images." in table.html


def test_many_images_are_cut_to_a_few_and_the_rest_is_counted(tmp_path):
    root = write_image_folder(tmp_path / "pets")
    for path in sorted((root / "cats").rglob("*.PNG")):
        path.write_bytes(b"")
    text = data_views.findings_table(check_catalog(load_catalog(str(root)))).text
    assert text.count("the file is empty") == 5
    assert "... and 15 more" in text


def test_nothing_wrong_is_said_with_what_was_looked_at(tmp_path):
    check = check_catalog(load_catalog(str(write_uned_tree(tmp_path / "uned"))))
    text = repr(data_views.findings_table(check))
    assert "nothing wrong; checked the files of all and the pixels of all of 48 images" in text


def test_folders_of_splits_are_said(tmp_path):
    folder = write_image_folder(tmp_path / "pets", ["train", "val", "test"])
    check = check_catalog(load_catalog(str(folder)))
    assert check.notes
    assert check.notes[0] in data_views.findings_table(check).text


def test_kinds_of_files_are_tabulated(root):
    text = data_views.files_table(check_catalog(load_catalog(str(root)))).text
    assert re.search(
        r"dogs +30 files of \d\.\d KB: \.png 20, \.jpg 10; PNG 20, JPEG 10; RGB; 24 to 24 pixels wide", text
    )
    none = check_catalog(load_catalog(str(root)), seconds=0)
    assert "none was looked at" in data_views.files_table(none).text


def test_a_runs_needs_are_told_of_its_preset(root):
    text = data_views.needs_table(load_catalog(str(root)), CheckParams(data=str(root), plan="smoke")).text
    for name in ("run", "steps", "reading", "memory"):
        assert re.search(rf"^{name} ", text, re.M)
    assert "preset smoke" in text
    with pytest.raises(UserError, match="no preset 'smoky'; did you mean 'smoke'"):
        data_views.needs_table(load_catalog(str(root)), CheckParams(data=str(root), plan="smoky"))


def test_images_that_do_not_fit_into_memory_are_read_again_each_time():
    needs = {"n_images": 10**6, "n_seen": 10**7, "n_measured": 100, "seconds_per_image": 0.001, "model_bytes": 1}
    few = RunNeeds(train_bytes=2**30, eval_bytes=1, **needs)
    many = RunNeeds(train_bytes=5 * 2**30, eval_bytes=1, **needs)
    assert data_views._reading(few, 1000, 10).endswith("from then on they come from memory")
    assert "2 h 46 min in all: use n_workers" in data_views._reading(many, 1000, 10)


def test_the_sheet_of_samples_marks_what_cannot_be_read(root):
    catalog = load_catalog(str(root))
    assert len(sheets.sample_sheet(catalog, n_classes=20).data) > 1000
