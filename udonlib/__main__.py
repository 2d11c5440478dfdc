"""`python -m udonlib COMMAND`: what is done from a terminal, without a notebook.

workspace [FOLDER]     the notebooks and presets of an installed udonlib, in a folder to work in
train [PRESET]         a run, begun or gone on with; also under torchrun
worker RUN             a run that has a folder, gone on with
release [RUN]          a finished run's model as a folder for others
results                the grids behind RESULTS.md, or what of them is left
embed FOLDER           a folder's images as vectors, or those that are new
index EMBEDDINGS       an index of such vectors, or one brought up to date
search INDEX IMAGE     the most similar images of an index
"""

import argparse
import filecmp
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from udonlib.errors import UserError
from udonlib.files import INSTALLED, SHARE, read_yaml_text

SHARED = ("notebooks", "params")
LINE_SECONDS = 10.0  # between two lines of a training
NOTABLE = ("start", "validation", "steering", "end")  # records that are worth a line at once


def make_workspace(folder: Path) -> list[Path]:
    """Copy notebooks and presets into a folder and make its outputs/; a file that was changed there is left alone.

    Returns the files that were left alone. Raises UserError where something cannot be written.
    """
    kept = []
    try:
        (folder / "outputs").mkdir(parents=True, exist_ok=True)
        for name in SHARED:
            for source in sorted(path for path in (SHARE / name).rglob("*") if path.is_file()):
                target = folder / source.relative_to(SHARE)
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)
                elif not filecmp.cmp(source, target, shallow=False):
                    kept.append(target)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
    return kept


def workspace(arguments: argparse.Namespace) -> None:
    """Make a workspace."""
    folder = arguments.folder
    if not INSTALLED:
        raise UserError(f"this udonlib is a clone of the project, which is a workspace already: {SHARE}")
    for path in make_workspace(folder):
        print(f"left as it is, since it differs: {path}")
    print(f"Notebooks: {folder / 'notebooks'}, begin with train.ipynb. Results: {folder / 'outputs'}.")


def train(arguments: argparse.Namespace) -> None:
    """Begin a run, or go on with it."""
    presets, runs = import_module("udonlib.presets"), import_module("udonlib.runs")  # seconds to import
    with _stopping():
        values = {name: read_yaml_text(value) for name, value in arguments.parameters}
        _finish(runs.open_run(presets.load(arguments.preset, **values)))


def worker(arguments: argparse.Namespace) -> None:
    """Go on with a run that has a folder; or with what a notebook has asked for, which looks on from outside."""
    apart, runs = import_module("udonlib.runs.apart.worker"), import_module("udonlib.runs")
    asked = arguments.asked
    with _stopping():
        folder = Path(arguments.run) if asked else runs.load_run(arguments.run, arguments.outputs).path
        with apart.signs(folder, held=bool(asked)) as signs:
            _finish(apart.asked_run(folder, asked) if asked else runs.load_run(str(folder)), signs.take)


@contextmanager
def _stopping() -> Iterator[None]:
    """Say once, of however many processes, why they end before the run does."""
    parallel = import_module("udonlib.training.parallel.world")
    try:
        with parallel.together():
            yield
    except parallel.RunStoppedError as error:  # as somebody wished: torchrun is not to start it again
        print(error, file=sys.stderr)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last checkpoint")


def _finish(run: Any, take: Callable[[dict[str, Any]], None] = lambda record: None) -> None:
    """Train a run to its end, with a line now and then; of several processes the first one alone says them.

    Args:
        take: is given each record.
    """
    progress = import_module("udonlib.runs.watch").Progress(run.params, time.monotonic)
    is_first = import_module("udonlib.training.parallel.world").join().is_first
    say = partial(print, flush=True) if is_first else lambda *words: None
    due = 0.0
    say(f"run {run.path}")
    for record in run.train():
        take(record)
        progress.update(record)
        for notice in record.get("notices", ()):
            say(notice)
        if record["kind"] == "end":
            progress.state = "finished"
        if record["kind"] in NOTABLE or time.monotonic() >= due:
            say(progress.line())
            due = time.monotonic() + LINE_SECONDS


