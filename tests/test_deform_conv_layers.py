# SPDX-License-Identifier: MIT
"""The layers of deformable convolution: their formula, initial values, keys and arguments."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from torch import Tensor, nn

from internimage import CheckpointError
from internimage.extension import has_kernel
from internimage.layers import DeformConv2d, ModulatedDeformConv2d, accept_old_keys
from internimage.layers.deform_conv import offset_layouts
from internimage.layers.packing import set_weight_packing
from internimage.layers.sampling import SamplingLayer

VERSIONS = [DeformConv2d, ModulatedDeformConv2d]
# every argument with another value than another's, the sides of pairs too
CASES = {
    "3x3": dict(kernel_size=3, padding=1),
    "strided": dict(kernel_size=3, stride=2, padding=1, offset_groups=4),
    "dilated, groups": dict(kernel_size=3, padding=2, dilation=2, groups=2, offset_groups=8),
    "unequal sides": dict(kernel_size=(2, 3), stride=(1, 2), padding=(2, 0), dilation=(3, 1), groups=4, bias=False),
    "1x1": dict(kernel_size=1, offset_groups=2),
}


@pytest.fixture(params=VERSIONS, ids=lambda version: version.__name__)
def version(request) -> type[DeformConv2d] | type[ModulatedDeformConv2d]:
    return request.param


def trained(version, dtype=torch.float64, **arguments) -> DeformConv2d | ModulatedDeformConv2d:
    """A layer of 8 to 12 channels whose every parameter matters: offsets have a standard deviation of about a pixel."""
    layer = version(8, 12, **arguments, dtype=dtype)
    points = layer.kernel_size[0] * layer.kernel_size[1]
    nn.init.normal_(layer.conv_offset.weight, std=(8 * points) ** -0.5)
    nn.init.normal_(layer.conv_offset.bias)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def from_locations(layer, x: Tensor) -> Tensor:
    """The papers' sum over the points, of x read by `grid_sample` at the places that `sampling` names."""
    location, weight = layer.sampling(x)  # (N, Ho, Wo, groups, P, 2), (N, Ho, Wo, groups, P)
    n, ho, wo, groups, points, _ = location.shape
    size = torch.tensor([x.shape[3], x.shape[2]], dtype=x.dtype)
    grid = (2 * location + 1) / size - 1  # pixel centers to the coordinates of `align_corners=False`
    columns = []
    for group, part in enumerate(x.chunk(groups, dim=1)):
        read = F.grid_sample(part, grid[:, :, :, group].flatten(2, 3), align_corners=False)  # (N, C, Ho, Wo * P)
        columns.append(read.view(n, -1, ho, wo, points) * weight[:, :, :, group].unsqueeze(1))
    taken = torch.cat(columns, dim=1).unflatten(1, (layer.groups, -1))  # (N, groups, Cin / groups, Ho, Wo, P)
    kernel = layer.weight.flatten(2).unflatten(0, (layer.groups, -1))  # (groups, Cout / groups, Cin / groups, P)
    y = torch.einsum("ngchwp,gocp->ngohw", taken, kernel).flatten(1, 2)
    return y if layer.bias is None else y + layer.bias.view(-1, 1, 1)


# ---- what they compute


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_papers_sum_at_the_places_of_sampling(version, case):
    layer, x = trained(version, **CASES[case]), torch.randn(2, 8, 7, 9, dtype=torch.float64)
    location, weight = layer.sampling(x)
    assert weight.std() > 0.1 if layer.modulated else bool((weight == 1).all())
    assert location.shape[:-1] == weight.shape
    assert layer.input_size(x) == (7, 9) and isinstance(layer, SamplingLayer)
    # both interpolate with four products of float64 a point; the sums differ in their order only
    assert_close(layer(x), from_locations(layer, x), 1e-11)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_new_layers_are_the_plain_convolution_or_half_of_it(version, case):
    layer, x = version(8, 12, **CASES[case], dtype=torch.float64), torch.randn(2, 8, 7, 9, dtype=torch.float64)
    layer.weight.normal_()
    plain = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    assert_close(layer(x), plain / 2 if version is ModulatedDeformConv2d else plain, 1e-11)
    assert layer.offset_parameters() == [layer.conv_offset.weight, layer.conv_offset.bias]


