# SPDX-License-Identifier: MIT
"""Hypothesis strategies for operators that sample: any geometry, with the smallest images that fit it and somewhat
larger ones."""

import math

import deform_oracle
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


@st.composite
def deform_problems(draw, nowhere: bool = True, most_room: int = 5) -> deform_oracle.Problem:
    """Of deformable convolution v1 or v2, float64.

    Args:
        nowhere: Also offsets of zero, at the border of the image, huge, infinite or NaN. Otherwise no location is at a
            kink of the interpolation, and all are finite.
        most_room: Maximum height and width of an image, in excess of the smallest that fits.
    """
    side = st.integers(1, 4)
    pair = {low: st.tuples(st.integers(low, 3), st.integers(low, 3)) for low in (0, 1)}
    kernel_size = draw(st.tuples(side, side))
    window = {"stride": draw(pair[1]), "padding": draw(pair[0]), "dilation": draw(pair[1])}
    smallest = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel_size, window["padding"], window["dilation"])]
    groups, offset_groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    problem = deform_oracle.draw(
        draw(st.integers(0, 2**16)),
        n=draw(st.integers(1, 2)),
        size=tuple(low + draw(st.integers(0, most_room)) for low in smallest),
        channels=math.lcm(groups, offset_groups) * draw(st.sampled_from([1, 2, 3, 5])),
        out_channels=groups * draw(st.integers(1, 3)),
        kernel_size=kernel_size,
        groups=groups,
        offset_groups=offset_groups,
        offset_std=draw(st.sampled_from([0.5, 2.0, 8.0])),
        bias=draw(st.booleans()),
        mask=draw(st.booleans()),
        **window,
    )
    if nowhere and draw(st.booleans()):
        problem.offset.round_()
    if nowhere and draw(st.booleans()):
        for value in (math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0):
            problem.offset.view(-1)[torch.randint(problem.offset.numel(), (2,))] = value
    return problem
