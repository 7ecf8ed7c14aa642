# SPDX-License-Identifier: MIT
"""The variants of the CUDA kernels (csrc/cuda/gather/variants.h) on a CPU: against the reference and the default ones.

Their launches: test_nvrtc.py; their machine code: test_cuda_compile.py.
"""

import math
import re

import cuda_host
import oracle
import pytest
import strategies
import torch
from conftest import assert_close
from hypothesis import HealthCheck, given, settings
from test_cuda_host import (
    CASES,
    NAMES,
    PYTEST,
    check_nowhere,
    check_pixel_centers,
    compare,
    host,  # noqa: F401
    large_problem,
    sanitized,  # noqa: F401
)
from test_dcnv3 import schema

from internimage.ops import dcnv3_reference as reference

HALF = [torch.float16, torch.bfloat16]
EVERYTHING = "tiles,window,fixed"

pytestmark = pytest.mark.skipif(cuda_host.COMPILER is None, reason="needs a C++ compiler (g++, or CXX)")


@pytest.fixture
def chosen(host):  # noqa: F811
    """The host's build with all variants chosen."""
    host.choose(EVERYTHING)
    yield host
    host.choose()
    host.shuffle()


def families(host) -> list[str]:  # noqa: F811
    """Of the kernels of the last call: such as "tiles"; "backward" is that of 3x3 kernels, too."""
    return [kernel.split("_kernel")[0].removesuffix("3x3") for kernel in host.kernels]


def draw(case: str, dtype: torch.dtype, std: float = 2.0, n: int = 2, seed: int = 1):
    """Geometry, then input, offset, mask and grad_output of a case, or of one's own."""
    arguments, size, group_channels = CASES[case] if isinstance(case, str) else case
    *tensors, grad_output = oracle.draw(seed, n, size, group_channels, std, **arguments)
    tensors[1] = oracle.off_the_grid(tensors[1], **arguments)
    return schema(arguments), [t.to(dtype) for t in tensors], grad_output.to(dtype)


# ---- which


@pytest.mark.parametrize("names", ["", "tiles", "window,fixed", "fixed, tiles ,window", "tiles,tiles"])
def test_lists(names, host):  # noqa: F811
    assert host.library.set_variants(names.encode())
    host.choose()


@pytest.mark.parametrize(
    "names", ["tile", "tiles,", ",", " ", "tiles;window", "tiles window", "all", "Tiles", "tilesx"]
)
def test_lists_with_another_name(names, host):  # noqa: F811
    assert not host.library.set_variants(names.encode())
    host.choose()


