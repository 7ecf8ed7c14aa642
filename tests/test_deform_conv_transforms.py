# SPDX-License-Identifier: MIT
"""Deformable convolution v1 and v2: derivatives of every order and in every mode, and what torch does with operators.

Numbers are in test_deform_conv.py. `gradcheck` compares derivatives with differences of float64 numbers; its tolerance
of 1e-5, relative, is three orders above the differences' own error. Locations are at least 0.1 pixels from the kinks.
"""

import io
import itertools

import deform_oracle
import pytest
import torch
from conftest import DEVICES, TOLERANCE, assert_close
from deform_oracle import Problem
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from internimage.ops import deform_conv2d

OP = torch.ops.internimage.deform_conv2d.default
OP_BACKWARD = torch.ops.internimage.deform_conv2d_backward.default
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}

CASES = {
    "v2": {"padding": (1, 1), "kernel_size": (2, 3)},
    "v1": {"padding": (1, 0), "kernel_size": (3, 2), "mask": False, "bias": False, "stride": (1, 2)},
    "groups": {"padding": (1, 1), "kernel_size": (2, 2), "groups": 2, "offset_groups": 2, "dilation": (1, 2)},
}

on_devices = pytest.mark.parametrize("device", DEVICES)


def small(case: str, n: int = 1, seed: int = 0) -> Problem:
    return deform_oracle.draw(seed, n, (3, 4), 4, 2, **CASES[case])


def as_function(problem: Problem):
    """deform_conv2d of the problem's tensors, in their order, and these."""
    names = list(problem.tensors)
    return (lambda *t: deform_conv2d(**dict(zip(names, t)), **problem.window)), tuple(problem.tensors.values())


@pytest.fixture(params=list(CASES))
def problem(request):
    return as_function(small(request.param))


def energy(function):
    return lambda *tensors: function(*tensors).sin().sum()


def gradients(function, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves), leaves)


# ---- reverse mode

# Atomic additions come in any order: on CUDA, two runs of a backward may differ by rounding.
NONDETERMINISM = {"cpu": 0.0, "cuda": 1e-10}


@on_devices
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case, order, device):
    function, tensors = as_function(small(case, n=2))
    leaves = [t.to(device).requires_grad_() for t in tensors]
    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    assert check(function, leaves, nondet_tol=NONDETERMINISM[device], fast_mode=True)


def second_derivatives(function, tensors, grad_output, directions) -> list[torch.Tensor]:
    """Of <grad_output, output>: the gradient of the gradient along the directions."""
    first = torch.autograd.grad(function(*tensors), tensors, grad_output, create_graph=True)
    along = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
    return torch.autograd.grad(along, tensors, create_graph=True, materialize_grads=True)


@on_devices
@pytest.mark.parametrize("case", CASES)
def test_third_derivatives(case, device):
    """The derivatives of double backward, by differences; that of the bias is constant."""
    problem = small(case).map(lambda t: t.to(device))
    function, tensors = as_function(problem)
    directions = [torch.randn_like(t) for t in tensors]

    def second(*leaves: torch.Tensor) -> list[torch.Tensor]:
        found = second_derivatives(function, leaves, problem.grad_output, directions)
        return [g for name, g in zip(problem.tensors, found, strict=True) if name != "bias"]

    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(second, leaves, nondet_tol=NONDETERMINISM[device], fast_mode=True)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_double_backward_in_other_dtypes(memory_format, dtype, device):
    """Against float64 on the same, rounded, numbers."""
    problem = small("groups", n=2).map(lambda t: t.to(dtype))
    function, tensors = as_function(problem)
    directions = [torch.randn_like(t) for t in tensors]

    def run(place, dtype, memory_format):
        def move(t):
            return t.to(place, dtype).contiguous(
                memory_format=memory_format if t.dim() == 4 else torch.contiguous_format
            )

        leaves = [move(t).requires_grad_() for t in tensors]
        return second_derivatives(function, leaves, move(problem.grad_output), [move(d) for d in directions])

    expected = run("cpu", torch.float64, torch.contiguous_format)
    for name, found, right in zip(problem.tensors, run(device, dtype, FORMATS[memory_format]), expected, strict=True):
        assert found.dtype == dtype
        # two roundings more than in a gradient: of the gradients, and of their directions' products with the columns
        assert_close(found, right, 2 * TOLERANCE[dtype], name)


