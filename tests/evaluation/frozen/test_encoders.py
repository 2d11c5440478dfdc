"""One pass of encoders that know everything, or nothing, over pictures that show their class, domain and figure."""

import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.helpers.catalogs import write_tree
from udonlib.data.catalog import load_catalog
from udonlib.data.images import ImageReader
from udonlib.errors import UserError
from udonlib.evaluation.evaluate import evaluate
from udonlib.evaluation.frozen.encoders import TOGETHER, EncoderScores, evaluate_encoders, model_encoder
from udonlib.evaluation.frozen.relative import relative_to_best
from udonlib.evaluation.reading import loading, pixels
from udonlib.models.backbones import create_backbone
from udonlib.models.embedding_model import EmbeddingModel
from udonlib.models.heads import unit

SIDE = 16


def drawing(label: int, domain: int, seed: int, opaque: bool = False) -> bytes:
    """A figure of two rectangles: its red is the class, its green the domain, its blue 0; the rest is transparent."""
    rng = np.random.default_rng(seed)
    image = np.zeros((SIDE, SIDE, 4), np.uint8)
    for _ in range(2):
        top, left, height, width = rng.integers(0, 9, 2).tolist() + rng.integers(3, 8, 2).tolist()
        image[top : top + height, left : left + width] = (10 * label, 50 * domain, 0, 255)
    buffer = io.BytesIO()
    pixels = Image.fromarray(image)
    if opaque:
        pixels = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
    pixels.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def tree(tmp_path):
    """Three domains: drawings, drawings with an index of their own, and pictures without alpha."""
    files = {}
    for number, (domain, opaque) in enumerate({"emoji": False, "flags": False, "photos": True}.items()):
        splits = {"train": [0, 1, 2], "val": [3], "test": [4, 5, 6]} | ({"index": [4, 5, 6, 3]} if number == 1 else {})
        for split, classes in splits.items():
            rows = []
            for label in classes:
                for i in range(6):
                    path = f"{domain}/{split}{label}_{i}.png"
                    rows.append({"path": path, "class_id": label})
                    seed = 1000 * number + 100 * label + 10 * i + (split == "index")
                    files[f"images/{path}"] = drawing(label, number, seed, opaque)
            files[f"info_files/{domain}/{split}.json"] = json.dumps(rows).encode()
    return write_tree(tmp_path / "data", files)


def knows(images):
    """Class and domain as a unit vector, and the mask itself as patches."""
    red, green, blue = images.amin((2, 3)).float().unbind(1)
    number = (red / 10 + 10 * green / 50).round().long()
    blue = F.interpolate(images[:, 2:].float(), (48, 48), mode="bilinear", align_corners=False)
    return {"class": 3 * torch.eye(40)[number], "patches": (blue.flatten(1)[:, :, None] <= 127.5).float()}


def constant(images):
    return {"class": torch.ones(len(images), 4), "patches": torch.ones(len(images), 9, 4)}


def seen(images):
    """Something of the picture: a class token of 12 numbers, patches of 4 x 4."""
    small = F.adaptive_avg_pool2d(images.float(), 4)
    return {"class": F.adaptive_avg_pool2d(images.float(), 2).flatten(1), "patches": small.flatten(2).mT}


def also_seen(images):
    small = F.adaptive_avg_pool2d(255 - images.float(), 2).pow(1.5)
    return {"class": small.flatten(1)[:, 3:], "patches": small.flatten(2).mT}


def without_patches(images):
    return {"class": seen(images)["class"]}


def run(tree, encoders, **options):
    catalog = load_catalog(str(tree))
    reader = ImageReader(catalog, SIDE, "eval", on_bad_image=options.pop("on_bad_image", "error"))
    return evaluate_encoders(encoders, catalog, loading(reader), **options)


