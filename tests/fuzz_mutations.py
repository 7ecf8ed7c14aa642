# SPDX-License-Identifier: MIT
"""Ways to damage files: blindly, and with knowledge of what stands in them.

A mutation takes bytes and a random generator and gives other bytes. One that knows a format leaves alone what is not of
it, so that it can follow any other mutation.
"""

import io
import json
import pickletools
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]

EXTREMES = (0, 1, -1, 2, 127, 128, 255, 256, 32767, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63)


def _span(data: bytes, random: Random, most: int = 5000) -> tuple[int, int]:
    start = random.randrange(len(data) + 1)
    return start, min(len(data), start + random.choice((1, 2, 4, 8, 16, 64, 512, most)))


# ---- blind


def flip_bits(data: bytes, random: Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 8)) if data else 0):
        damaged[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(damaged)


def zero_page(data: bytes, random: Random) -> bytes:
    size = random.choice((16, 64, 512, 512, 4096))
    start = random.randrange(len(data) // size + 1) * size
    return data[:start] + bytes(len(data[start : start + size])) + data[start + size :]


def truncate(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)] if random.random() < 0.8 else data[:-1]


def insert(data: bytes, random: Random) -> bytes:
    start, _ = _span(data, random)
    return data[:start] + random.randbytes(random.choice((1, 2, 8, 100))) + data[start:]


def remove(data: bytes, random: Random) -> bytes:
    start, end = _span(data, random)
    return data[:start] + data[end:]


def duplicate(data: bytes, random: Random) -> bytes:
    start, end = _span(data, random)
    return data[:end] + data[start:end] + data[end:]


def swap(data: bytes, random: Random) -> bytes:
    size = random.choice((1, 4, 64, 512))
    a, b = sorted(random.randrange(len(data) // size + 1) * size for _ in range(2))
    if a + size > b:
        return data
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


def overwrite_number(data: bytes, random: Random) -> bytes:
    """A lying length, offset or count, of any width, in either order of bytes."""
    width = random.choice((1, 2, 4, 4, 8, 8))
    if len(data) < width:
        return data
    value = random.choice((*EXTREMES, len(data), len(data) + 1)) % (1 << 8 * width)
    # the beginnings and ends of files are where headers are
    near = random.choice((len(data), 64, 512))
    start = min(random.randrange(near), len(data) - width)
    start = start if random.random() < 0.7 else len(data) - width - start
    return data[:start] + value.to_bytes(width, random.choice(("little", "big"))) + data[start + width :]


def overwrite_digits(data: bytes, random: Random) -> bytes:
    """A number that is written as text."""
    found = list(re.finditer(rb"-?\d+", data[:200_000]))
    if not found:
        return data
    match = random.choice(found)
    value = random.choice((*map(str, EXTREMES), "1e999", "0.5", "nan", "-0", "9" * 400, "9" * 5000, "1_0", "0x1"))
    return data[: match.start()] + value.encode() + data[match.end() :]


def overwrite_text(data: bytes, random: Random) -> bytes:
    start, end = _span(data, random)
    return data[:start] + random.choice(HOSTILE_TEXT).encode("utf-8", "surrogatepass") + data[end:]


BLIND: tuple[Mutation, ...] = (
    flip_bits, flip_bits, flip_bits, zero_page, zero_page, truncate, insert, remove, duplicate, swap, overwrite_number,
    overwrite_number, overwrite_digits, overwrite_text,
)  # fmt: skip

# ---- JSON

HOSTILE_TEXT = (
    "", "\0", "\x1b[31m", "\r\n", "../../etc/passwd", "/dev/zero", "a/" * 3000, "x" * 10_000, "\ud800", "\u202e", "{}",
    "hf-hub:a/b", "__class__", "internimage_tiny", "[" * 5000, '{"a":' * 5000, "os.system", "%s%n", "\ufeff", "\u2028",
)  # fmt: skip


def _hostile_value(random: Random) -> Any:
    deep: Any = 1
    for _ in range(random.choice((3, 500))):
        deep = [deep] if random.random() < 0.5 else {"a": deep}
    return random.choice(
        (
            None, True, False, 0, -1, 1e308, -0.5, 10**30, 10**4000, float("nan"), float("inf"), [], {}, [[]],
            {"": None}, [1, "a", None], [0] * 1000, deep, 1_000_000_000,
            random.choice(HOSTILE_TEXT), random.choice(EXTREMES),
        )
    )  # fmt: skip


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        found.append((value, key))
        _places(inner, found)
    return found


def edit_json(data: bytes, random: Random) -> bytes:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return data
    places = _places(content, [])
    kind = random.randrange(6)
    if kind == 0 or not places:
        return _dumps(_hostile_value(random))
    inside, key = random.choice(places)
    other = random.choice(places)
    if kind == 1:
        del inside[key]
    elif kind == 2 and isinstance(inside, dict):
        inside[random.choice(HOSTILE_TEXT)] = inside.pop(key)
    elif kind == 3 and isinstance(inside, dict):  # the same key twice
        text = _dumps(content)
        entry = _dumps({key: _hostile_value(random)})[1:-1]
        return text[:-1] + b"," + entry + b"}" if text.endswith(b"}") else text
    elif kind == 4:
        inside[key] = json.loads(_dumps(other[0][other[1]]))
    else:
        inside[key] = _hostile_value(random)
    return _dumps(content)


def _dumps(content: Any) -> bytes:
    try:
        return json.dumps(content).encode()
    except (ValueError, RecursionError):  # a number of more digits than Python prints, or too deep for its writer
        return b"1" * 5000


# ---- YAML

_HOSTILE_YAML = (
    "!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!python/module:os", "&a [*a, *a]", "*b",
    "[" * 3000, "{a: " * 3000, "!!binary '*'", "!!timestamp 2020-99-99", "2020-13-45", "!!set {a}", "<<: {lr: 1}", "|",
    "'", '"\\xzz"', "? a", "-", "---", "...", "%YAML 9.9", "\t", "0o9", "1e999", ".nan", ".inf", "190:20:30", "~",
    "yes", "!!int 'x'", "!!float ''", "9" * 5000, "!", "!!omap [a: 1]", "[1, 2]", "{a: 1}", "\ufeff", "\x00",
    "\x1b[31m",
)  # fmt: skip


def edit_yaml(data: bytes, random: Random) -> bytes:
    lines = data.decode("utf-8", "replace").split("\n")
    i = random.randrange(len(lines))
    value = random.choice(_HOSTILE_YAML)
    kind = random.randrange(4)
    if kind == 0:
        lines.insert(i, value)
    elif kind == 1:
        lines.insert(i, random.choice(lines))
    elif kind == 2:
        lines[i] = f"{lines[i].partition(':')[0]}: {value}"
    else:
        lines[i] = f"{value}: {lines[i].partition(':')[2]}"
    return "\n".join(lines).encode("utf-8", "replace")


# ---- tables and lists


def edit_lines(data: bytes, random: Random) -> bytes:
    lines = data.split(b"\n")
    i, j = random.randrange(len(lines)), random.randrange(len(lines))
    cells = lines[i].split(b",")
    hostile = random.choice((*HOSTILE_TEXT, *map(str, EXTREMES), "nan", "inf", "1e999", "9" * 5000, '"', "²", "١", " "))
    kind = random.randrange(5)
    if kind == 0:
        lines[i] = lines[j]
    elif kind == 1:
        lines.insert(i, hostile.encode("utf-8", "surrogatepass"))
    elif kind == 2:
        cells.append(b"1")
        lines[i] = b",".join(cells)
    else:
        cells[random.randrange(len(cells))] = hostile.encode("utf-8", "surrogatepass")
        lines[i] = b",".join(cells)
    return b"\n".join(lines)


# ---- pickles

_CODE = b"cposix\nsystem\n(S'true'\ntR"
_OPCODES = (
    _CODE, _CODE + b"0", b"cbuiltins\neval\n(S'1'\ntR0", b"cos\nsystem\n", b"c__main__\nx\n",
    b"ctorch\nload\n(S'/x'\ntR0", b"cbuiltins\nbytearray\n(I8000000000\ntR0", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n)R", b"cargparse\nNamespace\n)\x81}b", b"X\x05\0\0\0posixX\x06\0\0\0system\x93",
    *(bytes([code]) for code in b"}])(tN012aesubRQoi.\x81\x85\x86\x87"), b"q\0", b"h\0", b"r\xff\xff\xff\xff",
    b"j\xff\xff\xff\x7f", b"L" + b"9" * 5000 + b"L\n", b"\x8a\x01\xff", b"\x8b\xff\xff\xff\x7f", b"B\xff\xff\xff\x7f",
    b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"(" * 3000, b"]" + b"2" * 3000,
    b"K\x01" + b"\x85" * 20_000, b"\x80\x09", b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f", b"P1\n", b"\x82\x01",
)  # fmt: skip


