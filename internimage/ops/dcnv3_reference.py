# SPDX-License-Identifier: MIT
"""DCNv3 in plain torch: the specification that every kernel is tested against.

For output pixel o and group g, with the P sampling locations of `sampling.sampling_coordinates`::

    output[o, g] = sum_p  mask[o, g, p] * bilinear(input[:, g], location[o, g, p])

A location contributes only strictly inside (-1, W) x (-1, H); the pixels around the image count as zero there. One
outside, NaN and infinity included, contributes nothing and receives no gradient. At pixel centres, where the bilinear
interpolation has a kink, the derivative is the right-hand one.

Works on any torch device, in float64, float32, bfloat16 and float16; the half types are computed in float32 and rounded
once. Nothing here calls autograd: `dcnv3_backward`, `dcnv3_double_backward` and `dcnv3_jvp` are written out.

The idea of the implementation: bilinear sampling at P points is a weighted sum over 4 * P rows (pixels of one group) of
the input, and torch has an operator for weighted sums of gathered rows: `embedding_bag`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .arguments import check_offset_scale
from .sampling import Geometry, accumulate_dtype, sampling_coordinates


@dataclass(frozen=True)
class _Corner:
    """One of the four pixels around every sampling location; each field is (N, Ho, Wo, groups, P)."""

    row: Tensor  # which row of `_rows(input)`; the last, zero one where the pixel lies outside
    weight: Tensor  # bilinear weight, 0 where the location is outside
    # its derivatives with respect to x, y and both (the pure second ones are 0); only where they were asked for
    weight_x: Tensor | None = None
    weight_y: Tensor | None = None
    weight_xy: Tensor | None = None


def _rows(input: Tensor, groups: int) -> Tensor:
    """(N * H * W * groups + 1, C / groups): one row a pixel and group, and a row of zeros for all that is outside.

    Gathering a zero keeps an infinity in the image from reaching a location that does not touch it, which a weight of
    zero would not.
    """
    rows = rearrange(input, "n h w (g c) -> (n h w g) c", g=groups)
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


def _corners(
    coordinates: tuple[Tensor, Tensor], input_size: Sequence[int], derivatives: bool
) -> tuple[Tensor, list[_Corner]]:
    """The four corners of every location and where the location is inside; x and y are (N, Ho, Wo, groups, P)."""
    x, y = coordinates
    n, _, _, groups, _ = x.shape
    height, width = input_size
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)  # False for NaN
    x, y = torch.where(inside, x, 0), torch.where(inside, y, 0)  # finite, so that the integers below are defined
    x_floor, y_floor = x.floor(), y.floor()
    right, below = x - x_floor, y - y_floor  # share of the right and of the lower pixel
    left, above = 1 - right, 1 - below
    image = torch.arange(n, device=x.device).view(n, 1, 1, 1, 1) * (height * width * groups)
    group = torch.arange(groups, device=x.device).view(groups, 1)
    upper_left = (y_floor.long() * width + x_floor.long()) * groups + (image + group)
    zero_row = n * height * width * groups
    in_column = (inside & (x_floor >= 0), inside & (x_floor < width - 1))  # for the left and the right corners
    in_line = (y_floor >= 0, y_floor < height - 1)
    corners = []
    for step_y, share_y, sign_y in ((0, above, -1), (1, below, 1)):
        for step_x, share_x, sign_x in ((0, left, -1), (1, right, 1)):
            valid = in_column[step_x] & in_line[step_y]
            row = upper_left + (step_y * width + step_x) * groups
            corner = {
                "row": torch.where(valid, row, zero_row),
                "weight": torch.where(inside, share_x * share_y, 0),
            }
            if derivatives:
                corner["weight_x"] = torch.where(inside, sign_x * share_y, 0)
                corner["weight_y"] = torch.where(inside, sign_y * share_x, 0)
                corner["weight_xy"] = inside.to(x.dtype) * (sign_x * sign_y)
            corners.append(_Corner(**corner))
    return inside, corners


def _weighted_rows(rows: Tensor, corners: list[_Corner], weights: list[Tensor]) -> Tensor:
    """sum over corners and points of weight * row; -> (N, Ho, Wo, C)."""
    n, ho, wo, groups, _ = corners[0].row.shape
    if n * ho * wo == 0:
        return rows.new_zeros(n, ho, wo, groups * rows.shape[1])
    row = torch.stack([corner.row for corner in corners], dim=-1).flatten(-2)
    weight = torch.stack(weights, dim=-1).flatten(-2)
    bags = F.embedding_bag(row.flatten(0, 3), rows, per_sample_weights=weight.flatten(0, 3), mode="sum")
    return rearrange(bags, "(n h w g) c -> n h w (g c)", n=n, h=ho, w=wo)


def _dots(grad: Tensor, rows: Tensor, corner: _Corner) -> Tensor:
    """<grad, row> over the channels of a group, for every location: (N, Ho, Wo, C) -> (N, Ho, Wo, groups, P)."""
    shape = corner.row.shape
    gathered = rows[corner.row.reshape(-1)].view(-1, shape[-1], rows.shape[1])  # (N * Ho * Wo * groups, P, C / groups)
    return torch.bmm(gathered, grad.reshape(-1, rows.shape[1], 1)).view(shape)


def _scatter(grad: Tensor, rows: Tensor, corner: _Corner, weight: Tensor, total: Tensor, deterministic: bool) -> Tensor:
    """Add weight * grad to the rows that were sampled: the transpose of `_weighted_rows`, for one corner."""
    row = corner.row.reshape(-1)
    values = weight.reshape(-1, weight.shape[-1], 1) * grad.reshape(-1, 1, rows.shape[1])
    values = values.reshape(-1, rows.shape[1])
    if deterministic:  # sorts on CUDA, where index_add adds in any order
        return total.index_put((row,), values, accumulate=True)
    return total.index_add(0, row, values)


def _modulation(mask: Tensor, inside: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The factor of every location, and the same with 0 where the location is outside; (N, Ho, Wo, groups, P)."""
    factor = mask.to(accumulate_dtype(mask.dtype)).reshape(inside.shape)
    if geometry.softmax:
        factor = factor.softmax(-1)
    return factor, torch.where(inside, factor, 0)


