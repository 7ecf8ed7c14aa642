# SPDX-License-Identifier: MIT
"""Sampling geometry of DCNv3: output size, kernel grid and sampling locations.

The single definition of where DCNv3 samples, shared by the reference operator, the fake kernels, the layer and the
analysis tools.

Conventions, used everywhere in this package:

* Coordinates are (x, y) = (column, row) in pixels of the unpadded input. Pixel centers are at integer coordinates.
* The points of a kernel are in x-major order: all rows of the leftmost column first.
* The channels of `offset` are group-major, then point, then (x, y); those of `mask` are group-major, then point.

The last two are DCNv3's; another operator names its own `Order`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """The non-tensor arguments of DCNv3, in the order of the operator's schema."""

    kernel_size: Pair  # (height, width), like the next three
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    offset_scale: float
    remove_center: bool
    softmax: bool


class Order(NamedTuple):
    """How an operator orders the points of a kernel, and the two numbers of an offset."""

    row_major: bool  # all columns of the uppermost row first, else all rows of the leftmost column
    y_first: bool  # (y, x), else (x, y)


DCNV3, CONVOLUTION = Order(False, False), Order(True, True)  # the second is of deformable convolution v1 and v2


def num_points(kernel_size: Sequence[int], remove_center: bool = False) -> int:
    """Number of sampling points P per group: `kh * kw`, minus one with `remove_center`."""
    return kernel_size[0] * kernel_size[1] - int(remove_center)


def output_size(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Pair:
    """Output (height, width), from (height, width) pairs. Not positive where the kernel does not fit."""
    height, width = (
        (size + 2 * pad - (dil * (kernel - 1) + 1)) // step + 1
        for size, kernel, step, pad, dil in zip(input_size, kernel_size, stride, padding, dilation)
    )
    return height, width


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which coordinates and sums are computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kernel_grid(
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    remove_center: bool,
    *,
    dtype: torch.dtype,
    device: torch.device,
    order: Order = DCNV3,
) -> Tensor:
    """Regular kernel grid, relative to the kernel's center.

    Args:
        kernel_size: (kh, kw).
        dilation: Distance between neighboring points in pixels, (vertical, horizontal).
        remove_center: Omit the center point; both kernel sides must be odd.
        dtype: Floating dtype of the result.
        device: Device of the result.
        order: Of the points.

    Returns:
        (P, 2) points as (x, y) pixels. The center is `dilation * (kernel - 1) // 2` pixels after the
        first point: of an even side with dilation 1, the left or upper one of the two middle points.
    """
    (kh, kw), (dh, dw) = kernel_size, dilation
    x = torch.arange(kw, dtype=dtype, device=device) * dw - (dw * (kw - 1)) // 2
    y = torch.arange(kh, dtype=dtype, device=device) * dh - (dh * (kh - 1)) // 2
    grid = torch.stack(torch.meshgrid(x, y, indexing="ij"), dim=-1)
    grid = (grid.transpose(0, 1) if order.row_major else grid).reshape(kh * kw, 2)
    if remove_center:
        center = (kw // 2) * kh + kh // 2  # in either order
        grid = torch.cat([grid[:center], grid[center + 1 :]])
    return grid


def sampling_coordinates(
    offset: Tensor,  # (N, Ho, Wo, groups * P * 2)
    geometry: Geometry,
    order: Order = DCNV3,
) -> tuple[Tensor, Tensor]:
    """Where every output pixel of every group samples the input.

    For output pixel (ox, oy) and kernel point (kx, ky) of `kernel_grid`, with `center_x = dilation_x * (kw - 1) // 2`::

        x = ox * stride_x - padding_x + center_x + (kx + offset_x) * offset_scale

    and likewise for y. `offset_scale` scales both the grid, about the kernel's center, and the offsets
    (Wang et al., "InternImage", CVPR 2023, and the official CUDA kernel).

    Args:
        offset: (N, Ho, Wo, groups * P * 2) in pixels.
        geometry: Of the operator; `softmax` is ignored.
        order: Of the points and of an offset's numbers.

    Returns:
        x and y, each (N, Ho, Wo, groups, P), in `accumulate_dtype(offset.dtype)`.
    """
    n, ho, wo, _ = offset.shape
    dtype, device = accumulate_dtype(offset.dtype), offset.device
    (kh, kw), (sh, sw), (ph, pw), (dh, dw), groups, offset_scale, remove_center, _ = geometry
    x = torch.arange(wo, dtype=dtype, device=device) * sw - pw + (dw * (kw - 1)) // 2
    y = torch.arange(ho, dtype=dtype, device=device) * sh - ph + (dh * (kh - 1)) // 2
    grid = kernel_grid((kh, kw), (dh, dw), remove_center, dtype=dtype, device=device, order=order)  # (P, 2)
    points = grid.shape[0]
    # groups and points as one axis: torch is slow at broadcasting over a short innermost axis
    grid_x, grid_y = grid.repeat(groups, 1).unbind(-1)
    offset_x, offset_y = offset.to(dtype).reshape(n, ho, wo, groups * points, 2).unbind(-1)
    if order.y_first:
        offset_x, offset_y = offset_y, offset_x
    x = x.view(wo, 1) + (grid_x + offset_x) * offset_scale
    y = y.view(ho, 1, 1) + (grid_y + offset_y) * offset_scale
    return x.view(n, ho, wo, groups, points), y.view(n, ho, wo, groups, points)


def sampling_locations(offset: Tensor, geometry: Geometry, order: Order = DCNV3) -> Tensor:
    """`sampling_coordinates` as one tensor (N, Ho, Wo, groups, P, 2) of (x, y)."""
    return torch.stack(sampling_coordinates(offset, geometry, order), dim=-1)
