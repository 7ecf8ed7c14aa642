# SPDX-License-Identifier: MIT
"""DCNv3 for any shape, dtype and memory layout, against the formula in float64; sizes at the edges of what there is.

The operators beneath the public function are called here, with whatever strides: the formula sees the same numbers.
"""

import itertools
import math
import os

import numpy as np
import oracle
import pytest
import strategies
import torch
from conftest import DEVICES, TOLERANCE, assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internimage.extension import has_kernel
from internimage.ops import dcnv3_reference as reference

OP, OP_BACKWARD = torch.ops.internimage.dcnv3, torch.ops.internimage.dcnv3_backward
NAMES = ("grad_input", "grad_offset", "grad_mask")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EXAMPLES = int(os.environ.get("INTERNIMAGE_TEST_EXAMPLES", 200))  # that hypothesis draws

on_devices = pytest.mark.parametrize("device", DEVICES)


def reverse_memory(t: torch.Tensor) -> torch.Tensor:
    return t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


def channels_first(t: torch.Tensor) -> torch.Tensor:
    return t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


def sliced(t: torch.Tensor) -> torch.Tensor:
    n, h, w, c = t.shape
    store = t.new_full((n, h, 2 * w + 1, c + 3), math.nan)
    store[:, :, 1::2, 2 : c + 2] = t
    return store[:, :, 1::2, 2 : c + 2]


def late(t: torch.Tensor) -> torch.Tensor:
    """Dense, beginning at an odd place of its memory: nothing is aligned to a vector."""
    store = torch.cat([t.new_full((3,), math.nan), t.reshape(-1)])
    return store[3:].view(t.shape)


def expanded(*axes: int):
    """One number for all of the axes: stride 0."""

    def make(t: torch.Tensor) -> torch.Tensor:
        part = t
        for axis in axes:
            part = part[(slice(None),) * axis + (slice(0, 1),)]
        return part.clone().expand(t.shape)

    return make


# what memory a tensor may have; those that expand change its numbers
LAYOUTS = {
    "dense": lambda t: t,
    "channels first": channels_first,
    "reversed": reverse_memory,
    "sliced": sliced,
    "late": late,
    "batch expanded": expanded(0),
    "rows expanded": expanded(1, 2),
    "channels expanded": expanded(3),
    "one number": expanded(0, 1, 2, 3),
}


@st.composite
def problems(draw, dtype: torch.dtype):
    """Input, offset, mask and grad_output in the dtype and in some layout, and the geometry."""
    tensors, arguments = draw(strategies.problems(3, 5, 6, (1, 2, 3, 4, 8, 12, 16, 20, 24, 32, 40)))
    names = [draw(st.sampled_from(list(LAYOUTS))) for _ in tensors]
    return [LAYOUTS[name](t.to(dtype)) for name, t in zip(names, tensors)], arguments


def schema(arguments: dict) -> tuple:
    """The arguments in the schema's order."""
    defaults = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    defaults |= {"offset_scale": 1.0, "remove_center": False, "softmax": False}
    return tuple({**defaults, **arguments}.values())


def assert_right(results, tensors, arguments) -> None:
    """Output and three gradients are those of the formula, but for rounding."""
    exact = [t.detach().cpu().double() for t in tensors]
    *inputs, grad_output = exact
    dtype = tensors[0].dtype
    expected = [oracle.differentiable(*inputs, **arguments), *oracle.gradients(grad_output, *inputs, **arguments)]
    sides = [expected[2]]
    for offset in oracle.either_side_of_pixel_centers(inputs[1], dtype, **arguments):
        sides.append(oracle.gradients(grad_output, inputs[0], offset, inputs[2], **arguments)[1])
    for name, result, right in zip(("output", *NAMES), results, expected):
        assert result.shape == right.shape and result.dtype == dtype, name
        # the numbers summed are of size 1: a lucky draw may leave nothing but a small part of one in sight
        allowed = TOLERANCE[dtype] * max(1.0, right.abs().max().item() if right.numel() else 0.0)
        value = result.detach().cpu().double()
        deviation = (value - right).abs()
        if name == "grad_offset":
            deviation = torch.stack([(value - side).abs() for side in sides]).amin(0)
        worst = deviation.max().item() if deviation.numel() else 0.0
        assert worst <= allowed, f"{name}: deviates by {worst:.2e}, allowed {allowed:.1e}"  # also false for NaN


