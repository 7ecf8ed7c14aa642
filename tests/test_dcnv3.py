# SPDX-License-Identifier: MIT
"""The DCNv3 operator: numbers, derivatives, semantics at the edges, and what torch does with operators."""

import itertools
import math

import golden
import oracle
import pytest
import strategies
import torch
from conftest import DEVICES, TOLERANCE, assert_close
from hypothesis import HealthCheck, given, settings
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from internimage.ops import dcnv3
from internimage.ops import dcnv3_reference as reference
from internimage.ops.sampling import Geometry, kernel_grid, num_points, output_size, sampling_locations

OP = torch.ops.internimage.dcnv3.default
OP_BACKWARD = torch.ops.internimage.dcnv3_backward.default
NAMES = ("input", "offset", "mask")
HALF = [torch.bfloat16, torch.float16]

on_devices = pytest.mark.parametrize("device", DEVICES)


def schema(arguments: dict) -> tuple:
    """The arguments in the schema's order, for functions without defaults."""
    defaults = {
        "kernel_size": (3, 3),
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (1, 1),
        "groups": 1,
        "offset_scale": 1.0,
        "remove_center": False,
        "softmax": False,
    }
    return tuple({**defaults, **arguments}.values())


def forward_and_gradients(tensors, grad_output, arguments) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = dcnv3(*leaves, **arguments)
    return [output, *torch.autograd.grad(output, leaves, grad_output)]


def reference_forward_and_gradients(tensors, grad_output, arguments, deterministic=False) -> list[torch.Tensor]:
    """The reference itself, even where the operator has a compiled kernel."""
    arguments = schema(arguments)
    grads = reference.dcnv3_backward(grad_output, *tensors, *arguments, deterministic, [True] * 3)
    return [reference.dcnv3(*tensors, *arguments), *grads]


def deterministic_forward_and_gradients(tensors, grad_output, arguments) -> list[torch.Tensor]:
    arguments = schema(arguments)
    return [OP(*tensors, *arguments), *OP_BACKWARD(grad_output, *tensors, *arguments, True, [True] * 3)]


IMPLEMENTATIONS = {
    "operator": forward_and_gradients,
    "deterministic": deterministic_forward_and_gradients,
    "reference": reference_forward_and_gradients,
}


def oracle_forward_and_gradients(tensors, grad_output, arguments) -> list[torch.Tensor]:
    return [oracle.forward(*tensors, **arguments), *oracle.gradients(grad_output, *tensors, **arguments)]


def assert_all_close(results, expected, names=("output", *NAMES), tolerance=None) -> None:
    for name, result, right in zip(names, results, expected, strict=True):
        assert_close(result, right, tolerance, name)


# ---- goldens


def golden_problem(case: dict) -> tuple[list[torch.Tensor], dict]:
    """Input, offset, mask and grad_output by the rule of the goldens, float64, and the arguments."""
    groups, points = case["group"], case["kernel_h"] * case["kernel_w"] - case["remove_center"]
    geometry = {
        name: (case[f"{official}_h"], case[f"{official}_w"])
        for name, official in (("kernel_size", "kernel"), ("stride", "stride"), ("padding", "pad"))
    }
    geometry["dilation"] = (case["dilation_h"], case["dilation_w"])
    n, size, channels = case["N"], (case["H"], case["W"]), groups * case["group_channels"]
    ho, wo = oracle.output_size(size, **geometry)
    generator = torch.Generator().manual_seed(case["seed"])

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    input = randn(n, *size, channels)
    offset = randn(n, ho, wo, groups * points * 2) * case["offset_std"]
    mask = randn(n, ho, wo, groups, points)
    grad_output = randn(n, ho, wo, channels)
    if case["offset_mode"] == "rounded":
        offset = offset.round()
    elif case["offset_mode"] == "zeros":
        offset = torch.zeros_like(offset)
    if case["mask_mode"] == "softmax":
        mask = mask.softmax(-1)
    arguments = {
        **geometry,
        "groups": groups,
        "offset_scale": case["offset_scale"],
        "remove_center": bool(case["remove_center"]),
    }
    return [input, offset, mask.flatten(3), grad_output], arguments


@pytest.mark.parametrize("case", golden.cases("op").values(), ids=lambda case: case["name"])
def test_golden_inputs_are_drawn_alike(case):
    for name, tensor in zip((*NAMES, "grad_output"), golden_problem(case)[0]):
        fingerprint = case["inputs"][name]
        assert list(tensor.shape) == fingerprint["shape"]
        assert tensor.flatten()[:3].tolist() == pytest.approx(fingerprint["first3"], rel=1e-13, abs=0)
        assert tensor.sum().item() == pytest.approx(fingerprint["sum"], rel=1e-11, abs=1e-9)


def assert_golden(results, name: str, dtype: torch.dtype, device: str) -> None:
    for which, result in zip(("output", "grad_input", "grad_offset", "grad_mask"), results, strict=True):
        assert result.dtype == dtype and result.device.type == device
        assert_close(result, golden.tensors("op")[f"{name}/{which}"], name=which)


@on_devices
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", golden.cases("op"))
def test_golden(name, dtype, implementation, device):
    tensors, arguments = golden_problem(golden.cases("op")[name])
    *tensors, grad_output = (t.to(device, dtype) for t in tensors)
    assert_golden(IMPLEMENTATIONS[implementation](tensors, grad_output, arguments), name, dtype, device)


# ---- the formula


