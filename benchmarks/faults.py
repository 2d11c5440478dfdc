"""What befalls a run while it trains, and whether anything is lost by it.

    python benchmarks/faults.py                 3 kills, a few minutes on an idle machine
    python benchmarks/faults.py --kills 50

A small run on two domains of the embedded benchmark is killed (SIGKILL) at random moments between its first record and
its end: while it trains, validates, writes records, checkpoints and its evaluation. Each time it is begun again. In the
end its weights are to be those, to the bit, of the same run that nobody touched. Then another one is told to end
(SIGTERM): how long it takes until its checkpoint is there and the process is gone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import signal
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

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


def train(values: dict[str, Any], messages: Connection) -> None:
    """Train in a process of its own, and tell of each record."""
    torch.set_num_threads(1)
    for record in open_run(TrainParams(**values)).train():
        messages.send(record["kind"])


class Process:
    """A process that trains a run."""

    def __init__(self, context: Any, params: TrainParams) -> None:
        self.messages, theirs = context.Pipe()
        self.process = context.Process(target=train, args=(params.model_dump(mode="json"), theirs))
        self.process.start()
        theirs.close()
        self.messages.recv()  # "start"
        self.began = time.monotonic()

    def last(self) -> str:
        """The kind of the last record that it told of."""
        kind = "start"
        while self.messages.poll():
            try:
                kind = self.messages.recv()
            except EOFError:
                break
        return kind


def weights(params: TrainParams) -> dict[str, torch.Tensor]:
    """The weights after the last step."""
    return torch.load(open_run(params).last, weights_only=True)["model"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["udonlib.runs.run"])
    with tempfile.TemporaryDirectory() as folder:
        whole, victim, told = (
            presets.load("smoke", outputs=str(Path(folder) / name), **CHANGES) for name in ("whole", "victim", "told")
        )
        first = Process(context, whole)
        first.process.join()
        seconds = time.monotonic() - first.began
        print(f"the run takes {seconds:.1f} s when nobody touches it")
        # Each kill takes what was done since the last checkpoint: the moments lie so that the run ends after the last.
        after: Counter[str] = Counter()
        for number in range(arguments.kills):
            victim_process = Process(context, victim)
            time.sleep(generator.uniform(0, 2 * seconds / arguments.kills))
            victim_process.process.kill()
            victim_process.process.join()
            after[victim_process.last()] += 1
            if victim_process.process.exitcode != -signal.SIGKILL:
                print(f"it was finished before kill {number + 1}; begun anew")
                victim = victim.model_copy(update={"outputs": f"{victim.outputs}-{number}"})
        last = Process(context, victim)
        last.process.join()
        same = last.process.exitcode == 0 and all(
            torch.equal(value, weights(victim)[name]) for name, value in weights(whole).items()
        )
        kinds = ", ".join(f"{kind} {n}" for kind, n in after.most_common())
        print(f"SIGKILL: {arguments.kills} times, the last record before: {kinds}; weights the same to the bit: {same}")

        ended = Process(context, told)
        time.sleep(seconds / 2)
        began, ended_by = time.monotonic(), ended.process
        ended_by.terminate()
        ended_by.join()
        step = torch.load(open_run(told).last, weights_only=True)["step"]
        print(f"SIGTERM: checkpoint of step {step}, gone after {time.monotonic() - began:.2f} s: {ended_by.exitcode}")
        if not same:
            raise SystemExit("the weights differ")


if __name__ == "__main__":
    main()
