# SPDX-License-Identifier: MIT
"""Models that are exported to ONNX as anybody does it, in both forms of the operators; and how the form is chosen."""

import subprocess
import sys

import onnx
import pytest
import torch
import views
from conftest import assert_close
from exported import DYNAMIC, File
from runs import ROOT, environment
from torch import nn

from internimage.export import operator_form
from internimage.layers import DCNv3, DeformConv2d, ModulatedDeformConv2d
from internimage.layers.deform_conv import DeformConv
from internimage.ops import onnx_forms

on_forms = pytest.mark.parametrize("form", ["deform-conv", "grid-sample"])

# what huge and giant have, in a model with few layers
HUGE = {**views.HUGE, "depths": (1, 1, 1, 1), "stage3_post_norm_blocks": (0,), "channels": 16, "attentive_head": True}
MODELS = {
    "atto": ("internimage_atto", {}),
    "huge": ("internimage_atto", HUGE),
    "resnet": ("small resnet", {}),
}
SIZES = [(1, 32, 64), (5, 96, 64), (2, 64, 64)]  # none of them that of the example


def model(case: str, **arguments) -> nn.Module:
    name, own = MODELS[case]
    return views.model(name, **own, **arguments).float()


def deformable(module: nn.Module) -> int:
    """How many layers have learned offsets."""
    return sum(isinstance(layer, (DCNv3, DeformConv)) for layer in module.modules())


@torch.no_grad()
def assert_equal_to(file: File, module: nn.Module) -> None:
    """The file against the model in float64, at other sizes and batches than those of the example.

    float32 deviates by 1e-6 in these models, in eager as in onnxruntime (1.5e-6 at most); a point at a wrong place by
    1e-2 or more.
    """
    for n, *size in SIZES:
        x = torch.randn(n, 3, *size)
        expected = module.double()(x.double())
        outputs, expected = file(x), expected if isinstance(expected, list) else [expected]
        for output, right in zip(outputs, expected, strict=True):
            assert_close(output, right, 1e-5)
    module.float()


def example() -> torch.Tensor:
    return torch.randn(3, 3, 64, 96)


DIMENSIONS = ({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},)


@pytest.mark.parametrize("case", MODELS)
def test_models_without_a_word(case, tmp_path):
    """The plain call of torch.onnx.export: a node of standard ONNX a layer. It leaves the model as it is."""
    module, x = model(case), example()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    with torch.no_grad():
        before = module(x)
    file = File(module, (x,), tmp_path, dynamic_shapes=DIMENSIONS)
    assert set(file.opset) == {""} and file.opset[""] >= 19
    counts = file.counts()
    assert counts["DeformConv"] == deformable(module) and not counts["GridSample"]
    assert not any("::" in name for name in counts)
    # torch writes the mean over a map as a mean and a Gather; nothing else has one
    assert len(file.on_activations("Gather", "GatherND", "GatherElements")) <= counts["ReduceMean"]
    assert_equal_to(file, module)
    with torch.no_grad():
        assert torch.equal(module(x), before)
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


def test_feature_maps(tmp_path):
    """`features_only`, exported in inference mode, as some scripts do."""
    module = model("atto", features_only=True, depths=(1, 1, 1, 1))
    with torch.inference_mode():
        file = File(module, (example(),), tmp_path, dynamic_shapes=DIMENSIONS)
    counts = file.counts()
    assert counts["DeformConv"] == 4 and not file.on_activations("Gather", "GatherND", "GatherElements")
    assert_equal_to(file, module)


class Layers(nn.Module):
    """A layer of each kind, with a grid that the image's size does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.first = DCNv3(8, (2, 3), 2, (1, 2), (1, 2), 2, 1.5, dw_kernel_size=(2, 5))
        self.second = ModulatedDeformConv2d(8, 8, (3, 2), (1, 2), 1, offset_groups=2)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x):
        return self.second(self.first(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@on_forms
def test_layers_with_dynamic_shapes(form, tmp_path):
    layers = Layers()
    options = {"dynamic_shapes": DIMENSIONS, **({"opset_version": 18} if form == "grid-sample" else {})}
    file = File(layers, (torch.randn(3, 8, 13, 16),), tmp_path, form, **options)
    if form == "grid-sample":
        assert file.opset == {"": 18}
        assert_grid_samples(file, 2)
    for size in ((1, 8, 16, 17), (5, 8, 9, 8), (0, 8, 9, 8)):
        x = torch.randn(size)
        with torch.no_grad():
            expected = layers.double()(x.double())
        layers.float()
        assert_close(file(x)[0], expected, 1e-5)  # measured: 1e-6


def assert_grid_samples(file: File, layers: int) -> None:
    """One node a layer, whose attributes are those that runtimes have fast code for."""
    nodes = [node for node in file.nodes if node.op_type == "GridSample"]
    assert len(nodes) == layers and not file.counts()["DeformConv"]
    for node in nodes:
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert attributes["mode"] == (b"bilinear" if file.opset[""] < 20 else b"linear")
        assert attributes.get("padding_mode", b"zeros") == b"zeros" and attributes.get("align_corners", 0) == 0


@pytest.mark.parametrize("case, opset", [("atto", 16), ("huge", 18), ("resnet", 20), ("resnet", 16)])
def test_the_torchscript_exporter(case, opset, tmp_path):
    """It takes the form of plain torch."""
    module = model(case)
    axes = {"x": {0: "batch", 2: "height", 3: "width"}}
    options = dict(dynamo=False, input_names=["x"], dynamic_axes=axes, opset_version=opset)
    file = File(module, (example(),), tmp_path, "grid-sample", **options)
    assert file.opset == {"": opset}
    assert_grid_samples(file, deformable(module))
    assert_equal_to(file, module)


@pytest.mark.parametrize("layer", [DCNv3(4), DeformConv2d(4, 4, 1)], ids=lambda layer: type(layer).__name__)
def test_the_torchscript_exporter_without_the_form(layer, tmp_path):
    with pytest.raises(RuntimeError, match=r'no DeformConv: .*dynamo=True.*operator_form\("grid-sample"\)'):
        File(layer, (torch.randn(1, 4, 4, 4),), tmp_path, dynamo=False)


# ---- the choice


def test_the_choice_ends_with_its_block():
    deform, grid = onnx_forms.FORMS.values()
    assert onnx_forms.current_form() is deform
    with operator_form("grid-sample"):
        assert onnx_forms.current_form() is grid
        with operator_form("deform-conv"):
            assert onnx_forms.current_form() is deform
        with pytest.raises(ZeroDivisionError), operator_form("deform-conv"):
            1 / 0  # noqa: B018
        assert onnx_forms.current_form() is grid
    assert onnx_forms.current_form() is deform


def test_a_form_that_does_not_exist():
    with pytest.raises(ValueError, match="operator_form must be 'deform-conv' or 'grid-sample', got 'gridsample'"):
        with operator_form("gridsample"):
            pass


def test_nothing_of_onnx_is_imported_before_an_export():
    code = (
        "import sys, timm, internimage, internimage.export\n"
        "model = timm.create_model('internimage_atto')\n"
        "sys.exit(', '.join(name for name in sys.modules if name.split('.')[0].startswith('onnx')) or None)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment()
    )
    assert result.returncode == 0, result.stderr
