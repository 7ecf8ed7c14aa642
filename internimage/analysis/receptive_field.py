# SPDX-License-Identifier: MIT
"""The effective receptive field: how much each pixel of an image matters to a node.

"Deformable ConvNets v2: More Deformable, Better Results", CVPR 2019, section 2.1: the gradient of the node's response
with respect to perturbations of each pixel. It says how much single pixels matter, not what regions do.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .areas import Area, as_mask, ratio
from .inspection import check_finite, inspected
from .maps import NodeError
from .nodes import Node
from .projections import check_projections, directions, gradients

__all__ = ["ReceptiveField", "effective_receptive_field"]


@dataclass(frozen=True, eq=False)
class ReceptiveField:
    """What `effective_receptive_field` returns. Pixels are those of the preprocessed image.

    Attributes:
        sensitivity: (H, W), float64. The Frobenius norm over channels and colors of the Jacobian at each pixel, in
            units of the node per unit of the preprocessed image.
        node: What the node is, in words.
        center: The pixel (x, y) that the node is at; for a node of the whole image, the middle of that.
        projections: How many random ones it was estimated by; None if it is exact.
    """

    sensitivity: Tensor
    node: str
    center: tuple[float, float]
    projections: int | None

    @property
    def energy(self) -> Tensor:
        """The square of the sensitivity, (H, W), which adds up over pixels."""
        return self.sensitivity.square()

    def concentration(self, area: Area) -> float:
        """The share of the energy inside an area, over the area's share of the image: 1 if it is spread evenly.

        Args:
            area: A mask (H, W), or a box (left, top, right, bottom) of the pixels' edges.

        Returns:
            From 0. NaN if the sensitivity is zero everywhere.

        Raises:
            NodeError: The area has another size, or no pixels of the image.
        """
        mask = as_mask(area, *self.sensitivity.shape)
        energy = self.energy
        return ratio(float(energy[mask].sum()), float(energy.sum())) / float(mask.double().mean())

    def square_side(self, share: float) -> float:
        """The side, in pixels, of the smallest square around the center that holds a share of the energy.

        Args:
            share: Above 0, at most 1, such as 0.5 and 0.99.

        Returns:
            The square may reach beyond the image. NaN if the sensitivity is zero everywhere.

        Raises:
            NodeError: The share is out of range.
        """
        if not 0 < share <= 1:
            raise NodeError(f"share must be above 0 and at most 1, got {share!r}")
        height, width = self.sensitivity.shape
        x = (torch.arange(width, dtype=torch.float64) - self.center[0]).abs()
        y = (torch.arange(height, dtype=torch.float64) - self.center[1]).abs()
        distance, order = torch.maximum(y[:, None], x).flatten().sort(stable=True)
        held = self.energy.flatten()[order].cumsum(0)
        if not held[-1] > 0:
            return float("nan")
        enough = torch.searchsorted(held, share * held[-1])
        return 2 * float(distance[enough]) + 1


def effective_receptive_field(
    model: nn.Module,
    image: Tensor,
    node: Node,
    projections: int | None = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ReceptiveField:
    """How much each pixel matters to a node: the norm of the node's derivative with respect to the pixel.

    For a vector f of C channels it is `sqrt(sum_c sum_rgb (d f_c / d pixel)^2)`. The square is estimated without bias
    by projections of f on random signs, each of which takes one backward pass; with fewer channels than projections,
    and for a single number, it is exact.

    Args:
        model: Any model; left as it is.
        image: (C, H, W) or (1, C, H, W), preprocessed.
        node: `Position`, `Logit` or `Pooled`.
        projections: Of a vector; None for the exact result, with a backward pass for each channel.
        seed: Of the random signs.
        progress: Called after each backward pass with the number of those that are done, and of all.

    Returns:
        The sensitivity of the node to each pixel. The same arguments give the same result.

    Raises:
        NodeError: The model has no such node, or an argument is out of range.
        NotFiniteView: There is NaN or infinity in the weights, the image or the gradient.
    """
    check_projections(projections)
    opened = node.open(model)
    with inspected(model, image) as batch:
        batch.requires_grad_()
        values = opened.values(batch)
        check_finite(values, f"the node '{opened.text()}'", batch.dtype)
        rows, factor = directions(values.shape[1], projections, seed)
        energy = torch.zeros(batch.shape[2:], dtype=torch.float64)
        for i, (gradient,) in enumerate(gradients(values, [batch], rows)):
            if gradient is not None:
                energy += gradient[0].cpu().double().square().sum(0)
            if progress is not None:
                progress(i + 1, len(rows))
        check_finite(energy, f"the gradient of the node '{opened.text()}'", batch.dtype)
    height, width = energy.shape
    return ReceptiveField(
        sensitivity=(energy * factor).sqrt(),
        node=opened.text(),
        center=opened.center() or ((width - 1) / 2, (height - 1) / 2),
        projections=None if len(rows) == values.shape[1] else projections,
    )
