# SPDX-License-Identifier: MIT
"""Checksums of checkpoint files, which torch does not verify when it loads.

A file written by `save` ends in a line with a checksum of everything before it. torch's reader ignores that line, so
it is also an ordinary file of `torch.save`. The checksums of a checkpoint's other files are stored in such a file. They
are CRC-32, which detects accidental damage (all but one case in 2**32) and is three times as fast as SHA-256. They do
not protect from deliberate changes.
"""

import os
import re
import stat
import zipfile
import zlib
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from ..files import archive_errors

_LAST_LINE = re.compile(rb"\ncrc32 ([0-9a-f]{8}) of (\d{16}) bytes\n")
_LAST_LINE_SIZE = len("\ncrc32 01234567 of 0123456789012345 bytes\n")
_END_OF_ZIP = b"PK\5\6"
_NO_COMMENT = b"\0\0"
_END_OF_ZIP_SIZE = 22  # with no comment
_CHUNK = 1 << 20


class DamagedError(ValueError):
    """A checkpoint that is not what was written. The message is a clause, such as "it has no 'model'"."""


class ChecksumWriter:
    """A writable binary file that computes the size and the checksum of what is written.

    Args:
        file: To write to; its other methods are available too.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = 0  #: bytes
        self.checksum = 0  #: CRC-32

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write bytes."""
        count = self._file.write(data)
        self.checksum = zlib.crc32(data, self.checksum)
        self.size += memoryview(data).nbytes
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def save(path: Path, thing: Any) -> None:
    """`torch.save` with a checksum at the end; the file is synced to the disk.

    Raises:
        OSError: The disk is full, or another error of the file system.
        KeyboardInterrupt: Ctrl-C.
    """
    with archive_errors(), path.open("wb") as file:
        writer = ChecksumWriter(file)
        torch.save(thing, cast(IO[bytes], writer))  # torch needs `write` alone
        file.write(b"\ncrc32 %08x of %016d bytes\n" % (writer.checksum, writer.size))
        file.flush()
        os.fsync(file.fileno())


def open_checked(path: Path) -> tuple[BufferedReader, int]:
    """Check all bytes of a file written by `save` and open it.

    Of a plain `torch.save` file, as older versions wrote, the checksums in its ZIP archive are checked.

    Returns:
        The open file, and its checksum.

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
                raise DamagedError("it has another checksum than when it was written")
        file.seek(0)
        return file, checksum
    except BaseException:
        file.close()
        raise


def check_file(path: Path, size: int, checksum: int) -> None:
    """Compare a file with the size and checksum that `ChecksumWriter` computed when it was written.

    Raises:
        DamagedError: It is not what was written.
        OSError: It cannot be read.
    """
    file, now = _open(path)
    with file:
        if now != size:
            raise DamagedError(f"its '{path.name}' has {now} bytes instead of {size}")
        if _checksum(file, size) != checksum:
            raise DamagedError(f"its '{path.name}' has another checksum than when it was written")


def check_archive(file: BinaryIO, size: int) -> None:
    """Check a file that `torch.save` wrote without a checksum by the checksums in its ZIP archive.

    Args:
        file: Seekable; contains the archive and nothing else.
        size: Of the file, in bytes.

    Raises:
        DamagedError: It is not such an archive, or is truncated.
    """
    reason = f"its {size} bytes are not a complete checkpoint"
    file.seek(max(size - _END_OF_ZIP_SIZE, 0))
    end = file.read()
    if not (end.startswith(_END_OF_ZIP) and end.endswith(_NO_COMMENT)):
        raise DamagedError(reason)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            # no entry is compressed, so their sizes add up to less than the file's
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise DamagedError(reason)
            if sum(entry.file_size for entry in entries) > size or archive.testzip() is not None:
                raise DamagedError(reason)
    # damaged headers also raise errors of struct and zlib, and NotImplementedError for an unknown version
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(reason) from error


def read_slice(path: Path, offset: int, length: int) -> BytesIO:
    """Read `length` bytes of a file from `offset` on.

    Raises:
        DamagedError: The file is shorter.
        OSError: It cannot be read.
    """
    file, size = _open(path)
    with file:
        if offset + length > size:
            raise DamagedError(f"its '{path.name}' has {size} bytes instead of {offset + length} or more")
        file.seek(offset)
        return BytesIO(file.read(length))


def read_whole(path: Path, most: int = 1 << 32) -> bytes:
    """Read a file of at most `most` bytes.

    Raises:
        DamagedError: It is not a regular file, or larger.
        OSError: It cannot be read.
    """
    file, size = _open(path)
    with file:
        if size > most:
            raise DamagedError(f"its '{path.name}' has {size} bytes")
        return file.read(size)


def checksum_of(data: bytes) -> int:
    """The CRC-32 of bytes."""
    return zlib.crc32(data)


def _open(path: Path) -> tuple[BufferedReader, int]:
    """Open a regular file; also returns its size in bytes."""
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
        raise DamagedError(f"'{path.name}' is not a regular file")
    file = path.open("rb")
    return file, os.fstat(file.fileno()).st_size


def _checksum(file: BufferedReader, size: int) -> int:
    """The CRC-32 of the next `size` bytes of a file."""
    checksum, view = 0, memoryview(bytearray(min(_CHUNK, max(size, 1))))
    while size:
        count = file.readinto(view[: min(size, len(view))])
        if not count:
            raise DamagedError("it was truncated while it was read")
        checksum = zlib.crc32(view[:count], checksum)
        size -= count
    return checksum
