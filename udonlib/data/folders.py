"""What folders of images mean: which are domains, which are splits, which are classes.

    domain/class/image                          classes are dealt to train, val and test
    split/class/image, domain/split/class/image     the folders train, val and test say what an image is for

In an archive all of this may lie in one more folder. Folders below a class belong to it.
"""

import hashlib
from collections.abc import Iterable, Sequence

from udonlib.data.listing import LeftOut, Listing
from udonlib.data.storage import DataError, Store, path_problem, printable

SHARES = (0.6, 0.1)  # of a domain's classes for train and val; the rest is for test
# What folders of splits are called, whatever the size of their letters.
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
ORDER = ("train", "val", "test")
LAYOUTS = "expected domain/class/image, or folders train, val and test over class/image"

Classes = dict[str, list[str]]  # a class's name -> the paths of its images, both in order


class ImageFolders:
    """The domains of a folder or archive of images.

    Attributes:
        store: reads the images' paths.
        notes: sentences on how the splits were made, where folders say so; more come as `splits` is called.

    Raises:
        DataError: no images in folders; folders of splits beside others; names that cannot be stored.
    """

    says = "its folders hold"

    def __init__(self, store: Store) -> None:
        listing = Listing(store)
        top = _top_folder(listing.paths) if store.is_archive else None
        if top is not None:
            store = store.below(top)
            listing.enter(top)
        self.store, self._listing = store, listing
        self.notes: list[str] = []
        for path in listing.paths:
            if "/" not in path:
                self._leave_out_unlabelled(path)
        folders = _grouped(listing.paths, 0)
        if not folders:
            kind = "archive" if store.is_archive else "folder"
            found = "".join(f"; {left.count} x {left.kind}: {left.reason}" for left in listing.left_out[:3])
            problem = f"the {kind} holds neither info_files/ nor folders domain/class/image{found}"
            raise DataError(f"{printable(str(store.start))}: {problem}")
        whole = (
            top if top is not None else store.root.stem if store.is_archive else store.root.absolute().resolve().name
        )
        if _splits_among(folders, 1, str(store.start)):
            folders = {whole: [path for path in listing.paths if "/" in path]}
            self._level = 0  # of the folders that are a domain's splits or classes, in paths
        else:
            self._level = 1
        self._folders = folders

    @property
    def names(self) -> list[str]:
        """The domains' names, in order."""
        return list(self._folders)

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What was passed over."""
        return self._listing.left_out

    def where(self, domain: str) -> str:
        """Name a domain in messages."""
        return f"{self.store.start}: domain '{domain}'"

    def columns(self, domain: str) -> dict[str, dict[str, str]]:
        """Return name -> path -> what is known of each image besides: nothing."""
        return {}

    def splits(self, domain: str) -> dict[str, Classes]:
        """Return split -> class -> images of a domain: as its folders say, see `completed`, or else `dealt`.

        Raises: DataError for a name that cannot be stored, images outside of class folders, and too few classes.
        """
        given = self._given(domain)
        if set(given) - {"train"}:
            splits, note = completed(domain, given, "its folders say")
            self.notes.append(note)
            return splits
        classes = given["train"] if given else self._classes(domain, self._folders[domain], self._level)
        return dealt(domain, classes, str(self.store.start / domain))

    def classes(self, domain: str) -> Classes:
        """Return class -> images of a domain, of all its splits together.

        Raises: DataError for a name that cannot be stored, and images outside of class folders.
        """
        given = self._given(domain)
        if not given:
            return self._classes(domain, self._folders[domain], self._level)
        classes: Classes = {}
        for split in given.values():
            for name, paths in split.items():
                classes.setdefault(name, []).extend(paths)
        return classes

    def _given(self, domain: str) -> dict[str, Classes]:
        """Return split -> class -> images where folders say so, else nothing."""
        folders = _grouped(self._folders[domain], self._level)
        named = _splits_among(folders, self._level + 1, f"{self.store.start}/{domain}")
        given = {}
        for folder, split in named.items():
            paths = folders[folder]
            if any(path.count("/") > self._level + 1 for path in paths):
                given[split] = self._classes(domain, paths, self._level + 1)
            else:  # as ImageNet's test images, whose classes are not published
                for path in paths:
                    self._leave_out_unlabelled(path)
        return given

    def _classes(self, domain: str, paths: Sequence[str], level: int) -> Classes:
        where = printable(str(self.store.start))
        for path in (domain, *paths):
            if problem := path_problem(path):
                raise DataError(f"{where}: {problem}; rename it")
            if path.count("/") == level:
                raise DataError(f"{where}/{path}: an image outside of a class folder; {LAYOUTS}")
        return _grouped(paths, level)

    def _leave_out_unlabelled(self, path: str) -> None:
        self._listing.leave_out("no class", "an image in no class folder: it has no label", path, True)


def dealt(domain: str, classes: Classes, where: str, what: str = "class folder") -> dict[str, Classes]:
    """Return split -> class -> images, no class in two splits and no split empty.

    Classes are put in the order of the SHA-256 of "domain/class" and cut at 60% and 70%: the same on every machine.

    Args:
        where, what: the images come from, and what a class is there, for messages.

    Raises: DataError for fewer than three classes.
    """
    if len(classes) < 3:
        found = f"found {len(classes)} with images"
        raise DataError(f"{printable(where)}: train, val and test need a {what} each, {found}")
    order = _by_hash(classes, domain)
    n_val = max(1, round(SHARES[1] * len(order)))
    n_train = min(max(1, round(SHARES[0] * len(order))), len(order) - n_val - 1)
    cuts = {"train": (0, n_train), "val": (n_train, n_train + n_val), "test": (n_train + n_val, len(order))}
    return {split: {name: classes[name] for name in sorted(order[a:b])} for split, (a, b) in cuts.items()}


def completed(domain: str, given: dict[str, Classes], says: str) -> tuple[dict[str, Classes], str]:
    """Make the splits that are missing among those given: test of val, val of a part of train.

    Args:
        says: who gave them: "its folders say".

    Returns: all splits, and a sentence on what was done.
    """
    said = f"{domain}: {says} what is {', '.join(sorted(given, key=ORDER.index))}"
    splits = dict(given)
    if "test" not in splits:
        splits["test"] = splits.pop("val")
        said += "; val is taken for test, since there is no other"
    known = set(splits["test"]).intersection(splits.get("train", ()))
    if "train" in splits and "val" not in splits:
        held_back = _some_images(splits["train"]) if known else {}
        if held_back:
            said += "; a tenth of each train class's images is held back for val"
        else:
            held_back = _some_classes(splits["train"], domain)
            said += "; a tenth of the train classes is held back for val"
        taken = {path for paths in held_back.values() for path in paths}
        kept = {name: [path for path in paths if path not in taken] for name, paths in splits["train"].items()}
        splits["train"] = {name: paths for name, paths in kept.items() if paths}
        splits["val"] = held_back
    if known:
        said += (
            f"; {len(known)} of {len(splits['test'])} test classes stand in train too: measured is how well known "
            "classes are found, not new ones"
        )
    return {name: splits[name] for name in ORDER if splits.get(name)}, said


def _grouped(paths: Iterable[str], level: int) -> Classes:
    """Put paths together by their folder at a level, from 0; those without one are left out."""
    groups: Classes = {}
    for path in paths:
        parts = path.split("/", level + 1)
        if len(parts) == level + 2:
            groups.setdefault(parts[level], []).append(path)
    return groups


def _top_folder(paths: Sequence[str]) -> str | None:
    """Return the one folder in which an archive holds all its domains, if there is one."""
    tops = {path.partition("/")[0] for path in paths}
    deep = all(path.count("/") >= 3 for path in paths)
    return tops.pop() if len(tops) == 1 and deep else None


def _splits_among(folders: Classes, level: int, where: str) -> dict[str, str]:
    """Return folder -> split where all folders are splits, that is hold folders of classes; else nothing.

    Raises: DataError where folders of splits stand beside others, or two stand for one split.
    """
    named = {name: SPLIT_FOLDERS[name.lower()] for name in folders if name.lower() in SPLIT_FOLDERS}
    over_classes = {split for name, split in named.items() if all(path.count("/") > level for path in folders[name])}
    others = [name for name in folders if name not in named]
    if not over_classes or (others and len(over_classes) < 2):
        return {}
    if others:
        found = f"found {', '.join(map(printable, [*named, *others][:6]))}"
        raise DataError(f"{printable(where)}: folders of splits stand beside others: {LAYOUTS}; {found}")
    if len(set(named.values())) < len(named):
        raise DataError(f"{printable(where)}: two folders of one split; found {', '.join(named)}")
    return named


def _by_hash(names: Iterable[str], salt: str) -> list[str]:
    """Put names in an order that looks like chance and is the same everywhere."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{salt}/{name}".encode()).digest())


def _some_images(classes: Classes) -> Classes:
    """Choose a tenth of each class's images, two at least so that one finds the other, and leave two in training."""
    chosen = {
        name: _by_hash(paths, "")[: max(2, len(paths) // 10)] for name, paths in classes.items() if len(paths) > 3
    }
    return {name: sorted(paths) for name, paths in chosen.items()}


def _some_classes(classes: Classes, domain: str) -> Classes:
    """Choose a tenth of the classes, one at least, and leave one in training."""
    n = min(max(1, round(SHARES[1] * len(classes))), len(classes) - 1)
    return {name: classes[name] for name in sorted(_by_hash(classes, domain)[:n])}