def test_who_knows_all_is_always_right_and_who_says_the_same_of_all_is_not(tree):
    scores = run(tree, {"knows": knows, "constant": constant}, batch_size=7)
    table = scores.table()
    assert list(table) == ["group", "metric", "encoder", "emoji", "flags", "photos", "mean"]
    rows = table.set_index(["encoder", "metric"]).drop(columns="group")
    for metric in ("r_at_1", "mmp_at_5", "logistic", "knn"):
        assert rows.loc["knows", metric].tolist() == [100] * 4
        assert rows.loc["constant", metric]["mean"] < 60
    assert rows.loc["constant", "logistic"]["emoji"] == pytest.approx(100 / 3)
    dense = rows.loc["knows", "mean_iou"]
    assert dense[["emoji", "flags", "mean"]].tolist() == [100] * 3
    assert np.isnan(dense["photos"])  # no alpha, no task
    assert rows.loc["constant", "mean_iou"]["mean"] < 50


def test_each_encoder_sees_each_image_once(tree):
    counts = dict.fromkeys(("a", "b"), 0)

    def counting(name):
        def encode(images):
            counts[name] += len(images)
            return seen(images)

        return encode

    calls = []
    run(tree, {name: counting(name) for name in counts}, batch_size=5, progress=lambda *call: calls.append(call))
    n = 3 * 18 + 24 + 2 * 18  # queries, the index of flags, the training images of the two that have masks
    assert counts == {"a": n, "b": n}
    images = [done for what, done, total in calls if what == "images" and total == n]
    assert images == sorted(images)
    assert images[-1] == n
    assert calls[-1][0] == "probes"
    assert calls[-1][1] == calls[-1][2] == 2 * 3  # encoders, domains that have a classification task


def test_retrieval_is_that_of_evaluate(tree):
    scores = run(tree, {"pixels": lambda images: {"class": 7 * pixels(images)}})
    catalog = load_catalog(str(tree))
    load = loading(ImageReader(catalog, SIDE, "eval"))
    expected = evaluate(catalog, "test", load, image_embedders={"pixels": pixels}).outcomes
    expected = expected[expected["index"] == "merged"].reset_index(drop=True)
    for metric in ("r_at_1", "mmp_at_5"):
        found = scores.outcomes.query("group == 'retrieval' and metric == @metric").reset_index(drop=True)
        assert found[["domain", "path"]].equals(expected[["domain", "path"]])
        np.testing.assert_allclose(found["score"], expected[metric])


def test_all_teachers_together_are_an_encoder_that_says_what_each_says(tree):
    def both(images):
        a, b = seen(images), also_seen(images)
        finer = F.interpolate(unit(b["patches"]).mT.reshape(-1, 3, 2, 2), (4, 4), mode="bilinear", align_corners=False)
        patches = unit(torch.cat([unit(a["patches"]), unit(finer.flatten(2).mT)], dim=2))
        return {"class": torch.cat([unit(a["class"]), unit(b["class"])], dim=1), "patches": patches}

    scores = run(tree, {"a": seen, "b": also_seen, "both": both}, teachers=("a", "b"))
    parts = {
        name: part.drop(columns="encoder").reset_index(drop=True) for name, part in scores.outcomes.groupby("encoder")
    }
    assert set(parts) == {"a", "b", "both", TOGETHER}
    pd.testing.assert_frame_equal(
        parts["both"].sort_values(list(parts["both"])[:4], ignore_index=True),
        parts[TOGETHER].sort_values(list(parts["both"])[:4], ignore_index=True),
        atol=1e-6,
    )
    assert not parts["a"]["score"].equals(parts[TOGETHER]["score"])


def test_the_same_seed_gives_the_same_scores_whatever_the_batches(tree):
    one, other = (run(tree, {"a": seen}, batch_size=size).outcomes for size in (5, 64))
    pd.testing.assert_frame_equal(one, other)
    assert not one["path"].equals(run(tree, {"a": seen}, seed=1).outcomes["path"])


def test_an_encoder_without_patches_has_no_dense_task_and_none_is_drawn_of_no_images(tree):
    scores = run(tree, {"a": seen, "plain": without_patches}, teachers=("a", "plain"))
    dense = scores.outcomes[scores.outcomes["group"] == "dense"]
    assert set(dense["encoder"]) == {"a"}
    assert "dense" not in set(run(tree, {"a": seen}, n_dense=0).outcomes["group"])


