# SPDX-License-Identifier: MIT
"""Deformable convolution v1 and v2 as columns times weight, and its derivatives.

    output = bias + sum over points p and input channels c of weight[:, c, p] * columns[p, c]

The columns are `deform_columns`, which has kernels; the product is torch's. The columns take kernel points times the
memory of the input, so they are computed for a few images at a time, and again in the backward pass.

The functions take the tensors and arguments of the schema of `deform_conv`, already checked; see
`registration.Reference` for the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import deform_columns_reference as columns_reference
from .deform_columns import apply_deform_columns
from .onednn import multiplied_in
from .sampling import accumulate_dtype, output_size

_CHUNK_BYTES = 4 << 20  # of columns: they stay in the cache for the product, and fresh memory costs more than it


def memory_format(t: Tensor) -> torch.memory_format:
    """Channels last if a tensor of (N, C, H, W) is stored so, else contiguous."""
    is_last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format


def like(t: Tensor, other: Tensor) -> Tensor:
    """t in the dtype and the memory format of another tensor."""
    return t.to(other.dtype).contiguous(memory_format=memory_format(other))


def _last(t: Tensor) -> Tensor:
    return t.permute(0, 2, 3, 1)


def _first(t: Tensor) -> Tensor:
    return t.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class _Shape:
    """The arguments of one call, and the layouts of its products: one for each group of the convolution."""

    kernel_size: tuple[int, int]
    out_channels: int
    window: Sequence[Sequence[int]]  # stride, padding, dilation
    groups: int
    offset_groups: int

    @classmethod
    def of(cls, weight: Tensor, arguments: Sequence[Any]) -> "_Shape":
        *window, groups, offset_groups = arguments
        out_channels, _, height, width = weight.shape
        return cls((height, width), out_channels, window, groups, offset_groups)

    @property
    def columns_arguments(self) -> tuple[Any, ...]:
        return (self.kernel_size, *self.window, self.offset_groups)

    def matrices(self, weight: Tensor) -> Tensor:
        """(groups, out / groups, P * in / groups); no copy if the weight is channels last."""
        return _last(weight).reshape(self.groups, self.out_channels // self.groups, -1)

    def weight(self, matrices: Tensor) -> Tensor:
        """The inverse of `matrices`."""
        height, width = self.kernel_size
        return _first(matrices.reshape(self.out_channels, height, width, -1))

    def split_columns(self, columns: Tensor) -> Tensor:
        """(N, Ho, Wo, P * C) -> (groups, pixels, P * in / groups)."""
        if self.groups == 1:
            return columns.flatten(0, 2).unsqueeze(0)
        height, width = self.kernel_size
        rows = columns.reshape(-1, height * width, self.groups, columns.shape[3] // (height * width * self.groups))
        return rows.permute(2, 0, 1, 3).flatten(2)

    def join_columns(self, rows: Tensor, size: Sequence[int]) -> Tensor:
        """The inverse of `split_columns`, for an output of `size` (N, Ho, Wo)."""
        height, width = self.kernel_size
        joined = rows.unflatten(2, (height * width, -1)).permute(1, 2, 0, 3)
        return joined.reshape(*size, rows.shape[0] * rows.shape[2])

    def split_output(self, output: Tensor) -> Tensor:
        """(N, out, Ho, Wo) -> (groups, pixels, out / groups)."""
        rows = _last(output).reshape(-1, self.groups, self.out_channels // self.groups)
        return rows.transpose(0, 1)

    def product(self, columns: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Columns times weight: -> (N, out, Ho, Wo), stored channels last."""
        rows, matrices = self.split_columns(columns), self.matrices(weight)
        if self.groups == 1:
            product = F.linear(rows[0], matrices[0], bias)
        else:
            product = torch.baddbmm(bias.view(self.groups, 1, -1), rows, matrices.transpose(1, 2))
            product = product.transpose(0, 1).flatten(1)
        return _first(product.view(*columns.shape[:3], self.out_channels))