@pytest.mark.parametrize("dtype", cuda_host.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(case, dtype, chosen):
    """All problems with all variants: what a variant does not serve goes to the default kernel."""
    arguments, size, group_channels = CASES[case]
    *tensors, grad_output = oracle.draw(1, 2, size, group_channels, 2.0, **arguments)
    tensors[1] = oracle.off_the_grid(tensors[1], **arguments)
    is_3x3 = arguments.get("kernel_size", (3, 3)) == (3, 3)
    chosen.forward(*(t.to(dtype) for t in tensors), *schema(arguments))
    vectors = group_channels % (32 // dtype.itemsize) == 0
    assert families(chosen) == (["tiles"] if is_3x3 and vectors and dtype != torch.float64 else ["forward"])
    dense = is_3x3 and not {"stride", "dilation"} & arguments.keys() and group_channels == 16 and dtype in HALF
    last = "window" if dense else "backward"
    compare(chosen, tensors, grad_output, arguments, dtype)
    assert families(chosen) == [last]
    compare(chosen, tensors, grad_output, arguments, dtype, deterministic=True)
    sums = ["fixed_range", "fixed_sum", "fixed_slow", "fixed_round"] if dtype != torch.float64 else ["deterministic"]
    assert families(chosen) == [*sums, last]


@pytest.mark.parametrize("dtype", cuda_host.DTYPES, ids=str)
@pytest.mark.parametrize("case", ["softmax", "no center", "3 channels", "strides"])
def test_64_bit_indices(case, dtype, chosen):
    arguments, size, group_channels = CASES[case]
    *tensors, grad_output = oracle.draw(2, 2, size, group_channels, 2.0, **arguments)
    tensors[1] = oracle.off_the_grid(tensors[1], **arguments)
    compare(chosen, tensors, grad_output, arguments, dtype, deterministic=True, wide=True)
    assert all(re.search("unsigned long", kernel) for kernel in chosen.kernels)
    assert families(chosen)[-1] == "backward"


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(problem=strategies.problems())
def test_any_problem(problem, chosen):
    """In float32, whose sums have no tolerance for a term that is missing."""
    *tensors, grad_output = (t.float() for t in problem[0])
    geometry = schema(problem[1])
    # coordinates that are computed in float32 may be beyond a kink, so that the reference does so, too
    chosen.choose()
    expected = chosen.forward(*tensors, *geometry)
    grads = chosen.backward(grad_output, *tensors, *geometry)
    chosen.choose(EVERYTHING)
    assert torch.equal(chosen.forward(*tensors, *geometry), expected)
    results = chosen.backward(grad_output, *tensors, *geometry, deterministic=True)
    for name, result, right in zip(NAMES, results, grads):
        assert_close(result, right, 1e-5, name)


@pytest.mark.parametrize(
    "direction, deterministic, problem, family",
    [
        ("forward", False, (1, (9, 9), 16, (2**15, 2**16 - 8)), "tiles"),
        # 2^31 threads with those beyond the edges, but fewer without
        ("forward", False, (1, (9, 9), 16, (2**15, 2**16 - 1)), "forward"),
        ("forward", False, (1, (2**15, 2**12), 16, (1, 1)), "forward"),
        ("backward", False, (1, (9, 9), 16, (2**15, 2**15)), "window"),
        ("backward", False, (1, (9, 9), 16, (2**15, 2**16)), "backward"),
        ("backward", False, (1, (2**15, 2**12), 16, (1, 1)), "backward"),
        ("backward", True, (1, (9, 9), 16, (2**14, 2**12)), "fixed_range"),
        ("backward", True, (1, (9, 9), 16, (2**15, 2**12)), "deterministic"),  # the sums would have too few bits
    ],
    ids=str,
)
def test_large_problems(direction, deterministic, problem, family, chosen):
    kernels = chosen.kernels_for(large_problem(*problem), "float16", direction, deterministic)
    assert kernels[0].startswith(f"{family}_kernel<"), kernels


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", ["softmax", "no center"])
def test_part_of_the_gradients(case, deterministic, wanted, chosen):
    geometry, tensors, grad_output = draw(case, torch.float16)
    everything = chosen.backward(grad_output, *tensors, *geometry, deterministic=deterministic)
    part = chosen.backward(grad_output, *tensors, *geometry, deterministic=deterministic, wanted=wanted)
    for grad, right, want in zip(part, everything, (wanted[0], wanted[1], wanted[1])):
        assert (grad is not None) == want
        if want:
            assert_close(grad, right, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30])
@pytest.mark.parametrize("case", ["softmax", "no center", "3 channels"])
def test_locations_that_are_nowhere(case, value, dtype, chosen):
    check_nowhere(chosen, case, value, dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("softmax", [False, True])
def test_pixel_centers(softmax, dtype, chosen):
    check_pixel_centers(chosen, softmax, dtype)


# ---- tiles


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (7, 9), (17, 3), (4, 29), (16, 11)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 8, 11])
def test_tiles_are_the_default_forward(groups, size, dtype, softmax, chosen):
    """Bit by bit, whatever is left at the edges and of the groups; a batch of two."""
    group_channels = 32 if dtype == torch.float32 and groups % 2 else 16  # 4 or 2 slices of float32
    geometry, tensors, _ = draw(
        ({"padding": (1, 1), "groups": groups, "softmax": softmax}, size, group_channels), dtype
    )
    output = chosen.forward(*tensors, *geometry)
    assert families(chosen) == ["tiles"]
    chosen.choose()
    assert torch.equal(output, chosen.forward(*tensors, *geometry)) and families(chosen) == ["forward"]


# ---- window


@pytest.mark.parametrize(
    "size, std, dtype",
    cuda_host.in_turn(HALF, [(4, 8), (5, 9), (3, 7), (9, 17), (1, 30), (13, 2)], [0.0, 0.3, 1.0, 5.0, 40.0]),
    ids=str,
)
def test_window(size, std, dtype, chosen):
    """Sampling points inside and outside of the window, on all sides; the sums in float32 before they are rounded."""
    arguments = {"padding": (1, 1), "groups": 3, "softmax": True}
    geometry, tensors, grad_output = draw((arguments, size, 16), dtype, std)
    sums = torch.zeros_like(tensors[0], dtype=torch.float32)
    grads = chosen.backward(grad_output, *tensors, *geometry, grad_input=sums)
    assert families(chosen) == ["window"]
    exact = [t.double() for t in tensors]
    expected = reference.dcnv3_backward(grad_output.double(), *exact, *geometry, False, [True] * 3)
    # a weight has 22 or 16 bits and is rounded for each corner that is added to it; the coordinates are in float32
    assert_close(sums, expected[0], 2e-6 if dtype == torch.float16 else 1e-4, "sums")
    for name, grad, right in zip(NAMES[1:], grads, expected[1:]):
        assert_close(grad, right, name=name)


