# SPDX-License-Identifier: MIT
"""The CUDA kernels on a CPU (cuda_host) with offsets and masks that stand as other operators have them: in one tensor,
with space between pixels or groups, points row by row, y before x. Against the reference on dense tensors.

What the dense layout shares with these, and that nothing is read past the tensor's end: test_cuda_host.py; their
machine code: test_cuda_compile.py.
"""

import math
import re
from typing import NamedTuple

import cuda_host
import oracle
import pytest
import strategies
import torch
from conftest import assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cuda_host import CASES as DENSE_CASES
from test_cuda_host import NAMES, untouched
from test_dcnv3 import schema

from internimage.ops import dcnv3_reference as reference

DTYPES = cuda_host.DTYPES
SUFFIX = {0: "dense", 1: "even", 2: "odd"}  # last parameter of a kernel -> layout of csrc/cuda/gather/arguments.h

pytestmark = pytest.mark.skipif(cuda_host.COMPILER is None, reason="needs a C++ compiler (g++, or CXX)")


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> cuda_host.Host:
    return cuda_host.Host(cuda_host.shared(tmp_path_factory, "-DLAYOUTS"))


class Layout(NamedTuple):
    """Where offsets and masks stand in one tensor: the first of each, elements from group to group and from pixel to
    pixel; and their order."""

    offset: int
    mask: int
    offset_group: int
    mask_group: int
    pixel: int
    row_major: bool = False
    y_first: bool = False

    def expected(self, groups: int) -> str:
        """What the kernels must be compiled for."""
        strides = (self.offset, self.pixel, self.offset_group if groups > 1 else 0)
        return "odd" if any(stride % 2 for stride in strides) else "even"


