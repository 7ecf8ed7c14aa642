# SPDX-License-Identifier: MIT
"""Whether tensors changed, and the packed weights of convolutions. Those of blocks are in test_fused_block.py."""

import copy
import io
import pickle
import zipfile

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from torch import nn

from internimage import ops  # noqa: F401  (defines the operators)
from internimage.extension import has_kernel
from internimage.layers import conv as conv_module
from internimage.layers.conv import Conv2d
from internimage.layers.packing import Snapshot, set_weight_packing, weights_not_packed
from internimage.ops import onednn

needs_kernel = pytest.mark.skipif(not has_kernel("fingerprint", "cpu"), reason="needs the compiled CPU kernels")
fingerprint = torch.ops.internimage.fingerprint
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (2,), (3,), (4,), (5,), (7,), (8,), (64,), (9, 5), (64, 255), (16, 3, 3, 3)]


# ---- fingerprints


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fingerprint(shape, dtype):
    """It is a function of the values; whatever changes all of them changes it."""
    x, other = torch.randn(shape).to(dtype), torch.randn(3).to(dtype)
    found = fingerprint([x, other])
    assert fingerprint([x, other]) == found == fingerprint([x.clone(), other.clone()])
    for changed in (
        x * 2,
        -x,
        x + 1,
        torch.zeros_like(x),
        torch.full_like(x, float("nan")),
        x.nextafter(x + 1) if dtype.itemsize > 2 else x * 1.5,
    ):
        assert fingerprint([changed, other]) != found
        assert fingerprint([x, other * 2]) != found
    assert fingerprint([other, x]) != found
    assert fingerprint([torch.zeros(shape), -torch.zeros(shape)]) != fingerprint([torch.zeros(shape)] * 2)


@needs_kernel
def test_fingerprint_of_other_tensors():
    assert fingerprint([torch.empty(0)]) == fingerprint([torch.empty(0, 4), torch.empty(0)])
    assert Snapshot([], []).is_current()
    for x in (torch.randn(4, 6).T, torch.randn(9)[::2], torch.randn(1, 3).expand(4, 3)):
        with pytest.raises(RuntimeError, match="internimage::fingerprint: tensors must be contiguous"):
            fingerprint([torch.randn(3), x])
    assert fingerprint([torch.randn(12)[3:7]]) != 0
    fingerprint([torch.zeros(3, dtype=torch.complex128)])  # is not read


@needs_kernel
@torch.no_grad()
def test_snapshot():
    """What torch counts, memory, values and layout."""
    copied, used = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
    changes = [
        lambda: used.mul_(1),
        lambda: copied.mul_(1),
        lambda: used.detach().zero_(),
        lambda: copied.data.mul_(2),
        lambda: setattr(copied, "data", copied.data.clone()),
        lambda: setattr(used, "data", used.data.clone()),
        lambda: setattr(copied, "data", copied.data.T),
        lambda: copied.view(-1)[3].fill_(1),
        lambda: copied.detach().numpy().fill(3),
    ]
    for change in changes:
        snapshot = Snapshot([copied, used], [copied] if copied.is_contiguous() else [])
        assert snapshot.is_current() and snapshot.is_current()
        change()
        if not copied.is_contiguous():
            assert not snapshot.is_current()
            copied.data = copied.data.contiguous()
            continue
        assert not snapshot.is_current()