# ---- forward mode and torch.func


def test_grad_and_vjp(problem):
    function, tensors = problem
    expected = gradients(energy(function), tensors)
    output, pull_back = vjp(energy(function), *tensors)
    every = tuple(range(len(tensors)))
    for found in (grad(energy(function), every)(*tensors), pull_back(torch.ones_like(output))):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_forward_mode_agrees_with_finite_differences(problem):
    """Each tensor alone and all together; gradcheck's forward mode goes through dual numbers, jvp by torch.func."""
    function, tensors = problem
    leaves = [t.clone().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_backward_ad=False, fast_mode=True)
    directions = tuple(torch.randn_like(t) for t in tensors)
    _, tangent = jvp(function, tensors, directions)
    with forward_ad.dual_level():
        dual = function(*(forward_ad.make_dual(t, d) for t, d in zip(tensors, directions)))
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, tangent)
    assert tangent.abs().max() > 0.1
    parts = [jvp(lambda t, i=i: function(*tensors[:i], t, *tensors[i + 1 :]), (tensors[i],), (directions[i],))[1]
             for i in range(len(tensors))]  # fmt: skip
    assert_close(sum(parts), tangent, 1e-12)


def test_jacobians(problem):
    function, tensors = problem
    for i in range(len(tensors)):
        assert_close(jacfwd(function, i)(*tensors), jacrev(function, i)(*tensors), 1e-12)


@pytest.mark.parametrize("which", ["offset", "weight"])
def test_hessians(which):
    """Forward over reverse, reverse over reverse and reverse over forward are one matrix."""
    problem = deform_oracle.draw(0, 1, (2, 3), 4, 2, (2, 2), groups=2, offset_groups=2, padding=(0, 1))
    function, tensors = as_function(problem)
    i = list(problem.tensors).index(which)
    second = hessian(energy(function), i)(*tensors)
    assert_close(jacrev(jacrev(energy(function), i), i)(*tensors), second, 1e-12)
    assert_close(jacrev(jacfwd(energy(function), i), i)(*tensors), second, 1e-12)
    assert second.abs().max() > 0.1


def mapped(in_dims: tuple[int | None, ...]) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Tensors with a mapped axis of 3 where in_dims says so, and the arguments of a loop."""
    draws = [as_function(small("groups", n=2, seed=seed))[1] for seed in range(3)]
    tensors = [
        draws[0][i] if axis is None else torch.stack([d[i] for d in draws], axis) for i, axis in enumerate(in_dims)
    ]
    return tensors, [[d[i] if axis is not None else draws[0][i] for i, axis in enumerate(in_dims)] for d in draws]


@on_devices
@pytest.mark.parametrize(
    "in_dims",
    [
        (0, None, None, None, None),  # over inputs
        (None, 2, None, None, None),
        (None, None, 0, None, None),  # over weights
        (None, None, 1, 0, None),
        (None, None, None, None, 4),
        (0, 0, 0, 0, 0),
        (1, 3, None, 1, 2),
    ],
    ids=str,
)
def test_vmap(in_dims, device):
    """Values, and gradients through the mapped call, against a loop."""
    function, _ = as_function(small("groups", n=2))
    tensors, slices = mapped(in_dims)
    leaves = [t.to(device).requires_grad_() for t in tensors]
    output = vmap(function, in_dims=in_dims)(*leaves)
    loop = [t.clone().requires_grad_() for t in tensors]
    expected = torch.stack(
        [function(*(t if a is None else t.select(a, k) for t, a in zip(loop, in_dims))) for k in range(len(slices))]
    )
    assert_close(output, expected, 1e-12)
    assert_close(expected, torch.stack([function(*t) for t in slices]), 1e-12)
    weights = torch.randn_like(expected)
    found = torch.autograd.grad(output, leaves, weights.to(device))
    for a, b in zip(found, torch.autograd.grad(expected, loop, weights), strict=True):
        assert_close(a, b, 1e-12)


def test_gradients_of_each_sample():
    """Of a network's parameters, for each image of a batch: those of a batch of one image."""
    problem = small("v2", n=3)
    images, offset, weight, bias, mask = as_function(problem)[1]

    def loss(weight, bias, image, offset, mask):
        return deform_conv2d(image[None], offset[None], weight, bias, mask=mask[None], **problem.window).sin().sum()

    each = vmap(grad(loss, (0, 1)), in_dims=(None, None, 0, 0, 0))(weight, bias, images, offset, mask)
    for k in range(3):
        expected = gradients(lambda w, b, k=k: loss(w, b, images[k], offset[k], mask[k]), (weight, bias))
        for a, b in zip(each, expected, strict=True):
            assert_close(a[k], b, 1e-12)