# of groups and their points
LAYOUTS = {
    # a group's offsets and then its masks; pixels padded to 8 elements
    "dcnv4": lambda g, p: Layout(0, 2 * p, 3 * p, 3 * p, (3 * g * p + 7) // 8 * 8),
    # all offsets and then all masks
    "one linear layer": lambda g, p: Layout(0, 2 * g * p, 2 * p, p, 3 * g * p),
    "padded pixels": lambda g, p: Layout(0, 2 * g * p + 2, 2 * p, p, 4 * g * p + 2),
    "odd pixels": lambda g, p: Layout(0, 2 * g * p, 2 * p, p, 4 * g * p + 3),
    "an odd begin": lambda g, p: Layout(5, 2 * g * p + 5, 2 * p, p, 4 * g * p + 6),
    "masks first": lambda g, p: Layout(p + p % 2, 0, 3 * p + p % 2, 3 * p + p % 2, g * (3 * p + p % 2) + 2),
    "space between groups": lambda g, p: Layout(0, 2 * p + 1, 4 * p + 2, 4 * p + 2, g * (4 * p + 2) + 4),
    "deform_conv2d": lambda g, p: Layout(0, 2 * g * p, 2 * p, p, 3 * g * p, row_major=True, y_first=True),
    "row by row": lambda g, p: Layout(0, 2 * p, 3 * p, 3 * p, 3 * g * p, row_major=True),
    "y before x": lambda g, p: Layout(0, 2 * p, 3 * p, 3 * p, 3 * g * p, y_first=True),
}


def order_of(arguments: dict, row_major: bool) -> list[int]:
    """Which points, numbered column by column, come one after the other."""
    kernel, dilation = arguments.get("kernel_size", (3, 3)), arguments.get("dilation", (1, 1))
    points = oracle.kernel_points(kernel, dilation, arguments.get("remove_center", False))
    return sorted(range(len(points)), key=lambda k: points[k][::-1] if row_major else points[k])


class Packed:
    """Offsets and masks in one tensor, which ends where the last of them does; all else in it is NaN."""

    def __init__(
        self, layout: Layout, pixels: tuple[int, int, int], groups: int, points: int, dtype: torch.dtype
    ) -> None:
        n, height, width = pixels
        ends = layout.offset + 2 * points, layout.mask + points
        steps = layout.offset_group, layout.mask_group
        last = max(end + (groups - 1) * step for end, step in zip(ends, steps))
        self.storage = torch.full(((n * height * width - 1) * layout.pixel + last,), math.nan, dtype=dtype)
        images = height * width * layout.pixel, width * layout.pixel, layout.pixel
        self.offset, self.mask = (
            self.storage.as_strided((*pixels, groups, count), (*images, step, 1), first)
            for count, step, first in zip((2 * points, points), steps, (layout.offset, layout.mask))
        )

    def fill(self, offset: torch.Tensor, mask: torch.Tensor, order: list[int], y_first: bool) -> "Packed":
        """With the numbers of dense tensors."""
        pairs = offset.unflatten(3, (self.mask.shape[3], -1, 2))[..., order, :]
        self.offset.copy_((pairs.flip(-1) if y_first else pairs).flatten(-2))
        self.mask.copy_(mask.view(self.mask.shape)[..., order])
        return self

    def dense(self, order: list[int], y_first: bool) -> list[torch.Tensor]:
        """Offset and mask in DCNv3's order."""
        back = sorted(range(len(order)), key=order.__getitem__)
        pairs = self.offset.unflatten(-1, (-1, 2))[..., back, :]
        return [(pairs.flip(-1) if y_first else pairs).flatten(3), self.mask[..., back].flatten(3)]

    def check_untouched(self) -> None:
        """Nothing was written between the numbers."""
        self.offset.fill_(math.nan)
        self.mask.fill_(math.nan)
        assert self.storage.isnan().all()


class Problem:
    """A problem whose offsets and masks stand in a layout, and whose gradients in another one, or in the same."""

    def __init__(self, tensors, grad_output, arguments, layout, grad_layout=None, dtype=torch.float64) -> None:
        self.geometry, self.dtype = schema(arguments), dtype
        self.input, offset, mask = (t.to(dtype) for t in tensors)
        self.grad_output = grad_output.to(dtype)
        self.groups, points = self.geometry[4], mask.shape[3] // self.geometry[4]
        self.layout = layout(self.groups, points)
        self.grad_layout = (grad_layout or layout)(self.groups, points)
        self.order = order_of(arguments, self.layout.row_major)
        sizes = tuple(mask.shape[:3]), self.groups, points, dtype
        self.packed = Packed(self.layout, *sizes).fill(offset, mask, self.order, self.layout.y_first)
        self.grads = Packed(self.grad_layout, *sizes)
        # what is there as slices of the one tensor
        self.exact = [t.double() for t in (self.input, *self.packed.dense(self.order, self.layout.y_first))]

    def forward(self, host, wide=False) -> torch.Tensor:
        host.row_major, host.y_first = self.layout.row_major, self.layout.y_first
        return host.forward(self.input, self.packed.offset, self.packed.mask, *self.geometry, wide=wide)

    def backward(self, host, **options) -> list[torch.Tensor]:
        """Gradients, those of offset and mask dense; checks what is between them."""
        host.row_major, host.y_first = self.layout.row_major, self.layout.y_first
        tensors = self.grad_output, self.input, self.packed.offset, self.packed.mask
        grad_input, *_ = host.backward(
            *tensors, *self.geometry, grad_points=(self.grads.offset, self.grads.mask), **options
        )
        results = [t.clone() for t in self.grads.dense(self.order, self.layout.y_first)]
        self.grads.check_untouched()
        return [grad_input, *results]

    def expected(self) -> list[torch.Tensor]:
        """Output and gradients by the reference."""
        grads = reference.dcnv3_backward(self.grad_output.double(), *self.exact, *self.geometry, False, [True] * 3)
        return [reference.dcnv3(*self.exact, *self.geometry), *grads]

    def check(self, host, deterministic=False, wide=False) -> None:
        output, *grads = self.expected()
        assert_close(self.forward(host, wide), output, name="output")
        assert layouts(host) == [self.layout.expected(self.groups)]
        results = self.backward(host, deterministic=deterministic, wide=wide)
        for name, grad, right in zip(NAMES, results, grads):
            assert_close(grad, right, name=f"grad_{name}")
        both = {self.layout.expected(self.groups), self.grad_layout.expected(self.groups)}
        assert layouts(host) == ["odd" if "odd" in both else "even"] * (1 + deterministic)


@pytest.fixture(autouse=True)
def dcnv3_order(host):
    """In DCNv3's order again after each test."""
    yield
    host.row_major = host.y_first = False
    host.choose()


def layouts(host) -> list[str]:
    """What the kernels of the last call are compiled for."""
    return [SUFFIX[int(re.search(r", (\d)>$", kernel).group(1))] for kernel in host.kernels]


def draw(case, layout, dtype=torch.float64, grad_layout=None) -> Problem:
    arguments, size, group_channels = CASES[case]
    *tensors, grad_output = oracle.draw(1, 2, size, group_channels, 2.0, **arguments)
    tensors[1] = oracle.off_the_grid(tensors[1], **arguments)
    return Problem(tensors, grad_output, arguments, LAYOUTS[layout], grad_layout and LAYOUTS[grad_layout], dtype)


CASES = {
    name: DENSE_CASES[name]
    for name in (
        *("softmax", "no center", "an odd number of units", "eight lanes, no center", "half a vector", "3 channels"),
        *("20 channels", "many chunks", "oblong, no center", "even", "one pixel"),
    )
}


@pytest.mark.parametrize("case, layout, dtype", cuda_host.in_turn(DTYPES, CASES, LAYOUTS, each=2), ids=str)
def test_against_the_reference(case, layout, dtype, host):
    draw(case, layout, dtype).check(host)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["dcnv4", "padded pixels", "deform_conv2d"])
