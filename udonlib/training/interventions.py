"""What was done to a run while it trained, by whom and after which step: the lines of its steering.jsonl.

An intervention holds the whole state of the steering and not a difference, so that one alone can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_serializer

from udonlib.errors import UserError, nearest
from udonlib.files import replacing

MAX_MULTIPLIER = 10.0
Multiplier = Annotated[float, Field(ge=0, le=MAX_MULTIPLIER)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, le=MAX_MULTIPLIER)]


NAMED = {"multipliers": "domain", "locks": "domain", "teachers": "teacher"}  # fields of a wish -> what they go by


class Wish(BaseModel):
    """How a person wants a run to be steered; a wish for nothing leaves it to its parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    multipliers: dict[str, Multiplier] = Field({}, description="domain -> factor of its adaptive weight; else 1")
    locks: dict[str, Share] = Field({}, description="domain -> share of the steps that it is pinned to")
    teachers: dict[str, Multiplier] = Field({}, description="frozen teacher -> factor of its weight; else 1")
    drop_probability: Share | None = Field(None, description="of frozen teachers; None: as the parameters say")

    rate: Rate = Field(1.0, description="factor of the learning rates on their schedule")

    @field_validator("multipliers", "teachers")
    @classmethod
    def _without_ones(cls, factors: dict[str, float]) -> dict[str, float]:
        return {name: factor for name, factor in factors.items() if factor != 1}

    @model_serializer(mode="wrap")
    def _as_before(self, write: Callable[[Wish], dict[str, Any]]) -> dict[str, Any]:
        """Files in which no frozen teacher or rate is steered, and no end asked for, stay as before that could be."""
        unsaid: dict[str, Any] = {"teachers": {}, "drop_probability": None, "rate": 1.0, "finish": 0}
        return {name: value for name, value in write(self).items() if name not in unsaid or value != unsaid[name]}

    @property
    def wish(self) -> Wish:
        """This alone, where more is said beside it."""
        return Wish(**{name: getattr(self, name) for name in Wish.model_fields})

    def allocates_as(self, other: Wish) -> bool:
        """Whether both want the same of the domains."""
        return (self.multipliers, self.locks) == (other.multipliers, other.locks)


def _differing(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float | None]:
    """What a mapping says that another does not; None for what it leaves out."""
    return {name: after.get(name) for name in {**before, **after} if before.get(name) != after.get(name)}


def changes_between(before: Wish, after: Wish) -> dict[str, Any]:
    """The fields in which a wish differs from another, of those in NAMED the names that do; None leaves a name out."""
    then, now = dict(before), dict(after)
    changes = {field: now[field] for field in now if then[field] != now[field]}
    return changes | {field: _differing(then[field], now[field]) for field in NAMED if field in changes}


def changed(before: Wish, after: Wish) -> str:
    """Say what one wish asks for that another did not: "emoji ×3, flags let go, learning rate ×0.5"."""
    changes = changes_between(before, after)
    named = [(field, name, value) for field in NAMED for name, value in changes.get(field, {}).items()]
    said = []
    for field, name, value in named:
        factor = f"×{1 if value is None else value:g}"
        lock = "let go" if value is None else f"locked at {value:.1%}"
        said.append(f"{name} {lock}" if field == "locks" else f"{'teacher ' * (field == 'teachers')}{name} {factor}")
    if "drop_probability" in changes:
        asked = after.drop_probability
        said.append("teachers dropped as by the parameters" if asked is None else f"teachers dropped at {asked:.0%}")
    return ", ".join([*said, *([f"learning rate ×{after.rate:g}"] if "rate" in changes else [])])


def check_wished(wished: Mapping[str, Any], known: Mapping[str, Sequence[str]], place: str) -> None:
    """Refuse a wish for what a run does not have, or for no teacher at all.

    Args:
        wished: fields of a `Wish`.
        known: "domain" and "teacher" -> the run's names of them; a kind that is missing is not checked.
        place: where the wish was found.

    Raises:
        UserError: "<place>: teachers: no teacher 'dino'; did you mean 'dinov2'?", "<place>: this run has no frozen
            teachers ...", "<place>: no teacher is left ...".
    """
    teachers, factors = known.get("teacher"), wished.get("teachers") or {}
    if teachers is not None and not teachers and (factors or wished.get("drop_probability") is not None):
        raise UserError(f"{place}: this run has no frozen teachers, whose weights or drop_probability could be steered")
    for field, kind in NAMED.items():
        for name in wished.get(field) or ():
            if name not in known.get(kind, [name]):
                raise UserError(f"{place}: {field}: no {kind} '{name}'; {nearest(name, known[kind])}")
    if teachers and not any(factors.get(name, 1.0) for name in teachers):
        raise UserError(f"{place}: no teacher is left to learn from: every factor of their weights is 0")


