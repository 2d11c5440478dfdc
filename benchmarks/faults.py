"""What befalls a run while it trains, and whether anything is lost by it.

    python benchmarks/faults.py                 4 kills of each kind, ten minutes on an idle machine
    python benchmarks/faults.py --kills 50

A small run on two domains of the embedded benchmark is killed (SIGKILL) between its first record and its end, and begun
again each time: first at random moments, then just before random ones of its changes of files (opened to be written,
renamed, removed): records, checkpoints and metrics. Then after its last step, where evaluation and summary are
written: one that has come so far is killed before each change of a file in turn. In the end weights and evaluation are
to be those, to the bit, of the same run that nobody touched. Then another one is told to end (SIGTERM): how long it
takes until its checkpoint is there and the process is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from udonlib import presets
from udonlib.params import TrainParams
from udonlib.runs.run import open_run

CHANGES: dict[str, Any] = {
    "steps": 60,
    "checkpoint_every": 1,
    "eval_every": 15,
    "log_every": 1,
    "run": "toy",
    "n_threads": 1,
    "domains": ["emoji", "flags"],
    "backbone_args": {"width": 2},
    "check_data": "skip",
}


CHANGING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def train(values: dict[str, Any], kill_at: int, messages: Connection) -> None:
    """Train in a process of its own, and tell of each record; be killed before the `kill_at`-th change of a file."""
    torch.set_num_threads(1)
    params = TrainParams(**values)
    changed: list[str] = []

    def heed(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGING) and str(params.outputs) in str(arguments[0]):
            changed.append(str(arguments[0]))
            if len(changed) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    run = open_run(params)
    sys.addaudithook(heed)
    for record in run.train():
        messages.send(record["kind"])
    messages.send(changed)


class Process:
    """A process that trains a run."""

    def __init__(self, context: Any, params: TrainParams, kill_at: int = 0) -> None:
        self.messages, theirs = context.Pipe()
        self.process = context.Process(target=train, args=(params.model_dump(mode="json"), kill_at, theirs))
        self.process.start()
        theirs.close()
        self.said: list[Any] = []
        with contextlib.suppress(EOFError):
            self.said.append(self.messages.recv())  # "start"
        self.began = time.monotonic()

    def wait(self) -> bool:
        """Wait for its end, and say whether it was killed. Then `said` holds the kinds of its records."""
        with contextlib.suppress(EOFError):
            while True:
                self.said.append(self.messages.recv())
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL


Ended = tuple[dict[str, torch.Tensor], pd.DataFrame]  # weights after the last step, and the evaluation


def ended(params: TrainParams) -> Ended | None:
    """What a run has ended with; None if it has not ended."""
    run = open_run(params)
    if run.status != "finished":
        return None
    return torch.load(run.last, weights_only=True)["model"], run.evaluation()


def same(one: Ended | None, other: Ended) -> bool:
    """Whether both are, to the bit."""
    if one is None or not one[1].equals(other[1]):
        return False
    return all(torch.equal(value, one[0][name]) for name, value in other[0].items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["udonlib.runs.run"])
    with tempfile.TemporaryDirectory() as folder:

        def toy(name: str) -> TrainParams:
            return presets.load("smoke", outputs=str(Path(folder) / name), **CHANGES)

        whole = toy("whole")
        first = Process(context, whole)
        first.wait()
        seconds = time.monotonic() - first.began
        changed: list[str] = first.said[-1]
        untouched = ended(whole)
        assert untouched is not None
        print(f"the run takes {seconds:.1f} s when nobody touches it, and changes files {len(changed)} times")
        lost = 0
        # Each kill takes what was done since the last checkpoint: the moments lie so that the run ends after the last.
        for kind, most in (("moments", 2 * seconds), ("changes of files", 2 * len(changed))):
            victim = toy(kind)
            before: Counter[str] = Counter()
            for number in range(arguments.kills):
                place = generator.uniform(0, most / arguments.kills)
                process = Process(context, victim, 0 if kind == "moments" else 1 + int(place))
                if kind == "moments":
                    time.sleep(place)
                    process.process.kill()
                if process.wait():
                    before[process.said[-1] if process.said else "its first record"] += 1
                else:
                    lost += not same(ended(victim), untouched)
                    print(f"it was finished before kill {number + 1}; begun anew")
                    victim = toy(f"{kind} {number}")
            Process(context, victim).wait()
            lost += not same(ended(victim), untouched)
            kinds = ", ".join(f"{record} {n}" for record, n in before.most_common())
            print(
                f"SIGKILL at random {kind}: {before.total()} times, the last record before: {kinds}; runs lost: {lost}"
            )

        end = next(number for number, path in enumerate(changed, 1) if "evaluation" in path)
        ready = toy("ready")
        Process(context, ready, end).wait()
        killed, number = [], 1
        while True:
            victim = toy(f"end {number}")
            shutil.copytree(ready.outputs, victim.outputs)
            if not Process(context, victim, number).wait():
                lost += not same(ended(victim), untouched)  # it has come to its end, or to an error
                break
            killed.append(number)
            Process(context, victim).wait()
            lost += not same(ended(victim), untouched)
            number += 1
        print(f"SIGKILL before each change of a file after the last step: {len(killed)} times; runs lost: {lost}")

        told = toy("told")
        stopped = Process(context, told)
        time.sleep(seconds / 2)
        began = time.monotonic()
        stopped.process.terminate()
        stopped.process.join()
        gone = time.monotonic() - began
        step = torch.load(open_run(told).last, weights_only=True)["step"]
        print(f"SIGTERM: checkpoint of step {step}, gone after {gone:.2f} s: {stopped.process.exitcode}")
        if lost:
            raise SystemExit(f"runs that lost something: {lost}")


if __name__ == "__main__":
    main()
