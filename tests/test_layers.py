# SPDX-License-Identifier: MIT
"""The DCNv3 layer against the official module's numbers and a composition by hand; norms and attentive pooling."""

import math

import golden
import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, TOLERANCE, assert_close
from test_gelu import exact_gelu
from test_layer_norm import exact_layer_norm
from torch import nn

from internimage.extension import has_kernel
from internimage.layers import AttentivePool, DCNv3
from internimage.layers.activation import activation_class
from internimage.layers.norm import create_norm
from internimage.layers.query import Query

on_devices = pytest.mark.parametrize("device", DEVICES)

OFFICIAL_NAMES = {"group": "groups", "pad": "padding"}
OFFICIAL_VALUES = {"BN": "batchnorm", "LN": "layernorm", "SiLU": "silu", "GELU": "gelu"}


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """With the goldens' weights, so that nothing is zero."""
    module.load_state_dict(golden.fill_state_dict({key: value.shape for key, value in module.state_dict().items()}))
    return module.eval()


def golden_layer(case: dict, dtype: torch.dtype, device: str) -> DCNv3:
    kwargs = {OFFICIAL_NAMES.get(name, name): OFFICIAL_VALUES.get(v, v) for name, v in case["kwargs"].items()}
    return filled(DCNv3(**kwargs)).to(device, dtype)


