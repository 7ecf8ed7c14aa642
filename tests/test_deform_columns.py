# SPDX-License-Identifier: MIT
"""The columns of deformable convolution: the operator and its kernels, beneath `deform_conv2d`.

Against the papers' equations in loops, and for all dtypes and shapes against the reference in float64 on the same,
already rounded, numbers. Offset and mask are channels last here; the oracle's problems are permuted.
"""

import itertools
import math
import os

import deform_oracle
import pytest
import strategies
import torch
from conftest import DEVICES, assert_close
from deform_oracle import Problem
from hypothesis import HealthCheck, given, settings

from internimage.extension import has_kernel
from internimage.ops import deform_columns_reference as reference

OP = torch.ops.internimage.deform_columns.default
OP_BACKWARD = torch.ops.internimage.deform_columns_backward.default
NAMES = ("grad_input", "grad_offset", "grad_mask")
EXAMPLES = int(os.environ.get("INTERNIMAGE_TEST_EXAMPLES", 60))  # that hypothesis draws
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

on_devices = pytest.mark.parametrize("device", DEVICES)

# dtype -> deviation, relative to the largest number. Half types are computed in float32 and rounded once, by half a
# unit in the last place. In float32 it is the locations that count: below 16 pixels each of the three roundings in one
# is at most 2^-21 = 5e-7 pixels, times the difference of two pixels, a few times the largest result at most.
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5}
ROUNDING |= {half: torch.finfo(half).eps / 2 + ROUNDING[torch.float32] for half in (torch.bfloat16, torch.float16)}


def channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.permute(0, 2, 3, 1).contiguous()


def channels_first(t: torch.Tensor) -> torch.Tensor:
    return t.permute(0, 3, 1, 2)