@torch.no_grad()
def test_the_thirds_of_the_prediction_and_the_order_of_x_and_y():
    """As in mmcv: channel (group * points + point) * 2 is y, the one after it x; the last third is the mask."""
    layer = ModulatedDeformConv2d(4, 1, 3, padding=1, offset_groups=2)
    layer.conv_offset.bias[(9 + 5) * 2] = 0.25  # second group, point 5: row 1, column 2
    layer.conv_offset.bias[(9 + 5) * 2 + 1] = -1.5
    layer.conv_offset.bias[36 + 9 + 5] = 1.0
    location, weight = layer.sampling(torch.zeros(1, 4, 5, 6))
    assert location[0, 3, 2, 1, 5].tolist() == [2 + 1 - 1.5, 3 + 0.25]  # (x, y)
    assert location[0, 3, 2, 0, 5].tolist() == [3, 3] and location[0, 3, 2, 1, 2].tolist() == [3, 2]
    expected = torch.full((2, 9), 0.5)
    expected[1, 5] = 1 / (1 + torch.tensor(-1.0).exp())
    torch.testing.assert_close(weight[0, 3, 2], expected)


def test_initial_values(version):
    torch.manual_seed(0)
    layer = version(32, 64, 3)
    # kaiming uniform for ReLU: sqrt(6 / fan_in); v2: 1 / sqrt(fan_in)
    bound = (288**-0.5) * (1 if version is ModulatedDeformConv2d else 6**0.5)
    assert bound * 0.99 < layer.weight.abs().max() <= bound
    assert not layer.bias.any() and not any(p.any() for p in layer.offset_parameters())
    assert layer.conv_offset.weight.shape == ((27 if version is ModulatedDeformConv2d else 18), 32, 3, 3)


def test_offsets_stay_zero_in_what_initializes_all_convolutions(version):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), version(8, 8, 3))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    assert not any(parameter.any() for parameter in model[1].offset_parameters())
    nn.init.ones_(model[1].conv_offset.weight)
    model[1].reset_parameters()
    assert not any(parameter.any() for parameter in model[1].offset_parameters())


def test_offsets_learn(version):
    """Zero weights do not keep the gradient from the offsets, nor from the mask."""
    layer = version(4, 4, 3, padding=1)
    layer(torch.randn(2, 4, 6, 6)).square().sum().backward()
    grad = layer.conv_offset.weight.grad
    assert (grad.flatten(1).abs().amax(1) > 0).all(), "a channel without gradient"


# ---- as a module


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")
@torch.no_grad()
def test_copies_and_graphs_compute_the_same(version):
    layer, x = trained(version, torch.float32, **CASES["strided"]), torch.randn(2, 8, 7, 9)
    expected = layer(x)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.jit.script(layer),
        torch.jit.trace(layer, x, check_trace=False),
        torch.fx.symbolic_trace(layer),
        torch.export.export(layer, (x,)).module(),
    ):
        assert torch.equal(other(x), expected)
    last = torch.channels_last
    assert_close(layer.to(memory_format=last)(x.to(memory_format=last)), expected, 1e-5)


@torch.no_grad()
def test_half_types_and_autocast(version):
    layer, x = trained(version, **CASES["strided"]), torch.randn(2, 8, 7, 9, dtype=torch.float64)
    exact = layer(x)
    # a location is rounded in the half type too: up to 2^-8 of a coordinate near 8, and the map's slope is about 1
    assert_close(layer.bfloat16()(x.bfloat16()), exact, 0.1)
    layer, x = layer.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert_close(layer(x), exact, 0.1)