def golden_input(case: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and gradient of the output, float64."""
    seed, shape = case["input_seed"], case["input_shape_NHWC"]
    return golden.images(seed, shape).double(), golden.randn(seed + 1, shape)


on_golden = pytest.mark.parametrize("case", golden.cases("module").values(), ids=lambda case: case["name"])


@on_golden
def test_golden_keys_and_shapes(case):
    state = golden_layer(case, torch.float32, "cpu").state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == case["param_shapes"]


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@on_golden
def test_golden(case, dtype, device):
    layer = golden_layer(case, dtype, device)
    x, grad_output = (t.to(device, dtype) for t in golden_input(case))
    output = layer(x.requires_grad_())
    output.backward(grad_output)
    assert output.dtype == x.grad.dtype == dtype
    assert_close(output, golden.tensors("module")[f"{case['name']}/output"], name="output")
    assert_close(x.grad, golden.tensors("module")[f"{case['name']}/grad_input"], name="grad_input")

    tolerance = {torch.float64: 1e-9, torch.float32: TOLERANCE[torch.float32]}[dtype]
    assert {name for name, _ in layer.named_parameters()} == set(case["param_grads"])
    for name, parameter in layer.named_parameters():
        expected, grad = case["param_grads"][name], parameter.grad.double().cpu()
        probe = (grad * golden.grad_probe(name, grad.shape)).sum().item()
        assert grad.norm().item() == pytest.approx(expected["norm"], rel=tolerance), name
        assert probe == pytest.approx(expected["probe"], rel=0, abs=tolerance * expected["norm"]), name


@on_devices
@on_golden
def test_golden_under_autocast(case, device):
    """Rounded to bfloat16 between all steps; an offset's rounding moves the sample, hence the wide tolerance."""
    layer = golden_layer(case, torch.float32, device)
    x, grad_output = (t.to(device, torch.float32) for t in golden_input(case))
    with torch.autocast(device, dtype=torch.bfloat16):
        output = layer(x.requires_grad_())
    output.backward(grad_output.to(output.dtype))
    assert output.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    assert_close(output, golden.tensors("module")[f"{case['name']}/output"], 5e-2)
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.norm().item() == pytest.approx(case["param_grads"][name]["norm"], rel=0.25), name


@on_golden
def test_golden_compiled_and_exported(case):
    layer = golden_layer(case, torch.float64, "cpu")
    x, grad_output = golden_input(case)
    expected = golden.tensors("module")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    output = compiled(x.requires_grad_())
    output.backward(grad_output)
    assert_close(output, expected[f"{case['name']}/output"])
    assert_close(x.grad, expected[f"{case['name']}/grad_input"])
    program = torch.export.export(layer, (x.detach(),))
    assert_close(program.module()(x.detach()), expected[f"{case['name']}/output"])


# ---- composition

COMPOSITIONS = {
    "stride": {"stride": 2},
    "strides": {"stride": (2, 1), "kernel_size": (3, 5), "padding": (1, 2), "offset_scale": 1.5},
    "no padding": {"padding": 0},
    "dilation": {"dilation": 2, "padding": 2, "dw_kernel_size": 3},
    "wide query": {"dw_kernel_size": (5, 7), "stride": 3},
    "remove_center": {"remove_center": True, "groups": 8},
    "even": {"kernel_size": 2, "padding": 0, "dw_kernel_size": 4},
    "mixed": {"center_feature_scale": True, "offset_scale": 0.5},
}
# by hand: what makes the depthwise window and the kernel concentric
QUERY_PADDING = {"strides": (1, 2), "no padding": 0, "dilation": 1, "wide query": (2, 3), "even": 1}


@pytest.mark.parametrize("case", COMPOSITIONS)
def test_composition(case):
    kwargs = COMPOSITIONS[case]
    layer = filled(DCNv3(16, dtype=torch.float64, **kwargs))
    x = golden.images(3, (2, 7, 9, 16)).double()
    output = layer(x)

    p = dict(layer.named_parameters())
    pair = {
        name: value if isinstance(value, tuple) else (value, value)
        for name, value in {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1, **kwargs}.items()
        if name in ("kernel_size", "stride", "padding", "dilation")
    }
    groups = kwargs.get("groups", 4)
    query = F.conv2d(
        x.permute(0, 3, 1, 2),
        p["dw_conv.0.weight"],
        p["dw_conv.0.bias"],
        pair["stride"],
        QUERY_PADDING.get(case, 1),
        groups=16,
    ).permute(0, 2, 3, 1)
    query = F.gelu(F.layer_norm(query, (16,), p["dw_conv.1.1.weight"], p["dw_conv.1.1.bias"], 1e-6))
    projected, offset, mask = (
        F.linear(t, p[f"{name}.weight"], p[f"{name}.bias"])
        for name, t in (("input_proj", x), ("offset", query), ("mask", query))
    )
    geometry = {
        **pair,
        "groups": groups,
        "offset_scale": kwargs.get("offset_scale", 1.0),
        "remove_center": kwargs.get("remove_center", False),
    }
    y = oracle.forward(projected, offset, mask, **geometry, softmax=True)
    if kwargs.get("center_feature_scale"):
        scale = torch.sigmoid(query @ p["center_feature_scale_proj_weight"].T + p["center_feature_scale_proj_bias"])
        scale = scale.repeat_interleave(16 // groups, dim=-1)
        y = y * (1 - scale) + projected * scale
    expected = F.linear(y, p["output_proj.weight"], p["output_proj.bias"])
    assert output.shape[1:3] == oracle.output_size((7, 9), **pair)
    assert_close(output, expected)

    location, weight = layer.sampling(x)
    points = offset.shape[-1] // groups // 2
    assert location.shape == (*output.shape[:3], groups, points, 2)
    assert_close(weight.sum(-1), torch.ones_like(weight[..., 0]))
    assert_close(weight, mask.view(weight.shape).softmax(-1))
    for axis, right in zip(location.unbind(-1), oracle.locations(offset, **geometry)):
        assert_close(axis, right)


def test_a_new_layer_is_a_mean_over_the_regular_grid():
    layer = DCNv3(16, dtype=torch.float64)
    x = golden.images(4, (2, 5, 6, 16)).double()
    mean = F.avg_pool2d(F.linear(x, layer.input_proj.weight).permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
    assert_close(layer(x), F.linear(mean, layer.output_proj.weight))
    location, weight = layer.sampling(x)
    assert_close(weight, torch.full_like(weight, 1 / 9))
    assert location[0, 2, 3, 0].tolist() == [[2 + i // 3, 1 + i % 3] for i in range(9)]


def test_reset_parameters():
    layer = DCNv3(16, center_feature_scale=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7.0)
    layer.reset_parameters()
    for name in ("offset.weight", "offset.bias", "mask.weight", "mask.bias", "input_proj.bias", "output_proj.bias"):
        assert not layer.get_parameter(name).any(), name
    for name in ("center_feature_scale_proj_weight", "center_feature_scale_proj_bias"):
        assert not layer.get_parameter(name).any(), name
    for linear in (layer.input_proj, layer.output_proj):
        bound = (6 / (16 + 16)) ** 0.5
        weight = linear.weight.detach()
        assert bound / 2 < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)


def test_device_and_dtype_of_the_parameters():
    layer = DCNv3(16, center_feature_scale=True, norm_layer="batchnorm", device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}
    assert layer(torch.empty(2, 5, 6, 16, device="meta", dtype=torch.float64)).shape == (2, 5, 6, 16)


def test_empty_batch():
    layer = filled(DCNv3(16, stride=2))
    x = torch.zeros(0, 5, 6, 16, requires_grad=True)
    output = layer(x)
    output.sum().backward()
    assert output.shape == (0, 3, 3, 16) and x.grad.shape == x.shape


@pytest.mark.parametrize(
    "kwargs, exception, words",
    [
        ({"groups": 3}, ValueError, ("groups", "divide", "16 channels", "3 groups")),
        ({"groups": 0}, ValueError, ("groups", "at least 1", "0")),
        ({"groups": True}, TypeError, ("groups", "an int", "True")),
        ({"groups": 4.0}, TypeError, ("groups", "an int", "4.0")),
        ({"channels": 0}, ValueError, ("channel", "at least 1", "0")),
        ({"kernel_size": (3, 3, 3)}, ValueError, ("kernel_size", "(3, 3, 3)")),
        ({"kernel_size": 3.0}, TypeError, ("kernel_size", "3.0")),
        ({"kernel_size": 0}, ValueError, ("kernel_size", "at least 1", "0")),
        ({"stride": 0}, ValueError, ("stride", "at least 1", "0")),
        ({"padding": -1}, ValueError, ("padding", "at least 0", "-1")),
        ({"dilation": "2"}, TypeError, ("dilation", "'2'")),
        ({"dw_kernel_size": 0}, ValueError, ("dw_kernel_size", "at least 1", "0")),
        ({"dw_kernel_size": 4}, ValueError, ("dw_kernel_size 4", "even")),
        ({"dw_kernel_size": (3, 2)}, ValueError, ("dw_kernel_size 2", "even")),
        ({"dw_kernel_size": 1, "padding": 0}, ValueError, ("dw_kernel_size 1", "not negative")),
        ({"dilation": 3}, ValueError, ("dw_kernel_size 3", "dilation 3", "padding 1")),
        ({"remove_center": True, "kernel_size": 2}, ValueError, ("remove_center", "odd", "(2, 2)")),
        ({"remove_center": True, "kernel_size": 1, "padding": 0}, ValueError, ("remove_center", "1x1")),
        ({"center_feature_scale": True, "stride": 2}, ValueError, ("center_feature_scale", "stride (2, 2)")),
        ({"center_feature_scale": True, "padding": (1, 2)}, ValueError, ("center_feature_scale", "padding (1, 2)")),
        ({"offset_scale": "1"}, TypeError, ("offset_scale", "a number", "'1'")),
        ({"norm_layer": "groupnorm"}, ValueError, ("norm_layer", "'layernorm' or 'batchnorm'", "'groupnorm'")),
        ({"act_layer": "nothing"}, ValueError, ("act_layer", "'gelu'", "'nothing'")),
        ({"act_layer": None}, ValueError, ("act_layer", "'gelu'", "None")),
    ],
    ids=str,
)
def test_constructor_errors(kwargs, exception, words):
    with pytest.raises(exception) as error:
        DCNv3(**{"channels": 16, **kwargs})
    assert error.type is exception
    for word in words:
        assert word in str(error.value), f"{word!r} is not in {str(error.value)!r}"


# ---- norms


@pytest.mark.parametrize("in_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("out_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("norm_layer", ["layernorm", "batchnorm"])
def test_create_norm(norm_layer, in_format, out_format):
    norm = create_norm(6, norm_layer, in_format, out_format, dtype=torch.float64)
    native = "NHWC" if norm_layer == "layernorm" else "NCHW"
    place = int(in_format != native)
    filled(norm)
    assert f"{place}.weight" in norm.state_dict()
    x = golden.randn(5, (2, 3, 4, 6))  # channels last
    weight, bias = norm[place].weight, norm[place].bias
    if norm_layer == "layernorm":
        mean, var, eps = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True), 1e-6
    else:
        mean, var, eps = norm[place].running_mean, norm[place].running_var, 1e-5
    expected = (x - mean) / (var + eps).sqrt() * weight + bias
    output = norm(x if in_format == "NHWC" else x.permute(0, 3, 1, 2))
    assert_close(output, expected if out_format == "NHWC" else expected.permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"norm_layer": "LN"}, ("norm_layer", "'layernorm' or 'batchnorm'", "'LN'")),
        ({"in_format": "channels_last"}, ("in_format", "'NHWC' or 'NCHW'", "'channels_last'")),
        ({"out_format": "NCWH"}, ("out_format", "'NHWC' or 'NCHW'", "'NCWH'")),
    ],
    ids=str,
)
def test_create_norm_errors(kwargs, words):
    with pytest.raises(ValueError) as error:
        create_norm(6, **kwargs)
    for word in words:
        assert word in str(error.value)


# ---- attentive pooling


@on_devices
@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_attentive_pool(num_heads, device):
    """Against torch's multi-head attention."""
    pool = filled(AttentivePool(8, 5, num_heads, dtype=torch.float64))
    x = golden.randn(6, (2, 8, 3, 4))
    grad_output = golden.randn(7, (2, 5))
    names = [name for name, _ in pool.named_parameters()]
    assert all(parameter.any() for parameter in pool.parameters())

    p = {name: parameter.detach().clone().requires_grad_() for name, parameter in pool.named_parameters()}
    peer_x = x.clone().requires_grad_()
    tokens = peer_x.flatten(2).permute(2, 0, 1)  # (H * W, N, channels)
    query, key, value = (
        F.layer_norm(t, (8,), p[f"norm1_{name}.0.weight"], p[f"norm1_{name}.0.bias"], 1e-6)
        for name, t in (("q", tokens.mean(0, keepdim=True)), ("k", tokens), ("v", tokens))
    )
    expected, _ = F.multi_head_attention_forward(
        query,
        key,
        value,
        embed_dim_to_check=8,
        num_heads=num_heads,
        in_proj_weight=None,
        in_proj_bias=torch.cat([p[f"cross_dcn.{name}_bias"] for name in "qkv"]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=p["cross_dcn.proj.weight"],
        out_proj_bias=p["cross_dcn.proj.bias"],
        use_separate_proj_weight=True,
        q_proj_weight=p["cross_dcn.q.weight"],
        k_proj_weight=p["cross_dcn.k.weight"],
        v_proj_weight=p["cross_dcn.v.weight"],
    )
    expected = expected.squeeze(0)
    # what all keys have in common does not change a softmax, so these gradients are noise
    names.remove("cross_dcn.k_bias")
    names.remove("norm1_k.0.bias")
    expected_grads = torch.autograd.grad(expected, [peer_x, *(p[name] for name in names)], grad_output)

    pool, x = pool.to(device), x.to(device).requires_grad_()
    output = pool(x)
    assert_close(output, expected)
    grads = torch.autograd.grad(output, [x, *(pool.get_parameter(name) for name in names)], grad_output.to(device))
    for name, grad, right in zip(["x", *names], grads, expected_grads):
        assert_close(grad, right, name=name)


@on_devices
def test_attentive_pool_under_autocast(device):
    pool = filled(AttentivePool(8, 5, 2))
    x = golden.images(6, (2, 8, 3, 4))
    expected = pool(x)
    with torch.autocast(device, dtype=torch.bfloat16):
        output = pool.to(device)(x.to(device))
    assert output.dtype == torch.bfloat16
    assert_close(output, expected, 5e-2)


def test_attentive_pool_errors():
    with pytest.raises(ValueError, match="num_heads must divide the channels: 8 channels, 3 heads"):
        AttentivePool(8, 5, 3)


# ---- layer norm in inference


def test_layer_norm_layer_has_gradients_and_rounds_alike():
    norm = create_norm(12)[0].double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))
    with torch.no_grad():
        assert_close(norm(x), exact_layer_norm(x, norm.weight, norm.bias, 1e-6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert create_norm(12)[0](torch.randn(3, 12)).dtype == torch.float32  # as torch's own


# ---- GELU


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_gelu_layer_keeps_the_layout_of_maps(dtype):
    """A convolution before it and one behind it work channels last; a new layout would be copied twice."""
    act = activation_class("gelu")()
    x = (2 * torch.randn(2, 5, 6, 12)).to(dtype)
    for view in (x, x.permute(0, 3, 1, 2), x[0], x[..., ::2], x.transpose(1, 2), x[:, :1, :1].permute(0, 3, 1, 2)):
        output = act(view)
        assert_close(output, exact_gelu(view))
        for layout in (torch.contiguous_format, torch.channels_last):
            if view.dim() == 4 and view.is_contiguous(memory_format=layout):
                assert output.is_contiguous(memory_format=layout)


def test_gelu_layer_has_gradients():
    act = activation_class(torch.nn.GELU)()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(act, (x,))
    assert_close(torch.func.vmap(act)(x), exact_gelu(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert act(x.float()).dtype == torch.float32  # as torch's own


# ---- the query


def query_layer(channels=12, norm_layer="layernorm", act_layer="gelu", dtype=torch.float32, **conv) -> Query:
    conv = {"padding": 1, "groups": channels, **conv}
    found = Query(
        nn.Conv2d(channels, channels, 3, dtype=dtype, **conv),
        create_norm(channels, norm_layer, in_format="NCHW", out_format="NHWC", dtype=dtype),
        activation_class(act_layer)(),
    ).eval()
    for parameter in found.parameters():
        nn.init.normal_(parameter)
    for name, buffer in found.named_buffers():
        if name.endswith("var"):
            buffer.fill_(2.0)
    return found


def one_by_one(found: Query, x: torch.Tensor) -> torch.Tensor:
    """In float64, in which no module but torch's own computes."""
    conv, norm, act = found.double()
    x = conv(x.double())
    if isinstance(norm[-1], nn.LayerNorm):
        x = exact_layer_norm(x.permute(0, 2, 3, 1), norm[-1].weight, norm[-1].bias, norm[-1].eps)
    else:
        x = norm(x)
    return F.silu(x) if isinstance(act, nn.SiLU) else exact_gelu(x)


@pytest.mark.parametrize(
    "arguments, fuses",
    [
        ({}, True),
        ({"bias": False}, True),
        ({"stride": (2, 1)}, True),
        ({"norm_layer": "batchnorm"}, False),
        ({"act_layer": "silu"}, False),
        ({"dilation": 2}, False),
        ({"groups": 6}, False),
    ],
    ids=str,
)
@torch.no_grad()
def test_query_layer(monkeypatch, arguments, fuses):
    found = query_layer(**arguments)
    x = torch.randn(2, 12, 7, 8)
    fused = []
    monkeypatch.setattr(
        Query, "_forward_fused", lambda self, x, run=Query._forward_fused: fused.append(1) or run(self, x)
    )
    output = found(x)
    assert len(fused) == (fuses and has_kernel("query", "cpu"))
    assert_close(output, one_by_one(found, x))


@torch.no_grad()
def test_query_layer_with_hooks_calls_its_modules():
    found, x = query_layer(), torch.randn(2, 12, 7, 8)
    expected, seen = found(x), []
    modules = [found[0], found[1], *found[1], found[2]]
    for module in modules:
        handle = module.register_forward_hook(lambda module, arguments, output: seen.append(module))
        assert_close(found(x), expected)
        assert seen.pop() is module and not seen
        handle.remove()
    found[1][1].forward = lambda x: torch.zeros_like(x)  # as libraries set it that wrap a module in place
    assert not found(x).any()


@torch.no_grad()
def test_query_layer_whose_modules_were_replaced():
    x = torch.randn(2, 12, 7, 8)
    found = query_layer()
    found[2] = nn.Identity()
    before = found(x)
    found.append(nn.Softmax(-1))
    assert_close(found(x), before.double().softmax(-1))
    found = query_layer()
    found[1].insert(1, nn.Softmax(-1))
    conv = F.conv2d(x, found[0].weight, found[0].bias, padding=1, groups=12).permute(0, 2, 3, 1).softmax(-1)
    norm = found[1][2]
    assert_close(found(x), F.gelu(F.layer_norm(conv, (12,), norm.weight, norm.bias, norm.eps)))
    reflecting = query_layer(padding_mode="reflect")
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    plain = query_layer(padding=0)
    plain.load_state_dict(reflecting.state_dict())
    assert_close(reflecting(x), plain(padded))


def test_query_layer_has_gradients():
    found = query_layer(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(found, (torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True),))
    found(torch.randn(1, 4, 3, 4, dtype=torch.float64)).sum().backward()
    assert all(parameter.grad is not None for parameter in found.parameters())


# ---- GELU in training


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gelu_has_gradients(dtype):
    """Those of torch's, which loses digits where x is far below 0; of a tensor in any layout."""
    act = activation_class("gelu")()
    for x in (torch.randn(3, 5, 7), torch.randn(2, 6, 4, 5).permute(0, 3, 1, 2), torch.randn(0, 4)):
        x = x.to(dtype).requires_grad_()
        grad = torch.randn_like(x)
        (found,) = torch.autograd.grad(act(x), x, grad)
        wide = x.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(torch.nn.functional.gelu(wide), wide, grad.double())
        assert found.dtype == dtype
        assert_close(found, expected)


def test_gelu_is_differentiated_again():
    act, x = activation_class("gelu")(), torch.randn(37, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(act, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(act, (x,))
    third = torch.func.grad(torch.func.grad(torch.func.grad(lambda t: act(t))))(torch.tensor(0.3, dtype=torch.float64))
    # the derivative of (2 - x^2) times the density
    density = math.exp(-(0.3**2) / 2) / math.sqrt(2 * math.pi)
    assert abs(third.item() - (0.3**3 - 4 * 0.3) * density) < 1e-12
