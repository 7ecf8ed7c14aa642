# SPDX-License-Identifier: MIT
"""Sampling locations alone, as in "Deformable Convolutional Networks", ICCV 2017: through several layers, and as a
dilation of the kernel.

They say where a layer may look, not what it makes of what is there: see `effective_points`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .areas import Area, as_mask, covering
from .inspection import inspected
from .maps import NodeError, whole_number
from .nodes import Node
from .recording import SampledLayer, recorded

__all__ = ["ComposedPoints", "LayerDilation", "composed_points", "effective_dilation"]


@dataclass(frozen=True, eq=False)
class ComposedPoints:
    """What `composed_points` returns.

    Attributes:
        locations: (M, 2), float64. Where the lowest layer samples, as (x, y) in pixels of the preprocessed image.
        paths: (M,), int64. How many ways lead there through the layers, their groups and points.
        lost: Ways through a point outside the map of a layer in between, which reads zeros there.
        layers: Names of the layers, from the lowest to the one at the node.
        node: What the node is, in words.
    """

    locations: Tensor
    paths: Tensor
    lost: int
    layers: tuple[str, ...]
    node: str


def composed_points(
    model: nn.Module, image: Tensor, node: Node, layers: int = 3, plain: bool = False
) -> ComposedPoints:
    """The locations that a position samples through the last deformable layers before it, composed.

    The layer at the node samples its input at P points for each group; each of these, rounded to the nearest output
    pixel of the layer below, samples again, and so on: 9^3 = 729 ways through three layers of a 3x3 kernel and one
    group. What lies between the layers, such as 3x3 convolutions, is not counted.

    Args:
        model: With deformable layers; left as it is.
        image: (C, H, W) or (1, C, H, W), preprocessed.
        node: A `Position`.
        layers: How many.
        plain: Also through plain 3x3 convolutions.

    Returns:
        The locations that the lowest layer samples, and the number of ways to each.

    Raises:
        UserError: The model has no deformable layers.
        NodeError: The node is no position or not there, or fewer layers come before it.
        NotFiniteView: There is NaN or infinity in the weights or in the image.
    """
    layers = whole_number("layers", layers, 1)
    opened = node.open(model)
    with inspected(model, image) as batch, torch.no_grad(), recorded(model, batch, plain) as found:
        opened.values(batch)
    center = opened.center()
    if center is None:
        raise NodeError(f"composed points start at a position of a map, and '{opened.text()}' is none")
    if layers > len(found):
        raise NodeError(f"layers must be at most {len(found)}, which come before {opened.text()}, got {layers}")
    chosen = found[-layers:]
    locations, paths = torch.tensor([center], dtype=torch.float64), torch.ones(1, dtype=torch.int64)
    lost = 0
    for layer in reversed(chosen):
        ways = _ways(layer, locations, paths)
        pixels = ways.nonzero(as_tuple=True)
        sampled = layer.locations.cpu().double()[pixels]  # (pixels, groups, P, 2)
        each = sampled.shape[1] * sampled.shape[2]
        lost = (lost + int(paths.sum() - ways.sum())) * each
        locations, paths = sampled.flatten(0, 2), ways[pixels].repeat_interleave(each)
    return ComposedPoints(locations, paths, lost, tuple(layer.name for layer in chosen), opened.text())


def _ways(layer: SampledLayer, locations: Tensor, paths: Tensor) -> Tensor:
    """How many ways lead to each output pixel of a layer, (Ho, Wo), from locations (M, 2) in image pixels."""
    height, width = layer.locations.shape[:2]
    stride = torch.tensor(layer.output_stride, dtype=torch.float64)
    row, column, inside = covering((locations + 0.5) / stride - 0.5, height, width)
    index = (row * width + column)[inside]
    ways = torch.zeros(height * width, dtype=torch.int64).index_add_(0, index, paths[inside])
    return ways.view(height, width)


@dataclass(frozen=True, eq=False)
class LayerDilation:
    """What `effective_dilation` returns of one layer.

    Attributes:
        layer: Name of the layer.
        dilation: (Ho, Wo, groups), float64. Mean distance of neighboring points of the kernel, in pixels of the
            layer's input.
        centers: (Ho, Wo, 2), float64. The center of each output pixel, as (x, y) in pixels of the preprocessed
            image.
    """

    layer: str
    dilation: Tensor
    centers: Tensor

    def inside(self, area: Area, height: int, width: int) -> tuple[float, float]:
        """Mean and standard deviation over the kernels whose output pixel has its center in an area, and all groups.

        Args:
            area: A mask (H, W), or a box (left, top, right, bottom) of the pixels' edges.
            height: Of the image, in pixels.
            width: Of the image, in pixels.

        Returns:
            NaN if the area has no such center.

        Raises:
            NodeError: The area has another size, or no pixels of the image.
        """
        mask = as_mask(area, height, width)
        row, column, _ = covering(self.centers, height, width)
        chosen = self.dilation[mask[row, column]]
        if not chosen.numel():
            return float("nan"), float("nan")
        return float(chosen.mean()), float(chosen.std(correction=0))


def effective_dilation(model: nn.Module, image: Tensor, plain: bool = False) -> tuple[LayerDilation, ...]:
    """The mean distance between all pairs of neighboring sampling locations of a kernel, at each output pixel.

    Neighbors are those of the kernel's grid, side by side or one above the other: 12 pairs of a 3x3 kernel, 8 without
    its center. A regular kernel has its dilation. Distances are in pixels of the layer's input.

    Args:
        model: With deformable layers; left as it is.
        image: (C, H, W) or (1, C, H, W), preprocessed.
        plain: Also of plain 3x3 convolutions.

    Returns:
        The layers that sample in a forward pass, in order.

    Raises:
        UserError: The model has no deformable layers.
        NotFiniteView: There is NaN or infinity in the weights or in the image.
    """
    with inspected(model, image) as batch, torch.no_grad(), recorded(model, batch, plain) as found:
        model(batch)
    return tuple(_dilation(layer) for layer in found if _pairs(layer))


def _pairs(layer: SampledLayer) -> list[tuple[int, int]]:
    """The pairs of neighbors among a kernel's points."""
    points = layer.kernel_points
    return [
        (i, k)
        for i, (x, y) in enumerate(points)
        for k, (other_x, other_y) in enumerate(points[:i])
        if abs(x - other_x) + abs(y - other_y) == 1
    ]


def _dilation(layer: SampledLayer) -> LayerDilation:
    locations = layer.locations.cpu().double() / torch.tensor(layer.input_stride, dtype=torch.float64)
    first, second = torch.tensor(_pairs(layer)).unbind(1)
    distances = (locations[..., first, :] - locations[..., second, :]).norm(dim=-1)
    height, width = locations.shape[:2]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    stride = torch.tensor(layer.output_stride, dtype=torch.float64)
    centers = (torch.stack([columns, rows], dim=-1).double() + 0.5) * stride - 0.5
    return LayerDilation(layer.name, distances.mean(-1), centers)