def test_transforms_of_torch_func(version):
    layer, x = trained(version, **CASES["3x3"]), torch.randn(2, 8, 5, 4, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    actual = torch.func.grad(lambda x: layer(x).square().sum())(x.detach())
    assert_close(actual, expected, 1e-11)
    assert_close(torch.vmap(lambda image: layer(image[None])[0])(x), layer(x), 1e-11)


def test_meta_and_dtypes(version):
    layer = version(8, 12, 3, device="meta", dtype=torch.float16)
    assert {p.device.type for p in layer.parameters()} == {"meta"} and layer.weight.dtype == torch.float16
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.weight.isfinite().all() and not layer.conv_offset.bias.any()
    assert version(8, 12, 3, bias=False).bias is None


# ---- keys: written by hand, from mmcv's and another implementation's state dicts


class Block(nn.Module):
    """A deformable convolution under the name that ResNets give it."""

    def __init__(self, version, **arguments) -> None:
        super().__init__()
        self.conv2 = version(4, 6, 3, **{**dict(bias=False), **arguments})


SPELLINGS = {
    "mmcv": "conv2.conv_offset.{}",
    "mmcv, before version 2": "conv2_offset.{}",
    "chengdazhi": "conv2.conv_offset_mask.{}",
}


def state_dict(spelling: str, channels: int) -> dict[str, Tensor]:
    tensors = {"conv2.weight": torch.randn(6, 4, 3, 3)}
    tensors[SPELLINGS[spelling].format("weight")] = torch.randn(channels, 4, 3, 3)
    tensors[SPELLINGS[spelling].format("bias")] = torch.randn(channels)
    return tensors


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_three_spellings(version, spelling, depth):
    tensors = state_dict(spelling, 27 if version is ModulatedDeformConv2d else 18)
    block = Block(version)
    model = nn.Sequential(nn.Sequential(block)) if depth else block
    accept_old_keys(model)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        given = {("0.0." if depth else "") + key: value for key, value in tensors.items()}
        one.load_state_dict(given, strict=True)
        conv = dict(one.named_modules())["0.0.conv2" if depth else "conv2"]
        values = tensors.values()
        for actual, expected in zip((conv.weight, conv.conv_offset.weight, conv.conv_offset.bias), values, strict=True):
            assert torch.equal(actual, expected)
        assert len(given) == 3  # the caller's own is not changed


def test_both_spellings_at_once_are_one_too_many(version):
    channels = 27 if version is ModulatedDeformConv2d else 18
    for spelling in list(SPELLINGS)[1:]:
        block = Block(version)
        accept_old_keys(block)
        with pytest.raises(RuntimeError, match="Unexpected key"):
            block.load_state_dict({**state_dict("mmcv", channels), **state_dict(spelling, channels)})


def test_a_bias_that_is_frozen_at_zero():
    tensors = state_dict("chengdazhi", 27)
    Block(ModulatedDeformConv2d).load_state_dict({**tensors, "conv2.bias": torch.zeros(6)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*conv2\.bias"):
        Block(ModulatedDeformConv2d).load_state_dict({**tensors, "conv2.bias": torch.ones(6)})
    block = Block(ModulatedDeformConv2d, bias=True)
    block.load_state_dict({**tensors, "conv2.bias": torch.ones(6)})
    assert (block.conv2.bias == 1).all()


def test_the_other_implementation_predicts_without_dilation():
    block = Block(ModulatedDeformConv2d, dilation=2, padding=2)
    with pytest.raises(CheckpointError, match=r"conv2\.conv_offset_mask\.weight' cannot.* dilation \(2, 2\)"):
        block.load_state_dict(state_dict("chengdazhi", 27))


@pytest.mark.parametrize(
    "version, arguments, channels, message",
    [
        (ModulatedDeformConv2d, {}, 18, r"has 18 channels, as in DeformConv2d\(..., offset_groups=1\); Modul.* has 27"),
        (
            DeformConv2d,
            {},
            27,
            r"has 27 channels, as in ModulatedDeformConv2d\(..., offset_groups=1\); Deform.* has 18",
        ),
        (ModulatedDeformConv2d, {}, 72, r"as in DeformConv2d\(..., offset_groups=4\)"),
        (ModulatedDeformConv2d, {}, 54, r"as in ModulatedDeformConv2d\(..., offset_groups=2\)"),
        (
            DeformConv2d,
            dict(offset_groups=4),
            18,
            r"as in DeformConv2d\(..., offset_groups=1\); .*offset_groups=4 has 72",
        ),
    ],
)
def test_offsets_of_the_other_version_or_number_of_groups(version, arguments, channels, message):
    block = Block(version, **arguments)
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(CheckpointError, match=message) as error:
        block.load_state_dict(state_dict("mmcv", channels))
    assert "\n" not in str(error.value) and "conv2.conv_offset.weight" in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())


def test_what_a_number_of_channels_can_be():
    assert offset_layouts(27, 64, (3, 3)) == [(True, 1)] and offset_layouts(18, 64, (3, 3)) == [(False, 1)]
    assert offset_layouts(72, 512, (3, 3)) == [(False, 4)] and offset_layouts(12, 64, (2, 2)) == [(True, 1)]
    assert offset_layouts(54, 64, (3, 3)) == [(True, 2)]  # three groups of v1 do not divide 64 channels
    assert offset_layouts(54, 96, (3, 3)) == [(True, 2), (False, 3)]
    assert offset_layouts(20, 64, (3, 3)) == offset_layouts(0, 64, (3, 3)) == []


# ---- bad arguments


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        (dict(offset_groups=3), ValueError, "offset_groups must divide in_channels, 8, got 3"),
        (dict(offset_groups=0), ValueError, "offset_groups must be at least 1, got 0"),
        (dict(offset_groups=1.0), TypeError, "offset_groups must be an int, got 1.0"),
        (dict(offset_groups=True), TypeError, "offset_groups must be an int, got True"),
        (dict(groups=5), ValueError, "groups must divide in_channels, 8, got 5"),
        (dict(groups=8), ValueError, "groups must divide out_channels, 12, got 8"),
        (dict(in_channels=0), ValueError, "in_channels must be at least 1, got 0"),
        (dict(out_channels="12"), TypeError, "out_channels must be an int, got '12'"),
        (dict(kernel_size=0), ValueError, "kernel_size must be at least 1"),
        (dict(stride=(1, 2, 3)), ValueError, "stride must be an int or a .* pair, got 3 values"),
        (dict(padding="same"), TypeError, "padding must be an int or a .* pair of ints, got 'same'"),
        (dict(padding=-1), ValueError, "padding must be at least 0"),
        (dict(dilation=0), ValueError, "dilation must be at least 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(version, arguments, kind, message):
    with pytest.raises(kind, match=message):
        version(**{**dict(in_channels=8, out_channels=12, kernel_size=3), **arguments})


# ---- the copy of the weight that inference keeps


def kept_layer(dtype=torch.float32) -> ModulatedDeformConv2d:
    return trained(ModulatedDeformConv2d, dtype, kernel_size=3, padding=1, groups=2).eval()


def formula(layer: nn.Module, x: Tensor) -> Tensor:
    """In float64, on the same numbers."""
    return from_locations(copy.deepcopy(layer).double(), x.double())


@pytest.mark.skipif(not has_kernel("fingerprint", "cpu"), reason="needs the compiled CPU kernels")
@torch.no_grad()
def test_inference_keeps_a_copy_of_the_weight():
    layer, x = kept_layer(), torch.randn(2, 8, 5, 7)
    first = layer(x)
    kept = layer._kept
    assert kept is not None and kept.tensor.is_contiguous(memory_format=torch.channels_last)
    assert_close(first, formula(layer, x))
    layer(x)
    assert layer._kept is kept
    assert copy.deepcopy(layer)._kept is None
    assert layer.state_dict().keys() == kept_layer().state_dict().keys()
    for change in (lambda: layer.weight.mul_(2), lambda: layer.weight.data.mul_(-1)):
        change()
        assert_close(layer(x), formula(layer, x))
        assert layer._kept is not kept
        kept = layer._kept
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    assert_close(layer(x), formula(layer, x))
    layer.train()
    assert layer._kept is None
    layer(x)
    assert layer._kept is None


@pytest.mark.parametrize("why", ["off", "gradients", "channels last", "autocast"])
def test_when_no_copy_is_kept(why):
    layer, x = kept_layer(), torch.randn(2, 8, 5, 7)
    if why == "off":
        set_weight_packing(layer, False)
    if why == "channels last":
        layer.to(memory_format=torch.channels_last)
    with torch.set_grad_enabled(why == "gradients"), torch.autocast("cpu", enabled=why == "autocast"):
        output = layer(x)
    assert layer._kept is None
    if why != "autocast":
        assert_close(output, formula(layer, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_the_kept_weight_of_other_dtypes(dtype):
    layer, x = kept_layer(dtype), torch.randn(2, 8, 5, 7).to(dtype)
    output = layer(x)
    set_weight_packing(layer, False)
    assert output.dtype == dtype
    torch.testing.assert_close(output, layer(x), rtol=0, atol=0)  # the same products of the same numbers