def operands(problem: Problem) -> tuple[list[torch.Tensor], tuple]:
    """Input, offset and mask, and the other arguments of the operator; a mask of ones if there is none."""
    n, channels, ho, wo = problem.offset.shape
    mask = problem.offset.new_ones(n, channels // 2, ho, wo) if problem.mask is None else problem.mask
    geometry = problem.kernel_size, problem.stride, problem.padding, problem.dilation, problem.offset_groups
    return [channels_last(t) for t in (problem.input, problem.offset, mask)], geometry


def gradient(tensors: list[torch.Tensor], geometry: tuple) -> torch.Tensor:
    """A gradient of the columns."""
    points = math.prod(geometry[0])
    return torch.randn(*tensors[1].shape[:3], points * tensors[0].shape[3], dtype=torch.float64).to(tensors[0].dtype)


def run(tensors, grad, geometry, forward=OP, backward=OP_BACKWARD) -> list[torch.Tensor]:
    return [forward(*tensors, *geometry), *backward(grad, *tensors, *geometry, False, [True] * 3)]


def assert_right(tensors, grad, geometry, device="cpu") -> None:
    """Columns and gradients are those of the reference in float64 on the same numbers, but for rounding."""
    results = run([t.to(device) for t in tensors], grad.to(device), geometry)
    exact = run([t.double() for t in tensors], grad.double(), geometry, reference.forward, reference.backward)
    for name, result, right in zip(("columns", *NAMES), results, exact, strict=True):
        assert result.dtype == tensors[0].dtype, name
        assert_close(result, right, ROUNDING[result.dtype], name)


# ---- the equations


@on_devices
@pytest.mark.parametrize("implementation", ["operator", "reference"])
@settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(problem=strategies.deform_problems())
def test_formula(problem, implementation, device):
    functions = (OP, OP_BACKWARD) if implementation == "operator" else (reference.forward, reference.backward)
    tensors, geometry = operands(problem)
    grad = gradient(tensors, geometry)
    columns, *grads = run([t.to(device) for t in tensors], grad.to(device), geometry, *functions)
    shaped = grad.view(*grad.shape[:3], *problem.kernel_size, -1)
    expected = deform_oracle.gradients_of_columns(problem, shaped)
    # absolute, because in some draws nearly all points are outside the image
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(columns.cpu().view(shaped.shape), deform_oracle.columns(problem), **close)
    for name, found in zip(("input", "offset", "mask"), grads, strict=True):
        torch.testing.assert_close(
            channels_first(found).cpu(), expected[name], **close, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---- shapes and dtypes, against the reference

CASES = {
    "plain": {"padding": (1, 1)},
    "one channel": {"channels": 1, "padding": (1, 1)},
    "odd channels": {"channels": 21, "offset_groups": 3, "padding": (1, 1)},
    "a channel a group": {"channels": 5, "offset_groups": 5, "padding": (1, 1)},
    "even kernel": {"kernel_size": (2, 4), "channels": 6, "offset_groups": 2, "padding": (1, 2)},
    "oblong kernel": {"kernel_size": (5, 1), "channels": 20, "offset_groups": 2, "padding": (2, 0)},
    "one point": {"kernel_size": (1, 1), "channels": 12, "offset_groups": 3},
    "strides": {"stride": (2, 3), "size": (9, 8), "padding": (1, 0), "channels": 12},
    "long strides": {"stride": (4, 1), "size": (13, 5), "padding": (1, 1), "channels": 17},
    "dilation": {"dilation": (2, 3), "size": (7, 8), "padding": (2, 3), "channels": 12, "offset_groups": 2},
    "padding of 9": {"padding": (9, 9), "channels": 7, "offset_groups": 7},
    "one pixel": {"size": (1, 1), "padding": (1, 1), "channels": 16, "offset_groups": 2},
    "one row": {"size": (1, 11), "padding": (1, 1), "channels": 9},
    "one column": {"size": (11, 1), "padding": (1, 1), "channels": 9},
    "more points than a strip": {"kernel_size": (25, 25), "size": (3, 4), "padding": (12, 12), "channels": 3},
    "many groups": {"channels": 160, "offset_groups": 80, "size": (3, 9), "padding": (1, 1)},
    "many channels": {"channels": 257, "size": (3, 4), "padding": (1, 1)},
    "empty batch": {"n": 0, "padding": (1, 1)},
    "many images": {"n": 33, "size": (2, 3), "padding": (1, 1), "channels": 3},
}


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_shapes(case, dtype, device):
    tensors, geometry = operands(deform_oracle.draw(1, **CASES[case]).map(lambda t: t.to(dtype)))
    assert_right(tensors, gradient(tensors, geometry), geometry, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_tails_of_all_vectors(dtype):
    for channels in (*range(1, 35), 48, 63):
        problem = deform_oracle.draw(channels, 1, (3, 4), 2 * channels, offset_groups=2, padding=(1, 1))
        tensors, geometry = operands(problem.map(lambda t: t.to(dtype)))
        assert_right(tensors, gradient(tensors, geometry), geometry)


@on_devices
def test_an_image_without_pixels_or_channels(device):
    for size, channels in (((0, 0), 4), ((5, 6), 0)):
        tensors, geometry = operands(deform_oracle.draw(0, 1, size, channels, padding=(2, 2)))
        tensors = [t.to(device) for t in tensors]
        columns, *grads = run(tensors, gradient(tensors, geometry).to(device), geometry)
        assert columns.shape == (*tensors[1].shape[:3], 9 * channels) and not columns.any()
        assert [grad.shape for grad in grads] == [t.shape for t in tensors] and not any(grad.any() for grad in grads)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_offsets_that_lead_nowhere(value, dtype, device):
    """Zero columns and no gradients, whatever the mask is there; the points beside them are as ever."""
    problem = deform_oracle.draw(2, channels=13, padding=(1, 1))
    offset = problem.offset.movedim(1, -1)  # a view of it
    nowhere = (torch.arange(offset.numel()) % 5 == 0).view(offset.shape)
    offset[nowhere] = value
    gone = nowhere.unflatten(-1, (-1, 2)).any(-1)  # the points, (N, Ho, Wo, 9)
    problem.mask.movedim(1, -1)[gone] = math.nan
    tensors, geometry = operands(problem)
    tensors = [t.to(device, dtype) for t in tensors]
    grad = gradient(tensors, geometry).to(device)
    columns, *grads = run(tensors, grad, geometry)
    expected = operands(problem)[0]
    expected[2][gone] = 0.0
    exact = [t.to(dtype).double() for t in expected]
    right = run(exact, grad.cpu().double(), geometry, reference.forward, reference.backward)
    for name, found, wanted in zip(("columns", *NAMES), (columns, *grads), right, strict=True):
        assert_close(found, wanted, ROUNDING[dtype], name)
    assert not columns.cpu().unflatten(-1, (9, -1))[gone].any()
    assert not grads[1].cpu().unflatten(-1, (-1, 2))[gone].any() and not grads[2].cpu()[gone].any()


# ---- memory and threads


def thirds(problem: Problem) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Offset and mask in the places that a layer, a user or autograd may have them in, channels last."""
    _, offset, mask = operands(problem)[0]
    count = mask.shape[-1]
    packed = torch.cat([offset, mask], -1)
    between = torch.full((*packed.shape[:3], 3 * count + 7), math.nan, dtype=packed.dtype)
    between[..., 3 : 3 + 3 * count] = packed
    nchw = packed.permute(0, 3, 1, 2).contiguous()
    tall = torch.full((packed.shape[0], packed.shape[1] + 1, *packed.shape[2:]), math.nan, dtype=packed.dtype)
    tall[:, :-1] = packed

    def split(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return t[..., : 2 * count], t[..., 2 * count :]

    return [
        ("thirds of a channels-last map", *split(packed)),
        ("with other channels around them", *split(between[..., 3 : 3 + 3 * count])),
        ("thirds of a contiguous NCHW map", *split(nchw.permute(0, 2, 3, 1))),
        ("thirds of a larger map", *split(tall[:, :-1])),
        ("columns first", *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (offset, mask))),
        ("every other number", *(t.repeat_interleave(2, -1)[..., ::2] for t in (offset, mask))),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset_groups", [1, 3])
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (1, 130), (9, 1)], ids=str)
def test_layout_of_offset_and_mask_changes_no_bit(size, offset_groups, dtype):
    problem = deform_oracle.draw(3, 2, size, 15, offset_groups=offset_groups, padding=(1, 1)).map(lambda t: t.to(dtype))
    (input, offset, mask), geometry = operands(problem)
    grad = gradient([input, offset, mask], geometry)
    expected = run([input, offset, mask], grad, geometry)
    for name, *views in thirds(problem):
        assert torch.equal(views[0], offset) and torch.equal(views[1], mask)
        for found, right in zip(run([input, *views], grad, geometry), expected, strict=True):
            assert torch.equal(found, right), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axes", [(0,), (1,), (3,), (1, 2), (0, 1, 2, 3)], ids=str)
def test_expanded_offset_and_mask_change_no_bit(axes, dtype):
    """Of strides of 0: v1's mask is one 1, expanded to all points."""
    problem = deform_oracle.draw(4, 3, (4, 5), 6, offset_groups=2, padding=(1, 1)).map(lambda t: t.to(dtype))
    tensors, geometry = operands(problem)
    grad = gradient(tensors, geometry)
    parts = [tensors[1], tensors[2]]
    for axis in axes:
        parts = [part.narrow(axis, 0, 1) for part in parts]
    views = [part.expand(t.shape) for part, t in zip(parts, tensors[1:])]
    for pair in (views, [tensors[1], views[1]], [views[0], tensors[2]]):
        expected = run([tensors[0], *(t.contiguous() for t in pair)], grad, geometry)
        for found, right in zip(run([tensors[0], *pair], grad, geometry), expected, strict=True):
            assert torch.equal(found, right)


@pytest.mark.parametrize("which", ["input", "grad"])
def test_layout_of_input_and_gradient_changes_no_bit(which):
    tensors, geometry = operands(deform_oracle.draw(5, 2, (5, 6), 6, offset_groups=2, padding=(1, 1)))
    grad = gradient(tensors, geometry)
    expected = run(tensors, grad, geometry)
    t = tensors[0] if which == "input" else grad
    for view in (
        t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        torch.cat([t, t + 1], -1)[..., : t.shape[-1]],
        torch.cat([t[:1], t])[1:],
    ):
        again = run([view, *tensors[1:]], grad, geometry) if which == "input" else run(tensors, view, geometry)
        for found, right in zip(again, expected, strict=True):
            assert torch.equal(found, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n, offset_groups", [(1, 1), (1, 6), (3, 2), (33, 1)])
def test_threads_do_not_change_a_bit(n, offset_groups, dtype):
    problem = deform_oracle.draw(6, n, (9, 11), 48, offset_groups=offset_groups, padding=(1, 1))
    tensors, geometry = operands(problem.map(lambda t: t.to(dtype)))
    grad = gradient(tensors, geometry)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(tensors, grad, geometry))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- which gradients


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_output_mask(wanted, deterministic, dtype, device):
    """What is not wanted has no elements; what is, is the same whatever else is wanted."""
    problem = deform_oracle.draw(7, channels=20, offset_groups=2, padding=(1, 1)).map(lambda t: t.to(dtype))
    tensors, geometry = operands(problem)
    grad = gradient(tensors, geometry)
    on_device = [t.to(device) for t in (grad, *tensors)]
    grads = OP_BACKWARD(*on_device, *geometry, deterministic, list(wanted))
    exact = [t.double() for t in (grad, *tensors)]
    expected = reference.backward(*exact, *geometry, False, [True] * 3)
    for name, found, want, right in zip(NAMES, grads, wanted, expected, strict=True):
        assert found.dtype == dtype
        assert_close(found, right if want else right.new_empty(0), ROUNDING[dtype], name)


# ---- derivatives, and what torch does with operators


@on_devices
@pytest.mark.parametrize("order", [1, 2])
def test_gradcheck(order, device):
    problem = deform_oracle.draw(8, 1, (3, 4), 4, kernel_size=(2, 3), offset_groups=2, padding=(1, 1))
    tensors, geometry = operands(problem)
    leaves = [t.to(device).requires_grad_() for t in tensors]
    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    assert check(lambda *t: OP(*t, *geometry), leaves, nondet_tol=0.0 if device == "cpu" else 1e-10, fast_mode=True)


OPCHECK = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 1), "dilation": (1, 2), "offset_groups": 2}


@on_devices
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, device):
    tensors, geometry = operands(deform_oracle.draw(9, size=(6, 9), **OPCHECK).map(torch.Tensor.float))
    torch.library.opcheck(OP, (*(t.to(device).requires_grad_(requires_grad) for t in tensors), *geometry))


