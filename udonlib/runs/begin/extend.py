"""More steps for a run that is finished: what it is trained with then, and what that means."""

from __future__ import annotations

from collections.abc import Set

from udonlib.errors import UserError
from udonlib.params import TrainParams
from udonlib.runs.begin.origins import differences
from udonlib.runs.folder import RunFolder


def with_more_steps(run: RunFolder, params: TrainParams) -> TrainParams:
    """The parameters that a run is trained with where more steps are asked of it than it has, by `extend` or `steps`.

    The step at which it was finished, or else its last one, becomes a seam: see `TrainParams.part_at`. Whoever asks
    for what the run was given already, or for what it had before, gets it as it is; `steps` alone lengthens a run that
    is finished, and no other.
    """
    target, more = params.steps + params.extend, params.extend > 0

    def lengthened(steps: int, seams: tuple[int, ...]) -> TrainParams:
        # The name of the folder is that of the run as it began.
        return params.model_copy(update={"steps": steps, "seams": seams, "extend": 0, "run": run.path.name})

    if run.status == "new" or params.overwrite:
        return lengthened(target, (params.steps,)) if more else params
    before = run.params
    if before.seams and target <= before.steps:
        return lengthened(before.steps, before.seams)
    if target <= before.steps or not (more or run.status == "finished"):
        return params.model_copy(update={"extend": 0})
    ended = run.summary()["steps"] if run.status == "finished" else before.steps
    return lengthened(target, (*before.seams, ended))


def to_go_on_with(run: RunFolder, params: TrainParams, changeable: Set[str]) -> TrainParams:
    """The parameters that a run is trained with, which are those that it began with, but for more steps.

    Args:
        changeable: parameters that may differ.

    Raises:
        UserError: "run 'x' exists and differs in scale: ...".
    """
    goes_on = run.status != "new" and not params.overwrite
    params = with_more_steps(run, params)
    if not goes_on:
        return params
    before = run.params
    if params.seams and params.seams[: len(before.seams)] == before.seams:  # it is given more steps
        before = before.model_copy(update={"steps": params.steps, "seams": params.seams})
    if before.precision == "auto":  # written by hand
        before = before.model_copy(update={"precision": params.precision})
    differing = differences(before, params, changeable)
    if differing:
        raise UserError(
            f"run {run.path.name!r} exists and differs in {'; '.join(differing)}. "
            "Give this one another name (run=...), or replace that one (overwrite=true)"
        )
    return params


def what_more_means(params: TrainParams, step: int) -> str:
    """Say what happens to a run at `step` that was given more steps; "" where it was not, or not yet."""
    start, length = params.part_at(step)
    if not start:
        return ""
    rates = "stay as they are"
    if params.rate_schedule == "cosine":
        rates = "begin anew at their full height, without a warm-up, and come down to 0 at its end"
    return f"this run was finished at step {start:,} and is given {length:,} more; in these the learning rates {rates}"
