# SPDX-License-Identifier: MIT
"""Whether the files of a checkpoint are what was written, byte for byte. torch checks neither when it loads.

A file that `save` wrote ends in a line with a checksum of everything before it, which torch's reader passes over, so it
is an ordinary file of `torch.save` besides. Other files of a checkpoint have their checksums in such a file. They are
CRC-32, which finds damage (one in 2**32 such accidents is missed) and is three times as fast as SHA-256; nobody's
intentions are checked by them.
"""

import io
import os
import re
import stat
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..files import archive_errors

_LAST_LINE = re.compile(rb"\ncrc32 ([0-9a-f]{8}) of (\d{16}) bytes\n")
_LAST_LINE_SIZE = len("\ncrc32 01234567 of 0123456789012345 bytes\n")
_END_OF_ZIP = b"PK\5\6"
_NO_COMMENT = b"\0\0"
_END_OF_ZIP_SIZE = 22  # with no comment
_CHUNK = 1 << 20


class DamagedError(ValueError):
    """A checkpoint that is not what was written; the message says why, to stand in a sentence about it."""


class Summing:
    """A file to write to that counts its bytes and their checksum on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = 0
        self.checksum = 0

    def write(self, data) -> int:
        count = self._file.write(data)
        self.checksum = zlib.crc32(data, self.checksum)
        self.size += memoryview(data).nbytes
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def save(path: Path, thing: Any) -> None:
    """`torch.save` to the disk itself, with a checksum at the end.

    Raises:
        OSError: The disk is full, or the like.
        KeyboardInterrupt: Ctrl-C.
    """
    with archive_errors(), path.open("wb") as file:
        summing = Summing(file)
        torch.save(thing, summing)
        file.write(b"\ncrc32 %08x of %016d bytes\n" % (summing.checksum, summing.size))
        file.flush()
        os.fsync(file.fileno())


def open_checked(path: Path) -> tuple[BinaryIO, int]:
    """Open a file that `save` wrote, once all its bytes are checked; also returns their checksum.

    Of a file of `torch.save` itself, as older versions wrote, the checksums that its ZIP archive has are checked.

    Raises:
        DamagedError: It is not what was written.
        OSError: It cannot be read.
    """
    file, size = _open(path)
    try:
        file.seek(max(size - _LAST_LINE_SIZE, 0))
        found = _LAST_LINE.fullmatch(file.read())
        file.seek(0)
        if found is None:
            check_archive(file, size)
            file.seek(0)
            checksum = _checksum(file, size)
        else:
            checksum = _checksum(file, size - _LAST_LINE_SIZE)
            if (checksum, size - _LAST_LINE_SIZE) != (int(found[1], 16), int(found[2])):
                raise DamagedError("its bytes are not those that were written")
        file.seek(0)
        return file, checksum
    except BaseException:
        file.close()
        raise


def check_file(path: Path, size: int, checksum: int) -> None:
    """Compare a file with what `Summing` counted when it was written.

    Raises:
        DamagedError: It is not what was written.
        OSError: It cannot be read.
    """
    file, now = _open(path)
    with file:
        if now != size:
            raise DamagedError(f"its '{path.name}' has {now} bytes, and {size} were written")
        if _checksum(file, size) != checksum:
            raise DamagedError(f"the bytes of its '{path.name}' are not those that were written")


def check_archive(file: BinaryIO, size: int) -> None:
    """Check what `torch.save` without a checksum wrote, as far as the checksums of its ZIP archive go.

    Args:
        file: Seekable; nothing but the archive is in it.
        size: Of the file, in bytes.

    Raises:
        DamagedError: It is no such archive, or not all of it.
    """
    reason = f"its {size} bytes are not those of a checkpoint, or not all of them"
    file.seek(max(size - _END_OF_ZIP_SIZE, 0))
    end = file.read()
    if not (end.startswith(_END_OF_ZIP) and end.endswith(_NO_COMMENT)):
        raise DamagedError(reason)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            # nothing is compressed, so what the entries say that they hold has to be there
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise DamagedError(reason)
            if sum(entry.file_size for entry in entries) > size or archive.testzip() is not None:
                raise DamagedError(reason)
    # headers that are damaged: struct's and zlib's errors are not zipfile's, nor is that of an unknown version
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(reason) from error


def part(path: Path, offset: int, length: int) -> io.BytesIO:
    """Some bytes of a file.

    Raises:
        DamagedError: The file has not so many.
        OSError: It cannot be read.
    """
    file, size = _open(path)
    with file:
        if offset + length > size:
            raise DamagedError(f"its '{path.name}' has {size} bytes, and {offset + length} were written")
        file.seek(offset)
        return io.BytesIO(file.read(length))


def read(path: Path, most: int = 1 << 32) -> bytes:
    """All bytes of a file.

    Raises:
        DamagedError: It is no regular file, or larger than `most`.
        OSError: It cannot be read.
    """
    file, size = _open(path)
    with file:
        if size > most:
            raise DamagedError(f"its '{path.name}' has {size} bytes")
        return file.read(size)


def checksum_of(data: bytes) -> int:
    """The checksum of bytes."""
    return zlib.crc32(data)


def _open(path: Path) -> tuple[BinaryIO, int]:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe would wait for its writer
        raise DamagedError(f"'{path.name}' is not a file")
    file = path.open("rb")
    return file, os.fstat(file.fileno()).st_size


def _checksum(file: BinaryIO, size: int) -> int:
    """Of the next bytes of a file."""
    checksum, view = 0, memoryview(bytearray(min(_CHUNK, max(size, 1))))
    while size:
        count = file.readinto(view[: min(size, len(view))])
        if not count:
            raise DamagedError("it ended while it was read")
        checksum = zlib.crc32(view[:count], checksum)
        size -= count
    return checksum
