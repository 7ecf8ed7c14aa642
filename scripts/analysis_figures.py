# SPDX-License-Identifier: MIT
"""The pictures of `docs/analysis.md`: views of a trained model, beside the same model without training.

`analysis_pictures.py --pictures` calls this with the models that it has measured. Each picture has one image of each
class, the first of the held-out ones, whatever the views look like there.
"""

import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from analysis_measures import BOUND, CELL, NODE, PROJECTIONS, Held
from PIL import Image, ImageDraw, ImageFont
from shapes import ATTRIBUTION
from torch import Tensor, nn

from internimage.analysis import (
    effective_points,
    effective_receptive_field,
    map_of,
    saliency_region,
    sampled_points,
)
from internimage.analysis.canvas import Canvas, color_bar, to_pixels
from internimage.analysis.drawing import (
    draw_effective_points,
    draw_receptive_field,
    draw_region,
    draw_sampling,
)
from internimage.html_page import png
from internimage.models.parts import sampling_layers

SIDE = 160  # px of one picture
_LEFT, _GAP, _LINE, _TEXT = 118, 8, 18, 13
_INK, _PALE, _PAPER = "#1a1a1a", "#5f6368", "#ffffff"

Row = tuple[str, list[Image.Image]]
"""A label, and a picture of each image."""


def one_of_each(images: Sequence[Held]) -> list[Held]:
    """The first image of each class, in the order of the classes' names."""
    return [next(held for held in images if held.label == label) for label in sorted({held.label for held in images})]


def sheet(rows: Sequence[Row], columns: Sequence[str], ticks: tuple[str, str, str] | None) -> Image.Image:
    """Pictures in rows and columns with their labels, the scale of colors, and where the photographs are from.

    Args:
        rows: From the top.
        columns: Labels of the columns.
        ticks: Texts below the left end, middle and right end of the scale; None without a scale.
    """
    font = ImageFont.load_default(_TEXT)
    width = _LEFT + len(columns) * (SIDE + _GAP)
    note = textwrap.wrap(ATTRIBUTION, (width - 2 * _GAP) // 6)
    heights = [rows[0][1][0].height] * len(rows)
    bottom = _LINE + _GAP + sum(heights) + _GAP * len(rows)
    total = bottom + (2 * _LINE + _GAP if ticks else 0) + (_LINE - 4) * len(note) + _GAP
    found = Image.new("RGB", (width, total), _PAPER)
    draw = ImageDraw.Draw(found)
    for i, label in enumerate(columns):
        draw.text((_LEFT + i * (SIDE + _GAP), 2), label, _INK, font)
    y = _LINE + _GAP
    for label, pictures in rows:
        for k, line in enumerate(label.split("\n")):
            draw.text((_GAP, y + k * _LINE), line, _INK, font)
        for i, picture in enumerate(pictures):
            found.paste(picture, (_LEFT + i * (SIDE + _GAP), y))
        y += pictures[0].height + _GAP
    if ticks:
        bar = color_bar(2 * SIDE, 10)
        found.paste(bar, (_LEFT, y))
        for text, at, anchor in zip(ticks, (0, SIDE, 2 * SIDE), ("la", "ma", "ra")):
            draw.text((_LEFT + at, y + 12), text, _PALE, font, anchor=anchor)
        y += 2 * _LINE + _GAP
    small = ImageFont.load_default(_TEXT - 2)
    for line in note:
        draw.text((_GAP, y), line, _PALE, small)
        y += _LINE - 4
    return found


def draw_figures(
    models: Mapping[str, nn.Module], images: Sequence[Held], config: Mapping[str, Any]
) -> dict[str, bytes]:
    """The pictures as PNG files, by name.

    Args:
        models: "trained" and "control".
        images: Held out, with at least one of each class.
        config: timm's preprocessing.
    """
    chosen = one_of_each(images)
    shown = partial(to_pixels, mean=config["mean"], std=config["std"])
    columns = [held.label for held in chosen]
    names = {"trained": "trained", "control": "untrained"}
    logarithmic = "1 % and less", "10 %", "the largest"
    originals: Row = ("image", [Canvas(shown(held.image), SIDE).picture() for held in chosen])
    fields = [(names[name], [_field(model, held, shown) for held in chosen]) for name, model in models.items()]
    layers = list(sampling_layers(models["trained"]))
    points = [
        (f"{names[name]}\n{layer.removesuffix('.dcn')}", [_points(model, held, shown, layer) for held in chosen])
        for layer in (layers[0], layers[-2])
        for name, model in models.items()
    ]
    regions = [
        (f"{names[name]}\n{how}", [_region(models[name], held, shown, fill, relative) for held in chosen])
        for name, how, fill, relative in (
            ("trained", "median fill", "median", False),
            ("trained", "median fill,\nrelative bound", "median", True),
            ("trained", "blur fill", "blur", False),
            ("trained", "zero fill", "zero", False),
            ("control", "median fill", "median", False),
            ("control", "median fill,\nrelative bound", "median", True),
        )
    ]
    samples = [
        (
            f"{names[name]}\n{layers[-2].removesuffix('.dcn')}",
            [_samples(model, held, shown, layers[-2]) for held in chosen],
        )
        for name, model in models.items()
    ]
    return {
        "receptive-field.png": png(sheet([originals, *fields], columns, logarithmic)),
        "effective-points.png": png(sheet(points, columns, logarithmic)),
        "saliency.png": png(sheet([originals, *regions], columns, None)),
        "sampling.png": png(sheet(samples, columns, ("weight 0", "", "the largest"))),
    }


def _field(model: nn.Module, held: Held, shown: Any) -> Image.Image:
    field = effective_receptive_field(model, held.image, NODE, PROJECTIONS)
    return draw_receptive_field(shown(held.image), field, None, SIDE)


def _points(model: nn.Module, held: Held, shown: Any, layer: str) -> Image.Image:
    found = effective_points(model, held.image, NODE, PROJECTIONS)
    (points,) = [each for each in found.layers if each.layer == layer]
    return draw_effective_points(shown(held.image), points, None, SIDE)


def _region(model: nn.Module, held: Held, shown: Any, fill: str, relative: bool) -> Image.Image:
    region = saliency_region(model, held.image, NODE, BOUND, CELL, fill)
    if relative:
        region = saliency_region(model, held.image, NODE, BOUND * region.masked_error, CELL, fill)
    return draw_region(shown(held.image), region, SIDE)


def _samples(model: nn.Module, held: Held, shown: Any, layer: str) -> Image.Image:
    """Where a layer samples for the output pixel in the middle of the object."""
    _, locations, weights = sampled_points(model, held.image[None], layer)
    y, x = (float(each) for each in held.mask.nonzero().double().mean(0))
    there = map_of(model, held.image, layer)
    column, row = there.from_image(x, y)
    picked: tuple[Tensor, Tensor] = locations[0, row, column], weights[0, row, column]
    return draw_sampling(shown(held.image), *picked, there.to_image(column, row), SIDE)