def _chunks(shape: _Shape, input: Tensor) -> list[slice]:
    """The batch in parts, whose columns have at most `_CHUNK_BYTES` if they are of more than one image."""
    images, channels, *size = input.shape
    if images < 2:
        return [slice(None)]
    height, width = output_size(size, shape.kernel_size, *shape.window)
    points = shape.kernel_size[0] * shape.kernel_size[1]
    step = max(1, _CHUNK_BYTES // max(1, height * width * points * channels * input.element_size()))
    return [slice(begin, begin + step) for begin in range(0, images, step)]


def _computed_in(t: Tensor) -> torch.dtype:
    """The dtype in which a call is computed: float32 for a half type that the processor has no products of."""
    return multiplied_in(t.dtype) if t.device.type == "cpu" else t.dtype


def forward(input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, *arguments: Any) -> Tensor:
    """The output."""
    shape = _Shape.of(weight, arguments)
    given, dtype = input, _computed_in(input)
    input, offset, mask, weight, bias = (t.to(dtype) for t in (input, offset, mask, weight, bias))
    outputs = [
        _forward_part(shape, input[chunk], offset[chunk], mask[chunk], weight, bias) for chunk in _chunks(shape, input)
    ]
    return like(outputs[0] if len(outputs) == 1 else torch.cat(outputs), given)


def forward_at_once(
    input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, *arguments: Any
) -> Tensor:
    """The output, with the columns of all images at once: for exported programs, whose batch has no number."""
    return like(_forward_part(_Shape.of(weight, arguments), input, offset, mask, weight, bias), input)


def _forward_part(shape: _Shape, input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    columns = apply_deform_columns(_last(input), _last(offset), _last(mask), *shape.columns_arguments)
    return shape.product(columns, weight, bias)


def backward(
    grad_output: Tensor, input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """Gradients of the output with respect to the five tensors.

    The last two arguments are `deterministic` and `output_mask`.
    """
    *others, deterministic, output_mask = arguments
    shape = _Shape.of(weight, others)
    given, dtype = (input, offset, mask, weight, bias), _computed_in(input)
    grad_output, input, offset, mask, weight, bias = (t.to(dtype) for t in (grad_output, *given))
    chunks = [
        (_last(input[chunk]), _last(offset[chunk]), _last(mask[chunk]), grad_output[chunk])
        for chunk in _chunks(shape, input)
    ]
    of_points: list[tuple[Tensor, ...]] = []
    if any(output_mask[:3]):
        matrices = shape.matrices(weight)
        for *tensors, grad in chunks:
            size = tensors[0].shape[0], *grad.shape[2:]
            grad_columns = shape.join_columns(torch.bmm(shape.split_output(grad), matrices), size)
            of_points.append(
                apply_deform_columns.backward(
                    grad_columns, *tensors, *shape.columns_arguments, deterministic, list(output_mask[:3])
                )
            )
        del matrices, grad_columns  # before the next copy of the weight's size is made
    of_weight: Tensor | None = None
    for *tensors, grad in chunks if output_mask[3] else ():
        columns = shape.split_columns(apply_deform_columns(*tensors, *shape.columns_arguments))
        product = torch.bmm(shape.split_output(grad).transpose(1, 2), columns).to(accumulate_dtype(dtype))
        of_weight = product if of_weight is None else of_weight.add_(product)
        del columns, product
    grads = []
    for i, wanted in enumerate(output_mask[:3]):
        parts = [part[i] for part in of_points] if wanted else []
        grads.append(_first(parts[0] if len(parts) == 1 else torch.cat(parts)) if wanted else input.new_empty(0))
    grads.append(input.new_empty(0) if of_weight is None else shape.weight(of_weight))
    grads.append(grad_output.sum((0, 2, 3)) if output_mask[4] else input.new_empty(0))
    return tuple(like(g, t) if wanted else g.to(t.dtype) for g, t, wanted in zip(grads, given, output_mask))


def double_backward(
    grad_grad_input: Tensor,
    grad_grad_offset: Tensor,
    grad_grad_mask: Tensor,
    grad_grad_weight: Tensor,
    grad_grad_bias: Tensor,
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """Gradients of `backward` with respect to grad_output and the five tensors.

    With the columns C, their derivative T in the direction of the first three arguments, and grad_grad_weight W'::

        L = <grad_output, T weight + C W' + grad_grad_bias>

    of which these are the gradients. The last argument is `deterministic`.
    """
    *others, deterministic = arguments
    shape = _Shape.of(weight, others)
    tensors = _last(input), _last(offset), _last(mask)
    directions = _last(grad_grad_input), _last(grad_grad_offset), _last(grad_grad_mask)
    rows, size = shape.split_output(grad_output), (input.shape[0], *grad_output.shape[2:])
    grad_columns = shape.join_columns(torch.bmm(rows, shape.matrices(weight)), size)
    tangent, *of_tangent = columns_reference.double_backward(
        *directions, grad_columns, *tensors, *shape.columns_arguments, deterministic
    )
    columns = apply_deform_columns(*tensors, *shape.columns_arguments)
    of_output = shape.product(tangent, weight, grad_grad_bias)
    of_output = of_output + shape.product(columns, grad_grad_weight, torch.zeros_like(bias))
    of_columns = apply_deform_columns.backward(
        shape.join_columns(torch.bmm(rows, shape.matrices(grad_grad_weight)), size),
        *tensors,
        *shape.columns_arguments,
        deterministic,
        [True] * 3,
    )
    of_weight = shape.weight(torch.bmm(rows.transpose(1, 2), shape.split_columns(tangent)))
    of_points = (_first(a + b) for a, b in zip(of_tangent, of_columns))
    return of_output, *of_points, of_weight, torch.zeros_like(bias)


def jvp(tangents: Sequence[Tensor], tensors: Sequence[Tensor], *arguments: Any) -> Tensor:
    """Derivative of the output in the direction of `tangents`, for forward mode."""
    *points, weight, bias = tensors
    *directions, weight_dir, bias_dir = tangents
    shape = _Shape.of(weight, arguments)
    points, directions = [_last(t) for t in points], [_last(t) for t in directions]
    tangent = columns_reference.jvp(directions, points, *shape.columns_arguments)
    columns = apply_deform_columns(*points, *shape.columns_arguments)
    return shape.product(tangent, weight, bias_dir) + shape.product(columns, weight_dir, torch.zeros_like(bias))
