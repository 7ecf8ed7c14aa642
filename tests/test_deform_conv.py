# SPDX-License-Identifier: MIT
"""Deformable convolution v1 and v2: numbers against torchvision and the papers' equations, the edges, memory.

Derivatives of higher order and torch's transforms are in test_deform_conv_transforms.py.
"""

import inspect
import itertools
import math
import os

import deform_oracle
import pytest
import strategies
import torch
import torch.nn.functional as F
from conftest import DEVICES, TOLERANCE, assert_close
from deform_oracle import Problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internimage.ops import deform_conv2d
from internimage.ops import deform_conv_torchvision as other_kernels

EXAMPLES = int(os.environ.get("INTERNIMAGE_TEST_EXAMPLES", 100))  # that hypothesis draws
HALF = [torch.bfloat16, torch.float16]
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}

on_devices = pytest.mark.parametrize("device", DEVICES)


def stored(problem: Problem, memory_format: torch.memory_format) -> Problem:
    """The problem with its images and its weight in a memory format."""
    return problem.map(lambda t: t.contiguous(memory_format=memory_format) if t.dim() == 4 else t)


def assert_all_close(results: dict, expected: dict, tolerance: float | None = None, least: float = 0.0) -> None:
    """The largest deviation is within the tolerance, times the largest value or `least`."""
    assert results.keys() == expected.keys()
    for name, right in expected.items():
        result = results[name]
        assert result.shape == right.shape, f"{name}: {tuple(result.shape)}, expected {tuple(right.shape)}"
        if right.numel() == 0:
            continue
        deviation = (result.detach().double().cpu() - right.detach().double().cpu()).abs().max().item()
        limit = TOLERANCE[result.dtype] if tolerance is None else tolerance
        allowed = limit * max(least, right.abs().max().item())
        assert deviation <= allowed, f"{name}: deviates by {deviation:.2e}, allowed {allowed:.1e}"  # also false for NaN


# ---- the oracle


@pytest.mark.parametrize("seed", range(3))
def test_the_oracles_gradients_are_its_differences(seed):
    """The output is linear in each number alone, and in a coordinate inside a pixel: central differences are exact."""
    problem = deform_oracle.draw(
        seed, 1, (3, 4), 4, 2, (2, 2), groups=2, offset_groups=2, stride=(2, 1), padding=(1, 1), dilation=(1, 2)
    )
    step = 2.0**-4  # locations are at least 0.1 from the kinks
    for name, grad in deform_oracle.gradients(problem).items():
        flat = problem.tensors[name].view(-1)
        for at in torch.randperm(flat.numel())[:12].tolist():
            value = flat[at].item()
            sides = []
            for sign in (1, -1):
                flat[at] = value + sign * step
                sides.append((deform_oracle.forward(problem) * problem.grad_output).sum().item())
            flat[at] = value
            difference = (sides[0] - sides[1]) / (2 * step)
            assert grad.reshape(-1)[at].item() == pytest.approx(difference, rel=1e-10, abs=1e-10), (name, at)


@pytest.mark.parametrize("kernel_size", [(3, 3), (2, 4)], ids=str)
def test_without_offsets_it_is_a_convolution(kernel_size):
    """Both the oracle and the operator; whole offsets that are alike everywhere move the image."""
    window = {"stride": (2, 1), "padding": (2, 3), "dilation": (1, 2)}
    problem = deform_oracle.draw(0, 2, (7, 8), 6, 4, kernel_size, groups=2, offset_groups=3, mask=False, **window)
    for shift in (0, 1):
        problem.offset.fill_(shift)
        image = F.pad(problem.input, (0, shift, 0, shift))[:, :, shift:, shift:]
        # the moved image has lost its first row and column, which the padding before it would have shown
        problem.input[:, :, :shift] = problem.input[:, :, :, :shift] = 0
        expected = F.conv2d(image, problem.weight, problem.bias, groups=2, **window)
        assert_close(deform_oracle.forward(problem), expected, 1e-13)
        assert_close(problem.call(deform_conv2d), expected)


