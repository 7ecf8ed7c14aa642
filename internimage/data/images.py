# SPDX-License-Identifier: MIT
"""Images as files: which files are images, and how one is read. Training, evaluation and prediction all come here."""

import os
import stat
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..errors import UserError, one_line, some
from ..values import BadValue, Whole, shown

# Pillow recognizes a file by its content, whatever its name. Of its formats those are read that hold pixels and that it
# decodes itself: EPS under any name would start Ghostscript, WMF calls Windows, PDF and films need other programs, FPX
# and MIC are containers of other files, and BUFR, GRIB and HDF5 are stubs for whatever a program has registered.
_FORMATS = (
    "AVIF", "BLP", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "PSD",
    "QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM",
    "HEIF", "JXL",  # of the plugins pillow_heif and pillow-jxl-plugin, where a program has registered them
)  # fmt: skip
USUAL_ENDINGS = ".jpg, .jpeg, .png, .webp, .avif, .gif, .bmp, .tiff and others that Pillow reads"

MAX_PIXELS = "INTERNIMAGE_MAX_PIXELS"  # environment variable, which loader workers inherit

_LEFT_BY_SYSTEMS = ("thumbs.db", "desktop.ini")

_TURNS = {  # Exif orientation -> what sets the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DataError(UserError, ValueError):
    """A dataset that cannot be used as it is; the message says what is there and what should be."""


class ImageError(DataError):
    """An image that cannot be read; the message is the reason alone, without the name of the file."""


def formats() -> list[str]:
    """Pillow's names of the formats that are read, as far as this Pillow has them."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def endings() -> frozenset[str]:
    """Endings of file names, in lower case and with their dot, that make a file in a folder an image."""
    taken = set(formats())
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in taken)


def is_clutter(name: str) -> bool:
    """Whether a file is one that systems leave behind and that nobody misses: hidden, Thumbs.db and the like."""
    return name.startswith(".") or name.lower() in _LEFT_BY_SYSTEMS


def is_image_name(name: str, known: frozenset[str]) -> bool:
    """Whether a file's name, without its folder, is that of an image. macOS writes `._NAME` beside `NAME`."""
    return os.path.splitext(name)[1].lower() in known and not name.startswith("._")


@dataclass
class Listing:
    """What stands below a folder, in order; names are relative to it, with / between their parts."""

    images: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)  # other files, and what only has the name of an image
    folders: list[str] = field(default_factory=list)  # visible ones


