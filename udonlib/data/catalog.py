"""What images, classes and splits exist: the catalog of domains, read from UnED's info files or from image folders.

Four forms come to the same `Catalog`: the official UnED form in a folder or in one archive,

    info_files/<domain>/<split>.json    a list of {"path": "cars/car_ims/000001.jpg", "class_id": 7 or [7, 12]}
    images/<path>                       (or an image root given apart, or shards: `data.tables.shards`)

images in folders or in one archive, domain/class/image, or split/class/image or domain/split/class/image where folders
called train, val and test say what each image is for; a manifest, which is a table of images (`data.tables.manifest`);
and MiniUnED, which ships with the package in the official form. Several of them, side by side, are one catalog, too.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64

from udonlib.data.folders import Classes, ImageFolders
from udonlib.data.info_files import read_info_file
from udonlib.data.listing import LeftOut
from udonlib.data.storage import DataError, JoinedStore, Store
from udonlib.data.tables.manifest import ENDINGS, Manifest, is_manifest
from udonlib.data.tables.shards import Shards, find_shards
from udonlib.errors import nearest
from udonlib.files import sources

__all__ = ["Catalog", "DataError", "Domain", "LeftOut", "Split", "check_images", "load_catalog"]

SPLITS = ("train", "val", "test", "index", "small_index")
REQUIRED_SPLITS = SPLITS[:3]
MINIUNED = Path(__file__).parent / "miniuned" / "miniuned.zip"
# The usual orders: UnED's recipe, then MiniUnED. Domains of other names follow by alphabet.
RESERVED = {"mean", "all"}  # rows of tables that stand beside domains
KNOWN_DOMAINS = (
    *("food2k", "cars", "sop", "inshop", "inat", "met", "gldv2", "rp2k"),
    *("emoji", "flags", "logos", "icons", "fonts", "kanji", "fashion", "earth"),
)


class MissingDataError(DataError):
    """No folder or archive where data should be: it has moved, or the name is misspelt."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images of one domain that are used together.

    paths: relative to the catalog's images. labels: class ids of each image, padded with -1; ids count within the
    domain, over all its splits. class_names: class id -> name, for the classes that have one. columns: name -> a
    cell of each image, of what a manifest says besides.
    """

    name: str
    paths: tuple[str, ...]
    labels: Int64[np.ndarray, "n max_labels"]
    class_names: dict[int, str] = field(default_factory=dict)
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True, eq=False)
class Domain:
    """A visual domain: its splits by name ("train", "val", "test"; "index" and "small_index" where it has them)."""

    name: str
    splits: dict[str, Split]

    def queries(self, subset: Literal["val", "test"]) -> Split:
        """Return the images that are searched for."""
        return self.splits[subset]

    def index(self, subset: Literal["val", "test"]) -> Split:
        """Return the images that are searched in: `index` for test, `small_index` for val, else the queries."""
        return self.splits.get({"val": "small_index", "test": "index"}[subset], self.splits[subset])

    @cached_property
    def train_classes(self) -> Int64[np.ndarray, "classes"]:
        """The class ids of the train split, rising: what `train_labels` count. None where there is no such split."""
        train = self.splits.get("train")
        return np.zeros(0, dtype=np.int64) if train is None else np.unique(train.labels[:, 0])

    @cached_property
    def train_labels(self) -> Int64[np.ndarray, "n"]:
        """The class of each train image, 0 .. n_classes - 1."""
        return np.searchsorted(self.train_classes, self.splits["train"].labels[:, 0]).astype(np.int64)

    @property
    def n_classes(self) -> int:
        """The number of classes of the train split."""
        return len(self.train_classes)

    @cached_property
    def known_classes(self) -> Int64[np.ndarray, "classes"]:
        """Those classes of the test split that stand in the train split too: they are known, not new, when tested."""
        return np.intersect1d(self.splits["test"].labels, self.train_classes) if "test" in self.splits else np.zeros(0)

    @property
    def sizes(self) -> dict[str, int]:
        """Images of each split."""
        return {name: len(split) for name, split in self.splits.items()}


@dataclass(frozen=True, eq=False)
class Catalog:
    """The domains of one benchmark and where their images are read from.

    root: the folder or archive as given. store: reads an image's bytes by its path in a split. left_out: what of a
    folder of images was passed over. notes: sentences about how it was read that a person should know.
    """

    name: str
    root: Path
    domains: tuple[Domain, ...]
    store: Store
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Domain:
        for domain in self.domains:
            if domain.name == name:
                return domain
        raise DataError(f"{self.root}: no domain '{name}'; {nearest(name, self.names)}")

    @property
    def n_classes(self) -> dict[str, int]:
        """Training classes of each domain, in the order of the domains."""
        return {domain.name: domain.n_classes for domain in self.domains}

    @property
    def names(self) -> tuple[str, ...]:
        """The domains' names, in the order that numbers them."""
        return tuple(domain.name for domain in self.domains)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every domain's splits, paths and labels: the same wherever and however the data is stored."""
        digest = hashlib.sha256()
        for domain in sorted(self.domains, key=lambda domain: domain.name):
            for name in sorted(domain.splits):
                split = domain.splits[name]
                digest.update(f"{domain.name}\0{name}\0{split.labels.shape}\0".encode())
                digest.update("\0".join(split.paths).encode())
                digest.update(split.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def load_catalog(
    data: str | Path | Sequence[str | Path] = "miniuned",
    domains: str | Sequence[str] = "all",
    images: str | Path | None = None,
    needed: Sequence[str] = REQUIRED_SPLITS,
    all_as_test: bool = False,
) -> Catalog:
    """Read and check the catalog of a benchmark.

    Args:
        data: "miniuned"; or a folder or zip archive that holds info_files/, in a folder of its own or not; or one of
            domain/class/image, whose classes are then dealt to train, val and test (60, 10 and 30%) by a hash of their
            names. Folders train, val and test in place of the domains, or of a domain's classes, are its splits. Or a
            manifest, .csv, .tsv or .parquet. Several of these, as a list or as text in brackets, are read side by side:
            their domains are called differently, and in front of a path stands its domain, where it does not already.
        domains: "all", or names in the order wanted, as a list or separated by commas.
        images: folder or archive of the images where they are not in `data`; of info files, its images/ is used if it
            has one.
        needed: the splits that each domain must have: training needs all three, an evaluation its own.
        all_as_test: take every image for a test query, whatever split it is in; then no split is needed.

    Raises: DataError with the file, the entry, what was found, what is valid and the nearest valid name.
    """
    places = sources(data)
    # In a list, what ships with the package has its images; alone it may be looked at in another form.
    forms = [_form(place, None if place == "miniuned" and len(places) > 1 else images) for place in places]
    if images is not None and not any(form.images_apart for form in forms):
        root = forms[-1].root
        raise DataError(f"parameter 'images': {root} holds no info_files/, so images cannot lie elsewhere")
    owners: dict[str, _Form] = {}
    for form in forms:
        for name in form.names:
            if name in owners:
                found = f"domain '{name}' is in {owners[name].root} and in {form.root}"
                raise DataError(f"parameter 'data': {found}; expected different names: rename one, or leave one out")
            owners[name] = form
    root = Path(" + ".join(str(form.root) for form in forms))
    loaded = [
        Domain(name, owners[name].read(name, None if all_as_test else needed))
        for name in _chosen(domains, sorted(owners), root)
    ]
    store = forms[0].store
    if len(forms) > 1:
        store = JoinedStore(root, {domain.name: (owners[domain.name].store, _paths(domain)) for domain in loaded})
        loaded = [_below_its_name(domain) for domain in loaded]
    told = [form.source for form in forms if form.source is not None]
    left_out = tuple(entry for source in told for entry in source.left_out)
    notes = tuple(note for source in told for note in source.notes)
    return Catalog("+".join(form.name for form in forms), root, tuple(loaded), store, left_out, notes)


def check_images(catalog: Catalog) -> int:
    """Check that every image of the catalog exists; return how many there are. Nothing is decoded.

    Raises: DataError with the number of missing images of each domain and the first of them.
    """
    n_images, problems = 0, []
    for domain in catalog.domains:
        paths = _paths(domain)
        missing = catalog.store.missing(paths)
        n_images += len(paths)
        if missing:
            problems.append(f"{domain.name}: {len(missing)} of {len(paths)} images missing, first '{missing[0]}'")
    if problems:
        raise DataError("\n".join([f"{catalog.store.root}: images that are named do not exist", *problems]))
    return n_images


def _paths(domain: Domain) -> list[str]:
    """Return the paths of all images of a domain, each once."""
    return list(dict.fromkeys(path for split in domain.splits.values() for path in split.paths))


def _below_its_name(domain: Domain) -> Domain:
    """Return a domain whose paths begin with its name, as `JoinedStore` reads them."""
    names = JoinedStore.names(domain.name, _paths(domain))
    splits = {k: replace(split, paths=tuple(map(names.__getitem__, split.paths))) for k, split in domain.splits.items()}
    return Domain(domain.name, splits)


def _existing(path: str | Path, parameter: str) -> Path:
    where = Path(path).expanduser()
    if not where.exists():
        parent = where.parent if where.parent.is_dir() else Path()
        beside = [entry.name for entry in parent.iterdir() if entry.is_dir() or entry.suffix in (".zip", *ENDINGS)]
        hint = nearest(where.name, ["miniuned", *beside][:20])
        raise MissingDataError(f"parameter '{parameter}': no folder or archive '{path}'; {hint}")
    return where


def _chosen(domains: str | Sequence[str], present: Sequence[str], root: Path) -> list[str]:
    if domains == "all" and not RESERVED & set(present):
        return sorted(present, key=lambda name: (name not in KNOWN_DOMAINS, (*KNOWN_DOMAINS, name).index(name), name))
    names = [name.strip() for name in domains.split(",")] if isinstance(domains, str) else list(domains)
    names = list(present) if domains == "all" else names
    for name in names:
        if name in RESERVED:
            raise DataError(f"{root}: a domain cannot be called '{name}', a name of results tables; rename its folder")
        if name not in present:
            raise DataError(f"parameter 'domains': {root} has no domain '{name}'; {nearest(name, present)}")
    if len(set(names)) < len(names) or not names:
        raise DataError(f"parameter 'domains': every domain once, and one at least; found {', '.join(names) or 'none'}")
    return names


def _official_below(store: Store) -> Store:
    """Return the store from where info_files/ lies: at its top, or in the one folder there that has it."""
    if store.has_folder("info_files"):
        return store
    holders = [folder for folder in store.folders() if store.below(folder).has_folder("info_files")]
    return store.below(holders[0]) if len(holders) == 1 else store


# --- the forms -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """One place that holds domains: their names, what reads their images, what reads their splits.

    read: of a domain, with the splits that are needed; None: all of its images as test. images_apart: whether images
    may lie elsewhere, and do where that was said. source: notes what it does.
    """

    name: str
    root: Path
    store: Store
    names: Sequence[str]
    read: Callable[[str, Sequence[str] | None], dict[str, Split]]
    images_apart: bool = True
    source: ImageFolders | Manifest | None = None


def _form(place: str, images: str | Path | None) -> _Form:
    """Say how the data of one place is read."""
    where = MINIUNED if place == "miniuned" else _existing(place, "data")
    if is_manifest(where):
        manifest = Manifest(where, None if images is None else Store(_existing(images, "images")))
        return _Form(where.stem, where, manifest.store, manifest.names, partial(_read_source, manifest), True, manifest)
    store = _official_below(Store(where))
    name = "miniuned" if place == "miniuned" else store.root.stem
    if not store.has_folder("info_files"):
        if not store.is_archive and any(store.root.glob("*/train.json")):
            raise DataError(
                f"parameter 'data': {store.root} holds <domain>/train.json itself; expected the folder above it, in "
                "which it is called info_files"
            )
        folders = ImageFolders(store)
        return _Form(name, store.root, folders.store, folders.names, partial(_read_source, folders), False, folders)
    image_store = store if images is None else Store(_existing(images, "images"))
    if not image_store.is_archive and find_shards(image_store.start):
        image_store = Store.over(image_store.start, Shards(image_store.start))
    elif image_store.has_folder("images"):
        image_store = image_store.below("images")
    files = _info_files(store)
    return _Form(
        name, store.root, image_store, sorted(files), partial(_read_official, store, files), images is not None
    )


# --- the official form -----------------------------------------------------------------------------------------------


def _read_official(
    store: Store, files: dict[str, set[str]], domain: str, needed: Sequence[str] | None
) -> dict[str, Split]:
    splits = _read_splits(store, domain, files[domain], needed or ())
    _check_agreement(splits, f"{store.start}/info_files/{domain}")
    return {"test": _joined(splits)} if needed is None else splits


def _info_files(store: Store) -> dict[str, set[str]]:
    """Return domain -> its files in info_files/."""
    files: dict[str, set[str]] = {}
    for path in store.files("info_files"):
        domain, slash, name = path.partition("/")
        if slash and name.endswith(".json"):
            files.setdefault(domain, set()).add(name)
    if not files:
        raise DataError(f"{store.root}: info_files/ holds no <domain>/<split>.json")
    return files


def _read_splits(store: Store, domain: str, present: set[str], needed: Sequence[str]) -> dict[str, Split]:
    splits = {}
    for name in SPLITS:
        path = f"info_files/{domain}/{name}.json"
        if f"{name}.json" in present:
            splits[name] = _parse_split(store.read(path), name, f"{store.start}/{path}")
        elif name in needed:
            raise DataError(f"{store.start}/{path}: no such file; {nearest(f'{name}.json', present)}")
    if not splits:
        where = f"{store.start}/info_files/{domain}"
        raise DataError(
            f"{where}: no file of a split; {nearest(sorted(present)[0], [f'{name}.json' for name in SPLITS])}"
        )
    return splits


def _joined(splits: dict[str, Split]) -> Split:
    """Put all images of a domain into one test split, each once; splits agree on their labels."""
    paths = tuple(dict.fromkeys(path for split in splits.values() for path in split.paths))
    place = {path: i for i, path in enumerate(paths)}
    labels = np.full((len(paths), max(split.labels.shape[1] for split in splits.values())), -1, dtype=np.int64)
    names: dict[int, str] = {}
    for split in splits.values():
        labels[[place[path] for path in split.paths], : split.labels.shape[1]] = split.labels
        names |= split.class_names
    return Split("test", paths, labels, names)


def _parse_split(content: bytes, name: str, file: str) -> Split:
    paths, ids, class_names = read_info_file(content, file)
    several = next((i for i, label in enumerate(ids) if isinstance(label, list) and len(label) > 1), None)
    if name == "train" and several is not None:
        raise DataError(f"{file}, entry {several} (from 0): a train image has one class_id, found {ids[several]}")
    rows = [label if isinstance(label, list) else [label] for label in ids] if list in set(map(type, ids)) else None
    if rows is None:
        return Split(name, tuple(paths), np.array(ids, dtype=np.int64)[:, None], class_names)
    width = max(map(len, rows))
    labels = np.array([row + [-1] * (width - len(row)) for row in rows], dtype=np.int64)
    return Split(name, tuple(paths), labels, class_names)


def _check_agreement(named: dict[str, Split], where: str) -> None:
    """Refuse an image that has different labels in two splits."""
    splits = list(named.values())
    for i, one in enumerate(splits[:-1]):
        position = {path: k for k, path in enumerate(one.paths)}
        for other in splits[i + 1 :]:
            rows = np.array([position.get(path, -1) for path in other.paths])
            shared = np.flatnonzero(rows >= 0)
            width = max(one.labels.shape[1], other.labels.shape[1])
            there, here = _sorted_labels(one, rows[shared], width), _sorted_labels(other, shared, width)
            for k in np.flatnonzero((here != there).any(axis=1))[:1].tolist():
                number, first = int(shared[k]), int(rows[shared[k]])
                raise DataError(
                    f"{where}/{other.name}.json, entry {number} (from 0): '{other.paths[number]}' has class_id "
                    f"{_ids(here[k])} here and {_ids(there[k])} in {one.name}.json, entry {first}"
                )


def _sorted_labels(split: Split, rows: np.ndarray, width: int) -> np.ndarray:
    labels = np.full((len(rows), width), -1, dtype=np.int64)
    labels[:, : split.labels.shape[1]] = split.labels[rows]
    return np.sort(labels, axis=1)


def _ids(labels: np.ndarray) -> list[int]:
    return [label for label in labels.tolist() if label >= 0]


# --- images in folders, or in a manifest -----------------------------------------------------------------------------


def _read_source(source: ImageFolders | Manifest, domain: str, needed: Sequence[str] | None) -> dict[str, Split]:
    splits = {"test": source.classes(domain)} if needed is None else source.splits(domain)
    for split in needed or ():
        if split not in splits:
            raise DataError(f"{source.where(domain)} has no images for {split}; {source.says} {', '.join(splits)}")
    return _labelled(splits, source.columns(domain))


def _labelled(splits: dict[str, Classes], columns: dict[str, dict[str, str]]) -> dict[str, Split]:
    """Number the classes of a domain over all its splits, in the order of their paths.

    Args:
        columns: name -> path -> cell, of what is known besides.
    """
    names = {name for classes in splits.values() for name in classes}
    ids = {name: i for i, name in enumerate(sorted(names, key=lambda name: f"{name}/"))}
    made = {}
    for split, classes in splits.items():
        paths = tuple(path for paths in classes.values() for path in paths)
        labels = np.repeat([ids[name] for name in classes], [len(paths) for paths in classes.values()])
        cells = {name: tuple(cell[path] for path in paths) for name, cell in columns.items()}
        known = {ids[name]: name for name in classes}
        made[split] = Split(split, paths, labels.astype(np.int64)[:, None], known, cells)
    return made
