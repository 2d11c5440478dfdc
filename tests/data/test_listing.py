"""Which files of a folder are its images, and how what is passed over is said."""

import os
from pathlib import Path

import pytest

from tests.helpers.catalogs import picture, write_tree, write_zip
from udonlib.data.listing import LeftOut, Listing
from udonlib.data.storage import Store
from udonlib.errors import UserError

IMAGE = picture(0)
PLAIN = ["cats/a/0.png", "cats/a/1.png", "cats/b/0.png"]


def listed(root: Path, *more: str) -> Listing:
    return Listing(Store(write_tree(root, dict.fromkeys((*PLAIN, *more), IMAGE))))


def by_kind(listing: Listing) -> dict[str, LeftOut]:
    return {left.kind: left for left in listing.left_out}


@pytest.mark.parametrize(
    "copy",
    ["cats/a/@eaDir/0.png", "cats/a/.AppleDouble/0.png", "__MACOSX/cats/a/0.png", "cats/.thumbnails/0.png",
     "$RECYCLE.BIN/x/0.png", "System Volume Information/x/0.png", "#recycle/x/0.png", "lost+found/x/0.png"],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_folders_that_systems_make_are_passed_over_and_said(tmp_path: Path, copy: str, packed: bool) -> None:
    files = dict.fromkeys([*PLAIN, copy, copy.replace("0.png", "1.png")], IMAGE)
    root = write_zip(tmp_path / "x.zip", files) if packed else write_tree(tmp_path / "x", files)
    listing = Listing(Store(root))
    assert listing.paths == PLAIN
    (left,) = listing.left_out
    assert copy.startswith(left.path)
    assert left.count == 1
    assert not left.is_image


@pytest.mark.parametrize(
    ("name", "kind"),
    [("Thumbs.db", "Thumbs.db"), ("desktop.ini", "desktop.ini"), ("._0.png", "hidden"), (".DS_Store", "hidden")],
)
def test_files_that_systems_make_are_passed_over_and_said(tmp_path: Path, name: str, kind: str) -> None:
    listing = listed(tmp_path, f"cats/a/{name}", f"cats/b/{name}")
    assert listing.paths == PLAIN
    assert [(left.kind, left.path, left.count, left.is_image) for left in listing.left_out] == [
        (kind, f"cats/a/{name}", 2, False)
    ]


def test_what_is_left_out_by_its_ending_is_counted_with_the_reason(tmp_path: Path) -> None:
    listing = listed(tmp_path, "cats/a/x.HEIC", "cats/b/y.heic", "cats/a/notes.txt", "cats/a/download")
    assert listing.paths == PLAIN
    left = by_kind(listing)
    assert (left[".heic"].count, left[".heic"].path, left[".heic"].is_image) == (2, "cats/a/x.HEIC", True)
    assert "pillow-heif" in left[".heic"].reason
    assert left["no ending"].is_image
    assert not left[".txt"].is_image
    assert [entry.is_image for entry in listing.left_out] == [True, True, False], "lost images come first"


def test_many_endings_are_counted_together(tmp_path: Path) -> None:
    listing = listed(tmp_path, *[f"cats/a/x.{i:03d}" for i in range(100)])
    assert len(listing.left_out) < 50
    assert sum(left.count for left in listing.left_out) == 100


def test_a_folder_without_images_is_said_once(tmp_path: Path) -> None:
    listing = listed(tmp_path, "cats/c/only.heic")
    (tmp_path / "empty/1/2").mkdir(parents=True)
    left = [entry for entry in Listing(Store(tmp_path)).left_out if entry.kind == "empty folder"]
    assert [(entry.path, entry.count) for entry in left] == [("empty", 2)]
    assert by_kind(listing)["empty folder"].path == "cats/c"


def test_folders_that_link_to_themselves_end(tmp_path: Path) -> None:
    write_tree(tmp_path, dict.fromkeys(PLAIN, IMAGE))
    os.symlink(".", tmp_path / "cats/loop")
    os.symlink("..", tmp_path / "cats/loop2")
    os.symlink("/", tmp_path / "cats/loop3")
    listing = Listing(Store(tmp_path))
    assert listing.paths == PLAIN
    assert (by_kind(listing)["link"].count, by_kind(listing)["link"].path) == (3, "cats/loop")


def test_each_real_file_is_read_once_however_many_links_lead_to_it(tmp_path: Path) -> None:
    write_tree(tmp_path / "x", dict.fromkeys(PLAIN, IMAGE))
    write_tree(tmp_path / "elsewhere", {"2.png": IMAGE, "3.png": IMAGE, "deep/4.png": IMAGE})
    os.symlink("../a", tmp_path / "x/cats/again")  # another class of the same images
    os.symlink("../b/0.png", tmp_path / "x/cats/a/b.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "x/cats/c")
    os.symlink(tmp_path / "elsewhere", tmp_path / "x/cats/d")
    os.symlink(tmp_path / "elsewhere/2.png", tmp_path / "x/cats/a/2.png")
    listing = Listing(Store(tmp_path / "x"))
    real = [os.path.realpath(tmp_path / "x" / path) for path in listing.paths]
    assert len(set(real)) == len(real) == 6
    assert "cats/c/deep/4.png" in listing.paths, "links out of the folder are followed"
    assert all(left.is_image for left in listing.left_out if left.kind == "link")


def test_a_link_that_leads_nowhere_is_an_image_that_is_missing_if_its_name_says_so(tmp_path: Path) -> None:
    write_tree(tmp_path, dict.fromkeys(PLAIN, IMAGE))
    os.symlink("gone.png", tmp_path / "cats/a/9.png")
    os.symlink("gone", tmp_path / "cats/c")
    listing = Listing(Store(tmp_path))
    assert listing.paths == sorted([*PLAIN, "cats/a/9.png"])
    assert by_kind(listing)["link"].reason == "leads nowhere"
    assert Store(tmp_path).missing(listing.paths) == ["cats/a/9.png"]


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    write_tree(tmp_path, dict.fromkeys(PLAIN, IMAGE))
    os.mkfifo(tmp_path / "cats/a/pipe.png")
    listing = Listing(Store(tmp_path))
    assert listing.paths == PLAIN
    assert by_kind(listing)["no file"].path == "cats/a/pipe.png"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_may_not_be_read_is_an_error(tmp_path: Path) -> None:
    write_tree(tmp_path, dict.fromkeys(PLAIN, IMAGE))
    (tmp_path / "cats/b").chmod(0)
    with pytest.raises(UserError, match=r"cats/b: cannot be read: Permission denied"):
        Listing(Store(tmp_path))
    (tmp_path / "cats/b").chmod(0o700)


def test_names_that_cannot_be_printed_are_escaped(tmp_path: Path) -> None:
    listing = listed(tmp_path, os.fsdecode(b"cats/a/caf\xe9.txt"), "cats/a/two\nlines.heic")
    paths = {left.kind: left.path for left in listing.left_out}
    assert paths == {".txt": r"cats/a/caf\udce9.txt", ".heic": r"cats/a/two\nlines.heic"}
