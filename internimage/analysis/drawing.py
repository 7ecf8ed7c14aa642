# SPDX-License-Identifier: MIT
"""Pictures of views, from their arrays. Every value is shown on one scale of colors, over the image in dark gray.

Numbers that span decades, such as sensitivities, are shown by their logarithm, from a hundredth of the largest one.
"""

import math

import torch
from PIL import Image
from torch import Tensor

from .canvas import SIDE, Canvas, dimmed
from .colors import colors_of
from .effective_points import LayerPoints
from .receptive_field import ReceptiveField
from .saliency import SaliencyRegion

DECADES = 2  # of the logarithmic scale
MOST_POINTS = 4000  # drawn of a layer


def logarithmic(values: Tensor) -> Tensor:
    """Values from 0 -> places on the scale: the largest at 1, a hundredth of it and less at 0."""
    values = values.double()
    most = float(values.max()) if values.numel() else 0.0
    if not most > 0:
        return torch.zeros_like(values)
    return (1 + (values / most).clamp_min(10.0**-DECADES).log10() / DECADES).clamp(0, 1)


def draw_receptive_field(
    pixels: Tensor, field: ReceptiveField, marked: tuple[float, float] | None, side: int = SIDE
) -> Image.Image:
    """The sensitivity of each pixel on a logarithmic scale, and the squares that hold 50 and 99 % of the energy.

    Args:
        pixels: The image, (3, H, W), uint8.
        field: Its receptive field.
        marked: The pixel (x, y) that the node is at; None for a node of the whole image.
        side: Longest side of the picture.
    """
    value = logarithmic(field.sensitivity)
    heat = dimmed(pixels) * (1 - value) + colors_of(value).permute(2, 0, 1).double()
    canvas = Canvas(heat.clamp(0, 255).round().byte(), side)
    for share in (0.99, 0.5):
        canvas.square(*field.center, field.square_side(share))
    if marked is not None:
        canvas.cross(*marked)
    return canvas.picture()


def strongest(points: LayerPoints) -> Tensor:
    """Indices of the points that are drawn, into the flattened ones, the weakest first.

    At most 4000, with at least a hundredth of the largest strength.
    """
    strength = points.strength.flatten()
    order = strength.argsort(descending=True, stable=True)[:MOST_POINTS]
    return order[strength[order] >= strength.max() * 10.0**-DECADES].flip(0) if strength.max() > 0 else order[:0]


def draw_effective_points(
    pixels: Tensor, points: LayerPoints, marked: tuple[float, float] | None, side: int = SIDE
) -> Image.Image:
    """The strongest points of a layer, colored by their strength on a logarithmic scale.

    Args:
        pixels: The image, (3, H, W), uint8.
        points: Of the layer.
        marked: The pixel (x, y) that the node is at; None for a node of the whole image.
        side: Longest side of the picture.
    """
    canvas = Canvas(dimmed(pixels), side)
    chosen = strongest(points)
    radius = min(max(side / math.sqrt(max(len(chosen), 1)) / 5, 1.5), 5.0)
    values = logarithmic(points.strength.flatten())[chosen].tolist()
    for (x, y), value in zip(points.locations.reshape(-1, 2)[chosen].tolist(), values):
        canvas.dot(x, y, radius, value, edged=False)
    if marked is not None:
        canvas.cross(*marked)
    return canvas.picture()


def draw_region(pixels: Tensor, region: SaliencyRegion, side: int = SIDE) -> Image.Image:
    """The image in its colors inside a region, outlined, and in dark gray outside."""
    canvas = Canvas(torch.where(region.mask, pixels, dimmed(pixels)), side)
    canvas.outline(region.mask)
    return canvas.picture()


def draw_sampling(
    pixels: Tensor, locations: Tensor, weights: Tensor, at: tuple[float, float], side: int = SIDE
) -> Image.Image:
    """The points that one output pixel of a layer samples: the larger and the brighter, the larger the weight.

    Args:
        pixels: The image, (3, H, W), uint8.
        locations: (groups, P, 2) as (x, y) in pixels of the image.
        weights: (groups, P). Points whose location or weight is not finite are left out.
        at: The output pixel's center in the image.
        side: Longest side of the picture.
    """
    canvas = Canvas(dimmed(pixels), side)
    weights = weights.double().flatten()
    most = float(weights[weights.isfinite()].abs().max()) if weights.isfinite().any() else 0.0
    for (x, y), weight in zip(locations.double().reshape(-1, 2).tolist(), weights.tolist()):
        if math.isfinite(weight):
            share = abs(weight) / most if most else 0.0
            canvas.dot(x, y, 2.5 + 3 * share, share)
    canvas.cross(*at)
    return canvas.picture()