def test_jacobians_and_differentials_of_a_mapped_function():
    """The transforms in any order: forward mode and reverse mode inside and outside of vmap."""
    function, _ = as_function(small("groups", n=2))
    tensors, slices = mapped((0, 0, 0, 0, 0))
    directions = [torch.randn_like(t) for t in tensors]
    _, outside = jvp(vmap(function), tuple(tensors), tuple(directions))
    inside = vmap(lambda t, d: jvp(function, t, d)[1])(tuple(tensors), tuple(directions))
    loop = [jvp(function, tuple(t), tuple(d[k] for d in directions))[1] for k, t in enumerate(slices)]
    assert_close(outside, torch.stack(loop), 1e-12)
    assert_close(inside, torch.stack(loop), 1e-12)
    whole = grad(lambda *t: vmap(energy(function))(*t).sum(), (0, 1, 2, 3, 4))(*tensors)
    each = vmap(grad(energy(function), (0, 1, 2, 3, 4)))(*tensors)
    for a, b in zip(whole, each, strict=True):
        assert_close(a, b, 1e-12)


class Layer(torch.nn.Module):
    """A convolution that predicts thirds of one map, as the layers of v2 do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 4, 3, 3))
        self.conv_offset = torch.nn.Conv2d(4, 27, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        offset, mask = self.conv_offset(x).split([18, 9], 1)
        return deform_conv2d(x, offset, self.weight, padding=1, mask=mask.sigmoid())


def test_a_layer():
    """Gradients of parameters as functions, and the tangent of an image."""
    layer = Layer().double()
    image, direction = torch.randn(2, 2, 4, 5, 6, dtype=torch.float64).unbind()
    parameters = dict(layer.named_parameters())
    found = grad(lambda p: functional_call(layer, p, (image,)).square().sum())(parameters)
    layer(image).square().sum().backward()
    for name, parameter in parameters.items():
        assert_close(found[name], parameter.grad, 1e-12, name)
    step = 1e-6
    with torch.no_grad():
        difference = (layer(image + step * direction) - layer(image - step * direction)) / (2 * step)
    assert_close(jvp(layer, (image,), (direction,))[1], difference, 1e-6)


# ---- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_autocast(case, dtype):
    """All tensors in autocast's dtype, whatever they have, and gradients in their own."""
    problem = small(case, n=2).map(torch.Tensor.float)
    problem = Problem(
        **{**problem.__dict__, "offset": problem.offset.bfloat16(), "grad_output": problem.grad_output.to(dtype)}
    )
    with torch.autocast("cpu", dtype=dtype):
        results = problem.differentiate(deform_conv2d)
    rounded = problem.map(lambda t: t.to(dtype))
    expected = deform_oracle.output_and_gradients(rounded)
    assert results["output"].dtype == dtype
    for name, t in problem.tensors.items():
        assert results[name].dtype == t.dtype
    for name, right in expected.items():
        assert_close(results[name], right, TOLERANCE[dtype], name)