# ---- convolutions


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "arguments",
    [
        dict(kernel_size=3, stride=2, padding=1),
        dict(kernel_size=3, stride=2, padding=1, bias=False),
        dict(kernel_size=(1, 3), stride=(1, 2), padding=(0, 2), dilation=(1, 2)),
        dict(kernel_size=3, padding=1, groups=3),
        dict(kernel_size=3, padding="same"),
        dict(kernel_size=3, padding=1, padding_mode="reflect"),
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [True, False])
@torch.no_grad()
def test_convolution(packed, arguments, dtype):
    layer = Conv2d(6, 18, **arguments).to(dtype).eval()
    set_weight_packing(layer, packed)
    exact = nn.Conv2d(6, 18, **arguments).double()
    exact.load_state_dict(layer.state_dict())
    for size in ((2, 6, 9, 12), (1, 6, 3, 4), (3, 6, 40, 5)):
        x = torch.randn(size).to(dtype)
        for layout in (x, x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
            output = layer(layout)
            assert output.dtype == dtype and output.is_contiguous(memory_format=torch.channels_last)
            assert_close(output, exact(x.double()))
    assert layer(torch.zeros(0, 6, 9, 12, dtype=dtype)).shape[0] == 0
    usable = packed and "same" not in arguments.values() and "reflect" not in arguments.values()
    if has_kernel("fingerprint", "cpu") and conv_module._CAN_PACK:
        multiplied = torch.float32 if dtype.itemsize < 4 and not onednn.has_product(dtype) else dtype
        assert (layer._packed is not None) == (usable and onednn.has_product(multiplied))


@pytest.fixture
def conv() -> Conv2d:
    """A convolution that has packed its weight."""
    layer = Conv2d(6, 10, 3, padding=1).eval()
    with torch.no_grad():
        layer(torch.randn(2, 6, 7, 8))
    if has_kernel("fingerprint", "cpu") and conv_module._CAN_PACK:
        assert layer._packed is not None
    return layer


def replace(layer: nn.Module, name: str, value: torch.Tensor) -> None:
    setattr(layer, name, nn.Parameter(value))


def step(layer: nn.Module) -> None:
    with torch.enable_grad():
        layer(torch.randn(2, 6, 7, 8)).sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "one element": lambda layer: layer.weight[1, 2, 0, 1].fill_(9),
    "data": lambda layer: layer.weight.data.mul_(2),
    "other data": lambda layer: setattr(layer.weight, "data", torch.randn_like(layer.weight)),
    "strided data": lambda layer: setattr(layer.weight, "data", layer.weight.data.transpose(2, 3)),
    "parameter": lambda layer: replace(layer, "weight", torch.randn_like(layer.weight)),
    "bias": lambda layer: replace(layer, "bias", torch.randn_like(layer.bias)),
    "no bias": lambda layer: layer.register_parameter("bias", None),
    "state": lambda layer: layer.load_state_dict({k: v * 3 for k, v in layer.state_dict().items()}),
    "assigned": lambda layer: layer.load_state_dict({k: v * 3 for k, v in layer.state_dict().items()}, assign=True),
    "step": step,
    "dtype": lambda layer: layer.double(),
    "layout": lambda layer: layer.to(memory_format=torch.channels_last),
    "initial": lambda layer: layer.reset_parameters(),
    "stride": lambda layer: setattr(layer, "stride", (2, 1)),
    "padding": lambda layer: setattr(layer, "padding", (0, 2)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_a_changed_convolution(conv, change):
    change(conv)
    x = torch.randn(2, 6, 7, 8, dtype=conv.weight.dtype)
    bias = None if conv.bias is None else conv.bias.double()
    assert_close(conv(x), F.conv2d(x.double(), conv.weight.double(), bias, conv.stride, conv.padding))


def test_a_packed_convolution_is_trained_copied_and_saved(conv):
    x = torch.randn(2, 6, 7, 8)
    with torch.no_grad():
        expected = conv(x)
    assert conv(x).requires_grad
    for made in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv)), copy.copy(conv)):
        with torch.no_grad():
            assert torch.equal(made(x), expected)
    assert copy.deepcopy(conv)._packed is None
    buffer = io.BytesIO()
    torch.save(conv, buffer)
    stored = [name for name in zipfile.ZipFile(buffer).namelist() if "/data/" in name]
    assert len(stored) == 2  # weight and bias
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False)._packed is None
    assert set(conv.state_dict()) == {"weight", "bias"}
    conv.train()
    assert conv._packed is None
    with torch.no_grad():
        conv(x)
    assert conv._packed is None


@torch.no_grad()
def test_turning_packing_off(conv):
    x = torch.randn(2, 6, 7, 8)
    expected = conv(x)
    set_weight_packing(nn.Sequential(conv), False)
    assert conv._packed is None
    assert_close(conv(x), expected, 1e-6)
    assert conv._packed is None
    set_weight_packing(conv, True)
    assert torch.equal(conv(x), expected)
    other = Conv2d(6, 6, 3).eval()
    set_weight_packing(other, False)
    with pytest.raises(KeyError), weights_not_packed(nn.ModuleList([conv, other])):
        conv(x)
        assert conv._packed is None
        raise KeyError
    assert conv.pack_weights and not other.pack_weights
    assert torch.equal(conv(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_results_do_not_depend_on_the_size_that_a_weight_was_packed_for(dtype):
    """oneDNN chooses the layout by the size of the first image."""
    for channels in (3, 16, 32, 64):
        layer = Conv2d(channels, max(16, 2 * channels), 3, stride=2, padding=1).to(dtype).eval()
        images = [
            torch.randn(n, channels, h, w).to(dtype) for n, h, w in ((1, 4, 8), (2, 8, 12), (8, 14, 14), (1, 56, 50))
        ]
        expected = [copy.deepcopy(layer)(image) for image in images]
        for first in images:
            layer.clear_packed()
            layer(first)
            assert all(torch.equal(layer(image), right) for image, right in zip(images, expected))
