# SPDX-License-Identifier: MIT
"""What a layer that samples at predicted locations tells about itself, whichever its operator."""

from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class SamplingLayer(Protocol):
    """A deformable layer; `DCNv3` is one."""

    def sampling(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where the layer samples its input x, and with which weights.

        Args:
            x: What `forward` takes, of a batch of N.

        Returns:
            Locations (N, Ho, Wo, groups, P, 2) as (x, y) in pixels of the layer's input, where 0 is the center of the
            first one; and weights (N, Ho, Wo, groups, P).
        """

    def input_size(self, x: Tensor) -> tuple[int, int]:
        """Height and width of an input, in the layer's own memory format."""

    def offset_parameters(self) -> list[nn.Parameter]:
        """The parameters that offsets are predicted with, which recipes give a learning rate of their own."""
