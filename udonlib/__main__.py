"""`python -m udonlib workspace [FOLDER]`: the notebooks and presets of an installed udonlib, in a folder to work in."""

import argparse
import filecmp
import shutil
import sys
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


def main() -> None:
    """Do what the command line says; a mistake of the user's ends the process with one line."""
    parser = argparse.ArgumentParser(prog="python -m udonlib", description=__doc__.partition(": ")[2])
    commands = parser.add_subparsers(required=True, metavar="workspace")
    command = commands.add_parser("workspace", help="copy notebooks/ and params/, and make outputs/")
    command.add_argument("folder", type=Path, nargs="?", default=Path(), help="where; the working folder if not given")
    folder = parser.parse_args().folder
    if not INSTALLED:
        sys.exit(f"this udonlib is a clone of the project, which is a workspace already: {SHARE}")
    try:
        kept = make_workspace(folder)
    except UserError as error:
        sys.exit(str(error))
    for path in kept:
        print(f"left as it is, since it differs: {path}")
    print(f"Notebooks: {folder / 'notebooks'}, begin with train.ipynb. Results: {folder / 'outputs'}.")


if __name__ == "__main__":
    main()
