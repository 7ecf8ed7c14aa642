# SPDX-License-Identifier: MIT
"""The CUDA kernels' source, compiled for the CPU and run against the reference: all but races and speed.

Needs no GPU and no CUDA toolkit, only a C++ compiler. `cuda_host` explains how it is done.
"""

import ctypes
import math
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_host
import golden
import oracle
import pytest
import strategies
import torch
from conftest import assert_close
from hypothesis import HealthCheck, given, settings
from test_dcnv3 import golden_problem, schema

from internimage.ops import dcnv3_reference as reference

DTYPES = cuda_host.DTYPES
NAMES = ("input", "offset", "mask")
ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(cuda_host.COMPILER is None, reason="needs a C++ compiler (g++, or CXX)")


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> cuda_host.Host:
    return cuda_host.Host(cuda_host.shared(tmp_path_factory, "-DLAYOUTS"))


def compare(host, tensors, grad_output, arguments, dtype, deterministic=False, wide=False) -> None:
    """Forward and backward of `dtype` against the reference in float64 on the same rounded numbers."""
    geometry = schema(arguments)
    tensors, grad_output = [t.to(dtype) for t in tensors], grad_output.to(dtype)
    exact = [t.double() for t in tensors]
    output = host.forward(*tensors, *geometry, wide=wide)
    assert_close(output, reference.dcnv3(*exact, *geometry), name="output")
    grads = host.backward(grad_output, *tensors, *geometry, deterministic=deterministic, wide=wide)
    expected = reference.dcnv3_backward(grad_output.double(), *exact, *geometry, False, [True] * 3)
    for name, grad, right in zip(NAMES, grads, expected):
        assert_close(grad, right, name=f"grad_{name}")


# arguments, input size, channels of a group
CASES = {
    "plain": ({"padding": (1, 1), "groups": 2}, (6, 7), 16),
    "softmax": ({"padding": (1, 1), "groups": 2, "softmax": True}, (6, 7), 16),
    "no center": ({"padding": (1, 1), "groups": 3, "remove_center": True}, (5, 4), 16),
    "no center, softmax": ({"padding": (1, 1), "remove_center": True, "softmax": True}, (5, 4), 16),
    "an odd number of units": ({"padding": (1, 1), "groups": 3, "softmax": True}, (3, 3), 16),
    "four lanes": ({"padding": (1, 1), "groups": 3}, (3, 5), 32),
    "eight lanes, no center": ({"padding": (1, 1), "remove_center": True, "softmax": True}, (3, 5), 64),
    "two slices": ({"padding": (1, 1), "groups": 2, "softmax": True}, (5, 6), 32),
    "three slices": ({"padding": (1, 1), "groups": 2, "softmax": True}, (4, 5), 48),
    "many chunks": ({"padding": (1, 1), "softmax": True}, (3, 4), 192),
    "all of a warp": ({"padding": (1, 1), "groups": 2, "softmax": True}, (3, 3), 256),
    "half a vector": ({"padding": (1, 1), "groups": 3, "softmax": True}, (5, 6), 8),
    "half vectors": ({"kernel_size": (2, 3), "padding": (1, 1), "groups": 2}, (5, 6), 24),
    "1 channel": ({"padding": (1, 1), "groups": 3, "softmax": True}, (5, 6), 1),
    "2 channels": ({"padding": (1, 1), "groups": 3}, (5, 6), 2),
    "3 channels": ({"padding": (1, 1), "groups": 2, "softmax": True}, (5, 6), 3),
    "12 channels": ({"padding": (1, 1), "groups": 2, "softmax": True}, (5, 6), 12),
    "20 channels": ({"padding": (1, 1), "groups": 2}, (5, 6), 20),
    "strides": ({"padding": (1, 2), "stride": (2, 3), "groups": 2, "softmax": True}, (9, 10), 16),
    "scale": ({"padding": (1, 1), "offset_scale": 1.3, "groups": 2}, (6, 7), 16),
    "dilation": ({"padding": (2, 3), "dilation": (2, 3), "groups": 2, "offset_scale": 0.5}, (6, 9), 16),
    "no padding": ({"groups": 2}, (5, 3), 16),
    "much padding": ({"padding": (4, 5), "softmax": True}, (2, 3), 16),
    "oblong": ({"kernel_size": (3, 5), "padding": (1, 2), "groups": 2, "softmax": True}, (6, 7), 16),
    "oblong, no center": ({"kernel_size": (5, 3), "padding": (2, 1), "remove_center": True}, (6, 7), 16),
    "even": ({"kernel_size": (2, 4), "padding": (1, 2), "groups": 2, "softmax": True}, (5, 6), 16),
    "large": ({"kernel_size": (7, 7), "padding": (3, 3), "softmax": True}, (7, 8), 16),
    "one point": ({"kernel_size": (1, 1), "groups": 2, "softmax": True}, (5, 6), 16),
    "one pixel": ({"padding": (1, 1), "groups": 5, "softmax": True}, (1, 1), 16),
    "one row": ({"padding": (1, 1), "groups": 2}, (1, 9), 16),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(case, dtype, host):
    arguments, size, group_channels = CASES[case]
    *tensors, grad_output = oracle.draw(1, 2, size, group_channels, 2.0, **arguments)
    tensors[1] = oracle.off_the_grid(tensors[1], **arguments)
    compare(host, tensors, grad_output, arguments, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["softmax", "no center", "half a vector", "3 channels", "many chunks", "strides"])
def test_64_bit_indices(case, dtype, host):
    arguments, size, group_channels = CASES[case]
    *tensors, grad_output = oracle.draw(2, 2, size, group_channels, 2.0, **arguments)
    tensors[1] = oracle.off_the_grid(tensors[1], **arguments)
    compare(host, tensors, grad_output, arguments, dtype, wide=True)
    assert all(re.search("unsigned long", kernel) for kernel in host.kernels)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["softmax", "no center", "1 channel", "20 channels", "many chunks", "strides", "even"])
