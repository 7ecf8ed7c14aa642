# SPDX-License-Identifier: MIT
"""Where a layer samples several images: a picture of each, and the sheet that `predict --draw-points` writes."""

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from timm.data import create_transform
from torch import nn

from ..errors import UserError
from ..files import writing
from .canvas import color_bar, draw_cross, fitted, to_pixels
from .drawing import draw_sampling
from .maps import LayerMap
from .points import sampled_points

_TILE = 224  # longest side of one picture in pixels
_GAP, _TEXT, _LINE = 16, 13, 19  # between tiles; size of letters; height of a line
_INK, _PALE, _PAPER = "#1a1a1a", "#5f6368", "#ffffff"


def point_tiles(
    model: nn.Module, images: list[Image.Image], config: dict[str, Any], layer: str | None = None
) -> tuple[str, list[Image.Image]]:
    """A picture of each image, at most 224 pixels per side, with the points that its middle output pixel depends on.

    A cross marks the output pixel, a dot each sampled point: the larger and the brighter, the larger its weight.

    Args:
        model: As in `sampled_points`; is left in eval mode.
        images: At least one.
        config: timm's preprocessing.
        layer: As in `sampled_points`.

    Returns:
        The layer's name, and the pictures.

    Raises:
        UserError: The model has no such layer.
    """
    parameter = next(model.parameters())
    transform = create_transform(**config, is_training=False)
    batch = torch.stack([transform(image) for image in images]).to(parameter.device, parameter.dtype)
    layer, locations, weights = sampled_points(model.eval(), batch, layer)
    rows, columns, groups = locations.shape[1:4]
    row, column = rows // 2, columns // 2
    at = LayerMap(layer, groups, rows, columns, *batch.shape[2:]).to_image(column, row)
    return layer, [
        draw_sampling(
            to_pixels(batch[i], config["mean"], config["std"]),
            locations[i, row, column].cpu(),
            weights[i, row, column].cpu(),
            at,
            _TILE,
        )
        for i in range(len(images))
    ]


def draw_points(
    model: nn.Module,
    images: list[tuple[str, Image.Image]],
    config: dict[str, Any],
    path: str | Path,
    layer: str | None = None,
) -> str:
    """Draw the points that the middle output pixel of each image is computed from, as one picture with a legend.

    Args:
        model: As in `sampled_points`; is left in eval mode.
        images: (name, image) pairs, at least one; the end of the name is shown below the image.
        config: timm's preprocessing.
        path: File to write; its suffix determines the format, such as `.png`. A pipe gets PNG.
        layer: As in `sampled_points`.

    Returns:
        The layer's name.

    Raises:
        UserError: The model has no such layer, or Pillow knows no format by that ending.
        WriteError: The file cannot be written; an existing one is unchanged.
    """
    path = Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE and path.exists() and not path.is_file() and not path.is_dir():
        kind = "PNG"  # a pipe or a device, whose name has no suffix
    if kind not in Image.SAVE:
        raise UserError(f"'{path}' cannot be written as a picture: its name must end in .png, .jpg or .webp")
    layer, tiles = point_tiles(model, [image for _, image in images], config, layer)
    sheet = _sheet([name for name, _ in images], tiles, layer)
    data = io.BytesIO()
    try:
        sheet.save(data, kind)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"'{path}' cannot be written as {kind} ({error}); .png always can") from error
    with writing(path) as file:
        file.write(data.getvalue())
    return layer


def _sheet(names: list[str], tiles: list[Image.Image], layer: str) -> Image.Image:
    """The tiles with their names, below a title and a legend."""
    font, large = ImageFont.load_default(_TEXT), ImageFont.load_default(_TEXT + 4)
    columns = min(len(tiles), 4)
    width = max(columns * (_TILE + _GAP) + _GAP, 2 * (_TILE + _GAP) + _GAP)  # room for the legend
    heights = [max(tile.height for tile in tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
    top = _GAP + 28 + 3 * _LINE + _GAP
    sheet = Image.new("RGB", (width, top + sum(height + _LINE + _GAP for height in heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP - 4), fitted(f"Where {layer} samples", large, width - 2 * _GAP), _INK, large)
    y = _GAP + 28
    draw_cross(draw, (_GAP + 9, y + _LINE // 2 - 2))
    draw.text((_GAP + 26, y), "the output pixel in the middle", _PALE, font)
    sheet.paste(color_bar(2 * _GAP, 10), (_GAP, y + _LINE + 5))
    draw.text((_GAP + 40, y + _LINE), "a point it is computed from: its weight, from 0 to the largest", _PALE, font)
    draw.text((_GAP + 26, y + 2 * _LINE), "(points outside the image read zeros and are not drawn)", _PALE, font)
    for i, (name, tile) in enumerate(zip(names, tiles)):
        row, column = divmod(i, columns)
        x = _GAP + column * (_TILE + _GAP)
        y = top + sum(height + _LINE + _GAP for height in heights[:row])
        sheet.paste(tile, (x, y))
        draw.text((x, y + heights[row] + 4), fitted(name, font, _TILE, keep_end=True), _INK, font)
    return sheet
