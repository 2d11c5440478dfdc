"""Votes of neighbours, and the threshold of "none of these"."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.search import MODEL, OTHER, clusters
from udonlib.errors import UserError
from udonlib.search.classify import NONE, TEMPERATURE, calibrate, classify, tradeoff, votes
from udonlib.search.embed import Embeddings
from udonlib.search.index import build_index

MADE = clusters(600, spread=0.2)


@settings(max_examples=60)
@given(
    neighbours=st.lists(
        st.tuples(st.floats(-1, 1, width=32), st.sampled_from([None, "a", "b", "c"])), min_size=1, max_size=8
    )
)
def test_votes_are_counted_as_by_hand(neighbours):
    neighbours = sorted(neighbours, key=lambda each: -each[0])
    values = np.array([[value for value, _ in neighbours]], dtype=np.float32)
    labels = np.array([label for _, label in neighbours], dtype=object)
    [winner], [score] = votes(values, np.arange(len(neighbours))[None], labels)
    heard = [(value, label) for value, label in neighbours if label]
    if not heard:
        assert winner is None
        assert np.isneginf(score)
        return
    weights = {v: np.exp((v - heard[0][0]) / TEMPERATURE) for v, _ in heard}
    counts = {label: sum(weights[v] for v, other in heard if other == label) for _, label in heard}
    assert counts[winner] == pytest.approx(max(counts.values()))
    of_winner = sum(weights[v] * v for v, label in heard if label == winner)
    assert score == pytest.approx(of_winner / sum(counts.values()), abs=1e-6)


def test_missing_neighbours_do_not_vote():
    values, rows = np.array([[0.5, -np.inf]], dtype=np.float32), np.array([[1, -1]])
    assert votes(values, rows, np.array(["a", "b"], dtype=object))[0] == ["b"]


def test_the_threshold_gives_labels_to_few_images_of_unknown_classes():
    index = build_index(MADE)
    found = calibrate(index, false_labels=0.1)
    assert index.answers == found
    assert found["right"] >= found["right_without"] > 0.9
    assert found["answered"] > 0.7
    assert found["false_labels"] < 0.2
    strangers = clusters(500, n_classes=20, spread=0.2, seed=5)
    centres = np.random.default_rng(123).standard_normal((20, 12))
    unknown = centres[np.arange(500) % 20] + 0.2 * np.random.default_rng(4).standard_normal((500, 12))
    unknown = (unknown / np.linalg.norm(unknown, axis=1, keepdims=True)).astype(np.float32)
    assert (classify(index, unknown)["answer"] != NONE).mean() < 0.25
    answers = classify(index, strangers.vectors)
    named = strangers.images["domain"] + "/" + strangers.images["label"]
    answered = answers["answer"] != NONE
    assert answered.mean() > 0.7
    assert (answers["answer"] == named)[answered].mean() > 0.95
    assert (answers["nearest_class"] == named).mean() > 0.9
    assert (answers["score"][answered] >= found["threshold"]).all()


def test_more_false_labels_allowed_means_more_answers():
    index = build_index(MADE)
    shares = [calibrate(index, false_labels=a)["answered"] for a in (0.01, 0.2, 0.6)]
    assert shares == sorted(shares)


def test_what_other_thresholds_would_cost_is_told_and_nothing_is_kept():
    index = build_index(MADE)
    table = tradeoff(index, (0.01, 0.2, 0.6))
    assert index.answers == {}
    assert table["allowed"].tolist() == [0.01, 0.2, 0.6]
    for row in table.to_dict("records"):
        share = row.pop("allowed")
        assert {"column": "label", "k": 10} | row == calibrate(index, false_labels=share)
    with pytest.raises(UserError, match="parameter 'false_labels': found 0, expected more than 0"):
        tradeoff(index, (0.1, 0))


def test_the_same_seed_gives_the_same_threshold_and_images_removed_do_not_count():
    index = build_index(MADE)
    first = calibrate(index, seed=3)
    assert calibrate(index, seed=3) == first
    index.remove([image for image, label in zip(MADE.ids, MADE.images["label"], strict=True) if label == "class 3"])
    calibrate(index)
    third = MADE.vectors[(MADE.images["label"] == "class 3").to_numpy()]
    assert "odd/class 3" not in set(classify(index, third)["nearest_class"])


def test_held_out_images_calibrate_in_place_of_those_of_the_index():
    index = build_index(MADE)
    held_out = clusters(400, spread=0.2, seed=8)
    found = calibrate(index, held_out=held_out, false_labels=0.1)
    assert found["n_calibrated"] + found["n_checked"] == 400
    assert found["right"] > 0.9
    with pytest.raises(UserError, match="this index: an index of model 'small'"):
        calibrate(index, held_out=Embeddings(held_out.vectors, held_out.images, OTHER))
    with pytest.raises(UserError, match="no column 'label'"):
        calibrate(index, held_out=Embeddings(held_out.vectors, held_out.images[["id"]], MODEL))


def test_a_filter_and_the_query_itself_are_left_out_of_the_vote():
    index = build_index(MADE)
    calibrate(index)
    odd = classify(index, MADE.vectors[:20], where={"domain": "odd"})["nearest_class"]
    assert odd.str.startswith("odd/").all()
    alone = index.images["label"].to_numpy().copy()
    alone[7] = "alone"
    index.images["label"] = alone
    index.answers["k"] = 1
    assert "alone" in classify(index, MADE.vectors[7:8])["nearest_class"][0]
    assert "alone" not in classify(index, MADE.vectors[7:8], exclude=np.array([7]))["nearest_class"][0]


def test_what_cannot_be_calibrated_is_said():
    index = build_index(MADE)
    with pytest.raises(UserError, match="has no threshold of 'none of these' yet"):
        classify(index, MADE.vectors[:1])
    with pytest.raises(UserError, match=r"parameter 'column': no column 'lable'; did you mean 'label'\?"):
        calibrate(index, "lable")
    with pytest.raises(UserError, match="parameter 'false_labels': found 1, expected more than 0"):
        calibrate(index, false_labels=1)
    unlabelled = MADE.images.assign(label=pd.Series([None] * 600, dtype=object))
    with pytest.raises(UserError, match="0 images of 0 classes by 'label' have another of their class, expected 40"):
        calibrate(build_index(Embeddings(MADE.vectors, unlabelled, MADE.model)))
    few = Embeddings(MADE.vectors[:30], MADE.images[:30], MADE.model)
    with pytest.raises(UserError, match="images of .* classes by 'label' have another"):
        calibrate(build_index(few))
