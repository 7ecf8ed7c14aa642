# SPDX-License-Identifier: MIT
"""The DCNv3 operator: its schema and the public function.

Defines `torch.ops.internimage.dcnv3` and `torch.ops.internimage.dcnv3_backward`. The plain-torch reference is
registered for every device; a compiled kernel, once loaded, takes precedence on its device.
"""

from collections.abc import Sequence

from torch import Tensor

from . import dcnv3_reference as reference
from .arguments import (
    as_pair,
    check_alike,
    check_channels,
    check_kernel,
    check_offset_scale,
    check_shapes,
    check_tensor,
)
from .registration import DifferentiableOperator, Reference, is_autocast_enabled
from .sampling import Geometry, output_size

# checks nothing; takes the arguments in the order of the schema: three tensors and the fields of `Geometry`
apply_dcnv3 = DifferentiableOperator(
    "dcnv3",
    tensors=("input", "offset", "mask"),
    arguments="int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups, float offset_scale, "
    "bool remove_center, bool softmax",
    output_shape=lambda input, offset, mask, *geometry: (
        input[0],
        *output_size(input[1:3], *geometry[:4]),
        input[3],
    ),
    reference=Reference(
        reference.dcnv3, reference.dcnv3_backward, reference.dcnv3_double_backward, reference.dcnv3_jvp
    ),
)


def dcnv3(
    input: Tensor,  # (N, H, W, C)
    offset: Tensor,  # (N, Ho, Wo, groups * P * 2)
    mask: Tensor,  # (N, Ho, Wo, groups * P)
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> Tensor:
    """Deformable convolution v3: modulated sampling at learned offsets. The operator has no weights.

    With P = kh * kw - remove_center sampling points per group, for output pixel o and the channels of group g::

        output[o, g] = sum_p  m[o, g, p] * bilinear(input[:, g], location[o, g, p])
        location     = o * stride - padding + center + (kernel_point_p + offset[o, g, p]) * offset_scale

    where center = dilation * (kernel_size - 1) // 2, kernel points are relative to the center, and m is `mask`, or its
    softmax over the P points with `softmax=True`. Pixels outside the image are zero. A location that is not strictly
    inside (-1, W) x (-1, H), or not finite, contributes nothing and gets no gradient. (Wang et al., "InternImage:
    Exploring Large-Scale Vision Foundation Models with Deformable Convolutions", CVPR 2023, equation 2.)

    Differentiable any number of times in all three tensors; works under autocast (which casts all three to its dtype),
    `torch.compile`, `torch.export`, the transforms of `torch.func` (`grad`, `vjp`, `jvp`, `jacrev`, `jacfwd`,
    `hessian`, `vmap`) and in forward mode.

    Args:
        input: (N, H, W, C), channels last. float64, float32, bfloat16 or float16; the 16-bit types accumulate in
            float32. N may be 0.
        offset: (N, Ho, Wo, groups * P * 2), in pixels: group-major, then point, then (x, y). The points are in
            x-major order: all rows of the leftmost kernel column first. Dtype and device of `input`.
        mask: (N, Ho, Wo, groups * P): group-major, then point. Weights, or logits with `softmax=True`.
        kernel_size: Kernel (height, width), or one int for both.
        stride: Step between output pixels.
        padding: Rows and columns of zeros around the image; not limited by the kernel size.
        dilation: Distance between neighboring kernel points.
        groups: Number of groups, each with its own offsets and mask; divides C.
        offset_scale: Factor on the kernel grid and on the offsets.
        remove_center: Omit the center point; both kernel sides must be odd.
        softmax: `mask` holds logits, normalized over the P points of a group (in float32 for the 16-bit types).

    Returns:
        (N, Ho, Wo, C) with `Ho = (H + 2 * padding - dilation * (kh - 1) - 1) // stride + 1`, Wo likewise.

    Raises:
        TypeError: An argument has the wrong type, or a tensor a wrong dtype.
        ValueError: An argument is out of range, or a tensor has a wrong rank, shape or device.
    """
    tensors = {"input": input, "offset": offset, "mask": mask}
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    check_alike(tensors, not is_autocast_enabled(input.device.type))
    check_channels(input.shape[3], groups)
    check_offset_scale(offset_scale)
    geometry = Geometry(
        as_pair(kernel_size, "kernel_size", 1),
        as_pair(stride, "stride", 1),
        as_pair(padding, "padding", 0),
        as_pair(dilation, "dilation", 1),
        groups,
        float(offset_scale),
        bool(remove_center),
        bool(softmax),
    )
    check_kernel(geometry.kernel_size, geometry.remove_center)
    check_shapes(input, offset, mask, geometry)
    return apply_dcnv3(input, offset, mask, *geometry)
