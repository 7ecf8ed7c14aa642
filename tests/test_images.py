# SPDX-License-Identifier: MIT
"""Which files are images and how one is read: formats, pixels of more than 8 bits, Exif, damage, unusual files."""

import io
import os
import random
import struct

import numpy as np
import pytest
from pictures import count, refuse_to_list, three
from PIL import ExifTags, GifImagePlugin, Image, PngImagePlugin, features
from torchvision.datasets import FakeData, ImageFolder

from internimage.data import datasets as data_module
from internimage.data.datasets import GuardedDataset, open_dataset, read_as_gray
from internimage.data.images import DataError, ImageError, formats, image_extensions, list_images, read_image
from internimage.tasks.classification.predict import find_images
from internimage.tasks.classification.predict import read_image as read_for_predict

FORMATS = ["png", "jpg", "bmp", "gif", "ppm", "tiff", "tga", "webp", "avif", "jp2"]


def saved(image, name="image.png", **options):
    file = io.BytesIO()
    image.save(file, Image.registered_extensions()["." + name.rsplit(".")[-1]], **options)
    return io.BytesIO(file.getvalue())


@pytest.mark.parametrize("ending", FORMATS)
def test_formats_are_images_and_read(tmp_path, ending):
    kind = {"jp2": "jpg_2000"}.get(ending, ending)
    file = tmp_path / f"picture.{ending.upper()}"
    if kind in ("webp", "avif", "jpg_2000") and not features.check(kind):
        assert kind != "webp", "wheels of every Pillow have WebP"
        return
    Image.new("RGB", (8, 6), (250, 120, 10)).save(file)
    assert f".{ending}" in image_extensions()
    assert list_images(tmp_path).images == [file.name]
    for mode, pixel in (("RGB", (250, 120, 10)), ("L", (146,))):
        image = read_image(file, mode)
        assert image.mode == mode and image.size == (8, 6)
        assert np.abs(np.asarray(image).reshape(48, -1)[20].astype(int) - pixel).max() <= 6


@pytest.mark.parametrize("ending", ["pdf", "eps", "ps", "mpg", "wmf", "h5", "pcd", "txt", "json"])
def test_formats_that_other_programs_would_decode_are_not_images(ending):
    assert f".{ending}" not in image_extensions()


OTHERS = {
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n",
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hH", 0, 0, 99, 99, 72) + bytes(6) + b"\x01\0\t\0" + bytes(60),
    "PDF": b"%PDF-1.7\n1 0 obj\n",
    "GRIB": b"GRIB" + bytes(3) + b"\x01" + bytes(90),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(90),
    "BUFR": b"BUFR" + bytes(90),
    "FITS": b"SIMPLE  =                    T" + b" " * 50 + b"END".ljust(2800),
    "FPX": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600),
    "MPEG": b"\0\0\x01\xb3\x10\x00\x10\x13" + bytes(60),
    "FLI": bytes(4) + b"\x11\xaf\x01\0\x08\0\x08\0\x08\0\0\0" + bytes(120),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_are_not_read_under_another_extension(tmp_path, kind):
    """Pillow goes by the content alone, and starts Ghostscript for EPS."""
    file = tmp_path / "image.jpg"
    file.write_bytes(OTHERS[kind])
    with pytest.raises(ImageError, match="^not an image$"):
        read_image(file)


def test_no_reader_of_another_format_is_called(monkeypatch):
    def fail(*_):
        raise AssertionError("a format that is not allowed")

    Image.init()
    ours = formats()
    others = [name for name in (*Image.ID, "NEW") if name not in ours]
    assert {"EPS", "WMF", "GRIB", "NEW"} <= set(others) and {"PNG", "JPEG", "TIFF", "WEBP"} <= set(ours)
    for name in others:
        monkeypatch.setitem(Image.OPEN, name, (fail, fail))
    monkeypatch.setattr(Image, "ID", [*others, *ours])
    with pytest.raises(ImageError, match="^not an image$"):
        read_image(io.BytesIO(b"%!PS nothing"))


