# SPDX-License-Identifier: MIT
"""Folders of images in class folders, read as timm reads them and with nothing left out in silence."""

import io
import os
import pickle
import pickletools
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from timm.data.readers.reader import Reader

from ..errors import one_line, some
from .images import USUAL_ENDINGS, DataError, ImageError, list_images, open_regular, why

_MOST_BYTES, _MOST_LINES = 1 << 27, 4_000_000  # of class maps and labels; ImageNet-1k's training images have 42 MB
_INSTRUCTIONS = frozenset(  # of pickles of a dict of text and whole numbers
    "PROTO FRAME STOP MARK EMPTY_DICT DICT SETITEM SETITEMS UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 STRING "
    "SHORT_BINSTRING BINSTRING INT BININT BININT1 BININT2 LONG LONG1 PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET "
    "LONG_BINGET".split()
)

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation"),
    "test": ("test",),
}
ALL_SPLIT_NAMES = frozenset(name for names in _SPLIT_NAMES.values() for name in names)


def split_names(split: str) -> list[str]:
    """The words for a split, the given one first."""
    names = next((names for names in _SPLIT_NAMES.values() if split in names), ())
    return [split, *(name for name in names if name != split)] if split else []


# ---- splits of a folder


def _folders(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"the folder '{root}' cannot be listed: {error.strerror or error}") from error


def find_split(root: str | Path, split: str) -> Path:
    """The folder of a split below `root` (`val` also finds `validation` and the like), or `root` if it has none.

    Among classes a folder may be called `train` and show trains: it is no split if it stands beside folders of other
    names and none that is called like a split has folders in it.

    Raises:
        DataError: `root` is empty, or is a folder that cannot be listed.
    """
    if str(root) == "":
        raise DataError("the name of the data's folder is empty")
    root = Path(root)
    if not root.is_dir():
        return root
    inside = _folders(root)
    found = next((name for name in split_names(split) if name in inside), None)
    if found is None:
        return root
    has_splits = split not in ALL_SPLIT_NAMES or ALL_SPLIT_NAMES.issuperset(inside) or _splits(root, inside)
    return root / found if has_splits else root


def _splits(root: Path, inside: list[str]) -> list[str]:
    return [name for name in inside if name in ALL_SPLIT_NAMES and _folders(root / name)]


def choose_folder(root: str | Path, split: str) -> Path:
    """The folder of class folders for a split: `root` itself where it has no splits.

    Raises:
        DataError: It has splits and not this one. Taken for class folders they would be merged.
    """
    folder = find_split(root, split)
    if folder != Path(root):
        return folder
    splits = _splits(folder, _folders(folder))
    if splits and not split:
        raise DataError(f"'{root}' has the splits {some(splits)} and no class folders: give one of these folders")
    if splits:
        raise DataError(f"'{root}' has no split '{split}'; it has {some(splits)}")
    if split and split not in ALL_SPLIT_NAMES:
        raise DataError(f"'{root}' has no split '{split}': there is no folder of that name in it, nor other splits")
    return folder


# ---- class maps


def read_lines(path: str | Path, what: str) -> list[str]:
    """The lines of a text file that a user gave, without white space around them.

    Args:
        path: The file.
        what: What it is, for messages: "class map".

    Raises:
        DataError: It is not there, not a regular file, not UTF-8 text, or has more than 128 MiB or 4 million lines.
    """
    lines = []
    try:
        with io.TextIOWrapper(open_list(path, what), encoding="utf-8-sig") as file:
            for line in file:
                lines.append(line.strip())
                if len(lines) > _MOST_LINES:
                    raise DataError(f"'{path}' has more than {_MOST_LINES} lines, so it is no {what}")
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 text (byte {error.start}), so it is no {what}") from error
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror or error}") from error
    return lines


def open_list(path: str | Path, what: str) -> BinaryIO:
    """Open a file that is to be read into memory.

    Args:
        path, what: As in `read_lines`.

    Raises:
        DataError: It is not there, not a regular file, or has more than 128 MiB.
    """
    if not Path(path).exists():
        raise DataError(f"there is no {what} at '{path}'")
    try:
        file = open_regular(path)
    except ImageError as error:
        raise DataError(f"'{path}' is {error}, so it is no {what}") from error
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror or error}") from error
    if os.fstat(file.fileno()).st_size > _MOST_BYTES:
        file.close()
        raise DataError(f"'{path}' has more than {_MOST_BYTES >> 20} MiB, so it is no {what}")
    return file


def _unpickle(path: str | Path) -> dict[str, int]:
    """A pickled dict of class names. Only instructions are followed that make one: none of these calls anything."""
    with open_list(path, "class map") as file:
        data = file.read()
    try:
        odd = next(
            (
                code.name
                for code, argument, _ in pickletools.genops(data)
                if code.name not in _INSTRUCTIONS
                or (code.name.endswith("PUT") and argument > len(data))  # room would be made up to there
            ),
            None,
        )
        mapping = None if odd else pickle.loads(data)
    except (ValueError, pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"'{path}' is not a pickled class map: {one_line(error)}") from error
    if odd:
        raise DataError(f"'{path}' is not a pickled class map: it has the instruction {odd}")
    if not isinstance(mapping, dict) or not all(isinstance(name, str | int) for name in mapping):
        raise DataError(f"'{path}' is not a pickled class map, which is a dict of class names and their indices")
    return mapping