# ---- the peer


def test_arguments_are_torchvisions():
    from torchvision.ops import deform_conv2d as peer  # here, so that the other tests run without torchvision

    ours, theirs = (inspect.signature(function).parameters for function in (deform_conv2d, peer))
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        default = parameter.default
        pairs = (default, default[0]) if isinstance(default, tuple) else (default,)
        assert ours[name].default in pairs and ours[name].kind is parameter.kind, name


# dtype -> deviation from torchvision in float64 on the same numbers, relative to the largest result and at least 1: of
# all samples a draw may leave but a small share of one pixel in sight, whose error is still that of its location.
# float32: images have fewer than 16 rows and columns, so each of the three roundings in a location is at most 2^-21 =
# 5e-7 pixels; the sums, of at most some hundred products, add a few 2^-24 of their terms. Locations stay 0.1 pixels
# away from the pixels, where a rounded one could have the derivative of the other side.
PEER = {torch.float64: 1e-11, torch.float32: 1e-5}


@on_devices
@pytest.mark.parametrize("dtype", PEER, ids=str)
def test_torchvision(dtype, device):
    from torchvision.ops import deform_conv2d as peer

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(problem=strategies.deform_problems(nowhere=False), memory_format=st.sampled_from(list(FORMATS.values())))
    def check(problem, memory_format):
        problem = stored(problem.map(lambda t: t.to(dtype)), memory_format)
        results = problem.map(lambda t: t.to(device)).differentiate(deform_conv2d)
        assert {t.dtype for t in results.values()} == {dtype}
        assert_all_close(results, problem.map(torch.Tensor.double).differentiate(peer), PEER[dtype], least=1.0)

    check()


@pytest.mark.parametrize("mask", [False, True])
def test_torchvision_at_whole_offsets(mask):
    """Where a location is exactly -1, torchvision differs in the gradient of the offset alone: see the oracle."""
    from torchvision.ops import deform_conv2d as peer

    problem = deform_oracle.draw(1, size=(6, 7), offset_groups=2, groups=2, mask=mask, padding=(1, 1))
    problem.offset.round_()
    results, expected = (problem.differentiate(function, offset=False) for function in (deform_conv2d, peer))
    assert_all_close(results, expected, PEER[torch.float64])


@on_devices
@pytest.mark.parametrize("groups, offset_groups", [(1, 1), (4, 2)])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_torchvision_with_large_batches(memory_format, groups, offset_groups, device):
    """Columns of 5 images of 16 x 16 x 64 take 6 MB in float64: more than are made at once."""
    from torchvision.ops import deform_conv2d as peer

    problem = deform_oracle.draw(2, 5, (16, 16), 64, 8, groups=groups, offset_groups=offset_groups, padding=(1, 1))
    problem = stored(problem, FORMATS[memory_format])
    results = problem.map(lambda t: t.to(device)).differentiate(deform_conv2d)
    assert_all_close(results, problem.differentiate(peer), PEER[torch.float64])


# ---- the equations, where torchvision cannot follow


@on_devices
@settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(problem=strategies.deform_problems(), memory_format=st.sampled_from(list(FORMATS.values())))
def test_formula(problem, memory_format, device):
    results = stored(problem, memory_format).map(lambda t: t.to(device)).differentiate(deform_conv2d)
    assert_all_close(results, deform_oracle.output_and_gradients(problem), 1e-11, least=1.0)


# ---- torchvision's kernels by our rules, as on CUDA and MPS; they are here on a CPU, where ours serve otherwise