def test_autocast_leaves_float64_alone():
    problem = small("v2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = problem.differentiate(deform_conv2d)
    for name, right in deform_oracle.output_and_gradients(problem).items():
        assert results[name].dtype == torch.float64
        assert_close(results[name], right)


def test_autocast_around_the_backward_pass_too():
    """The gradients' dtypes are those of the tensors, also if backward runs under autocast."""
    problem = small("v2").map(torch.Tensor.float)
    leaves = {name: t.requires_grad_() for name, t in problem.tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        problem.call(deform_conv2d, **leaves).float().square().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves.values())


def test_autocast_under_a_transform(problem):
    function, tensors = problem
    tensors = [t.float() for t in tensors]
    every = tuple(range(len(tensors)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(energy(function), tensors)
        found = grad(energy(function), every)(*tensors)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


# ---- torch's checks of operators


def operands(problem: Problem) -> tuple[list[torch.Tensor], tuple]:
    """Tensors and other arguments of the operator."""
    tensors = [problem.input, problem.offset, problem.mask, problem.weight, problem.bias]
    groups = problem.input.shape[1] // problem.weight.shape[1]
    return tensors, (problem.stride, problem.padding, problem.dilation, groups, problem.offset_groups)


OPCHECK = {
    "kernel_size": (2, 3),
    "stride": (2, 1),
    "padding": (1, 2),
    "dilation": (1, 2),
    "groups": 2,
    "offset_groups": 4,
}


@on_devices
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, memory_format, device):
    tensors, arguments = operands(deform_oracle.draw(1, 3, (6, 9), 8, **OPCHECK).map(torch.Tensor.float))
    tensors[0] = tensors[0].contiguous(memory_format=FORMATS[memory_format])
    torch.library.opcheck(OP, (*(t.to(device).requires_grad_(requires_grad) for t in tensors), *arguments))


@on_devices
@pytest.mark.parametrize(
    "requires_grad",
    [False, pytest.param(True, marks=pytest.mark.slow)],  # which traces double backward with all sizes as symbols
)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck_backward(memory_format, requires_grad, device):
    problem = deform_oracle.draw(1, 3, (6, 9), 8, **OPCHECK).map(torch.Tensor.float)
    tensors, arguments = operands(problem)
    tensors = [t.contiguous(memory_format=FORMATS[memory_format]) if t.dim() == 4 else t for t in tensors]
    tensors = [t.to(device).requires_grad_(requires_grad) for t in (problem.grad_output, *tensors)]
    torch.library.opcheck(OP_BACKWARD, (*tensors, *arguments, False, [True, False, True, True, True]))


@on_devices
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=5)), ids=str)
def test_output_mask(wanted, deterministic, device):
    problem = deform_oracle.draw(2, 2, (4, 5), padding=(1, 1))
    tensors, arguments = operands(problem.map(lambda t: t.to(device)))
    grads = OP_BACKWARD(problem.grad_output.to(device), *tensors, *arguments, deterministic, list(wanted))
    expected = deform_oracle.gradients(problem)
    for name, found, want in zip(("input", "offset", "mask", "weight", "bias"), grads, wanted, strict=True):
        assert_close(found, expected[name] if want else expected[name].new_empty(0), name=name)


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
def test_deterministic_algorithms_are_requested(deterministic, device):
    function, tensors = as_function(small("v2"))
    leaves = [t.to(device).requires_grad_() for t in tensors]
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        with Calls() as seen:
            function(*leaves).sum().backward()
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    assert [arguments[-2] for func, arguments in seen.calls if func is OP_BACKWARD] == [deterministic]