@on_devices
def test_opcheck_backward(device):
    tensors, geometry = operands(deform_oracle.draw(9, size=(6, 9), **OPCHECK).map(torch.Tensor.float))
    tensors = [t.to(device).requires_grad_() for t in (gradient(tensors, geometry), *tensors)]
    torch.library.opcheck(OP_BACKWARD, (*tensors, *geometry, False, [True, False, True]))


# ---- wrong arguments that bypass the checking function


@pytest.mark.skipif(not has_kernel("deform_columns", "cpu"), reason="needs the compiled CPU kernels")
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"offset": torch.zeros(2, 5, 6, 17)}, "shape that input and kernel ask for"),
        ({"mask": torch.zeros(2, 6, 5, 9)}, "shape that input and kernel ask for"),
        ({"mask": torch.zeros(2, 5, 6)}, "4 dimensions"),
        ({"mask": torch.zeros(2, 5, 6, 9, dtype=torch.float64)}, "one dtype"),
        ({"offset_groups": 3}, "groups must divide"),
        ({"offset_groups": 0}, "groups must divide"),
        ({"kernel_size": [9, 3]}, "does not fit"),
        ({"stride": [0, 1]}, "must be positive"),
        ({"padding": [-1, 1]}, "must not be negative"),
        ({"dilation": [2**62, 1]}, "below 2.30"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_the_operator_refuses_what_does_not_fit(changes, message):
    arguments = {"input": torch.zeros(2, 5, 6, 4), "offset": torch.zeros(2, 5, 6, 18), "mask": torch.zeros(2, 5, 6, 9)}
    arguments |= {"kernel_size": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "offset_groups": 1}
    arguments = list({**arguments, **changes}.values())
    with pytest.raises(RuntimeError, match=message):
        OP(*arguments)
    with pytest.raises(RuntimeError, match=message):
        OP_BACKWARD(torch.zeros(2, 5, 6, 36), *arguments, False, [True] * 3)


@pytest.mark.skipif(not has_kernel("deform_columns", "cpu"), reason="needs the compiled CPU kernels")
def test_the_backward_refuses_a_gradient_of_another_shape():
    """DCNv3's, of as many channels as the input, would be read past its end."""
    tensors = [torch.zeros(2, 5, 6, channels) for channels in (4, 18, 9)]
    with pytest.raises(RuntimeError, match="grad_output must have the output's shape"):
        OP_BACKWARD(torch.zeros(2, 5, 6, 4), *tensors, [3, 3], [1, 1], [1, 1], [1, 1], 1, False, [True] * 3)