def read_class_map(path: str | Path) -> dict[str, int]:
    """Class name -> index from a file with a name a line, or from a pickled dict (`.pkl`) as timm takes them.

    Raises:
        DataError: It cannot be read, is empty, or has empty lines or a name twice.
    """
    if Path(path).suffix.lower() == ".pkl" and Path(path).is_file():
        mapping = _unpickle(path)
        odd = [name for name, index in mapping.items() if type(index) is not int or not 0 <= index < _MOST_LINES]
        if odd or not mapping:
            raise DataError(
                f"the class map '{path}' has no index from 0 to {_MOST_LINES - 1} for "
                f"{some(odd) if mapping else 'any class'}"
            )
        return mapping
    names = read_lines(path, "class map")
    while names and not names[-1]:
        names.pop()
    if not names:
        raise DataError(f"the class map '{path}' is empty; it needs a class a line, in the model's order")
    if "" in names:
        raise DataError(f"line {names.index('') + 1} of the class map '{path}' is empty, which shifts all that follow")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"the class map '{path}' names a class twice: {some(twice, 5)}")
    return {name: index for index, name in enumerate(names)}


# ---- readers


class ListedImages(Reader):
    """timm's reader interface over (file, index) pairs below a root."""

    def __init__(self, root: Path, samples: list[tuple[str, int]], class_to_idx: dict[str, int] | None) -> None:
        super().__init__()
        self.root, self.samples, self.class_to_idx = str(root), samples, class_to_idx

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, target = self.samples[index]
        try:
            return open_regular(path), target
        except OSError as error:  # it is gone, or not to be read by us
            raise ImageError(why(error)) from error

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = str(self.samples[index][0])
        return os.path.basename(path) if basename else path


# ---- classes


def natural(name: str) -> list[int | str]:
    """timm's order, 2 before 10. To be given sorted names: it has 1 and 01 for equal and leaves them as they are."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def index_classes(
    where: Path, classes: Iterable[str], labels: list[str], class_map: dict[str, int] | None
) -> dict[str, int]:
    """Class name -> index, checked against what is there."""
    if class_map is None:
        return {name: index for index, name in enumerate(sorted(sorted(classes), key=natural))}
    lacking = {name for name in classes if name not in class_map}
    if lacking:
        images = sum(label in lacking for label in labels)
        raise DataError(
            f"the class map lacks {len(lacking)} of the {len(set(classes))} classes of '{where}', with {images} images "
            f"({some(lacking, 5)}): add them, or take their folders out"
        )
    return class_map


def no_class_folders(where: Path, files: list[str]) -> DataError:
    there = f"{len(files)} files ({', '.join(sorted(files)[:3])}, ...)" if files else "nothing"
    tars = sum(name.lower().endswith(".tar") for name in files)
    hint = ". A tar is given by its own name" if tars else ""
    return DataError(f"'{where}' has no class folders: expected {where}/CLASS/IMAGE, found {there}{hint}")


def check_depth(where: Path, images: list[str], classes: list[str]) -> None:
    """Every image stands in a class folder, and in no folder below it."""
    deep = {PurePosixPath(name).parent.name for name in images if name.count("/") > 1}
    if deep:
        raise DataError(
            f"'{where}' has images in folders below its class folders, and these would become classes of their own "
            f"({some(deep, 3)}, beside {some(classes, 3)}): give the folder that holds the class folders, and keep the "
            f"images of a class in one folder"
        )
    beside = [name for name in images if "/" not in name]
    if beside:
        raise DataError(f"'{where}' has images beside its class folders, which have no class: {some(beside, 3)}")


def check_empty(where: Path, images: list[str], ignored: list[str], classes: list[str]) -> None:
    """An empty class would be left out in silence and shift the indices of all that follow."""
    full = {name.split("/", 1)[0] for name in images}
    for name in classes:
        if name not in full:
            others = [file.split("/", 1)[1] for file in ignored if file.startswith(f"{name}/")]
            found = f"only {some(others, 3)}" if others else "it is empty"
            raise DataError(
                f"class folder '{where}/{name}' holds no image ({found}); images end in {USUAL_ENDINGS}. Add some or "
                f"remove the folder"
            )


def open_folder(folder: Path, class_map: dict[str, int] | None = None) -> tuple[ListedImages, list[str]]:
    """A folder of class folders, looked over before anything is computed.

    Returns:
        The reader, in timm's order; and the files in class folders that are no images, to be told.

    Raises:
        DataError: There are no class folders; one holds no image; images stand beside or below them; the class map
            lacks a class; a folder cannot be listed.
    """
    listing = list_images(folder)
    classes = [name for name in listing.folders if "/" not in name]
    if not classes:
        raise no_class_folders(folder, listing.images + listing.ignored)
    check_empty(folder, listing.images, listing.ignored, classes)
    check_depth(folder, listing.images, classes)
    labels = [name.split("/", 1)[0] for name in listing.images]
    class_to_idx = index_classes(folder, classes, labels, class_map)
    samples = [(os.path.join(folder, name), class_to_idx[label]) for name, label in zip(listing.images, labels)]
    samples.sort(key=lambda sample: natural(sample[0]))
    return ListedImages(folder, samples, class_to_idx), [name for name in listing.ignored if "/" in name.rstrip("/")]
