# SPDX-License-Identifier: MIT
"""Effective sampling locations: where the deformable layers before a node sample, and how much each location matters.

"Deformable ConvNets v2: More Deformable, Better Results", CVPR 2019, section 2.1: the gradient of the node with respect
to the sampling locations. Neither the locations alone nor the layer's weights say how much one contributes.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from .areas import Area, as_mask, covering, ratio
from .inspection import check_finite, inspected
from .maps import NodeError
from .nodes import Node
from .projections import check_projections, directions, gradients
from .recording import recorded

__all__ = ["EffectivePoints", "LayerPoints", "effective_points"]


@dataclass(frozen=True, eq=False)
class LayerPoints:
    """The points of one layer. Ho and Wo are the sides of its output, P the points of its kernel.

    Attributes:
        layer: Name of the layer.
        locations: (Ho, Wo, groups, P, 2), float64, as (x, y) in pixels of the preprocessed image, where 0 is the
            center of the first one. Points may lie outside, where a layer reads zeros.
        strength: (Ho, Wo, groups, P), float64. The length of the node's gradient with respect to the location, in
            units of the node per image pixel; for a vector, the Frobenius norm of its Jacobian.
        deformable: False for a plain convolution.
    """

    layer: str
    locations: Tensor
    strength: Tensor
    deformable: bool

    def concentration(self, area: Area, height: int, width: int) -> float:
        """The share of the strength at points inside an area, over the share of points inside.

        Args:
            area: A mask (H, W), or a box (left, top, right, bottom) of the pixels' edges.
            height: Of the image, in pixels.
            width: Of the image, in pixels.

        Returns:
            From 0; 1 if points inside are as strong as all. NaN if there are no points inside, or none has strength.

        Raises:
            NodeError: The area has another size, or no pixels of the image.
        """
        mask = as_mask(area, height, width)
        row, column, there = covering(self.locations, height, width)
        inside = there & mask[row, column]
        share = ratio(float(self.strength[inside].sum()), float(self.strength.sum()))
        return ratio(share, float(inside.double().mean()))


@dataclass(frozen=True, eq=False)
class EffectivePoints:
    """What `effective_points` returns.

    Attributes:
        layers: The layers before the node, in the order in which they sample.
        node: What the node is, in words.
        projections: How many random ones the strengths were estimated by; None if they are exact.
    """

    layers: tuple[LayerPoints, ...]
    node: str
    projections: int | None


def effective_points(
    model: nn.Module,
    image: Tensor,
    node: Node,
    projections: int | None = 1,
    seed: int = 0,
    plain: bool = False,
) -> EffectivePoints:
    """Where the deformable layers before a node sample the image, and how much the node depends on each location.

    Zeros that require a gradient are added to the offsets of every layer: one backward pass gives the derivatives for
    all locations of all layers. A node that is a vector is projected on random signs, as in
    `effective_receptive_field`; each projection takes one backward pass more. At the center of a pixel, where the
    locations of a new layer are, the interpolation has a kink: the derivative is that to the right and downwards, and
    none where the border of zeros begins.

    Strength is large where the map changes: edges have it in a model without training too, which is the comparison.

    Args:
        model: With DCNv3, DeformConv2d or ModulatedDeformConv2d; left as it is.
        image: (C, H, W) or (1, C, H, W), preprocessed.
        node: `Position`, `Logit` or `Pooled`.
        projections: Of a vector; None for the exact result, with a backward pass for each channel. A picture needs 8.
        seed: Of the random signs.
        plain: Also the plain 3x3 convolutions of the model, as deformable ones with zero offsets, so that a plain model
            can be compared with a deformable one.

    Returns:
        Locations and strengths of each layer. The same arguments give the same result.

    Raises:
        UserError: The model has no deformable layers.
        NodeError: The model has no such node, no deformable layer comes before it, or an argument is out of range.
        NotFiniteView: There is NaN or infinity in the weights, the image or the gradient.
    """
    check_projections(projections)
    opened = node.open(model)
    with inspected(model, image) as batch, recorded(model, batch, plain) as found:
        values = opened.values(batch)
        check_finite(values, f"the node '{opened.text()}'", batch.dtype)
        rows, factor = directions(values.shape[1], projections, seed)
        inputs = [layer.zeros for layer in found if layer.zeros is not None]
        squares: list[Tensor | None] = [None] * len(found)
        for each in gradients(values, inputs, rows):
            for i, gradient in enumerate(each):
                if gradient is None:
                    continue  # computed before the node, or beside it, but the node does not depend on it
                check_finite(gradient, f"the gradient of the node '{opened.text()}'", batch.dtype)
                square = found[i].location_gradient(gradient).cpu().double().square().sum(-1)
                kept = squares[i]
                squares[i] = square if kept is None else kept + square
    layers = tuple(
        LayerPoints(layer.name, layer.locations.cpu().double(), (square * factor).sqrt(), layer.deformable)
        for layer, square in zip(found, squares)
        if square is not None
    )
    if not layers:
        raise NodeError(f"no deformable layer comes before the node '{opened.text()}'")
    return EffectivePoints(layers, opened.text(), None if len(rows) == values.shape[1] else projections)