class Intervention(Wish):
    """A line of steering.jsonl: what was done after `step` steps."""

    number: int
    step: int
    panel: str = ""
    steers: bool = Field(False, description="the wish has changed")
    paused: bool = False
    evaluate: bool = False
    save: bool = False
    stop: bool = False
    finish: bool = Field(False, description="no step more: the best model is tested")
    refused: str = Field("", description="why nothing was done")

    @property
    def matters(self) -> bool:
        """Whether the finished run depends on it: it changed the allocation, validated, or ended the training."""
        return self.steers or self.evaluate or self.finish

    def record(self) -> dict[str, Any]:
        """As a record of the run."""
        return {"kind": "steering"} | self.model_dump()

    def __str__(self) -> str:
        """Say what was done, for a person: "emoji ×2, flags locked at 30%, teacher dinov2 ×2"."""
        done = [f"refused: {self.refused}"] if self.refused else []
        if self.steers:
            free = {name: value for name, value in self.multipliers.items() if name not in self.locks}
            done += _alike({name: f"×{value:g}" for name, value in free.items()})
            done += _alike({name: f"locked at {share:.1%}" for name, share in self.locks.items()})
            done += _alike({f"teacher {name}": f"×{factor:g}" for name, factor in self.teachers.items()})
            if self.drop_probability is not None:
                done.append(f"teachers dropped at {100 * self.drop_probability:g}%")
            done += [f"learning rate ×{self.rate:g}"] if self.rate != 1 else []
            done = done or ["the allocation left alone"]
        requests = (
            *(("validated", self.evaluate), ("saved", self.save), ("stopped", self.stop)),
            *(("finished before its last step", self.finish), ("paused", self.paused)),
        )
        return ", ".join([*done, *(word for word, asked in requests if asked)]) or "resumed"


def _alike(values: Mapping[str, str]) -> list[str]:
    """Names with what was done to each, those together to which the same was done: "emoji, flags ×2", "earth ×3"."""
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(name)
    return [f"{', '.join(alike)} {value}" for value, alike in names.items()]


def interventions(folder: Path) -> list[Intervention]:
    """Read what was done to the run in this folder; a line that is still being written is left out.

    Raises:
        UserError: "<file>, line 3: ..." for a line that is none of ours.
    """
    file = folder / "steering.jsonl"
    found = []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True) if file.exists() else [], 1):
        if line.endswith(b"\n"):
            try:
                found.append(Intervention.model_validate_json(line))
            except ValidationError as error:
                raise UserError(f"{file}, line {number}: {error.errors()[0]['msg']}") from None
    return found


class Log:
    """steering.jsonl while its run trains: what was done, and behind that what is still to be repeated.

    Both are in one file, so that a run that is killed while it repeats knows the rest.

    Args:
        folder: of the run.
        n_taken: interventions that matter and that the state of the training holds: those after them are repeated.
        replay: folder of another run whose interventions to repeat instead of the run's own.

    Raises:
        UserError: a file that cannot be read, or that holds fewer interventions than were taken.
    """

    def __init__(self, folder: Path, n_taken: int = 0, replay: Path | None = None) -> None:
        self._file = folder / "steering.jsonl"
        entries = interventions(folder)
        places = [place for place, entry in enumerate(entries, 1) if entry.matters]
        if n_taken > len(places):
            raise UserError(
                f"{self._file}: {len(places)} interventions, where the checkpoint holds {n_taken}: "
                "restore the file, or begin anew (overwrite=true)"
            )
        place = places[n_taken - 1] if n_taken else 0
        self._done, self._rest, self._replays = entries[:place], entries[place:], replay is not None
        if replay is not None:
            self._rest = [entry for entry in interventions(replay) if entry.matters][n_taken:]
        self.number = max((entry.number for entry in entries), default=0)

    def last_to_come(self) -> Intervention | None:
        """The last of what is to be repeated; None: nothing is."""
        return next((entry for entry in reversed(self._rest) if entry.matters), None)

    def next(self, step: int) -> Intervention | None:
        """What is to be repeated after `step` steps, one thing at a time."""
        while self._rest and self._rest[0].step <= step:
            entry = self._rest.pop(0)
            # It happens once more, after this step; what it asked for besides belongs to the past.
            again = entry.model_copy(update={"step": step, "paused": False, "save": False, "stop": False})
            if self._replays:  # it goes into this run's own file, with a number of its own
                self.number += 1
                entry = again = again.model_copy(update={"number": self.number})
            self._done.append(entry)
            if self._replays:
                self._write()
            if entry.matters:
                return again
        return None

    def add(self, entry: Intervention) -> None:
        """Write something new, before it is done. Where it matters, what was to be repeated is void."""
        if entry.matters:  # the run takes another way: only what happened until here stays
            self._done += [other for other in self._rest if not other.matters and other.step <= entry.step]
            self._rest = []
        self._done.append(entry)
        self.number = max(self.number, entry.number)
        self._write()

    def _write(self) -> None:
        # What a replay has yet to repeat stands in the other run's file.
        with replacing(self._file) as file:
            for entry in self._done if self._replays else [*self._done, *self._rest]:
                file.write(entry.model_dump_json().encode() + b"\n")