def list_images(folder: str | Path) -> Listing:
    """The images below a folder. Links are followed, hidden folders are left alone.

    An image is a regular file: to open a named pipe would wait forever for someone to write to it.

    Raises:
        DataError: A folder cannot be listed. To go on without it would leave its images out in silence.
    """
    known, listing = endings(), Listing()
    stack = [(os.fspath(folder), "", ())]
    while stack:
        path, inside, above = stack.pop()
        try:
            status = os.stat(path)
            here = (status.st_dev, status.st_ino)
            if here in above:
                listing.ignored.append(f"{inside} (a link to a folder above it)")
                continue
            with os.scandir(path) as found:
                entries = sorted(found, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise DataError(f"the folder '{path}' cannot be listed: {error.strerror or error}") from error
        if inside:
            listing.folders.append(inside[:-1])
        for entry in entries:
            name = inside + entry.name
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                is_folder = is_file = False
            if is_folder and entry.name.startswith("."):
                listing.ignored += [f"{name}/"] if inside else []
            elif is_folder:
                stack.append((entry.path, name + "/", (*above, here)))
            elif is_image_name(entry.name, known):
                if is_file:
                    listing.images.append(name)
                else:
                    listing.ignored.append(f"{name} (not a regular file)")
            elif not is_clutter(entry.name):
                listing.ignored.append(name)
    for names in (listing.images, listing.ignored, listing.folders):
        names.sort()
    return listing


def ignored_message(where: str | Path, ignored: list[str]) -> str:
    """One line about files that are left out."""
    files = f"{len(ignored)} files are" if len(ignored) > 1 else "1 file is"
    return f"'{where}': {files} left out, not taken for images: {some(ignored, 5)}"


def most_pixels() -> int | None:
    """How many pixels an image may have: INTERNIMAGE_MAX_PIXELS, or what Pillow itself refuses; None is no limit.

    Raises:
        UserError: The variable's value is no number of pixels.
    """
    text = os.environ.get(MAX_PIXELS)
    if not text:
        return None if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS
    try:
        limit = Whole(1, 10**12).parse(text)
    except BadValue as error:
        raise UserError(f"the environment variable {MAX_PIXELS} must be {error}, got {shown(text)}") from error
    if Image.MAX_IMAGE_PIXELS is not None and limit > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = -(-limit // 2)  # else Pillow refuses what was asked for
    return limit


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to read it. A named pipe would wait forever for a writer, and a device may never end.

    Raises:
        ImageError: It is not a regular file.
        OSError: It is not there, or the like.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # before it is opened, which is an event to some devices
        raise ImageError("not a regular file")

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    file = open(path, "rb", opener=opener)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # another one took its place
        file.close()
        raise ImageError("not a regular file")
    return file


def read_image(source: str | Path | BinaryIO, mode: str | None = "RGB", upright: bool = True) -> Image.Image:
    """Decode the first frame of an image.

    Args:
        source: Path or open file.
        mode: Pillow's, "RGB" or "L"; None leaves the image's own.
        upright: Turn the image as its Exif orientation says. Cameras store the sensor's view and this tag.

    Raises:
        ImageError: It is not an image, is damaged, has more than `most_pixels`, or pixels whose range is not known.
    """
    if isinstance(source, str | Path):
        try:
            with open_regular(source) as file:
                return read_image(file, mode, upright)
        except OSError as error:
            raise ImageError(why(error)) from error
    image, orientation = _decode(source)
    image = image.copy() if mode is None else _convert(image, mode)
    turn = _TURNS.get(orientation) if upright else None
    return image if turn is None else image.transpose(turn)


def _decode(source: BinaryIO) -> tuple[Image.Image, int]:
    """The first frame and its Exif orientation. All files that this package takes for images are decoded here.

    Pillow promises no kind of error: its decoders are some forty modules, a third of them bindings to other libraries,
    and what they let pass on damaged bytes is whatever their parsing meets, such as RuntimeError (AVIF), struct.error,
    IndexError, KeyError, SyntaxError or MemoryError, and other ones in other versions. So any exception from in there
    says that this image cannot be read. Beside Pillow's code nothing is called in there but a comparison of sizes.
    """
    limit = most_pixels()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, in the words of the file
            with Image.open(source, formats=formats()) as image:
                _check_size(image, limit)
                image.load()  # first: a PNG may have its Exif data at the end, and a TIFF is turned in this
                _check_size(image, limit)  # an icon's is that of the picture in it
                return image, _orientation(image)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(_too_large(limit)) from error
    except UnidentifiedImageError as error:
        raise ImageError("an empty file" if source.seek(0, os.SEEK_END) == 0 else "not an image") from error
    except Exception as error:
        raise ImageError(why(error)) from error


def _check_size(image: Image.Image, limit: int | None) -> None:
    if 0 in image.size:
        raise ImageError("it has no pixels")
    if limit is not None and image.width * image.height > limit:
        raise ImageError(f"{image.width} x {image.height} pixels are {_too_large(limit)}")


def _too_large(limit: int | None) -> str:
    return f"more than the {limit} that are read; {MAX_PIXELS} sets another limit"


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as in `_decode`; but damaged Exif data are no damaged picture
        return 1


def why(error: Exception) -> str:
    """The reason in few words: of an OSError without the file's name, which stands beside it."""
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)


def convert_image(image: Image.Image, mode: str | None) -> Image.Image:
    """An image that is open already, in a mode; as `read_image` does it.

    Raises:
        ImageError: It has pixels whose range is not known.
    """
    return image if mode is None else _convert(image, mode)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Pillow's conversion; but Pillow cuts pixels of more than 8 bits off at 255, which makes them white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # 0 to 65535; Pillow has 16-bit PNG and PGM files in mode I up to some version
        image = image.convert("I").point([(value + 128) // 257 for value in range(65536)], "L")
    elif image.mode == "I":
        raise ImageError("32-bit integer pixels, whose range is not known: convert it to 8 or 16 bits")
    elif image.mode == "F":
        pixels = np.asarray(image)
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # not <, which NaN would pass
            raise ImageError("32-bit float pixels outside 0 to 1: scale them, or convert it to 8 or 16 bits")
        image = Image.fromarray((pixels * 255 + 0.5).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colors, without Pillow's warning
    return image.convert(mode)
