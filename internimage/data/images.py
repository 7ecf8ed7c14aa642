# SPDX-License-Identifier: MIT
"""Image files: which files count as images, and how one is decoded, in training, evaluation and prediction alike."""

import os
import stat
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..errors import UserError, list_some, one_line
from ..values import BadValue, Whole, shown

# Pillow recognizes a file by its content, whatever its name. Allowed are only formats that hold pixels and that Pillow
# decodes itself: EPS under any name would start Ghostscript, WMF calls Windows, PDF and video need other programs, FPX
# and MIC are containers of other files, and BUFR, GRIB and HDF5 are stubs for whatever a program has registered.
_FORMATS = (
    "AVIF", "BLP", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "PSD",
    "QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM",
    "HEIF", "JXL",  # if a program has registered the plugins pillow_heif and pillow-jxl-plugin
)  # fmt: skip
COMMON_EXTENSIONS = ".jpg, .jpeg, .png, .webp, .avif, .gif, .bmp, .tiff and others that Pillow reads"

MAX_PIXELS = "INTERNIMAGE_MAX_PIXELS"  # an environment variable, so that loader workers inherit it

_SYSTEM_FILES = ("thumbs.db", "desktop.ini")

_TRANSPOSES = {  # Exif orientation -> the operation that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DataError(UserError, ValueError):
    """A dataset that cannot be used; the message says what was found and what was expected."""


class ImageError(DataError):
    """An image that cannot be read; the message is the reason, without the file's name."""


def formats() -> list[str]:
    """Pillow's names of the formats that can be read, as far as this Pillow supports them."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def image_extensions() -> frozenset[str]:
    """The file extensions, lower case and with the dot, by which a file in a folder counts as an image."""
    supported = set(formats())
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in supported)


def is_system_file(name: str) -> bool:
    """Whether a file is hidden or left by an operating system (Thumbs.db and the like), and ignored silently."""
    return name.startswith(".") or name.lower() in _SYSTEM_FILES


def is_image_name(name: str, extensions: frozenset[str]) -> bool:
    """Whether a file's name, without its folder, is that of an image. macOS writes `._NAME` beside `NAME`."""
    return os.path.splitext(name)[1].lower() in extensions and not name.startswith("._")


@dataclass
class Listing:
    """What is below a folder, sorted; names are relative to the folder and use / as the separator."""

    images: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)  # other files, and non-files with the name of an image
    folders: list[str] = field(default_factory=list)  # without hidden ones


