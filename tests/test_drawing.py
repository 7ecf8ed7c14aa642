# SPDX-License-Identifier: MIT
"""Pictures of views: the scale of colors, and what is drawn where."""

import numpy as np
import pytest
import torch
from PIL import Image

from internimage.analysis.areas import as_mask
from internimage.analysis.canvas import Canvas, color_bar, dimmed, to_pixels
from internimage.analysis.colors import colors_of, css_gradient, rgb, scale
from internimage.analysis.drawing import (
    draw_effective_points,
    draw_receptive_field,
    draw_region,
    draw_sampling,
    logarithmic,
    strongest,
)
from internimage.analysis.effective_points import LayerPoints
from internimage.analysis.receptive_field import ReceptiveField
from internimage.analysis.saliency import SaliencyRegion

GRAY = torch.full((3, 16, 16), 200, dtype=torch.uint8)
DIM = (70, 70, 70)  # 35 % of 200


def lightness(colors):
    """CIELAB's L* of sRGB colors (N, 3), 0 to 255: by CIE 15, not by the formulas that made the scale."""
    encoded = np.asarray(colors, float) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(y > (6 / 29) ** 3, 116 * np.cbrt(y) - 16, y * (29 / 3) ** 3)


def pixel(picture, x, y, side=16):
    """The color at the middle of a pixel of an image of a side."""
    factor = picture.width / side
    return picture.getpixel((int((x + 0.5) * factor), int((y + 0.5) * factor)))


def test_the_scale_becomes_lighter_evenly():
    """From black to nearly white, in L* and as gray. L* and the lightness that the scale is even in (OKLab's) are two
    models of the same thing, which differ near black alone: above, steps of one eighth differ by less than a fifth."""
    found = lightness(scale().numpy())
    assert found[0] == 0 and found[-1] > 90 and (np.diff(found) > -0.6).all()  # colors are rounded to whole numbers
    eighths = np.diff(found[np.linspace(0, 255, 9).round().astype(int)])
    assert eighths[2:].max() / eighths[2:].min() < 1.2 and eighths.min() > 1
    gray = np.array([Image.new("RGB", (1, 1), tuple(c)).convert("L").getpixel((0, 0)) for c in scale().tolist()])
    assert (np.diff(gray.astype(int)) >= -1).all() and gray[-1] > 230


def test_colors_of_values():
    values = torch.tensor([[-1.0, 0.0], [0.5, 2.0]])
    assert colors_of(values).shape == (2, 2, 3)
    assert rgb(0) == tuple(scale()[0].tolist()) == tuple(colors_of(values)[0, 0].tolist())
    assert rgb(1) == tuple(scale()[255].tolist()) == tuple(colors_of(values)[1, 1].tolist())
    first, last = ("#%02x%02x%02x" % rgb(value) for value in (0, 1))  # noqa: UP031
    assert css_gradient().startswith(f"linear-gradient(90deg,{first},") and css_gradient().endswith(f",{last})")
    bar = color_bar(50, 4)
    assert bar.size == (50, 4) and bar.getpixel((0, 3)) == rgb(0) and bar.getpixel((49, 0)) == rgb(1)


def test_an_image_as_it_looks_is_the_preprocessing_undone():
    pixels = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.equal(to_pixels(image, mean, std), pixels)
    assert torch.equal(to_pixels(image.bfloat16() * 100, mean, std), to_pixels(image * 100, mean, std).clamp(0, 255))
    gray = to_pixels((pixels[:1] / 255 - 0.5) / 0.25, (0.5,), (0.25,))
    assert gray.shape == (3, 5, 7) and torch.equal(gray[1], pixels[0])


def test_the_logarithm_of_values():
    values = torch.tensor([0.0, 1e-9, 2e-2, 0.2, 2.0])
    assert torch.allclose(logarithmic(values), torch.tensor([0, 0, 0, 0.5, 1]).double(), atol=1e-7)
    assert torch.equal(logarithmic(torch.zeros(3)), torch.zeros(3).double())
    assert logarithmic(torch.zeros(0)).shape == (0,)


def field(sensitivity, center=(7.5, 7.5)):
    return ReceptiveField(sensitivity.double(), "a node", center, None)


def test_a_receptive_field_is_colored_where_it_is_large_and_shows_the_image_elsewhere():
    sensitivity = torch.zeros(16, 16)
    sensitivity[3, 12], sensitivity[4, 12], sensitivity[5, 12] = 5.0, 0.5, 0.05
    picture = draw_receptive_field(GRAY, field(sensitivity, (12, 4)), None)
    assert picture.size == (448, 448)
    assert pixel(picture, 12, 3) == rgb(1.0)
    assert pixel(picture, 12, 5) == DIM and pixel(picture, 2, 2) == DIM
    # the value 0.5 over half of the dimmed image, each rounded once
    expected = [35 + c for c in rgb(0.5)]
    assert np.abs(np.subtract(pixel(picture, 12, 4), expected)).max() <= 1