def run(tensors, arguments, device="cpu") -> list[torch.Tensor]:
    """Output and gradients; the layouts survive the way to another device only in part, which is well enough there."""
    input, offset, mask, grad_output = (t.to(device) for t in tensors)
    output = OP(input, offset, mask, *schema(arguments))
    return [output, *OP_BACKWARD(grad_output, input, offset, mask, *schema(arguments), False, [True] * 3)]


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formula_in_any_layout(dtype, device):
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(problem=problems(dtype))
    def check(problem):
        assert_right(run(*problem, device), *problem)

    check()


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", range(4), ids=["input", "offset", "mask", "grad_output"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, which, dtype, device):
    """Every layout of every tensor, in a shape of whole vectors: what a fast path would take."""
    arguments = {"padding": (1, 1), "groups": 3, "softmax": True}
    tensors = [t.to(dtype) for t in oracle.draw(1, 2, (6, 9), 16, **arguments)]
    tensors[which] = LAYOUTS[layout](tensors[which])
    assert_right(run(tensors, arguments, device), tensors, arguments)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 33])
def test_batches(batch, dtype, device):
    arguments = {"padding": (1, 1), "stride": (2, 1), "groups": 2, "softmax": True}
    tensors = [t.to(dtype) for t in oracle.draw(2, batch, (5, 4), 12, **arguments)]
    assert_right(run(tensors, arguments, device), tensors, arguments)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 12, 16, 20, 257, 1024])
def test_one_pixel(channels, dtype, device):
    for arguments in ({"padding": (1, 1), "softmax": True}, {"kernel_size": (1, 1), "groups": 2}):
        tensors = [t.to(dtype) for t in oracle.draw(3, 2, (1, 1), channels, 0.6, **arguments)]
        assert_right(run(tensors, arguments, device), tensors, arguments)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("value", [1e30, -1e30, math.inf, -math.inf, math.nan])
