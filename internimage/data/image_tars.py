# SPDX-License-Identifier: MIT
"""Tars of images in class folders, under the rules of folders.

A tar has no table of contents: a header that is lost takes all that follow it along. So a tar is read whole or refused.
"""

import io
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from timm.data.readers.reader import Reader

from ..errors import some
from .image_sets import ALL_SPLIT_NAMES, check_depth, check_empty, index_classes, natural, no_class_folders, split_names
from .images import USUAL_ENDINGS, DataError, ImageError, endings, is_clutter, is_image_name, open_regular, why

_BLOCK = tarfile.BLOCKSIZE
_END = 2 * _BLOCK  # zeros, which stand behind the last member
# tar fills its last record with zeros. GNU tar and Python write records of 10 KiB, and tar -b makes larger ones.
_RECORDS = (tarfile.RECORDSIZE, *(_BLOCK << power for power in range(5, 12)))
_LONGEST_HEADER = 1 << 20  # bytes, of a member, with its long name and its extended headers
_DEEPEST = 8  # tars in tars


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
        try:
            with open_regular(self.path) as file:
                file.seek(member.offset)
                data = file.read(member.size)
        except OSError as error:
            raise ImageError(why(error)) from error
        if len(data) < member.size:
            raise ImageError("the tar has become shorter")
        return io.BytesIO(data), target

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = self.samples[index][0].name
        return name.rsplit("/", 1)[-1] if basename else name


class _Part:
    """A part of an open file as tarfile reads it, which believes the sizes that stand in headers.

    It would go back and forth without end between members of negative size, read on behind the end of the file in
    search of a line's end, and read a name of any length into memory.
    """

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self.file, self.start, self.size = file, start, size
        self._position, self._left = 0, _LONGEST_HEADER

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        """tarfile does this once for each member."""
        if not 0 <= position <= self.size:
            raise tarfile.ReadError("unexpected end of data")
        self._position, self._left = position, _LONGEST_HEADER
        return position

    def read(self, size: int) -> bytes:
        self._left -= size
        if size < 0 or self._left < 0:
            raise tarfile.ReadError(f"a header has more than {_LONGEST_HEADER} bytes")
        self.file.seek(self.start + self._position)
        data = self.file.read(min(size, self.size - self._position))
        self._position += len(data)
        return data


@dataclass
class _Contents:
    images: dict[str, Member] = field(default_factory=dict)  # by name
    ignored: list[str] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)


def _scan_tar(part: _Part, inside: tuple[str, ...], known: frozenset[str], contents: _Contents, depth: int = 1) -> None:
    """The members of a tar in `contents`, by its headers alone.

    Raises:
        tarfile.TarError: It is damaged.
    """
    if depth > _DEEPEST:
        raise tarfile.ReadError(f"more than {_DEEPEST} tars in each other")
    with tarfile.open(fileobj=part, mode="r:") as archive:
        end = 0
        while (member := archive.next()) is not None:
            archive.members.clear()  # tarfile keeps them all
            if member.size < 0 or archive.offset <= end:
                raise tarfile.ReadError("a header has a negative size")
            if _is_plain(member) and member.offset_data + member.size > archive.offset:
                raise tarfile.ReadError("the sizes in a header and its extended header differ")
            end = archive.offset
            _take(part, member, inside, known, contents, depth)
        end = archive.offset
    _check_end(part, end)


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Whether a member is a file whose bytes stand in the tar as they are."""
    return member.isfile() and not member.issparse()


def _take(
    part: _Part,
    member: tarfile.TarInfo,
    inside: tuple[str, ...],
    known: frozenset[str],
    contents: _Contents,
    depth: int,
) -> None:
    """A member in `contents`; a tar's own members are."""
    parts = [name for name in member.name.split("/") if name not in ("", ".")]
    if inside and len(parts) > 1 and parts[0] == inside[-1]:
        parts = parts[1:]  # cat.tar with cat/1.jpg in it
    name, path = "/".join((*inside, *parts)), (*inside, *parts)
    if ".." in parts:
        contents.ignored.append(f"{name} (outside of the tar)")
        return
    if not parts or any(above.startswith(".") for above in path[:-1]):
        return
    start, plain = part.start + member.offset_data, _is_plain(member)
    if member.isdir():
        contents.folders.add(name)
    elif plain and is_image_name(parts[-1], known):
        if name in contents.images:  # as when a tar that was appended to is unpacked, the later one counts
            contents.ignored.append(f"{name} (replaced by a later one)")
        contents.images[name] = Member(name, start, member.size)
    elif plain and parts[-1].lower().endswith(".tar"):
        stem = (*path[:-1], parts[-1][:-4])
        contents.folders.add("/".join(stem))
        _scan_tar(_Part(part.file, start, member.size), stem, known, contents, depth + 1)
    elif not is_clutter(parts[-1]):
        kind = "" if plain else " (sparse)" if member.isfile() else " (not a regular file)"
        contents.ignored.append(f"{name}{kind}")


def _check_end(part: _Part, end: int) -> None:
    """tarfile takes a damaged header behind the first one for the end, and a block of zeros, too.

    Raises:
        tarfile.ReadError: At `end` there is not what tar writes behind the last member, up to the end of the file.
    """
    rest = part.size - end
    part.seek(end)
    first = part.read(_BLOCK)
    if len(first) == _BLOCK and any(first):
        raise tarfile.ReadError("a header is damaged")
    if rest < _END:
        raise tarfile.ReadError("it ends too early")
    part.file.seek(part.start + end)
    if any(part.file.read(min(rest, _END + max(_RECORDS)))):
        raise tarfile.ReadError(
            "more follows behind its end: a header is lost, or tars were joined, which can be unpacked"
        )
    full = (part.size % record == 0 and rest - _END < record for record in _RECORDS)
    if rest != _END and not any(full):
        raise tarfile.ReadError(f"it ends in {rest} bytes of zeros, more than tar writes: its last part is lost")


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
        with open_regular(path) as file:
            _scan_tar(_Part(file, 0, os.fstat(file.fileno()).st_size), (), endings(), contents)
    except (tarfile.TarError, ValueError, IndexError, RecursionError) as error:
        # beside its own errors, tarfile lets those of numbers, of lists that are cut off and of chains of headers pass
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
