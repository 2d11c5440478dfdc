"""A real JupyterLab and a real browser: what a person does with the notebooks, done by a test.

    with Server(folder) as server, browser() as chromium:
        lab = Lab(server, chromium)
        notebook = lab.open("train.ipynb", preset="smoke")
        notebook.run_all()
        notebook.wait_idle()

Nothing sleeps to synchronise: every wait is for a condition. Cells are named by their ids. What cells show is read from
the notebook's model, and only what is about looks from the page.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from tests.helpers.notebookfiles import NOTEBOOKS, copy_with
from tests.helpers.waiting import SECONDS, wait_until
from udonlib.runs.folder import RunFolder

FLAGS = (  # no calls home, and WebGL without a graphics card
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-angle=swiftshader --enable-unsafe-swiftshader"
).split()
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},  # every cell is in the page
}

READY = """() => {
    const panel = window.jupyterapp?.shell.currentWidget;
    const kernel = panel?.sessionContext?.session?.kernel;
    return Boolean(panel?.context?.isReady && panel.sessionContext.isReady && kernel
        && window.udonInfo === kernel.id && kernel.status === "idle");
}"""
# `kernel.info` is a promise: the page notes whose has come.
WATCH_INFO = """() => {
    const kernel = window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel;
    if (kernel && kernel.connectionStatus === "connected") {
        kernel.info.then(() => { window.udonInfo = kernel.id; });
        return true;
    }
    return false;
}"""


def find_chromium() -> str | None:
    """The path of a Chromium or Chrome; None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Server:
    """JupyterLab on loopback, with a token, settings and files of its own; its kernels end with it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "notebooks"
        self.log = folder / "jupyter.log"
        self._folder = folder
        self._token = os.urandom(16).hex()

    def __enter__(self) -> "Server":
        self.root.mkdir(parents=True)
        homes = {name: self._folder / name.lower() for name in ("CONFIG", "DATA", "RUNTIME")}
        overrides = homes["CONFIG"] / "labconfig" / "default_setting_overrides.json"
        overrides.parent.mkdir(parents=True)
        overrides.write_text(json.dumps(SETTINGS))
        without = ("UDON_LIVE", "JPY_SESSION_NAME")  # the kernels must find out themselves that a person looks
        environment = {name: value for name, value in os.environ.items() if name not in without}
        environment |= {f"JUPYTER_{name}_DIR": str(path) for name, path in homes.items()}
        environment |= {"JUPYTER_CONFIG_PATH": str(NOTEBOOKS / ".jupyter")}  # as with `make lab`
        environment |= {"IPYTHONDIR": str(self._folder / "ipython"), "JUPYTER_PREFER_ENV_PATH": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        options = ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--no-browser"]
        options += [f"--ServerApp.root_dir={self.root}", f"--IdentityProvider.token={self._token}", "--allow-root"]
        options += ["--LabApp.expose_app_in_browser=True", "--LabApp.news_url=", "--LabApp.extension_manager=readonly"]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jupyter", "lab", *options], env=environment, stdout=log, stderr=log
            )
        try:
            wait_until(self._answers, f"JupyterLab to start; its log is {self.log}")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop()

    def _answers(self) -> bool:
        assert self._process.poll() is None, self.log.read_text()[-3000:]
        try:
            self.request("GET", "api/status")
        except OSError:
            return False
        return True

    def _stop(self) -> None:
        """End the server and every process below it, also those that do not listen."""
        try:
            below = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            below = []
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for process in below:
            if process.is_running():
                process.kill()
        psutil.wait_procs(below, timeout=10)

    def request(self, method: str, path: str) -> Any:
        """Ask the server's own interface."""
        request = urllib.request.Request(f"{self.url}/{path}", method=method)
        request.add_header("Authorization", f"token {self._token}")
        with urllib.request.urlopen(request, timeout=20) as answer:
            content = answer.read()
        return json.loads(content) if content else None

    def address(self, path: str, workspace: str) -> str:
        """Where JupyterLab shows a file."""
        return f"{self.url}/lab/workspaces/{workspace}/tree/{path}?reset&token={self._token}"

    def kernel_process(self, kernel: str) -> psutil.Process:
        """The process of a kernel."""
        for process in psutil.Process(self._process.pid).children(recursive=True):
            if any(kernel in word for word in process.cmdline()):
                return process
        raise AssertionError(f"no process of kernel {kernel}")

    def end_kernels(self) -> None:
        """Shut down every kernel, busy or not."""
        for session in self.request("GET", "api/sessions"):
            self.request("DELETE", f"api/sessions/{session['id']}")