@on_devices
@pytest.mark.parametrize("implementation", ["operator", "reference"])
@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(problem=strategies.problems())
def test_formula(problem, implementation, device):
    *tensors, grad_output = problem[0]
    arguments = problem[1]
    on_device = [t.to(device) for t in (*tensors, grad_output)]
    output, *grads = IMPLEMENTATIONS[implementation](on_device[:3], on_device[3], arguments)
    expected = oracle_forward_and_gradients(tensors, grad_output, arguments)
    # absolute, because in some draws nearly all points are outside the image
    for name, result, right in zip(("output", *NAMES), (output.detach(), *grads), expected):
        torch.testing.assert_close(result.cpu(), right, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def test_the_two_oracles_agree():
    arguments = {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 3), "groups": 2, "softmax": True}
    *tensors, _ = oracle.draw(0, 2, (5, 6), 3, **arguments)
    assert_close(oracle.differentiable(*tensors, **arguments), oracle.forward(*tensors, **arguments), 1e-13)


# ---- a peer

PEER_CASES = {
    "plain": {"padding": (1, 1)},
    "groups": {"groups": 3, "padding": (1, 1)},
    "strides": {"stride": (2, 1), "padding": (0, 2), "groups": 2},
    "dilation": {"dilation": (1, 2), "padding": (2, 3), "groups": 2},
    "oblong": {"kernel_size": (3, 5), "padding": (1, 2)},
    "even": {"kernel_size": (2, 4), "padding": (1, 2), "dilation": (2, 3), "groups": 2, "offset_scale": 0.6},
    "scale": {"offset_scale": 1.7, "padding": (1, 1), "groups": 2},
}


@on_devices
@pytest.mark.parametrize("case", PEER_CASES)
def test_torchvision(case, device):
    """A depthwise deform_conv2d with weights of one; its points are counted row by row, its offsets are (y, x)."""
    from torchvision.ops import deform_conv2d  # here, so that the other tests run without torchvision

    arguments = {"kernel_size": (3, 3), "dilation": (1, 1), "groups": 1, "offset_scale": 1.0} | PEER_CASES[case]
    *tensors, grad_output = oracle.draw(3, 2, (7, 8), 4, 1.0, **arguments)
    tensors[1] = oracle.off_the_grid(tensors[1], **arguments)
    (kh, kw), (dh, dw), groups = arguments["kernel_size"], arguments["dilation"], arguments["groups"]
    scale = arguments["offset_scale"]

    input, offset, mask = (t.requires_grad_() for t in tensors)
    n, ho, wo, channels = grad_output.shape
    grid_y = torch.arange(kh) * dh - dh * (kh - 1) // 2
    grid_x = torch.arange(kw) * dw - dw * (kw - 1) // 2
    grid = torch.stack(torch.meshgrid(grid_x, grid_y, indexing="ij"), dim=-1)  # (kw, kh, 2)
    moved = offset.view(n, ho, wo, groups, kw, kh, 2)
    moved = (moved + grid) * scale - grid
    peer = deform_conv2d(
        input.permute(0, 3, 1, 2),
        moved.permute(0, 3, 5, 4, 6, 1, 2).flip(4).reshape(n, groups * kh * kw * 2, ho, wo),
        torch.ones(channels, 1, kh, kw, dtype=torch.float64),
        stride=arguments.get("stride", (1, 1)),
        padding=arguments["padding"],
        dilation=arguments["dilation"],
        mask=mask.view(n, ho, wo, groups, kw, kh).permute(0, 3, 5, 4, 1, 2).reshape(n, groups * kh * kw, ho, wo),
    ).permute(0, 2, 3, 1)
    expected = [peer, *torch.autograd.grad(peer, (input, offset, mask), grad_output)]
    assert_all_close(
        forward_and_gradients([t.to(device) for t in tensors], grad_output.to(device), arguments), expected
    )


# ---- half types

HALF_CASES = {
    "plain": ({"padding": (1, 1), "groups": 2, "softmax": True}, 16),
    "odd channels": ({"padding": (1, 1), "groups": 3}, 5),
    "wide": ({"kernel_size": (5, 5), "padding": (2, 2), "stride": (2, 2), "groups": 2, "softmax": True}, 12),
    "remove_center": ({"padding": (1, 1), "groups": 2, "offset_scale": 0.5, "remove_center": True}, 8),
}