def edit_pickle(data: bytes, random: Random) -> bytes:
    """Delete, repeat, exchange or add instructions."""
    starts = []
    try:
        for _, _, position in pickletools.genops(data):
            starts.append(position)
    except Exception:  # what is damaged already has fewer instructions that can be told apart
        pass
    if len(starts) < 3:
        return data
    i, j = sorted(random.sample(range(len(starts)), 2))
    a, b = starts[i], starts[i + 1] if i + 1 < len(starts) else len(data)
    kind = random.randrange(6)
    if kind == 0:
        return data[:a] + data[b:]
    if kind == 1:
        return data[:b] + data[a:b] + data[b:]
    if kind == 2:
        return data[:a] + data[starts[j] :]
    if kind == 3:
        return data[:a] + random.choice(_OPCODES) + data[b:]
    return data[:a] + random.choice(_OPCODES) + data[a:]


# ---- ZIP


def edit_zip_header(data: bytes, random: Random) -> bytes:
    """A field of a header of an archive: sizes, offsets, flags, methods, checksums."""
    found = [match.start() for match in re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06|\x06\x06|\x06\x07)", data)]
    if not found:
        return data
    start, width = random.choice(found) + random.randrange(4, 46), random.choice((1, 2, 4))
    value = random.choice((*EXTREMES, 8, 12, 14, len(data))) % (1 << 8 * width)
    return data[:start] + value.to_bytes(width, "little") + data[start + width :]


