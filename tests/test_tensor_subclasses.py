# SPDX-License-Identifier: MIT
"""Parameters that are tensors of another class, as libraries of quantization make them: what they get are torch's own
operators, and the numbers of the same weights as plain tensors."""

import copy
from unittest.mock import Mock

import golden
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import assert_close
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from internimage.layers import mlp as mlp_module
from internimage.layers.activation import GELU
from internimage.layers.conv import Conv2d
from internimage.layers.fast_path import use_fast_path
from internimage.layers.linear import Linear
from internimage.layers.mlp import Mlp
from internimage.layers.norm import LayerNorm, create_norm
from internimage.layers.query import Query
from internimage.models.blocks import Block, Stem


class Int8(Tensor):
    """A tensor in 8 bits with one scale. It has no memory of its own, and knows the operators of torch alone."""

    _steps: Tensor
    _scale: Tensor

    @staticmethod
    def __new__(cls, steps: Tensor, scale: Tensor) -> "Int8":
        self = torch.Tensor._make_wrapper_subclass(cls, steps.shape, dtype=scale.dtype)
        self._steps, self._scale = steps, scale
        return self

    @classmethod
    def of(cls, x: Tensor) -> "Int8":
        """x rounded to 255 steps."""
        x = x.detach()
        scale = (x.abs().amax() / 127).clamp_min(torch.finfo(x.dtype).tiny)
        return cls((x / scale).round().to(torch.int8), scale)

    def plain(self) -> Tensor:
        """The same numbers as a plain tensor."""
        return self._steps.to(self._scale.dtype) * self._scale

    @classmethod
    def __torch_dispatch__(cls, operator, types, arguments=(), keywords=None):
        if operator.namespace != "aten":
            raise NotImplementedError(f"{cls.__name__} has no {operator}")
        if operator in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(arguments[0]._steps, arguments[0]._scale)
        return operator(*tree_map_only(cls, cls.plain, arguments), **tree_map_only(cls, cls.plain, keywords or {}))


def quantize(module: nn.Module, *names: str) -> None:
    """Replace parameters in place, as `torchao.quantize_` does."""
    for name in names:
        owner, _, own = name.rpartition(".")
        parameter = Int8.of(module.get_parameter(name))
        setattr(module.get_submodule(owner), own, nn.Parameter(parameter, requires_grad=False))