def _softmax_grad(grad: Tensor, factor: Tensor) -> Tensor:
    """Gradient of the logits from the gradient of their softmax, over the last axis."""
    return factor * (grad - (factor * grad).sum(-1, keepdim=True))


def _geometry(arguments: Sequence) -> Geometry:
    geometry = Geometry(*arguments)
    check_offset_scale(geometry.offset_scale)  # the compiled kernels refuse it, too
    return geometry


def dcnv3(input: Tensor, offset: Tensor, mask: Tensor, *arguments) -> Tensor:
    """DCNv3; see `internimage.ops.dcnv3` for the arguments, here in the schema's order and already checked."""
    geometry = _geometry(arguments)
    rows = _rows(input.to(accumulate_dtype(input.dtype)), geometry.groups)
    inside, corners = _corners(sampling_coordinates(offset, geometry), input.shape[1:3], derivatives=False)
    _, factor = _modulation(mask, inside, geometry)
    return _weighted_rows(rows, corners, [factor * c.weight for c in corners]).to(input.dtype)


def dcnv3_backward(
    grad_output: Tensor,  # (N, Ho, Wo, C)
    input: Tensor,  # (N, H, W, C)
    offset: Tensor,  # (N, Ho, Wo, groups * P * 2)
    mask: Tensor,  # (N, Ho, Wo, groups * P)
    *arguments,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of DCNv3 with respect to input, offset and mask; the last two arguments are `deterministic` and
    `output_mask`. A gradient that was not asked for is an empty tensor of shape (0,)."""
    *arguments, deterministic, output_mask = arguments
    geometry = _geometry(arguments)
    dtype = accumulate_dtype(input.dtype)
    grad = grad_output.to(dtype)
    rows = _rows(input.to(dtype), geometry.groups)
    inside, corners = _corners(sampling_coordinates(offset, geometry), input.shape[1:3], derivatives=True)
    all_factors, factor = _modulation(mask, inside, geometry)

    grad_input = grad_offset = grad_mask = None
    if output_mask[0]:
        total = torch.zeros_like(rows)
        for c in corners:
            total = _scatter(grad, rows, c, factor * c.weight, total, deterministic)
        grad_input = total[:-1].reshape(input.shape)
    if output_mask[1] or output_mask[2]:
        dots = [_dots(grad, rows, c) for c in corners]
        if output_mask[1]:
            grad_x = sum(c.weight_x * dot for c, dot in zip(corners, dots))
            grad_y = sum(c.weight_y * dot for c, dot in zip(corners, dots))
            step = torch.stack([grad_x, grad_y], dim=-1) * (factor * geometry.offset_scale)[..., None]
            grad_offset = step.reshape(offset.shape)
        if output_mask[2]:
            grad_factor = sum(c.weight * dot for c, dot in zip(corners, dots))
            if geometry.softmax:
                grad_factor = _softmax_grad(grad_factor, all_factors)
            grad_mask = grad_factor.reshape(mask.shape)
    empty = input.new_empty(0)
    return tuple(empty.clone() if g is None else g.to(input.dtype) for g in (grad_input, grad_offset, grad_mask))


class _Direction:
    """A direction (I', o', m') in tensors of input's, offset's and mask's shapes, and the derivative T of DCNv3 in it::

        T = sum_p  m_p B_p(I') + m_p s (o'_x dB_p/dx (I) + o'_y dB_p/dy (I)) + f_p B_p(I)

    with B_p the bilinear sample at point p, m the (normalized) mask, f its derivative in the direction m' and s the
    offset scale. Differentiable torch operations throughout.
    """

    def __init__(
        self,
        input_dir: Tensor,
        offset_dir: Tensor,
        mask_dir: Tensor,
        input: Tensor,
        offset: Tensor,
        mask: Tensor,
        geometry: Geometry,
    ) -> None:
        dtype = accumulate_dtype(input.dtype)
        self.rows, self.rows_dir = (_rows(t.to(dtype), geometry.groups) for t in (input, input_dir))
        coordinates = sampling_coordinates(offset, geometry)
        self.inside, self.corners = _corners(coordinates, input.shape[1:3], derivatives=True)
        self.all_factors, self.factor = _modulation(mask, self.inside, geometry)
        step = offset_dir.to(dtype).reshape(*self.inside.shape, 2) * geometry.offset_scale
        self.step_x, self.step_y = step.unbind(-1)
        self.mask_dir = factor_dir = mask_dir.to(dtype).reshape(self.inside.shape)
        if geometry.softmax:
            self.centered_dir = self.mask_dir - (self.all_factors * self.mask_dir).sum(-1, keepdim=True)
            factor_dir = self.all_factors * self.centered_dir
        self.factor_dir = torch.where(self.inside, factor_dir, 0)  # f
        # the weight of each corner's row in T: of I' and of I
        self.direct = [self.factor * c.weight for c in self.corners]
        self.moved = [
            self.factor * (c.weight_x * self.step_x + c.weight_y * self.step_y) + self.factor_dir * c.weight
            for c in self.corners
        ]

    def derivative(self) -> Tensor:
        """T, (N, Ho, Wo, C), in the dtype of sums."""
        along_input = _weighted_sum(self.rows_dir, self.corners, self.direct)
        return along_input + _weighted_sum(self.rows, self.corners, self.moved)


def dcnv3_jvp(tangents: Sequence[Tensor], tensors: Sequence[Tensor], *arguments) -> Tensor:
    """Derivative of `dcnv3` at (input, offset, mask) in the direction of `tangents`, for forward mode."""
    return _Direction(*tangents, *tensors, _geometry(arguments)).derivative().to(tensors[0].dtype)


def dcnv3_double_backward(
    grad_grad_input: Tensor,  # (N, H, W, C)
    grad_grad_offset: Tensor,  # (N, Ho, Wo, groups * P * 2)
    grad_grad_mask: Tensor,  # (N, Ho, Wo, groups * P)
    grad_output: Tensor,  # (N, Ho, Wo, C)
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    *arguments,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `dcnv3_backward` with respect to grad_output, input, offset and mask.

    The three gradients that `dcnv3_backward` returns are linear in grad_output, so their weighted sum with
    (I', o', m') = (grad_grad_input, grad_grad_offset, grad_grad_mask) is <grad_output, T>, where T is the derivative of
    the forward pass in the direction (I', o', m'), see `_Direction`. So the gradient of grad_output is T and the others
    are those of <grad_output, T>. Everything is a differentiable torch operation: torch gives third and higher
    derivatives.

    The last argument is `deterministic`.
    """
    *arguments, deterministic = arguments
    geometry = _geometry(arguments)
    at = _Direction(grad_grad_input, grad_grad_offset, grad_grad_mask, input, offset, mask, geometry)
    grad = grad_output.to(at.rows.dtype)
    rows, corners, factor, step_x, step_y = at.rows, at.corners, at.factor, at.step_x, at.step_y
    grad_grad_output = at.derivative()

    total = torch.zeros_like(rows)
    for c, weight in zip(corners, at.moved):
        total = _scatter(grad, rows, c, weight, total, deterministic)
    grad_input = total[:-1].reshape(input.shape)

    dots = [_dots(grad, rows, c) for c in corners]
    dots_dir = [_dots(grad, at.rows_dir, c) for c in corners]
    along_x = sum(c.weight_x * dot for c, dot in zip(corners, dots))  # d/dx of <grad, B_p(I)>
    along_y = sum(c.weight_y * dot for c, dot in zip(corners, dots))
    mixed = sum(c.weight_xy * dot for c, dot in zip(corners, dots))
    dir_x = sum(c.weight_x * dot for c, dot in zip(corners, dots_dir))
    dir_y = sum(c.weight_y * dot for c, dot in zip(corners, dots_dir))
    grad_x = factor * (dir_x + mixed * step_y) + at.factor_dir * along_x
    grad_y = factor * (dir_y + mixed * step_x) + at.factor_dir * along_y
    grad_offset = (torch.stack([grad_x, grad_y], dim=-1) * geometry.offset_scale).reshape(offset.shape)

    grad_factor = sum(c.weight * dot for c, dot in zip(corners, dots_dir)) + along_x * step_x + along_y * step_y
    grad_factor = torch.where(at.inside, grad_factor, 0)
    if geometry.softmax:
        # f = m (m' - <m, m'>) depends on m twice: through both factors m
        grad_factor_dir = sum(c.weight * dot for c, dot in zip(corners, dots))
        inner = (at.all_factors * grad_factor_dir).sum(-1, keepdim=True)
        grad_factor = grad_factor + grad_factor_dir * at.centered_dir - inner * at.mask_dir
        grad_factor = _softmax_grad(grad_factor, at.all_factors)
    grad_mask = grad_factor.reshape(mask.shape)
    return tuple(g.to(input.dtype) for g in (grad_grad_output, grad_input, grad_offset, grad_mask))


def _weighted_sum(rows: Tensor, corners: list[_Corner], weights: list[Tensor]) -> Tensor:
    """`_weighted_rows` by differentiable operations (embedding_bag has no double backward); -> (N, Ho, Wo, C)."""
    n, ho, wo, groups, points = corners[0].row.shape
    total = 0
    for c, weight in zip(corners, weights):
        gathered = rows[c.row.reshape(-1)].view(-1, points, rows.shape[1])
        total = total + torch.bmm(weight.reshape(-1, 1, points), gathered)
    return total.reshape(n, ho, wo, groups * rows.shape[1])
