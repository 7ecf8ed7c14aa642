# SPDX-License-Identifier: MIT
"""The interface of layers that sample at predicted locations, whatever their operator."""

from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class SamplingLayer(Protocol):
    """A deformable layer, such as `DCNv3`."""

    def sampling(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sampling locations and weights for the input x.

        Args:
            x: Input of `forward`, with batch size N.

        Returns:
            Locations (N, Ho, Wo, groups, P, 2) as (x, y) in pixels of the layer's input, where 0 is the center of the
            first one; and weights (N, Ho, Wo, groups, P).
        """

    def input_size(self, x: Tensor) -> tuple[int, int]:
        """Height and width of an input x, which may be channels first or last."""

    def offset_parameters(self) -> list[nn.Parameter]:
        """The parameters that predict the offsets, for which recipes have a separate learning rate."""


@runtime_checkable
class PredictsOffsets(SamplingLayer, Protocol):
    """A sampling layer that has one module for its offsets, whose output can be read and added to."""

    def offset_module(self) -> nn.Module:
        """The module whose output has the predicted offsets, and may have other channels after them."""

    def locations(self, predicted: Tensor) -> Tensor:
        """Sampling locations, from what `offset_module` gives.

        Args:
            predicted: Output of `offset_module`, with batch size N.

        Returns:
            (N, Ho, Wo, groups, P, 2), as of `sampling`.
        """

    def location_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient with respect to `locations`, from that with respect to the output of `offset_module`.

        Args:
            gradient: In the shape of the output.

        Returns:
            (N, Ho, Wo, groups, P, 2), per pixel of the layer's input.
        """

    def kernel_points(self) -> list[tuple[int, int]]:
        """The column and row of each of the P points in the kernel, in the order of `locations`."""
