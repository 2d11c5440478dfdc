"""A release as a whole: by whom it can be used, and when there is none."""

from __future__ import annotations

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch

from tests.helpers.fresh import TIMM, run_fresh
from tests.helpers.missing import script_without
from udonlib.__main__ import main
from udonlib.data.decoding import decode
from udonlib.data.images import ImageReader
from udonlib.errors import UserError
from udonlib.release import release as module
from udonlib.release.folder import CONFIG, FILES, HEAD, ReleasedModel, read_config
from udonlib.release.onnx_export import OnnxEmbedder
from udonlib.release.release import TIE, compare, release
from udonlib.release.testset import TestSet


def test_a_release_holds_its_files_and_nothing_else(released):
    assert {path.name for path in released.folder.iterdir()} == set(FILES)
    assert json.loads((released.folder / "metrics.json").read_text()) == released.metrics
    assert released.folder.name == read_config(released.folder).udonlib.name
    assert not [name for name in FILES if "prototypes" in (released.folder / name).read_bytes().decode("latin1")]


def test_it_says_how_the_files_were_compared(run, released):
    onnx = released.metrics["onnx"]
    n_queries = sum(len(domain.queries("test")) for domain in run.catalog.domains)
    assert onnx["n_queries"] == n_queries == onnx["n_same"] + onnx["n_ties"]
    assert onnx["n_images"] == sum(len({*d.queries("test").paths, *d.index("test").paths}) for d in run.catalog.domains)
    assert onnx["max_difference"] <= 1e-5
    assert onnx["n_files"] == n_queries
    assert onnx["files_max_difference"] <= 1e-3


ONNX_ALONE = """
import sys
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
images = np.load("images.npz")
rows = {
    name: np.concatenate([session.run(None, {"images": images[f"{name}_{i}"][None]})[0] for i in range(n)])
    for name, n in (("query", int(images["n_query"])), ("index", int(images["n_index"])))
}
similarities = rows["query"].astype(float) @ rows["index"].astype(float).T
for row, place in enumerate(images["itself"]):
    if place >= 0:
        similarities[row, place] = -np.inf
np.save("found.npy", np.argsort(-similarities, axis=1, kind="stable")[:, :5])
assert not {"torch", "timm", "udonlib"} & {name.split(".")[0] for name in sys.modules}
"""


def test_onnxruntime_alone_finds_the_runs_neighbours(run, released, tmp_path):
    """From the decoded files, of their own size, in a process that can import neither torch nor udonlib."""
    arrays, places = {}, {}
    for name in ("query", "index"):
        splits = [(d.name, d.queries("test") if name == "query" else d.index("test")) for d in run.catalog.domains]
        paths = [(domain, path) for domain, split in splits for path in split.paths]
        for i, (_, path) in enumerate(paths):
            arrays[f"{name}_{i}"] = np.array(decode(run.catalog.store.read(path), path))
        arrays[f"n_{name}"], places[name] = len(paths), paths
    assert arrays["query_0"].shape == (37, 41, 3)
    index = {path: i for i, path in enumerate(places["index"])}
    arrays["itself"] = np.array([index.get(path, -1) for path in places["query"]])
    np.savez(tmp_path / "images.npz", **arrays)
    shutil.copy(released.folder / "model.onnx", tmp_path)
    run_fresh(script_without(["torch", "timm", "udonlib"], ONNX_ALONE), tmp_path)
    found = np.load(tmp_path / "found.npy")
    expected = np.concatenate([n.position for n in run.neighbours() if n.embedder == "student"])
    assert found.shape == expected.shape
    assert (found == expected).all()


TIMM_ALONE = """
import sys
import torch, timm

torch.set_num_threads(1)
encoder = timm.create_model("local-dir:.", pretrained=True).eval()
with torch.no_grad():
    torch.save(encoder(torch.load("images.pt")), "features.pt")
assert "udonlib" not in sys.modules
"""


@pytest.mark.parametrize(
    "changes",
    [
        {"nested_dims": [4]},
        "taught",
        {"backbone": "test_vit", "steps": 2},
        {"backbone": "test_efficientnet", "steps": 2, "backbone_args": {"drop_rate": 0.1}},
    ],
    ids=["resnet", "unic", "vit", "depthwise"],
)
def test_timm_alone_loads_the_encoder_to_the_bit(finished, taught, released_of, changes, tmp_path):
    run = taught if changes == "taught" else finished(**changes)
    folder = shutil.copytree(released_of(run).folder, tmp_path / "copy")
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(images, folder / "images.pt")
    run_fresh(TIMM + script_without(["udonlib"], TIMM_ALONE), folder)
    with torch.no_grad():
        assert torch.equal(torch.load(folder / "features.pt"), run.load_model().backbone(images))
    loaded = ReleasedModel.from_pretrained(folder)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(loaded.embed(pixels), run.load_model().embed(pixels))


def test_a_model_without_a_head_is_released_as_its_encoder_alone(taught, released_of):
    """Taught by frozen encoders: the unit feature is the embedding, and no projector is left."""
    released = released_of(taught)
    assert not (released.folder / HEAD).exists()
    assert released.config.udonlib.head == "feature"
    assert released.config.udonlib.embedding_dim == released.config.num_features
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    embeddings = OnnxEmbedder(released.folder / "model.onnx")(images)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(2))


