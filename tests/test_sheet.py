# SPDX-License-Identifier: MIT
"""Pictures of sampled points: what is drawn where, and what cannot be drawn or written."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from internimage import files
from internimage.analysis import canvas
from internimage.analysis.colors import rgb
from internimage.analysis.drawing import draw_sampling
from internimage.analysis.sheet import draw_points, point_tiles
from internimage.cli import main
from internimage.errors import UserError

CONFIG = dict(input_size=(3, 32, 48), interpolation="bicubic", mean=(0.5,) * 3, std=(0.2,) * 3, crop_pct=1.0)
LAYER = "levels.0.blocks.0.dcn"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("internimage_atto", num_classes=3)


def gray(count):
    return [(f"image {i}.png", Image.new("RGB", (48, 32), (128, 128, 128))) for i in range(count)]


def test_a_tile_has_its_points_where_they_are(model):
    """A new layer's points are the 3x3 grid around the output pixel, four image pixels apart, all of one weight."""
    layer, (tile,) = point_tiles(model, [gray(1)[0][1]], CONFIG, LAYER)
    assert layer == LAYER and tile.size == (224, 149)
    scale = 224 / 48
    row, column = 4, 6  # the middle one of 8 x 12 output pixels, each of 4 x 4 image pixels
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            at = ((column + dx + 0.5) * 4 * scale, (row + dy + 0.5) * 4 * scale)
            expected = (255, 255, 255) if dx == dy == 0 else rgb(1.0)  # the cross covers the one in the middle
            assert tile.getpixel(tuple(map(int, at))) == expected
    assert tile.getpixel((5, 5)) == (45, 45, 45)  # 35 % of 128


@pytest.mark.parametrize("count, columns, rows", [(1, 2, 1), (3, 3, 1), (4, 4, 1), (5, 4, 2)])
def test_a_sheet_of_tiles_with_names_on_white(model, tmp_path, count, columns, rows):
    path = tmp_path / "new" / "points.png"
    assert draw_points(model, gray(count), CONFIG, path, LAYER) == LAYER
    with Image.open(path) as sheet:
        assert sheet.width == columns * 240 + 16  # with room for the legend, also above one tile
        assert [sheet.getpixel(at) for at in ((0, 0), (sheet.width - 1, sheet.height - 1))] == [(255, 255, 255)] * 2
        assert sheet.height == 117 + rows * (149 + 19 + 16)
        legend = sheet.crop((0, 0, sheet.width, 100))
        shades = {color for _, color in legend.getcolors(1 << 20)}
        assert {rgb(0.0), rgb(1.0)} <= shades and len(shades & {rgb(i / 255) for i in range(256)}) > 20
        names = sheet.crop((16, sheet.height - 16 - 19, 240, sheet.height - 14))
        assert min(names.convert("L").tobytes()) < 100  # letters
    assert os.stat(path).st_mode & 0o044 == 0o044


def test_the_names_are_those_of_the_images_and_of_long_ones_the_end_is_kept(model, tmp_path):
    seen = []
    long = "/very" * 20 + "/cat.png"
    for name in ("cat.png", "owl.png", "a" + long, "b" + long, "caf\udce9\n.png", "猫.png"):
        draw_points(model, [(name, gray(1)[0][1])], CONFIG, tmp_path / "x.png", LAYER)
        seen.append((tmp_path / "x.png").read_bytes())
    assert len(set(seen)) == 5 and seen[2] == seen[3]
    font = canvas.ImageFont.load_default(13)
    assert canvas.fitted(long, font, 224, keep_end=True).endswith("very/cat.png")
    assert canvas.fitted("levels." * 40, font, 224).startswith("levels.")
    assert canvas.fitted("caf\udce9\n.png", font, 224) == "caf\\udce9\\n.png"
    assert font.getlength(canvas.fitted("W" * 100, font, 224)) <= 224


def test_weights_that_are_not_finite_are_left_out(tmp_path):
    broken = timm.create_model("internimage_atto", num_classes=3)
    with torch.no_grad():
        broken.levels[0].blocks[0].dcn.offset.weight.fill_(float("nan"))
    draw_points(broken, gray(1), CONFIG, tmp_path / "x.png", LAYER)
    assert (tmp_path / "x.png").is_file()
    image, weights = torch.full((3, 32, 32), 128, dtype=torch.uint8), torch.ones(2, 2)
    places = torch.full((2, 2, 2), 5.0)
    drawn = draw_sampling(image, places, weights, (28.0, 28.0)).getcolors(1 << 20)
    assert rgb(1.0) in [color for _, color in drawn]
    for value in (float("nan"), float("inf"), float("-inf")):
        none = draw_sampling(image, places.new_zeros(2, 0, 2), weights[:, :0], (28.0, 28.0))
        assert draw_sampling(image, places * value, weights, (28.0, 28.0)) == none
        assert draw_sampling(image, places, weights * value, (28.0, 28.0)) == none


@pytest.mark.parametrize("name", ["points.txt", "points", "points.png.doc", ".png"])
def test_an_ending_that_is_no_picture(model, tmp_path, name):
    with pytest.raises(UserError, match=f"{name}' cannot be written as a picture: its name must end in .png"):
        draw_points(model, gray(1), CONFIG, tmp_path / name, LAYER)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["points.jpg", "points.webp", "points.BMP", "points.gif"])
def test_other_formats(model, tmp_path, name):
    draw_points(model, gray(1), CONFIG, tmp_path / name, LAYER)
    with Image.open(tmp_path / name) as image:
        assert image.format.lower() in name.lower().replace("jpg", "jpeg")


def test_a_pipe_gets_a_png(model, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_bytes)
        draw_points(model, gray(1), CONFIG, pipe, LAYER)
        assert read.result(timeout=60).startswith(b"\x89PNG")
    assert pipe.is_fifo()


def test_a_picture_that_cannot_be_written(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "x.png", tmp_path / "folder.png"):
        with pytest.raises(UserError, match="cannot be written to|is a folder"):
            draw_points(model, gray(1), CONFIG, path, LAYER)
    (tmp_path / "old.png").write_bytes(b"the picture of yesterday")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space left on device"):
        draw_points(model, gray(1), CONFIG, tmp_path / "old.png", LAYER)
    assert (tmp_path / "old.png").read_bytes() == b"the picture of yesterday"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png", "old.png"]


def test_a_model_without_dcnv3_layers_and_a_layer_that_is_not_there(model, tmp_path, capsys):
    with pytest.raises(UserError, match="has no sampling layer 'levels.9'; it has levels.0.blocks.0.dcn, "):
        draw_points(model, gray(1), CONFIG, tmp_path / "x.png", "levels.9")
    gray(1)[0][1].save(tmp_path / "in.png")
    arguments = ["predict", str(tmp_path / "in.png"), "--model", "resnet10t", "--num-classes", "3"]
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("resnet10t", num_classes=3).state_dict(), weights)
    assert main([*arguments, "--checkpoint", str(weights), "--draw-points", str(tmp_path / "x.png")]) == 2
    err = capsys.readouterr().err
    assert "'resnet10t' has no layers that sample at learned offsets, such as DCNv3" in err and "Traceback" not in err
    assert not (tmp_path / "x.png").exists()
