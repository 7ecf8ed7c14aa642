# SPDX-License-Identifier: MIT
"""The columns of deformable convolution v1 and v2: what its weight is multiplied with.

Defines `torch.ops.internimage.deform_columns` and `deform_columns_backward`. For output pixel o and each point p of the
kernel, row by row, with the offsets and the mask of its channel's offset group::

    columns[o, p] = mask[o, p] * bilinear(input, o * stride - padding + p * dilation + offset[o, p])

Shapes, all channels last: input (N, H, W, C); offset (N, Ho, Wo, groups * P * 2), group-major, then point, then (y, x);
mask (N, Ho, Wo, groups * P); columns (N, Ho, Wo, P * C), point by point. What is outside the image is as in `dcnv3`.
"""

from . import deform_columns_reference as reference
from .registration import DifferentiableOperator, Reference
from .sampling import num_points, output_size

# checks nothing; takes the arguments in the order of the schema
apply_deform_columns = DifferentiableOperator(
    "deform_columns",
    tensors=("input", "offset", "mask"),
    arguments="int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int offset_groups",
    output_shape=lambda input, offset, mask, kernel_size, *window_and_groups: (
        input[0],
        *output_size(input[1:3], kernel_size, *window_and_groups[:3]),
        num_points(kernel_size) * input[3],
    ),
    reference=Reference(reference.forward, reference.backward, reference.double_backward, reference.jvp),
)
