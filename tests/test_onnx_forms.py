# SPDX-License-Identifier: MIT
"""Both forms of the operators in files of ONNX, run by onnxruntime: against the formulas, goldens and whole models."""

import math
import random

import deform_oracle
import golden
import onnx
import onnxruntime
import oracle
import pytest
import torch
from conftest import TOLERANCE, assert_close
from exported import File, Many
from test_dcnv3 import golden_problem, schema
from test_layers import golden_input, golden_layer
from torch import nn

from internimage.export import operator_form
from internimage.layers import DCNv3, DeformConv2d, ModulatedDeformConv2d, for_onnx
from internimage.layers.deform_conv import DeformConv
from internimage.layers.linear import Linear
from internimage.ops import dcnv3, onnx_forms
from internimage.ops.arguments import as_pair
from internimage.ops.sampling import DCNV3, Geometry, num_points

FORMS = ["deform-conv", "grid-sample"]
OPSET = {"deform-conv": {}, "grid-sample": {"opset_version": 18}}
on_forms = pytest.mark.parametrize("form", FORMS)
OPERATOR = {"deform-conv": "DeformConv", "grid-sample": "GridSample"}


def export(parts, arguments, folder, form) -> tuple[File, list[torch.Tensor]]:
    """A file of several modules in float32, and what it computes."""
    file = File(Many(parts), (arguments,), folder, form, **OPSET[form])
    assert file.counts()[OPERATOR[form]] == len(parts) and set(file.opset) == {""}
    return file, file(*(t for tensors in arguments for t in tensors))


# ---- the operators