def test_the_squares_of_a_receptive_field_and_the_cross():
    """A sensitivity of one pixel beside the node: both squares have its distance as half of their side."""
    sensitivity = torch.zeros(16, 16)
    sensitivity[8, 11] = 1.0
    picture = np.asarray(draw_receptive_field(GRAY, field(sensitivity, (8.0, 8.0)), (8.0, 8.0)))
    factor = 448 / 16
    # 7 pixels wide around pixel (8, 8): its left edge is that of pixel 5
    edge = round(5 * factor)
    row = picture[round(9.7 * factor), edge - 2 : edge + 4].astype(int)
    assert row.max() > 200 and row.min() < 30  # a light line with a dark edge
    assert tuple(picture[round(8.5 * factor), round(8.5 * factor)]) == (255, 255, 255)
    none = np.asarray(draw_receptive_field(GRAY, field(torch.zeros(16, 16)), None))
    assert (none == 70).all()  # nothing matters: no squares, and the image


def layer(locations, strength):
    """A layer of one output pixel and group."""
    return LayerPoints(
        "layer",
        torch.tensor(locations).double().view(1, 1, 1, -1, 2),
        torch.tensor(strength).double().view(1, 1, 1, -1),
        True,
    )


def test_effective_points_are_where_they_are_and_as_bright_as_they_are_strong():
    points = layer([[2, 3], [10, 3], [6, 12], [14, 14], [50, 50]], [1.0, 0.1, 0.5, 0.001, 0.9])
    assert strongest(points).tolist() == [1, 2, 4, 0]  # the last is below a hundredth; the weakest is drawn first
    picture = draw_effective_points(GRAY, points, None)
    assert pixel(picture, 2, 3) == rgb(1.0) and pixel(picture, 10, 3) == rgb(0.5)
    assert pixel(picture, 6, 12) == rgb(1 + np.log10(0.5) / 2)
    assert pixel(picture, 14, 14) == DIM and pixel(picture, 8, 8) == DIM
    nothing = draw_effective_points(GRAY, layer([[2, 3]], [0.0]), (8, 8))
    assert pixel(nothing, 2, 3) == DIM and pixel(nothing, 8, 8) == (255, 255, 255)


def test_of_many_points_the_strongest_are_drawn():
    strength = torch.rand(10000, generator=torch.Generator().manual_seed(0)) + 0.1
    points = LayerPoints("layer", torch.zeros(100, 100, 1, 1, 2), strength.view(100, 100, 1, 1).double(), True)
    chosen = strongest(points)
    assert len(chosen) == 4000 and strength[chosen].min() >= strength.sort(descending=True).values[3999]


def region(mask):
    return SaliencyRegion(mask, mask, float(mask.double().mean()), 0.0, 0.1, 0.5, True, 9, 1, "median", GRAY, "a node")


def test_a_region_is_in_its_colors_and_outlined():
    mask = as_mask((4, 2, 8, 6), 16, 16)
    picture = draw_region(GRAY, region(mask))
    for y in range(16):
        for x in range(16):
            assert pixel(picture, x, y) == ((200, 200, 200) if mask[y, x] else DIM), (x, y)
    array = np.asarray(picture).astype(int)
    white = (array > 240).all(-1)
    factor = 28
    assert white[3 * factor : 5 * factor, 4 * factor - 2 : 4 * factor + 2].any(1).all()  # the left edge
    assert not white[:, : 4 * factor - 3].any() and not white[: 2 * factor - 3].any()
    assert (np.asarray(draw_region(GRAY, region(torch.zeros(16, 16, dtype=torch.bool)))) == 70).all()
    whole = np.asarray(draw_region(GRAY, region(torch.ones(16, 16, dtype=torch.bool))))
    assert (whole[10:-10, 10:-10] == 200).all()


def test_samples_are_where_they_are_and_the_larger_weight_is_brighter():
    locations = torch.tensor([[[2.0, 2.0], [9.0, 4.0]], [[5.0, 12.0], [40.0, 5.0]]])
    weights = torch.tensor([[0.4, 0.1], [0.2, 0.9]])
    picture = draw_sampling(GRAY, locations, weights, (12.0, 12.0))
    for (x, y), weight in (((2, 2), 0.4), ((9, 4), 0.1), ((5, 12), 0.2)):
        assert pixel(picture, x, y) == rgb(weight / 0.9)  # the largest is outside
    assert pixel(picture, 12, 12) == (255, 255, 255)
    dark = draw_sampling(GRAY, locations, weights * 0, (12.0, 12.0))
    assert pixel(dark, 2, 2) == rgb(0.0)


@pytest.mark.parametrize("height, width, size", [(64, 32, (224, 448)), (3, 448, (448, 3)), (1, 1000, (448, 1))])
def test_a_canvas_keeps_the_proportions(height, width, size):
    pixels = torch.full((3, height, width), 9, dtype=torch.uint8)
    canvas = Canvas(pixels)
    canvas.outline(torch.ones(height, width, dtype=torch.bool))
    canvas.dot(float("nan"), 0, 2, 1.0)
    canvas.square(0, 0, float("nan"))
    assert canvas.picture().size == size and dimmed(pixels).shape == pixels.shape
