"""The model card: true figures, licences that are stated or said to be missing, programs that run."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
import yaml

from tests.helpers.catalogs import picture
from tests.helpers.fresh import TIMM, run_fresh
from udonlib.params import TrainParams
from udonlib.release.card import NOT_STATED, Facts, Licences, card


@pytest.fixture
def facts(run, released):
    metrics = released.metrics
    return Facts(
        released.config,
        run.params,
        run.catalog,
        run.evaluation(),
        pd.DataFrame(metrics["vectors"]),
        metrics["onnx"],
        run.summary(),
        run.provenance()[0],
    )


def programs(text):
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def printed(text, folder):
    """The embedding that a program of a card ends with, in a process of its own."""
    said = run_fresh(f"{text}\nprint(embedding[0].tolist())", folder)
    return [float(value) for value in said.strip("[]\n").split(",")]


@pytest.mark.parametrize("name", ["run", "taught"])
def test_its_programs_run_as_they_stand_and_agree(name, released_of, request, tmp_path, monkeypatch):
    """timm's as well, with the pixels of the same file in place of the random ones."""
    folder = shutil.copytree(released_of(request.getfixturevalue(name)).folder, tmp_path / "copy")
    (folder / "photo.jpg").write_bytes(picture(3, (32, 32), "JPEG"))
    onnx, ours, timms = programs((folder / "README.md").read_text())
    monkeypatch.chdir(folder)
    names = {}
    exec(ours, names)
    expected = pytest.approx(names["embedding"][0].tolist(), abs=1e-5)
    assert printed(onnx, folder) == expected
    torch.save(names["model"].read("photo.jpg")[None] / 255, "pixels.pt")
    assert timms.count("torch.rand(1, 3, size, size)") == 1
    same = timms.replace("torch.rand(1, 3, size, size)", "torch.load('pixels.pt')")
    assert printed(TIMM + same, folder) == expected


def test_a_head_of_several_layers_is_left_to_udonlib(facts):
    own = facts.config.udonlib.model_copy(update={"head_hidden_dims": (6,)})
    text = card(replace(facts, config=facts.config.model_copy(update={"udonlib": own})))
    assert "**timm alone**, for the encoder:" in text
    assert "holds the head: an MLP" in programs(text)[2]
    compile(programs(text)[2], "card", "exec")


def test_it_begins_with_what_the_hub_reads(facts):
    front = yaml.safe_load(card(facts).split("---")[1])
    assert front["library_name"] == "timm"
    assert front["pipeline_tag"] == "image-feature-extraction"


def test_the_table_is_that_of_the_runs_evaluation(facts):
    text = card(facts)
    table = facts.evaluation.query("embedder == 'student' and index == 'merged'").set_index("domain")
    for domain in ("emoji", "flags"):
        row = table.loc[domain]
        r_at_1 = f"{row.r_at_1:.1f} ({row.r_at_1_low:.1f} to {row.r_at_1_high:.1f})"
        assert f"| {domain} | {row.n_queries} | {r_at_1} |" in text
    assert f"| **mean of the domains** | {table.loc['mean'].n_queries} |" in text


def test_it_says_what_the_model_was_made_of(facts):
    text = card(facts)
    for said in ("Recipe**: `udon`, seed 0; 11 steps", "`learning_rate: 0.01`", "emoji (12 images, 3 classes)"):
        assert said in text
    assert facts.params.data not in text
    assert "a head for each domain, trained together" in text
    taught = TrainParams(**facts.params.model_dump() | {"offline_teachers": "specialist_small"})
    assert "specialists, one for each domain" in card(replace(facts, params=taught))


def test_what_smaller_vectors_lose_and_what_is_hopeless_is_said(facts):
    vectors = facts.vectors.copy()
    assert {"float32", "float16", "int8", "binary", "prefix_4"} == set(vectors["vectors"])
    vectors["verdict"] = ["", *["as good"] * (len(vectors) - 1)]
    assert "None of these is hopeless." in card(replace(facts, vectors=vectors))
    vectors.loc[(vectors["vectors"] == "binary") & (vectors["reranked"] == 0), "verdict"] = "hopeless"
    assert "Hopeless for this model: binary without re-ranking." in card(replace(facts, vectors=vectors))


def test_frozen_teachers_are_named_with_their_licences_and_without_folders(taught, released_of):
    text = (released_of(taught).folder / "README.md").read_text()
    assert "by their features and not by labels: one (`small_resnet` with the weights of `one.safetensors`)" in text
    assert licence_rows(text)["the teachers"] == "one: CC-BY-NC-4.0"
    assert str(taught.params.teachers["one"].weights) not in text


def licence_rows(text):
    return dict(re.findall(r"^\| ((?:this|the|udonlib)[^|]*) \| (.*) \|$", text, flags=re.MULTILINE))


def test_licences_that_nobody_stated_are_said_to_be_missing(facts):
    rows = licence_rows(card(facts))
    assert rows["this model"] == rows["the data"] == NOT_STATED
    assert rows["the weights that it began with"] == "none: from scratch"
    stated = licence_rows(card(facts, Licences("CC0", "CC-BY-4.0", "Apache-2.0", "MIT too")))
    assert list(stated.values())[:4] == ["CC0", "CC-BY-4.0", "Apache-2.0", "MIT too"]


@pytest.mark.parametrize(
    ("changes", "licence", "said"),
    [
        ({"pretrained": True}, "apache-2.0", "apache-2.0"),
        ({"pretrained": True}, None, NOT_STATED),
        ({"weights": "udonlib/miniuned/backbone.safetensors"}, None, "MIT, as udonlib, which holds them"),
        ({"weights": "pydantic/file.pth"}, None, "MIT (package pydantic)"),
        ({"weights": "somewhere/file.pth"}, None, NOT_STATED),
    ],
)
def test_the_licence_of_the_first_weights_is_looked_up(facts, changes, licence, said):
    params = TrainParams(**facts.params.model_dump() | changes)
    rows = licence_rows(card(replace(facts, params=params, encoder_licence=licence)))
    assert rows["the weights that it began with"] == said


def test_miniuneds_licences_are_named(facts):
    params = facts.params.model_copy(update={"data": "miniuned"})
    assert "ATTRIBUTION.md" in licence_rows(card(replace(facts, params=params)))["the data"]
