"""sampler.npz and sampler_trainer.npz."""

from __future__ import annotations

import re

import numpy as np

from udonlib.training.sampler import (
    draw_schedule,
    initial_weights,
    round_robin_schedule,
    steps_per_domain,
    updated_weights,
)

TOLERANCE = 1e-6
STRATEGY = {"specialist_top_steps": "fixed"}  # theirs -> ours, where the names differ


def window_sums(domains, losses, n_images, n_domains):
    """Loss sums and image counts by domain of a window's steps."""
    return (
        np.bincount(domains, weights=losses, minlength=n_domains),
        np.bincount(domains, weights=n_images, minlength=n_domains),
    )


def test_initial_weights_and_steps_of_every_strategy(golden, agree):
    arrays = golden("sampler")
    cases = [match for key in arrays if (match := re.fullmatch(r"(init/(.+)/T(\d+))/weights__f64", key))]
    assert cases
    for match in cases:
        prefix, strategy, n_steps = match[1], match[2], int(match[3])
        sizes = arrays["uned/specialist_top_steps" if strategy in STRATEGY else "uned/n_train_images"]
        weights = initial_weights(STRATEGY.get(strategy, strategy), sizes.tolist())
        agree(prefix, weights, arrays[f"{prefix}/weights__f64"], TOLERANCE)
        if strategy == "round_robin":
            schedule = round_robin_schedule(len(sizes), n_steps)
            first = arrays[f"{prefix}/first_20"]
            np.testing.assert_array_equal(schedule[: len(first)], first)
        else:
            schedule = draw_schedule(weights, n_steps, np.random.default_rng(0))
            np.testing.assert_array_equal(steps_per_domain(weights, n_steps), arrays[f"{prefix}/steps_per_domain"])
        counts = np.bincount(schedule, minlength=len(sizes))
        np.testing.assert_array_equal(counts, arrays[f"{prefix}/steps_per_domain"], err_msg=prefix)


def test_the_update_of_the_weights(golden, agree):
    arrays = golden("sampler")
    cases = [match[1] for key in arrays if (match := re.fullmatch(r"(update/.+)/weights_before__f64", key))]
    assert cases
    for prefix in cases:
        before = arrays[f"{prefix}/weights_before__f64"]
        sums = window_sums(
            *(arrays[f"{prefix}/window_{name}"] for name in ("domain", "loss_sum", "n_examples")), len(before)
        )
        after = updated_weights(before, *sums)
        agree(prefix, after, arrays[f"{prefix}/weights_after__f64"], TOLERANCE)
        found = steps_per_domain(after, int(arrays[f"{prefix}/total_steps"]))
        np.testing.assert_array_equal(found, arrays[f"{prefix}/steps_per_domain"], err_msg=prefix)


def test_the_log_of_the_reference_s_loop(golden, agree):
    arrays = golden("sampler_trainer")
    n_domains = int(arrays["n_domains"])
    weights = arrays["update/weights_before__f64"][0]
    for i, (first, last) in enumerate(arrays["update/window_first_last"]):
        agree(f"before {i}", weights, arrays["update/weights_before__f64"][i], TOLERANCE)
        window = slice(first - 1, max(last, first - 1))  # steps count from 1; first > last is an empty window
        names = ("domain_of_step", "teacher_loss_sum_of_step__f64", "n_examples_of_step")
        weights = updated_weights(weights, *window_sums(*(arrays[name][window] for name in names), n_domains))
        agree(f"after {i}", weights, arrays["update/weights_after__f64"][i], TOLERANCE)
        found = steps_per_domain(weights, int(arrays["total_steps"]))
        np.testing.assert_array_equal(found, arrays["update/steps_per_domain"][i])
