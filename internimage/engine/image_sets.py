# SPDX-License-Identifier: MIT
"""Folders and tars of images in class folders, read as timm reads them and with nothing left out in silence."""

import io
import os
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader import Reader

from ..errors import some
from .images import USUAL_ENDINGS, DataError, endings, is_clutter, is_image_name, list_images

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation"),
    "test": ("test",),
}
_ALL_SPLIT_NAMES = frozenset(name for names in _SPLIT_NAMES.values() for name in names)


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
    has_splits = split not in _ALL_SPLIT_NAMES or _ALL_SPLIT_NAMES.issuperset(inside) or _splits(root, inside)
    return root / found if has_splits else root


def _splits(root: Path, inside: list[str]) -> list[str]:
    return [name for name in inside if name in _ALL_SPLIT_NAMES and _folders(root / name)]


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
    if split and split not in _ALL_SPLIT_NAMES:
        raise DataError(f"'{root}' has no split '{split}': there is no folder of that name in it, nor other splits")
    return folder


# ---- class maps


def read_lines(path: str | Path, what: str) -> list[str]:
    """The lines of a text file that a user gave, without white space around them.

    Args:
        path: The file.
        what: What it is, for messages: "class map".

    Raises:
        DataError: It is not there, not a regular file, or not UTF-8 text.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"there is no {what} at '{path}'")
    if not path.is_file():  # a named pipe would wait forever for a writer
        raise DataError(f"'{path}' is not a regular file, so it is no {what}")
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 text (byte {error.start}), so it is no {what}") from error
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror or error}") from error


def read_class_map(path: str | Path) -> dict[str, int]:
    """Class name -> index from a file with a name a line, or from a pickled dict (`.pkl`) as timm takes them.

    Raises:
        DataError: It cannot be read, is empty, or has empty lines or a name twice.
    """
    if Path(path).suffix.lower() == ".pkl" and Path(path).is_file():
        try:
            mapping = load_class_map(str(path))
        except Exception as error:  # unpickling raises whatever a damaged file makes of it
            raise DataError(f"'{path}' is not a pickled class map: {error}") from error
        odd = [name for name, index in mapping.items() if not isinstance(index, int) or index < 0]
        if odd or not mapping:
            raise DataError(
                f"the class map '{path}' has no index of 0 or more for {some(odd) if mapping else 'any class'}"
            )
        return mapping
    names = read_lines(path, "class map")
    while names and not names[-1]:
        names.pop()
    if not names:
        raise DataError(f"the class map '{path}' is empty; it needs a class a line, in the model's order")
    if "" in names:
        raise DataError(f"line {names.index('') + 1} of the class map '{path}' is empty, which shifts all that follow")
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()
    if twice:
        raise DataError(f"the class map '{path}' names a class twice: {some(twice, 5)}")
    return {name: index for index, name in enumerate(names)}


# ---- readers


class ListedImages(Reader):
    """timm's reader interface over (file, index) pairs."""

    def __init__(self, samples: list[tuple[str | Path, int]], class_to_idx: dict[str, int] | None) -> None:
        super().__init__()
        self.samples, self.class_to_idx = samples, class_to_idx

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, target = self.samples[index]
        return open(path, "rb"), target

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = str(self.samples[index][0])
        return os.path.basename(path) if basename else path


class TarImages(Reader):
    """timm's reader interface over places in a tar.

    timm's own keeps the file open, and loader workers that were forked from a process that has read from it share one
    position in it.
    """

    def __init__(self, path: Path, samples: list[tuple["Member", int]], class_to_idx: dict[str, int]) -> None:
        super().__init__()
        self.path, self.samples, self.class_to_idx = path, samples, class_to_idx

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        member, target = self.samples[index]
        with open(self.path, "rb") as file:
            file.seek(member.offset)
            return io.BytesIO(file.read(member.size)), target

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = self.samples[index][0].name
        return name.rsplit("/", 1)[-1] if basename else name


# ---- classes


