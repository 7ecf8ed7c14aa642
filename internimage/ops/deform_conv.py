# SPDX-License-Identifier: MIT
"""Deformable convolution v1 and v2: the schema and the public function.

Defines `torch.ops.internimage.deform_conv2d` and `torch.ops.internimage.deform_conv2d_backward`.
"""

from collections.abc import Sequence

from torch import Tensor

from . import deform_conv_reference as reference
from . import deform_conv_torchvision
from .arguments import as_pair, check_alike, check_fits, check_tensor
from .registration import DifferentiableOperator, Reference, is_autocast_enabled
from .sampling import Pair, output_size

# checks nothing; takes the arguments in the order of the schema. Ones stand for a mask that is not given, and zeros for
# a bias: an expanded one takes no memory, and is read from the cache
apply_deform_conv2d = DifferentiableOperator(
    "deform_conv2d",
    tensors=("input", "offset", "mask", "weight", "bias"),
    arguments="int[2] stride, int[2] padding, int[2] dilation, int groups, int offset_groups",
    output_shape=lambda input, offset, mask, weight, bias, *arguments: (
        input[0],
        weight[0],
        *output_size(input[2:], weight[2:], *arguments[:3]),
    ),
    reference=Reference(reference.forward, reference.backward, reference.double_backward, reference.jvp),
    batched=False,
    memory_format=reference.memory_format,
)

deform_conv_torchvision.register()

_IMAGES = "batch, channels, height, width"


def deform_conv2d(
    input: Tensor,  # (N, in_channels, H, W)
    offset: Tensor,  # (N, 2 * offset_groups * kh * kw, Ho, Wo)
    weight: Tensor,  # (out_channels, in_channels / groups, kh, kw)
    bias: Tensor | None = None,  # (out_channels,)
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,  # (N, offset_groups * kh * kw, Ho, Wo)
) -> Tensor:
    """Deformable convolution: v1 (Dai et al., "Deformable Convolutional Networks", ICCV 2017, equation 2), or with a
    mask v2 (Zhu et al., "Deformable ConvNets v2: More Deformable, Better Results", CVPR 2019, equation 1).

    Arguments and results are those of `torchvision.ops.deform_conv2d`. For output pixel o, with the kernel points p::

        output[o]      = bias + sum_p  weight[p] * mask[o, p] * bilinear(input, location[o, p])
        location[o, p] = o * stride - padding + p * dilation + offset[o, p]

    Pixels outside the image are zero. A location that is not strictly inside (-1, W) x (-1, H), or not finite,
    contributes nothing and gets no gradient.

    Differentiable any number of times in all tensors; works under autocast (which casts all to its dtype),
    `torch.compile`, `torch.export`, the transforms of `torch.func` and in forward mode. Training keeps no columns
    (samples of all points) between the passes. On a CPU our kernels sample; on CUDA and MPS torchvision's operator does
    the work where it can.

    Args:
        input: float64, float32, bfloat16 or float16. N may be 0.
        offset: In pixels: group-major, then kernel point, row by row, then (y, x). Dtype and device of `input`, like
            all others. Its channels give the number of offset groups, each of which serves adjacent input channels.
        weight: Its channels give the number of groups of the convolution, independent of the offset groups.
        bias: Added to each output channel.
        stride: Step between output pixels, as (vertical, horizontal) or one int, like the next two.
        padding: Rows and columns of zeros around the image.
        dilation: Distance between neighboring kernel points.
        mask: Factor of each sample: group-major, then kernel point.

    Returns:
        (N, out_channels, Ho, Wo) with `Ho = (H + 2 * padding - dilation * (kh - 1) - 1) // stride + 1`, Wo likewise;
        stored channels last if `input` is.

    Raises:
        TypeError: An argument has the wrong type, or a tensor a wrong dtype.
        ValueError: An argument is out of range, or a tensor has a wrong rank, shape or device.
    """
    check_tensor("input", input, _IMAGES)
    if offset is None and mask is not None:
        raise TypeError("a mask needs offsets: offset must be a torch.Tensor, got None; zeros sample the regular grid")
    check_tensor("offset", offset, _IMAGES)
    check_tensor("weight", weight, "output channels, channels of a group, height, width")
    tensors = {"input": input, "offset": offset, "weight": weight}
    if bias is not None:
        check_tensor("bias", bias, "output channels")
        tensors["bias"] = bias
    if mask is not None:
        check_tensor("mask", mask, _IMAGES)
        tensors["mask"] = mask
    under_autocast = is_autocast_enabled(input.device.type)
    check_alike(tensors, not under_autocast)
    window = as_pair(stride, "stride", 1), as_pair(padding, "padding", 0), as_pair(dilation, "dilation", 1)
    groups = _groups(input, weight, bias)
    out_channels, _, kh, kw = weight.shape
    size = check_fits((input.shape[2], input.shape[3]), (kh, kw), *window)
    offset_groups = _offset_groups(input, offset, kh * kw, size)
    points = offset_groups * kh * kw
    if mask is None:
        mask = offset.new_ones(points).view(1, -1, 1, 1).expand(input.shape[0], -1, *size)
    else:
        _check_shape("mask", mask, (input.shape[0], points, *size), "offset groups * kernel points")
    bias = weight.new_zeros(out_channels) if bias is None else bias
    return apply_deform_conv2d(input, offset, mask, weight, bias, *window, groups, offset_groups)


