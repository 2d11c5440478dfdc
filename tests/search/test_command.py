"""`python -m udonlib embed`, `index` and `search`: from a folder of images to their neighbours, and mistakes."""

import subprocess
import sys

import pytest

from tests import PROJECT
from tests.helpers.catalogs import picture, write_image_folder
from tests.helpers.training import SMALL
from udonlib import __main__ as program
from udonlib.params import TrainParams
from udonlib.runs.run import open_run


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Folder of results that holds a short run."""
    folder = tmp_path_factory.mktemp("command")
    data = write_image_folder(folder / "data", n_classes=4)
    values = {"data": str(data), "outputs": str(folder / "outputs"), "run": "small", "steps": 2, "eval_every": 2}
    for _ in open_run(TrainParams(**SMALL | values, n_threads=1, eval_batch_size=4)).train():
        pass
    return folder / "outputs"


@pytest.fixture
def say(outputs, monkeypatch, capsys):
    """Give a command; returns what it prints, or the one line that it ends with."""

    def say(*words):
        monkeypatch.setattr(sys, "argv", ["udonlib", *map(str, words), "--outputs", str(outputs)])
        ended = ""
        try:
            program.main()
        except SystemExit as end:
            ended = str(end.code)
        assert "\n" not in ended
        return ended or capsys.readouterr().out

    return say


def test_from_a_folder_to_neighbours(say, outputs, tmp_path):
    images = write_image_folder(tmp_path / "mine", n_classes=10, n_images=3)
    (images / "cats" / "class 0" / "bad.png").write_bytes(b"no image")
    assert "bad.png: not an image" in say("embed", images)
    said = say("embed", images, "--on-bad-image", "skip", "--name", "mine")
    assert "left out: cats/class 0/bad.png" in said
    assert "60 vectors of 8 numbers by small: " in said
    said = say("index", "mine")
    assert "chosen: exact" in said
    assert "answers by class: of 30 images" in said
    assert f"60 images: {outputs / 'indexes' / 'mine'}" in said
    said = say(
        "search", "mine", "dogs/class 3/0.PNG", images / "cats" / "class 1" / "1.jpg", "-k", 2, "--where", "domain=cats"
    )
    blocks = said.split(str(images))
    assert blocks[0].startswith("dogs/class 3/0.PNG: ")
    assert blocks[0].count("cats/class") == 2
    assert "cats/class 1/1.jpg" in blocks[1].splitlines()[2]
    (images / "cats" / "class 0" / "bad.png").write_bytes(picture(999))
    (images / "cats" / "class 1" / "1.jpg").unlink()
    say("embed", images, "--name", "mine")
    assert "1 images added, 1 removed" in say("index", "mine")


def test_what_holds_no_labels_is_indexed_without_answers(say, tmp_path):
    (tmp_path / "flat").mkdir()
    for i in range(5):
        (tmp_path / "flat" / f"{i}.png").write_bytes(picture(i))
    say("embed", tmp_path / "flat", "--name", "flat")
    assert "no answers by class: " in say("index", "flat")
    assert say("search", "flat", "3.png", "-k", 1).startswith("3.png\n")


def test_mistakes_end_in_one_line(say, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    for words, message in (
        (("embed", tmp_path / "none"), "cannot be read: No such file"),
        (("embed", tmp_path / "a.png"), "expected a folder or zip of images"),
        (("embed", tmp_path, "--model", "smal"), "did you mean 'small'"),
        (("embed", tmp_path, "--on-bad-image", "skp"), "did you mean 'skip'"),
        (("index", "nothing"), "no embeddings 'nothing'"),
        (("search", "nothing", "x"), "no index 'nothing'"),
    ):
        assert message in say(*words), words
    say("embed", tmp_path, "--name", "one")
    assert "expected COLUMN=VALUE; did you mean 'domain'" in say("search", "one", "a.png", "--where", "domian=x")
    assert "did you mean 'sq8'" in say("index", "one", "--kind", "sq9")


def test_the_program_starts_without_what_search_needs():
    script = "import sys; sys.argv = ['x', '--help']\nfrom udonlib import __main__\ntry: __main__.main()\n"
    script += "finally: assert not {'torch', 'faiss', 'pyarrow'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "index what embed has written" in done.stdout