def test_a_plugin_for_heif_is_used_if_a_program_has_registered_it(monkeypatch):
    def decode(file, name):
        return PngImagePlugin.PngImageFile(io.BytesIO(file.read()[4:]))

    assert "HEIF" not in formats()
    monkeypatch.setitem(Image.OPEN, "HEIF", (decode, lambda prefix: prefix.startswith(b"HEIF")))
    monkeypatch.setattr(Image, "ID", [*Image.ID, "HEIF"])
    picture = saved(Image.new("RGB", (5, 4), (1, 2, 3))).getvalue()
    assert read_image(io.BytesIO(b"HEIF" + picture)).getpixel((4, 3)) == (1, 2, 3)


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_16_bit_gray_keeps_its_range(name):
    """Pillow clips at 255: everything above 0.4 % of the range would be white."""
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    for mode in ("RGB", "L"):
        image = read_image(saved(Image.fromarray(values), name), mode)
        assert np.asarray(image).reshape(5, -1)[:, 0].tolist() == [0, 1, 1, 128, 255]


def test_big_endian_16_bit_tiff():
    image = Image.frombytes("I;16B", (3, 1), struct.pack(">3H", 0, 32768, 65535))
    assert np.asarray(read_image(saved(image, "a.tiff"), "L")).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("name", ["a.tiff", "a.pfm"])
def test_float_pixels(name):
    def read(*values):
        return read_image(saved(Image.fromarray(np.array([values], dtype=np.float32)), name), "RGB")

    assert np.asarray(read(0.0, 0.25, 0.5, 1.0))[0, :, 0].tolist() == [0, 64, 128, 255]
    for invalid in (1.5, -0.1, 255.0, float("nan"), float("inf")):
        with pytest.raises(ImageError, match="32-bit float pixels outside 0 to 1"):
            read(0.0, invalid)


def test_32_bit_integers_are_rejected():
    with pytest.raises(ImageError, match="32-bit integer pixels, whose range is unknown"):
        read_image(saved(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "a.tiff"))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "image, options",
    [
        (Image.new("LA", (4, 4), (80, 10)), {}),
        (Image.new("RGBA", (4, 4), (80, 80, 80, 10)), {}),
        (Image.new("P", (4, 4), 0), {"transparency": b"\x10\xff"}),
        (Image.new("P", (4, 4), 0), {"transparency": 0}),
        (Image.new("1", (4, 4), 0), {}),
    ],
    ids=["LA", "RGBA", "palette with alpha", "palette with one clear color", "bits"],
)
def test_transparency_is_dropped_without_a_warning(image, options, mode, recwarn):
    if image.mode == "P":
        image = image.copy()
        image.putpalette([80, 80, 80, 200, 200, 200])
    value = 0 if image.mode == "1" else 80
    read = read_image(saved(image, **options), mode)
    assert read.mode == mode and set(np.asarray(read).flatten().tolist()) == {value}
    assert not [str(warning.message) for warning in recwarn]


def test_cmyk_jpeg_has_its_colors():
    """Adobe's programs write these inverted, and so does Pillow."""
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    pixel = np.asarray(read_image(saved(red.convert("CMYK"), "a.jpg")))[8, 8]
    assert pixel[0] > 240 and pixel[1] < 15 and pixel[2] < 15


# ---- Exif


def corner(turn):
    """A white image with a black upper left corner, stored as by a camera that was held in another orientation."""
    image = Image.new("L", (32, 16), 255)
    image.paste(0, (0, 0, 8, 8))
    if turn is not None:
        image = image.transpose(turn)
    return image