@pytest.mark.parametrize("padding", [(0, 0), (2, 1), (3, 6), (0, 9)], ids=str)
@pytest.mark.parametrize("remove_center", [False, True])
def test_window_and_padding(remove_center, padding, chosen):
    """Tiles whose window is partly, or all, outside of the image."""
    arguments = {"padding": padding, "groups": 2, "remove_center": remove_center, "offset_scale": 0.7}
    *tensors, grad_output = oracle.draw(1, 2, (6, 5), 16, 1.0, **arguments)
    tensors[1] = oracle.off_the_grid(tensors[1], **arguments)
    compare(chosen, tensors, grad_output, arguments, torch.float16)
    assert families(chosen) == ["window"]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("magnitude", [0.0, 2.0**-20, 2.0**-10, 1.0, 2.0**12])
def test_window_and_masks_of_any_magnitude(magnitude, dtype, chosen):
    """The parts of a weight neither overflow nor lose their last bits, though float16 has few exponents."""
    geometry, tensors, grad_output = draw("plain", torch.float64, 0.3)
    tensors[2] = tensors[2].clamp(-4, 4) * magnitude
    tensors[1][..., ::2] = -tensors[1][..., ::2].round()  # many points of a unit at one pixel: weights add up
    tensors, grad_output = [t.to(dtype) for t in tensors], grad_output.to(dtype)
    sums = torch.zeros_like(tensors[0], dtype=torch.float32)
    chosen.backward(grad_output, *tensors, *geometry, grad_input=sums)
    exact = [t.double() for t in tensors]
    expected = reference.dcnv3_backward(grad_output.double(), *exact, *geometry, False, [True] * 3)
    assert_close(sums, expected[0], 2e-6 if dtype == torch.float16 else 1e-4)


@pytest.mark.parametrize(
    "softmax, which, value, dtype",
    cuda_host.in_turn(HALF, [False, True], ["input", "mask", "grad_output", "all"], [math.inf, -math.inf, math.nan]),
    ids=str,
)
def test_what_is_not_finite_in_a_window(softmax, which, value, dtype, chosen):
    """Reaches what it reaches with the default kernel, and no more: weights of exactly zero are among them, and tiles
    without such values."""
    arguments = {"padding": (1, 1), "groups": 2, "softmax": softmax}
    geometry, tensors, grad_output = draw((arguments, (9, 18), 16), dtype, 1.0)
    tensors[1].view(-1, 2)[::3] = tensors[1].view(-1, 2)[::3].round()
    tensors[2] = tensors[2].abs() + 0.1
    if which in ("input", "all"):
        tensors[0].view(-1)[100:1500:97] = value
    if which in ("mask", "all"):
        tensors[2].view(-1)[100:800:97] = value
    if which in ("grad_output", "all"):
        grad_output.view(-1)[100:800:97] = value
    results = chosen.backward(grad_output, *tensors, *geometry)
    assert families(chosen) == ["window"]
    chosen.choose()
    expected = chosen.backward(grad_output, *tensors, *geometry)
    is_finite = softmax and which == "mask" and value == -math.inf  # factors of zero
    assert all(t.isfinite().all() for t in expected) == is_finite and all(t.isfinite().any() for t in expected)
    for name, result, right in zip(NAMES, results, expected):
        assert torch.equal(result.isnan(), right.isnan()) and torch.equal(result.isposinf(), right.isposinf()), name
        assert_close(*(torch.where(right.isfinite(), t, 0) for t in (result, right)), name=name)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_window_with_large_gradients(dtype, chosen):
    """Sums of what is near the largest value are infinite where they are with the default kernel."""
    geometry, tensors, grad_output = draw("softmax", dtype, 0.3)
    grad_output = grad_output.sign() * torch.finfo(dtype).max * 0.3
    sums, expected = (torch.zeros_like(tensors[0], dtype=torch.float32) for _ in range(2))
    chosen.backward(grad_output, *tensors, *geometry, grad_input=sums)
    chosen.choose()
    chosen.backward(grad_output, *tensors, *geometry, grad_input=expected)
    assert_close(sums, expected, 1e-4)


