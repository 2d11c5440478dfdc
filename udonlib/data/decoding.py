"""From the bytes of an image file to RGB, and to the square of pixels that a network sees.

bytes -> decode -> RGB -> prepare_train | prepare_eval -> uint8 [3, size, size]
"""

import contextlib
import importlib
import io
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageChops, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from udonlib.errors import UserError

MAX_PIXELS = 89_478_485  # a quarter of a GiB as RGB, Pillow's own limit; larger ones are refused before decoding
MAX_ASPECT = 100  # long side / short side; the middle of a longer strip shows nothing of it


class ImageError(UserError):
    """An image that cannot be used; the message begins with its path."""


def decode(data: bytes, path: str, at_least: int | None = None) -> Image.Image:
    """Decode an image file to RGB.

    The EXIF orientation is applied. Transparency is laid on white. 16-bit grey is scaled to 8 bits, 65535 to 255, also
    where an image uses a part of that range: one scale for all. CMYK is converted (inverted as Adobe's marker says), of
    an animation or several pages the first is taken. Colour profiles are ignored.

    Args:
        data: the file's bytes; the format is recognised by content, not by the name.
        path: its name, for messages.
        at_least: allow a large JPEG to be decoded at a fraction of its size whose short side is still twice as many
            pixels. That is faster by far and smoother than the whole image would be.

    Raises: ImageError, beginning with the path: empty, not an image, cut short, damaged, pixels of no fixed range, more
        than MAX_PIXELS declared, or one side more than MAX_ASPECT times the other.
    """
    with _in_words(path):
        return _to_rgb(_loaded(data, path, at_least), path)


def identify(data: bytes, path: str) -> Image.Image:
    """Read the header of an image file: its `format`, `mode` and `size`. No pixels are decoded.

    Raises: ImageError as `decode` does, for what a header tells.
    """
    with _in_words(path):
        return _identified(data, path)


def decode_alpha(data: bytes, path: str) -> Image.Image | None:
    """Decode how opaque each pixel of an image file is, 0 to 255 (mode L), as `decode` turns it; None: all are.

    Where the header says so, no pixels are decoded.

    Raises: ImageError, as `decode` does.
    """
    with _in_words(path):
        if not _identified(data, path).has_transparency_data:
            return None
        image = _loaded(data, path)
        with contextlib.suppress(Exception):  # as in `decode`
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "I" or image.mode.startswith("I;16"):
            seen = np.asarray(image) != image.info["transparency"]
            alpha = Image.fromarray(np.where(seen, 255, 0).astype(np.uint8))
        else:
            alpha = image.convert("RGBA").getchannel("A")
        return None if alpha.getextrema() == (255, 255) else alpha


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Bring an image that Pillow has opened or made to RGB, as `decode` does with a file's; it is not changed itself.

    Args:
        name: what to call it in messages.

    Raises: ImageError, beginning with the name, as `decode` does.
    """
    with _in_words(name):
        _check_sides(image, name)
        own = image.copy()
        own.format = image.format  # says how CMYK is meant; a copy has none
        return _to_rgb(own, name)


class _Quiet:
    """No warnings while anybody is inside: `catch_warnings` of threads that overlap would leave them off for good."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._caught.__exit__(None, None, None)


_quiet = _Quiet()


@contextlib.contextmanager
def _in_words(path: str) -> Iterator[None]:
    """Turn whatever Pillow raises into an ImageError that begins with the path."""
    try:
        with _quiet:  # on odd metadata: the pixels decide
            yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: too large: more than {MAX_PIXELS} pixels are declared ({error})") from error
    except Exception as error:  # damaged files make Pillow's readers raise nearly anything
        raise ImageError(f"{path}: cannot be decoded: {error or type(error).__name__}") from error


def _identified(data: bytes, path: str) -> ImageFile.ImageFile:
    if not data:
        raise ImageError(f"{path}: the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: not an image of a known format ({', '.join(USUAL)} ...), or damaged") from error
    _check_sides(image, path)
    return image


def _check_sides(image: Image.Image, path: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{path}: too large: {width} x {height} are declared, more than {MAX_PIXELS} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"{path}: too thin: {width} x {height}, one side more than {MAX_ASPECT} times the other")


def _loaded(data: bytes, path: str, at_least: int | None = None) -> ImageFile.ImageFile:
    image = _identified(data, path)
    if at_least is not None:
        image.draft(None, (2 * at_least, 2 * at_least))
    if image.mode == "RGB" and any("16" in str(tile[3]) for tile in image.tile):
        _shorten_key(image)
    image.load()
    return image


def _to_rgb(image: Image.Image, path: str) -> Image.Image:
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow takes every CMYK JPEG for Adobe's, whose values are inverted
    with contextlib.suppress(Exception):  # unreadable EXIF data says nothing: the pixels are good
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{path}: 32-bit pixels of {values.min()} to {values.max()}; store it with 8 or 16 bits")
        grey = ((values + 128) // 257).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255  # the colour that stands for nothing, on white
        image = Image.fromarray(grey)
    if image.mode == "F":
        raise ImageError(f"{path}: floating-point pixels have no fixed range; store it with 8 or 16 bits")
    if image.has_transparency_data:
        above = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    return image.convert("RGB")


def _shorten_key(image: Image.Image) -> None:
    """Cut the transparent colour of an image of 3 x 16 bits to the 3 x 8 that Pillow keeps of its pixels."""
    if isinstance(image.info.get("transparency"), tuple):
        image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])


