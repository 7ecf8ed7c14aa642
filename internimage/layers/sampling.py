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