def _groups(input: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """The number of groups of the convolution."""
    channels, (out_channels, group_channels) = input.shape[1], weight.shape[:2]
    if min(weight.shape) < 1 or channels < 1:
        raise ValueError(
            f"input and weight must have channels, and weight kernel points, got {tuple(input.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if channels % group_channels != 0:
        raise ValueError(
            f"the channels of a group of weight must divide those of input: weight {tuple(weight.shape)} has "
            f"{group_channels}, input has {channels}"
        )
    groups = channels // group_channels
    if out_channels % groups != 0:
        raise ValueError(
            f"weight {tuple(weight.shape)} has {group_channels} of the {channels} channels of input, which makes "
            f"{groups} groups; they must divide its {out_channels} output channels"
        )
    if bias is not None and bias.shape[0] != out_channels:
        raise ValueError(
            f"bias must have shape ({out_channels},), a number for each output channel, got ({bias.shape[0]},)"
        )
    return groups


def _offset_groups(input: Tensor, offset: Tensor, points: int, size: Pair) -> int:
    """The number of offset groups, for an output of `size`."""
    n, channels, last = input.shape[0], offset.shape[1], offset.shape[3]
    formula = "2 * offset groups * kernel points"
    if tuple(offset.shape[:3]) == (n, *size) and last > 0 and last % (2 * points) == 0:
        _check_shape("offset", offset, (n, last, *size), formula)  # channels last
    if channels < 1 or channels % (2 * points) != 0:
        raise ValueError(
            f"offset must have {formula} channels, a multiple of {2 * points}, got {channels}: {tuple(offset.shape)}"
        )
    offset_groups = channels // (2 * points)
    if input.shape[1] % offset_groups != 0:
        raise ValueError(
            f"the offset groups must divide the channels of input: offset {tuple(offset.shape)} has {offset_groups} "
            f"groups of 2 * {points} channels, input has {input.shape[1]} channels"
        )
    _check_shape("offset", offset, (n, channels, *size), formula)
    return offset_groups


def _check_shape(name: str, t: Tensor, expected: tuple[int, ...], formula: str) -> None:
    if tuple(t.shape) == expected:
        return
    n, channels, height, width = expected
    hint = ""
    if tuple(t.shape) == (n, channels, width, height):
        hint = "; height and width are swapped"
    elif tuple(t.shape) == (n, height, width, channels):
        hint = "; it is channels last, as for dcnv3: permute(0, 3, 1, 2)"
    raise ValueError(
        f"{name} must have shape {expected} = (batch, {formula}, output height, output width), got "
        f"{tuple(t.shape)}{hint}"
    )
