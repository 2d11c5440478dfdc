"""One way to look up a run: by its name, by its path, or "latest".

What is asked of a run is a `Question`. It says which runs can answer, and so which of them "latest" is: the one that
wrote the question's file last.

| question | who asks | "latest" |
|---|---|---|
| RUN | steer, runs | the run that is trained now, or else that wrote a record last |
| KEPT | evaluate | the run whose best model so far was kept last |
| ANSWERED | specialists of gaps | of the finished runs that kept how each query was answered, the last one |
| that_tested("student") | embeddings | the same, with the student's neighbours; by name also one with a best model |
| that_tested("teacher") | gaps | the same, with teachers |

Those of the sampler's notebook stand where it reads runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from udonlib.errors import ParameterError
from udonlib.evaluation.files import NEIGHBOURS, OUTCOMES
from udonlib.files import is_held, run_path, runs_folder
from udonlib.runs.folder import METRICS, WORKER, RunFolder, is_locked


@dataclass(frozen=True)
class Question:
    """What is asked of a run.

    what: which runs answer, for messages: "finished run with teachers".
    file: in the folder of each that does; the latest is the run that wrote its own last.
    lacks: why a run does not answer, as what follows its name; "" where it does.
    rank: of runs that answer, those of the lowest rank come first, and the latest of them is the latest.
    advice: what to do where none answers.
    """

    what: str
    file: str
    lacks: Callable[[RunFolder], str] = lambda run: ""
    rank: Callable[[RunFolder], Any] | None = None
    advice: str = "train one: make train"

    @property
    def several(self) -> str:
        """What they are called where there are more than one."""
        return self.what.replace("run", "runs", 1)


def _unfinished(run: RunFolder) -> str:
    return "" if run.status == "finished" else f"is {run.status}"


def _not_answered(run: RunFolder) -> str:
    return _unfinished(run) or ("" if run.params and (run.path / OUTCOMES).exists() else f"has no {OUTCOMES}")


def _not_kept(run: RunFolder) -> str:
    coming = f"its first validation comes at step {run.params.eval_every:,}"
    return "" if run.best.exists() else f"has no checkpoint yet: it is {run.status}, and {coming}"


def that_tested(embedder: str) -> Question:
    """Ask for a finished run that tested an embedder and kept its queries' neighbours.

    By its name also an unfinished one answers, if it has kept a model that can be tested.
    """

    def lacks(run: RunFolder) -> str:
        if run.status != "finished" and run.best.exists():
            has = embedder == "student" or run.params.has_teachers
            return "" if has else f"(recipe {run.params.recipe!r}) has no {embedder}"
        if run.status == "unfinished":
            return _not_kept(run)
        if missing := _not_answered(run):
            return missing
        if embedder not in set(run.evaluation()["embedder"]):
            return f"(recipe {run.params.recipe!r}) has no {embedder}"
        return "" if (run.path / NEIGHBOURS).exists() else f"has no {NEIGHBOURS}"

    return Question("finished run" + " with teachers" * (embedder == "teacher"), "summary.json", lacks)


RUN = Question("run", METRICS, rank=lambda run: not is_locked(run.path))
KEPT = Question("run with a checkpoint", "checkpoints/best.pt", _not_kept)
ANSWERED = Question("finished run", "summary.json", _not_answered)


def find_run(name: str, question: Question = RUN, outputs: str = "auto", parameter: str = "run") -> RunFolder:
    """An existing run that answers a question: by its name or path, or "latest".

    Args:
        parameter: the one that `name` was given by, for messages.

    Raises:
        ParameterError: no run is called so, with the nearest name; it does not answer, with those that do; none does.
    """
    if name != "latest":
        run = RunFolder(run_path(name, outputs, parameter))
        if lacks := question.lacks(run):
            others = ", ".join(other.path.name for other in islice(runs_for(question, outputs), 8)) or "none yet"
            raise ParameterError({parameter: f"run {run.path.name!r} {lacks}; {question.several}: {others}"})
        return run
    latest = next(runs_for(question, outputs), None)
    if latest is None:
        problem = f"found 'latest', but there is no {question.what} in {runs_folder(outputs)}; {question.advice}"
        raise ParameterError({parameter: problem})
    return latest


def trained_now(outputs: str = "auto") -> str:
    """The runs that a process trains now, or is about to, in a sentence."""
    home = runs_folder(outputs)
    folders = sorted(
        {file.parent for name in ("lock", f"{WORKER}.lock") for file in home.glob(f"*/{name}") if is_held(file)}
    )
    return f"Trained now: {', '.join(folder.name for folder in folders) or 'none'}."


def runs_for(question: Question, outputs: str = "auto") -> Iterator[RunFolder]:
    """The runs that answer a question, the latest one first. One that is damaged, or of another version, does not."""
    home = runs_folder(outputs)
    files = sorted(home.glob(f"*/{question.file}"), key=lambda file: -file.stat().st_mtime_ns)
    runs = (RunFolder(home / file.relative_to(home).parts[0]) for file in files)
    answering = (run for run in runs if _answers(run, question))
    return iter(sorted(answering, key=question.rank)) if question.rank else answering


def _answers(run: RunFolder, question: Question) -> bool:
    try:
        return not question.lacks(run)
    except (OSError, KeyError, ValueError):  # UserError is one of the last
        return False
