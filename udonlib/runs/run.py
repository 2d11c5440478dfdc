"""Train a run into its folder, or go on with it; evaluate its best model.

    run = open_run(params)
    for record in run.train(): ...        # every record is in the run's files already
    run.evaluation()

See `runs.folder` for what the folder holds.
"""

from __future__ import annotations

import copy
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from udonlib.data.catalog import Catalog
from udonlib.data.check.datacheck import DataCheck, check_quickly
from udonlib.data.decoding import JpegDecoder
from udonlib.data.images import ImageReader, WindowLoader
from udonlib.data.imbalance import open_catalog
from udonlib.errors import UserError
from udonlib.evaluation.evaluate import EmbeddingError, Neighbours, evaluate_model
from udonlib.evaluation.files import NEIGHBOURS, load_neighbours, save_evaluation
from udonlib.evaluation.frozen.encoders import EncoderScores
from udonlib.evaluation.reading import heeding, loading, n_evaluated
from udonlib.models.embedding_model import EmbeddingModel, create_model, model_cost
from udonlib.models.processors import n_cores, pick_device, pick_precision, slow_precision
from udonlib.models.teachers import Teacher
from udonlib.params import WITHOUT_EFFECT, TrainParams
from udonlib.runs.begin.extend import to_go_on_with, what_more_means
from udonlib.runs.begin.origins import check_origins, origins, replayed
from udonlib.runs.begin.start import Begun, begin_with, find_start, since_start
from udonlib.runs.checkpoints import load_model
from udonlib.runs.find import RUN, find_run
from udonlib.runs.folder import RunFolder
from udonlib.runs.teachers import (
    Progress,
    create_objective,
    load_specialists,
    of_one_domain,
    open_teachers,
    some_images,
    specialist_params,
    student_scores,
    teacher_scores,
)
from udonlib.runs.writer import NoWriter, RunWriter, provenance
from udonlib.training.needs import check_room
from udonlib.training.parallel.world import LostError, World, normed_apart, together
from udonlib.training.steering import Commands, Control, Notice, RunStoppedError, read_control
from udonlib.training.threads import use_threads
from udonlib.training.trainer import Record, Trainer, diverged, merged_r_at_1

SIGN_SECONDS = 2.0  # between two signs of life of a run that trains slowly

# What a run may be resumed with although it is another value than it began with.
CHANGEABLE = WITHOUT_EFFECT - {"seed"}