UNDONE_BY = {  # orientation -> how the upright image is transposed for storage
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tiff", "a.webp"])
@pytest.mark.parametrize("orientation", UNDONE_BY)
def test_exif_orientation(orientation, name):
    stored, exif = corner(UNDONE_BY[orientation]), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = stored.convert("RGB")
    for mode in ("RGB", "L"):
        pixels = np.asarray(read_image(saved(stored, name, exif=exif), mode).convert("L")).astype(int)
        assert pixels.shape == (16, 32)
        assert np.abs(pixels - np.asarray(corner(None)).astype(int)).max() < 100, "another corner is black"
    if name != "a.tiff":  # which Pillow itself rotates
        left = read_image(saved(stored, name, exif=exif), upright=False)
        assert left.size == stored.size


def test_images_with_damaged_exif_data_are_read(monkeypatch):
    image = Image.new("RGB", (8, 4), (9, 9, 9))
    for data in (b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\0" * 9, b"Exif\0\0"):
        assert read_image(saved(image, "a.jpg", exif=data)).size == (8, 4)

    def fail(self):
        raise struct.error("short")

    monkeypatch.setattr(Image.Image, "getexif", fail)
    assert read_image(saved(image, "a.bmp")).size == (8, 4)


def test_datasets_are_read_upright_unless_their_classes_are_synsets(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for folder in ("photos", "n01440764"):
        (tmp_path / folder / folder).mkdir(parents=True)
        Image.new("RGB", (8, 4)).save(tmp_path / folder / folder / "a.jpg", exif=exif)
    for folder, size in (("photos", (4, 8)), ("n01440764", (8, 4))):
        dataset = open_dataset(tmp_path / folder)
        assert GuardedDataset(dataset, lambda image: image)[0][0].size == size
        assert GuardedDataset(dataset, lambda image: image, upright=True)[0][0].size == (4, 8)
    assert read_for_predict(tmp_path / "n01440764" / "n01440764" / "a.jpg", "a.jpg").size == (4, 8)


EXIF = {
    "values without end": struct.pack("<HHIII", 1, 274, 3 << 16, 0xFFFFFFFF, 8),
    "a count without end": struct.pack("<HHHII", 1, 274, 3, 0xFFFFFFFF, 8),
    "text": struct.pack("<HHHI4sI", 1, 274, 2, 4, b"6\0\0\0", 0),
    "many": struct.pack("<HHHII", 1, 274, 3, 2, 0x00060006) + bytes(4),
    "none of eight": struct.pack("<HHHII", 1, 274, 3, 1, 65535) + bytes(4),
    "a fraction": struct.pack("<HHHII", 1, 274, 5, 1, 26) + bytes(4) + struct.pack("<II", 6, 0),
    "60000 tags": struct.pack("<H", 60000) + struct.pack("<HHII", 274, 3, 1, 6) * 4000,
    "a circle": struct.pack("<HHHIII", 1, 34665, 4, 1, 8, 8),
}


@pytest.mark.parametrize("kind", EXIF)
def test_invalid_orientations_rotate_once_or_not_at_all(kind):
    data = b"Exif\0\0II*\0\x08\0\0\0" + EXIF[kind]
    image = Image.new("RGB", (8, 4), (9, 9, 9))
    sizes = {read_image(saved(image, name, exif=data)).size for name in ("a.jpg", "a.png", "a.webp")}
    assert sizes <= {(8, 4), (4, 8)}


# ---- damage and unusual files


def broken():
    picture = saved(Image.new("RGB", (64, 64), (200, 10, 10)), "a.png").getvalue()
    return {
        "empty": (b"", "an empty file"),
        "text": (b"hello", "not an image"),
        "truncated": (picture[: len(picture) // 2], ".+"),
        "no size": (b"P6\n0 0\n255\n", ".+"),
        "flipped": (picture[:50] + bytes([picture[50] ^ 255]) + picture[51:], ".+"),
    }


@pytest.mark.parametrize("kind", broken())
def test_damaged_images_are_reported(tmp_path, kind):
    data, reason = broken()[kind]
    file = tmp_path / "x.png"
    file.write_bytes(data)
    for source in (file, io.BytesIO(data)):
        with pytest.raises(ImageError, match=f"^{reason}$"):
            read_image(source)
    with pytest.raises(DataError, match="'x.png' (is not an image|cannot be read)"):
        read_for_predict(file, "x.png")


@pytest.mark.parametrize("where", ["PIL.ImageFile.ImageFile.load", "PIL.PngImagePlugin.PngImageFile._open"])
@pytest.mark.parametrize("error", [RuntimeError("avif"), struct.error("short"), MemoryError(), KeyError("tag")])
def test_any_exception_of_a_decoder_is_an_image_error(monkeypatch, error, where):
    def fail(*_, **__):
        raise error

    good = saved(Image.new("RGB", (8, 8)))
    monkeypatch.setattr(where, fail)
    with pytest.raises(DataError, match="'good' (cannot be read: .|is not an image)"):
        read_for_predict(good, "good")


def test_an_error_in_a_transform_is_not_taken_for_an_unreadable_image(tmp_path):
    def wrong(image):
        raise RuntimeError("a mistake in a transform")

    dataset = open_dataset(three(tmp_path, 1))
    with pytest.raises(RuntimeError, match="a mistake"):
        GuardedDataset(dataset, wrong)[0]


@pytest.mark.parametrize("cases", [40, pytest.param(1700, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "ending", ["png", "jpg", "gif", "tiff", "webp", "avif", "jp2", "bmp", "dds", "ico", "ppm", "tga"]
)
def test_mutated_images_are_read_or_rejected(ending, cases, recwarn, capfd):
    """Larger numbers of them raised RuntimeError, struct.error and others from Pillow."""
    if ending in ("avif", "jp2") and not features.check({"jp2": "jpg_2000"}.get(ending, ending)):
        return
    draw = random.Random(ending)
    noise = Image.frombytes("RGB", (20, 18), draw.randbytes(20 * 18 * 3))
    good = saved(noise, f"a.{ending}").getvalue()
    assert read_image(io.BytesIO(good)).mode == "RGB"
    for _ in range(cases):
        data = bytearray(good)
        for _ in range(draw.choice((1, 1, 4))):
            at = draw.randrange(min(len(data), 200))
            data[at : at + 4] = draw.choice((b"\xff\xff\xff\xff", bytes(4), draw.randbytes(4)))
        try:
            assert read_image(io.BytesIO(data)).mode == "RGB"
        except ImageError as error:
            assert 0 < len(str(error)) <= 300 and "\n" not in str(error)
    assert not [str(warning.message) for warning in recwarn] and capfd.readouterr().out == ""


def test_ctrl_c_in_a_decoder_is_passed_on(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    good = saved(Image.new("RGB", (8, 8)))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read_image(good)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_the_first_frame_of_an_animation(name):
    frames = [Image.new("RGB", (8, 8), color) for color in ((0, 0, 250), (250, 0, 0), (0, 250, 0))]
    pixel = np.asarray(read_image(saved(frames[0], name, save_all=True, append_images=frames[1:])))[4, 4]
    assert pixel[2] > 230 and pixel[0] < 20 and pixel[1] < 20


def test_only_one_of_many_frames_is_read(monkeypatch):
    file = saved(Image.new("1", (8, 8)), "a.gif").getvalue()
    start = 13 + 3 * 2 ** ((file[10] & 7) + 1)  # after the size and the palette
    head, frame = file[:start], file[start:-1]
    seeks, seek = [], GifImagePlugin.GifImageFile._seek
    monkeypatch.setattr(
        GifImagePlugin.GifImageFile, "_seek", lambda self, frame, *more: seeks.append(frame) or seek(self, frame, *more)
    )
    assert read_image(io.BytesIO(head + frame * 100_000 + b";")).size == (8, 8)
    assert seeks and set(seeks) == {0}


# ---- from other libraries


def test_images_that_torchvision_opens_can_be_read_as_gray_too(tmp_path):
    for dataset, size in (
        (FakeData(3, (3, 4, 5), num_classes=2), (4, 5)),
        (open_dataset(three(tmp_path, 1)), (9, 10)),
    ):
        image, target, failure = GuardedDataset(dataset, np.asarray)[1]
        assert failure is None and image.shape == (*size, 3) and target in (0, 1)
        read_as_gray(dataset)
        assert GuardedDataset(dataset, np.asarray)[1][0].shape == size


def test_an_image_that_torchvision_cannot_read_is_reported():
    class Broken(FakeData):
        def __getitem__(self, index):
            raise SyntaxError("broken PNG file")

    assert GuardedDataset(Broken(3, (3, 4, 5)), np.asarray)[1] == (None, -1, ("sample 1", "broken PNG file"))


def test_torchvisions_datasets_of_files_are_read_by_the_same_rules(tmp_path, monkeypatch):
    """Their own loader would start Ghostscript and wait for a pipe's writer; that of iNaturalist decodes lazily."""
    folder = three(tmp_path, 3)
    (folder / "blue" / "0.png").write_bytes(OTHERS["EPS"])
    (folder / "green" / "0.png").unlink()
    (folder / "red" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
    listed = ImageFolder(folder, loader=Image.open)
    listed.samples.append((str(folder / "red" / "pipe.png"), 2))
    os.mkfifo(folder / "red" / "pipe.png")
    monkeypatch.setattr(data_module, "create_dataset", lambda *_, **__: listed)
    result = count(open_dataset(tmp_path, name="torch/inaturalist"))
    assert (result.images, result.top1) == (6, 100.0)
    assert [reason for _, reason in result.skipped][::2] == ["not an image", "not a regular file"]


def test_an_image_that_is_replaced_by_a_pipe_is_not_waited_for(tmp_path):
    dataset = open_dataset(three(tmp_path, 1))
    (tmp_path / "blue" / "0.png").unlink()
    os.mkfifo(tmp_path / "blue" / "0.png")
    (tmp_path / "green" / "0.png").unlink()
    result = count(dataset)
    assert [reason for _, reason in result.skipped] == ["not a regular file", "No such file or directory"]
    (tmp_path / "green" / "0.png").symlink_to("/dev/zero")
    assert count(dataset).skipped[1][1] == "not a regular file"


def test_listing(tmp_path):
    for name in (
        "a.jpg",
        "b/c.PNG",
        "b/._c.PNG",
        "b/.DS_Store",
        "b/Thumbs.db",
        "b/notes.txt",
        "b/.old/d.jpg",
        ".git/e.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    os.mkfifo(tmp_path / "b" / "pipe.jpg")
    (tmp_path / "b" / "gone.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "b" / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "b" / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "b" / "linked.jpg").symlink_to(tmp_path / "a.jpg")
    (tmp_path / "b" / "above").symlink_to(tmp_path)
    listing = list_images(tmp_path)
    assert listing.images == ["a.jpg", "b/c.PNG", "b/linked.jpg"]
    assert listing.ignored == [
        "b/.old/", "b/above/ (a link to a parent folder)", "b/gone.jpg (not a regular file)", "b/notes.txt",
        "b/pipe.jpg (not a regular file)", "b/self.jpg (not a regular file)",
        "b/zero.jpg (not a regular file)",
    ]  # fmt: skip
    assert listing.folders == ["b"]


def test_a_folder_that_cannot_be_listed_is_not_empty(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    refuse_to_list(monkeypatch, tmp_path / "a")
    for look in (list_images, lambda folder: find_images([str(folder)])):
        with pytest.raises(DataError, match=f"the folder '{tmp_path}/a' cannot be listed: Permission denied"):
            look(tmp_path)


def test_find_images(tmp_path, capsys):
    for name in ("b/2.webp", "b/10.jpg", "a.png", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_images([str(tmp_path / "b"), str(tmp_path / "a.png")])
    assert [file.name for file in found] == ["10.jpg", "2.webp", "a.png"]
    assert capsys.readouterr().err == f"'{tmp_path / 'b'}': ignoring 1 file that is not an image: notes.txt\n"
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(DataError, match="pipe.jpg' is not a regular file"):
        find_images([str(tmp_path / "pipe.jpg")])
    with pytest.raises(ImageError, match="not a regular file"):
        read_image(tmp_path / "pipe.jpg")
    with pytest.raises(DataError, match="the name of an image is empty"):
        find_images([""])
