# SPDX-License-Identifier: MIT
"""Deformable convolution v1 and v2: locations at pixels, at the border, outside of the image and nowhere."""

import math

import deform_oracle
import pytest
import torch
from conftest import DEVICES
from deform_oracle import Problem, assert_all_close

from internimage.ops import deform_conv2d

HALF = [torch.bfloat16, torch.float16]

on_devices = pytest.mark.parametrize("device", DEVICES)


def one_sample(y: float, x: float, device="cpu", image=None, dtype=torch.float64, mask=2.0) -> tuple:
    """Output and gradients for grad_output 1 of one sample at (y, x) of a 3 x 4 image with one channel; weight 1."""
    if image is None:
        image = torch.tensor([[3.0, 5.0, 11.0, 2.0], [7.0, 1.0, 4.0, 13.0], [6.0, 17.0, 9.0, 8.0]], dtype=dtype)
    height, width = image.shape
    offset = torch.full((1, 2, height, width), -99.0, dtype=torch.float64)  # the other output pixels sample nothing
    offset[0, :, 0, 0] = torch.tensor([y, x])
    masks = torch.full((1, 1, height, width), mask, dtype=dtype)
    grad_output = torch.zeros(1, 1, height, width, dtype=dtype)
    grad_output[0, 0, 0, 0] = 1.0
    weight = torch.ones(1, 1, 1, 1, dtype=dtype)
    problem = Problem(image.view(1, 1, height, width), offset.to(dtype), weight, None, masks, grad_output)
    found = problem.map(lambda t: t.to(device)).differentiate(deform_conv2d)
    assert not found["output"].flatten()[1:].any()
    return (
        found["output"][0, 0, 0, 0].item(),
        found["input"].view(height, width).cpu(),
        found["offset"][0, :, 0, 0].tolist(),
        found["mask"][0, 0, 0, 0].item(),
        found["weight"].item(),
    )


@on_devices
def test_between_pixels(device):
    # 0.75 * (0.5 * 5 + 0.5 * 11) + 0.25 * (0.5 * 1 + 0.5 * 4), times the mask's 2
    output, grad_input, grad_offset, grad_mask, grad_weight = one_sample(0.25, 1.5, device)
    assert (output, grad_weight) == (2 * 6.625, 2 * 6.625) and grad_mask == 6.625
    assert grad_offset == [2 * (2.5 - 8), 2 * (0.75 * 6 + 0.25 * 3)]
    assert grad_input.tolist() == [[0, 0.75, 0.75, 0], [0, 0.25, 0.25, 0], [0, 0, 0, 0]]


@on_devices
def test_the_derivative_at_a_pixel_center_is_the_right_hand_one(device):
    output, grad_input, grad_offset, *_ = one_sample(1.0, 1.0, device)
    assert output == 2.0 and grad_offset == [2 * (17 - 1), 2 * (4 - 1)]
    assert grad_input[1, 1] == 2.0 and grad_input.sum() == 2.0
    assert one_sample(2.0, 3.0, device)[2] == [-2 * 8, -2 * 8]  # at the last pixel, toward the outside


def assert_nothing(output, grad_input, grad_offset, grad_mask, grad_weight) -> None:
    assert (output, grad_offset, grad_mask, grad_weight) == (0.0, [0.0, 0.0], 0.0, 0.0) and not grad_input.any()


BORDER = [(1.0, -1.0), (-1.0, 1.0), (1.0, 4.0), (3.0, 1.0), (-1.0, -1.0), (3.0, 4.0)]


@on_devices
@pytest.mark.parametrize("location", BORDER)
def test_the_border_itself_is_outside(location, device):
    """At exactly -1 and exactly the height or width; at -1 torchvision has the gradient of the inside."""
    assert_nothing(*one_sample(*location, device))


@on_devices
@pytest.mark.parametrize("location", [(-1 + 2**-10, 1.0), (1.0, -1 + 2**-10), (3 - 2**-10, 1.0), (1.0, 4 - 2**-10)])
def test_just_inside_the_border_counts(location, device):
    output, grad_input, grad_offset, grad_mask, grad_weight = one_sample(*location, device)
    assert 0 < output == grad_weight < 0.05 and 0 < grad_mask < 0.05
    assert any(abs(g) >= 2 for g in grad_offset)
    assert grad_input.sum() == 2 * 2**-10


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_locations_that_are_nowhere(value, dtype, device):
    """torchvision ends the process at a NaN."""
    for location in ((value, 1.0), (1.0, value), (value, value)):
        assert_nothing(*one_sample(*location, device, dtype=dtype))


@on_devices
@pytest.mark.parametrize("mask", [math.nan, math.inf])
def test_the_mask_of_a_point_outside_does_not_matter(mask, device):
    for location in (*BORDER, (math.nan, 1.0), (-7.0, 1.0)):
        assert_nothing(*one_sample(*location, device, mask=mask))


@on_devices
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_pixel_that_is_not_sampled_does_not_matter(value, device):
    image = torch.full((3, 4), value, dtype=torch.float64)
    for location in (*BORDER, (math.nan, math.nan), (-7.0, -7.0), (9.0, 9.0)):  # all pixels beside them are infinite
        assert_nothing(*one_sample(*location, device, image))
    image[:2, :2] = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    output, _, grad_offset, grad_mask, grad_weight = one_sample(0.5, 0.5, device, image)
    assert (output, grad_mask, grad_weight, grad_offset) == (2 * 2.75, 2.75, 2 * 2.75, [5.0, 3.0])
    output, _, grad_offset, grad_mask, _ = one_sample(-0.5, -0.5, device, image)  # three of the corners are outside
    assert (output, grad_mask, grad_offset) == (0.5, 0.25, [1.0, 1.0])


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e30])
def test_one_location_that_is_nowhere_leaves_the_others(value, dtype, device):
    """In whole calls; also with infinite numbers in the image, which points beside them must not meet."""
    problem = deform_oracle.draw(4, channels=6, out_channels=4, groups=2, offset_groups=3, padding=(1, 1))
    problem.offset.view(-1)[::7] = value
    results = problem.map(lambda t: t.to(device, dtype)).differentiate(deform_conv2d)
    assert_all_close(results, deform_oracle.output_and_gradients(problem))
    assert not results["offset"].view(-1)[::7].any()
