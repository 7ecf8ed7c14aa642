# SPDX-License-Identifier: MIT
"""Exported programs in processes without Python: the schemas they find there, and the C++ program of docs/deploy.md."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from test_export import small_model

from internimage.engine.create import data_config
from internimage.export import program
from internimage.export.export import Request, export_model

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the sources, not an installed package")


def schemas():
    """The texts in csrc/schema.cpp, by operator."""
    text = (ROOT / "csrc" / "schema.cpp").read_text()
    found = ["".join(re.findall(r'"(.*?)"', each)) for each in re.findall(r"m\.def\((.*?)\);", text, re.DOTALL)]
    return {each.split("(")[0]: each for each in found}


def deformable_resnet():
    torch.manual_seed(0)
    model = timm.create_model("dcnv2_resnet18", num_classes=3).eval()
    for name, parameter in model.named_parameters():
        if "offset" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


MODELS = {"InternImage": small_model, "ResNet": deformable_resnet}


def test_the_schemas_are_those_of_python():
    """Letter by letter: a program that was exported here calls them there."""
    for name, text in schemas().items():
        assert f"internimage::{text}" == str(getattr(torch.ops.internimage, name).default._schema)


@pytest.mark.parametrize("kind", MODELS)
def test_packages_call_no_others(kind):
    image = torch.randn(3, 3, 70, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = MODELS[kind]().double()(image.double())
    traced = program.trace(MODELS[kind](), torch.zeros(2, 3, 64, 64), ("batch", "height", "width"), {})
    for plain, called in ((False, "dcnv3" if kind == "InternImage" else "deform_columns"), (True, None)):
        with torch.no_grad():
            written_out = traced.run_decompositions(program.decompositions("aoti", plain))
            found = written_out.module()(image)
        assert program.own_operators(written_out) == ([f"internimage.{called}.default"] if called else [])
        assert called is None or called in schemas()
        assert float((found - exact).abs().max()) <= 1e-5 * float(exact.max() - exact.min())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of loaded libraries")
def test_python_does_not_load_the_schemas():
    """torch would end the process: internimage.ops has registered the same."""
    loaded = Path("/proc/self/maps").read_text()
    assert "/_C.abi3.so" in loaded and "_schema" not in loaded


@pytest.mark.slow  # AOTInductor compiles for a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("kind, plain", [("InternImage", False), ("ResNet", False), ("InternImage", True)])
def test_the_program_of_the_docs(kind, plain, tmp_path):
    """As the page has it: its code, its commands, and the logits of the model."""
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```cpp\n(.*?)```", text, re.DOTALL)
    (commands,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) <= 30
    (tmp_path / "classify.cpp").write_text(code)
    model = MODELS[kind]()
    export_model(model, data_config(model, 64), "random", tmp_path / "tiny.pt2", Request("aoti", decompose=plain))
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    image.numpy().tofile(tmp_path / "image.f32")
    if plain:
        commands = commands.rsplit(" $(", 1)[0]
    result = subprocess.run(["bash", "-ec", commands], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        exact = model.double()(image.double()).numpy()[0]
    found = np.array([float(line) for line in result.stdout.split()])
    assert np.abs(found - exact).max() <= 1e-5 * np.ptp(exact)
    short = commands.replace("224 224", "225 224").splitlines()
    result = subprocess.run(["bash", "-ec", short[-1]], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, "image.f32 is too short\n")