@pytest.mark.parametrize("case", ["no center", "half a vector", "3 channels", "many chunks", "even"])
def test_64_bit_indices(case, layout, dtype, host):
    draw(case, layout, dtype).check(host, deterministic=True, wide=True)
    assert all("unsigned long" in kernel for kernel in host.kernels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["dcnv4", "padded pixels", "deform_conv2d", "y before x"])
@pytest.mark.parametrize("case", ["softmax", "no center", "20 channels", "even"])
def test_deterministic(case, layout, dtype, host):
    draw(case, layout, dtype).check(host, deterministic=True)
    assert host.kernels[0].startswith("deterministic_kernel<")


@settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(problem=strategies.problems(), layout=st.sampled_from(sorted(LAYOUTS)), deterministic=st.booleans())
def test_any_problem(problem, layout, deterministic, host):
    *tensors, grad_output = problem[0]
    drawn = Problem(tensors, grad_output, problem[1], LAYOUTS[layout])
    results = [drawn.forward(host), *drawn.backward(host, deterministic=deterministic)]
    for name, result, right in zip(("output", *NAMES), results, drawn.expected()):
        torch.testing.assert_close(result, right, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize(
    "layout, grad_layout",
    [
        ("dcnv4", "one linear layer"),
        ("padded pixels", "masks first"),
        ("padded pixels", "odd pixels"),  # the gradients' pairs are not aligned, or
        ("an odd begin", "masks first"),  # those of the offsets
    ],
)
@pytest.mark.parametrize("case", ["an odd number of units", "no center", "3 channels"])
def test_gradients_stand_elsewhere(case, layout, grad_layout, dtype, host):
    draw(case, layout, dtype, grad_layout).check(host)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("layout", ["dcnv4", "deform_conv2d"])
@pytest.mark.parametrize("case", ["softmax", "even"])
def test_part_of_the_gradients(case, layout, deterministic, wanted, host):
    problem = draw(case, layout)
    results = problem.backward(host, deterministic=deterministic, wanted=wanted)
    for grad, right, want in zip(results, problem.expected()[1:], (wanted[0], wanted[1], wanted[1])):
        if want:
            assert_close(grad, right)
        else:
            assert grad is None or grad.isnan().all()  # nothing was written


@pytest.mark.parametrize(
    "case, layout, value, dtype",
    cuda_host.in_turn(
        DTYPES, ["no center", "even"], ["dcnv4", "padded pixels", "deform_conv2d"], [math.nan, math.inf, 1e30]
    ),
    ids=str,
)
def test_locations_that_are_nowhere(case, layout, value, dtype, host):
    arguments, size, group_channels = CASES[case]
    *tensors, grad_output = oracle.draw(4, 2, size, group_channels, 1.0, **arguments)
    tensors[1] = oracle.off_the_grid(tensors[1], **arguments)
    tensors[1].view(-1)[::7] = value
    problem = Problem(tensors, grad_output, arguments, LAYOUTS[layout], dtype=dtype)
    problem.check(host)
    assert not problem.backward(host)[1].reshape(-1)[::7].any()


# ---- which kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_dense(dtype, host):
    """A dense tensor as one with strides takes DCNv3's kernels, and so does one group in any strides between groups."""
    for case, group in (("softmax", None), ("many chunks", 5)):
        arguments, size, group_channels = CASES[case]
        input, offset, mask, grad_output = (t.to(dtype) for t in oracle.draw(1, 2, size, group_channels, **arguments))
        groups = schema(arguments)[4]
        views = [t.unflatten(3, (groups, -1)) for t in (offset, mask)]
        if group is not None:
            views = [t.as_strided(t.shape, (*t.stride()[:3], group, 1)) for t in views]
        output = host.forward(input, *views, *schema(arguments))
        assert layouts(host) == ["dense"]
        assert torch.equal(output, host.forward(input, offset, mask, *schema(arguments)))
        host.backward(grad_output, input, *views, *schema(arguments), grad_points=tuple(map(torch.empty_like, views)))
        assert layouts(host) == ["dense"]
        host.row_major = True
        host.forward(input, *views, *schema(arguments))
        assert layouts(host) == ["even"]
        host.row_major = False


@pytest.mark.parametrize("layout", ["dcnv4", "padded pixels", "deform_conv2d"])
@pytest.mark.parametrize("case", ["softmax", "no center"])
def test_variants_leave_other_layouts_to_the_default_kernels(case, layout, host):
    host.choose("tiles,window,fixed")
    problem = draw(case, layout, torch.float16)
    problem.check(host, deterministic=True)
    assert [kernel.split("_kernel")[0] for kernel in host.kernels] == ["deterministic", "backward3x3"]
    problem.forward(host)
    assert host.kernels[0].startswith("forward_kernel<")


def test_strides_of_more_than_32_bits(host):
    """A pixel's numbers begin 2^31 elements after those of the one before; the last of them beyond 2^32."""
    arguments = {"padding": (1, 1), "groups": 3, "softmax": True}
    input, offset, mask, grad_output = (t.half() for t in oracle.draw(1, 1, (1, 4), 16, **arguments))
    views, grads = [], []
    for tensor in (offset, mask):
        shape, strides = (1, 1, 4, 3, tensor.shape[3] // 3), (2**33, 2**33, 2**31, 100, 1)
        view, grad = (untouched((3 * 2**31 + 300,), torch.float16).as_strided(shape, strides) for _ in range(2))
        view.copy_(tensor.view(shape))
        views.append(view)
        grads.append(grad)
    geometry, exact = schema(arguments), [t.double() for t in (input, offset, mask)]
    assert_close(host.forward(input, *views, *geometry), reference.dcnv3(*exact, *geometry), name="output")
    grad_input, *_ = host.backward(grad_output, input, *views, *geometry, grad_points=tuple(grads))
    assert all("unsigned int" in kernel for kernel in host.kernels)
    expected = reference.dcnv3_backward(grad_output.double(), *exact, *geometry, False, [True] * 3)
    for name, grad, right in zip(NAMES, (grad_input, *grads), expected):
        assert_close(grad.reshape(right.shape), right, name=f"grad_{name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["an odd number of units", "even"])
def test_a_mask_of_ones_is_one_unit(case, dtype, host):
    """With strides of 0."""
    arguments, size, group_channels = CASES[case]
    arguments = {**arguments, "softmax": False}
    input, offset, mask, _ = (t.to(dtype) for t in oracle.draw(1, 2, size, group_channels, **arguments))
    offset = oracle.off_the_grid(offset.double(), **arguments).to(dtype)
    views = [t.unflatten(3, (schema(arguments)[4], -1)) for t in (offset, torch.ones_like(mask))]
    views[1] = views[1][0, 0, 0, 0].clone().expand(views[1].shape)
    output = host.forward(input, *views, *schema(arguments))
    exact = [t.double() for t in (input, offset, torch.ones_like(mask))]
    assert_close(output, reference.dcnv3(*exact, *schema(arguments)))
