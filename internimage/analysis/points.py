# SPDX-License-Identifier: MIT
"""Sampled points of deformable layers, as numbers and drawn over images."""

import io
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from timm.data import create_transform
from torch import Tensor, nn

from ..errors import UserError
from ..files import writing
from ..models.attributes import name_of
from ..models.parts import NoSuchParts, sampling_layers, sampling_layers_of_stage
from ..terminal import printable

_TILE = 224  # longest side of one drawn image in pixels
_FINE = 3  # drawn this many times as large and reduced, for smooth edges
_GAP, _TEXT, _LINE = 16, 13, 19  # between tiles; size of letters; height of a line
_INK, _PALE, _PAPER = "#1a1a1a", "#5f6368", "#ffffff"
_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#bfef45")


@torch.inference_mode()
def sampled_points(model: nn.Module, images: Tensor, layer: str | None = None) -> tuple[str, Tensor, Tensor]:
    """Where a layer samples, in pixels of the model's input.

    Args:
        model: A model with layers that sample at learned offsets, such as DCNv3.
        images: (N, C, H, W), preprocessed.
        layer: Name of the layer; None takes the last one of stage 3.

    Returns:
        The layer's name; locations (N, Ho, Wo, groups, P, 2) as (x, y), where 0 is the center of the first pixel; and
        weights (N, Ho, Wo, groups, P).

    Raises:
        UserError: The model has no such layer.
    """
    layers = sampling_layers(model)
    if not layers:
        raise NoSuchParts(f"'{name_of(model)}' has no layers that sample at learned offsets, such as DCNv3")
    if layer is None:
        layer = (sampling_layers_of_stage(model, 3) or list(layers))[-1]
    if layer not in layers:
        raise NoSuchParts(
            f"'{name_of(model)}' has no sampling layer '{layer}'; it has {', '.join(list(layers)[:3])}, ..."
        )
    seen = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        model(images)
    finally:
        handle.remove()
    (x,) = seen
    location, weight = layers[layer].sampling(x)
    # a feature pixel covers `stride` image pixels, with its center in their middle
    height, width = layers[layer].input_size(x)
    stride = torch.tensor([images.shape[3] / width, images.shape[2] / height], device=location.device)
    return layer, (location.float() + 0.5) * stride - 0.5, weight.float()


def point_tiles(
    model: nn.Module, images: list[Image.Image], config: dict[str, Any], layer: str | None = None
) -> tuple[str, list[Image.Image]]:
    """A picture of each image, at most 224 pixels per side, with the points that its middle output pixel depends on.

    A cross marks the output pixel, a dot each sampled point: its color shows the group, its size the weight.

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
    mean = torch.tensor(config["mean"]).view(-1, 1, 1)
    std = torch.tensor(config["std"]).view(-1, 1, 1)
    shown = ((batch.float().cpu() * std + mean).clamp(0, 1) * 255).round().byte().expand(-1, 3, -1, -1)
    row, column = locations.shape[1] // 2, locations.shape[2] // 2
    at = (column + 0.5) / locations.shape[2], (row + 0.5) / locations.shape[1]
    return layer, [
        _tile(shown[i], locations[i, row, column].cpu(), weights[i, row, column].cpu(), at) for i in range(len(images))
    ]


def _tile(image: Tensor, locations: Tensor, weights: Tensor, at: tuple[float, float]) -> Image.Image:
    """An image (3, H, W), points (groups, P, 2) in its pixels, weights (groups, P), the cross as shares of W and H."""
    height, width = image.shape[1:]
    scale = _TILE / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    fine = _FINE * size[0], _FINE * size[1]
    tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(fine, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(tile)
    for group, (places, shares) in enumerate(zip(locations.tolist(), weights.tolist())):
        for (x, y), weight in zip(places, shares):
            if math.isfinite(x) and math.isfinite(y) and math.isfinite(weight):
                center = (x + 0.5) * scale * _FINE, (y + 0.5) * scale * _FINE
                _dot(draw, center, 2.5 + 12 * max(weight, 0.0), _COLORS[group % len(_COLORS)], _FINE)
    _cross(draw, (at[0] * fine[0], at[1] * fine[1]), _FINE)
    return tile.resize(size, Image.Resampling.BOX)


def _dot(draw: ImageDraw.ImageDraw, at: tuple[float, float], radius: float, color: str, fine: int) -> None:
    x, y, r = *at, radius * fine
    draw.ellipse([x - r, y - r, x + r, y + r], fill=color, outline="white", width=fine)


def _cross(draw: ImageDraw.ImageDraw, at: tuple[float, float], fine: int) -> None:
    x, y = at
    for color, arm, thickness in (("black", 9, 5), ("yellow", 7, 2)):  # visible on any background
        draw.line([x - arm * fine, y, x + arm * fine, y], fill=color, width=thickness * fine)
        draw.line([x, y - arm * fine, x, y + arm * fine], fill=color, width=thickness * fine)


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
    draw.text((_GAP, _GAP - 4), _fit(f"Where {layer} samples", large, width - 2 * _GAP), _INK, large)
    y = _GAP + 28
    _cross(draw, (_GAP + 9, y + _LINE // 2 - 2), 1)
    draw.text((_GAP + 26, y), "the output pixel in the middle", _PALE, font)
    _dot(draw, (_GAP + 9, y + _LINE + _LINE // 2 - 2), 5, _COLORS[0], 1)
    draw.text((_GAP + 26, y + _LINE), "a point it is computed from: color = group, size = weight", _PALE, font)
    draw.text((_GAP + 26, y + 2 * _LINE), "(points outside the image read zeros and are not drawn)", _PALE, font)
    for i, (name, tile) in enumerate(zip(names, tiles)):
        row, column = divmod(i, columns)
        x = _GAP + column * (_TILE + _GAP)
        y = top + sum(height + _LINE + _GAP for height in heights[:row])
        sheet.paste(tile, (x, y))
        draw.text((x, y + heights[row] + 4), _fit(name, font, _TILE, keep_end=True), _INK, font)
    return sheet


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, keep_end: bool = False) -> str:
    """The text, shortened to a width; a path keeps its end. Unprintable characters are escaped."""
    text = printable(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"...{text}") > width:
        text = text[1:] if keep_end else text[:-1]
    return f"...{text}" if keep_end else f"{text}..."
