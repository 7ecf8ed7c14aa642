# SPDX-License-Identifier: MIT
"""The linear layer and the MLP, in inference on a CPU and elsewhere, against float64 arithmetic."""

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from torch import nn

from internimage.layers import linear
from internimage.layers import mlp as mlp_module
from internimage.layers.fast_path import use_fast_path
from internimage.layers.linear import Linear
from internimage.layers.mlp import Mlp
from internimage.ops import onednn


def exact_mlp(mlp: Mlp, x: torch.Tensor) -> torch.Tensor:
    w1, b1, w2, b2 = (p.detach().double() for p in (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias))
    hidden = x.double() @ w1.T + b1
    return 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)) @ w2.T + b2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7, 12), (40, 12), (1, 1, 1, 12), (0, 4, 4, 12)], ids=str)
def test_mlp_in_pieces(monkeypatch, shape, dtype):
    """Whatever the number of rows, whole pieces and a rest."""
    monkeypatch.setattr(mlp_module, "_HIDDEN_BYTES", 3 * 48 * dtype.itemsize)
    monkeypatch.setattr(mlp_module, "_HALF_ROWS", 7)
    product = Mock(wraps=linear.product)
    monkeypatch.setattr(linear, "product", product)  # a hook would have the layers called once
    mlp = Mlp(12, 48).to(dtype)
    nn.init.normal_(mlp.fc1.bias)
    nn.init.normal_(mlp.fc2.bias)
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        output = mlp(x)
    assert_close(output, exact_mlp(mlp, x))
    assert output.dtype == dtype and output.is_contiguous()
    rows = x.numel() // 12
    piece = max(3, 7 if dtype.itemsize == 2 else 0) * torch.get_num_threads()
    assert product.call_count == 2 * max(1, -(-rows // piece))  # it did go through in pieces


@torch.no_grad()
def test_mlp_with_hooks_calls_its_layers_once(monkeypatch):
    monkeypatch.setattr(mlp_module, "_HIDDEN_BYTES", 1)
    mlp = Mlp(12, 48)
    x, seen = torch.randn(5, 7, 12), []
    expected = mlp(x)
    for child in mlp.children():
        child.register_forward_hook(lambda module, arguments, output: seen.append(output.shape))
    assert_close(mlp(x), expected)
    assert seen == [(5, 7, 48), (5, 7, 48), (5, 7, 12)]


def test_mlp_reads_any_layout(monkeypatch):
    monkeypatch.setattr(mlp_module, "_HIDDEN_BYTES", 1)
    mlp = Mlp(12, 24)
    x = torch.randn(2, 12, 5, 6).permute(0, 2, 3, 1)
    with torch.inference_mode():
        assert_close(mlp(x), exact_mlp(mlp, x))


def test_mlp_has_gradients(monkeypatch):
    monkeypatch.setattr(mlp_module, "_HIDDEN_BYTES", 1)
    mlp = Mlp(6, 8).double()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mlp, (x,))
    frozen = Mlp(6, 8).double().requires_grad_(False)
    assert torch.autograd.gradcheck(frozen, (x,))
    mlp(x.detach()).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mlp.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 9), (2, 3, 5, 9), (0, 9), (9,), (2100, 9), (3, 30, 30, 9)], ids=str)
def test_linear(shape, bias, dtype):
    """Few rows and many, as the choice of operator depends on it."""
    layer = Linear(9, 5, bias=bias).to(dtype)
    x = torch.randn(shape).to(dtype)
    with torch.inference_mode():
        output = layer(x)
        strided = layer(x.mT.contiguous().mT) if x.dim() > 1 else output
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert_close(output, expected)
    assert_close(strided, expected)
    assert output.dtype == dtype


def test_what_takes_the_fast_path():
    weight = torch.randn(3, 3)
    x = torch.randn(3, 3)
    assert use_fast_path(x, weight, None)
    assert not use_fast_path(x, weight.double())
    assert not use_fast_path(x.to("meta"), weight)
    leaf = nn.Parameter(weight)
    assert not use_fast_path(x, leaf)
    with torch.no_grad():
        assert use_fast_path(x, leaf.detach())
        assert use_fast_path(x, leaf)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not use_fast_path(x, weight)
    seen = []
    torch.func.vmap(lambda row: (seen.append(use_fast_path(row, weight)), row)[1])(x)
    torch.jit.trace(lambda row: (seen.append(use_fast_path(row, weight)), row + 1)[1], x, check_trace=False)
    assert seen == [False, False]


def test_under_vmap_and_autocast():
    mlp = Mlp(6, 8).requires_grad_(False)
    x = torch.randn(4, 5, 6)
    assert_close(torch.func.vmap(mlp)(x), exact_mlp(mlp, x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mlp(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_without_the_fused_operator(monkeypatch, dtype):
    monkeypatch.setattr(onednn, "_PRODUCT", "another")
    assert onednn._dtypes() == frozenset()
    monkeypatch.setattr(onednn, "_DTYPES", onednn._dtypes())
    layer = Linear(9, 5).to(dtype)
    x = torch.randn(40, 9).to(dtype)
    with torch.inference_mode():
        assert_close(layer(x), F.linear(x.double(), layer.weight.double(), layer.bias.double()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_a_half_type_without_products_is_multiplied_in_float32(monkeypatch, dtype, bias):
    """To the bit: the exact float32 product of the same numbers, rounded once."""
    monkeypatch.setattr(onednn, "_DTYPES", frozenset({torch.float32}))
    layer = Linear(300, 5, bias=bias).to(dtype)
    x = torch.randn(2, 20, 300).to(dtype)
    output = layer(x)
    assert output.dtype == dtype
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    # half a unit in the last place, plus that float32's rounding can turn a tie
    unit = torch.finfo(dtype).eps
    assert ((output.double() - exact).abs() <= 0.5001 * unit * exact.abs() + 300 * 2**-24 * 20).all()


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("features", [(1, 1), (9, 5), (64, 255), (70, 16)], ids=str)
@torch.no_grad()
def test_packed_product(features, rows):
    """Also with other numbers of rows than those that it was packed for, and for weights that were cut out."""
    if not onednn.CAN_PACK:
        pytest.skip("torch has no such operator")
    weight = torch.randn(features[0] + 2, features[1]).T[:, 1:-1]
    bias, x = torch.randn(features[1]), torch.randn(rows, features[0])
    for packed_for in (1, 9, 3136):
        packed = onednn.pack(weight, packed_for)
        for b in (bias, None):
            expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
            assert_close(torch.ops.mkldnn._linear_pointwise.default(x, packed, b, "none", [], ""), expected, 1e-5)