def randomize(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.requires_grad_(False).eval()


def plain(parameter: Tensor) -> Tensor:
    return parameter.plain() if isinstance(parameter, Int8) else parameter


SUBSETS = [("weight",), ("bias",), ("weight", "bias")]


class Named(Tensor):
    """A subclass that changes nothing."""


def test_only_plain_parameters_take_the_fast_path():
    x, weight = torch.randn(3, 3), torch.randn(3, 3)
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            assert use_fast_path(x, weight, nn.Parameter(weight, requires_grad=False))
            for other in (
                Int8.of(weight),
                nn.Parameter(Int8.of(weight), requires_grad=False),
                weight.as_subclass(Named),
            ):
                assert not use_fast_path(x, other)
                assert not use_fast_path(x, weight, None, other)
            assert not use_fast_path(x.as_subclass(Named), weight)


@pytest.mark.parametrize("names", SUBSETS, ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_linear(mode, names):
    layer, x = randomize(Linear(12, 5)), torch.randn(4, 9, 12)
    with mode():
        layer(x)
        quantize(layer, *names)
        assert torch.equal(layer(x), F.linear(x, plain(layer.weight), plain(layer.bias)))


@pytest.mark.parametrize("names", SUBSETS, ids=str)
@torch.no_grad()
def test_layer_norm(names):
    layer, x = randomize(LayerNorm(12)), torch.randn(4, 9, 12)
    layer(x)
    quantize(layer, *names)
    assert torch.equal(layer(x), F.layer_norm(x, (12,), plain(layer.weight), plain(layer.bias), layer.eps))


@pytest.mark.parametrize("names", [("fc1.weight", "fc2.weight"), ("fc1.weight",), ("fc2.bias",)], ids=str)
@torch.no_grad()
def test_mlp(monkeypatch, names):
    """Plain weights, and these alone, take rows in pieces."""
    monkeypatch.setattr(mlp_module, "_HIDDEN_BYTES", 1)
    pieces = Mock(wraps=mlp_module.chunk_rows)
    monkeypatch.setattr(mlp_module, "chunk_rows", pieces)
    mlp, x = randomize(Mlp(12, 24)), torch.randn(4, 9, 12)
    mlp(x)
    quantize(mlp, *names)
    assert pieces.call_count == 1
    hidden = F.gelu(F.linear(x, plain(mlp.fc1.weight), plain(mlp.fc1.bias)))
    # one GELU is the compiled kernel's: 2.4e-7 and 1.2e-6 are the errors of the two
    assert_close(mlp(x), F.linear(hidden, plain(mlp.fc2.weight), plain(mlp.fc2.bias)), 1e-5)
    assert pieces.call_count == 1


@pytest.mark.parametrize("names", SUBSETS, ids=str)
@torch.no_grad()
def test_convolution(names):
    """Also after a call that has packed the weight."""
    conv, x = randomize(Conv2d(6, 8, 3, stride=2, padding=1)), torch.randn(2, 6, 9, 11)
    conv(x)
    assert conv._packed is not None
    quantize(conv, *names)
    expected = F.conv2d(x.contiguous(memory_format=torch.channels_last), plain(conv.weight), plain(conv.bias), 2, 1)
    assert_close(conv(x), expected, 1e-6)  # the sums of 54 products may be in another order
    assert "weight" not in names or conv._packed is None or not conv._packed.is_current(conv)


@pytest.mark.parametrize("names", [("0.weight",), ("0.bias",), ("1.1.weight", "1.1.bias")], ids=str)
@torch.no_grad()
def test_query(names):
    query = randomize(Query(nn.Conv2d(8, 8, 3, padding=1, groups=8), create_norm(8, in_format="NCHW"), GELU()))
    x = torch.randn(2, 8, 7, 9)
    query(x)
    quantize(query, *names)
    conv, norm = query[0], query[1][1]
    y = F.conv2d(x, plain(conv.weight), plain(conv.bias), padding=1, groups=8).permute(0, 2, 3, 1)
    expected = F.gelu(F.layer_norm(y, (8,), plain(norm.weight), plain(norm.bias), norm.eps))
    assert_close(query(x), expected, 1e-5)


def dequantized(module: nn.Module) -> nn.Module:
    """A copy with plain parameters of the same numbers."""
    other = copy.deepcopy(module)
    for name, parameter in module.named_parameters():
        owner, _, own = name.rpartition(".")
        setattr(other.get_submodule(owner), own, nn.Parameter(plain(parameter).clone(), requires_grad=False))
    return other


@torch.no_grad()
def test_stem():
    x = torch.randn(2, 3, 33, 47)
    for name in dict(Stem(3, 16).named_parameters()):
        stem = randomize(Stem(3, 16))
        stem(x)
        quantize(stem, name)
        assert_close(stem(x), dequantized(stem)(x), 1e-5, name)


@pytest.mark.parametrize(
    "arguments",
    [dict(layer_scale=1.0, post_norm=True), dict(res_post_norm=True, center_feature_scale=True, dw_kernel_size=5)],
    ids=["scaled", "attentive"],
)
@torch.no_grad()
def test_block(arguments):
    """Whichever parameter it is, also of a block that was fused before."""
    whole = randomize(Block(16, 2, **arguments))
    x = torch.randn(2, 5, 7, 16)
    for name, _ in list(whole.named_parameters()):
        block = copy.deepcopy(whole)
        block(x)
        assert block.fused_for(x) is not None
        quantize(block, name)
        assert block.fused_for(x) is None
        other = dequantized(block)
        assert other.fused_for(x) is not None
        assert_close(block(x), other(x), 1e-5, name)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_model(mode):
    """The weights of all linear layers, as `torchao.quantize_` chooses them, of a model that has packed weights."""
    model = timm.create_model("internimage_atto", num_classes=10).eval().requires_grad_(False)
    model.load_state_dict(golden.fill_state_dict({key: value.shape for key, value in model.state_dict().items()}))
    x = golden.images(1, (2, 3, 64, 96))
    with mode():
        before = model(x)
        quantize(model, *(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)))
        after = model(x)
        assert not torch.equal(after, before)
        assert_close(after, dequantized(model)(x), 1e-5)
