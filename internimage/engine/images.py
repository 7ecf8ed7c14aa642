# SPDX-License-Identifier: MIT
"""Images as files: which files are images, and how one is read. Training, evaluation and prediction all come here."""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..errors import UserError, some

# Formats of Pillow that are left alone: vector graphics and containers that need other programs to be decoded (EPS
# would start Ghostscript), films, and those whose endings mean other things elsewhere (.pcd point clouds, .gbr Gerber).
_NOT_TAKEN = frozenset(
    "BUFR CUR DCX EPS FITS FLI FTEX GBR GRIB HDF5 IM IMT IPTC MCIDAS MPEG MSP PCD PIXAR SPIDER WMF XVTHUMB".split()
)
USUAL_ENDINGS = ".jpg, .jpeg, .png, .webp, .avif, .gif, .bmp, .tiff and others that Pillow reads"

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
    """Pillow's names of the formats that are read, those of plugins such as pillow_heif among them."""
    Image.init()
    return [name for name in Image.ID if name not in _NOT_TAKEN]


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


def read_image(source: str | Path | BinaryIO, mode: str | None = "RGB", upright: bool = True) -> Image.Image:
    """Decode the first frame of an image.

    Args:
        source: Path or open file.
        mode: Pillow's, "RGB" or "L"; None leaves the image's own.
        upright: Turn the image as its Exif orientation says. Cameras store the sensor's view and this tag.

    Raises:
        ImageError: It is not an image, is damaged, or has pixels whose range is not known.
    """
    if isinstance(source, str | Path):
        try:
            if not stat.S_ISREG(os.stat(source).st_mode):
                raise ImageError("not a regular file")
        except OSError as error:
            raise ImageError(why(error)) from error
    try:
        with Image.open(source, formats=formats()) as image:
            image.load()  # first: a PNG may have its Exif data at the end, and a TIFF is turned in this
            turn = _TURNS.get(_orientation(image)) if upright else None
            image = image.copy() if mode is None else _convert(image, mode)
            return image if turn is None else image.transpose(turn)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("an empty file" if _is_empty(source) else "not an image") from error
    except Exception as error:  # Pillow's decoders raise whatever their parsing of a damaged file meets
        raise ImageError(why(error)) from error


def why(error: Exception) -> str:
    """The reason in few words: of an OSError without the file's name, which stands beside it."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def convert_image(image: Image.Image, mode: str | None) -> Image.Image:
    """An image that is open already, in a mode; as `read_image` does it.

    Raises:
        ImageError: It has pixels whose range is not known.
    """
    return image if mode is None else _convert(image, mode)


def _is_empty(source: str | Path | BinaryIO) -> bool:
    if isinstance(source, str | Path):
        return os.path.getsize(source) == 0
    return source.seek(0, os.SEEK_END) == 0


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged Exif data are no damaged picture
        return 1


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Pillow's conversion; but Pillow cuts pixels of more than 8 bits off at 255, which makes them white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # 0 to 65535; Pillow has 16-bit PNG and PGM files in mode I up to some version
        image = Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).astype(np.uint8))
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
