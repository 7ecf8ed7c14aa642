# SPDX-License-Identifier: MIT
"""What `analysis_pictures.py` measures of the views of an image, and the rows that it makes of many images.

A measure takes a model and an image whose object is known, and returns numbers under the names (quantity, part), where
the part is a layer, a fill, or empty. NaN is a number that is not defined for this image, such as the share of an empty
region. Another measure is another function in `MEASURES`.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from shapes import inside
from torch import Tensor, nn

from internimage.analysis import (
    Pooled,
    effective_dilation,
    effective_points,
    effective_receptive_field,
    saliency_region,
)
from internimage.data.datasets import EvaluationTransform

NODE = Pooled()
PROJECTIONS = 8
BOUND = 0.05  # of the saliency region's error
CELL = 4  # side of its cells, px
FILLS = ("median", "blur", "zero")
RELATIVE = "median, relative bound"  # the bound is BOUND times the error of the wholly masked image
FLAT = 1e-4  # px: dilations that differ by less do not vary; locations are float32, with steps of 4e-6 px at 64 px

RADIUS = ("object's radius, px", "")
DILATION = "dilation of kernels on {}, px"
CORRELATION = "correlation of the radius with the dilation on {}"
AREAS = ("object", "background")

Name = tuple[str, str]
"""A quantity, and the layer or fill that it is of."""

Values = dict[Name, list[float]]
"""The number of each image, in order."""


@dataclass(frozen=True, eq=False)
class Held:
    """An image and where its object is.

    Args:
        image: (3, H, W), preprocessed.
        mask: bool (H, W), the pixels of the object.
        file: Below the folder of the images.
        label: Name of the object's class.
    """

    image: Tensor
    mask: Tensor
    file: str
    label: str


def read_images(folder: Path, split: str, count: int, config: Mapping[str, Any]) -> list[Held]:
    """The first images of a split that `shapes.py` has written, which have one shape each.

    Args:
        folder: Of the splits and annotations.
        split: Its name.
        count: How many.
        config: timm's preprocessing, which must keep the size.
    """
    content = json.loads((folder / "annotations" / f"{split}.json").read_text(encoding="utf-8"))
    labels = {one["id"]: one["name"] for one in content["categories"]}
    shapes = {one["image_id"]: one for one in content["annotations"]}
    transform = EvaluationTransform(dict(config))
    found = []
    for entry in content["images"][:count]:
        shape = shapes[entry["id"]]
        mask = inside(np.array(shape["segmentation"][0]).reshape(-1, 2), entry["width"])
        with Image.open(folder / entry["file_name"]) as image:
            pixels = transform(image.convert("RGB"))
        found.append(Held(pixels, torch.from_numpy(mask), entry["file_name"], labels[shape["category_id"]]))
    return found


# ---- measures of one image


def of_object(model: nn.Module, held: Held, budget: int) -> dict[Name, float]:
    """The object itself: the radius of the circle of its area, and its share of the image's pixels.

    A region or an energy that knows nothing of the object has this share on it.
    """
    area = float(held.mask.sum())
    return {RADIUS: math.sqrt(area / math.pi), ("object's share of the image", ""): area / held.mask.numel()}


def of_receptive_field(model: nn.Module, held: Held, budget: int) -> dict[Name, float]:
    """The share of the receptive field's energy on the object, over the object's share of the image."""
    field = effective_receptive_field(model, held.image, NODE, PROJECTIONS)
    return {("receptive field: energy on the object / its area", ""): field.concentration(held.mask)}


def of_saliency(model: nn.Module, held: Held, budget: int) -> dict[Name, float]:
    """The saliency regions of each fill, and that of the median with a relative bound.

    With a fixed bound a model whose feature hardly changes keeps an empty region, which has no share. The relative
    bound asks the same of every model: to keep all but a twentieth of what masking the image changes.
    """
    found: dict[Name, float] = {}
    masked_error = math.nan
    for part in (*FILLS, RELATIVE):
        relative = part == RELATIVE
        bound = max(BOUND * masked_error, 1e-9) if relative else BOUND  # a bound must be above 0
        start = time.process_time()
        region = saliency_region(model, held.image, NODE, bound, CELL, FILLS[0] if relative else part, budget)
        seconds = time.process_time() - start
        if part == FILLS[0]:
            masked_error = region.masked_error
        found |= {
            ("saliency: share of the region on the object", part): region.share_inside(held.mask),
            ("saliency: share of the object in the region", part): float(region.mask[held.mask].double().mean()),
            ("saliency: region's share of the image", part): region.size,
            ("saliency: share of regions that are empty", part): float(not region.cells.any()),
            ("saliency: share of regions not proven minimal", part): float(not region.minimal),
            ("saliency: error of the wholly masked image", part): region.masked_error,
            ("saliency: evaluations", part): region.evaluations,
            ("saliency: CPU seconds", part): seconds,
        }
    return found


def of_points(model: nn.Module, held: Held, budget: int) -> dict[Name, float]:
    """The share of the effective points' strength on the object, over the share of points there, of each layer."""
    height, width = held.mask.shape
    points = effective_points(model, held.image, NODE, PROJECTIONS)
    return {
        ("effective points: strength on the object / share of points", layer.layer): layer.concentration(
            held.mask, height, width
        )
        for layer in points.layers
    }


