# SPDX-License-Identifier: MIT
"""Folders of class folders, read in timm's order; problems are errors, and ignored files are reported."""

import io
import os
import pickle
import pickletools
import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from timm.data.readers.reader import Reader

from ..errors import list_some, one_line
from .images import COMMON_EXTENSIONS, DataError, ImageError, list_images, open_regular, reason_of

_MOST_BYTES, _MOST_LINES = 1 << 27, 4_000_000  # of class maps and labels; ImageNet-1k's training list has 42 MB
_OPCODES = frozenset(  # of pickles of a dict of strings and integers
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
    """The synonyms of a split's name, the given one first."""
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
    """The folder of a split below `root` (`val` also finds `validation` and the like), or `root` if it has no splits.

    A class may be called `train` and show trains: such a folder is not a split if there are folders of other names
    beside it and no folder with the name of a split contains folders.

    Raises:
        DataError: `root` is empty, or is a folder that cannot be listed.
    """
    if str(root) == "":
        raise DataError("the name of the data folder is empty")
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
    """The folder of class folders of a split: `root` itself if it has no splits.

    Raises:
        DataError: It has splits, but not this one. Taken for class folders, they would be merged.
    """
    folder = find_split(root, split)
    if folder != Path(root):
        return folder
    splits = _splits(folder, _folders(folder))
    if splits and not split:
        raise DataError(f"'{root}' has the splits {list_some(splits)} and no class folders: give one of these folders")
    if splits:
        raise DataError(f"'{root}' has no split '{split}'; it has {list_some(splits)}")
    if split and split not in ALL_SPLIT_NAMES:
        raise DataError(f"'{root}' has no split '{split}': it has no folder of that name, and no other splits")
    return folder


# ---- class maps


def read_lines(path: str | Path, what: str) -> list[str]:
    """The lines of a text file given by the user, stripped of surrounding white space.

    Args:
        path: The file.
        what: What it is, for messages, such as "class map".

    Raises:
        DataError: It does not exist, is not a regular file or UTF-8 text, or exceeds 128 MiB or 4 million lines.
    """
    lines = []
    try:
        with io.TextIOWrapper(open_list(path, what), encoding="utf-8-sig") as file:
            for line in file:
                lines.append(line.strip())
                if len(lines) > _MOST_LINES:
                    raise DataError(f"'{path}' has more than {_MOST_LINES} lines, so it is not a {what}")
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 text (byte {error.start}), so it is not a {what}") from error
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror or error}") from error
    return lines


def open_list(path: str | Path, what: str) -> BinaryIO:
    """Open a file that will be read into memory as a whole.

    Args:
        path, what: As in `read_lines`.

    Raises:
        DataError: It does not exist, is not a regular file, or exceeds 128 MiB.
    """
    if not Path(path).exists():
        raise DataError(f"there is no {what} at '{path}'")
    try:
        file = open_regular(path)
    except ImageError as error:
        raise DataError(f"'{path}' is {error}, so it is not a {what}") from error
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror or error}") from error
    if os.fstat(file.fileno()).st_size > _MOST_BYTES:
        file.close()
        raise DataError(f"'{path}' has more than {_MOST_BYTES >> 20} MiB, so it is not a {what}")
    return file


def _unpickle(path: str | Path) -> dict[Any, Any]:
    """A pickled dict of class names. Only the opcodes that build one are allowed, and none of these calls anything."""
    with open_list(path, "class map") as file:
        data = file.read()
    try:
        unexpected = next(
            (
                code.name
                for code, argument, _ in pickletools.genops(data)
                if code.name not in _OPCODES
                # the memo is allocated up to the index
                or (code.name.endswith("PUT") and isinstance(argument, int) and argument > len(data))
            ),
            None,
        )
        mapping = None if unexpected else pickle.loads(data)
    except (ValueError, pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"'{path}' is not a pickled class map: {one_line(error)}") from error
    if unexpected:
        raise DataError(f"'{path}' is not a pickled class map: it has the opcode {unexpected}")
    if not isinstance(mapping, dict) or not all(isinstance(name, str | int) for name in mapping):
        raise DataError(f"'{path}' is not a pickled class map, which is a dict of class names and their indices")
    return mapping


def read_class_map(path: str | Path) -> dict[str, int]:
    """Class name -> index, from a file with one name per line, or from a pickled dict (`.pkl`) such as timm reads.

    Raises:
        DataError: It cannot be read, is empty, or has empty lines or a duplicate name.
    """
    if Path(path).suffix.lower() == ".pkl" and Path(path).is_file():
        mapping = _unpickle(path)
        invalid = [name for name, index in mapping.items() if type(index) is not int or not 0 <= index < _MOST_LINES]
        if invalid or not mapping:
            raise DataError(
                f"the class map '{path}' has no index from 0 to {_MOST_LINES - 1} for "
                f"{list_some(invalid) if mapping else 'any class'}"
            )
        return mapping
    names = read_lines(path, "class map")
    while names and not names[-1]:
        names.pop()
    if not names:
        raise DataError(f"the class map '{path}' is empty; it needs one class per line, in the model's order")
    if "" in names:
        line = names.index("") + 1
        raise DataError(f"line {line} of the class map '{path}' is empty, which would shift the classes after it")
    duplicates = [name for name, count in Counter(names).items() if count > 1]
    if duplicates:
        raise DataError(f"the class map '{path}' names a class twice: {list_some(duplicates, 5)}")
    return {name: index for index, name in enumerate(names)}


