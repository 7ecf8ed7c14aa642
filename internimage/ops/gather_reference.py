# SPDX-License-Identifier: MIT
"""Bilinear sampling at learned locations in plain torch, and its derivatives: what the references of operators share.

For output pixel o, group g and point p, with the locations of `sampling.sampling_coordinates`::

    sample[o, g, p] = mask[o, g, p] * bilinear(input[:, g], location[o, g, p])

The output has their sum over the points, as in DCNv3; or, with `columns=True`, all of them: (N, Ho, Wo, P * C), point
by point. A location contributes only if it is strictly inside (-1, W) x (-1, H), where pixels outside the image are
zero. All others, including NaN and infinity, contribute nothing and get no gradient. At pixel centers, where bilinear
interpolation has a kink, the derivative is the right-hand one.

Works on any torch device, in float64, float32, bfloat16 and float16; the 16-bit types are computed in float32 and
rounded once. Nothing here calls autograd: the derivatives are written out.

Implementation: bilinear sampling at P points is a weighted sum of 4 * P rows (pixels of one group) of the input, and
torch has an operator for weighted sums of gathered rows: `embedding_bag`. A bag is what is summed to one row of the
output: the points of a unit, or with `columns=True` one point.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .sampling import Geometry, Order, accumulate_dtype, sampling_coordinates


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


@dataclass(frozen=True)
class _Bags:
    """The layout of an output.

    Args:
        shape: (N, Ho, Wo, groups, P), of the locations.
        columns: Whether a bag is one point.
    """

    shape: Sequence[int]
    columns: bool

    @property
    def points(self) -> int:
        """Points in a bag."""
        return 1 if self.columns else self.shape[-1]

    def split(self, output: Tensor) -> Tensor:
        """Output, or its gradient -> (bags, C / groups)."""
        if self.columns:
            return rearrange(output, "n h w (p g c) -> (n h w g p) c", g=self.shape[3], p=self.shape[4])
        return rearrange(output, "n h w (g c) -> (n h w g) c", g=self.shape[3])

    def join(self, bags: Tensor) -> Tensor:
        """The inverse of `split`."""
        n, ho, wo, groups, points = self.shape
        if self.columns:
            return rearrange(bags, "(n h w g p) c -> n h w (p g c)", n=n, h=ho, w=wo, g=groups, p=points)
        return rearrange(bags, "(n h w g) c -> n h w (g c)", n=n, h=ho, w=wo, g=groups)


def _weighted_rows(rows: Tensor, corners: list[_Corner], weights: list[Tensor], bags: _Bags) -> Tensor:
    """Sum of weight * row over the corners and points of each bag: the output."""
    n, ho, wo, groups, points = bags.shape
    if n * ho * wo == 0:
        return rows.new_zeros(n, ho, wo, groups * rows.shape[1] * (points if bags.columns else 1))
    row = torch.stack([corner.row for corner in corners], dim=-1).view(-1, 4 * bags.points)
    weight = torch.stack(weights, dim=-1).view(-1, 4 * bags.points)
    return bags.join(F.embedding_bag(row, rows, per_sample_weights=weight, mode="sum"))


def _dots(grads: Tensor, rows: Tensor, corner: _Corner, bags: _Bags) -> Tensor:
    """Dot product of each bag's gradient and the rows of its points: (bags, C / groups) -> (N, Ho, Wo, groups, P)."""
    gathered = rows[corner.row.reshape(-1)].view(-1, bags.points, rows.shape[1])
    return torch.bmm(gathered, grads.unsqueeze(-1)).view(corner.row.shape)


def _scatter(
    grads: Tensor, rows: Tensor, corner: _Corner, weight: Tensor, total: Tensor, bags: _Bags, deterministic: bool
) -> Tensor:
    """Add weight * gradient to the sampled rows: the transpose of `_weighted_rows`, for one corner."""
    row = corner.row.reshape(-1)
    values = (weight.reshape(-1, bags.points, 1) * grads.unsqueeze(1)).reshape(-1, rows.shape[1])
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


