"""How papermill executes notebooks here: what the terminal shows meanwhile, and where the kernel listens.

    papermill notebooks/train.ipynb out.ipynb --engine udon --log-level WARNING --no-progress-bar

papermill's own --log-output frames every cell and logs a blank line after each text. This is an engine for it, by the
name that pyproject.toml gives it: lines, warnings and tables are printed as they come, pictures and HTML are left to
the notebook. An error ends papermill as ever, with the cell's traceback.

papermill loads this module when it starts. Its own engine, too, then starts kernels that listen where no other can be,
see `SocketKernels`: of some 300 notebooks that began beside others one had failed. And it warns of each `-p NAME` that
the cell of parameters does not list, as if it had no effect. The cell of train.ipynb lists the main ones of some
eighty: of the others papermill says nothing.
"""

import logging
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from jupyter_client.manager import AsyncKernelManager
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, logger, papermill_engines
from traitlets import default

# A kernel warns where others on this machine could listen to it, and calls the interrupt with which it is always ended
# an error, if that finds it idle. A kernel that dies is reported by papermill itself.
KERNEL = ["--log-level=50"]


UNKNOWN = "Passed unknown parameter: "


def is_news(record: logging.LogRecord) -> bool:
    """Whether papermill says more than that a parameter of ours stands in no cell; the notebook itself checks it."""
    message = record.getMessage()
    if not message.startswith(UNKNOWN):
        return True
    from udonlib.params import TrainParams  # half a second

    return message.removeprefix(UNKNOWN) not in TrainParams.model_fields


logger.addFilter(is_news)


MAX_PATH = 100  # characters of a socket's path: all systems take as many


class SocketKernels(AsyncKernelManager):
    """Starts a kernel that listens on sockets in a folder of its own.

    A port of the network is chosen here and opened by the kernel a second later. By then another kernel that starts may
    have it: this one dies, or hangs while it ends, and papermill waits for it in vain.
    """

    @default("connection_file")
    def _in_a_folder_of_its_own(self) -> str:
        return str(Path(tempfile.mkdtemp(prefix="kernel-")) / "k.json")

    @default("transport")
    def _by_files_where_paths_are_short(self) -> str:
        return "ipc" if os.name == "posix" and len(f"{self.connection_file}-ipc-1") < MAX_PATH else "tcp"

    def cleanup_connection_file(self) -> None:
        """Remove what the kernel needed, when it has ended."""
        super().cleanup_connection_file()
        self.cleanup_ipc_files()
        with suppress(OSError):
            Path(self.connection_file).parent.rmdir()


class PlainEngine(NBClientEngine):
    """papermill's usual engine, with a kernel that listens on sockets."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
        """Execute the notebook; the arguments are those of papermill's own engine."""
        given = {"kernel_manager_class": SocketKernels} | options
        return super().execute_managed_notebook(nb_man, kernel_name, **given)


papermill_engines.register(None, PlainEngine)  # where none is named


class TerminalEngine(NBClientEngine):
    """papermill's usual engine, with a client that prints."""

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man: Any,
        kernel_name: str,
        log_output: bool = False,
        stdout_file: Any = None,
        stderr_file: Any = None,
        start_timeout: int = 60,
        execution_timeout: int | None = None,
        **_: Any,
    ) -> Any:
        """Execute the notebook; the arguments are those of papermill's own engine."""
        nb_man.log_output = False  # no frames
        client = _PrintingClient(
            nb_man,
            kernel_name=kernel_name,
            startup_timeout=start_timeout,
            timeout=execution_timeout,
            log=logger,
            log_output=True,  # call `log_output_message`
            stdout_file=stdout_file,
            stderr_file=stderr_file,
            extra_arguments=list(KERNEL),
            kernel_manager_class=SocketKernels,
        )
        return client.execute()


class _PrintingClient(PapermillNotebookClient):
    def log_output_message(self, output: Any) -> None:
        data = output.get("data", {})
        if output.output_type == "stream":
            is_error = output.name == "stderr"
            for place in (sys.stderr if is_error else sys.stdout, self.stderr_file if is_error else self.stdout_file):
                if place is not None:
                    place.write(output.text)
                    place.flush()
        elif "text/plain" in data and not any(kind.startswith("image/") or "<img " in data[kind] for kind in data):
            print(data["text/plain"].rstrip("\n"), flush=True)
