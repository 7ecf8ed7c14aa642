# SPDX-License-Identifier: MIT
"""Checks of the model's arguments, before anything is allocated.

They come from Python, from `--model-kwargs` and from a folder's config.json, so a wrong one can be of any type. The
upper limits are far above any model in use; they keep a mistyped number from exhausting the memory.
"""

import math
import operator
from collections.abc import Iterable, Mapping
from numbers import Real
from reprlib import repr  # shortens, so that a message stays on one line whatever a file contains
from typing import Any

from ..layers.activation import activation_class

MOST_CLASSES = 10_000_000
_MOST_CHANNELS = 8192  # of the first stage; giant has 512
_MOST_BLOCKS = 1000  # of a stage, and of all four; giant has 48 and 56
_MOST_IMAGE_CHANNELS = 65536
_LARGEST_KERNEL = 255
_LARGEST_RATIO = 256


def check_whole_number(name: str, value: Any, least: int, most: int) -> None:
    """Raises ValueError unless `value` is an int from `least` to `most`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {repr(value)}")


def check_num_classes(num_classes: Any) -> None:
    """Raises ValueError unless it is a whole number from 0."""
    check_whole_number("num_classes", num_classes, 0, MOST_CLASSES)


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int larger than any float
        return False


def _whole_numbers(name: str, values: Any, least: int, most: int) -> None:
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, Mapping)):
        raise ValueError(f"{name} must be a sequence of whole numbers, got {repr(values)}")
    for value in values:
        check_whole_number(f"each of {name}", value, least, most)


def check_arguments(
    in_chans: Any,
    num_classes: Any,
    channels: Any,
    depths: Any,
    groups: Any,
    mlp_ratio: Any,
    layer_scale: Any,
    offset_scale: Any,
    dw_kernel_size: Any,
    stage3_post_norm_blocks: Any,
    cls_scale: Any,
    act_layer: Any,
    drop_rate: Any,
    drop_path_rate: Any,
    **switches: Any,
) -> None:
    """Check arguments of `InternImage`, named as there; `switches` are the booleans.

    Raises:
        ValueError: One is of another type, out of range, or does not fit another; the message names it.
    """
    check_whole_number("in_chans", in_chans, 1, _MOST_IMAGE_CHANNELS)
    check_num_classes(num_classes)
    check_whole_number("channels", channels, 2, _MOST_CHANNELS)
    if channels % 2:
        raise ValueError(f"channels must be even (the first convolution has half of them), got {channels}")
    _whole_numbers("depths", depths, 1, _MOST_BLOCKS)
    _whole_numbers("groups", groups, 1, 8 * _MOST_CHANNELS)
    if len(depths) != 4 or len(groups) != 4:
        raise ValueError(f"depths and groups must name four stages, got {repr(depths)} and {repr(groups)}")
    if sum(depths) > _MOST_BLOCKS:
        raise ValueError(f"depths must be at most {_MOST_BLOCKS} blocks together, got {repr(depths)}")
    for i, count in enumerate(groups):
        if channels * 2**i % count:
            raise ValueError(
                f"groups must divide the channels of their stage: stage {i + 1} has {channels * 2**i} channels and "
                f"{count} groups"
            )
    for name, ratio, width in (("mlp_ratio", mlp_ratio, channels), ("cls_scale", cls_scale, 8 * channels)):
        if not is_number(ratio) or not 0 < ratio <= _LARGEST_RATIO or int(width * ratio) < 1:
            raise ValueError(
                f"{name} must be a number above 0, at most {_LARGEST_RATIO}, that leaves a channel, got {repr(ratio)}"
            )
    if layer_scale is not None and not is_number(layer_scale):
        raise ValueError(f"layer_scale must be None or a finite number, got {repr(layer_scale)}")
    if not is_number(offset_scale):
        raise ValueError(f"offset_scale must be a finite number, got {repr(offset_scale)}")
    if dw_kernel_size is not None:
        sides = dw_kernel_size if isinstance(dw_kernel_size, (tuple, list)) else (dw_kernel_size,)
        _whole_numbers("dw_kernel_size", sides, 1, _LARGEST_KERNEL)
    _whole_numbers("stage3_post_norm_blocks", stage3_post_norm_blocks, 0, depths[2] - 1)
    if len(set(stage3_post_norm_blocks)) < len(tuple(stage3_post_norm_blocks)):
        raise ValueError(f"stage3_post_norm_blocks must name each block once, got {repr(stage3_post_norm_blocks)}")
    activation_class(act_layer)  # raises
    for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
        if not is_number(rate) or not 0 <= rate <= 1:
            raise ValueError(f"{name} must be a number from 0 to 1, got {repr(rate)}")
    for name, value in switches.items():
        if not isinstance(value, (bool, int)) or value not in (0, 1):
            raise ValueError(f"{name} must be true or false, got {repr(value)}")
    if switches.get("post_norm") and switches.get("res_post_norm"):
        raise ValueError("post_norm and res_post_norm exclude each other")


def check_head(num_classes: Any, global_pool: Any) -> None:
    """Check the classes and the pooling of `DCNResNet`; raises ValueError."""
    check_num_classes(num_classes)
    pools = ("avg", "max", "avgmax", "catavgmax", "")
    if global_pool not in pools:
        raise ValueError(f"global_pool must be one of {pools}, got {repr(global_pool)}")
    if num_classes > 0 and not global_pool:
        raise ValueError(f"global_pool='' gives a map, which has no classes: pass num_classes=0, not {num_classes}")


def check_resnet(
    block: Any,
    layers: Any,
    num_classes: Any,
    in_chans: Any,
    output_stride: Any,
    global_pool: Any,
    channels: Any,
    cardinality: Any,
    base_width: Any,
    rates: Mapping[str, Any],
    zero_init_last: Any,
) -> None:
    """Check arguments of `DCNResNet`, named as there; `rates` are those of dropout.

    Raises:
        ValueError: One is of another type, out of range, or does not fit another; the message names it.
    """
    if block not in ("basic", "bottleneck"):
        raise ValueError(f"block must be 'basic' or 'bottleneck', got {repr(block)}")
    _whole_numbers("layers", layers, 1, _MOST_BLOCKS)
    _whole_numbers("channels", channels, 1, 8 * _MOST_CHANNELS)
    if len(layers) != 4 or len(channels) != 4:
        raise ValueError(f"layers and channels must name four stages, got {repr(layers)} and {repr(channels)}")
    if sum(layers) > _MOST_BLOCKS:
        raise ValueError(f"layers must be at most {_MOST_BLOCKS} blocks together, got {repr(layers)}")
    check_head(num_classes, global_pool)
    check_whole_number("in_chans", in_chans, 1, _MOST_IMAGE_CHANNELS)
    if isinstance(output_stride, bool) or output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride must be 8, 16 or 32, got {repr(output_stride)}")
    check_whole_number("cardinality", cardinality, 1, _MOST_CHANNELS)
    check_whole_number("base_width", base_width, 1, _MOST_CHANNELS)
    if block == "basic" and (cardinality, base_width) != (1, 64):
        raise ValueError(
            f"basic blocks have cardinality 1 and base_width 64, got {cardinality} and {base_width}; bottlenecks can "
            f"have others"
        )
    if any(count * base_width < 64 for count in channels):
        raise ValueError(f"base_width must leave each stage a channel, got {base_width} for channels {repr(channels)}")
    for name, rate in rates.items():
        if not is_number(rate) or not 0 <= rate <= 1:
            raise ValueError(f"{name} must be a number from 0 to 1, got {repr(rate)}")
    if not isinstance(zero_init_last, (bool, int)) or zero_init_last not in (0, 1):
        raise ValueError(f"zero_init_last must be true or false, got {repr(zero_init_last)}")