def in_zip(edit: Mutation, ending: str) -> Mutation:
    """An edit of a record of an archive, whose headers then say what is right for it."""

    def mutation(data: bytes, random: Random) -> bytes:
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                records = [(info, archive.read(info)) for info in archive.infolist()]
        except Exception:  # of an archive that another mutation has damaged
            return data
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w", random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            for info, content in records:
                if info.filename.endswith(ending):
                    content = edit(content, random)
                archive.writestr(zipfile.ZipInfo(info.filename), content)
        return target.getvalue()

    mutation.__name__ = f"{edit.__name__}_of_{ending}"
    return mutation


def repack_zip(data: bytes, random: Random) -> bytes:
    """Records that are missing, that are there twice, or that have other names or a bomb in them."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # as above
        return data
    if not records:
        return data
    i = random.randrange(len(records))
    name, content = records[i]
    kind = random.randrange(6)
    if kind == 0:
        del records[i]
    elif kind == 1:
        records.append((name, random.choice(records)[1]))
    elif kind == 2:
        records[i] = (random.choice(("../x", "/x", "", name.upper(), random.choice(records)[0])), content)
    elif kind == 3:
        records[i] = (name, content[: len(content) // 2])
    elif kind == 4:
        records[i] = (name, bytes(20_000_000))
    else:
        random.shuffle(records)
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED if kind == 4 else zipfile.ZIP_STORED) as archive:
        for name, content in records:
            archive.writestr(zipfile.ZipInfo(name or "x"), content)
    return target.getvalue()


# ---- safetensors


def edit_safetensors(data: bytes, random: Random) -> bytes:
    """An edit of the header, with a length that is right or lies."""
    length = int.from_bytes(data[:8], "little")
    if not 0 < length <= len(data) - 8:
        return data
    header = edit_json(data[8 : 8 + length], random)
    said = len(header) if random.random() < 0.8 else random.choice(EXTREMES) % (1 << 64)
    return struct.pack("<Q", said) + header + data[8 + length :]


# ---- tar


def edit_tar_header(data: bytes, random: Random) -> bytes:
    """A field of a member's header, with the checksum that it then has."""
    heads = [i for i in range(0, len(data) - 511, 512) if data[i + 257 : i + 262] == b"ustar"]
    if not heads:
        return data
    start = random.choice(heads)
    header = bytearray(data[start : start + 512])
    name, size, kind = (0, 100), (124, 12), (156, 1)
    place, width = random.choice((name, size, kind, size, kind, (100, 8), (136, 12), (157, 100), (345, 155)))
    values = {
        size: (b"77777777777", b"00000000001", b"\x80" + bytes(10) + b"\x10", b"\xff" * 12, b"xyz", b"-1", b" "),
        kind: (b"0", b"1", b"2", b"3", b"5", b"6", b"7", b"x", b"g", b"L", b"K", b"S", b"\0", b"Z", b"D"),
    }
    others = (
        b"../../x.png",
        b"/x.png",
        b"\xff\xfe",
        b"",
        b"\x1b[31m/a.png",
        b"a" * 200,
        b"cat/0.tar",
        b"././@LongLink",
    )
    value = random.choice(values.get((place, width), others))[:width]
    header[place : place + width] = value.ljust(width, b"\0")
    return data[:start] + _with_checksum(header) + data[start + 512 :]


