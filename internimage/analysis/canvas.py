# SPDX-License-Identifier: MIT
"""A picture of an image to draw on, with the pixels of the image as coordinates, and what is drawn on it."""

import math

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..terminal import printable
from .colors import colors_of, rgb

SIDE = 448  # longest side of a picture in pixels
_FINE = 3  # drawn this many times as large and reduced, for smooth edges
_DIM = 0.35  # brightness of the image behind values
_EDGE, _MARK = "#000000", "#ffffff"


def to_pixels(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """A preprocessed image (C, H, W) as it looks: (3, H, W), uint8. Other numbers of channels become gray."""
    shape = (-1, 1, 1)
    pixels = image.detach().float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    pixels = pixels if len(pixels) == 3 else pixels.mean(0, keepdim=True).expand(3, -1, -1)
    return (pixels.clamp(0, 1) * 255).round().byte()


def dimmed(pixels: Tensor) -> Tensor:
    """An image (3, H, W), uint8, in dark gray, to draw values over."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return ((pixels * weights).sum(0, keepdim=True) * _DIM).round().byte().expand(3, -1, -1)


def pixels_picture(pixels: Tensor) -> Image.Image:
    """An image (3, H, W), uint8, as a picture of that size."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


class Canvas:
    """A picture of an image to draw on. Places are (x, y) in pixels of the image, 0 being the center of the first one.

    Args:
        pixels: (3, H, W), uint8.
        side: Longest side of the picture; small images are shown in sharp squares.
    """

    def __init__(self, pixels: Tensor, side: int = SIDE) -> None:
        height, width = pixels.shape[1:]
        self.scale = side / max(height, width)
        self.size = max(round(width * self.scale), 1), max(round(height * self.scale), 1)
        fine = _FINE * self.size[0], _FINE * self.size[1]
        self._image = pixels_picture(pixels).resize(fine, Image.Resampling.NEAREST)
        self._draw = ImageDraw.Draw(self._image)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a place is in the fine picture."""
        return (x + 0.5) * self.scale * _FINE, (y + 0.5) * self.scale * _FINE

    def dot(self, x: float, y: float, radius: float, value: float, edged: bool = True) -> None:
        """A dot of a radius in pixels of the picture, in the color of a value from 0 to 1. None outside the image."""
        if math.isfinite(x) and math.isfinite(y):
            draw_dot(self._draw, self.place(x, y), radius, rgb(value), _FINE, edged)

    def cross(self, x: float, y: float) -> None:
        """Marks a place."""
        draw_cross(self._draw, self.place(x, y), _FINE)

    def square(self, x: float, y: float, side: float) -> None:
        """The outline of a square of a side in pixels of the image; it may reach beyond."""
        if math.isfinite(side):
            corners = [*self.place(x - side / 2, y - side / 2), *self.place(x + side / 2, y + side / 2)]
            self._draw.rectangle(corners, outline=_EDGE, width=3 * _FINE)
            self._draw.rectangle(
                [a + d for a, d in zip(corners, (_FINE, _FINE, -_FINE, -_FINE))], outline=_MARK, width=_FINE
            )

    def outline(self, mask: Tensor) -> None:
        """The edges of a mask (H, W) of the image's pixels."""
        padded = torch.nn.functional.pad(mask, (1, 1, 1, 1))
        for y, x in (padded[1:, 1:-1] != padded[:-1, 1:-1]).nonzero().tolist():
            self._edge((x, y), (x + 1, y))
        for y, x in (padded[1:-1, 1:] != padded[1:-1, :-1]).nonzero().tolist():
            self._edge((x, y), (x, y + 1))

    def _edge(self, start: tuple[int, int], end: tuple[int, int]) -> None:
        factor = self.scale * _FINE
        self._draw.line([start[0] * factor, start[1] * factor, end[0] * factor, end[1] * factor], _MARK, 2 * _FINE)

    def picture(self) -> Image.Image:
        """The result, RGB."""
        return self._image.resize(self.size, Image.Resampling.BOX)


def draw_dot(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    radius: float,
    color: tuple[int, int, int],
    fine: int = 1,
    edged: bool = True,
) -> None:
    """A dot in a picture that is `fine` times too large; the radius is that in the reduced one."""
    x, y, r = *at, radius * fine
    draw.ellipse([x - r, y - r, x + r, y + r], fill=color, outline=_MARK if edged else None, width=fine)


def draw_cross(draw: ImageDraw.ImageDraw, at: tuple[float, float], fine: int = 1) -> None:
    """A cross in a picture that is `fine` times too large."""
    x, y = at
    for color, arm, thickness in ((_EDGE, 9, 5), (_MARK, 7, 2)):  # visible on any background
        draw.line([x - arm * fine, y, x + arm * fine, y], fill=color, width=thickness * fine)
        draw.line([x, y - arm * fine, x, y + arm * fine], fill=color, width=thickness * fine)


def fitted(text: str, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont", width: int, keep_end: bool = False) -> str:
    """The text, shortened to a width; a path keeps its end. Unprintable characters are escaped."""
    text = printable(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"...{text}") > width:
        text = text[1:] if keep_end else text[:-1]
    return f"...{text}" if keep_end else f"{text}..."


def color_bar(width: int, height: int) -> Image.Image:
    """The scale from left to right."""
    row = colors_of(torch.linspace(0, 1, width))
    return Image.fromarray(row[None].expand(height, -1, -1).contiguous().numpy())
