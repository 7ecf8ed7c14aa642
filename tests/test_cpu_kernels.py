# SPDX-License-Identifier: MIT
"""What is specific to the compiled CPU kernels: instruction sets, vector tails, threads, the binary's symbols.

Their arithmetic is tested in test_dcnv3.py, which tests whatever backend serves the operator.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import launched
import pytest
import torch
from conftest import assert_close

import internimage
from internimage.extension import backend, has_kernel
from internimage.ops import dcnv3
from internimage.ops import dcnv3_reference as reference

FOLDER = Path(internimage.__file__).parent
TESTS = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    not has_kernel("dcnv3", "cpu"),
    reason=f"needs the compiled CPU kernels: {backend('dcnv3', 'cpu').reason}",
)

CAPABILITIES = ["default", "avx2", "avx512"]


def run_python(capability, code, *arguments):
    """In a process that has not called the kernels yet."""
    variables = os.environ | {"INTERNIMAGE_CPU_CAPABILITY": capability}
    variables.setdefault("INTERNIMAGE_TEST_EXAMPLES", "60")  # all of them are drawn in `make test-machines`
    return launched.python("-c", code, *arguments, variables=variables, timeout=1000)


USED = "import torch, internimage; print(torch.ops.internimage.cpu_capability(), flush=True)\n"


@pytest.fixture(scope="module")
def best() -> str:
    """The best instruction set of this processor; for this process the variable may be set to a lower one."""
    return run_python(CAPABILITIES[-1], USED).stdout.strip()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_gives_the_golden_numbers(capability, best):
    """The variable is read once per process, so each instruction set gets a process, except that of this process."""
    used = min(capability, best, key=CAPABILITIES.index)
    if used == torch.ops.internimage.cpu_capability():
        return  # these tests are run with it anyway
    names = (
        "golden or half or empty or one_pixel or layout or batches or nowhere or group_channels or strips or operator"
        " or shapes or tails or expanded or output_mask"
    )
    files = ["test_dcnv3.py", "test_dcnv3_properties.py", "test_deform_columns.py", "test_cpu_kernels.py"]
    files += ["test_gelu.py", "test_query.py", "test_layer_norm.py", "test_block.py"]
    selected = [
        *(str(TESTS / file) for file in files),
        "-k",
        f"({names}) and not every_instruction_set",
        "-m",
        "not slow and not gpu",
    ]
    pytest_ = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    result = run_python(capability, USED + pytest_, "-q", "-p", "no:cacheprovider", *selected)
    assert result.returncode == 0, result.stdout[-3000:]
    assert result.stdout.splitlines()[0] == used


def draw(groups, channels, size=(2, 5, 7), points=9, dtype=torch.float64):
    n, h, w = size
    tensors = (
        torch.randn(n, h, w, groups * channels, dtype=torch.float64),
        torch.randn(n, h, w, groups * points * 2, dtype=torch.float64) * 2,
        torch.randn(n, h, w, groups * points, dtype=torch.float64),
        torch.randn(n, h, w, groups * channels, dtype=torch.float64),
    )
    return [t.to(dtype) for t in tensors]


def geometry(groups, size=3, offset_scale=1.0):
    """A square kernel with softmax, whose output has the input's size."""
    return [size] * 2, [1, 1], [size // 2] * 2, [1, 1], groups, offset_scale, False, True


def check_against_reference(tensors, *arguments):
    """Output and gradients are those of the reference in float64 with the same (rounded) numbers."""
    *inputs, grad = tensors
    *wide, wide_grad = (t.double() for t in tensors)
    output = torch.ops.internimage.dcnv3(*inputs, *arguments)
    assert_close(output, reference.dcnv3(*wide, *arguments), name="output")
    grads = torch.ops.internimage.dcnv3_backward(grad, *inputs, *arguments, False, [True] * 3)
    expected = reference.dcnv3_backward(wide_grad, *wide, *arguments, False, [True] * 3)
    for name, got, want in zip(("input", "offset", "mask"), grads, expected):
        assert_close(got, want, name=f"grad_{name}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 7, 8, 12, 15, 16, 17, 20, 24, 31, 32, 33, 48, 257, 1024])
def test_group_channels(channels, dtype):
    """All tails of all vector widths."""
    check_against_reference(draw(2, channels, (1, 4, 5), dtype=dtype), *geometry(2))


@pytest.mark.parametrize("groups, points", [(1, 9), (40, 9), (128, 9), (3, 49), (2, 1225)])
def test_strips(groups, points):
    """From many pixels per strip down to a pixel that has more points than a strip should."""
    check_against_reference(draw(groups, 4, (1, 3, 41), points), *geometry(groups, round(points**0.5), 0.5))


@pytest.mark.parametrize("batch", [1, 3, 33])
def test_threads_do_not_change_a_bit(batch):
    x, offset, mask, grad = draw(6, 16, (batch, 9, 11), dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            tensors = [t.clone().requires_grad_() for t in (x, offset, mask)]
            output = dcnv3(*tensors, padding=1, groups=6, softmax=True)
            results.append([output, *torch.autograd.grad(output, tensors, grad)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


def layouts(tensor):
    """The tensor's numbers in other places: with and without an even distance from one pixel to the next."""
    n, h, w, c = tensor.shape
    wide = torch.full((n, h, w, 2 * c + 40), float("nan"), dtype=tensor.dtype)
    for begin in (0, 1, c + 40):
        view = wide.clone()[..., begin : begin + c]
        view.copy_(tensor)
        yield f"part of channels, from {begin}", view
    tight = torch.full((n, h, w, c + 1), float("nan"), dtype=tensor.dtype)[..., :c]
    yield "one more channel", tight.copy_(tensor)
    rows = torch.full((n, h, w + 1, c), float("nan"), dtype=tensor.dtype)[:, :, :w]
    yield "longer rows", rows.copy_(tensor)
    images = torch.full((n, h + 1, w, c), float("nan"), dtype=tensor.dtype)[:, :h]
    yield "taller images", images.copy_(tensor)
    yield "channels first", tensor.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    yield "columns first", tensor.transpose(1, 2).contiguous().transpose(1, 2)
    yield "every other channel", torch.full((n, h, w, 2 * c), 7.0, dtype=tensor.dtype)[..., ::2].copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 3, 40])
@pytest.mark.parametrize("size", [(2, 5, 7), (1, 1, 1), (3, 1, 1), (1, 1, 9), (2, 9, 1), (1, 2, 130)], ids=str)
def test_layout_of_offset_and_mask_changes_no_bit(size, groups, dtype):
    """Parts of one tensor's channels are read where they are; nothing beside them is, or counts."""
    x, offset, mask, grad = draw(groups, 5, size, dtype=dtype)
    arguments = geometry(groups)
    expected = torch.ops.internimage.dcnv3(x, offset, mask, *arguments)
    grads = torch.ops.internimage.dcnv3_backward(grad, x, offset, mask, *arguments, False, [True] * 3)
    both = torch.cat([offset, mask], -1).split([offset.shape[-1], mask.shape[-1]], -1)
    pairs = [("parts of one", both), *((name, (view, mask)) for name, view in layouts(offset))]
    pairs += [(name, (offset, view)) for name, view in layouts(mask)]
    for name, pair in pairs:
        assert torch.equal(pair[0], offset) and torch.equal(pair[1], mask)
        assert torch.equal(torch.ops.internimage.dcnv3(x, *pair, *arguments), expected), name
    for pair in (both, (pairs[4][1][0], mask)):
        found = torch.ops.internimage.dcnv3_backward(grad, x, *pair, *arguments, False, [True] * 3)
        assert all(torch.equal(a, b) for a, b in zip(found, grads))


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (3,), (0, 1, 2), (0, 1, 2, 3), (1, 2)], ids=str)
def test_expanded_offset_and_mask_change_no_bit(axes, softmax):
    """Of a stride of zero."""
    x, offset, mask, _ = draw(2, 6, (3, 4, 5), dtype=torch.float32)
    arguments = [*geometry(2)[:-1], softmax]
    for axis in axes:
        offset, mask = offset.narrow(axis, 0, 1), mask.narrow(axis, 0, 1)
    views = offset.expand(3, 4, 5, 36), mask.expand(3, 4, 5, 18)
    expected = torch.ops.internimage.dcnv3(x, *(view.contiguous() for view in views), *arguments)
    assert torch.equal(torch.ops.internimage.dcnv3(x, *views, *arguments), expected)


def test_infinities_stay_where_they_are():
    """An infinite pixel affects the same outputs as in the reference, and no others."""
    x, offset, mask, _ = draw(1, 16, (1, 6, 6), dtype=torch.float64)
    x[0, 0, 0, 3] = float("inf")
    x[0, 5, 5, 0] = float("nan")
    offset[0, 2, 2, :6] = 1e30
    output = torch.ops.internimage.dcnv3(x, offset, mask, *geometry(1))
    expected = reference.dcnv3(x, offset, mask, *geometry(1))
    assert torch.equal(output.isfinite(), expected.isfinite())
    assert not expected.isfinite().all() and expected.isfinite().any()


@pytest.mark.parametrize(
    "change, groups, message",
    [
        (lambda offset: offset[..., :-1], 2, "shape that input and kernel ask for"),
        (lambda offset: offset.double(), 2, "one dtype"),
        (lambda offset: offset, 3, "groups must divide"),
    ],
    ids=["shape", "dtype", "groups"],
)
def test_refusals(change, groups, message):
    """Wrong arguments that bypass the checking function are refused, not read out of bounds."""
    x, offset, mask, _ = draw(2, 4, (1, 4, 4), dtype=torch.float32)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.internimage.dcnv3(x, change(offset), mask, *geometry(groups))


def one_point(x, factor):
    """x * factor by DCNv3: a 1x1 kernel on images of one pixel, with nothing else involved."""
    n, channels = x.shape
    image, mask = x.view(n, 1, 1, channels), factor.view(n, 1, 1, 1)
    offset = torch.zeros(n, 1, 1, 2, dtype=x.dtype)
    arguments = ([1, 1], [1, 1], [0, 0], [1, 1], 1, 1.0, False, False)
    return torch.ops.internimage.dcnv3(image, offset, mask, *arguments).view(n, channels)


def assert_same_numbers(actual, expected):
    """Bit for bit, but for the kind of a NaN."""
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual[~expected.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [16, 15], ids=str)
def test_every_half_number_is_preserved(dtype, channels):
    """All 65,536 of them, including subnormals, infinities and NaN, in vectors and one by one."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.repeat(2)[: 2**16 // channels * channels + channels].view(-1, channels).contiguous().view(dtype)
    assert_same_numbers(one_point(x, torch.ones(len(x), dtype=dtype)), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_numbers_are_rounded_as_torch_rounds(dtype):
    """Products of random bits over the whole range: ties, subnormal results, overflow."""
    bits = torch.randint(-(2**15), 2**15, (2, 50_000, 16), dtype=torch.int32).to(torch.int16).view(dtype)
    x, factor = bits[0], bits[1, :, :1].nan_to_num(1.5, 1.5, 1.5)  # an infinite factor times a share of 0 is NaN
    assert_same_numbers(one_point(x, factor), (x.float() * factor.float()).to(dtype))


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_binary_depends_on_the_stable_abi_alone():
    """No symbol of ATen, c10 or Python: such a binary runs on any torch from 2.10 and any Python from 3.10."""
    (module,) = FOLDER.glob("_C.*so")
    listed = subprocess.run(["nm", "-D", "--undefined-only", "-C", module], capture_output=True, text=True, check=True)
    names = [line.split(maxsplit=1)[1] for line in listed.stdout.splitlines() if " U " in f" {line} "]
    assert not [name for name in names if re.search(r"\bat::|\bc10::|\bPy[A-Z_]|\b_Py", name)]
    assert any(name.startswith(("U aoti_torch", "aoti_torch")) for name in names), "nothing of torch was listed"
