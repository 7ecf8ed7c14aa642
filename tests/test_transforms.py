# SPDX-License-Identifier: MIT
"""The operator and a model under `torch.func` and in forward mode, against reverse mode and finite differences.

`torch.autograd.gradcheck` compares reverse and forward mode with differences of float64 numbers; what it accepts is
its default tolerance of 1e-5 relative, three orders above the differences' own error.
"""

import pytest
import timm
import torch
from conftest import assert_close
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from internimage.ops import dcnv3

ARGUMENTS = {
    "softmax": dict(kernel_size=3, padding=1, groups=2, softmax=True, offset_scale=0.7),
    "plain": dict(kernel_size=(1, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2), remove_center=True),
}
SHAPES = {"softmax": ((1, 3, 4, 4), (1, 3, 4, 36), (1, 3, 4, 18)), "plain": ((2, 3, 4, 2), (2, 2, 4, 4), (2, 2, 4, 2))}


@pytest.fixture(params=list(ARGUMENTS))
def problem(request):
    """A function of the three tensors, and tensors; no point is at a kink, as the offsets are drawn at random."""
    tensors = tuple(torch.randn(shape, dtype=torch.float64) for shape in SHAPES[request.param])
    return (lambda *t: dcnv3(*t, **ARGUMENTS[request.param])), tensors


def energy(function):
    return lambda *tensors: function(*tensors).sin().sum()


def gradients(function, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves), leaves)


def test_grad_and_vjp(problem):
    function, tensors = problem
    expected = gradients(energy(function), tensors)
    output, pull_back = vjp(energy(function), *tensors)
    for found in (grad(energy(function), (0, 1, 2))(*tensors), pull_back(torch.ones_like(output))):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_forward_mode_agrees_with_finite_differences(problem):
    """Each tensor alone and all together; gradcheck's forward mode goes through dual numbers, jvp by torch.func."""
    function, tensors = problem
    leaves = [t.clone().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_backward_ad=False)
    directions = tuple(torch.randn_like(t) for t in tensors)
    _, tangent = jvp(function, tensors, directions)
    with forward_ad.dual_level():
        dual = function(*(forward_ad.make_dual(t, d) for t, d in zip(tensors, directions)))
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, tangent)
    assert tangent.abs().max() > 0.1


def test_jacobians_and_hessians(problem):
    """Forward over reverse, reverse over reverse and reverse over forward are one matrix."""
    function, tensors = problem
    for i in range(3):
        assert_close(jacfwd(function, i)(*tensors), jacrev(function, i)(*tensors), 1e-12)
        second = hessian(energy(function), i)(*tensors)
        assert_close(jacrev(jacrev(energy(function), i), i)(*tensors), second, 1e-12)
        assert_close(jacrev(jacfwd(energy(function), i), i)(*tensors), second, 1e-12)


def test_third_derivatives(problem):
    """Of the offsets, along one direction, against reverse mode three times."""
    function, (input, offset, mask) = problem
    direction = torch.randn_like(offset)

    def along(energy):
        return lambda offset: (grad(energy)(offset) * direction).sum()

    leaf = offset.clone().requires_grad_()
    value = energy(function)(input, leaf, mask)
    for _ in range(3):
        (derivative,) = torch.autograd.grad(value, leaf, create_graph=True)
        value = (derivative * direction).sum()
    found = along(along(along(lambda offset: energy(function)(input, offset, mask))))(offset)
    assert_close(found, value, 1e-10)


def test_gradients_of_each_sample(problem):
    function, tensors = problem
    many = tuple(torch.stack([t, t.flip(0) + 0.1]) for t in tensors)
    each = vmap(grad(energy(function), (0, 1, 2)))(*many)
    for k in range(2):
        for a, b in zip(each, gradients(energy(function), [t[k] for t in many]), strict=True):
            assert_close(a[k], b, 1e-12)
    whole = grad(lambda *m: vmap(energy(function))(*m).sum(), (0, 1, 2))(*many)
    for a, b in zip(whole, each, strict=True):
        assert_close(a, b, 1e-12)


def test_autocast_under_a_transform(problem):
    function, tensors = problem
    tensors = [t.float() for t in tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(energy(function), tensors)
        found = grad(energy(function), (0, 1, 2))(*tensors)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_a_model():
    """Gradients of parameters as functions, and the tangent of an image, which no fused layer may drop."""
    model = timm.create_model("internimage_atto", num_classes=3).double().eval()
    image, direction = torch.randn(2, 1, 3, 32, 32, dtype=torch.float64).unbind()
    parameters = dict(model.named_parameters())
    found = grad(lambda p: functional_call(model, p, (image,)).square().sum())(parameters)
    model(image).square().sum().backward()
    for name, parameter in parameters.items():
        assert_close(found[name], parameter.grad, 1e-12, name)
    with torch.no_grad():
        step = 1e-6
        difference = (model(image + step * direction) - model(image - step * direction)) / (2 * step)
        assert_close(jvp(model, (image,), (direction,))[1], difference, 1e-6)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(image, direction))).tangent
            assert_close(tangent, difference, 1e-6)


def test_a_compiled_gradient(problem):
    function, tensors = problem
    compiled = torch.compile(lambda *t: grad(energy(function))(*t), backend="aot_eager")
    assert_close(compiled(*tensors), gradients(energy(function), tensors)[0], 1e-12)