def by_other_kernels(problem: Problem, wanted=(True,) * 5) -> dict:
    mask = torch.ones_like(problem.offset[:, ::2]) if problem.mask is None else problem.mask
    bias = torch.zeros_like(problem.weight[:, 0, 0, 0]) if problem.bias is None else problem.bias
    tensors = problem.input, problem.offset, mask, problem.weight, bias
    groups = problem.input.shape[1] // problem.weight.shape[1]
    arguments = problem.stride, problem.padding, problem.dilation, groups, problem.offset_groups
    output = other_kernels.forward(*tensors, *arguments)
    grads = other_kernels.backward(problem.grad_output, *tensors, *arguments, False, list(wanted))
    grads = dict(zip(("input", "offset", "mask", "weight", "bias"), grads, strict=True))
    return {"output": output, **{name: grads[name] for name in problem.tensors}}


@settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(problem=strategies.deform_problems(), memory_format=st.sampled_from(list(FORMATS.values())))
def test_other_kernels(problem, memory_format):
    results = by_other_kernels(stored(problem, memory_format))
    assert_all_close(results, deform_oracle.output_and_gradients(problem), 1e-11, least=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_other_kernels_in_other_dtypes(memory_format, dtype):
    problem = deform_oracle.draw(3, 2, (7, 8), 20, 6, padding=(1, 1), offset_groups=2).map(lambda t: t.to(dtype))
    results = by_other_kernels(stored(problem, FORMATS[memory_format]))
    assert results["output"].is_contiguous(memory_format=FORMATS[memory_format])
    assert {t.dtype for t in results.values()} == {dtype}
    assert_all_close(results, deform_oracle.output_and_gradients(problem))


def test_other_kernels_leave_out_what_is_not_wanted_or_not_there():
    problem = deform_oracle.draw(3, padding=(1, 1))
    problem.offset.view(-1)[::5] = math.nan
    problem.mask.view(-1)[::3] = math.inf
    expected = deform_oracle.output_and_gradients(problem)
    found = by_other_kernels(problem, (False, True, False, False, True))
    assert [found[name].numel() for name in ("input", "mask", "weight")] == [0, 0, 0]
    for name in ("output", "offset", "bias"):
        assert torch.equal(found[name].isfinite(), expected[name].isfinite())
    empty = by_other_kernels(deform_oracle.draw(3, 0, padding=(1, 1)))
    assert empty["output"].shape == (0, 6, 5, 6)


# ---- half types


@on_devices
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("changes", [{}, {"groups": 2, "offset_groups": 4}, {"mask": False, "bias": False}], ids=str)
def test_half(changes, memory_format, dtype, device):
    """Against the equations in float64 on the rounded numbers: besides the results only the columns are rounded."""
    problem = deform_oracle.draw(3, 2, (7, 8), 20, 6, padding=(1, 1), **changes).map(lambda t: t.to(dtype))
    results = stored(problem, FORMATS[memory_format]).map(lambda t: t.to(device)).differentiate(deform_conv2d)
    assert {t.dtype for t in results.values()} == {dtype}
    assert_all_close(results, deform_oracle.output_and_gradients(problem))


@on_devices
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_coordinates_are_float32(dtype, device):
    """At column 600 a half type cannot represent quarter pixels; float32 can."""
    ramp = torch.arange(700.0).remainder(7)
    offset = torch.tensor([0.0, 0.25]).view(1, 2, 1, 1).expand(1, 2, 1, 700)
    image, offset, weight = (t.to(device, dtype) for t in (ramp.view(1, 1, 1, 700), offset, torch.ones(1, 1, 1, 1)))
    expected = 0.75 * ramp + 0.25 * torch.cat([ramp[1:], torch.zeros(1)])
    assert_close(deform_conv2d(image, offset, weight).flatten(), expected)


# ---- semantics of a location


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


# ---- shapes


@on_devices
@pytest.mark.parametrize(
    "size, changes",
    [
        ((1, 1), {"padding": (1, 1)}),
        ((1, 1), {"padding": (3, 3), "dilation": (3, 3), "offset_groups": 2}),
        ((1, 1), {"kernel_size": (1, 1), "groups": 2}),
        ((1, 6), {"padding": (1, 1), "groups": 2}),
        ((6, 1), {"padding": (7, 9), "kernel_size": (2, 2)}),
        ((5, 6), {"channels": 1, "out_channels": 1}),
        ((5, 6), {"channels": 6, "out_channels": 12, "groups": 6, "offset_groups": 6}),
        ((5, 6), {"kernel_size": (1, 6), "offset_groups": 4}),
    ],
    ids=str,
)
def test_unusual_shapes(size, changes, device):
    problem = deform_oracle.draw(5, 2, size, **changes)
    results = problem.map(lambda t: t.to(device)).differentiate(deform_conv2d)
    assert_all_close(results, deform_oracle.output_and_gradients(problem), 1e-11, least=1.0)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"groups": 2, "offset_groups": 2, "mask": False}], ids=str)
