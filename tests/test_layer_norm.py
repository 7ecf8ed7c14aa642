# SPDX-License-Identifier: MIT
"""The operator of layer norm, against its formula in float64. Needs the operators alone, not the layers."""

import pytest
import torch
from conftest import assert_close

from internimage import ops  # noqa: F401  (defines the operator)
from internimage.extension import has_kernel


def exact_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    deviation = x - x.mean(-1, keepdim=True)
    variance = deviation.pow(2).mean(-1, keepdim=True)
    return deviation / (variance + eps).sqrt() * weight.double() + bias.double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4, 15, 16, 17, 64, 70, 257])
@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 2), (2, 5, 7), (0, 4)], ids=str)
def test_layer_norm_operator(shape, channels, dtype):
    """Any number of rows, as they go four by four, and every tail of a row; far from zero, too."""
    x = (torch.randn(*shape, channels) * 3 + 100 * (dtype == torch.float32)).to(dtype)
    weight, bias = torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)
    output = torch.ops.internimage.layer_norm(x, weight, bias, 1e-6)
    assert output.dtype == dtype and output.is_contiguous()
    assert_close(output, exact_layer_norm(x, weight, bias, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 16, 70, 1024, 1030])  # 1024: up to there half types are kept as floats
@pytest.mark.parametrize("with_scale", [False, True])
def test_layer_norm_operator_scales_and_adds(with_scale, channels, dtype):
    x, residual = torch.randn(5, 3, channels).to(dtype), torch.randn(3, 5, channels).to(dtype).transpose(0, 1)
    weight, bias, scale = torch.randn(3, channels).to(dtype).unbind()
    output = torch.ops.internimage.layer_norm(x, weight, bias, 1e-6, residual, scale if with_scale else None)
    expected = exact_layer_norm(x, weight, bias, 1e-6) * (scale.double() if with_scale else 1)
    assert_close(output, residual.double() + expected)
    only_scaled = torch.ops.internimage.layer_norm(x, weight, bias, 1e-6, None, scale)
    assert_close(only_scaled, exact_layer_norm(x, weight, bias, 1e-6) * scale.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 16, 70, 1030])
def test_scaling_and_adding_round_as_operators_of_their_own(channels, dtype):
    """Bit for bit: a product contracted with the sum into a fused multiply-add would round once."""
    x, residual = torch.randn(2, 40, channels, dtype=dtype)
    weight, bias, scale = torch.randn(3, channels, dtype=dtype).unbind()
    norm = torch.ops.internimage.layer_norm(x, weight, bias, 1e-6)
    for scaled, factor in ((norm, None), (norm * scale, scale)):
        found = torch.ops.internimage.layer_norm(x, weight, bias, 1e-6, residual, factor)
        assert torch.equal(found, residual + scaled)
    assert torch.equal(torch.ops.internimage.layer_norm(x, weight, bias, 1e-6, None, scale), norm * scale)


def test_layer_norm_operator_names_what_does_not_fit():
    x, row = torch.randn(4, 6), torch.randn(6)
    with pytest.raises(RuntimeError, match="residual must have input's shape and dtype"):
        torch.ops.internimage.layer_norm(x, row, row, 1e-6, torch.randn(1, 6))
    with pytest.raises(RuntimeError, match="scale must be vectors of input's last size"):
        torch.ops.internimage.layer_norm(x, row, row, 1e-6, None, torch.randn(5))


def test_layer_norm_keeps_nan_and_infinity_apart():
    x = torch.randn(9, 32).bfloat16()
    x[1, 3], x[4, 0], x[6] = float("nan"), float("inf"), 3e38
    row = torch.ones(32).bfloat16()
    output = torch.ops.internimage.layer_norm(x, row, row, 1e-6, x, None)
    assert output.isnan().all(-1).tolist() == [i in (1, 4, 6) for i in range(9)]
    assert output[[0, 2, 3, 5, 7, 8]].isfinite().all()


def test_layer_norm_operator_is_well_behaved():
    x = torch.randn(4, 6, 5).mT  # strided
    weight, bias = torch.randn(6), torch.randn(12)[::2]
    torch.library.opcheck(torch.ops.internimage.layer_norm, (x, weight, bias, 1e-6))
    torch.library.opcheck(torch.ops.internimage.layer_norm, (x, weight, bias, 1e-6, torch.randn(4, 5, 6), bias))
    assert_close(torch.ops.internimage.layer_norm(x, weight, bias, 0.5), exact_layer_norm(x, weight, bias, 0.5))
    row = torch.randn(1, 48)
    many = torch.ops.internimage.layer_norm(row.expand(7, 48), row[0], row[0], 1e-6)
    assert all(torch.equal(one, many[0]) for one in many)  # a row does not depend on where it stands