# ---- fixed


def test_another_order_of_threads_gives_other_bits(host):  # noqa: F811
    """Of the default kernel, else the next test shows nothing."""
    geometry, tensors, grad_output = draw("softmax", torch.float32)
    sums = []
    for seed in range(3):
        host.shuffle(seed)
        sums.append(host.backward(grad_output, *tensors, *geometry)[0])
    host.shuffle()
    assert not torch.equal(sums[0], sums[1]) and not torch.equal(sums[1], sums[2])
    assert_close(sums[1], sums[0], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", ["plain", "softmax", "3 channels", "20 channels", "strides", "even", "large"])
def test_fixed_point_sums_do_not_depend_on_the_order(case, dtype, chosen):
    geometry, tensors, grad_output = draw(case, dtype)
    grads = []
    for seed in range(3):
        chosen.shuffle(seed)
        grads.append(chosen.backward(grad_output, *tensors, *geometry, deterministic=True))
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other))


def bits_of(mask: torch.Tensor, points: int) -> int:
    """`fixed_bits` of select.h: below the largest product."""
    return 58 - math.ceil(math.log2(mask.shape[1] * mask.shape[2] * points))


@pytest.mark.parametrize("std", [0.3, 5.0])
@pytest.mark.parametrize(
    "scales", [(1, 1), (1e-30, 1e25), (1e37, 1e-37), (2e38, 1e-3), (1e-38, 1e-6), (1e-42, 1)], ids=str
)
@pytest.mark.parametrize("softmax", [False, True])
def test_error_of_fixed_point_sums(softmax, scales, std, chosen):
    """At most what fixed.cuh says, with coordinates that float32 has exactly. `scales`: of grad_output and mask."""
    arguments = {"padding": (1, 1), "groups": 2, "softmax": softmax}
    *tensors, grad_output = oracle.draw(11, 2, (9, 8), 16, std, **arguments)
    tensors[1] = (tensors[1] * 64).round() / 64
    grad_output = grad_output.clamp(-1.6, 1.6) * scales[0]
    tensors[2] = tensors[2].clamp(-1.6, 1.6) * (1 if softmax else scales[1])
    tensors, grad_output = [t.float() for t in tensors], grad_output.float()
    geometry = schema(arguments)
    result = chosen.backward(grad_output, *tensors, *geometry, deterministic=True)[0]
    exact = [t.double() for t in tensors]
    right = reference.dcnv3_backward(grad_output.double(), *exact, *geometry, False, [True] * 3)[0]
    if softmax:  # terms of the same magnitude, without the softmax
        exact[2] = exact[2].unflatten(-1, (2, 9)).softmax(-1).flatten(-2)
    size = schema({**arguments, "softmax": False})
    terms = reference.dcnv3_backward(
        grad_output.double().abs(), exact[0], exact[1], exact[2].abs(), *size, False, [True] * 3
    )[0]
    count = 9 * 8 * 9  # of an image, at most
    largest = max(grad_output.abs().max().item(), 2.0**-126) * max(
        1 if softmax else exact[2].abs().max().item(), 2.0**-126
    )
    relative = 3 * 2.0**-24 + (2.0**-20 if softmax else 0)  # the factors of a softmax are rounded, too
    bound = (
        terms * relative + count * largest * 2.0 ** -(bits_of(tensors[2], 9) + 1) + right.abs() * 2.0**-24 + 2.0**-149
    )
    assert ((result.double() - right).abs() <= bound).all()
    assert right.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_fixed_point_sums_do_not_overflow(dtype, chosen):
    """All points of an image at one pixel, with the largest products that there are."""
    arguments = {"padding": (1, 1)}
    *tensors, grad_output = oracle.draw(12, 1, (6, 7), 16, 0.0, **arguments)
    x, y = oracle.locations(tensors[1], **arguments)
    tensors[1] = torch.stack((3 - x, 2 - y), dim=-1).reshape(tensors[1].shape)
    tensors[2] = torch.full_like(tensors[2], 1.984375)  # 2 - 2^-6, which all types have
    grad_output = torch.full_like(grad_output, -1.984375)
    sums = torch.zeros_like(tensors[0], dtype=torch.float32)
    tensors, grad_output = [t.to(dtype) for t in tensors], grad_output.to(dtype)
    chosen.backward(grad_output, *tensors, *schema(arguments), deterministic=True, grad_input=sums)
    expected = torch.zeros_like(sums)
    expected[:, 2, 3] = -(1.984375**2) * 6 * 7 * 9
    assert torch.equal(sums, expected)


