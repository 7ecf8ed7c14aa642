# SPDX-License-Identifier: MIT
"""Tar files of images: splits, classes, damage."""

import io
import os
import random
import struct
import tarfile

import pytest
from pictures import COLORS, CONFIG, ByColor, command, count, three, write_model
from PIL import Image

from internimage.data.datasets import class_names, open_dataset
from internimage.data.images import DataError
from internimage.tasks.classification.evaluate import evaluate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def pack(path, *members):
    """(name, content) pairs, None for a folder."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def picture(color):
    file = io.BytesIO()
    Image.new("RGB", (10, 9), COLORS[color]).save(file, "PNG")
    return file.getvalue()


def pictures(*prefixes, colors=COLORS, count=2):
    return [(f"{p}{color}/{i}.png", picture(color)) for p in prefixes for color in colors for i in range(count)]


@pytest.mark.parametrize("prefix", ["", "./", "photos/", "photos/val/"])
def test_tars_of_class_folders(tmp_path, prefix, capsys):
    extra = [(f"{prefix}red/notes.txt", b"words"), (f"{prefix}red/._0.png", b"macOS"), (f"{prefix}README", b"words")]
    dataset = open_dataset(pack(tmp_path / "a.tar", *pictures(prefix), *extra))
    assert class_names(dataset) == list(COLORS)
    result = count(dataset)
    assert (result.images, result.top1) == (6, 100.0)
    assert capsys.readouterr().err == f"'{tmp_path}/a.tar': ignoring 1 file that is not an image: red/notes.txt\n"
    assert dataset.filename(5).endswith("red/1.png")


@pytest.mark.parametrize("inside", ["", "{color}/"])
def test_a_tar_of_one_tar_per_class(tmp_path, inside):
    """As ImageNet's training images are distributed."""
    tars = []
    for color in COLORS:
        members = [(f"{inside.format(color=color)}{i}.png", picture(color)) for i in range(2)]
        tars.append((f"train/{color}.tar", pack(tmp_path / "x.tar", *members).read_bytes()))
    dataset = open_dataset(pack(tmp_path / "a.tar", *tars), "train")
    result = count(dataset)
    assert (result.images, result.top1, class_names(dataset)) == (6, 100.0, list(COLORS))


def test_workers_forked_from_a_process_that_has_read_the_tar(tmp_path):
    """With one open file, the workers would share its position and read the wrong bytes."""
    dataset = open_dataset(pack(tmp_path / "a.tar", *pictures("", count=8)))
    assert count(dataset).top1 == 100.0
    result = evaluate(ByColor(), dataset, CONFIG, 1, 2, progress=False)
    assert (result.images, result.top1, result.skipped) == (24, 100.0, [])


def test_the_later_of_two_members_with_the_same_name_counts(tmp_path):
    """As when a tar that was appended to is unpacked."""
    dataset = open_dataset(pack(tmp_path / "a.tar", ("red/0.png", picture("blue")), *pictures("")))
    result = count(dataset)
    assert (result.images, result.top1) == (6, 100.0)


def test_splits_of_a_tar_are_never_merged(tmp_path):
    path = pack(tmp_path / "a.tar", *pictures("data/train/", count=3), *pictures("data/val/"))
    assert [len(open_dataset(path, split)) for split in ("validation", "train")] == [6, 9]
    for split, message in (("test", "has no split 'test'; it has train, val"), ("", "has the splits .*: name one")):
        with pytest.raises(DataError, match=message):
            open_dataset(path, split)
    with pytest.raises(DataError, match="has no split 'fold'"):
        open_dataset(pack(tmp_path / "b.tar", *pictures("")), "fold")


def damaged_header(path):
    pack(path, *pictures(""))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        data[archive.getmembers()[3].offset] ^= 255
    path.write_bytes(data)