def test_empty_batch(changes, dtype, device):
    problem = deform_oracle.draw(6, 0, padding=(1, 1), stride=(2, 2), **changes).map(lambda t: t.to(device, dtype))
    results = problem.differentiate(deform_conv2d)
    assert results["output"].shape == (0, 6, 3, 3)
    for name, t in problem.tensors.items():
        assert results[name].shape == t.shape and not results[name].any()
    leaves = {name: t.detach().requires_grad_() for name, t in problem.tensors.items()}
    first = torch.autograd.grad(problem.call(deform_conv2d, **leaves).sum(), list(leaves.values()), create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), list(leaves.values()), materialize_grads=True)
    assert [g.shape for g in second] == [t.shape for t in problem.tensors.values()]


@on_devices
def test_arguments_as_ints_lists_and_pairs(device):
    problem = deform_oracle.draw(7, size=(7, 8), stride=(2, 2), padding=(1, 1), dilation=(2, 2))
    expected = deform_oracle.forward(problem)
    tensors = [t.to(device) for t in (problem.input, problem.offset, problem.weight, problem.bias)]
    mask = problem.mask.to(device)
    for window in ((2, 1, 2), ([2, 2], [1, 1], [2, 2]), ((2, 2), 1, [2, 2])):
        assert_close(deform_conv2d(*tensors, *window, mask), expected)


# ---- layouts and dtypes of results


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_memory_format_and_dtype_of_the_result(memory_format, groups, dtype, device):
    """Contiguous in, contiguous out; channels last in, channels last out: also of a result that needs no gradient."""
    problem = deform_oracle.draw(8, 2, (5, 6), 4, 6, groups=groups, padding=(1, 1)).map(lambda t: t.to(device, dtype))
    problem = stored(problem, FORMATS[memory_format])
    with torch.no_grad():
        output = problem.call(deform_conv2d)
    for result in (output, problem.differentiate(deform_conv2d)["output"]):
        assert result.dtype == dtype and result.is_contiguous(memory_format=FORMATS[memory_format])
    assert problem.differentiate(deform_conv2d)["input"].is_contiguous(memory_format=FORMATS[memory_format])


