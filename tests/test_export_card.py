# SPDX-License-Identifier: MIT
"""The cards of exported files: which runtimes they name, and the code for each. Other tests run the code."""

import ast
import re

import pytest

from internimage.export.card import card
from internimage.export.description import Description


def text(**changes) -> str:
    values = dict(
        format="onnx", architecture="internimage_tiny", weights="tag", checksum="0" * 64, license="mit",
        classes=("cat", "fox"), input_size=(3, 224, 288), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic",
        crop_pct=1.0, crop_mode="center", operator="grid-sample", opset=18,
    )  # fmt: skip
    return card(Description(**{**values, **changes}), "m.onnx", 2**20)


@pytest.mark.parametrize(
    "changes, runtimes, trtexec",
    [
        ({}, ["onnxruntime", "openvino"], True),
        ({"operator": ""}, ["onnxruntime", "openvino"], True),  # no deformable layer
        ({"dtype": "float16"}, ["onnxruntime", "openvino"], True),
        ({"features": ("stride4", "stride8"), "classes": ()}, ["onnxruntime", "openvino"], True),
        ({"quantization": "dynamic"}, ["onnxruntime", "openvino"], False),
        ({"quantization": "static"}, ["onnxruntime"], False),
        ({"preprocessed": True}, ["onnxruntime"], False),
        ({"operator": "deform-conv", "opset": 20}, ["onnxruntime"], False),
    ],
)
def test_the_runtimes_of_a_file(changes, runtimes, trtexec):
    """Code for those that give the right answer, and how to export for the others."""
    found = text(**changes)
    blocks = re.findall(r"```python\n(.*?)```", found, re.DOTALL)
    assert [name for block in blocks for name in ("onnxruntime", "openvino") if f"import {name}\n" in block] == runtimes
    for block in blocks:
        ast.parse(block)
        shape = "(1, 480, 640, 3), np.uint8" if changes.get("preprocessed") else "(1, 3, 224, 288), np.float"
        assert f"image = np.zeros({shape}" in block
        assert "stride4, stride8 = " in block if "features" in changes else "s,) = " in block
    assert ("trtexec --onnx=m.onnx --minShapes=image:1x3x224x288 " in found) == trtexec
    assert ("for these export with" in found or "for it export without" in found) == (not trtexec)


def test_a_fixed_size_has_no_profile():
    assert "trtexec --onnx=m.onnx\n" in text(open=())
