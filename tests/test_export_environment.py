# SPDX-License-Identifier: MIT
"""The code of a card in an environment with onnxruntime and numpy alone, as whoever is given a file has it."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).resolve().parent.parent / "scripts" / "checks"
if not CHECKS.exists():
    pytest.skip("needs the sources, not an installed package", allow_module_level=True)
sys.path.insert(0, str(CHECKS))

import deploy_check  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from test_export import CLASSES, small_model  # noqa: E402

from internimage.cli import main  # noqa: E402
from internimage.engine.create import data_config  # noqa: E402
from internimage.models.timm_folder import save_model  # noqa: E402

pytestmark = pytest.mark.slow  # installs onnxruntime: 30 s


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of the environment, in which neither torch nor onnx can be imported."""
    try:
        return deploy_check.environment(tmp_path_factory.mktemp("environment"), ("onnxruntime", "numpy"))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"pip cannot install onnxruntime: {(error.stderr or str(error)).strip().splitlines()[-1]}")


@pytest.mark.parametrize(
    "options",
    [[], ["--operator", "grid-sample"], ["--quantize", "dynamic"], ["--with-preprocess"]],
    ids=["plain", "grid-sample", "int8", "with-preprocess"],
)
def test_the_code_of_the_card_runs_with_onnxruntime_alone(options, python, tmp_path):
    """And the outputs are the model's: of the logits' range int8 is off by a hundredth, and others by 1e-6."""
    model = small_model()
    (tmp_path / "mine").mkdir()
    save_model(model, tmp_path / "mine", CLASSES, data_config(model, 64))
    assert main(["export", "--model", str(tmp_path / "mine"), "--output", str(tmp_path / "m.onnx"), *options]) == 0
    code = deploy_check.code_of(tmp_path / "m.onnx.md", "onnxruntime")
    output = "probabilities" if "--with-preprocess" in options else "logits"
    found = deploy_check.run(python, "-c", f"{code}print(*{output}[0])", cwd=tmp_path)
    with torch.no_grad():
        if output == "logits":
            expected = model.double()(torch.zeros(1, 3, 64, 64, dtype=torch.float64))[0].numpy()
            tolerance = (5e-2 if "--quantize" in options else 1e-5) * np.ptp(expected)
        else:  # a black image is as black when it was resized
            mean, std = (torch.tensor(data_config(model, 64)[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
            expected = model((-mean / std).expand(1, 3, 64, 64)).softmax(-1)[0].numpy()
            tolerance = 1e-5
    assert np.abs(np.array(found.split(), float) - expected).max() <= tolerance
