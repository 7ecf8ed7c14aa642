# SPDX-License-Identifier: MIT
"""DCNv3 in plain torch: the specification that every kernel is tested against.

For output pixel o and group g, with the P sampling locations of `sampling.sampling_coordinates`::

    output[o, g] = sum_p  mask[o, g, p] * bilinear(input[:, g], location[o, g, p])

A location contributes only if it is strictly inside (-1, W) x (-1, H), where pixels outside the image are zero. All
others, including NaN and infinity, contribute nothing and get no gradient. At pixel centers, where bilinear
interpolation has a kink, the derivative is the right-hand one.

Works on any torch device, in float64, float32, bfloat16 and float16; the 16-bit types are computed in float32 and
rounded once. Nothing here calls autograd: `dcnv3_backward`, `dcnv3_double_backward` and `dcnv3_jvp` are written out.

Implementation: bilinear sampling at P points is a weighted sum of 4 * P rows (pixels of one group) of the input, and
torch has an operator for weighted sums of gathered rows: `embedding_bag`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .arguments import check_offset_scale
from .sampling import Geometry, accumulate_dtype, sampling_coordinates


@dataclass(frozen=True)
class _Corner:
    """One of the four pixels around every sampling location; each tensor is (N, Ho, Wo, groups, P)."""

    row: Tensor  # index into `_rows(input)`; the last row, of zeros, if the pixel is outside the image
    inside: Tensor  # whether the location is
    share_x: Tensor  # 1 - |x - pixel x|
    share_y: Tensor
    sign_x: int  # derivative of share_x: -1 for the left corners, 1 for the right ones
    sign_y: int

    @cached_property
    def weight(self) -> Tensor:
        """The bilinear weight, 0 if the location is outside."""
        return torch.where(self.inside, self.share_x * self.share_y, 0)

    # its derivatives; the second ones in x alone and in y alone are 0

    @cached_property
    def weight_x(self) -> Tensor:
        return torch.where(self.inside, self.sign_x * self.share_y, 0)

    @cached_property
    def weight_y(self) -> Tensor:
        return torch.where(self.inside, self.sign_y * self.share_x, 0)

    @cached_property
    def weight_xy(self) -> Tensor:
        return self.inside.to(self.share_x.dtype) * (self.sign_x * self.sign_y)


def _rows(input: Tensor, groups: int) -> Tensor:
    """(N * H * W * groups + 1, C / groups): a row for each pixel and group, then a row of zeros for pixels outside.

    A zero weight would not do for these: times an infinity in the image it is NaN.
    """
    rows = rearrange(input, "n h w (g c) -> (n h w g) c", g=groups)
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


def _corners(coordinates: tuple[Tensor, Tensor], input_size: Sequence[int]) -> tuple[Tensor, list[_Corner]]:
    """Which locations are inside, and the four corners of each; x and y are (N, Ho, Wo, groups, P)."""
    x, y = coordinates
    n, _, _, groups, _ = x.shape
    height, width = input_size
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)  # False for NaN
    x, y = torch.where(inside, x, 0), torch.where(inside, y, 0)  # finite, so that conversion to integers is defined
    x_floor, y_floor = x.floor(), y.floor()
    right, below = x - x_floor, y - y_floor  # shares of the right and of the lower pixels
    left, above = 1 - right, 1 - below
    image = torch.arange(n, device=x.device).view(n, 1, 1, 1, 1) * (height * width * groups)
    group = torch.arange(groups, device=x.device).view(groups, 1)
    upper_left = (y_floor.long() * width + x_floor.long()) * groups + (image + group)
    zero_row = n * height * width * groups
    in_column = (inside & (x_floor >= 0), inside & (x_floor < width - 1))  # for the left and the right corners
    in_row = (y_floor >= 0, y_floor < height - 1)
    corners = []
    for step_y, share_y, sign_y in ((0, above, -1), (1, below, 1)):
        for step_x, share_x, sign_x in ((0, left, -1), (1, right, 1)):
            valid = in_column[step_x] & in_row[step_y]
            row = upper_left + (step_y * width + step_x) * groups
            corners.append(_Corner(torch.where(valid, row, zero_row), inside, share_x, share_y, sign_x, sign_y))
    return inside, corners


def _weighted_rows(rows: Tensor, corners: list[_Corner], weights: list[Tensor]) -> Tensor:
    """Sum of weight * row over corners and points: -> (N, Ho, Wo, C)."""
    n, ho, wo, groups, _ = corners[0].row.shape
    if n * ho * wo == 0:
        return rows.new_zeros(n, ho, wo, groups * rows.shape[1])
    row = torch.stack([corner.row for corner in corners], dim=-1).flatten(-2)
    weight = torch.stack(weights, dim=-1).flatten(-2)
    bags = F.embedding_bag(row.flatten(0, 3), rows, per_sample_weights=weight.flatten(0, 3), mode="sum")
    return rearrange(bags, "(n h w g) c -> n h w (g c)", n=n, h=ho, w=wo)


def _dots(grad: Tensor, rows: Tensor, corner: _Corner) -> Tensor:
    """Dot product of grad and row over the channels of a group: (N, Ho, Wo, C) -> (N, Ho, Wo, groups, P)."""
    shape = corner.row.shape
    gathered = rows[corner.row.reshape(-1)].view(-1, shape[-1], rows.shape[1])  # (N * Ho * Wo * groups, P, C / groups)
    return torch.bmm(gathered, grad.reshape(-1, rows.shape[1], 1)).view(shape)


def _scatter(grad: Tensor, rows: Tensor, corner: _Corner, weight: Tensor, total: Tensor, deterministic: bool) -> Tensor:
    """Add weight * grad to the sampled rows: the transpose of `_weighted_rows`, for one corner."""
    row = corner.row.reshape(-1)
    values = weight.reshape(-1, weight.shape[-1], 1) * grad.reshape(-1, 1, rows.shape[1])
    values = values.reshape(-1, rows.shape[1])
    if deterministic:  # sorts on CUDA, where the order of index_add is not determined
        return total.index_put((row,), values, accumulate=True)
    return total.index_add(0, row, values)


def _modulation(mask: Tensor, inside: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The factor of every location, and the same with 0 if the location is outside; both (N, Ho, Wo, groups, P)."""
    factor = mask.to(accumulate_dtype(mask.dtype)).reshape(inside.shape)
    if geometry.softmax:
        factor = factor.softmax(-1)
    return factor, torch.where(inside, factor, 0)


