# SPDX-License-Identifier: MIT
"""DCNv3 in plain torch: the specification that every kernel is tested against.

For output pixel o and group g, with the P sampling locations of `sampling.sampling_coordinates`::

    output[o, g] = sum_p  mask[o, g, p] * bilinear(input[:, g], location[o, g, p])

`gather_reference` has the sampling and its derivatives. The arguments of the four functions are those of
`internimage.ops.dcnv3`, in the schema's order and already checked; see `registration.Reference` for the others.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import gather_reference as gather
from .arguments import check_offset_scale
from .sampling import Geometry


def _geometry(arguments: Sequence[Any]) -> Geometry:
    geometry = Geometry(*arguments)
    check_offset_scale(geometry.offset_scale)  # as the compiled kernels do
    return geometry


def dcnv3(input: Tensor, offset: Tensor, mask: Tensor, *arguments: Any) -> Tensor:
    """DCNv3."""
    return gather.forward(input, offset, mask, _geometry(arguments), False)


def dcnv3_backward(
    grad_output: Tensor, input: Tensor, offset: Tensor, mask: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of DCNv3 with respect to input, offset and mask.

    The last two arguments are `deterministic` and `output_mask`.
    """
    *others, deterministic, output_mask = arguments
    return gather.backward(grad_output, input, offset, mask, _geometry(others), False, deterministic, output_mask)


def dcnv3_double_backward(
    grad_grad_input: Tensor,
    grad_grad_offset: Tensor,
    grad_grad_mask: Tensor,
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `dcnv3_backward` with respect to grad_output, input, offset and mask.

    The last argument is `deterministic`.
    """
    *others, deterministic = arguments
    tensors = grad_grad_input, grad_grad_offset, grad_grad_mask, grad_output, input, offset, mask
    return gather.double_backward(*tensors, _geometry(others), False, deterministic)


def dcnv3_jvp(tangents: Sequence[Tensor], tensors: Sequence[Tensor], *arguments: Any) -> Tensor:
    """Derivative of `dcnv3` at (input, offset, mask) in the direction of `tangents`, for forward mode."""
    return gather.jvp(tangents, tensors, _geometry(arguments), False)
