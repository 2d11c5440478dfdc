"""Votes against counting by hand, the linear classifier against what it must find, and how images are dealt."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from udonlib.errors import UserError
from udonlib.evaluation.frozen.probes import deal, logistic_probe, vote
from udonlib.models.heads import unit


def clusters(n_classes: int = 4, n: int = 12, dim: int = 6, spread: float = 0.3) -> tuple[torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(dim)[:n_classes]
    vectors = centres.repeat_interleave(n, 0) + spread * torch.randn(n_classes * n, dim, generator=generator)
    return unit(vectors), np.repeat(np.arange(n_classes) * 10 + 3, n)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.floats(0.05, 0.95), st.integers(0, 9))
def test_images_of_every_class_are_dealt_to_both_sides(classes, share, seed):
    labels = np.array(classes)
    known, counts = np.unique(labels, return_counts=True)
    if counts.max() < 2:
        with pytest.raises(UserError, match=f"none of the {len(known)} classes has two images"):
            deal(labels, share, np.random.default_rng(seed))
        return
    labelled, asked = deal(labels, share, np.random.default_rng(seed))
    assert not set(labelled) & set(asked)
    for label, n in zip(known, counts, strict=True):
        n_labelled, n_asked = (labels[labelled] == label).sum(), (labels[asked] == label).sum()
        if n == 1:
            assert (n_labelled, n_asked) == (0, 0)
        else:
            assert n_labelled == min(n - 1, max(1, round(share * n)))
            assert n_labelled + n_asked == n
    assert (np.diff(labelled) > 0).all()
    assert (np.diff(asked) > 0).all()


def test_another_seed_deals_otherwise():
    labels = np.repeat([1, 2], 20)
    dealt = [deal(labels, 0.5, np.random.default_rng(seed))[0].tolist() for seed in (0, 0, 1)]
    assert dealt[0] == dealt[1] != dealt[2]


@settings(deadline=None)
@given(st.integers(1, 12), st.floats(0.02, 2), st.integers(0, 10**6))
def test_a_vote_is_counted_by_hand(k, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    labelled, asked = (unit(torch.randn(n, 5, generator=generator)) for n in (9, 4))
    labels = torch.randint(0, 3, (9,), generator=generator).numpy()
    expected = []
    for vector in asked.double():
        similarities = (labelled.double() @ vector).numpy()
        votes = dict.fromkeys(sorted(set(labels.tolist())), 0.0)
        for i in np.argsort(-similarities)[:k]:
            votes[int(labels[i])] += np.exp(similarities[i] / temperature)
        expected.append(max(votes, key=votes.__getitem__))
    assert vote(labelled, labels, asked, k, temperature).tolist() == expected


def test_many_far_neighbours_outvote_a_near_one_where_the_temperature_is_high():
    labelled = unit(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]]))
    labels, asked = np.array([7, 9, 9]), torch.tensor([[1.0, 0.0]])
    assert vote(labelled, labels, asked, 3, 0.07).tolist() == [7]
    assert vote(labelled, labels, asked, 3, 5.0).tolist() == [9]
    assert vote(labelled, labels, asked, 1, 5.0).tolist() == [7]


@pytest.mark.parametrize(("k", "temperature"), [(0, 1.0), (1, 0.0), (1, float("nan"))])
def test_a_vote_of_nobody_is_refused(k, temperature):
    with pytest.raises(ValueError, match="valid: k >= 1, temperature > 0"):
        vote(torch.eye(2), np.array([0, 1]), torch.eye(2), k, temperature)


def test_a_linear_classifier_finds_classes_that_a_plane_parts():
    vectors, labels = clusters()
    labelled, asked = deal(labels, 0.5, np.random.default_rng(0))
    probe = logistic_probe(vectors[labelled], labels[labelled])
    assert (probe.predict(vectors[asked]) == labels[asked]).mean() > 0.9
    assert probe.strength in probe.tried
    assert len(probe.tried) == 11


def test_the_strength_is_chosen_on_images_that_were_held_out():
    """Weak regularisation learns by heart that some images have the other's label."""
    truth, generator = np.tile([0, 1], 150), torch.Generator().manual_seed(3)
    vectors = torch.randn(300, 100, generator=generator)
    vectors[:, 0] += torch.from_numpy(truth) * 4
    labels = np.where(np.random.default_rng(0).random(300) < 0.15, 1 - truth, truth)
    probe = logistic_probe(vectors, labels, trials=8)
    best, by_heart = max(probe.tried.values()), max(probe.tried)
    surely_worse = best - (best * (1 - best) / 60) ** 0.5  # a standard error, of 60 images held out
    assert probe.tried[by_heart] < surely_worse <= probe.tried[probe.strength]
    assert all(found < surely_worse for strength, found in probe.tried.items() if strength > probe.strength)
    assert logistic_probe(vectors, labels, trials=8).tried == probe.tried
    assert logistic_probe(vectors, labels, trials=1).strength == 1.0


def test_where_held_out_images_say_nothing_as_much_is_learned_as_can_be():
    """The three images of a class are unlike each other, and those asked for are like them."""
    labels = np.repeat(np.arange(20), 3)
    vectors = unit(torch.randn(60, 40, generator=torch.Generator().manual_seed(1)))
    probe = logistic_probe(vectors, labels)
    assert max(probe.tried.values()) < 0.3
    assert probe.strength == max(probe.tried)
    assert (probe.predict(vectors) == labels).all()


def test_the_only_image_of_a_class_is_trained_on():
    vectors, labels = clusters(2)
    vectors, labels = torch.cat([vectors, -vectors[:1]]), np.append(labels, 99)
    assert logistic_probe(vectors, labels, trials=3).classifier.classes_.tolist() == [3, 13, 99]


def test_what_cannot_be_classified_is_refused():
    vectors, labels = clusters(1)
    with pytest.raises(UserError, match="found 1 class of 12 images"):
        logistic_probe(vectors, labels)
    vectors, labels = clusters(2)
    vectors[3, 0] = float("nan")
    with pytest.raises(UserError, match="found 1 vectors with values that are not finite"):
        logistic_probe(vectors, labels)
    with pytest.raises(ValueError, match="trials is 0"):
        logistic_probe(*clusters(2), trials=0)
