# SPDX-License-Identifier: MIT
"""Pixels carried through resize and crop: against where the preprocessing itself puts a spot of light."""

import numpy as np
import pytest
from PIL import Image

from internimage.data.datasets import EvaluationTransform
from internimage.data.images import DataError
from internimage.data.placement import placement

CONFIG = dict(input_size=(3, 64, 64), interpolation="bicubic", mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=0.875)
MODES = ("center", "squash", "border")


def config(**changes):
    return CONFIG | changes


def spot(width, height, x, y):
    """A wide spot of light around a place, on black."""
    columns, rows = np.arange(width), np.arange(height)[:, None]
    light = 255 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * (min(width, height) / 14) ** 2))
    return Image.fromarray(light.round().astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize("border", [0, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(150, 100), (90, 200), (40, 40), (64, 64), (31, 47)])
def test_a_spot_is_where_it_is_carried(size, mode, border):
    """The center of mass of the preprocessed spot. Resampling filters are symmetric, so it moves with the pixels; the
    rounding of shades (half a level of 255, over a spot's pixels) moves it by less than a tenth of a pixel."""
    width, height = size
    settings = config(crop_mode=mode, crop_border_pixels=border)
    for share in (0.45, 0.55):
        x, y = share * width, (1 - share) * height
        image = spot(width, height, x, y)
        light = EvaluationTransform(settings)(image)[0].double().numpy()
        total = light.sum()
        found = (light.sum(0) * np.arange(64)).sum() / total, (light.sum(1) * np.arange(64)).sum() / total
        place = placement(settings, image)
        # the spot's own center of mass, as its shades are rounded too
        shades = np.asarray(image)[..., 0].astype(float)
        center = [(shades.sum(axis) * np.arange(shades.shape[1 - axis])).sum() / shades.sum() for axis in (0, 1)]
        assert np.allclose(place.to_model(*center), found, atol=0.1), (size, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("input_size", [(3, 64, 64), (3, 48, 80), (1, 64, 64)])
def test_the_size_is_that_of_the_preprocessing_and_the_way_back_is_the_inverse(mode, input_size):
    channels = input_size[0]
    settings = config(crop_mode=mode, input_size=input_size, mean=(0.0,) * channels, std=(1.0,) * channels)
    image = Image.new("L" if channels == 1 else "RGB", (123, 77))
    place = placement(settings, image)
    assert EvaluationTransform(settings)(image).shape == (channels, place.model_height, place.model_width)
    for at in ((0, 0), (61.5, 40), (122, 76)):
        assert np.allclose(place.from_model(*place.to_model(*at)), at, atol=1e-9)


def test_by_hand():
    """150 x 100: the shorter side becomes 73 (64 / 0.875), the longer one 109; then 64 x 64 from the middle."""
    place = placement(config(), Image.new("RGB", (150, 100)))
    assert (place.model_width, place.model_height) == (64, 64)
    assert place.scale == (109 / 150, 0.73) and place.shift == (-22, -4)  # 22.5 and 4.5, rounded to even
    assert place.to_model(-0.5, -0.5) == (-22.5, -4.5)
    left, right, top, bottom = place.seen()
    assert (left, right, top, bottom) == (30, 117, 5, 92)
    for x, y in ((left, top), (right, bottom)):
        place.checked(x, y)
    for x, y in ((left - 1, 50), (right + 1, 50), (70, top - 1), (70, bottom + 1)):
        with pytest.raises(DataError, match="is in the part that the crop removes: the model sees columns 30 to 117"):
            place.checked(x, y)


@pytest.mark.parametrize("at", [(-1, 5), (5, -1), (150, 5), (5, 100), (1e9, 5)])
def test_a_pixel_outside_the_image(at):
    with pytest.raises(DataError, match="is outside the image of 150 x 100 pixels"):
        placement(config(), Image.new("RGB", (150, 100))).checked(*at)


def test_padding_is_not_the_image():
    """With borders a wide image does not fill the model's: rows above it belong to no pixel, and all columns do."""
    place = placement(config(crop_mode="border", crop_pct=1.0), Image.new("RGB", (128, 64)))
    assert place.shift == (0, 16) and place.scale == (0.5, 0.5) and place.seen() == (0, 127, 0, 63)


def test_a_preprocessing_that_moves_pixels_in_another_way(monkeypatch):
    class Turn:
        pass

    monkeypatch.setattr(
        "internimage.data.placement.EvaluationTransform",
        lambda config: type("Steps", (), {"transform": type("All", (), {"transforms": [Turn()]})()})(),
    )
    with pytest.raises(DataError, match="pixels cannot be carried through 'Turn'"):
        placement(config(), Image.new("RGB", (8, 8)))
