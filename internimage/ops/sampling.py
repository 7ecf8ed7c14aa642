# SPDX-License-Identifier: MIT
"""Sampling geometry of DCNv3: output size, kernel grid and sampling locations.

The one place that knows where DCNv3 looks. The reference operator, the fake kernels, the layer and the analysis tools
all ask here, so that they cannot disagree.

Conventions, used everywhere in this package:

* Coordinates are (x, y) = (column, row) in pixels of the unpadded input. Pixel centres are the integers.
* The points of a kernel are counted x-major: all rows of the leftmost column first.
* The channels of `offset` are group-major, then point, then (x, y); those of `mask` are group-major, then point.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """The arguments of DCNv3 besides its tensors, in the order of the operator's schema."""

    kernel_size: Pair  # (height, width), as the next three
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    offset_scale: float
    remove_center: bool
    softmax: bool


def num_points(kernel_size: Sequence[int], remove_center: bool = False) -> int:
    """Number of sampling points P of one group: `kh * kw`, less one with `remove_center`."""
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
) -> Tensor:
    """Regular kernel grid about the kernel's centre.

    Args:
        kernel_size: (kh, kw).
        dilation: Distance of neighbouring points in pixels, (vertical, horizontal).
        remove_center: Leave out the centre point. Both kernel sides must be odd then.
        dtype: Floating dtype of the result.
        device: Device of the result.

    Returns:
        (P, 2) points as (x, y) pixels, x-major. The centre of an even side is the left or upper one of the two middle
        points for dilation 1; in general it is `dilation * (kernel - 1) // 2` pixels after the first point.
    """
    (kh, kw), (dh, dw) = kernel_size, dilation
    x = torch.arange(kw, dtype=dtype, device=device) * dw - (dw * (kw - 1)) // 2
    y = torch.arange(kh, dtype=dtype, device=device) * dh - (dh * (kh - 1)) // 2
    grid = torch.stack(torch.meshgrid(x, y, indexing="ij"), dim=-1).reshape(kh * kw, 2)
    if remove_center:
        centre = (kw // 2) * kh + kh // 2
        grid = torch.cat([grid[:centre], grid[centre + 1 :]])
    return grid


def sampling_coordinates(
    offset: Tensor,  # (N, Ho, Wo, groups * P * 2)
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:
    """Where every output pixel of every group samples the input.

    For output pixel (ox, oy) and kernel point (kx, ky) of `kernel_grid`, with `centre_x = dilation_x * (kw - 1) // 2`::

        x = ox * stride_x - padding_x + centre_x + (kx + offset_x) * offset_scale

    and the same for y. `offset_scale` stretches the grid about the kernel's centre as well as the offsets
    (Wang et al., "InternImage", CVPR 2023, and the official CUDA kernel).

    Args:
        offset: (N, Ho, Wo, groups * P * 2) in pixels, (x, y) innermost.
        geometry: Of the operator; `softmax` plays no part.

    Returns:
        x and y, each (N, Ho, Wo, groups, P), in `accumulate_dtype(offset.dtype)`.
    """
    n, ho, wo, _ = offset.shape
    dtype, device = accumulate_dtype(offset.dtype), offset.device
    (kh, kw), (sh, sw), (ph, pw), (dh, dw), groups, offset_scale, remove_center, _ = geometry
    x = torch.arange(wo, dtype=dtype, device=device) * sw - pw + (dw * (kw - 1)) // 2
    y = torch.arange(ho, dtype=dtype, device=device) * sh - ph + (dh * (kh - 1)) // 2
    grid = kernel_grid((kh, kw), (dh, dw), remove_center, dtype=dtype, device=device)  # (P, 2)
    points = grid.shape[0]
    # groups and points as one axis: torch is slow where the innermost axis that broadcasts is short
    grid_x, grid_y = grid.repeat(groups, 1).unbind(-1)
    offset_x, offset_y = offset.to(dtype).reshape(n, ho, wo, groups * points, 2).unbind(-1)
    x = x.view(wo, 1) + (grid_x + offset_x) * offset_scale
    y = y.view(ho, 1, 1) + (grid_y + offset_y) * offset_scale
    return x.view(n, ho, wo, groups, points), y.view(n, ho, wo, groups, points)


def sampling_locations(offset: Tensor, geometry: Geometry) -> Tensor:
    """`sampling_coordinates` as one tensor (N, Ho, Wo, groups, P, 2) of (x, y)."""
    return torch.stack(sampling_coordinates(offset, geometry), dim=-1)