def list_images(folder: str | Path) -> Listing:
    """List the images below a folder. Links are followed, hidden folders are skipped.

    Only regular files are images: opening a named pipe would block until someone writes to it.

    Raises:
        DataError: A folder cannot be listed. Skipping it would silently drop its images.
    """
    extensions, listing = image_extensions(), Listing()
    # path, name relative to `folder` with a trailing /, (device, inode) of the folders above
    stack: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [(os.fspath(folder), "", ())]
    while stack:
        path, prefix, above = stack.pop()
        try:
            status = os.stat(path)
            here = (status.st_dev, status.st_ino)
            if here in above:
                listing.ignored.append(f"{prefix} (a link to a parent folder)")
                continue
            with os.scandir(path) as found:
                entries = sorted(found, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise DataError(f"the folder '{path}' cannot be listed: {error.strerror or error}") from error
        if prefix:
            listing.folders.append(prefix[:-1])
        for entry in entries:
            name = prefix + entry.name
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                is_folder = is_file = False
            if is_folder and entry.name.startswith("."):
                listing.ignored += [f"{name}/"] if prefix else []
            elif is_folder:
                stack.append((entry.path, name + "/", (*above, here)))
            elif is_image_name(entry.name, extensions):
                if is_file:
                    listing.images.append(name)
                else:
                    listing.ignored.append(f"{name} (not a regular file)")
            elif not is_system_file(entry.name):
                listing.ignored.append(name)
    for names in (listing.images, listing.ignored, listing.folders):
        names.sort()
    return listing


def ignored_message(where: str | Path, ignored: list[str]) -> str:
    """One line about the files in a folder or tar that are ignored."""
    files = f"{len(ignored)} files that are not images" if len(ignored) > 1 else "1 file that is not an image"
    return f"'{where}': ignoring {files}: {list_some(ignored, 5)}"


def pixel_limit() -> int | None:
    """The largest number of pixels of an image: INTERNIMAGE_MAX_PIXELS, or Pillow's limit; None for no limit.

    Raises:
        UserError: The variable's value is not a number of pixels.
    """
    text = os.environ.get(MAX_PIXELS)
    if not text:
        return None if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS
    try:
        limit = Whole(1, 10**12).parse(text)
    except BadValue as error:
        raise UserError(f"the environment variable {MAX_PIXELS} must be {error}, got {shown(text)}") from error
    if Image.MAX_IMAGE_PIXELS is not None and limit > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = -(-limit // 2)  # otherwise Pillow would reject larger images
    return limit


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading. Opening a named pipe would wait for a writer, and a device may never end.

    Raises:
        ImageError: It is not a regular file.
        OSError: It does not exist, may not be read, and so on.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # before opening, which has side effects on some devices
        raise ImageError("not a regular file")

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    file = open(path, "rb", opener=opener)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # it was replaced in the meantime
        file.close()
        raise ImageError("not a regular file")
    return file


def read_image(source: str | Path | BinaryIO, mode: str = "RGB", upright: bool = True) -> Image.Image:
    """Decode the first frame of an image.

    Args:
        source: Path or open binary file.
        mode: Pillow's mode to convert to, such as "RGB" or "L".
        upright: Apply the Exif orientation. Cameras store the sensor's view and this tag.

    Raises:
        ImageError: It is not an image, is damaged, exceeds `pixel_limit`, or has pixels of an unknown range.
    """
    if isinstance(source, str | Path):
        try:
            with open_regular(source) as file:
                return read_image(file, mode, upright)
        except OSError as error:
            raise ImageError(reason_of(error)) from error
    decoded, orientation = _decode(source)
    image = convert_image(decoded, mode)
    transpose = _TRANSPOSES.get(orientation) if upright else None
    return image if transpose is None else image.transpose(transpose)


def _decode(source: BinaryIO) -> tuple[Image.Image, int]:
    """The first frame and its Exif orientation. Every image file that this package reads is decoded here.

    Pillow documents no set of exceptions: its decoders are some forty modules, a third of them bindings to other
    libraries, and on damaged bytes they raise whatever their parsing runs into: RuntimeError (AVIF), struct.error,
    IndexError, KeyError, SyntaxError, MemoryError, and others in other versions. So any exception in this block means
    that the image cannot be read. Apart from Pillow, the block only compares sizes.
    """
    limit = pixel_limit()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged metadata, quoting the file
            with Image.open(source, formats=formats()) as image:
                _check_size(image, limit)
                image.load()  # first: a PNG may have its Exif data at the end, and loading rotates a TIFF
                _check_size(image, limit)  # again: an icon gets the size of the picture inside it
                return image, _orientation(image)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"its pixels are {_too_large(limit)}") from error
    except UnidentifiedImageError as error:
        raise ImageError("an empty file" if source.seek(0, os.SEEK_END) == 0 else "not an image") from error
    except Exception as error:
        raise ImageError(reason_of(error)) from error


def _check_size(image: Image.Image, limit: int | None) -> None:
    if 0 in image.size:
        raise ImageError("it has no pixels")
    if limit is not None and image.width * image.height > limit:
        raise ImageError(f"{image.width} x {image.height} pixels are {_too_large(limit)}")


def _too_large(limit: int | None) -> str:
    return f"more than the limit of {limit}; the environment variable {MAX_PIXELS} sets another limit"


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # any, as in `_decode`; but the pixels are intact, so the image is used as stored
        return 1


def reason_of(error: Exception) -> str:
    """An exception's message on one line; of an OSError, without the file name, which callers add themselves."""
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)


def convert_image(image: Image.Image, mode: str) -> Image.Image:
    """Convert to a mode as Pillow does, but scale pixels of more than 8 bits, which Pillow clips at 255 (white).

    Raises:
        ImageError: The range of its pixels is unknown.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # 0 to 65535; older versions of Pillow open 16-bit PNG and PGM files in mode I
        image = image.convert("I").point([(value + 128) // 257 for value in range(65536)], "L")
    elif image.mode == "I":
        raise ImageError("32-bit integer pixels, whose range is unknown: convert it to 8 or 16 bits")
    elif image.mode == "F":
        pixels = np.asarray(image)
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # not `min < 0 or max > 1`, which is false for NaN
            raise ImageError("32-bit float pixels outside 0 to 1: scale them, or convert it to 8 or 16 bits")
        image = Image.fromarray((pixels * 255 + 0.5).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colors, without Pillow's warning
    return image.convert(mode)
