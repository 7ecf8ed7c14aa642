# SPDX-License-Identifier: MIT
"""Malicious files, assembled byte by byte: pickles from opcodes, archives from records."""

import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

# ---- pickles


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def many(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def numbers(*values: int) -> bytes:
    return many(*map(number, values))


def call(name: str, *arguments: bytes) -> bytes:
    return named(name) + many(*arguments) + b"R"


def storage(key: str, count: int, kind: str = "torch.FloatStorage", before_16: bool = False) -> bytes:
    view = [b"N"] if before_16 else []
    return many(text("storage"), named(kind), text(key), text("cpu"), number(count), *view) + b"Q"


def tensor(stored: bytes, shape: Iterable[int], stride: Iterable[int], offset: int = 0) -> bytes:
    hooks = call("collections.OrderedDict")
    shape, stride = numbers(*shape), numbers(*stride)
    return call("torch._utils._rebuild_tensor_v2", stored, number(offset), shape, stride, b"\x89", hooks)


def mapping(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def pickled(content: bytes) -> bytes:
    return b"\x80\x02" + content + b"."


def with_weights(beside: bytes, before_16: bool = False) -> bytes:
    """A pickle of a small tensor `a`, whose storage `0` has two elements, and of something else."""
    weights = mapping({"a": tensor(storage("0", 2, before_16=before_16), (2,), (1,))})
    return pickled(mapping({"model": weights, "beside": beside}))


TWO = struct.pack("<2f", 1, 2)  # the elements of its storage

# ---- archives


@dataclass
class Record:
    """A record of an archive, and the false values that its headers state."""

    name: str
    content: bytes  # as stored
    method: int = 0
    size: int | None = None  # uncompressed
    crc: int | None = None
    flags: int = 0
    local_name: str | None = None
    local_method: int | None = None
    local_crc: int | None = None
    shift: int = 0  # of the position in the directory


def archive(path: Path, records: Iterable[Record]) -> Path:
    body, directory, count = bytearray(), bytearray(), 0
    for record in records:
        name, stored = record.name.encode(), len(record.content)
        crc = zlib.crc32(record.content) if record.crc is None else record.crc
        size = stored if record.size is None else record.size
        local_name = name if record.local_name is None else record.local_name.encode()
        method = record.method if record.local_method is None else record.local_method
        local_crc = crc if record.local_crc is None else record.local_crc
        place = len(body) + record.shift
        head = struct.pack(
            "<4s5H3I2H", b"PK\3\4", 20, record.flags, method, 0, 0, local_crc, stored, size, len(local_name), 0
        )
        body += head + local_name
        body += record.content
        sizes = (crc, stored, size, len(name), 0, 0, 0, 0, 0, place)
        directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, record.flags, record.method, 0, 0, *sizes) + name
        count += 1
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF), len(directory), len(body), 0)
    path.write_bytes(body + directory + end)
    return path


def torch_archive(path: Path, content: bytes, storages: Mapping[str, bytes] | None = None, *more: Record) -> Path:
    """An archive like those of torch.save, from a pickle and the bytes of its storages."""
    storages = {"0": TWO} if storages is None else storages
    records = [Record("w/data.pkl", content), Record("w/byteorder", b"little")]
    records += [Record(f"w/data/{key}", data) for key, data in storages.items()]
    return archive(path, [*records, *more, Record("w/version", b"3\n")])


def deflated(name: str, blocks: int, block: bytes, **options) -> Record:
    """A record of many repetitions of `block`, which never has all of them in memory."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    once = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    options = {"size": blocks * len(block), "crc": 0, **options}
    return Record(name, once * blocks + packer.flush(), method=8, **options)


# ---- the format before torch 1.6


def before_torch_16(path: Path, content: bytes, storages: Mapping[str, tuple[int, bytes]] | None = None) -> Path:
    """A file of that format; storages: key -> stated number of elements, and the bytes."""
    storages = {"0": (2, TWO)} if storages is None else storages
    keys = b"](" + b"".join(map(text, storages)) + b"e"
    head = [number(0x1950A86A20F9469CFC6C), number(1001), mapping({"little_endian": b"\x88"})]
    with path.open("wb") as file:
        for part in (*map(pickled, head), content, pickled(keys)):
            file.write(part)
        for count, data in storages.values():
            file.write(struct.pack("<q", count) + data)
    return path


# ---- safetensors


def safetensors(path: Path, header: bytes, body: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)
    return path