def release(arguments: argparse.Namespace) -> None:
    """Release a run."""
    from udonlib.release.card import Licences  # seconds to import, and not needed for a workspace
    from udonlib.release.release import release
    from udonlib.runs.find import ANSWERED, find_run
    from udonlib.runs.run import load_run

    run = load_run(find_run(arguments.run, ANSWERED, arguments.outputs))
    if arguments.data:
        run.move_data(arguments.data, arguments.images)
    stated = Licences(arguments.licence, arguments.data_licence, arguments.weights_licence, arguments.teachers_licence)
    began, said = time.monotonic(), ""

    def report(what: str, done: int, total: int) -> None:
        nonlocal said
        if what != said:
            print(f"{time.monotonic() - began:5.0f} s  {what} ...", flush=True)
            said = what

    print(f"releasing run {run.path.name!r}", flush=True)
    released = release(run, arguments.folder, stated, arguments.overwrite, report)
    onnx = released.metrics["onnx"]
    print(f"{released.folder}: {', '.join(sorted(released.config.udonlib.sha256))}")
    print(
        f"ONNX against PyTorch: embeddings of {onnx['n_images']:,} images differ by at most "
        f"{onnx['max_difference']:.1e}; {onnx['n_same']:,} of {onnx['n_queries']:,} lists of {onnx['k']} neighbours "
        f"are the same, {onnx['n_ties']:,} differ in ties"
    )
    for row in released.metrics["vectors"]:
        reranked = f", {row['reranked']} re-ranked" if row["reranked"] else ""
        print(f"{row['vectors']}{reranked}: {row['bytes']:g} bytes, R@1 {row['r_at_1']:.2f}  {row['verdict']}")


def results(arguments: argparse.Namespace) -> None:
    """Say what is left of the results and how long it takes, and run it."""
    module = import_module("udonlib.lab.results")  # seconds to import, and needs the notebooks' packages
    all_parts = module.Results(module.named(arguments.only), arguments.outputs, arguments.jobs)
    lines = all_parts.plan()
    for name, n_runs, n_left, minutes in lines:
        print(f"{name:32} {n_runs:3} runs, {n_left:3} left, about {minutes:.0f} minutes")
    print(f"about {sum(line[3] for line in lines):.0f} minutes, {arguments.jobs} at a time; tables: {all_parts.folder}")
    for said in () if arguments.plan else all_parts.run():
        print(said, flush=True)


@contextmanager
def shown(units: dict[str, str]) -> Iterator[Callable[[str, int, int], None] | None]:
    """Show progress as the notebooks do; without their packages nothing is shown."""
    try:
        live = import_module("udonlib.lab.views.live")
    except ImportError:
        yield None
        return
    with live.ProgressLine(units) as line:
        yield line.progress


def use(arguments: argparse.Namespace) -> None:
    """Embed, index or search."""
    command = import_module("udonlib.search.command")  # seconds to import
    try:
        getattr(command, arguments.use)(arguments, shown)
    except KeyboardInterrupt:
        sys.exit("stopped" + ("; the same command goes on from there" if arguments.use == "embed" else ""))