def test_deterministic(case, dtype, wide, host):
    arguments, size, group_channels = CASES[case]
    *tensors, grad_output = oracle.draw(3, 2, size, group_channels, 2.0, **arguments)
    tensors[1] = oracle.off_the_grid(tensors[1], **arguments)
    compare(host, tensors, grad_output, arguments, dtype, deterministic=True, wide=wide)
    first, *others = host.kernels
    (other,) = others
    assert first.startswith("deterministic_kernel<") and other.startswith(("backward_kernel<", "backward3x3_kernel<"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", golden.cases("op"))
def test_golden(name, dtype, host):
    tensors, arguments = golden_problem(golden.cases("op")[name])
    *tensors, grad_output = (t.to(dtype) for t in tensors)
    output = host.forward(*tensors, *schema(arguments))
    grads = host.backward(grad_output, *tensors, *schema(arguments))
    for which, result in zip(("output", "grad_input", "grad_offset", "grad_mask"), (output, *grads)):
        assert_close(result, golden.tensors("op")[f"{name}/{which}"], name=which)


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(problem=strategies.problems())
def test_any_problem(problem, host):
    *tensors, grad_output = problem[0]
    geometry = schema(problem[1])
    torch.testing.assert_close(
        host.forward(*tensors, *geometry), reference.dcnv3(*tensors, *geometry), rtol=1e-11, atol=1e-11
    )
    expected = reference.dcnv3_backward(grad_output, *tensors, *geometry, False, [True] * 3)
    for deterministic in (False, True):
        grads = host.backward(grad_output, *tensors, *geometry, deterministic=deterministic)
        for name, grad, right in zip(NAMES, grads, expected):
            torch.testing.assert_close(grad, right, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


# ---- semantics


def check_nowhere(host, case, value, dtype) -> None:
    """Every seventh coordinate of the offsets is `value`: nothing is read there, and its gradient is zero."""
    arguments, size, group_channels = CASES[case]
    *tensors, grad_output = oracle.draw(4, 2, size, group_channels, 1.0, **arguments)
    tensors[1] = oracle.off_the_grid(tensors[1], **arguments)
    tensors[1].view(-1)[::7] = value
    compare(host, tensors, grad_output, arguments, dtype)
    compare(host, tensors, grad_output, arguments, dtype, deterministic=True)
    grads = host.backward(*(t.to(dtype) for t in (grad_output, *tensors)), *schema(arguments))
    assert not grads[1].reshape(-1)[::7].any()


def check_pixel_centers(host, softmax, dtype) -> None:
    """All locations on the kinks of the interpolation, those on the border of the image among them."""
    arguments = {"padding": (2, 2), "groups": 2, "softmax": softmax}
    *tensors, grad_output = oracle.draw(6, 2, (4, 5), 16, 1.5, **arguments)
    tensors[1] = tensors[1].round()
    compare(host, tensors, grad_output, arguments, dtype)


@pytest.mark.parametrize(
    "case, value, dtype",
    cuda_host.in_turn(
        DTYPES, ["softmax", "no center", "3 channels", "even"], [math.nan, math.inf, -math.inf, 1e30, -1e30]
    ),
    ids=str,
)
def test_locations_that_are_nowhere(case, value, dtype, host):
    check_nowhere(host, case, value, dtype)


def test_a_mask_of_nan_does_not_count_outside(host):
    arguments, size, group_channels = CASES["plain"]
    *tensors, grad_output = oracle.draw(5, 1, size, group_channels, 1.0, **arguments)
    tensors[1].view(-1, 2)[::5] = -20.0
    tensors[2].view(-1)[::5] = math.nan
    compare(host, tensors, grad_output, arguments, torch.float64)
    compare(host, tensors, grad_output, arguments, torch.float32, deterministic=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softmax", [False, True])
def test_pixel_centers(softmax, dtype, host):
    check_pixel_centers(host, softmax, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("case", ["plain", "3 channels", "strides", "even"])
def test_infinities_reach_what_they_reach_in_the_reference(case, value, dtype, host):
    arguments, size, group_channels = CASES[case]
    *tensors, grad_output = oracle.draw(7, 2, size, group_channels, 2.0, **arguments)
    tensors[1] = oracle.off_the_grid(tensors[1], **arguments)
    tensors[1].view(-1, 2)[::3] = tensors[1].view(-1, 2)[::3].round()  # weights of exactly zero
    tensors[2] = tensors[2].abs() + 0.1  # so that infinities do not cancel
    tensors[0].view(-1)[::37] = value
    tensors, grad_output = [t.to(dtype) for t in tensors], grad_output.to(dtype)
    geometry, exact = schema(arguments), [t.double() for t in tensors]
    results = host.forward(*tensors, *geometry), *host.backward(grad_output, *tensors, *geometry)
    expected = (
        reference.dcnv3(*exact, *geometry),
        *reference.dcnv3_backward(grad_output.double(), *exact, *geometry, False, [True] * 3),
    )
    for result, right in zip(results, expected):
        assert torch.equal(result.isnan(), right.isnan()) and torch.equal(result.isposinf(), right.isposinf())
    assert not results[0].isfinite().all() and results[0].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["softmax", "even"])
def test_softmax_of_large_logits(case, dtype, host):
    arguments, size, group_channels = CASES[case]
    *tensors, grad_output = oracle.draw(8, 1, size, group_channels, 1.0, **arguments)
    tensors[1] = oracle.off_the_grid(tensors[1], **arguments)
    tensors[2] = tensors[2] * 300
    tensors[2].view(-1)[::4] = -math.inf
    compare(host, tensors, grad_output, arguments, dtype)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", ["softmax", "even", "20 channels"])
def test_part_of_the_gradients(case, deterministic, wanted, host):
    arguments, size, group_channels = CASES[case]
    *tensors, grad_output = oracle.draw(9, 2, size, group_channels, 1.0, **arguments)
    everything = host.backward(grad_output, *tensors, *schema(arguments), deterministic=deterministic)
    part = host.backward(grad_output, *tensors, *schema(arguments), deterministic=deterministic, wanted=wanted)
    for grad, right, want in zip(part, everything, (wanted[0], wanted[1], wanted[1])):
        if want:
            assert_close(grad, right)  # the order of atomic additions may be another
        else:
            assert grad is None


# ---- which kernel

FORWARD = {  # dtype, channels of a group -> channels of a thread
    (torch.float16, 16): 16,
    (torch.bfloat16, 32): 16,
    (torch.float16, 8): 8,
    (torch.float16, 24): 8,
    (torch.float16, 12): 1,
    (torch.float32, 16): 8,
    (torch.float32, 12): 4,
    (torch.float32, 3): 1,
    (torch.float64, 16): 4,
    (torch.float64, 6): 2,
    (torch.float64, 1): 1,
}


@pytest.mark.parametrize("dtype, group_channels", FORWARD, ids=str)
def test_vector_width(dtype, group_channels, host):
    tensors = [t.to(dtype) for t in oracle.draw(0, 1, (3, 3), group_channels, padding=(1, 1))]
    host.forward(*tensors[:3], *schema({"padding": (1, 1)}))
    (kernel,) = host.kernels
    assert kernel.split(", ")[1] == str(FORWARD[dtype, group_channels])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "arguments, points",
    [
        ({"padding": (1, 1)}, 9),
        ({"padding": (1, 1), "remove_center": True}, 8),
        ({"kernel_size": (2, 4)}, 0),
        ({"kernel_size": (1, 9)}, 0),
        ({"kernel_size": (5, 5)}, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("softmax", [False, True])
def test_kernel_sizes(softmax, arguments, points, dtype, host):
    arguments = {**arguments, "softmax": softmax}
    *tensors, grad_output = (t.to(dtype) for t in oracle.draw(0, 1, (9, 9), 16, **arguments))
    host.forward(*tensors, *schema(arguments))
    (kernel,) = host.kernels
    assert kernel.split(", ")[2:4] == [str(points), str(softmax and points > 0).lower()]
    host.backward(grad_output, *tensors, *schema(arguments))
    (kernel,) = host.kernels
    name, *parameters = re.split("<|, ", kernel)
    assert (name, parameters[1]) == (("backward3x3_kernel", str(points)) if points else ("backward_kernel", "4"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "group_channels, kernel",
    [(16, "3x3, 2"), (32, "3x3, 0"), (64, "3x3, 0"), (256, "3x3, 0"), (8, 4), (48, 4), (512, 4), (12, 4), (6, 1)],
    ids=str,
)
def test_lanes_of_the_backward(group_channels, kernel, dtype, host):
    """Two lanes of 8 channels have a kernel of their own; 4, 8, 16 and 32 another; all else takes the general one."""
    problem = large_problem(1, (9, 9), group_channels, (9, 9))
    (found,) = host.kernels_for(problem, str(dtype)[6:], "backward")
    name, *parameters = re.split("<|, ", found)
    if isinstance(kernel, int):
        assert (name, parameters[1]) == ("backward_kernel", str(kernel))
    else:
        assert (name, parameters[2]) == ("backward3x3_kernel", kernel[-1])


def test_division_by_multiplication(host):
    generator = torch.Generator().manual_seed(0)
    most = 2**31 - 1
    divisors = [1, 2, 3, 5, 7, 9, 10, 56, 112, 641, 1023, 1024, 1025, 65535, 65537, 2**30 - 1, 2**30, 2**30 + 1, most]
    divisors += torch.randint(1, most, (200,), generator=generator).tolist()
    for divisor in divisors:
        dividends = torch.randint(0, most, (500,), generator=generator).tolist()
        multiples = [divisor * k for k in torch.randint(0, most // divisor + 1, (100,), generator=generator).tolist()]
        dividends += [0, 1, most, *multiples, *(max(m - 1, 0) for m in multiples)]
        given, result = ((ctypes.c_uint32 * len(dividends))(*values) for values in (dividends, [0] * len(dividends)))
        host.library.divide(ctypes.c_uint32(divisor), given, result, ctypes.c_int64(len(dividends)))
        assert list(result) == [d // divisor for d in dividends], divisor


# ---- 2^31: where 32-bit indices end


def large_problem(n, size, channels, out_size, groups=1, softmax=False) -> cuda_host.Problem:
    """Sizes without tensors; output and input need not go together, for nobody looks."""
    pairs = (3, 3), (1, 1), (1, 1), (1, 1)
    sizes = n, *size, channels, *out_size, *(value for pair in pairs for value in pair)
    return cuda_host.Problem.dense(*sizes, groups, channels // groups, 9, 1.0, False, softmax)


@pytest.mark.parametrize(
    "direction, deterministic, problem, wide",
    [
        # elements of an image
        ("forward", False, (1, (2**15, 2**12), 16, (1, 1)), True),
        ("forward", False, (1, (2**15 - 1, 2**12), 16, (1, 1)), False),
        ("forward", False, (9, (2**14, 2**12), 16, (1, 1)), False),  # of a batch, they may be more
        ("backward", False, (1, (2**15, 2**12), 16, (1, 1)), True),
        ("backward", False, (1, (2**15 - 1, 2**12), 16, (1, 1)), False),
        ("backward", True, (1, (2**15, 2**12), 16, (1, 1)), True),
        ("backward", True, (1, (2**15 - 1, 2**12), 16, (1, 1)), False),
        # threads: 16 channels each, then 4
        ("forward", False, (1, (9, 9), 16, (2**16, 2**15)), True),
        ("forward", False, (1, (9, 9), 16, (2**16, 2**15 - 1)), False),
        ("forward", False, (1, (9, 9), 32, (2**16, 2**14)), True),
        ("forward", False, (8, (9, 9), 32, (2**16, 2**11), 2), True),
        ("backward", False, (1, (9, 9), 16, (2**14, 2**15)), True),
        ("backward", False, (1, (9, 9), 16, (2**14, 2**15 - 1)), False),
        ("backward", False, (2, (9, 9), 12, (2**14, 2**16)), True),
        # the deterministic kernel has a thread a channel and counts pixels of groups
        ("backward", True, (2**15, (1, 1), 2**16, (1, 1)), True),
        ("backward", True, (2**15 - 1, (1, 1), 2**16, (1, 1)), False),
        ("backward", True, (1, (9, 9), 16, (2**16, 2**15)), True),
        ("backward", True, (1, (9, 9), 16, (2**12, 2**15), 16), True),
    ],
    ids=str,
)
def test_which_problems_need_64_bit_indices(direction, deterministic, problem, wide, host):
    kernels = host.kernels_for(large_problem(*problem), "float16", direction, deterministic)
    assert len(kernels) == 1 + deterministic
    assert ("unsigned long" in kernels[0]) == wide, kernels


def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose memory comes into being where it is written: most of them never are."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags), dtype=dtype).view(shape)


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is not there until it is written (Linux)")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "dtype, n, size, group_channels, wide",
    [
        (torch.float16, 1, (2**13, 2**14 + 8), 16, True),
        (torch.float16, 1, (2**13, 2**14 - 1), 16, False),
        (torch.bfloat16, 4, (2**13, 2**14 - 1), 16, False),  # the last image begins beyond 2^32
        (torch.float32, 1, (2**13, 2**14 + 8), 16, True),
        (torch.float32, 1, (2**13, 2**14 - 1), 16, False),
        (torch.float64, 1, (2**12, 2**15 - 1), 16, False),
        (torch.float16, 1, (2**14, 2**15 + 8), 5, True),
        (torch.float16, 1, (2**13, 2**15), 7, False),
    ],
    ids=str,
)
def test_images_around_2_to_31_elements(dtype, n, size, group_channels, wide, deterministic, host):
    """Output pixels in the four corners of the image, against an image of nothing but these corners."""
    small, side = (8, 8), 4  # pixels of a corner
    arguments = {"padding": (1, 1), "stride": (7, 7), "softmax": True}
    *tensors, grad_output = oracle.draw(20, n, small, group_channels, **arguments)
    # multiples of 1/128 are exact beside coordinates of 2^15; odd ones are off the kinks
    tensors[1] = (torch.randint(-64, 64, tensors[1].shape) * 2 + 1).double() / 128
    tensors, grad_output = [t.to(dtype) for t in tensors], grad_output.to(dtype)
    large = untouched((n, *size, group_channels), dtype)
    grad_large = untouched(large.shape, cuda_host.COMPUTE[dtype])
    ends = [
        (slice(None), rows, columns)
        for rows in (slice(side), slice(-side, None))
        for columns in (slice(side), slice(-side, None))
    ]
    for end in ends:
        large[end] = tensors[0][end]
    geometry, exact = schema(arguments), [t.double() for t in tensors]
    strides = (size[0] - 1, size[1] - 1)
    far = schema({**arguments, "stride": strides})

    output = host.forward(large, *tensors[1:], *far)
    assert ("unsigned long" in host.kernels[0]) == wide
    assert_close(output, reference.dcnv3(*exact, *geometry), name="output")
    grads = host.backward(grad_output, large, *tensors[1:], *far, deterministic=deterministic, grad_input=grad_large)
    assert ("unsigned long" in host.kernels[0]) == wide
    expected = reference.dcnv3_backward(grad_output.double(), *exact, *geometry, False, [True] * 3)
    for name, grad, right in zip(NAMES[1:], grads, expected[1:]):
        assert_close(grad, right, name=f"grad_{name}")
    for end in ends:
        assert_close(grad_large[end].to(dtype), expected[0][end], name="grad_input")


# ---- the stand-in for CUDA itself


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_half_types_round_as_torch_does(dtype, host):
    values = torch.arange(2**16).to(torch.uint16).view(dtype).float()
    values = values[values.isfinite()]
    values = torch.cat([values, values * 1.0003, torch.tensor([65519.0, 65520.0, 1e30, 2.0**-24, 2.0**-25, 1e-40])])
    values = values[torch.randperm(len(values))[:20000]]
    for value in values.tolist():
        result = host.library.round_trip(str(dtype)[6:].encode(), ctypes.c_float(value))
        assert result == torch.tensor(value).to(dtype).item()
    for value in (math.inf, -math.inf):
        assert host.library.round_trip(str(dtype)[6:].encode(), ctypes.c_float(value)) == value
    assert math.isnan(host.library.round_trip(str(dtype)[6:].encode(), ctypes.c_float(math.nan)))


def test_misaligned_tensors_are_noticed(host):
    tensors = [t.float() for t in oracle.draw(0, 1, (3, 3), 16)]
    tensors[0] = torch.cat([torch.zeros(1), tensors[0].flatten()])[1:].view(tensors[0].shape)
    with pytest.raises(RuntimeError, match="misaligned"):
        host.forward(*tensors[:3], *schema({}))


def sanitizer_libraries() -> str:
    """What must be loaded before Python for AddressSanitizer to see the memory of tensors; empty if it is not there."""
    names = ("libasan.so", "libubsan.so")
    found = [
        subprocess.run([cuda_host.COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in names
    ]
    return " ".join(found) if all(Path(path).is_absolute() for path in found) else ""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Runs code in Python with a build of the kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

    The kernels see no difference between the addresses of bfloat16, which it does not have, and float16, which alone
    has all layouts there.
    """
    if not sanitizer_libraries():
        pytest.skip(f"needs the sanitizer libraries of {cuda_host.COMPILER}")
    library = cuda_host.shared(tmp_path_factory, *cuda_host.SANITIZERS, "-DLAYOUTS_OF_HALF")
    environment = dict(
        os.environ,
        LD_PRELOAD=sanitizer_libraries(),
        ASAN_OPTIONS="detect_leaks=0",
        OMP_NUM_THREADS="1",
        PYTHONPATH=str(ROOT),
        **{cuda_host.LIBRARY: str(library)},
    )

    def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
        # the operators alone: the models take seconds more to import
        code = f"import internimage_command as c; c.starting = True\n{code}"
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)

    return run


PYTEST = "import sys, pytest; sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
SANITIZED = """
not bfloat16 and (
  test_cuda_host and (test_against_the_reference or nowhere or (64_bit or deterministic) and float16)
  or test_cuda_layouts and test_against_the_reference and float16 and (dcnv4 or odd or deform)
)
"""


def test_under_address_sanitizer(sanitized):
    """Of the layouts: nothing is read or written past the end of the one tensor."""
    files = "tests/test_cuda_host.py", "tests/test_cuda_layouts.py"
    result = sanitized(PYTEST, *files, "-k", " ".join(SANITIZED.split()))
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    assert re.search(r"\d{3,} passed", result.stdout)


ROW_MISSING = """
import os, sys, torch
sys.path.insert(0, "tests")
import cuda_host, oracle
input, offset, mask, _ = (t.to(torch.float16) for t in oracle.draw(0, 1, (5, 6), 16, padding=(1, 1)))
host = cuda_host.Host(os.environ["%s"])
whole = host.problem
host.problem = lambda short, *rest: whole(input, *rest)  # an image of 5 rows, of which 4 are there
host.forward(input[:, :4].clone(), offset, mask, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1.0, False, False)
"""


def test_address_sanitizer_sees_a_missing_row(sanitized):
    result = sanitized(ROW_MISSING % cuda_host.LIBRARY)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr and "csrc/cuda/gather/forward.cuh" in result.stderr