def _natural(name: str) -> tuple[list, str]:
    """timm's order, 2 before 10; and where that leaves two equal, as 1 and 01, one order on every machine."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())], name


def _index_classes(
    where: Path, classes: Iterable[str], labels: list[str], class_map: dict[str, int] | None
) -> dict[str, int]:
    """Class name -> index, checked against what is there."""
    odd = [name for name in classes if any("\ud800" <= c <= "\udfff" for c in name)]  # a run's report would fail
    if odd:
        raise DataError(f"'{where}' has class folders whose names are not UTF-8: {some(map(ascii, odd), 3)}")
    if class_map is None:
        return {name: index for index, name in enumerate(sorted(classes, key=_natural))}
    lacking = {name for name in classes if name not in class_map}
    if lacking:
        images = sum(label in lacking for label in labels)
        raise DataError(
            f"the class map lacks {len(lacking)} of the {len(set(classes))} classes of '{where}', with {images} images "
            f"({some(lacking, 5)}): add them, or take their folders out"
        )
    return class_map


def _no_class_folders(where: Path, files: list[str]) -> DataError:
    there = f"{len(files)} files ({', '.join(sorted(files)[:3])}, ...)" if files else "nothing"
    tars = sum(name.lower().endswith(".tar") for name in files)
    hint = ". A tar is given by its own name" if tars else ""
    return DataError(f"'{where}' has no class folders: expected {where}/CLASS/IMAGE, found {there}{hint}")


def _check_depth(where: Path, images: list[str], classes: list[str]) -> None:
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


def _check_empty(where: Path, images: list[str], ignored: list[str], classes: list[str]) -> None:
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
        raise _no_class_folders(folder, listing.images + listing.ignored)
    _check_empty(folder, listing.images, listing.ignored, classes)
    _check_depth(folder, listing.images, classes)
    labels = [name.split("/", 1)[0] for name in listing.images]
    class_to_idx = _index_classes(folder, classes, labels, class_map)
    samples = [(os.path.join(folder, name), class_to_idx[label]) for name, label in zip(listing.images, labels)]
    samples.sort(key=lambda sample: _natural(sample[0]))
    return ListedImages(samples, class_to_idx), [name for name in listing.ignored if "/" in name.rstrip("/")]


# ---- tars


@dataclass(frozen=True)
class Member:
    """An image in a tar."""

    name: str  # with / between its parts; a tar in the tar is a folder
    offset: int  # in the outermost file, bytes
    size: int


@dataclass
class _Contents:
    images: dict[str, Member] = field(default_factory=dict)  # by name: of two of one name the later one counts
    ignored: list[str] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)


def _scan_tar(file: BinaryIO, start: int, inside: tuple[str, ...], known: frozenset[str], contents: _Contents) -> None:
    """The members of a tar in `contents`, by its headers alone.

    Raises:
        tarfile.TarError: It is damaged. tarfile itself takes a damaged header behind the first one for the end.
    """
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            parts = [part for part in member.name.split("/") if part not in ("", ".")]
            if inside and len(parts) > 1 and parts[0] == inside[-1]:
                parts = parts[1:]  # cat.tar with cat/1.jpg in it
            name, path = "/".join((*inside, *parts)), (*inside, *parts)
            if not parts or any(part.startswith(".") for part in path[:-1]):
                continue
            if member.isdir():
                contents.folders.add(name)
            elif member.isfile() and not member.issparse() and is_image_name(parts[-1], known):
                contents.images[name] = Member(name, start + member.offset_data, member.size)
            elif member.isfile() and not member.issparse() and parts[-1].lower().endswith(".tar"):
                stem = (*path[:-1], parts[-1][:-4])
                contents.folders.add("/".join(stem))
                _scan_tar(archive.extractfile(member), start + member.offset_data, stem, known, contents)
            elif not is_clutter(parts[-1]):
                contents.ignored.append(name if member.isfile() else f"{name} (not a regular file)")
        file.seek(archive.offset)
        end = file.read(tarfile.BLOCKSIZE)
        if end != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it ends too early" if len(end) < tarfile.BLOCKSIZE else "a header is damaged")


def open_tar(path: Path, split: str = "", class_map: dict[str, int] | None = None) -> tuple[TarImages, list[str]]:
    """A tar of class folders, with or without a folder above them, or of a tar for each class.

    Args:
        path: The file; is not compressed.
        split: Of a tar with splits, this one's class folders.
        class_map: Class name -> index.

    Returns:
        As `open_folder`.

    Raises:
        DataError: It is damaged, has no images in class folders or not this split, or as `open_folder`.
    """
    contents = _Contents()
    try:
        with path.open("rb") as file:
            _scan_tar(file, 0, (), endings(), contents)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read as an uncompressed tar: {error}") from error
    if not contents.images:
        raise DataError(f"'{path}' holds no image; images end in {USUAL_ENDINGS}")
    above = _choose_above(path, list(contents.images), split)
    start = len(above)
    images = {name[start:]: member for name, member in contents.images.items() if name.startswith(above)}
    ignored = [name[start:] for name in contents.ignored if name.startswith(above)]
    folders = {name[start:] for name in contents.folders if name.startswith(above) and len(name) > start}
    classes = sorted({name.split("/", 1)[0] for name in (*images, *(f"{name}/" for name in folders)) if "/" in name})
    where = path / above.rstrip("/")
    if not classes:
        raise _no_class_folders(where, list(images))
    _check_empty(where, list(images), ignored, classes)
    _check_depth(where, list(images), classes)
    labels = [name.split("/", 1)[0] for name in images]
    class_to_idx = _index_classes(where, classes, labels, class_map)
    samples = [(member, class_to_idx[label]) for member, label in zip(images.values(), labels)]
    samples.sort(key=lambda sample: _natural(sample[0].name))
    return TarImages(path, samples, class_to_idx), [name for name in ignored if "/" in name]


def _choose_above(path: Path, images: list[str], split: str) -> str:
    """What stands before the class folders in the names of a tar, up to a /."""
    above = {name.rsplit("/", 2)[0] if name.count("/") > 1 else "" for name in images}
    splits = {place for place in above if place.rsplit("/", 1)[-1] in (*_ALL_SPLIT_NAMES, *split_names(split))}
    for name in split_names(split):
        found = sorted((place for place in splits if place.rsplit("/", 1)[-1] == name), key=len)
        if found:
            return found[0] + "/"
    if splits and split:
        there = {place.rsplit("/", 1)[-1] for place in splits}
        raise DataError(f"'{path}' has no split '{split}'; it has {some(there)}")
    if split and split not in _ALL_SPLIT_NAMES:
        raise DataError(f"'{path}' has no split '{split}', nor others")
    if len(above) == 1:
        (place,) = above
        return place + "/" if place else ""
    if len(splits) == len(above):
        raise DataError(f"'{path}' has the splits {some(splits)}: name one")
    return ""