def resize_train(
    pixels: UInt8[np.ndarray, "height width 3"], resize_size: int
) -> Float[Tensor, "3 resize_size resize_size"]:
    """Squash an image to a square, values in 0..255: bilinear, half-pixel centres, no antialiasing.

    Source: UDON's input pipeline; pinned by golden/preprocess.npz.
    """
    return _bilinear(_planes(pixels), resize_size, resize_size)


def resize_eval(
    pixels: UInt8[np.ndarray, "height width 3"], image_size: int
) -> Float[Tensor, "3 image_size image_size"]:
    """Bring the short side to `image_size` and cut the middle, values in 0..255.

        longer = trunc(long / short * size),   offset = (longer - size) // 2

    Bilinear as in `resize_train`. Source: UDON's input pipeline; pinned by golden/preprocess.npz.
    """
    return _short_side(_planes(pixels), image_size)


def prepare_train(
    image: Image.Image | UInt8[Tensor, "3 _ _"], resize_size: int
) -> UInt8[Tensor, "3 resize_size resize_size"]:
    """`resize_train`, rounded to whole values (by at most 0.5 of 255) so that batches are small to store and send.

    Args:
        image: RGB, of Pillow or as values; a tensor's device is that of the result.
    """
    return _bilinear(_planes(image), resize_size, resize_size).round().to(torch.uint8)


def prepare_eval(
    image: Image.Image | UInt8[Tensor, "3 _ _"], image_size: int
) -> UInt8[Tensor, "3 image_size image_size"]:
    """`resize_eval`, rounded as in `prepare_train`."""
    return _short_side(_planes(image), image_size).round().to(torch.uint8)


def _planes(image: Image.Image | np.ndarray | Tensor) -> Tensor:
    return image if isinstance(image, Tensor) else torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _short_side(image: Tensor, image_size: int) -> Tensor:
    height, width = image.shape[1:]
    short = min(height, width)
    new_height, new_width = int(height / short * image_size), int(width / short * image_size)
    top, left = (new_height - image_size) // 2, (new_width - image_size) // 2
    resized = _bilinear(image, new_height, new_width)
    return resized[:, top : top + image_size, left : left + image_size]


def _bilinear(image: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(image[None].float(), (height, width), mode="bilinear", align_corners=False, antialias=False)[0]


def is_plain_jpeg(data: bytes, path: str) -> bool:
    """Whether a file is a whole JPEG of grey values or YCbCr, upright as it is: one that any decoder shows alike.

    Raises: ImageError as `decode` does, for what a header tells.
    """
    with _in_words(path):
        image = _identified(data, path)
        if image.format != "JPEG" or image.mode not in ("L", "RGB") or b"\xff\xd9" not in data[-32:]:
            return False
        if image.mode == "RGB" and "jfif" not in image.info and image.info.get("adobe_transform") != 1:
            return False  # perhaps RGB, stored as it is
        with contextlib.suppress(Exception):  # as in `decode`
            return image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return True


class JpegDecoder:
    """Decodes plain JPEGs where the model trains, many at once: NVIDIA's nvimgcodec, on a GPU by its own circuits.

    Against Pillow's, pixels differ by a level or two on a GPU, and by nothing on a CPU.

    Args:
        device: on which the images are to be; on a GPU they are decoded beside what it is computing.

    Raises:
        UserError: "parameter 'decoder': ..." where the library is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            codec: Any = importlib.import_module("nvidia.nvimgcodec")
        except ImportError as error:
            raise UserError(
                "parameter 'decoder': found 'nvimgcodec', which is not installed: pip install "
                "'nvidia-nvimgcodec-cu13[nvjpeg]', or cu12 for a PyTorch with CUDA 12; 'pillow' needs nothing else "
                f"({error})"
            ) from error
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        place = codec.NVIMGCODEC_DEVICE_CPU_ONLY if self._stream is None else self._stream.device_index
        backends = [codec.Backend(codec.CPU_ONLY)] if self._stream is None else None
        options = ":fancy_upsampling=1"  # as libjpeg does
        n_threads = max(1, torch.get_num_threads() - 1)  # beside the one that waits for them
        self._decoder = codec.Decoder(place, n_threads, backends, options)
        self._params = codec.DecodeParams(color_spec=codec.ColorSpec.SRGB, sample_format=codec.SampleFormat.P_RGB)

    def __call__(self, files: Sequence[bytes]) -> list[UInt8[Tensor, "3 _ _"] | None]:
        """Return the RGB images of these files, None where one cannot be decoded; for the work of `beside`."""
        if not files:
            return []
        stream = 0 if self._stream is None else self._stream.cuda_stream
        found = self._decoder.decode(list(files), params=self._params, cuda_stream=stream)
        return [None if image is None else self._tensor(image) for image in found]

    def _tensor(self, image: Any) -> Tensor:
        return torch.from_numpy(np.array(image)) if self._stream is None else torch.from_dlpack(image)

    def beside(self, work: Callable[[], Tensor]) -> Tensor:
        """Return what `work` makes; a GPU does it beside what it is computing, and what it is given next waits."""
        if self._stream is None:
            return work()
        now = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            made = work()
        now.wait_stream(self._stream)
        made.record_stream(now)
        return made


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
