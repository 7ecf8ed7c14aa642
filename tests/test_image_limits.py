# SPDX-License-Identifier: MIT
"""How large images may be: a configurable limit of pixels, and small files that become large in memory."""

import io
import struct
import tracemalloc
import zlib

import pytest
from pictures import CONFIG, command, count, three, write_model
from PIL import Image

from internimage.data.datasets import EvaluationTransform, open_dataset
from internimage.data.images import MAX_PIXELS, DataError, ImageError, pixel_limit, read_image


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, *chunks, pixels=b""):
    head = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0))
    rows = zlib.compress(pixels or (b"\0" + bytes(width)) * height)
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_limit_of_pixels(monkeypatch, recwarn):
    """By default Pillow's own; Pillow also warns at half of it, with two lines per image."""
    assert pixel_limit() == 2 * Image.MAX_IMAGE_PIXELS == 178956970
    with pytest.raises(ImageError, match=f"more than the limit of 178956970; .* {MAX_PIXELS} sets another"):
        read_image(io.BytesIO(png(20000, 20000, pixels=b"\0")))
    with pytest.raises(ImageError, match="truncated|incomplete|broken|unrecognized"):
        read_image(io.BytesIO(png(10000, 10000, pixels=b"\0")))  # which is large, but not too large
    assert not [str(warning.message) for warning in recwarn]

    monkeypatch.setenv(MAX_PIXELS, "100")
    assert read_image(io.BytesIO(png(10, 10))).size == (10, 10)
    with pytest.raises(ImageError, match="^11 x 10 pixels are more than the limit of 100"):
        read_image(io.BytesIO(png(11, 10)))
    icon = io.BytesIO()
    Image.new("RGB", (32, 32)).save(icon, "ICO", sizes=[(32, 32)])
    data = bytearray(icon.getvalue())
    data[6:8] = 4, 4  # the size of the picture, in the list of pictures
    with pytest.raises(ImageError, match="^32 x 32 pixels are more than the limit of 100"):
        read_image(io.BytesIO(data))


def test_a_limit_of_pixels_above_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ImageError, match="more than the limit of 100"):
        read_image(io.BytesIO(png(11, 10)))
    monkeypatch.setenv(MAX_PIXELS, "111")
    assert read_image(io.BytesIO(png(11, 10))).size == (11, 10)
    with pytest.raises(ImageError, match="more than the limit of 111"):
        read_image(io.BytesIO(png(14, 8)))
    monkeypatch.delenv(MAX_PIXELS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as in programs that trust their images
    assert pixel_limit() is None and read_image(io.BytesIO(png(14, 8))).size == (14, 8)


@pytest.mark.parametrize("value", ["0", "-5", "many", "1e6", "1" * 5000])
def test_an_invalid_limit_is_reported_once(value, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(MAX_PIXELS, value)
    three(tmp_path / "data", 1)
    with pytest.raises(DataError.__base__, match=f"{MAX_PIXELS} must be a whole number from 1") as error:
        count(open_dataset(tmp_path / "data"))
    assert len(str(error.value)) < 200
    line = command(capsys, "predict", tmp_path / "data", "--model", "internimage_atto")
    assert f"{MAX_PIXELS} must be a whole number from 1" in line


def test_too_large_images_do_not_count_and_others_do(tmp_path, capsys, monkeypatch):
    three(tmp_path / "data", 2)
    (tmp_path / "data" / "red" / "0.png").write_bytes(png(20, 20))
    (tmp_path / "data" / "red" / "2.png").write_bytes(png(1, 60_000))  # to be resized to 8 x 480000
    monkeypatch.setenv(MAX_PIXELS, "399")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    dataset = open_dataset(tmp_path / "data")
    result = count(dataset)
    assert (result.images, result.top1) == (5, 100.0)
    assert "20 x 20 pixels are more than the limit of 399" in result.skipped[0][1]
    monkeypatch.setenv(MAX_PIXELS, "1000000")
    result = count(dataset)
    assert (result.images, len(result.skipped)) == (6, 1)
    assert result.skipped[0][1] == "1 x 60000 pixels are too long and narrow: resized, they would become 3840000"

    (tmp_path / "model").mkdir()
    model = write_model(tmp_path / "model")
    files = [tmp_path / "data" / "red" / name for name in ("2.png", "1.png")]
    line = command(capsys, "predict", *files, "--model", model, "--draw-points", tmp_path / "points.png")
    assert "2.png' cannot be read: 1 x 60000 pixels are too long and narrow" in line
    assert Image.open(tmp_path / "points.png").size[0] > 0


def test_a_long_image_that_fits_is_read():
    assert EvaluationTransform(CONFIG)(Image.new("RGB", (1, 60_000))).shape == (3, 8, 8)
    squash = CONFIG | {"crop_mode": "squash", "input_size": (3, 224, 224)}
    assert EvaluationTransform(squash)(Image.new("RGB", (1, 60_000))).shape == (3, 224, 224)
    border = CONFIG | {"crop_mode": "border"}
    with pytest.raises(ImageError, match="1 x 60000 pixels cannot be resized"):
        EvaluationTransform(border)(Image.new("RGB", (1, 60_000)))


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_text_that_decompresses_to_more_than_the_image(name):
    """100 MB of zeros are compressed to 0.4 MB."""
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(100)) + packer.flush()
    start = b"a\0\x01\0\0\0" if name == b"iTXt" else b"a\0\0"
    tracemalloc.start()
    try:
        try:
            assert read_image(io.BytesIO(png(4, 4, chunk(name, start + packed)))).size == (4, 4)
        except ImageError as error:
            assert "too large" in str(error).lower()
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
