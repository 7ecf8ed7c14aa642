# SPDX-License-Identifier: MIT
"""The operators of GELU and its gradient, against its formula in float64. Needs the operators alone, not the layers."""

import math

import pytest
import torch
from conftest import assert_close

from internimage import ops  # noqa: F401  (defines the operator)
from internimage.extension import has_kernel

gelu, gelu_, gelu_backward = (getattr(torch.ops.internimage, name) for name in ("gelu", "gelu_", "gelu_backward"))
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

on_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
needs_kernel = pytest.mark.skipif(not has_kernel("gelu_", "cpu"), reason="needs the compiled CPU kernels")


def exact_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * Phi(x); the complementary error function keeps the digits of small tails."""
    x = x.double()
    return x * torch.special.erfc(-x / 2**0.5) / 2


def values(dtype: torch.dtype) -> torch.Tensor:
    """Dense where the function bends, and every magnitude that the type has."""
    exponents = torch.arange(-20, 15, dtype=torch.float64).exp2()
    dense = torch.linspace(-15, 15, 60_001, dtype=torch.float64)
    return torch.cat([dense, exponents, -exponents, torch.zeros(1, dtype=torch.float64)]).to(dtype)


@needs_kernel  # torch's own loses digits, and is NaN for infinity
@on_dtypes
def test_gelu_operator(dtype):
    """float32: as simd/gelu.h says of its polynomial, and positive values have at least the digits of their type. Half
    types are rounded once more."""
    x = values(dtype)
    output, exact = gelu(x), exact_gelu(x)
    assert output.dtype == dtype
    error = (output.double() - exact).abs()
    if dtype == torch.float64:
        # a relative error e of the argument of erfc is one of 2 * x^2 * e in its tail
        assert (error <= 1e-15 * (1 + x.square()) * exact.abs()).all()
        return
    once_more = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal / 2
    assert (error <= 2.4e-7 * x.double().clamp_min(1) + once_more).all()
    digits = x > -5
    assert (error <= 1e-5 * exact.abs() + once_more)[digits].all()


@needs_kernel
@on_dtypes
def test_gelu_of_what_is_no_number(dtype):
    inf, nan, large = float("inf"), float("nan"), torch.finfo(dtype).max
    output = gelu(torch.tensor([nan, inf, large, -large, -0.0, 0.0] * 20, dtype=dtype)).view(20, 6)
    assert output[:, 0].isnan().all()
    assert (output[:, 1] == inf).all()
    assert (output[:, 2] == large).all()
    assert (output[:, 3:] == 0).all()
    # -inf * 0, as torch says, and nothing beside it
    x = torch.zeros(40, dtype=dtype)
    x[7] = -inf
    assert gelu(x).isnan().nonzero().tolist() == torch.nn.functional.gelu(x).isnan().nonzero().tolist() == [[7]]


@needs_kernel
@on_dtypes
def test_a_value_of_the_operator_does_not_depend_on_its_position(dtype):
    """Every tail of every vector width, from every beginning: to the bit."""
    x = (torch.randn(200) * 3).to(dtype)
    expected = gelu(x)
    for count in range(71):
        for begin in (0, 1, 3):
            assert torch.equal(gelu(x[begin : begin + count].clone()), expected[begin : begin + count])
            in_place = x.clone()
            gelu_(in_place[begin : begin + count])
            assert torch.equal(in_place[begin : begin + count], expected[begin : begin + count])
            assert torch.equal(in_place[begin + count :], x[begin + count :])
            assert torch.equal(in_place[:begin], x[:begin])


@needs_kernel
def test_gelu_takes_the_same_steps_in_every_thread():
    x = torch.randn(3, 70_001)
    expected, threads = gelu(x), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(gelu(x), expected)
    finally:
        torch.set_num_threads(threads)


@on_dtypes
def test_gelu_of_any_layout(dtype):
    wide = torch.randn(6, 4, 10).to(dtype)
    for x in (wide.mT, wide[:, :, ::3], wide[:1].expand(5, 4, 10), wide.permute(2, 0, 1), torch.randn(()).to(dtype)):
        output = gelu(x)
        assert output.is_contiguous() and output.shape == x.shape
        assert_close(output, exact_gelu(x), 4 * torch.finfo(dtype).eps)
    assert gelu(wide[:0]).shape == (0, 4, 10)


@needs_kernel
def test_gelu_in_place_refuses_what_it_cannot_overwrite():
    x = torch.randn(4, 6)
    kept = x.clone()
    for view in (x.T, x[:, ::2], x[:, :3], x[:1].expand(5, 6)):
        with pytest.raises(RuntimeError, match="internimage::gelu_: input must be contiguous"):
            gelu_(view)
    assert torch.equal(x, kept)
    with pytest.raises(RuntimeError):
        gelu(torch.ones(3, dtype=torch.int64))


def test_gelu_operators_are_well_behaved():
    torch.library.opcheck(gelu, (torch.randn(4, 6, 5),))
    torch.library.opcheck(gelu, (torch.randn(4, 6, 5).mT,))
    torch.library.opcheck(gelu_, (torch.randn(4, 6, 5),))


# ---- its gradient


def exact_derivative(x: torch.Tensor) -> torch.Tensor:
    """Phi(x) + x * phi(x)."""
    x = x.double()
    return torch.special.erfc(-x / 2**0.5) / 2 + x * torch.exp(-x.square() / 2) / (2 * math.pi) ** 0.5


@needs_kernel
@on_dtypes
def test_gradient(dtype):
    """float32: as simd/gelu.h says. Half types are rounded once more."""
    x = values(dtype)
    grad = torch.randn(len(x)).to(dtype)
    exact = grad.double() * exact_derivative(x)
    error = (gelu_backward(grad, x).double() - exact).abs()
    if dtype == torch.float64:
        # exp(-x^2 / 2) and erfc have a relative error of about x^2 rounding errors, and are below 1
        assert (error <= 1e-15 * grad.abs()).all()
    else:
        once_more = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal / 2
        assert (error <= 5e-7 * grad.double().abs() + once_more).all()


@needs_kernel
@on_dtypes
def test_gradient_of_what_is_no_number(dtype):
    inf, nan, large = float("inf"), float("nan"), torch.finfo(dtype).max
    x = torch.tensor([nan, inf, -inf, large, -large, -0.0, 0.0] * 20, dtype=dtype)
    derivative = gelu_backward(torch.ones_like(x), x).view(20, 7)
    assert derivative[:, 0].isnan().all()
    assert (derivative[:, [1, 3]] == 1).all()
    assert (derivative[:, [2, 4]].abs() <= 1e-30).all()
    assert (derivative[:, 5:] == 0.5).all()


@needs_kernel
@on_dtypes
def test_a_value_of_the_gradient_does_not_depend_on_its_position(dtype):
    x, grad = (torch.randn(2, 200) * 3).to(dtype)
    expected = gelu_backward(grad, x)
    for count in range(71):
        for begin in (0, 1, 3):
            part = slice(begin, begin + count)
            assert torch.equal(gelu_backward(grad[part].clone(), x[part].clone()), expected[part])
    wide = torch.randn(4, 6, 5).to(dtype)
    assert torch.equal(gelu_backward(wide.mT, wide.mT), gelu_backward(wide, wide).mT)


def test_gradient_names_what_does_not_fit():
    x = torch.randn(4, 6)
    for grad in (torch.randn(6), torch.randn(6, 4), torch.randn(4, 6).double()):
        if has_kernel("gelu_backward", "cpu"):
            with pytest.raises(RuntimeError, match="grad_output must have input's shape and dtype"):
                gelu_backward(grad, x)
    torch.library.opcheck(gelu_backward, (torch.randn(4, 6).mT, torch.randn(6, 4)))
    assert gelu_backward(x[:0], x[:0]).shape == (0, 6)
