# SPDX-License-Identifier: MIT
"""Tar files of class folders, with the same rules as folders.

A tar has no index: if a header is lost, so are all members after it. So a damaged tar is rejected as a whole.
"""

import io
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, BinaryIO, cast

from timm.data.readers.reader import Reader

from ..errors import list_some
from .image_sets import ALL_SPLIT_NAMES, index_images, natural_key, no_class_folders, split_names
from .images import (
    COMMON_EXTENSIONS,
    DataError,
    ImageError,
    image_extensions,
    is_image_name,
    is_system_file,
    open_regular,
    reason_of,
)

_BLOCK = tarfile.BLOCKSIZE
_END = 2 * _BLOCK  # of zeros, which follow the last member
# sizes of a record, the last of which is padded with zeros: GNU tar and Python write 10 KiB, tar -b larger ones
_RECORDS = (tarfile.RECORDSIZE, *(_BLOCK << power for power in range(5, 12)))
_LARGEST_HEADER = 1 << 20  # bytes, of a member, with its long name and its extended headers
_MOST_NESTED = 8  # tars in tars


@dataclass(frozen=True)
class Member:
    """An image in a tar."""

    name: str  # with / as the separator; a nested tar counts as a folder
    offset: int  # in the outermost file, bytes
    size: int  # bytes


class TarReader(Reader):
    """timm's reader interface over the members of a tar.

    timm's own reader keeps the file open, so loader workers forked from a process that has read from it would share one
    file position.
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
            raise ImageError(reason_of(error)) from error
        if len(data) < member.size:
            raise ImageError("the tar has been truncated")
        return io.BytesIO(data), target

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = self.samples[index][0].name
        return name.rsplit("/", 1)[-1] if basename else name


class _TarSlice:
    """A read-only view of a byte range of a file, for tarfile, which trusts the sizes in headers.

    Without the limits here, it would loop between members of negative size, search for the end of a line beyond the end
    of the file, and read a name of any length into memory.
    """

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self.file, self.start, self.size = file, start, size
        self._position, self._left = 0, _LARGEST_HEADER  # _left: bytes that may be read before the next seek

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        """Go to a position; tarfile does so once per member."""
        if not 0 <= position <= self.size:
            raise tarfile.ReadError("unexpected end of data")
        self._position, self._left = position, _LARGEST_HEADER
        return position

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes; tarfile.ReadError if a header is too large."""
        self._left -= size
        if size < 0 or self._left < 0:
            raise tarfile.ReadError(f"a header has more than {_LARGEST_HEADER} bytes")
        self.file.seek(self.start + self._position)
        data = self.file.read(min(size, self.size - self._position))
        self._position += len(data)
        return data


@dataclass
class _Contents:
    images: dict[str, Member] = field(default_factory=dict)  # by name
    ignored: list[str] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)


def _scan_tar(
    part: _TarSlice, inside: tuple[str, ...], extensions: frozenset[str], contents: _Contents, depth: int = 1
) -> None:
    """Add the members of a tar to `contents`; reads only its headers.

    Args:
        part: The tar.
        inside: Folders that the tar itself is in, if it is nested.
        extensions: From `image_extensions`.
        contents: To add to.
        depth: Nesting level, from 1.

    Raises:
        tarfile.TarError: It is damaged.
    """
    if depth > _MOST_NESTED:
        raise tarfile.ReadError(f"more than {_MOST_NESTED} nested tars")
    # in this mode tarfile calls read, seek and tell alone
    with tarfile.open(fileobj=cast(IO[bytes], part), mode="r:") as archive:
        end = 0
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # typeshed has no such list; it would keep them all
            if member.size < 0 or archive.offset <= end:
                raise tarfile.ReadError("a header has a negative size")
            if _is_plain(member) and member.offset_data + member.size > archive.offset:
                raise tarfile.ReadError("the sizes in a header and its extended header differ")
            end = archive.offset
            _add_member(part, member, inside, extensions, contents, depth)
        end = archive.offset
    _check_end(part, end)


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Whether a member is a file that is stored contiguously."""
    return member.isfile() and not member.issparse()


def _add_member(
    part: _TarSlice,
    member: tarfile.TarInfo,
    inside: tuple[str, ...],
    extensions: frozenset[str],
    contents: _Contents,
    depth: int,
) -> None:
    """Add a member to `contents`; of a nested tar, its members."""
    parts = [name for name in member.name.split("/") if name not in ("", ".")]
    if inside and len(parts) > 1 and parts[0] == inside[-1]:
        parts = parts[1:]  # cat.tar with cat/1.jpg in it
    name, path = "/".join((*inside, *parts)), (*inside, *parts)
    if ".." in parts:
        contents.ignored.append(f"{name} (outside the tar)")
        return
    if not parts or any(above.startswith(".") for above in path[:-1]):
        return
    start, plain = part.start + member.offset_data, _is_plain(member)
    if member.isdir():
        contents.folders.add(name)
    elif plain and is_image_name(parts[-1], extensions):
        if name in contents.images:  # the later one counts, as when a tar that was appended to is unpacked
            contents.ignored.append(f"{name} (replaced by a later one)")
        contents.images[name] = Member(name, start, member.size)
    elif plain and parts[-1].lower().endswith(".tar"):
        stem = (*path[:-1], parts[-1][:-4])
        contents.folders.add("/".join(stem))
        _scan_tar(_TarSlice(part.file, start, member.size), stem, extensions, contents, depth + 1)
    elif not is_system_file(parts[-1]):
        kind = "" if plain else " (sparse)" if member.isfile() else " (not a regular file)"
        contents.ignored.append(f"{name}{kind}")


def _check_end(part: _TarSlice, end: int) -> None:
    """Check that the tar ends at `end`: tarfile also takes a damaged header, or one block of zeros, for the end.

    Raises:
        tarfile.ReadError: What is there is not what tar writes after the last member.
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
            "there is more data after its end: a header is lost, or tars were concatenated, which can be unpacked"
        )
    full = (part.size % record == 0 and rest - _END < record for record in _RECORDS)
    if rest != _END and not any(full):
        raise tarfile.ReadError(f"it ends in {rest} bytes of zeros, more than tar writes: its last part is lost")


