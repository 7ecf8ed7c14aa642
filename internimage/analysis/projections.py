# SPDX-License-Identifier: MIT
"""Random projections of a node's vector, by which its Jacobian is measured in a few backward passes.

The node of a normed map has no useful single number: the gradient of the sum of its channels is zero behind a layer
norm, and so is that of its length. The squared length of the Jacobian's columns is well defined. For random signs v,
the mean of `(J^T v)^2` is `sum_c J_c^2`, since the signs of different channels have mean zero.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .maps import whole_number


def check_projections(projections: int | None) -> None:
    """Raise NodeError unless it is None, for all channels, or a positive whole number."""
    if projections is not None:
        whole_number("projections", projections, 1, ", or None for all channels")


def directions(channels: int, projections: int | None, seed: int) -> tuple[Tensor, float]:
    """Vectors to multiply a Jacobian with from the left, and the factor on the sum of the squares.

    All channels, one by one, if that takes no more passes: then the sum is exact.

    Args:
        channels: Length D of the node's vector.
        projections: Random ones; None for all channels.
        seed: Of the random signs.

    Returns:
        (R, D) of float32 on the CPU, and the factor.
    """
    if projections is None or projections >= channels:
        return torch.eye(channels), 1.0
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (projections, channels), generator=generator) * 2 - 1
    return signs.float(), 1.0 / projections


def gradients(values: Tensor, inputs: list[Tensor], rows: Tensor) -> Iterator[list[Tensor | None]]:
    """For each direction (D,) of rows (R, D), the gradients of its product with the values (1, D); None for none."""
    for i, row in enumerate(rows):
        if not values.requires_grad:
            yield [None] * len(inputs)
            continue
        output = row.to(values.device, values.dtype)[None]
        yield list(torch.autograd.grad(values, inputs, output, retain_graph=i < len(rows) - 1, allow_unused=True))