@on_devices
@pytest.mark.parametrize("implementation", ["operator", "reference"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", HALF_CASES)
def test_half(case, dtype, implementation, device):
    """Against float64 on the rounded inputs: only the results are rounded, as sums are in float32."""
    arguments, group_channels = HALF_CASES[case]
    *tensors, grad_output = (t.to(dtype) for t in oracle.draw(5, 2, (8, 9), group_channels, **arguments))
    results = IMPLEMENTATIONS[implementation]([t.to(device) for t in tensors], grad_output.to(device), arguments)
    assert {result.dtype for result in results} == {dtype}
    assert_all_close(results, oracle_forward_and_gradients(tensors, grad_output, arguments))


@on_devices
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_coordinates_are_float32(dtype, device):
    """At column 600 a half type cannot represent quarter pixels; float32 can."""
    input = torch.arange(700, dtype=torch.float32).remainder(7).view(1, 1, 700, 1).to(device, dtype)
    offset = torch.tensor([0.25, 0.0]).repeat(700).view(1, 1, 700, 2).to(device, dtype)
    output = dcnv3(input, offset, torch.ones(1, 1, 700, 1, device=device, dtype=dtype), kernel_size=1)
    ramp = torch.arange(700.0).remainder(7)
    expected = 0.75 * ramp + 0.25 * torch.cat([ramp[1:], torch.zeros(1)])
    assert_close(output.flatten(), expected)


# ---- semantics


def one_sample(x: float, y: float, device: str, image=None, dtype=torch.float64):
    """Output and gradients for grad_output 1 of one sample at (x, y), of a 3 x 4 image with one channel."""
    if image is None:
        image = torch.tensor([[3.0, 5.0, 11.0, 2.0], [7.0, 1.0, 4.0, 13.0], [6.0, 17.0, 9.0, 8.0]], dtype=dtype)
    height, width = image.shape
    offset = torch.zeros(1, height, width, 2, dtype=dtype, device=device)
    offset[0, 0, 0] = torch.tensor([x, y])
    mask = torch.zeros(1, height, width, 1, dtype=dtype, device=device)
    mask[0, 0, 0] = 2.0
    tensors = [image.view(1, height, width, 1).to(device), offset, mask]
    grad_output = torch.zeros(1, height, width, 1, dtype=dtype, device=device)
    grad_output[0, 0, 0] = 1.0
    output, *grads = forward_and_gradients(tensors, grad_output, {"kernel_size": 1})
    return (
        output[0, 0, 0].item(),
        grads[0].view(height, width).cpu(),
        grads[1][0, 0, 0].tolist(),
        grads[2][0, 0, 0].item(),
    )


@on_devices
def test_between_pixels(device):
    # 0.75 * (0.5 * 5 + 0.5 * 11) + 0.25 * (0.5 * 1 + 0.5 * 4), times the mask's 2
    output, grad_input, grad_offset, grad_mask = one_sample(1.5, 0.25, device)
    assert output == pytest.approx(2 * 6.625)
    assert grad_mask == pytest.approx(6.625)
    assert grad_offset == pytest.approx([2 * (0.75 * 6 + 0.25 * 3), 2 * (2.5 - 8)])
    assert grad_input.tolist() == [[0, 0.75, 0.75, 0], [0, 0.25, 0.25, 0], [0, 0, 0, 0]]


@on_devices
def test_derivative_at_a_pixel_center_is_the_right_hand_one(device):
    output, grad_input, grad_offset, _ = one_sample(1.0, 1.0, device)
    assert output == 2.0
    assert grad_offset == [2 * (4 - 1), 2 * (17 - 1)]
    assert grad_input[1, 1] == 2.0 and grad_input.sum() == 2.0


@on_devices
def test_derivative_at_the_last_pixel_is_toward_the_outside(device):
    assert one_sample(3.0, 2.0, device)[2] == [-2 * 8, -2 * 8]


def assert_outside(output, grad_input, grad_offset, grad_mask) -> None:
    assert (output, grad_offset, grad_mask) == (0.0, [0.0, 0.0], 0.0) and not grad_input.any()


@on_devices
@pytest.mark.parametrize("location", [(-1.0, 1.0), (1.0, -1.0), (4.0, 1.0), (1.0, 3.0), (-1.0, -1.0)])
def test_the_border_itself_is_outside(location, device):
    assert_outside(*one_sample(*location, device))


@on_devices
@pytest.mark.parametrize("location", [(-1 + 2**-10, 1.0), (1.0, -1 + 2**-10), (4 - 2**-10, 1.0), (1.0, 3 - 2**-10)])
def test_just_inside_the_border_counts(location, device):
    output, grad_input, grad_offset, grad_mask = one_sample(*location, device)
    assert 0 < output < 0.05 and 0 < grad_mask < 0.05
    assert any(abs(g) >= 2 for g in grad_offset)
    assert grad_input.sum() == 2 * 2**-10


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_locations_that_are_nowhere(value, dtype, device):
    for location in ((value, 1.0), (1.0, value), (value, value)):
        assert_outside(*one_sample(*location, device, dtype=dtype))


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_one_location_that_is_nowhere_leaves_the_others(value, dtype, device):
    arguments = {"padding": (1, 1), "groups": 2, "softmax": True}
    *tensors, grad_output = oracle.draw(7, 1, (5, 6), 4, **arguments)
    tensors[1] = oracle.off_the_grid(tensors[1], **arguments)
    tensors[1].view(-1)[::7] = value
    on_device = [t.to(device, dtype) for t in (*tensors, grad_output)]
    results = forward_and_gradients(on_device[:3], on_device[3], arguments)
    assert_all_close(results, oracle_forward_and_gradients(tensors, grad_output, arguments))
    assert not results[2].reshape(-1)[::7].any()


@on_devices
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_pixel_that_is_not_sampled_does_not_matter(value, device):
    image = torch.full((3, 4), value, dtype=torch.float64)
    image[:2, :2] = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    output, _, grad_offset, grad_mask = one_sample(0.5, 0.5, device, image)
    assert (output, grad_mask, grad_offset) == (2 * 2.75, 2.75, [3.0, 5.0])
    output, _, grad_offset, grad_mask = one_sample(-0.5, -0.5, device, image)  # three of the corners are outside
    assert (output, grad_mask, grad_offset) == (0.5, 0.25, [1.0, 1.0])
    assert_outside(*one_sample(-7.0, -7.0, device, image))


@on_devices
def test_softmax_is_over_the_points_also_outside(device):
    """A point outside keeps its weight in the softmax; it is not distributed over the others."""
    input = torch.ones(1, 1, 1, 1, dtype=torch.float64, device=device)
    offset = torch.zeros(1, 1, 1, 18, dtype=torch.float64, device=device)
    mask = torch.zeros(1, 1, 1, 9, dtype=torch.float64, device=device)
    grad_output = torch.ones_like(input)
    output, *grads = forward_and_gradients([input, offset, mask], grad_output, {"padding": 1, "softmax": True})
    assert output.item() == pytest.approx(1 / 9)
    expected = [-1 / 81] * 9
    expected[4] = 8 / 81
    assert grads[2].flatten().tolist() == pytest.approx(expected)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_softmax_of_large_logits(dtype, device):
    """Shifted by their largest, as exp alone would overflow."""
    arguments = {"padding": (1, 1), "groups": 2, "softmax": True}
    *tensors, _ = oracle.draw(8, 1, (4, 5), 4, **arguments)
    tensors[2] = tensors[2] * 300
    tensors = [t.to(dtype) for t in tensors]
    output = dcnv3(*(t.to(device) for t in tensors), **arguments)
    assert_close(output, oracle.forward(*tensors, **arguments))


@on_devices
@pytest.mark.parametrize(
    "size, arguments",
    [
        ((1, 1), {"padding": (1, 1)}),
        ((1, 1), {"padding": (2, 3), "kernel_size": (5, 5), "groups": 2}),
        ((1, 1), {"kernel_size": (1, 1)}),
        ((1, 6), {"padding": (1, 1), "remove_center": True}),
        ((6, 1), {"padding": (1, 1), "softmax": True}),
    ],
    ids=str,
)
def test_one_pixel_images(size, arguments, device):
    *tensors, grad_output = oracle.draw(9, 2, size, 3, 0.7, **arguments)
    results = forward_and_gradients([t.to(device) for t in tensors], grad_output.to(device), arguments)
    assert_all_close(results, oracle_forward_and_gradients(tensors, grad_output, arguments))


@on_devices
@pytest.mark.parametrize("softmax", [False, True])
def test_empty_batch(softmax, device):
    arguments = {"padding": (1, 1), "stride": (2, 2), "groups": 2, "softmax": softmax}
    *tensors, grad_output = (t.to(device) for t in oracle.draw(0, 0, (5, 6), 4, **arguments))
    output, *grads = forward_and_gradients(tensors, grad_output, arguments)
    assert output.shape == (0, 3, 3, 8)
    assert [g.shape for g in grads] == [t.shape for t in tensors]
    leaves = [t.detach().requires_grad_() for t in tensors]
    first = torch.autograd.grad(dcnv3(*leaves, **arguments).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), leaves)
    assert [g.shape for g in second] == [t.shape for t in tensors]


@on_devices
def test_image_without_pixels(device):
    arguments = {"padding": (2, 2)}
    *tensors, grad_output = (t.to(device) for t in oracle.draw(0, 1, (0, 0), 4, **arguments))
    output, *grads = forward_and_gradients(tensors, grad_output, arguments)
    assert output.shape == (1, 2, 2, 4) and not output.any()
    assert grads[0].shape == (1, 0, 0, 4) and not grads[1].any() and not grads[2].any()


# a tensor to take a view of, and the view of it
VIEWS = {
    "channels first in memory": (
        lambda t: t.permute(0, 3, 1, 2).contiguous(),
        lambda t: t.permute(0, 2, 3, 1),
    ),
    "every other": (lambda t: t.repeat_interleave(2, dim=2), lambda t: t[:, :, ::2]),
    "part of the channels": (lambda t: torch.cat([t, t + 1], dim=-1), lambda t: t[..., : t.shape[-1] // 2]),
    "batch expanded": (lambda t: t[:1].clone(), lambda t: t.expand(2, -1, -1, -1)),
    "channels expanded": (lambda t: t[..., :1].clone(), None),
    "begins late": (lambda t: torch.cat([t[:1], t])[..., None], lambda t: t[1:, ..., 0]),
}


@on_devices
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("which", range(4), ids=[*NAMES, "grad_output"])
def test_strides(which, view, device):
    arguments = {"padding": (1, 1), "stride": (2, 1), "groups": 2, "softmax": view != "channels expanded"}
    tensors = oracle.draw(11, 2, (5, 6), 4, **arguments)
    store, make = VIEWS[view]
    channels = tensors[which].shape[-1]
    if make is None:
        make = lambda t: t.expand(-1, -1, -1, channels)  # noqa: E731

    def run(function, place):
        bases = [t.to(place) for t in tensors]
        bases[which] = store(bases[which]).detach()
        bases[:3] = (t.requires_grad_() for t in bases[:3])
        views = [make(t) if i == which else t for i, t in enumerate(bases)]
        assert views[which].storage_offset() or not views[which].is_contiguous()
        output = function(*views[:3], **arguments)
        return output, *torch.autograd.grad(output, bases[:3], views[3])

    assert_all_close(run(dcnv3, device), run(oracle.differentiable, "cpu"))


@on_devices
def test_sum_backward(device):
    """The gradient of a sum is one number, expanded to the output's shape."""
    arguments = {"padding": (1, 1), "groups": 2}
    *tensors, grad_output = oracle.draw(12, 2, (5, 6), 4, **arguments)
    leaves = [t.to(device).requires_grad_() for t in tensors]
    dcnv3(*leaves, **arguments).sum().backward()
    expected = oracle.gradients(torch.ones_like(grad_output), *tensors, **arguments)
    assert_all_close([leaf.grad for leaf in leaves], expected, NAMES)


@on_devices
def test_arguments_as_ints_lists_and_pairs(device):
    pairs = {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (2, 2)}
    *tensors, _ = oracle.draw(13, 1, (7, 8), 4, **pairs)
    expected = oracle.forward(*tensors, **pairs)
    tensors = [t.to(device) for t in tensors]
    ints = {name: pair[0] for name, pair in pairs.items()}
    lists = {name: list(pair) for name, pair in pairs.items()}
    for arguments in (pairs, ints, lists, {**pairs, "offset_scale": 1, "remove_center": 0}):
        assert_close(dcnv3(*tensors, **arguments), expected)
    assert_close(dcnv3(*tensors, *pairs.values()), expected)


# ---- derivatives

DERIVATIVE_CASES = {
    "plain": {"padding": (1, 1)},
    "softmax": {"padding": (1, 1), "groups": 2, "softmax": True},
    "scale": {"padding": (1, 0), "offset_scale": 1.7, "stride": (2, 1)},
    "remove_center": {"padding": (1, 1), "remove_center": True, "stride": (2, 2), "softmax": True},
    "even": {"kernel_size": (2, 2), "padding": (1, 0), "groups": 2, "offset_scale": 0.5, "softmax": True},
}


def smooth_problem(case: str, device: str, n: int = 1):
    arguments = DERIVATIVE_CASES[case]
    *tensors, grad_output = oracle.draw(14, n, (3, 4), 2, 1.0, **arguments)
    tensors[1] = oracle.off_the_grid(tensors[1], **arguments)
    return [t.to(device) for t in tensors], grad_output.to(device), arguments


# Atomic additions come in any order: on CUDA, two runs of a backward may differ by rounding.
NONDETERMINISM = {"cpu": 0.0, "cuda": 1e-10}


@on_devices
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("case", DERIVATIVE_CASES)
def test_gradcheck(case, order, device):
    tensors, grad_output, arguments = smooth_problem(case, device)
    check, more = torch.autograd.gradcheck, ()
    if order == 2:
        check, more = torch.autograd.gradgradcheck, ([grad_output.requires_grad_()],)
    leaves = [t.requires_grad_() for t in tensors]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return dcnv3(*tensors, **arguments)

    assert check(function, leaves, *more, nondet_tol=NONDETERMINISM[device], fast_mode=True)


def derivatives(function, tensors, grad_output, directions, orders: int) -> list[torch.Tensor]:
    """Gradients of the gradients of the gradients, each contracted with directions; all of the last order."""
    leaves = [t.detach().requires_grad_() for t in (*tensors, grad_output)]
    value = (function(*leaves[:3]) * leaves[3]).sum()
    for order in range(orders):
        grads = torch.autograd.grad(value, leaves, create_graph=order + 1 < orders)
        value = sum((g * d.to(g)).sum() for g, d in zip(grads, directions[order]))
    return list(grads)


@on_devices
@pytest.mark.parametrize("orders", [2, 3])
@pytest.mark.parametrize("case", DERIVATIVE_CASES)
def test_higher_derivatives(case, orders, device):
    tensors, grad_output, arguments = smooth_problem(case, "cpu", n=2)
    tensors[1].view(-1)[::11] = math.nan
    shapes = [t.shape for t in (*tensors, grad_output)]
    directions = [[torch.randn(s, dtype=torch.float64) for s in shapes] for _ in range(orders)]
    expected = derivatives(lambda *t: oracle.differentiable(*t, **arguments), tensors, grad_output, directions, orders)
    result = derivatives(
        lambda *t: dcnv3(*t, **arguments), [t.to(device) for t in tensors], grad_output.to(device), directions, orders
    )
    assert all(right.abs().max() > 1e-3 for right in expected)  # else nothing would be compared
    assert_all_close(result, expected, (*NAMES, "grad_output"))


@on_devices
@pytest.mark.parametrize("wanted", [w for w in itertools.product([False, True], repeat=3) if any(w)], ids=str)
@pytest.mark.parametrize("case", ["plain", "softmax"])
def test_double_backward_of_part_of_the_gradients(case, wanted, device):
    tensors, grad_output, arguments = smooth_problem(case, "cpu", n=2)
    directions = [torch.randn_like(t) for t in tensors]

    def second(gradients, place):
        leaves = [t.detach().to(place).requires_grad_() for t in (grad_output, *tensors)]
        # gradients that were not requested are empty and included, as in a loop over all of them
        weights = [d.to(place) if w else 0.0 for d, w in zip(directions, wanted)]
        value = sum((g * w).sum() for g, w in zip(gradients(*leaves), weights))
        return torch.autograd.grad(value, leaves, materialize_grads=True)

    def by_oracle(grad, *leaves):
        return torch.autograd.grad(oracle.differentiable(*leaves, **arguments), leaves, grad, create_graph=True)

    result = second(lambda *t: OP_BACKWARD(*t, *schema(arguments), False, list(wanted)), device)
    assert_all_close(result, second(by_oracle, "cpu"), ("grad_output", *NAMES))


@on_devices
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", DERIVATIVE_CASES)
def test_double_backward_of_the_reference(case, deterministic, device):
    tensors, grad_output, arguments = smooth_problem(case, "cpu", n=2)
    directions = [torch.randn_like(t) for t in tensors]
    leaves = [t.requires_grad_() for t in (grad_output, *tensors)]
    first = torch.autograd.grad(
        oracle.differentiable(*leaves[1:], **arguments), leaves[1:], leaves[0], create_graph=True
    )
    expected = torch.autograd.grad(first, leaves, directions)
    on_device = [t.detach().to(device) for t in (*directions, *leaves)]
    result = reference.dcnv3_double_backward(*on_device, *schema(arguments), deterministic)
    assert_all_close(result, expected, ("grad_output", *NAMES))


@on_devices
@pytest.mark.parametrize("needed", [w for w in itertools.product([False, True], repeat=3) if any(w)], ids=str)
def test_gradients_of_some(needed, device):
    arguments = {"padding": (1, 1), "groups": 2, "softmax": True}
    *tensors, grad_output = oracle.draw(15, 1, (4, 5), 3, **arguments)
    leaves = [t.detach().to(device).requires_grad_(need) for t, need in zip(tensors, needed)]
    dcnv3(*leaves, **arguments).backward(grad_output.to(device))
    for leaf, need, right in zip(leaves, needed, oracle.gradients(grad_output, *tensors, **arguments)):
        if need:
            assert_close(leaf.grad, right)
        else:
            assert leaf.grad is None


@on_devices
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_output_mask(wanted, deterministic, device):
    arguments = {"padding": (1, 1), "groups": 2, "softmax": True}
    *tensors, grad_output = oracle.draw(16, 1, (4, 5), 3, **arguments)
    on_device = [t.to(device) for t in (grad_output, *tensors)]
    grads = OP_BACKWARD(*on_device, *schema(arguments), deterministic, list(wanted))
    for grad, want, right in zip(grads, wanted, oracle.gradients(grad_output, *tensors, **arguments)):
        assert_close(grad, right if want else right.new_empty(0))


# ---- what torch does with operators


class Calls(TorchDispatchMode):
    """Records the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "internimage":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@on_devices
@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_algorithms_are_requested_of_the_kernel(deterministic, device):
    *tensors, _ = (t.to(device).requires_grad_() for t in oracle.draw(0, 1, (3, 4), 2))
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        with Calls() as seen:
            dcnv3(*tensors).sum().backward()
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    (_, _), (func, arguments) = seen.calls
    assert func is OP_BACKWARD and arguments[-2] is deterministic


OPCHECK_CASES = {
    "plain": {},
    "all": {
        "kernel_size": (3, 5),
        "stride": (2, 1),
        "padding": (2, 1),
        "dilation": (1, 2),
        "groups": 2,
        "offset_scale": 1.5,
        "remove_center": True,
        "softmax": True,
    },
}


@on_devices
@pytest.mark.parametrize(
    "dtype, requires_grad", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)], ids=str
)
@pytest.mark.parametrize("case", OPCHECK_CASES)
def test_opcheck(case, requires_grad, dtype, device):
    *tensors, _ = oracle.draw(17, 2, (6, 9), 3, **OPCHECK_CASES[case])
    tensors = [t.to(device, dtype).requires_grad_(requires_grad) for t in tensors]
    torch.library.opcheck(OP, (*tensors, *schema(OPCHECK_CASES[case])))


@on_devices
@pytest.mark.parametrize(
    "case, wanted, requires_grad",
    [
        ("all", (True, True, True), True),
        ("all", (True, False, False), True),
        ("plain", (False, True, True), True),
        ("plain", (False, False, True), False),
    ],
    ids=str,
)
def test_opcheck_backward(case, wanted, requires_grad, device):
    *tensors, grad_output = oracle.draw(17, 2, (6, 9), 3, **OPCHECK_CASES[case])
    tensors = [t.to(device, torch.float32).requires_grad_(requires_grad) for t in (grad_output, *tensors)]
    torch.library.opcheck(OP_BACKWARD, (*tensors, *schema(OPCHECK_CASES[case]), False, list(wanted)))


def compiled_matches(compiled, tensors, grad_output, arguments, device) -> None:
    leaves = [t.to(device).requires_grad_() for t in tensors]
    output = compiled(*leaves)
    results = [output, *torch.autograd.grad(output, leaves, grad_output.to(device))]
    assert_all_close(results, oracle_forward_and_gradients(tensors, grad_output, arguments))


@on_devices
def test_compile(device):
    torch._dynamo.reset()
    arguments = {"padding": (1, 1), "stride": (2, 2), "groups": 2, "softmax": True}
    *tensors, grad_output = oracle.draw(18, 2, (6, 7), 4, **arguments)
    compiled = torch.compile(lambda *t: dcnv3(t[0] * 1.0, *t[1:], **arguments) + 0.0, fullgraph=True)
    compiled_matches(compiled, tensors, grad_output, arguments, device)


@on_devices
@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": (1, 1), "groups": 2, "softmax": True},
        {"kernel_size": (3, 2), "stride": (2, 2), "padding": (1, 0), "dilation": (1, 2), "groups": 2},
    ],
    ids=["same size", "strided"],
)
def test_compile_dynamic(arguments, device):
    """One graph for all batch and image sizes."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: dcnv3(*t, **arguments), fullgraph=True, dynamic=True, backend="aot_eager")
    # no two sizes are equal in the first, as dynamo would treat them as one
    for n, size, stance in (
        (2, (6, 9), "default"),
        (3, (10, 8), "fail_on_recompile"),
        (4, (11, 14), "fail_on_recompile"),
        (2, (8, 8), "fail_on_recompile"),
    ):
        *tensors, grad_output = oracle.draw(19, n, size, 4, **arguments)
        with torch.compiler.set_stance(stance):
            compiled_matches(compiled, tensors, grad_output, arguments, device)


class Small(torch.nn.Module):
    def __init__(self, arguments: dict) -> None:
        super().__init__()
        self.arguments = arguments

    def forward(self, input, offset, mask):
        return dcnv3(input, offset, mask, **self.arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_export(dynamic):
    arguments = {"padding": (1, 1), "groups": 2, "softmax": True}
    *tensors, _ = oracle.draw(20, 2, (6, 7), 4, **arguments)
    n, h, w = (torch.export.Dim(name, min=2, max=64) for name in ("n", "h", "w"))
    shapes = ({0: n, 1: h, 2: w},) * 3 if dynamic else None
    program = torch.export.export(Small(arguments), tuple(tensors), dynamic_shapes=shapes)
    assert OP in [node.target for node in program.graph.nodes]
    if dynamic:
        *tensors, _ = oracle.draw(21, 3, (5, 9), 4, **arguments)
    assert_close(program.module()(*tensors), oracle.forward(*tensors, **arguments))


VMAP = {"padding": (1, 1), "stride": (2, 1), "groups": 2, "softmax": True}


def mapped_problem(in_dims) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Tensors (and grad_output) with a mapped axis of 3 where in_dims says so, and the slices of a loop."""
    draws = [oracle.draw(30 + i, 2, (4, 5), 3, **VMAP) for i in range(3)]
    mapped = [
        draws[0][which] if axis is None else torch.stack([d[which] for d in draws], dim=axis)
        for which, axis in enumerate(in_dims)
    ]
    return mapped, [[d[w] if a is not None else draws[0][w] for w, a in enumerate(in_dims)] for d in draws]


@on_devices
@pytest.mark.parametrize(
    "in_dims", [d for d in itertools.product([None, 0, 2], repeat=3) if any(a is not None for a in d)], ids=str
)
def test_vmap(in_dims, device):
    mapped, slices = mapped_problem(in_dims)
    output = torch.func.vmap(lambda *t: dcnv3(*t, **VMAP), in_dims=in_dims)(*(t.to(device) for t in mapped))
    assert_close(output, torch.stack([oracle.forward(*t, **VMAP) for t in slices]))


@on_devices
@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False)], ids=str)
@pytest.mark.parametrize(
    "in_dims",
    [(0, 0, 0, 0), (None, 1, None, 0), (-1, None, None, None), (None, None, 3, 2), (0, None, 4, None)],
    ids=str,
)
def test_vmap_backward(in_dims, wanted, device):
    mapped, slices = mapped_problem((*in_dims[1:], in_dims[0]))
    mapped = [t.to(device) for t in (mapped[3], *mapped[:3])]
    grads = torch.func.vmap(lambda *t: OP_BACKWARD(*t, *schema(VMAP), False, list(wanted)), in_dims=in_dims)(*mapped)
    expected = [oracle.gradients(t[3], *t[:3], **VMAP) for t in slices]
    for i, (grad, want) in enumerate(zip(grads, wanted)):
        assert_close(grad, torch.stack([e[i] for e in expected]) if want else torch.zeros(3, 0))


@on_devices
def test_batched_gradients(device):
    """vmap as autograd uses it: over several grad_outputs."""
    *tensors, grad_output = oracle.draw(31, 2, (4, 5), 3, **VMAP)
    grad_outputs = torch.stack([grad_output, torch.ones_like(grad_output), grad_output**2])
    leaves = [t.to(device).requires_grad_() for t in tensors]
    grads = torch.autograd.grad(dcnv3(*leaves, **VMAP), leaves, grad_outputs.to(device), is_grads_batched=True)
    expected = [oracle.gradients(g, *tensors, **VMAP) for g in grad_outputs]
    for i, grad in enumerate(grads):
        assert_close(grad, torch.stack([e[i] for e in expected]))


# ---- autocast


@on_devices
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float16),
        (torch.float32, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_autocast(dtypes, dtype, device):
    arguments = {"padding": (1, 1), "groups": 2, "softmax": True}
    *tensors, grad_output = oracle.draw(22, 2, (5, 6), 4, **arguments)
    leaves = [t.to(device, d).requires_grad_() for t, d in zip(tensors, dtypes)]
    with torch.autocast(device, dtype=dtype), Calls() as seen:
        output = dcnv3(*leaves, **arguments)
    assert output.dtype == dtype
    assert [t.dtype for t in seen.calls[0][1][:3]] == [dtype] * 3
    output.backward(grad_output.to(device, dtype))
    assert [leaf.grad.dtype for leaf in leaves] == list(dtypes)
    rounded = [leaf.detach().to(dtype).cpu() for leaf in leaves]
    assert_close(output, oracle.forward(*rounded, **arguments))
    tolerance = max(TOLERANCE[d] for d in (dtype, *dtypes))
    expected = oracle.gradients(grad_output.to(dtype), *rounded, **arguments)
    assert_all_close([leaf.grad for leaf in leaves], expected, NAMES, tolerance)


@on_devices
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_leaves_float64(dtype, device):
    case = "k3_raw_mask"
    tensors, arguments = golden_problem(golden.cases("op")[case])
    *leaves, grad_output = (t.to(device) for t in tensors)
    with torch.autocast(device, dtype=dtype):
        results = forward_and_gradients(leaves, grad_output, arguments)
    assert_golden(results, case, torch.float64, device)


@on_devices
@pytest.mark.parametrize("orders", [1, 2])
def test_backward_under_autocast_does_not_round(orders, device):
    """A backward pass called inside the autocast block: its matrix products keep float32."""
    tensors, grad_output, arguments = smooth_problem("softmax", "cpu", n=2)
    directions = [[torch.randn_like(t) for t in (*tensors, grad_output)]] * 2
    expected = derivatives(lambda *t: oracle.differentiable(*t, **arguments), tensors, grad_output, directions, orders)

    def forward(*leaves):
        with torch.autocast(device, enabled=False):
            return dcnv3(*leaves, **arguments)

    leaves = [t.to(device, torch.float32) for t in (*tensors, grad_output)]
    with torch.autocast(device, dtype=torch.bfloat16):
        result = derivatives(forward, leaves[:3], leaves[3], directions, orders)
    assert_all_close(result, expected, (*NAMES, "grad_output"))


# ---- shapes without data


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_meta(dtype):
    arguments = {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 0), "groups": 2}
    *tensors, grad_output = oracle.draw(0, 3, (7, 8), 4, **arguments)
    leaves = [t.to("meta", dtype).requires_grad_() for t in tensors]
    output = dcnv3(*leaves, **arguments)
    assert (output.shape, output.dtype, output.device.type) == (grad_output.shape, dtype, "meta")
    grads = torch.autograd.grad(output.sum(), leaves, create_graph=True)
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, dtype) for t in leaves]
    second = torch.autograd.grad(sum(g.sum() for g in grads), leaves)
    assert [(g.shape, g.dtype) for g in second] == [(t.shape, dtype) for t in leaves]


@on_devices
def test_fake_tensors(device):
    arguments = {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 0), "groups": 2}
    *tensors, grad_output = oracle.draw(0, 3, (7, 8), 4, **arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t).to(device, torch.float16) for t in (grad_output, *tensors)]
        output = dcnv3(*fakes[1:], **arguments)
        grads = OP_BACKWARD(*fakes, *schema(arguments), False, [True, False, True])
    assert (output.shape, output.dtype, output.device.type) == (grad_output.shape, torch.float16, device)
    assert [tuple(g.shape) for g in grads] == [(3, 7, 8, 8), (0,), tuple(tensors[2].shape)]
    assert {g.dtype for g in grads} == {torch.float16}


# ---- sampling geometry

# size, kernel, stride, padding, dilation
AXES = [
    (7, 3, 1, 1, 1),
    (8, 3, 2, 1, 1),
    (9, 5, 2, 0, 2),
    (6, 2, 1, 3, 1),
    (5, 4, 3, 2, 1),
    (1, 1, 1, 0, 1),
    (4, 3, 1, 0, 2),
]


@pytest.mark.parametrize("height", AXES, ids=str)
@pytest.mark.parametrize("width", AXES[:4], ids=str)
def test_output_size_is_that_of_a_convolution(height, width):
    size, kernel, stride, padding, dilation = zip(height, width)
    if any(s + 2 * p < d * (k - 1) + 1 for s, k, _, p, d in (height, width)):
        assert min(output_size(size, kernel, stride, padding, dilation)) < 1
        return
    image, weight = torch.zeros(1, 1, *size), torch.zeros(1, 1, *kernel)
    expected = torch.nn.functional.conv2d(image, weight, None, stride, padding, dilation).shape[2:]
    assert output_size(size, kernel, stride, padding, dilation) == tuple(expected)


def test_num_points():
    assert num_points((3, 5)) == 15
    assert num_points((3, 5), True) == 14


def grid(kernel_size, dilation, remove_center=False) -> list[list[float]]:
    return kernel_grid(kernel_size, dilation, remove_center, dtype=torch.float64, device=torch.device("cpu")).tolist()


def test_kernel_grid():
    assert grid((3, 3), (1, 1)) == [
        [-1, -1], [-1, 0], [-1, 1],
        [0, -1], [0, 0], [0, 1],
        [1, -1], [1, 0], [1, 1],
    ]  # fmt: skip
    # the center of an even side is the first of its two middle points
    assert grid((1, 2), (1, 1)) == [[0, 0], [1, 0]]
    assert grid((2, 1), (3, 1)) == [[0, -1], [0, 2]]
    assert grid((1, 4), (1, 3)) == [[-4, 0], [-1, 0], [2, 0], [5, 0]]
    assert grid((3, 1), (2, 1), True) == [[0, -2], [0, 2]]
    assert grid((3, 5), (1, 2), True) == [
        [-4, -1], [-4, 0], [-4, 1],
        [-2, -1], [-2, 0], [-2, 1],
        [0, -1], [0, 1],
        [2, -1], [2, 0], [2, 1],
        [4, -1], [4, 0], [4, 1],
    ]  # fmt: skip


def test_sampling_locations():
    offset = torch.zeros(1, 2, 3, 2 * 2 * 2, dtype=torch.float64)
    offset[0, 1, 2] = torch.tensor([0.5, 0.25, 0, 0, 0, 0, -1, 3])
    location = sampling_locations(offset, Geometry((2, 1), (2, 3), (1, 0), (1, 1), 2, 2.0, False, False))
    assert location.shape == (1, 2, 3, 2, 2, 2)
    # rows begin at -1 + 0 (the upper point is the center) and step by 2, columns at 0 and step by 3
    assert location[0, 0, 0].tolist() == [[[0, -1], [0, 1]]] * 2
    assert location[0, 0, 2].tolist() == [[[6, -1], [6, 1]]] * 2
    assert location[0, 1, 0].tolist() == [[[0, 1], [0, 3]]] * 2
    assert location[0, 1, 2].tolist() == [[[7, 1.5], [6, 3]], [[6, 1], [4, 9]]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_sampling_locations_dtype(dtype):
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1, 0.5, False, False)
    location = sampling_locations(torch.zeros(1, 1, 1, 18, dtype=dtype), geometry)
    assert location.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert location[0, 0, 0, 0, 0].tolist() == [-0.5, -0.5]
