"""Which files are images: the formats that are decoded, their endings, and why files of other endings are left out.

What the installed Pillow reads is read, but for formats that hold something else than a picture, or that are read by
starting other programs; and so is what its plugins for HEIC and JPEG XL read, where they are installed.
"""

import contextlib
import importlib

from PIL import Image

# Pillow's readers of these are not asked: EPS and WMF start other programs or draw pages; BUFR, GRIB, HDF5 and MPEG are
# stubs without pixels; FITS, McIDAS and SPIDER hold measurements; IPTC is text; the last have no signature of their own
# by which content could be told from garbage, or are parts of programs.
NO_PICTURES = frozenset(
    "EPS WMF BUFR GRIB HDF5 MPEG FITS MCIDAS SPIDER IPTC IM IMT PCD TGA GBR CUR FLI XVTHUMB".split()
)
USUAL = "JPEG PNG WEBP GIF BMP TIFF PPM JPEG2000 AVIF".split()  # asked first

# Endings of what people may take for an image that is looked for: what it is, and what helps.
REASONS = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "photographs of phones: install pillow-heif and they are read"),
    ".jxl": "JPEG XL: install pillow-jxl-plugin and they are read",
    **dict.fromkeys((".avif", ".avifs"), "this Pillow was built without AVIF: install a newer one"),
    ".svg": "drawings without pixels: convert them to PNG",
    **dict.fromkeys((".eps", ".ps", ".pdf", ".ai", ".wmf", ".emf"), "pages, not pictures: convert them to PNG"),
    **dict.fromkeys((".tga", ".pcd"), "a format without a signature: convert them to PNG"),
    **dict.fromkeys(
        (".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"), "raw data of a camera: develop them to JPEG"
    ),
    **dict.fromkeys((".dcm", ".nii", ".fits", ".fit", ".fts"), "measurements without a fixed range: convert to PNG"),
    **dict.fromkeys(
        (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"), "films: store their frames as images"
    ),
    **dict.fromkeys((".npy", ".npz", ".mat", ".h5", ".hdf", ".pkl"), "arrays: store each image as PNG"),
    **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"), "archives: unpack them"),
    **dict.fromkeys((".part", ".crdownload", ".download", ".tmp"), "left by a transfer that was cut: fetch them again"),
}


def _add_plugins() -> None:
    """Let Pillow's plugins for HEIC and JPEG XL register themselves, if they are installed."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_jxl")


Image.init()
_add_plugins()
FORMATS = tuple([name for name in USUAL if name in Image.OPEN] + sorted(set(Image.OPEN).difference(USUAL, NO_PICTURES)))
ENDINGS = frozenset(ending for ending, name in Image.registered_extensions().items() if name in {*FORMATS, "MPO"})


def ending(name: str) -> str:
    """Return the ending of a file's name in small letters, ".jpg", or "" where it has none."""
    before, dot, after = name.rpartition(".")
    return dot + after.lower() if before else ""


def why_left_out(ending: str) -> tuple[str, bool]:
    """Say why files of an ending are not read, and whether they may be images that somebody would miss."""
    if not ending:
        return "no ending that says what they are: give images theirs, such as .jpg", True
    if ending in REASONS:
        return REASONS[ending], True
    return "no ending of an image", False