def run_node(operator, inputs, attributes, *, dtype, shape, version) -> torch.Tensor:
    """`torch.onnx.ops.symbolic`, computed by onnxruntime from a file with this node alone."""
    tensors = {f"input{i}": t.detach().contiguous() for i, t in enumerate(inputs) if t is not None}
    names = [f"input{i}" if t is not None else "" for i, t in enumerate(inputs)]
    assert dtype == torch.float32
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes)
        for name, sizes in [*((name, t.shape) for name, t in tensors.items()), ("output", shape)]
    ]
    node = onnx.helper.make_node(operator, names, ["output"], **attributes)
    graph = onnx.helper.make_graph([node], "node", values[:-1], values[-1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", version)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: t.numpy() for name, t in tensors.items()})[0])


def run_grid_sample(images, grid, mode, padding_mode, align_corners) -> torch.Tensor:
    """`torch.nn.functional.grid_sample`, likewise: GridSample with the attributes of the same names."""
    attributes = {"mode": mode, "padding_mode": padding_mode, "align_corners": int(align_corners)}
    shape = (*images.shape[:2], *grid.shape[1:3])
    return run_node("GridSample", [images, grid], attributes, dtype=images.dtype, shape=shape, version=16)


@pytest.fixture
def node_by_node(monkeypatch):
    """The forms run in eager, but their nodes in onnxruntime: exporting takes half a second for each."""
    monkeypatch.setattr(torch.onnx.ops, "symbolic", run_node)
    monkeypatch.setattr(nn.functional, "grid_sample", run_grid_sample)


class Call(nn.Module):
    """One call of DCNv3 on given tensors."""

    def __init__(self, arguments: dict) -> None:
        super().__init__()
        self.geometry = Geometry(*schema(arguments))

    def forward(self, input, offset, mask):
        form = onnx_forms.current_form()
        offset = form.offsets(self.geometry, DCNV3).of_map(offset, -1)
        return form.dcnv3(input, offset, form.masks(self.geometry, DCNV3).of_map(mask, -1), self.geometry)


@on_forms
@pytest.mark.parametrize("name", golden.cases("op"))
def test_golden_operator(name, form, node_by_node):
    """The numbers of the official code, in float32."""
    tensors, arguments = golden_problem(golden.cases("op")[name])
    with operator_form(form):
        assert_close(Call(arguments)(*(t.float() for t in tensors[:3])), golden.tensors("op")[f"{name}/output"])


class Predicted(nn.Module):
    """DCNv3 whose offset and mask two linear layers predict, as in the layer.

    All its numbers are small multiples of 1/8, so that offsets and logits are exact in float32, whatever the order of
    sums. Offsets reach some pixels, to points outside the image, too.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        points = geometry.groups * num_points(geometry.kernel_size, geometry.remove_center)
        self.offset, self.mask = Linear(4, points * 2), Linear(4, points)
        for parameter in self.parameters():
            parameter.data = torch.randint(-8, 9, parameter.shape) / 8

    def forward(self, input, query):
        return for_onnx.dcnv3(self, input, query, Linear)

    def expected(self, input, query):
        """By the formula, in float64."""
        offset, mask = (nn.functional.linear(query, layer.weight, layer.bias) for layer in (self.offset, self.mask))
        return oracle.forward(input, offset, mask, *self.geometry)


def geometries(count: int) -> list[Geometry]:
    """Random ones. Every argument has all its values, and pairs have unequal ones."""
    draw, found = random.Random(0), []
    while len(found) < count:
        remove_center = draw.random() < 0.3
        sides = [1, 3, 5] if remove_center else [1, 2, 3, 4, 5]

        def pair(values):
            return draw.choice(values), draw.choice(values)

        kernel_size = pair(sides)
        if remove_center and kernel_size == (1, 1):
            continue
        window = pair([1, 2, 3]), pair([0, 1, 2, 3]), pair([1, 2, 3])
        scale = draw.choice([0.5, 0.75, 1.0, 1.0, 1.5, 2.0])
        found.append(Geometry(kernel_size, *window, draw.choice([1, 2, 3]), scale, remove_center, True))
    return found


def problem(geometry: Geometry, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An image of up to 16 pixels a side, and a query, for `Predicted`."""
    draw = random.Random(seed)
    window = list(zip(geometry.kernel_size, geometry.padding, geometry.dilation))
    size = [max(1, d * (k - 1) + 1 - 2 * p) + draw.randint(0, 3) for k, p, d in window]
    ho, wo = oracle.output_size(size, *geometry[:4])
    n, channels = draw.choice([1, 2]), geometry.groups * draw.choice([1, 2, 5])
    return torch.rand(n, *size, channels) * 2 - 1, torch.randint(-4, 5, (n, ho, wo, 4)) / 8


@on_forms
@torch.no_grad()
def test_random_geometries(form, node_by_node):
    """DeformConv deviates from the formula by at most 2e-6 of the image's range: its locations are exact, so what is
    left are the roundings of at most 25 factors, which sum to 1, and of their products and sums: 30 in a row, of 6e-8
    each, in numbers that are at most 1.

    GridSample's locations are relative to the image's size and are not: in numbers of up to 3, four roundings of 1.2e-7
    for 8 pixels, so 1e-5 pixels at most, in both directions, where the image has a slope of up to 2.
    """
    all_geometries = geometries(200)
    assert {g.kernel_size for g in all_geometries} >= {(2, 3), (4, 1), (1, 4), (5, 5), (2, 2)}
    limit = {"deform-conv": 2e-6, "grid-sample": 4e-5}[form]
    for seed, geometry in enumerate(all_geometries):
        part, tensors = Predicted(geometry), problem(geometry, seed)
        with operator_form(form):
            output = part(*tensors)
        expected = part.expected(*tensors)
        assert output.shape == expected.shape, geometry
        deviation = (output - expected).abs().max().item()
        assert deviation <= limit, f"{geometry}: deviates by {deviation:.1e}"


@pytest.mark.parametrize(
    "kernel_size, offset_scale, remove_center", [(3, 1.0, False), (3, 2.0, True), ((2, 4), 0.5, False)]
)
def test_points_that_are_nowhere(kernel_size, offset_scale, remove_center, node_by_node):
    """DeformConv takes nothing from a point at NaN, at infinity or far away, as our kernel."""
    options = dict(kernel_size=as_pair(kernel_size, "", 1), padding=(1, 2), groups=2, offset_scale=offset_scale)
    options |= dict(remove_center=remove_center, softmax=True)
    tensors = [t.float() for t in oracle.draw(0, 2, (6, 7), 3, **options)[:3]]
    offset = tensors[1].view(-1)
    for value in (math.nan, math.inf, -math.inf, 1e30, -1e30):
        offset[torch.randperm(offset.numel())[: offset.numel() // 20]] = value
    output = Call(options)(*tensors)
    assert_close(output, dcnv3(*tensors, **options), 2e-6)  # measured: 3e-7
    assert_close(output, oracle.forward(*tensors, **options), 1e-5)


# ---- the layers


@on_forms
def test_golden_layer(form, tmp_path):
    """The numbers of the official module, in float32."""
    cases = golden.cases("module")
    parts = [golden_layer(case, torch.float32, "cpu") for case in cases.values()]
    _, outputs = export(parts, [(golden_input(case)[0].float(),) for case in cases.values()], tmp_path, form)
    for name, output in zip(cases, outputs, strict=True):
        assert_close(output, golden.tensors("module")[f"{name}/output"], name=name)


class Adapted(Linear):
    """Stands for a layer that computes more than its weight and bias tell, as adapters do."""

    def forward(self, input):
        return super().forward(input) + 0.25


@on_forms
def test_predictors_of_another_kind(form, tmp_path):
    """A layer in place of `offset` and `mask`, one without a bias, and a hook: what they compute counts."""
    layers = [DCNv3(8, groups=2, offset_scale=1.5) for _ in range(3)]
    layers.append(ModulatedDeformConv2d(8, 8, 3, padding=1, offset_groups=2))
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
    layers[0].offset, layers[0].mask = Adapted(8, 36), Adapted(8, 18)
    layers[1].offset.register_forward_hook(lambda module, inputs, output: output * 1.5 + 0.25)
    layers[3].conv_offset.register_forward_hook(lambda module, inputs, output: output * 1.5 + 0.25)
    layers[2].offset.bias = None
    x = torch.randn(2, 8, 8, 8)
    _, outputs = export(layers, [(x,)] * 4, tmp_path, form)
    for layer, output in zip(layers, outputs, strict=True):
        with torch.no_grad():
            assert_close(output, layer.double()(x.double()), 1e-5)  # measured: 1e-6; without the change: 1e-1


@on_forms
def test_half_precision(form, tmp_path):
    """The coordinates of GridSample stay in float32: onnxruntime has no other, and half's would be too coarse."""
    layer = DCNv3(16, groups=4)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    layer, x = layer.half(), torch.randn(1, 24, 24, 16).half()
    file, (output,) = export([layer], [(x,)], tmp_path, form)
    assert output.dtype == torch.float16
    assert_close(output, layer.double()(x.double()), TOLERANCE[torch.float16])


def convolutions(count: int) -> list[tuple[DeformConv, torch.Tensor]]:
    """Random layers of deformable convolution, with images."""
    draw, found = random.Random(1), []
    for _ in range(count):
        kernel, stride, dilation = ((draw.randint(1, most), draw.randint(1, most)) for most in (4, 3, 3))
        padding, groups, offset_groups = (
            (draw.randint(0, 3), draw.randint(0, 3)),
            draw.choice([1, 2]),
            draw.choice([1, 3]),
        )
        layer = draw.choice([DeformConv2d, ModulatedDeformConv2d])(
            6, 4, kernel, stride, padding, dilation, groups, draw.random() < 0.5, offset_groups
        )
        nn.init.normal_(layer.conv_offset.weight, std=0.2)
        nn.init.normal_(layer.conv_offset.bias)
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
        size = [max(1, d * (k - 1) + 1 - 2 * p) + draw.randint(0, 4) for k, p, d in zip(kernel, padding, dilation)]
        found.append((layer, torch.randn(draw.choice([1, 2]), 6, *size)))
    return found


@on_forms
@torch.no_grad()
def test_deformable_convolutions(form, node_by_node):
    """Against the papers' sums in float64. float32 rounds offsets of some pixels, and a place that is off by a pixel's
    1e-6 changes a sample by as much: 2e-5 allows for tens of samples that are off in the same direction."""
    for layer, x in convolutions(40):
        with operator_form(form):
            output = for_onnx.deform_conv2d(layer, x, type(layer.conv_offset))
        layer, x = layer.double(), x.double()
        predicted = layer.conv_offset(x)
        points = predicted.shape[1] // (3 if layer.modulated else 2)
        mask = predicted[:, 2 * points :].sigmoid() if layer.modulated else None
        given = x, predicted[:, : 2 * points], layer.weight, layer.bias, mask, output
        window = layer.stride, layer.padding, layer.dilation
        assert_close(output, deform_oracle.forward(deform_oracle.Problem(*given, *window)), 2e-5, str(layer))