@contextmanager
def browser(executable: str) -> Iterator[Browser]:
    """A headless Chromium that ends with the block."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        try:
            yield chromium
        finally:
            chromium.close()


class Lab:
    """Opens notebooks; each has a page of its own, all share one window's cookies and size."""

    def __init__(
        self, server: Server, chromium: Browser, width: int = 1440, height: int = 900, scale: float = 1
    ) -> None:
        self.server = server
        self._context = chromium.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce")
        self._context.set_default_timeout(1000 * SECONDS)
        self._n_pages = 0

    def open(self, name: str, copy: str = "", **parameters: object) -> "Notebook":
        """Open a notebook of the project with other parameters, under its own name or that of a copy.

        A notebook that is open already, or was written by a test, is opened as it is when no parameters are given.
        """
        copy = copy or name
        if parameters or not (self.server.root / copy).exists():
            copy_with(NOTEBOOKS / name, self.server.root / copy, **parameters)
        notebook = Notebook(self.visit(copy), self.server, copy)
        notebook.wait_ready()
        return notebook

    def visit(self, path: str) -> Page:
        """Open any file of the server."""
        self._n_pages += 1
        page = self._context.new_page()
        page.goto(self.server.address(path, f"page{self._n_pages}"))
        return page

    def close(self) -> None:
        """Close the pages and end their kernels."""
        self._context.close()
        self.server.end_kernels()


