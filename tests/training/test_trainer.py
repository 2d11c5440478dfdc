"""The loop on a small catalog; killed processes are tested in test_runs.py."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.training import SMALL, make, predicting, same, weights
from udonlib.data.augmentation import augment
from udonlib.data.catalog import load_catalog
from udonlib.data.images import ImageReader
from udonlib.models.embedding_model import create_model
from udonlib.params import TrainParams
from udonlib.training.trainer import TrainingError


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return load_catalog(str(write_uned_tree(tmp_path_factory.mktemp("data"))))


@pytest.fixture(scope="module")
def trained(catalog):
    """What trains to the end once for each set of changes, with its state at every step, as it is saved."""

    @functools.cache
    def train(changes):
        trainer, states = make(catalog, **json.loads(changes), checkpoint_every=1), {}
        for record in trainer.train():
            if record["kind"] == "checkpoint":
                torch.save(dict(trainer.state_dict()), file := io.BytesIO())
                states[record["step"]] = file.getvalue()
        return trainer, states

    return lambda changes: train(json.dumps(changes))


def test_records_come_when_they_are_due(catalog):
    records = [(record["kind"], record["step"]) for record in make(catalog).train()]
    assert [step for kind, step in records if kind == "allocation"] == [0, 4, 8]
    assert [step for kind, step in records if kind == "validation"] == [5, 10, 11]
    assert {3, 6, 9, 11} <= {step for kind, step in records if kind == "checkpoint"}
    assert {2, 4, 6, 8, 10, 11} <= {step for kind, step in records if kind == "train"}


def test_the_window_s_mean_teacher_losses_become_the_next_weights(catalog):
    trainer = make(catalog, log_every=1, steps=8)
    records = list(trainer.train())
    sums = dict.fromkeys(catalog.names, 0.0)
    counts = dict.fromkeys(catalog.names, 0)
    for record in records:
        if record["kind"] == "train" and record["step"] <= 4:
            for domain, losses in record["losses"].items():
                sums[domain] += losses["ce_teacher"]
                counts[domain] += 1
    means = np.array([sums[name] / counts[name] for name in catalog.names])
    second = [record for record in records if record["kind"] == "allocation"][1]
    np.testing.assert_allclose(list(second["weights"].values()), means / means.sum(), rtol=1e-5)


@pytest.mark.parametrize("log_every", [1, 3, 7])
def test_how_often_losses_are_logged_changes_nothing(catalog, log_every):
    reference, other = make(catalog), make(catalog, log_every=log_every)
    list(reference.train())
    list(other.train())
    assert same(weights(reference), weights(other))


@pytest.mark.parametrize("at", [3, 4, 5, 6, 8, 9, 10])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"domains_per_batch": 2, "batch_size": 8},
        {"sampler": "dataset_size"},
        {"average_decay": 0.9, "distillation_ramp": 6, "sampler_smoothing": 0.5},
    ],
)
def test_a_restored_trainer_ends_in_the_same_bits(catalog, trained, at, changes):
    whole, states = trained(changes)
    torch.manual_seed(12345)  # another process has drawn other numbers
    second = make(catalog, **changes, checkpoint_every=1)
    second.load_state_dict(torch.load(io.BytesIO(states[at]), weights_only=True))
    list(second.train())
    assert same(weights(whole), weights(second))
    for a, b in zip(whole.learner.optimizer.state.values(), second.learner.optimizer.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert whole.sampler.weights.tolist() == second.sampler.weights.tolist()
    assert same(whole.kept.state_dict(), second.kept.state_dict())


def test_a_record_says_the_rate_and_the_mean_norm_of_the_gradient(catalog):
    trainer, norms = make(catalog, log_every=2, steps=4), []
    step = trainer.learner.step

    def noted(*arguments):
        terms, norm = step(*arguments)
        norms.append(norm.item())
        return terms, norm

    trainer.learner.step = noted
    found = {record["step"]: record["gradient_norm"] for record in trainer.train() if record["kind"] == "train"}
    assert len(norms) == 4
    for before, step in itertools.pairwise([0, *found]):
        assert found[step] == pytest.approx(sum(norms[before:step]) / (step - before))
    assert any(step - before > 1 for before, step in itertools.pairwise([0, *found]))
    assert min(norms) > 0


def test_another_objective_is_trained_logged_and_resumed_to_the_bit(catalog):
    changes = {"log_every": 1, "checkpoint_every": 1, "domains_per_batch": 2, "weight_decay": 0.1}

    def begin():
        return make(catalog, predicting(TrainParams(**SMALL)), **changes)

    whole, states, records = begin(), {}, []
    for record in whole.train():
        records.append(record)
        if record["kind"] == "checkpoint":
            torch.save(dict(whole.state_dict()), file := io.BytesIO())
            states[record["step"]] = file.getvalue()
    losses = [record["losses"] for record in records if record["kind"] == "train"]
    assert all(set(terms) == {"total", "brightness"} for domains in losses for terms in domains.values())
    assert all(0.1 < terms["brightness"] < 0.9 for domains in losses for terms in domains.values())
    allocation = [record["weights"] for record in records if record["kind"] == "allocation"][1]
    sums = {name: [domains[name]["total"] for domains in losses[:4] if name in domains] for name in catalog.names}
    means = np.array([np.mean(values) for values in sums.values()])
    np.testing.assert_allclose(list(allocation.values()), means / means.sum(), rtol=1e-5)  # allocated by `total`

    again = begin()
    again.load_state_dict(torch.load(io.BytesIO(states[6]), weights_only=True))
    list(again.train())
    assert same(weights(whole), weights(again))
    assert same(whole.learner.objective.state_dict(), again.learner.objective.state_dict())
    assert set(whole.learner.objective.state_dict()) == {
        *("projectors.0.weight", "projectors.0.bias", "projectors.1.weight", "projectors.1.bias", "running"),
    }
    assert set(weights(whole)) == set(weights(make(catalog)))  # none of it is in the model


def test_a_checkpoint_of_before_objectives_goes_on(catalog):
    whole, later = make(catalog), make(catalog)
    for record in whole.train():
        if record == {"kind": "checkpoint", "step": 6}:
            torch.save(dict(whole.state_dict()), file := io.BytesIO())
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert state.pop("objective") == {}
    later.load_state_dict(state)
    list(later.train())
    assert same(weights(whole), weights(later))


def test_state_of_an_objective_that_is_no_number_is_not_kept(catalog):
    trainer = make(catalog, predicting(TrainParams(**SMALL)))
    step = trainer.learner.step

    def broken(number, images, parts, slots):
        found = step(number, images, parts, slots)
        if number == 2:
            trainer.learner.objective.running = torch.full((3,), float("nan"))
        return found

    trainer.learner.step = broken
    with pytest.raises(TrainingError, match="step 3: running is not finite any more"):
        list(trainer.train())


def test_what_is_kept_is_the_moving_average_of_weights_and_statistics(catalog):
    trainer = make(catalog, average_decay=0.9, steps=3, log_every=1, checkpoint_every=1)
    expected = None
    for record in trainer.train():
        if record["kind"] == "checkpoint":
            now = weights(trainer)
            if expected is None:
                expected = create_model(trainer.params, catalog.n_classes).state_dict()
            decay = min(0.9, record["step"] / (record["step"] + 10))
            for name, value in now.items():
                expected[name] = decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value
    for name, value in trainer.kept.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    assert not same(trainer.kept.state_dict(), weights(trainer))


def test_training_stops_when_validations_have_not_improved_for_the_patience(catalog):
    trainer = make(catalog, steps=40, eval_every=4, patience=2)
    scores = iter([3.0, 5.0, 4.0, 4.5, 9.0])
    row = {"embedder": "student", "index": "merged", "domain": "mean"}
    trainer._validate = lambda model: pd.DataFrame([row | {"r_at_1": next(scores)}])
    records = list(trainer.train())
    assert [record["step"] for record in records if record["kind"] == "validation"] == [4, 8, 12, 16]
    assert records[-1] == {"kind": "checkpoint", "step": 16}
    again = make(catalog, steps=40, eval_every=4, patience=2)
    again.load_state_dict(trainer.state_dict())
    assert list(again.train()) == []


@pytest.mark.parametrize(("frozen_steps", "validated"), [(12, [4, 8, 12, 16, 20]), (40, [4, 8, 12])])
def test_patience_waits_until_the_backbone_thaws_if_it_ever_does(catalog, frozen_steps, validated):
    trainer = make(catalog, steps=40, eval_every=4, patience=2, frozen_steps=frozen_steps)
    scores = iter([5.0, 4.0, 3.0, 4.5, 4.5])
    row = {"embedder": "student", "index": "merged", "domain": "mean"}
    trainer._validate = lambda model: pd.DataFrame([row | {"r_at_1": next(scores)}])
    assert [record["step"] for record in trainer.train() if record["kind"] == "validation"] == validated


def test_another_seed_gives_another_training(catalog):
    first, second = make(catalog), make(catalog, seed=1)
    list(first.train())
    list(second.train())
    assert not same(weights(first), weights(second))


def test_every_domain_s_images_are_counted(catalog):
    records = list(make(catalog, sampler="round_robin").train())
    last = [record for record in records if record["kind"] == "allocation"][-1]
    assert sum(last["images_seen"].values()) == 8 * 8
    last = [record for record in records if record["kind"] == "train"][-1]
    assert sum(last["images_seen"].values()) == 11 * 8


def test_slots_of_a_mixed_batch_add_up_to_the_batch(catalog):
    trainer = make(catalog, domains_per_batch=4)
    plan = trainer.plan_window()
    assert len(plan) == 4
    assert all(sum(len(indices) for _, indices in step) == 8 for step in plan)
    assert all(len({name for name, _ in step}) == len(step) for step in plan)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_run_whose_loss_is_not_finite_stops_before_the_next_checkpoint(catalog, where):
    trainer = make(catalog)
    step = trainer.learner.step

    def broken(number, images, parts, slots):
        terms, norm = step(number, images, parts, slots)
        if number == 6 and where == "loss":
            name = parts[0][0]
            terms = copy.deepcopy(terms)
            terms[name]["kl"] = terms[name]["kl"] * float("nan")
        return terms, norm * (float("inf") if number == 6 and where == "gradient" else 1)

    trainer.learner.step = broken
    saved = []
    with pytest.raises(TrainingError, match=r"step 7: (kl of domain '\w+' is nan|the gradient is not finite)"):
        for record in trainer.train():
            saved += [record["step"]] * (record["kind"] == "checkpoint")
    assert saved == [3, 5, 6]
    assert trainer.step == 8  # whose record was to be logged


@pytest.mark.parametrize("due", [{"eval_every": 7}, {"eval_every": 99, "checkpoint_every": 7}])
@pytest.mark.parametrize("averaged", [0.0, 0.5])
def test_weights_that_are_no_numbers_are_neither_validated_nor_kept(catalog, due, averaged):
    trainer = make(catalog, average_decay=averaged, **due)
    step, validate, asked = trainer.learner.step, trainer._validate, []

    def broken(number, images, parts, slots):
        found = step(number, images, parts, slots)  # the losses of this step are of the weights before
        if number == 6:
            next(trainer.model.student.parameters()).data.view(-1)[0] = float("nan")
        return found

    trainer.learner.step = broken
    trainer._validate = lambda model: asked.append(trainer.step) or validate(model)
    saved = []
    with pytest.raises(TrainingError, match=r"step 7: student\S+ is not finite .*warmup_steps.*max_grad"):
        saved += [record["step"] for record in trainer.train() if record["kind"] == "checkpoint"]
    assert asked == []


def test_only_better_validations_are_best(catalog):
    trainer = make(catalog)
    scores = iter([3.0, 2.0, 5.0])
    trainer._validate = lambda model: pd.DataFrame(
        [{"embedder": "student", "index": "merged", "domain": "mean", "r_at_1": next(scores)}]
    )
    assert [record["best"] for record in trainer.train() if record["kind"] == "validation"] == [True, False, True]
    assert trainer.best == 5.0


def test_every_image_goes_into_the_step_with_its_own_label_and_domain(catalog):
    trainer = make(catalog, augmentation="none", domains_per_batch=4)
    reader = ImageReader(catalog, 32, "train")
    label_of = {}  # by pixels: what the step sees says which image it is
    for domain in catalog.domains:
        images = reader.read(domain.name, "train", np.arange(len(domain.train_labels)))
        label_of |= {
            image.float().numpy().tobytes(): (domain.name, label)
            for image, label in zip(images, domain.train_labels.tolist(), strict=True)
        }
    step, seen = trainer.learner.step, []

    def watched(number, images, parts, slots):
        seen.extend(
            zip(
                [label_of[image.numpy().tobytes()] for image in images],
                [(name, label) for name, labels in parts for label in labels.tolist()],
                strict=True,
            )
        )
        return step(number, images, parts, slots)

    trainer.learner.step = watched
    list(trainer.train())
    assert len(seen) == 11 * 8
    assert all(shown == told for shown, told in seen)
    assert len({label for _, (_, label) in seen}) > 2


def test_each_domain_is_augmented_in_its_own_way(catalog, monkeypatch):
    import udonlib.training.trainer

    kinds_seen = set()

    def watched(images, kinds, *rest):
        kinds_seen.update(kinds)
        return augment(images, kinds, *rest)

    monkeypatch.setattr(udonlib.training.trainer, "augment", watched)
    list(make(catalog, domains="flags,emoji", augmentation_by_domain={"emoji": "affine_colour"}).train())
    assert kinds_seen == {"affine", "affine_colour"}


def test_training_images_grow_to_their_size(catalog, monkeypatch):
    trainer = make(catalog, start_image_size=16, growing_steps=4, steps=6, augmentation="crop_flip")
    step, sizes = trainer.learner.step, []

    def watched(number, images, parts, slots):
        sizes.append(tuple(images.shape[2:]))
        return step(number, images, parts, slots)

    monkeypatch.setattr(trainer.learner, "step", watched)
    list(trainer.train())
    assert sizes == [(16, 16), (16, 16), (24, 24), (24, 24), (32, 32), (32, 32)]


def test_a_small_training_image_is_the_whole_image(catalog):
    """It is scaled, not cut out: what is seen small at first is seen large in the end."""
    trainer = make(catalog, start_image_size=16, growing_steps=4, augmentation="none")
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    images[:, :, :, 16:] = 200
    seen = []
    trainer.learner.step = lambda number, views, parts, slots: (
        seen.append(views),
        ({name: {} for name, _ in parts}, torch.zeros(())),
    )[1]
    [(name, _), *_] = trainer._labels.items()
    slots = [(name, np.arange(8) % 2)]
    trainer._train_step(images, slots, slots)
    assert (seen[0][:, :, :, :7] < 1).all()
    assert (seen[0][:, :, :, 9:] > 199).all()


def test_signs_of_life_come_between_records_and_change_nothing(catalog):
    quiet, telling = make(catalog, log_every=100), make(catalog, log_every=100)
    telling.sign_every = 0.0
    plain = [(record["kind"], record["step"]) for record in quiet.train()]
    signs = [record for record in telling.train() if record["kind"] == "progress"]
    assert {record["step"] for record in signs} == {1, 2, 7}  # every step without another record
    assert all(record["images_per_s"] > 0 for record in signs)
    assert not [record for record in plain if record[0] == "progress"]
    assert same(weights(quiet), weights(telling))
