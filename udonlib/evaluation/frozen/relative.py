"""A student against its teachers: how far it is from the best of them, task by task, and how sure that is.

Two questions, and two columns `against`:

| against | teacher | asks |
|---|---|---|
| the best of each task | the one with the highest score there | does one student replace all of its teachers |
| the best teacher | the one with the highest mean over all tasks, everywhere the same | is it better than keeping one |

    points = 100 (s - t)          percent = 100 (s - t) / t          s, t: mean scores of the student and the teacher

The best of a task is chosen by the very scores that are compared, in the teachers' favour. Means over tasks are means
of the tasks' points and percents, each task counting the same. Source: UNIC (ECCV 2024) sec. 4, relative gains.

**Intervals** are those of `evaluation.intervals`, over queries, paired, and over seeds where students differ in theirs.
The gain in percent is a ratio of means; its queries enter linearised (the delta method), which leaves the mean:

    percent of query i = 100 [r + (s_i - (1 + r) t_i) / t],     r = s / t - 1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from udonlib.errors import UserError
from udonlib.evaluation.frozen.encoders import EncoderScores
from udonlib.evaluation.frozen.tasks import HEADLINES
from udonlib.evaluation.intervals import bootstrap_interval

AGAINST = ("the best of each task", "the best teacher")
Task = tuple[str, str]  # group, domain
Scores = Float[np.ndarray, "_ _"]  # encoders by queries


def relative_to_best(
    scores: EncoderScores | pd.DataFrame,
    students: Sequence[str],
    teachers: Sequence[str],
    seed: int = 0,
    n_resamples: int = 1000,
    level: float = 0.95,
) -> pd.DataFrame:
    """Compare a student with its best teachers, by the headline metric of each task.

    Args:
        scores: of `evaluate_encoders`, or their outcomes.
        students: names of encoders that are one student under several seeds; or one name.
        teachers: names of single teachers.
        seed: of the bootstrap.

    Returns:
        A row per task; then, with domain "mean", one per group and one of group "all": against, group, domain, teacher
        ("" where it is not one), teacher_score and student_score in percent, points, points_low, points_high, percent,
        percent_low, percent_high, n_queries, n_students. Tasks that a student or all teachers lack are left out, and
        against the best teacher those that it lacks. percent is NaN where a teacher scores 0, and in means of such.

    Raises:
        UserError: names that were not evaluated, or are none; students and teachers with no task in common; other
            queries of one encoder than of another.
    """
    outcomes = scores.outcomes if isinstance(scores, EncoderScores) else scores
    known = list(dict.fromkeys(outcomes["encoder"]))
    for kind, names in (("students", students), ("teachers", teachers)):
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise UserError(f"{kind}: found {', '.join(unknown) or 'none'}; evaluated are {', '.join(known)}")
    by_encoder = _by_task(outcomes, [*students, *teachers])
    tasks = [task for task in by_encoder[students[0]] if all(task in by_encoder[name] for name in students)]
    tasks = [task for task in tasks if any(task in by_encoder[name] for name in teachers)]
    if not tasks:
        raise UserError(f"students and teachers have no task in common: {', '.join([*students, *teachers])}")
    ours = {task: np.stack([by_encoder[name][task].to_numpy() for name in students]) for task in tasks}
    means = {name: {task: of_task.mean() for task, of_task in by_encoder[name].items()} for name in teachers}
    best = {task: max((name for name in teachers if task in means[name]), key=_score_in(means, task)) for task in tasks}
    shared = [task for task in tasks if all(task in by_encoder[name] for name in teachers)]
    overall = {name: float(np.mean([means[name][task] for task in shared or means[name]])) for name in teachers}
    single = max(teachers, key=overall.__getitem__)
    rows = []
    for against, of_task in zip(AGAINST, (best, {t: single for t in tasks if t in by_encoder[single]}), strict=True):
        theirs = {task: by_encoder[name][task].to_numpy()[None] for task, name in of_task.items()}
        compared = _compared({task: ours[task] for task in theirs}, theirs, of_task, seed, n_resamples, level)
        compared.insert(0, "against", against)
        rows.append(compared)
    return pd.concat(rows, ignore_index=True)


def _score_in(means: Mapping[str, Mapping[Task, float]], task: Task) -> Callable[[str], float]:
    return lambda name: means[name][task]


def _by_task(outcomes: pd.DataFrame, names: Sequence[str]) -> dict[str, dict[Task, pd.Series]]:
    """Headline scores of each encoder and task, by path; all encoders of a task have the same paths in one order."""
    headline = outcomes["metric"] == outcomes["group"].map(HEADLINES)
    by_encoder: dict[str, dict[Task, pd.Series]] = {name: {} for name in names}
    paths: dict[Task, tuple[str, np.ndarray]] = {}
    groups = outcomes[headline & outcomes["encoder"].isin(names)].groupby(["encoder", "group", "domain"], sort=False)
    for (name, group, domain), part in groups:
        here = part["path"].to_numpy()
        first, there = paths.setdefault((group, domain), (name, here))
        if not np.array_equal(here, there):
            raise UserError(
                f"{group} of '{domain}': '{name}' and '{first}' were tested on different images ({len(here):,} and "
                f"{len(there):,}); evaluate both at once, or with the same data and seed"
            )
        by_encoder[name][group, domain] = part["score"]
    return by_encoder


def _compared(
    ours: dict[Task, Scores],
    theirs: dict[Task, Scores],
    names: dict[Task, str],
    seed: int,
    n_resamples: int,
    level: float,
) -> pd.DataFrame:
    percents = {task: _percents(ours[task], theirs[task]) for task in ours}
    points = {task: 100 * (ours[task] - theirs[task]) for task in ours}
    groups = {group: [task for task in ours if task[0] == group] for group in dict.fromkeys(task[0] for task in ours)}
    rows = []
    for group, tasks in [*groups.items(), ("all", list(ours))]:
        intervals = []
        for values in (points, percents):
            generator = np.random.default_rng(seed)
            of_group = {domain: values[group, domain] for group, domain in tasks}
            keyed = {f"{g} {d}": values[g, d] for g, d in tasks} if group == "all" else of_group
            found = bootstrap_interval(keyed, generator, n_resamples, level)
            intervals.append(found[["mean", "low", "high"]].to_numpy())
        for i, task in enumerate([*tasks, None]):
            if group == "all" and task is not None:
                continue
            counted = tasks if task is None else [task]
            teacher = {names[t] for t in counted}
            rows.append(
                {
                    "group": group,
                    "domain": "mean" if task is None else task[1],
                    "teacher": teacher.pop() if len(teacher) == 1 else "",
                    "teacher_score": 100 * np.mean([theirs[t].mean() for t in counted]),
                    "student_score": 100 * np.mean([ours[t].mean() for t in counted]),
                    **dict(zip(("points", "points_low", "points_high"), intervals[0][i], strict=True)),
                    **dict(zip(("percent", "percent_low", "percent_high"), intervals[1][i], strict=True)),
                    "n_queries": sum(ours[t].shape[1] for t in counted),
                    "n_students": len(ours[counted[0]]),
                }
            )
    table = pd.DataFrame(rows)
    is_mean = table["domain"] == "mean"
    return pd.concat([table[~is_mean], table[is_mean]], ignore_index=True)


def _percents(ours: Scores, theirs: Scores) -> Scores:
    """Relative gain in percent, query by query, linearised at the mean scores."""
    teacher = theirs.mean()
    if teacher == 0:
        return np.full_like(ours, np.nan)
    ratio = ours.mean(axis=1, keepdims=True) / teacher
    return 100 * (ratio - 1 + (ours - ratio * theirs) / teacher)
