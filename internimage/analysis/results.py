# SPDX-License-Identifier: MIT
"""What is kept of a study: its numbers and its arrays."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from .effective_points import EffectivePoints, LayerPoints
from .study import NodeViews, Study


def of_each_resolution(points: EffectivePoints) -> list[LayerPoints]:
    """The last layer before the node at each resolution: one picture for each shows how the points spread."""
    last = {layer.strength.shape[:2]: layer for layer in points.layers}
    return [layer for layer in points.layers if last[layer.strength.shape[:2]] is layer]


def points_with_half(layer: LayerPoints) -> int:
    """How many of the strongest points of a layer have half of its strength together; 0 if it has none."""
    ordered = layer.strength.flatten().sort(descending=True).values.cumsum(0)
    if not len(ordered) or not ordered[-1] > 0:
        return 0
    return int(torch.searchsorted(ordered, 0.5 * ordered[-1])) + 1


def numbers(found: Study) -> dict[str, Any]:
    """The numbers of a study, ready for JSON. Lengths are in pixels of the preprocessed image."""
    return {
        "model": found.model,
        "height": found.pixels.shape[1],
        "width": found.pixels.shape[2],
        "nodes": [_node_numbers(node) for node in found.nodes],
    }


def _node_numbers(node: NodeViews) -> dict[str, Any]:
    result: dict[str, Any] = {"node": node.node, "x": None, "y": None}
    if node.center is not None:
        result["x"], result["y"] = node.center
    if node.field is not None:
        result["erf"] = {
            "largest_sensitivity": float(node.field.sensitivity.max()),
            "square_50": _finite(node.field.square_side(0.5)),
            "square_99": _finite(node.field.square_side(0.99)),
            "projections": node.field.projections,
        }
    if node.points is not None:
        result["points"] = [
            {
                "layer": layer.layer,
                "deformable": layer.deformable,
                "points": layer.strength.numel(),
                "points_with_half_of_the_strength": points_with_half(layer),
                "largest_strength": float(layer.strength.max()),
            }
            for layer in node.points.layers
        ]
    if node.region is not None:
        region = node.region
        result["saliency"] = {
            "size": region.size,
            "cells": int(region.cells.sum()),
            "all_cells": region.cells.numel(),
            "cell": region.cell,
            "error": region.error,
            "bound": region.bound,
            "masked_error": _finite(region.masked_error),
            "fill": region.fill,
            "minimal": region.minimal,
            "evaluations": region.evaluations,
            "text": region.text,
        }
    return result


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def arrays(studies: Sequence[Study]) -> dict[str, Any]:
    """The arrays of studies, as they are stored in `views.npz`: model and node are counted from 1."""
    result: dict[str, Any] = {}
    for i, found in enumerate(studies, 1):
        model = f"model{i}"
        result[f"{model}/name"] = found.model
        result[f"{model}/image"] = found.pixels.permute(1, 2, 0).numpy()
        for sampling in found.sampling:
            result[f"{model}/sampling/{sampling.layer}/locations"] = sampling.locations.numpy()
            result[f"{model}/sampling/{sampling.layer}/weights"] = sampling.weights.numpy()
        for j, node in enumerate(found.nodes, 1):
            prefix = f"{model}/node{j}"
            result[f"{prefix}/name"] = node.node
            if node.field is not None:
                result[f"{prefix}/erf/sensitivity"] = node.field.sensitivity.numpy()
            for layer in node.points.layers if node.points is not None else ():
                # the locations are those of the image, whatever the node
                result[f"{model}/points/{layer.layer}/locations"] = layer.locations.float().numpy()
                result[f"{prefix}/points/{layer.layer}/strength"] = layer.strength.float().numpy()
            if node.region is not None:
                result[f"{prefix}/saliency/cells"] = node.region.cells.numpy()
                result[f"{prefix}/saliency/mask"] = node.region.mask.numpy()
                result[f"{prefix}/saliency/masked"] = node.region.masked.float().numpy()
    return result
