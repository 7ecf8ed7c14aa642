# SPDX-License-Identifier: MIT
"""The query of DCNv3, from which offset and mask are predicted, in one pass for inference::

    torch.ops.internimage.query(input, conv_weight, conv_bias, norm_weight, norm_bias, stride, padding, eps)
        = gelu(layer_norm(depthwise_conv(input)))

`input` is (N, H, W, C), the output (N, Ho, Wo, C); `conv_weight` is (C, 1, height, width), `conv_bias` (may be None),
`norm_weight` and `norm_bias` (C,), all of `input`'s dtype. Half types are computed in float32 and rounded once, at the
end. Defined on every device and not differentiable; faster than torch's operators only with the compiled CPU kernel.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import check_one_device
from .registration import library
from .sampling import output_size

library.define(
    "query(Tensor input, Tensor conv_weight, Tensor? conv_bias, Tensor norm_weight, Tensor norm_bias, "
    "int[2] stride, int[2] padding, float eps) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _query(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    eps: float,
) -> Tensor:
    dtype = torch.float32 if input.dtype.itemsize < 4 else input.dtype
    weight, bias = conv_weight.to(dtype), None if conv_bias is None else conv_bias.to(dtype)
    channels_first = input.to(dtype).permute(0, 3, 1, 2)
    x = F.conv2d(channels_first, weight, bias, tuple(stride), tuple(padding), groups=weight.shape[0])
    x = F.layer_norm(x.permute(0, 2, 3, 1), norm_weight.shape, norm_weight.to(dtype), norm_bias.to(dtype), eps)
    return F.gelu(x).to(input.dtype).contiguous()


library.impl("query", _query, "CompositeExplicitAutograd")


@torch.library.register_fake("internimage::query", lib=library)
def _fake(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    eps: float,
) -> Tensor:
    others = {"conv_weight": conv_weight, "norm_weight": norm_weight, "norm_bias": norm_bias}
    check_one_device({"input": input} | others | ({} if conv_bias is None else {"conv_bias": conv_bias}))
    n, height, width, channels = input.shape
    kernel: Sequence[int] = conv_weight.shape[2:]
    size = output_size((height, width), kernel, stride, padding, (1, 1))
    return input.new_empty((n, *size, channels))
