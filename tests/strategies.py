# SPDX-License-Identifier: MIT
"""Hypothesis strategies for DCNv3: any geometry, with the smallest images that fit it and somewhat larger ones."""

import math

import oracle
import torch
from hypothesis import strategies as st


@st.composite
def problems(
    draw,
    most_images: int = 2,
    most_groups: int = 3,
    most_room: int = 3,
    group_channels: tuple[int, ...] = (1, 3, 8, 12, 16, 20),
) -> tuple[list[torch.Tensor], dict]:
    """Input, offset, mask and grad_output in float64, and the geometry; some offsets are huge, infinite or NaN.

    Args:
        most_images, most_groups: Maximum numbers of images and groups.
        most_room: Maximum height and width of an image, in excess of the smallest that fits.
        group_channels: Choices of the number of channels per group.
    """
    remove_center = draw(st.booleans())
    side = st.sampled_from([1, 3, 5] if remove_center else [1, 2, 3, 4, 5])
    kernel_size = draw(st.tuples(side, side).filter(lambda k: not remove_center or k != (1, 1)))
    pair = {low: st.tuples(st.integers(low, 3), st.integers(low, 3)) for low in (0, 1)}
    arguments = {
        "kernel_size": kernel_size,
        "stride": draw(pair[1]),
        "padding": draw(pair[0]),
        "dilation": draw(pair[1]),
        "groups": draw(st.integers(1, most_groups)),
        "offset_scale": draw(st.sampled_from([1.0, 2.0, 0.5, 1.5, 0.37, -1.0, 0.0])),
        "remove_center": remove_center,
        "softmax": draw(st.booleans()),
    }
    smallest = [
        max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel_size, arguments["padding"], arguments["dilation"])
    ]
    size = tuple(low + draw(st.integers(0, most_room)) for low in smallest)
    channels = draw(st.sampled_from(group_channels))
    seed, std = draw(st.integers(0, 2**16)), draw(st.sampled_from([0.0, 0.5, 2.0, 8.0]))
    tensors = oracle.draw(seed, draw(st.integers(1, most_images)), size, channels, std, **arguments)
    if draw(st.booleans()):
        offset = tensors[1].view(-1)
        for value in (math.nan, math.inf, -math.inf, 1e30, -1e30):
            offset[torch.randint(offset.numel(), (1,))] = value
    return tensors, arguments