def _softmax_grad(grad: Tensor, factor: Tensor) -> Tensor:
    """Gradient of the logits from the gradient of their softmax, over the last axis."""
    return factor * (grad - (factor * grad).sum(-1, keepdim=True))


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """Their sum, term by term."""
    total = sum(terms)
    assert isinstance(total, Tensor)  # there are terms: the corners
    return total


def _geometry(arguments: Sequence[Any]) -> Geometry:
    geometry = Geometry(*arguments)
    check_offset_scale(geometry.offset_scale)  # as the compiled kernels do
    return geometry


def dcnv3(input: Tensor, offset: Tensor, mask: Tensor, *arguments: Any) -> Tensor:
    """DCNv3. The arguments are those of `internimage.ops.dcnv3`, in the schema's order and already checked."""
    geometry = _geometry(arguments)
    rows = _rows(input.to(accumulate_dtype(input.dtype)), geometry.groups)
    inside, corners = _corners(sampling_coordinates(offset, geometry), input.shape[1:3])
    _, factor = _modulation(mask, inside, geometry)
    return _weighted_rows(rows, corners, [factor * c.weight for c in corners]).to(input.dtype)


def dcnv3_backward(
    grad_output: Tensor,  # (N, Ho, Wo, C)
    input: Tensor,  # (N, H, W, C)
    offset: Tensor,  # (N, Ho, Wo, groups * P * 2)
    mask: Tensor,  # (N, Ho, Wo, groups * P)
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of DCNv3 with respect to input, offset and mask.

    The last two arguments are `deterministic` and `output_mask`. A gradient that `output_mask` excludes has shape (0,).
    """
    *others, deterministic, output_mask = arguments
    geometry = _geometry(others)
    dtype = accumulate_dtype(input.dtype)
    grad = grad_output.to(dtype)
    rows = _rows(input.to(dtype), geometry.groups)
    inside, corners = _corners(sampling_coordinates(offset, geometry), input.shape[1:3])
    all_factors, factor = _modulation(mask, inside, geometry)

    grad_input, grad_offset, grad_mask = (input.new_empty(0) for _ in range(3))
    if output_mask[0]:
        total = torch.zeros_like(rows)
        for c in corners:
            total = _scatter(grad, rows, c, factor * c.weight, total, deterministic)
        grad_input = total[:-1].reshape(input.shape)
    if output_mask[1] or output_mask[2]:
        dots = [_dots(grad, rows, c) for c in corners]
        if output_mask[1]:
            grad_x = _sum(c.weight_x * dot for c, dot in zip(corners, dots))
            grad_y = _sum(c.weight_y * dot for c, dot in zip(corners, dots))
            step = torch.stack([grad_x, grad_y], dim=-1) * (factor * geometry.offset_scale)[..., None]
            grad_offset = step.reshape(offset.shape)
        if output_mask[2]:
            grad_factor = _sum(c.weight * dot for c, dot in zip(corners, dots))
            if geometry.softmax:
                grad_factor = _softmax_grad(grad_factor, all_factors)
            grad_mask = grad_factor.reshape(mask.shape)
    return grad_input.to(input.dtype), grad_offset.to(input.dtype), grad_mask.to(input.dtype)


class _Direction:
    """A direction (I', o', m') for input, offset and mask, and the derivative T of DCNv3 in this direction::

        T = sum_p  m_p B_p(I') + m_p s (o'_x dB_p/dx (I) + o'_y dB_p/dy (I)) + f_p B_p(I)

    where B_p is the bilinear sample at point p, m the (normalized) mask, f its derivative in the direction m', and s
    the offset scale. All operations are differentiable.

    Args:
        directions: I', o' and m'.
        tensors: Input, offset and mask.
        geometry: Of the operator.
    """

    def __init__(self, directions: Sequence[Tensor], tensors: Sequence[Tensor], geometry: Geometry) -> None:
        input_dir, offset_dir, mask_dir = directions
        input, offset, mask = tensors
        dtype = accumulate_dtype(input.dtype)
        self.rows, self.rows_dir = (_rows(t.to(dtype), geometry.groups) for t in (input, input_dir))
        coordinates = sampling_coordinates(offset, geometry)
        self.inside, self.corners = _corners(coordinates, input.shape[1:3])
        self.all_factors, self.factor = _modulation(mask, self.inside, geometry)
        step = offset_dir.to(dtype).reshape(*self.inside.shape, 2) * geometry.offset_scale
        self.step_x, self.step_y = step.unbind(-1)
        self.mask_dir = factor_dir = mask_dir.to(dtype).reshape(self.inside.shape)
        self.centered_dir = self.mask_dir  # with softmax, m' - <m, m'>
        if geometry.softmax:
            self.centered_dir = self.mask_dir - (self.all_factors * self.mask_dir).sum(-1, keepdim=True)
            factor_dir = self.all_factors * self.centered_dir
        self.factor_dir = torch.where(self.inside, factor_dir, 0)  # f
        # the weights of each corner's row of I', and of I, in T
        self.weights_dir = [self.factor * c.weight for c in self.corners]
        self.weights = [
            self.factor * (c.weight_x * self.step_x + c.weight_y * self.step_y) + self.factor_dir * c.weight
            for c in self.corners
        ]

    def derivative(self) -> Tensor:
        """T, (N, Ho, Wo, C), in `accumulate_dtype` of the input."""
        along_input = _weighted_sum(self.rows_dir, self.corners, self.weights_dir)
        return along_input + _weighted_sum(self.rows, self.corners, self.weights)


def dcnv3_jvp(tangents: Sequence[Tensor], tensors: Sequence[Tensor], *arguments: Any) -> Tensor:
    """Derivative of `dcnv3` at (input, offset, mask) in the direction of `tangents`, for forward mode."""
    return _Direction(tangents, tensors, _geometry(arguments)).derivative().to(tensors[0].dtype)


def dcnv3_double_backward(
    grad_grad_input: Tensor,  # (N, H, W, C)
    grad_grad_offset: Tensor,  # (N, Ho, Wo, groups * P * 2)
    grad_grad_mask: Tensor,  # (N, Ho, Wo, groups * P)
    grad_output: Tensor,  # (N, Ho, Wo, C)
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `dcnv3_backward` with respect to grad_output, input, offset and mask.

    The three gradients that `dcnv3_backward` returns are linear in grad_output, so their weighted sum with
    (I', o', m') = (grad_grad_input, grad_grad_offset, grad_grad_mask) is <grad_output, T>, where T is the derivative of
    the forward pass in the direction (I', o', m'), see `_Direction`. So the gradient of grad_output is T and the others
    are those of <grad_output, T>. All operations are differentiable, so that torch can derive third and higher orders.

    The last argument is `deterministic`.
    """
    *others, deterministic = arguments
    geometry = _geometry(others)
    direction = _Direction((grad_grad_input, grad_grad_offset, grad_grad_mask), (input, offset, mask), geometry)
    rows, corners, factor = direction.rows, direction.corners, direction.factor
    step_x, step_y, all_factors = direction.step_x, direction.step_y, direction.all_factors
    grad = grad_output.to(rows.dtype)
    grad_grad_output = direction.derivative()

    total = torch.zeros_like(rows)
    for c, weight in zip(corners, direction.weights):
        total = _scatter(grad, rows, c, weight, total, deterministic)
    grad_input = total[:-1].reshape(input.shape)

    dots = [_dots(grad, rows, c) for c in corners]
    dots_dir = [_dots(grad, direction.rows_dir, c) for c in corners]
    sample_x = _sum(c.weight_x * dot for c, dot in zip(corners, dots))  # d/dx of <grad, B_p(I)>
    sample_y = _sum(c.weight_y * dot for c, dot in zip(corners, dots))
    sample_xy = _sum(c.weight_xy * dot for c, dot in zip(corners, dots))
    sample_dir_x = _sum(c.weight_x * dot for c, dot in zip(corners, dots_dir))  # d/dx of <grad, B_p(I')>
    sample_dir_y = _sum(c.weight_y * dot for c, dot in zip(corners, dots_dir))
    grad_x = factor * (sample_dir_x + sample_xy * step_y) + direction.factor_dir * sample_x
    grad_y = factor * (sample_dir_y + sample_xy * step_x) + direction.factor_dir * sample_y
    grad_offset = (torch.stack([grad_x, grad_y], dim=-1) * geometry.offset_scale).reshape(offset.shape)

    sample_dir = _sum(c.weight * dot for c, dot in zip(corners, dots_dir))
    grad_factor = torch.where(direction.inside, sample_dir + sample_x * step_x + sample_y * step_y, 0)
    if geometry.softmax:
        # f = m (m' - <m, m'>) depends on m through both occurrences
        grad_factor_dir = _sum(c.weight * dot for c, dot in zip(corners, dots))
        inner = (all_factors * grad_factor_dir).sum(-1, keepdim=True)
        grad_factor = grad_factor + grad_factor_dir * direction.centered_dir - inner * direction.mask_dir
        grad_factor = _softmax_grad(grad_factor, all_factors)
    grad_mask = grad_factor.reshape(mask.shape)
    dtype = input.dtype
    return grad_grad_output.to(dtype), grad_input.to(dtype), grad_offset.to(dtype), grad_mask.to(dtype)


def _weighted_sum(rows: Tensor, corners: list[_Corner], weights: list[Tensor]) -> Tensor:
    """`_weighted_rows` in differentiable operations: embedding_bag has no double backward. -> (N, Ho, Wo, C)."""
    n, ho, wo, groups, points = corners[0].row.shape
    total = _sum(
        torch.bmm(weight.reshape(-1, 1, points), rows[c.row.reshape(-1)].view(-1, points, rows.shape[1]))
        for c, weight in zip(corners, weights)
    )
    return total.reshape(n, ho, wo, groups * rows.shape[1])
