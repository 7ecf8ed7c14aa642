# SPDX-License-Identifier: MIT
"""What a new operator gets by registering a reference: docs/add-an-operator.md, done with a small operator."""

import pytest
import torch
from conftest import assert_close
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck, gradgradcheck

from internimage.ops.registration import DifferentiableOperator, Reference, library

# output[n, i] = factor * input[n, i]^2 * weight[n, i]


def forward(input, weight, factor):
    return (factor * input.float() ** 2 * weight.float()).to(input.dtype) if input.dtype != torch.float64 else (
        factor * input**2 * weight
    )  # fmt: skip


def backward(grad_output, input, weight, factor, deterministic, output_mask):
    grads = (2 * factor * input * weight * grad_output, factor * input**2 * grad_output)
    return tuple(grad if wanted else input.new_empty(0) for grad, wanted in zip(grads, output_mask))


def double_backward(grad_grad_input, grad_grad_weight, grad_output, input, weight, factor, deterministic):
    return (
        2 * factor * input * weight * grad_grad_input + factor * input**2 * grad_grad_weight,
        2 * factor * grad_output * (weight * grad_grad_input + input * grad_grad_weight),
        2 * factor * input * grad_output * grad_grad_input,
    )


def jvp(tangents, tensors, factor):
    (input_dir, weight_dir), (input, weight) = tangents, tensors
    return factor * (2 * input * weight * input_dir + input**2 * weight_dir)


@pytest.fixture(scope="module")
def weighted_square():
    return DifferentiableOperator(
        "test_weighted_square",
        tensors=("input", "weight"),
        arguments="float factor",
        output_shape=lambda input, weight, factor: input,
        reference=Reference(forward, backward, double_backward, jvp),
    )


@pytest.fixture
def tensors():
    return [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def formula(input, weight):
    return 1.5 * input**2 * weight


def test_derivatives(weighted_square, tensors):
    def call(*inputs):
        return weighted_square(*inputs, 1.5)

    assert gradcheck(call, tensors, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, tensors, check_fwd_over_rev=True)
    for wanted in range(2):  # one gradient without the other
        (grad,) = torch.autograd.grad(call(*tensors).sum(), tensors[wanted])
        (expected,) = torch.autograd.grad(formula(*tensors).sum(), tensors[wanted])
        assert_close(grad, expected)


def test_transforms(weighted_square, tensors):
    def call(*inputs):
        return weighted_square(*inputs, 1.5)

    x, weight = (t.detach() for t in tensors)
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        ours, expected = (transform(f, argnums=(0, 1))(x, weight) for f in (call, formula))
        for a, b in zip(torch.utils._pytree.tree_leaves(ours), torch.utils._pytree.tree_leaves(expected)):
            assert_close(a, b)
    for in_dims in ((1, 1), (1, None), (None, 0)):  # (5, 3) mapped over 5, with weights of 3; then an axis that is not
        batch = [t.T.unsqueeze(1).movedim(0, d) if d is not None else t[:, :1].T for t, d in zip((x, weight), in_dims)]
        assert_close(torch.vmap(call, in_dims)(*batch), torch.vmap(formula, in_dims)(*batch))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, weight)
        tangent = forward_ad.unpack_dual(call(dual, weight)).tangent
    assert_close(tangent, 3 * x * weight * weight)


def test_autocast_and_its_gradients(weighted_square):
    x, weight = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        y = weighted_square(x, weight, 1.5)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert_close(y, formula(x, weight), 2e-2)
    wide = x.detach().double()
    with torch.autocast("cpu", torch.bfloat16):
        assert weighted_square(wide, wide, 1.5).dtype == torch.float64


def test_fakes(weighted_square, tensors):
    x, weight = (t.detach().to("meta") for t in tensors)
    assert weighted_square(x, weight, 1.5).shape == (3, 5)
    with pytest.raises(ValueError, match="weight must be on the device of input, meta, got cpu"):
        weighted_square(x, tensors[1].detach(), 1.5)


def test_opcheck(weighted_square, tensors):
    """torch's own checks: the schema, the fakes, the autograd registration, compilation with dynamic shapes."""
    torch.library.opcheck(torch.ops.internimage.test_weighted_square.default, (*tensors, 1.5))


def test_a_kernel_takes_over_its_device(weighted_square, tensors):
    seen = []

    def kernel(input, weight, factor):
        seen.append(factor)
        return forward(input, weight, factor)

    library.impl("test_weighted_square", kernel, "CPU")
    x, weight = tensors
    assert gradcheck(lambda *inputs: weighted_square(*inputs, 1.5), (x, weight), check_forward_ad=True)
    assert seen