# ---- in place


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 16, 70, 1030])
@pytest.mark.parametrize("with_scale", [False, True])
def test_adding_in_place_has_the_bits_of_a_new_tensor(with_scale, channels, dtype):
    x, residual = torch.randn(2, 5, 3, channels).to(dtype).unbind()
    weight, bias, scale = torch.randn(3, channels).to(dtype).unbind()
    scale = scale if with_scale else None
    expected = torch.ops.internimage.layer_norm(x, weight, bias, 1e-6, residual, scale)
    assert_close(
        expected,
        residual.double() + exact_layer_norm(x, weight, bias, 1e-6) * (1 if scale is None else scale.double()),
    )
    kept = x.clone()
    assert torch.ops.internimage.add_layer_norm_(residual, x, weight, bias, 1e-6, scale) is None
    assert torch.equal(residual, expected) and torch.equal(x, kept)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    again = torch.zeros_like(residual)
    torch.ops.internimage.add_layer_norm_(again, strided, weight, bias, 1e-6, scale)
    zero = torch.ops.internimage.layer_norm(x, weight, bias, 1e-6, torch.zeros_like(x), scale)
    assert torch.equal(again, zero)
    twice = torch.ops.internimage.layer_norm(x, weight, bias, 1e-6, x, scale)
    torch.ops.internimage.add_layer_norm_(x, x, weight, bias, 1e-6, scale)  # the input itself
    assert torch.equal(x, twice)


def test_adding_in_place_refuses_what_it_cannot_overwrite():
    x, row = torch.randn(4, 6), torch.randn(6)
    add = torch.ops.internimage.add_layer_norm_
    if has_kernel("add_layer_norm_", "cpu"):
        for residual in (torch.randn(6, 4).T, torch.randn(4, 12)[:, ::2], torch.randn(1, 6).expand(4, 6)):
            kept = residual.clone()
            with pytest.raises(RuntimeError, match="add_layer_norm_: residual must be contiguous"):
                add(residual, x, row, row, 1e-6)
            assert torch.equal(residual, kept)
        with pytest.raises(RuntimeError, match="residual must have input's shape and dtype"):
            add(torch.randn(2, 6), x, row, row, 1e-6)
        with pytest.raises(RuntimeError, match="residual must have input's shape and dtype"):
            add(torch.randn(4, 6).double(), x, row, row, 1e-6)
    torch.library.opcheck(add, (torch.randn(4, 6), x, row, row, 1e-6))
    torch.library.opcheck(add, (torch.randn(4, 6), x, row, row, 1e-6, row))
    add(torch.empty(0, 6), torch.empty(0, 6), row, row, 1e-6)


# ---- of a sum


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 16, 70, 1024, 1030])
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 11])
def test_norm_of_a_sum_has_the_bits_of_both_operators(rows, channels, dtype):
    """Every rest of four rows: one that is repeated to make the last four must be added to once."""
    x, addend = torch.randn(2, rows, channels).to(dtype).unbind()
    weight, bias = torch.randn(2, channels).to(dtype).unbind()
    total, kept = x + addend, addend.clone()
    output = torch.ops.internimage.norm_of_sum_(x, addend, weight, bias, 1e-6)
    assert torch.equal(x, total) and torch.equal(addend, kept)
    assert torch.equal(output, torch.ops.internimage.layer_norm(total, weight, bias, 1e-6))
    assert_close(output, exact_layer_norm(total, weight, bias, 1e-6))


def test_norm_of_a_sum_refuses_what_it_cannot_overwrite():
    x, row, norm = torch.randn(4, 6), torch.randn(6), torch.ops.internimage.norm_of_sum_
    if has_kernel("norm_of_sum_", "cpu"):
        for view in (torch.randn(6, 4).T, torch.randn(4, 12)[:, ::2], torch.randn(1, 6).expand(4, 6)):
            kept = view.clone()
            with pytest.raises(RuntimeError, match="norm_of_sum_: input must be contiguous"):
                norm(view, x, row, row, 1e-6)
            assert torch.equal(view, kept)
        for addend in (torch.randn(1, 6), torch.randn(4, 6).double()):
            with pytest.raises(RuntimeError, match="addend must have input's shape and dtype"):
                norm(x, addend, row, row, 1e-6)
    torch.library.opcheck(norm, (torch.randn(4, 6), torch.randn(6, 4).T, row, row, 1e-6))
