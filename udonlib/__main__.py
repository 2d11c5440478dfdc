"""`python -m udonlib COMMAND`: what is done from a terminal, without a notebook.

workspace [FOLDER]     the notebooks and presets of an installed udonlib, in a folder to work in
release [RUN]          a finished run's model as a folder for others
"""

import argparse
import filecmp
import shutil
import sys
import time
from pathlib import Path

from udonlib.errors import UserError
from udonlib.files import INSTALLED, SHARE

SHARED = ("notebooks", "params")


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


def parser() -> argparse.ArgumentParser:
    """All commands with their arguments."""
    program = argparse.ArgumentParser(prog="python -m udonlib", description="What is done from a terminal.")
    commands = program.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("workspace", help="copy notebooks/ and params/, and make outputs/")
    command.add_argument("folder", type=Path, nargs="?", default=Path(), help="where; the working folder if not given")
    command.set_defaults(do=workspace)

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
    return program


def main() -> None:
    """Do what the command line says; a mistake of the user's ends the process with its message alone."""
    arguments = parser().parse_args()
    try:
        arguments.do(arguments)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