def test_an_encoder_of_our_own_is_released_without_timms_help(finished):
    released = release(finished(backbone="small_resnet", backbone_args={"width": 4}, steps=2))
    assert not released.config.is_timms
    assert "timm does not know" in (released.folder / "README.md").read_text()
    model = ReleasedModel.from_pretrained(released.folder)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.allclose(OnnxEmbedder(released.folder / "model.onnx")(images), model.embed(images), atol=1e-5)


def test_a_run_that_is_not_finished_is_not_released(finished, tmp_path):
    run = finished(steps=3)
    (run.path / "summary.json").unlink()
    with pytest.raises(UserError, match="is not finished: .* a release holds the figures of its test"):
        release(run, tmp_path / "release")
    assert not (tmp_path / "release").exists()


def test_another_release_or_other_files_are_not_replaced(run, released, finished, tmp_path):
    other = finished(seed=3, steps=2)
    with pytest.raises(UserError, match=f"holds the release of run '{run.path.name}'; .*--overwrite"):
        release(other, released.folder)
    assert read_config(released.folder).udonlib.name == run.path.name
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match="holds something that is no release"):
        release(other, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file, expected a folder"):
        release(other, tmp_path / "file")


def test_a_release_that_fails_leaves_the_one_before(run, released, monkeypatch):
    before = (released.folder / CONFIG).read_bytes()
    monkeypatch.setattr(module, "MAX_DIFFERENCE", 0.0)
    with pytest.raises(UserError, match="the ONNX file is not the model: embeddings differ by up to .*; nothing was"):
        release(run, released.folder)
    assert (released.folder / CONFIG).read_bytes() == before
    assert {path.name for path in released.folder.iterdir()} == set(FILES)


def test_a_graph_that_prepares_images_otherwise_is_refused(run, released):
    model = ReleasedModel.from_pretrained(released.folder)
    with pytest.raises(UserError, match="does not prepare images as the evaluation does"):
        module.compare_files(model, lambda images: -model.embed(images[..., :32, :32]), run.catalog)


def test_data_that_has_changed_is_refused(run, monkeypatch, tmp_path):
    notes = [run.provenance()[0] | {"data_fingerprint": "other"}]
    monkeypatch.setattr(run, "provenance", lambda: notes)
    with pytest.raises(UserError, match="has changed since it began"):
        release(run, tmp_path / "release")


def vectors(*angles):
    turn = torch.tensor(angles, dtype=torch.float64)
    return torch.stack([turn.cos(), turn.sin()], 1).float()


def two(index, other):
    none = torch.zeros(1, dtype=torch.int64)
    many = torch.zeros(len(index), dtype=torch.int64)
    queries = {name: vectors(0.0) for name in ("torch", "onnx")}
    both = {"torch": index, "onnx": other}
    return TestSet(("a",), queries, both, none, many, none[:, None], many[:, None], none - 1)


def test_neighbours_that_change_places_in_a_tie_are_counted():
    same = two(vectors(0.1, 0.5), vectors(0.1, 0.5))
    assert compare(same, 2) | {"max_difference": 0} == {
        "n_images": 3, "max_difference": 0, "n_queries": 1, "k": 2, "n_same": 1, "n_ties": 0, "tie": TIE
    }  # fmt: skip
    close = 0.5 + 1e-6
    tie = two(vectors(0.5, close), vectors(close, 0.5))
    assert (compare(tie, 2)["n_same"], compare(tie, 2)["n_ties"]) == (0, 1)


def test_other_neighbours_are_refused_with_the_figures():
    with pytest.raises(UserError, match=r"differ by up to 0\.38 .* and 1 of 1 queries have other neighbours"):
        compare(two(vectors(0.1, 0.5), vectors(0.5, 0.1)), 2)


def test_the_neighbours_alone_are_reason_enough(monkeypatch):
    monkeypatch.setattr(module, "MAX_DIFFERENCE", 1.0)
    with pytest.raises(UserError, match="1 of 1 queries"):
        compare(two(vectors(0.1, 0.5), vectors(0.5, 0.1)), 2)


def test_images_are_read_as_the_run_reads_them(run, released):
    domain = run.catalog.domains[0]
    path = domain.queries("test").paths[0]
    expected = ImageReader(run.catalog, 32, "eval").read(domain.name, "test", np.array([0]))[0]
    model = ReleasedModel.from_pretrained(released.folder)
    assert torch.equal(model.read(run.catalog.root / "images" / path), expected)


def test_the_command_line_releases_a_run_and_says_what_was_compared(run, monkeypatch, capsys, tmp_path):
    stated = ["--licence", "CC0", "--data-licence", "CC-BY-4.0"]
    monkeypatch.setattr(sys, "argv", ["udonlib", "release", str(run.path), "--folder", str(tmp_path / "out"), *stated])
    main()
    said = capsys.readouterr().out
    assert f"releasing run '{run.path.name}'" in said
    assert re.search(r"ONNX against PyTorch: embeddings of \d+ images differ by at most \S+; \d+ of \d+ lists", said)
    assert re.search(r"^binary, \d+ re-ranked: 1 bytes, R@1 \S+", said, flags=re.MULTILINE)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| this model | CC0 |" in text
    assert "| the data | CC-BY-4.0 |" in text


def test_the_command_line_ends_with_one_message(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["udonlib", "release", "nothing", "--outputs", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"parameter 'run': no run 'nothing' in .*; it holds no runs yet"):
        main()