@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize(
    "which, size, groups, kernel_size",
    [("mask", (5, 3), 2, (3, 3)), ("grad_output", (5, 3), 2, (3, 3)), ("grad_output", (35, 34), 8, (1, 1))],
    ids=str,
)
def test_the_largest_value_counts_wherever_it_is(which, size, groups, kernel_size, at, chosen):
    """The larger grad_output has more values than there are threads that read them (2^17)."""
    arguments = {"groups": groups, "kernel_size": kernel_size}
    geometry, tensors, grad_output = draw((arguments, size, 16), torch.float32, 0.3, n=1)
    (tensors[2] if which == "mask" else grad_output).view(-1)[at] = 2.0**40
    result = chosen.backward(grad_output, *tensors, *geometry, deterministic=True, wanted=(True, False))[0]
    assert families(chosen)[0] == "fixed_range"
    chosen.choose()
    expected = chosen.backward(grad_output, *tensors, *geometry, wanted=(True, False))[0]
    assert_close(result, expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("which", ["mask", "grad_output"])
@pytest.mark.parametrize("case", ["plain", "softmax", "3 channels"])
def test_what_is_not_finite_is_summed_by_the_deterministic_kernel(case, which, value, dtype, chosen):
    geometry, tensors, grad_output = draw(case, dtype)
    (tensors[2] if which == "mask" else grad_output).view(-1)[30:200:41] = value
    result = chosen.backward(grad_output, *tensors, *geometry, deterministic=True)[0]
    assert families(chosen)[0] == "fixed_range"
    chosen.choose()
    expected = chosen.backward(grad_output, *tensors, *geometry, deterministic=True)[0]
    assert families(chosen)[0] == "deterministic"
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


# ---- the stand-in for CUDA itself


def test_different_operations_of_a_warp_are_noticed(host):  # noqa: F811
    host.library.different_operations.restype = cuda_host.ctypes.c_char_p
    for which in range(3):
        said = host.library.different_operations(which).decode()
        assert said.startswith("the threads of a warp came to different operations, "), said


def test_a_product_of_matrices(host):  # noqa: F811
    """The fragments are where mma.cuh says they are, which is what the PTX ISA says."""
    a, b, c = torch.randn(16, 16).half(), torch.randn(16, 8).half(), torch.randn(16, 8)
    result = torch.zeros(16, 8)
    host.library.product(*(cuda_host.pointer(t) for t in (a, b, c, result)))
    assert_close(result, c.double() + a.double() @ b.double(), 1e-6)


@pytest.mark.parametrize("columns", range(8))
def test_words_of_a_window(columns, host):  # noqa: F811
    """No two values have one place; threads that access it together use all banks, as window.cuh says."""
    word = host.library.window_word
    assert {word(9, column, unit) for column in range(16) for unit in range(32)} == set(range(9 * 512, 10 * 512))
    positions = {host.library.window_position(unit) for unit in range(32)}
    assert positions == set(range(32))
    own = [(unit, *divmod(host.library.window_position(unit), 8)) for unit in range(32)]
    assert len({word(row, column + columns, unit) % 32 for unit, row, column in own}) == 32
    for first in range(0, 32, 8):  # eight threads access 16 bytes each at once
        lanes = [divmod(lane, 4) for lane in range(first, first + 8)]
        for half in range(2):
            assert len({word(0, 8 * half + 2 * pair, 2 * row) // 4 % 8 for row, pair in lanes}) == 8
        for step in range(4):
            assert len({word(0, 2 * row, 8 * step + 2 * pair) // 4 % 8 for row, pair in lanes}) == 8


@pytest.mark.slow
def test_under_address_sanitizer(sanitized):  # noqa: F811
    which = "(reference or tiles_are or test_window or order or nowhere) and (float16 or plain) and not bfloat16"
    which += " and not (tiles_are and 11)"
    result = sanitized(PYTEST, "tests/test_cuda_variants.py", "-k", which)
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    assert re.search(r"\d{3,} passed", result.stdout)