def cut(path, at):
    pack(path, *pictures(""))
    with tarfile.open(path) as archive:
        member = archive.getmembers()[4]
    path.write_bytes(path.read_bytes()[: {"header": member.offset, "data": member.offset_data + 10}[at]])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: path.write_bytes(b""), "cannot be read as an uncompressed tar: empty file"),
        (lambda path: path.write_bytes(b"garbage" * 1000), "cannot be read as an uncompressed tar: "),
        (lambda path: pack(path), "contains no image"),
        (lambda path: pack(path, ("a/notes.txt", b"words")), "contains no image"),
        (lambda path: pack(path, ("a.png", picture("red"))), r"has no class folders: .*found 1 files \(a.png"),
        (lambda path: cut(path, "data"), "cannot be read as an uncompressed tar: unexpected end of data"),
        (lambda path: cut(path, "header"), "cannot be read as an uncompressed tar: it ends too early"),
        (damaged_header, "cannot be read as an uncompressed tar: a header is damaged"),
        (lambda path: pack(path, *pictures(""), ("pink/", None)), r"pink' contains no image \(it is empty\)"),
        (lambda path: pack(path, *pictures(""), ("a.png", b"")), "has images beside its class folders"),
        (lambda path: pack(path, *pictures("", "red/")), "classes of their own"),
        (lambda path: pack(path, *pictures(""), ("pink.tar", b"garbage" * 100)), "cannot be read as an uncompressed"),
        (os.mkfifo, "neither a folder of class folders nor a .tar file"),
    ],
    ids=lambda x: "" if callable(x) else x[:40],
)
def test_tars_that_cannot_be_used(tmp_path, make, message, capsys, model):
    make(tmp_path / "a.tar")
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path / "a.tar")
    command(capsys, "evaluate", "--model", model, "--data", tmp_path / "a.tar", "--workers", 0)


def test_other_archives_get_a_hint(tmp_path):
    for name in ("a.tar.gz", "a.tgz", "a.zip"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match="unpack it, or convert it to an uncompressed .tar"):
            open_dataset(tmp_path / name)
    (tmp_path / "a.csv").write_bytes(b"")
    with pytest.raises(DataError, match="neither a folder of class folders nor a .tar file$"):
        open_dataset(tmp_path / "a.csv")


def test_a_tar_of_other_classes_is_rejected(tmp_path):
    with pytest.raises(DataError, match="not those that the model was trained on"):
        count(open_dataset(pack(tmp_path / "a.tar", *pictures(""))), ByColor(("green", "blue", "red")))


# ---- damage


def with_long_names(path, form):
    """Three classes, with names that need extended headers; the contents are not images."""
    with tarfile.open(path, "w", format=form) as archive:
        for color in COLORS:
            for i in range(3):
                info = tarfile.TarInfo(f"{color}/{i}{'-long' * 30 if i == 1 else ''}{'ü' if i == 2 else ''}.png")
                info.size = 2000
                archive.addfile(info, io.BytesIO(bytes([i + 1]) * 2000))
    return path.read_bytes()


def found(path):
    dataset = open_dataset(path)
    return {dataset.filename(i): dataset.reader.samples[i] for i in range(len(dataset))}


