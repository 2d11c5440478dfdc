"""A kernel that executes notebook after notebook by papermill: only the first waits for a process and its imports.

What papermill does beside that is tested with a process for each notebook, in tests/test_notebook_set.py.
"""

import logging
import os
import shutil
import subprocess
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import papermill.cli
from click.testing import CliRunner
from jupyter_client.manager import KernelManager
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, papermill_engines

from tests import PROJECT
from tests.helpers.waiting import SECONDS
from udonlib.lab.terminal import SocketKernels

# As in a new kernel: no names, no inputs.
FORGET = "get_ipython().reset(new_session=True)"


class Kernel:
    """One kernel of this environment, in the project's folder; it ends with the block."""

    def __enter__(self) -> "Kernel":
        quiet = {"UDON_LIVE": "0", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "JUPYTER_PREFER_ENV_PATH": "1"}
        place = SocketKernels()  # ports may be taken by another kernel before this one opens them
        self._folder = Path(place.connection_file).parent
        self._manager = KernelManager(
            kernel_name="python3", transport=place.transport, connection_file=place.connection_file
        )
        self._manager.start_kernel(cwd=str(PROJECT), env=os.environ | quiet)

        class Warm(Engine):
            """papermill's own engine, but for the kernel."""

            @classmethod
            def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> None:
                client = PapermillNotebookClient(nb_man, km=self._manager, log=logging.getLogger(__name__))
                try:
                    client.execute()
                finally:
                    client.kc.stop_channels()

        papermill_engines.register("warm", Warm)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._manager.shutdown_kernel(now=True)
        shutil.rmtree(self._folder)

    def papermill(self, notebook: Path, out: Path, *options: str) -> subprocess.CompletedProcess:
        """What `papermill NOTEBOOK OUT -p NAME VALUE ... -y YAML` leaves; stderr is the error in which it ends."""
        self._forget()
        words = [str(notebook), str(out), "--engine", "warm", "--no-progress-bar", *options]
        done = CliRunner().invoke(papermill.cli.papermill, words)
        said = "".join(traceback.format_exception(done.exception)) if done.exception else ""
        return subprocess.CompletedProcess(words, done.exit_code, done.stdout, said)

    def _forget(self) -> None:
        client = self._manager.client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=SECONDS)
            client.execute(FORGET, silent=True, reply=True, timeout=SECONDS)
        finally:
            client.stop_channels()
