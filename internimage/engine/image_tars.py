# SPDX-License-Identifier: MIT
"""Tars of images in class folders, under the rules of folders."""

import io
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from timm.data.readers.reader import Reader

from ..errors import some
from .image_sets import (
    ALL_SPLIT_NAMES,
    check_depth,
    check_empty,
    index_classes,
    natural,
    no_class_folders,
    split_names,
)
from .images import USUAL_ENDINGS, DataError, endings, is_clutter, is_image_name


@dataclass(frozen=True)
class Member:
    """An image in a tar."""

    name: str  # with / between its parts; a tar in the tar is a folder
    offset: int  # in the outermost file, bytes
    size: int


class TarImages(Reader):
    """timm's reader interface over places in a tar.

    timm's own keeps the file open, and loader workers that were forked from a process that has read from it share one
    position in it.
    """

    def __init__(self, path: Path, samples: list[tuple[Member, int]], class_to_idx: dict[str, int]) -> None:
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
        raise no_class_folders(where, list(images))
    check_empty(where, list(images), ignored, classes)
    check_depth(where, list(images), classes)
    labels = [name.split("/", 1)[0] for name in images]
    class_to_idx = index_classes(where, classes, labels, class_map)
    samples = [(member, class_to_idx[label]) for member, label in zip(images.values(), labels)]
    samples.sort(key=lambda sample: natural(sample[0].name))
    return TarImages(path, samples, class_to_idx), [name for name in ignored if "/" in name]


def _choose_above(path: Path, images: list[str], split: str) -> str:
    """What stands before the class folders in the names of a tar, up to a /."""
    above = {name.rsplit("/", 2)[0] if name.count("/") > 1 else "" for name in images}
    splits = {place for place in above if place.rsplit("/", 1)[-1] in (*ALL_SPLIT_NAMES, *split_names(split))}
    for name in split_names(split):
        found = sorted((place for place in splits if place.rsplit("/", 1)[-1] == name), key=len)
        if found:
            return found[0] + "/"
    if splits and split:
        there = {place.rsplit("/", 1)[-1] for place in splits}
        raise DataError(f"'{path}' has no split '{split}'; it has {some(there)}")
    if split and split not in ALL_SPLIT_NAMES:
        raise DataError(f"'{path}' has no split '{split}', nor others")
    if len(above) == 1:
        (place,) = above
        return place + "/" if place else ""
    if len(splits) == len(above):
        raise DataError(f"'{path}' has the splits {some(splits)}: name one")
    return ""
