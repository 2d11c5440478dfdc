"""A release's folder: loaded as it was written, refused where it is not."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from huggingface_hub import ModelHubMixin
from safetensors.torch import load_file, save_file

from udonlib.errors import UserError
from udonlib.release import folder as module
from udonlib.release.folder import (
    CARD,
    CONFIG,
    ENCODER,
    FILES,
    HEAD,
    ReleaseConfig,
    ReleasedModel,
    check_files,
    config_of,
    read_config,
    write_config,
    write_weights,
)


@pytest.fixture
def copy(released, tmp_path):
    return shutil.copytree(released.folder, tmp_path / "copy")


def images():
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def change_config(folder, **changes):
    """Rewrite config.json, its own checksum too, as somebody would who means it."""
    values = json.loads((folder / CONFIG).read_text())
    own = changes.pop("udonlib", {})
    values |= changes
    values["udonlib"] |= own
    write_config(folder, ReleaseConfig(**values))


def test_the_config_has_timms_keys_and_ours(run, released):
    values = json.loads((released.folder / CONFIG).read_text())
    assert values["architecture"] == "test_resnet"
    assert values["num_classes"] == values["pretrained_cfg"]["num_classes"] == 0
    model = run.load_model()
    assert values["num_features"] == model.backbone.feature_dim
    timms = values["pretrained_cfg"]
    assert timms["input_size"] == [3, 32, 32]
    assert (timms["mean"], timms["std"]) == (list(model.backbone.mean), list(model.backbone.std))
    assert (timms["interpolation"], timms["crop_pct"], timms["crop_mode"]) == ("bilinear", 1.0, "center")
    ours = values["udonlib"]
    assert (ours["embedding_dim"], ours["head"], ours["nested_dims"]) == (8, "student", [4])
    assert set(ours["sha256"]) == set(FILES)
    assert ours["domains"] == ["emoji", "flags"]


def test_the_weights_are_the_encoders_and_the_heads_alone(run, released):
    model = run.load_model()
    for file, part in ((ENCODER, model.backbone.encoder), (HEAD, model.student)):
        tensors = load_file(released.folder / file)
        assert set(tensors) == set(part.state_dict())
        assert all(torch.equal(tensors[name], value) for name, value in part.state_dict().items())


def test_from_pretrained_gives_the_same_embeddings_to_the_bit(run, released):
    model = ReleasedModel.from_pretrained(str(released.folder))
    assert isinstance(model, ModelHubMixin)
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model.embed(images()), run.load_model().embed(images()))
    assert model.config == released.config


def test_a_head_of_several_layers_on_features_of_any_norm_comes_back(finished, tmp_path):
    run = finished(head_hidden_dims=[6, 5], normalise_features=False, steps=2)
    model = run.load_model()
    write_weights(tmp_path, model)
    config = write_config(tmp_path, config_of(model, run.params, "two"))
    assert config.udonlib.head_hidden_dims == (6, 5)
    with torch.no_grad():
        assert torch.equal(ReleasedModel.from_pretrained(tmp_path).embed(images()), model.embed(images()))


def test_save_pretrained_writes_what_from_pretrained_reads(released, tmp_path):
    model = ReleasedModel.from_pretrained(released.folder)
    model.save_pretrained(tmp_path)
    again = ReleasedModel.from_pretrained(tmp_path)
    assert torch.equal(again.embed(images()), model.embed(images()))
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, ENCODER, HEAD, CARD}


def test_from_the_hub_only_a_releases_files_are_fetched(released, monkeypatch):
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(released.folder)

    monkeypatch.setattr(module, "snapshot_download", fetch)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda **_: str(released.folder / CONFIG))
    model = ReleasedModel.from_pretrained("somebody/model", revision="v1")
    assert model.config == released.config
    assert (asked["name"], asked["revision"], set(asked["allow_patterns"])) == ("somebody/model", "v1", set(FILES))


@pytest.mark.parametrize("place", ["nowhere", "./nowhere", "/no/where", "a/b/c"])
def test_a_folder_that_is_not_there_is_said(place):
    with pytest.raises(UserError, match="nowhere|where|a/b/c.*no folder of a release"):
        ReleasedModel.from_pretrained(place)


def test_a_folder_of_something_else_is_said(tmp_path):
    with pytest.raises(UserError, match=r"no folder of a release: it holds no config.json"):
        ReleasedModel.from_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text('{"architecture": "resnet18"}')
    with pytest.raises(UserError, match=r"config.json: damaged, or not of a release: KeyError\('udonlib'\)"):
        ReleasedModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", [ENCODER, HEAD])
def test_one_changed_bit_is_found_before_anything_is_loaded(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[-5] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}: damaged or changed: .* bytes of SHA-256 .* fetch the release again"):
        ReleasedModel.from_pretrained(copy)


@pytest.mark.parametrize("name", FILES[:-1])
def test_every_file_can_be_held_against_its_checksum(copy, name):
    check_files(copy, read_config(copy))
    (copy / name).write_bytes((copy / name).read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{name}: damaged or changed"):
        check_files(copy, read_config(copy))
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name}: missing"):
        check_files(copy, read_config(copy))


@pytest.mark.parametrize("cut", [1, 40, 700])
def test_a_config_cut_short_is_one_message(copy, cut):
    (copy / CONFIG).write_text((copy / CONFIG).read_text()[:-cut].rstrip("}\n "))
    with pytest.raises(UserError, match=r"config.json: damaged"):
        ReleasedModel.from_pretrained(copy)


def test_a_config_that_was_edited_is_found(copy):
    text = (copy / CONFIG).read_text()
    assert text.count('"normalise_features": true') == 1
    (copy / CONFIG).write_text(text.replace('"normalise_features": true', '"normalise_features": false'))
    with pytest.raises(UserError, match=r"config.json: damaged or changed: it is not what its own checksum says"):
        ReleasedModel.from_pretrained(copy)


def test_values_that_do_not_fit_are_one_message(copy):
    values = json.loads((copy / CONFIG).read_text())
    values["pretrained_cfg"]["mean"] = "white"
    (copy / CONFIG).write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"config.json: damaged, or not of a release: . values do not fit"):
        ReleasedModel.from_pretrained(copy)


def test_a_later_format_is_said(copy):
    values = json.loads((copy / CONFIG).read_text())
    values["udonlib"]["format"] = 2
    (copy / CONFIG).write_text(json.dumps(values))
    with pytest.raises(UserError, match="found format 2, this udonlib .* reads format 1"):
        ReleasedModel.from_pretrained(copy)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_is_never_opened_whatever_the_config_says(copy, capsys):
    (copy / ENCODER).write_bytes(pickle.dumps(Evil()))
    change_config(copy)
    with pytest.raises(UserError, match=f"{ENCODER}: cannot be read as a safetensors file"):
        ReleasedModel.from_pretrained(copy)
    torch.save({"x": Evil()}, copy / ENCODER)
    change_config(copy)
    with pytest.raises(UserError, match=f"{ENCODER}: cannot be read as a safetensors file"):
        ReleasedModel.from_pretrained(copy)
    assert "executed" not in capsys.readouterr().out


def test_weights_of_another_model_are_refused(copy):
    save_file({"layers.0.weight": torch.zeros(3, 3)}, copy / HEAD)
    change_config(copy)
    with pytest.raises(UserError, match=f"{HEAD}: of another model than config.json says"):
        ReleasedModel.from_pretrained(copy)


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained_cfg_overlay", "pretrained", "features_only"])
def test_arguments_that_let_timm_read_other_files_are_refused(copy, name):
    change_config(copy, model_args={name: "elsewhere"})
    with pytest.raises(UserError, match=f"'model_args' holds {name}, which no encoder needs"):
        ReleasedModel.from_pretrained(copy)


@pytest.mark.parametrize("name", ["hf-hub:somebody/model", "local-dir:elsewhere", "resnet_of_mine"])
def test_an_architecture_is_a_name_that_timm_knows(copy, name):
    change_config(copy, architecture=name)
    with pytest.raises(UserError, match="unknown timm model"):
        ReleasedModel.from_pretrained(copy)


def test_a_config_without_the_weights_checksums_is_refused(copy):
    (copy / ENCODER).rename(copy / "model.bin")
    change_config(copy)
    with pytest.raises(UserError, match=f"no checksum of {ENCODER}"):
        ReleasedModel.from_pretrained(copy)


def test_a_missing_image_is_said(released):
    with pytest.raises(UserError, match="nothing.jpg: cannot be read: No such file"):
        ReleasedModel.from_pretrained(released.folder).read("nothing.jpg")
