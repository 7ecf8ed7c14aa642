# SPDX-License-Identifier: MIT
"""The one color scale of all pictures: from black over violet and orange to light yellow.

Its lightness rises evenly from 0 to 0.95, and its hue turns one way, in OKLCH (B. Ottosson, "A perceptual color space
for image processing", 2020). So equal steps look equal, in color, in gray, and to those who see few colors.
"""

from functools import cache

import torch
from torch import Tensor

STEPS = 256
_LIGHTNESS = 0.0, 0.95
_HUE = 290.0, 460.0  # degrees: violet, red (360), yellow
_CHROMA = 0.19  # at most; less where sRGB has no such color

# OKLab -> cube roots of cone responses, and cone responses -> linear sRGB, from the source above
_TO_ROOTS = [
    [1.0, 0.3963377774, 0.2158037573],
    [1.0, -0.1055613458, -0.0638541728],
    [1.0, -0.0894841775, -1.2914855480],
]
_TO_RGB = [
    [4.0767416621, -3.3077115913, 0.2309699292],
    [-1.2684380046, 2.6097574011, -0.3413193965],
    [-0.0041960863, -0.7034186147, 1.7076147010],
]  # fmt: skip


@cache
def scale() -> Tensor:
    """The colors from the smallest value to the largest: (256, 3), uint8, sRGB."""
    share = torch.linspace(0, 1, STEPS, dtype=torch.float64)
    lightness = _LIGHTNESS[0] + share * (_LIGHTNESS[1] - _LIGHTNESS[0])
    hue = torch.deg2rad(_HUE[0] + share * (_HUE[1] - _HUE[0]))
    low, high = torch.zeros_like(share), torch.full_like(share, _CHROMA)
    for _ in range(30):  # bisection: the largest chroma that sRGB has at each lightness and hue
        middle = (low + high) / 2
        color = _linear_rgb(lightness, middle, hue)
        there = ((color >= -1e-6) & (color <= 1 + 1e-6)).all(1)
        low, high = torch.where(there, middle, low), torch.where(there, high, middle)
    linear = _linear_rgb(lightness, low, hue).clamp(0, 1)
    encoded = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (255 * encoded).round().to(torch.uint8)


def _linear_rgb(lightness: Tensor, chroma: Tensor, hue: Tensor) -> Tensor:
    lab = torch.stack([lightness, chroma * hue.cos(), chroma * hue.sin()], dim=1)
    roots = lab @ torch.tensor(_TO_ROOTS, dtype=torch.float64).T
    return roots**3 @ torch.tensor(_TO_RGB, dtype=torch.float64).T


def colors_of(values: Tensor) -> Tensor:
    """Colors of values from 0 to 1: (...) -> (..., 3), uint8. Values beyond are those of the ends."""
    index = (values.double().clamp(0, 1) * (STEPS - 1)).round().long()
    return scale()[index]


def rgb(value: float) -> tuple[int, int, int]:
    """The color of a value from 0 to 1."""
    red, green, blue = colors_of(torch.tensor(value)).tolist()
    return red, green, blue


def css_gradient(stops: int = 17) -> str:
    """The scale from left to right, as a background in CSS."""
    places = [i / (stops - 1) for i in range(stops)]
    return f"linear-gradient(90deg,{','.join('#{:02x}{:02x}{:02x}'.format(*rgb(place)) for place in places)})"
