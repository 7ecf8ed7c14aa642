# SPDX-License-Identifier: MIT
"""Deformable convolution v1 and v2: numbers against torchvision and the papers' equations, layouts, memory.

Locations at pixels and outside are in test_deform_conv_edges.py, other derivatives in test_deform_conv_transforms.py.
"""

import inspect
import itertools
import os

import deform_oracle
import pytest
import strategies
import torch
import torch.nn.functional as F
from conftest import DEVICES, assert_close
from deform_oracle import FORMATS, Problem, assert_all_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internimage.ops import deform_conv2d

EXAMPLES = int(os.environ.get("INTERNIMAGE_TEST_EXAMPLES", 100))  # that hypothesis draws
HALF = [torch.bfloat16, torch.float16]

on_devices = pytest.mark.parametrize("device", DEVICES)


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
        problem = problem.map(lambda t: t.to(dtype)).stored(memory_format)
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
    problem = problem.stored(FORMATS[memory_format])
    results = problem.map(lambda t: t.to(device)).differentiate(deform_conv2d)
    assert_all_close(results, problem.differentiate(peer), PEER[torch.float64])


# ---- the equations, where torchvision cannot follow


@on_devices
@settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(problem=strategies.deform_problems(), memory_format=st.sampled_from(list(FORMATS.values())))
def test_formula(problem, memory_format, device):
    results = problem.stored(memory_format).map(lambda t: t.to(device)).differentiate(deform_conv2d)
    assert_all_close(results, deform_oracle.output_and_gradients(problem), 1e-11, least=1.0)


# ---- half types


@on_devices
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("changes", [{}, {"groups": 2, "offset_groups": 4}, {"mask": False, "bias": False}], ids=str)
def test_half(changes, memory_format, dtype, device):
    """Against the equations in float64 on the rounded numbers: besides the results only the columns are rounded."""
    problem = deform_oracle.draw(3, 2, (7, 8), 20, 6, padding=(1, 1), **changes).map(lambda t: t.to(dtype))
    results = problem.stored(FORMATS[memory_format]).map(lambda t: t.to(device)).differentiate(deform_conv2d)
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
    problem = problem.stored(FORMATS[memory_format])
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
    problem = deform_oracle.draw(12, 1, (4, 5), padding=(1, 1)).stored(FORMATS[memory_format])
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
    problem = problem.map(lambda t: t.to(device, dtype)).stored(FORMATS[memory_format])
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
