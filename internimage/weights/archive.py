# SPDX-License-Identifier: MIT
"""ZIP archives as torch.save writes them, with everything checked that they state about themselves.

torch itself checks no CRC, and reads as many bytes as a pickle asks for, even beyond the record. zipfile opens archives
whose records overlap, and trusts the directory about where a record is.
"""

import errno
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_MOST_DIRECTORY = 4 * 2**20  # bytes; the largest model with its optimizer takes a fifth
_CHUNK = 2**20
# a record's header: signature, version, flags, method, time, date, CRC, compressed and full size, lengths of the rest
_LOCAL = struct.Struct("<4s5H3I2H")
_ENCRYPTED, _SIZES_FOLLOW = 0x1, 0x8  # flags; torch writes CRC and sizes after a record, in a descriptor
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class ArchiveError(ValueError):
    """An archive that is damaged, or whose records are inconsistent. The message is a clause: "its ... is ..."."""


@dataclass(frozen=True)
class Record:
    """What the directory of an archive says about a record, and where the next one begins.

    Attributes:
        name: With its folder.
        header: Where its header begins.
        limit: Where the next header begins, or the directory.
        stored, size: Bytes in the file, and of the content.
        crc: Of the content; 0 where none was computed (`torch.serialization.set_crc32_options`, `skip_data`).
        flags, method: As in the format.
    """

    name: str
    header: int
    limit: int
    stored: int
    size: int
    crc: int
    flags: int
    method: int

    @property
    def is_compressed(self) -> bool:
        """Whether its bytes are not those of the content."""
        return self.method != zipfile.ZIP_STORED


def check_archive(path: Path) -> None:
    """Check a whole archive as torch.save writes it: its structure, and the CRC of every record.

    Reads the file once, at some gigabytes a second, and holds none of it.

    Raises:
        ArchiveError: It is damaged, truncated, or no such archive.
        OSError: It cannot be read.
    """
    archive = Archive(path)
    for record in archive.records.values():
        archive.check(record)


class Archive:
    """The records of an archive. Each is checked against its header and its CRC when it is read.

    Args:
        path: The file.

    Attributes:
        records: By name, in the order in which they lie in the file.

    Raises:
        ArchiveError: The directory cannot be read; or records overlap, share a name, or are compressed in a way that
            torch.save does not use.
        OSError: The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        infos, end = _directory(path)
        if not infos:
            raise ArchiveError("its ZIP archive has no records, or lost its directory")
        infos.sort(key=lambda info: info.header_offset)
        limits = [info.header_offset for info in infos[1:]] + [end]
        self.records: dict[str, Record] = {}
        for info, limit in zip(infos, limits, strict=True):
            record = Record(
                info.orig_filename, info.header_offset, limit, info.compress_size, info.file_size, info.CRC,
                info.flag_bits, info.compress_type,
            )  # fmt: skip
            _check_claims(record)
            if record.name in self.records:
                raise ArchiveError(f"its ZIP archive has two records of the name '{_shown(record)}'")
            self.records[record.name] = record
        self._checked: set[str] = set()

    def read(self, record: Record) -> bytes:
        """All of a record.

        Raises:
            ArchiveError: It is damaged.
            OSError: It cannot be read.
        """
        content = bytearray(record.size)
        self.read_into(record, memoryview(content))
        return bytes(content)

    def read_into(self, record: Record, target: memoryview) -> None:
        """All of a record into a buffer of bytes that has its size. Raises as `read`."""
        with self.path.open("rb", buffering=0) as file:
            crc, place = 0, 0
            for chunk in _content(file, record):
                crc = zlib.crc32(chunk, crc)
                target[place : place + len(chunk)] = chunk
                place += len(chunk)
        self._compare(record, crc)

    def read_part(self, record: Record, start: int, target: memoryview) -> None:
        """The bytes of a record from `start` into a buffer; the whole record is checked first, once.

        For records that are not compressed. Raises as `read`.
        """
        if record.name not in self._checked:
            self.check(record)
        with self.path.open("rb", buffering=0) as file:
            file.seek(_locate(file, record) + start)
            while target:
                count = file.readinto(target[:_CHUNK])
                if not count:
                    raise _damaged(record, "is cut off")
                target = target[count:]

    def check(self, record: Record) -> None:
        """Compare a record with its header and its CRC. Raises as `read`."""
        with self.path.open("rb", buffering=0) as file:
            crc = 0
            for chunk in _content(file, record):
                crc = zlib.crc32(chunk, crc)
        self._compare(record, crc)

    def _compare(self, record: Record, crc: int) -> None:
        if record.crc not in (crc, 0):
            raise _damaged(record, "is damaged: its CRC does not match its content")
        self._checked.add(record.name)


class _Limited:
    """A file for zipfile, which would read a directory of any size at once, into objects ten times as large."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(_MOST_DIRECTORY + 1 if size < 0 else min(size, _MOST_DIRECTORY + 1))
        if len(content) > _MOST_DIRECTORY:
            raise ArchiveError(f"the directory of its ZIP archive is larger than {_MOST_DIRECTORY >> 20} MiB")
        return content