def test_the_class_token_of_an_encoder_that_has_none_is_the_mean_over_its_patches(tree):
    patches_alone = lambda images: {"patches": seen(images)["patches"]}  # noqa: E731
    pooled = lambda images: {"class": seen(images)["patches"].mean(1), "patches": seen(images)["patches"]}  # noqa: E731
    outcomes = run(tree, {"a": patches_alone, "b": pooled}).outcomes
    a, b = (outcomes.loc[outcomes["encoder"] == name, "score"].tolist() for name in "ab")
    assert a == b


def test_images_that_cannot_be_read_take_no_part(tree):
    bad = ["emoji/test4_0.png", "flags/index5_1.png", "emoji/train0_2.png"]
    write_tree(tree, {f"images/{path}": b"no image" for path in bad})
    scores = run(tree, {"a": knows}, on_bad_image="skip")
    # That one cannot be read is known of the training image before it is drawn: its mask cannot be read either.
    assert [tuple(row) for row in scores.skipped.to_numpy()] == [("emoji", "test", bad[0]), ("flags", "index", bad[1])]
    assert bad[0] not in set(scores.outcomes["path"])
    assert scores.outcomes.groupby("metric")["score"].mean().to_dict() == dict.fromkeys(scores.outcomes["metric"], 1)


def test_a_domain_of_which_nothing_can_be_read_is_refused(tree):
    for path in (tree / "images" / "photos").glob("test*"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="photos/test: none of 18 images can be read"):
        run(tree, {"a": knows}, on_bad_image="skip")


def test_scores_are_read_as_they_were_written(tree, tmp_path):
    scores = run(tree, {"1": seen, "NA": knows})
    scores.save(tmp_path)
    again = EncoderScores.load(tmp_path)
    pd.testing.assert_frame_equal(again.outcomes, scores.outcomes)
    pd.testing.assert_frame_equal(again.table(), scores.table())
    with pytest.raises(UserError, match="missing"):
        EncoderScores.load(tmp_path / "nowhere")


def test_a_student_is_compared_with_its_teachers(tree):
    scores = run(tree, {"student": knows, "a": seen, "b": constant}, teachers=("a", "b"))
    gains = relative_to_best(scores, ["student"], ["a", "b"])
    assert (gains.loc[gains["group"] == "all", "points"] > 0).all()
    assert set(gains["group"]) == {"retrieval", "classification", "dense", "all"}


def test_what_cannot_be_evaluated_is_refused(tree):
    with pytest.raises(UserError, match="teacher 'c' is none of the encoders: a"):
        run(tree, {"a": seen}, teachers=("c",))
    with pytest.raises(UserError, match=f"expected one or more, none '{TOGETHER}'"):
        run(tree, {TOGETHER: seen})
    with pytest.raises(UserError, match="found none; expected one or more"):
        run(tree, {})

    def broken(kind):
        def encode(images):
            said = seen(images)
            said[kind][0, ..., 0] = float("nan")
            return said

        return encode

    for kind in ("class", "patches"):
        with pytest.raises(UserError, match="encoder 'a': its tokens of 1 of 18 images are not finite"):
            run(tree, {"a": broken(kind)})
    odd = lambda images: seen(images) | {"patches": torch.ones(len(images), 5, 2)}  # noqa: E731
    with pytest.raises(UserError, match="encoder 'a' gives 5 patches an image"):
        run(tree, {"a": odd})


def test_a_model_of_ours_says_its_embedding_and_its_patches():
    backbone = create_backbone("small_resnet", pretrained=False, image_size=32, arguments={"width": 4})
    model = EmbeddingModel(backbone, {"a": 3}, student_dim=8).train()
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = model_encoder(model)(images)
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(tokens["class"], model.embed(images), rtol=0, atol=0)
        torch.testing.assert_close(tokens["patches"], model.tokens(images, end=True)[-1]["patches"], rtol=0, atol=0)
    assert not tokens["class"].requires_grad
    assert set(model_encoder(model, patches=False)(images)) == {"class"}