@on_devices
def test_deterministic_mode_raises_nothing_and_changes_nothing(device):
    problem = small("groups", n=2).map(lambda t: t.to(device))
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        results = [problem.differentiate(deform_conv2d) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    for name, right in deform_oracle.output_and_gradients(problem).items():
        assert torch.equal(results[0][name], results[1][name])
        assert_close(results[0][name], right, name=name)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_meta_tensors(memory_format):
    problem = small("groups", n=2)
    image = problem.input.contiguous(memory_format=FORMATS[memory_format])
    expected = problem.call(deform_conv2d, input=image)
    output = problem.map(lambda t: t.to("meta")).call(deform_conv2d, input=image.to("meta"))
    assert output.device.type == "meta" and output.dtype == expected.dtype
    assert output.shape == expected.shape and output.stride() == expected.stride()


# ---- compilation and export


def compiled_matches(compiled, problem, device) -> None:
    leaves = {name: t.to(device).requires_grad_() for name, t in problem.tensors.items()}
    output = compiled(*leaves.values())
    grads = torch.autograd.grad(output, list(leaves.values()), problem.grad_output.to(device))
    expected = deform_oracle.output_and_gradients(problem)
    assert_close(output, expected["output"])
    assert output.stride() == problem.call(deform_conv2d).stride()
    for name, found in zip(leaves, grads, strict=True):
        assert_close(found, expected[name], name=name)


@on_devices
@pytest.mark.parametrize("memory_format", FORMATS)
def test_compile(memory_format, device):
    """By inductor, with operations beside it."""
    torch._dynamo.reset()
    problem = deform_oracle.draw(3, 2, (6, 7), groups=2, offset_groups=2, padding=(1, 1), stride=(2, 2))
    problem = problem.map(lambda t: t.contiguous(memory_format=FORMATS[memory_format]) if t.dim() == 4 else t)
    function, _ = as_function(problem)
    compiled = torch.compile(lambda x, *t: function(x * 1.0, *t) + 0.0, fullgraph=True)
    compiled_matches(compiled, problem, device)


@on_devices
@pytest.mark.parametrize("case", CASES)
def test_compile_dynamic(case, device):
    """One graph for all batch and image sizes."""
    torch._dynamo.reset()
    function, _ = as_function(small(case))
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    # no two sizes are equal in the first, also of the weight, as dynamo would treat them as one
    for n, size, stance in (
        (5, (9, 13), "default"),
        (7, (10, 9), "fail_on_recompile"),
        (5, (12, 15), "fail_on_recompile"),
        (3, (9, 9), "fail_on_recompile"),
    ):
        problem = deform_oracle.draw(4, n, size, 4, 2, **CASES[case])
        with torch.compiler.set_stance(stance):
            compiled_matches(compiled, problem, device)


def test_a_compiled_gradient(problem):
    function, tensors = problem
    compiled = torch.compile(lambda *t: grad(energy(function))(*t), backend="aot_eager")
    assert_close(compiled(*tensors), gradients(energy(function), tensors)[0], 1e-12)


class Small(torch.nn.Module):
    def __init__(self, window: dict) -> None:
        super().__init__()
        self.window = window

    def forward(self, input, offset, weight, bias=None, mask=None):
        return deform_conv2d(input, offset, weight, bias, mask=mask, **self.window)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_export(case, dynamic):
    """Saved and loaded again."""
    problem = deform_oracle.draw(5, 2, (6, 7), 4, 2, **CASES[case])
    # the output's size, which offset and mask have, follows from that of the input
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    shapes = {name: sizes if name in ("input", "offset", "mask") else None for name in problem.tensors}
    program = torch.export.export(
        Small(problem.window), (), problem.tensors, dynamic_shapes=shapes if dynamic else None
    )
    assert OP in [node.target for node in program.graph.nodes]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    if dynamic:
        problem = deform_oracle.draw(6, 3, (5, 9), 4, 2, **CASES[case])
    assert_close(loaded(**problem.tensors), deform_oracle.forward(problem))