class Run(RunFolder):
    """A run with its parameters, ready to train; `path` is its folder where that is not as they say. Writes nothing.

    Raises:
        UserError: a folder that holds a run of other parameters ("... differs in steps: 400 there, 800 here; ...").
    """

    def __init__(self, params: TrainParams, path: Path | None = None) -> None:
        super().__init__(path or params.run_dir)
        goes_on = self.status != "new" and not params.overwrite
        if params.precision == "auto":  # what the run began with, or what this machine multiplies fast
            chosen = pick_precision(self.params.precision if goes_on else "auto", pick_device(params.device))
            params = params.model_copy(update={"precision": chosen})
        params = to_go_on_with(self, params, CHANGEABLE)
        self.__dict__["params"] = params

    @cached_property
    def catalog(self) -> Catalog:
        """What the run trains on and is tested on."""
        p = self.params
        catalog = open_catalog(p)
        if p.recipe == "specialist" and len(catalog.domains) > 1:
            names = ", ".join(catalog.names)
            raise UserError(f"parameter 'domains': found 'all' ({names}), expected one domain for recipe 'specialist'")
        return catalog

    def move_data(self, data: str = "auto", images: str | None = None) -> None:
        """Look for the run's data somewhere else, before anything is read; "auto" and None: where it was.

        The root of the images is not kept where `data` moves without them: then they are under `data`.
        """
        p = self.params
        if data != "auto" or images:
            moved = {"images": images or p.images} if data == "auto" else {"data": data, "images": images}
            self.__dict__["catalog"] = open_catalog(p.model_copy(update=moved))

    @cached_property
    def data_check(self) -> DataCheck | None:
        """What a few seconds tell of the data, before it is trained on; None where that is over, or was not asked for.

        Takes 3 seconds at most, or one for each million of images to train, up to a minute.

        Raises:
            UserError: the data is broken: "... images that cannot be read: 2 (...)".
        """
        p = self.params
        if p.check_data == "skip" or self.is_over:
            return None
        check = check_quickly(self.catalog, min(60.0, max(3.0, p.steps * p.batch_size / 1e6)), n_threads=n_cores())
        if p.check_data == "refuse":
            check.refuse_broken(p.on_bad_image)
        return check

    def create_model(self) -> EmbeddingModel:
        """The model before its first step, on the CPU."""
        return self._begin()[0]

    def _begin(self) -> tuple[EmbeddingModel, Begun | None]:
        """The model before its first step, and what of it another run knew, where it begins with one."""
        p, n_classes = self.params, self.catalog.n_classes
        if p.start is None:
            return create_model(p, n_classes), None
        folder = find_start(p)
        start = load_run(folder)
        try:
            start.check_data()
        except UserError as error:
            name = f"parameter 'start': run {folder.path.name!r}"
            raise UserError(f"{name} knows its classes by the data that it was trained on: {error}") from None
        model = create_model(p.model_copy(update={"pretrained": False, "weights": None}), n_classes)
        return model, begin_with(model, folder, start.load_model(), start.catalog, self.catalog)

    def load_model(self) -> EmbeddingModel:
        """The best model of the run, in evaluation mode, on the CPU."""
        with self._saying_what_to_do():
            return load_model(self.best, self.params)

    def frozen_teachers(self) -> dict[str, Teacher]:
        """The run's frozen teachers, by name, checked, on the CPU; none where it has none."""
        p = self.params
        images = some_images(ImageReader(self.catalog, p.resize_size, "train", p.on_bad_image), p.image_size)
        return open_teachers(p, images) if p.teachers else {}

    def teacher_scores(self, progress: Progress | None = None) -> EncoderScores:
        """How good each frozen teacher is, and all together: see `runs.teachers`. The run need not be trained."""
        return teacher_scores(self.params, self.catalog, self.frozen_teachers(), progress)

    def encoder_scores(self, progress: Progress | None = None) -> EncoderScores:
        """How good the student of the finished run and its frozen teachers are, on the same tasks and images."""
        student = student_scores(self.params, self.catalog, self.load_model(), self.path, progress)
        teachers = self.teacher_scores(progress)
        return EncoderScores(pd.concat([student.outcomes, teachers.outcomes], ignore_index=True), teachers.skipped)

    def train(self) -> Iterator[Record]:
        """Train to the end, then evaluate the best model; yields `start`, the trainer's records, `test` and `end`.

        Goes on from the last checkpoint of an unfinished run. A finished run is left as it is: only `end` comes.

        Under `torchrun` every process calls this, and gets the same records: print them in the first one alone, see
        `training.parallel.world.join`. That one alone reads and writes the run's folder and is steered; it tells the
        others its state, so that a run may go on with another number of them. Each reads its share of every batch and
        of what is validated and tested. SIGTERM leaves a checkpoint and ends the process.

        Raises:
            UserError: whatever is wrong with parameters or data, before anything is written; a loss that is not finite,
                with the last checkpoint kept; data that changed since the run began.
        """
        with together() as world, Notice() as notice:
            try:
                yield from self._train(world, notice)
            except RunStoppedError as error:
                world.leave(error)
                if not notice.given:
                    raise
                print(error, file=sys.stderr)
                raise SystemExit(128 + signal.SIGTERM) from None

    def _train(self, world: World, notice: Notice) -> Iterator[Record]:
        self.__dict__["params"] = p = world.broadcast(self.params)
        if world.is_first and not p.overwrite:
            check_origins(self, self._origins())
        over = world.is_first and self.is_over
        finished = world.broadcast(self.summary() if over else None)
        if finished is not None:
            yield {"kind": "end", "step": finished["steps"]} | finished
            return
        repeated = replayed(p, self.path, self.catalog.fingerprint, CHANGEABLE) if world.is_first else None
        check = world.broadcast(self.data_check if world.is_first else None)
        use_threads(p.n_threads or n_cores() // world.n_here or 1)
        device = world.device(pick_device(p.device))
        tested = max(len(domain.splits[name]) for domain in self.catalog.domains for name in ("val", "test"))
        check_room(p, self.catalog.n_classes, tested, device, n_processes=world.size)
        model, begun = self._begin()
        model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        jpegs = JpegDecoder(device) if p.decoder == "nvimgcodec" else None
        reader = ImageReader(self.catalog, p.resize_size, "train", p.on_bad_image, p.cache_images, jpegs=jpegs)
        test_reader = ImageReader(self.catalog, p.image_size, "eval", p.on_bad_image, p.cache_images)
        load = heeding(notice.heed, loading(test_reader, p.n_workers))

        def validate(kept: EmbeddingModel) -> pd.DataFrame:
            try:
                return evaluate_model(kept, self.catalog, p, "val", load, helpers=world).table
            except EmbeddingError as error:  # of weights that are finite, but too large to compute with
                raise diverged(trainer.step, str(error)) from None

        offline = load_specialists(p, self._specialists())
        frozen = self.frozen_teachers()
        for teacher in (*offline.values(), *frozen.values()):
            teacher.to(device)
        objective, cached = create_objective(p, model, reader, frozen, offline, world)
        trainer = Trainer(model, self.catalog, p, WindowLoader(reader, p.n_workers), validate, objective, world)
        untrained = copy.deepcopy(model).requires_grad_(False)
        # Requests of before are void, those made while this process loads are not.
        before = Control() if p.overwrite or not world.is_first else read_control(self.path)
        writer = RunWriter(self) if world.is_first else NoWriter(self)
        try:
            statistics = [list(model.backbone.mean), list(model.backbone.std)]  # may come from a file of weights
            began = time.perf_counter()
            if p.overwrite:
                writer.clear()
            resumed = self._resume(trainer, writer, device, begun) if world.is_first else (None, 0.0, [])
            state, seconds_before, problems = resumed
            world.share(trainer, state)
            del resumed, state  # as large as the model and its optimizer
            sampler = trainer.sampler
            if world.is_first:
                trainer.commands = Commands(
                    self.path,
                    sampler.names,
                    trainer.n_interventions,
                    trainer.wish,
                    repeated,
                    lambda: sampler.weights.tolist(),
                    before,
                    objective.taught_by,
                    notice,
                )
            trainer.sign_every = SIGN_SECONDS

            def seconds() -> float:
                paused = trainer.commands.paused_seconds if trainer.commands else 0.0
                return seconds_before + time.perf_counter() - began - paused

            start = {
                "kind": "start",
                "step": trainer.step,
                "n_steps": p.steps,
                "batch_size": p.batch_size,
                "device": str(device),
                "n_images": {domain.name: len(domain.splits["train"]) for domain in self.catalog.domains},
                "teachers": list(objective.taught_by),
                "n_evaluated": {subset: n_evaluated(self.catalog, subset) for subset in ("val", "test")},
            }
            if writer.n_records == 0:  # a resumed run has the same records as one that was not interrupted
                writer.record(start)
            kept = [(record["step"], record["r_at_1"]) for record in self.records("validation") if record["best"]]
            doubts = f"data check: {check.verdict}" if check and not check.is_sound else ""
            mixture = of_one_domain(p, model, len(self.catalog.domains))
            more = what_more_means(p, trainer.step)
            loaded = str(begun or model.backbone.loaded)
            apart = normed_apart(model.backbone, world)
            said = (*problems, slow_precision(p.precision, device), doubts, loaded, mixture, apart, more)
            notices = [text for text in said if text]
            yield world.broadcast(start | {"best": kept[-1:], "notices": notices})
            for record in world.in_turn(cached.fill()) if cached is not None else ():
                notice.heed()
                yield record | {"step": trainer.step}
            try:
                for record in trainer.train():
                    if record["kind"] == "checkpoint":
                        state = trainer.state_dict() | {"n_records": writer.n_records, "seconds": seconds()}
                        state["statistics"] = statistics
                        writer.save_last(state)
                    elif record["kind"] != "progress":
                        if record["kind"] == "validation" and record["best"]:
                            best = {"model": trainer.kept_state(), "step": record["step"], "r_at_1": record["r_at_1"]}
                            best["statistics"] = statistics
                            writer.save_best(best)
                        writer.record(record)
                    yield record
            finally:
                writer.wait()
            train_seconds = seconds()
            best = world.broadcast(self.load_model_state() if world.is_first else {})
            model.load_state_dict(trainer.shards.part(best["model"]))
            evaluation = evaluate_model(model, self.catalog, p, "test", load, untrained, world)
            names = ("student", "teacher")
            table = world.broadcast(save_evaluation(evaluation, self.path, p.seed, names) if world.is_first else None)
            yield {"kind": "test", "step": trainer.step, "table": table}
            skipped = world.collect({**reader.skipped, **test_reader.skipped})
            thawed = p.backbone_learning_rate > 0 and trainer.step > p.frozen_steps
            summary = {
                "steps": trainer.step,
                "images": trainer.step * p.batch_size,
                "train_seconds": round(train_seconds, 1),
                "images_per_s": self.pace(),
                **asdict(model_cost(model, p.image_size, thawed)),
                "seconds": round(seconds(), 1),
                "best_step": best["step"],
                "best_validation_r_at_1": best["r_at_1"],
                "test_r_at_1": merged_r_at_1(table),
                "skipped_images": {path: problem for of_one in skipped for path, problem in of_one.items()},
                "interventions": trainer.n_interventions,
            }
            writer.finish(summary)
            yield {"kind": "end", "step": trainer.step} | world.broadcast(summary)
        except BaseException as error:
            writer.note_end(world.cause(error) if isinstance(error, LostError) else error)
            raise
        finally:
            writer.close()

    def _resume(
        self, trainer: Trainer, writer: RunWriter, device: torch.device, begun: Begun | None
    ) -> tuple[dict[str, Any] | None, float, list[str]]:
        """Load the last checkpoint that is whole, if there is one.

        Returns:
            Its state, the seconds that were spent until then, and what of the run's files is damaged and what that
            means.
        """
        note = provenance(self.catalog, device) | {"origins": self._origins(), "processes": trainer.world.size}
        if begun is not None:
            note["start"] = asdict(begun)
        self.check_data()
        last = self.checkpoint()
        n_records, seconds, problems = 0, 0.0, []
        if last is not None:
            trainer.load_state_dict(last.state)
            n_records, seconds, problems = last.state["n_records"], last.state["seconds"], last.problems
        if problems:
            problems = [*problems, f"the run goes on from step {trainer.step:,}"]
            note["damaged"] = problems
        elif torn := self.torn_records():  # no checkpoint counts it: nothing is lost
            problems = [torn]
        writer.settle(last)
        writer.start(self.params, note | {"from_step": trainer.step}, n_records)
        return last and last.state, seconds, problems

    def check_data(self) -> None:
        """Refuse to mix a run with other data than it began with."""
        before = self.provenance()
        if before and before[0]["data_fingerprint"] != self.catalog.fingerprint:
            raise UserError(
                f"run {self.path.name!r} does not fit: the data at {self.params.data!r} has changed since it began. "
                "Restore the data, or begin anew (overwrite=true)"
            )

    def _origins(self) -> dict[str, str]:
        """SHA-256 of each file that the run begins with."""
        return origins(self.params, self._specialists())

    def _specialists(self) -> dict[str, Run]:
        """The runs whose models teach offline, by domain, trained or not."""
        p = self.params
        named = specialist_params(p, self.catalog.names) if p.offline_teachers is not None else {}
        return {domain: Run(params) for domain, params in named.items()}

    def since_start(self) -> pd.DataFrame | None:
        """What the run has gained and lost on the test queries since it began, by domain: see `runs.begin.start`.

        None where it did not begin with another run.
        """
        if self.params.start is None:
            return None
        return since_start(self.outcomes(), self.provenance()[0]["start"]["known"])

    def neighbours(self) -> list[Neighbours]:
        """Neighbours of all test queries in the merged index, for the student and each teacher.

        Raises:
            UserError: the data has changed, so that positions would name other images.
        """
        self.check_data()
        return load_neighbours(self.path / NEIGHBOURS, self.catalog, "test")


def open_run(params: TrainParams) -> Run:
    """The run of these parameters, whether it is new, unfinished or finished; data and domains are read and checked.

    Raises:
        UserError: data that is missing or wrong, with the file and the entry; an unknown domain, with the nearest name;
            a folder of that name which holds a run of other parameters.
    """
    with together():
        run = Run(params)
        _ = run.catalog
    return run


def load_run(run: RunFolder | str, outputs: str = "auto") -> Run:
    """An existing run: its folder, its name or path, or "latest", see `runs.find`.

    Raises:
        ParameterError: no run is called so, with the nearest name.
    """
    folder = find_run(run, RUN, outputs) if isinstance(run, str) else run
    update = {"run": folder.path.name, "overwrite": False}
    if folder.path.parent.name == "runs":  # results may have moved
        update["outputs"] = str(folder.path.parent.parent)
    return Run(folder.params.model_copy(update=update), folder.path)
