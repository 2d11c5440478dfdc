"""The images of a folder or archive, and what in it is passed over, so that it can be said.

Computers and storage boxes leave thumbnails, recycle bins and notes of their own beside images, people leave links:
what is not an image of the user's is never read, and never missing without a word.
"""

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from udonlib.data.decoding import ENDINGS, ending, why_left_out
from udonlib.data.storage import DataError, Store, printable

# What systems make by themselves, in small letters; all that begins with a dot is passed over as well.
SYSTEM_FOLDERS = frozenset(
    "@eadir @tmp #recycle #snapshot @recycle @recently-snapshot __macosx __pycache__ lost+found $recycle.bin recycler "
    "found.000".split()
) | {"system volume information", "network trash folder", "temporary items"}
SYSTEM_FILES = frozenset("thumbs.db ehthumbs.db ehthumbs_vista.db desktop.ini icon\r".split())
MANY = 40  # kinds; rarer endings than these are counted together


@dataclass(frozen=True)
class LeftOut:
    """Files or folders that were passed over for one reason.

    kind: ".heic", "no ending", "@eaDir", "hidden", "empty folder", "link", "no class". reason: in words, with what
    helps. path: the first of them. count: how many. is_image: whether images of the user's may be among them.
    """

    kind: str
    reason: str
    path: str
    count: int
    is_image: bool = False


class Listing:
    """The images below a store's root, by path in order; `left_out` says what else is there."""

    def __init__(self, store: Store) -> None:
        self._left: dict[tuple[str, str], LeftOut] = {}
        self._folders: set[str] = set()
        self.paths = sorted(self._of_archive(store) if store.is_archive else self._of_folder(os.fspath(store.start)))
        self._note_empty_folders()

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What was passed over: first what may be images, then by kind."""
        return tuple(sorted(self._left.values(), key=lambda left: (not left.is_image, left.kind, left.path)))

    def enter(self, folder: str) -> None:
        """Count the images' paths from the one folder that holds them all."""
        self.paths = [path.removeprefix(f"{folder}/") for path in self.paths]

    def leave_out(self, kind: str, reason: str, path: str, is_image: bool = False) -> None:
        """Note one file or folder that is passed over."""
        if len(self._left) >= MANY and (kind, reason) not in self._left:
            kind, reason = "other files", "no ending of an image"
        known = self._left.get((kind, reason))
        first = path if known is None else min(path, known.path, key=lambda p: (p.count("/"), p))
        count = 1 if known is None else known.count + 1
        self._left[kind, reason] = LeftOut(kind, reason, printable(first), count, is_image)

    def _takes_folder(self, path: str) -> bool:
        name = path.rpartition("/")[2]
        if name.casefold() in SYSTEM_FOLDERS:
            self.leave_out(name, "a folder that the system made", path)
        elif name.startswith("."):
            self.leave_out("hidden", "its name begins with a dot", path)
        else:
            self._folders.add(path)
            return True
        return False

    def _takes_file(self, path: str) -> bool:
        name = path.rpartition("/")[2]
        kind = ending(name)
        if name.startswith("."):
            self.leave_out("hidden", "its name begins with a dot", path)
        elif kind in ENDINGS:
            return True
        elif name.lower() in SYSTEM_FILES:
            self.leave_out(name.strip(), "a file that the system made", path)
        else:
            reason, is_image = why_left_out(kind)
            self.leave_out(kind or "no ending", reason, path, is_image)
        return False

    def _of_archive(self, store: Store) -> Iterator[str]:
        taken = {"": True}  # folder -> whether it is looked into

        def takes(folder: str) -> bool:
            if folder not in taken:
                taken[folder] = takes(folder.rpartition("/")[0]) and self._takes_folder(folder)
            return taken[folder]

        for path in dict.fromkeys(store.files()):
            if takes(path.rpartition("/")[0]) and self._takes_file(path):
                yield path

    def _of_folder(self, root: str) -> Iterator[str]:
        """Yield the images below a folder, each real file once: where it lies, or else by the first link to it.

        Links are followed, out of the root too, since people keep images elsewhere. But two ways to one file would let
        it stand in two classes, or in train and test; and a link to a folder that holds it has no end.
        """
        root_real = os.path.realpath(root)
        read: dict[str, set[str]] = {}  # real folder -> names of its images
        links: deque[str] = deque()
        linked: set[str] = set()  # real images that a link led to
        yield from self._walk("", root_real, read, links, linked)
        while links:
            path = links.popleft()
            target = os.path.realpath(f"{root}/{path}")
            above, _, name = target.rpartition("/")
            if os.path.isdir(target):
                if f"{root_real}/".startswith(f"{target.rstrip('/')}/") or target in read:
                    self.leave_out("link", "leads to a folder that is read already, or that holds it", path, True)
                elif self._takes_folder(path):
                    yield from self._walk(path, target, read, links, linked)
            elif not os.path.exists(target) and ending(path) not in ENDINGS:
                self.leave_out("link", "leads nowhere", path, True)
            elif self._takes_file(path):
                if target in linked or name in read.get(above, ()):
                    self.leave_out("link", "leads to an image that is read already", path, True)
                else:
                    linked.add(target)
                    yield path

    def _walk(
        self, start: str, real: str, read: dict[str, set[str]], links: deque[str], linked: set[str]
    ) -> Iterator[str]:
        """Yield the images of a folder and those below, and collect its links, in order."""
        folders, found = [(start, real)], []
        while folders:
            path, where = folders.pop()
            if where in read:
                self.leave_out("link", "leads to a folder that is read already, or that holds it", path, True)
                continue
            read[where] = set()
            try:
                with os.scandir(where) as scanned:
                    entries = list(scanned)
            except OSError as error:
                raise DataError(f"{printable(where)}: cannot be read: {error.strerror}") from error
            for entry in entries:
                below = f"{path}/{entry.name}" if path else entry.name
                if entry.is_symlink():
                    found.append(below)
                elif entry.is_dir(follow_symlinks=False):
                    if self._takes_folder(below):
                        folders.append((below, f"{where.rstrip('/')}/{entry.name}"))
                elif not entry.is_file(follow_symlinks=False):
                    self.leave_out("no file", "a device or a pipe", below)
                elif self._takes_file(below):
                    if linked and f"{where}/{entry.name}" in linked:
                        self.leave_out("link", "leads to an image that is read already", below, True)
                    else:
                        read[where].add(entry.name)
                        yield below
        links.extend(sorted(found))

    def _note_empty_folders(self) -> None:
        filled = {""}
        for folder in {path.rpartition("/")[0] for path in self.paths}:
            while folder not in filled:
                filled.add(folder)
                folder = folder.rpartition("/")[0]
        for folder in self._folders - filled:
            if folder.rpartition("/")[0] in filled:  # what lies below an empty one is not counted again
                self.leave_out("empty folder", "holds no image", folder)
