# SPDX-License-Identifier: MIT
"""DCNv3 from its formula, slow and in float64; independent of the package.

Both functions sum over all pixels with the weights `max(0, 1 - |x - px|) * max(0, 1 - |y - py|)`, while the package
gathers four corners. `forward` loops over scalars; `differentiable` is the same in torch operations, for autograd.
"""

import itertools
import math

import torch
from torch import Tensor


def output_size(size, kernel_size, stride, padding, dilation) -> tuple[int, int]:
    axes = zip(size, kernel_size, stride, padding, dilation)
    height, width = ((length + 2 * p - d * (k - 1) - 1) // s + 1 for length, k, s, p, d in axes)
    return height, width


def kernel_points(kernel_size, dilation, remove_center) -> list[tuple[int, int]]:
    """(x, y) of the kernel's points relative to the first one, without offsets, leftmost column first."""
    (kh, kw), (dh, dw) = kernel_size, dilation
    points = [(column * dw, row * dh) for column in range(kw) for row in range(kh)]
    if remove_center:
        points.remove((kw // 2 * dw, kh // 2 * dh))
    return points


def draw(
    seed: int,
    n: int,
    size: tuple[int, int],
    group_channels: int,
    offset_std: float = 1.5,
    *,
    kernel_size=(3, 3),
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups: int = 1,
    remove_center: bool = False,
    **_,
) -> list[Tensor]:
    """Input, offset, mask and grad_output for a geometry; float64."""
    generator = torch.Generator().manual_seed(seed)
    ho, wo = output_size(size, kernel_size, stride, padding, dilation)
    points = groups * len(kernel_points(kernel_size, dilation, remove_center))
    shapes = (n, *size, groups * group_channels), (n, ho, wo, points * 2), (n, ho, wo, points)
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in (*shapes, (n, ho, wo, shapes[0][3]))]
    tensors[1] *= offset_std
    return tensors


def forward(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_size=(3, 3),
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> Tensor:
    """DCNv3 in loops. No check for outside locations is needed: pixels at a distance of 1 or more have weight 0."""
    image, offset, mask = (t.detach().double().cpu().numpy() for t in (input, offset, mask))
    n, height, width, channels = image.shape
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel_size, stride, padding, dilation
    ho, wo = output_size((height, width), kernel_size, stride, padding, dilation)
    points = kernel_points(kernel_size, dilation, remove_center)
    center_x, center_y = dw * (kw - 1) // 2, dh * (kh - 1) // 2
    per_group = channels // groups
    output = torch.zeros(n, ho, wo, channels, dtype=torch.float64)
    result = output.numpy()
    for b, oy, ox, g in itertools.product(range(n), range(ho), range(wo), range(groups)):
        own = slice(g * per_group, (g + 1) * per_group)
        factors = [float(f) for f in mask[b, oy, ox, g * len(points) : (g + 1) * len(points)]]
        if softmax:
            factors = [math.exp(f - max(factors)) for f in factors]
            factors = [f / math.fsum(factors) for f in factors]
        for p, (point_x, point_y) in enumerate(points):
            at = (g * len(points) + p) * 2
            shift_x, shift_y = float(offset[b, oy, ox, at]), float(offset[b, oy, ox, at + 1])
            x = (ox * sw - pw + center_x) + (point_x - center_x + shift_x) * offset_scale
            y = (oy * sh - ph + center_y) + (point_y - center_y + shift_y) * offset_scale
            columns = [(px, 1 - abs(x - px)) for px in range(width)]
            columns = [(px, share) for px, share in columns if share > 0]  # never true for NaN
            for py in range(height):
                share_y = 1 - abs(y - py)
                if share_y > 0:
                    for px, share_x in columns:
                        result[b, oy, ox, own] += factors[p] * share_x * share_y * image[b, py, px, own]
    return output


def locations(
    offset: Tensor,
    kernel_size=(3, 3),
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    **_,
) -> tuple[Tensor, Tensor]:
    """x and y of every sample, (N, Ho, Wo, groups, P), float64."""
    n, ho, wo, _ = offset.shape
    points = kernel_points(kernel_size, dilation, remove_center)
    shifts = offset.double().reshape(n, ho, wo, groups, len(points), 2)
    result = []
    for axis, steps, shape in ((1, wo, (1, 1, wo, 1, 1)), (0, ho, (1, ho, 1, 1, 1))):  # x, then y
        center = dilation[axis] * (kernel_size[axis] - 1) // 2
        begin = torch.tensor([o * stride[axis] - padding[axis] + center for o in range(steps)]).view(shape)
        regular = torch.tensor([point[1 - axis] - center for point in points])
        result.append(begin + (regular + shifts[..., 1 - axis]) * offset_scale)
    return result[0], result[1]


def _tent(distance: Tensor) -> Tensor:
    """max(0, 1 - |distance|), whose derivative at the kinks is the right-hand one; 0 for NaN."""
    rising, falling = (distance >= -1) & (distance < 0), (distance >= 0) & (distance < 1)
    return torch.where(rising, 1 + distance, torch.where(falling, 1 - distance, 0))


def differentiable(input: Tensor, offset: Tensor, mask: Tensor, groups: int = 1, softmax: bool = False, **geometry):
    """DCNv3 for autograd, on the CPU. Locations at -1 or below are outside by definition and moved away."""
    n, height, width, channels = input.shape
    shares = []
    for location, length in zip(locations(offset, groups=groups, **geometry), (width, height)):
        location = torch.where(location > -1, location, -9.0)
        shares.append(_tent(location[..., None] - torch.arange(length)))
    factors = mask.double().reshape(shares[0].shape[:-1])
    factors = factors.softmax(-1) if softmax else factors
    image = input.double().reshape(n, height, width, groups, channels // groups)
    output = torch.einsum("nhwgp,nhwgpy,nhwgpx,nyxgc->nhwgc", factors, shares[1], shares[0], image)
    return output.reshape(*output.shape[:3], channels)


def gradients(grad_output: Tensor, input: Tensor, offset: Tensor, mask: Tensor, **arguments) -> tuple[Tensor, ...]:
    """Gradients of input, offset and mask, float64."""
    leaves = [t.detach().double().cpu().requires_grad_() for t in (input, offset, mask)]
    return torch.autograd.grad(differentiable(*leaves, **arguments), leaves, grad_output.double().cpu())


def off_the_grid(offset: Tensor, **geometry) -> Tensor:
    """The offset, changed so that no location is closer than 0.1 to an integer, where the interpolation has kinks."""
    moves = []
    for location in locations(offset, **geometry):
        inner = location.floor() + 0.1 + 0.8 * (location - location.floor())
        moves.append((inner - location) / geometry.get("offset_scale", 1.0))
    return offset + torch.stack(moves, dim=-1).reshape(offset.shape)


def either_side_of_pixel_centers(offset: Tensor, dtype: torch.dtype, **geometry) -> tuple[Tensor, Tensor]:
    """Two offsets, whose locations are on either side of the pixel centers that rounding may carry a location across.

    The derivative with respect to a location jumps at pixel centers. Coordinates are computed in float32 (float64 for
    float64), so if the exact coordinate is closer to an integer than the rounding error, the derivative of either side
    is correct. Compare the gradient of offset with the exact ones at both results, and let each element agree with
    either. All other elements of both are those of the offset itself.

    Args:
        offset: float64, with values that `dtype` can represent.
        dtype: Dtype of the implementation's tensors.
    """
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    scale = geometry.get("offset_scale", 1.0)
    below, above = [], []
    for location in locations(offset, **geometry):
        # several roundings: of offset + point, of the scale, of the product and of the sums
        reach = 8 * unit * (1 + location.abs() + (location.abs() + 8) * abs(scale))
        center = location.round()
        near = (location - center).abs() <= reach
        if scale == 0:  # the offset has no effect, and its gradient is 0 on both sides
            near = torch.zeros_like(near)
        for side, moves in ((-1, below), (1, above)):
            moves.append(torch.where(near, (center + side * 2 * reach - location) / (scale or 1.0), 0))
    return tuple(offset + torch.stack(moves, dim=-1).reshape(offset.shape) for moves in (below, above))
