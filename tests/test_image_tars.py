# SPDX-License-Identifier: MIT
"""Tars of images: splits, classes, damage."""

import io
import os
import tarfile

import pytest
from pictures import COLORS, CONFIG, ByColor, command, count, write_model
from PIL import Image

from internimage.engine.data import DataError, class_names, open_dataset
from internimage.engine.evaluate import evaluate


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
    assert capsys.readouterr().err == f"'{tmp_path}/a.tar': 1 file is left out, not taken for images: red/notes.txt\n"
    assert dataset.filename(5).endswith("red/1.png")


@pytest.mark.parametrize("inside", ["", "{color}/"])
def test_a_tar_of_a_tar_for_each_class(tmp_path, inside):
    """As ImageNet's training images come."""
    tars = []
    for color in COLORS:
        members = [(f"{inside.format(color=color)}{i}.png", picture(color)) for i in range(2)]
        tars.append((f"train/{color}.tar", pack(tmp_path / "x.tar", *members).read_bytes()))
    dataset = open_dataset(pack(tmp_path / "a.tar", *tars), "train")
    result = count(dataset)
    assert (result.images, result.top1, class_names(dataset)) == (6, 100.0, list(COLORS))


def test_workers_forked_from_a_process_that_has_read_the_tar(tmp_path):
    """With one open file the workers would share its position and read each other's images."""
    dataset = open_dataset(pack(tmp_path / "a.tar", *pictures("", count=8)))
    assert count(dataset).top1 == 100.0
    result = evaluate(ByColor(), dataset, CONFIG, 1, 2, progress=False)
    assert (result.images, result.top1, result.skipped) == (24, 100.0, [])


def test_the_later_of_two_members_of_one_name_counts(tmp_path):
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
        (lambda path: pack(path), "holds no image"),
        (lambda path: pack(path, ("a/notes.txt", b"words")), "holds no image"),
        (lambda path: pack(path, ("a.png", picture("red"))), r"has no class folders: .*found 1 files \(a.png"),
        (lambda path: cut(path, "data"), "cannot be read as an uncompressed tar: unexpected end of data"),
        (lambda path: cut(path, "header"), "cannot be read as an uncompressed tar: it ends too early"),
        (damaged_header, "cannot be read as an uncompressed tar: a header is damaged"),
        (lambda path: pack(path, *pictures(""), ("pink/", None)), r"pink' holds no image \(it is empty\)"),
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


def test_other_archives_are_said_to_be(tmp_path):
    for name in ("a.tar.gz", "a.tgz", "a.zip"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match="unpack it, or pack it as a .tar that is not compressed"):
            open_dataset(tmp_path / name)
    (tmp_path / "a.csv").write_bytes(b"")
    with pytest.raises(DataError, match="neither a folder of class folders nor a .tar file$"):
        open_dataset(tmp_path / "a.csv")


def test_a_tar_of_other_classes_is_refused(tmp_path):
    with pytest.raises(DataError, match="not those that the model was trained on"):
        count(open_dataset(pack(tmp_path / "a.tar", *pictures(""))), ByColor(("green", "blue", "red")))
