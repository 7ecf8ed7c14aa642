# SPDX-License-Identifier: MIT
"""Deformable convolution v1 and v2: autocast, opcheck, determinism, compilation, export."""

import io
import itertools

import deform_oracle
import pytest
import torch
from conftest import DEVICES, TOLERANCE, assert_close
from deform_oracle import CASES, FORMATS, Problem, small
from torch.utils._python_dispatch import TorchDispatchMode

from internimage.ops import deform_conv2d

OP = torch.ops.internimage.deform_conv2d.default
OP_BACKWARD = torch.ops.internimage.deform_conv2d_backward.default

on_devices = pytest.mark.parametrize("device", DEVICES)


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


# ---- torch's checks of operators


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
    tensors, arguments = deform_oracle.draw(1, 3, (6, 9), 8, **OPCHECK).map(torch.Tensor.float).operands()
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
    tensors, arguments = problem.operands()
    tensors = [t.contiguous(memory_format=FORMATS[memory_format]) if t.dim() == 4 else t for t in tensors]
    tensors = [t.to(device).requires_grad_(requires_grad) for t in (problem.grad_output, *tensors)]
    torch.library.opcheck(OP_BACKWARD, (*tensors, *arguments, False, [True, False, True, True, True]))


@on_devices
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=5)), ids=str)
def test_output_mask(wanted, deterministic, device):
    problem = deform_oracle.draw(2, 2, (4, 5), padding=(1, 1))
    tensors, arguments = problem.map(lambda t: t.to(device)).operands()
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
    function, tensors = small("v2").as_function(deform_conv2d)
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
    function, _ = problem.as_function(deform_conv2d)
    compiled = torch.compile(lambda x, *t: function(x * 1.0, *t) + 0.0, fullgraph=True)
    compiled_matches(compiled, problem, device)


@on_devices
@pytest.mark.parametrize("case", CASES)
def test_compile_dynamic(case, device):
    """One graph for all batch and image sizes."""
    torch._dynamo.reset()
    function, _ = small(case).as_function(deform_conv2d)
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
