# SPDX-License-Identifier: MIT
"""Checks of operator arguments, with messages that name the argument, the value and what is allowed."""

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dtypes
from ..dtypes import torch_dtype
from .sampling import Geometry, Pair, num_points, output_size

FLOATING = tuple(map(torch_dtype, dtypes.FLOATING))


def as_pair(value: int | Sequence[int], name: str, minimum: int) -> Pair:
    """`value` as a (height, width) pair of ints.

    Raises:
        TypeError: It is neither an int nor a pair of ints.
        ValueError: Its length is not 2, or an entry is below `minimum`.
    """
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(values) != 2:
        raise ValueError(f"{name} must be an int or a (height, width) pair, got {len(values)} values: {value!r}")
    try:
        # operator.index and not isinstance: under dynamo the values may be symbolic ints. Not hasattr either, which
        # torch 2.10 cannot trace on them, and which float tensors and numpy arrays pass: their __index__ raises
        if isinstance(values[0], bool) or isinstance(values[1], bool):
            raise TypeError
        height, width = operator.index(values[0]), operator.index(values[1])
    except TypeError:
        given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.dim() else repr(value)
        raise TypeError(f"{name} must be an int or a (height, width) pair of ints, got {given}") from None
    if height < minimum or width < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    return height, width


def check_kernel(kernel_size: Pair, remove_center: bool) -> None:
    """Check that a kernel whose center is removed has a center, and other points.

    Raises:
        ValueError: With `remove_center`, for an even kernel side or a kernel of one point.
    """
    if remove_center and (kernel_size[0] % 2 == 0 or kernel_size[1] % 2 == 0):
        raise ValueError(
            f"remove_center needs a kernel_size with odd sides (an even side has no center), got {kernel_size}"
        )
    if num_points(kernel_size, remove_center) == 0:
        raise ValueError("remove_center leaves a 1x1 kernel without sampling points; use a larger kernel_size")


def check_count(value: int, name: str) -> int:
    """A positive number, as an int.

    Raises:
        TypeError: It is not an int.
        ValueError: It is not positive.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def check_channels(channels: int, groups: int) -> None:
    """Check that `groups` divides `channels`.

    Raises:
        TypeError: `groups` is not an int.
        ValueError: There are no channels, or `groups` is not positive or does not divide them.
    """
    if channels < 1:
        raise ValueError(f"input must have at least 1 channel, got {channels} channels")
    groups = check_count(groups, "groups")
    if channels % groups != 0:
        raise ValueError(f"groups must divide the channels of input: {channels} channels, {groups} groups")


def check_offset_scale(offset_scale: float) -> None:
    """Check that `offset_scale` is a finite number.

    Raises:
        TypeError: It is not a number.
        ValueError: It is NaN or infinite.
    """
    if isinstance(offset_scale, (str, bytes)) or not isinstance(offset_scale, (int, float)):
        raise TypeError(f"offset_scale must be a number, got {offset_scale!r}")
    if not abs(offset_scale) < math.inf:  # dynamo cannot trace math.isfinite on a symbolic float
        raise ValueError(f"offset_scale must be finite, got {offset_scale!r}")


def check_one_device(tensors: dict[str, Tensor]) -> None:
    """Check that the named tensors are on one device.

    Raises:
        ValueError: One is not on the device of the first.
    """
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name}, {first.device}, got {tensor.device}")


def check_tensor(name: str, tensor: object, axes: str = "batch, height, width, channels") -> None:
    """Check that an argument is a floating-point tensor.

    Args:
        name: Of the argument.
        tensor: Its value.
        axes: Names of the axes that it must have, separated by commas.

    Raises:
        TypeError: It is not a tensor, or its dtype is unsupported.
        ValueError: It has another number of axes.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")
    rank = axes.count(",") + 1
    if tensor.dim() != rank:
        expected = f"{rank} dimension{'s' * (rank > 1)}, ({axes})"
        raise ValueError(f"{name} must have {expected}, got {tensor.dim()}: {tuple(tensor.shape)}")


def check_alike(tensors: dict[str, Tensor], same_dtype: bool) -> None:
    """Check that the named tensors have one dtype and are on one device.

    Args:
        tensors: Name -> tensor.
        same_dtype: Require a single dtype. Otherwise float64 still does not mix with the others: autocast casts these
            to one dtype later, but leaves float64 alone.

    Raises:
        TypeError: The dtype of one is incompatible with that of the first.
        ValueError: One is not on the device of the first.
    """
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.dtype != first.dtype and (same_dtype or torch.float64 in (tensor.dtype, first.dtype)):
            raise TypeError(f"{name} must have the dtype of {first_name}, {first.dtype}, got {tensor.dtype}")
    check_one_device(tensors)


def check_fits(input_size: Pair, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """Check that a kernel fits the padded input, both as (height, width); returns the output's size.

    Raises:
        ValueError: It does not.
    """
    ho, wo = output_size(input_size, kernel_size, stride, padding, dilation)
    if ho < 1 or wo < 1:
        height, width = input_size
        raise ValueError(
            f"input of {height} x {width} pixels with padding {padding} is smaller than the "
            f"kernel: kernel_size {kernel_size}, dilation {dilation}"
        )
    return ho, wo


def check_shapes(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    geometry: Geometry,
) -> None:
    """Check that offset and mask have the shapes that follow from input and geometry.

    Raises:
        ValueError: The kernel does not fit the padded input, or a shape is wrong.
    """
    n, height, width, _ = input.shape
    ho, wo = check_fits((height, width), *geometry[:4])
    groups, points = geometry.groups, num_points(geometry.kernel_size, geometry.remove_center)
    for name, tensor, channels, formula in (
        ("offset", offset, groups * points * 2, "groups * points * 2"),
        ("mask", mask, groups * points, "groups * points"),
    ):
        expected = (n, ho, wo, channels)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} must have shape {expected} = (batch, output height, output width, {formula}), "
                f"got {tuple(tensor.shape)}"
            )