def damages(data):
    """Typical losses: pages and blocks of zeros, an end that is missing or was never written."""
    for size in (512, 4096):
        for at in range(0, len(data), size):
            yield f"{size} zeros at {at}", data[:at] + bytes(min(size, len(data) - at)) + data[at + size :]
    for at in range(0, len(data), 512):
        yield f"zeros from {at}", data[:at] + bytes(len(data) - at)
        yield f"cut at {at}", data[:at]
        yield f"cut at {at + 100}", data[: at + 100]
        yield f"lost 512 at {at}", data[:at] + data[at + 512 :]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_no_member_is_lost_silently(tmp_path, form, capsys):
    """All members of a damaged tar are found, or a message says that some are not."""
    path = tmp_path / "a.tar"
    good = with_long_names(path, form)
    whole, rejected, intact = found(path), 0, 0
    assert len(whole) == 9 and any("-long" in name for name in whole) and any("ü" in name for name in whole)
    for what, data in damages(good):
        path.write_bytes(data)
        capsys.readouterr()
        try:
            names = found(path)
        except DataError:
            rejected += 1
            continue
        last = max(member.offset + -(-member.size // 512) * 512 for member, _ in names.values())
        if names == whole:
            intact += 1
        elif last + 1024 <= len(data) - 10240:  # otherwise it looks like a shorter tar with padding
            assert "ignoring" in capsys.readouterr().err, f"{what}: {len(names)} members"
    assert rejected > 150 and intact > 30


# ---- what no tar program writes


def header(name=b"red/0.png", size=0, kind=b"0", magic=b"ustar\x0000"):
    """A member's header, with the correct checksum."""
    sizes = b"%011o\0" % size if 0 <= size < 8**11 else b"\xff" + (size % 256**11).to_bytes(11, "big")
    block = bytearray(struct.pack("100s8s8s8s12s12s8sc100s8s247x", name, b"", b"", b"", sizes, b"", b" " * 8, kind, b"",
                                  magic))  # fmt: skip
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(**records):
    lines = b""
    for key, value in records.items():
        rest = f" {key.replace('__', '.')}={value}\n".encode()
        length = next(n for n in range(len(rest), len(rest) + 20) if len(str(n)) + len(rest) == n)
        lines += str(length).encode() + rest
    return header(b"PaxHeaders/x", len(lines), b"x") + lines + bytes(-len(lines) % 512)


def long_name(name):
    return header(b"././@LongLink", len(name), b"L", b"ustar  \0") + name + bytes(-len(name) % 512)


def nested(depth):
    data = header()
    for _ in range(depth):
        data = header(b"a.tar", len(data) + 1024) + data + bytes(1024)
    return data


END = bytes(1024)
HOSTILE = {
    "a negative size": header(size=-512) + END,
    "a negative size in an extended header": pax(size=-1024) + header() + END,
    "a size beyond the end": header(size=1 << 40) + END,
    "a size beyond any file": header(size=1 << 80) + END,
    "a long name of 1 GB": header(b"././@LongLink", 1 << 30, b"L", b"ustar  \0") + bytes(4096),
    "long names without end": header(b"././@LongLink", 0, b"L", b"ustar  \0") * 3000 + END,
    "an extended header of 1 GB": header(b"x", 1 << 30, b"x") + bytes(4096),
    "a sparse map without an end": pax(GNU__sparse__major=1, GNU__sparse__minor=0) + header(size=512) + b"9" * 512,
    "a sparse header that is cut off": header(kind=b"S", magic=b"ustar  \0")[:482] + b"\1" + bytes(29),
    "a number that is none": pax(GNU__sparse__major=1, GNU__sparse__minor=0) + header(size=512) + b"x\n" * 256 + END,
    "another size in an extended header": pax(GNU__sparse__realsize=1 << 70) + header(size=512) + bytes(512) + END,
    "tars in each other": nested(40) + END,
    "tars in each other without end": nested(3000) + END,
    "a name that is no UTF-8 in an extended header": pax(path="x").replace(b"=x", b"=\xff") + header() + bytes(512),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_headers_are_one_line(tmp_path, what):
    """No endless loop, no large allocation, no traceback; tarfile itself would loop forever on some of these."""
    (tmp_path / "a.tar").write_bytes(HOSTILE[what])
    with pytest.raises(DataError, match="a.tar' cannot be read as an uncompressed tar: .") as error:
        open_dataset(tmp_path / "a.tar")
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def unusual_tar(draw):
    """Members of any kind, with sizes and extended headers that may be wrong and correct checksums."""
    data = b""
    for _ in range(draw.randrange(1, 8)):
        if draw.random() < 0.6:
            data += header(b"red/%d.png" % draw.randrange(9), 600) + draw.randbytes(600) + bytes(424)
            continue
        records = {
            draw.choice(("path", "size", "mtime", "hdrcharset", "GNU__sparse__major", "GNU__sparse__minor",
                         "GNU__sparse__map", "GNU__sparse__realsize", "GNU__sparse__name", "GNU__sparse__numblocks")):
            draw.choice(("", "0", "1", "-512", "9" * 20, "1,2,3", "red/0.png", "nan", "BINARY"))
            for _ in range(draw.randrange(1, 4))
        }  # fmt: skip
        content = draw.choice((b"", b"4\n0\n1\n", b"9" * 700, draw.randbytes(600), b"long/name.png\0", header()))
        size = draw.choice((len(content), len(content), 0, -512, 1 << 40, 1 << 80, -1, 513))
        name = draw.choice((b"red/0.png", b"/a/b.png", b"../b.png", b"a.tar", b"red/", b"", b"\xff\x1b/x.png"))
        data += pax(**records) if draw.random() < 0.3 else b""
        data += header(
            name, size, bytes([draw.choice(b"01234567LKxgSNVMDZ\0")]), draw.choice((b"ustar  ", b"ustar\x0000"))
        )
        data += content + bytes(-len(content) % 512)
    return data + bytes(draw.choice((1024, 1024, 1024, 0, 512, 10240)))


@pytest.mark.parametrize("cases", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_unusual_tars_are_read_or_rejected(tmp_path, cases):
    draw, good = random.Random(0), 0
    for _ in range(cases):
        (tmp_path / "a.tar").write_bytes(unusual_tar(draw))
        try:
            dataset = open_dataset(tmp_path / "a.tar")
        except DataError:
            continue
        good += all(len(dataset.reader[i][0].read()) <= 700 for i in range(len(dataset)))
    assert good > cases // 20


def test_members_that_are_not_images_are_reported_and_not_followed(tmp_path, capsys):
    """Links, devices, sparse files, paths outside; and of several members of the same name all but the last."""
    image = picture("red")
    special = [(b"red/hard.png", b"1"), (b"red/soft.png", b"2"), (b"red/tty.png", b"3"), (b"red/disk.png", b"4"),
           (b"red/pipe.png", b"6"), (b"red/odd.png", b"Z")]  # fmt: skip
    data = b"".join(header(name, kind=kind) for name, kind in special)
    data += (
        pax(GNU__sparse__major=0, GNU__sparse__minor=1, GNU__sparse__map="0,4")
        + header(b"red/holes.png", 4)
        + bytes(512)
    )
    for name in (b"red/0.png", b"/red/1.png", b"./red/0.png", b"red/../../red/2.png"):
        data += header(name, len(image)) + image + bytes(-len(image) % 512)
    (tmp_path / "a.tar").write_bytes(data + END)
    dataset = open_dataset(tmp_path / "a.tar")
    assert [dataset.filename(i) for i in range(len(dataset))] == ["red/0.png", "red/1.png"]
    err = capsys.readouterr().err
    assert err.startswith(f"'{tmp_path}/a.tar': ignoring 9 files that are not images: ")
    assert "red/../../red/2.png (outside the tar)" in err and "red/0.png (replaced by a later one)" in err
    assert "red/disk.png (not a regular file)" in err and "red/hard.png (not a regular file)" in err
    assert count(dataset, ByColor(("red",))).top1 == 100.0


def test_tars_of_other_programs(tmp_path):
    """What follows the last member: two blocks of zeros, or padding to a record of any size, as by tar -b."""
    members = b"".join(
        header(f"{color}/0.png".encode(), len(picture(color))) + picture(color) + bytes(-len(picture(color)) % 512)
        for color in COLORS
    )
    for size in (len(members) + 1024, 10240, 512 * 64, 512 * 128, 512 * 2048):
        (tmp_path / "a.tar").write_bytes(members + bytes(size - len(members)))
        assert count(open_dataset(tmp_path / "a.tar")).top1 == 100.0
    for rest, message in (
        (b"", "it ends too early"),
        (bytes(512), "it ends too early"),
        (bytes(1024) + b"x" + bytes(511), "there is more data after its end"),
        (bytes(512) + header() + bytes(1024), "there is more data after its end"),
        (bytes(1024) + members + bytes(1024), "there is more data after its end: .* or tars were concatenated"),
        (bytes(20480), "it ends in 20480 bytes of zeros, more than tar writes: its last part is lost"),
    ):
        (tmp_path / "a.tar").write_bytes(members + rest)
        with pytest.raises(DataError, match=message):
            open_dataset(tmp_path / "a.tar")
    with (tmp_path / "a.tar").open("r+b") as file:
        file.truncate(1 << 40)  # a download into a preallocated file; its zeros are not read
    with pytest.raises(DataError, match="bytes of zeros, more than tar writes"):
        open_dataset(tmp_path / "a.tar")


def test_a_tar_that_changes_after_it_was_opened(tmp_path, capsys):
    path = pack(tmp_path / "a.tar", *pictures(""))
    dataset = open_dataset(path)
    with path.open("r+b") as file:
        file.truncate(2048)
    result = count(dataset)
    assert (result.images, len(result.skipped)) == (2, 4)
    assert {reason for _, reason in result.skipped} == {"the tar has been truncated"}
    path.unlink()
    with pytest.raises(DataError, match="none of 6 images could be read.*No such file"):
        count(dataset)
    os.mkfifo(path)
    with pytest.raises(DataError, match="none of 6 images could be read.*not a regular file"):
        count(dataset)


def test_nothing_is_written_beside_the_data(tmp_path, model, capsys):
    """timm's own reader caches its listing in a file."""
    pack(tmp_path / "a.tar", *pictures(""))
    three(tmp_path / "folder")
    before = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}
    for data in ("a.tar", "folder"):
        command(capsys, "evaluate", "--model", model, "--data", tmp_path / data, "--workers", 0, status=0)
    assert {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]} == before