def test_offsets_that_lead_nowhere(value, channels, dtype, device):
    """All of them, and every fifth of them, among points that are somewhere."""
    arguments = {"padding": (1, 1), "groups": 2}
    for step in (1, 5):
        tensors = oracle.draw(4, 1, (5, 7), channels, **arguments)
        tensors[1].view(-1)[::step] = value  # in float64: newer torch writes no number into float16 that it cannot hold
        tensors = [t.to(dtype) for t in tensors]
        results = run(tensors, arguments, device)
        assert_right(results, tensors, arguments)
        if step == 1:
            assert not any(result.any() for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reference_close_to_pixel_centers(dtype):
    """The allowance there is needed, enough and small: the derivative on the one side or the other, nothing else."""
    arguments = {"padding": (1, 1), "groups": 2, "offset_scale": 1.0}
    *inputs, grad_output = oracle.draw(5, 2, (6, 7), 4, **arguments)
    step = torch.finfo(dtype).eps * torch.randint(-3, 4, inputs[1].shape)
    tensors = [t.to(dtype) for t in (inputs[0], inputs[1].round() + step, inputs[2], grad_output)]
    geometry = schema(arguments)
    output = reference.dcnv3(*tensors[:3], *geometry)
    grads = list(reference.dcnv3_backward(tensors[3], *tensors[:3], *geometry, False, [True] * 3))
    assert_right([output, *grads], tensors, arguments)
    if dtype == torch.float32:  # where float64 sees both sides, float32 sees one
        exact = oracle.gradients(*(t.double() for t in (tensors[3], *tensors[:3])), **arguments)[1]
        assert (grads[1] - exact).abs().max() > 0.1
    grads[1] = grads[1] + 1e-2
    with pytest.raises(AssertionError, match="grad_offset"):
        assert_right([output, *grads], tensors, arguments)


# ---- past 2^31 elements


def lazy_zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Zeros that take memory only where they are written."""
    return torch.from_numpy(np.zeros(shape, np.uint16)).view(dtype)


def test_more_than_2_31_elements_of_input():
    """Pixels behind the 2^31st element are found: the first and the last of each image, and one in between."""
    n, side, channels = 3, 8192, 16
    input = lazy_zeros(n, side, side, channels)
    assert input.numel() > 2**31
    step = (side - 1) // 2  # 3 x 3 output pixels
    for image, row, column in itertools.product(range(n), (0, 1, 2), (0, 1, 2)):
        input[image, row * step, column * step] = image * 9 + row * 3 + column + torch.arange(channels) / 16
    offset = torch.zeros(n, 3, 3, 2, dtype=input.dtype)
    mask = torch.ones(n, 3, 3, 1, dtype=input.dtype)
    geometry = ((1, 1), (step, step), (0, 0), (1, 1), 1, 1.0, False, False)
    output = OP(input, offset, mask, *geometry)
    right = torch.arange(27.0).view(3, 3, 3, 1) + torch.arange(channels) / 16
    assert_close(output, right)
    *_, grad_mask = OP_BACKWARD(torch.ones_like(output), input, offset, mask, *geometry, False, [False, False, True])
    assert_close(grad_mask, right.sum(-1, keepdim=True))


@pytest.mark.skipif(
    not has_kernel("dcnv3", "cpu"),
    reason="needs the compiled CPU kernels: the reference has no such limit",
)
def test_an_image_past_the_32_bits_of_places_is_refused():
    """Places inside an image are kept in 32 bits; a view of one number is as large as it says, and takes no memory."""
    for height, width in ((46341, 46341), (3, 2**29)):
        input = torch.zeros(1, 1, 1, 1).expand(1, height, width, 1)
        offset, mask = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 1)
        with pytest.raises(RuntimeError, match=f"{height} x {width} pixels is too large"):
            OP(input, offset, mask, (1, 1), (height, width), (0, 0), (1, 1), 1, 1.0, False, False)


@pytest.mark.slow
def test_more_than_2_31_elements_of_grad_input():
    """Takes 14 GB."""
    n, side, channels = 3, 8192, 11
    input = lazy_zeros(n, side, side, channels)
    assert input.numel() > 2**31
    offset, mask = torch.zeros(n, 2, 2, 2, dtype=input.dtype), torch.ones(n, 2, 2, 1, dtype=input.dtype)
    geometry = ((1, 1), (side - 1, side - 1), (0, 0), (1, 1), 1, 1.0, False, False)
    grad = torch.arange(n * 4 * channels, dtype=torch.float32).view(n, 2, 2, channels).to(input.dtype)
    grad_input, *_ = OP_BACKWARD(grad, input, offset, mask, *geometry, False, [True, False, False])
    assert torch.equal(grad_input[:, :: side - 1, :: side - 1], grad)
    assert grad_input.count_nonzero() == grad.count_nonzero()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["output", "offset"])
def test_more_than_2_31_elements_of_what_is_asked_for(what):
    """A small image under a wide margin, and of the margin nothing: takes 10 GB."""
    padding = 700 if what == "output" else 16400
    channels = 1100 if what == "output" else 1
    side = 2 + 2 * padding
    input = torch.arange(1.0, 5.0, dtype=torch.bfloat16).view(1, 2, 2, 1).expand(1, 2, 2, channels)
    offset = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16).expand(1, side, side, 2)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16).expand(1, side, side, 1)
    output = OP(input, offset, mask, (1, 1), (1, 1), (padding, padding), (1, 1), 1, 1.0, False, False)
    assert (output if what == "output" else offset).numel() > 2**31
    assert torch.equal(output[:, padding : padding + 2, padding : padding + 2], input)
    assert output.count_nonzero() == input.numel()
