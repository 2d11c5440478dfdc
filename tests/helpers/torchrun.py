"""A run trained by several processes that `torchrun` starts, as somebody types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests import PROJECT
from tests.helpers.waiting import wait_until
from udonlib.runs.folder import RunFolder


class Torchrun:
    """`torchrun --nproc_per_node SIZE OPTIONS -m udonlib train` with these parameters; what it says goes to a file."""

    def __init__(self, size: int, values: Mapping[str, object], *options: str) -> None:
        self.folder = RunFolder(Path(str(values["outputs"])) / "runs" / str(values["run"]))
        self._log = Path(str(values["outputs"])) / "log.txt"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        given = [word for name, value in values.items() for word in ("-p", name, json.dumps(value))]
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(size), *options]
        near = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*launch, "-m", "udonlib", "train", "paper", *given],
                cwd=PROJECT,
                env=os.environ | near | {"OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        return self.process.wait(timeout=600)

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has a record of this step."""
        wait_until(lambda: self.process.poll() is not None or self.folder.step >= step)
        assert self.process.poll() is None, self.said()

    def said(self) -> str:
        """What all of its processes have said."""
        return self._log.read_text()

    def kill_rank(self, rank: int) -> None:
        """Kill one of the processes, without a chance to say anything."""
        for folder in Path("/proc").iterdir():
            try:
                words = (folder / "environ").read_bytes().split(b"\0")
                stat = (folder / "stat").read_text().rpartition(")")[2].split()
            except (OSError, IndexError):
                continue
            if f"RANK={rank}".encode() in words and int(stat[1]) == self.process.pid:
                os.kill(int(folder.name), signal.SIGKILL)
                return
        raise AssertionError(f"no process has rank {rank}")
