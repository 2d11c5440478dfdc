"""release.ipynb: a release as it is shown, and held against what is loaded of it."""

import numpy as np
import pytest
import torch

from udonlib.errors import UserError
from udonlib.lab.use import release_page
from udonlib.lab.use.use_params import ReleaseParams
from udonlib.release.folder import FILES, ReleasedModel
from udonlib.release.release import Released


@pytest.fixture(scope="module")
def params(results):
    return ReleaseParams(outputs=str(results), licence="CC0-1.0")


@pytest.fixture(scope="module")
def released(params):
    return release_page.made(params, live=False)


def test_it_is_made_where_the_parameters_say_with_the_licence(released, results, params):
    assert released.folder == results / "releases" / "small"
    assert "| this model | CC0-1.0 |" in (released.folder / "README.md").read_text()
    with pytest.raises(UserError, match=r"parameter 'run': no run 'smal'.*did you mean 'small'\?"):
        release_page.made(params.model_copy(update={"run": "smal"}), live=False)


def test_tables_say_what_metrics_say(released):
    files, compared = str(release_page.files_table(released)), str(release_page.comparison_table(released))
    assert all(name in files for name in FILES)
    onnx = released.metrics["onnx"]
    for words in (
        f"of {onnx['n_queries']} queries: {onnx['n_same']} are the same 10 images",
        f"{onnx['max_difference']:.1e}",
    ):
        assert words in compared


@pytest.mark.parametrize("hopeless", [True, False])
def test_what_is_hopeless_is_said_in_words(released, hopeless):
    rows = [
        row | {"verdict": "hopeless" if hopeless and row["vectors"] == "binary" else row["verdict"] and "worse"}
        for row in released.metrics["vectors"]
    ]
    text = str(release_page.vectors_table(Released(released.folder, released.config, {"vectors": rows})))
    assert ("points lost: binary, binary re-ranked." in text) == hopeless
    assert ("None of these is hopeless" in text) == (not hopeless)


def test_the_chart_has_every_way_alone_and_re_ranked(released):
    fig = release_page.vectors_chart(released)
    assert [len(trace.x) for trace in fig.data] == [3, 3]
    assert [text.split("<br>")[0] for text in fig.layout.xaxis.ticktext] == ["float16", "int8", "binary"]


def test_the_card_keeps_its_code_and_is_set_below_the_page(released):
    text = release_page.card_of(released).data
    assert text.startswith("### small")
    assert "\n#### Licences" in text
    assert "library_name" not in text
    assert "# this folder" in text
    assert "### uint8" not in text


def test_three_ways_give_one_embedding_and_another_model_is_refused(released, params, capsys):
    photo = release_page.photo(released, params)
    model = ReleasedModel.from_pretrained(released.folder)
    whole = model.embed(model.read(photo.file)[None])
    with torch.no_grad():
        features = release_page.encoder(released, print)(photo.ready)
    assert "timm does not know the encoder 'small_resnet'" in capsys.readouterr().out
    table = release_page.same_table(released, {"whole": whole, "parts": release_page.headed(released, features)})
    assert "parts" in str(table)
    with pytest.raises(UserError, match="small: other gives another embedding: values differ by"):
        release_page.same_table(released, {"whole": whole, "other": np.roll(whole.numpy(), 1)})