# a tensor to take a view of, and the view of it
VIEWS = {
    "channels last": (lambda t: t.movedim(1, -1).contiguous(), lambda t: t.movedim(-1, 1)),
    "every other row": (lambda t: t.repeat_interleave(2, dim=2), lambda t: t[:, :, ::2]),
    "part of the channels": (lambda t: torch.cat([t, t + 1], dim=1), lambda t: t[:, : t.shape[1] // 2]),
    "batch expanded": (lambda t: t[:1].clone(), lambda t: t.expand(2, -1, -1, -1)),
    "begins late": (lambda t: torch.cat([t[:1], t]), lambda t: t[1:]),
}


@on_devices
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("which", ["input", "offset", "mask", "weight", "grad_output"])
def test_strides(which, view, device):
    problem = deform_oracle.draw(9, 2, (5, 6), 4, 2, groups=2, offset_groups=2, padding=(1, 1), stride=(2, 1))
    store, make = VIEWS[view]
    tensors = {**problem.tensors, "grad_output": problem.grad_output}
    tensors[which] = make(store(tensors[which]))
    problem = Problem(**tensors, **problem.window)
    on_device = {name: t.to(device) for name, t in tensors.items()}
    on_device[which] = make(store(tensors[which].to(device)))
    assert on_device[which].storage_offset() or not on_device[which].is_contiguous()
    results = Problem(**on_device, **problem.window).differentiate(deform_conv2d)
    assert_all_close(results, deform_oracle.output_and_gradients(problem))


def test_offset_and_mask_as_thirds_of_one_map():
    """As the layers predict them; gradients go back into the map."""
    problem = deform_oracle.draw(10, offset_groups=2, padding=(1, 1))
    packed = torch.cat([problem.offset, problem.mask], 1).contiguous(memory_format=torch.channels_last).requires_grad_()
    output = problem.call(deform_conv2d, offset=packed[:, :36], mask=packed[:, 36:])
    output.backward(problem.grad_output)
    expected = deform_oracle.output_and_gradients(problem)
    assert_close(output, expected["output"])
    assert_close(packed.grad, torch.cat([expected["offset"], expected["mask"]], 1))


@pytest.mark.parametrize("name", ["bias", "mask"])
def test_what_is_not_given_is_zeros_or_ones(name):
    given = deform_oracle.draw(11, groups=2, offset_groups=2, padding=(1, 1))
    given.tensors[name].fill_(0 if name == "bias" else 1)
    missing = Problem(**{**given.__dict__, name: None})
    expected = given.differentiate(deform_conv2d)
    del expected[name]
    assert_all_close(missing.differentiate(deform_conv2d), expected, 1e-13)


# ---- which gradients, threads, memory


@on_devices
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("needed", [w for w in itertools.product([False, True], repeat=5) if any(w)], ids=str)
def test_gradients_of_some(needed, memory_format, device):
    problem = stored(deform_oracle.draw(12, 1, (4, 5), padding=(1, 1)), FORMATS[memory_format])
    wanted = dict(zip(deform_oracle.TENSORS, needed))
    results = problem.map(lambda t: t.to(device)).differentiate(deform_conv2d, **wanted)
    expected = deform_oracle.output_and_gradients(problem)
    assert_all_close(results, {name: t for name, t in expected.items() if wanted.get(name, True)})


@on_devices
def test_sum_backward(device):
    """The gradient of a sum is one number, expanded to the output's shape."""
    problem = deform_oracle.draw(13, padding=(1, 1))
    leaves = {name: t.to(device).requires_grad_() for name, t in problem.tensors.items()}
    problem.call(deform_conv2d, **leaves).sum().backward()
    ones = Problem(**{**problem.__dict__, "grad_output": torch.ones_like(problem.grad_output)})
    assert_all_close({name: leaf.grad for name, leaf in leaves.items()}, deform_oracle.gradients(ones))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("n", [1, 5])
def test_threads_do_not_change_a_bit(n, groups, dtype):
    problem = deform_oracle.draw(14, n, (14, 15), 64, 32, groups=groups, offset_groups=2, padding=(1, 1))
    problem = problem.map(lambda t: t.to(dtype))
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(problem.differentiate(deform_conv2d))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, t in results[0].items():
            assert torch.equal(t, other[name]), name


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("groups", [1, 4])
def test_training_keeps_no_columns(groups, memory_format, dtype, device):
    """What is kept for the backward pass are the tensors themselves, and the ones and zeros of what was not given."""
    problem = deform_oracle.draw(15, 2, (10, 11), 32, 8, groups=groups, padding=(1, 1))
    problem = stored(problem.map(lambda t: t.to(device, dtype)), FORMATS[memory_format])
    kept = {}  # address -> bytes, as two may be views of one
    own = {t.untyped_storage().data_ptr() for t in problem.tensors.values()}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        leaves = {name: t.detach().requires_grad_() for name, t in problem.tensors.items()}
        output = problem.call(deform_conv2d, **leaves)
    output.backward(problem.grad_output)
    columns = 9 * problem.input.numel() * problem.input.element_size()
    assert sum(kept.values()) <= problem.input.nbytes < columns / 8