class Notebook:
    """A notebook in JupyterLab."""

    def __init__(self, page: Page, server: Server, path: str) -> None:
        self.page = page
        self.path = path
        self._server = server
        self.errors: list[str] = []  # of the page's own scripts
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    # Waiting

    def wait_for(self, predicate: str, argument: object = None, seconds: float = SECONDS) -> None:
        """Wait until a JavaScript function of the page is true."""
        self.page.wait_for_function(predicate, arg=argument, timeout=1000 * seconds, polling=50)

    def wait_ready(self, seconds: float = SECONDS) -> None:
        """Wait for the application, the notebook and a kernel that has answered and is idle."""
        self.wait_for("() => window.jupyterapp?.restored !== undefined", seconds=seconds)
        self.page.evaluate("() => window.jupyterapp.restored.then(() => null)")
        self.wait_for("() => Boolean(window.jupyterapp.shell.currentWidget?.context?.isReady)", seconds=seconds)
        self.wait_for(WATCH_INFO, seconds=seconds)
        self.wait_for(READY, seconds=seconds)

    def wait_idle(self, seconds: float = SECONDS) -> None:
        """Wait until everything that was asked to run has run, or was given up."""
        self.wait_for("() => window.udonRuns === 0", seconds=seconds)
        self.wait_for(
            """() => window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === "idle" """,
            seconds=seconds,
        )

    def wait_text(self, cell: str, words: str, seconds: float = SECONDS) -> None:
        """Wait until what a cell shows holds some words."""
        predicate = """([id, words]) => {
            const cells = window.jupyterapp.shell.currentWidget.content.widgets;
            const outputs = cells.find((cell) => cell.model.id === id).model.outputs.toJSON();
            return JSON.stringify(outputs).includes(words);
        }"""
        self.wait_for(predicate, [cell, json.dumps(words)[1:-1]], seconds)

    # Running

    def command(self, name: str) -> None:
        """Start a command of JupyterLab; `wait_idle` waits for the end of those that run cells."""
        self.page.evaluate(
            """(name) => {
                window.udonRuns = (window.udonRuns ?? 0) + 1;
                const done = () => { window.udonRuns -= 1; };
                void window.jupyterapp.commands.execute(name).then(done, done);
            }""",
            name,
        )

    def run_all(self) -> None:
        """Run all cells, without waiting."""
        self.command("notebook:run-all-cells")

    def run_cell(self, cell: str) -> None:
        """Run one cell, without waiting."""
        self.page.evaluate(
            """(id) => {
                const notebook = window.jupyterapp.shell.currentWidget.content;
                notebook.deselectAll();
                notebook.activeCellIndex = notebook.widgets.findIndex((cell) => cell.model.id === id);
            }""",
            cell,
        )
        self.command("notebook:run-cell")

    def interrupt(self) -> None:
        """Interrupt the kernel, and wait until the cells have stopped."""
        self.command("notebook:interrupt-kernel")
        self.wait_idle()

    def restart(self) -> None:
        """Restart the kernel as a person does, with the question whether that is meant."""
        self.command("notebook:restart-kernel")
        self.page.locator(".jp-Dialog button.jp-mod-accept").click()
        self.wait_idle()
        self.wait_ready()

    def kill_kernel(self) -> None:
        """Kill the kernel's process as a machine that runs out of memory does; wait for the one that replaces it."""
        kernel = self.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.id")
        self._server.kernel_process(kernel).kill()
        self.page.locator(".jp-Dialog button.jp-mod-accept").click()  # "The kernel appears to have died"
        self.wait_idle()
        self.wait_ready()

    def reload(self) -> None:
        """Save the notebook and reload its page, whatever the kernel does meanwhile."""
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.context.save()")
        self.page.reload()
        self.wait_for("() => Boolean(window.jupyterapp?.shell.currentWidget?.context?.isReady)")
        self.wait_for("() => window.jupyterapp.shell.currentWidget.sessionContext.isReady")

    def reopen(self) -> "Notebook":
        """Save it, end its kernel, and open what was saved in a page of its own, as on another day."""
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.context.save()")
        self._server.end_kernels()
        page = self.page.context.new_page()
        page.goto(self._server.address(self.path, "again"))
        again = Notebook(page, self._server, self.path)
        again.wait_ready()
        return again

    # Reading

    def model(self) -> dict[str, Any]:
        """The notebook as it would be saved."""
        return self.page.evaluate("() => window.jupyterapp.shell.currentWidget.content.model.toJSON()")

    def outputs(self, cell: str) -> list[dict[str, Any]]:
        """What a cell shows, as in a saved notebook."""
        [found] = [each for each in self.model()["cells"] if each["id"] == cell]
        return found["outputs"]

    def text(self, cell: str) -> str:
        """All text and HTML that a cell shows."""
        parts = []
        for output in self.outputs(cell):
            data = output.get("data", {})
            parts += [output.get("text", ""), data.get("text/html", ""), *output.get("traceback", [])]
            parts += [data.get("text/plain", "")] if "text/html" not in data else []
        return "\n".join("".join(part) for part in parts)

    def cell_errors(self) -> list[str]:
        """The errors in which cells ended."""
        cells = [cell for cell in self.model()["cells"] if cell["cell_type"] == "code"]
        outputs = [output for cell in cells for output in cell["outputs"]]
        return [f"{o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error"]

    # Looking

    def output(self, cell: str) -> Locator:
        """What a cell gave, in the page: one element for each output."""
        place = self.page.evaluate(
            """(id) => {
                const cell = window.jupyterapp.shell.currentWidget.content.widgets.find((c) => c.model.id === id);
                cell.node.dataset.udonCell = id;
                return id;
            }""",
            cell,
        )
        return self.page.locator(f'[data-udon-cell="{place}"] .jp-OutputArea-output')

    def screenshot(self, path: Path, cell: str = "", width: int = 0) -> Path:
        """Save a picture of the window, or of what a cell shows; with a width of the window in pixels."""
        if width:
            self.page.set_viewport_size({"width": width, "height": 900})
        target = self.output(cell).last if cell else self.page
        path.parent.mkdir(parents=True, exist_ok=True)
        target.screenshot(path=path)
        return path


def check_stills(lab: Lab, notebook: Notebook, still: str, gone: str) -> None:
    """What a living widget hides shows once the notebook was saved and is opened without a kernel, and in its export.

    still: finds what shows then. gone: the widget, which does not.
    """
    shown, widget = notebook.page.locator(still), notebook.page.locator(gone).first
    assert widget.is_visible()
    assert not shown.first.is_visible()
    reopened = notebook.reopen()
    lost = reopened.page.get_by_text("model not found")
    reopened.page.locator(still).first.wait_for()
    lost.first.wait_for(state="attached")  # JupyterLab's word on the widget, which nobody sees
    assert not any(each.is_visible() for each in lost.all())
    assert not reopened.page.locator(gone).count()
    path = lab.server.root / notebook.path
    subprocess.run([sys.executable, "-m", "nbconvert", "--to", "html", path], capture_output=True, check=True)
    page = notebook.page.context.new_page()
    page.goto(path.with_suffix(".html").as_uri(), wait_until="domcontentloaded")
    assert page.locator(still).first.is_visible()
    assert "VBox(" not in page.content()


def only_run(results: Path) -> RunFolder:
    [path] = (results / "runs").iterdir()
    return RunFolder(path)
