# SPDX-License-Identifier: MIT
"""AOTInductor packages for the CPU: built by the command, loaded, and run at sizes that were not traced."""

import subprocess
import sys

import pytest
import torch
from runs import environment
from test_export import CLASSES, small_model

from internimage.cli import main
from internimage.engine.create import data_config
from internimage.export.description import ExportError
from internimage.export.runtime import open_exported
from internimage.models.timm_folder import save_model

pytestmark = pytest.mark.slow  # AOTInductor compiles for a minute or two


@pytest.mark.parametrize("options", [[], ["--decompose"]], ids=["operator", "decompose"])
def test_a_package(options, tmp_path):
    """Against the model in float64: float32 is off by 1e-6 of the logits' range."""
    model = small_model()
    (tmp_path / "mine").mkdir()
    save_model(model, tmp_path / "mine", CLASSES, data_config(model, 64))
    path = tmp_path / "m.pt2"
    command = ["export", "--model", str(tmp_path / "mine"), "--output", str(path), "--format", "aoti", *options]
    assert main(command) == 0

    package, double = open_exported(path), small_model().double()
    assert package.description.classes == tuple(CLASSES) and package.description.device == "cpu"
    for shape in ((1, 3, 47, 64), (5, 3, 128, 70)):
        image = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            exact = double(image.double())
        assert float((package(image) - exact).abs().max()) <= 1e-5 * float(exact.max() - exact.min())
    with pytest.raises(ExportError, match=r"cannot run on images \(1, 1, 64, 64\)"):  # and not read beyond the image
        package(torch.zeros(1, 1, 64, 64))

    code = path.with_name("m.pt2.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    assert 'os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"' in code and ("import internimage" in code) == (not options)
    code += f"import sys\nassert logits.shape == (1, 3) and ('internimage' in sys.modules) == {not options}\n"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True)