def parser() -> argparse.ArgumentParser:
    """All commands with their arguments."""
    program = argparse.ArgumentParser(prog="python -m udonlib", description="What is done from a terminal.")
    commands = program.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("workspace", help="copy notebooks/ and params/, and make outputs/")
    command.add_argument("folder", type=Path, nargs="?", default=Path(), help="where; the working folder if not given")
    command.set_defaults(do=workspace)

    command = commands.add_parser("train", help="begin a run, or go on with it")
    command.add_argument("preset", nargs="?", default="miniuned_plus", help="name or path of a preset")
    command.add_argument(
        *("-p", "--parameter"),
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="sets a parameter; may be given several times",
    )
    command.set_defaults(do=train)

    command = commands.add_parser("worker", help="go on with a run that has a folder")
    command.add_argument("run", help="its name or path")
    command.add_argument("--outputs", default="auto", help="folder of all results")
    command.add_argument("--asked", type=Path, help="file of the parameters that a notebook has asked for")
    command.set_defaults(do=worker)

    command = commands.add_parser("release", help="write a finished run's model as a folder for others")
    command.add_argument("run", nargs="?", default="latest", help="name or path of a run; the latest if not given")
    command.add_argument("--folder", type=Path, help="where; outputs/releases/<run> if not given")
    command.add_argument("--overwrite", action="store_true", help="replace another release in that folder")
    command.add_argument("--outputs", default="auto", help="folder of all results")
    command.add_argument("--data", help="where the run's data is now; where it was if not given")
    command.add_argument("--images", help="where its images are, if not there")
    for name, of in (
        ("", "the model"),
        ("data-", "the data"),
        ("weights-", "first weights"),
        ("teachers-", "teachers"),
    ):
        command.add_argument(f"--{name}licence", help=f"licence of {of}, for the model card")
    command.set_defaults(do=release)

    command = commands.add_parser("results", help="run what is left of the grids behind RESULTS.md, and tabulate them")
    command.add_argument("--plan", action="store_true", help="say what is left and about how long it takes, no more")
    command.add_argument("--only", nargs="+", default=[], metavar="PART", help="of the results")
    command.add_argument("--jobs", type=int, default=2, help="runs at a time")
    command.add_argument("--outputs", default="auto", help="folder of all results")
    command.set_defaults(do=results)

    add_search(commands)
    return program


def add_search(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The commands that use a model, with their arguments."""
    command = commands.add_parser("embed", help="embed the images of a folder, or those that are new")
    command.add_argument("folder", help="of images, or a zip of them, or miniuned")
    command.add_argument("--model", default="latest", help="a run or checkpoint; the run kept last if not given")
    command.add_argument("--on-bad-image", default="error", help="error or skip")
    command.add_argument("--precision", default="auto", help="float32, bfloat16 or auto")
    command.add_argument("--device", default="auto", help="cpu, cuda or auto")
    command.add_argument("--batch-size", type=int, default=128, help="images that the network sees at once")
    command.add_argument("--name", default="auto", help="of the folder in outputs/embeddings")
    command.add_argument("--overwrite", action="store_true", help="compute all vectors anew")
    command.set_defaults(use="embed")
    command = commands.add_parser("index", help="index what embed has written, or bring its index up to date")
    command.add_argument("embeddings", help="what embed has written: its name or path")
    command.add_argument("--name", default="auto", help="of the folder in outputs/indexes; that of the embeddings")
    command.add_argument("--kind", default="auto", help="auto, exact, ivf, hnsw, sq8, ivf_sq8 or ivf_pq")
    command.add_argument("--max-ms", type=float, default=20.0, help="milliseconds that a query may take")
    command.add_argument("--max-mb", type=float, default=float("inf"), help="of memory that the index may take")
    command.add_argument("--recall", type=float, default=0.95, help="the least share of exact neighbours to find")
    command.set_defaults(use="index")
    command = commands.add_parser("search", help="show the most similar images of an index")
    command.add_argument("index", help="an index or embeddings: its name or path")
    command.add_argument("images", nargs="+", help="ids or paths")
    command.add_argument("-k", type=int, default=10, help="neighbours")
    command.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE", help="what images must have")
    command.add_argument("--model", help="where the one that the index names is elsewhere")
    command.set_defaults(use="search")
    for name in ("embed", "index", "search"):
        commands.choices[name].add_argument("--outputs", default="auto", help="folder of all results")
        commands.choices[name].set_defaults(do=use)


def main() -> None:
    """Do what the command line says; a mistake of the user's ends the process with its message alone."""
    arguments = parser().parse_args()
    try:
        arguments.do(arguments)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