class Gather(NamedTuple):
    """What distinguishes an operator, in one call, from others that sample."""

    geometry: Geometry
    columns: bool
    order: Order

    def paired(self, x: Tensor, y: Tensor) -> Tensor:
        """As an offset's two numbers, along a last axis."""
        return torch.stack([y, x] if self.order.y_first else [x, y], dim=-1)

    def unpaired(self, offset: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `paired`."""
        first, second = offset.unbind(-1)
        return (second, first) if self.order.y_first else (first, second)


class Functions:
    """The four functions of an operator's `registration.Reference`.

    Args:
        gather_of: From the arguments of its schema after the tensors.
    """

    def __init__(self, gather_of: Callable[[Sequence[Any]], "Gather"]) -> None:
        self._gather_of = gather_of

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor, *arguments: Any) -> Tensor:
        """The output."""
        return forward(input, offset, mask, self._gather_of(arguments))

    def backward(
        self, grad_output: Tensor, input: Tensor, offset: Tensor, mask: Tensor, *arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of `forward`; the last two arguments are `deterministic` and `output_mask`."""
        *others, deterministic, output_mask = arguments
        return backward(grad_output, input, offset, mask, self._gather_of(others), deterministic, output_mask)

    def double_backward(self, *tensors_and_arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of `backward`: of its three gradients' gradients, its four tensors and the schema's arguments; the
        last argument is `deterministic`."""
        a, b, c, d, e, f, g, *others, deterministic = tensors_and_arguments
        return double_backward(a, b, c, d, e, f, g, self._gather_of(others), deterministic)

    def jvp(self, tangents: Sequence[Tensor], tensors: Sequence[Tensor], *arguments: Any) -> Tensor:
        """Derivative of `forward` in a direction."""
        return jvp(tangents, tensors, self._gather_of(arguments))


def forward(input: Tensor, offset: Tensor, mask: Tensor, gather: Gather) -> Tensor:
    """The output, of arguments that were checked, with shapes as in `internimage.ops.dcnv3`."""
    geometry = gather.geometry
    rows = _rows(input.to(accumulate_dtype(input.dtype)), geometry.groups)
    inside, corners = _corners(sampling_coordinates(offset, geometry, gather.order), input.shape[1:3])
    _, factor = _modulation(mask, inside, geometry)
    weights = [factor * c.weight for c in corners]
    return _weighted_rows(rows, corners, weights, _Bags(inside.shape, gather.columns)).to(input.dtype)


def backward(
    grad_output: Tensor,  # (N, Ho, Wo, C), with columns (N, Ho, Wo, P * C)
    input: Tensor,  # (N, H, W, C)
    offset: Tensor,  # (N, Ho, Wo, groups * P * 2)
    mask: Tensor,  # (N, Ho, Wo, groups * P)
    gather: Gather,
    deterministic: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` with respect to input, offset and mask.

    A gradient that `output_mask` excludes has shape (0,).
    """
    geometry, dtype = gather.geometry, accumulate_dtype(input.dtype)
    rows = _rows(input.to(dtype), geometry.groups)
    inside, corners = _corners(sampling_coordinates(offset, geometry, gather.order), input.shape[1:3])
    all_factors, factor = _modulation(mask, inside, geometry)
    bags = _Bags(inside.shape, gather.columns)
    grads = bags.split(grad_output.to(dtype))

    grad_input, grad_offset, grad_mask = (input.new_empty(0) for _ in range(3))
    if output_mask[0]:
        total = torch.zeros_like(rows)
        for c in corners:
            total = _scatter(grads, rows, c, factor * c.weight, total, bags, deterministic)
        grad_input = total[:-1].reshape(input.shape)
    if output_mask[1] or output_mask[2]:
        dots = [_dots(grads, rows, c, bags) for c in corners]
        if output_mask[1]:
            grad_x = _sum(c.weight_x * dot for c, dot in zip(corners, dots))
            grad_y = _sum(c.weight_y * dot for c, dot in zip(corners, dots))
            step = gather.paired(grad_x, grad_y) * (factor * geometry.offset_scale)[..., None]
            grad_offset = step.reshape(offset.shape)
        if output_mask[2]:
            grad_factor = _sum(c.weight * dot for c, dot in zip(corners, dots))
            if geometry.softmax:
                grad_factor = _softmax_grad(grad_factor, all_factors)
            grad_mask = grad_factor.reshape(mask.shape)
    return grad_input.to(input.dtype), grad_offset.to(input.dtype), grad_mask.to(input.dtype)


class _Direction:
    """A direction (I', o', m') for input, offset and mask, and the derivative T of the output in this direction::

        T = sum_p  m_p B_p(I') + m_p s (o'_x dB_p/dx (I) + o'_y dB_p/dy (I)) + f_p B_p(I)

    or, with columns, each term of the sum. B_p is the bilinear sample at point p, m the (normalized) mask, f its
    derivative in the direction m', and s the offset scale. All operations are differentiable.

    Args:
        directions: I', o' and m'.
        tensors: Input, offset and mask.
        gather: The operator.
    """

    def __init__(self, directions: Sequence[Tensor], tensors: Sequence[Tensor], gather: Gather) -> None:
        geometry = gather.geometry
        input_dir, offset_dir, mask_dir = directions
        input, offset, mask = tensors
        dtype = accumulate_dtype(input.dtype)
        self.rows, self.rows_dir = (_rows(t.to(dtype), geometry.groups) for t in (input, input_dir))
        coordinates = sampling_coordinates(offset, geometry, gather.order)
        self.inside, self.corners = _corners(coordinates, input.shape[1:3])
        self.bags = _Bags(self.inside.shape, gather.columns)
        self.all_factors, self.factor = _modulation(mask, self.inside, geometry)
        step = offset_dir.to(dtype).reshape(*self.inside.shape, 2) * geometry.offset_scale
        self.step_x, self.step_y = gather.unpaired(step)
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
        """T, of the output's shape, in `accumulate_dtype` of the input."""
        along_input = _weighted_sum(self.rows_dir, self.corners, self.weights_dir, self.bags)
        return along_input + _weighted_sum(self.rows, self.corners, self.weights, self.bags)


def jvp(tangents: Sequence[Tensor], tensors: Sequence[Tensor], gather: Gather) -> Tensor:
    """Derivative of `forward` at (input, offset, mask) in the direction of `tangents`, for forward mode."""
    return _Direction(tangents, tensors, gather).derivative().to(tensors[0].dtype)


def double_backward(
    grad_grad_input: Tensor,  # (N, H, W, C)
    grad_grad_offset: Tensor,  # (N, Ho, Wo, groups * P * 2)
    grad_grad_mask: Tensor,  # (N, Ho, Wo, groups * P)
    grad_output: Tensor,  # (N, Ho, Wo, C), with columns (N, Ho, Wo, P * C)
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    gather: Gather,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `backward` with respect to grad_output, input, offset and mask.

    The three gradients that `backward` returns are linear in grad_output, so their weighted sum with
    (I', o', m') = (grad_grad_input, grad_grad_offset, grad_grad_mask) is <grad_output, T>, where T is the derivative of
    the forward pass in the direction (I', o', m'), see `_Direction`. So the gradient of grad_output is T and the others
    are those of <grad_output, T>. All operations are differentiable, so that torch can derive third and higher orders.
    """
    geometry = gather.geometry
    direction = _Direction((grad_grad_input, grad_grad_offset, grad_grad_mask), (input, offset, mask), gather)
    rows, corners, factor = direction.rows, direction.corners, direction.factor
    step_x, step_y, all_factors, bags = direction.step_x, direction.step_y, direction.all_factors, direction.bags
    grads = bags.split(grad_output.to(rows.dtype))
    grad_grad_output = direction.derivative()

    total = torch.zeros_like(rows)
    for c, weight in zip(corners, direction.weights):
        total = _scatter(grads, rows, c, weight, total, bags, deterministic)
    grad_input = total[:-1].reshape(input.shape)

    dots = [_dots(grads, rows, c, bags) for c in corners]
    dots_dir = [_dots(grads, direction.rows_dir, c, bags) for c in corners]
    sample_x = _sum(c.weight_x * dot for c, dot in zip(corners, dots))  # d/dx of <grad, B_p(I)>
    sample_y = _sum(c.weight_y * dot for c, dot in zip(corners, dots))
    sample_xy = _sum(c.weight_xy * dot for c, dot in zip(corners, dots))
    sample_dir_x = _sum(c.weight_x * dot for c, dot in zip(corners, dots_dir))  # d/dx of <grad, B_p(I')>
    sample_dir_y = _sum(c.weight_y * dot for c, dot in zip(corners, dots_dir))
    grad_x = factor * (sample_dir_x + sample_xy * step_y) + direction.factor_dir * sample_x
    grad_y = factor * (sample_dir_y + sample_xy * step_x) + direction.factor_dir * sample_y
    grad_offset = (gather.paired(grad_x, grad_y) * geometry.offset_scale).reshape(offset.shape)

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


def _weighted_sum(rows: Tensor, corners: list[_Corner], weights: list[Tensor], bags: _Bags) -> Tensor:
    """`_weighted_rows` in differentiable operations: embedding_bag has no double backward."""
    total = _sum(
        torch.bmm(weight.reshape(-1, 1, bags.points), rows[c.row.reshape(-1)].view(-1, bags.points, rows.shape[1]))
        for c, weight in zip(corners, weights)
    )
    return bags.join(total.squeeze(1))
