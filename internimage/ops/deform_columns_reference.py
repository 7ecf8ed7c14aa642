# SPDX-License-Identifier: MIT
"""The columns of deformable convolution in plain torch: the specification of `deform_columns`.

The sampling is that of `gather_reference`, whose points are ordered column by column and whose offsets are (x, y).
Those of deformable convolution v1 and v2 are ordered row by row and (y, x), so they are reordered before and after.

The arguments of the four functions are those of the schema, already checked; see `registration.Reference`.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import gather_reference as gather
from .sampling import Geometry


class _Order:
    """The order of the points, in the tensors of one call: reorders each to that of `gather_reference`, and back."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        kernel_size, stride, padding, dilation, offset_groups = arguments
        self.height, self.width = kernel_size
        self.geometry = Geometry(kernel_size, stride, padding, dilation, offset_groups, 1.0, False, False)

    def _swapped(self, t: Tensor, back: bool, lead: int, after: int) -> Tensor:
        """t with the two axes of the kernel swapped, which stand in its last axis."""
        first, second = (self.width, self.height) if back else (self.height, self.width)
        return t.reshape(*t.shape[:3], lead, first, second, after).transpose(4, 5)

    def offset(self, t: Tensor, back: bool = False) -> Tensor:
        return self._swapped(t, back, self.geometry.groups, 2).flip(-1).reshape(t.shape)

    def mask(self, t: Tensor, back: bool = False) -> Tensor:
        return self._swapped(t, back, self.geometry.groups, 1).reshape(t.shape)

    def columns(self, t: Tensor, back: bool = False) -> Tensor:
        return self._swapped(t, back, 1, t.shape[3] // (self.height * self.width)).reshape(t.shape)

    def tensors(self, input: Tensor, offset: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return input, self.offset(offset), self.mask(mask)


def forward(input: Tensor, offset: Tensor, mask: Tensor, *arguments: Any) -> Tensor:
    """The columns."""
    order = _Order(arguments)
    return order.columns(gather.forward(*order.tensors(input, offset, mask), order.geometry, True), back=True)


def backward(
    grad_output: Tensor, input: Tensor, offset: Tensor, mask: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the columns with respect to input, offset and mask.

    The last two arguments are `deterministic` and `output_mask`.
    """
    *others, deterministic, output_mask = arguments
    order = _Order(others)
    tensors = order.columns(grad_output), *order.tensors(input, offset, mask)
    grad_input, grad_offset, grad_mask = gather.backward(*tensors, order.geometry, True, deterministic, output_mask)
    if output_mask[1]:
        grad_offset = order.offset(grad_offset, back=True)
    if output_mask[2]:
        grad_mask = order.mask(grad_mask, back=True)
    return grad_input, grad_offset, grad_mask


def double_backward(
    grad_grad_input: Tensor,
    grad_grad_offset: Tensor,
    grad_grad_mask: Tensor,
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `backward` with respect to grad_output, input, offset and mask.

    The last argument is `deterministic`.
    """
    *others, deterministic = arguments
    order = _Order(others)
    grad_grads = order.tensors(grad_grad_input, grad_grad_offset, grad_grad_mask)
    tensors = order.columns(grad_output), *order.tensors(input, offset, mask)
    of_output, of_input, of_offset, of_mask = gather.double_backward(
        *grad_grads, *tensors, order.geometry, True, deterministic
    )
    return (
        order.columns(of_output, back=True),
        of_input,
        order.offset(of_offset, back=True),
        order.mask(of_mask, back=True),
    )


def jvp(tangents: Sequence[Tensor], tensors: Sequence[Tensor], *arguments: Any) -> Tensor:
    """Derivative of the columns at (input, offset, mask) in the direction of `tangents`, for forward mode."""
    order = _Order(arguments)
    directions, points = order.tensors(*tangents), order.tensors(*tensors)
    return order.columns(gather.jvp(directions, points, order.geometry, True), back=True)