def of_dilation(model: nn.Module, held: Held, budget: int) -> dict[Name, float]:
    """Mean and deviation of the effective dilation over kernels centered on the object, and on the background."""
    height, width = held.mask.shape
    found: dict[Name, float] = {}
    for layer in effective_dilation(model, held.image):
        for area, mask in zip(AREAS, (held.mask, ~held.mask)):
            mean, deviation = layer.inside(mask, height, width)
            found[DILATION.format(area), layer.layer] = mean
            found[f"deviation of the {DILATION.format(area)}", layer.layer] = deviation
    return found


Measure = Callable[[nn.Module, Held, int], dict[Name, float]]
MEASURES: tuple[Measure, ...] = (of_object, of_receptive_field, of_saliency, of_points, of_dilation)


def measure(
    model: nn.Module,
    images: Sequence[Held],
    budget: int,
    measures: Sequence[Measure] = MEASURES,
    done: Callable[[], object] = lambda: None,
) -> Values:
    """All measures of all images.

    Args:
        model: Left as it is.
        images: At least one.
        budget: Evaluations that the search for a saliency region may make.
        measures: Which.
        done: Called after each image.
    """
    values: Values = {}
    for number, held in enumerate(images):
        for each in measures:
            for name, value in each(model, held, budget).items():
                # a layer that one image has no number for: NaN there
                values.setdefault(name, [math.nan] * number).append(value)
        for known in values.values():
            known += [math.nan] * (number + 1 - len(known))
        done()
    return values


# ---- rows of many images


def correlation(first: Sequence[float], second: Sequence[float]) -> tuple[float, int]:
    """Pearson's correlation over the images where both numbers are defined, and how many these are.

    NaN with fewer than three, or if one of the two does not vary.
    """
    pairs = np.array([first, second], dtype=float)
    pairs = pairs[:, np.isfinite(pairs).all(0)]
    count = pairs.shape[1]
    if count < 3 or np.ptp(pairs, axis=1).min() < FLAT:
        return math.nan, count
    return float(np.corrcoef(pairs)[0, 1]), count


def _round(value: float) -> float:
    """To six significant digits."""
    return float(f"{value:.6g}")


def summary(values: Values) -> Iterator[dict[str, object]]:
    """Rows with mean, population standard deviation, least and largest of the images where a quantity is defined.

    Yields:
        quantity, of, mean, std, min, max, images: how many were counted. Where none was, the four are NaN. Of a
        correlation, which is one number of all images, std, min and max are empty.
    """
    for (quantity, part), numbers in values.items():
        defined = np.array([number for number in numbers if math.isfinite(number)])
        four = (defined.mean(), defined.std(), defined.min(), defined.max()) if defined.size else [math.nan] * 4
        yield {
            "quantity": quantity, "of": part, **dict(zip(("mean", "std", "min", "max"), map(_round, four))),
            "images": len(defined),
        }  # fmt: skip
    for area in AREAS:
        for (quantity, part), numbers in values.items():
            if quantity == DILATION.format(area):
                value, count = correlation(values[RADIUS], numbers)
                yield {
                    "quantity": CORRELATION.format(area), "of": part, "mean": _round(value), "std": "", "min": "",
                    "max": "", "images": count,
                }  # fmt: skip


# ---- files


def to_json(values: Values) -> list[dict[str, Any]]:
    """Numbers as JSON has them: null where one is not defined."""
    return [
        {"quantity": quantity, "of": part, "values": [value if math.isfinite(value) else None for value in numbers]}
        for (quantity, part), numbers in values.items()
    ]


def from_json(document: list[dict[str, Any]]) -> Values:
    """What `to_json` was given."""
    return {
        (one["quantity"], one["of"]): [math.nan if value is None else value for value in one["values"]]
        for one in document
    }
