"""Find image files, and open each as an upright 8-bit RGB image."""

from __future__ import annotations

import io
import math
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from aptvit.files.regular import open_regular
from aptvit.files.text import printable
from aptvit.measuring.progress import Progress, silent

T = TypeVar("T")

MAX_PIXELS = 200_000_000
"""Largest image that `open_image` decodes, in pixels; half of it for images with transparency or of 32-bit gray."""

MAX_RATIO = 1000
"""Largest ratio of the sides of an image: what resizes the shorter side makes the longer one as many times longer."""

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".avif", ".heic", ".heif")
) | frozenset((".gif", ".bmp", ".tif", ".tiff", ".jp2", ".tga", ".ppm", ".pgm", ".pbm", ".pnm"))
"""File name endings of images, lower case. Not every installation reads all of them, see `is_readable`."""

# Formats of Pillow with these endings. It knows others, of which PostScript runs a program.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "TGA", "PPM")
_HEIF = "pip install 'aptvit[heif]' reads them"

_TURNS = {  # EXIF orientation -> operation that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FLOATS = 2**23  # values that are converted at a time
_limit_lock = threading.Lock()


class ImageError(ValueError):
    """An image file cannot be read; the message is one line that names the file and the reason."""


class UnreadImagesWarning(UserWarning):
    """Image files in a folder were left out, because a library that reads them is not installed."""


def find_images(paths: Sequence[Path | str]) -> list[Path]:
    """List the image files among files and folders.

    Folders are searched recursively, in sorted order, for the usual image suffixes; hidden files and folders are
    skipped. Links to folders are followed, each folder once. Images that this installation does not read (HEIC, AVIF)
    are left out with an `UnreadImagesWarning`. A file named explicitly is taken whatever its suffix.

    Args:
        paths: Files and folders.

    Returns:
        The files in the order of `paths`, each once.

    Raises:
        ValueError: `paths` is empty, one of them does not exist, or there is no image among them.
    """
    if isinstance(paths, (str, Path)):  # a str is a Sequence too, of its letters
        paths = [paths]
    if not paths:
        raise ValueError("no paths given; name at least one image file or folder")
    files: dict[Path, Path] = {}
    unread: list[Path] = []
    for path in map(Path, paths):
        if not os.path.exists(path):
            raise ValueError(f"{path} does not exist; name an image file or a folder with images")
        if not os.path.isdir(path):
            files.setdefault(Path(os.path.abspath(path)), path)
            continue
        for file in _images_below(path):
            if is_readable(file.suffix):
                files.setdefault(Path(os.path.abspath(file)), file)
            else:
                unread.append(file)
    names, left_out = ", ".join(map(str, paths)), _left_out(unread)
    if not files:
        remedy = left_out or f"name image files or a folder with {', '.join(sorted(filter(is_readable, SUFFIXES)))}"
        raise ValueError(f"no images found in {names}; {remedy}")
    if unread:
        warnings.warn(f"{names}: {left_out}", UnreadImagesWarning, stacklevel=2)
    return list(files.values())


def check_readable(files: Sequence[Path]) -> None:
    """Raise ValueError if no file can be opened as an image. Reads headers, up to the first that is readable."""
    reason = ""
    for path in files:
        try:
            with open_regular(path) as file, warnings.catch_warnings(action="ignore"):
                identify(file)
            return
        except Image.DecompressionBombError:  # `open_image` has its own limit
            return
        except Exception as error:
            reason = reason or f"{printable(path)}: {_reason(path, error)}"
    raise ValueError(f"none of {len(files)} files can be read; the first: {reason}")


def is_readable(suffix: str) -> bool:
    """Whether this installation reads images with a file name ending: HEIC and AVIF need libraries of their own.

    Args:
        suffix: One of `SUFFIXES`, upper or lower case.
    """
    suffix = suffix.lower()
    if suffix in (".heic", ".heif"):
        return _reads_heif()
    return suffix != ".avif" or suffix in Image.registered_extensions()


def identify(file: BinaryIO) -> Image.Image:
    """Open an image with Pillow, and with pillow-heif where it is installed, without decoding it.

    Args:
        file: The open file at its beginning.

    Raises:
        UnidentifiedImageError: Neither library knows the format.
        OSError: The file cannot be read.
    """
    Image.init()
    try:
        return Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        if not _reads_heif():
            raise
        file.seek(0)
        return Image.open(file, formats=["HEIF"])


def upright_rgb(image: Image.Image, max_side: int | None = None) -> Image.Image:
    """Convert an image as `open_image` does: 8-bit RGB, transparency over white, turned as its EXIF data say.

    Args:
        image: The image as Pillow decodes it, or the current frame of an animation; not changed.
        max_side: As for `open_image`.
    """
    rgb = _upright(image, max_side)
    return rgb.copy() if rgb is image else rgb


def _upright(image: Image.Image, max_side: int | None) -> Image.Image:
    """As `upright_rgb`, without a copy of what needs no change."""
    turn = _TURNS.get(_orientation(image))
    rgb = _shrink(_to_rgb(image), max_side)
    if rgb is not image:
        rgb.info.clear()  # the EXIF orientation in it is not valid any more
    return rgb if turn is None else rgb.transpose(turn)


def open_image(
    path: Path | str, max_side: int | None = None, data: bytes | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Open an image file as viewers show it: upright, 8-bit RGB, transparency over white, first frame.

    16-bit gray is divided by 257. Gray floats are taken as 0..1, 0..255 or 0..65535, whichever is the narrowest that
    holds them; gray integers and floats outside 0..65535 are stretched from their smallest to their largest value.

    Args:
        path: The file.
        max_side: Longer side in pixels that the caller needs. An image of more than twice that is reduced to between
            one and two times `max_side`, for JPEG while it is decoded, which is faster.
        data: Content of the file, if it was read already; ``path`` is then used in error messages only.
        max_pixels: Largest image that is decoded, in pixels; at most `MAX_PIXELS`.

    Raises:
        ImageError: The file is missing, not readable, damaged, not an image, or larger than `max_pixels`.
        ValueError: `max_side` is less than 1.
    """
    path = Path(path)
    if max_side is not None and max_side < 1:
        raise ValueError(f"max_side is {max_side}; give a size of at least 1 pixel, or None for the full size")
    try:
        with open_regular(path) if data is None else io.BytesIO(data) as file:
            image = _upright(_decode(file, max_side, max_pixels), max_side)
            image.info.clear()
            return image
    except ImageError as error:
        raise ImageError(f"{printable(path)}: {error}") from None
    # Decoders meet damaged data with nearly any exception (SyntaxError, struct.error, zlib.error, KeyError, ...).
    except Exception as error:
        raise ImageError(f"{printable(path)}: {_reason(path, error)}") from error


def turn_of(path: Path | str) -> Image.Transpose | None:
    """Return the turn by which `open_image` makes a file upright; None for none, or if the file cannot be read."""
    try:
        with open_regular(path) as file, _higher_pixel_limit():
            return _TURNS.get(_orientation(identify(file)))
    except Exception:  # as in `open_image`, which tells why
        return None


def read_each(
    paths: Sequence[Path], read: Callable[[Path], T], progress: Progress = silent
) -> tuple[list[tuple[Path, T]], list[str]]:
    """Read files one by one. A file that cannot be read is reported, and the next one follows.

    Args:
        paths: Image files.
        read: Reads one; an `ImageError` means that it cannot be read.
        progress: Wraps the files.

    Returns:
        The files with what was read of them, and a message for each of the others.

    Raises:
        ValueError: If no file can be read.
    """
    images, skipped = [], []
    for path in progress(paths, "reading images", len(paths)):
        try:
            images.append((path, read(path)))
        except ImageError as error:
            skipped.append(str(error))
    if not images:
        raise ValueError(f"none of {len(paths)} files can be read; the first: {skipped[0]}")
    return images, skipped


@cache
def _reads_heif() -> bool:
    """Register pillow-heif with Pillow; False if it is not installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _left_out(unread: Sequence[Path]) -> str:
    """The number of files of each ending that this installation does not read, and the remedy; empty without any."""
    counts = Counter(file.suffix.lower() for file in unread)
    files = " and ".join(f"{count} {suffix} file{'s' * (count > 1)}" for suffix, count in sorted(counts.items()))
    return f"{files} left out: {_HEIF}" if unread else ""


def _images_below(folder: Path) -> list[Path]:
    paths: list[Path] = []
    visited = {os.path.realpath(folder)}  # links may lead back
    for root, folders, files in os.walk(folder, followlinks=True):
        visible = [name for name in sorted(folders) if not name.startswith((".", "__MACOSX"))]
        folders[:] = [name for name in visible if _is_new(os.path.join(root, name), visited)]
        paths += [
            Path(root, name)
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
        ]
    return sorted(paths)


def _is_new(folder: str, visited: set[str]) -> bool:
    """Whether a folder, or that which a link leads to, is not among the visited ones; it is added to them."""
    place = os.path.realpath(folder)
    is_new = place not in visited
    visited.add(place)
    return is_new


@contextmanager
def opened(path: Path | str, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an image file as it is stored, with limits as of `open_image`; decoded when it is read.

    Args:
        path: The file.
        max_pixels: As for `open_image`.

    Raises:
        ImageError: If it is larger, or too long and thin.
        OSError: If it cannot be read.
    """
    with open_regular(path) as file, _higher_pixel_limit(), identify(file) as image:
        try:
            _check_size(image, max_pixels)
        except ImageError as error:
            raise ImageError(f"{printable(path)}: {error}") from None
        yield image


def _check_size(image: Image.Image, max_pixels: int) -> None:
    """Raise ImageError if decoding, converting and resizing the image would need too much memory."""
    width, height = image.size
    # Images with transparency are decoded, and put over white.
    if (image.mode[0] in "IF" and image.mode[:4] != "I;16") or image.has_transparency_data:
        max_pixels = max_pixels // 2
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height} pixels are more than the {max_pixels:,} pixels that are opened")
    if min(width, height) < 1 or max(width, height) > MAX_RATIO * min(width, height):
        raise ImageError(f"{width} x {height} pixels are longer than {MAX_RATIO} times their width: crop the image")


@contextmanager
def _higher_pixel_limit() -> Iterator[int | None]:
    """Context with a higher limit of pixels in Pillow, a global: one thread at a time. Yields the former limit."""
    with _limit_lock:
        before = Image.MAX_IMAGE_PIXELS
        # Twice ours, so that Pillow's own warning stays silent for the sizes that we refuse with a message.
        Image.MAX_IMAGE_PIXELS = 2 * MAX_PIXELS
        try:
            yield before
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _decode(file: BinaryIO, max_side: int | None, max_pixels: int) -> Image.Image:
    with _higher_pixel_limit() as usual_limit:
        image = identify(file)
        _check_size(image, max_pixels)
        width, height = image.size
        if max_side is not None and max(width, height) > 2 * max_side:
            scale = max_side / max(width, height)
            image.draft(None, (math.ceil(width * scale), math.ceil(height * scale)))
        if usual_limit is not None and width * height > usual_limit:
            image.load()  # some decoders check again, so a large image is decoded under the lifted limit
    image.load()
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # an image with damaged EXIF data is still readable
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB; the image itself if it is, for it may be large."""
    if image.mode[0] in "IF":
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(gray: np.ndarray) -> np.ndarray:
    """(H, W) gray of 16 or 32 bits -> (H, W) uint8; some rows at a time, as floats take more memory than images."""
    step = max(1, _FLOATS // gray.shape[1])
    rows = [slice(start, start + step) for start in range(0, len(gray), step)]
    ranges = [(float(values.min()), float(values.max())) for values in (_finite(gray[part]) for part in rows)]
    low, high = min(least for least, _ in ranges), max(most for _, most in ranges)
    result = np.empty(gray.shape, dtype=np.uint8)
    for part in rows:
        result[part] = np.rint(_in_eight_bits(_finite(gray[part]), gray.dtype.kind == "f", low, high))
    return result


def _finite(gray: np.ndarray) -> np.ndarray:
    values: np.ndarray = np.nan_to_num(gray.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    return values


def _in_eight_bits(values: np.ndarray, is_float: bool, low: float, high: float) -> np.ndarray:
    if low < 0 or high > 65535:
        return (values - low) * (255 / max(high - low, 1e-12))
    if is_float and high <= 1:
        return values * 255
    return values / 257 if not is_float or high > 255 else values


def _shrink(image: Image.Image, max_side: int | None) -> Image.Image:
    if max_side is None or max(image.size) <= 2 * max_side:
        return image
    return image.reduce(-(-max(image.size) // (2 * max_side)))


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, IsADirectoryError) or os.path.isdir(path):
        return "this is a folder, not an image file"
    if isinstance(error, PermissionError):
        return "no permission to read the file"
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return "the file is empty"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than the {MAX_PIXELS:,} pixels that are opened"
    if isinstance(error, UnidentifiedImageError):
        if not is_readable(path.suffix):
            return f"{path.suffix} images need another library: {_HEIF}"
        return "not an image, or a format that is not read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "cannot be decoded: " + (" ".join(str(error).split()) or type(error).__name__)