def open_tar(path: Path, split: str = "", class_map: dict[str, int] | None = None) -> tuple[TarReader, list[str]]:
    """Open a tar of class folders, with or without a folder above them, or a tar of one tar per class.

    Args:
        path: The file, uncompressed.
        split: Which split to open, of a tar with splits.
        class_map: Class name -> index.

    Returns:
        As `open_folder`.

    Raises:
        DataError: It is damaged, has no images in class folders or not this split; and as `open_folder`.
    """
    contents = _Contents()
    try:
        with open_regular(path) as file:
            _scan_tar(_TarSlice(file, 0, os.fstat(file.fileno()).st_size), (), image_extensions(), contents)
    except (tarfile.TarError, ValueError, IndexError, RecursionError) as error:
        # besides its own errors, tarfile raises those of malformed numbers, truncated lists and chains of headers
        raise DataError(f"'{path}' cannot be read as an uncompressed tar: {error}") from error
    if not contents.images:
        raise DataError(f"'{path}' contains no image; image files end in {COMMON_EXTENSIONS}")
    above = _prefix_of_classes(path, list(contents.images), split)
    start = len(above)
    images = {name[start:]: member for name, member in contents.images.items() if name.startswith(above)}
    ignored = [name[start:] for name in contents.ignored if name.startswith(above)]
    folders = {name[start:] for name in contents.folders if name.startswith(above) and len(name) > start}
    classes = sorted({name.split("/", 1)[0] for name in (*images, *(f"{name}/" for name in folders)) if "/" in name})
    where = path / above.rstrip("/")
    if not classes:
        raise no_class_folders(where, list(images))
    targets, class_to_idx = index_images(where, list(images), ignored, classes, class_map)
    samples = list(zip(images.values(), targets))
    samples.sort(key=lambda sample: natural_key(sample[0].name))
    return TarReader(path, samples, class_to_idx), [name for name in ignored if "/" in name]


def _prefix_of_classes(path: Path, images: list[str], split: str) -> str:
    """What precedes the class folders in the names of a tar's members: empty, or ends in /."""
    above = {name.rsplit("/", 2)[0] if name.count("/") > 1 else "" for name in images}
    splits = {place for place in above if place.rsplit("/", 1)[-1] in (*ALL_SPLIT_NAMES, *split_names(split))}
    for name in split_names(split):
        found = sorted((place for place in splits if place.rsplit("/", 1)[-1] == name), key=len)
        if found:
            return found[0] + "/"
    if splits and split:
        there = {place.rsplit("/", 1)[-1] for place in splits}
        raise DataError(f"'{path}' has no split '{split}'; it has {list_some(there)}")
    if split and split not in ALL_SPLIT_NAMES:
        raise DataError(f"'{path}' has no split '{split}', and no other splits")
    if len(above) == 1:
        (place,) = above
        return place + "/" if place else ""
    if len(splits) == len(above):
        raise DataError(f"'{path}' has the splits {list_some(splits)}: name one")
    return ""