# ---- readers


class FileReader(Reader):
    """timm's reader interface over a list of files.

    Args:
        root: The folder of the images.
        samples: (path, class index) pairs.
        class_to_idx: Class name -> index; None if the classes have no names.
    """

    def __init__(self, root: Path, samples: list[tuple[str, int]], class_to_idx: dict[str, int] | None) -> None:
        super().__init__()
        self.root, self.samples, self.class_to_idx = str(root), samples, class_to_idx

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, target = self.samples[index]
        try:
            return open_regular(path), target
        except OSError as error:  # it was deleted, or may not be read
            raise ImageError(reason_of(error)) from error

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = str(self.samples[index][0])
        return os.path.basename(path) if basename else path


# ---- classes


def natural_key(name: str) -> list[int | str]:
    """Sort key of timm's natural order, 2 before 10. Sort by name first: 1 and 01 have the same key."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def index_images(
    where: Path, images: list[str], ignored: list[str], classes: list[str], class_map: dict[str, int] | None
) -> tuple[list[int], dict[str, int]]:
    """Check a listing of class folders and number its classes.

    Args:
        where: The folder or tar, for messages.
        images, ignored: Names of the image files and of others, relative to `where`.
        classes: Names of the class folders.
        class_map: Class name -> index; None numbers the classes in natural order.

    Returns:
        The class index of each image, and class name -> index.

    Raises:
        DataError: A class has no image, images are beside or below the class folders, or the class map lacks a class.
    """
    _check_empty(where, images, ignored, classes)
    _check_depth(where, images, classes)
    labels = [name.split("/", 1)[0] for name in images]
    class_to_idx = _index_classes(where, classes, labels, class_map)
    return [class_to_idx[label] for label in labels], class_to_idx


def _index_classes(
    where: Path, classes: list[str], labels: list[str], class_map: dict[str, int] | None
) -> dict[str, int]:
    if class_map is None:
        return {name: index for index, name in enumerate(sorted(sorted(classes), key=natural_key))}
    lacking = {name for name in classes if name not in class_map}
    if lacking:
        images = sum(label in lacking for label in labels)
        raise DataError(
            f"the class map lacks {len(lacking)} of the {len(classes)} classes of '{where}', with {images} images "
            f"({list_some(lacking, 5)}): add them to the map, or remove their folders"
        )
    return class_map


def no_class_folders(where: Path, files: list[str]) -> DataError:
    """The error for a folder or tar without class folders.

    Args:
        where: The folder or tar.
        files: Names of the files that it contains instead.
    """
    there = f"{len(files)} files ({', '.join(sorted(files)[:3])}, ...)" if files else "nothing"
    tars = sum(name.lower().endswith(".tar") for name in files)
    hint = ". Name a tar file itself, not its folder" if tars else ""
    return DataError(f"'{where}' has no class folders: expected {where}/CLASS/IMAGE, found {there}{hint}")


def _check_depth(where: Path, images: list[str], classes: list[str]) -> None:
    """Check that every image is directly in a class folder."""
    deep = {PurePosixPath(name).parent.name for name in images if name.count("/") > 1}
    if deep:
        raise DataError(
            f"'{where}' has images in folders below its class folders, and these would become classes of their own "
            f"({list_some(deep, 3)}, beside {list_some(classes, 3)}): give the folder that contains the class folders, "
            f"and keep the images of a class in one folder"
        )
    beside = [name for name in images if "/" not in name]
    if beside:
        raise DataError(f"'{where}' has images beside its class folders, which have no class: {list_some(beside, 3)}")


def _check_empty(where: Path, images: list[str], ignored: list[str], classes: list[str]) -> None:
    """Check that every class has images: dropping an empty class would shift the indices of the classes after it."""
    full = {name.split("/", 1)[0] for name in images}
    for name in classes:
        if name not in full:
            others = [file.split("/", 1)[1] for file in ignored if file.startswith(f"{name}/")]
            found = f"only {list_some(others, 3)}" if others else "it is empty"
            raise DataError(
                f"the class folder '{where}/{name}' contains no image ({found}); image files end in "
                f"{COMMON_EXTENSIONS}. Add some or remove the folder"
            )


def open_folder(folder: Path, class_map: dict[str, int] | None = None) -> tuple[FileReader, list[str]]:
    """Open a folder of class folders, with all checks.

    Returns:
        The reader, in timm's order; and the files in class folders that are not images, to be reported.

    Raises:
        DataError: There are no class folders; one contains no image; images are beside or below them; the class map
            lacks a class; a folder cannot be listed.
    """
    listing = list_images(folder)
    classes = [name for name in listing.folders if "/" not in name]
    if not classes:
        raise no_class_folders(folder, listing.images + listing.ignored)
    targets, class_to_idx = index_images(folder, listing.images, listing.ignored, classes, class_map)
    samples = [(os.path.join(folder, name), target) for name, target in zip(listing.images, targets)]
    samples.sort(key=lambda sample: natural_key(sample[0]))
    return FileReader(folder, samples, class_to_idx), [name for name in listing.ignored if "/" in name.rstrip("/")]
