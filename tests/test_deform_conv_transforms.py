# SPDX-License-Identifier: MIT
"""Deformable convolution v1 and v2: derivatives of every order and in every mode, and the transforms of `torch.func`.

Numbers are in test_deform_conv.py. `gradcheck` compares derivatives with differences of float64 numbers; its tolerance
of 1e-5, relative, is three orders above the differences' own error. Locations are at least 0.1 pixels from the kinks.
"""

import deform_oracle
import pytest
import torch
from conftest import DEVICES, TOLERANCE, assert_close
from deform_oracle import CASES, FORMATS, small
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from internimage.ops import deform_conv2d

on_devices = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(params=list(CASES))
def problem(request):
    return small(request.param).as_function(deform_conv2d)


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
    function, tensors = small(case, n=2).as_function(deform_conv2d)
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
    function, tensors = problem.as_function(deform_conv2d)
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
    function, tensors = problem.as_function(deform_conv2d)
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
    function, tensors = problem.as_function(deform_conv2d)
    i = list(problem.tensors).index(which)
    second = hessian(energy(function), i)(*tensors)
    assert_close(jacrev(jacrev(energy(function), i), i)(*tensors), second, 1e-12)
    assert_close(jacrev(jacfwd(energy(function), i), i)(*tensors), second, 1e-12)
    assert second.abs().max() > 0.1


def mapped(in_dims: tuple[int | None, ...]) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Tensors with a mapped axis of 3 where in_dims says so, and the arguments of a loop."""
    draws = [small("groups", n=2, seed=seed).as_function(deform_conv2d)[1] for seed in range(3)]
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
    function, _ = small("groups", n=2).as_function(deform_conv2d)
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
    images, offset, weight, bias, mask = problem.as_function(deform_conv2d)[1]

    def loss(weight, bias, image, offset, mask):
        return deform_conv2d(image[None], offset[None], weight, bias, mask=mask[None], **problem.window).sin().sum()

    each = vmap(grad(loss, (0, 1)), in_dims=(None, None, 0, 0, 0))(weight, bias, images, offset, mask)
    for k in range(3):
        expected = gradients(lambda w, b, k=k: loss(w, b, images[k], offset[k], mask[k]), (weight, bias))
        for a, b in zip(each, expected, strict=True):
            assert_close(a[k], b, 1e-12)


def test_jacobians_and_differentials_of_a_mapped_function():
    """The transforms in any order: forward mode and reverse mode inside and outside of vmap."""
    function, _ = small("groups", n=2).as_function(deform_conv2d)
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


def test_autocast_under_a_transform(problem):
    function, tensors = problem
    tensors = [t.float() for t in tensors]
    every = tuple(range(len(tensors)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(energy(function), tensors)
        found = grad(energy(function), every)(*tensors)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_a_compiled_gradient(problem):
    function, tensors = problem
    compiled = torch.compile(lambda *t: grad(energy(function))(*t), backend="aot_eager")
    assert_close(compiled(*tensors), gradients(energy(function), tensors)[0], 1e-12)
