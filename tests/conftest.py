# SPDX-License-Identifier: MIT
"""Devices, seeds, the table of tolerances, shared fixtures, and which skips are allowed."""

import importlib.util
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import hub_server
import pytest
import torch

# huggingface_hub reads these on import, so they are set first: no test uses the real Hub or the user's cache
HUB = hub_server.Hub()
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
    del os.environ[name]
os.environ["HF_ENDPOINT"] = HUB.url
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="internimage-tests-")
os.environ["HF_HUB_DISABLE_XET"] = "1"  # the server has plain HTTP only
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

# cuDNN would round the inputs of the depthwise convolution to 10 bits, which is more than TOLERANCE
torch.backends.cudnn.allow_tf32 = False

INSTALLED = importlib.util.find_spec("onnx") is not None and importlib.util.find_spec("onnxruntime") is not None
if sys.version_info < (3, 11) or not (INSTALLED or os.environ.get("INTERNIMAGE_FAIL_ON_SKIP")):
    # onnxruntime has DeformConv since 1.25, which is not for Python 3.10. Neither is in the folder of `make gpu-pack`
    _needs_onnx = re.compile("^(import|from) (onnx|onnxruntime|exported|test_export|test_onnx_models)\\b", re.MULTILINE)
    _files = Path(__file__).parent.glob("test_*.py")
    collect_ignore = [path.name for path in _files if _needs_onnx.search(path.read_text(encoding="utf-8"))]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# dtype -> largest deviation, relative to the largest absolute value of the expected tensor. float64 and float32: as
# required by the goldens. The 16-bit types round input, output and every intermediate between operators.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None, name: str = "") -> None:
    """Compare the largest deviation, relative to the largest expected value, with the tolerance (of actual's dtype)."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    limit = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    scale = expected.abs().max().clamp_min(1e-30)
    deviation = ((actual - expected).abs().max() / scale).item()
    assert deviation <= limit, f"{name}: deviation {deviation:.2e} of the largest value, allowed {limit:.0e}"


@pytest.fixture
def local_hub():
    """The server of hub_server.py, empty, at the address that huggingface_hub uses."""
    HUB.reset()
    HUB.start()
    yield HUB
    HUB.start()
    HUB.reset()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# ---- runs on the module's `data` fixture, for tests that resume or inspect them


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """A run that was stopped after step 7 of 9, with checkpoints of steps 6 and 7."""
    import runs  # imports huggingface_hub, which must come after the variables above

    run = tmp_path_factory.mktemp("stopped") / "run"
    runs.stop_at(runs.settings(data, run), 7)
    return run


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that was not stopped."""
    import runs

    run = tmp_path_factory.mktemp("whole") / "run"
    runs.finetune(runs.settings(data, run), progress=False)
    return run


@pytest.fixture
def copy(stopped, tmp_path):
    """A copy of the stopped run that a test may damage."""
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


# Files that take more than half a minute, longest first. With several workers, each file runs in one of them; long ones
# start first, so that no worker has one left at the end while the others are idle.
LONG = [
    "test_faults", "test_nvrtc", "test_cuda_host", "test_training", "test_cuda_variants", "test_cuda_compile",
    "test_benchmark", "test_cpu_kernels", "test_models", "test_models_goldens", "test_cuda_build", "test_gpu_check",
    "test_hub", "test_distributed", "test_dcnv3", "test_dcn_resnet", "test_setup", "test_export", "test_nodes",
    "test_saliency", "test_onnx_models", "test_compile",
]  # fmt: skip


def pytest_collection_modifyitems(config, items) -> None:
    if hasattr(config, "workerinput") and not config.pluginmanager.hasplugin("randomly"):
        items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_sessionfinish(session, exitstatus) -> None:
    """With INTERNIMAGE_FAIL_ON_SKIP, tests may only be skipped for lack of a GPU."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("INTERNIMAGE_FAIL_ON_SKIP") or reporter is None:
        return
    unexpected = [report for report in reporter.stats.get("skipped", []) if "needs a GPU" not in str(report.longrepr)]
    if unexpected and exitstatus == 0:
        reporter.write_line(f"{len(unexpected)} tests were skipped that could have run:", red=True)
        for report in unexpected:
            reporter.write_line(f"  {report.nodeid}: {report.longrepr[-1]}", red=True)
        session.exitstatus = 1