def _directory(path: Path) -> tuple[list[zipfile.ZipInfo], int]:
    """The records by zipfile, and where the directory begins."""
    with path.open("rb") as file:
        try:
            if not zipfile.is_zipfile(file):
                raise ArchiveError("the end of its ZIP archive is missing; compare its size with the original's")
            with zipfile.ZipFile(_Limited(file)) as archive:
                return archive.infolist(), archive.start_dir
        except ArchiveError:
            raise
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise ArchiveError("the directory of its ZIP archive lies outside of it") from error
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, EOFError, struct.error) as error:
            raise ArchiveError(f"the directory of its ZIP archive cannot be read ({type(error).__name__})") from error


def _check_claims(record: Record) -> None:
    """Check what the directory alone shows."""
    if record.header < 0 or record.header + _LOCAL.size + record.stored > record.limit:
        raise _damaged(record, "overlaps with another, or reaches beyond the archive")
    if record.flags & _ENCRYPTED:
        raise _damaged(record, "is encrypted")
    if record.method not in _METHODS:
        raise _damaged(record, "is compressed by another method than deflate")
    if record.stored != record.size and not record.is_compressed:
        raise _damaged(record, f"claims {record.size} bytes, and holds {record.stored}")
    if record.is_compressed and record.size > 1040 * record.stored + 64:  # what deflate can reach
        raise _damaged(record, f"claims {record.size} bytes, more than its {record.stored} can hold")


def _locate(file: IO[bytes], record: Record) -> int:
    """Where a record's bytes begin, once its own header is compared with the directory."""
    file.seek(record.header)
    header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size or header[:4] != b"PK\x03\x04":
        raise _damaged(record, "is not where the archive says")
    _, _, flags, method, _, _, crc, stored, size, name_length, extra_length = _LOCAL.unpack(header)
    name = file.read(name_length)
    encoding = "utf-8" if flags & 0x800 else "cp437"
    start = record.header + _LOCAL.size + name_length + extra_length
    agrees = (flags, method) == (record.flags, record.method) and name == record.name.encode(encoding, "replace")
    if flags & _SIZES_FOLLOW:
        file.seek(start + record.stored)
        agrees = agrees and _descriptor_agrees(file.read(24), record)
    else:
        large = 0xFFFFFFFF  # the sizes are in the extra field then
        agrees = agrees and crc == record.crc and stored in (record.stored, large) and size in (record.size, large)
    if not agrees or start + record.stored > record.limit:
        raise _damaged(record, "is described in two ways, at its place and in the directory")
    return start


def _descriptor_agrees(found: bytes, record: Record) -> bool:
    expected = (record.crc, record.stored, record.size)
    return found.startswith((struct.pack("<4s3I", b"PK\x07\x08", *(n & 0xFFFFFFFF for n in expected)),
                             struct.pack("<4sI2Q", b"PK\x07\x08", *expected)))  # fmt: skip


def _content(file: io.FileIO, record: Record) -> Iterator[bytes | memoryview]:
    """A record's content in pieces, which together have exactly the size that the directory states."""
    file.seek(_locate(file, record))
    stored = _stored(file, record.stored)
    pieces: Iterator[bytes | memoryview] = _inflated(stored, record) if record.is_compressed else stored
    left = record.size
    for piece in pieces:
        left -= len(piece)
        if left < 0:
            break
        yield piece
    if left:
        raise _damaged(record, "is cut off" if left > 0 else "holds more than it claims")


def _stored(file: io.FileIO, left: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(left, _CHUNK)))
    while left:
        count = file.readinto(buffer[:left])
        if not count:
            return
        left -= count
        yield buffer[:count]


def _inflated(pieces: Iterator[memoryview], record: Record) -> Iterator[bytes]:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        for piece in pieces:
            rest = bytes(piece)
            while rest:
                yield inflater.decompress(rest, _CHUNK)
                rest = inflater.unconsumed_tail
        while not inflater.eof:
            more = inflater.decompress(b"", _CHUNK)
            if not more:
                break
            yield more
    except zlib.error as error:
        raise _damaged(record, f"cannot be decompressed ({error})") from error


def _damaged(record: Record, problem: str) -> ArchiveError:
    return ArchiveError(f"the record '{_shown(record)}' of its ZIP archive {problem}")


def _shown(record: Record) -> str:
    return ascii(record.name)[1:-1][:100]