def _with_checksum(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def add_tar_header(data: bytes, random: Random) -> bytes:
    """A PAX or GNU header before a member, with lies about it."""
    heads = [i for i in range(0, len(data) - 511, 512) if data[i + 257 : i + 262] == b"ustar"]
    if not heads:
        return data
    start = random.choice(heads)
    info = tarfile.TarInfo("h")
    info.type = random.choice((tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE))
    key = random.choice(
        ("size", "path", "GNU.sparse.map", "GNU.sparse.major", "GNU.sparse.size", "hdrcharset", "mtime")
    )
    value = random.choice(("99999999999999", "-1", "0", "1", "x", "../../x.png", "cat/z.png", "0,1,5", "9" * 5000, ""))
    record = f" {key}={value}\n".encode()
    content = str(len(record) + len(str(len(record) + 3))).encode() + record
    content = random.choice((content, b"99999999 a=b\n", b"0 a=b\n", b"-5 a=b\n", b"x", b"cat/long.png\0"))
    info.size = len(content)
    block = info.tobuf(tarfile.USTAR_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")
    return data[:start] + block + data[start:]


# ---- PNG


@cache
def _bomb() -> bytes:
    return zlib.compress(bytes(30_000_000))


def edit_png(data: bytes, random: Random) -> bytes:
    """A chunk with the checksum that it then has: sizes that would fill the memory, text that inflates, odd types."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return data
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return data
    i = random.randrange(len(chunks))
    kind, content = chunks[i]
    choice = random.randrange(5)
    if choice == 0:
        chunks[i] = (kind, overwrite_number(content, random))
    elif choice == 1:
        chunks.insert(i, chunks[random.randrange(len(chunks))])
    elif choice == 2:
        chunks.insert(1, (random.choice((b"zTXt", b"iCCP", b"iTXt")), b"a\0\0" + _bomb()))
    elif choice == 3:
        chunks[i] = (random.choice((b"IDAT", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"eXIf", b"IEND")), content)
    else:
        chunks[i] = (kind, flip_bits(content, random))
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return data[:8] + b"".join(parts)
